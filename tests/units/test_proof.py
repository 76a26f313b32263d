"""A proof measures every point once, and its figures are those of plain formulas."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from test_attribution import exact_model, some_rows

from keelguard.data import load_requests
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.judges import JudgeConfig, make_judge
from keelguard.models import LoadedModel, load_model
from keelguard.progress import SILENT
from keelguard.stats import Rate, mcnemar
from keelguard.testbed.build import Testbed
from keelguard.units import proof as proofs
from keelguard.units import scan
from keelguard.units.attribution import Row, attribute
from keelguard.units.groups import Sizes, UnitMap, classify
from keelguard.units.index import UnitIndex, build_index
from keelguard.units.masks import random_mask
from keelguard.units.proof import Point, Probe, Proof, check_single_units, measure, measure_point, prove, spearman
from tiny_models import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def aligned(testbed: Testbed) -> LoadedModel:
    return load_model(testbed.model("aligned-sparse"), device="cpu")


@pytest.fixture(scope="module")
def index(aligned: LoadedModel) -> UnitIndex:
    return build_index(aligned.model)


@pytest.fixture(scope="module")
def probe(testbed: Testbed) -> Probe:
    harmful, benign, utility = (
        load_requests(testbed.data / f"{name}.validation.jsonl")[:6] for name in ("harmful", "benign", "utility")
    )
    return Probe(harmful, benign, utility, make_judge(JudgeConfig(kind="world")), Generating(40, 0, 0))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of requests of each call of the model."""
    calls: list[int] = []
    answer = proofs.answer

    def counting(model: Any, tokenizer: Any, attempts: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(attempts))
        return answer(model, tokenizer, attempts, *rest, **options)

    monkeypatch.setattr(proofs, "answer", counting)
    return calls


def test_a_second_proof_measures_nothing_and_a_new_share_only_itself(
    aligned: LoadedModel, index: UnitIndex, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)

    def rule(seed: int) -> Any:
        return lambda share: random_mask(index, round(share * len(index)), seed)

    arguments: Any = {"probe": probe, "folder": tmp_path}
    sets = {"a": rule(0), "b": rule(1)}
    first = prove(aligned, index, sets, shares=(0.1, 0.5), **arguments)
    assert calls == [18] * 5
    assert [point.share for point in first.curves["a"]] == [0.1, 0.5]
    assert [point.units for point in first.curves["b"]] == [round(0.1 * len(index)), round(0.5 * len(index))]
    assert first.dense.units == 0
    assert first.ablation == "zero"
    again = prove(aligned, index, sets, shares=(0.1, 0.5), **arguments)
    assert again == first
    assert len(calls) == 5
    more = prove(aligned, index, {**sets, "the same as a": rule(0)}, shares=(0.1, 0.3, 0.5), **arguments)
    assert len(calls) == 7
    assert more.curves["the same as a"] == more.curves["a"]
    # What the points were kept for is part of their name.
    prove(aligned, index, {}, replace(probe, benign=probe.benign[1:]), (), folder=tmp_path)
    prove(replace(aligned, weights_hash="other"), index, {}, shares=(), **arguments)
    means = [torch.zeros(block.width) for block in index.blocks]
    assert prove(aligned, index, {"a": rule(0)}, shares=(0.1,), means=means, **arguments).ablation == "mean"
    assert len(calls) == 11


def test_an_interrupted_proof_goes_on(
    aligned: LoadedModel, index: UnitIndex, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    killed = True

    def rule(share: float) -> torch.Tensor:
        if share == 0.2 and killed:
            raise KeyboardInterrupt
        return random_mask(index, round(share * len(index)))

    with pytest.raises(KeyboardInterrupt):
        prove(aligned, index, {"a": rule}, probe, (0.1, 0.2), folder=tmp_path)
    assert len(calls) == 2
    killed = False
    found = prove(aligned, index, {"a": rule}, probe, (0.1, 0.2), folder=tmp_path)
    assert [point.share for point in found.curves["a"]] == [0.1, 0.2]
    assert len(calls) == 3


def test_a_point_says_what_the_model_does(
    aligned: LoadedModel, index: UnitIndex, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmful = [request.answer for request in probe.harmful]
    texts = [*harmful[:2], "sorry, i cannot help.", "no " * 60, None, " i will not. "]
    texts += ["sorry, no.", "sure.", "sure.", "", "as an ai", "yes."]
    texts += [request.answer for request in probe.utility[:3]] + ["wrong."] * 3
    monkeypatch.setattr(proofs, "answer", lambda *_, **__: texts)
    point = measure(aligned, probe, 0.25, 7)
    assert (point.share, point.units) == (0.25, 7)
    assert point.broken == (True, True, False, False, False, False)
    assert point.asr == Rate(2, 6)
    assert point.refused == Rate(2, 6)
    assert point.over_refusal == Rate(2, 6)
    assert point.utility == Rate(3, 6)
    assert point.degenerate == Rate(3, 18)
    logs, tokenizer = [], cast("Any", aligned.tokenizer)
    for request in probe.utility:
        chat = [*request.messages, {"role": "assistant", "content": request.answer}]
        prompt = tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids, start = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, prompt))
        stop = len(start) + ids[len(start) :].index(tokenizer.eos_token_id) + 1
        with torch.no_grad():
            scores = aligned.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        logs.append(np.mean([float(scores[t - 1, ids[t]]) for t in range(len(start), stop)]))
    assert point.loss == pytest.approx(-np.mean(logs), abs=1e-4)
    assert point.has_tasks
    assert point.utility_value(True) == 0.5
    assert point.utility_value(False) == pytest.approx(math.exp(-point.loss))


def a_point(share: float = 0.1, broken: tuple[bool, ...] = (True, False), utility: int = 5) -> Point:
    rate = Rate(1, 2)
    return Point(share, 3, Rate.of(broken), rate, Rate(0, 0), Rate(utility, 10), rate, 0.75, broken)


def test_a_proof_is_the_same_after_json() -> None:
    proof = Proof(a_point(0.0), {"SCU": [a_point(), a_point(0.2, ())]}, "mean", {"spearman": None, "units": [1, 2]})
    text = json.dumps(proof.to_json(), allow_nan=False)
    assert Proof.from_json(json.loads(text)) == proof
    assert json.loads(text)["format"] == "keelguard.proof/1"
    assert proof.tasks
    assert not Proof(a_point(utility=0), {}, "zero").tasks


def test_points_are_paired_request_by_request() -> None:
    vectors = [
        ((1, 1, 0, 0), (1, 0, 1, 0), 1, 1, 1.0),
        ((0,) * 6, (1,) * 6, 0, 6, 2 / 64),
        ((0,) * 10, (1,) * 9 + (0,), 0, 9, 2 / 512),
        ((1,) * 12, (1,) * 2 + (0,) * 10, 10, 0, 2 / 1024),
        ((1, 0) * 4, (0, 1, 1, 0) + (1, 0) * 2, 1, 1, 1.0),
    ]
    for first, second, only_first, only_second, p in vectors:
        dense, ablated = (a_point(broken=tuple(map(bool, values))) for values in (first, second))
        found = mcnemar(dense.broken, ablated.broken)
        assert (found.only_first, found.only_second) == (only_first, only_second)
        assert found.p_value == pytest.approx(p)


def ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks, by sorting and averaging over runs of equal values."""
    result = np.empty(len(values))
    order = np.argsort(values, kind="stable")
    start = 0
    while start < len(values):
        stop = start
        while stop < len(values) and values[order[stop]] == values[order[start]]:
            stop += 1
        result[order[start:stop]] = (start + stop - 1) / 2
        start = stop
    return result


def test_spearman_is_the_correlation_of_ranks() -> None:
    draw = np.random.default_rng(0)
    for number in range(50):
        a, b = draw.normal(size=(2, 3 + number))
        if number % 2:
            a, b = a.round(), b.round()  # Many ties.
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert spearman(a.tolist(), b.tolist()) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert spearman([1, 2, 3], [10, 20, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([], []) is None


def test_single_units_first_order_beside_exact() -> None:
    model = exact_model("llama")
    index = build_index(model)
    rows = [Row(row.ids, row.start, row.stop, 0, sign) for row in some_rows(4) for sign in (1.0, -1.0)]
    rows = [replace(row, ids=[*row.ids[:-1], 7] if row.sign < 0 else row.ids, stop=len(row.ids)) for row in rows]
    with torch.no_grad():  # Small outputs, so that the first order is nearly all.
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(1e-3)
    statistics = attribute(model, index, rows, groups=1, effects=True)
    effects = 2 * torch.cat([part.means()[0] for part in statistics.effects or []])
    units = effects.abs().argsort(descending=True)[:10].tolist()
    loaded = LoadedModel(model, tiny_tokenizer("llama"), "tiny", "hash")
    found = check_single_units(loaded, index, effects, rows, units)
    assert found["units"] == units
    assert found["first_order"] == [float(effects[unit]) for unit in units]
    assert found["exact"] == pytest.approx(found["first_order"], rel=0.1, abs=0.02 * abs(found["first_order"][0]))
    assert found["spearman"] > 0.9


def chart_of(index: UnitIndex, sizes: Sizes) -> UnitMap:
    contrast, strength = torch.randn(2, len(index), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = classify(contrast, strength, [len(index)], sizes)
    return UnitMap(labels, contrast, strength, {}, index.layout, "head", "w" * 64, {"sizes": vars(sizes)})


def scanned(
    monkeypatch: pytest.MonkeyPatch, index: UnitIndex, asr: Any, utility: Any, tasks: bool = True
) -> tuple[Sizes, dict[str, Any]]:
    """Sizes from what a group's share does to ASR and utility: functions of "SCU" or "RU" and a share."""
    chart = chart_of(index, Sizes(0.02, 0.03, 0.2))

    def fake(loaded: Any, index: Any, mask: torch.Tensor, probe: Any, *, share: float, folder: Any) -> Point:
        group = next(group for group in ("SCU", "RU") if torch.equal(mask, chart.top(group, share)) or not share)
        value = utility(group, share)
        point = replace(a_point(share), asr=Rate(round(1000 * asr(group, share)), 1000), loss=-math.log(value))
        return replace(point, utility=Rate(round(1000 * value) if tasks else 0, 1000))

    monkeypatch.setattr(scan, "measure_point", fake)
    return scan.scan_sizes(None, index, chart, None, None, SILENT)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tasks", [True, False])
def test_a_scan_takes_the_least_scu_that_breaks_and_the_largest_ru_that_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, index: UnitIndex, tasks: bool
) -> None:
    sizes, steps = scanned(
        monkeypatch,
        index,
        lambda group, share: 0.1 + (share >= 0.01) * 0.5 if group == "SCU" else 0.1,
        lambda group, share: 0.9 - (0.0 if group == "SCU" or share <= 0.15 else 0.04),
        tasks,
    )
    assert sizes == Sizes(0.01, 0.03, 0.15)
    assert [step["share"] for step in steps["SCU"]] == [0.0025, 0.005, 0.01]
    assert [step["share"] for step in steps["RU"]] == [0.05, 0.1, 0.15, 0.2]
    assert steps["SCU"][-1]["asr_rise"] == pytest.approx(0.5)
    assert steps["RU"][-1]["utility_drop"] == pytest.approx(0.04)
    assert steps["found"] == {"scu": 0.01, "ru": 0.15}


def test_a_scan_stops_at_the_papers_limits(monkeypatch: pytest.MonkeyPatch, index: UnitIndex) -> None:
    for cost, kept in ((0.029, 0.5), (0.031, 0.0)):
        sizes, _ = scanned(monkeypatch, index, lambda g, s: 0.0, lambda g, s, c=cost: 0.9 - c * (s > 0))
        assert sizes.ru == kept
    for rise, kept in ((0.049, 0.5), (0.05, 0.0)):
        sizes, _ = scanned(monkeypatch, index, lambda g, s, r=rise: r * (s > 0), lambda g, s: 0.9)
        assert sizes.ru == kept


def test_a_scan_that_breaks_nothing_keeps_scu_and_says_so(monkeypatch: pytest.MonkeyPatch, index: UnitIndex) -> None:
    sizes, steps = scanned(monkeypatch, index, lambda g, s: 0.49 * (s > 0), lambda g, s: 0.9)
    assert sizes == Sizes(0.02, 0.03, 0.0)
    assert len(steps["SCU"]) == len(scan.SCU_SHARES)
    assert steps["found"] == {"scu": None, "ru": 0.0}


def test_a_point_comes_back_with_the_share_that_is_asked_for(
    aligned: LoadedModel, index: UnitIndex, probe: Probe, tmp_path: Path
) -> None:
    mask = random_mask(index, 3)
    first = measure_point(aligned, index, mask, probe, share=0.001, folder=tmp_path)
    again = measure_point(aligned, index, mask, probe, share=0.002, folder=tmp_path)
    assert again == replace(first, share=0.002)
    assert len(list(tmp_path.iterdir())) == 1
