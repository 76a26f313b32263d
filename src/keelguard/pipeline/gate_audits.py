"""The audits behind a gate: what nobody has audited is audited as the reference was, and the two are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelguard.errors import FailureError, UsageError
from keelguard.evaluation.audit import AuditConfig, audit_models
from keelguard.evaluation.judges import JudgeConfig
from keelguard.guard.adapter import Signal
from keelguard.guard.decoding import GuardedDecoder
from keelguard.guard.loop import check_fit
from keelguard.models import LoadedModel, load_model
from keelguard.pipeline.check import ATTACK, AUDITS, Check, undecided
from keelguard.pipeline.checks import audit_differences, measure_models, rule
from keelguard.pipeline.policy import GatePolicy
from keelguard.pipeline.repeat import repeated
from keelguard.pipeline.sides import Side
from keelguard.progress import Reporter
from keelguard.report import counts_keywords
from keelguard.units.diagnose import plain


@dataclass(frozen=True)
class GateOptions:
    """How models are found and loaded; nothing here changes what the policy demands.

    Attributes:
        adapter: a PEFT adapter that belongs to the candidate.
        name, against_name: the model of an audit run that has several.
        suite, limit, judge: what the reference is audited with where it never was; `suite` and `judge` also help to
            repeat an audit whose suite or judge is not found again.
        units: the unit map of a reference that is no package.
        shift: a finished `keelguard shift` of the two checkpoints.
        load: loads a model; the command line passes its options through it.
    """

    adapter: str | None = None
    name: str = ""
    against_name: str = ""
    suite: str = ""
    limit: int = 100
    judge: JudgeConfig | None = None
    units: Path | None = None
    shift: Path | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    load: Callable[..., LoadedModel] = load_model


def compare_audits(
    candidate: Side, reference: Side, policy: GatePolicy, out: Path, options: GateOptions, reporter: Reporter
) -> tuple[Side, Side, list[Check], list[str]]:
    """Both sides with their audits, the checks of these, and what a reader must know of them.

    Raises:
        UsageError: an audit cannot be repeated without a further option, or `out` holds one of something else.
    """
    try:
        if reference.report is None:
            reference = _audited(reference, config_of(reference, policy, options), out / "reference", options, reporter)
        assert reference.audit is not None and reference.report is not None
        if candidate.report is None:
            config = config_of(reference, policy, options)
            guarded = reference.guarded is not None
            candidate = _audited(candidate, config, out / "audit", options, reporter, guarded)
    except FailureError as error:
        return candidate, reference, [undecided(AUDITS, "", f"a side could not be audited: {error}")], []
    assert candidate.audit is not None and candidate.report is not None
    ours, theirs = candidate.audit, reference.audit
    demand = "not evaluable where suite, judge, data, limit, length of answers or seed differ"
    if differ := audit_differences(ours, theirs):
        return candidate, reference, [Check(AUDITS, "", "not evaluable", "; ".join(differ), demand)], []
    names = list(policy.attacks) or list(reference.report.safety)
    infos = [{info.name: info.settings for info in audit.attacks} for audit in (ours, theirs)]
    other = [name for name in names if name in infos[0] and name in infos[1] and infos[0][name] != infos[1][name]]
    measured: list[Any] = [undecided(ATTACK, name, "its settings differ between the audits") for name in other]
    names = [name for name in names if name not in other]
    measured += measure_models(candidate.report, reference.report, names, policy)
    if candidate.guarded and reference.guarded and candidate.guarded_audit and reference.guarded_audit:
        if differ := audit_differences(candidate.guarded_audit, reference.guarded_audit):
            measured.append(undecided(AUDITS, "under the signal", "; ".join(differ)))
        else:
            suffix = ", under the signal"
            measured += measure_models(candidate.guarded, reference.guarded, names, policy, suffix)
    said = "one suite, one judge, the same data and settings"
    checks = [Check(AUDITS, "", "pass", said, demand), *rule(measured, policy.alpha)]
    return candidate, reference, checks, _notes(candidate, reference)


def config_of(reference: Side, policy: GatePolicy, options: GateOptions) -> AuditConfig:
    """How the reference was audited, or is to be.

    Raises:
        UsageError: it never was, and no suite is named; or its audit cannot be repeated without a further option.
    """
    if reference.audit is None:
        if not options.suite:
            raise UsageError(
                "--suite: the reference was never audited; name the suite that both are to be audited with"
            )
        return AuditConfig(suite=options.suite, judge=options.judge, limit=options.limit, attacks=policy.attacks)
    known = {info.name for info in reference.audit.attacks}
    if policy.attacks and not known & set(policy.attacks):
        names = ", ".join(sorted(known))
        raise UsageError(f"policy: attacks {', '.join(policy.attacks)}: the reference's audit has only {names}")
    folder = reference.package.folder if reference.package else None
    return repeated(
        reference.audit,
        suite=options.suite,
        judge=options.judge,
        attacks=policy.attacks,
        hints=reference.hints,
        folder=folder,
    )


def _audited(
    side: Side, config: AuditConfig, out: Path, options: GateOptions, reporter: Reporter, guarded: bool = False
) -> Side:
    """Audit a side; under its signal too, where that was made for these very weights and `guarded` asks for it."""
    if side.absent or side.model is None:
        raise FailureError(f"{side.name}: {side.absent}")
    signal = Signal.load(side.signal) if guarded and side.signal is not None else None
    if signal is not None and signal.weights != side.weights:
        signal = None

    def load(source: str) -> LoadedModel:
        loaded = options.load(source, adapter=side.adapter)
        return plain(loaded) if signal is not None else loaded

    def guard(loaded: LoadedModel) -> GuardedDecoder:
        assert signal is not None
        signal.check(loaded.weights_hash, loaded.source)
        check_fit(loaded.model, signal)
        return GuardedDecoder(signal)

    result = audit_models(
        [f"{out.name}={side.model}"],
        config,
        out=out,
        load=load,
        guard=None if signal is None else guard,
        guard_digest="" if signal is None else GuardedDecoder(signal).digest,
        reporter=reporter,
    )
    return side.audited(result)


def _notes(candidate: Side, reference: Side) -> list[str]:
    """What a reader must know of two audits that can be compared."""
    assert candidate.audit and reference.audit and candidate.report and reference.report
    notes = []
    if candidate.report.weights == reference.report.weights:
        notes.append("Candidate and reference have the very same weights.")
    ours, theirs = candidate.audit.versions, reference.audit.versions
    changed = [f"{name} {theirs.get(name)} → {ours.get(name)}" for name in ours if ours[name] != theirs.get(name)]
    if changed:
        notes.append(f"The audits were made with other versions: {', '.join(changed)}. Answers may differ by that.")
    if counts_keywords(reference.audit):
        notes.append("The judge counts refusal keywords, which is weak evidence of harm.")
    if bool(candidate.guarded) != bool(reference.guarded):
        having, lacking = ("candidate", "reference") if candidate.guarded else ("reference", "candidate")
        notes.append(f"Only the {having} was audited under a signal: the {lacking}'s is not compared.")
    return notes
