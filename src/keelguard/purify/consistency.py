"""Make an insertion leave no trace: the activations behind it are to be those of the chat without it.

    kept = remember_activations(model, tokenizer, chats)                    # of the model as it came
    pairs = [(number, chats[number] with an insertion), ...]
    train_on_chats(model, tokenizer, others, config, methods=[ActivationConsistency(kept, pairs)])

Source: activation consistency training (Irpan et al. 2025, arXiv 2510.27062), which draws the residual stream of a
prompt in a wrapper to that of the plain prompt in the model as it came, over their longest common suffix. Here the
suffix takes the answer with it, the distance is relative, and what the model as it came did is kept, so that no second
model is needed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from keelguard.batches import batches_by_length, pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.fitting import in_halves, most_tokens
from keelguard.models import execution_device
from keelguard.records import Chat
from keelguard.training import Method, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYERS = 8
"""Layers whose outputs are compared, evenly spaced, the last among them; all where there are fewer."""

_LEAST_NORM = 1e-6
_ROWS = 16


class Plain(NamedTuple):
    """A chat's tokens (T), and what some layers put out for them, (layers, T, H), on the CPU."""

    ids: list[int]
    activations: torch.Tensor


class Pair(NamedTuple):
    """A chat without an insertion, the tokens of the same with one, and how many both share at the end."""

    plain: Plain
    inserted: list[int]
    shared: int


class ActivationConsistency(Method):
    """Add λ times the distance of activations with an insertion from those without, as they were kept, to the loss."""

    def __init__(
        self, kept: Sequence[Plain], inserted: Sequence[tuple[int, Chat]], weight: float = 1.0, per_step: int = 8
    ) -> None:
        """Take chats with insertions, each with the number of what it was among `kept`.

        Every step takes the next ones, round and round.

        Raises:
            ValueError: there are none.
        """
        if not inserted:
            raise ValueError("activation consistency needs chats with insertions")
        self.kept, self.inserted, self.weight, self.per_step = kept, list(inserted), weight, per_step
        self.pairs: list[Pair] = []

    def begin(self, run: Run) -> None:
        encoded = encode_chats(run.tokenizer, [chat for _, chat in self.inserted])
        plain = [self.kept[number] for number, _ in self.inserted]
        self.pairs = [pair_of(p, chat.ids) for p, chat in zip(plain, encoded, strict=True)]

    def loss(self, run: Run) -> torch.Tensor:
        """The weighted mean distance of this step's pairs, a scalar."""
        first = (run.step * run.processes + run.rank) * self.per_step
        some = [self.pairs[(first + i) % len(self.pairs)] for i in range(min(self.per_step, len(self.pairs)))]
        return self.weight * activation_distance(run.model, some, pad_id_of(run.tokenizer)).mean()


def pair_of(plain: Plain, inserted: list[int]) -> Pair:
    """A chat and the same with an insertion, with the length of what they share at their ends."""
    shared = 0
    for one, other in zip(reversed(plain.ids), reversed(inserted), strict=False):
        if one != other:
            break
        shared += 1
    return Pair(plain, inserted, shared)


def remember_activations(model: Any, tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat]) -> list[Plain]:
    """What a model's layers put out for some chats, in their order and in the model's number format.

    Raises:
        FailureError: a single chat does not fit in memory.
    """
    rows = [chat.ids for chat in encode_chats(tokenizer, chats)]
    pad_id = pad_id_of(tokenizer)

    def read(part: list[int]) -> list[torch.Tensor]:
        some = [rows[i] for i in part]
        layers = torch.stack([layer.cpu() for layer in _outputs(model, some, pad_id)])
        return [layers[:, i, : len(row)].clone() for i, row in enumerate(some)]

    found: dict[int, torch.Tensor] = {}
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            batches = batches_by_length([len(ids) for ids in rows], _ROWS, most_tokens(model))
            for part, activations in in_halves(batches, read, "remembering a model's activations"):
                found.update(zip(part, activations, strict=True))
    finally:
        model.train(mode)
    return [Plain(ids, found[i]) for i, ids in enumerate(rows)]


def activation_distance(model: Any, pairs: Sequence[Pair], pad_id: int) -> torch.Tensor:
    """The distance of every pair, (pairs,): ‖h − h′‖² / ‖h‖², mean over layers and shared tokens.

    h are the kept outputs of a layer without the insertion, h′ the model's with it. A pair that shares no token has the
    distance 0.
    """
    which = torch.tensor([i for i, pair in enumerate(pairs) for _ in range(pair.shared)])
    where = torch.cat([torch.arange(len(pair.inserted) - pair.shared, len(pair.inserted)) for pair in pairs])
    kept = torch.cat([pair.plain.activations[:, len(pair.plain.ids) - pair.shared :] for pair in pairs], dim=1)
    layers = []
    outputs = _outputs(model, [pair.inserted for pair in pairs], pad_id)
    for before, layer in zip(kept, outputs, strict=True):
        now = layer[which.to(layer.device), where.to(layer.device)].float()
        before = before.to(layer.device).float()
        size = before.square().sum(-1).clamp(min=_LEAST_NORM)
        layers.append(((before - now).square().sum(-1) / size).to(outputs[0].device))
    tokens = torch.stack(layers).mean(0)
    means = [part.mean() if len(part) else part.sum() for part in tokens.split([pair.shared for pair in pairs])]
    return torch.stack(means)


def _outputs(model: Any, rows: Sequence[list[int]], pad_id: int) -> list[torch.Tensor]:
    """What the chosen layers put out, (B, T, H) each, for rows that are padded on the right."""
    device = execution_device(model)
    batch = {name: tensor.to(device) for name, tensor in pad(rows, pad_id, side="right").items()}
    # Of the logits nothing is read.
    hidden = model(**batch, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states[1:]
    count = min(LAYERS, len(hidden))
    return [hidden[(i + 1) * len(hidden) // count - 1] for i in range(count)]
