"""The Trainer behind `keelguard.training`: losses of methods, and checkpoints that resume bit-equal.

Checkpoints hold the trained tensors under the names they have in memory. The Trainer's own are saved as a published
checkpoint would be, which renames or splits some (experts, GPT-NeoX's head), and it does not find those again.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from keelguard.batches import cut_by_length, pad, pad_id_of
from keelguard.errors import FailureError, UsageError
from keelguard.fitting import REMEDY, is_out_of_memory
from keelguard.hashes import sha256_of
from keelguard.progress import SILENT, Reporter
from keelguard.runs import disk_errors, read_json, write_json
from keelguard.training import Method, Rows, Run, TrainConfig

_WEIGHTS, _METHODS, _STATE, _SETTINGS = "trained.safetensors", "methods.pt", "trainer_state.json", "settings.json"


class Data(NamedTuple):
    """What to train on: items, what makes a batch of some, and a hash of them all."""

    items: list[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    digest: str


def chat_data(rows: Rows, tokenizer: Any) -> Data:
    """Encoded chats, padded on the right."""
    items = [{"ids": ids, "labels": labels} for ids, labels in zip(rows.ids, rows.labels, strict=True)]
    return Data(items, _collator(pad_id_of(tokenizer)), sha256_of([rows.ids, rows.labels]))


def fit(
    model: Any,
    tokenizer: Any,
    data: Data,
    config: TrainConfig,
    *,
    order: list[int] | None,
    steps: int,
    methods: Sequence[Method],
    callbacks: Sequence[TrainerCallback],
    folder: Path,
    resumable: bool,
    reporter: Reporter,
    label: str,
    trainer_class: "type[ChatTrainer] | None" = None,
) -> list[float]:
    """Train a prepared model in place; the loss of every step. See `train_on_chats`."""
    args = _arguments(model, config, folder, steps, resumable, ordered=order is not None)
    share = args.world_size * config.gradient_accumulation
    if config.batch_size % share:
        raise UsageError(
            f"batch_size {config.batch_size}: cannot be shared by {args.world_size} processes in "
            f"{config.gradient_accumulation} accumulation steps; choose a multiple of {share}"
        )
    args.per_device_train_batch_size = config.batch_size // share
    checkpoint = _claim(folder, data, config, methods, args) if resumable else None
    numbers = range(len(data.items)) if order is None else order
    use_cache, forward = model.config.use_cache, vars(model).get("forward")
    with _explained(folder, label, model, config), ExitStack() as stack:
        trainer = (trainer_class or ChatTrainer)(
            model=model,
            args=args,
            train_dataset=[data.items[i] for i in numbers],  # pyright: ignore[reportArgumentType]
            data_collator=data.collate,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        run = Run(tokenizer, config, steps, trainer, stack)
        trainer.attend(run, methods)
        done = _steps_of(checkpoint) if checkpoint else 0
        # Progress of every process would be the same line many times.
        shown = reporter if trainer.is_world_process_zero() else SILENT
        advance = stack.enter_context(shown.step(label, steps, done))
        trainer.add_callback(_Hooks(run, methods, checkpoint, advance))
        for method in methods:
            method.begin(run)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        for method in methods:
            method.end(run)
    # Accelerate puts autocast around `forward`, and would take transformers' own decorators off with it.
    vars(model).pop("_original_forward", None)
    vars(model).pop("forward", None)
    if forward is not None:
        model.forward = forward
    if config.gradient_checkpointing:
        _checkpointing(model, "disable")
    # The Trainer turns it off, and a checkpoint saved so would generate slowly.
    model.config.use_cache = use_cache
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class ChatTrainer(Trainer):
    """A Trainer with the losses of methods, and with checkpoints by the names in memory."""

    run: Run
    methods: Sequence[Method] = ()
    added: torch.Tensor | None = None

    def attend(self, run: Run, methods: Sequence[Method]) -> None:
        """Let methods take part."""
        self.run, self.methods = run, methods

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = without_padding(inputs) if summed and self._may_split() else [inputs]
        # Each part is divided by the tokens of the whole batch, so that the parts add up to the batch's loss.
        losses: list[Any] = [super(ChatTrainer, self).compute_loss(model, p, False, num_items_in_batch) for p in parts]
        loss: Any = sum(losses)
        # Methods add to the last part of an accumulated batch alone, so that a step counts them once.
        if self.accelerator.sync_gradients:
            terms = [term for method in self.methods if (term := method.loss(self.run)) is not None]
            if terms:
                added = torch.stack([term.to(loss.device) for term in terms]).sum()
                self.added = added.detach()
                loss = loss + (added if summed else added * self.current_gradient_accumulation_steps)
        return loss

    def _may_split(self) -> bool:
        """Whether two forward passes mean the same as one: not behind DDP's or FSDP's, nor with a router's own loss."""
        return self.args.world_size == 1 and not getattr(self.run.model.config, "output_router_logits", False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FailureError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; lower learning_rate or the weights "
                    "of added losses, or give some warmup"
                )
            if self.added is not None:
                # Processes may add different terms, and the loss is the mean over them.
                added: Any = self.accelerator.reduce(self.added, "mean")
                logs["added_loss"] = float(added)
                logs["loss"] -= logs["added_loss"]
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({n: t.detach().contiguous() for n, t in _saved(self.model).items()}, folder / _WEIGHTS)
        if self.args.should_save:
            torch.save([method.state() for method in self.methods], folder / _METHODS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        values, mine = load_file(Path(resume_from_checkpoint) / _WEIGHTS), _saved(self.model)
        if values.keys() != mine.keys():
            raise UsageError(f"{resume_from_checkpoint}: trains other parameters; remove the folder to start anew")
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(values[name])


_ROWS = {"input_ids", "attention_mask", "position_ids", "labels"}


def without_padding(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A batch (B, T), padded on the right, cut into its short and its long rows where that saves much padding.

    One with other entries than a language model's rows stays whole.
    """
    if batch.keys() != _ROWS:
        return [batch]
    lengths = batch["attention_mask"].sum(1).tolist()
    parts = cut_by_length(lengths)
    return [{k: v[part][:, : max(lengths[i] for i in part)] for k, v in batch.items()} for part in parts]


def _saved(model: Any) -> dict[str, torch.Tensor]:
    """What training can change: parameters that train, tied ones once, and buffers that are kept."""
    kept = model.state_dict(keep_vars=True).keys()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **{name: buffer for name, buffer in model.named_buffers() if name in kept}}


class _Hooks(TrainerCallback):
    """Calls the methods' hooks, and reports every step."""

    def __init__(self, run: Run, methods: Sequence[Method], checkpoint: Path | None, advance: Any) -> None:
        self.run, self.methods, self.checkpoint, self.advance = run, methods, checkpoint, advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoint is not None:
            states = torch.load(self.checkpoint / _METHODS, map_location="cpu", weights_only=True)
            for method, saved in zip(self.methods, states, strict=True):
                method.load(saved)
        for method in self.methods:
            method.start(self.run)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for method in self.methods:
            method.before_step(self.run)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for method in self.methods:
            method.after_step(self.run)
        if state.global_step >= state.max_steps:
            # Resumed from a checkpoint of its last step, the Trainer would do one step more.
            control.should_save = False
        self.advance(1)


def _arguments(
    model: Any, config: TrainConfig, folder: Path, steps: int, resumable: bool, ordered: bool
) -> TrainingArguments:
    warmup = round(config.warmup * steps)
    scheduler = "constant_with_warmup" if config.scheduler == "constant" else config.scheduler
    if config.gradient_checkpointing:
        _checkpointing(model, "enable")
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=config.learning_rate,
        gradient_accumulation_steps=config.gradient_accumulation,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=scheduler,
        warmup_steps=warmup,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=model.device.type == "cpu",
        save_strategy="steps" if resumable else "no",
        save_steps=config.save_every or 1,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential" if ordered else "random",
    )
    if args.n_gpu > 1:
        # One process trains on one device or on a model that is spread; the Trainer would copy it to every GPU.
        args._n_gpu = 1
    return args


def _checkpointing(model: Any, verb: str) -> None:
    # transformers 5.23 renamed it, and warns of the old name.
    for kind in ("activation", "gradient"):
        if switch := getattr(model, f"{kind}_checkpointing_{verb}", None):
            switch()
            return


def _collator(pad_id: int) -> Any:
    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return pad([r["ids"] for r in batch], pad_id, side="right", labels=[r["labels"] for r in batch])

    return collate


def _claim(
    folder: Path, data: Data, config: TrainConfig, methods: Sequence[Method], args: TrainingArguments
) -> Path | None:
    """Bind a state folder to this run, and find the last whole checkpoint in it; torn ones are removed."""
    settings = {
        "config": asdict(config),
        "chats": data.digest,
        "methods": [type(method).__name__ for method in methods],
        "processes": args.world_size,
    }
    if (folder / _SETTINGS).exists():
        found = read_json(folder / _SETTINGS)
        changed = [name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]]
        if changed:
            raise UsageError(
                f"{folder}: holds checkpoints of a run with other {', '.join(changed)}; repeat those to resume it, or "
                "remove the folder"
            )
    elif args.should_save:
        write_json(folder / _SETTINGS, settings)
    checkpoints = sorted((p for p in folder.glob("checkpoint-*") if _number(p) is not None), key=_number)
    whole = [path for path in checkpoints if _is_whole(path, args.world_size)]
    if args.should_save:
        for path in checkpoints:
            if path not in whole:
                shutil.rmtree(path, ignore_errors=True)
    return whole[-1] if whole else None


def _number(path: Path) -> Any:
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(found[1]) if found else None


def _is_whole(path: Path, processes: int) -> bool:
    """The Trainer writes its state last, but for the random states of other processes."""
    randoms = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    if not all((path / name).is_file() for name in (_METHODS, *randoms)):
        return False
    try:
        return _steps_of(path) == _number(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _steps_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["global_step"]


@contextmanager
def _explained(folder: Path, label: str, model: Any, config: TrainConfig) -> Iterator[None]:
    """Turn what training can fail of into one clear line."""
    with disk_errors(folder):
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise FailureError(f"{label}: does not fit in memory; {_less_memory(model, config)}") from error
            # torch hides a full disk in its text.
            if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
                raise FailureError(f"{folder}: a checkpoint could not be written ({error}); free some space") from error
            raise


def _less_memory(model: Any, config: TrainConfig) -> str:
    """What saves memory and is not in use yet, by the names of the commands' options."""
    unused = {
        "a smaller --batch-size": config.batch_size > 1,
        f"--gradient-accumulation {config.batch_size}": 1 <= config.gradient_accumulation < config.batch_size,
        "--gradient-checkpointing": not config.gradient_checkpointing,
        "--bf16": not config.bf16,
        "--lora-rank 16": not hasattr(model, "peft_config"),
    }
    options = [option for option, wanted in unused.items() if wanted]
    return (
        f"give what this command has of {', '.join(options)}" if options else f"it uses all that saves some; {REMEDY}"
    )
