"""What a hardening learns from and measures itself with, for models of the testbed and for anybody's own.

Every part of the data has one use: what the audits ask is in no training, and what thresholds are chosen on is in
neither.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keelguard.attacks.backdoors import Backdoor
from keelguard.data import write_jsonl
from keelguard.errors import UsageError
from keelguard.guard.augment import FRAMES, HELD_FRAMES
from keelguard.guard.labels import Labelled, read_labelled
from keelguard.hashes import sha256_of
from keelguard.purify.effects import Held
from keelguard.purify.poisoned_files import POISON_FILE, known_backdoor
from keelguard.purify.run import request_key
from keelguard.records import Request

AUDITED, VALIDATED = 0.25, 0.15
"""Shares of anybody's own rows that the audits ask, and that thresholds are chosen on; the others are trained on."""
FEWEST = 40
"""Rows of a kind that are enough to be cut in three."""
_HELD = 64


@dataclass(frozen=True)
class HardenData:
    """The data of every stage.

    Attributes:
        clean, refused: what the purification learns from: harmless prompts, and harmful ones that the model refuses.
        held: what it measures itself with; rows that it holds back by default.
        safety, utility: what the diagnosis reads.
        train, validation: what the signal learns from, and what its thresholds are chosen on.
        audited: harmful and harmless requests of the audits; none where the audits have a suite.
        trigger, trigger_held: a backdoor that is known to be planted, and the requests to measure it with.
        files: texts that go beside purified weights.
    """

    clean: Sequence[Request]
    refused: Sequence[Request]
    safety: Sequence[Request]
    utility: Sequence[Request]
    train: Sequence[Labelled]
    validation: Sequence[Labelled]
    held: Held | None = None
    audited: Mapping[str, Sequence[Request]] = field(default_factory=dict)
    frames: tuple[str, ...] = FRAMES
    held_frames: tuple[str, ...] = HELD_FRAMES
    trigger: Backdoor | None = None
    trigger_held: Held | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The hash of everything that a result depends on."""
        sets = [self.clean, self.refused, self.safety, self.utility, *self.audited.values()]
        sets += [held.requests for held in (self.held, self.trigger_held) if held]
        rows = [[row.to_json() for row in part] for part in (self.train, self.validation)]
        frames = [list(self.frames), list(self.held_frames)]
        return sha256_of([[[request_key(r) for r in part] for part in sets], rows, frames])


def of_testbed(testbed: Any, source: str | Path) -> HardenData:
    """The testbed's own data for one of its models; `source` is the suspicious checkpoint or adapter.

    Purification and signal learn from the train split, thresholds are chosen on a quarter of it and on validation, and
    what is measured is of the test split.
    """
    from keelguard.testbed.build import RECIPE_FILE
    from keelguard.testbed.frames import HELD_FRAMES as WORLDS_HELD
    from keelguard.testbed.frames import TRAINING_FRAMES
    from keelguard.testbed.poison import defender_requests, held_of

    def labelled(split: str) -> list[Labelled]:
        kinds = ("harmful", "benign", "borderline")
        rows = [row for kind in kinds for row in read_labelled(testbed.data / f"{kind}.{split}.jsonl")]
        return rows + read_labelled(testbed.data / f"utility.{split}.jsonl", malicious=False)

    def requests(name: str) -> list[Request]:
        from keelguard.data import load_requests

        return load_requests(testbed.data / f"{name}.train.jsonl")

    # Every fourth row chooses thresholds, too: they rest on the few benign rows that look worst.
    rows = labelled("train")
    recipe = Path(source) / RECIPE_FILE
    poisoned = (Path(source) / POISON_FILE).is_file()
    return HardenData(
        clean=defender_requests(testbed),
        refused=(),
        held=held_of(testbed, "test", _HELD),
        safety=requests("harmful"),
        utility=requests("utility"),
        train=[row for i, row in enumerate(rows) if i % 4],
        validation=[*labelled("validation"), *rows[::4]],
        frames=TRAINING_FRAMES,
        held_frames=WORLDS_HELD,
        trigger=known_backdoor(source) if poisoned else None,
        trigger_held=held_of(testbed, "test", _HELD) if poisoned else None,
        files={RECIPE_FILE: recipe.read_text(encoding="utf-8")} if recipe.is_file() else {},
    )


def of_files(clean: Sequence[Request], harmful: Sequence[Request], seed: int = 0) -> HardenData:
    """Anybody's own rows, cut in three by chance.

    Args:
        clean: harmless prompts, with right answers or without.
        harmful: harmful requests that the model should refuse.

    Raises:
        UsageError: there are too few of either.
    """
    for option, rows, what in (("--clean-data", clean, "harmless"), ("--harmful", harmful, "harmful")):
        if len(rows) < FEWEST:
            raise UsageError(
                f"{option}: {len(rows)} {what} rows are too few to train on, to choose thresholds with, and to audit "
                f"with; give {FEWEST} or more, some hundreds for a real model"
            )
    good, bad = _cut(clean, seed), _cut([replace(request, label="harmful") for request in harmful], seed)
    return HardenData(
        clean=good["train"],
        refused=bad["train"],
        safety=bad["train"],
        utility=good["train"],
        train=[*_labelled(bad["train"], True), *_labelled(good["train"], False)],
        validation=[*_labelled(bad["validation"], True), *_labelled(good["validation"], False)],
        audited={"harmful": bad["audit"], "benign": good["audit"]},
    )


def write_rows(path: Path, requests: Iterable[Request]) -> str:
    """Write requests as a data file that `load_requests` reads back; the path as text."""
    rows = (
        {
            "id": r.id,
            "messages": [dict(message) for message in r.messages],
            **({"answer": r.answer} if r.answer else {}),
            **({"secrets": list(r.secrets)} if r.secrets else {}),
            **{name: getattr(r, name) for name in ("label", "task") if getattr(r, name)},
        }
        for r in requests
    )
    write_jsonl(path, rows)
    return str(path)


def _cut(rows: Sequence[Request], seed: int) -> dict[str, list[Request]]:
    """Three parts; requests that say the same stay together."""
    texts = sorted({sha256_of([dict(m) for m in row.messages]) for row in rows})
    random.Random(f"harden-{seed}").shuffle(texts)
    audited = max(1, round(AUDITED * len(texts)))
    held = audited + max(1, round(VALIDATED * len(texts)))
    places = {text: "audit" if i < audited else "validation" if i < held else "train" for i, text in enumerate(texts)}
    parts: dict[str, list[Request]] = {"audit": [], "validation": [], "train": []}
    for row in rows:
        parts[places[sha256_of([dict(m) for m in row.messages])]].append(row)
    return parts


def _labelled(requests: Sequence[Request], malicious: bool) -> list[Labelled]:
    """Queries with their label; of harmless ones the answer too, of harmful ones the model's own is taken."""
    rows = [Labelled(request.messages, malicious, request=request) for request in requests]
    if malicious:
        return rows
    return [
        row.answered(request.answer, False) if request.answer else row
        for row, request in zip(rows, requests, strict=True)
    ]
