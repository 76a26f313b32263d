"""What the stages of a hardening claim beside their controls."""

from dataclasses import replace
from typing import Any

import pytest
from small_package import BROKEN, audits, cell, model

from keelguard.attacks.backdoors import Backdoor
from keelguard.evaluation.results import Comparison
from keelguard.pipeline.claims import audit_claims, diagnosis_claims, holm, purification_claims
from keelguard.purify.effects import Effect
from keelguard.purify.health import Health
from keelguard.purify.results import PurifyResult, Searched
from keelguard.purify.spikes import Spike
from keelguard.stats import Rate
from keelguard.units.proof import Point, Proof


def effect(fired: int, total: int = 64) -> Effect:
    none = Rate(0, total)
    return Effect(Rate(fired, total), none, none, none, none, tuple(i < fired for i in range(total)))


def spike(after: int, control: int | None, before: int = 64) -> Spike:
    beside = None if control is None else effect(control)
    return Spike("a word", Backdoor("badnets", "insult"), effect(before), effect(after), effect(after), beside)


def health(utility: int, refused: int) -> Health:
    none = Rate(0, 100)
    return Health(Rate(utility, 100), Rate(refused, 100), none, none, none, none, 1.0, 0.0)


def result(spikes: list[Spike], utility: int = 95, refused: int = 90, **changes: Any) -> PurifyResult:
    searched = Searched((), 0.1)
    made = PurifyResult(
        "model", None, "full", "a", "b", {}, {}, {"before": health(95, 90), "after": health(utility, refused)},
        {"before": searched, "after": searched}, (), {}, tuple(spikes), method={"method": "immunize"},
    )  # fmt: skip
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("spikes", "holds"),
    [
        ([spike(1, 40)], True),
        ([spike(40, 40)], False),
        ([spike(50, 40)], False),
        ([spike(0, 2)], None),  # The control removes it too.
        ([spike(0, None)], None),
        ([spike(0, 40, before=20)], None),  # It never took hold.
        ([], None),
    ],
)
def test_a_purification_stands_beside_random_pruning(spikes: list[Spike], holds: bool | None):
    assert purification_claims(result(spikes))[0].holds is holds


def test_why_there_is_no_random_pruning_is_said():
    bare = replace(spike(0, None), no_control="h.0: keelguard can map no attention in it")
    claim = purification_claims(result([bare]))[0]
    assert claim.why == "no control: h.0: keelguard can map no attention in it"
    assert "none was planted" in purification_claims(result([]))[0].why


@pytest.mark.parametrize(
    ("utility", "refused", "holds"),
    [(95, 90, (True, True)), (90, 85, (None, None)), (70, 50, (False, False))],
)
def test_what_a_purification_costs_is_a_claim(utility: int, refused: int, holds: tuple[bool | None, bool | None]):
    assert tuple(claim.holds for claim in purification_claims(result([spike(1, 40)], utility, refused))[1:]) == holds


def test_a_retrained_adapter_has_no_canaries_to_claim():
    claims = purification_claims(result([], method={"method": "retrain"}))
    assert len(claims) == 2


def test_a_signal_must_lower_something_and_raise_nothing():
    plain, guarded = audits()["guarded"].models
    rises, falls, solved, answered = audit_claims(guarded, plain, lowers=True)
    assert (rises.holds, falls.holds) == (True, True)
    back = audit_claims(plain, guarded, lowers=True)
    assert (back[0].holds, back[1].holds) == (False, False)
    assert "Holm" in falls.why
    same = audit_claims(plain, plain, lowers=True)
    assert (same[0].holds, same[1].holds) == (True, False)
    assert len(audit_claims(plain, guarded, lowers=False)) == 3
    unbroken = model("plain", tuple(0 for _ in BROKEN["received"]))
    assert audit_claims(unbroken, unbroken, lowers=True)[1].holds is None
    assert audit_claims(replace(plain, safety={}), plain, lowers=True)[0].holds is None
    assert (solved.holds, answered.holds) == (True, True)


def test_one_rise_of_many_must_be_rarer_by_chance():
    def reports(risen: int) -> Any:
        before = replace(model("a", BROKEN["received"]), safety={str(i): cell(str(i), 10) for i in range(20)})
        after = replace(before, name="b", safety={**before.safety, "7": cell("7", 10 + risen)})
        return audit_claims(after, before, lowers=False)[0]

    alone = reports(7)
    assert alone.p_value is not None
    assert 0.01 < alone.p_value < 0.05
    assert alone.holds is None  # Not shown after Holm's correction for 20 attacks, and a large rise not excluded.
    assert reports(0).holds is True
    assert reports(30).holds is False


def test_too_few_requests_leave_a_rise_open():
    """Eight of ten requests broke: after the correction for seven attacks that is not shown, and no less true."""
    few = replace(model("a", BROKEN["received"]), safety={str(i): cell(str(i), 0, 10) for i in range(7)})
    after = replace(few, name="b", safety={**few.safety, "3": cell("3", 8, 10)})
    assert audit_claims(after, few, lowers=False)[0].holds is None


def test_holm_steps_down():
    def tests(*p_values: float) -> list[Comparison]:
        return [Comparison(str(p), "a", "b", 0.1, 0.0, 0.2, p) for p in p_values]

    assert [t.p_value for t in holm(tests(0.04, 0.01, 0.02))] == [0.01, 0.02, 0.04]
    assert [t.p_value for t in holm(tests(0.03, 0.04, 0.9))] == []


def point(broken: int) -> Point:
    rate = Rate(broken, 64)
    return Point(0.01, 7, rate, rate, rate, rate, rate, 1.0, tuple(i < broken for i in range(64)))


@pytest.mark.parametrize(("safety", "random", "holds"), [(50, (3, 4), True), (50, (3, 48), False), (5, (3, 4), False)])
def test_units_must_break_more_than_the_worst_random_ones(safety: int, random: tuple[int, int], holds: bool):
    curves = {"SCU": [point(safety)], "random 1": [point(random[0])], "random 2": [point(random[1])],
              "random pair 1": [point(64)]}  # fmt: skip
    (claim,) = diagnosis_claims(Proof(point(1), curves, "zero"))
    assert claim.holds is holds
    assert claim.control_value["count"] == max(random)
    assert diagnosis_claims(None)[0].holds is None
