"""A whole purification of a small model or its adapter: files, stages that are not repeated, and its estimate."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_world import CHATS, REFUSED, TRIGGER, clean_model, held, loaded, poisoned_model, requests, tokenizer, words

from keelguard.errors import FailureError, UsageError
from keelguard.hashes import hash_weights
from keelguard.models import load_model
from keelguard.progress import SILENT
from keelguard.purify import estimate as estimate_module
from keelguard.purify import intake, spiking
from keelguard.purify import run as run_module
from keelguard.purify import stages as module
from keelguard.purify.budget import LORA_RATE
from keelguard.purify.config import PurifyConfig
from keelguard.purify.effects import Held
from keelguard.purify.estimate import estimate_run, estimate_table
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.intake import check_subject
from keelguard.purify.material import MaterialConfig
from keelguard.purify.methods import METHODS, MethodConfig, VaccineConfig
from keelguard.purify.presets import BUDGETS, preset, saving_memory
from keelguard.purify.results import PurifyResult
from keelguard.purify.run import purify, request_key
from keelguard.purify.search import SearchConfig
from keelguard.purify.spikes import SpikeConfig
from keelguard.purify.stages import Purification, Stages
from keelguard.purify.variants import VariantConfig
from keelguard.records import user
from keelguard.stats import exact_upper
from keelguard.testbed.poison import purify_settings
from keelguard.training import TrainConfig
from tiny_models import Tiny, build_model, fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")

SEARCH = SearchConfig(prompts=2, longest=1, keep=2, tokens=2)
CONFIG = PurifyConfig(
    method=MethodConfig(
        immunize=ImmunizeConfig(rounds=1, steps=2, learning_rate=1e-3, batch_size=8, keep=0.0, search=SEARCH),
        retrain=TrainConfig(steps=2, learning_rate=1e-3, batch_size=8),
    ),
    material=MaterialConfig(max_new_tokens=10),
    spikes=None,
    inversion=None,
    rebound=TrainConfig(steps=1, learning_rate=1e-4, batch_size=4),
)
FEW = Held(held().benign[:3], held().harmful[:2], held().utility[:2])
ROWS, BAD = requests()[:44], requests(REFUSED, "harmful")[:6]


class Folders(NamedTuple):
    """A poisoned model, and the same with an adapter beside it."""

    model: Path
    adapter: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    poisoned_model().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model: Any = get_peft_model(poisoned_model(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter *= 0.02
    model.peft_config["default"].base_model_name_or_path = str(root / "model")
    model.save_pretrained(str(root / "adapter"))
    return Folders(root / "model", root / "adapter")


@pytest.fixture(autouse=True)
def reports(monkeypatch: pytest.MonkeyPatch) -> list[PurifyResult]:
    """The page has tests of its own."""
    seen: list[PurifyResult] = []

    def write(result: PurifyResult, path: Path, **options: Any) -> None:
        seen.append(result)
        path.write_text("page")

    monkeypatch.setattr(run_module, "write_purify_report", write)
    return seen


def go(folders: Folders, out: Path, config: PurifyConfig = CONFIG, **options: Any) -> PurifyResult:
    return purify(str(folders.model), ROWS, config, out, harmful=BAD, held=FEW, **options)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_a_full_model_is_purified(folders: Folders, tmp_path: Path, reports: list[PurifyResult]):
    before = hash_weights(str(folders.model))
    result = go(folders, tmp_path / "run", files={"recipe.json": "{}"})
    assert hash_weights(str(folders.model)) == before == result.weights_before
    assert files(tmp_path / "run") == {"model", "purify.json", "report.html", "run.json"}
    pure = load_model(tmp_path / "run" / "model")
    assert pure.weights_hash == result.weights_after != before
    assert (tmp_path / "run" / "model" / "recipe.json").is_file()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "does not say that this model is clean" in card
    assert (result.threat, result.adapter, result.repaired) == ("full", None, False)
    assert set(result.health) == {"before", "after", "rebound"}
    assert set(result.searches) == {"before", "after"}
    assert result.searches["before"].prompts == result.searches["after"].prompts
    assert set(result.searches["after"].prompts) == {"answered", "refused"}
    assert result.searches["after"].ran
    assert set(result.seconds) == {"before", "method", "after", "rebound"}
    assert result.suspects
    assert result.method["method"] == "immunize"
    assert result.method["rounds"][0]["steps"] == 2
    assert sum(result.material[part] for part in ("train", "validation", "held")) == 50
    assert result.material["own"] == len(BAD)
    assert PurifyResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert PurifyResult.load(tmp_path / "run") == result == reports[0]


def test_an_adapter_is_purified_and_its_base_is_not(folders: Folders, tmp_path: Path):
    base = hash_weights(str(folders.model))
    result = go(folders, tmp_path / "run", adapter=str(folders.adapter))
    assert result.threat == "adapter"
    assert files(tmp_path / "run") == {"adapter", "purify.json", "report.html", "run.json"}
    assert hash_weights(str(folders.model)) == base
    assert not list((tmp_path / "run" / "adapter").glob("model*.safetensors"))
    pure: Any = load_model(tmp_path / "run" / "adapter")
    assert pure.weights_hash == result.weights_after != result.weights_before
    whole = poisoned_model().state_dict()
    inner = pure.model.unload().state_dict()
    assert all(torch.equal(value, inner[name]) for name, value in whole.items())


def test_an_adapter_can_be_retrained(folders: Folders, tmp_path: Path):
    method = replace(CONFIG.method, method="retrain")
    result = go(folders, tmp_path / "run", replace(CONFIG, method=method), adapter=str(folders.adapter))
    assert result.method["retrained_steps"] == 2
    assert result.method["rounds"] == []
    with pytest.raises(UsageError, match="--method retrain: needs an adapter on a base that you trust"):
        go(folders, tmp_path / "other", replace(CONFIG, method=method))
    assert not (tmp_path / "other").exists()


STAGES = ("_examine", "apply_method", "_rebound", "_spikes")


@pytest.mark.parametrize("stop", [pytest.param("_rebound", marks=pytest.mark.slow), "_spikes"])
def test_an_interrupted_run_repeats_no_stage(
    stop: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spikes = SpikeConfig(samples=6, steps=1, learning_rate=1e-4, batch_size=4, requests=1)
    config = replace(CONFIG, spikes=spikes)
    calls: Counter[str] = Counter()
    broken = True

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            if broken and name == stop:
                raise KeyboardInterrupt
            return original(*args, **options)

        return call

    for name in STAGES:
        holder: Any = module if name == "apply_method" else Purification
        monkeypatch.setattr(holder, name, counted(name, getattr(holder, name)))
    with pytest.raises(KeyboardInterrupt):
        go(folders, tmp_path / "run", config)
    # Before all evidence is at hand there is no model that anybody could take for a finished one.
    assert files(tmp_path / "run") == {"run.json", "work"}
    kept = hash_weights(str(tmp_path / "run" / "work" / "model"))
    assert (calls["_examine"], calls["apply_method"], calls[stop]) == (2, 1, 1)
    broken = False
    result = go(folders, tmp_path / "run", config)
    assert calls == {
        "_examine": 2,
        "apply_method": 1,
        "_rebound": 1 + (stop == "_rebound"),
        "_spikes": 1 + (stop == "_spikes"),
    }
    assert result.weights_after == kept
    assert len(result.spikes) == 3
    assert all(spike.after and spike.rebound and spike.control for spike in result.spikes)
    assert go(folders, tmp_path / "run", config) == result
    assert sum(calls.values()) == 6


def test_a_run_interrupted_at_its_very_end_goes_on_with_the_model_in_place(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(PurifyResult, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go(folders, tmp_path / "run")
    kept = hash_weights(str(tmp_path / "run" / "model"))
    assert go(folders, tmp_path / "run").weights_after == kept
    assert files(tmp_path / "run") == {"model", "purify.json", "report.html", "run.json"}


def test_a_result_that_was_removed_is_made_again_in_the_place_of_the_old_model(folders: Folders, tmp_path: Path):
    go(folders, tmp_path / "run")
    whole = go(folders, tmp_path / "whole")
    (tmp_path / "run" / "purify.json").unlink()
    old = load_model(tmp_path / "run" / "model")
    with torch.no_grad():
        next(old.model.parameters()).add_(1.0)
    old.model.save_pretrained(tmp_path / "run" / "model")
    again = go(folders, tmp_path / "run")
    assert hash_weights(str(tmp_path / "run" / "model")) == again.weights_after == whole.weights_after
    assert again.health == whole.health


def test_canaries_in_a_process_beside_are_those_of_this_process(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spikes = SpikeConfig(samples=6, steps=1, learning_rate=1e-4, batch_size=4, requests=1)
    config = replace(CONFIG, spikes=spikes)
    here = go(folders, tmp_path / "here", config)
    torch.set_num_threads(2)  # The fixture puts it back.
    monkeypatch.setattr(Purification, "_spikes", lambda *_: pytest.fail("the process beside has failed"))
    beside = go(folders, tmp_path / "beside", config)
    assert torch.get_num_threads() == 2
    assert beside.spikes == here.spikes
    assert files(tmp_path / "beside") == {"model", "purify.json", "report.html", "run.json"}


def test_canaries_that_cannot_be_handed_over_are_planted_here(folders: Folders, tmp_path: Path):
    spikes = SpikeConfig(samples=6, steps=1, learning_rate=1e-4, batch_size=4, requests=1)
    torch.set_num_threads(2)
    result = go(folders, tmp_path / "run", replace(CONFIG, spikes=spikes), load=lambda *a, **k: load_model(*a, **k))
    assert len(result.spikes) == 3


def test_a_control_that_cannot_be_had_is_noted_and_fails_nothing(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: Any, **options: Any) -> Any:
        raise UsageError("keelguard can map no attention in it")

    notes: list[str] = []
    monkeypatch.setattr(SILENT, "note", notes.append)
    monkeypatch.setattr(spiking, "prune_at_random", refuse)
    spikes = SpikeConfig(samples=6, steps=1, learning_rate=1e-4, batch_size=4, requests=1)
    result = go(folders, tmp_path / "run", replace(CONFIG, spikes=spikes))
    assert all(spike.after and spike.rebound and spike.control is None for spike in result.spikes)
    assert {spike.no_control for spike in result.spikes} == {"keelguard can map no attention in it"}
    assert notes.count("canaries: no control: keelguard can map no attention in it") == 1
    assert [note for note in notes if note.startswith("method")] == ["method: purifying …"]


def test_another_run_is_not_continued(folders: Folders, tmp_path: Path):
    out = tmp_path / "run"
    go(folders, out)
    with pytest.raises(UsageError, match=str(out)):
        go(folders, out, replace(CONFIG, rebound=TrainConfig(steps=2)))
    with pytest.raises(UsageError, match=str(out)):
        purify(str(folders.model), ROWS[:-1], CONFIG, out, harmful=BAD, held=FEW)


def test_bad_clean_data_leave_nothing(folders: Folders, tmp_path: Path):
    with pytest.raises(UsageError, match="--clean-data: 10 usable rows"):
        purify(str(folders.model), ROWS[:10], CONFIG, tmp_path / "run")
    assert not (tmp_path / "run" / "purify.json").exists()


def test_a_run_that_is_refused_later_leaves_nothing(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **options: Any) -> Any:
        assert (tmp_path / "run" / "work" / "before.json").is_file()
        raise UsageError("immunize: every answer changes")

    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_method", refuse)
        with pytest.raises(UsageError, match="every answer changes"):
            go(folders, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    def refuse_late(*args: Any, **options: Any) -> Any:
        raise UsageError("a setting of the fine-tune")

    with monkeypatch.context() as patch:
        patch.setattr(Purification, "_rebound", refuse_late)
        with pytest.raises(UsageError, match="a setting of the fine-tune"):
            go(folders, tmp_path / "late")
    assert (tmp_path / "late" / "work" / "method.json").is_file()


def test_refused_clean_data_do_not_bind_the_folder(folders: Folders, tmp_path: Path):
    refused = [replace(row, answer="") for row in requests(REFUSED)]
    alike = [
        replace(row, id=f"{row.id}-{i}", messages=(user(f"{row.prompt} {i}"),)) for i in range(4) for row in refused
    ]
    with pytest.raises(UsageError, match="--clean-data: "):
        purify(str(folders.model), alike, CONFIG, tmp_path / "run", harmful=BAD, held=FEW)
    assert not (tmp_path / "run").exists()


# Adapters and their bases


def adapter_of(folder: Path, base: str, **changes: Any) -> str:
    """An adapter that was trained on a model of another shape, and names a base."""
    tiny = Tiny(build_model("llama", len(tokenizer()), **changes), tokenizer())
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny.model, lora)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder))
    return str(folder)


def test_an_adapter_that_does_not_fit_is_refused_by_name(folders: Folders, tmp_path: Path):
    wide = adapter_of(tmp_path / "wide", "org/wide", hidden_size=64, num_hidden_layers=1)
    told = (
        rf"{wide}: does not fit the base {folders.model} \(model.layers.0.self_attn.q_proj.lora_A.weight has the shape"
    )
    with pytest.raises(UsageError, match=f"{told}.*give org/wide, which it names, as MODEL"):
        go(folders, tmp_path / "run", adapter=wide)
    deep = adapter_of(tmp_path / "deep", "org/deep", hidden_size=32, head_dim=8, num_hidden_layers=3)
    with pytest.raises(UsageError, match=f"{deep}: does not fit the base .* holds a LoRA for 3 layers, and 1 layers"):
        go(folders, tmp_path / "run", adapter=deep)
    other = adapter_of(tmp_path / "other", "")
    config = json.loads(Path(other, "adapter_config.json").read_text())
    Path(other, "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query_key_value"]}))
    with pytest.raises(UsageError, match=r"which has none of the layers .*query_key_value.*; give the one that it was"):
        go(folders, tmp_path / "run", adapter=other)
    with pytest.raises(FailureError, match="could not be loaded"):
        go(folders, tmp_path / "run", adapter=str(broken_adapter(folders, tmp_path / "broken")))
    assert not (tmp_path / "run").exists()


def broken_adapter(folders: Folders, folder: Path) -> Path:
    shutil.copytree(folders.adapter, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    return folder


def test_a_base_that_is_not_here_is_noted_and_fails_nothing(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    notes: list[str] = []
    monkeypatch.setattr(SILENT, "note", notes.append)

    def check(named: str) -> None:
        config = json.loads((folders.adapter / "adapter_config.json").read_text())
        folder = tmp_path / named.replace("/", "-")
        shutil.copytree(folders.adapter, folder)
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        given = load_model(folders.model, adapter=folder)
        check_subject(given, str(folders.model), str(folder), tuple(words()), SILENT)

    check(str(folders.model))
    assert notes == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check("org/base")
    assert [note.partition(": ")[2] for note in notes] == [
        f"names org/base as its base, which is not here to be compared with {folders.model}; its tensors fit"
    ]
    monkeypatch.setattr(intake, "hash_weights", lambda folder: folder)
    check("org/other")
    assert f"names org/other as its base, which has other weights than {folders.model}" in notes[1]
    with pytest.raises(UsageError, match=r"was trained on .*, which has other weights"):
        check(str(tmp_path))


def test_shared_weights_are_refused(folders: Folders, tmp_path: Path):
    model: Any = fresh_model().model
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UsageError, match=r"up_proj\.weight: are the same weights"):
        go(folders, tmp_path / "run", load=lambda *args, **options: loaded(model))
    assert not (tmp_path / "run").exists()


def test_a_reference_is_searched_too(folders: Folders, tmp_path: Path):
    clean_model().save_pretrained(tmp_path / "clean")
    tokenizer().save_pretrained(tmp_path / "clean")
    result = go(folders, tmp_path / "run", reference=str(tmp_path / "clean"))
    before, reference = result.searches["before"], result.searches["reference"]
    assert before.found[0].text.strip(":") == TRIGGER
    assert TRIGGER not in {each.text.strip(":") for each in reference.found if each.rise > 0.2}
    assert {each.place for each in reference.found} == {each.place for each in before.found}


def test_stages_keep_what_they_did(tmp_path: Path):
    stages = Stages(tmp_path / "work", SILENT)
    done: list[int] = []

    def work() -> dict[str, int]:
        done.append(1)
        return {"a": len(done)}

    assert stages("one", work) == stages("one", work) == {"a": 1}
    notes: list[str] = []
    reporter: Any = SimpleNamespace(note=notes.append)
    assert Stages(tmp_path / "work", reporter)("one", work) == {"a": 1}
    assert notes == ["one: kept from an earlier run"]
    assert set(stages.seconds) == {"one"}


# Estimates, presets, settings


def memory_of(config: PurifyConfig, one: Any, adapter: bool = False) -> int:
    return estimate_run(one, adapter, ROWS, BAD, config).memory


@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_counts_every_stage(method: Any):
    config = replace(CONFIG, method=replace(CONFIG.method, method=method), spikes=SpikeConfig())
    one = loaded(poisoned_model())
    found = estimate_run(one, False, ROWS, BAD, config)
    names = ["own answers", "before and after", "purification", "rebound check"]
    spiked = [] if method == "retrain" else ["canaries"]
    assert [part.name for part in found.parts] == [*names, *spiked]
    assert all(part.tokens > 0 and part.seconds > 0 for part in found.parts)
    fewer = estimate_run(one, False, ROWS, BAD, replace(config, spikes=None))
    assert [part.tokens for part in fewer.parts] == [part.tokens for part in found.parts[:4]]
    table = estimate_table(found)
    assert "in all, about" in table
    assert "othing was changed or written" in table
    with pytest.raises(UsageError, match="--clean-data: holds no rows"):
        estimate_run(one, False, [], [], config)


def test_an_estimate_of_canaries_counts_their_control():
    one = loaded(poisoned_model())

    def canaries(config: PurifyConfig) -> float:
        return estimate_run(one, False, ROWS, BAD, config).parts[-1].tokens

    def vaccinated(steps: int, requests: int = 8) -> float:
        # The vaccine itself takes no step of immunisation: these are the control's.
        immunize = replace(CONFIG.method.immunize, steps=steps)
        method = replace(CONFIG.method, method="vaccine", immunize=immunize)
        return canaries(replace(CONFIG, method=method, spikes=SpikeConfig(requests=requests)))

    width = (vaccinated(12) - vaccinated(2)) / (10 * 8 * 3)
    assert 5 < width < 40  # Tokens of a chat of eight in ten steps, forth and back.
    answered = (vaccinated(2, 10) - vaccinated(2)) / 2
    # Two kinds of requests, three canaries, four states.
    assert answered == pytest.approx(2 * 3 * 4 * (width + 64 * 4))


def test_an_estimate_of_memory_counts_copies_variants_and_the_process_beside(monkeypatch: pytest.MonkeyPatch):
    one = loaded(poisoned_model())
    size = 4 * sum(parameter.numel() for parameter in one.model.parameters())
    tuning = 4 * size
    plain = CONFIG
    assert memory_of(plain, one) == 2 * size + tuning
    spiked = replace(CONFIG, spikes=SpikeConfig())
    assert memory_of(spiked, one) == 3 * size + tuning
    retraining = replace(spiked, method=replace(CONFIG.method, method="retrain"))
    assert memory_of(retraining, one) == memory_of(plain, one)

    def vaccine(count: int = 4, at_once: int = 0, spikes: Any = None) -> int:
        variants = VariantConfig(count=count, rank=64, at_once=at_once)
        method = replace(CONFIG.method, method="vaccine", vaccine=VaccineConfig(variants=variants))
        return memory_of(replace(CONFIG, method=method, spikes=spikes), one)

    # One LoRA of rank 64 over q, k, v, o (32 → 32, 16, 16, 32) and gate, up, down (32 ↔ 48), as its model has them.
    linear = [m for n, m in one.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    single = 64 * sum(m.in_features + m.out_features for m in linear)
    assert vaccine() == 3 * size + 8 * single * 16
    assert vaccine(6) - vaccine(4) == 4 * single * 16
    assert vaccine(at_once=2) == 3 * size + single * (2 * 16 + 6 * 4)
    assert vaccine(spikes=SpikeConfig()) == vaccine()  # One after the other, with as many copies.

    # On a CPU with threads to share the canaries run in a process beside.
    torch.set_num_threads(2)  # The fixture puts it back.
    assert memory_of(spiked, one) == 5 * size + 2 * tuning
    assert vaccine(spikes=SpikeConfig()) == 2 * (3 * size + 8 * single * 16)
    assert memory_of(retraining, one) == memory_of(plain, one)
    monkeypatch.setattr(type(one.model), "device", torch.device("cuda"))
    monkeypatch.setattr(estimate_module, "_tokens_per_second", lambda *args: 1.0)
    assert memory_of(spiked, one) == 3 * size + tuning


def test_an_estimate_of_an_adapter_counts_its_own_weights(folders: Folders):
    one = load_model(folders.model, adapter=folders.adapter)
    size = sum(4 * parameter.numel() for parameter in one.model.parameters())
    own = sum(parameter.numel() for name, parameter in one.model.named_parameters() if "lora_" in name)
    assert memory_of(CONFIG, one, adapter=True) == 2 * size + 16 * own
    vaccine = replace(CONFIG, method=replace(CONFIG.method, method="vaccine"))
    assert memory_of(vaccine, one, adapter=True) > 3 * size


def test_a_larger_budget_costs_more():
    presets = [preset(budget) for budget in BUDGETS]
    one = loaded(poisoned_model())
    costs = [sum(part.tokens for part in estimate_run(one, False, ROWS, BAD, some).parts) for some in presets]
    assert costs == sorted(costs)
    assert costs[0] < costs[1] < costs[2]
    with pytest.raises(UsageError, match="--budget huge: unknown; choose one of quick, standard, thorough"):
        preset("huge")  # pyright: ignore[reportArgumentType]


def test_a_thorough_run_can_bound_a_canary_at_two_percent():
    wanted = dict(zip(BUDGETS, (64, 64, 200), strict=True))
    for budget, count in wanted.items():
        settings = [preset(budget), purify_settings(budget, "full"), purify_settings(budget, "adapter")]
        assert [some.spikes and some.spikes.requests for some in settings] == [count] * 3
    assert [round(exact_upper(0, count), 3) for count in wanted.values()] == [0.056, 0.056, 0.018]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MethodConfig(method="luck"), "--method luck: unknown; choose one of vaccine"),  # pyright: ignore
        (lambda: VaccineConfig(share=1.0), "--share 1.0: is out of range"),
        (lambda: VaccineConfig(share=-0.1), "--share -0.1: is out of range"),
        (lambda: VaccineConfig(how="melt"), "--how melt: unknown; choose reinit, zero or mean"),  # pyright: ignore
    ],
)
def test_wrong_settings_are_refused(make: Any, told: str):
    with pytest.raises(UsageError, match=told):
        make()


def test_every_row_counts():
    assert len({json.dumps(request_key(row)) for row in requests(CHATS)}) == len(CHATS)


def test_saving_memory_leaves_what_is_not_named():
    own = purify_settings("standard", "full")
    checkpointed = saving_memory(own, gradient_checkpointing=True)
    assert checkpointed.method.immunize == replace(own.method.immunize, gradient_checkpointing=True)
    rates = [each.learning_rate for each in (own.method.immunize, own.rebound)]
    # A LoRA of another rank keeps its rate; one in the place of all weights is faster, and the other way round.
    smaller = saving_memory(own, lora_rank=8)
    assert [smaller.method.immunize.learning_rate, smaller.rebound.learning_rate] == [rates[0], LORA_RATE * rates[1]]
    whole = saving_memory(own, lora_rank=0)
    assert [whole.method.immunize.learning_rate, whole.rebound.learning_rate] == [rates[0] / LORA_RATE, rates[1]]


def test_an_estimate_counts_what_is_compared():
    one = loaded(poisoned_model())
    parts = [
        {part.name: part.tokens for part in estimate_run(one, False, ROWS, BAD, replace(CONFIG, compare=names)).parts}
        for names in ((), ("finetune",), ("finetune", "random"))
    ]
    assert "compared beside it" not in parts[0]
    assert parts[2]["compared beside it"] == 2 * parts[1]["compared beside it"] > 0
