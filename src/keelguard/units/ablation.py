"""Take units out of a model for a while, without a copy of it: zero, their mean activation, or another model's weights.

with ablate(model, index, chosen):              # zeroed
    ...
with ablate(model, index, chosen, Mean(means)): # each at its mean activation
with ablate(model, index, chosen, Revert(base)):# as in the model that it was trained from
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from keelguard.errors import UsageError
from keelguard.units.index import Block, Slice, UnitIndex, parameters_by_name
from keelguard.units.taps import tap


@dataclass(frozen=True)
class Mean:
    """Put every channel at its mean: one tensor (channels,) per block of the index."""

    means: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Revert:
    """Put the units' weights of another model in their place, by canonical parameter name.

    Where units share a row (attention channels under grouped queries), it goes back only if all of them do.
    """

    weights: Mapping[str, torch.Tensor]


@contextmanager
def ablate(model: Any, index: UnitIndex, chosen: torch.Tensor, value: Mean | Revert | None = None) -> Iterator[None]:
    """Ablate the chosen units (units,) bool until the context ends; the weights come back bit-equal, whatever happens.

    Zeroing clears the columns of B alone: a unit whose output nobody reads is gone from the forward pass. Where the
    weights are not at hand, or an adapter reads the units beside them, their activations are held at zero instead.

    Raises:
        UsageError: the other model lacks a parameter or has it in another shape; or this one has its weights elsewhere
            or an adapter on them, so that they cannot be put back.
    """
    parameters = parameters_by_name(model)
    slices = index.slices(chosen, shared="all", roles="in out" if isinstance(value, Revert) else "out")
    out_of_reach = _out_of_reach(model, parameters, slices)
    if isinstance(value, Revert):
        if out_of_reach:
            raise UsageError(f"the units cannot be put back: {out_of_reach}")
        _check_same(parameters, value.weights, slices)
    elif value is None and out_of_reach:
        value = Mean([torch.zeros(block.width) for block in index.blocks])
    if isinstance(value, Mean):
        with tap(model, index, _MeanEdit(index, chosen, value)):
            yield
        return
    kept = [part.of(parameters[part.parameter].detach()) for part in slices]
    try:
        with torch.no_grad():
            for part in slices:
                new = part.of(value.weights[part.parameter].detach()) if isinstance(value, Revert) else 0.0
                part.put(parameters[part.parameter], new)
        yield
    finally:
        with torch.no_grad():
            for part, old in zip(slices, kept, strict=True):
                part.put(parameters[part.parameter], old)


class _MeanEdit:
    """Puts the chosen channels of every block at their means."""

    def __init__(self, index: UnitIndex, chosen: torch.Tensor, value: Mean) -> None:
        self.channels: dict[tuple[str, int | None], tuple[torch.Tensor, torch.Tensor]] = {}
        for block, means in zip(index.blocks, value.means, strict=True):
            picked = block.channels[chosen[block.span].cpu()].flatten()
            if len(picked):
                self.channels[block.module, block.expert] = (picked, means[picked])

    def __call__(self, block: Block, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor | None:
        found = self.channels.get((block.module, block.expert))
        if found is None:
            return None
        channels, means = found
        edited = x.clone()
        edited[:, channels.to(x.device)] = means.to(x.device, x.dtype)
        return edited


def _out_of_reach(model: Any, parameters: Mapping[str, torch.Tensor], slices: Sequence[Slice]) -> str:
    """Why writing these weights would not do; empty where it would."""
    if hasattr(model, "peft_config"):
        return "an adapter is on the model; merge it first"
    if any(parameters[part.parameter].device.type == "meta" for part in slices):
        return "the model is too large for this machine's memory; load it on a larger one"
    return ""


def _check_same(
    parameters: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], slices: Sequence[Slice]
) -> None:
    for part in slices:
        own, other = parameters[part.parameter], others.get(part.parameter)
        if other is None or other.shape != own.shape:
            found = "is missing" if other is None else f"has the shape {tuple(other.shape)}, not {tuple(own.shape)}"
            raise UsageError(f"the model to revert to: {part.parameter} {found}; name the one that this comes from")
