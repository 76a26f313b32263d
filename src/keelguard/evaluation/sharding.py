"""The answers of a model on disk, and how several processes share the work of finding them.

    ANSWERS/direct-0a1b2c3d.jsonl               a cell's answers, a line each behind a first one that says to what
    ANSWERS/parts/1/direct-0a1b2c3d.jsonl       what process 1 of a launcher adds, until the main one merges it

Every process plans the same batches and answers those that are its turn: a row has the same rows beside it as in a
run of one process, and so the same rounding. Only places in the files are kept in memory.
"""

import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from keelguard.generation import Answer
from keelguard.runs import disk_errors, write_text

PARTS = "parts"


class Turns:
    """Deals pieces of work to processes in turn. All must ask for the same pieces in the same order."""

    def __init__(self, process: int, processes: int) -> None:
        self.process, self.processes, self.asked = process, processes, 0

    def __call__(self) -> bool:
        """Whether the next piece is this process's."""
        self.asked += 1
        return (self.asked - 1) % self.processes == self.process


class AnswerStore(Sequence["Answer | None"]):
    """The answers to `count` attempts, read from disk one by one; None where there is none yet.

    Args:
        path: a JSONL file of finished answers to continue from and to add to; one of other attempts is started anew.
        fingerprint: what the answers belong to.
        part: the number of this process where several work: it reads `path`, and adds to a file of its own.

    Raises:
        FailureError: the file cannot be written.
    """

    def __init__(self, path: Path, fingerprint: str, count: int, part: int | None = None) -> None:
        self.header = json.dumps({"attempts": fingerprint})
        self.places = array("q", [-1]) * count
        self.files = [path]
        if part is None:
            _mend(path, self.header)
        else:
            self.files.append(path.parent / PARTS / str(part) / path.name)
        for number, file in enumerate(self.files):
            for i, place in _rows_of(file, self.header):
                self._keep(i, number, place)

    def _keep(self, i: int, file: int, place: int) -> None:
        if 0 <= i < len(self.places):
            self.places[i] = place * 2 + file

    def __contains__(self, i: object) -> bool:
        return isinstance(i, int) and self.places[i] >= 0

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, i: int) -> "Answer | None": ...
    @overload
    def __getitem__(self, i: slice) -> "list[Answer | None]": ...
    def __getitem__(self, i: int | slice) -> "Answer | list[Answer | None] | None":
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if self.places[i] < 0:
            return None
        place, file = divmod(self.places[i], 2)
        with self.files[file].open("rb") as stream:
            stream.seek(place)
            row = json.loads(stream.readline())
        return Answer(row["text"], row.get("note"), row.get("cut", False))

    def add(self, indices: Sequence[int], answers: Sequence[Answer]) -> None:
        """Write a batch of answers to the disk.

        Raises:
            FailureError: it is full.
        """
        file = self.files[-1]
        if len(self.files) > 1 and not file.exists():
            write_text(file, self.header + "\n")
        rows = [_line(_row(i, answer)) for i, answer in zip(indices, answers, strict=True)]
        with disk_errors(file), file.open("ab") as stream:
            place = stream.tell()
            stream.write(b"".join(rows))
            stream.flush()
            os.fsync(stream.fileno())
        for i, row in zip(indices, rows, strict=True):
            self._keep(i, len(self.files) - 1, place)
            place += len(row)


def merge_parts(answers: Path) -> None:
    """Add what processes have left beside a model's answers to these; for the main process, while none of them writes.

    A kill in between loses nothing: a row that stands twice is the same twice.

    Raises:
        FailureError: the disk is full.
    """
    for part in sorted((answers / PARTS).glob("*/*.jsonl")):
        header = _header_of(part)
        if header is not None:
            # Where the two are of different attempts, the part is the newer one.
            _mend(answers / part.name, header)
            _append(part, answers / part.name)
        part.unlink()
    shutil.rmtree(answers / PARTS, ignore_errors=True)


def _append(part: Path, target: Path) -> None:
    """Copy the whole rows of one file behind another's."""
    with disk_errors(target), part.open("rb") as source, target.open("ab") as stream:
        source.readline()
        for line in source:
            if line.endswith(b"\n"):
                stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def _mend(path: Path, header: str) -> None:
    """Start a file of other attempts anew, and drop what a kill left of a write behind the last line break."""
    if _header_of(path) != header:
        write_text(path, header + "\n")
        return
    with disk_errors(path), path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            stream.seek(start)
            if (found := stream.read(end - start).rfind(b"\n")) >= 0:
                if start + found + 1 < stream.seek(0, os.SEEK_END):
                    stream.truncate(start + found + 1)
                return
            end = start


def _header_of(path: Path) -> str | None:
    """The first line of a file, or None where there is no whole one."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        first = stream.readline()
    return first[:-1].decode("utf-8", "replace") if first.endswith(b"\n") else None


def _rows_of(path: Path, header: str) -> Iterator[tuple[int, int]]:
    """(number of the attempt, place in the file) of every whole row; a damaged one counts as none."""
    if _header_of(path) != header:
        return
    with path.open("rb") as stream:
        place = len(stream.readline())
        for line in stream:
            if line.endswith(b"\n") and (number := _number_of(line)) is not None:
                yield number, place
            place += len(line)


def _number_of(line: bytes) -> int | None:
    try:
        row = json.loads(line)
        return row["i"] if isinstance(row["i"], int) and isinstance(row["text"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def _row(index: int, answer: Answer) -> dict[str, Any]:
    told = {"note": answer.note} if answer.note is not None else {}
    return {"i": index, "text": answer.text, **told, **({"cut": True} if answer.cut else {})}


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
