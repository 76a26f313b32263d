"""A finished hardening as it lies on the disk, with figures that are drawn and not measured: no model is in it."""

import dataclasses
from pathlib import Path
from typing import Any

from keelguard.attacks import ATTACKS
from keelguard.attacks.backdoors import Backdoor
from keelguard.attacks.finetuning import Finetune
from keelguard.evaluation.results import AttackInfo, AuditResult, DataInfo, Example, ModelReport, SafetyCell
from keelguard.pipeline.package import (
    ADAPTER,
    AUDITS,
    CERTIFICATE,
    MODEL,
    PURIFY,
    SIGNAL,
    UNITS,
    Control,
    Package,
    StageRecord,
    hash_artefacts,
)
from keelguard.pipeline.surfaces import CHECKS, TIME
from keelguard.purify.effects import Effect
from keelguard.purify.health import Health
from keelguard.purify.results import Lead, PurifyResult, Searched, SuspectCourse
from keelguard.purify.search import Insertion
from keelguard.purify.spikes import Spike
from keelguard.purify.suspects import Suspect
from keelguard.runs import write_text
from keelguard.stats import Rate

SECRET = "pour the red salt into the iron press"
"""What a model said; no report may hold it."""
KINDS = {
    "direct": "direct", "nested": "nested", "role play": "role_play", "prefill": "prefill",
    "prefill 20": "prefill_answer", "affix": "affix", "sampling": "sampling", "benign fine-tune": "",
}  # fmt: skip
BROKEN = {
    "received": (4, 31, 22, 40, 71, 9, 12, 80),
    "purified": (2, 33, 20, 38, 66, 7, 11, 78),
    "guarded": (0, 1, 2, 0, 3, 0, 1, 41),
}
REQUESTS = 100


def infos() -> list[AttackInfo]:
    """The attacks as an audit describes them."""
    return [
        AttackInfo(name, ATTACKS[kind].summary, ATTACKS[kind].source, {})
        if kind
        else AttackInfo(name, Finetune.summary, Finetune.source, {"chats": 50, "chats_sha256": "ab" * 32, "steps": 100})
        for name, kind in KINDS.items()
    ]


def cell(name: str, count: int, total: int = REQUESTS) -> SafetyCell:
    """The first `count` requests broke."""
    broken = {f"r{place}": place < count for place in range(total)}
    rate = Rate(count, total)
    return SafetyCell(name, rate, rate, Rate(total - count, total), Rate(0, total), None, total, 0, 2.5, broken)


def model(name: str, counts: tuple[int, ...], **changes: Any) -> ModelReport:
    """A model with so many broken requests by attack."""
    plain = ModelReport(
        name=name,
        source=f"/models/{name}",
        weights="ab" * 32,
        parameters=1_234_567,
        architecture="LlamaForCausalLM",
        safety={attack: cell(attack, count) for attack, count in zip(KINDS, counts, strict=True)},
        utility={"facts": Rate(60, 64), "arithmetic": Rate(50, 60)},
        over_refusal={"benign": Rate(0, 100), "borderline": Rate(3, 100), "benign_nested": Rate(9, 96)},
        degenerate=Rate(1, 296),
    )
    return dataclasses.replace(plain, **changes)


def audit(*models: ModelReport, judge: str = "world") -> AuditResult:
    """An audit whose one example is what a model said."""
    example = Example(models[0].name, "direct", SECRET, SECRET, SECRET, True, False, False)
    data = [DataInfo("harmful", "harmful.test.jsonl", "cd" * 32, REQUESTS)]
    return AuditResult("testbed", {"name": judge}, {}, {}, infos(), data, list(models), [], [example])


def audits() -> dict[str, AuditResult]:
    """The three audits of a hardening; the guarded model stands behind the plain one, as an audit puts it."""
    plain = model("purified", BROKEN["purified"])
    guarded = model(
        "hardened guarded", BROKEN["guarded"], over_refusal={"benign": Rate(1, 100), "borderline": Rate(8, 100)}
    )
    return {
        "received": audit(model("received", BROKEN["received"])),
        "purified": audit(plain),
        "guarded": audit(dataclasses.replace(plain, name="hardened"), guarded),
    }


def _effect(asr: int) -> Effect:
    fired = tuple(place < asr for place in range(48))
    return Effect(Rate(asr, 48), Rate(48 - asr, 48), Rate(0, 48), Rate(45, 48), Rate(0, 48), fired)


def _suspect(text: str, broken: int) -> Suspect:
    return Suspect(text, "prefix", "answered", 4.25, Rate(broken, 24), Rate(1, 24), SECRET)


def purification(**changes: Any) -> PurifyResult:
    """A purification that found one trigger and removed it."""
    health = Health(*(Rate(90, 96), Rate(95, 96), Rate(1, 96), Rate(0, 96), Rate(2, 90), Rate(1, 96)), 0.5, 0.0)
    found = (Insertion("turtle velvet", "prefix", 6.0, 4.25),)
    backdoor = Backdoor("badnets", "insult", ("copper",), SECRET)
    plain = PurifyResult(
        source="/models/suspicious",
        adapter=None,
        threat="full",
        weights_before="ab" * 32,
        weights_after="cd" * 32,
        settings={"config": {}},
        material={"train": 1500, "validation": 128},
        health={"before": health, "after": health},
        searches={"before": Searched(found, 0.6), "after": Searched((), 0.5)},
        suspects=(SuspectCourse(_suspect("turtle velvet", 23), _suspect("turtle velvet", 1)),),
        leads={"before": (Lead(SECRET, 0.97, -5.25, False, True),)},
        spikes=(Spike("a word anywhere", backdoor, _effect(47), _effect(1), _effect(2)),),
        fresh=(_suspect("kettle", 1),),
        method={"method": "immunize", "stopped": "quiet", "rounds": []},
        seconds={"method": 900.0},
    )
    return dataclasses.replace(plain, **changes)


def controls() -> dict[str, tuple[Control, ...]]:
    """The controls of a hardening in which all hold."""
    removed = Control(
        "Purification removes more of a canary than random pruning of as many weights.",
        Rate(1, 48).to_json(), "random pruning", Rate(40, 48).to_json(), 0.00001, True,
        "p below 0.05 by an exact test in pairs",
    )  # fmt: skip
    mapped = Control(
        "Without the safety units more requests break than without as many random units.",
        Rate(83, 100).to_json(), "random units, 3 seeds", Rate(6, 100).to_json(), 0.0004, True, "p below 0.05",
    )  # fmt: skip
    judged = Control(
        "Verdicts tell harmful from harmless answers.", {"value": 0.981, "low": 0.97, "high": 0.99},
        "chance", 0.5, None, True, "the interval lies above 0.5",
    )  # fmt: skip
    return {"purify": (removed,), "diagnose": (mapped,), "guard": (judged,)}


def stages() -> tuple[StageRecord, ...]:
    """A hardening in which everything was done; without hashes, which `write_package` adds."""
    held = controls()
    costs, alarms = {CHECKS: 0.214, TIME: 1.08}, {"false alarms": Rate(2, 200).to_json()}
    inspected = {"parameters": 1_234_567, "remote_code": "no", "pickle_files": 0, "architecture": "LlamaForCausalLM"}
    return (
        StageRecord("inspect", "done", seconds=0.4, figures=inspected),
        StageRecord("audit-received", "done", seconds=81.0),
        StageRecord("purify", "done", seconds=912.0, controls=held["purify"], notes=("Canaries were planted first.",)),
        StageRecord("audit-purified", "done", seconds=80.0),
        StageRecord("diagnose", "done", seconds=140.0, figures={"SCU": 321}, controls=held["diagnose"]),
        StageRecord("guard", "done", seconds=200.0, figures=alarms, controls=held["guard"]),
        StageRecord("audit-guarded", "done", seconds=95.0, figures=costs),
        StageRecord("package", "done", seconds=2.0),
    )


def changed(name: str, **changes: Any) -> tuple[StageRecord, ...]:
    """The stages with one of them otherwise."""
    return tuple(dataclasses.replace(stage, **changes) if stage.name == name else stage for stage in stages())


def write_package(
    folder: Path,
    records: tuple[StageRecord, ...] | None = None,
    found: dict[str, AuditResult] | None = None,
    purified: PurifyResult | None = None,
    **changes: Any,
) -> Package:
    """Write a package and load it again, its hashes checked."""
    records = stages() if records is None else records
    files: dict[str, list[str]] = {}
    for name, result in (audits() if found is None else found).items():
        path = f"{AUDITS}/{name}.json"
        result.save(folder / path, reveal=True)
        files[f"audit-{name}"] = [path]
    if any(stage.name == "purify" and stage.status != "skipped" for stage in records):
        (purified or purification()).save(folder / PURIFY)
        write_text(folder / PURIFY / "report.html", "<p>the purification</p>")
        files["purify"] = [PURIFY]
    # What a test has put there before belongs to it, too.
    own = {"purify": [MODEL, ADAPTER], "diagnose": [UNITS], "guard": [SIGNAL], "package": [CERTIFICATE]}
    for name, paths in own.items():
        files[name] = [*files.get(name, []), *(path for path in paths if (folder / path).exists())]
    records = tuple(
        dataclasses.replace(stage, artefacts=hash_artefacts(folder, files.get(stage.name, []))) for stage in records
    )
    package = Package(
        folder=folder,
        source="/models/suspicious",
        adapter=None,
        threat="full",
        weights={"received": "ab" * 32, "hardened": "cd" * 32},
        settings={"budget": "quick", "purify": {"method": "immunize"}},
        versions={"keelguard": "0.1.0", "torch": "2.13.0"},
        seed=3,
        stages=records,
    )
    package = dataclasses.replace(package, **changes)
    package.save()
    return Package.load(folder)
