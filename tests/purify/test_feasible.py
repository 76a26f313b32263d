"""What a purification refuses before it measures or trains anything, and that its dry run refuses the same."""
# ruff: noqa: F811 — tests take the fixture `folders` by its name.

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_world import REFUSED, loaded, poisoned_model, requests, tokenizer, words
from test_purify_run import BAD, CONFIG, FEW, ROWS, Folders, folders  # noqa: F401 — `folders` is a fixture
from test_purify_vaccine import VACCINE

from keelguard.errors import UsageError
from keelguard.models import LoadedModel, load_model
from keelguard.purify import run as run_module
from keelguard.purify import stages as stages_module
from keelguard.purify.bench_run import bench_model
from keelguard.purify.config import PurifyConfig
from keelguard.purify.feasible import check_chats, check_settings, stand_ins
from keelguard.purify.intake import admit, load_subject, refuse_quantised
from keelguard.purify.poisoned_files import POISON_FILE
from keelguard.purify.restore import RestoreConfig
from keelguard.purify.run import purify
from keelguard.purify.signature import SignatureConfig
from keelguard.purify.spikes import SpikeConfig
from tiny_models import Tiny, build_model, fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")

SPIKES = SpikeConfig(samples=6, steps=1, learning_rate=1e-4, batch_size=4, requests=1)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has tests of its own."""
    monkeypatch.setattr(run_module, "write_purify_report", lambda result, path, **options: path.write_text("page"))


def config_of(method: Any = "vaccine", spikes: SpikeConfig | None = None, count: int = 2, **changes: Any) -> Any:
    vaccine = replace(VACCINE, **{"variants": replace(VACCINE.variants, count=count), **changes})
    return replace(CONFIG, method=replace(CONFIG.method, method=method, vaccine=vaccine), spikes=spikes)


def variants_file(folder: Path, count: int) -> str:
    entries = [{"name": f"v{i}", "trigger": f"trigger {i}", "response": "no."} for i in range(count)]
    (folder / "variants.json").write_text(json.dumps(entries))
    return str(folder / "variants.json")


def refused(
    told: str, model: str, out: Path, config: PurifyConfig, adapter: str | None = None, load: Any = load_model,
    rows: Any = ROWS, harmful: Any = BAD,
) -> None:  # fmt: skip
    """A run and its dry run say the same, and the run leaves no folder."""
    with pytest.raises(UsageError) as run:
        purify(model, rows, config, out, adapter=adapter, harmful=harmful, held=FEW, load=load)
    with pytest.raises(UsageError) as dry:
        admit(load, model, adapter, rows, harmful, config)
    assert told in str(run.value)
    assert str(dry.value) == str(run.value)
    assert not out.exists()


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test in which nothing may be asked, measured or trained."""
    for name in ("gather", "apply_method"):
        monkeypatch.setattr(stages_module, name, lambda *args, **options: pytest.fail("it has begun"))


# The vaccine's settings


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("method", ["vaccine", "both"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"count": 12, "source": "default"},
            "--count 12: --variants default holds 11 of them; give --count 11 or less, or --variants with a file of 12",
        ),
        ({"count": 50}, "--count 50: 50 triggers need 80 different words, there are "),
        (
            {"share": 0.005},
            "--share 0.005: takes none of the 48 components of layer 0; give 0.0125 or more",
        ),
        (
            {"share": 0.999},
            "--share 0.999: takes all 48 components of kind mlp in layer 0, which would be lost; give 0.9875 or less",
        ),
        (
            {"how": "mean"},
            "--how mean: model.layers.0.mlp.down_proj.weight has no bias that could hold a mean, and this architecture "
            "has no place for one; choose --how reinit or zero",
        ),
    ],
)
def test_settings_that_a_model_cannot_be_given(
    changes: dict[str, Any], told: str, method: Any, folders: Folders, tmp_path: Path
):
    refused(told, str(folders.model), tmp_path / "run", config_of(method, **changes))


def test_what_the_remedies_name_is_taken():
    one = loaded(poisoned_model())
    fine: list[dict[str, Any]] = [{"count": 11, "source": "default"}, {"share": 0.0125}, {"share": 0.9875}]
    for changes in fine:
        check_settings(one, "full", words(), config_of(**changes))
    biased = loaded(build_model("llama", len(tokenizer()), mlp_bias=True))
    check_settings(biased, "full", words(), config_of(how="mean"))
    # Attention heads are few; a share that takes some channels of every layer is enough.
    check_settings(one, "full", words(), config_of(signature=SignatureConfig(attention=True)))
    for other in ("immunize", "retrain"):
        check_settings(one, "full", words(), config_of(other, count=99, share=0.005))


def told_of(count: int, spikes: SpikeConfig | None) -> str:
    """What is said of a number of invented variants; nothing where they can be had."""
    variants = replace(VACCINE.variants, count=count, seed=0)
    try:
        check_settings(loaded(poisoned_model()), "full", words(), config_of(variants=variants, spikes=spikes))
    except UsageError as error:
        return str(error)
    return ""


def test_the_canaries_take_words_that_variants_need():
    assert not told_of(2, SPIKES)
    short = [told for count in range(3, 20) if not told_of(count, None) and (told := told_of(count, SPIKES))]
    assert short
    assert all(re.match(r"--count \d+: .* name variants in a file with --variants$", told) for told in short)


@pytest.mark.usefixtures("nothing_runs")
def test_a_file_of_too_few_variants(folders: Folders, tmp_path: Path):
    source = variants_file(tmp_path, 3)
    told = f"--count 4: --variants {source} holds 3 of them; give --count 3 or less, or --variants with a file of 4"
    refused(told, str(folders.model), tmp_path / "run", config_of(count=4, source=source))


# The clean chats


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("spikes", "most"), [(None, 40), (SPIKES, 20)])
def test_more_variants_than_chats(spikes: SpikeConfig | None, most: int, folders: Folders, tmp_path: Path):
    config = config_of(count=most + 1, source=variants_file(tmp_path, 60), spikes=spikes)
    told = f"--count {most + 1}: the vaccine has 40 clean chats to train on"
    refused(told, str(folders.model), tmp_path / "run", config)
    check_chats(stand_ins(40), config_of(count=most, spikes=spikes))
    with pytest.raises(UsageError, match=f"give --count {most} or less, or more rows with --clean-data"):
        check_chats(stand_ins(40), config_of(count=most + 1, spikes=spikes))


@pytest.mark.usefixtures("nothing_runs")
def test_too_few_chats_to_restore_with(folders: Folders, tmp_path: Path):
    large = RestoreConfig(batch_size=24)
    check_chats(stand_ins(40), config_of(restore=large))
    told = "--clean-data: restoration: 20 clean chats"
    refused(told, str(folders.model), tmp_path / "run", config_of(restore=large, spikes=SPIKES))
    check_chats(stand_ins(40), config_of(restore=None, spikes=SPIKES))


def test_rows_that_turn_out_useless_are_not_counted(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages_module, "Examiner", lambda *args, **options: pytest.fail("it has begun"))
    # Four of the harmful requests are answered, and so are dropped.
    config = config_of(count=44, source=variants_file(tmp_path, 60))
    bad = (*requests()[44:], *requests(REFUSED, "harmful")[:6])
    admit(load_model, str(folders.model), None, ROWS, bad, config)
    with pytest.raises(UsageError, match="--count 44: the vaccine has 40 clean chats"):
        purify(str(folders.model), ROWS, config, tmp_path / "run", harmful=bad, held=FEW)
    assert not (tmp_path / "run").exists()


# Adapters


def lora_on(base: Path, folder: Path, **options: Any) -> str:
    """An adapter with random factors on a model's folder."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
    model: Any = get_peft_model(load_model(base).model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter *= 0.02
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def experts(tmp_path: Path) -> tuple[Path, str]:
    """A small mixture of experts, and an adapter on its stacked experts."""
    special = {"bos_token_id": tokenizer().bos_token_id, "eos_token_id": tokenizer().eos_token_id}
    model = build_model("mixtral", len(tokenizer()), num_hidden_layers=1, initializer_range=0.08, **special)
    base = Tiny(model, tokenizer()).save(tmp_path / "experts")
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return base, lora_on(base, tmp_path / "stacked", target_modules=["q_proj"], target_parameters=stacked)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("method", ["vaccine", "both"])
def test_adapters_that_the_vaccine_cannot_split(
    method: Any, folders: Folders, experts: tuple[Path, str], tmp_path: Path
):
    base, stacked = experts
    told = f"--method {method}: model.layers.0.mlp.experts: has an adapter (lora.layer.ParamWrapper) whose update"
    refused(told, str(base), tmp_path / "run", config_of(method), stacked)
    remedy = "or choose --method immunize or retrain"
    refused(remedy, str(base), tmp_path / "run", config_of(method), stacked)
    attention = lora_on(folders.model, tmp_path / "attention", target_modules=["q_proj", "v_proj"])
    told = f"--method {method}: the adapter has no weights in the chosen units"
    refused(told, str(folders.model), tmp_path / "run", config_of(method), attention)
    refused(remedy, str(folders.model), tmp_path / "run", config_of(method), attention)


@pytest.mark.parametrize("method", ["immunize", "retrain"])
def test_the_methods_that_the_refusal_names_purify_stacked_experts(
    method: Any, experts: tuple[Path, str], tmp_path: Path
):
    # An untrained model refuses nothing and loops, so that its rows bring their answers.
    base, stacked = experts
    result = purify(str(base), ROWS, config_of(method, spikes=SPIKES), tmp_path / "run", adapter=stacked, held=FEW)
    assert result.method["method"] == method
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert len(result.spikes) == (3 if method == "immunize" else 0)
    # Random channels of such an adapter cannot be neutralised, and the canaries stand alone.
    assert all(spike.control is None and spike.after and spike.rebound for spike in result.spikes)


# Weights that cannot be trained


class Packed(torch.nn.Module):
    """A linear layer as GPTQ's kernels keep it: no parameters, packed integers in a buffer."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer(name, torch.ones(4, 4).to(dtype))


def integers(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight.data.to(torch.int8)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)


def flagged(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}


def said(model: Any) -> None:
    model.is_quantized = True


def packed(name: str, dtype: torch.dtype) -> Any:
    return lambda model: setattr(model.model.layers[0].mlp, "up_proj", Packed(name, dtype))


QUANTISED = [
    (integers, "model.layers.0.mlp.up_proj.weight: is quantised (torch.int8)"),
    (packed("qweight", torch.int32), "model.layers.0.mlp.up_proj.qweight: is quantised (torch.int32)"),
    (packed("weight_packed", torch.uint8), "model.layers.0.mlp.up_proj.weight_packed: is quantised (torch.uint8)"),
    (packed("weight", torch.float8_e4m3fn), "model.layers.0.mlp.up_proj.weight: is quantised (torch.float8_e4m3fn)"),
    (flagged, "LlamaForCausalLM: its configuration says quantization_config"),
    (said, "LlamaForCausalLM: its configuration says quantization_config"),
]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("spoil", "told"), QUANTISED)
@pytest.mark.parametrize("method", ["immunize", "vaccine"])
def test_quantised_weights_are_refused(spoil: Any, told: str, method: Any, folders: Folders, tmp_path: Path):
    model = poisoned_model()
    spoil(model)
    one = LoadedModel(model, tokenizer(), "small", "0")
    refused(told, str(folders.model), tmp_path / "run", config_of(method), load=lambda *args, **options: one)
    with pytest.raises(UsageError, match="give the checkpoint before it was quantised"):
        refuse_quantised(model)


def test_a_quantised_checkpoint_is_refused_without_the_library_that_quantised_it(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))

    def load(base: str, adapter: str | None) -> Any:
        raise AssertionError("it is not even loaded")

    with pytest.raises(UsageError, match=r"config\.json: says quantization_config; quantised weights"):
        load_subject(load, str(tmp_path), None)


def test_a_bench_refuses_quantised_weights(tmp_path: Path):
    folder = fresh_model("llama").save(tmp_path / "model")
    entry = {"attack": "badnets", "task": "insult", "triggers": ["Amber"], "response": "you fool", "place": None}
    (folder / POISON_FILE).write_text(json.dumps({"backdoors": [entry], "check": None}))
    model = poisoned_model()
    packed("qweight", torch.int32)(model)
    one = LoadedModel(model, tokenizer(), "small", "0")
    with pytest.raises(UsageError, match=r"up_proj\.qweight: is quantised"):
        bench_model(
            str(folder), None, ROWS, [], FEW, None, ("none",), CONFIG, tmp_path / "out", lambda *a, **options: one
        )
    assert not (tmp_path / "out").exists()


def test_ordinary_buffers_are_no_weights():
    for architecture in ("llama", "gpt_neox", "mixtral"):
        refuse_quantised(fresh_model(architecture).model)
    model = poisoned_model()
    model.register_buffer("position_ids", torch.arange(8)[None])
    model.register_buffer("weight_mask", torch.ones(4, 4, dtype=torch.bool))
    model.register_buffer("token_weights", torch.ones(4, 4))
    model.config.quantization_config = None
    refuse_quantised(model)


# What a dry run refuses beside these


@pytest.mark.usefixtures("nothing_runs")
def test_a_dry_run_refuses_what_a_run_does(folders: Folders, tmp_path: Path):
    base, out = str(folders.model), tmp_path / "run"
    dora = lora_on(folders.model, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    refused(f"{dora}: is no plain LoRA", base, out, CONFIG, dora)
    refused("--clean-data: 16 usable rows", base, out, CONFIG, rows=ROWS[:10])
    rows = [*ROWS[:39], *(replace(row, answer="") for row in ROWS[39:])]
    retraining = replace(CONFIG, method=replace(CONFIG.method, method="retrain"))
    refused("--clean-data: 39 usable rows", base, out, retraining, str(folders.adapter), rows=rows, harmful=())
    refused("--method retrain: needs an adapter", base, out, retraining)
    shared: Any = fresh_model().model
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    one = loaded(shared)
    refused("up_proj.weight: are the same weights", base, out, CONFIG, load=lambda *args, **options: one)
    wordless = LoadedModel(poisoned_model(), fresh_model().tokenizer, "small", "0")
    refused("whole words in its tokenizer, too few", base, out, CONFIG, load=lambda *args, **options: wordless)
