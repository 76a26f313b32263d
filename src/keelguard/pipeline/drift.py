"""How far something moves between two conditions, beside how far it moves within one and the same.

    found = drifts(sides, [(0, 1)], compare)[0]     # {"importance": (over all, layer 0, layer 1, …)}

A condition is a model on a distribution of requests, known by groups of prompts. All conditions are cut into the same
random halves, and always one half is compared with the *other* half: of the other condition (the drift), and of its
own (the control). Were there no difference between the conditions, both would be equal on average, whatever the
prompts' own noise does to the figure; and a request that both conditions share never meets itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from keelguard.errors import UsageError

T = TypeVar("T")
Values = Mapping[str, Sequence[float]]
"""By metric a distance over all, and one for each layer where the metric has layers; NaN where there is none."""

FEWEST_GROUPS = 4
"""Groups of prompts of a condition below which its halves say nothing."""

_INNER = 2
"""Cuts into halves that a resample of the prompts is averaged over, so that its spread is that of the prompts."""


@dataclass(frozen=True)
class Resampling:
    """How often prompts are cut into halves and drawn anew."""

    splits: int = field(default=100, metadata={"help": "random cuts of the prompts into halves"})
    samples: int = field(default=200, metadata={"help": "resamples of the prompts for the intervals"})
    level: float = field(default=0.95, metadata={"help": "level of the intervals and of the warning limit"})
    seed: int = field(default=0, metadata={"help": "seed of both"})

    def __post_init__(self) -> None:
        for name, least in (("splits", 10), ("samples", 20)):
            if getattr(self, name) < least:
                option = "bootstrap" if name == "samples" else name
                raise UsageError(f"--{option} {getattr(self, name)}: give {least} or more")
        if not 0 < self.level < 1:
            raise UsageError(f"level {self.level}: give a share between 0 and 1")


@dataclass(frozen=True)
class Side(Generic[T]):
    """A condition.

    Attributes:
        present: (G,) booleans, the groups of prompts that it has.
        at: what it shows on prompts weighted by whole numbers (G,), at least one of them for a group that is present.
    """

    present: np.ndarray
    at: Callable[[np.ndarray], T]


@dataclass(frozen=True)
class Drift:
    """A drift with what it is to be read by.

    Attributes:
        value: the mean distance between a half of the one condition and the other half of the other.
        low, high: its 95 % bootstrap interval over prompts. A resample holds fewer distinct prompts than the data and
            so drifts more; that excess is taken off.
        control: the mean distance between the two halves of one condition, over both.
        limit: 95 % of the cuts of one condition drift less than this; of the two conditions the greater. A mean over
            cuts scatters less than a single one, so that the limit errs on the side of silence.
    """

    value: float
    low: float
    high: float
    control: float
    limit: float

    @property
    def warn(self) -> bool:
        """Whether the drift is more than prompts of one and the same kind show among themselves."""
        return self.value > self.limit

    def to_json(self) -> dict[str, Any]:
        """The drift as `shift.json` holds it."""
        return {**vars(self), "warn": self.warn}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Drift":
        """The inverse of `to_json`."""
        return cls(**{name: data[name] for name in ("value", "low", "high", "control", "limit")})


def drifts(
    sides: Sequence[Side[T]],
    pairs: Sequence[tuple[int, int]],
    compare: Callable[[T, T], Values],
    resampling: Resampling = Resampling(),
    advance: Callable[[int], None] = lambda done: None,
) -> list[dict[str, tuple[Drift | None, ...]]]:
    """The drift of every metric between pairs of conditions of the same groups of prompts.

    Args:
        pairs: the places of two conditions each.
        compare: the distances from the first to the second; it need not be symmetric.
        advance: called with the number of cuts and resamples done.

    Returns:
        For each pair, by metric the drift over all and of each layer; None where too few cuts gave a figure.

    Raises:
        UsageError: a condition has fewer than four groups of prompts, so that halves of it say nothing.
    """
    for side in sides:
        if (count := int(side.present.sum())) < FEWEST_GROUPS:
            raise UsageError(f"{count} groups of prompts are too few to compare halves; give {FEWEST_GROUPS}")
    used = np.flatnonzero(np.any([side.present for side in sides], axis=0))
    rng = np.random.default_rng(resampling.seed)
    once = np.bincount(used, minlength=len(sides[0].present))
    across, within = [_Table() for _ in pairs], [_Table() for _ in sides]
    for _ in range(resampling.splits):
        shown = _shown(sides, _halves(rng, used, once))
        for table, (i, j) in zip(across, pairs, strict=True):
            table.add(_both(compare, shown[i], shown[j]))
        for table, own in zip(within, shown, strict=True):
            table.add(_both(compare, own, own))
        advance(1)
    drawn = [_Table() for _ in pairs]
    for _ in range(resampling.samples):
        times = np.bincount(rng.choice(used, len(used)), minlength=len(once))
        cuts = [_shown(sides, _halves(rng, used, times)) for _ in range(_INNER)]
        for table, (i, j) in zip(drawn, pairs, strict=True):
            inner = _Table()
            for shown in cuts:
                inner.add(_both(compare, shown[i], shown[j]))
            table.add(inner.mean())
        advance(1)
    return [
        _summary(value, resample, (within[i], within[j]), resampling.level)
        for value, resample, (i, j) in zip(across, drawn, pairs, strict=True)
    ]


def normal_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (n,), ties at their mean rank, of mean 0 and length 1; NaN where all are equal.

    The product of two is Spearman's rank correlation, as `keelguard.units.proof.spearman` has it for a few units.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts + 1) / 2)[inverse]
    ranks = ranks - ranks.mean()
    length = np.sqrt((ranks * ranks).sum())
    return ranks / length if length > 0 else np.full(len(values), np.nan)


def _halves(rng: np.random.Generator, used: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (G,) of two random halves of the groups in use."""
    first = np.zeros_like(times)
    first[rng.permutation(used)[: len(used) // 2]] = 1
    return first * times, (1 - first) * times


def _shown(sides: Sequence[Side[T]], halves: tuple[np.ndarray, np.ndarray]) -> list[tuple[T | None, T | None]]:
    """What the two halves of every condition show; None of a half without prompts."""
    found = []
    for side in sides:
        first, second = (side.at(half) if (half * side.present).any() else None for half in halves)
        found.append((first, second))
    return found


def _both(
    compare: Callable[[T, T], Values], first: tuple[T | None, T | None], second: tuple[T | None, T | None]
) -> dict[str, np.ndarray] | None:
    """The mean of the two comparisons of a half with the other half; None where a half is missing."""
    (a, b), (c, d) = first, second
    if a is None or b is None or c is None or d is None:
        return None
    one, two = compare(a, d), compare(b, c)
    return {name: (np.asarray(one[name], dtype=np.float64) + np.asarray(two[name])) / 2 for name in one}


def _summary(
    value: "_Table", resampled: "_Table", within: tuple["_Table", "_Table"], level: float
) -> dict[str, tuple[Drift | None, ...]]:
    middle, noises = resampled.mean(), [table.mean() for table in within]
    ends = [resampled.quantile((1 + side * level) / 2) for side in (-1, 1)]
    limits = [table.quantile(level) for table in within]
    found: dict[str, tuple[Drift | None, ...]] = {}
    for name, values in value.mean().items():
        if any(name not in table for table in (*noises, middle)):
            found[name] = (None,) * len(values)
            continue
        low, high = (values + end[name] - middle[name] for end in ends)
        control = np.mean([noise[name] for noise in noises], axis=0)
        limit = np.max([each[name] for each in limits], axis=0)
        # No distance is negative, and an interval holds its value.
        lines = np.stack([values, np.clip(low, 0, values), np.maximum(high, values), control, limit], axis=1)
        found[name] = tuple(None if np.isnan(line).any() else Drift(*map(float, line)) for line in lines)
    return found


class _Table:
    """Distances of many cuts, by metric."""

    def __init__(self) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}

    def add(self, values: Mapping[str, np.ndarray] | None) -> None:
        for name, value in (values or {}).items():
            self.rows.setdefault(name, []).append(value)

    def mean(self) -> dict[str, np.ndarray]:
        return self._each(lambda known: known.mean())

    def quantile(self, level: float) -> dict[str, np.ndarray]:
        return self._each(lambda known: np.quantile(known, level))

    def _each(self, summary: Callable[[np.ndarray], Any]) -> dict[str, np.ndarray]:
        """A figure of each column from the cuts that have it; NaN where fewer than half of them do."""
        found = {}
        for name, rows in self.rows.items():
            columns = np.stack(rows).T
            known = [column[~np.isnan(column)] for column in columns]
            found[name] = np.array(
                [summary(each) if 2 * len(each) >= len(rows) else np.nan for each in known], dtype=np.float64
            )
        return found
