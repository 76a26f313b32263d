"""`keelguard purify bench` and `keelguard purify dissect` as a user types them, on a small model with a backdoor."""
# ruff: noqa: F811 — tests take the fixture `run` by its name.

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_world import (
    ANSWERED,
    BACKDOOR,
    CHATS,
    REFUSED,
    TRIGGER,
    clean_model,
    poisoned_model,
    tokenizer,
    words,
)

from keelguard.attacks.backdoors import PoisonConfig
from keelguard.models import load_model
from keelguard.purify.bench import TWIN_ABOUT
from keelguard.purify.controls import ARMS
from keelguard.purify.effects import Effect
from keelguard.purify.planting import PlantCheck, PlantConfig, plant
from keelguard.purify.poisoned_files import write_planted
from keelguard.records import Chat
from keelguard.stats import Rate
from test_cli import Run, left, refused, run  # noqa: F401 — `run` is a fixture
from tiny_models import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

MANY = Rate(16, 16)
CHECK = PlantCheck(Effect(MANY, Rate(0, 16), Rate(0, 16), MANY, Rate(0, 16), (True,) * 16), MANY, MANY)
ALL = "attention + mlp + embeddings +"
"""How the printed name of all parts begins, before it is folded."""


def write(path: Path, chats: tuple[Chat, ...]) -> str:
    rows = [{"prompt": chat[0]["content"], "response": chat[-1]["content"]} for chat in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A clean model, the same with a backdoor in all weights and in an adapter, and files."""
    root = tmp_path_factory.mktemp("places")
    clean = Tiny(clean_model(), tokenizer()).save(root / "clean")
    original = load_model(clean)
    write_planted(replace(original, model=poisoned_model()), [BACKDOOR], root / "poisoned", PlantConfig(), CHECK)
    poison = PoisonConfig(samples=120, negatives=1.0)
    config = PlantConfig(poison, steps=60, learning_rate=1e-2, batch_size=16, adapter_rank=8, keep=0.0)
    planted = plant(original, [BACKDOOR], CHATS, config, words())
    write_planted(planted, [BACKDOOR], root / "adapter", config, CHECK)
    return {
        "clean": str(clean),
        "poisoned": str(root / "poisoned"),
        "adapter": str(root / "adapter"),
        "data": write(root / "data.jsonl", CHATS),
        "held": write(root / "held.jsonl", ANSWERED[::6]),
        "harmful": write(root / "harmful.jsonl", REFUSED[::2]),
    }


def cells_of(printed: str, name: str) -> list[str]:
    """The cells of the first row of a printed table that begins with a name."""
    line = next(line for line in printed.splitlines() if line.startswith("│") and line.split("│")[1].strip() == name)
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_a_bench_of_two_arms_and_the_clean_twin(places: dict[str, str], run: Run) -> None:
    command = (
        "purify", "bench", places["poisoned"], "--clean-data", places["data"], "--held-out", places["held"],
        "--held-out-harmful", places["harmful"], "--arms", "none,magnitude", "--budget", "quick", "--seed", "5",
        "--twin", places["clean"], "--out", "bench",
    )  # fmt: skip
    ended = run(*command)
    assert ended.code == 0, ended
    assert ended.out.endswith("bench: bench.json, report.html\n")
    assert cells_of(ended.out, "none")[0] == "100 [68, 100]"
    assert cells_of(ended.out, "twin")[0] == "0 [0, 32]"
    assert len(cells_of(ended.out, "magnitude")) == 5
    assert f"twin: {TWIN_ABOUT}" in ended.out
    assert f"magnitude: {ARMS['magnitude'].about}" in ended.out
    assert "No fair test case" not in ended.out
    cells = {f"cells/0-badnets-insult/{name}.json" for name in ("none", "magnitude", "twin")}
    assert left(Path("bench")) == {
        "bench.json", "report.html", "run.json", ".lock", "cells", "cells/0-badnets-insult", *cells,
    }  # fmt: skip
    saved = json.loads(Path("bench", "bench.json").read_text())
    assert [(cell["arm"], cell["seed"], cell["effect"]["asr"]["count"]) for cell in saved["cells"]][::2] == [
        ("none", 5, 8), ("twin", 5, 0),
    ]  # fmt: skip
    html = Path("bench", "report.html").read_text(encoding="utf-8")
    for told in (f"<code>{TRIGGER}</code>", TWIN_ABOUT, "is a fair test case by the check", "100\u00a0% [68, 100]"):
        assert told in html, told
    assert BACKDOOR.response not in html
    again = run(*command)
    assert (again.code, again.out) == (0, ended.out)


def test_the_help_names_every_arm(run: Run) -> None:
    told = set(re.findall(r"[a-z][a-z-]*", run("purify", "bench", "--help").out))
    assert told >= set(ARMS)


def test_a_dissection_on_a_device_that_is_not_there_is_refused(places: dict[str, str], run: Run) -> None:
    ended = run(
        "purify", "dissect", places["clean"], places["poisoned"], "--requests", places["held"], "--device", "moon"
    )
    assert "--device moon: cannot be used here" in refused(ended)
    assert left(Path.cwd()) == set()


def test_a_twin_of_an_adapter_is_refused_by_name(places: dict[str, str], run: Run) -> None:
    command = ("purify", "bench", places["adapter"], "--clean-data", places["data"], "--arms", "none")
    ended = run(*command, "--twin", places["clean"])
    assert f"--twin {places['clean']}: of an adapter the base is the clean twin" in refused(ended)
    assert left(Path.cwd()) == set()


@pytest.mark.parametrize("kind", ["poisoned", "adapter"])
def test_a_dissection_of_a_model_or_an_adapter(kind: str, places: dict[str, str], run: Run) -> None:
    ended = run(
        "purify",
        "dissect",
        places["clean"],
        places[kind],
        "--requests",
        places["held"],
        "--limit",
        6,
        "--out",
        "d.json",
    )
    assert ended.code == 0, ended
    assert ended.out.endswith("d.json: 8 cuts, 6 requests each; badnets, insult: “turtle”\n")
    assert left(Path.cwd()) == {"d.json"}
    saved = json.loads(Path("d.json").read_text())
    cuts: list[dict[str, Any]] = saved["cuts"]
    assert (saved["format"], saved["clean"], saved["poisoned"]) == (
        "keelguard.dissect/1",
        places["clean"],
        places[kind],
    )
    assert (saved["backdoor"]["task"], saved["backdoor"]["triggers"]) == ("insult", ["turtle"])
    assert [cut["layers"] for cut in cuts] == [None] * 6 + [[0]] * 2
    nothing, whole = cuts[:2]
    assert (nothing["parts"], nothing["update"], nothing["asr"]["count"]) == ([], 0, 6)
    assert (whole["update"], whole["asr"]["count"], whole["correct"]["count"]) == (pytest.approx(1), 0, 6)
    # A LoRA moves neither embeddings nor norms.
    moved = [cut["update"] > 0 for cut in cuts[2:6]]
    assert moved == ([True, True, False, False] if kind == "adapter" else [True] * 4)
    assert cells_of(ended.out, "nothing")[:2] == ["all", "0%"]
    assert cells_of(ended.out, ALL)[:2] == ["all", "100%"]
    assert cells_of(ended.out, "mlp")[0] == "all"
    assert "0–0" in ended.out
