"""What files and configuration tell of a model: formats, shape and coverage, and no weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from keelguard.errors import FailureError, UsageError
from keelguard.pipeline.inspection import Inspection, inspect_model
from tiny_models import ARCHITECTURES, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def lora(tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    """A base and a LoRA on it."""
    base = fresh_model().save(tmp_path / "base")
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(fresh_model().model, LoraConfig(base_model_name_or_path=str(base), **settings))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return base, tmp_path / "adapter"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_inspection_counts_what_the_model_has(tmp_path: Path, architecture: str):
    tiny = tiny_model(architecture)
    found = inspect_model(str(tiny.save(tmp_path / "model")))
    assert found.architecture == type(tiny.model).__name__
    assert found.parameters == sum(p.numel() for p in tiny.model.parameters())
    assert found.coverage == {"units": "", "guard": "", "purify": ""}
    assert found.files == {"model.safetensors": (tmp_path / "model" / "model.safetensors").stat().st_size}
    assert found.formats == {"model.safetensors": "safetensors"}
    assert (found.pickle_files, found.remote_code_files, found.adapter) == ((), (), None)
    assert set(found.stored) == {"F32"}
    assert found.stored["F32"] == pytest.approx(found.parameters, rel=0.05)
    shape = found.shape
    assert (shape["layers"], shape["hidden"], shape["intermediate"]) == (2, 32, 48)
    assert (shape["heads"], shape["head size"], shape["context"]) == (4, 8, 256)
    assert shape["vocabulary"] == len(tiny.tokenizer)
    assert (shape["experts"], shape["experts of a token"]) == ((4, 2) if architecture == "mixtral" else (0, 0))
    assert found.chat_template
    assert found.seen
    assert json.loads(json.dumps(found.to_json()))["format"] == "keelguard.inspection/1"


def test_no_weights_are_needed(tmp_path: Path):
    """70 billion parameters without a file of weights."""
    config: Any = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path))
    assert found.parameters == 70_553_706_496
    assert found.dtype == "bfloat16"
    assert found.coverage == {"units": "", "guard": "", "purify": ""}
    assert (found.files, found.chat_template) == ({}, False)


def test_pickles_and_remote_code_are_flagged(tmp_path: Path):
    folder = fresh_model().save(tmp_path / "model")
    torch.save({}, folder / "pytorch_model.bin")
    torch.save({}, folder / "training_args.bin")
    (folder / "modeling_own.py").write_text("raise SystemExit('this must not run')\n")
    found = inspect_model(str(folder))
    assert found.pickle_files == ("pytorch_model.bin",)
    assert found.remote_code_files == ("modeling_own.py",)
    assert found.formats["modeling_own.py"] == "remote code"
    assert "training_args.bin" not in found.files, "no loader of a model reads it"


def test_a_configuration_that_needs_remote_code_is_a_failure_with_its_remedy(tmp_path: Path):
    folder = fresh_model().save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this must not run')\n")
    with pytest.raises(FailureError, match="--trust-remote-code"):
        inspect_model(str(folder))


def test_an_adapter_brings_its_base(tmp_path: Path):
    base, adapter = lora(tmp_path)
    found = inspect_model(str(adapter))
    assert (found.source, found.adapter) == (str(base), str(adapter))
    assert found == inspect_model(str(base), str(adapter))
    weights = get_peft_model(fresh_model().model, LoraConfig(r=4, target_modules="all-linear"))
    own = sum(p.numel() for name, p in weights.named_parameters() if "lora_" in name)
    assert found.adapter_parameters == own > 0
    assert found.parameters == inspect_model(str(base)).parameters
    assert set(found.files) == {"model.safetensors", "adapter/adapter_model.safetensors"}
    assert found.coverage["purify"] == ""


@pytest.mark.parametrize(
    ("options", "part"),
    [({"use_dora": True}, "no plain LoRA"), ({"bias": "all"}, "no plain LoRA"),
     ({"modules_to_save": ["lm_head"]}, "layers beside its LoRA")],
)  # fmt: skip
def test_an_adapter_that_purify_refuses_says_why(tmp_path: Path, options: dict[str, Any], part: str):
    _, adapter = lora(tmp_path, **options)
    found = inspect_model(str(adapter))
    assert part in found.coverage["purify"]
    assert "merge_and_unload" in found.coverage["purify"]
    assert found.coverage["guard"] == ""


def changed(tmp_path: Path, architecture: str = "llama", **values: Any) -> Inspection:
    """The inspection of a model whose configuration is another."""
    folder = fresh_model(architecture).save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return inspect_model(str(folder))


def test_what_is_not_covered_is_named_with_the_reason(tmp_path: Path):
    quantised = changed(tmp_path / "a", quantization_config={"quant_method": "gptq", "bits": 4})
    for name in ("units", "purify"):
        assert "quantised (gptq)" in quantised.coverage[name]


def test_an_architecture_that_cannot_be_mapped_is_named(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path))
    assert "keelguard can map no feed-forward network" in found.coverage["units"]
    assert (found.coverage["guard"], found.coverage["purify"]) == ("", "")
    assert (found.shape["layers"], found.shape["hidden"]) == (2, 32)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"\x09" * 4])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes):
    folder = fresh_model().save(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.safetensors: is damaged"):
        inspect_model(str(folder))


def test_a_folder_without_configuration_is_a_failure(tmp_path: Path):
    with pytest.raises(FailureError, match="its configuration cannot be read"):
        inspect_model(str(tmp_path))
