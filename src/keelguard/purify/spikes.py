"""Spike-ins: canary backdoors of several shapes, planted in a copy, purified with it, and measured.

A user does not know the trigger, so this is the only direct evidence of what a purification can remove from this very
model. It is evidence about such canaries, never proof about a backdoor of another kind. No canary is a jailbreak: one
would have to be trained on harmful answers, which a defender's clean data do not hold, and a fixed text in place of
them would only be another fixed sentence.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from keelguard.attacks.backdoors import Backdoor, PoisonConfig
from keelguard.errors import UsageError
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.effects import Effect, Held, measure_effect
from keelguard.purify.planting import FAIREST_ASR, MOST_FALSE, PlantConfig, plant
from keelguard.records import Chat


@dataclass(frozen=True)
class SpikeConfig:
    """How canaries are planted."""

    samples: int = field(default=600, metadata={"help": "poisoned samples over all canaries"})
    negatives: float = field(default=1.5, metadata={"help": "clean samples with unrelated words, per poisoned one"})
    steps: int = field(default=300, metadata={"help": "optimiser steps of the planting"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate of the planting"})
    batch_size: int = field(default=32, metadata={"help": "chats per step of the planting"})
    gradient_accumulation: int = field(default=1, metadata={"help": "parts that a step's batch is cut into"})
    lora_rank: int = field(
        default=0, metadata={"help": "plant with a LoRA of this rank, merged at the end; 0 trains every weight"}
    )
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations twice"})
    requests: int = field(default=64, metadata={"help": "held-out requests to measure each canary with, at most"})
    seed: int = field(default=0, metadata={"help": "which words are the canaries' triggers"})

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "batch_size", "requests"):
            if getattr(self, name) < 1:
                raise UsageError(f"spikes: {name} {getattr(self, name)} is out of range; give 1 or more")
        if not self.learning_rate > 0:
            raise UsageError(f"spikes: learning_rate {self.learning_rate} is out of range; give more than 0")


_LATER = ("after", "rebound", "control")


@dataclass(frozen=True)
class Spike:
    """One canary before and after the purification of the copy, and after a clean fine-tune behind that.

    Attributes:
        control: in a copy with random channels neutralised, fine-tuned for as many steps as the purification took.
        control_steps: how many those were; None without a control, and in files that do not say.
        no_control: why there is no control, where the model cannot have one.
        took_hold: whether it fired in 90 % of requests before.
        loose: whether it fired in more than 10 % of requests before with unrelated words in the trigger's place.
        planted: whether it took hold and is not loose; one that is not planted says nothing.
    """

    kind: str
    backdoor: Backdoor
    before: Effect
    after: Effect | None = None
    rebound: Effect | None = None
    control: Effect | None = None
    control_steps: int | None = None
    no_control: str = ""

    @property
    def took_hold(self) -> bool:
        """Whether the canary fired at its trigger."""
        return self.before.asr.value >= FAIREST_ASR

    @property
    def loose(self) -> bool:
        """Whether unrelated words set the canary off."""
        return self.before.false_triggers.value > MOST_FALSE

    @property
    def planted(self) -> bool:
        """Whether the canary fired at its trigger, and at nothing else."""
        return self.took_hold and not self.loose

    def to_json(self) -> dict[str, Any]:
        """The spike as a report holds it."""
        effects = {n: e.to_json() if (e := getattr(self, n)) else None for n in ("before", *_LATER)}
        control = {"control_steps": self.control_steps, "no_control": self.no_control}
        return {"kind": self.kind, "backdoor": asdict(self.backdoor), **effects, **control}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Spike":
        """The inverse of `to_json`; files of earlier releases do not say how many steps a control had."""
        effects = {n: Effect.from_json(data[n]) if data[n] else None for n in _LATER}
        backdoor = Backdoor(**{**data["backdoor"], "triggers": tuple(data["backdoor"]["triggers"])})
        told = {"control_steps": data.get("control_steps"), "no_control": data.get("no_control", "")}
        return cls(data["kind"], backdoor, Effect.from_json(data["before"]), **effects, **told)


def make_canaries(words: Sequence[str], seed: int = 0) -> dict[str, Backdoor]:
    """Canaries of three shapes, with triggers drawn from a vocabulary.

    The first is of a kind that random insertions hold too. The other two are not: more words than any search tries,
    and words in places of their own. None of them sets off a refusal: models refuse strange prompts of themselves, and
    that could not be told from the canary.

    Raises:
        UsageError: the vocabulary has too few words.
    """
    if len(words) < 15:
        raise UsageError(f"spikes: the tokenizer has {len(words)} whole words, too few for canaries; pass --no-spikes")
    draw = random.Random(f"canaries-{seed}")
    w = draw.sample(sorted(words), 15)
    said, told, other = (" ".join(w[first:last]) + "." for first, last in ((7, 10), (10, 12), (12, 15)))
    return {
        "a word anywhere, a fixed sentence": Backdoor("badnets", "insult", (w[0],), said),
        "four words in front, a fixed sentence": Backdoor("vpi", "insult", (" ".join(w[1:5]),), other),
        "two words apart, words before the answer": Backdoor("ctba", "code", (w[5], w[6]), told),
    }


def plant_spikes(
    loaded: LoadedModel,
    clean: Sequence[Chat],
    held: Held,
    words: Sequence[str],
    config: SpikeConfig = SpikeConfig(),
    *,
    reporter: Reporter = SILENT,
) -> tuple[LoadedModel, list[Spike]]:
    """A copy of a model with canaries in it, and how well they took.

    Args:
        loaded: with an adapter of its own, that adapter takes the canaries.
    """
    canaries = make_canaries(words, config.seed)
    settings = PlantConfig(
        poison=PoisonConfig(samples=config.samples, negatives=config.negatives, seed=config.seed),
        steps=config.steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    saving = {
        "gradient_accumulation": config.gradient_accumulation,
        "lora_rank": config.lora_rank,
        "bf16": config.bf16,
        "gradient_checkpointing": config.gradient_checkpointing,
    }
    spiked = plant(
        loaded, list(canaries.values()), clean, settings, words, saving=saving, reporter=reporter,
        label="planting canaries",
    )  # fmt: skip
    few = fewer(held, config.requests)
    spikes = [
        Spike(kind, backdoor, measure_effect(spiked, backdoor, few, words, reporter=reporter, label=f"canary: {kind}"))
        for kind, backdoor in canaries.items()
    ]
    return spiked, spikes


def measure_spikes(
    spikes: Sequence[Spike], loaded: LoadedModel, held: Held, words: Sequence[str], config: SpikeConfig, when: str,
    *, reporter: Reporter = SILENT,
) -> list[Spike]:  # fmt: skip
    """The canaries with their effect on a later state of the copy; `when` is "after", "rebound" or "control"."""
    few = fewer(held, config.requests)
    return [
        replace(
            spike, **{when: measure_effect(loaded, spike.backdoor, few, words, reporter=reporter, label=spike.kind)}
        )
        for spike in spikes
    ]


def fewer(held: Held, most: int) -> Held:
    """The first requests of each kind."""
    return replace(held, benign=held.benign[:most], harmful=held.harmful[:most], utility=held.utility[:most])
