"""`keelguard gate`: whether a later model keeps what a reference had, by a policy.

result = gate("runs/tuned", "runs/harden", GatePolicy(), "runs/gate")
result.passed, result.checks                  # gate.json, gate.xml, gate.sarif and summary.md are in the folder

It loads what either side has, audits what nobody has audited, with the very questions of the reference's audit, and
leaves every decision to `checks` and `package_checks`.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from keelguard.errors import KeelguardError, UsageError
from keelguard.pipeline.check import AUDITS, CERTIFICATE, FILES, PURIFICATION, SIGNAL, STAGES, Check, undecided
from keelguard.pipeline.gate_audits import GateOptions, compare_audits, config_of
from keelguard.pipeline.gate_result import GATE_FILE, JUNIT_FILE, SARIF_FILE, SUMMARY_FILE, GateResult, decide
from keelguard.pipeline.gate_shift import shift_checks
from keelguard.pipeline.gate_signal import signal_checks
from keelguard.pipeline.package import CERTIFICATE as SEAL
from keelguard.pipeline.package_checks import certificate_check, purification_check, stages_check
from keelguard.pipeline.policy import GatePolicy
from keelguard.pipeline.seal import check_seal, read_seal
from keelguard.pipeline.shift_results import Shift
from keelguard.pipeline.sides import Side, open_side
from keelguard.progress import SILENT, Reporter
from keelguard.runs import disk_errors, versions
from keelguard.units.groups import UnitMap
from keelguard.units.verify import verify

_DEFAULTS = GateOptions()


def gate(
    candidate: str,
    against: str,
    policy: GatePolicy,
    out: str | Path,
    *,
    options: GateOptions = _DEFAULTS,
    reporter: Reporter = SILENT,
) -> GateResult:
    """Check a candidate against a reference, and write what was found into a folder.

    Args:
        candidate: a run of `harden`, `finetune` or `audit`, a checkpoint, an adapter, or a hub id.
        against: the same, but no hub id.

    Raises:
        UsageError: a side is none of these, or an audit cannot be repeated without a further option.
        FailureError: the folder cannot be written.
    """
    out = Path(out)
    with disk_errors(out):
        # Whatever ends this run early must not leave the verdict of an earlier one.
        for name in (GATE_FILE, JUNIT_FILE, SARIF_FILE, SUMMARY_FILE, SEAL):
            (out / name).unlink(missing_ok=True)
    shift = None if options.shift is None else Shift.load(options.shift)
    reference = open_side(against, column=options.against_name, pinned=policy.reference_sha256)
    if reference.kind == "model" and not Path(against).is_dir():
        raise UsageError(f"--against {against}: no such folder; give a run of keelguard harden, audit or finetune")
    ours = open_side(candidate, adapter=options.adapter, column=options.name, allow_pickle=options.allow_pickle)
    if reference.kind == "audit run":
        # What was measured of it counts, whatever stands at its path by now.
        reference = replace(reference, wrong="")
    if policy.reference_sha256 and reference.package is None and not reference.wrong:
        raise UsageError(f"policy: reference_sha256 pins a package's harden.json, and {against} is none; use null")
    checks = files_checks(ours, reference)
    notes: list[str] = []
    if any(check.ruling == "fail" for check in checks):
        checks += _unseen(reference, policy)
    else:
        checks += _of_the_reference(reference, policy)
        certificate = _certificate(ours, reference, policy, out, options)
        if policy.asks_audits:
            ours, reference, measured, notes = compare_audits(ours, reference, policy, out, options, reporter)
            checks += measured
        checks += certificate
        if policy.signal:
            config = partial(config_of, reference, policy, options)
            checks += signal_checks(ours, reference, policy, config, options.load, reporter)
        if shift is not None:
            checks += shift_checks(shift, ours.to_json()["weights"], reference.to_json()["weights"], policy.shift)
    result = GateResult(
        passed=decide(checks, policy),
        candidate=ours.to_json(),
        reference=reference.to_json(),
        policy=policy.to_json(),
        checks=tuple(checks),
        notes=tuple(notes),
        versions=versions(),
    )
    result.save(out)
    return result


def files_checks(candidate: Side, reference: Side) -> list[Check]:
    """Whether the files of either side are those of its records, where it has any."""
    demand = "fail where a file's SHA-256, or the hash of the weights, is not the one that was written down"
    found = []
    for role, side in (("reference", reference), ("candidate", candidate)):
        if side.wrong:
            found.append(Check(FILES, role, "fail", side.wrong, demand))
        elif side.package is not None:
            count = sum(len(stage.artefacts) for stage in side.package.stages)
            found.append(Check(FILES, role, "pass", f"its {count} files are those that it vouches for", demand))
        elif side.weights and not side.absent:
            found.append(Check(FILES, role, "pass", f"the weights are those of the {side.kind}", demand))
    return found


def _unseen(reference: Side, policy: GatePolicy) -> list[Check]:
    """What nothing is known of where files are not those that were vouched for."""
    packaged = reference.kind == "package"
    asked = {
        STAGES: policy.stages and packaged,
        AUDITS: policy.asks_audits,
        CERTIFICATE: policy.certificate is not None,
        SIGNAL: policy.signal and (packaged or reference.signal is not None),
        PURIFICATION: policy.max_canary_asr is not None,
    }
    why = "the files are not those that were vouched for"
    return [undecided(kind, "", why) for kind, wanted in asked.items() if wanted]


def _of_the_reference(reference: Side, policy: GatePolicy) -> list[Check]:
    """What is read from the reference alone."""
    found = []
    package = reference.package
    if policy.stages and package is not None:
        found.append(stages_check(package.stages))
    if policy.max_canary_asr is not None:
        if package is None:
            why = "the reference is no package of `keelguard harden` and has no canaries; null in the policy waives it"
            found.append(undecided(PURIFICATION, "", why))
        elif (result := package.purification) is None:
            why = next((stage.reason for stage in package.stages if stage.name == "purify"), "")
            found.append(undecided(PURIFICATION, "", f"the reference was not purified{f' ({why})' if why else ''}"))
        else:
            found.append(purification_check(result, policy))
    return found


def _certificate(candidate: Side, reference: Side, policy: GatePolicy, out: Path, options: GateOptions) -> list[Check]:
    """The units by the package's own certificate where that is about these, else by the reference's weights."""
    required = policy.certificate
    if required is None:
        return []
    if candidate.absent or candidate.model is None:
        return [undecided(CERTIFICATE, required, f"the candidate's model is not at hand: {candidate.absent}")]
    sealed = reference.package.folder / SEAL if reference.package is not None and options.units is None else None
    units = options.units or reference.units
    passed: dict[str, Any] = {
        "adapter": candidate.adapter,
        "allow_pickle": options.allow_pickle,
        "trust_remote_code": options.trust_remote_code,
    }
    try:
        if sealed is not None and sealed.is_file() and (seal := read_seal(sealed)).get("required") == required:
            found = check_seal(seal, candidate.model, **passed)
            counts = found.selected, len(found.broken)
        elif units is None:
            why = "the reference has no unit map"
            if reference.package is None:
                why += "; name one with --units, or waive it with null in the policy"
            return [undecided(CERTIFICATE, required, why)]
        elif reference.absent or reference.model is None:
            return [undecided(CERTIFICATE, required, f"the reference's model is not at hand: {reference.absent}")]
        else:
            chart = UnitMap.load(units)
            base, own = reference.model, reference.adapter
            found = verify(base, candidate.model, chart, base_adapter=own, require=required, **passed)
            counts = found.selected, found.violations
    except KeelguardError as error:
        return [undecided(CERTIFICATE, required, str(error))]
    found.save(out / SEAL)
    return [certificate_check(required, *counts, found.broken, found.config)]
