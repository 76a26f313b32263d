"""The gate on packages with a signal and a certificate: figures of a record, figures measured anew, guarded columns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_package import write_package

from guard_signals import make_signal
from keelguard.evaluation.audit import AuditConfig, audit_models
from keelguard.guard.decoding import GuardedDecoder
from keelguard.hashes import hash_weights
from keelguard.models import load_model
from keelguard.pipeline.gate import gate
from keelguard.pipeline.gate_result import GateResult
from keelguard.pipeline.policy import GatePolicy
from keelguard.pipeline.seal import seal
from keelguard.pipeline.signal_drift import Change, DriftReport
from keelguard.pipeline.verdicts import AUROC, ERROR, Estimate
from keelguard.runs import write_json
from keelguard.units.groups import UnitMap
from keelguard.units.index import parameters_by_name
from test_cli_units import save_map
from tiny_models import fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIGNAL_ALONE: dict[str, Any] = {
    "max_asr_rise": None, "max_mean_asr_rise": None, "max_over_refusal_rise": None, "max_utility_loss": None,
    "max_degenerate_rise": None, "max_canary_asr": None, "certificate": None, "stages": False,
}  # fmt: skip


class Hardened:
    """A package of a tiny model with a map, a certificate, a random signal, and audits with and without that."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "run"
        tiny = fresh_model(max_position_embeddings=512)
        self.model = tiny.save(self.folder / "model")
        self.weights = hash_weights(self.model)
        files = {}
        for use, text in (("requests", "Tell me about bad thing {}."), ("benign", "Tell me about good thing {}.")):
            files[use] = root / f"{use}.jsonl"
            files[use].write_text("".join(json.dumps({"prompt": text.format(i)}) + "\n" for i in range(24)))
        self.config = AuditConfig(
            "general", requests=(str(files["requests"]),), benign=(str(files["benign"]),), attacks=("direct",),
            max_new_tokens=6,
        )  # fmt: skip
        signal = make_signal(tiny, rank=0, mode="stop")
        signal.weights = self.weights
        self.signal = signal
        signal.save(self.folder / "signal")
        save_map(self.model, self.folder / "units")
        write_json(self.folder / "certificate.json", seal(self.model, UnitMap.load(self.folder / "units")))
        decoder = GuardedDecoder(signal)
        found = {"purified": self.audit(), "guarded": self.audit(lambda loaded: decoder, decoder.digest)}
        write_package(self.folder, found=found, weights={"received": "ab" * 32, "hardened": self.weights})

    def audit(self, guard: Any = None, digest: str = "") -> Any:
        out = self.root / f"audit-{bool(guard)}"
        return audit_models([f"purified={self.model}"], self.config, out=out, guard=guard, guard_digest=digest)

    def changed(self, folder: Path, scale: float) -> Path:
        """A copy in which every weight grew by a share."""
        loaded = load_model(self.model)
        for parameter in parameters_by_name(loaded.model).values():
            parameter.mul_(1 + scale)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        return folder

    def tuned(self, folder: Path, model: Path, signal: Any = None) -> Path:
        """A training run, with a record of its signal."""
        shutil.copytree(model, folder / "model")
        data = {"format": "keelguard.training/1", "weights": hash_weights(folder / "model")}
        write_json(folder / "finetune.json", {**data, **({"signal": signal} if signal else {})})
        return folder


@pytest.fixture(scope="module")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> Hardened:
    return Hardened(tmp_path_factory.mktemp("hardened"))


def rulings(result: GateResult, kind: str = "signal") -> dict[str, str]:
    return {check.subject: check.ruling for check in result.checks if check.kind == kind}


# The record of a fine-tune


def record(hardened: Hardened, weights: str, auroc: float = -0.001, **changes: Any) -> dict[str, Any]:
    fell = Estimate(auroc, auroc - 0.01, auroc + 0.01)
    figures = (
        Change("query", AUROC, Estimate(0.99, 0.98, 1), Estimate(0.99 + auroc, 0, 1), fell, 0.02),
        Change("answer", ERROR, Estimate(0.05, 0, 1), Estimate(0.06, 0, 1), Estimate(0.01, 0.0, 0.02), 0.05),
    )
    report = DriftReport(figures, 64, 64).to_json()
    plain = {
        "outcome": "recalibrated", "folder": "signal", "made_for": hardened.weights, "weights": weights, "reason": "",
        "steps": [{"name": "as it was", "report": {}}, {"name": "recalibrated", "report": report, "note": ""}],
    }  # fmt: skip
    more = changes.pop("more", None)
    plain["steps"] += [more] if more else []
    return {**plain, **changes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"query, AUROC": "pass", "answer, calibration error": "pass"}),
        ({"auroc": -0.2}, {"query, AUROC": "fail", "answer, calibration error": "pass"}),
        ({"outcome": "failed", "reason": "beyond the limits"}, {"": "fail"}),
        ({"made_for": "00" * 32}, {"": "not evaluable"}),
        ({"weights": "00" * 32}, {"": "not evaluable"}),
        ({"steps": []}, {"": "not evaluable"}),
        # A further remedy was tried and given up: its figures are nobody's.
        ({"more": {"name": "retrained", "report": {}}}, {"query, AUROC": "pass", "answer, calibration error": "pass"}),
    ],
)
def test_a_fine_tune_that_checked_the_signal_is_taken_by_its_record(hardened, tmp_path, changes, expected):
    model = hardened.changed(tmp_path / "model", 0.01)
    said = record(hardened, **{"weights": hash_weights(model), **changes})
    run = hardened.tuned(tmp_path / "tuned", model, said)
    result = gate(str(run), str(hardened.folder), GatePolicy(**SIGNAL_ALONE), tmp_path / "gate")
    assert rulings(result) == expected
    assert result.passed == (set(expected.values()) == {"pass"})


# Measured anew


def test_the_signal_is_measured_on_any_other_candidate(hardened, tmp_path):
    result = gate(str(hardened.model), str(hardened.folder), GatePolicy(**SIGNAL_ALONE), tmp_path / "gate")
    found = {check.subject: check for check in result.checks if check.kind == "signal"}
    assert {"query, AUROC", "query, calibration error", "answer, benign flagged"} <= set(found)
    assert {check.difference for check in found.values()} == {0.0}
    assert {check.requests for check in found.values()} == {48}
    other = hardened.changed(tmp_path / "other", 0.5)
    moved = gate(str(other), str(hardened.folder), GatePolicy(**SIGNAL_ALONE), tmp_path / "moved")
    assert any(check.difference for check in moved.checks if check.kind == "signal")


def test_a_policy_may_leave_the_signal_out(hardened, tmp_path):
    policy = GatePolicy(**{**SIGNAL_ALONE, "signal": False, "stages": True})
    assert rulings(gate(str(hardened.model), str(hardened.folder), policy, tmp_path / "gate")) == {}


def test_a_signal_that_does_not_fit_the_candidate_is_not_evaluable(hardened, tmp_path):
    other = fresh_model(hidden_size=48, max_position_embeddings=512).save(tmp_path / "other")
    result = gate(str(other), str(hardened.folder), GatePolicy(**SIGNAL_ALONE), tmp_path / "gate")
    assert rulings(result) == {"": "not evaluable"}


# The certificate of the package


def test_the_packages_own_certificate_is_enough(hardened, tmp_path, monkeypatch):
    """The weights that were hardened are not loaded again."""
    monkeypatch.setattr("keelguard.pipeline.gate.verify", lambda *args, **options: pytest.fail("loaded both"))
    policy = GatePolicy(**{**SIGNAL_ALONE, "certificate": "scu", "signal": False})
    same = gate(str(hardened.model), str(hardened.folder), policy, tmp_path / "same")
    assert rulings(same, "certificate") == {"scu": "pass"}
    moved = hardened.changed(tmp_path / "moved", 0.01)
    found = gate(str(moved), str(hardened.folder), policy, tmp_path / "gate")
    assert rulings(found, "certificate") == {"scu": "fail"}
    assert (tmp_path / "gate" / "certificate.json").is_file()


def test_other_units_than_the_certificate_names_are_compared_with_the_weights(hardened, tmp_path):
    policy = GatePolicy(**{**SIGNAL_ALONE, "certificate": "scu,ucu", "signal": False})
    result = gate(str(hardened.model), str(hardened.folder), policy, tmp_path / "gate")
    assert rulings(result, "certificate") == {"scu,ucu": "pass"}


# Under the signal


def test_a_candidate_with_a_signal_of_its_own_is_compared_under_it_too(hardened, tmp_path):
    policy = GatePolicy(**{**SIGNAL_ALONE, "max_degenerate_rise": 0.3, "signal": False})
    run = hardened.tuned(tmp_path / "tuned", hardened.model)
    alone = gate(str(run), str(hardened.folder), policy, tmp_path / "alone")
    assert set(rulings(alone, "degenerate answers")) == {""}
    assert any("Only the reference was audited under a signal" in note for note in alone.notes)
    hardened.signal.save(run / "signal")
    both = gate(str(run), str(hardened.folder), policy, tmp_path / "both")
    assert set(rulings(both, "degenerate answers")) == {"", "under the signal"}
    names = [model["name"] for model in json.loads((tmp_path / "both" / "audit" / "audit.json").read_text())["models"]]
    assert names == ["audit", "audit guarded"]


def test_a_signal_of_other_weights_guards_nothing(hardened, tmp_path):
    policy = GatePolicy(**{**SIGNAL_ALONE, "max_degenerate_rise": 0.3, "signal": False})
    run = hardened.tuned(tmp_path / "tuned", hardened.changed(tmp_path / "model", 0.01))
    hardened.signal.save(run / "signal")
    result = gate(str(run), str(hardened.folder), policy, tmp_path / "gate")
    assert set(rulings(result, "degenerate answers")) == {""}
