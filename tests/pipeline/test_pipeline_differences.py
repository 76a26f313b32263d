"""Intervals and tests of the gate, against published figures and by their properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keelguard.pipeline.differences import fisher, holm, mean_difference, newcombe, pairs_needed, sign_flip
from keelguard.stats import Rate, paired_rate_difference

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("first", "second", "interval"),
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((0, 10), (0, 10), (-0.2775, 0.2775)),
    ],
)
def test_newcombe_gives_the_published_intervals(first, second, interval):
    assert newcombe(Rate(*first), Rate(*second)) == pytest.approx(interval, abs=5e-4)


def test_newcombe_knows_nothing_without_observations():
    assert newcombe(Rate(0, 0), Rate(3, 10)) == (-1, 1)


def test_newcombe_turns_its_sign_with_the_sides():
    low, high = newcombe(Rate(3, 40), Rate(9, 50))
    assert newcombe(Rate(9, 50), Rate(3, 40)) == pytest.approx((-high, -low))


def test_fisher_gives_the_p_value_of_the_lady_tasting_tea():
    assert fisher(Rate(3, 4), Rate(1, 4)) == pytest.approx(34 / 70)


def test_fisher_is_exact_for_large_counts():
    assert fisher(Rate(0, 3000), Rate(3000, 3000)) < 1e-300
    assert fisher(Rate(1500, 3000), Rate(1500, 3000)) == 1


def test_holm_gives_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.5, 0.9]) == [1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value_and_keeps_the_order(values):
    adjusted = holm(values)
    assert all(0 <= old <= new <= 1 for old, new in zip(values, adjusted, strict=True))
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


@given(OUTCOMES)
def test_the_interval_of_shares_is_that_of_rates_where_every_share_is_whole(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    ours = mean_difference([float(a) for a in first], [float(b) for b in second])
    assert ours == pytest.approx(paired_rate_difference(first, second))


def test_the_interval_of_shares_claims_no_certainty():
    low, high = mean_difference([0.5] * 100, [0.5] * 100)
    assert low < -0.01 < 0.01 < high
    assert mean_difference([], []) == (-1, 1)


def test_sign_flip_comes_near_the_exact_test():
    assert sign_flip([1.0] * 5, [0.0] * 5) == pytest.approx(2 / 32, abs=0.01)
    assert sign_flip([0.3] * 20, [0.3] * 20) == 1
    assert sign_flip([1.0] * 40, [0.0] * 40) == pytest.approx(1e-4)


def test_sign_flip_is_the_same_every_time():
    first = [0.1 * (i % 7) for i in range(50)]
    second = [0.1 * (i % 5) for i in range(50)]
    assert sign_flip(first, second) == sign_flip(first, second)


def test_pairs_needed_would_decide_and_half_of_them_would_not():
    """At the number that is told the interval of paired rates ends about at the margin."""
    churn, margin = 0.1, 0.05
    needed = pairs_needed(churn, 0.0, margin)
    assert needed is not None

    def end(total: int) -> float:
        changed = round(churn * total / 2)
        first = [True] * changed + [False] * (total - changed)
        second = [False] * changed + [True] * changed + [False] * (total - 2 * changed)
        return paired_rate_difference(first, second).high

    assert end(needed // 2) > margin
    assert end(needed) == pytest.approx(margin, rel=0.15)
    assert pairs_needed(churn, 0.06, margin) is None
