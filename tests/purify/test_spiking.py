"""The canaries' course: held to the suspicious copy, beside a control of as many steps, or with the reason for none."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_world import CHATS, clean_model, fresh_small, held, loaded, material, tokenizer, words
from transformers import GPT2Config, GPT2LMHeadModel

from keelguard.purify import spiking as module
from keelguard.purify.budget import Budget, Setup
from keelguard.purify.config import PurifyConfig
from keelguard.purify.controls import both
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.methods import MethodConfig, Subject, Threat, VaccineConfig, apply_method
from keelguard.purify.prober import Prober
from keelguard.purify.repair import repair, repair_chats
from keelguard.purify.restore import RestoreConfig
from keelguard.purify.search import Insertion, SearchConfig
from keelguard.purify.spikes import SpikeConfig
from keelguard.purify.spiking import prune_at_random, run_spikes
from keelguard.purify.variants import VariantConfig
from keelguard.training import TrainConfig
from keelguard.units.index import build_index, parameters_by_name

pytestmark = pytest.mark.usefixtures("one_thread")

SEARCH = SearchConfig(prompts=2, longest=1, keep=2, tokens=1)
METHOD = MethodConfig(
    method="immunize",
    immunize=ImmunizeConfig(rounds=2, steps=3, learning_rate=1e-3, batch_size=4, keep=0.0, stable=100.0, quiet=0.0,
                            tolerance=100.0, search=SEARCH),
    vaccine=VaccineConfig(
        source="vocabulary", share=0.3, variants=VariantConfig(count=2, samples=4, steps=1, rank=2, batch_size=2),
        restore=RestoreConfig(samples=20, epochs=1.0, batch_size=8, patience=0),
    ),
)  # fmt: skip
CONFIG = PurifyConfig(
    method=METHOD,
    spikes=SpikeConfig(samples=6, steps=1, learning_rate=1e-4, batch_size=4, requests=1),
    inversion=None,
    rebound=TrainConfig(steps=2, learning_rate=1e-3, batch_size=4),
)
FEW = replace(held(), benign=held().benign[:1], harmful=(), utility=())


def subject(model: Any, threat: Threat = "full") -> Subject:
    return Subject(loaded(model), threat, replace(material(), train=CHATS), tuple(words()))


def adapted(*modules: str) -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=list(modules), task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(fresh_small(), lora).eval()


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches always find something, and cost nothing."""
    monkeypatch.setattr(Prober, "search", lambda *args, **options: ([Insertion("falcon", "prefix", 9.0, 9.0)], 0.0))


def test_an_adapter_on_queries_and_values_has_its_control_in_random_heads():
    model = adapted("q_proj", "v_proj")
    spikes = run_spikes(subject(model, "adapter"), FEW, CONFIG, lost=lambda: "")
    assert all(spike.after and spike.rebound and spike.control and not spike.no_control for spike in spikes)
    assert {spike.control_steps for spike in spikes} == {6}
    method = replace(METHOD, vaccine=replace(METHOD.vaccine, share=0.5))
    pruned: Any = prune_at_random(subject(model, "adapter"), method, 2).model
    rows = parameters_by_name(pruned)["model.layers.0.self_attn.v_proj.lora_B.default.weight"]
    assert 0 < int((rows == 0).all(1).sum()) < len(rows)


def test_a_model_whose_units_cannot_be_mapped_keeps_its_canaries_and_says_why_no_control():
    size = len(tokenizer())
    torch.manual_seed(0)
    gpt2: Any = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=128, n_embd=16, n_layer=1, n_head=2)).eval()
    gpt2.generation_config.eos_token_id = gpt2.config.eos_token_id = tokenizer().eos_token_id
    gpt2.generation_config.bos_token_id = gpt2.config.bos_token_id = tokenizer().bos_token_id
    spikes = run_spikes(subject(gpt2), FEW, CONFIG, lost=lambda: "")
    for spike in spikes:
        assert spike.after is not None
        assert spike.rebound is not None
        assert (spike.control, spike.control_steps) == (None, None)
        assert "keelguard can map no" in spike.no_control or "cannot map" in spike.no_control


def test_a_repaired_copy_is_held_to_itself_with_its_canaries(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    def plant(*args: Any, **options: Any) -> Any:
        spiked, spikes = planting(*args, **options)
        seen["spiked"] = copy.deepcopy(spiked.model.state_dict())
        return spiked, spikes

    def watch(given: Subject, *args: Any, original: Any = None, **options: Any) -> Any:
        seen["original"] = copy.deepcopy(original.model.state_dict())
        return repair(given, *args, original=original, **options)

    def prune(given: Subject, method: Any, steps: int, *args: Any) -> Any:
        seen["pruned"], seen["steps"] = copy.deepcopy(given.loaded.model.state_dict()), steps
        return prune_at_random(given, method, steps, *args)

    planting = module.plant_spikes
    monkeypatch.setattr(module, "plant_spikes", plant)
    monkeypatch.setattr(module, "repair", watch)
    monkeypatch.setattr(module, "prune_at_random", prune)
    came = clean_model()
    training = replace(CONFIG.rebound, steps=0, epochs=1.0, batch_size=16)
    spikes = run_spikes(subject(came), FEW, replace(CONFIG, rebound=training), lost=lambda: "refusals")
    changed = any(not torch.equal(value, came.state_dict()[name]) for name, value in seen["spiked"].items())
    assert changed
    for state in ("original", "pruned"):
        assert all(torch.equal(value, seen["spiked"][name]) for name, value in seen[state].items())
    ours = replace(material(), train=CHATS[len(CHATS) // 2 :])
    assert seen["steps"] == 6 + -(-len(repair_chats(ours)) // 16) > 6
    assert {spike.control_steps for spike in spikes} == {seen["steps"]}


@pytest.mark.parametrize(("method", "most"), [("vaccine", 0), ("both", 6)])
def test_the_steps_of_a_purification_are_those_of_its_parts(method: Any, most: int):
    done = apply_method(subject(clean_model()), replace(METHOD, method=method))
    assert done.restored is not None
    assert done.steps == done.restored.steps + most > most


def test_a_control_may_have_no_steps():
    before = clean_model()
    pruned = prune_at_random(subject(copy.deepcopy(before)), METHOD, 0).model
    rows = [part.parameter for block in build_index(before).blocks if block.kind == "mlp" for part in block.parts]
    old, new = parameters_by_name(before), parameters_by_name(pruned)
    moved = {name for name, value in new.items() if not torch.equal(value, old[name])}
    assert moved == set(rows)


def entries(model: Any, slices: Any) -> list[torch.Tensor]:
    named = parameters_by_name(model)
    return [piece.of(named[piece.parameter]).clone() for piece in slices]


def test_what_was_neutralised_stays_so_through_a_repair_and_an_immunisation(monkeypatch: pytest.MonkeyPatch):
    vaccine = apply_method(subject(clean_model()), replace(METHOD, method="vaccine"))
    assert vaccine.written is not None
    slices = vaccine.written.index.slices(vaccine.written.chosen, shared="all")
    fresh = entries(vaccine.loaded.model, slices)
    whole = copy.deepcopy(vaccine.loaded.model.state_dict())
    training = TrainConfig(steps=3, learning_rate=1e-2, batch_size=4)
    fixed = repair(replace(subject(clean_model()), loaded=vaccine.loaded), training, methods=vaccine.methods)
    assert all(torch.equal(a, b) for a, b in zip(entries(fixed.model, slices), fresh, strict=True))
    assert any(not torch.equal(value, whole[name]) for name, value in fixed.model.state_dict().items())
    done = apply_method(subject(clean_model()), replace(METHOD, method="both"))
    assert done.rounds
    assert all(torch.equal(a, b) for a, b in zip(entries(done.loaded.model, slices), fresh, strict=True))
    assert any(not torch.equal(value, whole[name]) for name, value in done.loaded.model.state_dict().items())
    # The arm of a bench, too: its vaccine is the same one, restored for other steps.
    arm = both(subject(clean_model()), Setup(Budget(steps=6, learning_rate=1e-3, batch_size=4), METHOD))
    assert all(torch.equal(a, b) for a, b in zip(entries(arm.model, slices), fresh, strict=True))
