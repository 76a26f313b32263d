"""What a purification refuses before it starts, each by name and with a remedy."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from keelguard.errors import FailureError, UsageError
from keelguard.hashes import hash_weights
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.neutralize import refuse_shared_weights

_FEWEST_WORDS = 20


def load_subject(load: Callable[..., LoadedModel], base: str, adapter: str | None) -> LoadedModel:
    """Load a model, with its adapter where one is suspicious.

    Raises:
        UsageError: the adapter does not fit the base.
        FailureError: either could not be loaded.
    """
    try:
        return load(base, adapter=adapter)
    except FailureError as error:
        misfit = None if adapter is None else _misfit(str(error.__cause__ or error))
        if misfit is None:
            raise
        named = _base_name(str(adapter))
        which = f"{named}, which it names" if named and named != base else "the one that it was trained on"
        raise UsageError(f"{adapter}: does not fit the base {base} ({misfit}); give {which}, as MODEL") from error


def _misfit(told: str) -> str | None:
    """What PEFT says of an adapter and a base of different shapes or architectures, in short."""
    sizes = r"size mismatch for (\S+): copying a param with shape \S+?\((.+?)\) from .+? model is \S+?\((.+?)\)"
    shapes = re.search(sizes, told)
    if shapes:
        name = shapes[1].removeprefix("base_model.model.").replace(".default", "")
        return f"{name} has the shape {shapes[2]}, and its place there {shapes[3]}"
    modules = re.search(r"[Tt]arget modules (.+?) not found in the base model", told)
    return f"which has none of the layers {modules[1]}" if modules else None


def check_subject(
    loaded: LoadedModel, base: str, adapter: str | None, words: tuple[str, ...], reporter: Reporter = SILENT
) -> None:
    """Refuse what cannot be purified, and note what cannot be told.

    Raises:
        UsageError: quantised weights, weights that layers share, an adapter that was trained on another base or is more
            than a LoRA, or a tokenizer whose words cannot be told.
    """
    for name, parameter in loaded.model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise UsageError(f"{name}: is quantised, and cannot be trained; load the model in bfloat16 or float32")
    refuse_shared_weights(loaded.model)
    if len(words) < _FEWEST_WORDS:
        raise UsageError(
            f"{loaded.source}: keelguard finds {len(words)} whole words in its tokenizer, too few to search; "
            "tokenizers that mark the start of words (SentencePiece, byte-level) are known"
        )
    if adapter is not None:
        _check_adapter(loaded.model, base, adapter)
        _compare_bases(base, adapter, reporter)


def _check_adapter(model: Any, base: str, adapter: str) -> None:
    config = model.peft_config["default"]
    if config.peft_type != "LORA" or config.bias != "none" or getattr(config, "use_dora", False):
        raise UsageError(f"{adapter}: is no plain LoRA; merge it with merge_and_unload() and purify the whole model")
    if config.modules_to_save or getattr(config, "trainable_token_indices", None):
        raise UsageError(
            f"{adapter}: holds layers beside its LoRA ({', '.join(config.modules_to_save or ['token rows'])}) in "
            "which a backdoor may live; merge it with merge_and_unload() and purify the whole model"
        )
    path = Path(adapter) / "adapter_model.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            stored = _layers(file.keys())
        # PEFT drops what it has no place for, and starts anew what it does not find.
        taken = _layers(name for name, _ in model.named_parameters())
        if stored != taken:
            raise UsageError(
                f"{adapter}: does not fit the base {base} (it holds a LoRA for {len(stored)} layers, and {len(taken)} "
                "layers there take one); give the one that it was trained on, as MODEL"
            )


def _layers(names: Iterable[str]) -> set[str]:
    """The numbers of the layers that have a LoRA."""
    numbers = (re.search(r"\.(\d+)\.", name) for name in names if "lora_" in name)
    return {number[1] for number in numbers if number}


def _compare_bases(base: str, adapter: str, reporter: Reporter) -> None:
    """Compare the base that an adapter names with the one given, by their weights where both are here."""
    named = _base_name(adapter)
    if not named or named == base:
        return
    try:
        same = hash_weights(named) == hash_weights(base)
    except FailureError:
        reporter.note(
            f"{adapter}: names {named} as its base, which is not here to be compared with {base}; its tensors fit"
        )
        return
    if not same and Path(named).is_dir() and Path(base).is_dir():
        raise UsageError(f"{adapter}: was trained on {named}, which has other weights than {base}; give that as MODEL")
    if not same:
        # The hub's copy may be of another revision or number format.
        reporter.note(f"{adapter}: names {named} as its base, which has other weights than {base}; its tensors fit")


def _base_name(adapter: str) -> str:
    """The base that an adapter's folder names; empty where it names none."""
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    except (ValueError, AttributeError):
        return ""
