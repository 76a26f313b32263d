"""Fine-tune a chat model on the answers of some chats: the one way that attacks, defences and alignment share.

    result = train_on_chats(model, tokenizer, chats, TrainConfig(epochs=1), methods=[Anchor(refusals)])
    result.model                                    # trained in place, in evaluation mode

With a `state_folder`, a run that is killed and repeated ends with the very weights of an undisturbed one (bit-equal on
a CPU). `accelerate launch` spreads a run over processes as it is: `batch_size` counts the chats of all of them.
torch is imported late, so that importing this module stays cheap.
"""

import gc
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from keelguard.batches import IGNORED, batches_by_length, pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.progress import SILENT, Reporter
from keelguard.records import Chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

SCHEDULERS = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is fine-tuned.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    steps: int = field(default=0, metadata={"help": "optimiser steps; 0 counts by epochs"})
    epochs: float = field(default=1.0, metadata={"help": "passes through the chats; not read where steps are given"})
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate of AdamW"})
    batch_size: int = field(
        default=16, metadata={"help": "chats per optimiser step, over all processes and accumulation steps"}
    )
    gradient_accumulation: int = field(
        default=1, metadata={"help": "parts that a step's batch is cut into, one after the other, to save memory"}
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of a LoRA on all linear layers; 0 trains everything"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay"})
    scheduler: Literal["linear", "cosine", "constant"] = field(
        default="linear", metadata={"help": "how the learning rate falls behind its peak: linear, cosine or constant"}
    )
    warmup: float = field(default=0.0, metadata={"help": "share of the steps over which the learning rate rises"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0 does not clip"})
    seed: int = field(default=0, metadata={"help": "order of the chats, LoRA's start and dropout"})
    save_every: int = field(default=0, metadata={"help": "steps between two checkpoints to resume from; 0 keeps none"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (autocast); the weights stay float32"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations twice instead of keeping them, to save memory"}
    )

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch_size": 1, "gradient_accumulation": 1, "lora_rank": 0, "weight_decay": 0}
        for name, bound in {**least, "max_grad_norm": 0, "save_every": 0, "seed": 0}.items():
            if not bound <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} {getattr(self, name)}: is out of range; give {bound} or more")
        if not self.steps and not 0 < self.epochs < math.inf:
            raise UsageError(f"epochs {self.epochs}: is out of range; give more than 0, or steps")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate {self.learning_rate}: is out of range; give more than 0, such as 2e-5")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup {self.warmup}: is a share of the steps; give at least 0 and less than 1")
        if self.scheduler not in SCHEDULERS:
            raise UsageError(f"scheduler {self.scheduler}: unknown; choose one of {', '.join(SCHEDULERS)}")
        if self.batch_size % self.gradient_accumulation:
            raise UsageError(
                f"gradient_accumulation {self.gradient_accumulation}: does not divide batch_size {self.batch_size}; "
                "choose a divisor of it"
            )

    def steps_for(self, chats: int) -> int:
        """The number of optimiser steps on so many chats."""
        return self.steps or math.ceil(self.epochs * math.ceil(chats / self.batch_size))


@dataclass
class Run:
    """A fine-tune under way, as its methods see it.

    Attributes:
        steps: the number of optimiser steps of the whole run.
        trainer: the `transformers.Trainer`.
        cleanup: what a method enters here is left when training ends, however it ends.
    """

    tokenizer: "PreTrainedTokenizerBase"
    config: TrainConfig
    steps: int
    trainer: Any
    cleanup: ExitStack

    @property
    def model(self) -> Any:
        """The model that trains, below DDP's wrapper; a LoRA is on it, FSDP's wrapper too."""
        return self.trainer.model

    @property
    def step(self) -> int:
        """How many optimiser steps are done."""
        return self.trainer.state.global_step

    @property
    def device(self) -> "torch.device":
        """Where the model takes its inputs."""
        return self.trainer.args.device

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.trainer.args.process_index

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.trainer.args.world_size

    def optimizer(self) -> "torch.optim.Optimizer":
        """The torch optimiser itself; there is none before `Method.start`."""
        return self.trainer.optimizer.optimizer

    def trainable(self) -> "list[torch.Tensor]":
        """The parameters that train, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def require_whole_weights(self, method: str) -> None:
        """Refuse FSDP and DeepSpeed for a method that reads or writes whole parameters.

        Raises:
            UsageError: the parameters are sharded.
        """
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise UsageError(
                f"{method}: needs whole parameters in every process, which FSDP and DeepSpeed shard; launch with DDP, "
                "train a LoRA (lora_rank 16), or choose freeze, anchor or mix"
            )


class Method:
    """What a defence does within a fine-tune; a hook does nothing unless it is overridden.

    Methods compose: every hook is called for each method in the order given. One object serves one run.
    """

    def data(self, chats: Sequence[Chat], config: TrainConfig) -> Sequence[Chat]:
        """What to train on in place of `chats`."""
        return chats

    def order(self, rows: int, steps: int, config: TrainConfig) -> list[int] | None:
        """The chat of every place of every batch, steps × batch_size numbers below `rows`; None leaves it to chance."""
        return None

    def begin(self, run: Run) -> None:
        """The model is ready to train and has the weights it started with, in a resumed run too."""

    def start(self, run: Run) -> None:
        """The optimiser is there; in a resumed run the weights are those of the checkpoint."""

    def loss(self, run: Run) -> "torch.Tensor | None":
        """A scalar that is added to the loss, once per optimiser step."""
        return None

    def before_step(self, run: Run) -> None:
        """The gradients of a step are complete and clipped."""

    def after_step(self, run: Run) -> None:
        """The weights have moved, the gradients are gone, and `run.step` counts the step."""

    def end(self, run: Run) -> None:
        """Training is over; a LoRA is not merged yet."""

    def state(self) -> "dict[str, Any]":
        """Tensors and plain values that a resumed run needs."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, between `begin` and `start`; tensors are on the CPU."""


class TrainResult(NamedTuple):
    """A fine-tuned model, in evaluation mode.

    `losses` has the loss on the chats of every step, without what methods add, mean per token and averaged over
    processes; `seconds` are those of this process, not of a killed one before it.
    """

    model: "PreTrainedModel"
    losses: list[float]
    seconds: float
    steps: int


class Rows(NamedTuple):
    """Encoded chats: ids, and labels that are `IGNORED` outside the answer and its end."""

    ids: list[list[int]]
    labels: list[list[int]]


def train_on_chats(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chats: Sequence[Chat],
    config: TrainConfig,
    *,
    methods: Sequence[Method] = (),
    callbacks: "Sequence[TrainerCallback]" = (),
    adapter: Literal["merge", "train"] = "merge",
    state_folder: str | Path | None = None,
    reporter: Reporter = SILENT,
    label: str = "fine-tuning",
) -> TrainResult:
    """Fine-tune a model on the answers of some chats with `transformers.Trainer`.

    Args:
        model: trained in place; an adapter that it brings is merged first, the LoRA of `lora_rank` at the end.
            Without a LoRA it becomes float32: in bfloat16 most steps at these rates would be rounded away.
        adapter: "train" trains the adapter that the model brings, and nothing else, and leaves it unmerged.
        chats: conversations that end with an assistant's message; the loss covers that message and its end.
        methods: what protects the model meanwhile; `keelguard.units.defences` has them.
        callbacks: further callbacks of the Trainer.
        state_folder: where checkpoints go every `save_every` steps, and where a repeated call resumes from. The model
            must be given as it was at the start. The caller removes the folder.
        label: names this training in progress and errors.

    Returns:
        The model and the course of its loss. Under FSDP the model is left sharded.

    Raises:
        UsageError: there are no chats, one is longer than the model's context, the batch cannot be shared among the
            processes, or the state folder belongs to another run.
        FailureError: training does not fit in memory or on the disk, or diverges.
    """
    from keelguard.trainable import finished, prepare
    from keelguard.training_loop import chat_data, fit

    began = time.monotonic()
    for method in methods:
        chats = method.data(chats, config)
    rows = encode_rows(model, tokenizer, chats, label)
    steps = config.steps_for(len(rows.ids))
    orders = [order for method in methods if (order := method.order(len(rows.ids), steps, config)) is not None]
    if len(orders) > 1:
        raise UsageError(f"{label}: two methods want to order the chats; choose one of them")
    model = prepare(model, config, adapter)
    with ExitStack() as stack:
        folder = state_folder or stack.enter_context(tempfile.TemporaryDirectory())
        losses = fit(
            model,
            tokenizer,
            chat_data(rows, tokenizer),
            config,
            order=orders[0] if orders else None,
            steps=steps,
            methods=methods,
            callbacks=callbacks,
            folder=Path(folder),
            resumable=state_folder is not None and config.save_every > 0,
            reporter=reporter,
            label=label,
        )
    # A Trainer holds its optimiser in a circle, which would lie beside whatever comes next.
    gc.collect()
    return TrainResult(finished(model, config), losses, time.monotonic() - began, steps)


def chat_loss(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chats: Sequence[Chat],
    batch_size: int = 16,
) -> float:
    """The mean cross-entropy per token of the chats' answers and their ends, in evaluation mode.

    Raises:
        UsageError: there are no chats, or one is longer than the model's context.
        FailureError: a single chat does not fit in memory.
    """
    import torch
    import torch.nn.functional as F

    from keelguard.fitting import in_halves, most_tokens, told_logits
    from keelguard.models import execution_device

    rows = encode_rows(model, tokenizer, chats, "loss")
    device = execution_device(model)

    def read(part: list[int]) -> torch.Tensor:
        labels = [rows.labels[i] for i in part]
        batch = pad([rows.ids[i] for i in part], pad_id_of(tokenizer), side="right", labels=labels)
        wanted = batch.pop("labels").roll(-1, dims=1)
        wanted[:, -1] = IGNORED
        told = wanted != IGNORED
        logits = told_logits(model, {k: v.to(device) for k, v in batch.items()}, told).float()
        return F.cross_entropy(logits, wanted[told].to(logits.device), reduction="none")

    total, count = 0.0, 0
    batches = batches_by_length([len(ids) for ids in rows.ids], batch_size, most_tokens(model))
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            for _, losses in in_halves(batches, read, "the loss on clean chats"):
                total += float(losses.double().sum())
                count += len(losses)
    finally:
        model.train(mode)
    return total / count


def encode_rows(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat], label: str
) -> Rows:
    """Encode chats to train on.

    Raises:
        UsageError: there are none, or one is longer than the model's context.
    """
    from keelguard.models import context_length

    if not chats:
        raise UsageError(f"{label}: there are no chats to train on; name a data file")
    encoded = encode_chats(tokenizer, chats)
    limit = context_length(model)
    longest = max(len(chat.ids) for chat in encoded)
    if limit is not None and longest > limit:
        raise UsageError(f"{label}: a chat has {longest} tokens, the model reads {limit}; shorten it")
    return Rows([chat.ids for chat in encoded], [chat.labels() for chat in encoded])
