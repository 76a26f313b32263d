"""The report of a diagnosis leads with its limits, shows every figure of the proof, and treats names as hostile."""

import dataclasses
import io
import math
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from rich.console import Console

from keelguard.errors import UsageError
from keelguard.plots import rate_text
from keelguard.stats import Rate, mcnemar
from keelguard.units.direction import Decision, DirectionProbe, Distances, Estimate
from keelguard.units.findings import (
    breaking_point,
    direction_sentences,
    map_sentences,
    proof_warnings,
    transfer_sentences,
    verdict,
)
from keelguard.units.groups import GROUPS, Sizes, UnitMap, classify
from keelguard.units.page import TOP, diagnosis_page, diagnosis_tables, write_diagnosis_report
from keelguard.units.proof import Point, Proof
from keelguard.units.proof_figures import place_counts
from keelguard.units.stability import chance
from keelguard.units.transfer import Transfer

LAYERS, EXPERTS, WIDTH, HEADS = 3, 2, 60, 4
SHARES = (0.01, 0.05, 0.2)
REQUESTS = 40
HOSTILE = (
    "<script>alert(1)</script>\x1b[31m\u202e",
    '"><img src=x onerror=alert(1)>\x00',
    "</title></svg><style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
)
BARE = {"model": "org/model", "architecture": "LlamaForCausalLM", "score": "decision"}


def sample_map(**meta: Any) -> UnitMap:
    """A map of a small mixture of experts; its figures are drawn, not measured."""
    layout = []
    for layer in range(LAYERS):
        layout.append({"name": f"layers.{layer}.self_attn", "layer": layer, "kind": "head", "units": HEADS})
        for expert in range(EXPERTS):
            layout.append({"name": f"layers.{layer}.mlp.{expert}", "layer": layer, "kind": "mlp", "units": WIDTH})
    sizes = [block["units"] for block in layout]
    generator = torch.Generator().manual_seed(0)
    contrast, strength = torch.randn(2, sum(sizes), generator=generator, dtype=torch.float64)
    labels = classify(contrast, strength, sizes, Sizes(0.1, 0.02, 0.2))
    return UnitMap(labels, contrast, strength, {}, layout, "head", "ab" * 32, meta or FULL)


FULL = {
    **BARE,
    "normalised": "over the whole model",
    "ranking": "global",
    "sizes": {"scu": 0.1, "ucu": 0.02, "ru": 0.2},
    "settings": {"tokens": 3, "seed": 0},
    "data": {"safety": [["data/harmful.jsonl", "cd" * 32]], "utility": [["data/chats.jsonl", "ef" * 32]]},
    "prompts": {"safety": 128, "utility": 64},
    "refusal_rate": 0.98,
    "coverage": {"units": {"head": 12, "mlp": 360}, "mapped": 9000, "total": 12000, "share": 0.75},
    "versions": {"torch": "2.13.0"},
    "stability": {g: {"iou": 0.81, "low": 0.72, "high": 0.93, "chance": 0.05, "samples": 20} for g in GROUPS},
    "overlap": {
        "halves of the prompts": {"first half / second half": dict.fromkeys(GROUPS, 0.77)},
        "data sets": {"1 a.jsonl / 2 b.jsonl": {"CU": 0.9, "SCU": 0.31, "UCU": None, "RU": 0.4}},
        "scores": {
            "decision / taylor": dict.fromkeys(GROUPS, 0.26),
            "decision / wanda": dict.fromkeys(GROUPS, 0.03),
            "taylor / wanda": dict.fromkeys(GROUPS, 0.91),
        },
    },
    "cost": {"attribution: safety": 12.345},
    "scan": {
        "SCU": [{"share": 0.0025, "asr_rise": 0.62, "utility_drop": 0.01}],
        "RU": [{"share": 0.05, "asr_rise": 0.0, "utility_drop": 0.21}],
        "found": {"scu": 0.0025, "ru": 0.0},
    },
}


def point(share: float, broken: int, solved: int = 45, *, refusing: int = 1, loss: float = 0.1) -> Point:
    return Point(
        share=share,
        units=round(share * 372),
        asr=Rate(broken, REQUESTS),
        refused=Rate(REQUESTS - broken, REQUESTS),
        over_refusal=Rate(refusing, 30),
        utility=Rate(solved, 50),
        degenerate=Rate(2, 120),
        loss=loss,
        broken=tuple(number < broken for number in range(REQUESTS)),
    )


def sample_proof(**curves: tuple[int, ...]) -> Proof:
    """Every curve that a proof has; each given as the broken requests at the three shares."""
    broken = {
        "SCU": (3, 31, 37),
        "UCU": (1, 2, 3),
        "CU": (2, 1, 4),
        "RU": (0, 0, 1),
        "random 1": (0, 2, 3),
        "random 2": (1, 5, 6),
        "magnitude": (0, 4, 7),
        "SCU by variance": (2, 6, 9),
        "random pair 1": (1, 9, 14),
        "random pair 2": (0, 7, 11),
        **{name.replace("_", " "): values for name, values in curves.items()},
    }
    drawn = {
        name: [point(SHARES[i], each, 44 - row, refusing=row + 3 * i) for i, each in enumerate(counts)]
        for row, (name, counts) in enumerate(broken.items())
    }
    exact = {"spearman": 0.87, "units": [1, 5, 9], "first_order": [0.1, -0.4, 0.0], "exact": [0.2, -0.3, 0.01]}
    return Proof(point(0.0, 1, 48), drawn, "zero", {**exact, "decision": -0.42})


def sample_transfer() -> Transfer:
    table = ((200, 4, 0, 10), (3, 20, 0, 0), (0, 0, 30, 0), (25, 0, 0, 80))
    return Transfer("decision", "head", "global", "aa" * 32, "bb" * 32, table, {0: table}, ())


def sample_probe(*, decided: bool = True) -> DirectionProbe:
    def distances(low: float, high: float) -> Distances:
        return Distances(Estimate(0.3, 0.2, 0.4), Estimate(0.2, 0.1, 0.3), Estimate((low + high) / 2, low, high))

    averaged = (distances(-0.2, -0.1), distances(0.1, 0.2), distances(-0.1, 0.1))
    logits = tuple(Estimate(v, v - 0.5, v + 0.5) for v in (4.0, 1.0, -1.7))
    decision = Decision(Estimate(5.6, 5.0, 6.1), logits, logits) if decided else None
    return DirectionProbe((2, 4, 6), (9, 9, 9), tuple((d, d) for d in averaged), averaged, decision)


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
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.raw += " " if tag in ("td", "th", "dt", "dd") else ""

    def handle_data(self, data):
        self.raw += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def html() -> str:
    return diagnosis_page(sample_map(), sample_proof(), sample_transfer(), sample_probe())


def terminal(chart: UnitMap, proof: Proof | None = None, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(diagnosis_tables(chart, proof, width=width))
    return stream.getvalue()


def test_page_is_well_formed_and_loads_nothing(html):
    page = Page(html)
    assert not page.open
    assert not {"script", "img", "iframe", "a", "link", "image", "foreignobject"} & set(page.tags)
    assert not page.values("src")
    assert all(value.startswith("#") for value in page.values("href"))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.values("content")
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 0
    assert {part for value in page.values("aria-labelledby") for part in value.split()} <= set(ids)
    assert page.tags.count("svg") == 5
    assert page.tags.count("th") == len(page.values("scope"))
    assert "nan" not in page.text.lower()


def test_page_is_the_same_twice_and_after_json(html, tmp_path):
    proof, transfer = Proof.from_json(sample_proof().to_json()), Transfer.from_json(sample_transfer().to_json())
    probe = DirectionProbe.from_json(sample_probe().to_json())
    sample_map().save(tmp_path)
    write_diagnosis_report(tmp_path / "out" / "page.html", UnitMap.load(tmp_path), proof, transfer, probe)
    assert (tmp_path / "out" / "page.html").read_text(encoding="utf-8") == html


def test_every_point_of_the_proof_is_in_the_table(html):
    text = Page(html).text
    for name, curve in {"whole model": [sample_proof().dense], **sample_proof().curves}.items():
        for each in curve:
            numbers = (
                f"{each.units:,} {rate_text(each.asr)} {each.asr.count}/{each.asr.total} {rate_text(each.refused)}"
            )
            rest = f"{rate_text(each.utility)} 90 % {rate_text(each.over_refusal)} {rate_text(each.degenerate)}"
            assert f"{numbers} {rest}" in text, name


def test_figure_of_the_curves_names_every_curve_once_and_seeds_together(html):
    figure = html[html.index("Units taken out") :].split("</svg>")[0]
    seeds = ("random units, 2 seeds", "random token pairs, 2 seeds")
    for name in ("SCU", "UCU", "CU", "RU", "magnitude", "SCU by variance", *seeds):
        assert figure.count(f">{name}<") == 1, name
    assert all(f">{name}<" in figure for name in ("attack success rate", "utility", "over-refusal"))


def test_page_says_how_far_the_map_can_be_trusted(html):
    text = Page(html).text
    expected = f"{chance(37 / 372):.2f}"
    assert "37 (10 %) are safety-critical (SCU), 7 (2 %) are utility-critical (UCU)" in text
    assert "0.81 [0.72, 0.93] with themselves over 20 resamples; two random sets of their size would have 0.05" in text
    assert f"The two halves of the prompts agree on SCU, with an IoU of 0.77 (chance {expected})." in text
    assert f"The data sets give different SCU, with an IoU of 0.31 (chance {expected}): the SCU depend on" in text
    assert (
        "Different scores give different SCU: those by decision have an IoU of 0.26 with taylor, 0.03 with wanda"
        in text
    )
    assert "the model refused 98 % of the harmful requests" in text
    assert (
        text.index("How far the map can be trusted") < text.index("Proof by ablation") < text.index("Where units sit")
    )
    assert "two random sets 0.05 0.01 0.52 0.11" in text, "chance stands beside the overlaps"
    assert "1 a.jsonl / 2 b.jsonl 0.31 – 0.90 0.40" in text


def test_scores_that_agree_are_said_to_agree():
    overlap = {"scores": {"decision / taylor": {"SCU": 0.8}}}
    words = " ".join(map_sentences(sample_map(**BARE, overlap=overlap)))
    assert "Other scores give similar SCU: the IoU is 0.80 with taylor" in words


def test_verdict_where_the_scu_break_safety():
    proof = sample_proof()
    found = breaking_point(proof)
    assert found is not None
    assert found.share == 0.05, "3 of 40 is no rise by half, 31 is"
    words = verdict(proof)
    assert words.startswith("With the 19 units that rank highest as SCU (5 % of all) zeroed, the attack success rate")
    assert f"rises from {rate_text(proof.dense.asr)} to {rate_text(found.asr)}" in words
    assert "utility changes by −8 points" in words
    assert f"random units reach at most {rate_text(Rate(5, REQUESTS))}" in words
    assert f"random token pairs reach at most {rate_text(Rate(9, REQUESTS))}" in words
    assert mcnemar(found.broken, proof.curves["random pair 1"][1].broken).p_value < 0.001
    assert "SCU against random pair 1: exact McNemar test, p < 0.001" in words
    assert proof_warnings(proof) == []


def test_verdict_at_exactly_fifty_points():
    assert breaking_point(sample_proof(SCU=(20, 30, 30))).share == 0.05  # pyright: ignore
    assert breaking_point(sample_proof(SCU=(21, 30, 30))).share == 0.01  # pyright: ignore


def test_verdict_where_no_share_breaks_safety():
    proof = sample_proof(SCU=(3, 8, 6))
    words = verdict(proof)
    assert words.startswith("Ablating the SCU does not break safety here")
    assert f"at most {rate_text(Rate(8, REQUESTS))} without them (at 5 % of all units)" in words
    assert "cannot rise" not in words
    assert "cannot rise that far" in verdict(dataclasses.replace(proof, dense=point(0.0, 30)))
    stronger = sample_proof(SCU=(3, 8, 6), magnitude=(0, 22, 30))
    assert "A control breaks safety where the SCU do not" in proof_warnings(stronger)[0]
    assert "at 5 % of all units" in proof_warnings(stronger)[0]


def test_verdict_warns_where_controls_are_as_strong():
    for name, group in (
        ("random_2", "random units"),
        ("random_pair_1", "token pairs"),
        ("magnitude", "largest weights"),
    ):
        proof = sample_proof(**{name: (0, 16, 20)})
        assert proof_warnings(proof)[0].startswith("A control is nearly as strong: without")
        assert group in proof_warnings(proof)[0]
        assert proof_warnings(sample_proof(**{name: (0, 15, 20)})) == [], "less than half of the rise"
    assert "p = 1.00" in verdict(sample_proof(random_1=(0, 31, 31)))


def test_verdict_without_pairs_or_without_controls():
    proof = sample_proof()
    unpaired = dataclasses.replace(proof.curves["random pair 1"][1], broken=(True,) * 3)
    curves = {**proof.curves, "random pair 1": [unpaired]}
    assert "there is no test" in verdict(dataclasses.replace(proof, curves=curves))
    assert "no random control" in verdict(dataclasses.replace(proof, curves={"SCU": proof.curves["SCU"]}))
    assert "was not measured" in verdict(dataclasses.replace(proof, curves={}))
    nothing = dataclasses.replace(proof.dense, asr=Rate(0, 0), broken=())
    assert "was not measured" in verdict(dataclasses.replace(proof, dense=nothing))


def test_keyword_judges_and_utility_without_tasks_are_warned_of():
    proof = sample_proof()
    assert "refusal keywords" in proof_warnings(dataclasses.replace(proof, judge="keyword"))[0]
    assert proof_warnings(dataclasses.replace(proof, judge="world")) == []
    unable = dataclasses.replace(proof, dense=dataclasses.replace(proof.dense, utility=Rate(2, 50), loss=0.2))
    assert "mean probability" in proof_warnings(unable)[0]
    assert "from 82 % to 90 %" in verdict(unable)
    unasked = dataclasses.replace(proof, dense=dataclasses.replace(proof.dense, utility=Rate(0, 0), loss=0.0))
    assert "Utility was not measured" in proof_warnings(unasked)[0]
    assert "utility changes" not in verdict(unasked)
    text = Page(diagnosis_page(sample_map(), dataclasses.replace(unable, judge="keyword"))).text
    assert "refusal keywords" in text
    assert "probability of a reference token" in text


def test_page_of_a_bare_map_leaves_out_what_is_not_there():
    page = Page(diagnosis_page(sample_map(**BARE)))
    assert page.tags.count("svg") == 1
    assert "was not measured" in page.text
    assert "no evidence that its SCU carry safety" in page.text
    for absent in ("How the sizes were found", "Attribute transfer", "Reasoning direction", "chance"):
        assert f"<h2>{absent}" not in page.text
    assert not page.open
    assert "not measured" in terminal(sample_map(**BARE))


def test_page_of_a_map_of_redundancy_alone():
    chart = sample_map(**BARE).relabelled(Sizes(0.0, 0.0, 0.2))
    page = Page(diagnosis_page(chart))
    assert "There are no SCU in this map" in page.text
    assert "How stable the RU are" in page.text


@pytest.mark.parametrize("key", ["model", "architecture", "score"])
def test_required_keys_are_asked_for_by_name(key):
    meta = {name: value for name, value in BARE.items() if name != key}
    with pytest.raises(UsageError, match=key):
        diagnosis_page(dataclasses.replace(sample_map(), meta=meta))


@pytest.mark.parametrize("key", sorted(FULL.keys() - BARE.keys()))
def test_any_other_key_may_be_missing(key):
    chart = sample_map(**{name: value for name, value in FULL.items() if name != key})
    assert not Page(diagnosis_page(chart)).open
    assert "SCU" in terminal(chart)


def _poisoned(value: Any, text: str) -> Any:
    if isinstance(value, str):
        return value + text
    if isinstance(value, dict):
        keep = (*GROUPS, "iou", "low", "high", "chance", "samples", "scu", "ru", "share", "asr_rise", "utility_drop")
        keep += ("units", "mapped", "total", "found", "safety", "halves of the prompts", "data sets", "scores")
        return {k if k in keep else k + text: _poisoned(item, text) for k, item in value.items()}
    return [_poisoned(item, text) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_everywhere(text, html):
    ours = Page(html)
    clean = sample_map()
    # Blocks sort by kind, so that a hostile kind is shown as it stands.
    layout = [{**b, "name": b["name"] + text, "kind": b["kind"] + text[:4]} for b in clean.layout]
    meta = {key: _poisoned(value, text) for key, value in clean.meta.items()}
    chart = dataclasses.replace(clean, layout=layout, meta=meta, weights=text + clean.weights, attention=text)
    proof = dataclasses.replace(sample_proof(**{f"other{text}": (1, 2, 3)}), judge="keyword" + text)
    transfer = dataclasses.replace(sample_transfer(), before=text, after=text)
    source = diagnosis_page(chart, proof, transfer, sample_probe())
    page = Page(source)
    assert not page.open
    assert set(page.tags) <= set(ours.tags)
    assert page.tags.count("style") == 1
    assert {name for name, _ in page.attributes} <= {name for name, _ in ours.attributes}
    assert not set(source) & set("\x1b\x00\u202e")
    assert page.text.count("⟨U+") > 5 or not any(c in text for c in "\x1b\x00")
    assert not set(terminal(chart, proof)) & set("\x1b\x00\u202e")


def test_page_names_data_hashes_cost_and_coverage(html):
    text = Page(html).text
    for part in (
        "cd" * 32,
        "ef" * 32,
        "ab" * 32,
        "12.3 s",
        "9,000 of 12,000 (75 %)",
        "units of kind mlp 360",
        "2.13.0",
    ):
        assert part in text
    assert "SCU: 0.25 % of all units" in text
    assert "0.25 % +62 −1" in text
    assert "0.87; the whole model’s decision is −0.42 nats" in text


def test_highest_ranking_units_are_named_by_their_place_in_the_block():
    chart = sample_map()
    contrast = chart.contrast.clone()
    contrast[[0, HEADS - 1, HEADS, HEADS + WIDTH - 1]] = torch.tensor([9.0, 8.0, 7.0, 6.0], dtype=torch.float64)
    labels = classify(contrast, chart.strength, chart.blocks, Sizes(0.1, 0.02, 0.2))
    text = Page(diagnosis_page(dataclasses.replace(chart, contrast=contrast, labels=labels))).text
    ends = [
        "layers.0.self_attn 0 +9.00",
        "layers.0.self_attn 3 +8.00",
        "layers.0.mlp.0 0 +7.00",
        "layers.0.mlp.0 59 +6.00",
    ]
    places = [text.index(end) for end in ends]
    assert places == sorted(places)
    table = text[text.index("The 20 SCU that rank highest") : text.index("How the sizes were found")]
    assert table.count("layers.") == TOP < int((labels == GROUPS.index("SCU")).sum())


def test_units_of_all_experts_of_a_layer_are_counted_together():
    chart = sample_map()
    table = place_counts(chart)
    assert set(table) == {(layer, kind) for layer in range(LAYERS) for kind in ("head", "mlp")}
    assert all(sum(table[layer, "mlp"]) == EXPERTS * WIDTH for layer in range(LAYERS))
    assert [sum(cell) for cell in zip(*table.values(), strict=True)] == [chart.counts()[g] for g in GROUPS]


def test_a_layer_without_some_kind_is_left_blank():
    chart = sample_map()
    layout = [
        {**block, "kind": "channel"} if block["name"] == "layers.1.self_attn" else block for block in chart.layout
    ]
    assert not Page(diagnosis_page(dataclasses.replace(chart, layout=layout))).open


def test_transfer_and_direction_in_words(html):
    words = " ".join(transfer_sentences(sample_transfer()))
    assert "11 % of 372 units changed group; most went RU → CU (7 %), CU → RU (3 %), CU → SCU (1 %)" in words
    words = " ".join(direction_sentences(sample_probe()))
    assert "the refusal is nearer at k = 2; the compliance is nearer at k = 4; neither is at k = 6" in words
    assert (
        "the model leans to refuse: the decision logit is +5.6 [+5.0, +6.1] nats; after 6 tokens of compliance" in words
    )
    assert len(direction_sentences(sample_probe(decided=False))) == 1
    assert "RU → CU (7 %)" in Page(html).text


@pytest.mark.parametrize("width", [40, 80, 160])
def test_terminal_never_cuts_a_figure(width):
    text = terminal(sample_map(), sample_proof(), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    assert "5–12 %" in flat, "two seeds of random units at 5 %"
    assert "Ablating" in flat or "With the 19 units" in flat
    assert terminal(sample_map(), sample_proof(), 100).count("Warning") == 0
    assert "Warning" in terminal(sample_map(), sample_proof(magnitude=(0, 30, 30)))


def test_missing_rates_are_dashes():
    empty = dataclasses.replace(point(0.05, 1), over_refusal=Rate(0, 0), utility=Rate(0, 0), loss=0.0)
    proof = Proof(dataclasses.replace(empty, share=0.0), {"SCU": [empty]}, "mean")
    page = Page(diagnosis_page(sample_map(), proof))
    assert "nan" not in page.text
    assert "– – –" in page.text
    assert "nan" not in terminal(sample_map(), proof)
    assert math.isnan(empty.utility.value)
    assert "put at their mean activation" in page.text


def test_sizes_that_were_chosen_are_not_rounded_into_one():
    scan = {"SCU": [{"share": s, "asr_rise": 0.1, "utility_drop": 0.0} for s in (0.015, 0.02)], "RU": [], "found": {}}
    text = Page(diagnosis_page(sample_map(**BARE, scan=scan))).text
    assert "1.5 % +10 0 2 % +10 0" in text
    assert "no share breaks safety; its size was kept" in text
    assert "the size of RU was found by ablation" in text
