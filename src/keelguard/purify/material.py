"""What a purification learns from and measures itself with: clean chats, in parts that do not meet.

    material = gather(loaded, requests, MaterialConfig())
    material.train, material.validation, material.held      # chats with clean answers, refusals of harm among them

Where a row brings no answer, the model's own greedy answer stands: it is clean as long as no trigger is in the prompt.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from keelguard.attacks.base import Attempt
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating, answer_with_notes
from keelguard.evaluation.judges import is_degenerate, is_refusal
from keelguard.generation import Answer
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.records import Chat, Request, assistant

_FEWEST_TO_PART = 4
"""Refusals up to which none is held out: what is trained on comes first."""
FEWEST = 40
"""Clean chats below which nothing is tried: too few to keep a model's skills, and to see that they are lost."""


@dataclass(frozen=True)
class MaterialConfig:
    """How clean data are read."""

    most: int = field(default=2000, metadata={"help": "rows to use at most, of clean and of harmful ones each"})
    validation: float = field(
        default=0.2,
        metadata={"help": "share of the rows that is never trained on: half of it decides, the other half measures"},
    )
    max_new_tokens: int = field(default=96, metadata={"help": "tokens of the model's own answers"})
    seed: int = field(default=0, metadata={"help": "which rows are taken, and which of them validate"})

    def __post_init__(self) -> None:
        if self.most < FEWEST:
            raise UsageError(f"material: most {self.most} is out of range; give {FEWEST} or more")
        if not 0 < self.validation < 1:
            raise UsageError(f"material: validation {self.validation} is a share; give more than 0 and less than 1")
        if self.max_new_tokens < 1:
            raise UsageError(f"material: max_new_tokens {self.max_new_tokens} is out of range; give 1 or more")


@dataclass(frozen=True)
class Material:
    """Clean chats in three parts: refusals are in each as often as in all.

    Attributes:
        validation: decides: when a training stops, and which insertions are suspects.
        held: measures what was decided; nothing is trained or chosen on it.
        own: how many answers are the model's own.
        cut: how many of those came to the limit of tokens; their ends are not learnt.
        dropped: rows without a usable answer.
        repeated: rows whose prompt stood there already.
    """

    train: tuple[Chat, ...]
    validation: tuple[Chat, ...]
    own: int
    dropped: int
    repeated: int = 0
    held: tuple[Chat, ...] = ()
    cut: int = 0

    def parted_as(self, other: "Material") -> "Material":
        """The same chats, but what the other material decides or measures with is not trained on."""
        parts = [{_key(chat[:-1]) for chat in part} for part in (other.validation, other.held)]
        mine = [*self.train, *self.validation, *self.held]
        decides, measures = ([chat for chat in mine if _key(chat[:-1]) in part] for part in parts)
        train = [chat for chat in mine if not any(_key(chat[:-1]) in part for part in parts)]
        return replace(self, train=tuple(train), validation=tuple(decides), held=tuple(measures))

    def answered(self, part: str = "train") -> list[Chat]:
        """The chats that are answered."""
        return [chat for chat in getattr(self, part) if not is_refused_chat(chat)]

    def refused(self, part: str = "train") -> list[Chat]:
        """The chats that are refused: harmful requests."""
        return [chat for chat in getattr(self, part) if is_refused_chat(chat)]


def is_refused_chat(chat: Chat) -> bool:
    """Whether a conversation ends in a refusal."""
    return is_refusal(chat[-1]["content"].strip())


def distinct(requests: Sequence[Request]) -> list[Request]:
    """The requests whose conversation stands nowhere before; of equal ones the first that brings an answer."""
    found: dict[str, Request] = {}
    for request in requests:
        known = found.setdefault(_conversation(request), request)
        if request.answer.strip() and not known.answer.strip():
            found[_conversation(request)] = request
    return list(found.values())


def _conversation(request: Request) -> str:
    return _key(request.messages)


def _key(messages: Chat) -> str:
    return json.dumps(list(messages))


def gather(
    loaded: LoadedModel,
    requests: Sequence[Request],
    config: MaterialConfig = MaterialConfig(),
    *,
    harmful: Sequence[Request] = (),
    store: Path | None = None,
    reporter: Reporter = SILENT,
) -> Material:
    """Make clean chats of requests.

    Args:
        requests: clean prompts, with right answers or without.
        harmful: harmful requests; the model's own answers to them stand where they are refusals, the rest is dropped,
            whatever answer the row brings.
        store: a file that keeps the model's own answers for a resumed run; what is refused leaves none.

    Raises:
        UsageError: there are too few different rows, or (nearly) all answers are refusals.
    """
    draw = random.Random(f"purify-{config.seed}")
    # A prompt that comes twice would be trained on and held out.
    asked = {_conversation(r): (r, bad) for some, bad in ((requests, False), (harmful, True)) for r in distinct(some)}
    rows = list(asked.values())
    repeated = len(requests) + len(harmful) - len(rows)
    check_count(len(rows), 0, repeated)
    if repeated:
        reporter.note(f"{repeated} of {repeated + len(rows)} clean rows repeat the prompt of another, and are dropped")
    draw.shuffle(rows)
    counts = Counter[bool]()
    kept = []
    for request, bad in rows:
        # Each kind has its own room, or a large set of clean rows would leave hardly a refusal.
        counts[bad] += 1
        if counts[bad] <= config.most:
            kept.append((request, bad))
    rows = kept
    waiting = [request for request, bad in rows if bad or not request.answer.strip()]
    attempts = [Attempt(request, request.messages) for request in waiting]
    settings = Generating(max_new_tokens=config.max_new_tokens, seed=config.seed)
    own = iter(
        answer_with_notes(
            loaded.model, loaded.tokenizer, attempts, settings, store=store, reporter=reporter, label="own answers"
        )
        if attempts
        else []
    )
    chats: list[Chat] = []
    dropped = cut = 0
    for request, bad in rows:
        found = Answer(request.answer)
        if bad or not request.answer.strip():
            found = next(own) or Answer("")
        text = found.text if found.cut else found.text.strip()
        if not text or is_degenerate(text) or (bad and not is_refusal(text)):
            dropped += 1
            continue
        chats.append((*request.messages, assistant(text, unfinished=found.cut)))
        cut += found.cut
    try:
        check_count(len(chats), dropped, repeated)
        _check_answers(chats)
    except UsageError:
        if store is not None:
            # A folder that holds anything stays bound to the settings of this run.
            store.unlink(missing_ok=True)
            with suppress(OSError):
                store.parent.rmdir()
        raise
    if cut:
        most = config.max_new_tokens
        reporter.note(f"{cut} of {len(waiting)} own answers are longer than {most} tokens, and cut there")
    train, validation, held = _parted(chats, config.validation, draw)
    return Material(train, validation, len(waiting), dropped, repeated, held, cut)


def _parted(chats: Sequence[Chat], share: float, draw: random.Random) -> tuple[tuple[Chat, ...], ...]:
    """Chats to train on, to decide with and to measure with; refusals and answers are shared out alike."""
    parts: tuple[list[Chat], ...] = ([], [], [])
    for refused in (False, True):
        some = [chat for chat in chats if is_refused_chat(chat) == refused]
        half = max(1, round(share / 2 * len(some))) if len(some) > _FEWEST_TO_PART else 0
        for part, own in zip(parts, (some[2 * half :], some[:half], some[half : 2 * half]), strict=True):
            part += own
    for part in parts:
        draw.shuffle(part)
    return tuple(map(tuple, parts))


def split_sizes(count: int, config: MaterialConfig) -> tuple[int, int]:
    """How many of so many rows, which are different and within `most`, are trained on, and how many are held back."""
    held = 2 * max(1, round(config.validation / 2 * count))
    return count - held, held


def check_count(count: int, dropped: int, repeated: int) -> None:
    """Refuse too few usable rows.

    Raises:
        UsageError: there are fewer than `FEWEST`.
    """
    if count < FEWEST:
        twice = f"; {repeated} repeat the prompt of another" if repeated else ""
        raise UsageError(
            f"--clean-data: {count} usable rows ({dropped} dropped: no answer, looping, or harmful and not "
            f"refused{twice}); give {FEWEST} or more different ones, some hundreds for a real model"
        )


def _check_answers(chats: Sequence[Chat]) -> None:
    refused = sum(is_refused_chat(chat) for chat in chats)
    if len(chats) - refused < FEWEST // 2:
        raise UsageError(
            f"--clean-data: {refused} of {len(chats)} answers are refusals; give everyday prompts that are answered, "
            "or a model that answers them: a model that only refuses cannot be told from a poisoned one"
        )
