"""Loading and saving checkpoints of every architecture, and what is said of the ones that cannot be used."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from keelguard.errors import FailureError, KeelguardError, UsageError
from keelguard.hashes import hash_model, hash_weights
from keelguard.models import architecture_of, context_length, load_model, resolve_sources, save_checkpoint
from keelguard.records import user
from tiny_models import ARCHITECTURES, Tiny, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])
QUERIES = {"gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
WEIGHTS = "model.safetensors"


@pytest.fixture
def tiny() -> Tiny:
    return tiny_model("llama")


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def save_adapter(tiny: Tiny, folder: Path, base: Path, modules: list[str] | None = None) -> torch.Tensor:
    """Write a LoRA with random weights that names its base; return the logits of the base with it."""
    config = LoraConfig(r=2, target_modules=modules or ["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(tiny.model), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    return logits(model)


def refusal(kind: type[KeelguardError], *args: Any, **options: Any) -> str:
    """The one line that loading ends with."""
    with pytest.raises(kind) as caught:
        load_model(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def change_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))


# Every architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_checkpoint_opens_with_transformers_and_here_with_the_same_logits(architecture: str, tmp_path: Path):
    tiny = tiny_model(architecture)
    expected = logits(tiny.model)
    digest = save_checkpoint(tiny.model, tiny.tokenizer, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), expected)
    loaded = load_model(tmp_path / "out")
    assert torch.equal(logits(loaded.model), expected)
    assert type(loaded.model) is type(tiny.model)
    assert architecture_of(loaded.model) == type(tiny.model).__name__
    assert context_length(loaded.model) == 256
    assert loaded.weights_hash == digest == hash_weights(tmp_path / "out")
    assert loaded.source == str(tmp_path / "out")
    chat: Any = [user("Hello  world (ok)")]
    text = tiny.tokenizer.apply_chat_template(chat, tokenize=False)
    for tokenizer in (loaded.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert tokenizer.apply_chat_template(chat, tokenize=False) == text
        assert tokenizer(text)["input_ids"] == tiny.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_loads_onto_its_base_named_or_not(architecture: str, tmp_path: Path):
    tiny = tiny_model(architecture)
    base = tiny.save(tmp_path / "base")
    expected = save_adapter(tiny, tmp_path / "adapter", base, QUERIES.get(architecture))
    assert (expected - logits(tiny.model)).abs().max() > 0.1
    named = load_model(base, adapter=tmp_path / "adapter")
    alone = load_model(tmp_path / "adapter")
    for loaded in (named, alone):
        assert torch.allclose(logits(loaded.model), expected, atol=1e-5)
        assert architecture_of(loaded.model) == type(tiny.model).__name__
        assert context_length(loaded.model) == 256
        assert loaded.weights_hash == hash_weights(base, tmp_path / "adapter") != hash_weights(base)
    assert (named.source, alone.source) == (str(base), str(tmp_path / "adapter"))


# Saving


def test_a_checkpoint_is_saved_with_its_card_and_further_files(tiny: Tiny, tmp_path: Path):
    out = tmp_path / "deep" / "out"
    save_checkpoint(tiny.model, tiny.tokenizer, out, card="# Card\n", files={"notes.json": "{}"}, max_shard_size="20KB")
    assert (out / "README.md").read_text() == "# Card\n"
    assert (out / "notes.json").read_text() == "{}"
    assert len(list(out.glob("*.safetensors"))) > 1
    assert load_model(out).weights_hash == hash_model(tiny.model)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "expected", "match"),
    [
        (OSError(28, "No space left on device"), FailureError, "no space left on the disk"),
        (
            # What safetensors raises when the disk is full.
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            FailureError,
            "no space left on the disk",
        ),
        (SafetensorError("Error while serializing: other"), SafetensorError, "other"),
    ],
)
def test_a_save_that_fails_leaves_what_stood_there(
    tiny: Tiny,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
    match: str,
):
    before = hash_weights(folder)

    def fail(model: Any, target: Path, **options: Any) -> None:
        (target / WEIGHTS).write_text("half")
        raise error

    monkeypatch.setattr(type(tiny.model), "save_pretrained", fail)
    with pytest.raises(expected, match=match):
        save_checkpoint(tiny.model, tiny.tokenizer, folder)
    assert hash_weights(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# Options


def test_the_dtype_is_the_checkpoints_unless_one_is_named_or_training_needs_float32(tiny: Tiny, tmp_path: Path):
    Tiny(copy.deepcopy(tiny.model).bfloat16(), tiny.tokenizer).save(tmp_path)
    assert load_model(tmp_path).model.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="float16").model.dtype == torch.float16
    assert load_model(tmp_path, dtype="float32").model.dtype == torch.float32
    assert load_model(tmp_path, training=True).model.dtype == torch.float32
    assert load_model(tmp_path, training=True, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="float32").weights_hash == hash_weights(tmp_path)


def test_a_model_is_frozen_unless_it_is_to_be_trained(folder: Path):
    frozen, trained = load_model(folder).model, load_model(folder, training=True).model
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())


def test_of_a_model_with_an_adapter_only_the_adapter_is_trained(tiny: Tiny, folder: Path, tmp_path: Path):
    save_adapter(tiny, tmp_path / "adapter", folder)
    model = load_model(tmp_path / "adapter", training=True).model
    assert model.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(trained) == 4
    frozen = load_model(tmp_path / "adapter").model
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_adapters_own_tokenizer_comes_first(tiny: Tiny, folder: Path, tmp_path: Path):
    save_adapter(tiny, tmp_path / "adapter", folder)
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert load_model(tmp_path / "adapter").tokenizer.chat_template == tiny.tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "adapter")
    for loaded in (load_model(tmp_path / "adapter"), load_model(folder, adapter=tmp_path / "adapter")):
        assert loaded.tokenizer.chat_template == tokenizer.chat_template


def test_a_missing_chat_template_is_named_with_its_remedy(tiny: Tiny, folder: Path, tmp_path: Path):
    (folder / "chat_template.jinja").unlink()
    message = refusal(UsageError, folder)
    assert "no chat template" in message
    assert "--chat-template" in message
    assert load_model(folder, needs_template=False).tokenizer.chat_template is None
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}é", encoding="utf-8")
    chat: Any = [user("Hi")]
    loaded = load_model(folder, chat_template=tmp_path / "t.jinja")
    assert loaded.tokenizer.apply_chat_template(chat, tokenize=False) == "Hié"
    assert "--chat-template" in refusal(UsageError, folder, chat_template=tmp_path / "none.jinja")


def test_a_given_chat_template_replaces_the_tokenizers(folder: Path, tmp_path: Path):
    (tmp_path / "t.jinja").write_text("mine")
    assert load_model(folder, chat_template=tmp_path / "t.jinja").tokenizer.chat_template == "mine"


@pytest.mark.parametrize("dtype", ["int8", "bf16", "__class__", ""])
def test_an_unknown_dtype_is_refused_with_the_known_ones(folder: Path, dtype: str):
    message = refusal(UsageError, folder, dtype=dtype)
    assert "--dtype" in message
    assert "bfloat16" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "bogus", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert f"--device {device}: cannot be used here: " in refusal(UsageError, folder, device=device)


# What is no checkpoint


def test_a_missing_path_is_told_from_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in (tmp_path / "none", "./none", "models/none", "../none", "a/b/c"):
        assert f"{path}: no such folder" in refusal(UsageError, path)
    for hub_id in ("some-org/some-model", "gpt2-of-nobody"):
        assert f"{hub_id}: is no folder here and no model of the hub" in refusal(FailureError, hub_id)


def test_a_hub_adapter_that_cannot_be_reached_is_named_itself(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal(FailureError, folder, adapter="some-org/lora").startswith("some-org/lora: is no folder here")


def test_a_file_is_no_folder(folder: Path):
    assert "is a file; give the folder" in refusal(UsageError, folder / WEIGHTS)


def test_a_folder_without_a_configuration_is_no_checkpoint(folder: Path):
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(UsageError, folder)


def test_a_folder_without_weights_is_no_checkpoint(folder: Path):
    (folder / WEIGHTS).unlink()
    message = refusal(UsageError, folder)
    assert "holds no weights" in message
    assert "pickle" not in message


def test_an_adapter_must_name_its_base(tiny: Tiny, folder: Path, tmp_path: Path):
    save_adapter(tiny, tmp_path / "adapter", folder)
    assert resolve_sources(str(tmp_path / "adapter")) == (str(folder), str(tmp_path / "adapter"))
    assert resolve_sources(str(folder)) == (str(folder), None)
    assert resolve_sources(str(tmp_path / "adapter"), "other") == (str(tmp_path / "adapter"), "other")
    assert resolve_sources(str(folder), "other") == (str(folder), "other")
    change_config(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=None)
    message = refusal(UsageError, tmp_path / "adapter")
    assert "names no base" in message
    assert "--adapter" in message
    for content in ("{", "[]"):
        (tmp_path / "adapter" / "adapter_config.json").write_text(content)
        assert "adapter_config.json: cannot be read" in refusal(UsageError, tmp_path / "adapter")


def test_an_adapter_whose_base_is_gone_is_refused_by_the_bases_name(tiny: Tiny, folder: Path, tmp_path: Path):
    save_adapter(tiny, tmp_path / "adapter", folder)
    shutil.rmtree(folder)
    assert f"{folder}: no such folder" in refusal(UsageError, tmp_path / "adapter")


# Damage


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04garbage")


def _wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, folder / WEIGHTS, {"format": "pt"})


def _lost_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_model("llama").save(folder, max_shard_size="20KB")
    next(folder.glob("*.safetensors")).unlink()


def _damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _config_of(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "config.json").write_text(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _garbage,
        _wrong_shape,
        _lost_shard,
        _damaged_tokenizer,
        _config_of("{"),
        _config_of("[]"),
        _config_of('{"model_type": "unknown"}'),
        _config_of('{"model_type": "vit"}'),
    ],
)
def test_a_damaged_checkpoint_is_a_failure_in_one_line(folder: Path, damage: Callable[[Path], None]):
    damage(folder)
    assert refusal(FailureError, folder).startswith(f"{folder}: could not be loaded: ")


def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_with_random_numbers(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert "lacks the weights model.layers.1.mlp.up_proj.weight" in refusal(FailureError, folder)


def test_a_damaged_adapter_is_named_and_not_its_base(tiny: Tiny, folder: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    save_adapter(tiny, adapter, folder)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-4])
    for arguments in ({"source": adapter}, {"source": folder, "adapter": adapter}):
        assert refusal(FailureError, **arguments).startswith(f"{adapter}: could not be loaded: ")
    (adapter / "adapter_model.safetensors").write_bytes(whole)
    change_config(adapter, "adapter_config.json", target_modules=["nowhere"])
    assert refusal(FailureError, adapter).startswith(f"{adapter}: could not be loaded: ")


# Safety of loading


def _pickle_only(tiny: Tiny, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(tiny.model.state_dict(), folder / "pytorch_model.bin")


def test_pickle_weights_are_read_only_when_allowed(tiny: Tiny, folder: Path):
    _pickle_only(tiny, folder)
    message = refusal(UsageError, folder)
    assert "pytorch_model.bin" in message
    assert "--allow-pickle" in message
    loaded = load_model(folder, allow_pickle=True)
    assert torch.equal(logits(loaded.model), logits(tiny.model))
    assert loaded.weights_hash == hash_weights(folder)


def test_a_stray_safetensors_file_is_no_cover_for_pickles(tiny: Tiny, folder: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    save_adapter(tiny, adapter, folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").rename(adapter / "stray.safetensors")
    assert "adapter_model.bin" in refusal(UsageError, folder, adapter=adapter)
    _pickle_only(tiny, folder)
    save_file(tensors, folder / "stray.safetensors")
    assert "pytorch_model.bin" in refusal(UsageError, folder)


class _Spy:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_hostile_pickle_does_not_run(tiny: Tiny, folder: Path, tmp_path: Path):
    marker = tmp_path / "ran"
    torch.save({"spy": _Spy(marker)}, folder / "pytorch_model.bin")
    load_model(folder)
    (folder / WEIGHTS).unlink()
    refusal(UsageError, folder)
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the pickle would have run"


SPY_CODE = """\
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class SpyConfig(LlamaConfig):
    model_type = "spy"
class SpyModel(LlamaForCausalLM):
    config_class = SpyConfig
"""


@pytest.mark.parametrize("model_type", ["llama", "spy"])
def test_a_checkpoints_own_code_runs_only_when_trusted(
    tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
):
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    marker = tmp_path / "ran"
    (folder / "spy.py").write_text(SPY_CODE.format(marker=str(marker)))
    auto_map = {"AutoConfig": "spy.SpyConfig", "AutoModelForCausalLM": "spy.SpyModel"}
    change_config(folder, auto_map=auto_map, model_type=model_type)
    change_config(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["spy.SpyTokenizer", None]})
    if model_type == "llama":  # A type that transformers knows loads without the code.
        assert torch.equal(logits(load_model(folder).model), logits(tiny.model))
    else:
        assert "--trust-remote-code" in refusal(FailureError, folder)
    assert not marker.exists()
    change_config(folder, "tokenizer_config.json", auto_map={})
    assert type(load_model(folder, trust_remote_code=True).model).__name__ == "SpyModel"
    assert marker.exists(), "the code would have run"


def test_an_adapter_hidden_in_its_bases_folder_is_refused(tiny: Tiny, folder: Path, tmp_path: Path):
    """transformers puts it on silently, and the hash of the checkpoint would not cover it."""
    save_adapter(tiny, tmp_path / "adapter", folder)
    save_adapter(tiny, tmp_path / "hidden", folder, ["v_proj"])
    for file in (tmp_path / "hidden").glob("adapter_*"):
        shutil.copy(file, folder)
    for arguments in ({"source": folder}, {"source": tmp_path / "adapter"}):
        assert f"{folder}: holds a checkpoint and an adapter" in refusal(UsageError, **arguments)


def test_weights_under_a_name_of_the_configs_choice_are_refused(tiny: Tiny, folder: Path):
    """transformers would load that file, and the hash would be that of model.safetensors."""
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    change_config(folder, transformers_weights="other.safetensors")
    assert "transformers_weights" in refusal(UsageError, folder)


def test_a_whole_model_is_no_adapter(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is a whole model and no adapter; give it in the place of MODEL"):
        resolve_sources("base", str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert resolve_sources("base", str(tmp_path)) == ("base", str(tmp_path))
