"""The words that all conditions of a shift are asked about: the first model's own refusals and compliances.

    words = agree_on_words(loaded, distributions, utility, config, tokens, folder)

Only the request, or the checkpoint, may differ between conditions. So a model that no longer refuses is measured, too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keelguard.attacks.base import Attempt
from keelguard.chats import EncodedChat
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating, answer
from keelguard.evaluation.judges import is_refusal
from keelguard.models import LoadedModel
from keelguard.pipeline.shift_data import Distribution
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request
from keelguard.units import material as materials
from keelguard.units.material import FEWEST

if TYPE_CHECKING:
    from keelguard.pipeline.shift import ShiftConfig

_OPENINGS = 8
_KS = (2, 4, 6, 8, 10)


@dataclass(frozen=True)
class Words:
    """What all conditions are asked about.

    Attributes:
        refusals, compliances: the openings of the first model's own answers, the most frequent first.
        texts: by distribution and request the first model's own answer to it.
        continuations: by key, token ids of a whole refusal and of a whole compliance.
        ks: lengths that all of those reach.
        utility: benign requests with their answers, encoded; `benign` are the same as requests.
    """

    refusals: list[tuple[int, ...]]
    compliances: list[tuple[int, ...]]
    texts: dict[str, list[str]]
    continuations: dict[str, tuple[list[int], list[int]]]
    ks: tuple[int, ...]
    utility: list[EncodedChat]
    benign: tuple[Request, ...]


def agree_on_words(
    loaded: LoadedModel,
    distributions: Sequence[Distribution],
    utility: Sequence[Request],
    config: "ShiftConfig",
    tokens: int,
    folder: Path,
    reporter: Reporter = SILENT,
) -> Words:
    """Let the first model answer everything, and take the words of its refusals and compliances.

    Args:
        utility: benign requests.
        tokens: length of the openings.
        folder: keeps the answers.

    Raises:
        UsageError: the model refuses less than half of the first distribution, or answers no benign request.
    """
    texts = {}
    for number, each in enumerate(distributions):
        # Under this name the preparation below finds those of the first.
        store = folder / f"safety-{number}.jsonl"
        texts[each.name] = own_answers(loaded, each, config, store, reporter)
    first = distributions[0]
    refused = sum(map(is_refusal, texts[first.name]))
    if refused < max(FEWEST, len(first.harmful) / 2):
        raise UsageError(
            f"{loaded.source}: refuses {refused} of {len(first.harmful)} requests of {first.name} ({first.source}); "
            f"the first distribution must be one that it refuses, at least half of it and {FEWEST} requests, since all "
            "others are measured by these refusals. Put another --data first, or name an aligned model"
        )
    material = materials.prepare(
        loaded,
        [list(first.harmful)],
        utility,
        tokens=tokens,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        store=folder,
        reporter=reporter,
    )
    own = [chat.ids[chat.response.start : chat.response.stop] for chat in material.safety]
    openings = Counter(tuple(ids[:tokens]) for ids in own if len(ids) >= tokens)
    if not openings:
        raise UsageError(
            f"{loaded.source}: no refusal has {tokens} tokens, which the unit map compares; diagnose again with less "
            "--tokens"
        )
    key_of = dict(zip((request.id for request in first.harmful), first.keys, strict=True))
    refusals = {key_of[request.id]: ids for request, ids in zip(material.refused, own, strict=True)}
    continuations, ks = _continuations(distributions, refusals, own, material.answers)
    return Words(
        refusals=[opening for opening, _ in openings.most_common(_OPENINGS)],
        compliances=material.compliances,
        texts=texts,
        continuations=continuations,
        ks=ks,
        utility=material.utility,
        benign=tuple(utility),
    )


def own_answers(
    loaded: LoadedModel, distribution: Distribution, config: "ShiftConfig", store: Path, reporter: Reporter = SILENT
) -> list[str]:
    """The model's own answers to the harmful requests; an empty text where a request does not fit its context."""
    found = answer(
        loaded.model,
        loaded.tokenizer,
        [Attempt(request, request.messages) for request in distribution.harmful],
        Generating(config.max_new_tokens, config.batch_size, config.seed),
        store=store,
        reporter=reporter,
        label=f"own answers: {distribution.name}",
    )
    return [(text or "").strip() for text in found]


def _continuations(
    distributions: Sequence[Distribution],
    refusals: Mapping[str, list[int]],
    spare: Sequence[list[int]],
    compliances: Sequence[list[int]],
) -> tuple[dict[str, tuple[list[int], list[int]]], tuple[int, ...]]:
    """By key its own refusal, or another's, and a compliance: long ones, so that all reach the same lengths."""
    longest = [sorted(pool, key=len)[-len(pool) // 2 :] for pool in (spare, compliances)]
    least = min(_KS[-1], *(len(pool[0]) for pool in longest))
    pools = [[ids for ids in pool if len(ids) >= least] for pool in longest]
    found = {}
    for number, key in enumerate(sorted({key for each in distributions for key in each.keys})):
        own = refusals.get(key, [])
        refusal = own if len(own) >= least else pools[0][number % len(pools[0])]
        found[key] = refusal, pools[1][number % len(pools[1])]
    return found, tuple(k for k in _KS if k <= least)
