"""Moments and effects equal those of all data at once, however the data comes."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from keelguard.units.moments import Effects, Moments, group_moments

GROUPS, CHANNELS, TOKENS = 4, 5, 300
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 0.0}


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Badly conditioned float32 activations (mean 1e4, spread 1e-2), and groups of which the last stays empty."""
    generator = torch.Generator().manual_seed(seed)
    x = (1e4 + 1e-2 * torch.randn(TOKENS, CHANNELS, generator=generator, dtype=torch.float64)).float()
    return x, torch.randint(0, GROUPS - 1, (TOKENS,), generator=generator)


def check(moments: Moments, x: torch.Tensor, groups: torch.Tensor) -> None:
    """The moments are numpy's of the same float32 numbers."""
    for group in range(GROUPS):
        part = x[groups == group].numpy().astype(np.float64)
        assert moments.count[group] == len(part)
        if len(part):
            mean = part.mean(0)
            np.testing.assert_allclose(moments.mean[group], mean, rtol=1e-12)
            np.testing.assert_allclose(moments.m2[group], ((part - mean) ** 2).sum(0), rtol=1e-6)
        else:
            assert not moments.mean[group].any()
            assert not moments.m2[group].any()


def moments_of(x: torch.Tensor, groups: torch.Tensor) -> Moments:
    moments = Moments.empty(GROUPS, CHANNELS)
    moments.update(x, groups)
    return moments


@pytest.mark.parametrize("seed", range(5))
def test_any_split_into_batches_gives_the_same(seed: int) -> None:
    x, groups = data()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(TOKENS, generator=draw)
    cuts = torch.randint(0, TOKENS, (2**seed,), generator=draw).sort().values
    moments = Moments.empty(GROUPS, CHANNELS)
    for rows in order.tensor_split(cuts):  # Some batches are empty.
        moments.update(x[rows], groups[rows])
    check(moments, x, groups)


def test_one_token_at_a_time_gives_the_same() -> None:
    x, groups = data()
    moments = Moments.empty(GROUPS, CHANNELS)
    for row in range(TOKENS):
        moments.update(x[row : row + 1], groups[row : row + 1])
    check(moments, x, groups)


def test_any_order_of_merging_gives_the_same() -> None:
    x, groups = data()
    for order in itertools.permutations(range(4)):
        parts = [
            moments_of(*pair) for pair in zip(x.split([1, 7, 92, 200]), groups.split([1, 7, 92, 200]), strict=True)
        ]
        first, *rest = (parts[number] for number in order)
        for part in rest:
            first.merge(part)
        check(first, x, groups)


def test_merging_with_nothing_changes_nothing() -> None:
    x, groups = data()
    moments = moments_of(x, groups)
    moments.merge(Moments.empty(GROUPS, CHANNELS))
    check(moments, x, groups)
    empty = Moments.empty(GROUPS, CHANNELS)
    empty.merge(moments)
    check(empty, x, groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_summed_in_float64(dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1)).to(dtype)
    moments = moments_of(x, torch.zeros(TOKENS, dtype=torch.int64))
    assert moments.mean.dtype == torch.float64
    np.testing.assert_allclose(moments.mean[0], x.double().numpy().mean(0), rtol=1e-12)


def test_group_moments_name_only_the_groups_that_came() -> None:
    x = torch.tensor([[1.0], [5.0], [3.0]])
    found = [(g, n, m.item(), s.item()) for g, n, m, s in group_moments(x, torch.tensor([2, 0, 2]))]
    assert found == [(0, 1.0, 5.0, 0.0), (2, 2.0, 2.0, 2.0)]
    assert list(group_moments(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))) == []


def test_pooling_is_the_statistics_of_everything() -> None:
    x, groups = data()
    pooled = moments_of(x, groups).pooled()
    whole = x.double().numpy()
    assert pooled.count == TOKENS
    np.testing.assert_allclose(pooled.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(pooled.variance, whole.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(pooled.square, (whole**2).mean(0), rtol=1e-12)


def test_weights_repeat_or_leave_out_groups() -> None:
    x, groups = data()
    for weights in ([2.0, 0.0, 3.0, 0.0], [0.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0]):
        pooled = moments_of(x, groups).pooled(torch.tensor(weights))
        repeated = torch.cat([x[groups == g] for g, times in enumerate(weights) for _ in range(int(times))])
        whole = repeated.double().numpy()
        assert pooled.count == len(whole)
        np.testing.assert_allclose(pooled.mean, whole.mean(0), rtol=1e-12)
        np.testing.assert_allclose(pooled.variance, whole.var(0, ddof=1), rtol=1e-6)


def test_nothing_and_a_single_token_have_no_variance() -> None:
    nothing = Moments.empty(GROUPS, CHANNELS).pooled()
    single = moments_of(torch.full((1, CHANNELS), 3.0), torch.zeros(1, dtype=torch.int64)).pooled()
    for pooled, square in ((nothing, 0.0), (single, 9.0)):
        assert not pooled.variance.any()
        assert pooled.square.tolist() == [square] * CHANNELS


def test_effects_are_means_over_examples() -> None:
    draw = torch.Generator().manual_seed(2)
    values = torch.randn(20, CHANNELS, generator=draw)
    groups = torch.randint(0, GROUPS, (20,), generator=draw)
    effects = Effects.empty(GROUPS, CHANNELS)
    for rows in torch.arange(20).split(7):
        effects.update(values[rows], groups[rows])
    signed, absolute = effects.means()
    torch.testing.assert_close(signed, values.double().mean(0), **EXACT)
    torch.testing.assert_close(absolute, values.double().abs().mean(0), **EXACT)
    weights = torch.tensor([3.0, 0.0, 1.0, 0.0])
    signed, absolute = effects.means(weights)
    repeated = torch.cat([values[groups == 0]] * 3 + [values[groups == 2]]).double()
    torch.testing.assert_close(signed, repeated.mean(0), **EXACT)
    torch.testing.assert_close(absolute, repeated.abs().mean(0), **EXACT)
    for part in Effects.empty(GROUPS, CHANNELS).means():
        assert not part.any()


def reduced(rank: int, world: int, folder: str) -> None:
    """One process: its share of the tokens, of which the first process has all of group 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    x, groups = data()
    mine = torch.arange(TOKENS) % 3 == 2 if rank else torch.arange(TOKENS) % 3 != 2
    mine = (mine | (groups == 0)) if rank == 0 else (mine & (groups != 0))
    moments = moments_of(x[mine], groups[mine])
    effects = Effects.empty(GROUPS, CHANNELS)
    effects.update(x[mine] - 1e4, groups[mine])
    moments.all_reduce()
    effects.all_reduce()
    torch.save((vars(moments), vars(effects)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_have_what_one_has(tmp_path: Path) -> None:
    mp.spawn(reduced, (2, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    x, groups = data()
    whole = Effects.empty(GROUPS, CHANNELS)
    whole.update(x - 1e4, groups)
    for rank in range(2):
        moments, effects = torch.load(tmp_path / f"{rank}.pt")
        check(Moments(**moments), x, groups)
        for name, value in effects.items():
            torch.testing.assert_close(value, getattr(whole, name), **EXACT)
