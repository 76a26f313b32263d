"""Fine-tuning under every protection: what is frozen stays bit-equal, and what is missing is named with its remedy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from keelguard.data import load_chats, load_requests
from keelguard.errors import UsageError
from keelguard.evaluation.judges import is_refusal
from keelguard.hashes import hash_model
from keelguard.models import LoadedModel, load_model
from keelguard.records import Request, user
from keelguard.testbed.build import Testbed
from keelguard.training import TrainConfig, train_on_chats
from keelguard.units.baselines import LisaConfig, SafeLoraConfig, safe_lora
from keelguard.units.diagnose import plain
from keelguard.units.finetune import FinetuneConfig, chosen_units, finetune, own_refusals
from keelguard.units.groups import Sizes, UnitMap, classify
from keelguard.units.index import build_index, parameters_by_name
from keelguard.units.masks import layer_mask, magnitude_mask, random_mask
from keelguard.units.training import TrainingResult
from keelguard.units.verify import verify
from tiny_models import fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = TrainConfig(steps=3, learning_rate=1e-3, batch_size=4, weight_decay=0.1)
FROZEN = "scu,cu:0.06"


def drawn_map(loaded: LoadedModel) -> UnitMap:
    """A map of a model with groups drawn at random, since freezing asks not how they were found."""
    index = build_index(plain(loaded).model)
    generator = torch.Generator().manual_seed(0)
    contrast, strength = torch.randn(2, len(index), generator=generator, dtype=torch.float64)
    labels = classify(contrast, strength, [block.size for block in index.blocks], Sizes(0.05, 0.05, 0.2))
    return UnitMap(labels, contrast, strength, {}, index.layout, index.attention, loaded.weights_hash, {})


@pytest.fixture(scope="module")
def aligned(testbed: Testbed) -> Path:
    return testbed.model("aligned-sparse")


@pytest.fixture(scope="module")
def chart(aligned: Path) -> UnitMap:
    return drawn_map(load_model(aligned))


@pytest.fixture(scope="module")
def harmful(testbed: Testbed) -> list[Request]:
    return load_requests(testbed.data / "harmful.train.jsonl")[:16]


@pytest.fixture
def tune(testbed: Testbed, aligned: Path, harmful: list[Request], tmp_path: Path) -> Callable[..., TrainingResult]:
    """A short fine-tune of the testbed's aligned model; `changes` go to its configuration."""
    chats = load_chats(testbed.data / "finetune-benign.train.jsonl")[:12]

    def tune(*protect: str, source: Path = aligned, safety: Any = harmful, options: Any = (), **changes: Any):
        config = FinetuneConfig(**{"train": TRAIN, "protect": protect, **changes})
        return finetune(str(source), chats, config, out=tmp_path / "out", safety=safety, **dict(options))

    return tune


def weights(source: Any) -> dict[str, torch.Tensor]:
    return dict(load_model(source, dtype="float32").model.named_parameters())


def moved(source: Path, result: TrainingResult) -> set[str]:
    """The parameters of which anything changed."""
    before, after = weights(source), weights(result.model)
    return {name for name in before if not torch.equal(before[name], after[name])}


# Every protection


ALONE = ("none", "anchor", "project", "mix", "ema", "lisa")


def test_every_protection_trains_in_a_way_of_its_own(
    tune: Callable[..., TrainingResult], aligned: Path, testbed: Testbed, tmp_path: Path
):
    found = {}
    lisa = LisaConfig(safety_steps=1, task_steps=2)
    for name in ALONE:
        result = tune(name, lisa=lisa)
        arm = "unprotected" if name == "none" else "protected"
        assert list(result.rows) == ["before", arm]
        assert result.rows["before"].task_loss > result.rows[arm].task_loss
        assert result.rows[arm].trained == sum(p.numel() for p in weights(aligned).values())
        assert moved(aligned, result) == set(weights(aligned))
        found[name] = result.weights
        (tmp_path / "out").rename(tmp_path / name)
    assert len(set(found.values())) == len(ALONE)


def test_protections_go_together_with_the_unprotected_run_beside(
    tune: Callable[..., TrainingResult], chart: UnitMap, aligned: Path
):
    result = tune("freeze", "anchor", "mix", options={"chart": chart, "compare": True})
    assert list(result.rows) == ["before", "unprotected", "protected"]
    certificate = verify(aligned, result.model, chart, require=FROZEN)
    assert certificate.holds
    assert certificate.selected == int(chart.select(FROZEN).sum()) > 100
    # All others move, but for rows that they share with frozen units.
    assert certificate.moved >= 0.95 * (len(chart) - certificate.selected)


def test_comparing_changes_nothing_of_the_result(
    tune: Callable[..., TrainingResult], tmp_path: Path, chart: UnitMap, aligned: Path
):
    first = tune("anchor", options={"compare": True})
    (tmp_path / "out").rename(tmp_path / "first")
    second = tune("anchor")
    (tmp_path / "out").rename(tmp_path / "second")
    assert first.weights == second.weights
    assert first.rows["protected"].task_loss == second.rows["protected"].task_loss
    bare = tune("none")
    assert first.rows["unprotected"].task_loss == bare.rows["unprotected"].task_loss


def test_safelora_projects_behind_the_training(tune: Callable[..., TrainingResult], testbed: Testbed, aligned: Path):
    chats = load_chats(testbed.data / "finetune-benign.train.jsonl")[:12]
    base = testbed.model("base")
    config = SafeLoraConfig(share=0.5)
    result = tune("safelora", safelora=config, options={"base": str(base)})
    loaded = load_model(aligned, training=True)
    model = train_on_chats(loaded.model, loaded.tokenizer, chats, TRAIN).model
    done = safe_lora(model, weights(aligned), weights(base), config)
    assert 0 < len(done.projected) < len(done.similarity)
    assert hash_model(model) == result.weights


# Freezing


@pytest.mark.parametrize("others", ["train", "freeze"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_frozen_units_are_bit_equal_in_the_checkpoint_and_the_others_moved(
    lora_rank: int, others: str, tune: Callable[..., TrainingResult], chart: UnitMap, aligned: Path
):
    train = replace(TRAIN, lora_rank=lora_rank, learning_rate=3e-3)
    result = tune("freeze", train=train, others=others, options={"chart": chart})
    certificate = verify(aligned, result.model, chart, require=FROZEN)
    assert certificate.holds
    assert certificate.moved >= 0.95 * (len(chart) - certificate.selected)
    # The same by hand, from the slices themselves.
    index = build_index(load_model(aligned).model)
    mask = chart.select(FROZEN)
    before, after = (parameters_by_name(load_model(path).model) for path in (aligned, result.model))
    for piece in index.slices(mask, shared="any"):
        assert torch.equal(piece.of(before[piece.parameter]), piece.of(after[piece.parameter]))
    outside = {name for name in moved(aligned, result) if not name.endswith("_proj.weight")}
    trains = others == "train" and not lora_rank
    assert outside == ({n for n in weights(aligned) if not n.endswith("_proj.weight")} if trains else set())


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("random:0.2", lambda model, index: random_mask(index, round(0.2 * len(index)))),
        ("random:0.2:3", lambda model, index: random_mask(index, round(0.2 * len(index)), 3)),
        ("magnitude:0.1", lambda model, index: magnitude_mask(model, index, round(0.1 * len(index)))),
        ("layers:1-2", lambda model, index: layer_mask(index, 1, 2)),
        ("layers:3", lambda model, index: layer_mask(index, 3, 3)),
    ],
)
def test_units_are_chosen_without_a_map_too(text: str, mask: Callable[..., torch.Tensor], aligned: Path):
    model = load_model(aligned).model
    index = build_index(model)
    assert torch.equal(chosen_units(text, model, index, None), mask(model, index))


def test_freezing_without_a_map(tune: Callable[..., TrainingResult], chart: UnitMap, aligned: Path):
    result = tune("freeze", freeze="layers:1-2", others="freeze", safety=())
    numbers = {int(name.split(".")[2]) for name in moved(aligned, result)}
    assert numbers == {0, 3}


# An adapter as the model


def test_an_adapter_is_merged_and_its_own_map_fits(
    tune: Callable[..., TrainingResult], aligned: Path, chart: UnitMap, tmp_path: Path
):
    loaded = load_model(aligned)
    torch.manual_seed(0)
    adapted = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    own = drawn_map(load_model(tmp_path / "adapter"))
    assert own.weights != chart.weights
    result = tune("freeze", source=tmp_path / "adapter", options={"chart": own})
    certificate = verify(tmp_path / "adapter", result.model, own, require=FROZEN)
    assert certificate.holds
    assert certificate.moved > 0
    with pytest.raises(UsageError, match="the unit map was made for weights"):
        tune("freeze", source=tmp_path / "adapter", options={"chart": chart})


# Mistakes


@pytest.mark.parametrize("name", ["anchor", "project", "mix", "lisa"])
def test_a_protection_without_safety_data_names_the_option(
    name: str, tune: Callable[..., TrainingResult], tmp_path: Path
):
    with pytest.raises(UsageError, match=f"--protect {name}: needs harmful requests .* name a --safety file"):
        tune(name, safety=())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("protect", "changes", "part"),
    [
        (("freeze",), {}, "give the unit map that holds them with --units"),
        (("freeze",), {"freeze": "random:much"}, "is not of the form random:0.11"),
        (("freeze",), {"freeze": "layers:"}, "is not of the form"),
        (("freeze",), {"freeze": "layers:2-9"}, "layers 2 to 9: are no range of this model, which has 0 to 3"),
        (("freeze",), {"freeze": "random:1.5"}, "'random:1.5': is not of the form"),
        (("freeze",), {"freeze": "random:0.00001"}, "(a share of all units)"),
        (("freeze",), {"freeze": "magnitude:-0.1"}, "'magnitude:-0.1': is not of the form"),
        (("safelora",), {}, "name it with --base"),
        (("anchr",), {}, "--protect anchr: choose from none, freeze"),
        ((), {}, "--protect : choose from"),
        (("none", "anchor"), {}, "none stands alone"),
        (("none",), {"others": "keep"}, "--others keep: unknown; choose train or freeze"),
    ],
)
def test_what_is_missing_or_unknown_is_named(
    protect: tuple[str, ...], changes: dict[str, Any], part: str, tune: Callable[..., TrainingResult], tmp_path: Path
):
    with pytest.raises(UsageError) as error:
        tune(*protect, **changes)
    assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_map_of_other_weights_is_refused(
    tune: Callable[..., TrainingResult], chart: UnitMap, testbed: Testbed, tmp_path: Path
):
    with pytest.raises(UsageError, match=r"the unit map was made for weights .* the model has"):
        tune("freeze", source=testbed.model("aligned"), options={"chart": chart})
    other = drawn_map(LoadedModel(fresh_model().model, None, "tiny", chart.weights))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="it was made for another architecture"):
        tune("freeze", options={"chart": other})
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_refuse_is_told_with_the_counts(
    tune: Callable[..., TrainingResult], testbed: Testbed, tmp_path: Path
):
    with pytest.raises(UsageError, match=r"base refuses \d of 16 requests; at least 8 refusals") as error:
        tune("anchor", source=testbed.model("base"))
    assert "--safety" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_own_refusals_are_refusals_in_the_models_words(aligned: Path, harmful: list[Request]):
    loaded = load_model(aligned, training=True)
    answered = Request("benign", (user("what does a baker make?"),))
    chats = own_refusals(loaded, [*harmful, answered], 24)
    assert loaded.model.training
    assert 8 <= len(chats) <= 16
    assert all(is_refusal(chat[-1]["content"]) for chat in chats)
    assert {chat[:-1] for chat in map(repr_of, chats)} <= {repr_of(r.messages) for r in harmful}


def repr_of(chat: Any) -> tuple[str, ...]:
    return tuple(message["content"] for message in chat)
