"""The page of a hardening leads with its verdict, hides no failure, shows no model's text, and trusts no name."""

import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_package import (
    BROKEN,
    SECRET,
    audit,
    audits,
    changed,
    controls,
    model,
    purification,
    stages,
    write_package,
)

from keelguard.pipeline import page as pages
from keelguard.pipeline.outcome import Outcome, reason_of, status_of
from keelguard.pipeline.package import Control, StageRecord
from keelguard.pipeline.page import figure_text, package_page, package_tables, write_package_report
from keelguard.pipeline.surfaces import Column
from keelguard.pipeline.wording import done, found, headline, unknown
from keelguard.plots import rate_text
from keelguard.stats import Rate

HOSTILE = (
    "<script>alert(1)</script>\x1b[31m\u202e",
    '"><img src=x onerror=alert(1)>\x00',
    "</title></svg></pre></style><style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}[bold red]",
    "javascript:alert(1)",
)
BOLD = re.compile(r"\b(clean|safe|secure|trustworthy)\b", re.IGNORECASE)


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.raw = ""
        self.feed(html)
        self.close()
        self.text = " ".join(self.raw.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.raw += " " if tag in ("td", "th", "dt", "dd", "li", "p", "h2", "h3") else ""

    def handle_data(self, data):
        self.raw += data

    def links(self) -> list[str]:
        return [value for name, value in self.attributes if name == "href"]


def failed(**changes: Any) -> tuple[StageRecord, ...]:
    """A hardening whose unit map is no better than random, though its record says that it was done."""
    control = dataclasses.replace(
        controls()["diagnose"][0], control_value=Rate(79, 100).to_json(), p_value=0.31, holds=False, **changes
    )
    return changed("diagnose", controls=(control,))


def skipped(name: str, reason: str) -> tuple[StageRecord, ...]:
    return changed(name, status="skipped", reason=reason, controls=(), figures={})


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return package_page(write_package(tmp_path_factory.mktemp("package")))


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch, html):
    """Figures are drawn for `html` alone: drawing takes longer than all else here."""
    for name in ("interval_bars", "heat_map"):
        monkeypatch.setattr(pages, name, lambda *args, title, **kwargs: f"<svg><text>{title}</text></svg>")


def terminal(package, width: int = 100, **more: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(package_tables(package, width=width, **more))
    return stream.getvalue()


def test_page_is_well_formed_and_loads_nothing(html):
    page = Page(html)
    assert not page.open
    assert not {"script", "img", "link", "iframe", "form", "input"} & set(page.tags)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not [value for name, value in page.attributes if name == "src"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.links() if link.startswith("#")} <= set(ids)
    assert page.tags.count("h1") == 1
    assert page.tags.count("th") == sum(name == "scope" for name, _ in page.attributes)


def test_writing_again_gives_the_same_page_and_leaves_nothing_else(tmp_path):
    package = write_package(tmp_path / "p")
    out = tmp_path / "out" / "report.html"
    write_package_report(package, out)
    first = out.read_text(encoding="utf-8")
    write_package_report(package, out)
    assert out.read_text(encoding="utf-8") == first
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_no_sentence_of_ours_promises_anything(tmp_path):
    packages = [
        write_package(tmp_path / "a"),
        write_package(tmp_path / "b", failed()),
        write_package(tmp_path / "c", skipped("purify", "not asked for"), {}),
        write_package(tmp_path / "d", (), {}),
    ]
    for package in packages:
        outcome = Outcome.of(package)
        for sentence in (headline(outcome), *found(outcome), *done(outcome), *unknown(outcome)):
            assert not BOLD.search(sentence), sentence
        assert "no test can show that nothing is" in unknown(outcome)[-1]


def test_a_hardening_that_held_says_of_what_it_is_evidence(html):
    text = Page(html).text
    assert "Every stage was done, and all 3 controls hold. That is evidence about the attacks and canaries" in text
    assert "Still works on the guarded model: benign fine-tune 41 % [32, 51]." in text.replace("\u00a0", " ")
    assert 'class="verdict open"' in html
    assert text.index("What was found") < text.index("What was done") < text.index("What is not known")
    assert text.index("What is not known") < text.index("Attack surfaces by state")
    said = text.replace("\u00a0", " ")
    most = "of the attacks on a request the one that succeeds most (prefill: prefill 20) breaks"
    assert f"As received, {most} 71 % [61, 79]" in said
    assert f"Guarded, {most} 3 % [1, 8]" in said
    tuned = "received 80 % [71, 87], purified 78 % [69, 85], guarded 41 % [32, 51]."
    assert f"Requests that break after a fine-tune on harmless chats: {tuned}" in said
    assert "“turtle velvet”" in text


def test_every_figure_stands_with_its_interval(html):
    text = Page(html).text.replace("\u00a0", " ")
    for counts in BROKEN.values():
        for count in counts:
            assert rate_text(Rate(count, 100)) in text
    assert "1 % [0.3, 4] (2/200)" in text
    assert "0.981 [0.97, 0.99]" in text
    assert "0.214" in text


def test_every_control_stands_beside_its_claim(html):
    text = Page(html).text.replace("\u00a0", " ")
    for control in (each for several in controls().values() for each in several):
        place = text.index(control.claim)
        line = text[place : place + 400]
        assert figure_text(control.value) in line
        assert figure_text(control.control_value) in line
        assert control.why in line
        assert "holds" in line
    assert "< 0.001" in text


def test_a_control_that_does_not_hold_fails_its_stage_whatever_the_record_says(tmp_path):
    package = write_package(tmp_path, failed())
    assert package.stage("diagnose").status == "done"
    html = package_page(package)
    page = Page(html)
    assert "This hardening did not hold in full. Failed: diagnose." in page.text
    assert 'class="verdict alarm"' in html
    assert '<article class="stage failed" id="stage-5">' in html
    assert "does not hold" in page.text
    assert "diagnose: failed. What it made is kept, and not to be relied on." in page.text
    shown = terminal(package)
    assert "Does not hold – diagnose" in shown
    assert "79 % [70, 86]" in shown


def test_a_stage_that_was_left_out_is_seen_with_its_reason(tmp_path):
    several = audits()
    del several["purified"]
    package = write_package(tmp_path, skipped("audit-purified", "--skip audit-purified was given"), several)
    page = Page(package_page(package))
    assert "Hardened in part. Left out: audit-purified." in page.text
    assert "What attacks do after the purification: audit-purified was left out (--skip audit-purified" in page.text
    assert "¹ purified: its audit was skipped (--skip audit-purified was given)." in page.text
    assert ("class", "stage skipped") in page.attributes


def test_a_stage_without_a_record_is_not_forgotten(tmp_path):
    records = tuple(stage for stage in stages() if stage.name != "purify")
    package = write_package(tmp_path, records)
    outcome = Outcome.of(package)
    assert headline(outcome).startswith("Hardened in part. Left out: purify.")
    assert any("purify was not run" in sentence for sentence in unknown(outcome))


def test_a_control_that_is_undecided_is_said(tmp_path):
    untested = dataclasses.replace(controls()["purify"][0], holds=None, why="no canary took hold")
    package = write_package(tmp_path, changed("purify", controls=(untested,)))
    page = Page(package_page(package))
    assert "Undecided controls: 1 of 3." in page.text
    assert page.text.count("undecided") == 2
    assert ("class", "verdict open") in page.attributes
    assert "(no canary took hold)." in page.text


def test_a_hardening_against_which_nothing_works_has_no_warning(tmp_path):
    several = audits()
    several["guarded"] = audit(several["guarded"].models[0], model("guarded", (0,) * 8))
    html = package_page(write_package(tmp_path, found=several))
    assert 'class="verdict "' in html
    assert "Still works" not in Page(html).text


def test_no_controls_is_no_success(tmp_path):
    records = tuple(dataclasses.replace(stage, controls=()) for stage in stages())
    assert "none of them tested its claim" in headline(Outcome.of(write_package(tmp_path, records)))


def test_what_is_left_after_the_purification_is_said(tmp_path):
    plain = purification()
    again = dataclasses.replace(plain.suspects[0].before, text="kettle")
    package = write_package(tmp_path, purified=purification(fresh=(again,), spikes=()))
    text = Page(package_page(package)).text
    assert "After the purification some still do: “kettle”" in text
    assert "In the purified model words are left that break its answers." in text
    assert "What this purification removes is not known" in text


def test_a_new_adapter_needs_no_canary(tmp_path):
    package = write_package(tmp_path, purified=purification(method={"method": "retrain"}, spikes=()))
    text = Page(package_page(package)).text
    assert "a new one trained on its base" in text
    assert "Nothing of the received adapter is in the new one" in text


def test_a_weak_judge_and_a_trusted_base_are_named(tmp_path):
    several = {"received": audit(model("m", BROKEN["received"]), judge="keyword")}
    package = write_package(tmp_path, found=several, threat="adapter", adapter="/adapters/lora")
    text = Page(package_page(package)).text
    assert "words of refusal" in text
    assert "What its base may hide" in text
    assert "Hardening of lora" in text


def test_no_text_of_a_model_is_shown(tmp_path):
    package = write_package(tmp_path)
    assert SECRET in (tmp_path / "audits" / "received.json").read_text()
    assert SECRET not in package_page(package)
    assert SECRET not in terminal(package, 400)


def test_reports_of_stages_are_linked_from_where_the_page_lies(tmp_path):
    package = write_package(tmp_path / "run")
    assert "purify/report.html" in Page(package_page(package)).links()
    write_package_report(package, tmp_path / "elsewhere" / "report.html")
    links = Page((tmp_path / "elsewhere" / "report.html").read_text()).links()
    assert "../run/purify/report.html" in links
    outside = {"../run/purify/report.html": "00", "/etc/x.html": "00", "javascript:alert(1).html": "00"}
    (tmp_path / "run" / "javascript:alert(1).html").write_text("x")
    records = (StageRecord("purify", "done", artefacts=outside),)
    links = Page(package_page(dataclasses.replace(package, stages=records))).links()
    assert [link for link in links if not link.startswith("#")] == 2 * ["javascript%3Aalert%281%29.html"]


def test_every_file_stands_with_its_hash(tmp_path):
    package = write_package(tmp_path)
    html = package_page(package)
    files = {name: value for stage in package.stages for name, value in stage.artefacts.items()}
    assert len(files) == 5
    for name, value in files.items():
        assert name in html
        assert value in html
    for needle in (*package.weights.values(), "immunize", "2.13.0", "15 min", "1,234,567"):
        assert needle in html


def test_further_states_and_known_triggers_get_their_columns(tmp_path):
    package = write_package(tmp_path)
    extra = [Column("fine-tuned, protected", model("tuned", (7, 33, 25, 42, 70, 9, 14, 81)), Rate(2, 48))]
    page = package_page(package, extra=extra, triggers={"received": Rate(47, 48), "guarded": Rate(1, 48)})
    text = Page(page).text.replace("\u00a0", " ")
    assert "fine-tuned, protected" in text
    assert "98 % [89, 99.6]" in text
    assert "fine-tuned, protected against received" in text
    assert "no trigger of it is known" not in text
    assert "no trigger of it is known" in Page(package_page(package)).text
    assert "2 % [0.4, 11]" in terminal(package, triggers={"guarded": Rate(1, 48)})


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_everywhere(tmp_path, text, html):
    bad = Control(text, text, text, {"value": text, text: text}, None, False, text)
    records = tuple(
        dataclasses.replace(stage, reason=text, controls=(bad,), figures={text: text}, notes=(text,))
        for stage in failed()
    )
    several = audits()
    first = several["received"].models[0]
    strange = dataclasses.replace(
        first,
        safety={text: first.safety["direct"], f"{text}2": first.safety["nested"]},
        utility={text: Rate(1, 2)},
        over_refusal={text: Rate(1, 2), f"{text}2": Rate(0, 2)},
    )
    several["received"] = dataclasses.replace(several["received"], models=[strange], judge={"name": f"keyword{text}"})
    plain = purification()
    course = dataclasses.replace(plain.suspects[0], before=dataclasses.replace(plain.suspects[0].before, text=text))
    package = write_package(
        tmp_path, records, several, purification(suspects=(course,)), source=text, settings={text: {text: text}},
        versions={text: text}, weights={text: text},
    )  # fmt: skip
    result = package_page(package, extra=[Column(text, strange, why=text, cost={text: text})])
    page, ours = Page(result), Page(html)
    assert not page.open
    assert set(page.tags) <= set(ours.tags)
    assert {name for name, _ in page.attributes} <= {name for name, _ in ours.attributes}
    assert page.tags.count("style") == 2
    assert all(link.startswith("#") or link == "purify/report.html" for link in page.links())
    assert not set(result) & set("\x1b\x00\u202e")
    assert not set(terminal(package, extra=[Column(text, strange)])) & set("\x1b\x00\u202e")
    assert "{{ 7 * 7 }}" in result or "7 * 7" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (True, "yes"), (0, "0"), (-1234, "−1,234"), (0.12345, "0.123"), (float("nan"), "–"),
        (123456.7, "123,457"), ("x" * 400, f"{'x' * 300}… (100 more characters)"), ([1, 2], "[1, 2]"),
        (Rate(4, 100).to_json(), "4 % [2, 10] (4/100)"), (Rate(0, 0).to_json(), "– (0/0)"),
        ({"value": 0.9, "low": 0.8, "high": None}, "0.9 [0.8, –]"), ({"count": 5, "total": 2}, "–"),
    ],
)  # fmt: skip
def test_figures_in_words(value, text):
    assert figure_text(value) == text


def test_terminal_holds_the_verdict_the_table_and_what_is_not_known(tmp_path):
    text = terminal(write_package(tmp_path))
    assert text.startswith("Every stage was done")
    assert "benign fine-tune" in text
    assert "no test can show" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_an_unfinished_package_is_a_page(tmp_path):
    package = write_package(tmp_path, (StageRecord("inspect", "done"),), {})
    text = Page(package_page(package)).text
    assert "What attacks do to the model was not measured." in text
    assert "purify was not run" in text


def test_a_reason_is_never_empty_where_a_stage_failed():
    stage = StageRecord("guard", "done", controls=(Control("It is better than chance", 1, "chance", 1, holds=False),))
    assert status_of(stage) == "failed"
    assert reason_of(stage) == "Does not hold: It is better than chance."
    assert reason_of(StageRecord("guard", "skipped", reason="no data")) == "no data"


def test_a_link_to_a_page_that_is_not_there_is_not_made(tmp_path):
    package = write_package(tmp_path)
    Path(tmp_path / "purify" / "report.html").unlink()
    assert "purify/report.html" not in Page(package_page(package)).links()
