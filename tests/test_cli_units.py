"""`keelguard diagnose`, `finetune`, `align` and `verify` as a user types them: mistakes, resumes, and files left."""
# ruff: noqa: F811 — tests take the fixture `run` by its name.

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from keelguard.data import load_chats
from keelguard.hashes import hash_weights
from keelguard.models import load_model
from keelguard.testbed.build import RECIPE_FILE
from keelguard.units.certificate import Certificate
from keelguard.units.groups import Sizes, UnitMap, classify
from keelguard.units.index import build_index
from keelguard.units.verify import verify
from test_cli import Ended, Run, left, refused, run  # noqa: F401 — `run` is a fixture
from tiny_models import fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = ("diagnose", "finetune", "align", "verify")


class Bed:
    """The testbed's aligned model without the file that says so, its data as a user's own, and a map of it."""

    def __init__(self, testbed: Any, folder: Path) -> None:
        self.testbed = testbed
        self.model = folder / "model"
        shutil.copytree(testbed.model("aligned-sparse"), self.model)
        (self.model / RECIPE_FILE).unlink()
        self.data = self._part("finetune-benign.train.jsonl", 24)
        self.safety = self._part("harmful.train.jsonl", 24)
        self.utility = self._part("utility.train.jsonl", 24)
        self.map = folder / "map"
        save_map(self.model, self.map)

    def _part(self, name: str, rows: int) -> Path:
        path = self.model.parent / name
        path.write_text("".join((self.testbed.data / name).read_text().splitlines(keepends=True)[:rows]))
        return path


def save_map(source: Path, folder: Path) -> None:
    """A map with groups drawn at random, since freezing asks not how they were found."""
    loaded = load_model(source)
    index = build_index(loaded.model)
    generator = torch.Generator().manual_seed(0)
    contrast, strength = torch.randn(2, len(index), generator=generator, dtype=torch.float64)
    labels = classify(contrast, strength, [block.size for block in index.blocks], Sizes(0.05, 0.05, 0.2))
    UnitMap(labels, contrast, strength, {}, index.layout, index.attention, loaded.weights_hash, {}).save(folder)


@pytest.fixture(scope="module")
def bed(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(testbed, tmp_path_factory.mktemp("bed"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_model().save(tmp_path_factory.mktemp("models") / "tiny")


def plain(text: str) -> str:
    """A page of help without frames and line ends."""
    return re.sub(r"[\s│]+", " ", text)


# Help and mistakes


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_examples_and_names_what_is_written(command: str, run: Run):
    text = plain(run(command, "--help").out)
    assert f"keelguard {command} ./my-" in text
    assert {
        "diagnose": "Writes map.safetensors and map.json, the unit map that finetune, align and verify read",
        "finetune": "Writes OUT/model and OUT/finetune.json",
        "align": "Writes OUT/model and OUT/align.json",
        "verify": "Exit code 1 when a unit of --require has moved",
    }[command] in text


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "diagnose: a wrong path": (("diagnose", "./gone/model"), "./gone/model: no such folder; give a checkpoint folder"),
    "diagnose: no data": (("diagnose", "MODEL"), "is no model of the testbed; give --utility FILE, and --safety FILE"),
    "diagnose: a missing file": (("diagnose", "MODEL", "--utility", "gone.jsonl"), "gone.jsonl: no such file"),
    "diagnose: a share": (("diagnose", "MODEL", "--utility", "DATA", "--scu", "2"), "--scu 2.0: give a share"),
    "diagnose: samples": (("diagnose", "MODEL", "--utility", "DATA", "--samples", "0"), "--samples 0: give 1 or more"),
    "diagnose: a score": (("diagnose", "MODEL", "--utility", "DATA", "--score", "luck"), "--score luck: unknown"),
    "diagnose: shares": (
        ("diagnose", "MODEL", "--utility", "DATA", "--safety", "SAFETY", "--prove", "--shares", "a"),
        "--shares a: give numbers",
    ),
    "diagnose: nothing to prove": (
        ("diagnose", "MODEL", "--utility", "DATA", "--prove"),
        "--prove: needs harmful requests that the model refuses; name a file with --safety",
    ),
    "diagnose: nothing to probe": (
        ("diagnose", "MODEL", "--utility", "DATA", "--direction"),
        "--direction: needs harmful requests",
    ),
    "diagnose: a missing suite": (
        ("diagnose", "MODEL", "--utility", "DATA", "--safety", "SAFETY", "--prove", "--suite", "gone.yaml"),
        "gone.yaml: cannot be read",
    ),
    "diagnose: a limit": (
        ("diagnose", "MODEL", "--utility", "DATA", "--safety", "SAFETY", "--prove", "--limit", "4"),
        "--limit 4: give 8 or more",
    ),
    "diagnose: a suite without requests": (
        ("diagnose", "MODEL", "--utility", "DATA", "--safety", "SAFETY", "--prove", "--suite", "general"),
        "--suite general: brings no harmful requests",
    ),
    "diagnose: a missing earlier map": (
        ("diagnose", "MODEL", "--utility", "DATA", "--before", "gone"),
        "--before gone: no unit map there",
    ),
    "finetune: a wrong path": (("finetune", "./gone/model", "--data", "DATA"), "./gone/model: no such folder"),
    "finetune: a wrong path alone": (("finetune", "./gone/model"), "./gone/model: no such folder"),
    "finetune: no data": (("finetune", "MODEL"), "give --data FILE, and --safety FILE"),
    "finetune: a missing file": (("finetune", "MODEL", "--data", "gone.jsonl"), "gone.jsonl: no such file"),
    "finetune: no safety data": (("finetune", "MODEL", "--data", "DATA"), "name a --safety file"),
    "finetune: a missing map": (
        ("finetune", "MODEL", "--data", "DATA", "--protect", "freeze", "--units", "gone"),
        "--units gone: no unit map there; make one with `keelguard diagnose",
    ),
    "finetune: no map": (("finetune", "MODEL", "--data", "DATA", "--protect", "freeze"), "with --units"),
    "finetune: a map that nothing reads": (
        ("finetune", "MODEL", "--data", "DATA", "--safety", "SAFETY", "--units", "MAP", "--protect", "mix"),
        "--units: only freeze reads it; add that to --protect mix, or leave it out",
    ),
    "finetune: a weight that nothing reads": (
        ("finetune", "MODEL", "--data", "DATA", "--protect", "none", "--anchor-weight", "2"),
        "--anchor-weight: only anchor reads it",
    ),
    "finetune: an unknown protection": (
        ("finetune", "MODEL", "--data", "DATA", "--protect", "hope"),
        "--protect hope: choose from none, freeze, anchor",
    ),
    "finetune: no base": (("finetune", "MODEL", "--data", "DATA", "--protect", "safelora"), "name it with --base"),
    "finetune: a wrong base": (
        ("finetune", "MODEL", "--data", "DATA", "--protect", "safelora", "--base", "./gone/base"),
        "./gone/base: no such folder",
    ),
    "finetune: a rate": (("finetune", "MODEL", "--data", "DATA", "--learning-rate", "0"), "learning_rate 0.0"),
    "finetune: a batch": (("finetune", "MODEL", "--data", "DATA", "--batch-size", "0"), "batch_size 0"),
    "finetune: a schedule": (("finetune", "MODEL", "--data", "DATA", "--scheduler", "up"), "scheduler up: unknown"),
    "finetune: a mixture": (
        ("finetune", "MODEL", "--data", "DATA", "--protect", "mix", "--mix-share", "1"),
        "mix: share 1.0 is out of range",
    ),
    "finetune: a missing suite": (
        ("finetune", "MODEL", "--data", "DATA", "--protect", "none", "--suite", "gone.yaml"),
        "gone.yaml: cannot be read",
    ),
    "finetune: a limit": (
        ("finetune", "MODEL", "--data", "DATA", "--safety", "SAFETY", "--limit", "4"),
        "--limit 4: give 8 or more",
    ),
    "align: a wrong path": (("align", "./gone/model"), "./gone/model: no such folder"),
    "align: no data": (("align", "MODEL"), "is no model of the testbed; give --data FILE"),
    "align: no map": (("align", "MODEL", "--data", "DATA"), "with --units"),
    "align: a share": (("align", "MODEL", "--data", "DATA", "--train", "random:2"), "'random:2': is not of the form"),
    "align: others": (("align", "MODEL", "--data", "DATA", "--train", "all", "--others", "keep"), "--others keep"),
    "align: another model's map": (
        ("align", "OTHER", "--data", "DATA", "--units", "MAP"),
        "the unit map holds",
    ),
    "verify: a wrong path": (("verify", "./gone/a", "MODEL", "--units", "MAP"), "./gone/a: no such folder"),
    "verify: a wrong second path": (("verify", "MODEL", "./gone/b", "--units", "MAP"), "./gone/b: no such folder"),
    "verify: a missing map": (("verify", "MODEL", "MODEL", "--units", "gone"), "--units gone: no unit map there"),
    "verify: no such group": (
        ("verify", "MODEL", "MODEL", "--units", "MAP", "--require", "scv"),
        "group 'scv': unknown; choose from",
    ),
    "verify: another model": (("verify", "OTHER", "MODEL", "--units", "MAP"), "the unit map"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case: str, run: Run, bed: Bed, tiny: Path):
    arguments, part = MISTAKES[case]
    places = {"MODEL": bed.model, "DATA": bed.data, "SAFETY": bed.safety, "MAP": bed.map, "OTHER": tiny}
    ended = run(*(places.get(argument, argument) for argument in arguments))
    # Progress may stand before the message.
    assert part in refused(ended._replace(err=ended.err[ended.err.rfind("keelguard: ") :]))
    assert left(Path.cwd()) == set()


@pytest.mark.parametrize("arguments", [("verify", "a", "b"), ("finetune",), ("finetune", "m", "--steps", "few")])
def test_an_argument_that_is_missing_or_of_another_kind(arguments: tuple[str, ...], run: Run):
    ended = run(*arguments)
    assert ended.code == 2
    assert "Error" in ended.err
    assert "Traceback" not in ended.err
    assert left(Path.cwd()) == set()


# diagnose


def test_a_diagnosis_of_the_testbed_grows_in_one_folder(run: Run, testbed: Any):
    command = ("diagnose", testbed.model("aligned-sparse"), "--samples", 16, "--bootstrap", 2, "--out", "out")
    ended = run(*command)
    assert ended.code == 0, ended
    assert "by default --utility utility.train.jsonl --safety harmful.train.jsonl (files in " in ended.err
    assert "out/report.html" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 120
    files = left(Path("out"))
    assert {"map.json", "map.safetensors", "report.html", "run.json"} <= files
    assert not files & {"proof.json", "transfer.json", "direction.json"}
    first = UnitMap.load("out")
    assert first.weights == hash_weights(testbed.model("aligned-sparse"))
    assert first.counts()["SCU"] == round(0.01 * len(first))
    shutil.copytree("out", "earlier")

    # Another score and other sizes read what was measured.
    measured = {path: path.stat().st_mtime_ns for path in Path("out").glob("statistics-*")}
    assert run(*command, "--score", "variance", "--scu", "0.05").code == 0
    second = UnitMap.load("out")
    assert (second.meta["score"], second.counts()["SCU"]) == ("variance", round(0.05 * len(second)))
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("statistics-*")} == measured
    assert len(measured) == 3
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    error = run(*command[:2], "--samples", 12, *command[4:]).err
    assert "samples: 16 → 12" in error
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before

    # The first map again, now with its proof, beside the earlier one, and with the probe.
    ended = run(
        *(*command, "--prove", "--shares", "0.01", "--controls", 1, "--limit", 8),
        *("--max-new-tokens", 64, "--before", "earlier", "--direction"),
    )
    assert ended.code == 0, ended
    assert "--suite suite-test.yaml" in ended.err
    assert torch.equal(UnitMap.load("out").labels, first.labels)
    assert {"proof.json", "transfer.json", "direction.json"} <= left(Path("out"))
    proof = json.loads(Path("out/proof.json").read_text())
    assert proof["map"] == first.digest
    assert {"SCU", "random 1", "magnitude", "random pair 1"} <= set(proof["curves"])
    assert all(point["asr"]["total"] == 8 for curve in proof["curves"].values() for point in curve)


def test_a_diagnosis_without_safety_finds_redundancy_alone(run: Run, testbed: Any, tmp_path: Path):
    config = tmp_path / "diagnose.yaml"
    config.write_text("samples: 16\nbootstrap: 0\nranking: layer\nru: 0.3\nout: from-file\n")
    ended = run("diagnose", testbed.model("base"), "--config", config, "--ru", "0.25")
    assert ended.code == 0, ended
    assert "by default --utility utility.train.jsonl (files" in ended.err
    chart = UnitMap.load("from-file")
    assert (chart.counts()["SCU"], chart.counts()["UCU"]) == (0, 0)
    assert chart.meta["sizes"]["ru"] == 0.25
    assert "'rank'" in run("diagnose", testbed.model("base"), "--config", bad(tmp_path)).err


def bad(folder: Path) -> Path:
    path = folder / "bad.yaml"
    path.write_text("rank: layer\n")
    return path


# finetune, align and verify


def test_a_fine_tune_of_the_testbed_says_what_it_took(run: Run, testbed: Any):
    command = ("finetune", testbed.model("aligned-sparse"), "--steps", 2, "--batch-size", 4, "--limit", 8, "--compare")
    ended = run(*command)
    assert ended.code == 0, ended
    assert (
        "so by default --data finetune-benign.train.jsonl --held-out finetune-benign.validation.jsonl --safety "
        "harmful.train.jsonl --suite suite-test.yaml --learning-rate 0.0007 (files in " in ended.err
    )
    out = Path("runs/finetune")
    assert ended.out.endswith(f"{out}/model: the new checkpoint; {out}/finetune.json: the figures\n")
    for word in ("before", "unprotected", "protected", "task loss", "held-out loss", "attack success", "over-refusal"):
        assert word in ended.out
    kept = json.loads((out / "finetune.json").read_text())
    assert kept["settings"]["train"]["learning_rate"] == 7e-4
    assert (kept["settings"]["train"]["steps"], kept["settings"]["protect"]) == (2, ["mix"])
    assert kept["rows"]["protected"]["point"]["asr"]["total"] == 8
    again = run(*command)
    assert (again.code, again.out) == (0, ended.out)
    assert "belongs to a run with other settings" in run(*command, "--seed", 1).err


@pytest.mark.parametrize(
    ("options", "steps", "rate"),
    [
        ((), 100, 7e-4),
        (("--epochs", 0.1), 1, 7e-4),
        (("--learning-rate", "2e-5", "--steps", 0), 10, 2e-5),
    ],
)
def test_what_is_given_wins_over_the_testbeds_defaults(
    options: tuple[Any, ...],
    steps: int,
    rate: float,
    run: Run,
    testbed: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    found: dict[str, Any] = {}

    class EnoughError(Exception):
        pass

    def stop(source: str, chats: Any, config: Any, **rest: Any) -> None:
        found.update(train=config.train, chats=len(chats))
        raise EnoughError

    monkeypatch.setattr("keelguard.pipeline.continued.finetune", stop)
    with pytest.raises(EnoughError):
        run("finetune", testbed.model("aligned-sparse"), *options)
    assert found["train"].steps_for(found["chats"]) == steps
    assert found["train"].learning_rate == rate


def test_a_lora_freezes_units_and_the_certificate_says_so(run: Run, bed: Bed, tmp_path: Path):
    config = tmp_path / "finetune.yaml"
    config.write_text(f"data: {bed.data}\nsafety: [{bed.safety}]\nsteps: 9\nlearning-rate: 3e-3\nbatch_size: 4\n")
    ended = run(
        *("finetune", bed.model, "--config", config, "--units", bed.map, "--protect", "freeze,anchor"),
        *("--lora-rank", 4, "--steps", 3, "--limit", 8, "--out", "out"),
    )
    assert ended.code == 0, ended
    assert "over-refusal" not in ended.out, "nobody asked benign requests"
    kept = json.loads(Path("out/finetune.json").read_text())
    assert kept["settings"]["train"] | {"steps": 3, "learning_rate": 3e-3, "lora_rank": 4} == kept["settings"]["train"]
    # Half of a small file is left to measure with.
    assert kept["rows"]["protected"]["point"]["asr"]["total"] == 8

    units = ("verify", bed.model, "out/model", "--units", bed.map)
    ended = run(*units, "--require", "scu,cu:0.06", "--out", "deep/certificate.json")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("scu,cu:0.06: holds, 0 of ")
    certificate = Certificate.load("deep/certificate.json")
    assert certificate.holds
    assert certificate.moved > 1000
    assert run(*units).code == 0, "nothing is required"
    ended = run(*units, "--require", "ru", "--out", "broken.json")
    assert (ended.code, ended.err) == (1, "")
    assert ended.out.startswith("ru: BROKEN, ")
    assert not Certificate.load("broken.json").holds


def test_without_requests_to_ask_the_command_says_that_safety_is_not_measured(run: Run, bed: Bed):
    ended = run("finetune", bed.model, "--data", bed.data, "--protect", "none", "--steps", 1, "--out", "out")
    assert ended.code == 0, ended
    assert "safety is not measured; give --suite, or --safety with 16 requests or more" in ended.err
    assert "attack success" not in ended.out
    assert list(json.loads(Path("out/finetune.json").read_text())["rows"]) == ["before", "unprotected"]


def test_an_alignment_from_end_to_end(run: Run, testbed: Any, tmp_path: Path):
    base = testbed.model("base")
    save_map(base, tmp_path / "map")
    ended = run("align", base, "--units", tmp_path / "map", "--steps", 2, "--batch-size", 4, "--limit", 8, "--compare")
    assert ended.code == 0, ended
    assert "by default --data alignment.train.jsonl --held-out alignment.validation.jsonl" in ended.err
    assert "--learning-rate 0.001 (files" in ended.err
    kept = json.loads(Path("runs/align/align.json").read_text())
    assert list(kept["rows"]) == ["before", "all weights", "ru"]
    assert kept["weights"] == hash_weights("runs/align/model")
    certificate = verify(base, "runs/align/model", UnitMap.load(tmp_path / "map"), require="scu,ucu,cu")
    assert certificate.groups["RU"]["moved"] > 0
    assert not certificate.outside["changed"]


# Interrupts and processes

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000", "COLUMNS": "100"}


def interrupted(command: list[str], wanted: Path, sign: str) -> Ended:
    """Run a command until a file of this pattern is there, then press Ctrl-C."""
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not list(wanted.glob(sign)):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    return Ended(process.returncode, out, err)


def test_an_interrupted_command_says_so_and_goes_on(run: Run, bed: Bed, tmp_path: Path):
    options = ["--data", bed.data, "--protect", "freeze", "--units", bed.map, "--steps", 40, "--save-every", 4]
    arguments = list(map(str, ["finetune", bed.model, *options, "--batch-size", 4, "--learning-rate", "1e-3"]))
    out = tmp_path / "stopped"
    ended = interrupted([sys.executable, "-m", "keelguard", *arguments, "--out", str(out)], out, "state-0/checkpoint-*")
    assert ended.code == 130
    assert ended.err.endswith("keelguard: interrupted; the same command goes on where it was\n")
    assert "Traceback" not in ended.err
    assert not (out / "model").exists()
    assert run(*arguments, "--out", out).code == 0
    assert run(*arguments, "--out", tmp_path / "whole").code == 0
    assert hash_weights(out / "model") == hash_weights(tmp_path / "whole" / "model")
    assert left(out) == left(tmp_path / "whole")


def test_an_interrupted_diagnosis_goes_on(run: Run, bed: Bed, tmp_path: Path):
    options = ["--safety", bed.safety, "--utility", bed.utility, "--samples", 12, "--bootstrap", 0]
    arguments = list(map(str, ["diagnose", bed.model, *options]))
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "keelguard", *arguments, "--out", str(out)]
    ended = interrupted(command, out, "answers/*")
    assert ended.code == 130
    assert ended.err.endswith("keelguard: interrupted; the same command goes on where it was\n")
    assert not (out / "map.json").exists()
    assert run(*arguments, "--out", out).code == 0
    assert run(*arguments, "--out", tmp_path / "whole").code == 0
    assert UnitMap.load(out).digest == UnitMap.load(tmp_path / "whole").digest


@pytest.mark.slow
def test_processes_of_accelerate_share_a_fine_tune(run: Run, bed: Bed, tmp_path: Path):
    """Two processes do what one does, and the main one alone writes and speaks."""
    options = ["--data", bed.data, "--safety", bed.safety, "--units", bed.map, "--protect", "freeze,anchor"]
    # Each process anchors four prompts per step: with four in all, one process and two add the same loss.
    options += ["--prompts", 4, "--steps", 6, "--batch-size", 4, "--learning-rate", "1e-3", "--limit", 8]
    arguments = list(map(str, ["finetune", bed.model, *options, "--save-every", 1]))
    launch = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "keelguard"]
    out = tmp_path / "two"
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, *arguments, "--out", str(out)],
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "errors").open("w"),
        text=True,
    )
    processes = own = 0
    while process.poll() is None:
        # The second process writes its own random state beside every checkpoint.
        own += bool(list(out.glob("state-0/checkpoint-*/rng_state_1.pth")))
        settings = list(out.glob("state-0/settings.json"))
        if settings and not processes:
            processes = json.loads(settings[0].read_text())["processes"]
        time.sleep(0.005)
    printed, _ = process.communicate()
    assert process.returncode == 0, (tmp_path / "errors").read_text()[-3000:]
    assert processes == 2
    assert own > 0
    assert printed.count("the new checkpoint") == 1
    assert printed.count("protected") == 1
    assert {"run.json", "rows", "model", "finetune.json", ".lock"} == {path.name for path in out.iterdir()}
    assert verify(bed.model, out / "model", UnitMap.load(bed.map), require="scu,cu:0.06").holds

    assert run(*arguments, "--out", tmp_path / "one").code == 0
    start, one, two = (
        dict(load_model(p).model.named_parameters()) for p in (bed.model, tmp_path / "one/model", out / "model")
    )
    moved = max(float((one[name] - start[name]).abs().max()) for name in start)
    apart = max(float((one[name] - two[name]).abs().max()) for name in start)
    assert moved > 1e-3
    # Sums in another order, which AdamW's first steps magnify where a gradient is nearly zero.
    assert apart < 0.05 * moved
    assert len(load_chats(str(bed.data))) == 24
