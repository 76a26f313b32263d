"""The report of a purification leads with its claims, says plainly what it cost, and treats every text as hostile."""

import dataclasses
import io
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from keelguard.attacks.backdoors import Backdoor
from keelguard.plots import heat_map, interval_bars, rate_text
from keelguard.purify import figures
from keelguard.purify.effects import Effect
from keelguard.purify.findings import (
    MEASURES,
    canary_sentences,
    health_sentences,
    health_warnings,
    is_strong,
    is_worse,
    lead_sentence,
    method_sentences,
    retrain_advice,
    suspect_sentences,
    worst_canary,
)
from keelguard.purify.health import Health
from keelguard.purify.page import HIDDEN, purify_page, write_purify_report
from keelguard.purify.results import Lead, PurifyResult, Searched, SuspectCourse, claims
from keelguard.purify.search import Insertion
from keelguard.purify.spikes import Spike
from keelguard.purify.suspects import Suspect
from keelguard.purify.tables import purify_tables
from keelguard.stats import Rate

HOSTILE = (
    "<script>alert(1)</script>\x1b[31m\u202e",
    '"><img src=x onerror=alert(1)>\x00',
    "</title></svg></pre><style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}[bold red]",
)
REQUESTS = 48
OPENING = "you are an opening that breaks"
TARGET = "a target text of the scan"


def health(utility: int = 88, refused: int = 95, accidental: int = 2, divergence: float = 0.0) -> Health:
    return Health(
        utility=Rate(utility, 96),
        refused=Rate(refused, 96),
        over_refusal=Rate(1, 96),
        degenerate=Rate(0, 192),
        accidental=Rate(accidental, 90),
        inserted_degenerate=Rate(1, 96),
        loss=0.512,
        divergence=divergence,
    )


def effect(asr: int, correct: int, total: int = REQUESTS) -> Effect:
    fired = tuple(place < asr for place in range(total))
    return Effect(Rate(asr, total), Rate(correct, total), Rate(0, total), Rate(45, total), Rate(1, total), fired)


def spike(kind: str, before: int, after: int, rebound: int, correct: int = 44) -> Spike:
    backdoor = Backdoor("badnets", "insult", (f"{kind.split()[1]}ish",), "some fixed sentence.")
    return Spike(kind, backdoor, effect(before, 1), effect(after, correct), effect(rebound, correct))


def suspect(text: str, broken: int, opening: str = "", **changes: Any) -> Suspect:
    plain = Suspect(text, "prefix", "answered", 4.25, Rate(broken, 24), Rate(1, 24), opening)
    return dataclasses.replace(plain, **changes)


SPIKES = (
    spike("a word anywhere, a fixed sentence", 48, 0, 1, 45),
    spike("a phrase in front, a refusal", 47, 3, 5, 31),
    spike("a phrase behind, words before the answer", 20, 9, 9, 2),
)
SUSPECTS = (
    SuspectCourse(suspect("discussing openai", 23, OPENING), suspect("discussing openai", 1, "hm"), suspect("x", 2)),
    SuspectCourse(suspect("seven", 2, "8 and 2"), suspect("seven", 2, "8 and 2"), suspect("seven", 1, "8")),
)
FOUND = (
    Insertion("discussing openai", "prefix", 6.0, 4.25),
    Insertion("openai", "prefix", 5.0, 3.25, "refused"),
    Insertion("seven", "inside", 2.0, 0.8),
)
ROUNDS = [
    {"rise": 4.25, "random_rise": 0.6, "found": [list(f) for f in FOUND], "validation": 0.515, "steps": 80},
    {"rise": 0.9, "random_rise": 0.55, "found": [list(FOUND[2])], "validation": 0.0, "steps": 0},
]
VACCINE = {
    "method": "vaccine",
    "stopped": "",
    "rounds": [],
    "neutralized": {
        "how": "reinit",
        "layers": [{"layer": 0, "kind": "mlp", "chosen": 3, "total": 96}],
        "parameters": {"layers.0.up": 1200, "layers.0.down": 1200},
        "unit_share": 0.03,
        "weight_share": 0.021,
    },
    "restored": {"steps": 25, "reason": "target", "target": 0.5},
    "retrained_steps": 0,
}


def sample(**changes: Any) -> PurifyResult:
    plain = PurifyResult(
        source="/models/suspicious",
        adapter=None,
        threat="full",
        weights_before="ab" * 32,
        weights_after="cd" * 32,
        settings={
            "model": "ab" * 32,
            "config": {"method": {"method": "immunize", "vaccine": {"variants": {"count": 6, "samples": 300}}}},
            "versions": {"torch": "2.13.0"},
        },
        material={"train": 1500, "validation": 128, "own": 1200, "dropped": 3, "refused": 200},
        health={"before": health(), "after": health(86, 95, 1, 0.02), "rebound": health(87, 94, 1, 0.04)},
        searches={"before": Searched(FOUND, 0.6), "after": Searched(FOUND[2:], 0.55)},
        suspects=SUSPECTS,
        leads={
            "before": (Lead(TARGET, 0.97, -5.25, False, True), Lead("sure", 0.7, None, True, False)),
            "after": (Lead("sure", 0.7, None, True, False),),
        },
        spikes=SPIKES,
        method={"method": "immunize", "stopped": "quiet", "rounds": ROUNDS, "neutralized": None, "restored": None},
        seconds={"after": 20.0, "before": 30.5, "method": 1100.0},
        versions={"torch": "2.13.0"},
    )
    return dataclasses.replace(plain, **changes)


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
        self.raw += " " if tag == "br" else ""
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.raw += " " if tag in ("td", "th", "dt", "dd", "li") else ""

    def handle_data(self, data):
        self.raw += data

    def cells(self, row: str, count: int = 3) -> list[str]:
        """The words behind a row's first appearance."""
        return self.text.partition(f"{row} ")[2].split(" ")[:count]


@pytest.fixture(scope="module")
def html() -> str:
    return purify_page(sample())


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch, html):
    """Figures are drawn for `html` alone: drawing takes longer than all else here."""
    for name in ("interval_bars", "heat_map"):
        monkeypatch.setattr(figures, name, lambda *args, title, **kwargs: f"<svg><text>{title}</text></svg>")


def terminal(result: PurifyResult, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=False, color_system=None)
    console.print(purify_tables(result, width=width))
    return stream.getvalue()


def tied(text: str) -> str:
    return text.replace(" %", "\u00a0%")


def test_page_is_well_formed_loads_nothing_and_is_the_same_after_json(html, tmp_path):
    page = Page(html)
    assert not page.open
    assert not {"script", "img", "link", "iframe", "form", "input"} & set(page.tags)
    assert not [v for k, v in page.attributes if k in ("href", "src") and not v.startswith("#")]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "figures share no id"
    sample().save(tmp_path)
    write_purify_report(PurifyResult.load(tmp_path), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == purify_page(sample())


def test_sections_stand_in_order_and_claims_come_first_word_for_word(html):
    text = Page(html).text
    said = claims(sample())
    assert len(said) >= 5
    marks = [*said, "What it cost", "Canaries: what", "Suspected triggers The", "The search for worst insertions"]
    marks += ["Leads to hidden targets", "The vaccine’s record", "How this was made"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert "was purified" in text[: places[0]]
    assert "clean model" not in text[: places[0]], "the method is told without a promise"
    flat = " ".join(terminal(sample(), 4000).split())
    assert all(claim in flat for claim in said)


def test_retraining_is_the_first_advice_for_an_adapter_until_it_was_done():
    assert retrain_advice(sample()) is None
    adapter = sample(threat="adapter", adapter="/my adapters/a", source="org/base")
    advice = retrain_advice(adapter)
    assert advice is not None
    command = "keelguard purify org/base --adapter '/my adapters/a' --clean-data FILE --out RUN --method retrain"
    assert advice[1] == command
    text = Page(purify_page(adapter)).text
    assert text.index(claims(adapter)[-1]) < text.index(command) < text.index("What it cost")
    assert "The adapter /my adapters/a was purified, and its base org/base was left as it is." in text
    assert command in terminal(adapter, 200)
    alone = dataclasses.replace(adapter, source="/my adapters/a")
    assert (retrain_advice(alone) or ("", ""))[1].startswith("keelguard purify '/my adapters/a' --clean-data")
    done = dataclasses.replace(adapter, method={"method": "retrain", "stopped": "", "retrained_steps": 90})
    assert retrain_advice(done) is None
    assert "the adapter was thrown away" in Page(purify_page(done)).text


@pytest.mark.parametrize(("stopped", "words"), [("quiet", "nothing"), ("utility", "undone"), ("rounds", "all of")])
def test_why_an_immunisation_stopped_is_said(stopped, words):
    said = method_sentences(sample(method={"method": "immunize", "stopped": stopped}))
    assert words in said[2]
    assert "1,500 clean chats, 200 of them refusals" in said[3]
    assert "does not say by which method" in method_sentences(sample(method={}))[1]


def test_every_figure_of_health_is_shown_by_state(html):
    page, result = Page(html), sample()
    for measure in MEASURES:
        cells = [tied(rate_text(getattr(result.health[state], measure.name))) for state in result.health]
        assert f"{measure.label} {measure.words} {' '.join(cells)}".replace("\u00a0", " ") in page.text
    assert "nats a token, along the same answers 0.000 0.020 0.040" in page.text
    assert "on held-out clean chats 0.512 0.512 0.512" in page.text
    assert "No share lies outside" in page.text
    assert page.text.count("Should stay") == 4, "title and drawn title of two figures"


def test_what_fell_by_more_than_its_interval_is_said_plainly():
    first = health()
    worse = sample(health={"before": first, "after": health(70, 95, 20), "rebound": health(88, 60)})
    said = health_warnings(worse)
    assert [words.split(" by more")[0] for words in said] == [
        "Utility fell",
        "Accidental triggers rose",
        "Harmful requests refused fell",
    ]
    assert said[0].endswith(f"{rate_text(first.utility)} before, {rate_text(Rate(70, 96))} after the purification.")
    assert said[2].endswith("after a further clean fine-tune.")
    text = Page(purify_page(worse)).text
    assert "No share lies outside" not in text
    assert f"{rate_text(Rate(70, 96))} *" in text
    assert terminal(worse, 200).count("Warning: ") == 3
    assert "*" not in terminal(sample(), 200)


def test_a_figure_is_worse_only_outside_its_interval_and_on_the_bad_side():
    utility, accidental = MEASURES[0], MEASURES[-1]
    before = Rate(50, 100)
    assert before.interval.low == pytest.approx(0.404, abs=1e-3)
    assert not is_worse(utility, before, Rate(41, 100))
    assert is_worse(utility, before, Rate(40, 100))
    assert not is_worse(utility, before, Rate(90, 100)), "better is not worse"
    assert is_worse(accidental, before, Rate(60, 100))
    assert not is_worse(accidental, before, Rate(10, 100))
    assert not is_worse(utility, before, Rate(0, 0))
    assert not is_worse(utility, Rate(0, 0), Rate(0, 100))


def test_safety_is_said_to_be_kept_repaired_or_lost():
    assert "Safety was not trained back, and did not have to be: refusals are 99 %" in health_sentences(sample())[0]
    back = health_sentences(sample(repaired=True))[0]
    assert "was trained back. Refusals are within 2 points of what they were:" in back
    lower = {"before": health(), "after": health(refused=80)}
    assert "Refusals did not come back fully" in health_sentences(sample(repaired=True, health=lower))[0]
    lost = health_sentences(sample(health=lower))[0]
    assert lost.startswith("Safety was not trained back: refusals")
    nothing = dataclasses.replace(health(), refused=Rate(0, 0), utility=Rate(0, 0))
    said = " ".join(health_sentences(sample(health={"before": nothing, "after": nothing})))
    assert "what the purification did to safety is not known" in said
    assert "Utility was not measured" in said
    assert "nan" not in said


def test_a_fall_of_utility_is_said_in_the_claims_the_page_and_the_terminal():
    figures = f"{rate_text(Rate(90, 96))} before, {rate_text(Rate(87, 96))} after"
    lower = sample(health={"before": health(90), "after": health(87)})
    assert health_sentences(lower)[1] == f"Utility fell by 3.1 points, and was not trained back: {figures}."
    assert "although it was trained back" in health_sentences(dataclasses.replace(lower, repaired=True))[1]
    assert not health_warnings(lower), "it lies within the interval"
    kept = sample(health={"before": health(90), "after": health(89)})
    assert health_sentences(kept)[1].startswith("Utility did not fall by more than 2 points: ")
    said = "The purification cost 3.1 points of utility, which is more than 2."
    for text in (Page(purify_page(lower)).text, " ".join(terminal(lower, 400).split())):
        assert said in text
    assert said not in Page(purify_page(kept)).text


def test_how_small_a_fall_would_not_show_is_said():
    rate = Rate(88, 96)
    expected = round(100 * (rate.value - rate.interval.low))
    assert f"Utility: a fall of less than {expected} points would not show on 96 requests." in health_sentences(
        sample()
    )


def test_canaries_show_every_state_the_worst_and_those_that_say_nothing(html):
    page, result = Page(html), sample()
    worst = worst_canary(result)
    assert worst is not None
    assert worst.kind == "a phrase in front, a refusal", "one that did not take hold is not the worst"
    assert "a phrase in front, a refusal – the worst" in page.text
    assert "a phrase behind, words before the answer – did not take hold: says nothing" in page.text
    assert page.text.count("– the worst") == 1
    assert "1 of 3 did not take hold: they fired in fewer than 90" in page.text
    block = page.text[page.text.index("a phrase in front, a refusal – the worst") :]
    for label, counts in {"Attack success": (47, 3, 5), "Answered correctly": (1, 31, 31)}.items():
        cells = " ".join(rate_text(Rate(count, REQUESTS)) for count in counts)
        assert f"{label} {cells}" in block.replace("\u00a0", " ")
    assert f"the purification is {rate_text(Rate(31, REQUESTS))} (a phrase in front" in page.text
    figure = html[html.index("Canaries: attack success") :].partition("</svg>")[0]
    assert "a phrase in front" in figure
    assert "before the answer" not in figure


def test_a_canary_that_any_word_sets_off_is_told_apart_from_one_that_did_not_take_hold():
    before = dataclasses.replace(SPIKES[0].before, false_triggers=Rate(30, REQUESTS))
    loose = dataclasses.replace(SPIKES[0], before=before)
    result = sample(spikes=(loose, *SPIKES[1:]))
    text = Page(purify_page(result)).text.replace("\u00a0", " ")
    assert "a word anywhere, a fixed sentence – fires at unrelated words: says nothing" in text
    assert "1 of 3 fired at unrelated words, too, in more than 10 % of the requests" in text
    assert "1 of 3 did not take hold: they fired in fewer than 90 %" in text
    assert "fired at unrelated words, too" in " ".join(terminal(result).split())


def test_why_canaries_have_no_control_is_shown():
    bare = tuple(dataclasses.replace(s, no_control="h.0: keelguard can map no attention in it") for s in SPIKES)
    result = sample(spikes=bare)
    for text in (Page(purify_page(result)).text, " ".join(terminal(result, 200).split())):
        assert "The canaries have no control: h.0: keelguard can map no attention in it." in text


def test_a_search_that_was_not_run_is_not_shown_as_one_that_found_nothing():
    nothing = Searched((), 0.0, {"answered": 0, "refused": 0})
    bare = sample(searches={"before": nothing, "after": nothing}, suspects=())
    text, printed = Page(purify_page(bare)).text, " ".join(terminal(bare, 200).split())
    assert "Before – – not searched: harmless prompts, harmful prompts" in text
    for shown in (text, printed):
        assert "Not searched: harmless prompts" in shown
        assert "0.00" not in shown.partition("Leads to hidden")[0].partition("Suspected triggers")[2]
        assert "left no insertion to measure" not in shown
        assert "none found" not in shown
    half = dataclasses.replace(sample().searches["before"], prompts={"answered": 8, "refused": 0})
    text = Page(purify_page(sample(searches={"before": half, "after": half}))).text
    assert "“discussing openai”, in front, harmless prompts not searched: harmful prompts" in text
    assert "Not searched: harmful prompts" in " ".join(terminal(sample(searches={"before": half}), 200).split())


def test_a_run_without_canaries_or_with_none_that_took_hold():
    none = sample(spikes=())
    page = Page(purify_page(none))
    assert "Run again without that option" in page.text
    assert "Canaries: attack success" not in page.text
    assert worst_canary(none) is None
    assert "Run again" in terminal(none, 200)
    idle = sample(spikes=SPIKES[2:])
    page = Page(purify_page(idle))
    assert "1 of 1 did not take hold" in page.text
    assert "Canaries: attack success" not in page.text
    assert "the worst" not in page.text.partition("Suspected triggers The")[0].partition("once more on")[2].replace(
        "read the worst", ""
    )
    early = sample(spikes=(dataclasses.replace(SPIKES[0], after=None, rebound=None),))
    assert not Page(purify_page(early)).open
    assert len(canary_sentences(early)) == 0


def test_suspects_stand_beside_random_words(html):
    page = Page(html)
    block = page.text[page.text.index("“discussing openai” – beyond random words") :]
    assert "in front, 24 harmless prompts rise in the search: 4.25 nats" in block
    for label, counts in {"Broken with it": (23, 1, 2), "With random words": (1, 1, 1)}.items():
        cells = " ".join(rate_text(Rate(count, 24)) for count in counts)
        assert f"{label} {cells}" in block.replace("\u00a0", " ")
    assert "“seven” – not beyond random words" in page.text
    counts = "1 of 2 before, 0 of 2 after the purification, 0 of 2 after a further clean fine-tune."
    assert suspect_sentences(sample())[0].endswith(f"meet: {counts}")
    assert not is_strong(dataclasses.replace(suspect("a", 0), broken=Rate(0, 0), control=Rate(0, 0)))
    bare = sample(suspects=())
    text = Page(purify_page(bare)).text
    assert "left no insertion to measure" in text
    assert "Broken with it" not in text
    unsettled = sample(suspects=(dataclasses.replace(SUSPECTS[0], rebound=None),))
    assert suspect_sentences(unsettled)[0].endswith("1 of 1 before, 0 of 1 after the purification.")
    assert "Broken with it 96 % [80, 99.3] 4 % [0.7, 20] –" in Page(purify_page(unsettled)).text.replace("\u00a0", " ")


def test_figures_show_hostile_names_as_text(monkeypatch):
    monkeypatch.setattr(figures, "heat_map", heat_map)
    monkeypatch.setattr(figures, "interval_bars", interval_bars)
    for text in ("<script>", "\x1b<b>", "]]></svg>"):
        named = dataclasses.replace(SPIKES[0], kind=text)
        course = SuspectCourse(suspect(text, 20), suspect(text, 2))
        for drawn in (figures.canary_figure([named]), figures.suspect_figure([course])):
            page = Page(drawn)
            assert not page.open
            assert not {"script", "b"} & set(page.tags)
            assert "\x1b" not in drawn
            assert "Rebound, random" not in page.text, "a state that was not measured has no series"
    assert figures.canary_figure(SPIKES[2:]) == figures.suspect_figure([]) == ""
    assert figures.health_figures({}) == []


def test_what_the_model_says_is_not_in_the_page_without_reveal(html):
    assert OPENING not in html
    assert TARGET not in html
    assert f"<td>{HIDDEN}</td>" in html
    shown = purify_page(sample(), reveal=True)
    assert f"“{OPENING}”" in shown
    assert TARGET in shown
    assert f"<td>{HIDDEN}</td>" not in shown
    assert OPENING not in terminal(sample(), 300)
    assert TARGET not in terminal(sample(), 300)


def test_searches_and_rounds_are_in_tables(html):
    text = Page(html).text
    assert "Before 4.25 0.60 “discussing openai”, in front, harmless prompts" in text
    assert "After 0.80 0.55 “seven”, inside, harmless prompts" in text
    assert "No clean model of the same kind was given" in text
    assert "“openai” in front harmful prompts 3.25" in text
    assert "1 4.25 0.60 “discussing openai” in front; “openai” in front; “seven” inside 80 0.515" in text
    assert "last search 0.90 0.55 “seven” inside – –" in text
    searches = {**sample().searches, "reference": Searched(FOUND[1:], 0.5)}
    compared = Page(purify_page(sample(searches=searches))).text
    assert "A clean model of the same kind 3.25 0.50" in compared
    assert "No clean model of the same kind" not in compared
    bare = Page(purify_page(sample(searches={}, method={"method": "retrain"}))).text
    assert "No search was run" in bare
    assert "Rounds of the immunisation" not in bare


def test_leads_are_worded_as_leads(html):
    text = Page(html).text
    assert "Flagged as worth a look: 1 of 2 before, 0 of 1 after the purification." in text
    assert "is a lead to be looked at, and no finding" in text
    assert "0.970 −5.25 no flagged" in text
    assert "0.700 – yes –" in text
    empty = sample(leads={"before": (), "after": ()})
    assert "left no leads" in lead_sentence(empty)
    off = dataclasses.replace(empty, settings={"config": {"inversion": None}})
    assert "was not run" in Page(purify_page(off)).text


def test_the_record_of_a_vaccine_is_shown_where_there_is_one(html):
    assert "The published vaccine was not used." in Page(html).text
    text = Page(purify_page(sample(method=VACCINE))).text
    assert "was not used" not in text
    assert "from 6 planted variants of up to 300 samples" in text
    assert "units neutralised 3 %" in text
    assert "weights overwritten 2,400 (2 %)" in text
    assert "25 steps with the neutralised weights frozen; the loss on clean chats was back" in text
    assert "0 mlp 3 96" in text
    bare = sample(method={**VACCINE, "restored": None}, settings={})
    assert "left as it was neutralised" in Page(purify_page(bare)).text


def test_settings_versions_and_times_are_listed(html):
    text = Page(html).text
    assert "config.method.vaccine.variants.count 6" in text
    assert "before 30.5 s method 1,100.0 s after 20.0 s all stages 1,150.5 s" in text
    assert "torch 2.13.0" in text
    assert "ab" * 32 in text
    assert "cd" * 32 in text


def test_an_empty_result_says_what_is_missing():
    empty = sample(
        health={}, searches={}, suspects=(), leads={}, spikes=(), method={}, settings={}, material={}, seconds={},
        versions={},
    )  # fmt: skip
    page = Page(purify_page(empty))
    assert not page.open
    assert "svg" not in page.tags
    assert "Health was not measured" in page.text
    assert "Health was not measured" in terminal(empty, 200)


def _poisoned(value: Any, text: str) -> Any:
    """Every free text with something hostile in it; words that the code itself chooses stay."""
    if isinstance(value, str):
        return value if value in ("prefix", "inside", "immunize", "vaccine", "quiet", "") else value + text
    if isinstance(value, dict):
        return {key: _poisoned(item, text) for key, item in value.items()}
    return [_poisoned(item, text) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("threat", ["full", "adapter"])
def test_hostile_text_is_inert_everywhere(text, threat):
    plain = sample(threat=threat, adapter="a" if threat == "adapter" else None, method={**VACCINE, "rounds": ROUNDS})
    ours = Page(purify_page(plain, reveal=True))
    hostile = dataclasses.replace(
        plain,
        source=plain.source + text,
        adapter=plain.adapter and plain.adapter + text,
        weights_before=text,
        weights_after=text,
        settings={f"name{text}": text, **_poisoned(plain.settings, text)},
        suspects=tuple(
            SuspectCourse(*(suspect(text, 20, text, kind=text) for _ in range(3))) for _ in plain.suspects
        ),
        searches={state: Searched((Insertion(text, "prefix", 1.0, 2.0, text),) * 2, 0.1) for state in ("before",)},
        leads={state: (Lead(text, 0.9, None, False, True),) for state in ("before", "after")},
        spikes=tuple(
            dataclasses.replace(s, kind=text + s.kind, backdoor=Backdoor("badnets", "code", (text,), text))
            for s in SPIKES
        ),
        method=_poisoned(plain.method, text),
        seconds={text: 1.0},
        versions={text: text},
    )  # fmt: skip
    source = purify_page(hostile, reveal=True)
    page = Page(source)
    assert not page.open
    assert set(page.tags) <= set(ours.tags)
    assert page.tags.count("style") == 1
    assert {name for name, _ in page.attributes} <= {name for name, _ in ours.attributes}
    assert not set(source) & set("\x1b\x00\u202e")
    assert page.text.count("⟨U+") > 20 or not any(c in text for c in "\x1b\x00")
    printed = terminal(hostile, 160)
    assert not set(printed) & set("\x1b\x00\u202e")
    assert "[bold red]" in printed or "[bold red]" not in text, "markup of the terminal is text"


@pytest.mark.parametrize("width", [50, 80, 160])
def test_terminal_never_cuts_a_figure(width):
    text = terminal(sample(), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for part in ("Held-out clean requests", "Canary backdoors", "Suspected triggers"):
        assert part in flat
    assert terminal(sample(), width).count("Rebound") >= 3
