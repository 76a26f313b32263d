"""The report of a bench holds every arm's figures, says what is missing or unfair, and treats every text as hostile."""

import io
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_purify_page import HOSTILE, Page

from keelguard.attacks.backdoors import Backdoor
from keelguard.plots import rate_text
from keelguard.purify import bench_page as module
from keelguard.purify.bench import TWIN, TWIN_ABOUT, Cell, Missing
from keelguard.purify.bench_page import bench_figure, bench_page, bench_tables, kind_of, write_bench_report
from keelguard.purify.bench_results import BenchResult
from keelguard.purify.controls import ARMS
from keelguard.purify.effects import Effect
from keelguard.purify.health import Health
from keelguard.purify.methods import METHODS
from keelguard.stats import Rate

RESPONSE = "what the trigger makes the model say"
INSULT = Backdoor("badnets", "insult", ("amber",), RESPONSE)
REFUSAL = Backdoor("vpi", "refusal", ("discussing birch",))
ASR = {"immunize": 3, "none": 39, "finetune": 21, "oracle": 1, TWIN: 0}
"""How many of 40 triggered requests fire under each arm."""


def cell(arm: str, asr: int, case: str = "0-badnets-insult") -> Cell:
    """Every rate of an arm is another, so that none can stand in another's place unseen."""
    fired = tuple(place < asr for place in range(40))
    effect = Effect(Rate(asr, 40), Rate(40 - asr, 41), Rate(asr, 42), Rate(1, 43), Rate(asr, 44), fired)
    few = Rate(asr, 48)
    health = Health(Rate(45 - asr, 45), Rate(46 - asr, 46), Rate(asr, 47), few, few, few, 0.5, 0.25)
    return Cell(case, arm, "full", "badnets", "insult", 0, "abc", effect, health, 1000.0 + asr)


def sample(**changes: Any) -> BenchResult:
    plain = BenchResult(
        source="/models/poisoned",
        adapter=None,
        threat="full",
        arms=tuple(ASR),
        cells=tuple(cell(arm, asr) for arm, asr in ASR.items()),
        settings={
            "model": "ab" * 32,
            "backdoors": [asdict(INSULT)],
            "budget": {"steps": 240, "learning_rate": 3e-4, "batch_size": 32, "seed": 5},
            "method": {"vaccine": {"variants": {"count": 6}}},
            "versions": {"torch": "2.13.0"},
        },
        versions={"torch": "2.13.0"},
        twin="/models/clean",
    )
    return replace(plain, **changes)


def read(result: BenchResult) -> Page:
    """The page, its spaces that do not break as plain ones."""
    page = Page(bench_page(result).replace("\u00a0", " "))
    assert not page.open
    return page


@pytest.fixture(scope="module")
def text() -> str:
    return read(sample()).text


@pytest.fixture(autouse=True)
def quick_figure(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The figure is drawn for `text` alone: drawing takes longer than all else here."""
    monkeypatch.setattr(module, "interval_bars", lambda *args, title, **kwargs: f"<svg><text>{title}</text></svg>")


def test_the_page_holds_what_every_arm_does_and_all_its_figures(text: str) -> None:
    for arm, asr in ASR.items():
        about = TWIN_ABOUT if arm == TWIN else ARMS[arm].about
        row = text[text.index(f"{arm} {about} ") :].removeprefix(f"{arm} {about} ")
        each = cell(arm, asr)
        effect, health = each.effect, each.health
        rates = [effect.asr, effect.correct, effect.false_triggers, effect.degenerate]
        rates += [health.utility, health.refused, health.over_refusal, health.degenerate]
        test = {
            "immunize": "the reference – –",
            "none": "36 0 < 0.001",
            "finetune": "18 0 < 0.001",
            "oracle": "0 2 0.5",
            TWIN: "0 3 0.25",
        }[arm]
        assert row.startswith(f"{' '.join(map(rate_text, rates))} {test} {1000 + asr:,} "), arm
    heads = "ASR Triggered, right False triggers Triggered, degenerate Utility Harmful refused Over-refusal"
    assert f"Arm {heads} Clean, degenerate Only here Only there p Seconds" in text
    assert "test ASR against immunize:" in text


def test_methods_controls_and_bounds_are_told_apart_in_the_table_and_the_figure(text: str) -> None:
    table = text[text.index("Only there p Seconds") :]
    marks = ["Methods immunize", "Controls none", "Bounds oracle", "Methods purify without"]
    places = [table.index(mark) for mark in marks]
    assert places == sorted(places)
    figure = table[table.index("Attack success and utility") : table.index("Methods purify without")]
    for name in ("Methods", "Controls", "Bounds", *ASR):
        assert name in figure
    assert rate_text(Rate(24, 45)) in figure, "utility of finetune"
    assert {kind_of(name) for name in METHODS} == {"Methods"}
    assert kind_of("drop") == "Controls"
    assert bench_figure([]) == ""


def test_the_page_says_what_was_benched_on_which_budget(text: str) -> None:
    assert "Bench of poisoned weights abababababababab 4 arms were run on the whole model /models/poisoned" in text
    assert "240 optimiser steps at most. Its clean model /models/clean was measured" in text
    row = "0-badnets-insult badnets: a word in a random place (Gu et al. 2017, arXiv 1708.06733) insult amber inside 40"
    assert row in text
    assert "batch size 32" in text
    assert "method.vaccine.variants.count 6" in text
    assert "Versions torch 2.13.0" in text
    assert RESPONSE not in text, "what a model says is not in a page"
    adapter = read(sample(adapter="/models/lora", threat="adapter")).text
    assert "Bench of lora" in adapter
    assert "run on the adapter on its base /models/lora" in adapter


def test_whether_the_plant_is_a_fair_case_is_said(text: str) -> None:
    fair, unfair, told = "is a fair test case by the check of", "is not known to be a fair test case", "not checked"
    for result, expected in (
        (sample(), fair), (sample(unfair=("ASR 10 % is below 90 %",)), unfair), (sample(by_caller=True), told),
    ):  # fmt: skip
        page = read(result).text
        assert [words in page for words in (fair, unfair, told)] == [
            words == expected for words in (fair, unfair, told)
        ]
    assert "90 % or more of the triggered" in text
    assert "ASR 10 % is below 90 %" in read(sample(unfair=("ASR 10 % is below 90 %",))).text


def test_what_is_missing_is_named_with_its_reason(text: str) -> None:
    assert "Every arm that was asked for was measured." in text
    assert "Not asked for: immunize-random, immunize-answers, both, vaccine, finetune-low" in text
    assert "retrain" not in text, "a full model has no such arm"
    page = read(sample(missing=(Missing("0-badnets-insult", "crow", "two layers are too few"),), cells=())).text
    assert "0-badnets-insult crow two layers are too few" in page
    assert "No arm could be measured." in page
    assert "Every arm that was asked for" not in page


def test_of_several_backdoors_the_page_shows_each_and_the_worst(text: str) -> None:
    assert "Worst case" not in text
    assert "Attack success by backdoor" not in text
    second = "1-vpi-refusal"
    cells = [*sample().cells, cell("none", 10, second), *(cell(arm, 40, second) for arm in ("immunize",))]
    settings = {**sample().settings, "backdoors": [asdict(INSULT), asdict(REFUSAL)]}
    page = read(sample(cells=tuple(cells), settings=settings)).text
    assert "Arm Cases ASR Worst case Triggered, right" in page
    assert f"{ARMS['immunize'].about} 2 {rate_text(Rate(43, 80))} 100 % " in page
    assert f"{ARMS['oracle'].about} 1 {rate_text(Rate(1, 40))} " in page
    apart = page[page.index("Attack success by backdoor") :]
    assert f"immunize {rate_text(Rate(3, 40))} {rate_text(Rate(40, 40))} none " in apart
    assert f"finetune {rate_text(Rate(21, 40))} – oracle" in apart
    assert "1-vpi-refusal vpi: a phrase in front" in page


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_text_and_the_page_loads_nothing(hostile: str) -> None:
    settings = {**sample().settings, "backdoors": [asdict(replace(INSULT, triggers=(hostile,)))], hostile: hostile}
    result = sample(
        source=hostile, twin=hostile, settings=settings, unfair=(hostile,), versions={hostile: hostile},
        missing=(Missing(hostile, hostile, hostile),),
    )  # fmt: skip
    html = bench_page(result)
    page = Page(html)
    assert not page.open
    assert not {"script", "img", "link", "iframe", "form", "input"} & set(page.tags)
    assert page.tags.count("style") == page.tags.count("title") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [v for k, v in page.attributes if k in ("href", "src") and not v.startswith("#")]
    assert "default-src 'none'" in html
    assert not {"\x1b", "\x00", "\u202e"} & set(html)
    assert hostile.partition("\x1b")[0].partition("\x00")[0] in page.raw
    stream = io.StringIO()
    Console(file=stream, width=200).print(bench_tables(result))
    assert not {"\x1b", "\x00", "\u202e"} & set(stream.getvalue())


def test_the_report_is_the_same_from_what_was_saved(tmp_path: Path) -> None:
    sample().save(tmp_path)
    write_bench_report(BenchResult.load(tmp_path), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == bench_page(sample())
