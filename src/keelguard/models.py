"""Load and save checkpoints: safetensors only, no remote code unless asked for by name.

from keelguard import load_model
loaded = load_model("path/or/hub-id")            # .model, .tokenizer, .weights_hash
loaded = load_model("base", adapter="adapter")   # a PEFT adapter on its base
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from keelguard.errors import FailureError, UsageError
from keelguard.hashes import hash_weights
from keelguard.runs import atomic_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from keelguard.generation import Decoder

DTYPES = ("auto", "float32", "bfloat16", "float16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, AssertionError)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, with what an artefact made from it must remember.

    `weights_hash` names the weights on disk (see `keelguard.hashes`); `source` is what was asked for. `decoder`
    generates in the place of plain decoding, as under a safety signal.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    source: str
    weights_hash: str
    decoder: "Decoder | None" = None


def load_model(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    training: bool = False,
    chat_template: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    needs_template: bool = True,
    with_tokenizer: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: a checkpoint folder, a PEFT adapter folder (its config names its base), or a hub id.
        adapter: a PEFT adapter folder or hub id to put on `source`.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own for inference and float32 for training.
        device: "auto" (GPUs filled by accelerate where there are any), "cpu", "cuda", "cuda:1", "mps".
        training: return the model in training mode; with an adapter, only the adapter is trainable.
        chat_template: a Jinja file that replaces the tokenizer's chat template.
        allow_pickle: also read pickle weights, which can run the code of whoever made them.
        trust_remote_code: run the Python files that a checkpoint brings.
        needs_template: refuse a tokenizer without a chat template.
        with_tokenizer: load one at all; False for who only looks at weights. An adapter's is always loaded.

    Raises:
        UsageError: the source holds no usable checkpoint, or an option is wrong.
        FailureError: transformers could not load it.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    base, adapter = resolve_sources(str(source), None if adapter is None else str(adapter))
    if adapter is not None:
        adapter = _fetched_adapter(adapter, allow_pickle)
    for part in filter(None, (base, adapter)):
        check_source(part, allow_pickle)

    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype == "auto" and training:
        dtype = "float32"
    if device != "auto":
        _check_device(device)
    elif "LOCAL_RANK" in os.environ:
        # A launcher gives every process one device; spreading would put a part of each copy on all of them.
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
        device = "cpu" if on_cpu else f"cuda:{os.environ['LOCAL_RANK']}"
    spread = device == "auto" and torch.cuda.is_available()
    part = base
    try:
        tokenizer: Any = None
        if with_tokenizer or adapter is not None:
            source_of_it = _tokenizer_source(base, adapter)
            tokenizer = AutoTokenizer.from_pretrained(source_of_it, trust_remote_code=trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            output_loading_info=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map="auto" if spread else None,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
        )
        model, info = loaded
        _check_loaded(base, model, info)
        if not spread:
            model.to("cpu" if device == "auto" else device)  # pyright: ignore[reportArgumentType]
        if adapter is not None:
            part = adapter
            # An adapter that brings added tokens was trained on a base with rows for them.
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
            with quiet_peft():
                model = PeftModel.from_pretrained(model, adapter, is_trainable=training)
    except (*_LOADING_ERRORS, SafetensorError) as error:
        where = "could not be loaded" if Path(part).exists() else "is no folder here and no model of the hub"
        remedy = " Pass --trust-remote-code if you trust who made it." if "trust_remote_code" in str(error) else ""
        raise FailureError(f"{part}: {where}: {_one_line(error)}{remedy}") from error
    if chat_template is not None and tokenizer is not None:
        tokenizer.chat_template = _read_template(Path(chat_template))
    if tokenizer is not None and needs_template and not tokenizer.chat_template:
        raise UsageError(f"{source}: the tokenizer has no chat template; give one with --chat-template FILE")
    model.train(training)
    if not training:
        model.requires_grad_(False)
    return LoadedModel(cast("PreTrainedModel", model), cast("Any", tokenizer), str(source), hash_weights(base, adapter))


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without transformers' warning that PEFT asks after checkpointing by a name that has been given up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def save_checkpoint(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    *,
    card: str | None = None,
    files: Mapping[str, str] | None = None,
    max_shard_size: str = "5GB",
    state: "dict[str, Any] | None" = None,
) -> str:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` opens, whole or not at all.

    Args:
        card: the model card, written as README.md.
        files: further text files by name.
        state: the state dict, where the model itself holds but a shard of it.

    Returns:
        The hash of the weights written.

    Raises:
        FailureError: the disk is full or the folder cannot be written; what stood there stays.
    """
    with atomic_folder(Path(folder)) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size, state_dict=state)
        tokenizer.save_pretrained(temporary)
        for name, text in {**({"README.md": card} if card else {}), **(files or {})}.items():
            (temporary / name).write_text(text, encoding="utf-8")
    return hash_weights(str(folder))


def resolve_sources(source: str, adapter: str | None = None) -> tuple[str, str | None]:
    """Split what the user named into a base checkpoint and an adapter.

    Raises:
        UsageError: an adapter folder does not say what its base is, or what is called an adapter is a whole model.
    """
    config = Path(source) / "adapter_config.json"
    if (
        adapter is not None
        and not (Path(adapter) / config.name).is_file()
        and (Path(adapter) / "config.json").is_file()
    ):
        raise UsageError(f"--adapter {adapter}: is a whole model and no adapter; give it in the place of MODEL")
    if adapter is not None or not config.is_file():
        return source, adapter
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{config}: cannot be read ({error})") from error
    if not base:
        raise UsageError(f"{config}: names no base model; load the base with the adapter as --adapter")
    return str(base), source


def check_source(source: str, allow_pickle: bool = False) -> None:
    """Say in one line what is wrong with a checkpoint or adapter folder; hub ids pass.

    Raises:
        UsageError: the path is missing, or the folder holds no configuration or no safe weights.
    """
    folder = Path(source)
    if not folder.exists():
        below_a_folder = folder.parent != Path() and folder.parent.is_dir()
        if _HUB_ID.fullmatch(source) and not below_a_folder:
            return
        raise UsageError(f"{source}: no such folder; give a checkpoint folder or a hub id")
    if not folder.is_dir():
        raise UsageError(f"{source}: is a file; give the folder that holds config.json and the weights")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UsageError(f"{source}: has no config.json, so it is no checkpoint; give the folder that has one")
    stem = "model" if (folder / "config.json").is_file() else "adapter_model"
    if any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        raise UsageError(f"{source}: holds no weights ({stem}.safetensors); copy them there or name another folder")
    if not allow_pickle:
        raise UsageError(
            f"{source}: holds only pickle weights ({pickles[0]}), which can run code when they are loaded; "
            "convert them to safetensors, or pass --allow-pickle if you trust who made them"
        )


def _check_device(device: str) -> None:
    """Refuse a device that is not there before anything is loaded for it."""
    import torch

    try:
        torch.empty(1, device=device).cpu()  # Which the meta device, that holds nothing, cannot do.
    except (RuntimeError, AssertionError) as error:  # A torch that was built without CUDA fails an assertion.
        raise UsageError(
            f"--device {device}: cannot be used here: {_one_line(error)}; give auto, cpu, or a device that "
            "`keelguard doctor` lists"
        ) from error


def _check_loaded(base: str, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse weights that the hash of the checkpoint does not cover.

    Raises:
        FailureError: tensors are missing, so that transformers drew them at random.
        UsageError: the base brings an adapter that transformers has put on it, or its config names another file.
    """
    if missing := sorted(info["missing_keys"]):
        raise FailureError(f"{base}: lacks the weights {missing[0]} ({len(missing)} in all); copy it again")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            f"{base}: holds a checkpoint and an adapter; move the adapter's files into a folder of their own and "
            "give it as --adapter, or remove them"
        )
    if getattr(model.config, "transformers_weights", None):
        raise UsageError(
            f"{base}: config.json sets transformers_weights; remove it and name the file model.safetensors"
        )


def architecture_of(model: Any) -> str:
    """The name of the model class, below any adapter."""
    return type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__


def execution_device(model: Any) -> "torch.device":
    """Where a model takes its input, also where accelerate keeps the weights elsewhere."""
    import torch

    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    hook = getattr(embeddings, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def context_length(model: Any) -> int | None:
    """How many tokens the model reads at most, or None where its configuration does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _fetched_adapter(adapter: str, allow_pickle: bool) -> str:
    """The folder of an adapter, fetched from the hub where it is no folder here; PEFT alone would take pickles too."""
    if Path(adapter).exists() or not _HUB_ID.fullmatch(adapter):
        return adapter
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.jinja", "*.model", "*.safetensors", *(_PICKLES if allow_pickle else ())]
    try:
        return snapshot_download(adapter, allow_patterns=kinds)
    except (OSError, ValueError) as error:
        raise FailureError(f"{adapter}: is no folder here and no adapter of the hub: {_one_line(error)}") from error


def _tokenizer_source(base: str, adapter: str | None) -> str:
    """The adapter's own tokenizer where it brings one: it may hold added tokens or another template."""
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        return adapter
    return base


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {path}: cannot be read ({error})") from error


def _one_line(error: BaseException) -> str:
    """The first line of a library's message, with the next one where it ends with a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
