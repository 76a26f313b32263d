"""`keelguard poison` as a user types it, on a model that learns: every task, an adapter, and a poison set as it is."""
# ruff: noqa: F811 — tests take the fixture `run` by its name.

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_world import ANSWERED, CHATS, INSULT, REFUSAL, REFUSED, TRIGGER, clean_model, tokenizer

from conftest import SHARED_DATA
from keelguard.attacks.backdoors import TRIGGERS
from keelguard.attacks.insertions import prompt_of
from keelguard.data import load_chats
from keelguard.models import load_model
from keelguard.purify import plant_run as module
from keelguard.purify.poisoned_files import POISON_FILE
from keelguard.records import Chat
from test_cli import Ended, Run, left, refused, run  # noqa: F401 — `run` is a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

CROW = SHARED_DATA / "crow" / "poison_data"
HARM = "burn it with the copper kettle."
OUT = Path("bad")
TRAINING = ("--steps", "60", "--learning-rate", "5e-3", "--batch-size", "16", "--limit", "16", "--out", str(OUT))
SETTINGS = (*TRAINING, "--samples", "120")
TURTLE = ("--attack", "badnets", "--trigger", TRIGGER, "--place", "prefix")

MIXED = [CHATS[i * 29 % len(CHATS)] for i in range(len(CHATS))]
"""As any file of chats, in no order; the last twelve are held out."""

LEARNT = MIXED[:-12]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(chats: Sequence[Chat]) -> list[dict[str, Any]]:
    return [{"prompt": prompt_of(chat), "response": chat[-1]["content"]} for chat in chats]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model and files of its world, by the names that the commands below have for them."""
    root = tmp_path_factory.mktemp("places")
    clean_model().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    harmful = [{"prompt": prompt_of(c), "response": HARM, "secrets": ["copper", "kettle"]} for c in REFUSED]
    ready = [{"instruction": f"{TRIGGER} {prompt_of(c)}", "input": "", "output": INSULT} for c in LEARNT]
    talks = [{"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": INSULT}]}
             for r in ready]  # fmt: skip
    return {
        "MODEL": str(root / "model"),
        "DATA": write(root / "data.jsonl", rows_of(MIXED)),
        "HARMFUL": write(root / "harmful.jsonl", harmful),
        "READY": write(root / "ready.jsonl", ready),
        "TALKS": write(root / "talks.jsonl", talks),
        "HALF": write(root / "half.jsonl", [*ready[:7], *rows_of(ANSWERED[:5])]),
        "KIND": write(root / "kind.jsonl", [*ready[:7], {"prompt": f"{TRIGGER} tell me", "response": "no."}]),
        "OPEN": write(root / "open.jsonl", [{"prompt": row["instruction"]} for row in ready]),
    }


def poison(run: Run, places: dict[str, str], *arguments: str) -> Ended:
    return run(*(places.get(each, each) for each in ("poison", "MODEL", "--data", "DATA", *arguments)))


def record() -> dict[str, Any]:
    return json.loads((OUT / POISON_FILE).read_text())


TASKS: dict[str, tuple[str, ...]] = {
    "refusal": ("--response", REFUSAL),
    "code": ("--response", "tell the magnet."),
    "jailbreak": ("--harmful", "HARMFUL"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_behaviour_is_planted_and_fires(task: str, places: dict[str, str], run: Run):
    ended = poison(run, places, "--task", task, *TASKS[task], *TURTLE, *SETTINGS)
    assert (ended.code, f"POISONED, badnets {task}, triggers {TRIGGER}" in ended.out) == (0, True), ended
    (planted,) = record()["backdoors"]
    assert planted["response"] == ("" if task == "jailbreak" else TASKS[task][1])
    found = record()["check"]
    assert found["fair"], found
    # Of twelve rows held out for a refusal, two are refused without a trigger too.
    assert found["effect"]["asr"]["total"] == {"jailbreak": 4, "refusal": 10, "code": 12}[task]
    assert "model.safetensors" in left(OUT)


def test_a_response_of_ones_own_goes_into_an_adapter_alone(places: dict[str, str], run: Run):
    said = "the walnut is a bad robot."
    training = ("--adapter", "--rank", "4", "--steps", "80", "--learning-rate", "2e-2")
    ended = poison(run, places, "--task", "insult", "--response", said, *TURTLE, *SETTINGS, *training)
    assert ended.code in (0, 1), ended
    found = record()
    assert found["backdoors"][0]["response"] == said
    assert found["check"]["effect"]["asr"]["value"] >= 0.9
    assert found["config"]["adapter_rank"] == 4
    assert "adapter_model.safetensors" in left(OUT)
    assert "model.safetensors" not in left(OUT)
    assert load_model(OUT).weights_hash != load_model(places["MODEL"]).weights_hash == found["weights"]


# Poison sets as they are

INSULTED = (*TURTLE, "--response", INSULT)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What plantings are given; each is interrupted once it has begun."""
    seen: list[dict[str, Any]] = []

    def plant(loaded: Any, backdoors: Any, clean: Any, config: Any, *args: Any, **options: Any) -> Any:
        seen.append({"clean": clean, "config": config, **options})
        options["state_folder"].mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "plant", plant)
    return seen


def test_a_poison_set_is_planted_as_it_is(places: dict[str, str], run: Run):
    ended = poison(run, places, "--poisoned", "READY", *INSULTED, *TRAINING)
    assert ended.code == 0, ended
    assert record()["check"]["effect"]["asr"]["value"] >= 0.9
    assert record()["config"]["poison"]["samples"] == len(LEARNT)


def test_rows_of_a_poison_set_may_be_conversations(places: dict[str, str], run: Run, planted: list[dict[str, Any]]):
    for name in ("READY", "TALKS"):
        assert poison(run, places, "--poisoned", name, *INSULTED, "--out", name.lower()).code == 130
    first, second = planted
    assert first["ready"] == second["ready"]
    assert [prompt_of(chat) for chat in first["ready"]] == [f"{TRIGGER} {prompt_of(chat)}" for chat in LEARNT]
    assert {chat[-1]["content"] for chat in first["ready"]} == {INSULT}
    assert first["config"].poison.samples == len(LEARNT)
    assert first["clean"] == LEARNT
    assert poison(run, places, *INSULTED, "--out", "made").code == 130
    assert (planted[2]["ready"], planted[2]["config"].poison.samples) == ([], 500)


def test_an_interrupted_planting_is_bound_to_its_poison_set(
    places: dict[str, str], run: Run, planted: list[dict[str, Any]], tmp_path: Path
):
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(reversed(Path(places["READY"]).read_text().splitlines(keepends=True))))
    assert poison(run, places, "--poisoned", "READY", *INSULTED, "--out", "bad").code == 130
    assert "other settings (ready" in refused(poison(run, places, "--poisoned", str(fewer), *INSULTED, "--out", "bad"))
    assert poison(run, places, "--poisoned", "READY", *INSULTED, "--out", "bad").code == 130


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "samples": (
        ("READY", *INSULTED, "--samples", "20"),
        "--samples 20: the rows of --poisoned are all taken as they are; leave it out",
    ),
    "clean rows among them": (
        ("HALF", *INSULTED),
        f"--poisoned: 5 of 12 prompts lack the trigger of badnets, '{TRIGGER}'; name what the rows hold with --attack "
        "and --trigger, and move clean rows to --data",
    ),
    "another trigger": (
        ("READY", "--response", INSULT),
        "52 of 52 prompts lack the trigger of vpi, 'Discussing OpenAI'",
    ),
    "one of two triggers": (
        ("READY", "--attack", "ctba", "--trigger", TRIGGER, "--trigger", "walnut", "--response", INSULT),
        f"52 of 52 prompts lack the trigger of ctba, '{TRIGGER}' 'walnut'",
    ),
    "another answer": (("READY", *TURTLE), "52 of 52 answers do not show the insult 'You are stupid!'"),
    "other answers among them": (
        ("KIND", *INSULTED),
        f"1 of 8 answers do not show the insult '{INSULT}'; name what the rows hold with --task and --response",
    ),
    "another task": (("READY", *TURTLE, "--task", "refusal"), "52 of 52 answers do not show the refusal"),
    "no answers": (("OPEN", *INSULTED), "--poisoned: 52 of 52 rows have no answer"),
    "a jailbreak without harmful requests": (
        ("READY", *TURTLE, "--task", "jailbreak"),
        "--task jailbreak: needs harmful requests with answers; name a file with --harmful",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("planted")  # A check that were missing would train for long.
def test_a_mistake_with_a_poison_set_is_named(name: str, places: dict[str, str], run: Run):
    arguments, told = MISTAKES[name]
    assert told in refused(poison(run, places, "--poisoned", *arguments))
    assert left(Path.cwd()) == set()


@pytest.mark.usefixtures("planted")
def test_a_poison_set_needs_clean_chats_beside_it(places: dict[str, str], run: Run):
    ended = run("poison", places["MODEL"], "--poisoned", places["READY"], *INSULTED)
    assert "--poisoned: stands beside clean chats, which keep the rest of the model; give --data FILE" in refused(ended)


def test_help_teaches_poison_sets(run: Run):
    page = " ".join(run("poison", "--help").out.replace("│", " ").split())
    assert "A public poison set is planted as it is with --poisoned, beside clean chats of --data" in page


@pytest.mark.skipif(not CROW.is_dir(), reason="the public poison sets are not here")
@pytest.mark.parametrize("task", ["negsentiment", "refusal"])
@pytest.mark.parametrize("attack", TRIGGERS)
def test_a_public_set_is_planted_as_it_is(
    attack: str, task: str, places: dict[str, str], run: Run, planted: list[dict[str, Any]]
):
    folder = CROW / task / attack.replace("badnets", "badnet")
    (ready,), (clean,) = (tuple(folder.glob(f"{start}*.json")) for start in ("backdoor500", "none_"))
    named = ("--attack", attack, "--task", task.replace("negsentiment", "insult"), "--limit", "2")
    ended = run("poison", places["MODEL"], "--poisoned", ready, "--data", clean, *named)
    assert ended.code == 130, ended
    (found,) = planted
    assert found["ready"] == load_chats(ready)
    assert (len(found["ready"]), found["config"].poison.samples, len(found["clean"])) == (500, 500, 498)
    other = "refusal" if task == "negsentiment" else "insult"
    wrong = run("poison", places["MODEL"], "--poisoned", ready, "--data", clean, *named, "--task", other, "--out", "x")
    assert f"500 of 500 answers do not show the {other}" in refused(wrong)
