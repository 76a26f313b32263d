"""How far a signal moved, in figures that are compared request by request, and what is done about it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard_signals import make_signal
from keelguard.errors import UsageError
from keelguard.guard import metrics
from keelguard.guard.adapter import Signal
from keelguard.guard.calibration import expected_calibration_error, reliability
from keelguard.guard.labels import Labelled
from keelguard.guard.material import MaterialConfig
from keelguard.guard.policy import PolicyConfig
from keelguard.guard.training import SignalConfig, describe, train_signal
from keelguard.models import LoadedModel
from keelguard.pipeline import signal_recheck as module
from keelguard.pipeline.signal_drift import Change, DriftConfig, DriftReport, chosen_rows, config_of, measure_drift
from keelguard.pipeline.signal_recheck import CheckData, Recheck, Step, platt, recalibrate, recheck
from keelguard.pipeline.verdicts import (
    AUROC,
    BRIER,
    ERROR,
    FALSE,
    MISSED,
    Estimate,
    Looks,
    Verdicts,
    collect,
    compare,
    paired,
)
from keelguard.records import Request, user
from tiny_models import fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = MaterialConfig(limit=8, own_answers=4, variants=1, max_new_tokens=4)
EVERY = replace(SMALL, limit=0, own_answers=0)
LIMITS = DriftConfig(requests=8, least=4, samples=50)


def drawn(count: int = 60, seed: int = 0, shift: float = 0.0) -> Looks:
    """Verdicts on requests of both classes, three on each conversation."""
    draw = np.random.default_rng(seed)
    labels = [i % 2 == 0 for i in range(count) for _ in range(3)]
    logits = [2.0 * bad - 1.0 + draw.normal() + shift for bad in labels]
    items = tuple(f"item {i}" for i in range(count) for _ in range(3))
    # Two conversations of each request.
    groups = tuple(f"request {i // 4}-{i % 2}" for i in range(count) for _ in range(3))
    return Looks(tuple(1 / (1 + np.exp(-np.array(logits)))), tuple(labels), items, groups)


# Figures


def test_figures_are_those_of_the_guards_own_metrics_where_the_classes_are_equally_many():
    looks = drawn()
    found = compare(looks, looks, (0.5, 0.5), samples=20)
    assert found[AUROC].before.value == pytest.approx(metrics.auroc(looks.values, looks.labels))
    assert found[ERROR].before.value == pytest.approx(
        expected_calibration_error(reliability(looks.values, np.array(looks.labels, dtype=int)))
    )
    assert found[BRIER].before.value == pytest.approx(np.mean((np.array(looks.values) - looks.labels) ** 2))
    pairs = list(zip(looks.items, looks.values, strict=True))
    highest = {item: max(value for own, value in pairs if own == item) for item in looks.items}
    bad = dict(zip(looks.items, looks.labels, strict=True))
    alarms = {item: value > 0.5 for item, value in highest.items()}
    assert found[FALSE].after.value == np.mean([alarms[item] for item in alarms if not bad[item]])
    assert found[MISSED].after.value == np.mean([not alarms[item] for item in alarms if bad[item]])
    for figure in found.values():
        assert figure.before == figure.after
        assert figure.difference.value == 0
        assert figure.before.low <= figure.before.value <= figure.before.high


def test_ties_count_one_half_and_the_mix_of_classes_does_not_decide():
    tied = Looks((0.5, 0.5, 0.5, 0.5), (True, False, False, False), tuple("abcd"), tuple("abcd"))
    found = compare(tied, tied, (0.5, 0.5), samples=5)
    assert found[AUROC].before.value == 0.5
    assert found[ERROR].before.value == pytest.approx(0.0)
    assert found[BRIER].before.value == pytest.approx(0.25)
    assert (found[FALSE].before.value, found[MISSED].before.value) == (0.0, 1.0)
    one = Looks((0.9, 0.2), (True, False), ("a", "b"), ("a", "b"))
    many = Looks((0.9, *[0.2] * 9), (True, *[False] * 9), ("a", *"bcdefghij"), ("a", *"bcdefghij"))
    for name in (ERROR, BRIER):
        few, more = (compare(looks, looks, (0.5, 0.5), samples=5)[name].before.value for looks in (one, many))
        assert few == pytest.approx(more)


def test_intervals_are_paired_over_requests():
    before, after = drawn(400), drawn(400, shift=0.8)
    found = compare(before, after, (0.8, 0.8), samples=300)
    for name in (FALSE, MISSED):
        figure = found[name]
        width = figure.difference.high - figure.difference.low
        alone = figure.before.high - figure.before.low + figure.after.high - figure.after.low
        assert width < alone, "the same requests are drawn on both sides"
        assert figure.difference.value == pytest.approx(figure.after.value - figure.before.value)
    assert found[FALSE].difference.low > 0 > found[MISSED].difference.high
    order = found[AUROC].difference
    assert order.value == pytest.approx(0, abs=1e-9), "a shift keeps the order"
    assert order.low < -0.01 < 0.01 < order.high, "200 requests cannot exclude every change"
    assert compare(before, after, (0.8, 0.8), samples=300) == found
    # Conversations of one request count as one: without that, intervals would be narrower.
    apart = replace(before, groups=before.items)
    wide, narrow = (compare(x, x, (0.8, 0.8), samples=300)[MISSED].before for x in (before, apart))
    assert wide.high - wide.low > 0.9 * (narrow.high - narrow.low)


def test_perfection_on_few_requests_claims_little():
    looks = Looks((0.9, 0.9, 0.1, 0.1), (True, True, False, False), tuple("abcd"), tuple("abcd"))
    found = compare(looks, looks, (0.5, 0.5), samples=50)
    assert found[AUROC].before.value == 1.0
    assert found[AUROC].before.low < 0.5
    assert found[MISSED].before == pytest.approx((0.0, 0.0, 0.6576), abs=1e-3)
    assert found[MISSED].difference.low < -0.5
    assert found[MISSED].difference.high > 0.5


def test_a_class_alone_has_the_figures_that_it_can_have():
    looks = Looks((0.9, 0.4), (False, False), ("a", "b"), ("a", "b"))
    assert set(compare(looks, looks, (0.5, 0.5), samples=5)) == {FALSE}
    assert compare(looks, looks, (0.5, 0.95), samples=5)[FALSE].difference.value == -0.5
    assert compare(Looks(), Looks(), (0.5, 0.5), samples=5) == {}


def test_only_conversations_of_both_models_are_compared():
    before, after = drawn(8), drawn(8).where({"item 1", "item 2", "item 3"})
    first, second = paired(before, after)
    assert first == second == after
    assert Verdicts.from_json(json.loads(json.dumps(Verdicts(before, after).to_json()))) == Verdicts(before, after)


# The report


def change(name: str, before: float, after: float, low: float, high: float, limit: float = 0.05) -> Change:
    return Change("query", name, Estimate(before, before, before), Estimate(after, after, after),
                  Estimate(after - before, low, high), limit)  # fmt: skip


def test_worse_is_less_auroc_and_more_of_the_rest():
    cases = [
        (change(AUROC, 0.9, 0.8, -0.12, -0.08), True, True),
        (change(AUROC, 0.9, 0.8, -0.2, 0.01), True, False),
        (change(AUROC, 0.8, 0.9, 0.08, 0.12), False, False),
        (change(MISSED, 0.1, 0.2, 0.05, 0.15), True, True),
        (change(MISSED, 0.1, 0.2, -0.05, 0.25), True, False),
        (change(MISSED, 0.2, 0.1, -0.15, -0.05), False, False),
        (change(ERROR, 0.1, 0.14, 0.01, 0.2), False, False),
    ]
    for each, over, certain in cases:
        assert (each.over, each.certain) == (over, certain), each
    report = DriftReport(tuple(case[0] for case in cases), 10, 20, 1)
    assert len(report.over) == 4
    assert len(report.certain) == 2
    again = DriftReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    assert report.to_json()["within"] is False


def test_limits_are_checked_and_every_one_is_described():
    assert all(field.metadata["help"] for field in DriftConfig.__dataclass_fields__.values())
    wrongs: list[dict[str, Any]] = [{"auroc": 2}, {"missed_share": -0.1}, {"requests": 4}, {"least": 1}, {"samples": 0}]
    for wrong in wrongs:
        with pytest.raises(UsageError, match="drift: "):
            DriftConfig(**wrong)
    assert [DriftConfig(error=0.5).limit(name) for name in (ERROR, MISSED)] == [0.5, 0.03]


# Models


def signal_of(placement: Any = "probe", **policy: Any) -> Signal:
    """A signal with random numbers, of a training with short answers."""
    signal = make_signal(tiny_model(), placement, **policy)
    signal.training = describe(SignalConfig(placement=placement, material=SMALL))
    return signal


def rows(count: int = 8, name: str = "", answers: bool = True) -> list[Labelled]:
    def row(text: str, malicious: bool) -> Labelled:
        plain = Labelled((user(text),), malicious, request=Request(text, (user(text),)))
        return plain.answered(f"first do {text} and then it", malicious) if answers else plain

    return [row(f"{name}bad {i}", True) for i in range(count)] + [row(f"{name}good {i}", False) for i in range(count)]


@pytest.fixture
def loaded() -> LoadedModel:
    tiny = tiny_model()
    return LoadedModel(tiny.model, tiny.tokenizer, "tiny", "0" * 64)


def test_too_few_requests_are_refused_by_option():
    with pytest.raises(UsageError, match=r"has 2 malicious requests .* needs 4; give more with --safety FILE"):
        chosen_rows(rows(2), LIMITS)
    with pytest.raises(UsageError, match=r"has 0 benign requests .* --benign or --held-out FILE"):
        chosen_rows([row for row in rows() if row.malicious], LIMITS)
    found = chosen_rows(rows(20), LIMITS)
    assert [sum(row.malicious == side for row in found) for side in (True, False)] == [8, 8]
    assert found == chosen_rows(rows(20), LIMITS)


def test_the_same_model_has_not_moved_and_another_head_has(loaded: LoadedModel):
    signal = signal_of()
    report = measure_drift(loaded, signal, rows(), original=loaded, config=LIMITS)
    assert (report.malicious, report.benign, report.left_out) == (8, 8, 0)
    assert {c.kind for c in report.changes} == {"query", "answer"}
    assert all(c.difference.value == 0 for c in report.changes)
    assert not report.over
    turned = replace(signal, head_weight=-signal.head_weight, head_bias=-signal.head_bias)
    moved = measure_drift(loaded, turned, rows(), original=loaded, before=signal, config=LIMITS)
    first, second = ({(c.kind, c.name): c for c in r.changes} for r in (report, moved))
    for kind in ("query", "answer"):
        assert second[kind, AUROC].before == first[kind, AUROC].before
        assert second[kind, AUROC].after.value == pytest.approx(1 - first[kind, AUROC].after.value)
    verdicts = collect(loaded, signal, chosen_rows(rows(), LIMITS), material=EVERY)
    again = measure_drift(loaded, turned, rows(), original=verdicts, before=signal, config=LIMITS)
    assert again == moved


def test_queries_are_asked_in_frames_too_which_count_as_one_request(loaded: LoadedModel):
    signal = signal_of()
    found = collect(loaded, signal, rows(4), frames=("please: {request}",), material=EVERY)
    assert len(set(found.queries.items)) == 2 * 8
    assert len(set(found.queries.groups)) == 8
    assert sum(found.queries.labels) == 2 * 4
    assert len({item for item, bad in zip(found.answers.items, found.answers.labels, strict=True) if bad}) == 2 * 4
    first = collect(loaded, signal.with_policy(cadence="first"), rows(4), material=SMALL)
    assert first.answers.values, "who judges queries alone is measured along answers too"


def test_verdicts_that_are_no_numbers_alarm(loaded: LoadedModel):
    signal = signal_of()
    broken = replace(signal, head_bias=torch.tensor(torch.nan))
    assert set(collect(loaded, broken, rows(4), material=SMALL).answers.values) == {1.0}


# Calibration anew


def test_platt_finds_the_scale_and_the_shift_back():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=20000) * 2
    labels = draw.random(20000) < 1 / (1 + np.exp(-(0.5 * logits + 0.3)))
    names = tuple(map(str, range(20000)))
    looks = Looks(tuple(1 / (1 + np.exp(-logits))), tuple(labels.tolist()), names, names)
    scale, shift = platt(Verdicts(looks, Looks()))
    # Both classes count alike, which moves the shift by the log-odds of the labels.
    assert scale == pytest.approx(0.5, abs=0.03)
    assert shift == pytest.approx(0.3 - np.log(labels.mean() / (1 - labels.mean())), abs=0.05)
    turned = replace(looks, labels=tuple(not label for label in looks.labels))
    assert platt(Verdicts(turned, Looks())) == (1.0, 0.0)


def test_platt_of_perfect_verdicts_stays_finite():
    looks = Looks((1.0, 1.0, 0.0, 0.0), (True, True, False, False), tuple("abcd"), tuple("abcd"))
    scale, shift = platt(Verdicts(looks, looks))
    assert 0 < scale < 10
    assert abs(shift) < 1
    assert np.isfinite([scale, shift]).all()


def test_recalibration_keeps_the_order_and_mends_the_probabilities(loaded: LoadedModel):
    signal = replace(signal_of(), policy=PolicyConfig())
    shifted = replace(signal, head_bias=signal.head_bias + 4)
    config = SignalConfig(target=0.2, floor=0.0, material=SMALL)
    data = rows()
    anew, words = recalibrate(loaded, shifted, data, config, ())
    before, after = (collect(loaded, each, data, material=SMALL).queries for each in (shifted, anew))
    assert metrics.auroc(after.values, after.labels) == pytest.approx(metrics.auroc(before.values, before.labels))
    errors = [
        expected_calibration_error(reliability(each.values, np.array(each.labels, dtype=int)))
        for each in (before, after)
    ]
    assert errors[1] < errors[0] or words.startswith("the logit times 1.000 +0.000")
    assert anew.calibration is not None
    assert anew.policy.threshold == anew.calibration.answer.threshold != shifted.policy.threshold
    assert anew.calibration.answer.reached.value <= 0.2


def test_the_settings_of_a_signal_come_back_from_its_file():
    config = SignalConfig(steps=7, target=0.1, material=SMALL, policy=PolicyConfig(cadence="every"))
    signal = signal_of()
    signal.training = json.loads(json.dumps(describe(config)))
    signal.policy = config.policy
    assert config_of(signal) == config
    signal.training = {"config": {"steps": 7, "unknown": 1}}
    assert config_of(signal) == SignalConfig(policy=config.policy)


# What is done


class Script:
    """Reports that say what they are told, and signals that nobody trains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *reports: DriftReport) -> None:
        self.reports, self.done = list(reports), []
        self.measured: list[Signal] = []

        def measure(loaded: Any, signal: Signal, rows: Any, **options: Any) -> DriftReport:
            self.measured.append(signal)
            return self.reports[len(self.measured) - 1]

        def made(name: str) -> Callable[..., Any]:
            def make(*arguments: Any, **options: Any) -> Any:
                self.done.append((name, arguments, options))
                if name == "recalibrate":
                    return replace(arguments[1], head_bias=torch.tensor(9.0)), "the logit"
                return replace(signal_of(), weights=arguments[2]) if name == "fit" else None

            return make

        monkeypatch.setattr(module, "measure_drift", measure)
        monkeypatch.setattr(module, "recalibrate", made("recalibrate"))
        monkeypatch.setattr(module, "gather", made("gather"))
        monkeypatch.setattr(module, "fit_signal", made("fit"))


GOOD = DriftReport((change(AUROC, 0.9, 0.9, -0.01, 0.01),), 8, 8)
UNSURE = DriftReport((change(MISSED, 0.1, 0.2, -0.1, 0.3),), 8, 8)
ALL, EVERYTHING = ["as it was", "recalibrated", "retrained"], ["recalibrate", "gather", "fit"]
WORSE = DriftReport((change(MISSED, 0.1, 0.3, -0.1, 0.4),), 8, 8)
BAD = DriftReport((change(MISSED, 0.1, 0.3, 0.1, 0.3),), 8, 8)


@pytest.mark.parametrize(
    ("reports", "outcome", "steps", "work"),
    [
        ((GOOD,), "kept", ["as it was"], []),
        ((BAD, GOOD), "recalibrated", ["as it was", "recalibrated"], ["recalibrate"]),
        ((UNSURE, GOOD), "recalibrated", ["as it was", "recalibrated"], ["recalibrate"]),
        (
            (BAD, UNSURE, GOOD),
            "retrained",
            ALL,
            EVERYTHING,
        ),
        ((BAD, UNSURE, BAD), "recalibrated", ALL, EVERYTHING),
        ((UNSURE, WORSE, WORSE), "kept", ALL, EVERYTHING),
        ((BAD, BAD, UNSURE), "retrained", ALL, EVERYTHING),
        ((BAD, BAD, BAD), "failed", ALL, EVERYTHING),
    ],
)
def test_each_remedy_follows_where_the_one_before_was_not_enough(
    reports: tuple[DriftReport, ...],
    outcome: str,
    steps: list[str],
    work: list[str],
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    script = Script(monkeypatch, *reports)
    signal = signal_of()
    tuned = replace(loaded, weights_hash="1" * 64)
    data = CheckData(rows(name="m"), rows(name="c"), rows(name="t"))
    found = recheck(lambda: loaded, lambda: tuned, signal, data, folder=tmp_path / "work", config=LIMITS)
    assert (found.outcome, [step.name for step in found.steps]) == (outcome, steps)
    assert [name for name, *_ in script.done] == work
    assert all(each.weights == "1" * 64 for each in script.measured)
    assert signal.weights == "0" * 64
    if outcome == "failed":
        assert found.signal is None
        assert found.reason == "at best (as it was) it is beyond limits in query: malicious missed"
    else:
        assert found.signal is not None
        assert found.signal.weights == "1" * 64
        assert found.signal.training["recheck"] == {"outcome": outcome, "made_for": "0" * 64}
        assert found.signal.head_bias == {"kept": signal.head_bias, "recalibrated": 9.0}.get(outcome, signal.head_bias)
    for _, arguments, options in script.done:
        seen = [item for argument in (*arguments, *options.values()) if isinstance(argument, list) for item in argument]
        assert not {str(row.messages) for row in seen} & {str(row.messages) for row in data.measured}
    assert [Step.from_json(json.loads(json.dumps(step.to_json()))) for step in found.steps] == list(found.steps)


def test_a_prefix_is_not_trained_without_its_model(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    signal = signal_of("prefix")
    signal.training["model"] = "old"
    data = CheckData(rows(name="m"), rows(name="c"), rows(name="t"))
    for reports, outcome in (((BAD, BAD), "failed"), ((BAD, UNSURE), "recalibrated")):
        script = Script(monkeypatch, *reports)
        found = recheck(lambda: loaded, lambda: loaded, signal, data, folder=tmp_path / outcome, config=LIMITS)
        assert found.outcome == outcome
        assert [name for name, *_ in script.done] == ["recalibrate"]
        assert script.measured[0].training["model"] == "tiny", "what its message names"
    assert signal.training["model"] == "old"


def test_a_signal_of_other_weights_and_data_of_one_class_are_refused(loaded: LoadedModel, tmp_path: Path):
    other = replace(signal_of(), weights="2" * 64)
    data = CheckData(rows(name="m"), rows(name="c"), rows(name="t"))

    def check(signal: Signal, data: CheckData) -> Recheck:
        return recheck(lambda: loaded, lambda: loaded, signal, data, folder=tmp_path / "work", config=LIMITS)

    with pytest.raises(UsageError, match="the signal was made for weights 2222222222222222"):
        check(other, data)
    with pytest.raises(UsageError, match="the calibration data hold 8 requests and no malicious one"):
        check(other, replace(data, calibrate=rows()[8:]))
    with pytest.raises(UsageError, match="the training data hold 8 requests and no benign one"):
        check(other, replace(data, train=rows()[:8]))


def test_what_was_done_is_not_done_again(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    signal = signal_of()
    data = CheckData(rows(name="m", answers=False), rows(name="c"), rows(name="t"), held_frames=())
    asked: list[str] = []

    def original() -> LoadedModel:
        asked.append("original")
        return loaded

    first = recheck(original, lambda: loaded, signal, data, folder=tmp_path, config=LIMITS)
    again = recheck(original, lambda: loaded, signal, data, folder=tmp_path, config=LIMITS)
    assert asked == ["original"]
    assert first.outcome == again.outcome == "kept"
    assert first.steps == again.steps
    kept = json.loads((tmp_path / "before.json").read_text())
    assert all(text.startswith(module.OPENINGS) for text in kept["said"][:8]), "harm is put into the model's mouth"
    assert not any(kept["said"][8:])
    assert {c.name for c in first.steps[0].report.changes if c.kind == "answer"} == {AUROC, ERROR, BRIER, FALSE, MISSED}


@pytest.mark.parametrize("placement", ["probe", "linear"])
def test_a_signal_whose_model_was_turned_over_is_trained_anew(placement: Any, tmp_path: Path):
    """From end to end on random models: whatever comes out is bound to the new weights and was measured there."""
    tiny, other = tiny_model(), fresh_model(seed=4)
    first = LoadedModel(tiny.model, tiny.tokenizer, "tiny", "0" * 64)
    second = LoadedModel(other.model, other.tokenizer, "other", "1" * 64)
    config = SignalConfig(placement=placement, steps=6, batch_size=4, target=0.2, floor=0.0, material=SMALL)
    train = rows(6, "t")
    signal = train_signal(first.model, first.tokenizer, "0" * 64, train, rows(4, "c"), config, held_frames=())
    data = CheckData(rows(4, "m"), rows(4, "c"), train, frames=(), held_frames=())
    never = replace(LIMITS, auroc=0.0, error=0.0, brier=0.0, false_share=0.0, missed_share=0.0)
    found = recheck(lambda: first, lambda: second, signal, data, folder=tmp_path, config=never)
    assert [step.name for step in found.steps] == ALL
    assert found.outcome in ("retrained", "failed")
    if found.signal is not None:
        assert found.signal.weights == "1" * 64
        assert found.signal.placement == placement
        assert found.signal.tensors_hash() != signal.tensors_hash()
    thresholds = [step.thresholds for step in found.steps]
    assert thresholds[0] != thresholds[1]
