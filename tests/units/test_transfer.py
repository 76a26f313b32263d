"""Thresholds of the first map, carried over: a map against itself is diagonal, and groups may grow and shrink."""

import json
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keelguard.errors import UsageError
from keelguard.plots import percent
from keelguard.units.figures import transfer_figure
from keelguard.units.groups import GROUPS, Sizes, UnitMap, classify
from keelguard.units.importance import SCORES, Importance, standardise
from keelguard.units.transfer import Transfer, attribute_transfer, carried_labels

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = (40, 8, 40, 8)
SIZES = Sizes(scu=0.05, ucu=0.1, ru=0.25)


def make(
    safety: torch.Tensor, utility: torch.Tensor, score: str = "decision", ranking: Any = "global", **changes: Any
) -> UnitMap:
    """A map of four blocks in two layers with this raw importance."""
    raw = Importance(safety, utility)
    standard = standardise(raw, score, BLOCKS)
    sizes = changes.pop("sizes", SIZES)
    labels = classify(*standard, BLOCKS, sizes, ranking)
    layout = [
        {"name": f"layers.{i // 2}.{kind}", "layer": i // 2, "kind": kind, "units": count}
        for i, (count, kind) in enumerate(zip(BLOCKS, ("mlp", "head") * 2, strict=True))
    ]
    meta = {"score": score, "ranking": ranking}
    return UnitMap(
        **{
            "labels": labels, "contrast": standard.contrast, "strength": standard.strength,
            "raw": {score: vars(raw)}, "layout": layout, "attention": "head", "weights": "aa" * 32, "meta": meta,
            **changes,
        }
    )  # fmt: skip


def drawn(seed: int, **options: Any) -> UnitMap:
    draw = torch.Generator().manual_seed(seed)
    safety, utility = torch.randn(2, sum(BLOCKS), generator=draw, dtype=torch.float64).abs()
    return make(safety - 0.3, utility, **options)


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("score", SCORES)
def test_a_map_against_itself_is_diagonal(score: str, ranking: str):
    chart = drawn(0, score=score, ranking=ranking)
    assert torch.equal(carried_labels(chart, chart), chart.labels)
    found = attribute_transfer(chart, chart)
    assert found.moved == 0
    assert [found.counts[i][i] for i in range(4)] == list(chart.counts().values())
    assert found.units == sum(BLOCKS)
    assert len(found.thresholds) == (1 if ranking == "global" else len(BLOCKS))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 2)), min_size=sum(BLOCKS), max_size=sum(BLOCKS)),
    st.sampled_from(["global", "layer"]),
    st.sampled_from(["decision", "variance"]),
    st.sampled_from([SIZES, Sizes(0, 0, 0.3), Sizes(0.3, 0.3, 0.3), Sizes(0.2, 0, 0)]),
)
def test_equal_scores_go_where_they_were(values: Any, ranking: str, score: str, sizes: Sizes):
    """Few distinct values: most units stand exactly at a threshold."""
    safety, utility = torch.tensor(values, dtype=torch.float64).T
    chart = make(safety, utility, score, ranking, sizes=sizes)
    assert torch.equal(carried_labels(chart, chart), chart.labels)


def test_the_second_model_is_measured_on_the_scale_of_the_first():
    before = drawn(0)
    # Utility falls for all units alike: by shares nothing would change, by the first model's scores much does.
    faded = make(before.raw["decision"]["safety"], 0.5 * before.raw["decision"]["utility"])
    found = attribute_transfer(before, faded)
    ru = GROUPS.index("RU")
    assert sum(row[ru] for row in found.counts) > before.counts()["RU"]
    assert found.share("cu", "ru") > 0
    assert found.moved == pytest.approx(sum(found.share(a, b) for a in GROUPS for b in GROUPS if a != b))


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("score", ["decision", "variance"])
def test_counts_by_a_loop_over_units(score: str, ranking: str):
    before, after = drawn(1, score=score, ranking=ranking), drawn(2, score=score)
    found = attribute_transfer(before, after)
    scale = standardise(Importance(**after.raw[score]), score, BLOCKS, Importance(**before.raw[score]))
    own = standardise(Importance(**before.raw[score]), score, BLOCKS)
    expected: dict[int, list[list[int]]] = {layer: [[0] * 4 for _ in range(4)] for layer in (0, 1)}
    start = 0
    for number, size in enumerate(BLOCKS):
        everything = range(start, start + size) if ranking == "layer" else range(sum(BLOCKS))
        groups = {g: [j for j in everything if before.labels[j] == GROUPS.index(g)] for g in GROUPS}
        for j in range(start, start + size):
            contrast, strength = scale.contrast[j], scale.strength[j]
            if groups["SCU"] and contrast >= min(own.contrast[i] for i in groups["SCU"]):
                label = "SCU"
            elif groups["UCU"] and contrast <= max(own.contrast[i] for i in groups["UCU"]):
                label = "UCU"
            elif groups["RU"] and strength <= max(own.strength[i] for i in groups["RU"]):
                label = "RU"
            else:
                label = "CU"
            expected[number // 2][before.labels[j]][GROUPS.index(label)] += 1
        start += size
    assert {layer: [list(row) for row in table] for layer, table in found.layers.items()} == expected
    both = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(*expected.values(), strict=True)]
    assert [list(row) for row in found.counts] == both
    assert 0 < found.moved < 1


def test_a_group_that_was_empty_stays_empty():
    before = drawn(0, sizes=Sizes(0, 0.1, 0.2))
    found = attribute_transfer(before, drawn(1))
    assert found.thresholds[0]["SCU"] is None
    assert all(row[GROUPS.index("SCU")] == 0 for row in found.counts)


def test_transfer_comes_back_from_json():
    for ranking in ("global", "layer"):
        found = attribute_transfer(drawn(0, ranking=ranking, sizes=Sizes(0, 0.1, 0.2)), drawn(1))
        assert Transfer.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert sum(map(sum, found.to_json()["shares"])) == pytest.approx(1)


def test_maps_that_cannot_be_compared_are_refused():
    before = drawn(0)
    layout = [{**block, "name": "else"} for block in before.layout]
    for after, message in (
        (drawn(1, score="taylor"), "different scores, decision and taylor"),
        (drawn(1, attention="channel"), "different attention options, head and channel"),
        (drawn(1, layout=layout), "of different layouts"),
        (drawn(1, raw={}), "second unit map lacks raw importance by decision"),
    ):
        with pytest.raises(UsageError, match=message):
            attribute_transfer(before, after)
    with pytest.raises(UsageError, match="first unit map lacks"):
        attribute_transfer(drawn(0, raw={"decision": {"safety": torch.zeros(96)}}), before)
    with pytest.raises(UsageError, match="not those that its scores give"):
        attribute_transfer(drawn(0, labels=before.labels.flip(0)), before)


def test_the_figure_says_every_share():
    found = attribute_transfer(drawn(0), drawn(1))
    svg = transfer_figure(found)
    assert svg == transfer_figure(found)
    words = [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    for source in GROUPS:
        for target in GROUPS:
            assert percent(found.share(source, target)) in words
    assert {"before", "after", *(f"→ {group}" for group in GROUPS)} <= set(words)
    assert percent(found.moved) in svg
    # A band for each flow that there is, beside eight bars and the background.
    bands = svg.count("opacity")
    assert bands == sum(count > 0 for row in found.counts for count in row)
