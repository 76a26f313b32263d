"""Run folders: atomic writes, a manifest that says what a folder belongs to, a lock, and resume after a kill.

A run folder holds `run.json` (command, settings, versions) and whatever the command leaves there. The same
command with the same settings continues a run; other settings are refused, so that nothing of one run is ever
reported as another's.
"""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from keelguard import __version__
from keelguard.errors import FailureError, KeelguardError, UsageError

MANIFEST = "run.json"
LOCK = ".lock"
_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """The versions that a result depends on, read from package metadata without importing anything heavy."""
    found = {"keelguard": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write, of this package's or of a library's, into one clear line.

    Raises:
        FailureError: the disk is full, or the path cannot be written.
    """
    try:
        with _errors_of_libraries():
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(path)).free / 2**20
            raise FailureError(
                f"{path}: no space left on the disk ({free:.0f} MiB free); free some space or choose another "
                "--out, then run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise FailureError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UsageError(f"{path}: a file stands where a folder is needed; choose another --out") from error
        raise


@contextmanager
def _errors_of_libraries() -> Iterator[None]:
    """Raise the system's error that safetensors and tokenizers hide in the text of exceptions of their own."""
    try:
        yield
    except (OSError, KeelguardError):
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), str(error)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader, or a kill, sees the old file or the whole new one."""
    path = Path(path)
    temporary = _sibling(path)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder.

    Raises:
        UsageError: the file is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); remove it and run the command again") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder that takes the place of `path` only when the block ends well."""
    path = Path(path)
    temporary, old = _sibling(path), _sibling(path).with_suffix(".old")
    with disk_errors(path):
        try:
            # In a container a killed run may have had this very process number and left its folder.
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            _as_others(temporary)
            # The old folder steps aside, so that a kill at any moment leaves a whole one, here or beside.
            if path.exists():
                path.replace(old)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _as_others(folder: Path) -> None:
    """Give files the mode of any new file: safetensors writes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o777 | 0o666 & ~mask)


@contextmanager
def open_run(path: Path, command: str, settings: dict[str, Any]) -> Iterator[Path]:
    """Open a run folder for one process, new or to be resumed.

    A run that fails before it leaves anything gives the folder back: a mistake must not bind it to its settings.

    Args:
        path: the folder; created if it does not exist.
        command: which command the folder belongs to.
        settings: everything that determines the result, as JSON values.

    Raises:
        UsageError: the folder belongs to another command or other settings, or holds something else.
        FailureError: another process works in the folder, or it cannot be written.
    """
    path = Path(path)
    settings = json.loads(json.dumps(settings))
    _check_owner(path, command, settings)
    new = not path.exists()
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a")
    with lock:
        try:
            # The kernel frees this lock however the process ends, so that a killed run never blocks the next.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FailureError(f"{path}: another keelguard process works in this folder; wait for it") from error
        # Another run may have begun and ended since the first look.
        _check_owner(path, command, settings)
        if not (path / MANIFEST).exists():
            write_json(path / MANIFEST, {"command": command, "settings": settings, "versions": versions()})
        try:
            yield path
        except BaseException:
            _give_back(path, new)
            raise


def _give_back(path: Path, new: bool) -> None:
    """Take the manifest out of a folder that holds nothing else, and with it a folder that is new."""
    with suppress(OSError):
        if {p.name for p in path.iterdir()} <= {MANIFEST, LOCK}:
            (path / MANIFEST).unlink(missing_ok=True)
            if new:
                (path / LOCK).unlink()
                path.rmdir()


def _check_owner(path: Path, command: str, settings: dict[str, Any]) -> None:
    """Refuse a folder that another run, or somebody else, has filled."""
    manifest = path / MANIFEST
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path}: a file stands where a folder is needed; choose another --out")
    if not manifest.exists():
        strange = sorted(p.name for p in path.iterdir() if p.name != LOCK and not p.name.startswith(f".{MANIFEST}"))
        if strange:
            raise UsageError(f"{path}: holds {strange[0]} and is no run of keelguard; choose another --out")
        return
    found = read_json(manifest)
    if not isinstance(found, dict):
        raise UsageError(f"{manifest}: is no manifest of keelguard; choose another --out")
    if found.get("command") != command:
        raise UsageError(f"{path}: belongs to `keelguard {found.get('command')}`; choose another --out")
    if found.get("settings") != settings:
        raise UsageError(
            f"{path}: belongs to a run with other settings ({_changed(found.get('settings') or {}, settings)}); "
            "choose another --out, or repeat those settings to resume that run"
        )


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings that differ, as `name: old → new`, at most three of them; of nested ones the value that does."""
    leaves = list(_differences("", old, new))
    shown = [f"{name}: {_short(before)} → {_short(after)}" for name, before, after in leaves[:3]]
    return "; ".join(shown + (["…"] if len(leaves) > 3 else []))


def _differences(place: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new:
            yield place, old, new
        return
    for name in dict.fromkeys([*old, *new]):
        yield from _differences(f"{place}: {name}" if place else name, old.get(name), new.get(name))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _existing(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(p for p in [path, *path.absolute().parents] if p.exists())


def _sibling(path: Path) -> Path:
    """A hidden temporary name beside a path, on the same file system."""
    return path.parent / f".{path.name}.{os.getpid()}.tmp"
