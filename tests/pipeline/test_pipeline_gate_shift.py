"""The gate's reading of a shift between two checkpoints: by its warning limits, and only of these two."""

from typing import Any

import pytest

from keelguard.pipeline.drift import Drift
from keelguard.pipeline.gate_shift import shift_checks
from keelguard.pipeline.policy import GatePolicy
from keelguard.pipeline.shift_results import Pair, Shift

OURS, THEIRS = "aa" * 32, "bb" * 32


def shift(drifts: dict[str, dict[str, Drift]], against: str | None = OURS) -> Shift:
    def side(weights: str) -> dict[str, Any]:
        return {"name": "x", "source": "x", "weights": weights, "architecture": "x"}

    pairs = tuple(
        Pair(name, kind, 0, 1, {}, None, None)
        for name, kind in (("plain", "checkpoints"), ("nested", "checkpoints"), ("plain / nested", "distributions"))
    )
    return Shift(
        side(THEIRS), None if against is None else side(against), {}, None, {}, {}, (), (), pairs, drifts, {}, "", ()
    )


def drift(value: float, low: float, high: float) -> Drift:
    return Drift(value, low, high, control=0.01, limit=0.05)


@pytest.mark.parametrize(
    ("found", "ruling"),
    [
        (drift(0.03, 0.01, 0.08), "pass"),
        (drift(0.30, 0.20, 0.40), "fail"),
        (drift(0.06, 0.04, 0.09), "not evaluable"),
    ],
)
def test_a_drift_is_ruled_by_its_warning_limit(found, ruling):
    [check] = shift_checks(shift({"decision": {"plain": found}}), OURS, THEIRS, ["decision"])
    assert (check.ruling, check.name, check.margin) == (ruling, "shift: decision, plain", 0.05)


def test_drifts_between_distributions_are_no_concern_of_a_gate():
    found = {"decision": {"plain / nested": drift(9, 9, 9), "nested": drift(0, 0, 0)}}
    assert [c.name for c in shift_checks(shift(found), OURS, THEIRS, ["decision"])] == ["shift: decision, nested"]


def test_what_was_not_measured_is_not_evaluable():
    checks = shift_checks(shift({"importance": {"plain": drift(1, 1, 1)}}), OURS, THEIRS, GatePolicy().shift)
    assert [check.ruling for check in checks] == ["not evaluable"] * 3


def test_either_side_may_be_the_first():
    found = shift({"decision": {"plain": drift(0, 0, 0)}})
    assert shift_checks(found, THEIRS, OURS, ["decision"])[0].ruling == "pass"


@pytest.mark.parametrize("against", ["cc" * 32, None])
def test_a_shift_of_other_weights_says_nothing(against):
    [check] = shift_checks(shift({"decision": {"plain": drift(0, 0, 0)}}, against), OURS, THEIRS, ["decision"])
    assert check.ruling == "not evaluable"
