"""Findings in the format that scanners and code hosts read: SARIF 2.1.0 (OASIS, 2020).

log = to_sarif([Finding("asr/direct", "error", "rose from 2 % to 40 %", "adapters/new")], {"asr/direct": "…"})
write_json(out / "gate.sarif", log)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from keelguard import __version__
from keelguard.hashes import sha256_of
from keelguard.plots import legible

VERSION = "2.1.0"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


@dataclass(frozen=True)
class Finding:
    """Something that a scanner should show.

    Attributes:
        rule: the rule that it breaks, one of those given to `to_sarif`.
        path: the file or folder that it is about, best relative to the repository; empty where there is none.
        subject: what tells findings of one rule on one path apart, such as the attack.
    """

    rule: str
    level: Literal["error", "warning", "note"]
    message: str
    path: str
    subject: str = ""


def to_sarif(findings: Sequence[Finding], rules: Mapping[str, str]) -> dict[str, Any]:
    """A SARIF log of one run.

    Args:
        rules: what each rule demands, as a sentence, by its id; those that nothing breaks are listed too.

    Raises:
        ValueError: a finding's rule is none of `rules`.
    """
    numbers = {rule: number for number, rule in enumerate(rules)}
    for finding in findings:
        if finding.rule not in numbers:
            raise ValueError(f"finding of the rule {finding.rule!r}, which is none of {', '.join(rules)}")
    driver = {
        "name": "keelguard",
        "version": __version__,
        "rules": [{"id": rule, "shortDescription": {"text": _text(words)}} for rule, words in rules.items()],
    }
    results = [_result(finding, numbers[finding.rule]) for finding in findings]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SCHEMA, "version": VERSION, "runs": [run]}


def _result(finding: Finding, number: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": number,
        "level": finding.level,
        "message": {"text": _text(finding.message)},
    }
    if finding.path:
        # A file of weights has no lines, but code hosts drop a result without one.
        place = {"artifactLocation": {"uri": _uri(finding.path)}, "region": {"startLine": 1}}
        result["locations"] = [{"physicalLocation": place}]
    # The figures in a message change from run to run; what is wrong, and where, does not.
    result["partialFingerprints"] = {"keelguard/v1": sha256_of([finding.rule, finding.path, finding.subject])}
    return result


def _text(text: str) -> str:
    """A message that holds neither placeholders nor links (sections 3.11.5 and 3.11.6), whoever wrote its parts."""
    return legible(text).replace("{", "{{").replace("}", "}}").replace("](", "] (")


def _uri(path: str) -> str:
    """A path as a URI reference: relative paths stay so, for the code host to find them in the repository."""
    pure = PurePosixPath(path)
    return pure.as_uri() if pure.is_absolute() else quote(pure.as_posix().removeprefix("./"))
