"""What a purification found and did: the artefact of a run. What may be claimed of it is in `purify.claims`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.purify.claims import claims, is_strong
from keelguard.purify.compare import Compared
from keelguard.purify.health import Health
from keelguard.purify.prober import KINDS
from keelguard.purify.search import Insertion
from keelguard.purify.spikes import Spike
from keelguard.purify.suspects import Suspect
from keelguard.runs import read_json, write_json

__all__ = ["FORMAT", "RESULT_FILE", "Lead", "PurifyResult", "Searched", "SuspectCourse", "claims", "is_strong"]

FORMAT = "keelguard.purify/1"
RESULT_FILE = "purify.json"


@dataclass(frozen=True)
class Searched:
    """One search for the worst insertions: what it found, and the largest rise among random ones (nats).

    Attributes:
        prompts: how many of each kind it measured on, 0 where a kind was not searched; empty in files that do not say.
    """

    found: tuple[Insertion, ...]
    random_rise: float
    prompts: Mapping[str, int] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        """Whether anything was searched; files that do not say are taken to have been."""
        return not self.prompts or any(self.prompts.values())

    @property
    def skipped(self) -> tuple[str, ...]:
        """The kinds of prompts that were not searched, in words."""
        return tuple(KINDS.get(kind, kind) for kind, count in self.prompts.items() if not count)

    @property
    def rise(self) -> float:
        """The largest rise found; 0 where nothing was."""
        return self.found[0].rise if self.found else 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Searched":
        """The inverse of `asdict` and JSON."""
        found = tuple(Insertion(*each) for each in data["found"])
        return cls(found, data["random_rise"], data.get("prompts", {}))


@dataclass(frozen=True)
class Lead:
    """A start sequence of the inversion scan; see `inversion.TargetLead`."""

    text: str
    score: float
    log_ratio: float | None
    usual: bool
    flagged: bool


@dataclass(frozen=True)
class SuspectCourse:
    """A suspected trigger's effect on held-out prompts before, after, and after a further clean fine-tune."""

    before: Suspect
    after: Suspect
    rebound: Suspect | None = None

    def to_json(self) -> dict[str, Any]:
        """The course as a report holds it."""
        return {name: s.to_json() if (s := getattr(self, name)) else None for name in ("before", "after", "rebound")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SuspectCourse":
        """The inverse of `to_json`."""
        return cls(**{k: Suspect.from_json(v) if v else None for k, v in data.items()})  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class PurifyResult:
    """Everything that a run of `keelguard purify` found.

    Attributes:
        health: by "before", "after" and "rebound"; the last is after a further clean fine-tune.
        searches: by "before", "after" and, with a clean model of the same kind, "reference".
        leads: of the inversion scan, by "before" and "after".
        spikes: the canaries; empty without them.
        compared: other methods and controls on copies of the same model; empty unless the settings name some.
        fresh: what the search found after the purification, on the same held-out prompts.
        method: what was done, in figures; the rounds of an immunisation, the record of a vaccine.
        repaired: whether safety or utility had fallen and was trained back.
        seconds: of every stage.
    """

    source: str
    adapter: str | None
    threat: str
    weights_before: str
    weights_after: str
    settings: dict[str, Any]
    material: dict[str, int]
    health: dict[str, Health]
    searches: dict[str, Searched]
    suspects: tuple[SuspectCourse, ...]
    leads: dict[str, tuple[Lead, ...]]
    spikes: tuple[Spike, ...] = ()
    compared: tuple[Compared, ...] = ()
    fresh: tuple[Suspect, ...] = ()
    method: dict[str, Any] = field(default_factory=dict)
    repaired: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The result as `purify.json` holds it."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {
            "format": FORMAT,
            **plain,
            "health": {k: v.to_json() for k, v in self.health.items()},
            "searches": {k: asdict(v) for k, v in self.searches.items()},
            "suspects": [each.to_json() for each in self.suspects],
            "leads": {k: [asdict(lead) for lead in v] for k, v in self.leads.items()},
            "spikes": [spike.to_json() for spike in self.spikes],
            "compared": [each.to_json() for each in self.compared],
            "fresh": [each.to_json() for each in self.fresh],
            "claims": claims(self),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PurifyResult":
        """The inverse of `to_json`."""
        return cls(
            **{name: data[name] for name in _PLAIN},
            health={k: Health.from_json(v) for k, v in data["health"].items()},
            searches={k: Searched.from_json(v) for k, v in data["searches"].items()},
            suspects=tuple(SuspectCourse.from_json(each) for each in data["suspects"]),
            leads={k: tuple(Lead(**lead) for lead in v) for k, v in data["leads"].items()},
            spikes=tuple(Spike.from_json(each) for each in data["spikes"]),
            compared=tuple(Compared.from_json(each) for each in data.get("compared", ())),
            fresh=tuple(Suspect.from_json(each) for each in data["fresh"]),
        )

    def save(self, folder: Path) -> None:
        """Write FOLDER/purify.json, whole or not at all."""
        write_json(folder / RESULT_FILE, self.to_json())

    @classmethod
    def load(cls, folder: str | Path) -> "PurifyResult":
        """Read a run's result.

        Raises:
            UsageError: there is none, or it has another format.
        """
        path = Path(folder) / RESULT_FILE
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give the folder of a finished `keelguard purify`")
        data = read_json(path)
        if data.get("format") != FORMAT:
            raise UsageError(f"{path}: has the format {data.get('format')!r}, not {FORMAT}; purify again")
        return cls.from_json(data)


_PLAIN = (
    "source", "adapter", "threat", "weights_before", "weights_after", "settings", "material", "method", "repaired",
    "seconds", "versions",
)  # fmt: skip
