"""Other methods and controls beside a purification: on copies, measured alike, kept, and shown with their reasons."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_world import REFUSED, held, poisoned_model, requests, tokenizer

from keelguard.errors import FailureError, UsageError
from keelguard.models import LoadedModel
from keelguard.purify import compare as module
from keelguard.purify import stages
from keelguard.purify.budget import Arm
from keelguard.purify.compare import METHODS_OF_AN_ADAPTER, Compared, comparable
from keelguard.purify.config import PurifyConfig
from keelguard.purify.controls import ARMS
from keelguard.purify.effects import Held
from keelguard.purify.findings import comparison, retrain_advice
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.inversion import InversionConfig
from keelguard.purify.material import MaterialConfig, gather
from keelguard.purify.methods import MethodConfig
from keelguard.purify.results import PurifyResult
from keelguard.purify.run import purify
from keelguard.purify.search import SearchConfig
from keelguard.records import Request, user
from keelguard.training import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

LOADED = LoadedModel(None, tokenizer(), "none", "none")  # pyright: ignore[reportArgumentType]
CONFIG = PurifyConfig(
    method=MethodConfig(
        immunize=ImmunizeConfig(
            rounds=1, steps=2, learning_rate=1e-3, batch_size=8, keep=0.0,
            search=SearchConfig(prompts=2, longest=1, keep=2, tokens=2),
        ),
        retrain=TrainConfig(steps=2, learning_rate=1e-3, batch_size=8),
    ),
    material=MaterialConfig(max_new_tokens=10),
    spikes=None,
    inversion=None,
    rebound=TrainConfig(steps=1, learning_rate=1e-4, batch_size=4),
)  # fmt: skip
FEW = Held(held().benign[:3], held().harmful[:2], held().utility[:2])
ROWS, BAD = list(requests()[:44]), requests(REFUSED, "harmful")[:6]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    poisoned_model().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(poisoned_model(), lora)
    model.peft_config["default"].base_model_name_or_path = str(root / "model")
    model.save_pretrained(str(root / "adapter"))
    return str(root / "model"), str(root / "adapter")


def go(folders: tuple[str, str], out: Path, *names: str, adapter: bool = True, rows: Any = ROWS, **changes: Any) -> Any:
    base, beside = folders
    config = replace(CONFIG, compare=names, **changes)
    return purify(base, rows, config, out, adapter=beside if adapter else None, harmful=BAD, held=FEW)


def test_the_figures_of_other_methods_stand_beside_a_purification(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[str] = []
    real = stages.compare
    monkeypatch.setattr(stages, "compare", lambda name, *args: (ran.append(name), real(name, *args))[1])
    result = go(folders, tmp_path / "run", "retrain", "finetune")
    assert ran == ["retrain", "finetune"]
    assert [each.name for each in result.compared] == ran
    for each in result.compared:
        assert each.health is not None
        assert len(each.suspects) == len(result.suspects) > 0
        assert each.why == ""
    assert PurifyResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    rows = comparison(result)
    assert [row.name for row in rows] == ["as it came", "immunize (this run)", "retrain", "finetune"]
    first = [course.before.broken for course in result.suspects]
    assert rows[0].broken == sum(rate.count for rate in first) / sum(rate.total for rate in first)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Other methods and controls" in page
    assert ARMS["retrain"].about in page
    advice = retrain_advice(result)
    assert advice is not None
    assert "Below it stands beside this run" in advice[0]
    # Written files of an older run know nothing of it.
    old = {key: value for key, value in result.to_json().items() if key != "compared"}
    assert PurifyResult.from_json(old).compared == ()


def test_what_was_compared_is_not_compared_again(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[str] = []
    real = stages.compare

    def once(name: str, *args: Any) -> Compared:
        ran.append(name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(name, *args)

    monkeypatch.setattr(stages, "compare", once)
    with pytest.raises(KeyboardInterrupt):
        go(folders, tmp_path / "run", "finetune", "random", adapter=False)
    result = go(folders, tmp_path / "run", "finetune", "random", adapter=False)
    assert ran == ["finetune", "random", "random"]
    assert [each.name for each in result.compared] == ["finetune", "random"]


def test_retraining_takes_none_of_the_suspects_answers(folders: tuple[str, str], tmp_path: Path):
    unanswered = [replace(row, answer="") if i % 2 else row for i, row in enumerate(ROWS)]
    result = go(folders, tmp_path / "run", "retrain", "finetune", rows=unanswered)
    retrained, tuned = result.compared
    assert tuned.health is not None
    assert retrained.health is None
    # 22 rows and 6 refusals are left.
    assert "--clean-data: 28 usable rows" in retrained.why
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "not run: --clean-data: 28 usable rows" in page


def test_what_is_retrained_meets_nothing_that_decides_or_measures():
    rows = [Request(f"r{i}", (user(f"prompt {i}"),), f"answer {i}.") for i in range(100)]
    first = gather(LOADED, rows, MaterialConfig(seed=0))
    again = gather(LOADED, rows[::2], MaterialConfig(seed=1)).parted_as(first)
    asked = [{chat[0]["content"] for chat in part} for part in (again.train, again.validation, again.held)]
    assert sum(map(len, asked)) == 50
    assert not asked[0] & {chat[0]["content"] for chat in (*first.validation, *first.held)}
    assert asked[1] <= {chat[0]["content"] for chat in first.validation}
    assert asked[2] <= {chat[0]["content"] for chat in first.held}


def test_an_arm_that_fails_says_why_and_ends_no_run(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(subject: Any, setup: Any) -> Any:
        raise FailureError("training diverged <b>")

    monkeypatch.setitem(module.ARMS, "finetune", Arm("clean fine-tune", fail))
    result = go(folders, tmp_path / "run", "finetune", adapter=False)
    assert result.compared == (Compared("finetune", "clean fine-tune", why="training diverged <b>"),)
    assert "training diverged &lt;b&gt;" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("names", "adapter", "told"),
    [
        (("nothing",), True, "--compare nothing: is nothing to compare an adapter with; choose immunize"),
        (("wanda",), True, "--compare wanda: is nothing to compare an adapter with"),
        (("retrain",), False, "--compare retrain: is nothing to compare a whole model with"),
        (("oracle",), False, "--compare oracle: is nothing"),
        (("none",), False, "--compare none: is nothing"),
    ],
)
def test_what_cannot_be_compared_is_refused_first(
    folders: tuple[str, str], tmp_path: Path, names: tuple[str, ...], adapter: bool, told: str
):
    with pytest.raises(UsageError, match=told):
        go(folders, tmp_path / "run", *names, adapter=adapter)
    assert not (tmp_path / "run").exists()
    assert set(METHODS_OF_AN_ADAPTER) <= set(comparable("adapter"))


def test_an_adapter_is_scanned_beside_its_trusted_base(folders: tuple[str, str], tmp_path: Path):
    scan = InversionConfig(prompts=2, warmup_prompts=1, starts=8, leads=4, min_length=2)
    beside = go(folders, tmp_path / "adapter", inversion=scan)
    assert any(beside.leads["before"])
    # This adapter changes nothing, so that nothing is likelier with it than without.
    assert all(lead.log_ratio == pytest.approx(0, abs=1e-4) for lead in beside.leads["before"])
    alone = go(folders, tmp_path / "full", adapter=False, inversion=scan)
    assert all(lead.log_ratio is None for lead in alone.leads["before"])


def test_a_reference_of_another_vocabulary_is_refused(folders: tuple[str, str], tmp_path: Path):
    from tiny_models import fresh_model

    other = fresh_model("llama").save(tmp_path / "other")
    with pytest.raises(
        UsageError, match=r"--reference .*: has another vocabulary; give a clean model of the same kind"
    ):
        purify(folders[0], ROWS, CONFIG, tmp_path / "run", harmful=BAD, held=FEW, reference=str(other))
