"""How important every unit is, for safety and for utility: four scores behind one function.

- `decision`: for safety the mean effect on log P(refusal) − log P(compliance) where the choice is made, for utility the
  mean |effect| on the log-odds of the answers' tokens (see `attribution.Row`).
- `taylor`: the mean |effect| on the model's own safe answers, and on the answers to benign requests.
- `variance`: variance of the activation × squared norm of B's column (the paper's, after FLAP).
- `wanda`: root mean square of the activation × norm of B's column (Sun et al. 2023, arXiv 2306.11695).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from keelguard.units.attribution import Statistics
from keelguard.units.index import Part, UnitIndex, weights_by_name

SCORES = ("decision", "taylor", "variance", "wanda")
WITHIN_BLOCK = ("variance", "wanda")
"""Scores that are compared within a layer and module first, as in FLAP (An et al. 2023, arXiv 2312.11983, eq. 6)."""


@dataclass(frozen=True)
class Importance:
    """Importance of all units, float64 (units,): as measured, before any normalisation."""

    safety: torch.Tensor
    utility: torch.Tensor


def output_norms(model: Any, index: UnitIndex) -> list[torch.Tensor]:
    """‖B[:, j]‖² of every block's channels, float64 (channels,) on the CPU."""
    wanted: dict[str, list[tuple[int, Part]]] = {}
    for number, block in enumerate(index.blocks):
        wanted.setdefault(block.output.parameter, []).append((number, block.output))
    norms: dict[int, torch.Tensor] = {}
    for name, weight in weights_by_name(model, wanted):
        for number, part in wanted[name]:
            whole = weight if part.at is None else weight[part.at]
            norms[number] = whole.double().square().sum(1 - part.dim).cpu()
    return [norms[number] for number in range(len(index.blocks))]


def importance(
    score: Literal["decision", "taylor", "variance", "wanda"],
    index: UnitIndex,
    statistics: Mapping[str, Statistics],
    norms: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Importance:
    """The importance of every unit by one score.

    Args:
        statistics: of "safety" and "utility", and for the decision score of "decision".
        norms: from `output_norms`.
        weights: how often each group of prompts counts, (groups,) by the name of the statistics; once by default.
            A set that is missing from `statistics` has importance 0.
    """
    weights = weights or {}

    def one(name: str) -> torch.Tensor:
        found = statistics.get(name)
        if found is None:
            return torch.zeros(len(index), dtype=torch.float64)
        chosen = weights.get(name)
        if score in ("decision", "taylor"):
            # A prompt's choice is the sum over its two rows, of which the statistics hold the mean.
            return 2 * _effects(found, True, chosen) if name == "decision" else _effects(found, False, chosen)
        return _activations(found, index, norms, root=score == "wanda", weights=chosen)

    return Importance(one("decision" if score == "decision" else "safety"), one("utility"))


def _effects(found: Statistics, signed: bool, weights: torch.Tensor | None) -> torch.Tensor:
    assert found.effects is not None
    means = [part.means(weights) for part in found.effects]
    return torch.cat([mean if signed else absolute for mean, absolute in means]).cpu()


def _activations(
    found: Statistics, index: UnitIndex, norms: Sequence[torch.Tensor], *, root: bool, weights: torch.Tensor | None
) -> torch.Tensor:
    parts = []
    for block, moments, norm in zip(index.blocks, found.moments, norms, strict=True):
        pooled = moments.pooled(weights)
        channels = (pooled.square.cpu() * norm).sqrt() if root else pooled.variance.cpu() * norm
        parts.append(channels[block.channels].sum(-1))
    return torch.cat(parts)


class Standard(NamedTuple):
    """Normalised importance (units,): I_S − I_U, and I_S + I_U with the size of a signed I_S."""

    contrast: torch.Tensor
    strength: torch.Tensor


def standardise(found: Importance, score: str, blocks: Sequence[int], reference: Importance | None = None) -> Standard:
    """z-score the importance for safety and for utility, each over the model or within each block; then compare them.

    Args:
        blocks: the number of units of each block, in order.
        reference: importance in another model, whose means and spreads are used, so that its thresholds mean the
            same here.
    """
    reference = reference or found
    parts = blocks if score in WITHIN_BLOCK else [len(found.safety)]

    def z(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        pairs = zip(values.split(list(parts)), scale.split(list(parts)), strict=True)
        return torch.cat([_z(value, by) for value, by in pairs])

    utility = z(found.utility, reference.utility)
    return Standard(
        z(found.safety, reference.safety) - utility, z(found.safety.abs(), reference.safety.abs()) + utility
    )


def _z(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Where all of the scale is equal, as in a block of one unit, nothing differs from it by a known measure: 0."""
    spread = scale.std(correction=0)
    # Equal values may differ from their own mean by rounding.
    known = spread > 1e-12 * scale.abs().max()
    return (values - scale.mean()) / spread if known else torch.zeros_like(values)
