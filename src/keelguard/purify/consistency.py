"""Make an insertion leave no trace: the activations behind it are to be those of the chat without it.

    kept = remember_activations(model, tokenizer, chats)                    # of the model as it came
    numbered = [(number, chats[number] with an insertion), ...]
    train_on_chats(model, tokenizer, others, config, methods=[ActivationConsistency(kept, numbered)])

Source: activation consistency training (Irpan et al. 2025, arXiv 2510.27062), which draws the residual stream of a
prompt in a wrapper to that of the plain prompt in the model as it came, over their longest common suffix. Here the
suffix takes the answer with it, the distance is relative, and of at most eight layers, the last one behind the final
norm; what the model as it came did is kept, so that no second model is needed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from keelguard.batches import pad, pad_id_of
from keelguard.fitting import most_tokens, read_in_order
from keelguard.models import execution_device
from keelguard.records import Chat
from keelguard.training import Method, Run, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYERS = 8
"""Layers whose outputs are compared, evenly spaced, the last among them (behind the final norm); all of fewer."""

_LEAST_SQUARE = 1e-6
_ROWS = 16
_LABEL = "activation consistency"


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
    """Add λ times the distance of activations with an insertion from those without, as they were kept, to the loss.

    Dropout, which a model's own adapter may bring, counts as distance.
    """

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
        ids = encode_rows(run.model, run.tokenizer, [chat for _, chat in self.inserted], _LABEL).ids
        self.pairs = [pair_of(self.kept[number], row) for (number, _), row in zip(self.inserted, ids, strict=True)]

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
        UsageError: a chat is longer than the model's context.
        FailureError: a single chat does not fit in memory.
    """
    if not chats:
        return []
    rows, pad_id = encode_rows(model, tokenizer, chats, _LABEL).ids, pad_id_of(tokenizer)

    def read(part: list[int]) -> list[Plain]:
        some = [rows[i] for i in part]
        layers = torch.stack([layer.cpu() for layer in _outputs(model, some, pad_id)])
        return [Plain(row, layers[:, i, : len(row)].clone()) for i, row in enumerate(some)]

    # The outputs of all layers lie there at a time, where other passes keep those of one.
    most = max(1, most_tokens(model) // LAYERS)
    return read_in_order(model, [len(ids) for ids in rows], _ROWS, most, read, "remembering a model's activations")


def activation_distance(model: Any, pairs: Sequence[Pair], pad_id: int) -> torch.Tensor:
    """The distance of every pair, (pairs,): ‖h − h′‖² / ‖h‖², mean over layers and shared tokens.

    h are the kept outputs of a layer without the insertion, h′ the model's with it. A pair that shares no token has the
    distance 0.
    """
    which = torch.tensor([i for i, pair in enumerate(pairs) for _ in range(pair.shared)], dtype=torch.long)
    where = torch.cat([torch.arange(len(pair.inserted) - pair.shared, len(pair.inserted)) for pair in pairs])
    kept = torch.cat([pair.plain.activations[:, len(pair.plain.ids) - pair.shared :] for pair in pairs], dim=1)
    layers = []
    outputs = _outputs(model, [pair.inserted for pair in pairs], pad_id)
    for before, layer in zip(kept, outputs, strict=True):
        now = layer[which.to(layer.device), where.to(layer.device)].float()
        before = before.to(layer.device).float()
        size = before.square().sum(-1).clamp(min=_LEAST_SQUARE)
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
