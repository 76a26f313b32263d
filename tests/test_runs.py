"""Run folders: what a failure or a kill leaves, who may use a folder, and what a user is told."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from keelguard import runs
from keelguard.errors import FailureError, UsageError
from keelguard.runs import LOCK, MANIFEST, atomic_folder, disk_errors, open_run, read_json, write_json, write_text

SETTINGS: dict[str, Any] = {"model": "tiny", "seed": 0}


def tree(folder: Path) -> dict[str, str | None]:
    """Every path below a folder with its text, None for a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_text() for path in sorted(folder.rglob("*"))
    }


def refuse_with(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let every flush to the disk fail as the system would."""

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)


# Files


def test_a_file_is_written_whole_with_its_folders(tmp_path: Path):
    write_text(tmp_path / "a" / "b.txt", "ä\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "ä\n".encode()
    assert tree(tmp_path / "a") == {"b.txt": "ä\n"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    before = tree(tmp_path)
    refuse_with(monkeypatch, number)
    with pytest.raises(FailureError) as caught:
        write_json(path, {"new": 2})
    message = str(caught.value)
    assert str(path) in message
    assert "no space left on the disk" in message
    assert "MiB free" in message
    assert "--out" in message
    assert "\n" not in message
    assert tree(tmp_path) == before


def test_a_full_disk_is_reported_where_not_even_the_folder_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(FailureError, match="no space left"):
        write_text(tmp_path / "new" / "folder" / "a.txt", "text")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_place_that_cannot_be_written_is_a_failure_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    refuse_with(monkeypatch, number)
    with pytest.raises(FailureError, match=r"cannot be written .*; choose another --out"):
        write_text(tmp_path / "a.txt", "text")
    assert tree(tmp_path) == {}


def test_a_file_where_a_folder_is_needed_is_the_users_to_change(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for action in (lambda: write_text(tmp_path / "file" / "a.txt", ""), lambda: _fill(tmp_path / "file" / "a")):
        with pytest.raises(UsageError, match="a file stands where a folder is needed"):
            action()
    assert tree(tmp_path) == {"file": "mine"}


def test_a_reader_of_the_old_file_goes_on_reading_it(tmp_path: Path):
    write_text(tmp_path / "a.txt", "old")
    with (tmp_path / "a.txt").open() as reader:
        write_text(tmp_path / "a.txt", "new")
        assert reader.read() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_other_failures_are_not_dressed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refuse_with(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a.txt", "text")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("kind", [SafetensorError, Exception, RuntimeError])
def test_a_full_disk_that_a_library_hides_in_its_text_is_found(tmp_path: Path, kind: type[Exception]):
    with pytest.raises(FailureError, match="model: no space left on the disk"), atomic_folder(tmp_path / "model"):
        raise kind("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(kind, match="out of range"), disk_errors(tmp_path):
        raise kind("out of range")
    with pytest.raises(UsageError, match="told"), disk_errors(tmp_path):
        raise UsageError("told of (os error 28)")


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupt(descriptor: int) -> None:
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert tree(tmp_path) == {"a.txt": "old"}


def test_json_keeps_order_and_letters_and_refuses_what_json_lacks(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"z": "é", "a": [1.5, None]})
    assert path.read_text(encoding="utf-8") == '{\n  "z": "é",\n  "a": [\n    1.5,\n    null\n  ]\n}\n'
    assert read_json(path) == {"z": "é", "a": [1.5, None]}
    before = tree(tmp_path)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"rate": value})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"run\.json: cannot be read .* remove it and run the command again"):
        read_json(path)


# Folders


def _fill(path: Path, text: str = "new") -> None:
    with atomic_folder(path) as temporary:
        (temporary / "a.txt").write_text(text)


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as temporary:
        (temporary / "a.txt").write_text("new")
        assert not target.exists()
    assert tree(tmp_path) == {"deep": None, "deep/out": None, "deep/out/a.txt": "new"}


def test_a_folder_replaces_the_old_one_with_all_that_it_held(tmp_path: Path):
    _fill(tmp_path / "out", "old")
    (tmp_path / "out" / "stale.txt").write_text("stale")
    _fill(tmp_path / "out", "new")
    assert tree(tmp_path) == {"out": None, "out/a.txt": "new"}


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("bug"), ValueError),
        (OSError(errno.ENOSPC, "No space left on device"), FailureError),
    ],
)
def test_a_failure_keeps_the_old_folder_and_no_temporary_one(
    tmp_path: Path, error: BaseException, raised: type[BaseException]
):
    _fill(tmp_path / "out", "old")

    def work(temporary: Path) -> None:
        (temporary / "a.txt").write_text("half")
        raise error

    with pytest.raises(raised), atomic_folder(tmp_path / "out") as temporary:
        work(temporary)
    assert tree(tmp_path) == {"out": None, "out/a.txt": "old"}


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(tmp_path: Path):
    """In a container every run may have the same process number."""
    left = tmp_path / f".out.{os.getpid()}.tmp"
    left.mkdir()
    (left / "half.txt").write_text("half")
    _fill(tmp_path / "out")
    assert tree(tmp_path) == {"out": None, "out/a.txt": "new"}


# Runs


def test_a_new_run_writes_its_manifest(tmp_path: Path):
    with open_run(tmp_path / "new" / "run", "audit", {"model": "tiny", "seeds": (1, 2)}) as folder:
        assert folder == tmp_path / "new" / "run"
        manifest = read_json(folder / MANIFEST)
    assert manifest["command"] == "audit"
    assert manifest["settings"] == {"model": "tiny", "seeds": [1, 2]}
    assert {"keelguard", "python", "torch", "transformers", "peft"} <= set(manifest["versions"])
    assert all(isinstance(version, str) for version in manifest["versions"].values())


def test_the_same_settings_resume_a_run_and_keep_its_manifest(tmp_path: Path):
    with open_run(tmp_path / "run", "audit", {"seeds": (1, 2)}) as folder:
        write_text(folder / "answers.jsonl", "kept")
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    write_json(tmp_path / "run" / MANIFEST, {**manifest, "versions": {"keelguard": "0.0.1"}})
    with open_run(tmp_path / "run", "audit", {"seeds": (1, 2)}) as folder:
        assert (folder / "answers.jsonl").read_text() == "kept"
        assert read_json(folder / MANIFEST)["versions"] == {"keelguard": "0.0.1"}


def test_a_run_that_failed_can_be_resumed(tmp_path: Path):
    with pytest.raises(ValueError, match="bug"), open_run(tmp_path, "audit", SETTINGS):
        raise ValueError("bug")
    with open_run(tmp_path, "audit", SETTINGS) as folder:
        assert folder == tmp_path


@pytest.mark.parametrize("new", [True, False])
def test_a_run_that_fails_before_it_leaves_anything_binds_its_folder_to_nothing(tmp_path: Path, new: bool):
    path = tmp_path / "run" if new else tmp_path
    with pytest.raises(UsageError, match="mistake"), open_run(path, "audit", SETTINGS):
        raise UsageError("a mistake")
    assert path.exists() is not new
    with open_run(path, "purify", {}) as folder:
        write_text(folder / "answers.jsonl", "kept")
    with pytest.raises(UsageError, match="mistake"), open_run(path, "purify", {}):
        raise UsageError("a mistake")
    assert (path / "answers.jsonl").read_text() == "kept"
    assert (path / MANIFEST).exists()


def test_other_settings_are_refused_and_named(tmp_path: Path):
    with open_run(tmp_path, "audit", {**SETTINGS, "note": "x" * 100}):
        pass
    before = tree(tmp_path)
    with pytest.raises(UsageError) as caught, open_run(tmp_path, "audit", {**SETTINGS, "seed": 1, "top": True}):
        pass
    message = str(caught.value)
    assert "seed: 0 → 1" in message
    assert "top: null → true" in message
    assert "note: " + '"xxx' in message
    assert "x" * 60 not in message
    assert "model" not in message
    assert "choose another --out" in message
    assert tree(tmp_path) == before


def test_another_command_is_refused_by_the_name_of_the_first(tmp_path: Path):
    with open_run(tmp_path, "audit", SETTINGS):
        pass
    with (
        pytest.raises(UsageError, match=r"belongs to `keelguard audit`; choose another --out"),
        open_run(tmp_path, "purify", SETTINGS),
    ):
        pass


def test_a_folder_of_somebody_else_is_refused_and_left_untouched(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis\.tex and is no run of keelguard"), open_run(tmp_path, "a", {}):
        pass
    assert tree(tmp_path) == {"thesis.tex": "mine"}


@pytest.mark.parametrize("content", ["{", "[]", '"run"'])
def test_a_damaged_manifest_is_refused_and_left_untouched(tmp_path: Path, content: str):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match=r"run\.json"), open_run(tmp_path, "audit", SETTINGS):
        pass
    assert tree(tmp_path) == {MANIFEST: content}


def test_a_file_in_the_way_is_refused_and_left_untouched(tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    for path in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(UsageError, match="a file stands where a folder is needed"), open_run(path, "audit", {}):
            pass
    assert tree(tmp_path) == {"run": "mine"}


def test_a_run_killed_before_its_manifest_was_there_is_taken_up(tmp_path: Path):
    (tmp_path / LOCK).touch()
    (tmp_path / f".{MANIFEST}.123.tmp").write_text("{")
    with open_run(tmp_path, "audit", SETTINGS) as folder:
        assert read_json(folder / MANIFEST)["settings"] == SETTINGS


def test_a_full_disk_while_a_run_is_opened_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refuse_with(monkeypatch, errno.ENOSPC)
    with pytest.raises(FailureError, match="no space left"), open_run(tmp_path / "run", "audit", SETTINGS):
        pass
    monkeypatch.undo()
    with open_run(tmp_path / "run", "audit", SETTINGS):
        pass


# The lock


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that holds a run open until it is killed or its input ends."""
    code = (
        "import sys; from keelguard.runs import open_run\n"
        f"with open_run(sys.argv[1], 'audit', {SETTINGS!r}):\n"
        "    print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_in_use_is_refused_and_freed_by_a_kill(tmp_path: Path):
    with other_process(tmp_path) as process:
        before = tree(tmp_path)
        with pytest.raises(FailureError, match="another keelguard process"), open_run(tmp_path, "audit", SETTINGS):
            pass
        assert tree(tmp_path) == before
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        with open_run(tmp_path, "audit", SETTINGS) as folder:
            assert read_json(folder / MANIFEST)["settings"] == SETTINGS


def test_a_folder_is_free_again_after_the_block(tmp_path: Path):
    with (
        open_run(tmp_path, "audit", SETTINGS),
        pytest.raises(FailureError, match="another keelguard process"),
        open_run(tmp_path, "audit", SETTINGS),
    ):
        pass
    with open_run(tmp_path, "audit", SETTINGS):
        pass


def test_a_run_that_began_between_the_look_and_the_lock_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two commands see an empty folder; one works in it and ends before the other asks for the lock."""
    lock = fcntl.flock

    def late(file: Any, operation: int) -> None:
        monkeypatch.setattr(runs.fcntl, "flock", lock)
        with open_run(tmp_path, "audit", {**SETTINGS, "seed": 1}):
            pass
        lock(file, operation)

    monkeypatch.setattr(runs.fcntl, "flock", late)
    with pytest.raises(UsageError, match="seed: 1 → 0"), open_run(tmp_path, "audit", SETTINGS):
        pass


def test_files_of_an_atomic_folder_are_open_to_whom_new_files_are(tmp_path: Path):
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "plain").write_text("x")
        (folder / "below").mkdir()
        (folder / "below" / "closed").write_text("x")
        (folder / "below" / "closed").chmod(0o600)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "made").rglob("*") if path.is_file()}
    assert len(modes) == 1
