"""Runs the stages of a hardening: each leaves a record with the hash of every file that it wrote, and runs once.

A stage whose record is there is not repeated; its files are compared with their hashes, and one that has changed
stops the run by name, so that nothing is reused that is not what was written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.pipeline.package import Control, StageRecord, check_artefacts, hash_artefacts
from keelguard.progress import Reporter
from keelguard.runs import read_json, write_json

STAGES_FOLDER = "stages"


@dataclass(frozen=True)
class Outcome:
    """What a stage's work came to.

    Attributes:
        artefacts: files and folders that it wrote, by their path in the package.
    """

    artefacts: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    controls: Sequence[Control] = ()
    notes: Sequence[str] = ()


class StageRunner:
    """The stages of one run folder."""

    def __init__(self, folder: Path, skip: Mapping[str, str], reporter: Reporter) -> None:
        self.folder, self.skip, self.reporter = folder, skip, reporter
        self.records: list[StageRecord] = []

    def __call__(self, name: str, work: Callable[[], Outcome]) -> StageRecord:
        """Run a stage, or take what an earlier run left of it.

        Raises:
            FailureError: a file of the stage is missing or has changed; the message names it.
        """
        record = self._kept(name) or self._run(name, work)
        self.records.append(record)
        return record

    def done(self, name: str) -> bool:
        """Whether a stage has run, whatever its controls say."""
        return any(record.name == name and record.status != "skipped" for record in self.records)

    def _path(self, name: str) -> Path:
        return self.folder / STAGES_FOLDER / f"{name}.json"

    def _kept(self, name: str) -> StageRecord | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            record = StageRecord.from_json(read_json(path))
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path}: is damaged ({error}); remove it to run that stage again") from error
        check_artefacts(self.folder, record.artefacts)
        self.reporter.note(f"{name}: done before")
        return record

    def _run(self, name: str, work: Callable[[], Outcome]) -> StageRecord:
        if reason := self.skip.get(name):
            self.reporter.note(f"{name}: left out ({reason})")
            record = StageRecord(name, "skipped", reason)
        else:
            self.reporter.note(f"{name} …")
            start = time.monotonic()
            outcome = work()
            broken = [control.claim for control in outcome.controls if control.holds is False]
            record = StageRecord(
                name=name,
                status="failed" if broken else "done",
                reason=f"Does not hold: {' '.join(broken)}" if broken else "",
                seconds=round(time.monotonic() - start, 1),
                artefacts=hash_artefacts(self.folder, outcome.artefacts),
                figures=outcome.figures,
                controls=tuple(outcome.controls),
                notes=tuple(outcome.notes),
            )
            if broken:
                self.reporter.note(f"{name}: {record.reason}")
        write_json(self._path(name), record.to_json())
        return record
