"""The certificate: which units of a fine-tuned model still hold the very weights of its base, and which moved how far.

    certificate = verify("base", "tuned", UnitMap.load("runs/diagnose"), require="scu,cu:0.06")
    certificate.save("certificate.json")            # certificate.holds, certificate.broken

Behind `keelguard verify BASE TUNED --units MAP --require "scu,cu:0.06" [--out FILE]`. Freezing (arXiv 2410.10862,
section 4) is a claim about weights, and weights can be compared: nothing here depends on how the model was trained.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from keelguard.errors import UsageError
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, architecture_of, load_model, resolve_sources
from keelguard.runs import read_json
from keelguard.units.certificate import Certificate, certificate_lines
from keelguard.units.groups import GROUPS, UnitMap
from keelguard.units.index import UnitIndex, build_index, canonical

__all__ = [
    "Certificate", "certificate_lines", "config_differences", "described_config", "merged_model", "tensors_by_name",
    "unit_name", "verify",
]  # fmt: skip
_NAMED = 20
_CHUNK = 2**23  # Elements that are widened to float64 at a time: 64 MiB for each model.
# What a configuration says of files, sizes and habits, and not of what the weights compute.
_SILENT_KEYS = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "vocab_size", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "output_hidden_states", "output_attentions", "return_dict",
)  # fmt: skip


def verify(
    base: str | Path,
    tuned: str | Path,
    chart: UnitMap,
    *,
    base_adapter: str | Path | None = None,
    adapter: str | Path | None = None,
    require: str = "",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Certificate:
    """Compare every unit of two checkpoints on the CPU, each in its own dtype, block by block.

    Args:
        tuned: a checkpoint, or the folder of a PEFT adapter, which is put on `base` whatever base it names.
        chart: the unit map of `base`.
        base_adapter, adapter: adapters that belong to `base` and to `tuned`. Adapters are merged in memory, and where
            they write, in float32 at least: a change that merging in bfloat16 would round away counts as one.
        require: the units that must not have moved, as `UnitMap.select` takes them.

    Raises:
        UsageError: the map is not of `base`, the models differ in architecture or shapes (but for the rows of a
            vocabulary), the adapter cannot be merged, or `require` selects nothing.
        FailureError: a model cannot be loaded.
    """
    wanted = chart.select(require) if require.strip() else torch.zeros(len(chart), dtype=torch.bool)
    options: dict[str, Any] = {"device": "cpu", "needs_template": False, "with_tokenizer": False}
    options |= {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    first = load_model(base, adapter=base_adapter, **options)
    models = [merged_model(first)]
    index = build_index(models[0], chart.attention)  # pyright: ignore[reportArgumentType]
    chart.place(index, first.weights_hash)
    notes: list[str] = []
    source: str | Path = tuned
    if adapter is None and (Path(tuned) / "adapter_config.json").is_file():
        named = read_json(Path(tuned) / "adapter_config.json").get("base_model_name_or_path")
        source, adapter = resolve_sources(str(base), None if base_adapter is None else str(base_adapter))[0], tuned
        if named and named != source:
            notes.append(f"The adapter names {named} as its base; it was put on {source}.")
    second = load_model(source, adapter=adapter, **options)
    models.append(merged_model(second))
    tensors = [tensors_by_name(model) for model in models]
    _check_same(models, tensors)
    if build_index(models[1], index.attention).layout != index.layout:
        raise UsageError(f"{tuned}: its layers hold other units than those of {base}; name two models of one kind")

    distances, outside = _compare(index, *tensors)
    dtypes = [", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in ts.values()})) for ts in tensors]
    if any(loaded is not model for loaded, model in zip((first.model, second.model), models, strict=True)):
        notes.append("Adapters were merged in float32 at least, so that no change of theirs is rounded away.")
    if any(tensors[0][name].dtype != tensors[1][name].dtype for name in tensors[0]):
        notes.append(
            f"The base is in {dtypes[0]} and the tuned model in {dtypes[1]}: values were compared exactly after both "
            "were widened, so that rounding to a narrower type counts as a move."
        )
    config = config_differences(*map(described_config, models))
    if config:
        notes.append(f"The configurations differ in {', '.join(config)}: equal weights may compute something else.")
    broken = (wanted & (distances > 0)).nonzero().flatten().tolist()
    places = torch.cat([torch.full((block.size,), block.layer) for block in index.blocks])
    return Certificate(
        base=_side(base, base_adapter, first, models[0], dtypes[0]),
        tuned=_side(source, adapter, second, models[1], dtypes[1]),
        chart={
            "digest": chart.digest,
            "labels": sha256_of(chart.labels.tolist()),
            "attention": chart.attention,
            "units": len(chart),
        },
        groups=_summaries(distances, chart.labels),
        layers=[
            {"layer": layer, "groups": _summaries(distances[places == layer], chart.labels[places == layer])}
            for layer in places.unique().tolist()
        ],
        outside=outside,
        config=config,
        notes=notes,
        required=require,
        selected=int(wanted.sum()),
        violations=len(broken),
        holds=not broken,
        broken=[unit_name(chart.layout, number) for number in broken[:_NAMED]],
        distances=distances,
    )


def unit_name(layout: Sequence[Mapping[str, Any]], number: int) -> str:
    """A unit's name, such as "layers.3.mlp[17]", from its number in the whole model."""
    for block in layout:
        if number < block["units"]:
            return f"{block['name']}[{number}]"
        number -= block["units"]
    raise ValueError("the number is not of this layout")


def _side(
    source: str | Path, adapter: str | Path | None, loaded: LoadedModel, model: Any, dtype: str
) -> dict[str, Any]:
    """What a certificate says of one of the two models."""
    return {
        "source": str(source),
        "adapter": None if adapter is None else str(adapter),
        "weights": loaded.weights_hash,
        "architecture": architecture_of(model),
        "dtype": dtype,
    }


def merged_model(loaded: LoadedModel) -> Any:
    """The plain model, with its adapter, if any, merged into its weights in float32 at least.

    Raises:
        UsageError: the adapter changes no weights, or cannot be merged.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = loaded.model
    if not isinstance(model, PeftModel):
        return model
    kind = next(iter(model.peft_config.values()))
    if kind.is_prompt_learning:
        raise UsageError(
            f"{loaded.source}: its adapter ({kind.peft_type}) changes inputs, not weights; name a checkpoint or a LoRA"
        )
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for parameter in module.get_base_layer().parameters():
                if parameter.element_size() < 4:
                    parameter.data = parameter.data.float()
    try:
        return model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        raise UsageError(f"{loaded.source}: its adapter ({kind.peft_type}) cannot be merged: {error}") from error


def tensors_by_name(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by canonical name; tied ones under each of their names."""
    return {canonical(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}


def _vocabulary(model: Any) -> set[str]:
    """The tensors that have a row for every token."""
    owners = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    kept = {id(parameter) for owner in owners for parameter in owner.parameters()}
    return {name for name, tensor in tensors_by_name(model).items() if id(tensor) in kept}


def _check_same(models: Sequence[Any], tensors: Sequence[dict[str, torch.Tensor]]) -> None:
    """Refuse two models whose tensors cannot be compared, by the first difference."""
    kinds = [architecture_of(model) for model in models]
    if kinds[0] != kinds[1]:
        raise UsageError(f"BASE is a {kinds[0]} and TUNED a {kinds[1]}; name two models of one architecture")
    base, tuned = tensors
    resizable = _vocabulary(models[0])
    for name in dict.fromkeys([*base, *tuned]):
        if name not in base or name not in tuned:
            having, lacking = ("BASE", "TUNED") if name in base else ("TUNED", "BASE")
            raise UsageError(f"{name}: {having} has it and {lacking} has not; name a model and its fine-tune")
        shapes = [tuple(side[name].shape) for side in tensors]
        if shapes[0] != shapes[1] and not (name in resizable and shapes[0][1:] == shapes[1][1:]):
            raise UsageError(f"{name}: has the shape {shapes[0]} in BASE and {shapes[1]} in TUNED; name its fine-tune")


class _Rows(NamedTuple):
    """A comparison along one dimension of a tensor: whether a row changed, ‖Δ‖² and ‖W‖², each (rows,)."""

    moved: torch.Tensor
    delta: torch.Tensor
    norm: torch.Tensor

    def total(self) -> torch.Tensor:
        """The three sums, float64 (3,)."""
        return torch.stack([part.double().sum() for part in self])


def _compare(
    index: UnitIndex, base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Distances of all units, float64 (units,), and what changed in the rows of parameters that no unit owns."""
    units = torch.zeros(3, len(index), dtype=torch.float64)
    inside: set[str] = set()
    rest: dict[str, torch.Tensor] = {}
    for block in index.blocks:
        for part in block.parts:
            inside.add(part.parameter)
            whole = [side[part.parameter] for side in (base, tuned)]
            first, second = whole if part.at is None else [tensor[part.at] for tensor in whole]
            rows = _rows(first, second, part.dim)
            units[:, block.span] += torch.stack([values.double()[part.rows].sum(1) for values in rows])
            free = torch.ones(len(rows.moved), dtype=torch.bool).index_fill_(0, part.rows.flatten(), False)
            if free.any():
                rest[part.parameter] = rest.get(part.parameter, 0) + _Rows(*(values[free] for values in rows)).total()
    equal, changed = 0, []
    seen: set[tuple[int, int]] = set()
    for name in base:
        pair = (id(base[name]), id(tuned[name]))
        if pair in seen or (name in inside and name not in rest):
            continue
        seen.add(pair)
        sizes = [len(side[name]) if side[name].dim() else 1 for side in (base, tuned)]
        if name not in rest:
            # A vocabulary that grew is compared in the rows that both have.
            first, second = (
                side[name].reshape(size, -1)[: min(sizes)] for side, size in zip((base, tuned), sizes, strict=True)
            )
            rest[name] = _rows(first, second, 0).total()
        if sizes[0] == sizes[1] and not rest[name][0]:
            equal += 1
            continue
        state = {"state": "moved"} if sizes[0] == sizes[1] else {"state": "resized", "rows": sizes}
        changed.append({"name": name, **state, "distance": _number(_distances(rest[name][:, None]))})
    return _distances(units), {"equal": equal, "changed": changed}


def _rows(base: torch.Tensor, tuned: torch.Tensor, dim: int) -> _Rows:
    """Compare two tensors of one shape row by row along `dim`, some rows at a time."""
    count = base.shape[dim]
    step = max(1, _CHUNK * count // max(base.numel(), 1))
    found: list[_Rows] = []
    for start in range(0, count, step):
        size = min(step, count - start)
        a, b = (
            tensor.detach().narrow(dim, start, size).movedim(dim, 0).reshape(size, -1).double()
            for tensor in (base, tuned)
        )
        moved = (a != b) & ~(a.isnan() & b.isnan())
        # Where both are infinite the difference is no number.
        delta = torch.where(moved, b - a, 0.0)
        found.append(_Rows(moved.any(1), delta.square().sum(1), a.square().sum(1)))
    return _Rows(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _distances(sums: torch.Tensor) -> torch.Tensor:
    """(3, n) of moved, ‖Δ‖² and ‖W‖² → (n,) relative distances: above 0 where something moved, and only there."""
    moved, delta, norm = sums
    ratio = (delta / norm).sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return torch.where(moved > 0, ratio.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _summaries(distances: torch.Tensor, labels: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Counts and distances by group."""
    found = {}
    for label, group in enumerate(GROUPS):
        own = distances[labels == label]
        moved = own[own > 0]
        found[group] = {
            "equal": len(own) - len(moved),
            "moved": len(moved),
            "share": len(moved) / len(own) if len(own) else None,
            "median": _number(moved.median()) if len(moved) else None,
            "max": _number(moved.max()) if len(moved) else None,
        }
    return found


def _number(value: torch.Tensor) -> float | None:
    """A distance as JSON can hold it."""
    return value.item() if value.isfinite() else None


def described_config(model: Any) -> dict[str, Any]:
    """A model's configuration as JSON, but for the entries that name files, sizes and habits."""
    plain = json.loads(json.dumps(model.config.to_dict(), default=str))
    return {name: value for name, value in plain.items() if name not in _SILENT_KEYS}


def config_differences(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The entries of two described configurations that differ, as [base, tuned]."""
    pairs = {name: [side.get(name) for side in (base, tuned)] for name in dict.fromkeys([*base, *tuned])}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
