"""The memory model: what its parts count, how they grow, and that they agree with what autograd saves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from keelguard.pipeline.harden_config import HardenConfig
from keelguard.pipeline.inspection import Inspection, inspect_model
from keelguard.pipeline.memory import DECODING, GIB, CostSettings, StageCost, estimate
from keelguard.pipeline.sizes import FLOAT, Sizes, training
from keelguard.pipeline.workload import estimate_harden, estimate_text, lengths_of, settings_of
from keelguard.purify.presets import saving_memory
from keelguard.records import Request, user
from tiny_models import fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SEVEN = Inspection(
    source="7B", adapter=None, files={}, pickle_files=(), remote_code_files=(), architecture="LlamaForCausalLM",
    parameters=6_738_415_616, adapter_parameters=0, dtype="bfloat16", chat_template=True,
    shape={"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "key-value heads": 32, "head size": 128,
           "experts": 0, "experts of a token": 0, "vocabulary": 32000, "context": 4096},
    coverage={"units": "", "guard": "", "purify": ""},
)  # fmt: skip
WEIGHTS = 2 * SEVEN.parameters
ADAPTED = replace(SEVEN, adapter="adapter", adapter_parameters=40_000_000)


def by_name(found: Inspection = SEVEN, memory: int | None = None, **changes: Any) -> dict[str, StageCost]:
    return {cost.name: cost for cost in estimate(found, memory, replace(CostSettings(), **changes))}


# Parts


def test_every_stage_of_a_hardening_has_a_cost():
    assert list(by_name()) == [
        "inspect", "audit-received", "purify", "audit-purified", "diagnose", "guard", "audit-guarded", "package",
        "finetune, protected",
    ]  # fmt: skip
    for cost in by_name().values():
        assert all(isinstance(size, int) and size >= 0 for size in [*cost.device.values(), *cost.host.values()])
        assert json.loads(json.dumps(cost.to_json()))["device_bytes"] == cost.device_bytes
    assert by_name()["inspect"].device_bytes == 0
    assert "purify" not in by_name(purify=False)


def test_what_is_asked_takes_weights_and_a_cache():
    cost = by_name(audit_rows=16, prompt=100, answer=156)["audit-received"]
    assert cost.device["weights"] == WEIGHTS
    assert cost.device["cache"] == 2 * 32 * 4096 * 16 * 256 * 2
    assert by_name(audit_rows=32, prompt=100, answer=156)["audit-received"].device["cache"] == 2 * cost.device["cache"]


def test_a_fine_tune_keeps_weights_gradients_and_two_moments_in_float32():
    few = by_name(tune_rows=1, chat=8)["finetune, protected"].device
    assert few["weights"] == few["gradients"] == FLOAT * SEVEN.parameters
    assert few["optimiser"] == 2 * FLOAT * SEVEN.parameters
    # Gradients come as activations go: of many tokens the activations are the larger part.
    many = by_name(tune_rows=16, chat=512)["finetune, protected"].device
    assert "gradients" not in many
    assert many["activations"] > FLOAT * SEVEN.parameters


def test_a_purification_holds_the_models_that_it_compares():
    """As it came, as it was written, and the copy with canaries and a copy of that, which trains."""
    few: Any = {"rows": 1, "beside_rows": 1, "consistent": 0, "chat": 8, "search_rows": 1}
    cost = by_name(**few)["purify"]
    assert cost.device["copies"] == 2 * WEIGHTS + FLOAT * SEVEN.parameters
    assert cost.device_bytes == 2 * WEIGHTS + (1 + 4) * FLOAT * SEVEN.parameters
    without = by_name(**few, spike_steps=0)["purify"]
    assert without.device["copies"] in (WEIGHTS, 2 * WEIGHTS)
    assert without.device_bytes < cost.device_bytes


def test_a_purification_with_a_lora_and_small_passes_fits_one_large_gpu():
    """The copies stay in their number format, and of a step only a part is there at a time."""
    saving = {"rank": 16, "parts": 4, "purify_checkpointing": True}
    whole, small = by_name()["purify"], by_name(memory=80 * GIB, **saving)["purify"]
    assert small.device["copies"] == 3 * WEIGHTS
    assert small.device["optimiser"] == 2 * FLOAT * 16 * Sizes(SEVEN).linear
    assert small.fits
    assert small.device_bytes < whole.device_bytes / 2
    assert small.trained == whole.trained
    alone = by_name(spike_steps=0, **saving)["purify"]
    assert alone.host["kept for a step back"] == WEIGHTS
    for name in saving:
        without = by_name(**{key: value for key, value in saving.items() if key != name})["purify"]
        assert without.device_bytes > small.device_bytes, name


def test_kept_activations_lie_in_main_memory_and_lower_nothing_on_the_device():
    saving = {"rank": 16, "parts": 4, "purify_checkpointing": True}
    none, some = (by_name(consistent=chats, chat=384, **saving)["purify"] for chats in (0, 256))
    assert some.device == none.device
    assert some.host_bytes - none.host_bytes == 256 * 384 * 8 * 4096 * 2
    fewer = by_name(consistent=256, consistent_layers=100, chat=384, **saving)["purify"]
    assert fewer.host["kept activations"] == 4 * some.host["kept activations"], "of all 32 layers"


def test_only_rounds_of_immunisation_measure_further_losses():
    plain, beside = (by_name(beside_rows=rows, filled=1.0)["purify"] for rows in (0, 16))
    s = CostSettings()
    assert beside.trained - plain.trained == 2 * s.rounds * s.steps * 16 * s.chat


def test_autocast_halves_activations_and_keeps_copies_of_float32_weights():
    sizes = Sizes(SEVEN)
    cast = training(sizes, 8192, bf16=True)
    assert cast["activations"] == sizes.saved(8192, 2) + sizes.backward(8192, 2) + 2 * SEVEN.parameters
    assert cast["activations"] < 0.8 * training(sizes, 8192)["activations"]
    lora = training(sizes, 8192, adapter=16 * sizes.linear)
    assert training(sizes, 8192, adapter=16 * sizes.linear, bf16=True) == lora


def test_a_search_reads_no_more_tokens_than_its_budget():
    """A passage of 256 rows of a long chat would be the whole of a purification's memory."""
    few, many = (by_name(rows=1, beside_rows=1, chat=64, spike_steps=0, rank=8, search_rows=n) for n in (512, 51200))
    assert few["purify"].device_bytes == many["purify"].device_bytes


def test_an_adapter_alone_costs_little_beside_its_base():
    whole, alone = by_name(), by_name(ADAPTED)
    assert alone["purify"].device_bytes < whole["purify"].device_bytes / 2
    assert alone["purify"].device["optimiser"] == 2 * FLOAT * 40_000_000
    assert alone["audit-received"].device["weights"] == WEIGHTS + 2 * 40_000_000


def test_a_fine_tuning_attack_trains_a_copy():
    assert by_name()["audit-received"].trained == 0
    attacked = by_name(attack_steps=10)["audit-received"]
    assert attacked.device["copies"] == WEIGHTS
    assert attacked.device["optimiser"] == 2 * FLOAT * SEVEN.parameters
    assert attacked.trained > 0


def test_tokens_become_flops_and_hours():
    audit = by_name(asked=1000, prompt=100, answer=200, filled=1.0)["audit-received"]
    assert (audit.read, audit.generated, audit.trained) == (100_000, 200_000, 0)
    assert audit.flops == 2 * SEVEN.parameters * (100_000 + DECODING * 200_000)
    assert audit.hours(1e14) == pytest.approx(audit.flops / 1e14 / 3600)
    tuned = by_name(tune_steps=10, tune_rows=4, chat=50, filled=0.5)["finetune, protected"]
    assert tuned.trained == 1000
    assert tuned.flops == 6 * SEVEN.parameters * 1000


def test_idle_experts_count_for_memory_and_not_for_time():
    shape = {**SEVEN.shape, "intermediate": 14336, "experts": 8, "experts of a token": 2}
    mixed = Sizes(replace(SEVEN, parameters=46_702_792_704, shape=shape))
    assert mixed.weights == 2 * 46_702_792_704
    # Mixtral 8x7B is known to use 12.9 billion parameters for a token.
    assert mixed.active == pytest.approx(12.9e9, rel=0.01)


def test_what_does_not_fit_is_told():
    small, large = by_name(memory=80 * GIB), by_name(memory=2000 * GIB)
    assert small["audit-received"].fits
    assert small["purify"].fits is False
    assert all(cost.fits for cost in large.values())
    assert by_name()["audit-received"].fits is None


# What autograd saves


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kv", [2, 8])
def test_activations_are_those_that_autograd_saves(tmp_path: Path, dtype: str, frozen: bool, kv: int):
    config: Any = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=kv, dtype=dtype, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model: Any = LlamaForCausalLM(config).to(getattr(torch, dtype))
    if frozen:
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and 500 not in tensor.shape:
            kept.setdefault(place, tensor)
        return tensor

    rows, tokens = 4, 32
    ids, mask = torch.randint(0, 500, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.long)
    mask[0, -3:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = model(input_ids=ids, attention_mask=mask, labels=None if frozen else ids, use_cache=False)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    sizes = Sizes(inspect_model(str(tmp_path)))
    assert sizes.saved(rows * tokens, 4 if dtype == "float32" else 2, frozen) == pytest.approx(saved, rel=0.06)


def test_a_trained_model_is_what_the_parts_count(tmp_path: Path):
    """Weights, gradients and moments of a real optimiser step."""
    tiny = fresh_model()
    sizes = Sizes(inspect_model(str(tiny.save(tmp_path / "model"))))
    optimiser = torch.optim.AdamW(tiny.model.parameters())
    tiny.model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimiser.step()
    found = training(sizes, 0)
    parameters = list(tiny.model.parameters())
    assert found["weights"] == sum(p.nbytes for p in parameters)
    assert found["gradients"] == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = [value.nbytes for state in optimiser.state.values() for name, value in state.items() if name != "step"]
    assert found["optimiser"] == sum(moments)


def test_a_lora_trains_what_the_parts_count(tmp_path: Path):
    """Values and moments of a real adapter on all linear layers, after a real step."""
    tiny, rank = fresh_model(), 4
    sizes = Sizes(inspect_model(str(tiny.save(tmp_path / "model"))))
    model: Any = get_peft_model(tiny.model, LoraConfig(r=rank, target_modules="all-linear"))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in own) == rank * sizes.linear
    optimiser = torch.optim.AdamW(own)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimiser.step()
    moments = [value.nbytes for state in optimiser.state.values() for name, value in state.items() if name != "step"]
    assert training(sizes, 0, adapter=rank * sizes.linear)["optimiser"] == sum(moments)


def test_shards_divide_what_is_trained_and_checkpointing_what_is_saved():
    sizes = Sizes(SEVEN)
    whole, shared = (training(sizes, 8, shards=n) for n in (1, 8))
    assert shared["optimiser"] * 8 == whole["optimiser"]
    assert shared["gradients"] * 8 == whole["gradients"]
    # Beside an eighth of the weights a device holds two of the 32 layers whole.
    assert shared["weights"] == whole["weights"] // 8 + whole["weights"] // 16
    saved, again = (sizes.saved(8192, FLOAT, checkpointing=c) for c in (False, True))
    assert again < saved / 4


# What a hardening does


def test_settings_come_from_the_stages_own():
    config = HardenConfig()
    found = settings_of(config)
    assert (found.rounds, found.steps, found.rows) == (3, 80, 32)
    assert found.spike_steps == config.purify.spikes.steps  # pyright: ignore[reportOptionalMemberAccess]
    assert (found.guard_steps, found.looks) == (config.signal.steps, config.signal.looks)
    assert found.answer == 256
    assert found.attack_steps == 0
    assert found.asked > config.audit.limit * 10
    lora = replace(config, purify=saving_memory(config.purify, lora_rank=4, bf16=True, gradient_accumulation=8))
    smaller = settings_of(lora)
    assert (smaller.rank, smaller.parts, smaller.purify_bf16, smaller.purify_checkpointing) == (4, 8, True, False)
    fewer = settings_of(replace(config, audit=replace(config.audit, attacks=("direct",), limit=10)))
    assert fewer.asked < found.asked / 10
    without = settings_of(replace(config, purify=replace(config.purify, spikes=None)))
    assert without.spike_steps == 0


def test_a_suite_with_fine_tuning_attacks_counts_their_training(tmp_path: Path):
    (tmp_path / "requests.jsonl").write_text('{"prompt": "one"}\n')
    suite = tmp_path / "suite.yaml"
    suite.write_text("harmful: requests.jsonl\nattacks: [direct, {attack: finetune, chats: identity, steps: 7}]\n")
    config = HardenConfig()
    assert settings_of(replace(config, audit=replace(config.audit, suite=str(suite)))).attack_steps == 7


def test_stages_that_are_left_out_have_no_cost():
    config = HardenConfig(skip={"purify": "an adapter of our own", "audit-received": "done before"})
    names = [cost.name for cost in estimate_harden(SEVEN, config)]
    assert "purify" not in names
    assert "audit-received" not in names
    # The model is audited again behind every stage that may change it.
    assert {"audit-purified", "audit-guarded"} <= set(names)


def test_lengths_are_those_of_the_requests(tmp_path: Path):
    folder = tiny_model().save(tmp_path / "model")
    long = Request("b", (user("Hello world, how are you?"),), answer="I am fine, thanks (ok).")
    found = lengths_of(str(folder), [Request("a", (user("Hello"),)), long], answer=2)
    assert found.prompt < found.chat < 80
    assert 0.3 < found.filled < 1
    assert lengths_of(str(tmp_path), [long], answer=2) == CostSettings()
    assert lengths_of(str(folder), [], answer=2) == CostSettings()


def test_the_text_says_what_is_flagged_and_what_does_not_fit():
    odd = replace(
        SEVEN, pickle_files=("pytorch_model.bin",), remote_code_files=("own.py",), chat_template=False,
        coverage={**SEVEN.coverage, "units": "no such layers"},
    )  # fmt: skip
    text = estimate_text(odd, estimate_harden(odd, HardenConfig(), memory=80 * GIB), throughput=1e14)
    for part in (
        "6.74 billion parameters in bfloat16", "pytorch_model.bin: loading them can run code", "own.py: code",
        "units: not covered, since no such layers", "--chat-template", "1e+14 FLOP/s", "Nothing was changed",
    ):  # fmt: skip
        assert part in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "DOES NOT FIT" in lines["purify"]
    assert "DOES NOT FIT" not in lines["audit-received"]
