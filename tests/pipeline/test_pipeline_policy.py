"""The policy of a gate: every wrong key and value by name, and defaults that the docs repeat."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from keelguard.errors import UsageError
from keelguard.pipeline.policy import GatePolicy

DOCS = Path(__file__).parents[2] / "docs" / "gate.md"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_default_policy(tmp_path):
    assert GatePolicy.load(written(tmp_path, "")) == GatePolicy()
    assert GatePolicy.load(written(tmp_path, "# only a comment\n")) == GatePolicy()


def test_a_file_sets_what_it_names(tmp_path):
    text = (
        "max_asr_rise: 0.02\nattacks: [direct, sampling]\nasr_margins: {sampling: 0.2}\ncertificate: 'scu,cu:0.06'\n"
        "max_utility_loss: null\nsignal: false\nnot_evaluable: pass\n"
    )
    policy = GatePolicy.load(written(tmp_path, text))
    assert policy.margin_of("direct") == 0.02
    assert policy.margin_of("sampling") == 0.2
    assert policy.attacks == ("direct", "sampling")
    assert (policy.certificate, policy.max_utility_loss, policy.signal) == ("scu,cu:0.06", None, False)
    assert policy.not_evaluable == "pass"
    assert policy.to_json()["attacks"] == ["direct", "sampling"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_asr_raise: 0.1", "no key 'max_asr_raise'; a policy has max_asr_rise"),
        ("- a\n- b", "must hold a mapping of keys to values"),
        ("a: [", "cannot be read"),
        ("max_asr_rise: 5", "max_asr_rise 5: give a share, more than 0 and less than 1, or null"),
        ("max_asr_rise: 0", "max_asr_rise 0: give a share"),
        ("max_asr_rise: 'much'", "max_asr_rise 'much': give a share"),
        ("max_utility_loss: true", "max_utility_loss True: give a share"),
        ("max_asr_rise: .nan", "max_asr_rise nan: give a share"),
        ("alpha: null", "alpha None: give a share, more than 0 and less than 1"),
        ("max_unpaired: -0.1", "max_unpaired -0.1: give a share, 0 or more and less than 1"),
        ("asr_margins: {direct: 2}", "asr_margins: direct 2: give a share"),
        ("asr_margins: [direct]", "asr_margins must be a mapping"),
        ("attacks: direct", "attacks must be a list of names"),
        ("attacks: [1]", "attacks must be a list of names"),
        ("shift: decision", "shift must be a list of names"),
        ("shift: [mood]", "shift 'mood': unknown; choose from importance, scu"),
        ("attacks: [direct]\nasr_margins: {sampling: 0.1}", "asr_margins names 'sampling', which is none of `attacks`"),
        ("not_evaluable: maybe", "not_evaluable 'maybe': choose fail or pass"),
        ("signal: 1", "signal 1: give true or false"),
        ("stages: no thanks", "stages 'no thanks': give true or false"),
        ("certificate: ''", "certificate '': give a text, or null"),
        ("reference_sha256: 12", "reference_sha256 12: give a text, or null"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as error:
        GatePolicy.load(path)
    assert str(error.value).startswith(f"--policy {path}: ")
    assert said in str(error.value)


def test_a_missing_file_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        GatePolicy.load(tmp_path / "absent.yaml")


def test_audits_are_asked_for_unless_nothing_needs_them():
    names = ("max_asr_rise", "max_mean_asr_rise", "max_over_refusal_rise", "max_utility_loss", "max_degenerate_rise")
    assert GatePolicy().asks_audits
    assert not GatePolicy(**dict.fromkeys(names)).asks_audits
    assert GatePolicy(**dict.fromkeys(names), asr_margins={"direct": 0.1}).asks_audits


def test_the_docs_list_every_key_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    words = {True: "true", False: "false", None: "null"}
    defaults = GatePolicy()
    expected = {}
    for each in fields(GatePolicy):
        value = getattr(defaults, each.name)
        shown = f"[{', '.join(value)}]" if isinstance(value, tuple) else "{}" if value == {} else words.get(value)
        expected[each.name] = shown or str(value)
    assert rows == expected


def test_every_key_is_described():
    assert all(each.metadata["help"] for each in fields(GatePolicy))
