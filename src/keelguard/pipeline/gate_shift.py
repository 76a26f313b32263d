"""The gate's reading of `keelguard shift REFERENCE --against CANDIDATE`: what drifted beyond its warning limit."""

from collections.abc import Sequence

from keelguard.pipeline.check import SHIFT, Check, Ruling, undecided
from keelguard.pipeline.drift import Drift
from keelguard.pipeline.shift_results import Shift


def shift_checks(shift: Shift, candidate: str, reference: str, metrics: Sequence[str]) -> list[Check]:
    """A check for each metric on each kind of requests that both checkpoints were measured on.

    Args:
        candidate, reference: the hashes of their weights.
        metrics: those of the policy.
    """
    sides = [side["weights"] if side else "" for side in (shift.model, shift.against)]
    if sorted(sides) != sorted((candidate, reference)):
        named = " and ".join(each[:16] or "nothing" for each in sides)
        return [undecided(SHIFT, "", f"it compares the weights {named}, not those of the candidate and the reference")]
    names = {pair.name for pair in shift.pairs if pair.kind == "checkpoints"}
    found = []
    for metric in metrics:
        drifts = {name: drift for name, drift in shift.drift.get(metric, {}).items() if name in names}
        found += [_check(f"{metric}, {name}", drift) for name, drift in drifts.items()]
        if not drifts:
            found.append(undecided(SHIFT, metric, f"{metric} was not measured between these checkpoints"))
    return found


def _check(subject: str, drift: Drift) -> Check:
    ruling: Ruling = "pass" if not drift.warn else "fail" if drift.low > drift.limit else "not evaluable"
    said = {"pass": "within", "fail": "beyond", "not evaluable": "beyond, and its interval is not,"}[ruling]
    figures = f"{drift.value:.3f} [{drift.low:.3f}, {drift.high:.3f}]"
    rule = (
        "pass where the drift is within what requests of one kind show among themselves; fail where its interval "
        "begins beyond; else not evaluable"
    )
    return Check(
        SHIFT, subject, ruling, f"a drift of {figures} is {said} the warning limit {drift.limit:.3f}", rule,
        candidate=drift.value, reference=drift.control, low=drift.low, high=drift.high, margin=drift.limit,
        test="bootstrap over requests",
    )  # fmt: skip
