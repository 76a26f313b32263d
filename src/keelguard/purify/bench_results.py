"""What a bench of a user's own poisoned model found, and bench.json, which holds it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keelguard.attacks.backdoors import Backdoor
from keelguard.errors import UsageError
from keelguard.purify.bench import Cell, Missing
from keelguard.purify.methods import Threat
from keelguard.runs import read_json, write_json

FORMAT = "keelguard.bench/1"
RESULT_FILE = "bench.json"


def case_name(number: int, backdoor: Backdoor) -> str:
    """The name of the case of one of a model's backdoors."""
    return f"{number}-{backdoor.attack}-{backdoor.task}"


@dataclass(frozen=True)
class BenchResult:
    """A finished bench of a user's own poisoned model.

    Attributes:
        arms: the reference first; a clean twin that was given stands at the end.
        unfair: why what was planted is no fair test case, as `keelguard poison` found.
        twin: the clean model before the backdoor was planted, where it was given.
        by_caller: the backdoor is what the caller said, and not what the model's own file says.
    """

    source: str
    adapter: str | None
    threat: Threat
    arms: tuple[str, ...]
    cells: tuple[Cell, ...]
    missing: tuple[Missing, ...] = ()
    unfair: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    twin: str | None = None
    by_caller: bool = False

    @property
    def backdoors(self) -> list[Backdoor]:
        """What was planted, case by case."""
        told = self.settings.get("backdoors", [])
        return [Backdoor(**{**each, "triggers": tuple(each["triggers"])}) for each in told]

    def save(self, folder: str | Path) -> None:
        """Write FOLDER/bench.json, whole or not at all."""
        cells = [cell.to_json() for cell in self.cells]
        missing = [each._asdict() for each in self.missing]
        write_json(Path(folder) / RESULT_FILE, {"format": FORMAT, **vars(self), "cells": cells, "missing": missing})

    @classmethod
    def load(cls, folder: str | Path) -> "BenchResult":
        """Read a bench's result.

        Raises:
            UsageError: there is none, or it has another format.
        """
        path = Path(folder) / RESULT_FILE
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give the folder of a finished `keelguard purify bench`")
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise UsageError(f"{path}: has not the format {FORMAT}; run the bench again")
        cells = tuple(Cell.from_json(cell) for cell in data["cells"])
        missing = tuple(Missing(**each) for each in data["missing"])
        several = {name: tuple(data[name]) for name in ("arms", "unfair")}
        return cls(**{**data, **several, "cells": cells, "missing": missing})
