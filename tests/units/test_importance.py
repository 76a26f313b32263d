"""The four scores equal plain numpy formulas on activations that a plain hook collects."""

from typing import Any

import numpy as np
import pytest
import torch
from test_attribution import GROUPS, direct, exact_model, some_rows

from keelguard.units.attribution import Row, Statistics, attribute
from keelguard.units.importance import SCORES, Importance, importance, output_norms, standardise
from keelguard.units.index import UnitIndex, build_index
from tiny_models import ARCHITECTURES, build_model

pytestmark = pytest.mark.usefixtures("one_thread")
USES = {"safety": 1, "utility": 2, "decision": 3}


def measured(architecture: str = "llama", attention: Any = "head") -> Any:
    """A model with its index, rows and statistics by use, and output norms."""
    model = exact_model(architecture)
    index = build_index(model, attention)
    rows = {use: some_rows(6, seed) for use, seed in USES.items()}
    statistics = {use: attribute(model, index, some, groups=GROUPS, effects=True) for use, some in rows.items()}
    return model, index, rows, statistics, output_norms(model, index)


def output_matrix(model: Any, block: Any) -> np.ndarray:
    """B of a block, (outputs, channels)."""
    weight = dict(model.named_parameters())[block.output.parameter].detach()
    return (weight if block.expert is None else weight[block.expert]).numpy()


def activations(model: Any, index: UnitIndex, rows: list[Row], repeats: list[int]) -> list[np.ndarray]:
    """Each block's activations at response tokens (S, channels), the rows of each group as often as asked for."""
    found: list[list[np.ndarray]] = [[] for _ in index.blocks]
    for row in rows:
        _, seen = direct(model, index, row)
        for number, tokens in enumerate(seen):
            picked = [tokens[t].numpy() for t in range(row.start, row.stop) if t in tokens]
            found[number] += picked * repeats[row.group]
    return [np.stack(part) for part in found]


def published(model: Any, index: UnitIndex, rows: list[Row], repeats: list[int]) -> np.ndarray:
    """FLAP's WIFV: Σ_n (x − mean)² / (N − 1) · ‖B[:, j]‖², summed over a unit's channels."""
    parts = []
    for block, x in zip(index.blocks, activations(model, index, rows, repeats), strict=True):
        norm = (output_matrix(model, block) ** 2).sum(0)
        wifv = ((x - x.mean(0)) ** 2).sum(0) / (len(x) - 1) * norm
        parts.append(wifv[block.channels.numpy()].sum(1))
    return np.concatenate(parts)


def wanda(model: Any, index: UnitIndex, rows: list[Row], repeats: list[int]) -> np.ndarray:
    parts = []
    for block, x in zip(index.blocks, activations(model, index, rows, repeats), strict=True):
        score = np.sqrt((x**2).mean(0)) * np.linalg.norm(output_matrix(model, block), axis=0)
        parts.append(score[block.channels.numpy()].sum(1))
    return np.concatenate(parts)


def effects(model: Any, index: UnitIndex, rows: list[Row], repeats: list[int]) -> np.ndarray:
    """Effects (examples, units), repeated as asked for."""
    each = []
    for row in rows:
        each += [torch.cat(direct(model, index, row)[0]).numpy()] * repeats[row.group]
    return np.stack(each)


@pytest.mark.parametrize(("architecture", "attention"), [("llama", "head"), ("phi3", "channel")])
@pytest.mark.parametrize("repeats", [[1, 1, 1], [2, 0, 3]])
def test_scores_are_their_formulas(architecture: str, attention: str, repeats: list[int]) -> None:
    model, index, rows, statistics, norms = measured(architecture, attention)
    weights = None if repeats == [1, 1, 1] else {use: torch.tensor(repeats).double() for use in USES}
    for score, formula in (("variance", published), ("wanda", wanda)):
        found = importance(score, index, statistics, norms, weights)  # pyright: ignore[reportArgumentType]
        for use in ("safety", "utility"):
            np.testing.assert_allclose(getattr(found, use), formula(model, index, rows[use], repeats), rtol=1e-5)
    each = {use: effects(model, index, rows[use], repeats) for use in USES}
    wanted = {
        "taylor": (np.abs(each["safety"]).mean(0), np.abs(each["utility"]).mean(0)),
        "decision": (2 * each["decision"].mean(0), np.abs(each["utility"]).mean(0)),
    }
    for score, (safety, utility) in wanted.items():
        found = importance(score, index, statistics, norms, weights)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(found.safety, safety, rtol=1e-3, atol=1e-4 * np.abs(safety).max())
        np.testing.assert_allclose(found.utility, utility, rtol=1e-3, atol=1e-4 * utility.max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_norms_are_of_the_columns_of_b(architecture: str) -> None:
    model = build_model(architecture, 97)
    index = build_index(model)
    norms = output_norms(model, index)
    assert len(norms) == len(index.blocks)
    for block, norm in zip(index.blocks, norms, strict=True):
        assert norm.dtype == torch.float64
        wanted = (output_matrix(model, block).astype(np.float64) ** 2).sum(0)
        np.testing.assert_allclose(norm, wanted, rtol=1e-12)


def test_without_safety_data_safety_is_zero_everywhere() -> None:
    _, index, _, statistics, norms = measured()
    for score in SCORES:
        found = importance(score, index, {"utility": statistics["utility"]}, norms)  # pyright: ignore[reportArgumentType]
        assert not found.safety.any()
        assert found.utility.any()
        standard = standardise(found, score, [block.size for block in index.blocks])
        torch.testing.assert_close(standard.strength, -standard.contrast)


def draws(seed: int = 0, units: int = 12) -> Importance:
    values = np.random.default_rng(seed).normal(size=(2, units))
    return Importance(torch.from_numpy(values[0]), torch.from_numpy(np.abs(values[1])))


def z(values: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    return (values.numpy() - scale.numpy().mean()) / scale.numpy().std()


def test_effects_are_normalised_over_the_model() -> None:
    found = draws()
    for score in ("decision", "taylor"):
        contrast, strength = standardise(found, score, [4, 8])
        utility = z(found.utility, found.utility)
        np.testing.assert_allclose(contrast, z(found.safety, found.safety) - utility)
        np.testing.assert_allclose(strength, z(found.safety.abs(), found.safety.abs()) + utility)


def test_activations_are_normalised_within_each_block() -> None:
    found = draws()
    for score in ("variance", "wanda"):
        contrast, _ = standardise(found, score, [4, 8])
        for part in (slice(0, 4), slice(4, 12)):
            utility = z(found.utility[part], found.utility[part])
            np.testing.assert_allclose(contrast[part], z(found.safety[part], found.safety[part]) - utility)


def test_a_reference_brings_its_own_scale() -> None:
    found, reference = draws(1), draws(2)
    contrast, strength = standardise(found, "decision", [12], reference)
    utility = z(found.utility, reference.utility)
    np.testing.assert_allclose(contrast, z(found.safety, reference.safety) - utility)
    np.testing.assert_allclose(strength, z(found.safety.abs(), reference.safety.abs()) + utility)
    twice = Importance(2 * reference.safety, 2 * reference.utility)
    assert not torch.allclose(standardise(twice, "decision", [12], reference).contrast, contrast)


def test_where_all_is_equal_nothing_stands_out() -> None:
    found = draws()
    contrast, strength = standardise(found, "variance", [1, 11])
    assert contrast[0] == strength[0] == 0
    assert contrast[1:].all()
    for value in (0.0, 0.1, 1e-9, 1e9 / 3):  # The mean of equal numbers may differ from them by rounding.
        equal = torch.full((7,), value, dtype=torch.float64)
        for score in SCORES:
            assert not torch.cat(standardise(Importance(equal, equal), score, [3, 4])).any(), (score, value)


def test_small_importance_is_still_told_apart() -> None:
    found = draws()
    tiny = Importance(1e-30 * found.safety, 1e-30 * found.utility)
    for one, other in zip(standardise(tiny, "taylor", [12]), standardise(found, "taylor", [12]), strict=True):
        torch.testing.assert_close(one, other)


def test_statistics_without_effects_have_no_first_order_score() -> None:
    _, index, _, statistics, norms = measured()
    looked = {use: Statistics(part.moments, None) for use, part in statistics.items()}
    assert importance("variance", index, looked, norms).safety.any()
    with pytest.raises(AssertionError):
        importance("taylor", index, looked, norms)
