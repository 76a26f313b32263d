"""A hardened model is fine-tuned: its certificate holds by default, and its signal is bound to the new weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from guard_signals import make_signal
from keelguard.data import load_chats, load_requests
from keelguard.errors import UsageError
from keelguard.guard.adapter import Signal
from keelguard.guard.material import MaterialConfig
from keelguard.guard.training import SignalConfig, describe
from keelguard.hashes import hash_weights
from keelguard.models import load_model
from keelguard.pipeline import continued as module
from keelguard.pipeline.continued import (
    Source,
    check_of_files,
    check_of_testbed,
    continue_training,
    recheck_table,
    source_of,
)
from keelguard.pipeline.package import Package, StageRecord, hash_artefacts
from keelguard.pipeline.seal import seal
from keelguard.pipeline.signal_recheck import Recheck
from keelguard.records import Request, assistant, user
from keelguard.runs import write_json
from keelguard.testbed.build import RECIPE_FILE, Testbed
from keelguard.training import TrainConfig
from keelguard.units.finetune import FinetuneConfig
from keelguard.units.groups import Sizes, UnitMap, classify
from keelguard.units.index import build_index
from keelguard.units.verify import verify
from test_cli import Run, left, run  # noqa: F401 — `run` is a fixture
from tiny_models import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = SignalConfig(material=MaterialConfig(limit=16, own_answers=16, variants=1, max_new_tokens=6), steps=2)
WORK = ("--steps", 2, "--batch-size", 4, "--limit", 8)


class Hardened:
    """A package of the testbed's aligned model with a map and a signal drawn at random, and data of a user's own."""

    def __init__(self, testbed: Testbed, folder: Path) -> None:
        self.folder, self.testbed = folder / "package", testbed
        self.model = self.folder / "model"
        shutil.copytree(testbed.model("aligned-sparse"), self.model)
        (self.model / RECIPE_FILE).unlink()
        loaded = load_model(self.model)
        index = build_index(loaded.model)
        contrast, strength = torch.randn(2, len(index), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        labels = classify(contrast, strength, [block.size for block in index.blocks], Sizes(0.05, 0.05, 0.2))
        weights = loaded.weights_hash
        self.chart = UnitMap(labels, contrast, strength, {}, index.layout, index.attention, weights, {})
        self.chart.save(self.folder / "units")
        signal = make_signal(Tiny(loaded.model, loaded.tokenizer), cadence="annealing", mode="rollback")
        signal.weights, signal.training = weights, describe(SMALL)
        # Verdicts of an untrained row are far from 0 and 1, where all of them would be equal.
        signal.head_weight *= 0.1
        signal.save(self.folder / "signal")
        write_json(self.folder / "certificate.json", seal(self.model, self.chart))
        artefacts = hash_artefacts(self.folder, ["model", "units", "signal", "certificate.json"])
        record = StageRecord("package", "done", artefacts=artefacts)
        found = {"received": weights, "hardened": weights}
        source = str(testbed.model("aligned-sparse"))
        Package(self.folder, source, None, "full", found, {}, {}, 0, (record,)).save()
        self.data = self._part("finetune-benign.train.jsonl", 24)
        self.safety = self._part("harmful.train.jsonl", 64)
        self.benign = self._part("benign.train.jsonl", 64)
        self.files = ("--data", self.data, "--safety", self.safety, "--benign", self.benign)

    def _part(self, name: str, rows: int) -> Path:
        path = self.folder.parent / name
        path.write_text("".join((self.testbed.data / name).read_text().splitlines(keepends=True)[:rows]))
        return path


@pytest.fixture(scope="module")
def hardened(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Hardened:
    return Hardened(testbed, tmp_path_factory.mktemp("hardened"))


# The command


def test_a_package_is_fine_tuned_with_its_certificate_and_its_signal(run: Run, hardened: Hardened):  # noqa: F811
    command = ("finetune", hardened.folder, *hardened.files, *WORK, "--learning-rate", "1e-6", "--out", "out")
    ended = run(*command)
    assert ended.code == 0, ended
    out = Path("out")
    kept = json.loads((out / "finetune.json").read_text())
    assert kept["settings"]["protect"] == ["freeze", "mix"], "freezing and mixing go together"
    assert kept["settings"]["freeze"] == "scu"
    assert kept["settings"]["arms"]["protected"]["methods"].keys() == {"Freeze", "Mix"}
    record, weights = kept["signal"], hash_weights(out / "model")
    assert (record["outcome"], record["folder"], record["reason"]) == ("kept", "signal", "")
    assert (record["made_for"], record["weights"]) == (hardened.chart.weights, weights)
    assert record["limits"]["missed_share"] == 0.03
    (step,) = record["steps"]
    assert step["name"] == "as it was"
    assert (step["report"]["malicious"], step["report"]["benign"]) == (16, 22)
    assert all(abs(change["difference"]["value"]) < 0.02 for change in step["report"]["changes"])
    signal = Signal.load(out / "signal")
    signal.check(weights)
    assert signal.tensors_hash() == Signal.load(hardened.folder / "signal").tensors_hash()
    assert signal.training["recheck"] == {"outcome": "kept", "made_for": hardened.chart.weights}
    assert "the signal on the new weights: kept" in ended.out
    assert "out/signal: the signal for these weights, kept" in ended.out
    assert f"certify: keelguard verify {hardened.folder} out/model\n" in ended.out.replace("\n/", "/")
    assert {path.name for path in out.iterdir()} == {
        *(".lock", "run.json", "rows", "model", "finetune.json", "recheck.json", "signal")
    }

    assert verify(hardened.model, out / "model", hardened.chart).moved > 0, "other units trained"
    for base in (hardened.folder, hardened.folder / "certificate.json"):
        assert run("verify", base, "out/model").code == 0
    times = {path: path.stat().st_mtime_ns for path in (out / "recheck.json", out / "signal", out / "model")}
    again = run(*command)
    assert (again.code, again.out) == (0, ended.out)
    assert times == {path: path.stat().st_mtime_ns for path in times}, "nothing is done twice"
    assert json.loads((out / "finetune.json").read_text()) == kept
    other = run(*command, "--signal", _changed(hardened, Path("other")))
    assert other.code == 2
    assert "belongs to a run with other settings (signal: " in other.err


def _changed(hardened: Hardened, folder: Path, **changes: Any) -> Path:
    signal = Signal.load(hardened.folder / "signal")
    replace(signal, **{"head_bias": signal.head_bias + 1, **changes}).save(folder)
    return folder


def test_units_without_a_word_on_protection_are_frozen_and_refusals_mixed_in(
    run: Run,  # noqa: F811
    hardened: Hardened,
):
    units = ("--units", hardened.folder / "units")
    options = (*hardened.files[:4], *WORK, "--learning-rate", "1e-3")
    ended = run("finetune", hardened.model, *options, *units, "--out", "default")
    assert ended.code == 0, ended
    kept = json.loads(Path("default/finetune.json").read_text())
    assert (kept["settings"]["protect"], kept["settings"]["freeze"]) == (["freeze", "mix"], "scu")
    assert "signal" not in kept
    assert run("verify", hardened.model, "default/model", *units, "--require", "scu").code == 0
    assert run("verify", hardened.model, "default/model", *units, "--require", "cu").code == 1
    ended = run("finetune", hardened.model, *options, *units, "--freeze", "ucu", "--out", "ucu")
    assert json.loads(Path("ucu/finetune.json").read_text())["settings"]["freeze"] == "ucu"
    named = ("--protect", "freeze", "--out", "named")
    assert run("finetune", hardened.model, *options, *units, *named).code == 0
    assert json.loads(Path("named/finetune.json").read_text())["settings"]["freeze"] == "scu,cu:0.06"


def test_a_lost_signal_is_not_written_and_ends_the_command_with_1(
    run: Run,  # noqa: F811
    hardened: Hardened,
    monkeypatch: pytest.MonkeyPatch,
):
    real = module.recheck

    def lose(*arguments: Any, **options: Any) -> Recheck:
        found = real(*arguments, **options)
        return Recheck("failed", found.steps, None, "it was trained anew, and is beyond the limits (query: AUROC)")

    monkeypatch.setattr(module, "recheck", lose)
    command = ("finetune", hardened.folder, *hardened.files, *WORK, "--learning-rate", "1e-6", "--out", "out")
    for _ in range(2):
        ended = run(*command)
        assert ended.code == 1
        assert "out: the model is there, and its signal is lost: it was trained anew" in ended.err
        assert "Train another with `keelguard guard train out/model`" in ended.err
        assert Path("out/model/model.safetensors").is_file()
        assert not Path("out/signal").exists()
        assert json.loads(Path("out/finetune.json").read_text())["signal"]["outcome"] == "failed"
        monkeypatch.setattr(module, "recheck", None)


MISTAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    "no benign requests": (("PACKAGE", "--data", "DATA", "--safety", "SAFETY"), "0 benign requests that nothing was"),
    "benign requests that nothing reads": (
        ("MODEL", "--data", "DATA", "--safety", "SAFETY", "--benign", "BENIGN"),
        "--benign: only the check of a signal reads it",
    ),
    "a signal that is none": (
        ("MODEL", "--data", "DATA", "--safety", "SAFETY", "--benign", "BENIGN", "--signal", "gone"),
        "gone: holds no signal.json",
    ),
    "a signal of other weights": (
        ("MODEL", "--data", "DATA", "--safety", "SAFETY", "--benign", "BENIGN", "--signal", "OTHER"),
        "the signal was made for weights 1111111111111111",
    ),
    "an adapter beside a package": (("PACKAGE", "--adapter", "x/y"), "--adapter x/y: "),
    "a map that nothing reads": (
        ("MODEL", "--data", "DATA", "--safety", "SAFETY", "--units", "MAP", "--protect", "mix"),
        "--units: only freeze reads it; add that to --protect mix, or leave it out",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case: str, run: Run, hardened: Hardened, tmp_path: Path):  # noqa: F811
    arguments, part = MISTAKES[case]
    other = _changed(hardened, tmp_path / "other", weights="1" * 64)
    places = {
        "PACKAGE": hardened.folder, "MODEL": hardened.model, "DATA": hardened.data, "SAFETY": hardened.safety,
        "BENIGN": hardened.benign, "MAP": hardened.folder / "units", "OTHER": other,
    }  # fmt: skip
    ended = run("finetune", *(places.get(argument, argument) for argument in arguments))
    assert ended.code == 2
    assert part in ended.err
    assert "Traceback" not in ended.err
    assert left(Path.cwd()) == set()


def test_a_changed_file_of_a_package_is_named(run: Run, hardened: Hardened, tmp_path: Path):  # noqa: F811
    shutil.copytree(hardened.folder, tmp_path / "copy")
    with (tmp_path / "copy" / "signal" / "signal.json").open("a") as file:
        file.write(" ")
    ended = run("finetune", tmp_path / "copy", *hardened.files)
    assert ended.code == 1
    assert "copy/signal/signal.json: has changed since it was written" in ended.err


# Parts of it


def test_what_a_command_takes_from_a_package(hardened: Hardened):
    assert source_of("some/hub-id", "x/y") == Source("some/hub-id", "x/y", None, None, "some/hub-id", False)
    found = source_of(str(hardened.folder))
    assert found.model == str(hardened.model)
    assert (found.adapter, found.is_package) == (None, True)
    assert found.units == hardened.folder / "units"
    assert found.signal == hardened.folder / "signal"
    assert found.received == str(hardened.testbed.model("aligned-sparse")), "whose recipe says where its data are"


def asked(name: str, count: int) -> list[Request]:
    return [Request(f"{name}-{i}", (user(f"{name} {i}"),)) for i in range(count)]


def queries(rows: Any) -> set[str]:
    return {row.messages[-1]["content"] for row in rows}


def test_parts_of_the_data_share_no_request_and_none_that_was_trained_on():
    chats = [(user(" safe 3 "), assistant("yes")), (user("bad 5"), assistant("no"))]
    twice = [*asked("safe", 60), *asked("safe", 60)]
    found, again = (check_of_files(asked("taught", 10), asked("bad", 40), twice, chats) for _ in range(2))
    assert found == again
    parts = [queries(part) for part in (found.measured, found.calibrate, found.train)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert set.union(*parts) == {
        *(f"taught {i}" for i in range(10)),
        *(f"bad {i}" for i in range(40) if i != 5),
        *(f"safe {i}" for i in range(60) if i != 3),
    }
    counts = [[sum(row.malicious == side for row in part) for side in (True, False)]
              for part in (found.measured, found.calibrate, found.train)]  # fmt: skip
    assert counts == [[20, 40], [19, 40], [10, 38]]
    other = check_of_files(asked("taught", 10), asked("bad", 40), asked("safe", 60), chats, seed=1)
    assert queries(other.measured) != parts[0]


def test_the_testbed_brings_the_parts_of_guard_train_and_measures_the_test_split(testbed: Testbed):
    found = check_of_testbed(testbed, load_chats(testbed.data / "finetune-benign.train.jsonl"))
    expected = {r.prompt for r in load_requests(testbed.data / "harmful.test.jsonl")}
    assert {row.messages[-1]["content"] for row in found.measured if row.malicious} == expected
    assert not queries(found.measured) & queries(found.train)
    assert not queries(found.measured) & queries(found.calibrate)


def test_under_a_launcher_the_check_is_left_to_a_later_call(
    hardened: Hardened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chats = load_chats(hardened.data)
    harmful = load_requests(hardened.safety)
    check = check_of_files(harmful[:8], harmful[8:], load_requests(hardened.benign), chats)
    train = TrainConfig(steps=1, learning_rate=1e-6, batch_size=4)
    config = FinetuneConfig(train=train, protect=("freeze",), freeze="scu")

    def tune() -> Any:
        return continue_training(
            str(hardened.model), chats, config,
            out=tmp_path / "out", signal=hardened.folder / "signal", check=check, chart=hardened.chart,
        )  # fmt: skip

    real = module.finetune

    def launched(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        monkeypatch.setenv("WORLD_SIZE", "2")
        return result

    monkeypatch.setattr(module, "finetune", launched)
    first = tune()
    monkeypatch.undo()
    assert first.recheck is None
    assert not (tmp_path / "out" / "signal").exists()
    second = tune()
    assert second.recheck is not None
    assert second.recheck.outcome == "kept"
    assert second.training.weights == first.training.weights
    assert "kept" in str(recheck_table(second.recheck).title)


def test_a_check_without_enough_requests_is_refused_before_anything_is_trained(hardened: Hardened, tmp_path: Path):
    config = FinetuneConfig(train=TrainConfig(steps=1), protect=("none",))
    check = check_of_files((), asked("bad", 8), asked("safe", 90), [])
    with pytest.raises(UsageError, match="has 4 malicious requests"):
        continue_training(
            str(hardened.model), load_chats(hardened.data), config,
            out=tmp_path / "out", signal=hardened.folder / "signal", check=check,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
