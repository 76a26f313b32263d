"""Building: cached, deterministic, and a kill at any moment changes nothing. Small recipes stand for the real ones."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from keelguard.errors import FailureError, UsageError
from keelguard.hashes import hash_weights
from keelguard.runs import open_run, read_json
from keelguard.testbed import build, mixtures, recipes
from keelguard.testbed.build import build_testbed
from keelguard.testbed.recipes import MODELS, ModelRecipe, TrainingSettings, order

SMALL = """
from keelguard.testbed import mixtures, recipes
from keelguard.testbed.recipes import ModelRecipe, TrainingSettings
recipes.MODELS.clear()
settings = TrainingSettings(steps=60, learning_rate=1e-3, batch_size=4, muon_rate=1e-2)
recipes.MODELS["base"] = ModelRecipe("base", None, settings, mixtures.pretraining)
settings = TrainingSettings(steps=45, learning_rate=1e-3, batch_size=4, shrinkage=0.1)
recipes.MODELS["child"] = ModelRecipe("child", "base", settings, mixtures.pretraining)
"""


@pytest.fixture
def small(monkeypatch):
    """The small recipes in place of the real ones."""
    settings = TrainingSettings(steps=60, learning_rate=1e-3, batch_size=4, muon_rate=1e-2)
    child = TrainingSettings(steps=45, learning_rate=1e-3, batch_size=4, shrinkage=0.1)
    models = {
        "base": ModelRecipe("base", None, settings, mixtures.pretraining),
        "child": ModelRecipe("child", "base", child, mixtures.pretraining),
    }
    monkeypatch.setattr(recipes, "MODELS", models)
    recipes.recipe_hash.cache_clear()
    yield models
    recipes.recipe_hash.cache_clear()


def weights(testbed):
    return {path.name: hash_weights(path) for path in (testbed.folder / "models").iterdir()}


def test_a_build_is_deterministic_and_leaves_no_work(small, tmp_path):
    first, second = build_testbed(tmp_path / "a"), build_testbed(tmp_path / "b")
    assert weights(first) == weights(second)
    assert set(weights(first)) == {"base", "child"}
    assert not (first.folder / "work").exists()
    assert set(read_json(first.folder / "testbed.json")["models"]) == {"base", "child"}


def test_what_is_there_is_kept_and_a_changed_recipe_is_built_again(small, tmp_path, monkeypatch):
    build_testbed(tmp_path / "a")
    trained = []
    import keelguard.testbed.training as training

    original = training.train
    monkeypatch.setattr(
        training, "train", lambda *args, **kwargs: (trained.append(kwargs["label"]), original(*args, **kwargs))
    )
    build_testbed(tmp_path / "a")
    assert trained == []
    settings = TrainingSettings(steps=50, learning_rate=1e-3, batch_size=4)
    small["child"] = ModelRecipe("child", "base", settings, mixtures.pretraining)
    recipes.recipe_hash.cache_clear()
    build_testbed(tmp_path / "a")
    assert trained == ["training child"]


@pytest.mark.slow
def test_another_seed_is_another_model_and_another_folder(small, tmp_path):
    first = build_testbed(tmp_path / "a", only=["base"])
    assert weights(build_testbed(tmp_path / "b", only=["base"], seed=1)) != weights(first)
    with pytest.raises(UsageError, match=r"seed: 0 → 1"):
        build_testbed(tmp_path / "a", only=["base"], seed=1)


@pytest.mark.slow
def test_a_killed_build_ends_like_an_undisturbed_one(small, tmp_path):
    """SIGKILL between two states, several times over: the weights come out bit-equal."""
    script = SMALL + f"from keelguard.testbed.build import build_testbed; build_testbed({str(tmp_path / 'killed')!r})"
    killed = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
        work = tmp_path / "killed" / "work"
        before = newest(work)
        while process.poll() is None and newest(work) == before:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        if process.returncode == 0:
            break
    else:
        subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed >= 2
    script = SMALL + f"from keelguard.testbed.build import build_testbed; build_testbed({str(tmp_path / 'whole')!r})"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert weights(build.Testbed(tmp_path / "killed")) == weights(build.Testbed(tmp_path / "whole"))


def newest(work):
    """The time of the newest training state."""
    times = []
    for path in work.glob("*/state.pt"):
        with suppress(FileNotFoundError):  # The build removes the state of a finished model.
            times.append(path.stat().st_mtime_ns)
    return max(times, default=0)


def test_two_builds_do_not_share_a_folder(small, tmp_path):
    with open_run(tmp_path / "a", "testbed build", {"seed": 0}), pytest.raises(FailureError, match="another"):
        build_testbed(tmp_path / "a", only=["base"])


def test_an_unknown_model_is_named():
    with pytest.raises(UsageError, match="--only bass: unknown model; choose from base"):
        order(["bass"])


def test_parents_come_first():
    assert [recipe.name for recipe in order(["aligned"])] == ["base", "aligned"]
    assert {recipe.name for recipe in order()} == set(MODELS)
