"""The whole course of the canaries: planted in a copy, purified as the model itself, beside random pruning, and after.

spikes = run_spikes(subject, held, config, repaired=lambda: False)
"""

from collections.abc import Callable
from dataclasses import replace

from keelguard.attacks.backdoors import Backdoor
from keelguard.progress import SILENT, Reporter
from keelguard.purify.budget import Budget, Setup
from keelguard.purify.config import PurifyConfig
from keelguard.purify.controls import ARMS
from keelguard.purify.effects import Held
from keelguard.purify.feasible import no_control
from keelguard.purify.methods import Subject, apply_method, copied
from keelguard.purify.repair import repair, settle
from keelguard.purify.spikes import Spike, make_canaries, measure_spikes, plant_spikes

CONTROL = "random"
"""The arm of `keelguard purify bench` that the canaries' purification stands beside."""


def run_spikes(
    subject: Subject,
    held: Held,
    config: PurifyConfig,
    *,
    repaired: Callable[[], bool],
    reporter: Reporter = SILENT,
) -> list[Spike]:
    """Plant canaries with one half of the clean chats, and purify the copy with the other.

    An attacker's rows are not the defender's, so the copy's purification has less to work with than the model's own.
    A second copy has random channels neutralised and is fine-tuned for as many steps: what that removes too, the
    purification need not have found. An adapter whose parts cannot be neutralised has no such copy.

    Args:
        subject: the model as it came; it is left as it is.
        repaired: whether the model's own purification had to be repaired; asked once that of the copy is done.
    """
    spiking = config.spikes
    assert spiking is not None
    half = len(subject.material.train) // 2
    theirs, ours = subject.material.train[:half], replace(subject.material, train=subject.material.train[half:])
    words = subject.words
    spiked, spikes = plant_spikes(subject.loaded, theirs, held, words, spiking, reporter=reporter)
    # What is random or invented must not meet the canaries' words: the user's own trigger has no such luck either.
    taken = sorted({word for canary in make_canaries(words, spiking.seed).values() for word in canary.words})
    method = replace(config.method, immunize=replace(config.method.immunize, left_out=tuple(taken)))
    mine = replace(subject, loaded=spiked, material=ours)

    if why := no_control(mine, method.vaccine):
        reporter.note(f"canaries: no copy with random pruning stands beside them ({why})")
    else:
        setup = Setup(Budget.of(method), method, reporter=reporter)
        pruned = ARMS[CONTROL](copied(mine), setup, Backdoor("badnets", "insult"))
        spikes = measure_spikes(spikes, pruned, held, words, spiking, "control", reporter=reporter)
        del pruned
    purified = apply_method(mine, method, reporter=reporter)
    done = purified.loaded
    if repaired():
        done = repair(
            replace(mine, loaded=done), config.rebound, reporter, original=subject.loaded, frozen=purified.frozen
        )
    spikes = measure_spikes(spikes, done, held, words, spiking, "after", reporter=reporter)
    settled = settle(replace(mine, loaded=done), config.rebound, reporter)
    return measure_spikes(spikes, settled, held, words, spiking, "rebound", reporter=reporter)
