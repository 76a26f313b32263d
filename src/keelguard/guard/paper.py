"""The published method: fine-tune a model with its [CLS] token in front, by the joint loss of both phases.

    trained = train_prefix(model, tokenizer, material, validation, paper_config())
    trained.model, trained.signal

Source: SA-ESS (arXiv 2505.17072). Faithful: the masks, the joint loss, the rules of attention, τ, append and one shot.
The recipe is the paper's where it is published; a small model wants a hotter one. The annealing schedule is not.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import set_seed

from keelguard.batches import Span, pad_id_of
from keelguard.errors import UsageError
from keelguard.guard.adapter import Signal
from keelguard.guard.augment import HELD_FRAMES
from keelguard.guard.labels import Labelled, require_both
from keelguard.guard.masks import check_attention
from keelguard.guard.material import Material
from keelguard.guard.modules import PrefixModule, prefix_batch
from keelguard.guard.policy import PolicyConfig
from keelguard.guard.recovery import LanguageItem, language_items
from keelguard.guard.training import SignalConfig, calibrate, describe, run_trainer
from keelguard.hashes import sha256_of
from keelguard.progress import SILENT, Reporter
from keelguard.trainable import usual_lora, with_lora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(NamedTuple):
    """Labelled plain text for the pre-training phase."""

    text: str
    malicious: bool


class TrainedPrefix(NamedTuple):
    """A model that was fine-tuned with its signal; `adapter` is the unmerged PEFT model where a LoRA was trained."""

    model: Any
    signal: Signal
    adapter: Any | None


def paper_config(aligned: bool = True, **changes: Any) -> SignalConfig:
    """The published recipe: 8 epochs at 1e-6 for an aligned model, 15 at 2e-5 for a base model, batches of 72."""
    recipe: dict[str, Any] = {
        "placement": "prefix",
        "steps": 0,
        "epochs": 8.0 if aligned else 15.0,
        "learning_rate": 1e-6 if aligned else 2e-5,
        "batch_size": 72,
        "weight_decay": 0.1,
        "lora_rank": 0,
        "cls_weight": 0.1,
        "policy": PolicyConfig.paper(),
    }
    return SignalConfig(**{**recipe, **changes})


def train_prefix(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    material: Material,
    validation: Sequence[Labelled],
    config: SignalConfig,
    *,
    texts: Sequence[Text] = (),
    pretrain_steps: int = 0,
    held_frames: Sequence[str] = HELD_FRAMES,
    state_folder: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> TrainedPrefix:
    """Train the paper's placement, in place: pre-training on labelled text where there is any, then alignment.

    Args:
        model: becomes float32 and, without `lora_rank`, is fine-tuned whole.
        material: malicious queries with refusals and benign ones with answers are taken from it.
        texts: labelled plain text for the pre-training phase.
        pretrain_steps: steps of that phase; 0 takes three passes, as the paper.
        state_folder: where checkpoints go; a repeated call resumes from it if the model is given as it was.

    Raises:
        UsageError: a class is missing, or the model's attention cannot be looked into.
        FailureError: training does not fit in memory, or diverges.
    """
    check_attention(model)
    require_both(validation, "validation")
    if texts and len({text.malicious for text in texts}) < 2:
        raise UsageError("the pre-training texts are all of one class; give malicious and benign ones")
    set_seed(config.seed)
    signal = Signal.create(model, "", "prefix")
    signal.refusals, signal.policy = material.refusals, config.policy
    if config.lora_rank:
        model = with_lora(model, usual_lora(config.lora_rank))
    else:
        model = model.float().requires_grad_(True)
    folder = None if state_folder is None else Path(state_folder)
    if texts:
        items = _text_items(tokenizer, texts)
        passes = replace(config, steps=pretrain_steps, epochs=3.0, weight_decay=0.1)
        module = PrefixModule(model, signal, config.pretrain_weight, plain=True)
        _train(module, tokenizer, items, passes, folder and folder / "pretraining", reporter, "pre-training the signal")
        module.detach()
    items = language_items(tokenizer, material, recovery=config.recovery, seed=config.seed)
    module = PrefixModule(model, signal, config.cls_weight)
    losses = _train(module, tokenizer, items, config, folder and folder / "alignment", reporter, "aligning the signal")
    signal = module.detach()
    signal.training = {**describe(config), "material": len(items), "texts": len(texts), "last_loss": losses[-1]}
    adapter = model if config.lora_rank else None
    model = model.eval().requires_grad_(False)
    calibrated = calibrate(model, tokenizer, signal, validation, config, frames=held_frames, reporter=reporter)
    # The paper's thresholds are fixed; what calibration would choose is kept beside them.
    return TrainedPrefix(model, replace(calibrated, policy=config.policy), adapter)


def _train(
    module: PrefixModule, tokenizer: Any, items: Sequence[LanguageItem], config: SignalConfig, folder: Path | None,
    reporter: Reporter, label: str,
) -> list[float]:  # fmt: skip
    from keelguard.training_loop import Data

    pad_id = pad_id_of(tokenizer)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return prefix_batch([each["item"] for each in batch], pad_id)

    digest = sha256_of([[item.ids, item.labels, item.malicious] for item in items])
    data = Data([{"item": item} for item in items], collate, digest)
    return run_trainer(module, tokenizer, data, config, folder, reporter, label)


def _text_items(tokenizer: Any, texts: Sequence[Text]) -> list[LanguageItem]:
    """Plain texts, each token of which carries the language model's loss."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [start + tokenizer(each.text, add_special_tokens=False)["input_ids"] for each in texts]
    return [
        LanguageItem(ids, ids, Span(len(start), len(ids)), Span(len(ids), len(ids)), each.malicious)
        for ids, each in zip(rows, texts, strict=True)
    ]
