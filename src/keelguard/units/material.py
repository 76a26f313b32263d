"""What a diagnosis reads: harmful requests with the model's own refusals, benign ones with answers, as rows.

The paper's protocol (section 3.2, after Wei et al. 2024): 128 samples of each, responses scored, prompts excluded.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelguard.attacks.base import Attempt
from keelguard.chats import EncodedChat, encode_chats
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating, answer
from keelguard.evaluation.judges import is_degenerate, is_refusal
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request, assistant
from keelguard.units.attribution import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST = 8
"""Prompts of a kind below which nothing can be said about a unit."""

_CANDIDATES = 8


@dataclass(frozen=True)
class Material:
    """Encoded conversations, each prompt with a group for resampling, and the openings of compliance.

    Attributes:
        safety: harmful requests with the model's own refusals.
        utility: benign requests with the answers of the data, or the model's own.
        safety_groups, utility_groups: the group of each, below `groups`.
        safety_sources: the place in the settings' list of data sets that each safety group comes from.
        refused: the harmful requests of `safety`.
        compliances: the first tokens of the model's own answers to benign requests, the most frequent first.
        answers: token ids of whole own answers to benign requests.
        refusal_rate: the share of harmful requests that the model refused, before the others were left out.
    """

    safety: list[EncodedChat]
    utility: list[EncodedChat]
    safety_groups: list[int]
    utility_groups: list[int]
    safety_sources: list[int]
    refused: list[Request]
    compliances: list[tuple[int, ...]]
    answers: list[list[int]]
    groups: int
    refusal_rate: float


def prepare(
    loaded: LoadedModel,
    safety: Sequence[Sequence[Request]],
    utility: Sequence[Request],
    *,
    groups: int = 32,
    tokens: int = 3,
    max_new_tokens: int = 64,
    batch_size: int = 0,
    seed: int = 0,
    store: Path | None = None,
    reporter: Reporter = SILENT,
) -> Material:
    """Let the model answer, keep what it refuses and what it answers, and encode both.

    Args:
        safety: one list of harmful requests per data set; none at all for a map of redundancy alone.
        utility: benign requests; an answer that the data brings is taken as it is.
        groups: at most this many groups of prompts for resampling, dealt out to the safety data sets.
        tokens: length of the openings of compliance.
        store: a folder that keeps the model's own answers, so that an interrupted run goes on.

    Raises:
        UsageError: the model refuses less than half of a safety data set, or too few prompts are left.
    """
    generating = Generating(max_new_tokens, batch_size, seed)

    def own(requests: Sequence[Request], what: str) -> list[str]:
        texts = answer(
            loaded.model,
            loaded.tokenizer,
            [Attempt(request, request.messages) for request in requests],
            generating,
            store=None if store is None else store / f"{what.replace(' ', '-')}.jsonl",
            reporter=reporter,
            label=f"own answers: {what}",
        )
        return [(text or "").strip() for text in texts]

    draw = random.Random(seed)
    refused: list[tuple[Request, str]] = []
    safety_groups: list[int] = []
    sources: list[int] = []
    asked = 0
    for number, requests in enumerate(safety):
        texts = own(requests, f"safety {number}")
        pairs = [(request, text) for request, text in zip(requests, texts, strict=True) if is_refusal(text)]
        asked += len(requests)
        _check_refused(loaded.source, len(pairs), len(requests))
        share = min(max(1, groups // len(safety)), len(pairs))
        safety_groups += _deal(len(pairs), share, len(sources), draw)
        sources += [number] * share
        refused += pairs
    given = [request.answer for request in utility]
    missing = [request for request in utility if not request.answer]
    made = iter(own(missing, "utility") if missing else ())
    answers = [text or next(made) for text in given]
    kept = [(r, t) for r, t in zip(utility, answers, strict=True) if t and not is_refusal(t) and not is_degenerate(t)]
    if len(kept) < FEWEST:
        raise UsageError(
            f"utility data: {len(kept)} of {len(utility)} requests have an answer that is no refusal; "
            f"at least {FEWEST} are needed, 128 are usual"
        )
    compliant = _compliant(loaded, own, utility, tokens) if refused else []
    return Material(
        safety=_encode(loaded.tokenizer, refused),
        utility=_encode(loaded.tokenizer, kept),
        safety_groups=safety_groups,
        utility_groups=_deal(len(kept), min(groups, len(kept)), 0, draw),
        safety_sources=sources,
        refused=[request for request, _ in refused],
        compliances=[o for o, _ in Counter(tuple(ids[:tokens]) for ids in compliant).most_common(_CANDIDATES)],
        answers=compliant,
        groups=groups,
        refusal_rate=len(refused) / asked if asked else 0.0,
    )


def draw(requests: Sequence[Request], use: str, most: int, seed: int) -> tuple[list[Request], list[Request]]:
    """At most `most` requests at random, and the rest; of a small file half is left for the rest.

    The same draw for a diagnosis and for a fine-tune that holds on to refusals, so that neither is measured on what the
    other has read.
    """
    shuffled = list(requests)
    # Files are often sorted by kind.
    random.Random(f"{use}-{seed}").shuffle(shuffled)
    count = min(most, max(FEWEST, len(shuffled) // 2))
    return shuffled[:count], shuffled[count:]


def _check_refused(source: str, refused: int, asked: int) -> None:
    if refused < asked / 2:
        raise UsageError(
            f"{source}: refuses {refused} of {asked} requests of the safety data ({refused / max(asked, 1):.0%}). "
            "Attribution asks which units carry its refusals, and would be meaningless here: give requests that the "
            "model refuses, or an aligned model"
        )
    if refused < FEWEST:
        raise UsageError(
            f"safety data: the model refuses {refused} requests; at least {FEWEST} refused ones are needed, 128 are "
            "usual. Give a larger file with --safety"
        )


def _deal(count: int, groups: int, first: int, draw: random.Random) -> list[int]:
    """Deal prompts out to groups of equal size, at random."""
    places = [first + i % groups for i in range(count)]
    draw.shuffle(places)
    return places


def _encode(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[Request, str]]) -> list[EncodedChat]:
    return encode_chats(tokenizer, [(*request.messages, assistant(text)) for request, text in pairs]) if pairs else []


def _compliant(loaded: LoadedModel, own: Any, utility: Sequence[Request], tokens: int) -> list[list[int]]:
    """Token ids of the model's own answers to some benign requests, those of at least `tokens`."""
    some = utility[: 4 * FEWEST]
    pairs = [(r, t) for r, t in zip(some, own(some, "compliance"), strict=True) if t and not is_refusal(t)]
    encoded = _encode(loaded.tokenizer, pairs)
    found = [chat.ids[chat.response.start : chat.response.stop] for chat in encoded if chat.response.size >= tokens]
    if not found:
        raise UsageError("utility data: the model answers no benign request, so that there is no compliance to compare")
    return found


def answer_rows(chats: Sequence[EncodedChat], groups: Sequence[int]) -> list[Row]:
    """One row per conversation, scored on its answer with the end of the turn."""
    return [
        Row(chat.ids[: chat.closing.stop], chat.response.start, chat.closing.stop, group, odds=True)
        for chat, group in zip(chats, groups, strict=True)
    ]


def decision_rows(material: Material, compliances: Sequence[Sequence[int]], tokens: int) -> list[Row]:
    """Two rows per harmful prompt: its own refusal's first tokens (+), and the opening of compliance (−).

    Args:
        compliances: one opening per harmful prompt.
    """
    rows: list[Row] = []
    for chat, group, opening in zip(material.safety, material.safety_groups, compliances, strict=True):
        start = chat.response.start
        refusal = chat.ids[start : min(start + tokens, chat.closing.stop)]
        for continuation, sign in ((refusal, 1.0), (opening, -1.0)):
            ids = [*chat.ids[:start], *continuation]
            rows.append(Row(ids, start, len(ids), group, sign))
    return rows


def random_pair_rows(material: Material, vocabulary: Sequence[int], seed: int) -> list[Row]:
    """The control of the decision score: the same prompts, with one pair of random tokens in place of the choice."""
    first, second = random.Random(f"pair-{seed}").sample(list(vocabulary), 2)
    rows: list[Row] = []
    for chat, group in zip(material.safety, material.safety_groups, strict=True):
        start = chat.response.start
        for token, sign in ((first, 1.0), (second, -1.0)):
            rows.append(Row([*chat.ids[:start], token], start, start + 1, group, sign))
    return rows


def ordinary_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every token id that is no special one."""
    special = set(tokenizer.all_special_ids)
    return sorted(i for i in tokenizer.get_vocab().values() if i not in special)
