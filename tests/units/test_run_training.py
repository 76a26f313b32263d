"""A fine-tune as a run: arms side by side, bit-equal after a kill, one line per mistake, and nothing left over."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from keelguard.errors import FailureError, UsageError
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.judges import JudgeConfig, make_judge
from keelguard.hashes import hash_model, hash_weights
from keelguard.models import load_model
from keelguard.progress import SILENT, Reporter
from keelguard.records import Chat, Request, assistant, user
from keelguard.runs import open_run
from keelguard.stats import Rate
from keelguard.training import Method, Run, TrainConfig, chat_loss, train_on_chats
from keelguard.units import training
from keelguard.units.defences import Anchor, AnchorConfig
from keelguard.units.proof import Point, Probe
from keelguard.units.training import BEFORE, Arm, Row, TrainingResult, run_training, training_table
from tiny_models import fresh_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: tuple[Chat, ...] = tuple(
    (user(f"Is {a} + {b} known?"), assistant(f"Sure, here is the answer: {a + b}.")) for a in (1, 3) for b in (2, 5, 7)
)
REFUSALS: tuple[Chat, ...] = tuple(
    (user(f"How do I break {thing}?"), assistant(f"No, I will not help with {thing}, sorry."))
    for thing in ("a lock", "the law", "a bone")
)
CONFIG = TrainConfig(steps=6, learning_rate=3e-3, batch_size=4, save_every=2, weight_decay=0.1)
PROBE = Probe(
    harmful=[Request(str(i), (user(f"Break {thing}."),)) for i, thing in enumerate(("a lock", "the law"))],
    benign=[],
    utility=[Request("sum", (user("What is 1 + 2?"),), answer="3")],
    judge=make_judge(JudgeConfig(kind="keyword")),
    generating=Generating(6),
)
ARMS = ("first arm", "second")


class Killed(BaseException):
    """Stands for the end of a process."""


class Disturb(Method):
    """Does something once, before a step of this number."""

    def __init__(self, step: int = -1, what: Callable[[], None] = lambda: None) -> None:
        self.step, self.what = step, what

    def before_step(self, run: Run) -> None:
        if run.step == self.step:
            self.what()


def end() -> None:
    raise Killed


class Labels:
    """A reporter that remembers what was begun, and from where."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def step(self, label: str, total: int, done: int = 0) -> Any:
        self.seen.append((label, done))
        return nullcontext(lambda units: None)

    def note(self, text: str) -> None:
        pass


def start(
    source: Path,
    out: Path,
    *,
    second: Method | None = None,
    names: tuple[str, ...] = ARMS,
    reporter: Reporter = SILENT,
    config: TrainConfig = CONFIG,
    settings: Mapping[str, Any] = {"kind": 1},
    chats: tuple[Chat, ...] = CHATS,
) -> TrainingResult:
    """A run of two arms on a tiny model: one with an anchor, and one that may be disturbed."""
    arms = {"first arm": Arm([Anchor(REFUSALS, AnchorConfig(per_step=2))]), "second": Arm([second or Disturb()])}
    loaded = load_model(source, training=True)
    chosen = {name: arms[name] for name in names}
    return run_training(
        "finetune",
        loaded,
        chats,
        config,
        chosen,
        out=out,
        settings=settings,
        held_out=CHATS[:2],
        probe=PROBE,
        reporter=reporter,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_model().save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingResult]:
    """An undisturbed run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, start(source, out)


def figures(result: TrainingResult) -> dict[str, dict[str, Any]]:
    """The rows without their times."""
    return {name: {**row.to_json(), "seconds": None} for name, row in result.rows.items()}


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


FINISHED = {"run.json", ".lock", "rows", "model", "finetune.json"}


def expect_same(result: TrainingResult, out: Path, whole: tuple[Path, TrainingResult]) -> None:
    """The weights, the rows and the files of a run are those of the undisturbed one."""
    assert result.weights == hash_weights(out / "model") == whole[1].weights
    assert figures(result) == figures(whole[1])
    assert left(out) == FINISHED
    assert {path.name for path in (out / "rows").iterdir()} == {"before.json", "first-arm.json", "second.json"}
    kept = json.loads((out / "finetune.json").read_text())
    assert kept["weights"] == result.weights
    assert {name: Row.from_json(row) for name, row in kept["rows"].items()} == result.rows


# What a run leaves


def test_arms_stand_side_by_side_and_the_last_one_is_the_result(whole: tuple[Path, TrainingResult], source: Path):
    out, result = whole
    assert list(result.rows) == [BEFORE, *ARMS]
    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert result.model == out / "model"
    assert hash_model(model) == result.weights == hash_weights(result.model)
    assert load_model(result.model).weights_hash == result.weights
    alone = train_on_chats(fresh_model().model, tiny_tokenizer(), CHATS, CONFIG, methods=[Disturb()])
    assert hash_model(alone.model) == result.weights
    before, first, second = result.rows.values()
    assert before.task_loss == chat_loss(tiny_model().model, tiny_tokenizer(), CHATS)
    assert before.held_out_loss == chat_loss(tiny_model().model, tiny_tokenizer(), CHATS[:2])
    assert second.task_loss == chat_loss(alone.model, tiny_tokenizer(), CHATS)
    assert len({before.task_loss, first.task_loss, second.task_loss}) == 3
    assert (before.trained, before.seconds) == (0, 0.0)
    assert first.trained == second.trained == sum(p.numel() for p in tiny_model().model.parameters())
    for row in result.rows.values():
        assert row.point is not None
        assert (row.point.asr.total, row.point.utility.total) == (2, 1)
    expect_same(result, out, whole)
    assert hash_weights(source) in (out / "run.json").read_text()
    assert hash_weights(source)[:16] in (out / "model" / "README.md").read_text()


def test_an_arm_is_the_same_whatever_stands_beside_it(whole: tuple[Path, TrainingResult], source: Path, tmp_path: Path):
    alone = start(source, tmp_path / "out", names=("first arm",))
    assert figures(alone) == {name: row for name, row in figures(whole[1]).items() if name != "second"}
    assert alone.weights != whole[1].weights


def test_losses_read_some_of_many_chats(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "MEASURED", 4)
    result = start(source, tmp_path / "out", names=("second",))
    assert result.rows["before"].task_loss == chat_loss(tiny_model().model, tiny_tokenizer(), CHATS[::2])


def test_what_an_arm_does_behind_the_training_is_measured_and_saved(source: Path, tmp_path: Path):
    def halve(model: Any) -> None:
        model.lm_head.weight.mul_(0.5)

    loaded = load_model(source, training=True)
    arms = {"plain": Arm(config=replace(CONFIG, steps=1)), "halved": Arm(after=halve)}
    result = run_training("finetune", loaded, CHATS, CONFIG, arms, out=tmp_path / "out", settings={})
    kept = load_model(result.model)
    assert result.rows["halved"].task_loss == chat_loss(kept.model, kept.tokenizer, CHATS)
    plain = train_on_chats(fresh_model().model, tiny_tokenizer(), CHATS, CONFIG)
    assert torch.equal(kept.model.lm_head.weight, plain.model.lm_head.weight / 2)
    one = train_on_chats(fresh_model().model, tiny_tokenizer(), CHATS, replace(CONFIG, steps=1))
    assert result.rows["plain"].task_loss == chat_loss(one.model, tiny_tokenizer(), CHATS)
    assert (result.rows["plain"].point, result.rows["plain"].held_out_loss) == (None, None)


def test_a_finished_run_that_is_repeated_trains_nothing(whole: tuple[Path, TrainingResult], source: Path):
    out, first = whole
    times = {path: path.stat().st_mtime_ns for path in (*out.glob("rows/*"), *out.glob("model/*"))}
    labels = Labels()
    again = start(source, out, second=Disturb(0, end), reporter=labels)
    assert again == first
    assert labels.seen == []
    assert {path: path.stat().st_mtime_ns for path in (*out.glob("rows/*"), *out.glob("model/*"))} == times


# Resume


def test_a_killed_run_ends_like_an_undisturbed_one(whole: tuple[Path, TrainingResult], source: Path, tmp_path: Path):
    """SIGKILL in the second arm, behind a checkpoint: the first arm is not trained again."""
    script = """
import os, signal, sys
from pathlib import Path
import torch
from test_run_training import Disturb, start
torch.set_num_threads(1)
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
start(Path(sys.argv[1]), Path(sys.argv[2]), second=Disturb(3, kill))
"""
    out = tmp_path / "out"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(out)], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert left(out) == {"run.json", ".lock", "rows", "state-1"}
    assert (out / "state-1" / "checkpoint-2").is_dir()
    # What a kill in the middle of writing leaves besides.
    (out / ".model.123.tmp").mkdir()
    (out / "rows" / ".second.json.123.tmp").write_text("{")
    labels = Labels()
    expect_same(start(source, out, reporter=labels), out, whole)
    assert labels.seen == [("training: second", 2)]


@pytest.mark.parametrize("where", ["row", "states"])
def test_a_run_that_ends_behind_its_training_recovers(
    where: str, whole: tuple[Path, TrainingResult], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between the checkpoint and its row, or between a row and the removal of the state."""
    out = tmp_path / "out"

    def fail(*args: Any) -> Any:
        if (out / "model").is_dir():
            raise Killed
        return kept(*args)

    name = {"row": "_row", "states": "_remove_states"}[where]
    kept = getattr(training, name)
    monkeypatch.setattr(training, name, fail)
    with pytest.raises(Killed):
        start(source, out)
    monkeypatch.undo()
    assert left(out) == {"run.json", ".lock", "rows", "model", "state-1"}
    assert (out / "rows" / "second.json").exists() == (where == "states")
    labels = Labels()
    expect_same(start(source, out, reporter=labels), out, whole)
    assert [label for label, _ in labels.seen] == (["training: second"] if where == "row" else [])


def test_a_checkpoint_that_is_gone_is_trained_again(
    whole: tuple[Path, TrainingResult], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    start(source, out)
    (out / "model").rename(tmp_path / "taken")
    labels = Labels()
    expect_same(start(source, out, reporter=labels), out, whole)
    assert labels.seen == [("training: second", 0)]


# Mistakes and failures


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"settings": {"kind": 2}}, "kind: 1 → 2"),
        ({"config": replace(CONFIG, steps=7)}, "train: "),
        ({"chats": CHATS[1:]}, "chats: "),
        ({"names": ("second",)}, "arms: "),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    changes: dict[str, Any], part: str, whole: tuple[Path, TrainingResult], source: Path
):
    out, first = whole
    with pytest.raises(UsageError, match="belongs to a run with other settings") as error:
        start(source, out, **changes)
    assert part in str(error.value)
    assert left(out) == FINISHED
    assert hash_weights(out / "model") == first.weights


def test_a_folder_of_another_command_is_refused(source: Path, tmp_path: Path):
    with open_run(tmp_path / "out", "align", {}) as folder:
        (folder / "kept").write_text("mine")
    with pytest.raises(UsageError, match="belongs to `keelguard align`"):
        start(source, tmp_path / "out")


class Refusing(Method):
    """A method that cannot be used with these settings."""

    def begin(self, run: Run) -> None:
        raise UsageError("give other settings")


def mistake() -> None:
    raise UsageError("give other settings")


class Spoiling(Method):
    """The last step ends in no number."""

    def end(self, run: Run) -> None:
        run.trainable()[0].data.fill_(float("nan"))


def test_a_mistake_does_not_bind_a_folder_to_itself(source: Path, tmp_path: Path, whole: tuple[Path, TrainingResult]):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="give other settings"):
        start(source, out, second=Refusing(), names=("second",))
    assert not out.exists()
    with pytest.raises(FailureError, match="the last step left no usable weights; lower learning_rate"):
        start(source, out, second=Spoiling(), names=("second",), config=replace(CONFIG, save_every=0))
    assert not out.exists()
    # But what has been trained stays, and the folder with it.
    with pytest.raises(UsageError, match="give other settings"):
        start(source, out, second=Disturb(0, mistake))
    assert {"first-arm.json", "before.json"} == {path.name for path in (out / "rows").iterdir()}
    labels = Labels()
    expect_same(start(source, out, reporter=labels), out, whole)
    assert [label for label, _ in labels.seen] == ["training: second"]


def test_a_mistake_in_a_resumed_run_keeps_its_checkpoints(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        start(source, out, second=Disturb(3, end), names=("second",))
    with pytest.raises(UsageError, match="belongs to a run with other settings"):
        start(source, out, second=Refusing(), names=("second",))
    assert (out / "state-0" / "checkpoint-2").is_dir()
    assert (out / "rows" / "before.json").exists()


@pytest.mark.parametrize("stage", ["before", "checkpoint", "model"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    stage: str,
    whole: tuple[Path, TrainingResult],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "out"

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if stage == "before":
            patch.setattr(os, "fsync", full)
        elif stage == "checkpoint":
            patch.setattr("keelguard.training_loop.save_file", full)
        else:
            patch.setattr(type(tiny_model().model), "save_pretrained", full)
        with pytest.raises(FailureError, match="no space left on the disk") as error:
            start(source, out)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))
    expect_same(start(source, out), out, whole)


def test_a_folder_that_cannot_be_is_one_line(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UsageError, match="a file stands where a folder is needed"):
            start(source, out)


# The table


def row(loss: float, broken: int | None, **changes: Any) -> Row:
    rate = Rate(broken or 0, 100)
    point = Point(0.0, 0, rate, Rate(81, 100), Rate(0, 0), Rate(100, 100), Rate(0, 100), 0.1, ())
    return Row(loss, changes.pop("held_out_loss", None), None if broken is None else point, **changes)


def shown(result: TrainingResult, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(training_table(result))
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits_a_terminal_on_one_line_per_figure(width: int):
    rows = {
        "before": row(6.1234, 7, held_out_loss=0.5),
        "unprotected": row(0.25, 100, held_out_loss=0.1, trained=6_738_415_616),
        "protected": row(0.5, 15, held_out_loss=0.2, trained=6_738_415_616),
    }
    lines = shown(TrainingResult(rows, Path("model"), "ab"), width)
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["task loss", "6.1234", "0.2500", "0.5000"],
        ["held-out loss", "0.5000", "0.1000", "0.2000"],
        ["attack success", "7 % [3, 14]", "100 % [96, 100]", "15 % [9, 23]"],
        ["refused", *["81 % [72, 87]"] * 3],
        ["utility", *["100 % [96, 100]"] * 3],
        ["optimiser holds", "–", "6,738,415,616", "6,738,415,616"],
    ]
    assert [word for word in ("before", "unprotected", "protected") if word in lines[1]] == list(rows)


def test_the_table_leaves_out_what_nobody_measured():
    lines = shown(TrainingResult({"before": row(1.0, None), "[red]ru": row(0.5, None, trained=3)}, Path("m"), ""), 80)
    assert "[red]ru" in lines[1]
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["task loss", "optimiser holds"]


def test_rows_survive_their_file():
    for each in (row(0.5, 3, trained=4, seconds=1.5), row(0.5, None)):
        assert Row.from_json(json.loads(json.dumps(each.to_json()))) == each
    assert set(asdict(row(0.5, None))) == set(row(0.5, None).to_json())
