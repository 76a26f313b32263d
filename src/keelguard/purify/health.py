"""How a model fares on clean chats that purification never trained on: skills, refusals, and accidental triggers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from keelguard.attacks.insertions import PLACES, insert, random_words
from keelguard.batches import pad_id_of
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.judges import is_degenerate, is_refusal
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.effects import ANSWERS, Held, ask, is_right, opened_references, own_references
from keelguard.purify.keep import Kept, divergence, remember
from keelguard.purify.material import Material
from keelguard.records import Chat, Request
from keelguard.stats import Rate
from keelguard.training import chat_loss

MOST = 96
"""Requests of a kind to measure with at most."""

_AT_ONCE = 4
"""Chats along which the divergence is computed at a time: their logits are wide."""

_HELD = 200
"""Harmless requests to hold ready at most: a thorough run's canaries are measured with as many."""

T = TypeVar("T")


@dataclass(frozen=True)
class Health:
    """A model on held-out clean requests.

    Attributes:
        utility: tasks that are solved; without tasks, harmless requests that are answered right (see `is_right`).
        refused: harmful requests that are refused.
        over_refusal: harmless requests that are refused.
        degenerate: clean requests with an empty or looping answer.
        accidental: clean requests whose right answer goes wrong when unrelated words are put in.
        inserted_degenerate: those with an empty or looping answer.
        loss: nats per token on held-out clean chats.
        divergence: KL(input model ‖ this one), nats per token along the same answers.
    """

    utility: Rate
    refused: Rate
    over_refusal: Rate
    degenerate: Rate
    accidental: Rate
    inserted_degenerate: Rate
    loss: float
    divergence: float

    def to_json(self) -> dict[str, Any]:
        """The figures as a report holds them."""
        return {k: v.to_json() if isinstance(v, Rate) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Health":
        """The inverse of `to_json`."""
        values: dict[str, Any] = {k: Rate.from_json(v) if isinstance(v, dict) else v for k, v in data.items()}
        return cls(**values)


class Examiner:
    """Measures the health of a model and of what becomes of it, on the same requests and words."""

    def __init__(
        self,
        original: LoadedModel,
        material: Material,
        words: Sequence[str],
        held: Held | None = None,
        generating: Generating = ANSWERS,
        seed: int = 0,
        *,
        trusted: bool = True,
    ) -> None:
        """Measure with held-out requests, by default the clean chats that measure.

        Args:
            trusted: whether the original's own answers may serve as references; where it is to be thrown away, those
                of the rows do.
        """
        if held is None:
            held = held_out(material)
            few = held.benign[:_HELD]
            own = own_references(original, few, generating) if trusted else opened_references(few)
            held = replace(held, benign=own)
        self.held = held
        self.chats = (material.held or material.validation)[:MOST]
        self.kept: list[Kept] = remember(original.model, original.tokenizer, self.chats)
        self.words, self.generating, self.seed = list(words), generating, seed

    def __call__(self, loaded: LoadedModel, reporter: Reporter = SILENT, label: str = "health") -> Health:
        """Measure one model."""
        held, draw = self.held, random.Random(f"health-{self.seed}")
        tasks, strange = evenly(held.utility, MOST), held.benign[:MOST]
        clean = [*tasks, *strange, *held.harmful[:MOST]]
        prompts = [insert(r.prompt, random_words(self.words, draw, 3), draw.choice(PLACES), draw) for r in strange]
        texts = ask(
            loaded, [*clean, *strange], [*(r.prompt for r in clean), *prompts], self.generating, reporter, label
        )
        solved, rest = texts[: len(tasks)], texts[len(tasks) :]
        plain, rest = rest[: len(strange)], rest[len(strange) :]
        refusals, moved = rest[: len(held.harmful[:MOST])], rest[len(held.harmful[:MOST]) :]
        right = [is_right(r, text) for r, text in zip(strange, plain, strict=True)]
        still = [is_right(r, text) for r, text in zip(strange, moved, strict=True)]
        model: Any = loaded.model
        with torch.no_grad():
            parts = (self.kept[i : i + _AT_ONCE] for i in range(0, len(self.kept), _AT_ONCE))
            gap = sum(float(divergence(model, part, pad_id_of(loaded.tokenizer)).sum()) for part in parts)
        positions = sum(len(row.tokens) for row in self.kept)
        return Health(
            utility=Rate.of([is_right(r, text) for r, text in zip(tasks, solved, strict=True)] if tasks else right),
            refused=Rate.of([is_refusal(text.strip()) for text in refusals]),
            over_refusal=Rate.of([is_refusal(text.strip()) for text in plain]),
            degenerate=Rate.of([is_degenerate(text.strip()) for text in [*solved, *plain]]),
            accidental=Rate.of([not after for before, after in zip(right, still, strict=True) if before]),
            inserted_degenerate=Rate.of([is_degenerate(text.strip()) for text in moved]),
            loss=chat_loss(loaded.model, loaded.tokenizer, self.chats),
            # Of a model from itself rounding may leave it a hair below nothing.
            divergence=max(0.0, gap / max(1, positions)),
        )


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, spread over all: tasks of one kind stand together in many a file."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def held_out(material: Material) -> Held:
    """The chats that measure, as requests: the references are the chats' own answers."""
    part = "held" if material.held else "validation"
    benign = [_request(i, chat, "benign") for i, chat in enumerate(material.answered(part))]
    harmful = [_request(i, chat, "harmful") for i, chat in enumerate(material.refused(part))]
    return Held(benign=tuple(benign), harmful=tuple(harmful))


def _request(number: int, chat: Chat, label: str) -> Request:
    return Request(id=f"{label}-{number}", messages=chat[:-1], answer=chat[-1]["content"], label=label)
