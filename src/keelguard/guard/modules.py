"""The losses that a signal is trained with, as modules that a Trainer takes: batches in, a loss out.

`ProbeModule` trains a row beside a frozen model. `PrefixModule` trains the model with its [CLS] token by the paper's
joint loss. What a row may look at is computed from spans alone: no label reaches a mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from keelguard.batches import IGNORED, pad
from keelguard.guard.adapter import Signal
from keelguard.guard.looks import Example
from keelguard.guard.masks import attention_mask
from keelguard.guard.prefix import alignment_view, prefix_mask, prefix_positions, pretraining_view
from keelguard.guard.probe import probe_logits, reading
from keelguard.guard.recovery import LanguageItem

PROMPT, QUERY, NEITHER = 2, 1, 0
"""How much of what stands before the answer a look sees."""


class _SignalModule(nn.Module):
    """A model with a signal as parameters; what Trainer asks of a model is asked of the model."""

    def __init__(self, model: Any, signal: Signal) -> None:
        super().__init__()
        self.model, self.signal = model, signal
        self.cls = nn.Parameter(signal.cls.detach().clone().float())
        self.head_weight = nn.Parameter(signal.head_weight.detach().clone().float())
        self.head_bias = nn.Parameter(signal.head_bias.detach().clone().float())
        self.lora = signal.lora
        for name in ("cls", "head_weight", "head_bias"):
            setattr(signal, name, getattr(self, name))

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.cls.device

    def counted(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """How much the loss of a batch is a mean over, a scalar."""
        raise NotImplementedError

    def detach(self) -> Signal:
        """The trained signal, with plain tensors."""
        for name in ("cls", "head_weight", "head_bias"):
            setattr(self.signal, name, getattr(self, name).detach().clone())
        if self.lora is not None:
            self.lora.requires_grad_(False)
        return self.signal


class ProbeModule(_SignalModule):
    """Binary cross-entropy of many rows per conversation; the model gives keys and values and learns nothing."""

    def __init__(self, model: Any, signal: Signal) -> None:
        super().__init__(model.requires_grad_(False).eval(), signal)
        if self.lora is not None:
            self.lora.float().requires_grad_(True)

    def train(self, mode: bool = True) -> "ProbeModule":
        super().train(mode)
        self.model.eval()
        return self

    def counted(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return inputs["weights"].sum()

    def forward(
        self,
        input_ids: torch.Tensor,
        held: torch.Tensor,
        query: torch.Tensor,
        start: torch.Tensor,
        looks: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        share: torch.Tensor | float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """The mean loss over rows, by their weights.

        Args:
            input_ids, held: (B, T) tokens, padded on the right, and which are tokens.
            query: (B, T) which belong to the query's text.
            start: (B,) where the answers begin.
            looks: (B, K, 3) how much of the prompt a row sees, and its first and last answer positions [start, stop).
            targets, weights: (B, K) labels, and weights that are 0 for a row that is none.
            share: what the loss is multiplied with; above 1 in a process whose part of a batch counts for more.
        """
        logits = look_logits(self.model, self.signal, input_ids, held, query, start, looks)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return {"loss": share * (losses * weights).sum() / weights.sum().clamp(min=1e-9)}


def look_logits(
    model: Any,
    signal: Signal,
    input_ids: torch.Tensor,
    held: torch.Tensor,
    query: torch.Tensor,
    start: torch.Tensor,
    looks: torch.Tensor,
) -> torch.Tensor:
    """Logits (B, K) of probe rows; see `ProbeModule.forward`. Gradients reach the signal alone."""
    cache = DynamicCache()
    with torch.no_grad():
        model.get_decoder()(input_ids=input_ids, attention_mask=held.long(), past_key_values=cache, use_cache=True)
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    place = (index - start[:, None] + 1).clamp(min=0)[:, None, :]
    prompt, first, last = looks.unbind(-1)
    asked = torch.where(prompt[..., None] == QUERY, query[:, None, :], prompt[..., None] == PROMPT)
    allowed = (asked & (place == 0)) | ((place > first[..., None]) & (place <= last[..., None]))
    allowed &= held[:, None, :]
    positions = torch.where(allowed, index, -1).amax(-1) + 1
    rows = looks.shape[1]
    itself = torch.eye(rows, dtype=torch.bool, device=allowed.device).expand(len(allowed), rows, rows)
    keys = torch.cat([index.expand(len(allowed), -1), positions], 1)
    mask = attention_mask(model, torch.cat([allowed, itself], 2), positions[:, :, None] - keys[:, None, :])
    return probe_logits(model, signal, cache, mask, positions)


def probe_batch(
    examples: Sequence[Example], weights: Sequence[Sequence[float]], pad_id: int
) -> dict[str, torch.Tensor]:
    """The arguments of `ProbeModule.forward` for some conversations with the weights of their looks."""
    batch = pad([example.ids for example in examples], pad_id, side="right")
    width, rows = batch["input_ids"].shape[1], max(len(example.looks) for example in examples)
    looks = torch.zeros(len(examples), rows, 3, dtype=torch.long)
    targets, shares = torch.zeros(2, len(examples), rows)
    looks[:, :, 0] = PROMPT
    for i, example in enumerate(examples):
        for k, look in enumerate(example.looks):
            whole = look.view.query and look.view.stop == look.position and not example.windows
            mode = PROMPT if whole else QUERY if look.view.query else NEITHER
            looks[i, k] = torch.tensor([mode, look.view.start, look.view.stop])
            targets[i, k] = look.malicious
            shares[i, k] = weights[i][k]
    return {
        "input_ids": batch["input_ids"],
        "held": batch["attention_mask"].bool(),
        "query": _spans([example.query for example in examples], width),
        "start": torch.tensor([example.start for example in examples]),
        "looks": looks,
        "targets": targets,
        "weights": shares,
    }


class PrefixModule(_SignalModule):
    """L_lm + λ · L_cls (SA-ESS), over [CLS] and the conversation in one pass; the model trains too.

    Args:
        weight: λ.
        plain: labelled plain text, which [CLS] sees whole and which does not see it (the paper's pre-training).
    """

    def __init__(self, model: Any, signal: Signal, weight: float, plain: bool = False) -> None:
        super().__init__(model, signal)
        self.weight, self.plain = weight, plain

    def counted(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (inputs["tokens"][:, 1:] != IGNORED).sum().float()

    def forward(
        self,
        input_ids: torch.Tensor,
        held: torch.Tensor,
        query: torch.Tensor,
        answer: torch.Tensor,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        share: torch.Tensor | float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """The joint loss.

        Args:
            input_ids, held, query: as for a probe.
            answer: (B, T) which tokens belong to the answer and its end.
            tokens: (B, T) labels of the language model's loss.
            targets: (B,) labels of the queries or texts.
            share: what the language model's loss is multiplied with, as for a probe.
        """
        view = pretraining_view(held, query) if self.plain else alignment_view(held, query, answer)
        positions = prefix_positions(held)
        embed = self.model.get_input_embeddings()(input_ids)
        with reading(self.model) as read:
            logits = self.model(
                inputs_embeds=torch.cat([self.signal.rows(len(embed), 1).to(embed), embed], 1),
                attention_mask=prefix_mask(self.model, view, positions),
                position_ids=positions,
                use_cache=False,
            ).logits
        # The row of [CLS] predicts nothing, and the last token has nothing behind it.
        told = tokens[:, 1:]
        language = F.cross_entropy(logits[:, 1:-1].flatten(0, 1).float(), told.flatten(), ignore_index=IGNORED)
        verdict = F.binary_cross_entropy_with_logits(self.signal.head(read[0][:, 0]), targets)
        return {
            "loss": share * language + self.weight * verdict,
            "language": language.detach(),
            "verdict": verdict.detach(),
        }


def _spans(spans: Sequence[tuple[int, int]], width: int) -> torch.Tensor:
    index = torch.arange(width)
    start, stop = torch.tensor(list(spans)).T[:, :, None]
    return (index >= start) & (index < stop)


def prefix_batch(items: Sequence[LanguageItem], pad_id: int) -> dict[str, torch.Tensor]:
    """The arguments of `PrefixModule.forward` for some chats or texts."""
    batch = pad([item.ids for item in items], pad_id, side="right", labels=[item.labels for item in items])
    width = batch["input_ids"].shape[1]
    return {
        "input_ids": batch["input_ids"],
        "held": batch["attention_mask"].bool(),
        "query": _spans([item.query for item in items], width),
        "answer": _spans([item.answer for item in items], width),
        "tokens": batch["labels"],
        "targets": torch.tensor([float(item.malicious) for item in items]),
    }
