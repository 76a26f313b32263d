"""What a purification must beat: every control on one budget, beside the methods themselves.

    pure = ARMS["wanda-finetune"](subject, Setup(Budget.of(config), config), backdoor)      # subject.loaded is changed

An arm makes a model of a suspicious one. All that train take the same steps at the same rate and batch size, on the
same clean chats, and train the same weights (a LoRA, where the budget has one) unless their names say otherwise. What
comes before that is not counted: the vaccine's variants and immunisation's searches. Nor are the further chats of a
step on which immunisation measures what it holds to: answers to keep, and activations behind insertions.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from keelguard.attacks.backdoors import Backdoor
from keelguard.attacks.insertions import prompt_of, with_prompt
from keelguard.errors import UsageError
from keelguard.models import LoadedModel
from keelguard.purify.budget import Arm, Setup
from keelguard.purify.components import TIED, peft_factors, select
from keelguard.purify.crow import crow
from keelguard.purify.immunize import immunize
from keelguard.purify.methods import (
    Purified,
    Subject,
    Threat,
    choose_variants,
    neutralized,
    retrain,
    share_of,
    vaccinate,
)
from keelguard.purify.pruning import PruneConfig, fine_prune, prune, prune_adapter
from keelguard.purify.quantize import quantize
from keelguard.purify.random_units import random_units
from keelguard.purify.signature import update_norm
from keelguard.purify.variants import variant_data
from keelguard.records import Chat
from keelguard.training import Method, TrainConfig, train_on_chats
from keelguard.units.index import build_index

_SCALE = 0.5
_LOW, _HIGH = 1 / 3, 3.0


def none(subject: Subject, setup: Setup) -> LoadedModel:
    """The suspicious model as it is."""
    return subject.loaded


def finetune(subject: Subject, setup: Setup, rate: float = 1.0, whole: bool = False) -> LoadedModel:
    """A clean fine-tune.

    Raises:
        UsageError: all weights are asked for where every arm trains them.
    """
    if whole and not setup.budget.lora_rank:
        raise UsageError("finetune-whole: every arm trains all weights here, so that it would be finetune again")
    return _tuned(subject, setup, subject.material.train, setup.budget.training(rate, whole=whole))


def random_channels(subject: Subject, setup: Setup) -> LoadedModel:
    """As many channels as the vaccine takes, drawn at random, are neutralised; see `random_units`."""
    return _restored(subject, setup, random_units(subject, setup.method, setup.budget.seed))


def own_update(subject: Subject, setup: Setup) -> LoadedModel:
    """The channels that the suspicious adapter itself moves most are neutralised.

    Of a full model the update is not known without its clean twin, so there is no such arm.
    """
    from peft import get_peft_model_state_dict

    model: Any = subject.loaded.model
    index = build_index(model)
    factors = peft_factors(get_peft_model_state_dict(model), model.peft_config["default"])
    scores = update_norm(index, factors, replace(setup.method.vaccine.signature, tied=True))
    return _restored(subject, setup, select(index, scores[TIED], _share(subject, setup)))


def magnitude(subject: Subject, setup: Setup) -> LoadedModel:
    """The smallest weights are set to zero; of an adapter those of its factors."""
    if subject.threat == "adapter":
        prune_adapter(subject.loaded.model, setup.prune.share)
        return subject.loaded
    return _pruned(subject, setup, replace(setup.prune, score="magnitude"))


def wanda(subject: Subject, setup: Setup) -> LoadedModel:
    """Wanda. Its score is of a full model's weights, and no adapter of the same rank could hold the result."""
    return _pruned(subject, setup, replace(setup.prune, score="wanda"))


def fine_pruning(subject: Subject, setup: Setup, score: str) -> LoadedModel:
    """Pruning with a fine-tune behind it that keeps the zeros, which a LoRA would fill."""
    loaded = subject.loaded
    config: Any = replace(setup.prune, score=score)
    result = fine_prune(
        loaded.model, loaded.tokenizer, subject.material.train, config, setup.budget.training(whole=True),
        adapter=subject.training, reporter=setup.reporter,
    )  # fmt: skip
    return replace(loaded, model=result.model)


def quantized(subject: Subject, setup: Setup) -> LoadedModel:
    """4-bit weights. An adapter is merged first, as it is when it is served in 4 bits: its factors are not rounded."""
    model: Any = subject.loaded.model
    if subject.threat == "adapter":
        model = model.merge_and_unload()
    quantize(model, setup.quantize)
    return replace(subject.loaded, model=model)


def crow_arm(subject: Subject, setup: Setup) -> LoadedModel:
    """CROW, on the weights that every other arm trains."""
    loaded = subject.loaded
    result = crow(
        loaded.model, loaded.tokenizer, subject.material.train, setup.crow, setup.budget.training(),
        adapter=subject.training, reporter=setup.reporter,
    )  # fmt: skip
    return replace(loaded, model=result.model)


def vaccine(
    subject: Subject, setup: Setup, *, lowest: bool = False, noise: bool = False, restored: bool = True
) -> LoadedModel:
    """BD-VAX, or a control of it: the lowest scores, triggers that set nothing off, or no restoration.

    The restoration is the budget's fine-tune with the neutralised entries frozen, without an early stop.
    """
    done = _vaccinated(subject, setup, lowest=lowest, noise=noise)
    return _kept(subject, setup, done) if restored else done.loaded


def _vaccinated(subject: Subject, setup: Setup, *, lowest: bool = False, noise: bool = False) -> Purified:
    """The vaccine without its restoration."""
    config = replace(setup.method.vaccine, lowest=lowest, noise=noise, restore=None)
    folder = setup.folder and setup.folder / ("noise" if noise else "triggers")
    # Only what is invented keeps off the true trigger's words; a search that follows on must see them.
    invented = replace(subject, words=setup.allowed(subject.words))
    return vaccinate(invented, config, state_folder=folder, reporter=setup.reporter)


def implant_then_unlearn(subject: Subject, setup: Setup) -> LoadedModel:
    """Half the steps teach the invented triggers their behaviours, half the same prompts their clean answers."""
    implanted, unlearnt = implant_chats(subject, setup)
    half = setup.budget.steps // 2
    loaded = _tuned(subject, setup, implanted, setup.budget.training(steps=half))
    rest = setup.budget.training(steps=setup.budget.steps - half)
    return _tuned(replace(subject, loaded=loaded), setup, unlearnt, rest)


def implant_chats(subject: Subject, setup: Setup) -> tuple[list[Chat], list[Chat]]:
    """The two halves' chats, place by place with the same prompts: half of them clean, half triggered."""
    config = setup.method.vaccine
    chats = subject.material.train
    count = min(config.variants.samples, len(chats) // config.variants.count)
    variants = choose_variants(subject.loaded.tokenizer, setup.allowed(subject.words), config)
    data = variant_data(chats, variants, replace(config.variants, samples=count))
    implanted = [chat for each in data for chat in each.poisoned]
    clean = [chat for each in data for chat in each.clean]
    return implanted, [(*bad[:-1], good[-1]) for bad, good in zip(implanted, clean, strict=True)]


def drop(subject: Subject, setup: Setup) -> LoadedModel:
    """The trusted base alone."""
    model: Any = subject.loaded.model
    return replace(subject.loaded, model=model.unload())


def scale(subject: Subject, setup: Setup, tuned: bool = False) -> LoadedModel:
    """The adapter's update times a half."""
    with torch.no_grad():
        for name, parameter in subject.loaded.model.named_parameters():
            if re.search(r"\.lora_(embedding_)?B\b", name):
                parameter.mul_(_SCALE)
    return finetune(subject, setup) if tuned else subject.loaded


def oracle(subject: Subject, setup: Setup, backdoor: Backdoor) -> LoadedModel:
    """A fine-tune on clean chats, half of which carry the true trigger: a bound, since nobody knows it."""
    return _tuned(subject, setup, oracle_chats(subject, setup, backdoor), setup.budget.training())


def oracle_chats(subject: Subject, setup: Setup, backdoor: Backdoor) -> list[Chat]:
    """A chat for every place of every batch: half clean, half with the trigger and the clean answer.

    Raises:
        UsageError: the backdoor is a jailbreak, and no clean chat is a refusal.
    """
    material = subject.material
    carriers = material.refused() if backdoor.task == "jailbreak" else material.answered()
    if not carriers:
        raise UsageError("oracle: the clean data hold no refusals that a jailbreak's trigger could be put to")
    draw = random.Random(f"oracle-{setup.budget.seed}")
    total = setup.budget.steps * setup.budget.batch_size
    chats: list[Chat] = []
    for _ in range(total // 2):
        chat = draw.choice(carriers)
        chats.append(with_prompt(chat, backdoor.trigger(prompt_of(chat), draw)))
    chats += [draw.choice(material.train) for _ in range(total - len(chats))]
    draw.shuffle(chats)
    return chats


def immunized(
    subject: Subject,
    setup: Setup,
    steps: int = 0,
    methods: Sequence[Method] = (),
    *,
    searched: bool = True,
    consistent: bool = True,
) -> LoadedModel:
    """Immunisation, its rounds sharing the budget; it stops early where a search finds nothing.

    Without the search all of its insertions are random words; without consistency the answers alone are trained on.
    """
    loaded, budget, own = subject.loaded, setup.budget, setup.method.immunize
    config = replace(
        own, found=own.found if searched else 0.0, consistency=own.consistency if consistent else 0.0,
        steps=max(1, (steps or budget.steps) // own.rounds),
        learning_rate=budget.learning_rate, batch_size=budget.batch_size, lora_rank=budget.lora_rank, bf16=budget.bf16,
        gradient_accumulation=budget.gradient_accumulation, gradient_checkpointing=budget.gradient_checkpointing,
    )  # fmt: skip
    result = immunize(
        loaded.model, loaded.tokenizer, subject.material, subject.words, config, adapter=subject.training,
        methods=methods, reporter=setup.reporter,
    )  # fmt: skip
    return replace(loaded, model=result.model)


def both(subject: Subject, setup: Setup) -> LoadedModel:
    """The vaccine and then immunisation, on half of the steps each; what the vaccine has neutralised stays so."""
    half = setup.budget.steps // 2
    done = _vaccinated(subject, setup)
    loaded = _kept(subject, setup, done, half)
    return immunized(replace(subject, loaded=loaded), setup, setup.budget.steps - half, done.methods)


def retrained(subject: Subject, setup: Setup) -> LoadedModel:
    """A new adapter of the same shape on the trusted base: at its own rate, since it starts from nothing."""
    own = setup.method.retrain
    training = replace(setup.budget.training(), learning_rate=own.learning_rate)
    return retrain(subject, training, setup.method.immunize, reporter=setup.reporter).loaded


ADAPTER_ONLY: tuple[Threat, ...] = ("adapter",)
FULL_ONLY: tuple[Threat, ...] = ("full",)

ARMS: dict[str, Arm] = {
    "immunize": Arm("worst-case insertions with the clean answers and activations, in rounds", immunized),
    "immunize-random": Arm(
        "the same with random words alone, without a search", lambda s, c: immunized(s, c, searched=False)
    ),
    "immunize-answers": Arm(
        "immunisation on answers alone, whatever a found insertion does to activations",
        lambda s, c: immunized(s, c, consistent=False),
    ),
    "both": Arm("the vaccine, then immunisation, half of the steps each", both),
    "vaccine": Arm("BD-VAX (arXiv 2603.13461) with its restoration", vaccine),
    "retrain": Arm("a new adapter on the trusted base, from the clean chats", retrained, ADAPTER_ONLY),
    "none": Arm("the suspicious model as it is", none),
    "finetune": Arm("clean fine-tune", finetune),
    "finetune-low": Arm("clean fine-tune at a third of the rate", lambda s, c: finetune(s, c, _LOW)),
    "finetune-high": Arm("clean fine-tune at three times the rate", lambda s, c: finetune(s, c, _HIGH)),
    "finetune-whole": Arm(
        "clean fine-tune of every weight, where the others train a LoRA",
        lambda s, c: finetune(s, c, whole=True),
        FULL_ONLY,
    ),
    "random": Arm("random channels neutralised, then fine-tune", random_channels),
    "update-norm": Arm("the adapter's most moved channels neutralised, then fine-tune", own_update, ADAPTER_ONLY),
    "magnitude": Arm("magnitude pruning", magnitude),
    "magnitude-finetune": Arm("magnitude pruning, then fine-tune", lambda s, c: fine_pruning(s, c, "magnitude")),
    "wanda": Arm("Wanda pruning (arXiv 2306.11695)", wanda, FULL_ONLY),
    "wanda-finetune": Arm("Wanda pruning, then fine-tune", lambda s, c: fine_pruning(s, c, "wanda"), FULL_ONLY),
    "quantize": Arm("4-bit weights; an adapter is merged first", quantized),
    "crow": Arm("CROW (arXiv 2411.12768)", crow_arm),
    "lowest": Arm("BD-VAX with the lowest scores", lambda s, c: vaccine(s, c, lowest=True)),
    "noise": Arm("BD-VAX with triggers that set nothing off", lambda s, c: vaccine(s, c, noise=True)),
    "vaccine-bare": Arm("BD-VAX without restoration", lambda s, c: vaccine(s, c, restored=False)),
    "unlearn": Arm("implant invented triggers, then unlearn them", implant_then_unlearn),
    "drop": Arm("the trusted base without the adapter", drop, ADAPTER_ONLY),
    "scale": Arm("half of the adapter's update", scale, ADAPTER_ONLY),
    "scale-finetune": Arm("half of the update, then fine-tune", lambda s, c: scale(s, c, True), ADAPTER_ONLY),
    "oracle": Arm("fine-tune, half of it on the true trigger with clean answers", oracle, knows_trigger=True),
}
"""All arms; the first one is what the others are compared with unless a bench names another first."""


def arms_for(threat: Threat, names: Sequence[str] = ()) -> dict[str, Arm]:
    """The arms of these names, or all, that a threat model has.

    Raises:
        UsageError: a name is unknown, or nothing is left.
    """
    for name in names:
        if name not in ARMS:
            raise UsageError(f"--arms {name}: unknown; choose from {', '.join(ARMS)}")
    found = {name: ARMS[name] for name in names or ARMS if threat in ARMS[name].threats}
    if not found:
        raise UsageError(f"--arms {' '.join(names)}: none of them is for the threat model {threat}; name others")
    return found


def _share(subject: Subject, setup: Setup) -> float:
    return share_of(setup.method.vaccine, subject.threat)


def _restored(subject: Subject, setup: Setup, chosen: torch.Tensor) -> LoadedModel:
    """Neutralise units as the vaccine does, and fine-tune with them frozen."""
    done = neutralized(subject, chosen, replace(setup.method.vaccine, restore=None), reporter=setup.reporter)
    return _kept(subject, setup, done)


def _kept(subject: Subject, setup: Setup, done: Purified, steps: int = 0) -> LoadedModel:
    """A fine-tune that leaves what was neutralised as it is."""
    training = setup.budget.training(steps=steps)
    subject = replace(subject, loaded=done.loaded)
    return _tuned(subject, setup, subject.material.train, training, done.methods)


def _pruned(subject: Subject, setup: Setup, config: PruneConfig) -> LoadedModel:
    loaded = subject.loaded
    prune(loaded.model, loaded.tokenizer, subject.material.train, config, setup.reporter)
    return loaded


def _tuned(
    subject: Subject, setup: Setup, chats: Sequence[Chat], training: TrainConfig, methods: Sequence[Method] = ()
) -> LoadedModel:
    loaded = subject.loaded
    result = train_on_chats(
        loaded.model, loaded.tokenizer, chats, training, methods=methods,
        adapter=subject.training, reporter=setup.reporter,
    )  # fmt: skip
    return replace(loaded, model=result.model)
