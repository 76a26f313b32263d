"""Rows of parameters that keep their values, in whole tensors, in experts' tensors, or in a process's shard of one."""

from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from keelguard.errors import UsageError
from keelguard.units.index import Slice


class Place(NamedTuple):
    """K rows along `dim` of a tensor, or rows of the experts `at` of a 3-D one; `at` and `rows` are (K,) int64."""

    at: torch.Tensor | None
    dim: int
    rows: torch.Tensor

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the rows; of a 3-D tensor as (K, width)."""
        if self.at is None:
            return tensor.index_select(self.dim, self.rows)
        return tensor[self._key]

    @torch.no_grad()
    def put(self, tensor: torch.Tensor, values: torch.Tensor | None) -> None:
        """Write the rows in place; None stands for zeros."""
        if not len(self.rows):
            return
        if self.at is not None:
            tensor[self._key] = 0.0 if values is None else values
        elif values is None:
            tensor.index_fill_(self.dim, self.rows, 0)
        else:
            tensor.index_copy_(self.dim, self.rows, values)

    def to(self, device: torch.device) -> "Place":
        return Place(self.at if self.at is None else self.at.to(device), self.dim, self.rows.to(device))

    @property
    def _key(self) -> tuple[Any, ...]:
        return (self.at, self.rows) if self.dim == 0 else (self.at, slice(None), self.rows)


class Held:
    """Rows of one parameter and what they must be: their values when they were captured, or zeros."""

    def __init__(self, name: str, parameter: torch.Tensor, place: Place, *, zero: bool) -> None:
        self.name, self.shape, self.place = name, tuple(parameter.shape), place
        self.values: torch.Tensor | None = None
        self.sharded = False
        self.fit(parameter)
        if not zero:
            self.values = self.place.take(local_part(parameter))

    def fit(self, parameter: torch.Tensor) -> "Held":
        """Bring indices and values to the parameter's device, and down to this process's shard of it."""
        if tuple(parameter.shape) != self.shape:
            raise UsageError(
                f"{self.name}: has shape {tuple(parameter.shape)}, and had {self.shape}; parameters that FSDP1 or "
                "DeepSpeed flatten or partition cannot be protected: shard with FSDP2 (fully_shard)"
            )
        if isinstance(parameter, DTensor) and not self.sharded:
            self._shard(parameter)
        tensor = local_part(parameter)
        self.place = self.place.to(tensor.device)
        if self.values is not None:
            self.values = self.values.to(tensor.device, tensor.dtype)
        return self

    def restore(self, parameter: torch.Tensor) -> None:
        self.place.put(local_part(parameter), self.values)

    def zero_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.place.put(local_part(parameter.grad), None)

    def intact(self, parameter: torch.Tensor) -> bool:
        found = self.place.take(local_part(parameter))
        return torch.equal(found, torch.zeros_like(found) if self.values is None else self.values)

    def _shard(self, parameter: DTensor) -> None:
        if any(type(placement) not in (Shard, Replicate) for placement in parameter.placements):
            raise UsageError(
                f"{self.name}: is laid out as {parameter.placements}; only plain sharding and replication are supported"
            )
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, offset = compute_local_shape_and_global_offset(self.shape, mesh, placements)
        at, dim, rows = self.place
        along = dim if at is None else dim + 1
        inside = (rows >= offset[along]) & (rows < offset[along] + shape[along])
        if at is not None:
            inside &= (at >= offset[0]) & (at < offset[0] + shape[0])
            at = at[inside] - offset[0]
        self.place = Place(at, dim, rows[inside] - offset[along])
        if self.values is not None:
            # The axis of `values` that counts rows, and what the other axes are in the parameter.
            axis = along if at is None else 0
            kept = self.values.index_select(axis, inside.nonzero().flatten().to(self.values.device))
            others = [d for d in range(len(shape)) if d != along and (at is None or d != 0)]
            for where, d in zip([a for a in range(kept.ndim) if a != axis], others, strict=True):
                kept = kept.narrow(where, offset[d], shape[d])
            self.values = kept.clone()
        self.sharded = True


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The storage that this process holds of a tensor, outside of autograd."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def places_of(slices: list[Slice]) -> dict[str, Place]:
    """One place per parameter: the slices of all its experts together, so that one call writes them."""
    grouped: dict[str, list[Slice]] = {}
    for piece in slices:
        grouped.setdefault(piece.parameter, []).append(piece)
    places = {}
    for name, pieces in grouped.items():
        rows = torch.cat([piece.rows for piece in pieces])
        at = None
        if pieces[0].at is not None:
            at = torch.cat([torch.full_like(piece.rows, piece.at or 0) for piece in pieces])
        places[name] = Place(at, pieces[0].dim, rows)
    return places
