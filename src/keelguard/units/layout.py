"""What an index of units is made of: blocks of units, the parts of parameters that they own, and names of those.

Pure bookkeeping, without a look at any model; `keelguard.units.index` finds the blocks of one.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from keelguard.hashes import sha256_of

if TYPE_CHECKING:
    import torch

Attention = Literal["head", "channel"]
"""How attention is cut into units: whole heads (key/value groups), or single channels of the output projection."""

_WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module|base_model\.model|_fsdp_wrapped_module)\.)+")
_INNER = re.compile(r"\.(?:base_layer|_orig_mod|_fsdp_wrapped_module)(?=\.)")


class Slice(NamedTuple):
    """Rows of one parameter along one dimension; `at` selects an expert of a 3-D parameter first."""

    parameter: str
    at: int | None
    dim: int
    rows: "torch.Tensor"

    def of(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """A copy of the rows of a parameter's tensor."""
        whole = tensor if self.at is None else tensor[self.at]
        return whole.index_select(self.dim, self.rows.to(whole.device))

    def put(self, tensor: "torch.Tensor", values: "torch.Tensor | float") -> None:
        """Write the rows of a parameter's tensor in place."""
        whole = tensor if self.at is None else tensor[self.at]
        rows = self.rows.to(whole.device)
        if isinstance(values, float | int):
            whole.index_fill_(self.dim, rows, values)
        else:
            whole.index_copy_(self.dim, rows, values.to(whole.device, whole.dtype))


@dataclass(frozen=True)
class Part:
    """What a block's units own of one parameter.

    Attributes:
        parameter: its canonical name (see `parameters_by_name`).
        role: "in" for rows of A and their biases, "out" for columns of B.
        dim: the dimension of the parameter (behind the expert's) that `rows` counts along.
        rows: (U, w) int64, the indices that each unit owns; units may share a row.
        at: the expert of a 3-D parameter, else None.
    """

    parameter: str
    role: Literal["in", "out"]
    dim: int
    rows: "torch.Tensor"
    at: int | None = None


@dataclass(frozen=True)
class Block:
    """The U units of one kind in one place of one layer.

    Attributes:
        name: such as "layers.3.mlp".
        kind: "mlp", "head" or "channel".
        module: name of the module whose input holds the units' activations, or of the experts' module.
        channels: (U, w) int64, the input channels of B that belong to each unit.
        start: the number of its first unit in the whole model.
        expert: which expert of `module`, else None.
    """

    name: str
    layer: int
    kind: str
    module: str
    channels: "torch.Tensor"
    parts: tuple[Part, ...]
    start: int = 0
    expert: int | None = None

    @property
    def size(self) -> int:
        """Number of units U."""
        return len(self.channels)

    @property
    def span(self) -> slice:
        """The units' numbers in the whole model."""
        return slice(self.start, self.start + self.size)

    @property
    def width(self) -> int:
        """Number of input channels of B."""
        return self.channels.numel()

    @property
    def output(self) -> Part:
        """The columns of B."""
        return next(part for part in self.parts if part.role == "out")


@dataclass(frozen=True)
class Coverage:
    """What an index maps of a model: counts of units and parameters; `share` is of all parameters, tied ones once."""

    units: dict[str, int]
    mapped: int
    total: int

    @property
    def share(self) -> float:
        """The share of the model's parameters that belongs to units."""
        return self.mapped / self.total


@dataclass(frozen=True)
class UnitIndex:
    """All units of a model, numbered from 0 through its blocks."""

    blocks: tuple[Block, ...]
    attention: Attention
    coverage: Coverage

    def __len__(self) -> int:
        last = self.blocks[-1]
        return last.start + last.size

    @cached_property
    def layout(self) -> list[dict[str, Any]]:
        """The blocks as JSON, without tensors: what a unit map is bound to."""
        return [{"name": b.name, "layer": b.layer, "kind": b.kind, "units": b.size} for b in self.blocks]

    @cached_property
    def digest(self) -> str:
        """The hash of the layout."""
        return sha256_of(self.layout)

    def slices(
        self, chosen: "torch.Tensor", *, shared: Literal["any", "all"] = "any", roles: str = "in out"
    ) -> list[Slice]:
        """Where some units live.

        Args:
            chosen: (units,) bool.
            shared: a row that several units share belongs to the result if any of them is chosen (to freeze it),
                or only if all are (to train it, or to zero it).
            roles: "in", "out" or both.

        Raises:
            ValueError: `chosen` is no mask of this index.
        """
        import torch

        if chosen.shape != (len(self),) or chosen.dtype != torch.bool:
            raise ValueError(f"chosen has shape {tuple(chosen.shape)} and {chosen.dtype}; give bool of ({len(self)},)")
        found: dict[tuple[str, int | None, int], list[torch.Tensor]] = {}
        for block in self.blocks:
            mask = chosen[block.span].cpu()
            if not mask.any():
                continue
            for part in block.parts:
                if part.role not in roles.split():
                    continue
                rows = part.rows[mask].flatten().unique()
                if shared == "all":
                    left_out = part.rows[~mask].flatten().unique()
                    rows = rows[~torch.isin(rows, left_out)]
                if len(rows):
                    found.setdefault((part.parameter, part.at, part.dim), []).append(rows)
        return [Slice(name, at, dim, torch.cat(rows).unique()) for (name, at, dim), rows in found.items()]


def canonical(name: str) -> str:
    """The name of a module or parameter in the plain model."""
    return _INNER.sub("", _WRAPPERS.sub("", name))


def parameters_by_name(model: Any) -> "dict[str, torch.Tensor]":
    """A model's parameters under canonical names: those of the plain model, below any wrapper or adapter."""
    return {canonical(name): parameter for name, parameter in model.named_parameters()}


def weights_by_name(model: Any, names: Container[str]) -> "Iterator[tuple[str, torch.Tensor]]":
    """(canonical name, weight) of some parameters, each brought in while it is looked at where accelerate offloads."""
    from accelerate.utils import align_module_device

    for path, module in model.named_modules():
        for inner in [inner for inner, _ in module.named_parameters(recurse=False)]:
            name = canonical(f"{path}.{inner}")
            if name in names:
                with align_module_device(module):
                    yield name, getattr(module, inner).detach()
