"""Masks of units that know nothing of safety: the controls of equal size beside every claim."""

from typing import Any

import torch

from keelguard.errors import UsageError
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
            # Of a bias there is no other dimension, and a sum over none would be one over all.
            rest = tuple(d for d in range(weight.ndim) if d != part.dim)
            squares = weight.double().square()
            rows = squares.sum(rest) if rest else squares
            total += rows.cpu()[part.rows].sum(1)
            count += part.rows.shape[1] * (weight.numel() // weight.shape[part.dim])
        found.append(total / count)
    return torch.cat(found)


def layer_mask(index: UnitIndex, first: int, last: int) -> torch.Tensor:
    """All units of the layers from `first` to `last`, both included and counted from 0, as a mask (units,).

    Source: SPPFT (Li et al. 2025, arXiv 2408.17003, section 4), which freezes a contiguous range of "safety layers".
    There the range is found by how far benign and harmful prompts part, and the layers' norms are frozen, too; here
    the range is given and norms are no units: freeze them with `others="freeze"`.

    Raises:
        UsageError: there are no such layers.
    """
    layers = 1 + max(block.layer for block in index.blocks)
    if not 0 <= first <= last < layers:
        raise UsageError(f"layers {first} to {last}: are no range of this model, which has 0 to {layers - 1}")
    mask = torch.zeros(len(index), dtype=torch.bool)
    for block in index.blocks:
        mask[block.span] = first <= block.layer <= last
    return mask
