"""What a gate found: its verdict, and the files that machines and people read it from.

result = GateResult.load("runs/gate")
result.passed, result.verdict, result.named("fail")
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.pipeline.check import AUDITS, FILES, KINDS, PURIFICATION, STAGES, Check, Ruling
from keelguard.pipeline.junit import to_junit
from keelguard.pipeline.policy import GatePolicy
from keelguard.pipeline.sarif import Finding, to_sarif
from keelguard.pipeline.summary import gate_summary
from keelguard.runs import read_json, write_json, write_text

FORMAT = "keelguard.gate/1"
GATE_FILE, JUNIT_FILE, SARIF_FILE, SUMMARY_FILE = "gate.json", "gate.xml", "gate.sarif", "summary.md"
RULES = {kind.replace(" ", "-"): demand for kind, demand in KINDS.items()}
"""The rules of `gate.sarif`."""


_OF_NOBODY = (FILES, AUDITS, STAGES, PURIFICATION)
"""What passes without saying anything good of the candidate."""


def decide(checks: Sequence[Check], policy: GatePolicy) -> bool:
    """Whether a gate is passed: nothing failed, something speaks for the candidate, and nothing else is open.

    Checks that are not evaluable are let through only where the policy says so.
    """
    rulings = {check.ruling for check in checks}
    told = any(check.ruling == "pass" and check.kind not in _OF_NOBODY for check in checks)
    return "fail" not in rulings and told and (policy.not_evaluable == "pass" or "not evaluable" not in rulings)


_WORDS: dict[Ruling, str] = {"pass": "passed", "fail": "failed", "not evaluable": "not evaluable"}


@dataclass(frozen=True)
class GateResult:
    """The outcome of `keelguard gate`; the same inputs give the same files.

    Attributes:
        candidate, reference: name, kind, model, adapter and weights of either side.
        policy: every key with its value.
    """

    passed: bool
    candidate: Mapping[str, Any]
    reference: Mapping[str, Any]
    policy: Mapping[str, Any]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]

    def named(self, ruling: Ruling) -> list[Check]:
        """The checks of a ruling."""
        return [check for check in self.checks if check.ruling == ruling]

    @property
    def strict(self) -> bool:
        """Whether a check that is not evaluable fails the gate."""
        return self.policy["not_evaluable"] != "pass"

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        counts = {ruling: len(self.named(ruling)) for ruling in ("fail", "not evaluable", "pass")}
        said = f"of {len(self.checks)} checks {', '.join(f'{counts[each]} {words}' for each, words in _WORDS.items())}"
        if self.passed:
            return f"Passed: {said}."
        if counts["fail"]:
            return f"Failed: {said}."
        if counts["not evaluable"] and self.strict:
            return f"Not passed: {said}, and what cannot be evaluated does not pass."
        return f"Not passed: {said}, so that nothing speaks for the candidate."

    def to_json(self) -> dict[str, Any]:
        """The result as `gate.json` holds it."""
        return {"format": FORMAT, **vars(self), "checks": [c.to_json() for c in self.checks], "notes": list(self.notes)}

    def findings(self) -> list[Finding]:
        """What a scanner should show: what failed, and what could not be evaluated."""
        found = []
        for check in self.checks:
            if check.ruling != "pass":
                level = "error" if check.ruling == "fail" or self.strict else "warning"
                side = self.reference if (check.kind, check.subject) == (FILES, "reference") else self.candidate
                text = f"{check.name}: {check.ruling}: {check.reason}"
                found.append(Finding(check.kind.replace(" ", "-"), level, text, str(side["name"]), check.subject))
        return found

    def save(self, folder: Path) -> None:
        """Write the four files, each whole or not at all; `gate.json` comes last and vouches for the others.

        Raises:
            FailureError: the folder cannot be written.
        """
        write_text(folder / JUNIT_FILE, to_junit(self.checks, self.strict))
        write_json(folder / SARIF_FILE, to_sarif(self.findings(), RULES))
        write_text(folder / SUMMARY_FILE, gate_summary(self))
        write_json(folder / GATE_FILE, self.to_json())

    @classmethod
    def load(cls, folder: str | Path) -> "GateResult":
        """The inverse of `save`.

        Raises:
            UsageError: there is no gate, it is damaged, or of another format.
        """
        path = Path(folder) / GATE_FILE
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise UsageError(f"{path}: is no result of the format {FORMAT}; run `keelguard gate` again")
        try:
            checks = tuple(Check(**{k: v for k, v in each.items() if k != "name"}) for each in data["checks"])
            return cls(**{**data, "checks": checks, "notes": tuple(data["notes"])})
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path}: is damaged ({error}); run `keelguard gate` again") from error
