"""A model's answers to attempts, kept on disk batch by batch, so that an interrupted audit loses one batch."""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from keelguard.attacks.base import Attempt
from keelguard.batches import Span
from keelguard.chats import encode_chats
from keelguard.evaluation.judges import is_refusal
from keelguard.evaluation.sharding import AnswerStore, Turns
from keelguard.generation import Answer, Decoder, Prompt, default_batch_size, generate, plan_batches
from keelguard.models import context_length
from keelguard.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_AT_ONCE = 256  # Encoded chats hold every token's characters: some 200 bytes a token, until they become ids alone.


@dataclass(frozen=True)
class Generating:
    """How answers are generated. `batch_size` 0 chooses by the size of the model."""

    max_new_tokens: int = 256
    batch_size: int = 0
    seed: int = 0


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    attempts: Sequence[Attempt],
    settings: Generating,
    *,
    store: Path | None = None,
    decoder: Decoder | None = None,
    reporter: Reporter = SILENT,
    label: str = "answers",
) -> list[str | None]:
    """The text that the model adds to each attempt; None where prompt and answer exceed its context.

    Args:
        store: a JSONL file of finished answers to continue from and to add to.
        decoder: generates in the place of plain decoding.

    Raises:
        FailureError: the store cannot be written.
    """
    found = answer_with_notes(
        model, tokenizer, attempts, settings, store=store, decoder=decoder, reporter=reporter, label=label
    )
    return [None if each is None else each.text for each in found]


def answer_with_notes(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    attempts: Sequence[Attempt],
    settings: Generating,
    *,
    store: Path | None = None,
    decoder: Decoder | None = None,
    reporter: Reporter = SILENT,
    label: str = "answers",
) -> list[Answer | None]:
    """As `answer`, with what the decoder tells of each."""
    return list(
        find_answers(model, tokenizer, attempts, settings, store=store, decoder=decoder, reporter=reporter, label=label)
    )


def find_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    attempts: Sequence[Attempt],
    settings: Generating,
    *,
    store: Path | None = None,
    decoder: Decoder | None = None,
    turns: Turns | None = None,
    reporter: Reporter = SILENT,
    label: str = "answers",
) -> Sequence[Answer | None]:
    """As `answer_with_notes`, but with a store the answers stay on the disk, and are read where they are looked at.

    Args:
        turns: deals the batches that are missing to the processes of a launcher. The others' are None here, and this
            one's lie in a part of the store (see `sharding`).
    """
    prompts = _Prompts(tokenizer, attempts)
    limit = context_length(model)
    room = settings.max_new_tokens + (0 if decoder is None else decoder.room(tokenizer))
    fits = [limit is None or length + room <= limit for length in prompts.lengths]
    batches = [
        kept
        for batch in plan_batches(prompts.outlines(), settings.batch_size or default_batch_size(model))
        if (kept := [i for i in batch if fits[i]])
    ]
    found = _Kept(len(attempts))
    if store is not None:
        part = None if turns is None else turns.process
        found = AnswerStore(store, _fingerprint(attempts, settings, decoder), len(attempts), part)
    waiting = [batch for batch in batches if not all(i in found for i in batch)]
    if turns is not None:
        waiting = [batch for batch in waiting if turns()]
    todo, total = sum(map(len, waiting)), sum(fits)
    total = total if turns is None else todo
    with reporter.step(label, total, total - todo) as advance:
        for indices, answers in generate(
            model,
            tokenizer,
            prompts,
            waiting,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            decoder=decoder,
        ):
            found.add(indices, answers)
            advance(len(indices))
    return found


class _Kept(list["Answer | None"]):
    """Answers in memory, with the methods of a store."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)

    def __contains__(self, i: object) -> bool:
        return isinstance(i, int) and self[i] is not None

    def add(self, indices: Sequence[int], answers: Sequence[Answer]) -> None:
        for i, answer in zip(indices, answers, strict=True):
            self[i] = answer


class _Prompts(Sequence[Prompt]):
    """The prompts of attempts, four bytes a token.

    Attributes:
        lengths: their numbers of tokens.
    """

    def __init__(self, tokenizer: Any, attempts: Sequence[Attempt]) -> None:
        self.decodings = [attempt.decoding for attempt in attempts]
        self.ids, self.lengths, self.starts = array("i"), array("q"), array("q")
        self.spans: list[tuple[int, Span]] = []
        for first in range(0, len(attempts), _AT_ONCE):
            part = attempts[first : first + _AT_ONCE]
            encoded = encode_chats(tokenizer, [a.messages for a in part], prefills=[a.prefill or None for a in part])
            for attempt, chat in zip(part, encoded, strict=True):
                self.starts.append(len(self.ids))
                self.lengths.append(len(chat.ids))
                self.ids.extend(chat.ids)
                self.spans.append((len(chat.ids) - chat.response.start if attempt.prefill else 0, chat.query))

    def __len__(self) -> int:
        return len(self.decodings)

    @overload
    def __getitem__(self, i: int) -> Prompt: ...
    @overload
    def __getitem__(self, i: slice) -> list[Prompt]: ...
    def __getitem__(self, i: int | slice) -> Prompt | list[Prompt]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        prefill, query = self.spans[i]
        ids = self.ids[self.starts[i] : self.starts[i] + self.lengths[i]].tolist()
        return Prompt(ids, prefill, self.decodings[i], query)

    def outlines(self) -> list[Prompt]:
        """The prompts with their lengths alone."""
        return [Prompt(range(n), decoding=d) for n, d in zip(self.lengths, self.decodings, strict=True)]


def is_refused(answer: Answer) -> bool:
    """Whether an answer opens with a refusal, or was broken off for one."""
    return answer.broken_off or is_refusal(answer.text.strip())


def _fingerprint(attempts: Sequence[Attempt], settings: Generating, decoder: Decoder | None) -> str:
    """What the answers depend on beside the model; the batch size is left out, for only rounding depends on it."""

    def content() -> Iterator[Any]:
        yield from (settings.max_new_tokens, settings.seed, *([] if decoder is None else [decoder.digest]))
        for attempt in attempts:
            yield [list(attempt.messages), attempt.prefill, asdict(attempt.decoding)]

    # The hash of the whole as one JSON list, which need not be in memory at once.
    digest = hashlib.sha256(b"[")
    for number, value in enumerate(content()):
        digest.update(b", " if number else b"")
        digest.update(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
    digest.update(b"]")
    return digest.hexdigest()
