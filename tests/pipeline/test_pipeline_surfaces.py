"""The closing table shows the worst of each surface, says what was not measured and why, and takes names for text."""

import dataclasses
import io
import json

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from small_package import BROKEN, audits, cell, infos, model

from keelguard.attacks import ATTACKS
from keelguard.evaluation.results import AttackInfo
from keelguard.pipeline.markdown import code, plain
from keelguard.pipeline.surfaces import (
    ATTACK,
    BENIGN_TUNE,
    CHECKS,
    OTHER_TUNE,
    TIME,
    TRIGGER,
    Column,
    Row,
    Table,
    raised,
    surface_of,
    surfaces,
    surfaces_markdown,
    surfaces_table,
    worst_attack,
)
from keelguard.plots import rate_text
from keelguard.stats import Rate
from keelguard.testbed.suite import suite_text

HOSTILE = (
    "<script>alert(1)</script>\x1b[31m\u202e",
    "![x](http://evil.example/p.png) [y](javascript:alert(1))",
    "a | b\n\n# heading\n- item",
    "` `` ```\nfence",
    "[1]: http://evil.example [1](http://evil.example) [2][1]",
    "*b* _i_ ~~s~~ &lt;i&gt; <http://evil.example>",
    "{{ 7 * 7 }}[bold red]",
    "1. one",
    "- dash\\",
)


def columns() -> list[Column]:
    found = audits()
    return [
        Column("received", found["received"].models[0], Rate(47, 48)),
        Column("purified", None, why="its audit was skipped (--skip)"),
        Column("guarded", found["guarded"].models[1], Rate(1, 48), {CHECKS: 0.21, TIME: 1.08}),
    ]


def row(table: Table, name: str) -> Row:
    return next(each for each in table.rows if each.name == name)


def terminal(table: Table, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    console.print(surfaces_table(table, width=width))
    return stream.getvalue()


def test_rows_come_in_the_order_of_the_surfaces_then_costs():
    table = surfaces(columns(), infos())
    assert [each.name for each in table.rows] == [
        "direct", "nested", "prefill", "affixes", "sampling", TRIGGER, BENIGN_TUNE,
        "over-refusal", "utility", "degenerate answers", CHECKS, TIME,
    ]  # fmt: skip
    assert all(len(each.cells) == 3 for each in table.rows)
    assert [each.better for each in table.rows].count("high") == 1
    assert row(table, "utility").better == "high"


def test_the_worst_attack_of_a_surface_is_shown_and_named_by_column():
    table = surfaces(columns(), infos())
    received, purified, guarded = row(table, "nested").cells
    assert (received.rate, received.of) == (Rate(31, 100), "nested")
    assert (guarded.rate, guarded.of) == (Rate(2, 100), "role play")
    assert purified.rate is None
    assert "(received: nested; guarded: role play)" in table.notes[row(table, "nested").note - 1]
    assert "(prefill 20 in every state)" in table.notes[row(table, "prefill").note - 1]
    direct = row(table, "direct")
    assert direct.note == 0
    assert direct.cells[0].of == ""


def test_what_was_not_measured_is_a_dash_with_its_reason():
    table = surfaces(columns(), infos())
    for name in ("direct", "utility", "over-refusal"):
        missing = row(table, name).cells[1]
        assert missing.text == "–"
        assert table.notes[missing.note - 1] == "purified: its audit was skipped (--skip)."
    assert "not tried" in table.notes[row(table, TRIGGER).cells[1].note - 1]
    assert "Not measured" in table.notes[row(table, CHECKS).cells[0].note - 1]
    assert len(set(table.notes)) == len(table.notes)


def test_a_surface_that_one_audit_did_not_ask_is_a_dash_there_and_one_that_none_did_is_named():
    whole = model("a", BROKEN["received"])
    part = dataclasses.replace(whole, safety={"direct": whole.safety["direct"], "nested": whole.safety["nested"]})
    table = surfaces([Column("all", whole), Column("few", part)])
    dash = row(table, "sampling").cells[1]
    assert "did not ask" in table.notes[dash.note - 1]
    assert "In few these were not tried: role play." in table.notes[row(table, "nested").note - 1]
    assert TRIGGER in table.notes[-1]
    alone = surfaces([Column("few", part)])
    assert alone.notes[-1].endswith("prefill, affixes, sampling, trigger, benign fine-tune.")


def test_nothing_answered_is_not_zero():
    empty = dataclasses.replace(model("a", BROKEN["received"]), safety={"direct": cell("direct", 0, 0)})
    table = surfaces([Column("a", empty)])
    assert row(table, "direct").cells[0].text == "–"
    assert "No request could be measured." in table.notes


def test_utility_pools_tasks_and_over_refusal_is_the_worst_set():
    table = surfaces(columns(), infos())
    assert row(table, "utility").cells[0].rate == Rate(110, 124)
    assert row(table, "over-refusal").cells[0].of == "benign_nested"
    assert row(table, "over-refusal").cells[2].of == "borderline"
    assert "these were not tried: benign nested" in table.notes[row(table, "over-refusal").note - 1]


def test_every_attack_of_the_testbed_and_of_the_library_has_a_surface():
    import yaml

    names = [attack["name"] for attack in yaml.safe_load(suite_text("test"))["attacks"]]
    found = {name: surface_of(name) for name in names}
    assert found["prefill 40"] == "prefill"
    assert found["persuasion"] == found["role play"] == "nested"
    assert found["characters"] == found["payload split"] == "affixes"
    assert found["benign fine-tune"] == BENIGN_TUNE
    assert found["identity shift"] == "identity shift"
    assert found["harmful fine-tune"] == OTHER_TUNE
    for kind, made in ATTACKS.items():
        told = surface_of(AttackInfo("a name of its own", made.summary, made.source, {}))
        assert told == surface_of(kind) != "a name of its own"
    tuned = AttackInfo("identity shift", "", "", {"chats_sha256": "ab"})
    assert surface_of(tuned) == OTHER_TUNE
    assert surface_of("gcg") == "gcg"
    assert surface_of(TRIGGER) == "trigger (attack)"


def test_an_unknown_attack_keeps_its_row():
    strange = dataclasses.replace(model("a", BROKEN["received"]), safety={"gcg": cell("gcg", 3)})
    strange = dataclasses.replace(strange, safety={**strange.safety, TRIGGER: cell(TRIGGER, 9)})
    table = surfaces([Column("a", strange, Rate(4, 5))])
    assert row(table, "gcg").cells[0].rate == Rate(3, 100)
    assert row(table, TRIGGER).cells[0].rate == Rate(4, 5)
    assert row(table, "trigger (attack)").cells[0].rate == Rate(9, 100)


def test_the_most_successful_surface_leaves_out_triggers_and_fine_tunes():
    table = surfaces(columns(), infos())
    found = worst_attack(table, 0)
    assert found is not None
    assert (found[0].name, found[1].of) == ("prefill", "prefill 20")
    assert worst_attack(table, 1) is None


def test_json_holds_every_figure_and_no_nan():
    given = [*columns(), Column("odd", None, cost={CHECKS: float("nan"), "GiB": 4})]
    table = surfaces(given, infos())
    text = json.dumps(table.to_json(), allow_nan=False)
    read = json.loads(text)
    assert read["columns"] == ["received", "purified", "guarded", "odd"]
    first = next(each for each in read["rows"] if each["name"] == "direct")
    assert first["cells"][0]["rate"]["count"] == 4
    assert first["kind"] == ATTACK
    assert first["cells"][1] == {"rate": None, "value": None, "of": "", "note": 1}
    assert row(table, CHECKS).cells[3].text == "–"
    assert row(table, "GiB").cells[3].text == "4"


def test_a_table_needs_a_column():
    with pytest.raises(ValueError):
        surfaces([])


@pytest.mark.parametrize("width", [45, 100, 200])
def test_terminal_cuts_no_figure(width):
    table = surfaces(columns(), infos())
    text = terminal(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for each in table.rows:
        for shown in each.cells:
            assert shown.rate is None or rate_text(shown.rate) in text
    assert "95 % interval" in text


def test_terminal_takes_names_for_text():
    text = terminal(surfaces([Column("[red]m[/red]\x1b[2J", None)]), 120)
    assert "[red]m[/red]⟨U+001B⟩[2J" in text


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def test_markdown_is_a_table_with_notes():
    text = surfaces_markdown(surfaces(columns(), infos()))
    assert "| direct | 4 % [2, 10] | –¹ | 0 % [0, 4] |" in text
    html = rendered(text)
    assert html.count("<tr>") == 13
    assert "¹ purified: its audit was skipped (--skip)." in html


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_takes_names_for_text(text):
    strange = dataclasses.replace(model("a", BROKEN["received"]), safety={f"x{text}": cell("x", 3), text: cell("y", 4)})
    table = surfaces([Column(text, strange), Column(f"b {text}", None, why=text, cost={text: text})])
    html = rendered(surfaces_markdown(table))
    plainly = rendered(surfaces_markdown(surfaces([Column("a", strange)])))
    assert html.count("<table>") == plainly.count("<table>") == 1
    assert html.count("<td") == 3 * len(table.rows)
    for tag in ("<a", "<img", "<script", "<h1", "<li", "<em", "<strong", "<code", "<pre", "<s>", "<i>"):
        assert tag not in html
    assert not set(html) & set("\x1b\u202e")


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_is_read_as_it_was_written(text):
    import html

    from keelguard.plots import legible

    shown = " ".join(legible(text).split())
    assert html.unescape(rendered(plain(text))) == f"<p>{shown}</p>\n"
    assert html.unescape(rendered(f"- {plain(text)}")) == f"<ul>\n<li>{shown}</li>\n</ul>\n"


def test_intervals_stay_readable_and_names_become_code():
    assert plain("4 % [1, 10] of [2](x)") == "4 % [1, 10] of \\[2\\](x)"
    assert code("/models/a-b_c") == "`/models/a-b_c`"
    assert code("") == "–"
    assert rendered(code("a`b|<i>")) == "<p>a`b|&lt;i&gt;</p>\n"
    assert [raised(number) for number in (0, 1, 12)] == ["", "¹", "¹²"]
