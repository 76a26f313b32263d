"""The settings of immunisation."""

from dataclasses import dataclass, field

from keelguard.errors import UsageError
from keelguard.purify.search import SearchConfig


@dataclass(frozen=True)
class ImmunizeConfig:
    """How a model is immunised."""

    rounds: int = field(default=3, metadata={"help": "rounds of search and training at most"})
    steps: int = field(default=80, metadata={"help": "optimiser steps per round"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate of each round"})
    batch_size: int = field(default=32, metadata={"help": "chats per step"})
    gradient_accumulation: int = field(
        default=1, metadata={"help": "parts that a step's batch is cut into, one after the other, to save memory"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "rank of a LoRA that each round trains and merges; 0 trains every weight"}
    )
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (autocast); the weights stay as they are"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations twice instead of keeping them, to save memory"}
    )
    inserted: float = field(default=0.5, metadata={"help": "share of the chats that carry an insertion"})
    found: float = field(
        default=0.7,
        metadata={"help": "share of the insertions that the search found, others are random; 0 searches none"},
    )
    refused: float = field(
        default=0.2, metadata={"help": "share of harmful requests among the chats without insertions"}
    )
    inserted_refused: float = field(
        default=0.4, metadata={"help": "share of harmful requests among the chats with insertions"}
    )
    keep: float = field(default=3.0, metadata={"help": "weight of the divergence from the input model on clean chats"})
    kept: int = field(default=1000, metadata={"help": "clean chats on which that divergence is measured"})
    kept_per_step: int = field(default=8, metadata={"help": "of these, how many in each step"})
    consistency: float = field(
        default=2.0, metadata={"help": "weight of the distance between activations with and without an insertion"}
    )
    consistent: int = field(default=256, metadata={"help": "clean chats on which that distance is measured"})
    consistent_per_step: int = field(default=8, metadata={"help": "of these, how many in each step"})
    stable: float = field(
        default=0.5, metadata={"help": "nats by which an unrelated word may move an answer that insertions are put to"}
    )
    quiet: float = field(
        default=0.3, metadata={"help": "nats of rise up to which the worst insertion counts as nothing"}
    )
    tolerance: float = field(
        default=0.1, metadata={"help": "nats per token that the loss on clean validation chats may rise"}
    )
    search: SearchConfig = field(default=SearchConfig(), metadata={"help": "how insertions are searched"})
    left_out: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "words kept out of the random insertions, so that a test that knows the trigger does not leak it"
        },
    )
    seed: int = field(default=0, metadata={"help": "which insertions go where"})

    def __post_init__(self) -> None:
        options = {"rounds": 1, "steps": 1, "batch_size": 1, "gradient_accumulation": 1, "lora_rank": 0}
        for name, bound in options.items():
            if getattr(self, name) < bound:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {getattr(self, name)}: is out of range; give {bound} or more")
        for name, turned_off in {"kept": "keep", "kept_per_step": "keep", "consistent": "consistency",
                                 "consistent_per_step": "consistency"}.items():  # fmt: skip
            if getattr(self, name) < 1:
                raise UsageError(
                    f"immunize: {name} {getattr(self, name)} is out of range; give 1 or more, or {turned_off}=0"
                )
        if self.batch_size % self.gradient_accumulation:
            raise UsageError(
                f"--gradient-accumulation {self.gradient_accumulation}: does not divide the batch of {self.batch_size} "
                "chats; choose a divisor of it"
            )
        if not self.learning_rate > 0:
            raise UsageError(f"--learning-rate {self.learning_rate}: is out of range; give more than 0, such as 2e-5")
        for name in ("inserted", "found", "refused", "inserted_refused"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"immunize: {name} {getattr(self, name)} is a share; give 0 to 1")
        if not self.stable > 0:
            raise UsageError(f"immunize: stable {self.stable} is out of range; give more than 0")
        for name in ("keep", "consistency", "quiet", "tolerance"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"immunize: {name} {getattr(self, name)} is out of range; give 0 or more")

    @property
    def beside(self) -> int:
        """Chats of a step beside its batch, on which further losses are measured."""
        return self.kept_per_step * bool(self.keep) + self.consistent_per_step * bool(self.consistency)
