"""What a purification found and did: the artefact of a run, and the words in which it may be claimed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.purify.compare import Compared
from keelguard.purify.health import Health
from keelguard.purify.repair import FALL, fell
from keelguard.purify.search import Insertion
from keelguard.purify.spikes import Spike
from keelguard.purify.suspects import Suspect
from keelguard.runs import read_json, write_json
from keelguard.stats import Rate, exact_upper

FORMAT = "keelguard.purify/1"
RESULT_FILE = "purify.json"


@dataclass(frozen=True)
class Searched:
    """One search for the worst insertions: what it found, and the largest rise among random ones (nats)."""

    found: tuple[Insertion, ...]
    random_rise: float

    @property
    def rise(self) -> float:
        """The largest rise found; 0 where nothing was."""
        return self.found[0].rise if self.found else 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Searched":
        """The inverse of `asdict` and JSON."""
        return cls(tuple(Insertion(*each) for each in data["found"]), data["random_rise"])


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


def claims(result: PurifyResult) -> list[str]:
    """What may be said of a run, each with its test and its bound: never that a model is clean."""
    said = [*_about_spikes(result), *_about_suspects(result.suspects, result.fresh), *_about_utility(result.health)]
    before, after = result.searches.get("before"), result.searches.get("after")
    if before and after:
        said.append(
            f"On chats held back, the worst insertion found raises the loss of the model's own clean answers by "
            f"{after.rise:.2f} nats, the worst of a few dozen random ones by {after.random_rise:.2f} (before: "
            f"{before.rise:.2f} and {before.random_rise:.2f}). The search tries thousands, so that its worst is higher "
            "in any model; compare with one of the same kind that is trusted (--reference)."
        )
    if leads := result.leads.get("after"):
        flagged = sum(lead.flagged for lead in leads)
        said.append(f"The scan for hidden target texts flags {flagged}; it is a lead, and finds few kinds of backdoor.")
    said.append(
        "No test here can show that a model is clean. A backdoor of a kind that none of these tests knows may remain."
    )
    return said


def _about_spikes(result: PurifyResult) -> list[str]:
    spikes = result.spikes
    planted = [spike for spike in spikes if spike.planted and spike.after is not None]
    if result.method.get("method") == "retrain":
        return [
            "Nothing of the old adapter is in the new one, so no canary could survive and none was planted. What the "
            "base itself or the clean rows may hide is not tested."
        ]
    if not spikes:
        return ["No canaries were planted (--no-spikes), so nothing is known of what this purification can remove."]
    if not planted:
        return ["No canary took hold before the purification, so the spike-in says nothing. Plant for longer."]
    worst = max(planted, key=lambda spike: spike.after.asr.value if spike.after else 0.0)
    assert worst.after is not None
    asr = worst.after.asr
    bound = exact_upper(asr.count, asr.total)
    said = [
        f"{len(planted)} of {len(spikes)} canary backdoors took hold in a copy of this model; the same purification "
        f"left the worst of them ({worst.kind}) {asr.count} of {asr.total} triggered requests, which bounds "
        f"that canary's success at {100 * bound:.1f} % (95 %, exact)."
    ]
    if controlled := [spike for spike in planted if spike.control is not None]:
        mine = Rate.of([fired for s in controlled if s.after for fired in s.after.fired])
        pruned = Rate.of([fired for s in controlled if s.control for fired in s.control.fired])
        said.append(
            f"Over these canaries {mine} of triggered requests are left; in another copy, with random channels "
            f"neutralised and as many steps of clean fine-tuning, {pruned}."
        )
    back = [s for s in planted if s.rebound and s.after and s.rebound.asr.count > s.after.asr.count]
    if any(s.rebound for s in planted):
        worst_back = max((s.rebound.asr.value for s in planted if s.rebound), default=0.0)
        said.append(
            f"After a further clean fine-tune {len(back)} of {len(planted)} canaries fire more often than before it; "
            f"the worst in {100 * worst_back:.0f} % of requests."
        )
    return said


def _about_suspects(courses: Sequence[SuspectCourse], fresh: Sequence[Suspect]) -> list[str]:
    said = []
    if strong := [course for course in courses if is_strong(course.before)]:
        names = ", ".join(f"“{c.before.text}” ({c.before.place})" for c in strong)
        left = max(strong, key=lambda course: course.after.broken.value)
        said.append(
            f"Insertions that break held-out answers of the input model: {names}. A trigger would be among them, and "
            "so are weaknesses of any such model: compare with a trusted one (--reference). Of their effect the "
            "purified model keeps at most "
            f"{left.after.broken} (“{left.after.text}”), random words {left.after.control}."
        )
    else:
        said.append(
            "In the input model the search found no insertion that breaks held-out answers more often than random ones."
        )
    if not_gone := [suspect for suspect in fresh if is_strong(suspect)]:
        names = ", ".join(f"“{each.text}” ({each.place}, {each.broken})" for each in not_gone)
        said.append(f"In the purified model it still finds some: {names}.")
    elif fresh:
        said.append(
            f"In the purified model the {len(fresh)} worst that it finds break no more held-out answers than random."
        )
    return said


def _about_utility(health: Mapping[str, Health]) -> list[str]:
    before, after, rebound = (each and each.utility for each in map(health.get, ("before", "after", "rebound")))
    if before is None or after is None:
        return []
    if not (before.total and after.total):
        return ["What the purification cost in utility is not known: no held-out request could be measured."]
    said = f"Utility on held-out requests: {before} before, {after} after"
    if rebound is not None and rebound.total:
        said += f", {rebound} after a further clean fine-tune"
    points = 100 * (before.value - after.value)
    if fell(before, after):
        return [f"{said}. The purification cost {points:.1f} points of utility, which is more than {100 * FALL:.0f}."]
    return [f"{said}. It did not fall by more than {100 * FALL:.0f} points."]


def is_strong(suspect: Suspect) -> bool:
    """Whether an insertion breaks more held-out answers than random words do, beyond both intervals."""
    measured = suspect.broken.total and suspect.control.total
    return bool(measured) and suspect.broken.interval.low > suspect.control.interval.high
