"""Masks of units that know nothing of safety: the controls of equal size beside every claim."""

from typing import Any

import torch

from keelguard.errors import UsageError
from keelguard.units.index import Block, Part, UnitIndex, weights_by_name


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
    totals = torch.zeros(len(index), dtype=torch.float64)
    counts = torch.zeros(len(index), dtype=torch.float64)
    owned: dict[str, list[tuple[Block, Part]]] = {}
    for block in index.blocks:
        for part in block.parts:
            owned.setdefault(part.parameter, []).append((block, part))
    for name, weight in weights_by_name(model, owned):
        for block, part in owned[name]:
            whole = weight if part.at is None else weight[part.at]
            # Of a bias no dimension is left to sum over, and an empty list of dimensions would mean all.
            rows = whole.double().square().movedim(part.dim, 0).reshape(whole.shape[part.dim], -1).sum(1).cpu()
            totals[block.span] += rows[part.rows].sum(1)
            counts[block.span] += part.rows.shape[1] * (whole.numel() // whole.shape[part.dim])
    return totals / counts


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
