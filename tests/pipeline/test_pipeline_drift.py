"""The drift of two conditions: equal to its control where nothing differs, above its limit where something does."""

from collections.abc import Sequence

import numpy as np
import pytest

from keelguard.errors import UsageError
from keelguard.pipeline.drift import Drift, Resampling, Side, Values, drifts, normal_ranks
from keelguard.units.proof import spearman

GROUPS, LAYERS = 24, 3
FEW = Resampling(splits=60, samples=40)


def side(vectors: np.ndarray, present: np.ndarray | None = None) -> Side[np.ndarray]:
    """A condition that shows the weighted mean of its groups' vectors (G, layers)."""
    known = np.ones(len(vectors), dtype=bool) if present is None else present

    def at(weights: np.ndarray) -> np.ndarray:
        times = (weights * known)[:, None]
        assert times.sum() > 0, "asked of a half without prompts"
        return (times * vectors).sum(0) / times.sum()

    return Side(known, at)


def distance(first: np.ndarray, second: np.ndarray) -> Values:
    change = np.abs(first - second)
    return {"far": [change.mean(), *change]}


def drawn(seed: int, shift: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return shift + spread * np.random.default_rng(seed).normal(size=(GROUPS, LAYERS))


def one(first: Side, second: Side, resampling: Resampling = FEW) -> tuple[Drift | None, ...]:
    return drifts([first, second], [(0, 1)], distance, resampling)[0]["far"]


def test_a_condition_against_itself_is_its_control():
    """Were the same halves compared, a condition would be at no distance from itself."""
    same = drawn(0)
    for found in one(side(same), side(same.copy())):
        assert found is not None
        assert found.value == pytest.approx(found.control)
        assert found.value > 0.1
        assert not found.warn
        assert found.low <= found.value <= found.high


def test_where_nothing_differs_a_warning_is_rare():
    found = [one(side(drawn(2 * i)), side(drawn(2 * i + 1)), Resampling(40, 20))[0] for i in range(40)]
    assert sum(each is not None and each.warn for each in found) <= 2
    ratio = np.mean([each.value / each.control for each in found if each])
    assert 0.8 < ratio < 1.25


def test_a_shift_is_found_and_measured():
    before, after = drawn(0), drawn(1, shift=2.0)
    found = one(side(before), side(after))
    change = np.abs(after.mean(0) - before.mean(0))
    for each, wanted in zip(found, [change.mean(), *change], strict=True):
        assert each is not None
        assert each.warn
        assert each.value == pytest.approx(wanted, abs=0.1)
        assert each.low < wanted < each.high
        assert each.control < each.limit < 1.2


def test_a_shift_of_requests_in_pairs_does_not_drown():
    """The same noise on both sides, as of the same requests before and after: the halves differ all the same."""
    noise = drawn(0)
    assert not one(side(noise), side(noise + 0.01))[0].warn  # pyright: ignore[reportOptionalMemberAccess]
    assert one(side(noise), side(noise + 2.0))[0].warn  # pyright: ignore[reportOptionalMemberAccess]


def test_the_limit_is_that_of_the_noisier_condition():
    calm, loud = drawn(0, spread=0.1), drawn(1, spread=3.0)
    limits = [one(side(a), side(b))[0] for a, b in ((calm, calm), (loud, loud), (calm, loud), (loud, calm))]
    values = [each.limit for each in limits if each]
    assert values[0] < 0.2 < 0.8 < values[1]
    assert values[2] == pytest.approx(values[1])
    assert values[3] == pytest.approx(values[1])


def test_the_interval_is_that_of_the_prompts():
    """Its width against the true spread of the value over fresh prompts."""
    fresh = [one(side(drawn(2 * i)), side(drawn(2 * i + 1, shift=3.0)), Resampling(20, 20))[0] for i in range(40)]
    spread = np.std([each.value for each in fresh if each])
    widths = [each.high - each.low for each in fresh if each]
    # Between half and twice of what a normal distribution of that spread would give.
    assert 0.5 < np.mean(widths) / (2 * 1.96 * spread) < 2
    true = np.mean([each.value for each in fresh if each])
    assert sum(each is not None and each.low <= true <= each.high for each in fresh) >= 32


def test_the_interval_lies_around_the_value():
    """A resample holds fewer prompts than the data and drifts more: by a third here, if that were left in."""
    found = [one(side(drawn(i)), side(drawn(i)))[0] for i in range(12)]
    middles = [(each.low + each.high) / 2 / each.value for each in found if each]
    assert 0.9 < np.mean(middles) < 1.2


def test_the_second_is_seen_from_the_first():
    def after(first: np.ndarray, second: np.ndarray) -> Values:
        return {"rise": [max(0.0, float((second - first).mean()))]}

    sides = [side(drawn(0)), side(drawn(0, shift=4.0))]
    there, back = drifts(sides, [(0, 1), (1, 0)], after, FEW)
    assert there["rise"][0].value == pytest.approx(4, abs=0.1)  # pyright: ignore[reportOptionalMemberAccess]
    assert back["rise"][0].value == 0  # pyright: ignore[reportOptionalMemberAccess]


def test_all_pairs_are_cut_alike():
    sides = [side(drawn(0)), side(drawn(1)), side(drawn(2, shift=1.0))]
    counted: list[int] = []
    found = drifts(sides, [(0, 1), (0, 2), (1, 2)], distance, FEW, counted.append)
    assert sum(counted) == FEW.splits + FEW.samples
    assert found[1]["far"] == drifts([sides[0], sides[2]], [(0, 1)], distance, FEW)[0]["far"]
    assert found == drifts(sides, [(0, 1), (0, 2), (1, 2)], distance, FEW)
    assert found != drifts(sides, [(0, 1), (0, 2), (1, 2)], distance, Resampling(FEW.splits, FEW.samples, seed=1))


def test_groups_that_one_condition_lacks_are_asked_of_the_other_alone():
    half = np.arange(GROUPS) % 2 == 0
    found = one(side(drawn(0), half), side(drawn(1, shift=3.0), ~half))
    assert found[0] is not None
    assert found[0].warn


def test_what_has_no_figure_is_none_and_the_rest_stays():
    def compare(first: np.ndarray, second: np.ndarray) -> Values:
        return {"gaps": [1.0, float("nan"), 0.5]}

    (found,) = drifts([side(drawn(0)), side(drawn(1))], [(0, 1)], compare, FEW)
    assert found["gaps"][1] is None
    assert found["gaps"][0] == found["gaps"][0]
    assert found["gaps"][2] == Drift(0.5, 0.5, 0.5, 0.5, 0.5)
    assert not Drift(0.5, 0.5, 0.5, 0.5, 0.5).warn


def test_a_figure_that_most_cuts_lack_is_none():
    turn = [0]

    def compare(first: np.ndarray, second: np.ndarray) -> Values:
        # Two in a row, of which one figure is made.
        turn[0] += 1
        return {
            "rare": [1.0 if (turn[0] - 1) // 2 % 5 == 0 else float("nan")],
            "often": [float("nan") if turn[0] < 9 else 1.0],
        }

    (found,) = drifts([side(drawn(0)), side(drawn(1))], [(0, 1)], compare, FEW)
    assert found["rare"] == (None,)
    assert found["often"][0] is not None


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_groups_are_refused(count: int):
    with pytest.raises(UsageError, match=f"{count} groups of prompts are too few"):
        one(side(drawn(0)), side(drawn(1), np.arange(GROUPS) < count))


@pytest.mark.parametrize(("changes", "option"), [({"splits": 9}, "--splits 9"), ({"samples": 1}, "--bootstrap 1"),
                                                 ({"level": 1.0}, "level 1.0")])  # fmt: skip
def test_wrong_settings_are_named(changes: dict, option: str):
    with pytest.raises(UsageError, match=option):
        Resampling(**changes)


@pytest.mark.parametrize("values", [[3, 1, 2, 2, 5, 5, 5], [1, 2], [0.5, -1, 7, 7], list(range(50))])
def test_ranks_multiply_to_spearmans_correlation(values: Sequence[float]):
    other = np.random.default_rng(0).integers(0, 4, len(values)).astype(float)
    other[:2] = 0, 1
    product = float(normal_ranks(np.array(values, dtype=float)) @ normal_ranks(other))
    assert product == pytest.approx(spearman(list(map(float, values)), other.tolist()))


def test_constant_values_have_no_ranks():
    assert np.isnan(normal_ranks(np.ones(4))).all()


def test_a_drift_outlives_its_file():
    found = Drift(0.5, 0.4, 0.6, 0.1, 0.2)
    assert found.to_json() == {"value": 0.5, "low": 0.4, "high": 0.6, "control": 0.1, "limit": 0.2, "warn": True}
    assert Drift.from_json(found.to_json()) == found
