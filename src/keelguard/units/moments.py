"""Streaming statistics of units: exact counts, means and squared deviations, kept per group of prompts.

Groups make everything that is resampled free: a bootstrap, or the overlap of two data sets, only weighs groups
anew and reads no activation again. Two accumulators of different prompts merge into what one would have held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Pooled(NamedTuple):
    """Count, means (n,) and sums of squared deviations (n,) of all groups together, float64."""

    count: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        """Unbiased variance (n,); 0 with fewer than two tokens."""
        return self.m2 / (self.count - 1).clamp(min=1)

    @property
    def square(self) -> torch.Tensor:
        """Mean square (n,)."""
        return self.m2 / self.count.clamp(min=1) + self.mean**2


def group_moments(x: torch.Tensor, groups: torch.Tensor) -> Iterator[tuple[int, float, torch.Tensor, torch.Tensor]]:
    """Group, count, mean (n,) and sum of squared deviations (n,), float64, of each group among S tokens.

    Args:
        x: (S, n) activations of any floating dtype.
        groups: (S,) int64, the group of each token.
    """
    # Each group in turn: a product of a short one-hot matrix would cost as much as the model's own.
    order = groups.argsort(stable=True)
    for group, rows in enumerate(order.split(torch.bincount(groups).tolist())):
        if len(rows):
            part = x[rows].to(torch.float64)
            mean = part.mean(0)
            yield group, float(len(rows)), mean, (part - mean).square_().sum(0)


@dataclass
class Moments:
    """Count (G,), mean (G, n) and sum of squared deviations (G, n) of n channels in G groups, in float64.

    Two passes within a batch and Chan's merge between batches (Chan, Golub and LeVeque 1983): exact for any batch
    size, where the running formula of FLAP's published code is not.
    """

    count: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor

    @classmethod
    def empty(cls, groups: int, channels: int, device: Any = "cpu") -> "Moments":
        """Moments of nothing."""
        zeros = torch.zeros(groups, channels, dtype=torch.float64, device=device)
        return cls(torch.zeros(groups, dtype=torch.float64, device=device), zeros, zeros.clone())

    def update(self, x: torch.Tensor, groups: torch.Tensor) -> None:
        """Take in S tokens (S, n) of groups (S,); see `group_moments`."""
        for part in group_moments(x, groups):
            self.add(*part)

    def add(self, group: int, count: float, mean: torch.Tensor, m2: torch.Tensor) -> None:
        """Take in the count, mean (n,) and sum of squared deviations (n,) of further tokens of a group."""
        total = self.count[group] + count
        shift = mean - self.mean[group]
        self.m2[group] += m2 + shift**2 * (self.count[group] * count / total)
        self.mean[group] += shift * (count / total)
        self.count[group] = total

    def merge(self, other: "Moments") -> None:
        """Take in what another accumulator has seen of other tokens, group by group."""
        for group in range(len(self.count)):
            if other.count[group] > 0:
                count = float(other.count[group])
                self.add(group, count, other.mean[group].to(self.mean), other.m2[group].to(self.m2))

    def cpu(self) -> None:
        """Move to the CPU, in place: nothing that follows is worth the memory of a GPU."""
        self.count, self.mean, self.m2 = self.count.cpu(), self.mean.cpu(), self.m2.cpu()

    def pooled(self, weights: torch.Tensor | None = None) -> Pooled:
        """All groups together, each as often as its weight (G,) says; once by default."""
        count = self.count if weights is None else self.count * weights.to(self.count)
        total = count.sum()
        mean = (count[:, None] * self.mean).sum(0) / total.clamp(min=1)
        repeats = count / self.count.clamp(min=1)
        m2 = (repeats[:, None] * self.m2 + count[:, None] * (self.mean - mean) ** 2).sum(0)
        return Pooled(total, mean, m2)

    def all_reduce(self) -> None:
        """Merge the accumulators of all processes of the default group, in place in every one of them."""
        total, weighted = self.count.clone(), self.count[:, None] * self.mean
        for tensor in (total, weighted):
            torch.distributed.all_reduce(tensor)
        mean = weighted / total.clamp(min=1)[:, None]
        self.m2 += self.count[:, None] * (self.mean - mean) ** 2
        torch.distributed.all_reduce(self.m2)
        self.count, self.mean = total, mean


@dataclass
class Effects:
    """First-order effects of n units in G groups, float64: Σ and Σ|·| over examples, and how many examples.

    The effect of a unit on an objective J of one example is Σ x·∂J/∂x over its channels and tokens: by how much J
    falls, to first order, when the unit is removed (Molchanov et al. 2017, arXiv 1611.06440).
    """

    examples: torch.Tensor
    signed: torch.Tensor
    absolute: torch.Tensor

    @classmethod
    def empty(cls, groups: int, units: int, device: Any = "cpu") -> "Effects":
        """Effects of nothing."""
        zeros = torch.zeros(groups, units, dtype=torch.float64, device=device)
        return cls(torch.zeros(groups, dtype=torch.float64, device=device), zeros, zeros.clone())

    def update(self, effects: torch.Tensor, groups: torch.Tensor) -> None:
        """Take in B examples: effects (B, n), and the group of each (B,)."""
        effects = effects.to(torch.float64)
        self.examples.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
        self.signed.index_add_(0, groups, effects)
        self.absolute.index_add_(0, groups, effects.abs())

    def cpu(self) -> None:
        """Move to the CPU, in place."""
        self.examples, self.signed, self.absolute = self.examples.cpu(), self.signed.cpu(), self.absolute.cpu()

    def means(self, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean effect (n,) and mean absolute effect (n,) of an example, groups weighted by (G,)."""
        weights = torch.ones_like(self.examples) if weights is None else weights.to(self.examples)
        total = (self.examples * weights).sum().clamp(min=1)
        return weights @ self.signed / total, weights @ self.absolute / total

    def all_reduce(self) -> None:
        """Add up over all processes, in place in every one of them."""
        for tensor in (self.examples, self.signed, self.absolute):
            torch.distributed.all_reduce(tensor)
