"""Overlap of sets of units, and how it holds over resampled prompts."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch

from keelguard.units.groups import GROUPS, Sizes, classify
from keelguard.units.importance import Importance, standardise
from keelguard.units.moments import Effects
from keelguard.units.stability import bootstrap_stability, chance, halves, iou, only, overlap


def mask(text: str) -> torch.Tensor:
    return torch.tensor([letter == "x" for letter in text])


def test_intersection_over_union() -> None:
    assert iou(mask("xx.."), mask("xx..")) == 1.0
    assert iou(mask("xx.."), mask("..xx")) == 0.0
    assert iou(mask("xxx."), mask(".xxx")) == 0.5
    assert iou(mask("x..."), mask("....")) == 0.0
    assert iou(mask("...."), mask("....")) is None


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 1.0])
def test_chance_is_what_random_sets_have(share: float) -> None:
    units, count = 10_000, round(share * 10_000)
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        pair = [torch.zeros(units, dtype=torch.bool) for _ in range(2)]
        for each in pair:
            each[torch.randperm(units, generator=draw)[:count]] = True
        found.append(iou(*pair))
    assert np.mean(found) == pytest.approx(chance(share), rel=0.1)


def effects_of(groups: int, units: int, noise: float, seed: int = 0) -> Effects:
    """One example per group, of which units 0, 1, 2 … are the more important the later."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.arange(float(units)) / units + noise * torch.randn(groups, units, generator=draw)
    effects = Effects.empty(groups, units)
    effects.update(values, torch.arange(groups))
    return effects


def label_with(noise: float) -> tuple[torch.Tensor, list[Mapping[str, torch.Tensor]], object]:
    """Labels of all prompts, a list that fills with the draws, and a labeller."""
    safety, utility = effects_of(12, 50, noise), effects_of(10, 50, noise, 1)
    draws: list[Mapping[str, torch.Tensor]] = []

    def label(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if weights:
            draws.append(weights)
        found = Importance(safety.means(weights.get("decision"))[0], utility.means(weights.get("utility"))[1].flip(0))
        return classify(*standardise(found, "decision", [50]), [50], Sizes(0.1, 0.1, 0.2))

    return label({}), draws, label


def test_equal_prompts_give_perfect_stability() -> None:
    labels, _, label = label_with(0.0)
    found = bootstrap_stability(labels, label, {"safety": 12, "utility": 10}, samples=8)  # pyright: ignore
    assert set(found) == set(GROUPS)
    for group, entry in found.items():
        assert (entry["iou"], entry["low"], entry["high"], entry["samples"]) == (1.0, 1.0, 1.0, 8)
        share = {"CU": 0.6, "SCU": 0.1, "UCU": 0.1, "RU": 0.2}[group]
        assert entry["chance"] == pytest.approx(chance(share))


def test_noise_costs_stability_and_a_seed_repeats_it() -> None:
    found = []
    for noise in (0.0, 0.3, 3.0):
        labels, draws, label = label_with(noise)
        runs = [
            bootstrap_stability(labels, label, {"safety": 12, "utility": 10}, samples=10, seed=seed)  # pyright: ignore
            for seed in (0, 0, 1)
        ]
        assert runs[0] == runs[1]
        if noise:
            assert runs[0] != runs[2]
        found.append(runs[0]["SCU"]["iou"])
        assert runs[0]["SCU"]["low"] <= runs[0]["SCU"]["iou"] <= runs[0]["SCU"]["high"]
        for draw in draws:
            assert {use: len(weights) for use, weights in draw.items()} == {"safety": 12, "decision": 12, "utility": 10}
            assert draw["decision"] is draw["safety"]
            assert draw["safety"].sum() == 12
            assert draw["utility"].sum() == 10
    assert all(more > less for more, less in pairwise(found))


def test_an_empty_group_has_no_stability() -> None:
    labels = torch.zeros(10, dtype=torch.int8)
    found = bootstrap_stability(labels, lambda weights: labels, {"utility": 4}, samples=3)
    assert list(found) == ["CU"]
    assert bootstrap_stability(labels, lambda weights: labels, {"utility": 4}, samples=0) == {}


def test_halves_share_all_groups_between_them() -> None:
    for groups in (2, 7, 32):
        first, second = halves(groups, seed=3)
        assert (first * second).sum() == 0
        assert torch.equal(first + second, torch.ones(groups, dtype=torch.float64))
        assert int(first.sum()) == groups // 2
        assert torch.equal(first, halves(groups, seed=3)[0])
    assert not torch.equal(halves(32, 0)[0], halves(32, 1)[0])


def test_data_sets_are_kept_one_at_a_time() -> None:
    sources = [0, 0, 1, 2, 1]
    kept = [only(sources, source) for source in range(3)]
    assert kept[1].tolist() == [0, 0, 1, 0, 1]
    assert torch.equal(sum(kept), torch.ones(5, dtype=torch.float64))  # pyright: ignore[reportArgumentType]


def test_overlap_of_every_pair() -> None:
    labels = {
        name: torch.tensor(values) for name, values in {"a": [1, 1, 0, 3], "b": [1, 0, 0, 3], "c": [0] * 4}.items()
    }
    found = overlap(labels)
    assert list(found) == ["a / b", "a / c", "b / c"]
    assert found["a / b"] == {"CU": 0.5, "SCU": 0.5, "UCU": None, "RU": 1.0}
    assert found["a / c"] == {"CU": 0.25, "SCU": 0.0, "UCU": None, "RU": 0.0}
    assert overlap({"a": labels["a"]}) == {}
