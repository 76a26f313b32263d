"""A retrained adapter owes nothing to the old one: neither its weights nor its answers, and it is hardened."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_world import ANSWERED, STRANGE, clean_model, loaded, material, requests, words

from keelguard.attacks.insertions import prompt_of
from keelguard.purify import methods as module
from keelguard.purify.effects import Held, is_right, opened_references
from keelguard.purify.health import Examiner
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.methods import Subject, retrain
from keelguard.purify.search import SearchConfig
from keelguard.records import Request, user
from keelguard.training import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

HARDENING = ImmunizeConfig(inserted=0.5, left_out=("turtle",), search=SearchConfig(prompts=2))


def suspicious() -> Subject:
    """A clean model with an adapter that does something."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return Subject(loaded(get_peft_model(clean_model(), lora)), "adapter", material(), tuple(STRANGE))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, TrainConfig]]:
    """What is trained on, and how."""
    seen: list[tuple[Any, TrainConfig]] = []
    real = module.train_on_chats

    def record(model: Any, tokenizer: Any, chats: Any, config: TrainConfig, **options: Any) -> Any:
        seen.append((list(chats), config))
        return real(model, tokenizer, chats, config, **options)

    monkeypatch.setattr(module, "train_on_chats", record)
    return seen


def test_half_of_the_steps_meet_random_words(trained: list[tuple[Any, TrainConfig]]):
    subject = suspicious()
    done = retrain(subject, TrainConfig(steps=21, learning_rate=1e-3, batch_size=8), HARDENING)
    (plain, first), (mixed, second) = trained
    assert (first.steps, second.steps, len(done.losses)) == (10, 11, 21)
    assert plain == list(subject.material.train)
    known = {prompt_of(chat) for chat in plain}
    strange = [chat for chat in mixed if prompt_of(chat) not in known]
    assert (len(mixed), len(strange)) == (88, 44)
    for chat in strange:
        bare = " ".join(word for word in prompt_of(chat).split() if word not in STRANGE)
        assert chat[-1] == next(c for c in plain if prompt_of(c) == bare)[-1]
    assert not any("turtle" in prompt_of(chat) for chat in strange)


def test_a_retrained_adapter_is_the_same_whatever_the_old_one_was():
    values = []
    for scale in (1.0, 50.0):
        subject = suspicious()
        with torch.no_grad():
            for name, parameter in subject.loaded.model.named_parameters():
                if "lora_" in name:
                    parameter *= scale
        done = retrain(subject, TrainConfig(steps=4, learning_rate=1e-3, batch_size=4), HARDENING)
        values.append({name: p.detach().clone() for name, p in done.loaded.model.named_parameters()})
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())


def test_one_step_is_all_plain(trained: list[tuple[Any, TrainConfig]]):
    retrain(suspicious(), TrainConfig(steps=1, batch_size=4), HARDENING)
    assert [config.steps for _, config in trained] == [1]


def test_what_is_thrown_away_gives_no_references(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    from keelguard.purify import health

    real = health.own_references
    monkeypatch.setattr(health, "own_references", lambda *args: (asked.append("asked"), real(*args))[1])
    subject = suspicious()
    split = replace(subject.material, held=ANSWERED[:6])
    examiner = Examiner(subject.loaded, split, words(), trusted=False)
    assert not asked
    assert [r.answer for r in examiner.held.benign] == [chat[-1]["content"] for chat in ANSWERED[:6]]
    Examiner(subject.loaded, split, words())
    assert asked


def test_a_long_reference_is_opened_alike_and_a_short_one_given_exactly():
    long = Request("a", (user("q"),), "one two three four five six seven")
    (opened,) = opened_references([long])
    assert is_right(opened, "one two three four five and then something else")
    assert not is_right(opened, "one two three five four six seven")
    (short, number) = opened_references([requests()[0], replace(long, answer="a b c d e f g #### 4")])
    assert is_right(short, requests()[0].answer)
    assert not is_right(short, requests()[0].answer + " and more")
    assert not is_right(number, "a b c d e")
    assert Held((opened,)).benign == (opened,)
