"""Make an insertion leave no trace: the activations behind it are to be those of the chat without it.

    train_on_chats(model, tokenizer, chats, config, methods=[ActivationConsistency(pairs, weight=1.0, per_step=8)])

Source: activation consistency training (Irpan et al. 2025, arXiv 2510.27062), which compares the residual stream of a
prompt and of the same prompt in a wrapper over their longest common suffix. Two things are different here: chats take
the answer with them, and the activations without the insertion are those of the model as it is at that step, without a
gradient, so that no second model is needed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from keelguard.batches import pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.models import execution_device
from keelguard.records import Chat
from keelguard.training import Method, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST_NORM = 1e-6


class Pair(NamedTuple):
    """The tokens of a chat without and with an insertion, and how many they share at the end."""

    plain: list[int]
    inserted: list[int]
    shared: int


class ActivationConsistency(Method):
    """Add λ times the distance between activations without and with an insertion to the loss."""

    def __init__(self, pairs: Sequence[tuple[Chat, Chat]], weight: float = 1.0, per_step: int = 8) -> None:
        """Take pairs of a chat and the same with an insertion; every step takes the next ones, round and round.

        Raises:
            ValueError: there are none.
        """
        if not pairs:
            raise ValueError("activation consistency needs pairs of chats")
        self.chats, self.weight, self.per_step = list(pairs), weight, per_step
        self.pairs: list[Pair] = []

    def begin(self, run: Run) -> None:
        self.pairs = encode_pairs(run.tokenizer, self.chats)

    def loss(self, run: Run) -> torch.Tensor:
        """The weighted mean distance of this step's pairs, a scalar."""
        first = (run.step * run.processes + run.rank) * self.per_step
        some = [self.pairs[(first + i) % len(self.pairs)] for i in range(min(self.per_step, len(self.pairs)))]
        return self.weight * activation_distance(run.model, some, pad_id_of(run.tokenizer)).mean()


def encode_pairs(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[Chat, Chat]]) -> list[Pair]:
    """The tokens of some pairs, in their order."""
    sides = [encode_chats(tokenizer, [pair[side] for pair in pairs]) for side in (0, 1)]
    return [Pair(p.ids, i.ids, shared_suffix(p.ids, i.ids)) for p, i in zip(*sides, strict=True)]


def shared_suffix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their ends."""
    shared = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        shared += 1
    return shared


def activation_distance(model: Any, pairs: Sequence[Pair], pad_id: int) -> torch.Tensor:
    """The distance of every pair, (pairs,): ‖h − h′‖² / ‖h‖², mean over layers and shared tokens.

    h are the outputs of a layer without the insertion, which get no gradient, and h′ those with it. A pair that shares
    no token has the distance 0.
    """
    with torch.no_grad():
        plain = _activations(model, [pair.plain for pair in pairs], [pair.shared for pair in pairs], pad_id)
    inserted = _activations(model, [pair.inserted for pair in pairs], [pair.shared for pair in pairs], pad_id)
    layers = []
    for without, with_it in zip(plain, inserted, strict=True):
        without, with_it = without.float(), with_it.float()
        size = without.square().sum(-1).clamp(min=_LEAST_NORM)
        layers.append(((without - with_it).square().sum(-1) / size).to(layers[0].device if layers else size.device))
    tokens = torch.stack(layers).mean(0)
    means = [part.mean() if len(part) else part.sum() for part in tokens.split([pair.shared for pair in pairs])]
    return torch.stack(means)


def _activations(model: Any, rows: Sequence[list[int]], shared: Sequence[int], pad_id: int) -> list[torch.Tensor]:
    """Every layer's outputs (N, H) at the last `shared` tokens of each row, row by row."""
    batch = pad(rows, pad_id, side="right")
    device = execution_device(model)
    which = torch.tensor([i for i, count in enumerate(shared) for _ in range(count)])
    where = torch.tensor(
        [place for row, count in zip(rows, shared, strict=True) for place in range(len(row) - count, len(row))]
    )
    # Of the logits nothing is read.
    hidden = model(
        **{name: tensor.to(device) for name, tensor in batch.items()},
        output_hidden_states=True, use_cache=False, logits_to_keep=1,
    ).hidden_states  # fmt: skip
    return [layer[which.to(layer.device), where.to(layer.device)] for layer in hidden[1:]]
