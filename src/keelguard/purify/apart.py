"""The canaries' part of a purification as a job for a process beside; see `keelguard.beside`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keelguard.models import LoadedModel
from keelguard.purify.config import PurifyConfig
from keelguard.purify.effects import Held
from keelguard.purify.material import Material
from keelguard.purify.methods import Subject, Threat
from keelguard.purify.repair import Lost
from keelguard.purify.spiking import run_spikes
from keelguard.runs import read_json, write_json

_POLL = 0.5  # Seconds between two looks at a file.


@dataclass(frozen=True)
class Job:
    """What the process beside needs.

    Attributes:
        load: loads the model as it came; it must be picklable, as a partial of `load_model` is.
        method_record: the file in which the model's own purification says what it lost, and trained back.
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


def plant_and_purify(job: Job) -> None:
    """Load the model anew, take the canaries through the purification, and write them."""
    subject = Subject(job.load(job.base, adapter=job.adapter), job.threat, job.material, job.words)

    def lost() -> Lost:
        while not job.method_record.is_file():
            time.sleep(_POLL)
        return read_json(job.method_record)["value"]["lost"]

    spikes = run_spikes(subject, job.held, job.config, lost=lost)
    write_json(job.out, [spike.to_json() for spike in spikes])
