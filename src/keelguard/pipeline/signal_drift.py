"""How far a safety signal holds on weights other than those that it was made for, against a stated limit.

    report = measure_drift(tuned, signal, rows, original=original)           # report.over, report.changes

A signal reads hidden states, which move with the weights. What is done about it: `pipeline.signal_recheck`.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.guard.adapter import Signal
from keelguard.guard.labels import Labelled
from keelguard.guard.material import MaterialConfig
from keelguard.guard.training import SignalConfig
from keelguard.models import LoadedModel
from keelguard.pipeline.verdicts import (
    AUROC,
    BRIER,
    ERROR,
    FALSE,
    MISSED,
    Estimate,
    Verdicts,
    collect,
    compare,
    paired,
)
from keelguard.progress import SILENT, Reporter

QUERY, ANSWER = "query", "answer"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DriftConfig:
    """How far a signal may get worse before something is done, each limit for queries and for answers alike."""

    auroc: float = _option(0.02, "largest fall of AUROC")
    error: float = _option(0.05, "largest rise of the expected calibration error, both classes weighed alike")
    brier: float = _option(0.05, "largest rise of the Brier score, both classes weighed alike")
    false_share: float = _option(0.03, "largest rise of the share of benign queries, or answers, that are flagged")
    missed_share: float = _option(0.03, "largest rise of the share of malicious queries, or answers, that are missed")
    requests: int = _option(128, "most requests of each class that are measured")
    least: int = _option(16, "fewest requests of each class that say anything")
    samples: int = _option(1000, "bootstrap resamples")
    seed: int = _option(0, "draws of requests and resamples")

    def __post_init__(self) -> None:
        for name in ("auroc", "error", "brier", "false_share", "missed_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"drift: {name} {getattr(self, name)}: give 0 to 1")
        if self.requests < self.least or self.least < 2 or self.samples < 1:
            raise UsageError("drift: give 2 or more for least, no less for requests, and 1 or more for samples")

    def limit(self, name: str) -> float:
        """The largest change for the worse of a figure."""
        names = {AUROC: "auroc", ERROR: "error", BRIER: "brier", FALSE: "false_share", MISSED: "missed_share"}
        return getattr(self, names[name])


LIMITS = DriftConfig()
"""The limits that `keelguard finetune` keeps to."""


@dataclass(frozen=True)
class Change:
    """A figure of one kind of verdict before and after; `difference` is after less before, with a paired interval."""

    kind: str
    name: str
    before: Estimate
    after: Estimate
    difference: Estimate
    limit: float

    @property
    def falls(self) -> bool:
        """Whether less of it is worse: of AUROC, and of nothing else."""
        return self.name == AUROC

    @property
    def worse(self) -> float:
        """The change for the worse."""
        return -self.difference.value if self.falls else self.difference.value

    @property
    def over(self) -> bool:
        """Whether it changed for the worse by more than the limit. The figure itself decides: a remedy costs little."""
        return self.worse > self.limit

    @property
    def certain(self) -> bool:
        """Whether it is over, and the paired interval lies on the worse side altogether: no matter of chance."""
        return self.over and (self.difference.high < 0 if self.falls else self.difference.low > 0)

    def to_json(self) -> dict[str, Any]:
        """The change as JSON."""
        kept = {name: getattr(self, name)._asdict() for name in ("before", "after", "difference")}
        return {
            "kind": self.kind,
            "name": self.name,
            **kept,
            "limit": self.limit,
            "over": self.over,
            "certain": self.certain,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Change":
        """The inverse of `to_json`."""
        kept = {name: Estimate(**data[name]) for name in ("before", "after", "difference")}
        return cls(data["kind"], data["name"], **kept, limit=data["limit"])


@dataclass(frozen=True)
class DriftReport:
    """A signal on two states of a model.

    Attributes:
        changes: figures of queries and of answers, without those that no data allow.
        malicious, benign: requests measured.
        left_out: conversations that only one of the two models has, such as answers that became loops.
    """

    changes: tuple[Change, ...]
    malicious: int
    benign: int
    left_out: int = 0

    @property
    def over(self) -> tuple[Change, ...]:
        """The figures beyond their limits."""
        return tuple(change for change in self.changes if change.over)

    @property
    def certain(self) -> tuple[Change, ...]:
        """Those of them that are no matter of chance."""
        return tuple(change for change in self.changes if change.certain)

    @property
    def excess(self) -> float:
        """How far the figures are beyond their limits, all together."""
        return sum(change.worse - change.limit for change in self.over)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        plain = {name: value for name, value in vars(self).items() if name != "changes"}
        return {"changes": [change.to_json() for change in self.changes], **plain, "within": not self.over}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DriftReport":
        """The inverse of `to_json`."""
        changes = tuple(map(Change.from_json, data["changes"]))
        return cls(changes, data["malicious"], data["benign"], data["left_out"])


def measure_drift(
    loaded: LoadedModel,
    signal: Signal,
    labelled: Sequence[Labelled],
    *,
    original: LoadedModel | Verdicts,
    before: Signal | None = None,
    frames: Sequence[str] = (),
    config: DriftConfig = LIMITS,
    store: Path | None = None,
    reporter: Reporter = SILENT,
) -> DriftReport:
    """Compare a signal's verdicts on a model with those on the model that it was made for, request by request.

    Malicious rows are judged as they are, benign ones with each model's own answers.

    Args:
        loaded: the model after training, without an adapter that is not merged.
        signal: as it would be used on it; need not be bound to its weights.
        labelled: rows of both classes that nobody was trained on; `config.requests` of each class at most are taken.
        original: the model before, or its verdicts from an earlier call of `collect`.
        before: the signal on it; the same one by default.
        store: keeps the new model's own answers.

    Raises:
        UsageError: there are too few requests of a class, or none that fit the models' context.
    """
    rows = chosen_rows(labelled, config)
    material = material_of(before or signal, config)
    if isinstance(original, LoadedModel):
        first = before or signal
        original = collect(original, first, rows, frames=frames, material=material, reporter=reporter)
    now = collect(loaded, signal, rows, frames=frames, material=material, store=store, reporter=reporter)
    changes, left_out = [], 0
    for kind, old, new in ((QUERY, original.queries, now.queries), (ANSWER, original.answers, now.answers)):
        thresholds = (_threshold(before or signal, kind), _threshold(signal, kind))
        left_out += len(set(old.items) ^ set(new.items))
        found = compare(*paired(old, new), thresholds, config.samples, config.seed)
        changes += [Change(kind, name, *figure, limit=config.limit(name)) for name, figure in found.items()]
    if not any(change.name == AUROC for change in changes):
        raise UsageError("the signal cannot be measured: no request of either class fits both models' context")
    malicious = sum(row.malicious for row in rows)
    return DriftReport(tuple(changes), malicious, len(rows) - malicious, left_out)


def chosen_rows(rows: Sequence[Labelled], config: DriftConfig) -> list[Labelled]:
    """The rows that are measured: at most `requests` of each class, drawn by the seed.

    Raises:
        UsageError: there are fewer than `least` of one.
    """
    draw, found = random.Random(f"drift-{config.seed}"), []
    for malicious, name in ((True, "malicious"), (False, "benign")):
        side = [row for row in rows if row.malicious == malicious]
        if len(side) < config.least:
            raise UsageError(
                f"the signal's check has {len(side)} {name} requests that nothing was trained on, and needs "
                f"{config.least}; give more with {'--safety' if malicious else '--benign or --held-out'} FILE"
            )
        found += side if len(side) <= config.requests else draw.sample(side, config.requests)
    return found


def config_of(signal: Signal) -> SignalConfig:
    """The settings that a signal was trained with; the defaults where it does not say."""
    kept = signal.training.get("config")
    try:
        values = {**kept, "material": MaterialConfig(**kept["material"])} if isinstance(kept, Mapping) else {}
        return SignalConfig(**{"placement": signal.placement, **values, "policy": signal.policy})
    except (TypeError, KeyError):
        return SignalConfig(placement=signal.placement, policy=signal.policy)


def material_of(signal: Signal, config: DriftConfig) -> MaterialConfig:
    """How benign rows are answered: all that were chosen, to the length at which the signal was trained."""
    return replace(config_of(signal).material, limit=0, own_answers=0, seed=config.seed)


def _threshold(signal: Signal, kind: str) -> float:
    return signal.policy.query_threshold if kind == QUERY else signal.policy.threshold
