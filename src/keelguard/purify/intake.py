"""What a purification refuses before it starts, each by name and with a remedy."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from keelguard.attacks.insertions import vocabulary_words
from keelguard.errors import FailureError, UsageError
from keelguard.hashes import hash_weights
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.config import PurifyConfig
from keelguard.purify.feasible import check_chats, check_settings, stand_ins
from keelguard.purify.material import check_count, distinct, split_sizes
from keelguard.purify.methods import Threat
from keelguard.purify.neutralize import refuse_shared_weights
from keelguard.records import Request

_FEWEST_WORDS = 20
_UNQUANTISED = (
    "quantised weights cannot be trained; give the checkpoint before it was quantised, or one that was dequantised and "
    "saved in bfloat16 or float32"
)
_PACKED = re.compile(r"(weight|qzeros|w_q|codes)[^.]*$", re.IGNORECASE)
"""Names of buffers in which quantisers keep integer weights; other integer buffers count positions or mask."""


class Admitted(NamedTuple):
    """A model that can be purified as is asked, its vocabulary of insertions, and the clean rows that are used."""

    loaded: LoadedModel
    threat: Threat
    words: tuple[str, ...]
    requests: Sequence[Request]


def admit(
    load: Callable[..., LoadedModel],
    base: str,
    adapter: str | None,
    requests: Sequence[Request],
    harmful: Sequence[Request],
    config: PurifyConfig,
    reporter: Reporter = SILENT,
) -> Admitted:
    """Load what is to be purified, and refuse what could not be done with it; a dry run asks the same.

    Raises:
        UsageError: the model or the adapter cannot be purified, the clean rows are too few, or the method's settings
            do not suit them.
        FailureError: the model could not be loaded.
    """
    threat: Threat = "full" if adapter is None else "adapter"
    if config.method.method == "retrain":
        if adapter is None:
            raise UsageError("--method retrain: needs an adapter on a base that you trust; give it with --adapter")
        # What a suspicious adapter answers itself is no clean label.
        answered = [request for request in requests if request.answer.strip()]
        if len(answered) < len(requests):
            told = f"{len(answered)} of {len(requests)} clean rows have answers"
            reporter.note(f"retrain: {told}; the others are left out")
        requests = answered
    loaded = load_subject(load, base, adapter)
    words = tuple(vocabulary_words(loaded.tokenizer))
    check_subject(loaded, base, adapter, words, reporter)
    different = len(distinct([*requests, *harmful]))
    check_count(different, 0, len(requests) + len(harmful) - different)
    check_settings(loaded, threat, words, config)
    most = min(different, 2 * config.material.most)
    check_chats(stand_ins(split_sizes(most, config.material)[0]), config)
    return Admitted(loaded, threat, words, requests)


def load_subject(load: Callable[..., LoadedModel], base: str, adapter: str | None) -> LoadedModel:
    """Load a model, with its adapter where one is suspicious.

    Raises:
        UsageError: the adapter does not fit the base, or the base is quantised.
        FailureError: either could not be loaded.
    """
    _refuse_quantised_source(base)
    try:
        return load(base, adapter=adapter)
    except FailureError as error:
        misfit = None if adapter is None else _misfit(str(error.__cause__ or error))
        if misfit is None:
            raise
        named = _base_name(str(adapter))
        which = f"{named}, which it names" if named and named != base else "the one that it was trained on"
        raise UsageError(f"{adapter}: does not fit the base {base} ({misfit}); give {which}, as MODEL") from error


def _refuse_quantised_source(base: str) -> None:
    """Refuse by its configuration, since without the library that quantised it a checkpoint does not load at all."""
    path = Path(base) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return
    if isinstance(config, dict) and config.get("quantization_config"):
        raise UsageError(f"{path}: says quantization_config; {_UNQUANTISED}")


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
    refuse_quantised(loaded.model)
    refuse_shared_weights(loaded.model)
    if len(words) < _FEWEST_WORDS:
        raise UsageError(
            f"{loaded.source}: keelguard finds {len(words)} whole words in its tokenizer, too few to search; "
            "tokenizers that mark the start of words (SentencePiece, byte-level) are known"
        )
    if adapter is not None:
        _check_adapter(loaded.model, base, adapter)
        _compare_bases(base, adapter, reporter)


def refuse_quantised(model: Any) -> None:
    """Refuse weights that are quantised, whether parameters hold them or buffers do, as those of GPTQ and AWQ.

    Raises:
        UsageError: what is quantised, by name.
    """
    remedy = _UNQUANTISED
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise UsageError(f"{name}: is quantised ({parameter.dtype}); {remedy}")
    for name, buffer in model.named_buffers():
        whole = buffer.dtype == torch.bool or (buffer.is_floating_point() and buffer.element_size() > 1)
        if not whole and _PACKED.search(name):
            raise UsageError(f"{name}: is quantised ({buffer.dtype}); {remedy}")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise UsageError(f"{type(model).__name__}: its configuration says quantization_config; {remedy}")


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
