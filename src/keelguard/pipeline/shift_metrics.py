"""What is compared between two conditions: importance and groups of units, the direction, the signal's verdicts.

A `Side` for each family of metrics, made from a `Reading`, and the distances between two of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from keelguard.guard.calibration import expected_calibration_error, highest_per_item, reliability
from keelguard.guard.detect import Scores
from keelguard.pipeline.drift import Side, Values, normal_ranks
from keelguard.pipeline.shift_reading import BENIGN, BENIGN_ANSWER, HARMFUL, HARMFUL_ANSWER, Reading
from keelguard.stats import Rate
from keelguard.units.attribution import Statistics
from keelguard.units.groups import GROUPS, Sizes, UnitMap, classify
from keelguard.units.importance import Importance, importance, standardise
from keelguard.units.index import UnitIndex
from keelguard.units.stability import iou
from keelguard.units.transfer import carried_labels

METRICS = {
    "importance": "1 − Spearman’s rank correlation of all units’ importance for safety",
    "scu": "1 − IoU of the safety-critical units, at the map’s size",
    "groups": "share of units that change their group, by the thresholds of the first",
    "direction": "mean over layers of the change in distance to the refusal less that to the compliance",
    "decision": "change of the margin of refusal over compliance, nats a token",
    "calibration": "change of the signal’s calibration error on queries",
    "recall": "change of the share of harmful queries that the signal flags",
    "false_alarms": "change of the share of benign queries that the signal flags",
    "answer_calibration": "change of the signal’s calibration error along known answers",
}
"""The metrics, each a distance of at least 0, in the order in which they are shown."""

LAYERED = ("importance", "groups", "direction")
"""Those that are also known layer by layer."""


@dataclass(frozen=True)
class Mapped:
    """A unit map with the ranks of its importance for safety, over all units and inside each layer."""

    chart: UnitMap
    ranks: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, chart: UnitMap) -> "Mapped":
        """Of a map that has the raw importance of its own score."""
        safety = chart.raw[chart.meta["score"]]["safety"].numpy()
        return cls(chart, (normal_ranks(safety), *(normal_ranks(safety[inside]) for inside in _layers(chart))))


class Units:
    """Unit maps of one model from prompts weighted anew; utility is that of all benign answers.

    Attributes:
        chart: the unit map whose score, sizes and ranking are used.
    """

    def __init__(
        self, chart: UnitMap, index: UnitIndex, norms: Sequence[torch.Tensor], utility: Statistics, weights: str
    ) -> None:
        self.chart, self.index, self.norms, self.weights = chart, index, norms, weights
        self.score = chart.meta["score"]
        self.meta = {name: chart.meta.get(name) for name in ("score", "ranking", "sizes")}
        self.utility = importance(self.score, index, {"utility": utility}, norms).utility

    def at(self, statistics: Statistics, weights: np.ndarray) -> UnitMap:
        """The map that a diagnosis of these prompts (G,) would find."""
        times = torch.from_numpy(np.asarray(weights, dtype=np.float64))
        name = "decision" if self.score == "decision" else "safety"
        found = importance(self.score, self.index, {name: statistics}, self.norms, {name: times})
        raw = Importance(found.safety, self.utility)
        standard = standardise(raw, self.score, self.chart.blocks)
        ranking = self.chart.meta.get("ranking", "global")
        labels = classify(*standard, self.chart.blocks, Sizes(**self.chart.meta["sizes"]), ranking)
        return UnitMap(
            labels, *standard, {self.score: vars(raw)}, self.chart.layout, self.chart.attention, self.weights, self.meta
        )

    def side(self, reading: Reading) -> Side[Mapped] | None:
        """None where the condition has no statistics."""
        statistics = reading.statistics
        if statistics is None:
            return None
        counts = statistics.effects[0].examples if statistics.effects else statistics.moments[0].count
        return Side(counts.numpy() > 0, lambda weights: Mapped.of(self.at(statistics, weights)))


def compare_units(first: Mapped, second: Mapped) -> Values:
    """Importance, SCU and groups of two maps of one layout."""
    moved = (carried_labels(first.chart, second.chart) != first.chart.labels).numpy()
    critical = GROUPS.index("SCU")
    shared = iou(first.chart.labels == critical, second.chart.labels == critical)
    return {
        "importance": [1 - float(ours @ theirs) for ours, theirs in zip(first.ranks, second.ranks, strict=True)],
        "scu": [float("nan") if shared is None else 1 - shared],
        "groups": [moved.mean(), *(moved[inside].mean() for inside in _layers(first.chart))],
    }


def _layers(chart: UnitMap) -> list[np.ndarray]:
    """For each layer a mask (units,) of its units."""
    places = np.repeat([block["layer"] for block in chart.layout], chart.blocks)
    return [places == layer for layer in np.unique(places)]


@dataclass(frozen=True)
class Leaning:
    """Towards refusal or compliance: the margin in nats a token, and the direction at each layer (L,), where known."""

    margin: float
    direction: np.ndarray | None


def leaning_side(reading: Reading, count: int) -> Side[Leaning]:
    """The margin, and the reasoning direction, over prompts in `count` groups."""
    groups, margins = np.array(reading.groups), np.array(reading.margins)
    sizes = np.bincount(groups, minlength=count)

    def at(weights: np.ndarray) -> Leaning:
        times = weights[groups]
        margin = float((times * margins).sum() / times.sum())
        if reading.direction is None:
            return Leaning(margin, None)
        each = (weights * sizes)[:, None]
        return Leaning(margin, np.where(each > 0, each * reading.direction, 0).sum(0) / each.sum())

    return Side(sizes > 0, at)


def compare_leanings(first: Leaning, second: Leaning) -> Values:
    """The margin's change, and the direction's where both know one."""
    found: dict[str, Sequence[float]] = {"decision": [abs(first.margin - second.margin)]}
    if first.direction is not None and second.direction is not None:
        change = np.abs(first.direction - second.direction)
        found["direction"] = [change.mean(), *change]
    return found


@dataclass(frozen=True)
class Judged:
    """How the signal does: calibration errors, and shares of queries that it flags; NaN where nothing was judged."""

    error: float
    answer_error: float
    recall: float
    false_alarms: float


def judged_side(scores: Scores, threshold: float, count: int) -> Side[Judged]:
    """The signal's verdicts; `threshold` is that of queries."""
    values, labels = np.array(scores.values), np.array(scores.labels)
    groups, sets = np.array([int(group) for group in scores.groups], dtype=np.int64), np.array(scores.sets, dtype=str)
    queries = np.isin(sets, (HARMFUL, BENIGN))

    def error(chosen: np.ndarray) -> float:
        if not len(chosen):
            return float("nan")
        return expected_calibration_error(reliability(values[chosen], labels[chosen]))

    def share(chosen: np.ndarray) -> float:
        return float((values[chosen] > threshold).mean()) if len(chosen) else float("nan")

    def at(weights: np.ndarray) -> Judged:
        drawn = np.repeat(np.arange(len(values)), weights[groups])
        return Judged(
            error=error(drawn[queries[drawn]]),
            answer_error=error(drawn[~queries[drawn]]),
            recall=share(drawn[sets[drawn] == HARMFUL]),
            false_alarms=share(drawn[sets[drawn] == BENIGN]),
        )

    return Side(np.bincount(groups[sets == HARMFUL], minlength=count) > 0, at)


def compare_judged(first: Judged, second: Judged) -> Values:
    """The changes of all four figures."""
    return {
        "calibration": [abs(first.error - second.error)],
        "recall": [abs(first.recall - second.recall)],
        "false_alarms": [abs(first.false_alarms - second.false_alarms)],
        "answer_calibration": [abs(first.answer_error - second.answer_error)],
    }


def flagged_rates(scores: Scores, threshold: float) -> dict[str, Rate]:
    """By kind the share of queries above the threshold."""
    found = {}
    for kind in (HARMFUL, BENIGN):
        some = scores.where(each == kind for each in scores.sets)
        found[kind] = Rate.of([value > threshold for value in highest_per_item(some.values, some.items)])
    return found


def calibration_errors(scores: Scores) -> Mapping[str, float | None]:
    """The expected calibration error on queries and along answers; None where nothing was judged."""
    found = {}
    for name, kinds in (("queries", (HARMFUL, BENIGN)), ("answers", (HARMFUL_ANSWER, BENIGN_ANSWER))):
        some = scores.where(each in kinds for each in scores.sets)
        found[name] = expected_calibration_error(reliability(some.values, some.labels)) if some.values else None
    return found
