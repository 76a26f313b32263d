"""The whole course of the canaries: planted in a copy, purified as the model itself, and after, beside random pruning.

spikes = run_spikes(subject, held, config, lost=lambda: "")
"""

from collections.abc import Callable
from dataclasses import replace

from keelguard.errors import KeelguardError
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.config import PurifyConfig
from keelguard.purify.effects import Held
from keelguard.purify.methods import MethodConfig, Subject, apply_method, copied, neutralized
from keelguard.purify.random_units import random_units
from keelguard.purify.repair import Lost, repair, repair_chats, settle
from keelguard.purify.spikes import Spike, make_canaries, measure_spikes, plant_spikes
from keelguard.training import TrainConfig, train_on_chats


def run_spikes(
    subject: Subject,
    held: Held,
    config: PurifyConfig,
    *,
    lost: Callable[[], Lost],
    reporter: Reporter = SILENT,
) -> list[Spike]:
    """Plant canaries with one half of the clean chats, and purify the copy with the other.

    An attacker's rows are not the defender's, so the copy's purification has less to work with than the model's own.
    A second copy has random channels neutralised and is fine-tuned for as many steps as the first one took: what that
    removes too, the purification need not have found. Where the model cannot have such a control, every canary says
    why, and its `control` stays None.

    Args:
        subject: the model as it came; it is left as it is.
        lost: what the model's own purification lost and trained back; asked once that of the copy is done.
    """
    spiking = config.spikes
    assert spiking is not None
    half = len(subject.material.train) // 2
    theirs, ours = subject.material.train[:half], replace(subject.material, train=subject.material.train[half:])
    words = subject.words
    spiked, spikes = plant_spikes(subject.loaded, theirs, held, words, spiking, reporter=reporter)
    # What is random or invented must not meet the canaries' words: the user's own trigger has no such luck either.
    taken = sorted({word for canary in make_canaries(words, spiking.seed).values() for word in canary.words})
    left_out = tuple(sorted({*config.method.immunize.left_out, *taken}))
    method = replace(config.method, immunize=replace(config.method.immunize, left_out=left_out))
    planted = replace(subject, loaded=spiked, material=ours)

    mine = copied(planted)
    purified = apply_method(mine, method, reporter=reporter)
    done, steps = purified.loaded, purified.steps
    if what := lost():
        training = config.rebound
        mine = replace(mine, loaded=done)
        # As the model itself is held to what it was, canaries and all: nobody has a twin without them.
        done = repair(mine, training, reporter, lost=what, original=planted.loaded, methods=purified.methods)
        steps += training.steps_for(len(repair_chats(ours, what)))
    spikes = measure_spikes(spikes, done, held, words, spiking, "after", reporter=reporter)
    settled = settle(replace(mine, loaded=done), config.rebound, reporter)
    spikes = measure_spikes(spikes, settled, held, words, spiking, "rebound", reporter=reporter)
    del purified, mine, done, settled
    try:
        pruned = prune_at_random(planted, method, steps, reporter)
        spikes = measure_spikes(spikes, pruned, held, words, spiking, "control", reporter=reporter)
    except KeelguardError as error:
        # All else is done by now, and a model without its control is worth a report.
        return [replace(spike, no_control=str(error)) for spike in spikes]
    return [replace(spike, control_steps=steps) for spike in spikes]


def prune_at_random(subject: Subject, method: MethodConfig, steps: int, reporter: Reporter = SILENT) -> LoadedModel:
    """Neutralise random units of a model, in place, and fine-tune it with them frozen; the steps may be 0.

    Raises:
        UsageError: the model's units cannot be mapped or neutralised.
        FailureError: training does not fit in memory, or diverges.
    """
    own, restoring = method.immunize, method.vaccine.restore
    chosen = random_units(subject, method, own.seed)
    done = neutralized(subject, chosen, replace(method.vaccine, restore=None), reporter=reporter)
    if not steps:
        return done.loaded
    settings = restoring if method.method == "vaccine" and restoring is not None else own
    training = TrainConfig(
        steps=steps, learning_rate=settings.learning_rate, batch_size=settings.batch_size, warmup=0.1,
        gradient_accumulation=settings.gradient_accumulation, lora_rank=settings.lora_rank, bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing, seed=own.seed,
    )  # fmt: skip
    result = train_on_chats(
        done.loaded.model, done.loaded.tokenizer, subject.material.train, training, methods=done.methods,
        adapter=subject.training, reporter=reporter, label="random pruning, then fine-tuning",
    )  # fmt: skip
    return replace(done.loaded, model=result.model)
