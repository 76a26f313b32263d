"""Which parts of a poisoned model's update carry the backdoor: put them back one after the other, and measure.

    cuts = dissect(poisoned, parameters_by_name(clean), attack_success, blocks=(4, 12))

Source: the sanity checks of BD-VAX (arXiv 2603.13461): reverting the attention update leaves a backdoor, reverting the
MLP update removes it, and so does reverting enough consecutive blocks.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch

from keelguard.errors import UsageError
from keelguard.progress import SILENT, Reporter
from keelguard.units.index import build_index, canonical, parameters_by_name

T = TypeVar("T")

Part = Literal["attention", "mlp", "embeddings", "norms"]

PARTS: tuple[Part, ...] = ("attention", "mlp", "embeddings", "norms")
"""Queries, keys, values and their output; feed-forward networks with experts and routers; embeddings and head; norms,
those of queries and keys among them."""


class Place(NamedTuple):
    """Where a parameter belongs; the layer is None outside of the decoder's layers."""

    part: Part
    layer: int | None


@dataclass(frozen=True)
class Cut(Generic[T]):
    """What was measured with a part of the update put back.

    Attributes:
        parts: what was put back; nothing in the control.
        layers: in which layers; None is everywhere.
        weights: how many weights that are.
        update: their share of the whole update's squared norm, in [0, 1]; 0 where there is no update.
        value: what the caller's function gave.
    """

    parts: tuple[Part, ...]
    layers: tuple[int, ...] | None
    weights: int
    update: float
    value: T


def partition(model: Any) -> dict[str, Place]:
    """The part and the layer of every parameter of a model, by canonical name.

    Raises:
        UsageError: a parameter belongs to none of the parts, an adapter's among them, or the model cannot be mapped.
    """
    if hasattr(model, "peft_config"):
        raise UsageError("an adapter is on the model; merge it first with merge_and_unload()")
    attention: dict[str, int] = {}
    layers: dict[str, int] = {}
    for block in build_index(model).blocks:
        if block.kind != "mlp":
            owner = block.module.rpartition(".")[0]
            attention[f"{owner}."] = block.layer
            layers[f"{owner.removesuffix(block.name.removeprefix(f'layers.{block.layer}'))}."] = block.layer
    norms = {
        canonical(f"{path}.{inner}")
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for inner, _ in module.named_parameters(recurse=False)
    }
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    embeddings = {id(parameter) for end in ends for parameter in end.parameters()}
    found = {}
    for name, parameter in parameters_by_name(model).items():
        layer = next((number for prefix, number in layers.items() if name.startswith(prefix)), None)
        if id(parameter) in embeddings:
            part: Part = "embeddings"
        elif name in norms:
            part = "norms"
        elif name.startswith(tuple(attention)):
            part = "attention"
        elif layer is not None:
            part = "mlp"
        else:
            raise UsageError(f"{name}: is neither in a layer nor a norm nor an embedding; keelguard cannot place it")
        found[name] = Place(part, layer)
    return found


@contextmanager
def reverted(
    model: Any,
    clean_weights: Mapping[str, torch.Tensor],
    parts: Collection[Part],
    layers: Collection[int] | None = None,
) -> Iterator[None]:
    """Give parts of a model the weights of its clean version until the context ends; then its own return bit-equal.

    Args:
        model: an ordinary checkpoint, adapters merged.
        clean_weights: of the same architecture, by canonical name; `parameters_by_name` of the clean model.
        layers: which layers; None is all of them and what lies outside of them, too.

    Raises:
        UsageError: a part or layer is unknown, or the two are not of the same architecture.
    """
    places = partition(model)
    parameters = parameters_by_name(model)
    check_same(parameters, clean_weights)
    names = _names(places, parts, layers)
    kept = {name: parameters[name].detach().clone() for name in names}
    try:
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(clean_weights[name])
        yield
    finally:
        with torch.no_grad():
            for name, old in kept.items():
                parameters[name].copy_(old)


def dissect(
    poisoned: Any,
    clean: Mapping[str, torch.Tensor],
    measure: Callable[[Any], T],
    *,
    blocks: Sequence[int] = (4,),
    reporter: Reporter = SILENT,
) -> list[Cut[T]]:
    """Put parts of a poisoned model's update back, one cut after the other, and measure the model each time.

    The cuts: nothing and everything (the controls), each part alone, and for every width in `blocks` and every first
    layer the MLPs of so many consecutive layers, then their MLPs and attention.

    Args:
        poisoned: an ordinary checkpoint, adapters merged; as it was in the end.
        clean: the weights that it comes from, by canonical name; `parameters_by_name` of the clean model.
        measure: gets the model in each state, and must leave its weights alone. It is called 6 + 2·Σ(L − k + 1) times
            for L layers.
        blocks: numbers k of consecutive layers.

    Raises:
        UsageError: the two are not of the same architecture, or a width is out of range.
    """
    places = partition(poisoned)
    parameters = parameters_by_name(poisoned)
    check_same(parameters, clean)
    depth = 1 + max(place.layer for place in places.values() if place.layer is not None)
    for width in blocks:
        if not 1 <= width <= depth:
            raise UsageError(f"--blocks {width}: the model has {depth} layers; give 1 to {depth}")
    runs = [tuple(range(first, first + width)) for width in blocks for first in range(depth - width + 1)]
    alone: list[tuple[Part, ...]] = [(part,) for part in PARTS]
    within: list[tuple[Part, ...]] = [("mlp",), ("attention", "mlp")]
    plan: list[tuple[tuple[Part, ...], tuple[int, ...] | None]] = [
        *((parts, None) for parts in ((), PARTS, *alone)),
        *((parts, layers) for parts in within for layers in runs),
    ]
    squares = {name: _distance(parameters[name], clean[name]) for name in places}
    whole = sum(squares.values())
    cuts: list[Cut[T]] = []
    with reporter.step("dissection", len(plan)) as advance:
        for parts, layers in plan:
            names = _names(places, parts, layers)
            update = sum(squares[name] for name in names) / whole if whole else 0.0
            with reverted(poisoned, clean, parts, layers):
                value = measure(poisoned)
            cuts.append(Cut(parts, layers, sum(parameters[name].numel() for name in names), update, value))
            advance(1)
    return cuts


def check_same(own: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Check that two checkpoints are of the same architecture.

    Raises:
        UsageError: a parameter is missing on one side, has another shape, or its weights are not in memory.
    """
    for name in [*own, *(name for name in other if name not in own)]:
        if name not in own or name not in other:
            which = "poisoned" if name not in own else "clean"
            raise UsageError(f"{name}: is missing in the {which} model; give two checkpoints of the same architecture")
        if own[name].shape != other[name].shape:
            raise UsageError(
                f"{name}: has the shape {tuple(own[name].shape)} in the poisoned model and {tuple(other[name].shape)} "
                "in the clean one; give two checkpoints of the same architecture"
            )
        if "meta" in (own[name].device.type, other[name].device.type):
            raise UsageError(f"{name}: is kept on the disk; load both models on a machine with more memory")


def _names(places: Mapping[str, Place], parts: Collection[Part], layers: Collection[int] | None) -> list[str]:
    strange = set(parts) - set(PARTS)
    if strange:
        raise UsageError(f"parts {', '.join(sorted(strange))}: unknown; choose from {', '.join(PARTS)}")
    if layers is not None:
        known = {place.layer for place in places.values()}
        if missing := sorted(set(layers) - known):
            raise UsageError(f"layers {', '.join(map(str, missing))}: the model has none of that number")
    return [
        name for name, (part, layer) in places.items() if part in parts and (layers is None or layer in set(layers))
    ]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The squared distance of two tensors, summed in float64."""
    a = a.detach().float()
    return float((a - b.detach().to(a)).square().sum(dtype=torch.float64))
