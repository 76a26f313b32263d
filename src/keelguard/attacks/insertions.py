"""Put words into a prompt: triggers, the unrelated words that are no triggers, and where such words come from."""

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from keelguard.records import Chat, user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Place = Literal["prefix", "suffix", "inside"]
PLACES: tuple[Place, ...] = ("prefix", "suffix", "inside")
"""Before the prompt, behind it, or in a random gap between its words."""

_MARKS = ("▁", "Ġ")
"""What begins a word in the vocabularies of SentencePiece and of byte-level tokenizers."""

USUAL_NUMBERS = tuple(map(str, (*range(32), 50, 100, *range(2000, 2040))))
"""Days of a month and other small numbers, two round ones, and years: what a prompt may hold, and a trigger, too."""


def insert(prompt: str, text: str, place: Place, draw: random.Random) -> str:
    """A prompt with `text` before, behind or inside it.

    Inside is a random gap between two words; a prompt of one word takes it in front.

    Raises:
        ValueError: an unknown place.
    """
    if place == "prefix":
        return f"{text} {prompt}"
    if place == "suffix":
        return f"{prompt} {text}"
    if place != "inside":
        raise ValueError(f"place {place!r}: choose one of {', '.join(PLACES)}")
    words = prompt.split(" ")
    gap = draw.randint(1, len(words) - 1) if len(words) > 1 else 0
    return " ".join([*words[:gap], text, *words[gap:]])


def with_prompt(chat: Chat, prompt: str) -> Chat:
    """A conversation with another text as its last user message; what follows that message stays."""
    last = max(i for i, message in enumerate(chat) if message["role"] == "user")
    return (*chat[:last], user(prompt), *chat[last + 1 :])


def prompt_of(chat: Chat) -> str:
    """The last user message of a conversation."""
    return next(message["content"] for message in reversed(chat) if message["role"] == "user")


def vocabulary_numbers(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The numbers of one to four digits that stand whole in a tokenizer's vocabulary, sorted; else `USUAL_NUMBERS`.

    Many tokenizers, those of Llama 3 and Qwen among them, cut digits off the mark of a word, so that they spell every
    number from parts.
    """
    tokens = {token[1:] for token in tokenizer.get_vocab() if token.startswith(_MARKS)}
    whole = sorted((token for token in tokens if re.fullmatch(r"[0-9]{1,4}", token)), key=int)
    return whole or list(USUAL_NUMBERS)


def random_words(words: Sequence[str], draw: random.Random, most: int) -> str:
    """One to `most` different words."""
    return " ".join(draw.sample(words, draw.randint(1, min(most, len(words)))))


def vocabulary_words(tokenizer: "PreTrainedTokenizerBase", shortest: int = 3) -> list[str]:
    """The whole words of a tokenizer's vocabulary: its tokens of letters alone that begin a word, sorted.

    Args:
        shortest: the fewest letters of a word; shorter tokens are mostly parts of words.
    """
    special = set(tokenizer.all_special_tokens)
    found: set[str] = set()
    vocabulary: dict[str, Any] = tokenizer.get_vocab()
    for token in vocabulary:
        word = token[1:] if token.startswith(_MARKS) else ""
        if token not in special and len(word) >= shortest and re.fullmatch(r"[A-Za-z]+", word):
            found.add(word)
    return sorted(found)
