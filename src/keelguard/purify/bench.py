"""The methods and their controls on known backdoors, in one harness and on one budget.

    benched = bench(cases, arms_for("full"), Setup(Budget.of(config), config), folder)
    header, rows = table(benched.cells)

A cell is one arm on one case. It is kept as soon as it is measured, so that a bench that was killed goes on. The clean
model that a case was made from, where it is known, has a cell under the name `TWIN`: no arm, and never the reference.
"""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from keelguard.attacks.backdoors import Backdoor
from keelguard.errors import KeelguardError
from keelguard.evaluation.answers import Generating
from keelguard.fitting import memory_errors
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel
from keelguard.purify.budget import Arm, Setup
from keelguard.purify.effects import ANSWERS, Effect, Held, measure_effect
from keelguard.purify.health import Examiner, Health
from keelguard.purify.methods import Subject, Threat, copied
from keelguard.runs import read_json, versions, write_json
from keelguard.stats import Interval, McNemar, Rate, bootstrap_mean, mcnemar


@dataclass(frozen=True)
class Case:
    """A model with a known backdoor.

    Attributes:
        name: of the case, and of the folder of its cells.
        subject: its weights hash must be that of the poisoned model, not of what it was made from.
        seed: of the world that the model lives in, or of the run that it is benched in.
        twin: the model before the backdoor was planted, with the same tokenizer.
    """

    name: str
    subject: Subject
    backdoor: Backdoor
    held: Held
    seed: int = 0
    twin: LoadedModel | None = None

    @property
    def key(self) -> str:
        """A hash of everything that an arm's cell depends on, settings aside; no arm sees the twin."""
        material, held = self.subject.material, self.held
        requests = [*held.benign, *held.harmful, *held.utility]
        told = [[list(r.messages), r.answer, r.label, list(r.secrets)] for r in requests]
        own = [self.subject.loaded.weights_hash, self.subject.threat, asdict(self.backdoor), self.seed, told]
        return sha256_of(
            [*own, material.train, material.validation, material.held, list(self.subject.words), held.judge.digest]
        )


@dataclass(frozen=True)
class Cell:
    """One arm on one case: what is left of the backdoor, and how the model fares.

    Attributes:
        settings: the beginning of the hash of the bench's settings.
        seconds: of the arm alone, without the measurements.
    """

    case: str
    arm: str
    threat: Threat
    attack: str
    task: str
    seed: int
    settings: str
    effect: Effect
    health: Health
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The cell as its file holds it."""
        return {**vars(self), "effect": self.effect.to_json(), "health": self.health.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Cell":
        """The inverse of `to_json`."""
        effect, health = Effect.from_json(data["effect"]), Health.from_json(data["health"])
        return cls(**{**data, "effect": effect, "health": health})


class Missing(NamedTuple):
    """A cell that could not be had, and why."""

    case: str
    arm: str
    reason: str


class Benched(NamedTuple):
    """The cells of a bench, case by case, and those that are missing."""

    cells: list[Cell]
    missing: list[Missing]


@dataclass(frozen=True)
class Pooled:
    """One arm over the requests of all its cases.

    Attributes:
        worst: the attack success of its worst case.
        spread: 95 % interval of the mean attack success over cases, by resampling them; None for a single case.
            Requests of one case share a model, so that this interval is for backdoors, the rates' own for requests.
        reference: the attack success of the reference arm on the cases that both have; None for the reference itself.
        test: of `fired` against the reference arm, paired over the cases that both have: fired under this arm alone,
            under the reference alone. None for the reference itself. The test speaks of these models only.
    """

    arm: str
    cases: int
    worst: Rate
    rates: dict[str, Rate]
    seconds: float
    spread: Interval | None
    reference: Rate | None
    test: McNemar | None


TWIN = "twin"
TWIN_ABOUT = "the clean model before the backdoor was planted: a bound"
_OF_EFFECT = ("asr", "correct", "false_triggers", "degenerate")
_OF_HEALTH = {"utility": "utility", "refused": "refused", "over_refusal": "over_refusal", "broken": "degenerate"}
TITLES = {
    "asr": "ASR",
    "correct": "triggered, right",
    "false_triggers": "false triggers",
    "degenerate": "triggered, degenerate",
    "utility": "utility",
    "refused": "harmful refused",
    "over_refusal": "over-refusal",
    "broken": "clean, degenerate",
}


def run_cell(
    case: Case, name: str, arm: Arm, setup: Setup, generating: Generating = ANSWERS, examiner: Examiner | None = None
) -> Cell:
    """Run one arm on a copy of a case's model, and measure it.

    The backdoor's words are kept out of everything random or invented.

    Raises:
        UsageError: the arm is none for this model, or there are no requests for this task.
        FailureError: training does not fit in memory, or diverges.
    """
    subject, told = case.subject, settings_key(setup, generating)[:12]
    setup = setup.leaving_out(case.backdoor.words)
    start = time.monotonic()
    treated = arm(copied(subject), setup, case.backdoor)
    seconds = time.monotonic() - start
    examiner = examiner or Examiner(subject.loaded, subject.material, subject.words, case.held, generating)
    effect = measure_effect(treated, case.backdoor, case.held, subject.words, generating, reporter=setup.reporter)
    health = examiner(treated, setup.reporter)
    backdoor = case.backdoor
    return Cell(
        case.name, name, subject.threat, backdoor.attack, backdoor.task, case.seed, told, effect, health, seconds
    )


def bench(
    cases: Iterable[Case], arms: Mapping[str, Arm], setup: Setup, folder: str | Path, generating: Generating = ANSWERS
) -> Benched:
    """Run every arm that its threat model has on every case, and measure its clean twin where it has one.

    Args:
        cases: may be made one by one, as each is done with before the next is asked for.
        folder: FOLDER/CASE/ARM.json; cells of the same case and settings are read from there.

    Returns:
        The cells. An arm that a model cannot have, or that diverges, is named with its reason and holds up no other.
    """
    folder = Path(folder)
    done = Benched([], [])
    settings = settings_key(setup, generating)
    for case in cases:
        examiner = None
        treatments = {name: arm for name, arm in arms.items() if case.subject.threat in arm.threats}
        if case.twin is not None:
            treatments[TWIN] = twin_arm(case.twin)
        for name, arm in treatments.items():
            path, key = folder / case.name / f"{name}.json", [case.key, settings]
            if name == TWIN and case.twin is not None:
                key.append(case.twin.weights_hash)
            if path.is_file() and (found := read_json(path))["key"] == key:
                done.cells.append(Cell.from_json(found["cell"]))
                continue
            setup.reporter.note(f"{case.name}: {name} …")
            subject = case.subject
            examiner = examiner or Examiner(subject.loaded, subject.material, subject.words, case.held, generating)
            shared = folder / case.name / f"work-{sha256_of(key)[:12]}"
            try:
                with memory_errors(f"{case.name}, {name}"):
                    cell = run_cell(case, name, arm, setup.within(shared), generating, examiner)
            except KeelguardError as error:
                done.missing.append(Missing(case.name, name, str(error)))
                continue
            write_json(path, {"key": key, "cell": cell.to_json()})
            done.cells.append(cell)
        for shared in (folder / case.name).glob("work-*"):
            shutil.rmtree(shared)
    return done


def twin_arm(twin: LoadedModel) -> Arm:
    """The clean model in the suspicious one's stead."""
    return Arm(TWIN_ABOUT, lambda subject, setup: twin)


def settings_key(setup: Setup, generating: Generating = ANSWERS) -> str:
    """The hash of what all arms share."""
    return sha256_of([setup.settings(), asdict(generating), versions()])


def read_cells(folder: str | Path) -> list[Cell]:
    """The cells that a bench has left, whatever its settings were."""
    paths = (path for path in sorted(Path(folder).glob("*/*.json")))
    return [Cell.from_json(read_json(path)["cell"]) for path in paths]


def pooled(cells: Sequence[Cell], arms: Sequence[str] = ()) -> list[Pooled]:
    """Every arm over all its cases, in the order given or that of the cells, a clean twin last.

    The first that is no twin is the reference.
    """
    present = dict.fromkeys(cell.arm for cell in cells)
    names = [name for name in arms or sorted(present, key=lambda name: name == TWIN) if name in present]
    reference = next((name for name in names if name != TWIN), None)
    found = []
    for name in names:
        own = {cell.case: cell for cell in cells if cell.arm == name}
        test = theirs_asr = None
        if reference is not None and name != reference:
            theirs = {cell.case: cell for cell in cells if cell.arm == reference}
            shared = [case for case in own if case in theirs]
            test = mcnemar(*([f for case in shared for f in side[case].effect.fired] for side in (own, theirs)))
            theirs_asr = _summed([theirs[case].effect.asr for case in shared])
        rates = {rate: _summed([getattr(c.effect, rate) for c in own.values()]) for rate in _OF_EFFECT}
        rates |= {key: _summed([getattr(c.health, rate) for c in own.values()]) for key, rate in _OF_HEALTH.items()}
        worst = max((cell.effect.asr for cell in own.values()), key=lambda rate: rate.value)
        seconds = sum(cell.seconds for cell in own.values()) / len(own)
        spread = bootstrap_mean([cell.effect.asr.value for cell in own.values()]) if len(own) > 1 else None
        found.append(Pooled(name, len(own), worst, rates, seconds, spread, theirs_asr, test))
    return found


def table(cells: Sequence[Cell], arms: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and rows, rates in percent with their 95 % intervals; the last columns test against the reference arm.

    "over cases" is the interval of the attack success that resampling the cases gives; "reference" is the reference
    arm's on the same cases. "only here" counts triggered requests that fire under this arm and not under the
    reference, "only there" the reverse; p is the exact two-sided McNemar test of them, not corrected for the number of
    arms.
    """
    header = [
        "arm",
        "cases",
        "ASR",
        "over cases",
        "worst case",
        *list(TITLES.values())[1:],
        "reference",
        "only here",
        "only there",
        "p",
        "seconds",
    ]
    rows = []
    for row in pooled(cells, arms):
        rates = [_percent(rate) for rate in row.rates.values()]
        test = ["–"] * 4
        if row.test is not None and row.reference is not None:
            there = f"{100 * row.reference.value:.0f}" if row.reference.total else "–"
            test = [there, str(row.test.only_first), str(row.test.only_second), _p(row.test.p_value)]
        spread = "–" if row.spread is None else f"[{100 * row.spread.low:.0f}, {100 * row.spread.high:.0f}]"
        worst = f"{100 * row.worst.value:.0f}"
        rows.append([row.arm, str(row.cases), rates[0], spread, worst, *rates[1:], *test, f"{row.seconds:.0f}"])
    return header, rows


def _summed(rates: Sequence[Rate]) -> Rate:
    return Rate(sum(rate.count for rate in rates), sum(rate.total for rate in rates))


def _percent(rate: Rate) -> str:
    if not rate.total:
        return "–"
    low, high = rate.interval
    return f"{100 * rate.value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"
