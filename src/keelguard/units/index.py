"""Every structural unit of a model as slices of its parameters.

    index = build_index(model)                      # MLP channels and attention heads
    index.slices(chosen)                            # where the chosen units live: (parameter, dimension, rows)

A unit is one hidden index of f(X) = B·σ(A·X): rows of A and columns of B (arXiv 2410.10862, section 3). Nothing is
assumed from a module's name alone: shapes are checked, and what cannot be mapped is refused by name.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from keelguard.errors import UsageError
from keelguard.units.layout import (
    Attention,
    Block,
    Coverage,
    Part,
    Slice,
    UnitIndex,
    canonical,
    parameters_by_name,
    weights_by_name,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "Attention", "Block", "Coverage", "Part", "Slice", "UnitIndex", "build_index", "canonical", "parameters_by_name",
    "weights_by_name",
]  # fmt: skip


def build_index(model: Any, attention: Attention = "head") -> UnitIndex:
    """Find every unit of a causal language model.

    Args:
        model: a transformers model, or one with a PEFT adapter or a wrapper around it.
        attention: "head" makes a unit of a key/value group with its query heads; "channel" of one column of the
            output projection and its value row, which under grouped queries several units share.

    Raises:
        UsageError: the weights are quantised, or a layer holds what is not mapped.
    """
    _refuse_quantised(model)
    config = model.config.get_text_config()
    blocks: list[Block] = []
    start = 0
    for number, (name, layer) in enumerate(_decoder_layers(model, config)):
        found = list(_blocks_of(name, layer, number, config, attention))
        _refuse_incomplete(name, layer, found, attention)
        for block in found:
            blocks.append(replace(block, start=start))
            start += block.size
    return UnitIndex(tuple(blocks), attention, _coverage(blocks, model))


def _refuse_quantised(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise UsageError(
                f"{name}: is quantised ({type(parameter).__name__}, {parameter.dtype}); its units have no weights of "
                "their own to cut or freeze. Load the model in float32, bfloat16 or float16"
            )


def _refuse_incomplete(name: str, layer: Any, found: list[Block], attention: Attention) -> None:
    """Raise UsageError if a layer has weights, apart from norms and routers, outside the modules of its blocks."""
    owners = tuple((b.module if b.expert is not None else b.module.rpartition(".")[0]) + "." for b in found)
    for kind, what in (("mlp", "feed-forward network"), (attention, "attention")):
        if kind not in {block.kind for block in found}:
            children = ", ".join(f"{n} ({type(m).__name__})" for n, m in layer.named_children())
            raise UsageError(
                f"{name}: keelguard can map no {what} in it; it holds {children}. "
                "Only layers with the projections of Llama, Phi-3, GPT-NeoX or mixtures of experts are known"
            )
    for inner, parameter in layer.named_parameters():
        whole = canonical(f"{name}.{inner}")
        router = any(word in inner for word in ("norm", "gate", "router", "lora_"))
        if parameter.dim() > 1 and not router and not whole.startswith(owners):
            raise UsageError(f"{whole}: belongs to no unit that keelguard knows; it cannot map this layer")


def _decoder_layers(model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """(canonical name, layer) of the text decoder."""
    import torch

    count = getattr(config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        other = any(part in name for part in ("vision", "visual", "audio", "experts"))
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and not other:
            return ((canonical(f"{name}.{number}"), layer) for number, layer in enumerate(module))
    raise UsageError(f"{type(model).__name__}: keelguard finds no list of {count} layers in it")


class _Site(NamedTuple):
    """A module that may hold a block: its canonical name, the block's own name, the layer's number, itself."""

    name: str
    block: str
    layer: int
    module: Any

    @property
    def linears(self) -> dict[str, Any]:
        """Its linear layers, below any adapter."""
        import torch

        below = {name: getattr(child, "base_layer", child) for name, child in self.module.named_children()}
        return {name: child for name, child in below.items() if isinstance(child, torch.nn.Linear)}

    def parts(self, name: str, rows: "torch.Tensor") -> Iterator[Part]:
        """Rows of a linear layer with their biases."""
        yield Part(f"{self.name}.{name}.weight", "in", 0, rows)
        if self.linears[name].bias is not None:
            yield Part(f"{self.name}.{name}.bias", "in", 0, rows)

    def refuse(self, why: str) -> NoReturn:
        raise UsageError(f"{self.name} ({type(self.module).__name__}): {why}; keelguard cannot map it")


def _blocks_of(layer_name: str, layer: Any, number: int, config: Any, attention: Attention) -> Iterator[Block]:
    """The blocks of one layer, numbered from 0; the caller sets where they start."""
    for inner, module in layer.named_modules():
        name = canonical(f"{layer_name}.{inner}.").rstrip(".")
        site = _Site(name, f"layers.{number}{name.removeprefix(layer_name) or '.layer'}", number, module)
        linears = site.linears
        if {"gate_up_proj", "down_proj"} <= set(dict(module.named_parameters(recurse=False))):
            yield from _experts(site)
        elif out := next((c for c in ("down_proj", "dense_4h_to_h", "fc2") if c in linears), ""):
            yield _mlp(site, out)
        elif len(linears) > 1 and (out := next((c for c in ("o_proj", "out_proj", "dense") if c in linears), "")):
            yield _attention(site, out, config, attention)


def _refuse_strangers(site: _Site, known: set[str], harmless: tuple[str, ...] = ()) -> None:
    """Raise UsageError if a module has weights beside those of its units, which may tie the units to one another."""
    others = [(name, child) for name, child in site.module.named_children() if name not in known]
    strange = [
        name for name, child in others if not name.startswith(harmless) and any(True for _ in child.parameters())
    ]
    if site.block.endswith(".layer"):  # A layer that is its own feed-forward network holds everything else as well.
        strange = [name for name in strange if name in site.linears]
    strange += [name for name, _ in site.module.named_parameters(recurse=False)]
    if strange:
        site.refuse(f"holds {', '.join(strange)} beside {', '.join(sorted(known))}")


def _mlp(site: _Site, out: str) -> Block:
    import torch

    width = site.linears[out].in_features
    each = torch.arange(width)[:, None]
    rows = {name: each for name in ("gate_proj", "up_proj", "dense_h_to_4h", "fc1") if name in site.linears}
    rows = rows or {"gate_up_proj": torch.cat([each, each + width], dim=1)}
    _refuse_strangers(site, {*rows, out}, harmless=("act",))
    for name, owned in rows.items():
        if name not in site.linears or site.linears[name].out_features != owned.numel():
            site.refuse(f"has no {name} of {owned.numel()} rows")
    parts = [part for name, owned in rows.items() for part in site.parts(name, owned)]
    parts.append(Part(f"{site.name}.{out}.weight", "out", 1, each))
    return Block(site.block, site.layer, "mlp", f"{site.name}.{out}", each, tuple(parts))


def _experts(site: _Site) -> Iterator[Block]:
    """One block per expert of weights (E, 2I, H) and (E, H, I), as transformers keeps them."""
    import torch

    module = site.module
    usual = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
    odd = [key for key, value in usual.items() if getattr(module, key, None) is not value]
    odd += sorted({name for name, _ in module.named_parameters()} - {"gate_up_proj", "down_proj"})
    count, hidden, width = module.down_proj.shape if module.down_proj.dim() == 3 else (0, 0, 0)
    if odd or tuple(module.gate_up_proj.shape) != (count, 2 * width, hidden):
        site.refuse(f"experts of another layout ({', '.join(odd) or tuple(module.gate_up_proj.shape)})")
    each = torch.arange(width)[:, None]
    for expert in range(count):
        parts = (
            Part(f"{site.name}.gate_up_proj", "in", 0, torch.cat([each, each + width], dim=1), expert),
            Part(f"{site.name}.down_proj", "out", 1, each, expert),
        )
        yield Block(f"{site.block}.{expert}", site.layer, "mlp", site.name, each, parts, expert=expert)


def _attention(site: _Site, out: str, config: Any, attention: Attention) -> Block:
    import torch

    width = site.linears[out].in_features
    size = getattr(site.module, "head_dim", None) or getattr(site.module, "head_size", None)
    size = size or getattr(config, "head_dim", None) or width // getattr(config, "num_attention_heads", 1)
    heads = width // size
    placed = _projections(site, heads, size, config.model_type)
    (_, query), (_, key), (value_name, value) = placed
    groups = len(value) // size
    rows = sum(site.linears[name].out_features for name in {name for name, _ in placed})
    sound = len(query) == heads * size == width and len(key) == len(value) == groups * size and groups
    if not sound or heads % groups or rows != width + 2 * groups * size:
        site.refuse(f"{rows} query, key and value rows for {heads} heads of {size} channels")
    norms = {name: child for name, child in site.module.named_children() if "norm" in name}
    for name, norm in norms.items():
        # Zeroing a unit's rows must change no other unit, which a norm over both would do.
        tied = {"head": any(parameter.shape[-1] != size for parameter in norm.parameters())}
        tied["channel"] = not name.startswith(("q", "k"))
        if tied[attention]:
            remedy = "" if all(tied.values()) else " (the other way of cutting attention would do)"
            site.refuse(f"{name} ties its {attention}s to one another{remedy}")
    _refuse_strangers(site, {*(name for name, _ in placed), *norms, out})
    if attention == "channel":
        channels = torch.arange(width)[:, None]
        # Which value channel each input channel of the output projection is made from.
        source = torch.arange(groups * size).view(groups, 1, size).expand(groups, heads // groups, size).flatten()
        owned = {value_name: [value[source][:, None]]}
    else:
        channels = torch.arange(width).view(groups, -1)
        owned: dict[str, list[torch.Tensor]] = {}
        for name, where in placed:
            owned.setdefault(name, []).append(where.view(groups, -1))
    parts = [part for name, rows in owned.items() for part in site.parts(name, torch.cat(rows, dim=1))]
    parts.append(Part(f"{site.name}.{out}.weight", "out", 1, channels))
    return Block(site.block, site.layer, attention, f"{site.name}.{out}", channels, tuple(parts))


def _projections(site: _Site, heads: int, size: int, family: str) -> "list[tuple[str, torch.Tensor]]":
    """Where queries, keys and values stand: three times a linear layer's name and rows."""
    import torch

    linears, width = site.linears, heads * size
    separate = ("q_proj", "k_proj", "v_proj")
    if set(separate) <= set(linears):
        return [(name, torch.arange(linears[name].out_features)) for name in separate]
    if "qkv_proj" in linears and family.startswith("phi"):
        rest = max(0, linears["qkv_proj"].out_features - width) // 2
        return [("qkv_proj", rows) for rows in torch.arange(width + 2 * rest).split([width, rest, rest])]
    if "query_key_value" in linears and family in ("gpt_neox", "bloom"):
        # Each head's queries, keys and values stand together.
        return [("query_key_value", rows.flatten()) for rows in torch.arange(3 * width).view(heads, 3, size).unbind(1)]
    return site.refuse(f"attention of {', '.join(linears)} in {family}")


def _coverage(blocks: list[Block], model: Any) -> Coverage:
    units: dict[str, int] = {}
    mapped = 0
    named = parameters_by_name(model)
    for block in blocks:
        units[block.kind] = units.get(block.kind, 0) + block.size
        for part in block.parts:
            shape = named[part.parameter].shape if part.at is None else named[part.parameter].shape[1:]
            mapped += part.rows.unique().numel() * (shape.numel() // shape[part.dim])
    return Coverage(units, mapped, sum(p.numel() for n, p in named.items() if "lora_" not in n))
