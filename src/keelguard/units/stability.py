"""How far a unit map can be trusted: its groups over resampled prompts, over data sets, and over scores.

Independent work (arXiv 2602.17696) finds that safety-unit sets of different methods and data overlap little; so the
overlap belongs to the result. IoU is |A ∩ B| / |A ∪ B|; two random sets of a share p of the units have p / (2 − p).
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch

from keelguard.units.groups import GROUPS

Labeller = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Weights (groups,) of the prompts' groups by statistic → labels (units,)."""


def iou(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Intersection over union of two masks (units,); None where both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else None


def chance(share: float) -> float:
    """The expected IoU of two random sets that hold this share of all units each, in the limit of many units."""
    return share / (2 - share)


def bootstrap_stability(
    labels: torch.Tensor, label: Labeller, groups: Mapping[str, int], samples: int, seed: int = 0
) -> dict[str, Any]:
    """IoU of each group with itself when the groups of prompts are drawn anew, with replacement.

    Args:
        groups: the number of prompt groups by statistic; statistics of the same prompts ("safety" and "decision")
            are drawn together.

    Returns:
        By group: mean IoU, its 2.5 % and 97.5 % quantiles over the samples, and what chance would give.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {group: [] for group in GROUPS}
    for _ in range(samples):
        draws = {use: _multiplicities(rng, groups[use]) for use in ("safety", "utility") if use in groups}
        if "safety" in draws:
            draws["decision"] = draws["safety"]
        resampled = label(draws)
        for number, group in enumerate(GROUPS):
            value = iou(labels == number, resampled == number)
            if value is not None:
                found[group].append(value)
    return {
        group: {
            "iou": fmean(values),
            "low": float(np.quantile(values, 0.025)),
            "high": float(np.quantile(values, 0.975)),
            "chance": chance(float((labels == GROUPS.index(group)).double().mean())),
            "samples": len(values),
        }
        for group, values in found.items()
        if values
    }


def overlap(sets: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """IoU of every pair of labellings (units,), by group; None where a group is empty in both."""
    names = list(sets)
    return {
        f"{first} / {second}": {
            group: iou(sets[first] == number, sets[second] == number) for number, group in enumerate(GROUPS)
        }
        for i, first in enumerate(names)
        for second in names[i + 1 :]
    }


def halves(groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of weights (groups,) that share the groups of prompts between them."""
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    first = torch.zeros(groups, dtype=torch.float64)
    first[order[: groups // 2]] = 1.0
    return first, 1.0 - first


def only(sources: Sequence[int], source: int) -> torch.Tensor:
    """Weights (groups,) that keep the groups of one data set."""
    return torch.tensor([float(s == source) for s in sources], dtype=torch.float64)


def _multiplicities(rng: np.random.Generator, groups: int) -> torch.Tensor:
    """How often each group comes in a sample of as many groups, drawn with replacement."""
    return torch.from_numpy(np.bincount(rng.integers(0, groups, size=groups), minlength=groups).astype(np.float64))
