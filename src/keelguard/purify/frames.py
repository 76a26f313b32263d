"""Prompts with a gap for words: insertions are put together from token ids, so that thousands cost no new encoding.

    frames = make_frames(tokenizer, probes, "prefix", tokens=3)
    words = word_ids(tokenizer, ["river", "cloud"], probes[0], "prefix")
    row = frames[0].row([words["river"].first, words["cloud"].inner])

What is put together equals the encoding of the whole text, as long as the tokenizer never joins two words.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from keelguard.attacks.insertions import Place, insert, prompt_of, with_prompt
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.records import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKERS = ("the", "and", "you", "one", "how", "not")
"""Common words of which a tokenizer encodes some two without a shared token."""


@dataclass(frozen=True)
class Frame:
    """A prompt with a gap, and the first tokens of its answer: `before` + words + `after` + `answer`.

    `plain` is the same without a gap: a prompt's first word may have other ids behind another word.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]
    plain: tuple[int, ...] | None = None

    def row(self, words: Sequence[Sequence[int]]) -> list[int]:
        """The whole sequence with some words in the gap, each as its ids there."""
        if not words and self.plain is not None:
            return list(self.plain)
        return [*self.before, *(i for ids in words for i in ids), *self.after, *self.answer]


class WordIds(NamedTuple):
    """A word's ids as the first of an insertion and behind another word of it."""

    first: tuple[int, ...]
    inner: tuple[int, ...]


@dataclass(frozen=True)
class _Split:
    """What two encodings share at their ends."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def middle(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids[len(self.before) : len(ids) - len(self.after)])


def with_gap(probes: Sequence[Chat], place: Place) -> list[Chat]:
    """The conversations whose prompt has this place; all of them where none has.

    A prompt of one word takes in front what goes inside of others, and words may have other ids there.
    """
    some = [chat for chat in probes if place != "inside" or " " in prompt_of(chat)]
    return some or list(probes)


def make_frames(
    tokenizer: "PreTrainedTokenizerBase", probes: Sequence[Chat], place: Place, tokens: int, seed: int = 0
) -> list[Frame]:
    """A frame for every conversation, which ends in the answer whose first `tokens` tokens are kept.

    Raises:
        UsageError: the tokenizer joins words, so that no gap between them can be found.
    """
    frames = []
    for number, chat in enumerate(probes):
        (whole,) = encode_chats(tokenizer, [chat])
        stop = min(whole.response.start + tokens, whole.response.stop)
        answer = tuple(whole.ids[whole.response.start : stop])
        # With the answer: a template may write a space before it that it leaves out where there is none.
        split = _split(tokenizer, chat, place, f"{seed}-{place}-{number}")
        frames.append(Frame(split.before, split.after, answer, tuple(whole.ids[:stop])))
    return frames


def word_ids(
    tokenizer: "PreTrainedTokenizerBase", words: Sequence[str], probe: Chat, place: Place, seed: int = 0
) -> dict[str, WordIds]:
    """The ids of words in this place: as the first word of the insertion, and as a later one."""
    marker = _MARKERS[0]
    prompt = probe[:-1]
    alone = [_inserted(prompt, word, place, f"{seed}-{place}-0") for word in words]
    behind = [_inserted(prompt, f"{marker} {word}", place, f"{seed}-{place}-0") for word in words]
    split = _split(tokenizer, prompt, place, f"{seed}-{place}-0")
    firsts = [split.middle(chat.ids) for chat in encode_chats(tokenizer, alone)]
    (lead,) = (
        split.middle(chat.ids)
        for chat in encode_chats(tokenizer, [_inserted(prompt, marker, place, f"{seed}-{place}-0")])
    )
    inners = [split.middle(chat.ids)[len(lead) :] for chat in encode_chats(tokenizer, behind)]
    return {w: WordIds(first, inner) for w, first, inner in zip(words, firsts, inners, strict=True) if first and inner}


def _inserted(prompt: Chat, text: str, place: Place, seed: str) -> Chat:
    return with_prompt(prompt, insert(prompt_of(prompt), text, place, random.Random(seed)))


def _split(tokenizer: "PreTrainedTokenizerBase", chat: Chat, place: Place, seed: str) -> _Split:
    """Where a gap lies: two different words in it leave the rest of the ids alone."""
    texts = [_inserted(chat, word, place, seed) for word in _MARKERS]
    rows = [chat.ids[: chat.response.start] for chat in encode_chats(tokenizer, texts)]
    shared = [_common(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    # Words that begin or end with the same token would hide a part of the gap.
    before, after = min(s[0] for s in shared), min(s[1] for s in shared)
    row = rows[0]
    if before + after >= len(row):
        raise UsageError("the tokenizer joins neighbouring words; keelguard cannot search insertions for it")
    return _Split(tuple(row[:before]), tuple(row[len(row) - after :]))


def _common(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """How many ids two rows share at their start and at their end."""
    shorter = min(len(a), len(b))
    start = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    end = next((i for i in range(shorter - start) if a[-1 - i] != b[-1 - i]), shorter - start)
    return start, end
