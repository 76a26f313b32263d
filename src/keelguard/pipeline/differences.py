"""The statistics of the gate: intervals and tests of a difference, and the correction for several of them.

Pure functions of counts and arrays. Paired proportions are in `keelguard.stats`.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from keelguard.stats import Interval, Rate, wilson

_FLIPS, _CHUNK = 9999, 999


def newcombe(first: Rate, second: Rate, level: float = 0.95) -> Interval:
    """Interval of first − second for two independent proportions (Newcombe 1998, Statistics in Medicine 17, method 10).

    With no observations on a side nothing is known: the interval is [−1, 1].
    """
    if not first.total or not second.total:
        return Interval(-1.0, 1.0)
    difference = first.value - second.value
    (low_1, high_1), (low_2, high_2) = (wilson(rate.count, rate.total, level) for rate in (first, second))
    below = math.hypot(first.value - low_1, high_2 - second.value)
    above = math.hypot(high_1 - first.value, second.value - low_2)
    return Interval(max(-1.0, difference - below), min(1.0, difference + above))


def fisher(first: Rate, second: Rate) -> float:
    """The exact two-sided p-value of two independent proportions (Fisher 1935), in whole numbers throughout.

    Counts are summed that are no likelier than those seen, given their sum.
    """
    successes = first.count + second.count
    low, high = max(0, successes - second.total), min(successes, first.total)
    ways = [math.comb(first.total, k) * math.comb(second.total, successes - k) for k in range(low, high + 1)]
    seen = ways[first.count - low]
    return sum(each for each in ways if each <= seen) / sum(ways)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given: no less than they were, and at most 1."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def mean_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Interval:
    """Interval of mean(first − second) over pairs of shares in [0, 1]; [−1, 1] without any.

    As `keelguard.stats.paired_rate_difference`, which it equals where every share is 0 or 1: half a pair is added that
    rose by 1 and half of one that fell by 1, and one pair that did not change.
    """
    if not first:
        return Interval(-1.0, 1.0)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    total = len(differences) + 2
    mean = math.fsum(differences) / total
    spread = math.sqrt((math.fsum(d * d for d in differences) + 1) / total - mean**2) / math.sqrt(total)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    return Interval(max(-1.0, mean - z * spread), min(1.0, mean + z * spread))


def sign_flip(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of mean(first − second) by flipping the signs of pairs at random (Fisher's randomisation test).

    The least value that it can give is 1 / 10,000.
    """
    values = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    values = values[values != 0]
    if not values.size:
        return 1.0
    random = np.random.default_rng(seed)
    # Half a rounding error below, so that flips that give the same sum count.
    seen, reached = abs(values.sum()) - 1e-9, 0
    for _ in range(0, _FLIPS, _CHUNK):
        signs = random.integers(0, 2, size=(_CHUNK, values.size), dtype=np.int8) * 2.0 - 1.0
        reached += int((np.abs(signs @ values) >= seen).sum())
    return (reached + 1) / (_FLIPS + 1)


def pairs_needed(variance: float, difference: float, margin: float, level: float = 0.95) -> int | None:
    """About how many requests would show that a difference stays below a margin, if it is what was seen.

    Args:
        variance: of one request's difference.

    Returns:
        None where the difference seen is not below the margin.
    """
    if difference >= margin:
        return None
    z = NormalDist().inv_cdf(0.5 + level / 2)
    return math.ceil(max(z * z * variance / (margin - difference) ** 2, z / margin - 2))
