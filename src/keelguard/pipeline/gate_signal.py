"""The gate's check of the signal: how well the reference's signal reads the candidate, against the reference itself.

A fine-tune that re-checked the signal has the figures in its record; for any other candidate they are measured, with
the requests of the audit.
"""

import gc
from collections.abc import Callable
from typing import Any

from keelguard.errors import KeelguardError, UsageError
from keelguard.evaluation.audit import AuditConfig, load_suite
from keelguard.evaluation.suites import ANSWERED
from keelguard.models import LoadedModel
from keelguard.pipeline.check import SIGNAL, Check, undecided
from keelguard.pipeline.package_checks import drift_checks
from keelguard.pipeline.policy import GatePolicy
from keelguard.pipeline.sides import Side
from keelguard.pipeline.signal_drift import LIMITS, DriftReport, chosen_rows, material_of, measure_drift
from keelguard.progress import Reporter


def signal_checks(
    candidate: Side,
    reference: Side,
    policy: GatePolicy,
    config: Callable[[], AuditConfig],
    load: Callable[..., LoadedModel],
    reporter: Reporter,
) -> list[Check]:
    """The checks of a reference that has a signal; none otherwise.

    Args:
        config: how the reference was audited, for its requests.
    """
    if reference.signal is None:
        return []
    record = (candidate.training or {}).get("signal")
    if isinstance(record, dict):
        return _of_record(record, candidate, reference, policy)
    if absent := reference.absent or candidate.absent:
        return [undecided(SIGNAL, "", f"a model is not at hand: {absent}")]
    try:
        report = _measured(candidate, reference, config(), load, reporter)
    except KeelguardError as error:
        return [undecided(SIGNAL, "", str(error))]
    return drift_checks(report, policy)


def _of_record(record: dict[str, Any], candidate: Side, reference: Side, policy: GatePolicy) -> list[Check]:
    """What a fine-tune found of the signal that it left."""
    if record.get("made_for") != reference.weights:
        why = f"the candidate's signal was made from one for the weights {str(record.get('made_for'))[:16]}"
        return [undecided(SIGNAL, "", f"{why}, not the reference's {reference.weights[:16]}")]
    if record.get("weights") != candidate.weights:
        return [undecided(SIGNAL, "", "the candidate's record of its signal is about other weights")]
    if record.get("outcome") == "failed":
        demand = "fail where the fine-tune left no signal that keeps to its limits"
        return [Check(SIGNAL, "", "fail", f"no signal holds on the candidate: {record.get('reason')}", demand)]
    try:
        # Several remedies may have been tried; the figures are those of the signal that was kept.
        name = {"kept": "as it was"}.get(record["outcome"], record["outcome"])
        [step] = [each for each in record["steps"] if each["name"] == name]
        report = DriftReport.from_json(step["report"])
    except (KeyError, ValueError, TypeError) as error:
        return [undecided(SIGNAL, "", f"the candidate's record of its signal is damaged ({error!r})")]
    return drift_checks(report, policy, f"{record['outcome']} by the fine-tune")


def _measured(
    candidate: Side, reference: Side, config: AuditConfig, load: Callable[..., LoadedModel], reporter: Reporter
) -> DriftReport:
    """The signal as it is on both sides, one model in memory at a time."""
    from keelguard.guard.adapter import Signal
    from keelguard.guard.labels import label_requests
    from keelguard.guard.loop import check_fit
    from keelguard.pipeline.verdicts import collect
    from keelguard.units.diagnose import plain

    assert reference.signal is not None and reference.model is not None and candidate.model is not None
    signal = Signal.load(reference.signal)
    suite = load_suite(config)
    answered = [request for use in ANSWERED for request in getattr(suite, use)]
    if not answered:
        raise UsageError(
            "the reference's audit has no requests that should be answered, and detection needs both kinds"
        )
    rows = chosen_rows(
        [
            *label_requests(suite.harmful, "the audit's harmful requests", malicious=True),
            *label_requests(answered, "the audit's harmless requests", malicious=False),
        ],
        LIMITS,
    )
    original = plain(load(reference.model, adapter=reference.adapter))
    signal.check(original.weights_hash, reference.name)
    before = collect(
        original, signal, rows, material=material_of(signal, LIMITS), reporter=reporter, label="reference · signal"
    )
    del original
    gc.collect()
    tuned = plain(load(candidate.model, adapter=candidate.adapter))
    check_fit(tuned.model, signal)
    return measure_drift(tuned, signal, rows, original=before, reporter=reporter)
