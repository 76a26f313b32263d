"""Train chosen units and nothing else, at their cost: no gradient and no optimiser state exists for the other weights.

    with train_only(model, index, trainable_mask) as budget:
        optimizer = torch.optim.AdamW(budget.parameters(), lr=1e-4)
        ...                                     # any loop, or any trainer on `model`
    model.save_pretrained(folder)               # merged: an ordinary checkpoint

The slices that train are parameters of their own; every forward pass writes them into the weights, and the backward
pass computes their gradients alone.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from keelguard.errors import UsageError
from keelguard.units.index import Slice, UnitIndex, parameters_by_name

Others = Literal["freeze", "train"]
"""What happens to the parameters that belong to no unit."""

_SLICES = ("unit_rows", "unit_columns", "unit_bias")
"""The parameters that a layer gets: (K, in) of rows, (K, out) of columns, (K,) of its bias. Names of biases tell
trainers to leave weight decay off."""


class Budget:
    """Slices of a model that train alone, until `merge`. Made by `train_only`."""

    def __init__(self, model: Any, layers: "dict[str, _Sliced]", required_grad: dict[str, bool]) -> None:
        self._model = model
        self._layers = layers
        self._required_grad = required_grad

    def __enter__(self) -> "Budget":
        return self

    def __exit__(self, *_: object) -> None:
        self.merge()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The slices: rows (K, in), columns as (K, out), biases (K,), and experts' slices one after the other."""
        for layer in self._layers.values():
            for name in _SLICES:
                if name in layer._parameters:
                    yield getattr(layer, name)

    @property
    def numel(self) -> int:
        """How many numbers train in the units."""
        return sum(parameter.numel() for parameter in self.parameters())

    def merge(self) -> Any:
        """Write the slices into the weights and make the model an ordinary one again; returns it."""
        for layer in self._layers.values():
            layer.unslice()
        self._layers = {}
        named = parameters_by_name(self._model)
        for name, required in self._required_grad.items():
            named[name].requires_grad_(required)
        self._required_grad = {}
        return self._model


def train_only(model: Any, index: UnitIndex, trainable_mask: torch.Tensor, *, others: Others = "freeze") -> Budget:
    """Make some units the only weights of a model that train; everything else keeps its bits.

    Works in plain loops, transformers.Trainer and DDP, with gradient checkpointing, accumulation and autocast. A state
    dict taken meanwhile holds weights and slices, so that training can resume exactly on a model to which `train_only`
    was applied with the same mask. Do not shard the model meanwhile.

    Args:
        model: a plain transformers model, neither quantised nor with an adapter nor sharded.
        trainable_mask: (units,) bool. A row that several units share trains only if all of them do.
        others: what happens to the parameters that belong to no unit at all: embeddings, norms, output head, routers,
            biases of B, and queries and keys where the index cuts attention into channels. "freeze" sets
            `requires_grad` False on them until the merge; "train" leaves them as they are, so that they train if they
            did (they count neither in `Budget.numel` nor in `Budget.parameters()`: give the optimiser the model's).

    Raises:
        UsageError: the model is of another kind, has a budget already, or no row is left to train.
        ValueError: the mask is not one of this index.
    """
    slices = index.slices(trainable_mask, shared="all")
    if not slices:
        raise UsageError("no unit can train: the mask chooses none whose rows all belong to chosen units")
    _refuse(model, index)
    named = parameters_by_name(model)
    mapped = {part.parameter for block in index.blocks for part in block.parts}
    required_grad = {name: parameter.requires_grad for name, parameter in named.items()}
    for name, parameter in named.items():
        if name in mapped or others == "freeze":
            parameter.requires_grad_(False)
            parameter.grad = None
    modules = dict(model.named_modules())
    by_layer: dict[str, list[Slice]] = {}
    for piece in slices:
        by_layer.setdefault(piece.parameter.rpartition(".")[0], []).append(piece)
    layers = {name: _slice(modules[name], pieces) for name, pieces in by_layer.items()}
    return Budget(model, layers, required_grad)


def _refuse(model: Any, index: UnitIndex) -> None:
    modules = dict(model.named_modules())
    for module in modules.values():
        if "base_layer" in module._modules:
            raise UsageError("the model has an adapter; merge it first with merge_and_unload()")
        if isinstance(module, _Sliced):
            raise UsageError("the model has a training budget already; merge that one first")
    for part in {part.parameter: part for block in index.blocks for part in block.parts}.values():
        name, _, attribute = part.parameter.rpartition(".")
        parameter = modules[name]._parameters.get(attribute) if name in modules else None
        if parameter is None:
            raise UsageError(f"{part.parameter}: is in the unit index but not in the model; build the index from it")
        kind = type(modules[name])
        # `_apply_gate` comes with the decorator that lets transformers exchange the experts' forward pass.
        known = kind is nn.Linear if part.at is None else hasattr(kind, "_apply_gate")
        if not known:
            raise UsageError(
                f"{name}: is a {kind.__name__}, whose slices cannot be trained alone; use protect() instead"
            )
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            raise UsageError(
                f"{part.parameter}: is quantised or sharded ({type(parameter).__name__}, {parameter.dtype}); load the "
                "model whole, in float32, bfloat16 or float16"
            )


class _SliceMatmul(torch.autograd.Function):
    """x @ weight.T + bias, whose backward pass knows the gradients of x, a slice of the weight, and biases alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        part: torch.Tensor,
        part_of_bias: torch.Tensor | None,
        bias: torch.Tensor | None,
        layer: tuple[torch.Tensor, int, torch.Tensor, torch.Tensor | None],
    ) -> torch.Tensor:
        """
        Args:
            x: (..., in).
            part: (K, in) rows or (K, out) columns, already written into the weight.
            part_of_bias: (Kb,), already written into the bias.
            layer: weight (out, in), the dimension that is sliced, the indices (K,), those of the bias (Kb,). The
                weight is no saved tensor of autograd's: the next forward pass writes the same values into it.

        Returns:
            (..., out)
        """
        weight, dim, rows, _ = layer
        y = F.linear(x, weight, bias)
        if ctx.needs_input_grad[1]:
            # Of autocast, the type that the product was computed in is all that the backward pass has to know.
            ctx.save_for_backward((x if dim == 0 else x.index_select(-1, rows)).to(y.dtype))
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, part, part_of_bias and bias, None where nobody asks; autograd casts them to their types."""
        weight, dim, rows, bias_rows = ctx.layer
        flat = dy.reshape(-1, dy.shape[-1])
        dx = part = part_of_bias = bias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            x = x.reshape(-1, x.shape[-1])
            part = flat.index_select(1, rows).T @ x if dim == 0 else x.T @ flat
        if ctx.needs_input_grad[2]:
            part_of_bias = flat.index_select(1, bias_rows).sum(0)
        if ctx.needs_input_grad[3]:
            bias = flat.sum(0)
        return dx, part, part_of_bias, bias, None


class _Sliced(nn.Module):
    """What a layer becomes while slices of it train: its class is exchanged, and it keeps its name, hooks and place."""

    unit_rows: torch.Tensor
    unit_columns: torch.Tensor
    unit_bias: torch.Tensor
    where_rows: torch.Tensor
    where_columns: torch.Tensor
    where_bias: torch.Tensor
    where_rows_expert: torch.Tensor
    where_columns_expert: torch.Tensor
    _plain: type
    _own: tuple[nn.Parameter, ...]
    _sizes: dict[str, list[int]]

    def slice(self, pieces: list[Slice]) -> None:
        """Make parameters of some slices."""
        raise NotImplementedError

    def write(self) -> None:
        """Put the slices into the weights."""
        raise NotImplementedError

    def unslice(self) -> None:
        """Write the slices a last time and become what the layer was."""
        self.write()
        for name in [n for n in (*self._parameters, *self._buffers) if n in _SLICES or n.startswith("where_")]:
            delattr(self, name)
        plain = self._plain
        del self._plain, self._own, self._sizes
        self.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]

    def _add(self, name: str, values: torch.Tensor, **where: torch.Tensor) -> None:
        self._own = (*self._own, nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format)))
        self.register_parameter(name, self._own[-1])
        for key, indices in where.items():
            self.register_buffer(key, indices.to(values.device), persistent=False)

    def _check_own(self) -> None:
        """Sharded weights are gathered twice, and what the forward pass writes would be missing in the backward one."""
        mine = [p for name, p in self._parameters.items() if name in _SLICES]
        if any(a is not b for a, b in zip(mine, self._own, strict=True)):
            raise UsageError(
                "the slices of a training budget were replaced after train_only(), by sharding the model or by another "
                "conversion of its parameters; give train_only() the model as it trains, unsharded"
            )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The slices have moved on since the last forward pass.
        self.write()
        super()._save_to_state_dict(*args, **kwargs)


class _SlicedLinear(_Sliced, nn.Linear):
    """A linear layer of which rows (with biases) or columns train."""

    def slice(self, pieces: list[Slice]) -> None:
        for piece in pieces:
            if piece.parameter.endswith("bias"):
                assert self.bias is not None
                self._add("unit_bias", piece.of(self.bias), where_bias=piece.rows)
            elif piece.dim == 0:
                self._add("unit_rows", piece.of(self.weight), where_rows=piece.rows)
            else:
                self._add("unit_columns", piece.of(self.weight).T, where_columns=piece.rows)

    @torch.no_grad()
    def write(self) -> None:
        self._check_own()
        if "unit_rows" in self._parameters:
            self.weight.index_copy_(0, self.where_rows, self.unit_rows)
        else:
            self.weight.T.index_copy_(0, self.where_columns, self.unit_columns)
        if "unit_bias" in self._parameters:
            self.bias.index_copy_(0, self.where_bias, self.unit_bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        self.write()
        if not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        bias, where_bias = self._parameters.get("unit_bias"), self._buffers.get("where_bias")
        if "unit_rows" in self._parameters:
            layer = self.weight, 0, self.where_rows, where_bias
            return _SliceMatmul.apply(input, self.unit_rows, bias, self.bias, layer)
        layer = self.weight, 1, self.where_columns, where_bias
        return _SliceMatmul.apply(input, self.unit_columns, bias, self.bias, layer)


class _SlicedExperts(_Sliced):
    """Experts of weights (E, 2I, H) and (E, H, I), of which some experts' rows and columns train."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    _apply_gate: Any

    def slice(self, pieces: list[Slice]) -> None:
        for name, weight, dim in (("rows", self.gate_up_proj, 0), ("columns", self.down_proj, 1)):
            mine = {piece.at or 0: piece for piece in pieces if piece.dim == dim}
            sizes = [len(mine[e].rows) if e in mine else 0 for e in range(len(weight))]
            self._sizes[name] = sizes
            values = [mine[e].of(weight) if dim == 0 else mine[e].of(weight).T for e in sorted(mine)]
            rows = torch.cat([mine[e].rows for e in sorted(mine)])
            experts = torch.arange(len(weight)).repeat_interleave(torch.tensor(sizes))
            self._add(f"unit_{name}", torch.cat(values), **{f"where_{name}": rows, f"where_{name}_expert": experts})

    @torch.no_grad()
    def write(self) -> None:
        self._check_own()
        self.gate_up_proj[self.where_rows_expert, self.where_rows] = self.unit_rows
        self.down_proj[self.where_columns_expert, :, self.where_columns] = self.unit_columns

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) through the experts (T, k) with their weights (T, k), as transformers' experts do."""
        self.write()
        count = len(self.gate_up_proj)
        ins, outs = (
            list(zip(part.split(sizes), where.split(sizes), strict=True))
            for part, where, sizes in (
                (self.unit_rows, self.where_rows, self._sizes["rows"]),
                (self.unit_columns, self.where_columns, self._sizes["columns"]),
            )
        )
        result = torch.zeros_like(hidden_states)
        # Under expert parallelism an index of `count` stands for the experts of other processes.
        for expert in top_k_index.unique().tolist():
            if expert >= count:
                continue
            token, slot = torch.where(top_k_index == expert)
            gated = _matmul(hidden_states[token], self.gate_up_proj[expert], 0, *ins[expert])
            y = _matmul(self._apply_gate(gated), self.down_proj[expert], 1, *outs[expert])
            y = y * top_k_weights[token, slot, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result


def _matmul(x: torch.Tensor, weight: torch.Tensor, dim: int, part: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if not len(rows):
        return F.linear(x, weight)
    return _SliceMatmul.apply(x, part, None, None, (weight, dim, rows, None))  # pyright: ignore[reportReturnType]


def _slice(module: nn.Module, pieces: list[Slice]) -> _Sliced:
    """Exchange a layer's class, and add its slices as parameters."""
    plain = type(module)
    sliced: Any = module
    sliced.__class__ = _SlicedLinear if plain is nn.Linear else _sliced_experts(plain)
    sliced._plain, sliced._own, sliced._sizes = plain, (), {}
    sliced.slice(pieces)
    return sliced


@cache
def _sliced_experts(plain: type) -> type:
    return type(f"Sliced{plain.__name__}", (_SlicedExperts, plain), {})
