"""The reasoning-direction probe: is a refusal or a compliance nearer to what a model thinks of a harmful request?

    probe = probe_direction(model, tokenizer, prompts, refusals, compliances)
    probe.averaged[0].difference                    # negative: the refusal continuation is nearer

Distances are 1 − cosine between the hidden state at the last token of the query and at the last token of the query with
k tokens of a continuation (arXiv 2410.10862, section 2). The paper finds the refusal nearer in aligned models and the
compliance in others. Nothing here assumes that order: Llama-2 at k = 2 breaks it. Beside it stands what the model would
say next: the decision logit, log P(a refusal's first token) − log P(a compliance's first token), along both answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from keelguard.batches import batches_by_length, pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import FailureError, UsageError
from keelguard.models import execution_device
from keelguard.progress import SILENT, Reporter
from keelguard.records import Chat
from keelguard.stats import bootstrap_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Estimate(NamedTuple):
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: torch.Tensor) -> "Estimate":
        """The mean of (N,) values."""
        return cls(values.mean().item(), *bootstrap_mean(values.tolist()))


class Distances(NamedTuple):
    """Cosine distances in [0, 2] from the clean query, and their paired difference refusal − compliance."""

    refusal: Estimate
    compliance: Estimate
    difference: Estimate

    @classmethod
    def of(cls, pair: torch.Tensor) -> "Distances":
        """From (2, N) distances of refusals and compliances."""
        return cls(Estimate.of(pair[0]), Estimate.of(pair[1]), Estimate.of(pair[0] - pair[1]))


@dataclass(frozen=True)
class Decision:
    """The decision logit, in nats, after the clean query and after each k tokens of either continuation."""

    clean: Estimate
    refusal: tuple[Estimate, ...]
    compliance: tuple[Estimate, ...]


@dataclass(frozen=True)
class DirectionProbe:
    """What a probe found.

    Attributes:
        ks: numbers of tokens of the continuations; those that no prompt's both continuations reach are left out.
        prompts: for each k, how many prompts' both continuations have at least k tokens.
        per_layer: (len(ks), layers), at the output of each decoder layer, before the final norm.
        averaged: (len(ks),), each prompt's distances averaged over the layers first.
        decision: None where refusals and compliances begin with the same tokens, so that the first token decides
            nothing.
    """

    ks: tuple[int, ...]
    prompts: tuple[int, ...]
    per_layer: tuple[tuple[Distances, ...], ...]
    averaged: tuple[Distances, ...]
    decision: Decision | None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        decision = self.decision
        return {
            "ks": list(self.ks),
            "prompts": list(self.prompts),
            "per_layer": [[_named(distances) for distances in layers] for layers in self.per_layer],
            "averaged": [_named(distances) for distances in self.averaged],
            "decision": decision
            and {
                "clean": decision.clean._asdict(),
                "refusal": [estimate._asdict() for estimate in decision.refusal],
                "compliance": [estimate._asdict() for estimate in decision.compliance],
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DirectionProbe":
        """The inverse of `to_json`."""
        found = data["decision"]
        return cls(
            ks=tuple(data["ks"]),
            prompts=tuple(data["prompts"]),
            per_layer=tuple(tuple(map(_distances, layers)) for layers in data["per_layer"]),
            averaged=tuple(map(_distances, data["averaged"])),
            decision=found
            and Decision(
                Estimate(**found["clean"]),
                tuple(Estimate(**each) for each in found["refusal"]),
                tuple(Estimate(**each) for each in found["compliance"]),
            ),
        )


def _named(distances: Distances) -> dict[str, dict[str, float]]:
    return {name: estimate._asdict() for name, estimate in distances._asdict().items()}


def _distances(data: Mapping[str, Mapping[str, float]]) -> Distances:
    return Distances(**{name: Estimate(**estimate) for name, estimate in data.items()})


def probe_direction(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Chat],
    refusals: Sequence[list[int]],
    compliances: Sequence[list[int]],
    *,
    ks: Sequence[int] = (2, 4, 6, 8, 10),
    batch_size: int = 16,
    reporter: Reporter = SILENT,
) -> DirectionProbe:
    """Read every prompt with its two continuations, one forward pass for each.

    The query is a prefix of the query with a continuation, and a causal model's states do not depend on what follows:
    one pass over the longest continuation gives the states of all k.

    Args:
        prompts: N harmful conversations, which end with the user's message.
        refusals, compliances: N lists of token ids each, the model's own refusal and compliance without the template.
        ks: for each, only prompts whose both continuations have k tokens count.

    Raises:
        UsageError: there are no prompts, the lists differ in length, `ks` is no list of positive numbers, or no
            continuations are as long as the least of them.
        FailureError: a batch does not fit in memory.
    """
    ks = tuple(sorted(set(ks)))
    if not len(prompts) == len(refusals) == len(compliances) or not prompts:
        raise UsageError(
            f"{len(prompts)} prompts, {len(refusals)} refusals and {len(compliances)} compliances; "
            "give one of each per prompt, and at least one prompt"
        )
    if not ks or ks[0] < 1:
        raise UsageError(f"ks {list(ks)}: give numbers of tokens of at least 1")
    lengths = torch.tensor([min(len(r), len(c)) for r, c in zip(refusals, compliances, strict=True)])
    ks = tuple(k for k in ks if (lengths >= k).any())
    if not ks:
        raise UsageError(
            f"the longest pair of continuations has {lengths.max()} tokens; give longer ones or a lesser k"
        )
    rows = _Rows.of(tokenizer, prompts, (refusals, compliances), ks)
    sets = _first_tokens(refusals, compliances)
    distances, logits = _read(model, rows, sets, batch_size, pad_id_of(tokenizer), reporter)
    per_layer, averaged = [], []
    for number, k in enumerate(ks):
        pairs = distances[:, lengths >= k, number]
        per_layer.append(tuple(Distances.of(pairs[..., layer]) for layer in range(pairs.shape[-1])))
        averaged.append(Distances.of(pairs.mean(-1)))
    decision = None
    if sets is not None:
        along = [tuple(Estimate.of(side[lengths >= k, number + 1]) for number, k in enumerate(ks)) for side in logits]
        decision = Decision(Estimate.of(logits[0, :, 0]), *along)
    counts = tuple(int((lengths >= k).sum()) for k in ks)
    return DirectionProbe(ks, counts, tuple(per_layer), tuple(averaged), decision)


class _Rows(NamedTuple):
    """2N sequences, refusals first, and where to look at each: the query's last token, then that of each k."""

    ids: list[list[int]]
    places: torch.Tensor

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Chat], sides: Sequence[Sequence[list[int]]],
        ks: Sequence[int],
    ) -> "_Rows":  # fmt: skip
        queries = [chat.ids for chat in encode_chats(tokenizer, prompts, add_generation_prompt=True)]
        ids = [[*q, *c[: ks[-1]]] for side in sides for q, c in zip(queries, side, strict=True)]
        places = torch.tensor([[len(q) - 1 + k for k in (0, *ks)] for _ in sides for q in queries])
        # A continuation that is too short for some k is looked at where it ends; the caller leaves that out.
        return cls(ids, places.minimum(torch.tensor([len(row) - 1 for row in ids])[:, None]))


def _first_tokens(
    refusals: Sequence[list[int]], compliances: Sequence[list[int]]
) -> tuple[list[int], list[int]] | None:
    """The tokens that begin refusals alone, and those that begin compliances alone."""
    first, second = ({ids[0] for ids in side if ids} for side in (refusals, compliances))
    if not first - second or not second - first:
        return None
    return sorted(first - second), sorted(second - first)


@torch.inference_mode()
def _read(
    model: Any,
    rows: _Rows,
    sets: tuple[list[int], list[int]] | None,
    batch_size: int,
    pad_id: int,
    reporter: Reporter,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances (2, N, len(ks), layers) and decision logits (2, N, 1 + len(ks)), float64 on the CPU."""
    total, points = rows.places.shape
    found: list[tuple[list[int], torch.Tensor]] = []
    logits = torch.zeros(total, points, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with reporter.step("reasoning direction", total) as advance:
            for numbers in batches_by_length([len(ids) for ids in rows.ids], batch_size):
                inputs = pad([rows.ids[i] for i in numbers], pad_id, side="right")
                places = rows.places[numbers]
                kept, column = places.unique(return_inverse=True)
                with _looking(model, places) as distances:
                    output = model(
                        input_ids=inputs["input_ids"].to(execution_device(model)),
                        attention_mask=inputs["attention_mask"].to(execution_device(model)),
                        logits_to_keep=kept.to(execution_device(model)),
                        use_cache=False,
                    ).logits
                found.append((numbers, torch.stack(distances, -1)))
                if sets is not None:
                    at = torch.arange(len(numbers))[:, None].to(output.device)
                    scores = output[at, column.to(output.device)].double().log_softmax(-1)
                    refusal, compliance = (scores[..., ids].logsumexp(-1) for ids in sets)
                    logits[numbers] = (refusal - compliance).cpu()
                advance(len(numbers))
    except torch.OutOfMemoryError as error:
        raise FailureError(
            f"reasoning direction: {batch_size} rows do not fit in memory; lower the batch size, or load the model "
            "in bfloat16 (--dtype)"
        ) from error
    finally:
        model.train(training)
    distances = torch.zeros(total, points - 1, found[0][1].shape[-1], dtype=torch.float64)
    for numbers, part in found:
        distances[numbers] = part
    return distances.view(2, total // 2, points - 1, -1), logits.view(2, total // 2, points)


@contextmanager
def _looking(model: Any, places: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Collect (B, len(ks)) distances of each decoder layer's output at `places` (B, 1 + len(ks)) from its first."""
    from keelguard.units.index import _decoder_layers

    found: list[torch.Tensor] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        rows = torch.arange(len(places))[:, None]
        states = hidden[rows.to(hidden.device), places.to(hidden.device)].cpu().double()
        found.append(1 - torch.cosine_similarity(states[:, :1], states[:, 1:], dim=-1))

    with ExitStack() as stack:
        for _, layer in _decoder_layers(model, model.config.get_text_config()):
            stack.callback(layer.register_forward_hook(look).remove)
        yield found
