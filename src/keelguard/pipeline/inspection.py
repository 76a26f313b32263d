"""What a checkpoint or adapter is before any of its weights is read: files and formats, architecture, and coverage.

    found = inspect_model("suspect")
    found.parameters, found.pickle_files, found.coverage["units"]      # "" where it is covered, else the reason

The model is built from its configuration on the meta device, so that 70 billion parameters are inspected in seconds.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keelguard.errors import FailureError, KeelguardError, UsageError
from keelguard.models import resolve_sources

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNREAD_PICKLES = ("training_args.bin",)
"""Pickles that no loader touches."""


@dataclass(frozen=True)
class Inspection:
    """What is known of a model from its files.

    Attributes:
        files: size in bytes of every weights file, by name; an adapter's behind "adapter/".
        pickle_files: files whose loading can run code. They are not read unless asked for by name.
        remote_code_files: Python files that the checkpoint brings; they are not run unless asked for by name.
        adapter_parameters: of the adapter alone.
        shape: layers, hidden and intermediate size, attention heads, key-value heads, vocabulary, and context length.
        coverage: for "units", "guard" and "purify", why this architecture is not covered; empty where it is.
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

    def to_json(self) -> dict[str, Any]:
        """The inspection as a JSON object."""
        return {"format": "keelguard.inspection/1", **asdict(self)}


def inspect_model(source: str, adapter: str | None = None, *, trust_remote_code: bool = False) -> Inspection:
    """Inspect a checkpoint, or an adapter with its base; no weights are read.

    Args:
        trust_remote_code: run the Python files that a checkpoint brings, where its configuration needs them.

    Raises:
        UsageError: an adapter does not name its base.
        FailureError: the configuration cannot be read, or needs remote code.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base, adapter = resolve_sources(source, adapter)
    try:
        config: Any = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FailureError(f"{base}: its configuration cannot be read: {str(error).splitlines()[0]}") from error
    folders = {"": Path(base), **({"adapter/": Path(adapter)} if adapter else {})}
    files = {f"{place}{p.name}": p.stat().st_size for place, f in folders.items() for p in _files(f, _WEIGHTS)}
    pickles = [f"{place}{p.name}" for place, f in folders.items() for p in _files(f, _PICKLES)]
    code = [f"{place}{p.name}" for place, f in folders.items() for p in _files(f, (".py",))]
    text = config.get_text_config()
    return Inspection(
        source=base,
        adapter=adapter,
        files=files,
        pickle_files=tuple(name for name in pickles if Path(name).name not in _UNREAD_PICKLES),
        remote_code_files=tuple(code),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        adapter_parameters=_adapter_parameters(folders.get("adapter/")),
        dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        shape={
            "layers": text.num_hidden_layers,
            "hidden": text.hidden_size,
            "intermediate": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            "heads": text.num_attention_heads,
            "key-value heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            "vocabulary": text.vocab_size,
            "context": getattr(text, "max_position_embeddings", None) or 0,
        },
        chat_template=_has_template(base, adapter),
        coverage={name: _reason(check, model) for name, check in _coverage().items()},
    )


def _coverage() -> dict[str, Callable[[Any], Any]]:
    from keelguard.guard.masks import check_attention
    from keelguard.purify.neutralize import refuse_shared_weights
    from keelguard.units.index import build_index

    return {"units": build_index, "guard": check_attention, "purify": refuse_shared_weights}


def _reason(check: Callable[[Any], Any], model: Any) -> str:
    try:
        check(model)
    except KeelguardError as error:
        return str(error)
    return ""


def _files(folder: Path, ends: tuple[str, ...]) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in ends) if folder.is_dir() else []


def _adapter_parameters(folder: Path | None) -> int:
    """The values of an adapter, by the header of its file."""
    path = None if folder is None else folder / "adapter_model.safetensors"
    if path is None or not path.is_file():
        return 0
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(size))
        except ValueError as error:
            raise UsageError(f"{path}: is damaged (no safetensors header); copy it again") from error
    header.pop("__metadata__", None)
    total = 0
    for entry in header.values():
        count = 1
        for length in entry["shape"]:
            count *= length
        total += count
    return total


def _has_template(base: str, adapter: str | None) -> bool:
    """Whether a folder here brings a chat template; of a hub id nothing is known before it is loaded."""
    for folder in filter(None, (adapter, base)):
        path = Path(folder)
        if (path / "chat_template.jinja").is_file():
            return True
        config = path / "tokenizer_config.json"
        if config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace"):
            return True
    return False
