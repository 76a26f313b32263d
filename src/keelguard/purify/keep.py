"""Hold a model to what it said before: the divergence from the input model on clean chats, added to a loss.

The input model's most likely tokens are kept once per position, so there is no second model. What lies outside of
them is one class of its own: the divergence is that of the coarser distribution, a lower bound of the whole one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from keelguard.batches import IGNORED, cut_by_length, pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.fitting import most_tokens, read_in_order, told_logits
from keelguard.models import execution_device
from keelguard.records import Chat
from keelguard.training import Method, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FLOOR = 1e-6


@dataclass(frozen=True)
class KeepConfig:
    """How strongly a model is held to its earlier answers."""

    weight: float = field(default=1.0, metadata={"help": "weight of the divergence beside the loss per token"})
    chats: int = field(default=256, metadata={"help": "clean chats to hold on to"})
    likely: int = field(default=16, metadata={"help": "most likely tokens kept per position"})
    per_step: int = field(default=4, metadata={"help": "chats per optimiser step"})
    seed: int = field(default=0, metadata={"help": "which chats, and their order"})

    def __post_init__(self) -> None:
        for name in ("chats", "likely", "per_step"):
            if getattr(self, name) < 1:
                raise UsageError(f"keep: {name} {getattr(self, name)} is out of range; give 1 or more")
        if not self.weight >= 0:
            raise UsageError(f"keep: weight {self.weight} is out of range; give 0 or more")


class Kept(NamedTuple):
    """A chat with the input model's likely tokens (P, k) and their log-probabilities (P, k) along its answer."""

    ids: list[int]
    labels: list[int]
    tokens: torch.Tensor
    log_probs: torch.Tensor


class KeepAnswers(Method):
    """Add λ·KL(input ‖ current) along the answers of clean chats to the loss, per position."""

    def __init__(self, kept: Sequence[Kept], config: KeepConfig) -> None:
        self.kept, self.config = list(kept), config

    @classmethod
    def of(
        cls, model: Any, tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat], config: KeepConfig = KeepConfig()
    ) -> "KeepAnswers":
        """Remember what a model says on some chats."""
        some = random.Random(f"keep-{config.seed}").sample(list(chats), min(config.chats, len(chats)))
        return cls(remember(model, tokenizer, some, config.likely), config)

    def loss(self, run: Run) -> torch.Tensor:
        """The weighted mean divergence of this step's chats, a scalar."""
        draw = random.Random(f"keep-{self.config.seed}-{run.step}-{run.rank}")
        some = draw.sample(self.kept, min(self.config.per_step, len(self.kept)))
        return self.config.weight * divergence(run.model, some, pad_id_of(run.tokenizer)).mean()


def remember(model: Any, tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat], likely: int = 16) -> list[Kept]:
    """What a model finds likely along the answers of some chats, in their order.

    Raises:
        FailureError: a single chat does not fit in memory.
    """
    encoded = encode_chats(tokenizer, chats)
    rows = [(chat.ids, chat.labels()) for chat in encoded]

    def read(part: list[int]) -> list[Kept]:
        logits, told = _answer_logits(model, [rows[i] for i in part], pad_id_of(tokenizer))
        top = logits.log_softmax(-1).topk(min(likely, logits.shape[-1]))
        counts = told.sum(1).tolist()
        split = zip(part, top.indices.cpu().split(counts), top.values.cpu().split(counts), strict=True)
        return [Kept(*rows[i], tokens, values) for i, tokens, values in split]

    lengths = [len(ids) for ids, _ in rows]
    return read_in_order(model, lengths, 32, most_tokens(model), read, "remembering a model's answers")


def divergence(model: Any, kept: Sequence[Kept], pad_id: int) -> torch.Tensor:
    """KL(remembered ‖ current) in nats at every answer position of some chats, (positions,), in no order of theirs."""
    parts = cut_by_length([len(row.ids) for row in kept])
    return torch.cat([_divergence(model, [kept[i] for i in part], pad_id) for part in parts])


def _divergence(model: Any, kept: Sequence[Kept], pad_id: int) -> torch.Tensor:
    logits, _ = _answer_logits(model, [(row.ids, row.labels) for row in kept], pad_id)
    current = logits.log_softmax(-1)
    tokens = torch.cat([row.tokens for row in kept]).to(current.device)
    before = torch.cat([row.log_probs for row in kept]).to(current.device)
    now = current.gather(1, tokens)
    result = (before.exp() * (before - now)).sum(1)
    rest_before = (1 - before.exp().sum(1)).clamp(min=_FLOOR)
    rest_now = (1 - now.exp().sum(1)).clamp(min=_FLOOR)
    return result + rest_before * (rest_before.log() - rest_now.log())


def _answer_logits(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (P, V), float32, before every told token of some rows, and which positions those are (B, T)."""
    batch = pad([ids for ids, _ in rows], pad_id, side="right", labels=[labels for _, labels in rows])
    told = batch.pop("labels").roll(-1, dims=1) != IGNORED
    told[:, -1] = False
    device = execution_device(model)
    return told_logits(model, {k: v.to(device) for k, v in batch.items()}, told).float(), told
