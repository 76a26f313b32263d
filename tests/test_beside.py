"""A function in a process beside: it is done, it fails, it cannot be handed over, and it ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from keelguard.beside import beside


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_function_is_done_and_the_threads_are_shared(tmp_path: Path):
    with beside(Path.touch, tmp_path / "done") as running:
        assert torch.get_num_threads() == 1
        assert running is not None
        assert running.wait()
    assert (tmp_path / "done").is_file()
    assert torch.get_num_threads() == 2


def test_a_failure_is_told(tmp_path: Path):
    with beside(Path.unlink, tmp_path / "missing") as running:
        assert running is not None
        assert not running.wait()


def test_what_cannot_be_handed_over_is_left_to_the_caller(tmp_path: Path):
    with beside(lambda job: None, tmp_path) as running:
        assert running is None
    with beside(Path.touch, tmp_path / "unwanted", wanted=False) as running:
        assert running is None
    torch.set_num_threads(1)
    with beside(Path.touch, tmp_path / "unwanted") as running:
        assert running is None
    assert not (tmp_path / "unwanted").exists()


def test_leaving_the_block_ends_the_process():
    with beside(time.sleep, 600) as running:
        assert running is not None
        assert running.process.poll() is None
    assert running.process.poll() is not None
    assert torch.get_num_threads() == 2


PARENT = """
import time, torch
from keelguard.beside import beside
torch.set_num_threads(2)
with beside(time.sleep, 600) as running:
    print(running.process.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_parent_leaves_nothing_behind_that_works():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
    with suppress(ProcessLookupError):
        for _ in range(600):
            os.kill(child, 0)
            time.sleep(0.1)
        pytest.fail("the process beside goes on")
