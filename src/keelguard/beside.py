"""A function in a process beside, since small models gain little from a second core and much from a second process.

    with beside(work, job, wanted=on_cpu) as running:      # None where it would not help
        …                                                  # what this process does meanwhile
        done = running is not None and running.wait()      # whether the function came to its end

The process reads function and job from its standard input, is silent, and ends with its parent: what it did must lie
in files. Where it fails the caller does the work itself, and meets the error.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_POLL = 0.5  # Seconds between two looks at the parent.


class Beside:
    """A running process."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    def wait(self) -> bool:
        """Wait for the end; whether the function returned."""
        return self.process.wait() == 0

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


@contextmanager
def beside(work: Callable[[Any], object], job: Any, *, wanted: bool = True) -> Iterator[Beside | None]:
    """Run `work(job)` in a process with half of the threads, and give the other half to the block.

    Args:
        work: a function of a module, as it is handed over by its name.
        wanted: whether anything is to run beside at all.

    Yields:
        None where it was not wanted, where there is one thread only, or where the job cannot be handed over.
    """
    import torch

    threads = torch.get_num_threads()
    running = _start(work, job, threads // 2) if wanted and threads > 1 else None
    if running is None:
        yield None
        return
    torch.set_num_threads(threads - threads // 2)
    try:
        yield running
    finally:
        running.stop()
        torch.set_num_threads(threads)


def _start(work: Callable[[Any], object], job: Any, threads: int) -> Beside | None:
    try:
        sent = pickle.dumps((threads, work, job))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None  # A caller's own loader or judge may be a closure.
    process = subprocess.Popen(
        [sys.executable, "-m", "keelguard.beside", str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        # An interrupt is for the parent, which stops this process.
        start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    try:
        process.stdin.write(sent)
        process.stdin.close()
    except BrokenPipeError:
        return None
    return Beside(process)


def _end_with(parent: int) -> None:
    """End this process as soon as its parent has: a killed run must leave nothing behind that still works."""
    while os.getppid() == parent:
        time.sleep(_POLL)
    os._exit(1)


def _main() -> None:
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    threads, work, job = pickle.load(sys.stdin.buffer)
    import torch

    torch.set_num_threads(threads)
    work(job)


if __name__ == "__main__":
    _main()
