"""Keep chosen units bit-equal while any trainer trains the rest of the model.

    with protect(model, index, frozen_mask):
        trainer.train()

A gradient of zero does not freeze a weight: weight decay, old momentum and orthogonalised updates still move it. So the
units' values are put back after every step of every optimiser that holds a parameter of the model.
"""

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from keelguard.errors import FailureError, UsageError
from keelguard.units.held import Held, Place, places_of
from keelguard.units.index import Slice, UnitIndex, parameters_by_name

if TYPE_CHECKING:
    from torch.nn import Module

Others = Literal["train", "freeze"]
"""What happens to the parameters that belong to no unit."""

_MERGE = "merge the adapter first with merge_and_unload()"


class Protection:
    """Units of a model that no optimiser can move, until `remove`. Made by `protect`."""

    def __init__(self, model: "Module", slices: list[Slice], frozen_others: list[str]) -> None:
        # The hooks lie in torch's global tables, where a strong reference would keep a discarded model alive.
        self._model = weakref.ref(model)
        weakref.finalize(model, self.remove).atexit = False
        self._slices = slices
        self._frozen_others = frozen_others
        self._held: dict[str, Held] = {}
        self._handles: list[Any] = []
        self._hooked = WeakTensorKeyDictionary()
        self._plans: weakref.WeakKeyDictionary[Optimizer, _Plan] = weakref.WeakKeyDictionary()
        named = parameters_by_name(model)
        adapted = bool(_tuner_layers(model))
        for name, place in places_of(slices).items():
            # Beside an adapter most weights do not train, and a second copy of them would be large.
            if named[name].requires_grad or not adapted:
                self._held[name] = Held(name, named[name], place, zero=False)
        self._hold_adapters(model, named)
        for name in self._held:
            self._attach(name, named[name])
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def __enter__(self) -> "Protection":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.remove()

    def check(self) -> None:
        """Compare the units with what they were when `protect` was called.

        Raises:
            FailureError: something other than a torch optimiser has moved them.
        """
        model = self._model()
        named = parameters_by_name(model) if model is not None else {}
        for name, held in self._held.items():
            # An adapter's matrices are gone once it is merged.
            if name in named and not held.fit(named[name]).intact(named[name]):
                raise FailureError(
                    f"{name}: protected units have changed. Only torch optimisers that hold the model's own parameters "
                    "can be kept off them, which DeepSpeed's do not; train with FSDP2 (fully_shard) or DDP instead"
                )

    def remove(self) -> None:
        """Let the units train again, and the parameters that others="freeze" had frozen."""
        for handle in [*self._handles, *self._hooked.values()]:
            handle.remove()
        model = self._model()
        named = parameters_by_name(model) if model is not None else {}
        for name in self._frozen_others:
            if name in named:
                named[name].requires_grad_(True)
        self._handles, self._frozen_others = [], []
        self._hooked.clear()
        self._held.clear()
        self._plans.clear()

    def _hold_adapters(self, model: "Module", named: dict[str, torch.Tensor]) -> None:
        """Zero the parts of LoRA's matrices that would move frozen units, and hold them there."""
        names = {id(parameter): name for name, parameter in named.items()}
        for matrix, place in list(_lora_places(model, self._slices, named, self._held)):
            name = names[id(matrix)]
            self._held[name] = Held(name, matrix, place, zero=True)
            self._held[name].restore(matrix)

    def _attach(self, name: str, parameter: torch.Tensor) -> Held:
        """Fit what is held to the tensor that this process has now; its gradient is zero there from now on."""
        held = self._held[name].fit(parameter)
        if parameter.requires_grad and parameter not in self._hooked:
            # On accumulation, so that gradient clipping does not count these rows. FSDP2 calls such hooks, too.
            self._hooked[parameter] = parameter.register_post_accumulate_grad_hook(held.zero_gradient)
            held.zero_gradient(parameter)
        return held

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        model = self._model()
        ids = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
        if model is None or (optimizer in self._plans and self._plans[optimizer].ids == ids):
            return
        # A new optimiser, or one whose parameters were replaced: fully_shard puts DTensors in their place.
        named = parameters_by_name(model)
        mine = {name: parameter for name, parameter in named.items() if id(parameter) in ids}
        if mine:
            _expect_parameters(self._slices, named)
            self._hold_adapters(model, named)
        for name in {s.parameter for s in self._slices} - set(self._held):
            if name in mine and mine[name].requires_grad:
                raise UsageError(
                    f"{name}: did not train when protect() was called on a model with an adapter, and trains now; call "
                    "protect() after choosing what trains"
                )
        bound = [(self._attach(name, p), p) for name, p in mine.items() if name in self._held]
        self._plans[optimizer] = _Plan(ids, bound)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer in self._plans:
            for held, parameter in self._plans[optimizer].bound:
                held.restore(parameter)


def protect(model: "Module", index: UnitIndex, frozen_mask: torch.Tensor, *, others: Others = "train") -> Protection:
    """Keep the weights of some units bit-equal, whatever optimiser, weight decay or momentum trains the model.

    Works under transformers.Trainer, TRL, accelerate, DDP and FSDP2, and with plain LoRA, whose merged weights stay
    bit-equal in the frozen units. `fully_shard` may come before or after; if it comes after, the gradient norm of the
    first step still counts the frozen rows. The units' values are kept once more, on the model's device. As a context
    manager it checks in the end that nothing got past it.

    Args:
        model: any model whose parameters `index` maps; attach adapters before.
        frozen_mask: (units,) bool. A row that several units share is frozen if any of them is.
        others: what happens to the parameters that belong to no unit at all: embeddings, norms, output head, routers,
            biases of B, and queries and keys where the index cuts attention into channels. "train" leaves them as they
            are, so that they train if they did. "freeze" sets `requires_grad` False on them and on the adapters of such
            modules, until the protection is removed. Units outside `frozen_mask` train either way.

    Raises:
        UsageError: the model lacks a parameter of the index, or has an adapter that cannot be kept off the units. With
            some trainers this shows at the first step.
        ValueError: the mask is not one of this index.
    """
    slices = index.slices(frozen_mask, shared="any")
    _expect_parameters(slices, parameters_by_name(model))
    protection = Protection(model, slices, [])
    if others == "freeze":
        protection._frozen_others += _freeze_others(model, index)
    return protection


class _Plan(NamedTuple):
    """What to restore after an optimiser's step, while it holds the parameters of these ids."""

    ids: frozenset[int]
    bound: list[tuple[Held, torch.Tensor]]


def _expect_parameters(slices: list[Slice], named: dict[str, torch.Tensor]) -> None:
    for piece in slices:
        if piece.parameter not in named:
            raise UsageError(
                f"{piece.parameter}: is in the unit index but not in the model. Build the index from this model; if an "
                f"adapter or a wrapper keeps the parameter under another name, {_MERGE}"
            )


def _freeze_others(model: "Module", index: UnitIndex) -> list[str]:
    """Stop the training of every parameter of no unit; the names of those that did train."""
    named = parameters_by_name(model)
    mapped = {id(named[part.parameter]) for block in index.blocks for part in block.parts if part.parameter in named}
    for layer in _tuner_layers(model):
        base = {id(parameter) for parameter in layer.get_base_layer().parameters(recurse=False)}
        if base & mapped:
            mapped |= {id(parameter) for parameter in layer.parameters()} - base
    stopped = [name for name, p in named.items() if p.requires_grad and id(p) not in mapped]
    for name in stopped:
        named[name].requires_grad_(False)
        # An optimiser would still apply a gradient that is already there.
        named[name].grad = None
    return stopped


def _tuner_layers(model: "Module") -> list[Any]:
    """The layers of PEFT adapters."""
    if not any("base_layer" in module._modules for module in model.modules()):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _lora_places(
    model: "Module", slices: list[Slice], named: dict[str, torch.Tensor], known: dict[str, Held]
) -> Iterator[tuple[torch.Tensor, Place]]:
    """The matrices of LoRA layers over some slices, and which of their parts must be zero.

    Rows of W + s·B·A stay if those rows of B are zero, columns if those columns of A are.

    Raises:
        UsageError: an adapter's update is not zero there, or cannot be kept zero.
    """
    layers = _tuner_layers(model)
    names = {id(parameter): name for name, parameter in named.items()}
    for piece in slices if layers else []:
        owner, attribute = id(named[piece.parameter]), piece.parameter.rpartition(".")[2]
        for layer in layers:
            base = layer.get_base_layer()
            if not any(id(parameter) == owner for parameter in base.parameters(recurse=False)):
                continue
            if getattr(layer, "parameter_name", attribute) != attribute:
                continue
            _refuse_adapter(piece.parameter, layer)
            if attribute == "bias":
                continue
            for adapter, a in layer.lora_A.items():
                b = layer.lora_B[adapter]
                matrix = (b if piece.dim == 0 else a).weight
                if names[id(matrix)] in known:
                    continue
                if _moves(a.weight, b.weight, piece):
                    raise UsageError(
                        f"{piece.parameter}: the LoRA adapter {adapter!r} already moves units that are to be frozen; "
                        f"{_MERGE}, then attach a new one"
                    )
                yield matrix, Place(None, piece.dim, piece.rows)


def _refuse_adapter(parameter: str, layer: Any) -> None:
    """Only plain LoRA on a linear layer leaves some rows of its weight exactly alone."""
    from peft.tuners.lora.layer import Linear

    kind = ""
    if type(layer) is not Linear:
        kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
    elif layer.lora_variant:
        kind = ", ".join(type(variant).__name__ for variant in layer.lora_variant.values())
    elif any(layer.lora_bias.values()):
        kind = "LoRA with lora_bias"
    elif layer.fan_in_fan_out:
        kind = "LoRA with fan_in_fan_out"
    elif layer.merged:
        kind = "a merged LoRA that can be taken off again"
    if kind:
        raise UsageError(f"{parameter}: has an adapter ({kind}) that cannot be kept off frozen units; {_MERGE}")


def _moves(a: torch.Tensor, b: torch.Tensor, piece: Slice) -> bool:
    """Whether B·A is not zero in the slice; all processes of a sharded model must ask together."""
    a, b = ((t.full_tensor() if isinstance(t, DTensor) else t).detach() for t in (a, b))
    rows = piece.rows.to(a.device)
    b, a = (b[rows], a) if piece.dim == 0 else (b, a[:, rows])
    return bool(b.any()) and bool((b.float() @ a.float()).any())
