"""Alignment inside a budget: the chosen units move, and everything else stays bit-equal in the saved checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keelguard.errors import UsageError
from keelguard.hashes import hash_model
from keelguard.models import load_model
from keelguard.progress import SILENT
from keelguard.records import Chat, assistant, user
from keelguard.training import Run, TrainConfig, train_on_chats
from keelguard.units import align as module
from keelguard.units.align import TrainOnly, align
from keelguard.units.groups import Sizes, UnitMap, classify
from keelguard.units.index import UnitIndex, build_index, parameters_by_name
from keelguard.units.masks import layer_mask, magnitude_mask, random_mask
from keelguard.units.training import TrainingResult
from tiny_models import ARCHITECTURES, fresh_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: tuple[Chat, ...] = tuple(
    (user(f"How do I break {thing}?"), assistant(f"No, I will not help with {thing}, sorry."))
    for thing in ("a lock", "the law", "a bone", "my word")
)
TRAIN = TrainConfig(steps=4, learning_rate=3e-3, batch_size=2, weight_decay=0.1, save_every=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_model().save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def chart(source: Path) -> UnitMap:
    return drawn_map(source)


def drawn_map(source: Path) -> UnitMap:
    """A map with groups drawn at random, since a budget asks not how they were found."""
    loaded = load_model(source)
    index = build_index(loaded.model)
    generator = torch.Generator().manual_seed(0)
    contrast, strength = torch.randn(2, len(index), generator=generator, dtype=torch.float64)
    labels = classify(contrast, strength, [block.size for block in index.blocks], Sizes(0.0, 0.0, 0.3))
    return UnitMap(labels, contrast, strength, {}, index.layout, index.attention, loaded.weights_hash, {})


def expect_moved(
    source: Path, result: TrainingResult, mask: Callable[[Any, UnitIndex], torch.Tensor], others: str = "freeze"
) -> None:
    """Rows that belong to chosen units alone have moved, and nothing else but parameters of no unit under "train"."""
    loaded = load_model(source)
    index = build_index(loaded.model)
    chosen = mask(loaded.model, index)
    assert chosen.any()
    before, after = (parameters_by_name(model) for model in (loaded.model, load_model(result.model).model))
    free = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in before.items()}
    for piece in index.slices(chosen, shared="all"):
        where = free[piece.parameter] if piece.at is None else free[piece.parameter][piece.at]
        where.index_fill_(piece.dim, piece.rows, True)
    mapped = {part.parameter for block in index.blocks for part in block.parts}
    for name, tensor in before.items():
        changed = tensor != after[name]
        if name not in mapped:
            assert bool(changed.any()) == (others == "train"), name
            continue
        assert not bool((changed & ~free[name]).any()), f"{name}: moved outside of the budget"
        if free[name].any():
            assert changed[free[name]].float().mean() > 0.9, f"{name}: did not move inside of the budget"


# What trains


CHOICES: dict[str, Callable[[Any, UnitIndex], torch.Tensor]] = {
    "random:0.2": lambda model, index: random_mask(index, round(0.2 * len(index))),
    "magnitude:0.2": lambda model, index: magnitude_mask(model, index, round(0.2 * len(index))),
    "layers:0-0": lambda model, index: layer_mask(index, 0, 0),
    "layers:0-1": lambda model, index: torch.ones(len(index), dtype=torch.bool),
}


@pytest.mark.parametrize("others", ["freeze", "train"])
@pytest.mark.parametrize("train", CHOICES)
def test_only_the_chosen_units_move(train: str, others: Any, source: Path, tmp_path: Path):
    result = align(str(source), CHATS, TRAIN, out=tmp_path / "out", train=train, others=others)
    assert list(result.rows) == ["before", train]
    assert result.rows["before"].task_loss > result.rows[train].task_loss
    expect_moved(source, result, CHOICES[train], others)
    total = sum(p.numel() for p in tiny_model().model.parameters())
    assert 0 < result.rows[train].trained < total or (train, others) == ("layers:0-1", "train")


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
def test_the_redundant_units_of_a_map_are_the_budget(architecture: str, tmp_path: Path):
    source = fresh_model(architecture).save(tmp_path / "tiny")
    own = drawn_map(source)
    result = align(str(source), CHATS, TRAIN, out=tmp_path / "out", chart=own)
    assert list(result.rows) == ["before", "ru"]
    expect_moved(source, result, lambda model, index: own.members("RU"))


def test_all_is_a_full_fine_tune(source: Path, chart: UnitMap, tmp_path: Path):
    result = align(str(source), CHATS, TRAIN, out=tmp_path / "all", train="all")
    assert list(result.rows) == ["before", "all weights"]
    full = train_on_chats(fresh_model().model, tiny_tokenizer(), CHATS, TRAIN)
    assert result.weights == hash_model(full.model)
    # A LoRA goes with no budget, but with all weights it does.
    lora = align(str(source), CHATS, replace(TRAIN, lora_rank=2), out=tmp_path / "lora", train="all")
    assert 0 < lora.rows["all weights"].trained < result.rows["all weights"].trained

    beside = align(str(source), CHATS, TRAIN, out=tmp_path / "beside", chart=chart, compare=True)
    assert list(beside.rows) == ["before", "all weights", "ru"]
    assert beside.rows["all weights"].task_loss == result.rows["all weights"].task_loss
    expect_moved(source, beside, lambda model, index: chart.members("RU"))


# Resume


class Killed(BaseException):
    """Stands for the end of a process."""


def test_an_interrupted_budget_ends_bit_equal(
    source: Path, chart: UnitMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Ending(TrainOnly):
        def after_step(self, run: Run) -> None:
            if run.step == 3:
                raise Killed

    Ending.__name__ = "TrainOnly"  # A state folder belongs to methods of these names.
    whole = align(str(source), CHATS, TRAIN, out=tmp_path / "whole", chart=chart)
    with monkeypatch.context() as patch:
        patch.setattr(module, "TrainOnly", Ending)
        with pytest.raises(Killed):
            align(str(source), CHATS, TRAIN, out=tmp_path / "killed", chart=chart)
    assert (tmp_path / "killed" / "state-0" / "checkpoint-2").is_dir()
    again = align(str(source), CHATS, TRAIN, out=tmp_path / "killed", chart=chart)
    assert again.weights == whole.weights
    assert again.rows["ru"].task_loss == whole.rows["ru"].task_loss
    assert not list((tmp_path / "killed").glob("state-*"))
    assert align(str(source), CHATS, TRAIN, out=tmp_path / "killed", chart=chart, reporter=SILENT) == again


# Mistakes


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, "'ru': names groups of units; give the unit map that holds them with --units"),
        ({"train": "random:0"}, "'random:0': is not of the form"),
        ({"train": "layers:0-7"}, "layers 0 to 7: are no range of this model, which has 0 to 1"),
        (
            {"train": "random:0.2", "config": replace(TRAIN, lora_rank=4)},
            "--lora-rank 4: a budget of units has no LoRA",
        ),
        ({"train": "random:0.2", "others": "keep"}, "--others keep: unknown; choose train or freeze"),
    ],
)
def test_what_is_missing_or_unknown_is_named(changes: dict[str, Any], part: str, source: Path, tmp_path: Path):
    with pytest.raises(UsageError) as error:
        align(str(source), CHATS, **{"config": TRAIN, "out": tmp_path / "out", **changes})
    assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_map_of_other_weights_or_without_the_group_is_refused(chart: UnitMap, source: Path, tmp_path: Path):
    other = fresh_model(seed=5).save(tmp_path / "other")
    with pytest.raises(UsageError, match=r"the unit map was made for weights .* the model has"):
        align(str(other), CHATS, TRAIN, out=tmp_path / "out", chart=chart)
    with pytest.raises(UsageError, match="'scu': selects no unit"):
        align(str(source), CHATS, TRAIN, out=tmp_path / "out", chart=chart, train="scu")
    with pytest.raises(UsageError, match="group 'rru': unknown"):
        align(str(source), CHATS, TRAIN, out=tmp_path / "out", chart=chart, train="rru")
    assert not (tmp_path / "out").exists()
