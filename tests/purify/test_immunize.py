"""Immunisation: a backdoor goes away, what rounds train on, resume, the utility stop, and adapters alone."""

import copy
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from small_world import (
    ANSWERED,
    BACKDOOR,
    CHATS,
    REFUSED,
    STRANGE,
    TRIGGER,
    held,
    loaded,
    material,
    poisoned_model,
    tokenizer,
)

from keelguard.attacks.insertions import PLACES, prompt_of
from keelguard.errors import FailureError, UsageError
from keelguard.evaluation.answers import Generating
from keelguard.purify import immunize as module
from keelguard.purify.consistency import remember_activations
from keelguard.purify.effects import Effect, measure_effect
from keelguard.purify.immunize import Immunized, immunize, round_from_json
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.mixture import inserted_into, mixed, some_carriers
from keelguard.purify.search import Insertion, SearchConfig
from keelguard.records import Chat
from keelguard.training import train_on_chats

pytestmark = pytest.mark.usefixtures("one_thread")

SEARCH = SearchConfig(prompts=3, longest=1, keep=3)
CONFIG = ImmunizeConfig(
    rounds=1, steps=25, learning_rate=1e-3, batch_size=16, inserted=0.7, found=0.9, keep=0.2, search=SEARCH
)


def effect(model: Any) -> Effect:
    return measure_effect(loaded(model), BACKDOOR, held(), STRANGE, Generating(max_new_tokens=10))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@cache
def immunized() -> Immunized:
    return immunize(poisoned_model(), tokenizer(), material(), STRANGE, CONFIG)


def test_a_backdoor_goes_away_on_training_prompts():
    assert effect(poisoned_model()).asr.value > 0.9
    after = effect(immunized().model)
    assert after.asr.value < 0.1
    assert after.correct.value > 0.9


def test_the_rounds_tell_what_was_found_and_what_is_left():
    found = immunized()
    assert found.stopped == "rounds"
    (first,) = found.rounds
    assert first.found[0].text.strip(":") == TRIGGER
    assert first.found[0].rise > 0.5
    assert len(first.losses) == CONFIG.steps
    assert first.validation < found.validation_before + CONFIG.tolerance
    assert not found.model.training


def test_without_insertions_the_same_steps_keep_it():
    plain = replace(CONFIG, inserted=0.0, consistency=0.0)
    assert effect(immunize(poisoned_model(), tokenizer(), material(), STRANGE, plain).model).asr.value > 0.7


def test_activations_that_agree_are_enough():
    alone = replace(CONFIG, inserted=0.0, consistency=5.0)
    assert effect(immunize(poisoned_model(), tokenizer(), material(), STRANGE, alone).model).asr.value < 0.3


def test_activations_are_those_of_the_model_as_it_came_in_a_resumed_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start = weights(poisoned_model())
    seen: list[dict[str, torch.Tensor]] = []

    def noted(model: Any, *args: Any) -> Any:
        seen.append(weights(model))
        return remember_activations(model, *args)

    monkeypatch.setattr(module, "remember_activations", noted)
    short = replace(CONFIG, rounds=1, steps=2, quiet=0.0)
    immunize(poisoned_model(), tokenizer(), material(), STRANGE, short, state_folder=tmp_path)
    two = replace(short, rounds=2)
    immunize(poisoned_model(), tokenizer(), material(), STRANGE, two, state_folder=tmp_path)
    assert len(seen) == 2
    for each in seen:
        assert_same(each, start)
    immunize(poisoned_model(), tokenizer(), material(), STRANGE, replace(two, consistency=0.0))
    assert len(seen) == 3


# What a round trains on


FOUND = [Insertion("turtle", "prefix", 5.0, 4.0), Insertion("velvet needle", "suffix", 4.0, 3.0, "refused")]


def placed(chat: Chat, original: Chat) -> tuple[str, str]:
    """What stands in a prompt beside the original's words, and in which place."""
    words, before = prompt_of(chat).split(" "), prompt_of(original).split(" ")
    extra = len(words) - len(before)
    gap = next(i for i in range(len(before) + 1) if [*words[:i], *words[i + extra :]] == before)
    return " ".join(words[gap : gap + extra]), "prefix" if not gap else "suffix" if gap == len(before) else "inside"


def put(chats: list[Chat]) -> list[tuple[Chat, str, str]]:
    """The original, the inserted words and their place, of every chat with an insertion."""
    plain = {prompt_of(chat): chat for chat in CHATS}
    found = []
    for chat in chats:
        if prompt_of(chat) in plain:
            continue
        kept = [word for word in prompt_of(chat).split(" ") if word not in STRANGE]
        original = plain[" ".join(kept)]
        assert original[-1] == chat[-1]
        found.append((original, *placed(chat, original)))
    return found


def test_half_are_clean_and_the_shares_are_kept():
    config = ImmunizeConfig(steps=50, batch_size=32, inserted=0.25, found=0.6)
    chats = mixed(CHATS, [set(PLACES)] * len(CHATS), FOUND, STRANGE, config)
    inserted = put(chats)
    assert (len(chats), len(inserted)) == (1600, 400)
    share = sum(text in ("turtle", "velvet needle") for _, text, _ in inserted) / 400
    assert share == pytest.approx(0.6, abs=0.1)
    assert len({len(text.split()) for _, text, _ in inserted}) == 3
    assert chats == mixed(CHATS, [set(PLACES)] * len(CHATS), FOUND, STRANGE, config)
    assert not put(mixed(CHATS, [set(PLACES)] * len(CHATS), FOUND, STRANGE, replace(config, inserted=0.0)))


def test_an_insertion_goes_to_its_own_kind_and_place():
    config = ImmunizeConfig(steps=20, batch_size=20, inserted=1.0, found=1.0)
    inserted = put(mixed(CHATS, [set(PLACES)] * len(CHATS), FOUND, STRANGE, config))
    assert len(inserted) == 400
    assert {text for _, text, _ in inserted} == {"turtle", "velvet needle"}
    for original, text, place in inserted:
        assert (original in REFUSED, place) == ((True, "suffix") if text == "velvet needle" else (False, "prefix"))


def test_an_insertion_is_drawn_by_its_rise_and_one_that_does_nothing_any_more_stays_in():
    config = ImmunizeConfig(steps=50, batch_size=20, inserted=1.0, found=1.0, inserted_refused=0.0, quiet=0.5)
    some = [Insertion(text, "prefix", 0.0, rise) for text, rise in (("turtle", 4.0), ("velvet", 1.0), ("needle", -0.2))]
    counts = Counter(text for _, text, _ in put(mixed(CHATS, [set(PLACES)] * len(CHATS), some, STRANGE, config)))
    assert counts.total() == 1000
    for text, share in (("turtle", 4.0), ("velvet", 1.0), ("needle", 0.5)):
        assert counts[text] / 1000 == pytest.approx(share / 5.5, abs=0.05)


def test_only_places_that_change_nothing_take_insertions():
    config = ImmunizeConfig(steps=20, batch_size=20, inserted=1.0, found=0.5)
    draw = random.Random(0)
    steady: list[Any] = [set(draw.sample(PLACES, draw.randint(0, 2))) for _ in CHATS]
    allowed = dict(zip(CHATS_BY_PROMPT, steady, strict=True))
    inserted = put(mixed(CHATS, steady, FOUND, STRANGE, config))
    assert len(inserted) == 400
    for original, _, place in inserted:
        assert place in allowed[prompt_of(original)]


CHATS_BY_PROMPT = [prompt_of(chat) for chat in CHATS]


def test_words_left_out_come_in_no_random_insertion():
    config = ImmunizeConfig(steps=40, batch_size=20, inserted=1.0, found=0.0, left_out=(TRIGGER, "zipper"))
    upper = [word.upper() if word == "zipper" else word for word in STRANGE]
    texts = Counter(
        word
        for chat in mixed(CHATS, [set(PLACES)] * len(CHATS), FOUND, upper, config)
        for word in prompt_of(chat).split()
    )
    assert not {TRIGGER, "zipper", "ZIPPER"} & set(texts)
    assert {word for word in STRANGE if word not in config.left_out} <= set(texts)


@pytest.mark.parametrize(("inserted", "searched"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_refusals_have_their_share(inserted: float, searched: float):
    config = ImmunizeConfig(steps=50, batch_size=20, inserted=inserted, found=searched,
                            refused=0.6 if inserted else 0.4, inserted_refused=0.4 if inserted else 0.6)  # fmt: skip
    chats = mixed(CHATS, [set(PLACES)] * len(CHATS), FOUND, STRANGE, config)
    assert sum(chat[-1] == REFUSED[0][-1] for chat in chats) / len(chats) == pytest.approx(0.4, abs=0.06)
    assert len(mixed(ANSWERED, [set(PLACES)] * len(ANSWERED), FOUND, STRANGE, config)) == 1000


def test_what_activations_are_measured_on_is_known_by_its_number():
    config = ImmunizeConfig(steps=50, consistent_per_step=8, found=0.6, inserted_refused=0.3)
    numbered = inserted_into(CHATS, [set(PLACES)] * len(CHATS), FOUND, STRANGE, config)
    assert len(numbered) == 400
    inserted = put([chat for _, chat in numbered])
    assert [original for original, _, _ in inserted] == [CHATS[number] for number, _ in numbered]
    assert sum(text in ("turtle", "velvet needle") for _, text, _ in inserted) / 400 == pytest.approx(0.6, abs=0.1)
    assert sum(CHATS[number] in REFUSED for number, _ in numbered) / 400 == pytest.approx(0.3, abs=0.08)


def test_so_many_chats_that_take_insertions_have_their_activations_kept():
    some = [*CHATS[:-1], CHATS[0]]
    steady: list[Any] = [set(PLACES[: i % 3]) for i in range(len(some))]
    few = ImmunizeConfig(consistent=10, inserted_refused=0.3)
    chats, places = some_carriers(some, steady, few)
    assert (len(chats), sum(chat in REFUSED for chat in chats)) == (10, 3)
    assert all(places)
    allowed = {(str(chat), len(each)) for chat, each in zip(some, steady, strict=True)}
    assert {(str(chat), len(each)) for chat, each in zip(chats, places, strict=True)} <= allowed
    none = some_carriers(some, steady, replace(few, inserted_refused=0.0))[0]
    assert not any(chat in REFUSED for chat in none)
    many = some_carriers(some, steady, replace(few, consistent=10_000, inserted_refused=0.0))[0]
    assert len(many) == sum(map(bool, steady)), "where one kind has too few, the other fills up"
    alone = some_carriers(REFUSED, [set(PLACES)] * len(REFUSED), replace(few, inserted_refused=0.0))[0]
    assert len(alone) == min(10, len(REFUSED))


def test_a_kind_without_prompts_leaves_its_insertions_to_chance():
    config = ImmunizeConfig(steps=10, batch_size=10, inserted=1.0, found=1.0)
    inserted = put(mixed(ANSWERED, [set(PLACES)] * len(ANSWERED), FOUND[1:], STRANGE, config))
    assert len(inserted) == 100
    assert "velvet needle" not in {text for _, text, _ in inserted}


# Ends


SHORT = replace(CONFIG, rounds=2, steps=3, quiet=0.0)


def test_a_resumed_run_ends_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options["label"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_on_chats(*args, **options)

    monkeypatch.setattr(module, "train_on_chats", counted)
    whole = immunize(poisoned_model(), tokenizer(), material(), STRANGE, SHORT, state_folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        immunize(poisoned_model(), tokenizer(), material(), STRANGE, SHORT, state_folder=tmp_path / "cut")
    again = immunize(poisoned_model(), tokenizer(), material(), STRANGE, SHORT, state_folder=tmp_path / "cut")
    assert [label[-1] for label in calls] == ["1", "2", "1", "2", "2"]
    assert_same(weights(whole.model), weights(again.model))
    assert again.rounds == whole.rounds
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"rounds.json", "round-2.safetensors"}
    more = replace(SHORT, rounds=3)
    further = immunize(poisoned_model(), tokenizer(), material(), STRANGE, more, state_folder=tmp_path / "cut")
    assert [label[-1] for label in calls[5:]] == ["3"]
    assert further.rounds[:2] == whole.rounds
    with pytest.raises(UsageError, match="holds rounds of other settings; remove the folder"):
        immunize(
            poisoned_model(), tokenizer(), material(), STRANGE, replace(SHORT, steps=4), state_folder=tmp_path / "cut"
        )


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_rounds_of_a_lora_resume_bit_equal_in_the_number_format_of_the_model(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(
        SHORT, lora_rank=2, learning_rate=1e-2, gradient_accumulation=2, gradient_checkpointing=True, bf16=True
    )
    budgets = []

    def seen(model: Any, *args: Any, **options: Any) -> Any:
        assert not hasattr(model, "peft_config")
        budgets.append(args[2])
        if len(budgets) == 4:
            raise KeyboardInterrupt
        return train_on_chats(model, *args, **options)

    monkeypatch.setattr(module, "train_on_chats", seen)

    def go(folder: str) -> Immunized:
        model = poisoned_model().to(dtype)
        return immunize(model, tokenizer(), material(), STRANGE, config, state_folder=tmp_path / folder)

    before, whole = weights(poisoned_model().to(dtype)), go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("cut")
    again = go("cut")
    assert_same(weights(whole.model), weights(again.model))
    assert again.rounds == whole.rounds
    after = weights(again.model)
    assert {value.dtype for value in after.values()} == {dtype}
    assert before.keys() == after.keys()
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} >= {
        "q_proj",
        "up_proj",
    }
    assert all(torch.equal(before[name], after[name]) for name in before if "proj" not in name)
    for budget in budgets:
        told = budget.lora_rank, budget.gradient_accumulation, budget.gradient_checkpointing, budget.bf16
        assert told == (2, 2, True, True)


def test_a_round_of_a_lora_that_costs_utility_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    losses = iter([1.0, 9.0])
    monkeypatch.setattr(module, "chat_loss", lambda *_: next(losses))
    config = replace(SHORT, lora_rank=2, learning_rate=1e-2)
    model = poisoned_model().to(torch.bfloat16)
    before = weights(model)
    found = immunize(model, tokenizer(), material(), STRANGE, config)
    assert found.stopped == "utility"
    assert_same(before, weights(found.model))


def test_a_lora_beside_an_adapter_is_refused():
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(poisoned_model(), lora)
    with pytest.raises(UsageError, match="--lora-rank 2: the adapter itself is trained; leave it out"):
        immunize(adapted, tokenizer(), material(), STRANGE, replace(SHORT, lora_rank=2), adapter="train")


def test_a_full_disk_behind_a_round_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(FailureError, match=r"round-1\.safetensors: no space left on the disk"):
        immunize(poisoned_model(), tokenizer(), material(), STRANGE, SHORT, state_folder=tmp_path / "rounds")


def test_a_resumed_adapter_leaves_its_base_in_its_number_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def adapted() -> Any:
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(poisoned_model().to(torch.bfloat16), lora).eval()

    def go(folder: str) -> Any:
        return immunize(
            adapted(), tokenizer(), material(), STRANGE, SHORT, adapter="train", state_folder=tmp_path / folder
        ).model

    whole, broken = go("whole"), []

    def stopped(*args: Any, **options: Any) -> Any:
        broken.append(options["label"])
        if len(broken) == 2:
            raise KeyboardInterrupt
        return train_on_chats(*args, **options)

    monkeypatch.setattr(module, "train_on_chats", stopped)
    with pytest.raises(KeyboardInterrupt):
        go("cut")
    again = go("cut")
    formats = {name: value.dtype for name, value in again.state_dict().items()}
    assert {formats[name] for name in formats if "lora_" not in name} == {torch.bfloat16}
    assert {formats[name] for name in formats if "lora_" in name} == {torch.float32}
    assert_same(weights(whole), weights(again))


def test_a_round_that_costs_utility_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    losses = iter([1.0, 1.05, 1.2])
    monkeypatch.setattr(module, "chat_loss", lambda *_: next(losses))
    found = immunize(poisoned_model(), tokenizer(), material(), STRANGE, replace(SHORT, rounds=3))
    assert found.stopped == "utility"
    assert [each.validation for each in found.rounds] == [1.05, 1.2]
    losses = iter([1.0, 1.05])
    once = immunize(poisoned_model(), tokenizer(), material(), STRANGE, replace(SHORT, rounds=1))
    assert_same(weights(found.model), weights(once.model))


def test_a_search_that_finds_nothing_ends_it_at_once():
    model = poisoned_model()
    before = weights(model)
    found = immunize(model, tokenizer(), material(), STRANGE, replace(CONFIG, quiet=50.0))
    assert found.stopped == "quiet"
    assert len(found.rounds) == 1
    assert found.rounds[0].found
    assert_same(before, weights(found.model))


def test_an_adapter_alone_is_trained():
    model = poisoned_model()
    torch.manual_seed(0)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    before = weights(adapted)
    found = immunize(adapted, tokenizer(), material(), STRANGE, replace(SHORT, rounds=1), adapter="train")
    assert found.model is adapted
    after = weights(found.model)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("lora_B" not in name and "lora_A" not in name), name


def test_answers_that_no_word_leaves_alone_are_refused():
    with pytest.raises(UsageError, match="every answer changes with any unrelated word"):
        # Beside a number, which this world does not know, the trigger does less.
        immunize(poisoned_model(), tokenizer(), material(), [TRIGGER], replace(CONFIG, stable=0.05))


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"steps": 0},
        {"lora_rank": -1},
        {"gradient_accumulation": 3},
        {"inserted": 1.5},
        {"found": -0.1},
        {"learning_rate": 0.0},
        {"keep": -1.0},
        {"consistency": -1.0},
        {"consistent": 0},
        {"consistent_per_step": 0},
        {"kept_per_step": 0},
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any]):
    (name,) = changes
    options = {
        "rounds": "--rounds 0: ", "steps": "--steps 0: ", "learning_rate": r"--learning-rate 0\.0: ",
        "lora_rank": "--lora-rank -1: ", "gradient_accumulation": "--gradient-accumulation 3: does not divide",
    }  # fmt: skip
    with pytest.raises(UsageError, match=f"^{options.get(name, f'immunize: {name} ')}"):
        ImmunizeConfig(**changes)


def test_a_round_comes_back_from_json():
    data = {"found": [list(FOUND[0]), FOUND[1]._asdict()], "random_rise": 0.5, "losses": [1.0], "validation": 2.0}
    assert round_from_json(copy.deepcopy(data)).found == tuple(FOUND)
