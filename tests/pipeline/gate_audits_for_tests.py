"""Audits with drawn outcomes, for the gate: no model is in them."""

from dataclasses import replace
from typing import Any

from keelguard.evaluation.results import AttackInfo, AuditResult, DataInfo, ModelReport, SafetyCell
from keelguard.stats import Rate

REQUESTS = 100


def broken(count: int, total: int = REQUESTS, start: int = 0) -> dict[str, bool]:
    """So many broken requests of so many, from a place on."""
    return {f"r{i}": start <= i < start + count for i in range(total)}


def cell(attack: str, outcomes: dict[str, bool]) -> SafetyCell:
    rate = Rate.of(list(outcomes.values()))
    return SafetyCell(attack, rate, rate, Rate(0, rate.total), Rate(0, rate.total), None, rate.total, 0, 1.0, outcomes)


def report(asr: dict[str, dict[str, bool]] | None = None, **changes: Any) -> ModelReport:
    """A model that is broken rarely, refuses little, and solves most tasks."""
    asr = {"direct": broken(2), "nested": broken(10)} if asr is None else asr
    plain = ModelReport(
        name="model",
        source="/models/model",
        weights="ab" * 32,
        parameters=1000,
        architecture="LlamaForCausalLM",
        safety={name: cell(name, outcomes) for name, outcomes in asr.items()},
        utility={"facts": Rate(150, 160), "stories": Rate(6, 8)},
        over_refusal={"benign": Rate(1, 200), "benign_nested": Rate(4, 96)},
        degenerate=Rate(1, 296),
    )
    return replace(plain, **changes)


def audit(*models: ModelReport, **changes: Any) -> AuditResult:
    """An audit of these models."""
    models = models or (report(),)
    plain = AuditResult(
        suite="drawn",
        judge={"name": "world", "digest": "ef" * 32},
        settings={"limit": 100, "max_new_tokens": 96, "batch_size": 0, "seed": 0},
        versions={"keelguard": "0.1.0", "torch": "2.13.0"},
        attacks=[AttackInfo(name, f"{name}.", "", {}) for name in models[0].safety],
        data=[DataInfo("harmful", "/data/harmful.jsonl", "cd" * 32, REQUESTS)],
        models=list(models),
    )
    return replace(plain, **changes)
