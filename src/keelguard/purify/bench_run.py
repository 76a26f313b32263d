"""`keelguard purify bench`: a user's own poisoned model under every method and control.

result = bench_model("runs/poisoned", None, requests, harmful, held, None, (), PurifyConfig(), "runs/bench")
console.print(bench_tables(result))
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelguard.attacks.backdoors import Backdoor
from keelguard.attacks.insertions import vocabulary_words
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model, resolve_sources
from keelguard.progress import SILENT, Reporter
from keelguard.purify.bench import Case, Cell, Missing, bench, table
from keelguard.purify.budget import Budget, Setup
from keelguard.purify.config import PurifyConfig
from keelguard.purify.controls import ARMS, arms_for
from keelguard.purify.effects import ANSWERS, Held
from keelguard.purify.health import held_out
from keelguard.purify.intake import load_subject
from keelguard.purify.material import gather
from keelguard.purify.methods import Subject, Threat
from keelguard.purify.neutralize import refuse_shared_weights
from keelguard.purify.planting import POISON_FILE
from keelguard.purify.run import request_key
from keelguard.purify.stages import WORK
from keelguard.records import Request
from keelguard.runs import open_run, read_json, versions, write_json

if TYPE_CHECKING:
    from rich.console import Group

FORMAT = "keelguard.bench/1"
RESULT_FILE, CELLS = "bench.json", "cells"


@dataclass(frozen=True)
class BenchResult:
    """A finished bench of a user's own poisoned model.

    Attributes:
        unfair: why what was planted is no fair test case, as `keelguard poison` found.
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


def bench_model(
    source: str,
    adapter: str | None,
    requests: Sequence[Request],
    harmful: Sequence[Request],
    held: Held | None,
    backdoor: Backdoor | None,
    arms: Sequence[str],
    settings: PurifyConfig,
    out: str | Path,
    load: Callable[..., LoadedModel] = load_model,
    reporter: Reporter = SILENT,
    generating: Generating = ANSWERS,
) -> BenchResult:
    """Run the methods and controls on a model whose backdoor is known.

    The budget of all arms is that of the immunisation in `settings`.

    Args:
        source: a model that `keelguard poison` made, or that of an adapter.
        held: held-out requests to measure with; clean rows that are held back by default.
        backdoor: what is in it; by default what the poisoned model's own file says, each entry as a case.
        arms: names of `ARMS`, the reference first; all that the threat model has by default.

    Raises:
        UsageError: the backdoor is not known, an arm is unknown, the clean data do not suffice, or the folder is
            another run's.
        FailureError: the disk is full.
    """
    base, adapter = resolve_sources(source, adapter)
    threat: Threat = "full" if adapter is None else "adapter"
    chosen = arms_for(threat, arms)
    backdoors, unfair = ([backdoor], []) if backdoor is not None else planted_in(adapter or base)
    tasks = {each.task for each in backdoors}
    if held is not None and not held.harmful and "jailbreak" in tasks:
        raise UsageError("--held-out-harmful: a jailbreak is measured on held-out harmful requests; name a file")
    if held is not None and not held.benign and tasks - {"jailbreak"}:
        raise UsageError(f"--held-out: {', '.join(sorted(tasks))} is measured on held-out requests; name a file")
    loaded = load_subject(load, base, adapter)
    refuse_shared_weights(loaded.model)
    setup = Setup(Budget.of(settings.method), settings.method, reporter=reporter)
    setup = setup.leaving_out(frozenset().union(*(each.words for each in backdoors)))
    told = {
        "model": loaded.weights_hash,
        "chat_template": sha256_of(loaded.tokenizer.chat_template),
        "data": sha256_of([request_key(r) for r in (*requests, *harmful)]),
        "held": None
        if held is None
        else sha256_of([request_key(r) for r in (*held.benign, *held.harmful, *held.utility)]),
        "backdoors": [asdict(each) for each in backdoors],
        "arms": list(chosen),
        "material": asdict(settings.material),
        "generating": asdict(generating),
        **setup.settings(),
        "versions": versions(),
    }
    folder = Path(out)
    with open_run(folder, "purify bench", told):
        if not (folder / RESULT_FILE).is_file():
            material = gather(
                loaded, requests, settings.material, harmful=harmful, store=folder / WORK / "own.jsonl",
                reporter=reporter,
            )  # fmt: skip
            subject = Subject(loaded, threat, material, tuple(vocabulary_words(loaded.tokenizer)))
            cases = [
                Case(
                    f"{number}-{each.attack}-{each.task}", subject, each, held or held_out(material), setup.budget.seed
                )
                for number, each in enumerate(backdoors)
            ]
            cells, missing = bench(cases, chosen, setup, folder / CELLS, generating)
            result = BenchResult(
                source, adapter, threat, tuple(chosen), tuple(cells), tuple(missing), tuple(unfair), told, versions()
            )
            result.save(folder)
            shutil.rmtree(folder / WORK, ignore_errors=True)
    return BenchResult.load(folder)


def planted_in(folder: str | Path) -> tuple[list[Backdoor], list[str]]:
    """The backdoors of a model that `keelguard poison` made, and why they are no fair test case.

    Raises:
        UsageError: the model has no such file.
    """
    path = Path(folder) / POISON_FILE
    if not path.is_file():
        raise UsageError(f"{path}: no such file; a bench needs a known backdoor: plant one with `keelguard poison`")
    record = read_json(path)
    backdoors = [Backdoor(**{**each, "triggers": tuple(each["triggers"])}) for each in record["backdoors"]]
    check = record["check"]
    return backdoors, ["it was not checked when it was planted"] if check is None else list(check["why"])


def bench_tables(result: BenchResult) -> "Group":
    """The result for the terminal: what is left of the backdoor, how the models fare, and what is missing."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from keelguard.plots import legible

    header, rows = table(result.cells, result.arms)
    columns = {name: place for place, name in enumerate(header)}
    # Pooled over several backdoors a rate can hide the one that stays.
    several = ("cases", "worst case") if len({cell.case for cell in result.cells}) > 1 else ()
    parts: list[Any] = []
    for titles in (
        (*several[:1], "ASR", *several[1:], "triggered, right", "false triggers", "triggered, degenerate", "p"),
        ("utility", "harmful refused", "over-refusal", "clean, degenerate", "seconds"),
    ):
        shown = Table()
        shown.add_column("", no_wrap=True)
        for title in titles:
            shown.add_column(title, justify="right")
        for row in rows:
            shown.add_row(row[0], *(row[columns[title]] for title in titles))
        parts.append(shown)
    if rows:
        parts.append(
            Text(
                "In percent, with 95 % intervals. p: exact McNemar test of the triggered requests against "
                f"{rows[0][0]}, not corrected for the number of arms."
            )
        )
    parts += [Text(legible(f"{each.case}, {each.arm}: not run: {each.reason}")) for each in result.missing]
    parts += [Text(legible(f"No fair test case: {reason}.")) for reason in result.unfair]
    parts += [Text(f"{name}: {ARMS[name].about}") for name in result.arms]
    return Group(*parts)
