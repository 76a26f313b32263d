"""What a checkpoint or adapter is before any of its weights is read: files and formats, architecture, and coverage.

    found = inspect_model("suspect")
    found.parameters, found.pickle_files, found.coverage["units"]      # "" where it is covered, else the reason

The model is built from its configuration on the meta device, so that 70 billion parameters are inspected in seconds.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from keelguard.errors import FailureError, KeelguardError, UsageError
from keelguard.models import resolve_sources

_FORMATS = {
    ".safetensors": "safetensors", ".gguf": "gguf",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl"), "pickle"), ".py": "remote code",
}  # fmt: skip
_UNREAD_PICKLES = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt")
"""Pickles that no loader of a model touches."""


@dataclass(frozen=True)
class Inspection:
    """What is known of a model from its files.

    Attributes:
        files: size in bytes of every weights or code file, by name; an adapter's behind "adapter/".
        formats: "safetensors", "pickle", "gguf" or "remote code", by the same names.
        pickle_files: files whose loading can run code. They are not read unless asked for by name.
        remote_code_files: Python files that the checkpoint brings; they are not run unless asked for by name.
        parameters: tied ones once; `adapter_parameters` are the adapter's alone.
        dtype: what the configuration names.
        stored: how many values the safetensors files hold, by number format, the adapter's included.
        shape: layers, hidden and intermediate size, heads, key-value heads, head size, experts and those that a token
            meets (0 where there are none), vocabulary, and context length.
        coverage: for "units", "guard" and "purify", why this model is not covered; empty where it is.
        seen: whether the files lie here; those of a hub id that is not in its cache do not.
    """

    source: str
    adapter: str | None
    files: Mapping[str, int]
    pickle_files: tuple[str, ...]
    remote_code_files: tuple[str, ...]
    architecture: str
    parameters: int
    adapter_parameters: int
    dtype: str
    shape: Mapping[str, int]
    chat_template: bool
    coverage: Mapping[str, str]
    formats: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)
    seen: bool = True

    def to_json(self) -> dict[str, Any]:
        """The inspection as a JSON object."""
        return {"format": "keelguard.inspection/1", **asdict(self)}


def inspect_model(source: str, adapter: str | None = None, *, trust_remote_code: bool = False) -> Inspection:
    """Inspect a checkpoint, or an adapter with its base; no weights are read, and none are fetched.

    Args:
        source: a folder, or a hub id, whose configuration is fetched where it is not in the hub's cache.
        trust_remote_code: run the Python files that a checkpoint brings, where its configuration needs them.

    Raises:
        UsageError: an adapter does not name its base, or a file is damaged.
        FailureError: the configuration cannot be read, or needs remote code.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base, adapter = resolve_sources(source, adapter)
    try:
        config: Any = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        remedy = "; pass --trust-remote-code if you trust who made it" if "trust_remote_code" in str(error) else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FailureError(f"{base}: its configuration cannot be read: {reason}{remedy}") from error
    folders = {"": _folder(base), **({"adapter/": _folder(adapter)} if adapter else {})}
    here = {f"{place}{path.name}": path for place, folder in folders.items() for path in _files(folder)}
    formats = {name: _FORMATS[path.suffix] for name, path in here.items()}
    headers = {name: _header(path) for name, path in here.items() if formats[name] == "safetensors"}
    return Inspection(
        source=base,
        adapter=adapter,
        files={name: path.stat().st_size for name, path in here.items()},
        pickle_files=tuple(n for n, kind in formats.items() if kind == "pickle"),
        remote_code_files=tuple(n for n, kind in formats.items() if kind == "remote code"),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        adapter_parameters=sum(_count(h) for name, h in headers.items() if name.startswith("adapter/")),
        dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        shape=_shape(config.get_text_config()),
        chat_template=any(_has_template(folder) for folder in folders.values() if folder is not None),
        coverage=_coverage(model, config, folders.get("adapter/")),
        formats=formats,
        stored=_by_format(headers.values()),
        seen=all(folder is not None for folder in folders.values()),
    )


def _shape(text: Any) -> dict[str, int]:
    heads = text.num_attention_heads
    experts = next((n for k in ("num_local_experts", "num_experts", "n_routed_experts") if (n := _of(text, k))), 0)
    width = (_of(text, "moe_intermediate_size") if experts else 0) or _of(text, "intermediate_size")
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "intermediate": width or 4 * text.hidden_size,
        "heads": heads,
        "key-value heads": _of(text, "num_key_value_heads") or heads,
        "head size": _of(text, "head_dim") or text.hidden_size // heads,
        "experts": experts,
        "experts of a token": _of(text, "num_experts_per_tok"),
        "vocabulary": text.vocab_size,
        "context": _of(text, "max_position_embeddings"),
    }


def _of(config: Any, name: str) -> int:
    found = getattr(config, name, None)
    return found if isinstance(found, int) else 0


def _coverage(model: Any, config: Any, adapter: Path | None) -> dict[str, str]:
    """What each method refuses before it starts, as far as files and configuration tell."""
    from keelguard.guard.lora import linear_layers
    from keelguard.guard.masks import check_attention
    from keelguard.purify.neutralize import refuse_shared_weights
    from keelguard.units.index import build_index

    def guardable(model: Any) -> None:
        check_attention(model)
        if not linear_layers(model):
            raise UsageError(f"{type(model).__name__}: has no linear layers that a probe's LoRA could be put on")

    checks: dict[str, Callable[[Any], Any]] = {
        "units": build_index, "guard": guardable, "purify": refuse_shared_weights,
    }  # fmt: skip
    found = {name: _reason(check, model) for name, check in checks.items()}
    if quantised := getattr(config, "quantization_config", None):
        kind = quantised.get("quant_method", "") if isinstance(quantised, dict) else type(quantised).__name__
        why = f"the weights are quantised ({kind}), and neither cut nor trained; give them in bfloat16 or float32"
        found.update({name: why for name in ("units", "purify") if not found[name]})
    found["purify"] = found["purify"] or _adapter_reason(adapter)
    return found


def _reason(check: Callable[[Any], Any], model: Any) -> str:
    try:
        check(model)
    except KeelguardError as error:
        return str(error)
    return ""


def _adapter_reason(folder: Path | None) -> str:
    """Why an adapter cannot be purified as one; see `purify.intake`."""
    path = None if folder is None else folder / "adapter_config.json"
    if path is None or not path.is_file():
        return ""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: cannot be read ({error}); copy it again") from error
    remedy = "merge it with merge_and_unload() and purify the whole model"
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("use_dora"):
        return f"the adapter is no plain LoRA; {remedy}"
    if config.get("modules_to_save") or config.get("trainable_token_indices"):
        return f"the adapter holds layers beside its LoRA; {remedy}"
    return ""


def _folder(source: str) -> Path | None:
    """Where a checkpoint's files lie, a hub id's in the hub's cache; None where they do not."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        return None


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    known = (path for path in folder.iterdir() if path.suffix in _FORMATS and path.name not in _UNREAD_PICKLES)
    return sorted(path for path in known if path.is_file())


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors.

    Raises:
        UsageError: it says nothing sound.
    """
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        raw = stream.read(size) if size <= path.stat().st_size else b""
    try:
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        _by_format([header])
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: is damaged (no safetensors header); copy it again") from error
    return header


def _count(header: Mapping[str, Any]) -> int:
    return sum(prod(entry["shape"]) for entry in header.values())


def _by_format(headers: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for header in headers:
        for entry in header.values():
            counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + prod(entry["shape"])
    return counts


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
