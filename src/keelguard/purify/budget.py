"""One budget for every way to purify a model, and what a way is: an arm of a bench."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from keelguard.attacks.backdoors import Backdoor
from keelguard.errors import UsageError
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.crow import CrowConfig
from keelguard.purify.methods import MethodConfig, Subject, Threat
from keelguard.purify.pruning import PruneConfig
from keelguard.purify.quantize import QuantizeConfig
from keelguard.training import TrainConfig

LORA_RATE = 5.0
"""How many times the learning rate of all weights a LoRA has, as its steps move the model less."""


@dataclass(frozen=True)
class Budget:
    """The optimiser steps, and their rate and batch, that every arm has.

    Raises:
        UsageError: a value is out of range.
    """

    steps: int = field(default=240, metadata={"help": "optimiser steps of every arm, over all its parts"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    batch_size: int = field(default=32, metadata={"help": "chats per step"})
    gradient_accumulation: int = field(default=1, metadata={"help": "parts that a step's batch is cut into"})
    lora_rank: int = field(default=0, metadata={"help": "rank of a LoRA to train and merge; 0 trains every weight"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations twice"})
    seed: int = field(default=0, metadata={"help": "order of the chats, random channels, places of triggers"})

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UsageError(f"budget: steps {self.steps} is out of range; give 2 or more, as some arms have two parts")
        self.training()

    @classmethod
    def of(cls, config: MethodConfig) -> "Budget":
        """What immunisation uses when no round is left out: then it runs here with its own settings."""
        own = config.immunize
        return cls(
            own.rounds * own.steps, own.learning_rate, own.batch_size, own.gradient_accumulation, own.lora_rank,
            own.bf16, own.gradient_checkpointing, own.seed,
        )  # fmt: skip

    def training(self, rate: float = 1.0, steps: int = 0, *, whole: bool = False) -> TrainConfig:
        """A fine-tune of the whole budget, or of so many of its steps, at a multiple of its rate.

        Args:
            whole: train every weight where the budget has a LoRA, at the rate that suits them; see `LORA_RATE`.
        """
        whole = whole and self.lora_rank > 0
        return TrainConfig(
            steps=steps or self.steps, learning_rate=rate * self.learning_rate / (LORA_RATE if whole else 1),
            batch_size=self.batch_size, gradient_accumulation=self.gradient_accumulation,
            lora_rank=0 if whole else self.lora_rank, bf16=self.bf16,
            gradient_checkpointing=self.gradient_checkpointing, warmup=0.1, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What all arms of a bench share.

    Attributes:
        method: settings of the methods; their steps, rates and batch sizes give way to the budget's.
        folder: where arms of one case share the vaccine's trained variants; None trains them for each.
    """

    budget: Budget = Budget()
    method: MethodConfig = MethodConfig()
    prune: PruneConfig = PruneConfig()
    crow: CrowConfig = CrowConfig(samples=0)
    quantize: QuantizeConfig = QuantizeConfig()
    folder: Path | None = None
    reporter: Reporter = SILENT

    def settings(self) -> dict[str, Any]:
        """Everything that determines a result, as JSON values."""
        names = ("budget", "method", "prune", "crow", "quantize")
        return {name: asdict(getattr(self, name)) for name in names}

    def leaving_out(self, words: Sequence[str] | frozenset[str]) -> "Setup":
        """The same, with words that nothing random or invented may hold; searches see them still."""
        taken = {*self.method.immunize.left_out, *(word.lower() for word in words)}
        immunizing = replace(self.method.immunize, left_out=tuple(sorted(taken)))
        return replace(self, method=replace(self.method, immunize=immunizing))

    def allowed(self, words: Sequence[str]) -> tuple[str, ...]:
        """The words that invented triggers may hold."""
        return tuple(word for word in words if word.lower() not in self.method.immunize.left_out)

    def within(self, folder: Path | None) -> "Setup":
        """The same with another folder."""
        return replace(self, folder=folder)


@dataclass(frozen=True)
class Arm:
    """One way to treat a suspicious model; `run` takes the subject and the setup, and the backdoor if it knows it."""

    about: str
    run: Callable[..., LoadedModel]
    threats: tuple[Threat, ...] = ("full", "adapter")
    knows_trigger: bool = False

    def __call__(self, subject: Subject, setup: Setup, backdoor: Backdoor) -> LoadedModel:
        """Treat a model, in place.

        Raises:
            UsageError: the arm is none for this model or its threat model.
            FailureError: training does not fit in memory, or diverges.
        """
        if subject.threat not in self.threats:
            raise UsageError(f"{self.about}: needs the threat model {self.threats[0]}, not {subject.threat}")
        return self.run(subject, setup, backdoor) if self.knows_trigger else self.run(subject, setup)
