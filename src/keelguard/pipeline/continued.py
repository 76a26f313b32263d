"""`keelguard finetune` of a hardened model: its units frozen, its refusals mixed in, its signal checked behind it.

source = source_of("runs/harden")                        # what a package holds; any checkpoint is named as it is
found = continue_training(source.model, chats, config, out="runs/tuned", chart=chart, signal=source.signal, check=data)
found.training.rows["protected"], found.recheck.outcome
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.guard.adapter import Signal
from keelguard.guard.labels import Labelled, label_requests, read_labelled
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model
from keelguard.pipeline.package import PACKAGE_FILE, Package
from keelguard.pipeline.signal_drift import LIMITS, Change, DriftConfig, chosen_rows
from keelguard.pipeline.signal_recheck import CheckData, Recheck, Step, recheck
from keelguard.pipeline.verdicts import Estimate
from keelguard.processes import is_main, open_shared_run
from keelguard.progress import SILENT, Reporter
from keelguard.records import Chat, Request
from keelguard.runs import MANIFEST, read_json, write_json
from keelguard.testbed.build import Testbed
from keelguard.units.diagnose import plain
from keelguard.units.finetune import FinetuneConfig, finetune
from keelguard.units.training import TrainingResult

SIGNAL, RECHECK, WORK = "signal", "recheck.json", "signal-work"
PROTECT, FREEZE = ("freeze", "mix"), "scu"
"""How a model with a unit map is fine-tuned by default: its certificate holds, and its refusals are repeated."""
INSERTED = 0.5
"""The share of repeated refusals of a package with random words in their prompt, as in its purification."""


@dataclass(frozen=True)
class Source:
    """What is fine-tuned, or compared with.

    Attributes:
        model, adapter: the checkpoint, and an adapter to put on it.
        units, signal: those of a package.
        received: what a package was made of; else the model itself.
        is_package: whether a package was named.
    """

    model: str
    adapter: str | None
    units: Path | None
    signal: Path | None
    received: str
    is_package: bool


@dataclass(frozen=True)
class Continued:
    """A fine-tune, and what became of the signal; None where there is none, or a launcher left it to a later call."""

    training: TrainingResult
    recheck: Recheck | None


def source_of(model: str, adapter: str | None = None, option: str = "--adapter") -> Source:
    """What a command's MODEL names: the folder of a package, whose files are hashed and compared, or a checkpoint.

    Raises:
        UsageError: an adapter is named beside a package, or the package is unfinished or of another format.
        FailureError: a file of the package has changed.
    """
    if not (Path(model) / PACKAGE_FILE).is_file():
        return Source(model, adapter, None, None, model, False)
    if adapter is not None:
        raise UsageError(
            f"{option} {adapter}: {model} is a package of keelguard harden, which brings its own; leave it out"
        )
    package = Package.load(model)
    received = package.adapter or package.source
    return Source(package.model, package.hardened_adapter, package.units, package.signal, received, True)


def check_of_testbed(files: Testbed, chats: Sequence[Chat]) -> CheckData:
    """The parts of a testbed's data: of the training split every fourth row, and the validation split, for thresholds;
    the rest of it for a new signal; and the test split, which is measured."""
    from keelguard.testbed.frames import HELD_FRAMES, TRAINING_FRAMES

    def read(split: str) -> list[Labelled]:
        kinds = ("harmful", "benign", "borderline")
        rows = [row for kind in kinds for row in read_labelled(files.data / f"{kind}.{split}.jsonl")]
        return rows + read_labelled(files.data / f"utility.{split}.jsonl", malicious=False)

    rows = read("train")
    # A threshold rests on the few benign rows that look worst: those of the validation split alone would be too few.
    train = [row for i, row in enumerate(rows) if i % 4]
    calibrate = _unseen([*read("validation"), *rows[::4]], chats)
    # Small talk is the same in every split.
    measured = _unseen(read("test"), [*chats, *(row.messages for row in (*rows, *calibrate))])
    return CheckData(measured, calibrate, train, TRAINING_FRAMES, HELD_FRAMES)


def check_of_files(
    taught: Sequence[Request], asked: Sequence[Request], benign: Sequence[Request], chats: Sequence[Chat], seed: int = 0
) -> CheckData:
    """Parts of a user's requests, the same queries in one part.

    Args:
        taught: harmful requests that the fine-tune holds on to: a new signal may be trained on them.
        asked: others, half of them measured, half for calibration.
        benign: a third for each part.
        chats: what is trained on; requests that stand in it are left out.
    """
    harm = _parts(_unseen(label_requests(asked, "--safety", malicious=True), chats), 2, seed)
    good = _parts(_unseen(label_requests(benign, "--benign", malicious=False), chats), 3, seed)
    new = label_requests(taught, "--safety", malicious=True)
    return CheckData([*harm[0], *good[0]], [*harm[1], *good[1]], [*new, *good[2]])


def continue_training(
    source: str,
    chats: Sequence[Chat],
    config: FinetuneConfig,
    *,
    out: str | Path,
    signal: str | Path | None = None,
    check: CheckData | None = None,
    limits: DriftConfig = LIMITS,
    load: Callable[..., LoadedModel] = load_model,
    reporter: Reporter = SILENT,
    **options: Any,
) -> Continued:
    """Fine-tune as `units.finetune.finetune` does, then re-check the signal on the new weights.

    The signal that holds on them is written to OUT/signal, bound to them; `finetune.json` says under "signal" what was
    measured and done. One that cannot be saved is not written, since a signal that misses is worse than none.

    Args:
        signal: the folder of the signal of this very model; its check needs `check`.
        options: the others of `finetune`, such as `chart`, `safety` and `probe`.

    Raises:
        UsageError: as `finetune`; or the signal is of other weights, or its check has too few requests.
        FailureError: as `finetune`.
    """
    if signal is None or check is None:
        return Continued(finetune(source, chats, config, out=out, load=load, reporter=reporter, **options), None)
    kept, out = Signal.load(signal), Path(out)
    chosen_rows(check.measured, limits)

    def checked(wanted: str, **wishes: Any) -> LoadedModel:
        loaded = load(wanted, **wishes)
        if wanted == source:
            kept.check(loaded.weights_hash, source)
        return loaded

    parts = {name: [row.to_json() for row in getattr(check, name)] for name in ("measured", "calibrate", "train")}
    bound = {"tensors": kept.tensors_hash(), "policy": asdict(kept.policy), "limits": asdict(limits)}
    bound["data"] = sha256_of([parts, list(check.frames), list(check.held_frames)])
    result = finetune(
        source, chats, config, out=out, load=checked, reporter=reporter, bound={"signal": bound}, **options
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if is_main() and (out / RECHECK).exists():
            _record_signal(out)
        reporter.note("the signal is checked in one process: repeat this command without the launcher to do that")
        return Continued(result, None)
    with open_shared_run(out, "finetune", read_json(out / MANIFEST)["settings"]):
        if not (out / RECHECK).exists():
            found = recheck(
                lambda: plain(load(source)), lambda: plain(load(str(result.model))), kept, check,
                folder=out / WORK, config=limits, reporter=reporter,
            )  # fmt: skip
            if found.signal is not None:
                found.signal.save(out / SIGNAL, base=str(result.model))
            write_json(out / RECHECK, _record(found, kept, result, limits))
        shutil.rmtree(out / WORK, ignore_errors=True)
        record = _record_signal(out)
        steps = tuple(map(Step.from_json, record["steps"]))
        own = Signal.load(out / SIGNAL) if record["folder"] else None
        return Continued(result, Recheck(record["outcome"], steps, own, record["reason"]))


def _record_signal(out: Path) -> dict[str, Any]:
    """Put what became of the signal into finetune.json, which every call of the fine-tune writes anew."""
    record = read_json(out / RECHECK)
    write_json(out / "finetune.json", {**read_json(out / "finetune.json"), "signal": record})
    return record


def recheck_table(found: Recheck) -> Any:
    """The figures of every step for the terminal, those beyond their limits in words."""
    from rich.table import Table

    first = found.steps[0].report
    table = Table(
        title=f"the signal on the new weights: {found.outcome}",
        caption=f"{first.malicious} malicious, {first.benign} benign requests; 95 % intervals; (over): may be chance",
    )
    for name in ("verdict on", "", "limit", "before", *(step.name for step in found.steps)):
        table.add_column(name, justify="left" if name in ("verdict on", "") else "right")
    figures = [{(c.kind, c.name): c for c in step.report.changes} for step in found.steps]
    for key, change in figures[0].items():
        cells = [_shown(own[key].after) + _mark(own[key]) if key in own else "–" for own in figures]
        table.add_row(*key, f"{'−' if change.falls else '+'}{change.limit:g}", _shown(change.before), *cells)
    return table


def _mark(change: Change) -> str:
    return " over" if change.certain else " (over)" if change.over else ""


def _shown(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _record(found: Recheck, signal: Signal, result: TrainingResult, limits: DriftConfig) -> dict[str, Any]:
    """What finetune.json says of the signal."""
    return {
        "outcome": found.outcome,
        "folder": SIGNAL if found.signal is not None else None,
        "made_for": signal.weights,
        "weights": result.weights,
        "reason": found.reason,
        "limits": asdict(limits),
        "steps": [step.to_json() for step in found.steps],
    }


def _unseen(rows: Iterable[Labelled], chats: Sequence[Chat]) -> list[Labelled]:
    """The rows whose query no chat of the training data asks."""
    asked = {message["content"].strip() for chat in chats for message in chat if message["role"] == "user"}
    return [row for row in rows if row.messages[-1]["content"].strip() not in asked]


def _parts(rows: Sequence[Labelled], count: int, seed: int) -> list[list[Labelled]]:
    """The rows dealt out at random, those of one query together."""
    queries: dict[str, list[Labelled]] = {}
    for row in rows:
        queries.setdefault(sha256_of([seed, [dict(m) for m in row.messages]]), []).append(row)
    ordered = [queries[key] for key in sorted(queries)]
    return [[row for own in ordered[first::count] for row in own] for first in range(count)]
