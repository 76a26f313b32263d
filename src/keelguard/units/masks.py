"""Masks of units that know nothing of safety: the controls of equal size beside every claim."""

from typing import Any

import torch

from keelguard.units.index import UnitIndex, parameters_by_name


def random_mask(index: UnitIndex, count: int, seed: int = 0) -> torch.Tensor:
    """`count` random units as a mask (units,); for one seed, a larger count holds a smaller one."""
    ranked = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(len(index), dtype=torch.bool).index_fill_(0, ranked[:count], True)


def magnitude_mask(model: Any, index: UnitIndex, count: int) -> torch.Tensor:
    """The `count` units of the largest mean squared weight as a mask (units,)."""
    ranked = weight_magnitudes(model, index).argsort(descending=True, stable=True)
    return torch.zeros(len(index), dtype=torch.bool).index_fill_(0, ranked[:count], True)


def weight_magnitudes(model: Any, index: UnitIndex) -> torch.Tensor:
    """The mean squared weight of every unit, float64 (units,)."""
    named = parameters_by_name(model)
    found = []
    for block in index.blocks:
        total = torch.zeros(block.size, dtype=torch.float64)
        count = 0
        for part in block.parts:
            weight = named[part.parameter].detach()
            weight = weight if part.at is None else weight[part.at]
            rows = weight.double().square().sum(tuple(d for d in range(weight.ndim) if d != part.dim)).cpu()
            total += rows[part.rows].sum(1)
            count += part.rows.shape[1] * (weight.numel() // weight.shape[part.dim])
        found.append(total / count)
    return torch.cat(found)
