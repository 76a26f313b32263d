"""Intervals, paired tests and bootstrap: the statistics behind every figure that keelguard prints.

Pure functions of counts and arrays. Rates carry 95 % intervals unless a level is given.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A closed interval [low, high]."""

    low: float
    high: float


def wilson(count: int, total: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a binomial proportion (Wilson 1927, JASA 22).

    With no observations nothing is known: the interval is [0, 1].

    Raises:
        ValueError: count outside 0..total, or level outside (0, 1).
    """
    if not 0 <= count <= total:
        raise ValueError(f"count {count} is outside 0..{total}")
    if not 0 < level < 1:
        raise ValueError(f"level {level} is outside (0, 1)")
    if total == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = count / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if count == 0 else (centre - spread) / scale
    high = 1.0 if count == total else (centre + spread) / scale
    return Interval(low, high)


def exact_upper(count: int, total: int, level: float = 0.95) -> float:
    """Upper end of the exact two-sided interval of a binomial proportion (Clopper and Pearson 1934, Biometrika 26).

    Nothing seen in 200 trials bounds the proportion at 1.8 %.

    Raises:
        ValueError: count outside 0..total.
    """
    if not 0 <= count <= total:
        raise ValueError(f"count {count} is outside 0..{total}")
    low, high = count / total if total else 0.0, 1.0
    if count == total:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = sum(math.comb(total, k) * middle**k * (1 - middle) ** (total - k) for k in range(count + 1))
        low, high = (middle, high) if tail > (1 - level) / 2 else (low, middle)
    return high


@dataclass(frozen=True)
class Rate:
    """A proportion with what it was counted from and its 95 % Wilson interval."""

    count: int
    total: int

    @classmethod
    def of(cls, outcomes: Collection[bool]) -> "Rate":
        """Count the true outcomes."""
        return cls(sum(map(bool, outcomes)), len(outcomes))

    @property
    def value(self) -> float:
        """The proportion; NaN with no observations."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> Interval:
        """The 95 % Wilson interval."""
        return wilson(self.count, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{100 * self.value:.0f} %" if self.total else "nothing measured"
        return f"{share} [{100 * low:.0f}, {100 * high:.0f}], {self.count} of {self.total}"

    def to_json(self) -> dict[str, float | int | None]:
        """The rate as audit.json holds it; an empty rate has the value null."""
        low, high = self.interval
        value = self.value if self.total else None
        return {"value": value, "low": low, "high": high, "count": self.count, "total": self.total}

    @classmethod
    def from_json(cls, data: dict) -> "Rate":
        """The inverse of `to_json`."""
        return cls(count=data["count"], total=data["total"])


class McNemar(NamedTuple):
    """An exact McNemar test: discordant pairs (only the first, only the second) and the two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact two-sided McNemar test of two outcomes on the same requests (McNemar 1947, binomial form).

    Raises:
        ValueError: the sequences differ in length, so that they cannot be paired.
    """
    if len(first) != len(second):
        raise ValueError(f"paired outcomes differ in length: {len(first)} and {len(second)}")
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**discordant))


def paired_rate_difference(first: Sequence[bool], second: Sequence[bool], level: float = 0.95) -> Interval:
    """Interval of a difference of paired proportions (Agresti and Min 2005, Statistics in Medicine 24).

    Half an observation is added to each cell of the table, so that the interval keeps its width where no pair, or
    every pair, differs: where a bootstrap would claim certainty.

    Raises:
        ValueError: the sequences differ in length.
    """
    test = mcnemar(first, second)
    total = len(first) + 2
    gained, lost = test.only_first + 0.5, test.only_second + 0.5
    difference = (gained - lost) / total
    spread = math.sqrt((gained + lost) / total - difference**2) / math.sqrt(total)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    return Interval(max(-1.0, difference - z * spread), min(1.0, difference + z * spread))


def bootstrap_mean(values: Sequence[float], level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of a mean (Efron 1979).

    Raises:
        ValueError: there is nothing to resample.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("bootstrap_mean needs at least one value")
    picks = np.random.default_rng(seed).integers(0, data.size, size=(samples, data.size))
    low, high = np.quantile(data[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def paired_difference(
    first: Sequence[float], second: Sequence[float], level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap interval of mean(first − second), resampling pairs.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    if len(first) != len(second):
        raise ValueError(f"paired values differ in length: {len(first)} and {len(second)}")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap_mean(difference.tolist(), level, samples, seed)
