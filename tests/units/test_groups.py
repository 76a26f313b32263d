"""Groups hold exactly their shares, and a unit map says the same after it was saved."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keelguard.errors import FailureError, UsageError
from keelguard.units.groups import GROUPS, Sizes, UnitMap, classify, order
from keelguard.units.index import build_index
from tiny_models import build_model

RANKINGS: Any = ("global", "layer")


def scores(units: int, seed: int, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    contrast, strength = torch.randn(2, units, generator=draw, dtype=torch.float64)
    return (contrast.round(), strength.round()) if ties else (contrast, strength)


def make_map(seed: int = 0, sizes: Sizes = Sizes(0.1, 0.15, 0.25), units: int = 100) -> UnitMap:  # noqa: B008
    contrast, strength = scores(units, seed)
    blocks = [units // 5, units - units // 5]
    labels = classify(contrast, strength, blocks, sizes)
    layout = [
        {"name": f"layers.0.{kind}", "layer": 0, "kind": kind, "units": size}
        for kind, size in zip(("head", "mlp"), blocks, strict=True)
    ]
    raw = {
        "decision": {"safety": contrast + 1, "utility": strength},
        "wanda": {"safety": strength, "utility": strength},
    }
    meta = {"score": "decision", "ranking": "global", "sizes": vars(sizes), "data": {"safety": ["a.jsonl"]}}
    return UnitMap(labels, contrast, strength, raw, layout, "head", "0123456789abcdef" * 4, meta)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_groups_have_exact_sizes_and_do_not_overlap(ranking: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    for seed in range(60):
        shares = torch.rand(4, generator=draw)
        scu, ucu, ru = (shares[:3] / shares.sum()).tolist()
        blocks = torch.randint(1, 40, (5,), generator=draw).tolist()
        contrast, strength = scores(sum(blocks), seed, ties=seed % 2 == 0)
        labels = classify(contrast, strength, blocks, Sizes(scu, ucu, ru), ranking)
        assert labels.dtype == torch.int8
        parts = labels.split(blocks) if ranking == "layer" else [labels]
        for part in parts:
            left = len(part)
            for label, share in ((1, scu), (2, ucu), (3, ru)):
                wanted = min(round(share * len(part)), left)
                assert int((part == label).sum()) == wanted
                left -= wanted
            assert int((part == 0).sum()) == left


def test_groups_take_the_extremes_in_order_of_precedence() -> None:
    for seed in range(20):
        contrast, strength = scores(50, seed)
        labels = classify(contrast, strength, [50], Sizes(0.1, 0.2, 0.3))
        scu, ucu, ru, cu = (labels == n for n in (1, 2, 3, 0))
        assert contrast[scu].min() > contrast[~scu].max()
        assert contrast[ucu].max() < contrast[ru | cu].min()
        assert strength[ru].max() < strength[cu].min()


def test_a_unit_at_both_ends_belongs_to_the_first_group() -> None:
    contrast = torch.tensor([5.0, 0.0, -5.0, 1.0])
    strength = torch.tensor([-9.0, 3.0, -8.0, -7.0])
    assert classify(contrast, strength, [4], Sizes(0.25, 0.25, 0.25)).tolist() == [1, 0, 2, 3]


def test_ties_go_to_the_first_units() -> None:
    equal = torch.zeros(10)
    assert classify(equal, equal, [10], Sizes(0.2, 0.2, 0.2)).tolist() == [1, 1, 2, 2, 3, 3, 0, 0, 0, 0]
    assert order(equal, equal, "RU").tolist() == list(range(10))


def test_ranking_by_layer_takes_the_same_share_of_every_block() -> None:
    contrast = torch.cat([torch.arange(10.0), 100 + torch.arange(20.0)])
    overall = classify(contrast, -contrast, [10, 20], Sizes(0.1, 0.0, 0.0))
    within = classify(contrast, -contrast, [10, 20], Sizes(0.1, 0.0, 0.0), "layer")
    assert overall.nonzero().flatten().tolist() == [27, 28, 29]
    assert within.nonzero().flatten().tolist() == [9, 28, 29]


@pytest.mark.parametrize("values", [(-0.1, 0.1, 0.1), (0.1, 1.0, 0.0), (0.1, float("nan"), 0.1), (0.5, 0.3, 0.3)])
def test_impossible_sizes_are_usage_errors(values: Any) -> None:
    with pytest.raises(UsageError, match=r"--(scu|ucu|ru)"):
        Sizes(*values)


def test_a_map_knows_its_groups() -> None:
    chart = make_map()
    assert chart.counts() == {"CU": 50, "SCU": 10, "UCU": 15, "RU": 25}
    assert sum(chart.members(group).int() for group in GROUPS).tolist() == [1] * 100  # pyright: ignore
    assert torch.equal(chart.members("scu"), chart.members("SCU"))
    for bad in ("xcu", "", "all"):
        with pytest.raises(UsageError, match="unknown; choose from cu, scu, ucu, ru"):
            chart.members(bad)


def test_top_takes_a_share_of_all_units_whatever_their_label() -> None:
    chart = make_map()
    for group, values in (("SCU", chart.contrast), ("UCU", -chart.contrast), ("RU", -chart.strength)):
        for share in (0.0, 0.01, 0.3, 1.0):
            mask = chart.top(group, share)
            assert int(mask.sum()) == round(share * 100)
            if 0 < share < 1:
                assert values[mask].min() > values[~mask].max()
    # What matters most to both stands in SCU and UCU: of CU only those with its label are taken.
    cu = chart.members("cu")
    mask = chart.top("CU", 0.3)
    assert int(mask.sum()) == 30
    assert not (mask & ~cu).any()
    assert chart.strength[mask].min() > chart.strength[cu & ~mask].max()
    assert torch.equal(chart.top("CU", 1.0), cu)


def test_top_of_a_map_that_ranks_within_blocks_takes_a_share_of_every_block() -> None:
    chart = make_map()
    chart = chart.relabelled(Sizes(scu=0.1, ucu=0.1, ru=0.2), "layer")
    for group, share in (("SCU", 0.1), ("RU", 0.2)):
        mask = chart.top(group, share)
        counts = [int(part.sum()) for part in mask.split(chart.blocks)]
        assert counts == [round(share * size) for size in chart.blocks]
    assert torch.equal(chart.top("SCU", 0.1), chart.members("scu"))


def test_select_reads_groups_and_shares() -> None:
    chart = make_map()
    scu, cu = chart.members("scu"), chart.members("cu")
    assert torch.equal(chart.select("scu"), scu)
    assert torch.equal(chart.select(" SCU + cu ,"), scu | cu)
    assert torch.equal(chart.select("scu,cu:1"), scu | cu)
    assert chart.select("all").all()
    some = chart.select("scu,cu:0.06")
    assert int(some.sum()) == 16
    picked = some & ~scu
    assert not (picked & ~cu).any()
    assert chart.strength[picked].min() > chart.strength[cu & ~picked].max()
    # The first of the group itself, not of all units: these may carry another label.
    assert int(chart.select("ru:0.2").sum()) == 20
    assert not (chart.select("ru:0.2") & ~chart.members("ru")).any()


@pytest.mark.parametrize(
    "text", ["", " , ", "xcu", "scu,xcu", "cu:x", "cu:-0.1", "cu:1.5", "cu:nan", "cu:inf", "all:0.5"]
)
def test_what_select_cannot_read_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_map().select(text)
    assert "\n" not in str(caught.value)


def test_select_refuses_to_select_nothing() -> None:
    chart = make_map(sizes=Sizes(0.0, 0.1, 0.1))
    for text in ("scu", "scu:0.5", "cu:0.001", "ru:0"):
        with pytest.raises(UsageError, match="selects no unit"):
            chart.select(text)


def same(one: UnitMap, other: UnitMap) -> bool:
    tensors = [(one.labels, other.labels), (one.contrast, other.contrast), (one.strength, other.strength)]
    for score, uses in one.raw.items():
        tensors += [(value, other.raw[score][use]) for use, value in uses.items()]
    plain = ("layout", "attention", "weights", "meta", "digest")
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in tensors) and all(
        getattr(one, name) == getattr(other, name) for name in plain
    )


def test_a_map_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    chart = make_map()
    chart.save(tmp_path / "new" / "run")
    for source in (".", "map.json", "map.safetensors"):
        again = UnitMap.load(tmp_path / "new" / "run" / source)
        assert same(chart, again)
        assert set(again.raw) == {"decision", "wanda"}
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == ["map.json", "map.safetensors"]
    again.save(tmp_path / "again")
    for name in ("map.json", "map.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / "run" / name).read_bytes()


def test_no_map_is_a_usage_error(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none", tmp_path / "none" / "map.json"):
        with pytest.raises(UsageError, match="no unit map there; make one with `keelguard diagnose"):
            UnitMap.load(source)


@pytest.mark.parametrize("content", ["[1, 2]", "{}", '{"format": "keelguard.units/9"}', '{"format": null}'])
def test_another_format_is_refused(content: str, tmp_path: Path) -> None:
    make_map().save(tmp_path)
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(UsageError, match=r"map\.json: has the format .*not keelguard\.units/1"):
        UnitMap.load(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    make_map().save(tmp_path)
    tensors, text = (tmp_path / "map.safetensors").read_bytes(), (tmp_path / "map.json").read_text()
    for damaged in (b"", tensors[:-8], b"x" * 400):
        (tmp_path / "map.safetensors").write_bytes(damaged)
        with pytest.raises(UsageError, match=r"map\.safetensors: cannot be read"):
            UnitMap.load(tmp_path)
    (tmp_path / "map.safetensors").unlink()
    with pytest.raises(UsageError, match=r"map\.safetensors: cannot be read"):
        UnitMap.load(tmp_path)
    (tmp_path / "map.safetensors").write_bytes(tensors)
    (tmp_path / "map.json").write_text(text[:-30])
    with pytest.raises(UsageError, match=r"map\.json: cannot be read"):
        UnitMap.load(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    # As after a kill between the two: other scores of as many units, or another number of them.
    for number, other in enumerate((make_map(seed=1), make_map(units=90))):
        make_map().save(tmp_path / f"{number}")
        other.save(tmp_path / "other")
        (tmp_path / "other" / "map.safetensors").replace(tmp_path / f"{number}" / "map.safetensors")
        with pytest.raises(UsageError, match="do not belong together"):
            UnitMap.load(tmp_path / f"{number}")
        make_map().save(tmp_path / f"{number}")
        assert same(UnitMap.load(tmp_path / f"{number}"), make_map())


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_map().save(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FailureError, match="no space left on the disk"):
        make_map(seed=1).save(tmp_path)
    assert same(UnitMap.load(tmp_path), make_map())


def test_a_map_fits_its_model_only() -> None:
    model = build_model("llama", 97)
    index = build_index(model)
    contrast, strength = scores(len(index), 0)
    labels = classify(contrast, strength, [len(index)], Sizes())
    chart = UnitMap(labels, contrast, strength, {}, index.layout, "head", "a" * 64, {})
    assert chart.place(index) is chart.place(index, "a" * 64) is chart
    with pytest.raises(UsageError, match=r"made for weights a{16} .*, the model has b{16}"):
        chart.place(index, "b" * 64)
    for other in (build_index(model, "channel"), build_index(build_model("llama", 97, num_hidden_layers=1))):
        with pytest.raises(UsageError, match="made for another architecture"):
            chart.place(other)


def test_the_digest_tells_maps_apart() -> None:
    chart = make_map()
    assert chart.digest == make_map().digest
    assert chart.digest != make_map(seed=1).digest
    assert chart.digest != replace(chart, weights="f" * 64).digest


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_map_with_other_sizes(ranking: Any, tmp_path: Path) -> None:
    chart = make_map().relabelled(Sizes(0.05, 0.0, 0.5), ranking)
    assert chart.counts() == {"CU": 45, "SCU": 5, "UCU": 0, "RU": 50}
    assert chart.meta["sizes"] == {"scu": 0.05, "ucu": 0.0, "ru": 0.5}
    assert chart.meta["ranking"] == ranking
    assert chart.digest == make_map().digest
    chart.save(tmp_path)
    assert json.loads((tmp_path / "map.json").read_text())["groups"] == chart.counts()
