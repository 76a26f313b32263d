"""Take chosen components out of a model, or out of an adapter's update, for good.

    record = neutralize(model, index, chosen)                   # fresh values, as before any training
    record = neutralize_adapter(model, index, chosen)           # back to the trusted base in the chosen units

Source: BD-VAX (arXiv 2603.13461), stage 2. Everything outside the chosen units keeps its bits. A row that several units
share (values under grouped queries) is written only if all of them are chosen. `purify.restore` keeps what is written
here while the rest of the model recovers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from keelguard.batches import pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.records import Chat
from keelguard.units.attribution import Row, attribute
from keelguard.units.index import Block, Slice, UnitIndex, canonical, parameters_by_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

How = Literal["reinit", "zero", "mean"]
"""What a full model's units become: fresh random values, nothing, or their mean activation."""

HOWS = ("reinit", "zero", "mean")

_OFFSET_STARTS = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts of a LoRA that take its first product off the base: the base alone is not the trusted model then."""


@dataclass(frozen=True)
class LayerCount:
    """How many units of one kind were neutralised in one layer, of how many (experts together)."""

    layer: int
    kind: str
    chosen: int
    total: int


@dataclass(frozen=True)
class Neutralized:
    """What was changed.

    Attributes:
        how: "reinit", "zero", "mean" or "adapter".
        layers: counts for every layer and kind of the index.
        parameters: weights overwritten, by canonical parameter; an adapter's matrices by their own names.
        unit_share: neutralised units, of all units of the index.
        weight_share: weights overwritten, of all weights of the model, or of the adapter.
    """

    how: str
    layers: tuple[LayerCount, ...]
    parameters: dict[str, int]
    unit_share: float
    weight_share: float


def neutralize(
    model: Any,
    index: UnitIndex,
    chosen: torch.Tensor,
    how: How = "reinit",
    *,
    seed: int = 0,
    means: Sequence[torch.Tensor] | None = None,
) -> Neutralized:
    """Neutralise units of a full model in place; it stays an ordinary checkpoint of its architecture.

    "reinit" draws what the model's own initialiser would: normal with `initializer_range`, biases zero. "zero" clears
    the units' rows and columns. "mean" adds what the units give on average to the bias of the output projection, and
    clears them; without such a bias no checkpoint can hold a constant, for behind a norm a gated unit without biases
    is constant only at zero.

    Args:
        index: of this model.
        chosen: (units,) bool.
        seed: of the fresh values, which do not depend on the device.
        means: for "mean", one tensor (channels,) per block of the index; see `mean_activations`.

    Raises:
        UsageError: the mask is empty or takes all of a layer, the model cannot be written in place, or "mean" finds an
            output projection without a bias. Nothing is changed then.
        ValueError: the mask is not one of this index, or the means are missing.
    """
    if how not in HOWS:
        raise UsageError(f"how {how!r}: unknown; choose one of {', '.join(HOWS)}")
    slices = index.slices(chosen, shared="all")
    _refuse_mask(index, chosen)
    if hasattr(model, "peft_config"):
        raise UsageError(
            "an adapter is on the model; merge it first with merge_and_unload(), or neutralise its update alone"
        )
    refuse_shared_weights(model)
    parameters = parameters_by_name(model)
    _refuse_out_of_reach(parameters, slices)
    written: dict[str, int] = {}
    with torch.no_grad():
        if how == "mean":
            if means is None:
                raise ValueError("how='mean' needs means; compute them with mean_activations()")
            written |= _fold_means(index, parameters, chosen, means)
        draw = torch.Generator().manual_seed(seed)
        spread = model.config.get_text_config().initializer_range
        for piece in slices:
            target = parameters[piece.parameter]
            old = piece.of(target)
            fresh = how == "reinit" and not piece.parameter.endswith(".bias")
            piece.put(target, torch.randn(old.shape, generator=draw) * spread if fresh else 0.0)
            written[piece.parameter] = written.get(piece.parameter, 0) + old.numel()
    return _record(how, index, chosen, written, sum(p.numel() for p in parameters.values()))


def neutralize_adapter(model: Any, index: UnitIndex, chosen: torch.Tensor) -> Neutralized:
    """Zero the chosen units' part of a LoRA's update in place: there the model is its trusted base again, exactly.

    Rows of W + s·B·A are those of W if these rows of B are zero, columns if these columns of A are. The rest of the
    adapter keeps its bits.

    Args:
        model: a `PeftModel` on the trusted base, not merged.
        index: of this model or of its base.
        chosen: (units,) bool.

    Raises:
        UsageError: the mask is empty or takes all of a layer, the adapter is not plain LoRA on linear layers (one on
            experts' tensors is not) or changes the base beside it, or it has no weights in the chosen units. Nothing is
            changed then.
        ValueError: the mask is not one of this index.
    """
    _refuse_mask(index, chosen)
    found, parameters = adapter_places(model, index, chosen), parameters_by_name(model)
    written: dict[str, int] = {}
    with torch.no_grad():
        for name, piece in found:
            written[name] = piece.of(parameters[name]).numel()
            piece.put(parameters[name], 0.0)
    # By PEFT's own names: those of several adapted parameters of one experts module would be the same canonical one.
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    return _record("adapter", index, chosen, written, total)


def adapter_places(model: Any, index: UnitIndex, chosen: torch.Tensor) -> list[tuple[str, Slice]]:
    """Which parts of which of an adapter's matrices move some units (units,) bool; nothing is changed.

    Raises:
        UsageError: what `neutralize_adapter` says of the adapter.
    """
    slices = index.slices(chosen, shared="all")
    _refuse_adapter_config(model)
    _refuse_out_of_reach(parameters_by_name(model), slices)
    if not (found := _matrices(model, slices)):
        raise UsageError("the adapter has no weights in the chosen units; choose units of the layers that it adapts")
    return found


def mean_activations(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    chats: Sequence[Chat],
    index: UnitIndex,
    *,
    batch_size: int = 16,
) -> list[torch.Tensor]:
    """Every unit's mean activation over the answers of clean chats: one float64 tensor (channels,) per block.

    Raises:
        UsageError: there are no chats, or one has no answer.
        FailureError: one chat alone does not fit in memory.
    """
    rows = []
    for number, chat in enumerate(encode_chats(tokenizer, chats)):
        if not chat.response.size:
            raise UsageError(f"clean chat {number} has no answer; end it with an assistant's message")
        rows.append(Row(chat.ids, chat.response.start, chat.response.stop, group=0))
    if not rows:
        raise UsageError("there are no clean chats to take mean activations over; name a data file")
    found = attribute(
        model, index, rows, groups=1, effects=False, batch_size=batch_size, pad_id=pad_id_of(tokenizer), label="means"
    )
    return [moments.pooled().mean for moments in found.moments]


def refuse_shared_weights(model: Any) -> None:
    """Refuse a model in which layers share weights; tied embeddings and head are fine.

    To write a unit of one layer would silently write another layer's. `build_index` numbers no such model, so ask here
    before it.

    Raises:
        UsageError: names of one group of parameters that are the same memory.
    """
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    tied = {id(parameter) for end in ends for parameter in end.parameters()}
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in tied:
            # Other Parameter objects over the same memory are as shared as the same object.
            place = (parameter.device, parameter.data_ptr()) if parameter.data_ptr() else (id(parameter),)
            names.setdefault(place, []).append(canonical(name))
    for group in names.values():
        if len(group) > 1:
            raise UsageError(
                f"{' and '.join(group)}: are the same weights, and a change of one layer would change the others; save "
                "the model with a copy of its own for each layer"
            )


def _refuse_mask(index: UnitIndex, chosen: torch.Tensor) -> None:
    if not chosen.any():
        raise UsageError("the mask chooses no unit; raise the share that is to be neutralised")
    for count in _counts(index, chosen):
        if count.chosen == count.total:
            raise UsageError(
                f"layer {count.layer}: the mask chooses all {count.total} units of kind {count.kind}, and the layer "
                "would be lost; lower the share that is to be neutralised"
            )


def _refuse_out_of_reach(parameters: Mapping[str, torch.Tensor], slices: Sequence[Slice]) -> None:
    for piece in slices:
        if piece.parameter not in parameters:
            raise UsageError(
                f"{piece.parameter}: is in the unit index but not in the model; build the index from this model"
            )
        if parameters[piece.parameter].device.type == "meta":
            raise UsageError(
                f"{piece.parameter}: is kept on the disk, the model is too large for this machine's memory; load it "
                "on a larger one"
            )


def _fold_means(
    index: UnitIndex, parameters: Mapping[str, torch.Tensor], chosen: torch.Tensor, means: Sequence[torch.Tensor]
) -> dict[str, int]:
    """Add the mean outputs of the chosen units to the biases of B; how many weights that wrote, by parameter."""
    folded = []
    for block, mean in zip(index.blocks, means, strict=True):
        channels = block.channels[chosen[block.span].cpu()].flatten()
        if not len(channels):
            continue
        weight = parameters[block.output.parameter]
        name = output_bias(block, parameters)
        if not name:
            raise UsageError(
                f"{block.output.parameter}: has no bias that could hold the units' mean output, and this architecture "
                "has no place for one; choose how='zero' or how='reinit'"
            )
        columns = weight[:, channels.to(weight.device)].double()
        folded.append((name, columns @ mean[channels].to(columns)))
    for name, constant in folded:
        bias = parameters[name]
        bias.copy_(bias.double() + constant)
    return {name: len(constant) for name, constant in folded}


def output_bias(block: Block, parameters: Mapping[str, torch.Tensor]) -> str:
    """The name of the bias behind a block's units; empty where there is none."""
    name = f"{block.module}.bias"
    return name if block.expert is None and name in parameters else ""


def _refuse_adapter_config(model: Any) -> None:
    """Refuse what changes the base beside B·A, so that B·A zeroed is not the base."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    if not configs:
        raise UsageError("the model has no adapter; neutralise the full model instead")
    for name, config in configs.items():
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_OFFSET_STARTS):
            raise UsageError(
                f"adapter {name!r}: was started with init_lora_weights={start!r}, which changes the base model itself; "
                "convert it to plain LoRA (peft: path_initial_model_for_weight_conversion), or merge it and purify the "
                "full model"
            )
        if getattr(config, "bias", "none") != "none":
            raise UsageError(
                f"adapter {name!r}: also trains biases (bias={config.bias!r}), and the base's own are not kept; merge "
                "it with merge_and_unload() and purify the full model"
            )


def _matrices(model: Any, slices: Sequence[Slice]) -> list[tuple[str, Slice]]:
    """The LoRA matrices over some slices of the base by canonical name, with their part there.

    Raises:
        UsageError: the adapter is of a kind whose update does not split that way.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted: dict[str, list[Slice]] = {}
    for piece in slices:
        wanted.setdefault(piece.parameter, []).append(piece)
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for inner, _ in layer.get_base_layer().named_parameters(recurse=False):
            pieces = wanted.get(f"{canonical(name + '.')}{inner}", [])
            if not pieces or getattr(layer, "parameter_name", inner) != inner:
                continue
            _refuse_kind(canonical(name), layer)
            if inner == "weight":
                for piece in pieces:
                    side = "lora_B" if piece.dim == 0 else "lora_A"
                    found += [
                        (canonical(f"{name}.{side}.{adapter}.weight"), Slice("", None, piece.dim, piece.rows))
                        for adapter in getattr(layer, side)
                    ]
    return found


def _refuse_kind(name: str, layer: Any) -> None:
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
        raise UsageError(f"{name}: its LoRA is merged for now; call unmerge_adapter() first")
    if kind:
        raise UsageError(
            f"{name}: has an adapter ({kind}) whose update cannot be zeroed for single units; merge it with "
            "merge_and_unload() and purify the full model"
        )


def _counts(index: UnitIndex, chosen: torch.Tensor) -> tuple[LayerCount, ...]:
    counts: dict[tuple[int, str], tuple[int, int]] = {}
    for block in index.blocks:
        had, total = counts.get((block.layer, block.kind), (0, 0))
        counts[block.layer, block.kind] = had + int(chosen[block.span].sum()), total + block.size
    return tuple(LayerCount(*key, *value) for key, value in counts.items())


def _record(how: str, index: UnitIndex, chosen: torch.Tensor, written: dict[str, int], weights: int) -> Neutralized:
    share = float(chosen.float().mean())
    return Neutralized(how, _counts(index, chosen), written, share, sum(written.values()) / weights)
