"""The model card section and the findings say what the page says, in Markdown and for scanners."""

import dataclasses
import json
import re

import pytest
from markdown_it import MarkdownIt
from small_package import BROKEN, SECRET, audit, audits, changed, controls, model, purification, stages, write_package

from keelguard.pipeline.card import card_section, write_card
from keelguard.pipeline.findings import RULES, package_findings, write_package_sarif
from keelguard.pipeline.package import Control, StageRecord
from keelguard.pipeline.sarif import Finding
from keelguard.pipeline.surfaces import Column
from keelguard.stats import Rate

HOSTILE = (
    "<script>alert(1)</script>\x1b[31m\u202e",
    "![x](http://evil.example/p.png) [y](javascript:alert(1))",
    "a | b\n\n# heading\n- item\n---",
    "` `` ```\nfence",
    "*b* _i_ <b>x</b> [1]: http://evil.example",
)


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(text)


def found(package) -> dict[str, Finding]:
    return {finding.rule: finding for finding in package_findings(package)}


def test_card_says_what_was_done_what_it_withstands_and_its_limits(tmp_path):
    package = write_package(tmp_path)
    text = card_section(package)
    titles = re.findall(r"^#+ .*$", text, re.MULTILINE)
    assert titles == [
        "## Hardened with keelguard", "### What was found", "### What was done",
        "### What it withstands, and what it costs", "### Controls", "### Limits", "### Hashes",
    ]  # fmt: skip
    assert "| direct | 4 % [2, 10] | 2 % [0.6, 7] | 0 % [0, 4] |" in text
    assert "purify: Words that disturb the model’s own answers were searched" in text
    assert (
        "| guard | Verdicts tell harmful from harmless answers. | 0.981 [0.97, 0.99] | chance | 0.5 | – | holds |"
        in text
    )
    for stage in package.stages:
        for name, value in stage.artefacts.items():
            assert f"| `{name}` | `{value}` |" in text
    assert "The figures hold for the weights cdcdcdcdcdcdcdcd alone" in text
    assert rendered(text).count("<table>") == 3
    assert SECRET not in text
    assert not re.search(r"\b(clean|safe)\b", text, re.IGNORECASE)


def test_card_hides_no_failure(tmp_path):
    bad = dataclasses.replace(controls()["purify"][0], holds=False)
    text = card_section(write_package(tmp_path, changed("purify", controls=(bad,))))
    assert "**This hardening did not hold in full. Failed: purify. Still works" in text
    assert "**does not hold** |" in text
    assert "`purify/purify.json` (of a failed stage)" in text


def test_card_is_written_whole(tmp_path):
    package = write_package(tmp_path / "p")
    write_card(package, tmp_path / "out" / "MODEL_CARD.md", [Column("tuned", model("t", BROKEN["received"]))])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["MODEL_CARD.md"]
    assert "| guarded | tuned |" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("text", HOSTILE)
def test_card_takes_every_name_for_text(tmp_path, text):
    bad = Control(text, text, text, {text: text}, None, None, text)
    records = tuple(dataclasses.replace(stage, reason=text, controls=(bad,)) for stage in stages())
    several = audits()
    first = several["received"].models[0]
    strange = dataclasses.replace(first, safety={text: first.safety["direct"]}, over_refusal={text: Rate(1, 2)})
    several["received"] = dataclasses.replace(several["received"], models=[strange])
    plain = purification()
    course = dataclasses.replace(plain.suspects[0], before=dataclasses.replace(plain.suspects[0].before, text=text))
    package = write_package(
        tmp_path, records, several, purification(suspects=(course,)), source=text, adapter=text, weights={text: text},
        versions={"keelguard": text},
    )  # fmt: skip
    package = dataclasses.replace(package, stages=(*package.stages, StageRecord("x", "done", artefacts={text: text})))
    html = rendered(card_section(package))
    for tag in ("<a", "<img", "<script", "<b>", "<h1", "<h4", "<em", "<hr", "<pre"):
        assert tag not in html
    assert html.count("<h2") == 1
    assert html.count("<table>") == 3
    assert not set(html) & set("\x1b\u202e")


def test_a_hardening_that_held_leaves_only_what_still_works(tmp_path):
    package = write_package(tmp_path)
    rules = found(package)
    assert set(rules) == {"strong-insertion", "attack-succeeds"}
    assert rules["strong-insertion"].path == "purify/purify.json"
    assert "“turtle velvet”" in rules["strong-insertion"].message
    assert rules["attack-succeeds"].path == "audits/guarded.json"
    assert "benign fine-tune 41 % [32, 51]" in rules["attack-succeeds"].message
    assert "prefill" not in rules["attack-succeeds"].message
    known = package_findings(package, {"received": Rate(47, 48), "guarded": Rate(40, 48)})
    assert any("trigger 83 % [70, 91]" in each.message for each in known if each.rule == "attack-succeeds")


def test_failed_skipped_and_untested_stages_are_findings(tmp_path):
    bad = dataclasses.replace(controls()["diagnose"][0], holds=False)
    records = changed("diagnose", controls=(bad,))
    untested = dataclasses.replace(controls()["guard"][0], holds=None, why="one class only")
    records = tuple(
        dataclasses.replace(each, controls=(untested,)) if each.name == "guard" else each
        for each in records
        if each.name != "inspect"
    )
    skip = {"status": "skipped", "reason": "no time"}
    records = tuple(dataclasses.replace(each, **skip) if each.name == "audit-purified" else each for each in records)
    package = write_package(tmp_path, records)
    every = package_findings(package)
    rules = {finding.rule: finding for finding in every}
    assert (rules["stage-failed"].level, rules["stage-failed"].path) == ("error", "stages/diagnose.json")
    assert bad.claim.rstrip(".") in rules["stage-failed"].message
    assert bad.why in rules["stage-failed"].message
    assert "one class only" in rules["control-undecided"].message
    skips = [finding.message for finding in every if finding.rule == "stage-skipped"]
    assert skips == ["audit-purified was left out: no time", "inspect was not run."]


def test_code_in_the_files_is_an_error(tmp_path):
    rules = found(write_package(tmp_path / "a", changed("inspect", figures={"remote code": True, "pickle_files": 2})))
    assert rules["remote-code"].level == rules["pickle"].level == "error"
    assert "pickle_files: 2" in rules["pickle"].message
    for value in (False, 0, "no", "None", "", [], None):
        rules = found(
            write_package(tmp_path / "b", changed("inspect", figures={"remote code": value, "pickle": value}))
        )
        assert not {"remote-code", "pickle"} & set(rules), value


def test_what_a_purification_leaves_is_an_error(tmp_path):
    plain = purification()
    strong = plain.suspects[0].before
    spike = plain.spikes[0]
    left = purification(fresh=(strong,), spikes=(dataclasses.replace(spike, after=spike.before),))
    rules = found(write_package(tmp_path, purified=left))
    assert rules["insertion-left"].level == rules["canary-left"].level == "error"
    assert "98 % [89, 99.6]" in rules["canary-left"].message


def test_what_the_last_state_lost_is_a_finding_and_noise_is_none(tmp_path):
    guarded = model(
        "m guarded", (40, *BROKEN["received"][1:]), over_refusal={"benign": Rate(30, 100), "borderline": Rate(5, 100)},
        utility={"facts": Rate(20, 64), "arithmetic": Rate(48, 60)}, degenerate=Rate(60, 296),
    )  # fmt: skip
    several = audits()
    several["guarded"] = audit(several["guarded"].models[0], guarded, judge="keyword")
    rules = found(write_package(tmp_path, found=several))
    assert rules["attack-worse"].level == "error"
    assert "direct (+36 points)" in rules["attack-worse"].message
    assert "nested" not in rules["attack-worse"].message
    assert "benign from 0 % [0, 4] to 30 % [22, 40]" in rules["over-refusal"].message
    assert "borderline" not in rules["over-refusal"].message
    assert "facts" in rules["utility"].message
    assert "all tasks" in rules["utility"].message
    assert "arithmetic" not in rules["utility"].message
    assert "degenerate" in rules
    assert rules["weak-judge"].level == "note"


def test_an_attack_that_only_one_state_was_put_to_is_no_comparison(tmp_path):
    several = audits()
    first = several["received"].models[0]
    few = dataclasses.replace(first, safety={"direct": first.safety["direct"]})
    several["received"] = audit(few)
    assert "attack-worse" not in found(write_package(tmp_path, found=several))


def test_findings_are_sarif_and_hold_no_text_of_a_model(tmp_path):
    package = write_package(tmp_path / "p", changed("purify", controls=(Control("\x1b]0;x", 1, "y", 1, holds=False),)))
    write_package_sarif(package, tmp_path / "harden.sarif")
    text = (tmp_path / "harden.sarif").read_text()
    log = json.loads(text)
    assert log["version"] == "2.1.0"
    results = log["runs"][0]["results"]
    assert {each["ruleId"] for each in results} == {"stage-failed", "strong-insertion", "attack-succeeds"}
    assert [each["id"] for each in log["runs"][0]["tool"]["driver"]["rules"]] == list(RULES)
    assert SECRET not in text
    assert "\\u001b" not in text
