"""What a gate writes: the verdict, JSON, JUnit XML, SARIF and Markdown, whatever stands in names and reasons."""

import dataclasses
import io
import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from gate_audits_for_tests import broken, report

from keelguard.errors import UsageError
from keelguard.pipeline.check import AUDITS, FILES, KINDS, PURIFICATION, STAGES, Check, Ruling
from keelguard.pipeline.checks import compare_models
from keelguard.pipeline.gate_result import RULES, GateResult, decide
from keelguard.pipeline.junit import to_junit
from keelguard.pipeline.policy import GatePolicy
from keelguard.pipeline.sarif import Finding, to_sarif
from keelguard.pipeline.summary import gate_summary, gate_table

HOSTILE = "x\x1b[31m|`<img src=x>`[click](http://evil.test) {0} & \u202egnp.exe\ud800"
SAID = "5 % against 5 %"
LENIENT = GatePolicy(not_evaluable="pass")


def check(
    ruling: Ruling, kind: str = "attack success", subject: str = "direct", reason: str = "5 % against 5 %"
) -> Check:
    return Check(kind, subject, ruling, reason, "the rule")


def result(*checks: Check, policy: GatePolicy | None = None, **changes: Any) -> GateResult:
    policy = policy or GatePolicy()
    side = {"name": "adapters/new", "kind": "model", "model": "adapters/new", "adapter": None, "weights": "ab" * 32}
    plain = GateResult(
        decide(checks, policy), side, {**side, "name": "runs/harden", "kind": "package"}, policy.to_json(), checks, (),
        {"keelguard": "0.1.0"},
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


# The verdict


@pytest.mark.parametrize(
    ("rulings", "strict", "lenient"),
    [
        (("pass", "pass"), True, True),
        (("pass", "fail"), False, False),
        (("pass", "not evaluable"), False, True),
        (("not evaluable",), False, False),
        (("not evaluable", "fail"), False, False),
        ((), False, False),
    ],
)
def test_what_cannot_be_evaluated_fails_unless_it_is_let_through(rulings, strict, lenient):
    checks = [check(ruling) for ruling in rulings]
    assert (decide(checks, GatePolicy()), decide(checks, LENIENT)) == (strict, lenient)


@pytest.mark.parametrize("kind", [FILES, AUDITS, STAGES, PURIFICATION])
def test_what_is_not_about_the_candidate_alone_is_no_evidence(kind: str):
    files = check("pass", kind, "reference")
    assert not decide([files], LENIENT)
    assert not decide([files, check("not evaluable")], LENIENT)
    assert decide([files, check("pass")], GatePolicy())


def test_the_verdict_says_why():
    assert result(check("pass")).verdict == "Passed: of 1 checks 1 passed, 0 failed, 0 not evaluable."
    assert result(check("pass"), check("fail")).verdict.startswith("Failed: ")
    assert "what cannot be evaluated does not pass" in result(check("not evaluable")).verdict
    assert "nothing speaks for the candidate" in result(check("not evaluable"), policy=LENIENT).verdict


# gate.json


def test_a_result_is_read_back_as_it_was(tmp_path):
    checks = compare_models(report({"a": broken(40)}), report({"a": broken(2)}), ["a"], GatePolicy())
    kept = result(*checks, notes=("a note",))
    kept.save(tmp_path)
    assert GateResult.load(tmp_path) == kept
    assert {path.name for path in tmp_path.iterdir()} == {"gate.json", "gate.xml", "gate.sarif", "summary.md"}


def test_the_same_result_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        result(check("fail"), check("not evaluable"), check("pass")).save(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_damaged_result_is_a_mistake(tmp_path):
    result(check("pass")).save(tmp_path)
    data = json.loads((tmp_path / "gate.json").read_text())
    (tmp_path / "gate.json").write_text(json.dumps({**data, "format": "keelguard.audit/1"}))
    with pytest.raises(UsageError, match="is no result of the format"):
        GateResult.load(tmp_path)
    (tmp_path / "gate.json").write_text(json.dumps({**data, "checks": [{}]}))
    with pytest.raises(UsageError, match="is damaged"):
        GateResult.load(tmp_path)


# JUnit


def parsed(checks: list[Check], strict: bool = True) -> ElementTree.Element:
    return ElementTree.fromstring(to_junit(checks, strict))


def test_junit_has_a_case_for_every_check_and_counts_them():
    checks = [check("pass"), check("fail", subject="a"), check("not evaluable", subject="b")]
    [suite] = parsed(checks)
    assert suite.attrib == {"name": "keelguard gate", "tests": "3", "failures": "1", "errors": "1", "skipped": "0"}
    tags = [[child.tag for child in case] for case in suite]
    assert tags == [["system-out"], ["failure"], ["error"]]
    assert suite[1].attrib == {"classname": "keelguard gate.attack success", "name": "attack success: a"}
    assert suite[1][0].attrib["message"] == "5 % against 5 %"
    assert suite[1][0].text == "the rule"


def test_junit_skips_what_the_policy_lets_through():
    [suite] = parsed([check("pass"), check("not evaluable")], strict=False)
    assert (suite.attrib["errors"], suite.attrib["skipped"]) == ("0", "1")
    assert suite[1][0].tag == "skipped"


def test_junit_survives_hostile_text():
    [suite] = parsed([check("fail", subject=HOSTILE, reason=HOSTILE + "\x00\ufffe")])
    assert "⟨U+001B⟩" in suite[0].attrib["name"]
    assert "⟨U+FFFE⟩" in suite[0][0].attrib["message"]


# SARIF


def test_sarif_lists_every_rule_and_what_speaks_against_passing(tmp_path):
    checks = (
        check("pass"),
        check("fail"),
        check("not evaluable", "certificate", "scu"),
        check("fail", FILES, "reference"),
    )
    result(*checks).save(tmp_path)
    log = json.loads((tmp_path / "gate.sarif").read_text())
    [run] = log["runs"]
    assert log["version"] == "2.1.0"
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [kind.replace(" ", "-") for kind in KINDS]
    assert [found["ruleId"] for found in run["results"]] == ["attack-success", "certificate", "files"]
    assert [found["level"] for found in run["results"]] == ["error"] * 3
    for found in run["results"]:
        assert run["tool"]["driver"]["rules"][found["ruleIndex"]]["id"] == found["ruleId"]
    places = [found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for found in run["results"]]
    assert places == ["adapters/new", "adapters/new", "runs/harden"]


def test_sarif_only_warns_of_what_the_policy_lets_through():
    lenient = result(check("fail"), check("not evaluable"), policy=LENIENT)
    assert [finding.level for finding in lenient.findings()] == ["error", "warning"]


def test_sarif_has_no_placeholders_and_no_links_of_others():
    finding = Finding("a", "note", HOSTILE, "a b/ü#1.json")
    [found] = to_sarif([finding], {"a": "A."})["runs"][0]["results"]
    assert "{{0}}" in found["message"]["text"]
    assert "](" not in found["message"]["text"]
    assert "\x1b" not in found["message"]["text"]
    assert found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a%20b/%C3%BC%231.json"


def test_sarif_findings_keep_their_identity_while_figures_change():
    def fingerprint(message: str, path: str = "x", subject: str = "") -> dict[str, str]:
        log = to_sarif([Finding("a", "error", message, path, subject)], {"a": "A."})
        return log["runs"][0]["results"][0]["partialFingerprints"]

    assert fingerprint("5 %") == fingerprint("6 %")
    assert fingerprint("5 %") != fingerprint("5 %", "y")
    # Else a code host would show two attacks on one model as one finding.
    assert fingerprint("5 %", subject="direct") != fingerprint("5 %", subject="nested")


def test_sarif_paths_are_absolute_relative_or_absent():
    def place(path: str) -> Any:
        [found] = to_sarif([Finding("a", "error", "m", path)], {"a": "A."})["runs"][0]["results"]
        return found.get("locations") and found["locations"][0]["physicalLocation"]

    assert place("/tmp/a b")["artifactLocation"]["uri"] == "file:///tmp/a%20b"
    assert place("./runs/x")["artifactLocation"]["uri"] == "runs/x"
    assert place("runs/x")["region"] == {"startLine": 1}
    assert place("") is None


def test_sarif_of_an_unknown_rule_is_a_defect():
    with pytest.raises(ValueError, match="none of a"):
        to_sarif([Finding("b", "error", "m", "x")], {"a": "A."})


def test_every_kind_of_check_is_a_rule():
    assert set(RULES) == {kind.replace(" ", "-") for kind in KINDS}
    assert all(re.fullmatch(r"[a-z-]+", rule) for rule in RULES)


# Markdown and the terminal


def test_the_summary_shows_first_what_speaks_against_passing():
    text = gate_summary(result(check("pass", subject="quiet"), check("not evaluable", subject="open"), check("fail")))
    assert text.startswith("## ❌ keelguard gate\n\n**Failed: of 3 checks 1 passed, 1 failed, 1 not evaluable.**")
    assert text.index("direct") < text.index("open") < text.index("<details>") < text.index("quiet")
    assert "`adapters/new` (model, weights `abababababababab`)" in text
    assert gate_summary(result(check("pass"))).startswith("## ✅ keelguard gate")


def test_the_summary_takes_names_for_text():
    side = {"name": HOSTILE, "kind": "model", "model": HOSTILE, "adapter": None, "weights": ""}
    text = gate_summary(result(check("fail", subject=HOSTILE, reason=HOSTILE), candidate=side, notes=(HOSTILE,)))
    assert "<img" not in text.replace("\\<img", "")
    assert "](http" not in text.replace("\\](http", "").replace("\\]", "")
    assert "\x1b" not in text
    assert "\u202e" not in text
    row = next(line for line in text.splitlines() if line.startswith("| ❌"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_the_table_for_the_terminal_holds_the_same():
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(gate_table(result(check("fail", subject=HOSTILE), check("pass"), notes=("[bold]note[/bold]",))))
    text = console.export_text()
    assert "Failed: of 2 checks 1 passed, 1 failed" in text
    assert "[bold]note[/bold]" in text
    assert "\x1b" not in text
