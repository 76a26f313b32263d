"""Stages that run once, with the hash of every file that they wrote; and the package that they leave."""

import json
from pathlib import Path

import pytest

from keelguard.data import load_requests
from keelguard.errors import FailureError, UsageError
from keelguard.pipeline.harden_config import HardenConfig, read_skips
from keelguard.pipeline.harden_data import FEWEST, of_files, write_rows
from keelguard.pipeline.package import PACKAGE_FILE, Control, Package, StageRecord, hash_artefacts
from keelguard.pipeline.stage_runner import Outcome, StageRunner
from keelguard.progress import SILENT
from keelguard.records import Request, user


def runner(folder: Path, **skip: str) -> StageRunner:
    return StageRunner(folder, skip, SILENT)


def write(folder: Path, text: str = "kept") -> Outcome:
    (folder / "part").mkdir(parents=True, exist_ok=True)
    (folder / "part" / "file.txt").write_text(text)
    (folder / "part" / ".lock").write_text("")
    return Outcome(("part",), {"figure": 1})


def test_a_stage_runs_once_and_keeps_the_hash_of_every_file(tmp_path: Path):
    first = runner(tmp_path)("one", lambda: write(tmp_path))
    assert list(first.artefacts) == ["part/file.txt"]
    assert first.status == "done"
    again = runner(tmp_path)("one", lambda: pytest.fail("ran twice"))
    assert again == first


@pytest.mark.parametrize("change", ["other", None])
def test_a_file_that_is_not_what_was_written_stops_the_run_by_name(change: str | None, tmp_path: Path):
    runner(tmp_path)("one", lambda: write(tmp_path))
    path = tmp_path / "part" / "file.txt"
    path.write_text(change) if change else path.unlink()
    with pytest.raises(FailureError, match=r"part/file\.txt: (has changed|is missing)"):
        runner(tmp_path)("one", lambda: pytest.fail("ran twice"))


def test_a_control_that_does_not_hold_makes_a_failed_stage(tmp_path: Path):
    broken = Control("It helps.", 1, "nothing", 1, holds=False)
    run = runner(tmp_path)
    record = run("one", lambda: Outcome(controls=[Control("It works.", 1, "nothing", 0, holds=True), broken]))
    assert (record.status, record.reason) == ("failed", "Does not hold: It helps.")
    assert run.done("one")
    assert StageRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_stage_that_is_left_out_says_why(tmp_path: Path):
    run = runner(tmp_path, one="not covered")
    record = run("one", lambda: pytest.fail("ran"))
    assert (record.status, record.reason) == ("skipped", "not covered")
    assert not run.done("one")


def test_a_stage_that_breaks_leaves_no_record(tmp_path: Path):
    def work() -> Outcome:
        write(tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path)("one", work)
    assert runner(tmp_path)("one", lambda: write(tmp_path)).status == "done"


def test_a_package_is_read_back_and_refused_where_a_file_has_changed(tmp_path: Path):
    write(tmp_path)
    stage = StageRecord(
        "one", "done", artefacts=hash_artefacts(tmp_path, ["part"]), controls=(Control("c", 1, "d", 2),)
    )
    package = Package(tmp_path, "model", None, "full", {"received": "a"}, {"x": 1}, {"torch": "2"}, 3, (stage,))
    package.save()
    assert Package.load(tmp_path) == package
    assert package.stage("one") is stage
    with pytest.raises(KeyError):
        package.stage("two")
    assert (package.model, package.units, package.signal, package.purification) == ("model", None, None, None)
    (tmp_path / "part" / "file.txt").write_text("other")
    with pytest.raises(FailureError, match=r"part/file\.txt"):
        Package.load(tmp_path)
    assert Package.load(tmp_path, check=False) == package


@pytest.mark.parametrize("text", ["{}", '{"format": "keelguard.harden/1"}', "no json"])
def test_what_is_no_package_is_refused(text: str, tmp_path: Path):
    with pytest.raises(UsageError, match="harden"):
        Package.load(tmp_path)
    (tmp_path / PACKAGE_FILE).write_text(text)
    with pytest.raises(UsageError, match=PACKAGE_FILE):
        Package.load(tmp_path)


def test_stages_are_left_out_by_name_and_with_a_reason():
    config = HardenConfig(skip=read_skips(["guard=no data", "diagnose = not covered"]))
    assert config.skip["diagnose"] == "not covered"
    assert "guard was left out" in config.skip["audit-guarded"]
    for text in ("guard", "guard=", "inspect=why", "other=why"):
        with pytest.raises(UsageError, match="--skip"):
            HardenConfig(skip=read_skips([text]))


def requests(count: int, word: str) -> list[Request]:
    return [Request(f"{word}-{i}", (user(f"{word} {i}?"),), answer=f"yes {i}." if i % 2 else "") for i in range(count)]


def test_own_rows_are_cut_in_three_that_do_not_meet():
    good = requests(60, "good")
    data = of_files([*good, *good[:10]], requests(50, "bad"))
    trained = {r.prompt for r in data.clean}
    audited = {r.prompt for r in data.audited["benign"]}
    validated = {row.messages[-1]["content"] for row in data.validation if not row.malicious}
    assert not trained & audited
    assert not trained & validated
    assert not audited & validated
    assert trained | audited | validated == {r.prompt for r in good}
    assert (len(audited), len(validated)) == (15, 9)
    assert {r.label for r in data.audited["harmful"]} == {"harmful"}
    assert {row.malicious for row in data.train} == {True, False}
    assert of_files(good, requests(50, "bad")).digest == of_files(good, requests(50, "bad")).digest
    assert of_files(good, requests(50, "bad"), seed=1).digest != of_files(good, requests(50, "bad")).digest


@pytest.mark.parametrize(("good", "bad", "option"), [(FEWEST - 1, 50, "--clean-data"), (50, FEWEST - 1, "--harmful")])
def test_too_few_rows_are_refused(good: int, bad: int, option: str):
    with pytest.raises(UsageError, match=option):
        of_files(requests(good, "good"), requests(bad, "bad"))


def test_rows_are_read_back_as_they_were(tmp_path: Path):
    rows = [*requests(3, "good"), Request("x", (user("how?"),), "so.", ("salt",), "harmful", "how-to")]
    assert load_requests(write_rows(tmp_path / "rows.jsonl", rows)) == rows
