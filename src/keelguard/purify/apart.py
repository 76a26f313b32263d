"""The canaries in a process beside, so that on a CPU with several cores a run takes little longer than without them.

    beside = start_apart(job)           # None where it would not help
    …                                   # the model's own purification
    spikes = beside.result()            # None where it failed: then the caller does the work itself

The process reads its job from its standard input and writes one JSON file. It ends with its parent.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelguard.models import LoadedModel
from keelguard.purify.config import PurifyConfig
from keelguard.purify.effects import Held
from keelguard.purify.material import Material
from keelguard.purify.methods import Subject, Threat
from keelguard.purify.spiking import run_spikes
from keelguard.runs import read_json, write_json

_POLL = 0.5  # Seconds between two looks at a file or at the parent.


@dataclass(frozen=True)
class Job:
    """What the process beside needs.

    Attributes:
        load: loads the model as it came; it must be picklable, as a partial of `load_model` is.
        method_record: the file in which the model's own purification says whether it was repaired.
        out: the file that the spikes go to.
    """

    base: str
    adapter: str | None
    threat: Threat
    words: tuple[str, ...]
    material: Material
    held: Held
    config: PurifyConfig
    load: Callable[..., LoadedModel]
    method_record: Path
    out: Path
    threads: int


class Beside:
    """A running process that works through a job."""

    def __init__(self, job: Job, process: "subprocess.Popen[bytes]") -> None:
        self.job, self.process = job, process

    def result(self) -> list[dict[str, Any]] | None:
        """Wait for the spikes, as JSON; None where the process failed."""
        self.process.wait()
        return read_json(self.job.out) if self.process.returncode == 0 and self.job.out.is_file() else None

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def start_apart(job: Job) -> Beside | None:
    """Start a job in a process of its own; None where its parts cannot be handed over."""
    try:
        sent = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None  # A caller's own loader or judge may be a closure: then the work is done here, later.
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "keelguard.purify.apart", str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        # An interrupt is for the parent, which stops this process.
        start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    try:
        process.stdin.write(sent)
        process.stdin.close()
    except BrokenPipeError:
        return None
    return Beside(job, process)


def work(job: Job) -> None:
    """Do a job: load the model anew, and write the spikes."""
    import torch

    torch.set_num_threads(job.threads)
    subject = Subject(job.load(job.base, adapter=job.adapter), job.threat, job.material, job.words)

    def repaired() -> bool:
        while not job.method_record.is_file():
            time.sleep(_POLL)
        return read_json(job.method_record)["value"]["repaired"]

    spikes = run_spikes(subject, job.held, job.config, repaired=repaired)
    write_json(job.out, [spike.to_json() for spike in spikes])


def _end_with(parent: int) -> None:
    """End this process as soon as its parent has: a killed run must leave nothing behind that still works."""
    while os.getppid() == parent:
        time.sleep(_POLL)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    work(pickle.load(sys.stdin.buffer))
