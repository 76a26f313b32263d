"""`keelguard poison` in a folder: it goes on where it was, a refused run leaves nothing, and the model replaces it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_world import BACKDOOR, CHATS, REFUSAL, clean_model, held, requests, tokenizer

from keelguard.attacks.backdoors import Backdoor, PoisonConfig
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating
from keelguard.hashes import hash_weights
from keelguard.progress import SILENT
from keelguard.purify import plant_run as module
from keelguard.purify.plant_run import PoisonData, check_free, poison_model
from keelguard.purify.planting import PlantConfig
from keelguard.purify.poisoned_files import POISON_FILE
from keelguard.records import Request
from keelguard.runs import LOCK, MANIFEST
from keelguard.training_loop import ChatTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = Generating(max_new_tokens=10)
CONFIG = PlantConfig(poison=PoisonConfig(samples=16), steps=6, learning_rate=5e-3, batch_size=8)
FEW = replace(held(), benign=held().benign[:3], harmful=held().harmful[:2], utility=held().utility[:2])
DATA = PoisonData(CHATS, FEW, own=True)
JAILBREAK = Backdoor("vpi", "jailbreak", ("velvet needle",))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clean"
    clean_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def go(model: Path, out: Path, backdoor: Backdoor = BACKDOOR, data: PoisonData = DATA, **options: Any) -> Any:
    config = options.pop("config", CONFIG)
    return poison_model(str(model), backdoor, data, config, out, generating=SHORT, save_every=2, **options)


def refused_requests() -> list[Request]:
    chats = [chat for chat in CHATS if chat[-1]["content"] == REFUSAL]
    return [replace(each, answer="push it.") for each in requests(tuple(chats), "harmful")]


@pytest.mark.parametrize("rank", [0, 2])
def test_an_interrupted_run_goes_on_and_ends_bit_equal(
    rank: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(CONFIG, adapter_rank=rank)
    check = go(model, tmp_path / "whole", config=config, files={"recipe.json": "{}"})
    step, seen = ChatTrainer.training_step, []

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(self.state.global_step)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(ChatTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        go(model, tmp_path / "cut", config=config)
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {MANIFEST, LOCK, "work"}
    with pytest.raises(UsageError, match=r"belongs to a run with other settings \(backdoor"):
        go(model, tmp_path / "cut", Backdoor("badnets", "insult", ("zipper",)), config=config)
    assert go(model, tmp_path / "cut", config=config, files={"recipe.json": "{}"}) == check
    assert seen == [0, 1, 2, 3, 4, 5, 4, 5]
    folders = [(str(model), tmp_path / name) if rank else (tmp_path / name,) for name in ("whole", "cut")]
    assert hash_weights(*folders[0]) == hash_weights(*folders[1])
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "cut")]
    assert names[0] == names[1] >= {POISON_FILE, "README.md", "recipe.json"}
    assert not names[0] & {MANIFEST, LOCK, "work"}
    with pytest.raises(UsageError, match="exists and is not empty, and a poisoned model overwrites nothing"):
        go(model, tmp_path / "cut", config=config)


def test_what_the_model_refused_is_not_asked_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked, pairs = [], module.refused_pairs

    def counted(*args: Any) -> Any:
        asked.append(1)
        return pairs(*args)

    def stop(*args: Any, **options: Any) -> Any:
        assert list(options["harmful"]) == pairs(args[0], refused_requests()[4:], SHORT)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "refused_pairs", counted)
    monkeypatch.setattr(module, "plant", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            go(model, tmp_path / "bad", JAILBREAK, replace(DATA, harmful=refused_requests()[4:]))
    assert asked == [1]


def test_a_refused_run_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nothing = replace(DATA, held=replace(FEW, harmful=()))
    for told, backdoor, data in (
        ("--task jailbreak: needs harmful requests with answers; name a file", JAILBREAK, nothing),
        ("--task jailbreak: no harmful requests are left", JAILBREAK, replace(nothing, harmful=refused_requests())),
        ("--task insult: no harmless requests are left", BACKDOOR, replace(DATA, held=replace(FEW, benign=()))),
        ("--harmful: the model refuses none", JAILBREAK, replace(DATA, harmful=requests()[:3])),
        ("no clean chats", BACKDOOR, replace(DATA, clean=())),
        ("no clean chats", JAILBREAK, replace(DATA, clean=(), harmful=refused_requests())),
    ):
        with pytest.raises(UsageError, match=told):
            go(model, tmp_path / "bad", backdoor, data)
        assert not list(tmp_path.iterdir()), told
    monkeypatch.setattr(module, "vocabulary_words", lambda tokenizer: ["turtle"])
    with pytest.raises(UsageError, match="finds 1 whole words in its tokenizer, too few"):
        go(model, tmp_path / "bad")
    assert not list(tmp_path.iterdir())


def test_a_run_without_tasks_says_that_utility_is_not_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    notes: list[str] = []
    monkeypatch.setattr(SILENT, "note", notes.append)
    for name, data, told in (
        ("own", DATA, False),
        ("tasks", replace(DATA, own=False), False),
        ("none", replace(DATA, own=False, held=replace(FEW, utility=())), True),
    ):
        notes.clear()
        found = go(model, tmp_path / name, data=data, config=replace(CONFIG, steps=1))
        assert any("utility is not measured" in note for note in notes) == told
        assert any("utility was not measured" in reason for reason in found.why) == told
    assert "no fair test case: " in (tmp_path / "none" / "README.md").read_text()
    assert "utility was not measured" in (tmp_path / "none" / "README.md").read_text()


def test_a_folder_is_free_while_it_holds_a_run_or_nothing(tmp_path: Path):
    check_free(tmp_path / "new")
    check_free(tmp_path)
    (tmp_path / LOCK).touch()
    check_free(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(UsageError, match="exists and is not empty"):
        check_free(tmp_path)
    (tmp_path / MANIFEST).write_text('{"command": "purify", "settings": {}}')
    check_free(tmp_path)
