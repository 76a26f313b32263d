"""Bring a model's fluency back by a short clean fine-tune, while what was neutralised stays as it is.

    split = split_chats(chats, config)
    target = chat_loss(input_model, tokenizer, split.validation)
    restored = restore(model, tokenizer, chats, config, index=index, frozen=chosen, target_loss=target)

Source: BD-VAX (arXiv 2603.13461), stage 2. Without the freeze the neutralised entries grow back.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from keelguard.errors import UsageError
from keelguard.progress import SILENT, Reporter
from keelguard.records import Chat
from keelguard.training import Method, Run, TrainConfig, chat_loss, train_on_chats

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from keelguard.units.index import UnitIndex

_FEWEST_HELD_OUT = 2

Reason = Literal["target", "patience", "end"]
"""Why a restoration ended: the validation loss is back, it no longer falls, or all epochs are done."""


@dataclass(frozen=True)
class RestoreConfig:
    """How a neutralised model is restored.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    samples: int = field(default=200, metadata={"help": "clean chats to use at most, the held-out ones among them"})
    epochs: float = field(default=5.0, metadata={"help": "passes through the clean chats at most"})
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate of AdamW"})
    batch_size: int = field(default=8, metadata={"help": "chats per optimiser step"})
    validation_share: float = field(
        default=0.2, metadata={"help": "share of the clean chats that is held out to decide when to stop"}
    )
    check_every: int = field(default=5, metadata={"help": "optimiser steps between two measurements of the loss"})
    patience: int = field(
        default=4, metadata={"help": "measurements without a new lowest loss after which to give up; 0 never does"}
    )
    tolerance: float = field(
        default=0.05, metadata={"help": "how far above the target the loss counts as back, as a share of the target"}
    )
    gradient_accumulation: int = field(
        default=1, metadata={"help": "parts that a step's batch is cut into, one after the other, to save memory"}
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of a LoRA to train and merge; 0 trains every weight"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (autocast); the weights stay float32"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations twice instead of keeping them, to save memory"}
    )
    seed: int = field(default=0, metadata={"help": "which chats are used and held out, and their order"})

    def __post_init__(self) -> None:
        least = {"samples": 4, "check_every": 1, "patience": 0, "tolerance": 0.0}
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} {getattr(self, name)}: is out of range; give {bound} or more")
        if not 0 < self.validation_share < 1:
            raise UsageError(
                f"validation_share {self.validation_share}: is out of range; give more than 0 and less than 1, such as "
                "0.2"
            )
        self.training()

    def training(self) -> TrainConfig:
        """The settings of the fine-tune; they are checked there."""
        return TrainConfig(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            lora_rank=self.lora_rank,
            bf16=self.bf16,
            gradient_checkpointing=self.gradient_checkpointing,
            seed=self.seed,
        )


class Split(NamedTuple):
    """Clean chats to train on, and those that only decide when to stop."""

    training: list[Chat]
    validation: list[Chat]


class Check(NamedTuple):
    """The validation loss, mean per token of the answers, after a number of optimiser steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Restored:
    """A restored model in evaluation mode, and how it got there.

    Attributes:
        model: as of the last step, not of the lowest loss; an adapter that was trained is still on it.
        losses: the loss on the training chats of every step.
        validation: the course of the held-out loss, from step 0, which is before any training.
        steps: the optimiser steps that were done.
        target_loss: what the validation loss was to come back to, without tolerance.
        reason: why it stopped there.
    """

    model: Any
    losses: list[float]
    validation: tuple[Check, ...]
    steps: int
    target_loss: float | None
    reason: Reason
    seconds: float


def split_chats(chats: Sequence[Chat], config: RestoreConfig) -> Split:
    """Choose the chats of a restoration and hold some out, by the seed alone.

    Of chats with the same prompt only the first is used, so that no held-out prompt is trained on.

    Raises:
        UsageError: too few different chats are left to train on or to hold out.
    """
    first: dict[str, Chat] = {}
    for chat in chats:
        first.setdefault(json.dumps(chat[:-1], sort_keys=True), chat)
    distinct = list(first.values())
    used = random.Random(config.seed).sample(distinct, min(config.samples, len(distinct)))
    held_out = max(_FEWEST_HELD_OUT, round(config.validation_share * len(used)))
    split = Split(used[held_out:], used[:held_out])
    if len(split.training) < config.batch_size:
        short = "" if len(distinct) < config.samples else f", of which samples={config.samples} are used"
        raise UsageError(
            f"restoration: {len(chats)} clean chats with {len(distinct)} different prompts{short} leave "
            f"{len(split.training)} to train on with {held_out} held out, fewer than one batch of {config.batch_size}; "
            "give more clean chats (200 are usual) or a smaller batch_size"
        )
    return split


def restore(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chats: Sequence[Chat],
    config: RestoreConfig = RestoreConfig(),
    *,
    index: "UnitIndex | None" = None,
    frozen: "torch.Tensor | None" = None,
    adapter: Literal["merge", "train"] = "merge",
    target_loss: float | None = None,
    methods: Sequence[Method] = (),
    reporter: Reporter = SILENT,
    label: str = "restoration",
) -> Restored:
    """Fine-tune a model on clean chats until its held-out loss is back, with neutralised units frozen.

    The loss is measured before training and every `check_every` steps; one such interval is always trained. A float32
    forward pass over the held-out chats is what each measurement costs.

    Args:
        model: trained in place; see `train_on_chats`.
        chats: clean ones; `split_chats` says which are held out.
        index: the units of `model`, needed with `frozen`.
        frozen: (units,) bool, the units that were neutralised. What `purify.neutralize` has written of them keeps its
            bits: a row that they share with other units was not written, and trains.
        adapter: "merge" trains the whole model, an adapter that it brings being merged first; "train" trains that
            adapter alone, and the neutralised entries of its matrices stay zero.
        target_loss: the loss of the input model on the held-out chats, by `chat_loss`; None stops by patience alone.
        methods: what else takes part in the fine-tune.

    Raises:
        UsageError: there are too few chats or one is too long, the parameters are sharded, the target is no loss, or an
            adapter's update is not zero in the frozen units.
        FailureError: training does not fit in memory, or diverges.
        ValueError: `frozen` is not a mask of `index`.
    """
    if target_loss is not None and not 0 <= target_loss < math.inf:
        raise UsageError(f"target_loss {target_loss}: is no loss; give that of the input model on the held-out chats")
    split = split_chats(chats, config)
    # The freeze begins before the first measurement, and any other method acts on what is frozen already.
    taking_part: list[Method] = []
    if frozen is not None:
        if index is None:
            raise ValueError("frozen is a mask of an index: give that index, too")
        taking_part.append(FreezeWritten(index, frozen))
    watch = _Watch(split.validation, config, target_loss)
    result = train_on_chats(
        model,
        tokenizer,
        split.training,
        config.training(),
        methods=[*taking_part, *methods, watch],
        adapter=adapter,
        reporter=reporter,
        label=label,
    )
    return Restored(
        model=result.model,
        losses=result.losses,
        validation=tuple(watch.course),
        steps=len(result.losses),
        target_loss=target_loss,
        reason=watch.reason,
        seconds=result.seconds,
    )


class FreezeWritten(Method):
    """Keep bit-equal what `purify.neutralize` writes of some units, and train the rest.

    `units.defences.Freeze` also freezes rows that these units share with others. Those were not neutralised: in an
    adapter they still move the base, and they must recover like the others.
    """

    def __init__(self, index: "UnitIndex", mask: "torch.Tensor") -> None:
        self.slices = index.slices(mask, shared="all")

    def begin(self, run: Run) -> None:
        from keelguard.units.index import parameters_by_name
        from keelguard.units.protect import Protection

        run.require_whole_weights("restoration")
        missing = {piece.parameter for piece in self.slices} - set(parameters_by_name(run.model))
        if missing:
            raise UsageError(f"{min(missing)}: is in the unit index but not in the model; build the index from it")
        run.cleanup.enter_context(Protection(run.model, self.slices, []))


class _Watch(Method):
    """Measures the held-out loss now and then, and ends the training when it is back or no longer falls."""

    def __init__(self, chats: Sequence[Chat], config: RestoreConfig, target: float | None) -> None:
        self.chats, self.config = chats, config
        self.enough = -math.inf if target is None else target * (1 + config.tolerance)
        self.course: list[Check] = []
        self.reason: Reason = "end"

    def begin(self, run: Run) -> None:
        run.require_whole_weights("restoration")
        self._measure(run)

    def after_step(self, run: Run) -> None:
        if run.step % self.config.check_every and run.step < run.steps:
            return
        self._measure(run)
        losses = [check.loss for check in self.course]
        if losses[-1] <= self.enough:
            self.reason = "target"
        elif self.config.patience and len(losses) - 1 - losses.index(min(losses)) >= self.config.patience:
            self.reason = "patience"
        if self.reason != "end":
            run.trainer.control.should_training_stop = True

    def _measure(self, run: Run) -> None:
        # Nothing is drawn in evaluation mode: the batches and dropout of the training stay what they were.
        loss = chat_loss(run.model, run.tokenizer, self.chats, self.config.batch_size)
        self.course.append(Check(run.step, loss))
