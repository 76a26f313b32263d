"""Utility: exact answers, accuracy per task, and a perplexity that a few lines of log-softmax confirm."""

import math
from typing import Any

import pytest
import torch

from keelguard.errors import UsageError
from keelguard.evaluation import utility
from keelguard.evaluation.utility import is_correct, perplexity, solved_by_task
from keelguard.records import Request, user
from tiny_models import ARCHITECTURES, Tiny, fresh_model, tiny_model
from tokenizers_for_tests import chat_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "Foxes that jump over 17 lazy dogs; a naïve café, and nothing else to see. "


def request(answer: str, task: str = "", name: str = "r") -> Request:
    return Request(name, (user("?"),), answer=answer, task=task)


# Exact answers


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("6 * 7 = 42\n#### 42", "So the answer is 42.", True),
        ("#### 42", "First 42, then we add 1: 43", False),
        ("#### 42", "42.0 apples", True),
        ("#### 1,234", "In total $1234", True),
        ("#### 1234", "It costs 1,234.", True),
        ("#### -3", "It is -3 degrees", True),
        ("#### -3", "It is 3 degrees", False),
        ("#### 0.5", "about .5, or 0.50", True),
        ("#### 42", "forty-two", False),
        ("#### 42", "", False),
        ("#### none", "none", False),
        ("#### 7 #### 8", "8", True),
        ("#### 7 #### 8", "7", False),
        ("Paris", "paris", True),
        ("Paris", "  Paris.\n", True),
        ("Paris", "Paris, of course", False),
        ("New  York", "new york.", True),
        ("Paris", "", False),
        ("3.", "3", True),
        ("42", "The answer is 42", False),
    ],
)
def test_an_answer_is_right_by_its_last_number_or_as_a_whole(answer: str, response: str, right: bool):
    assert is_correct(request(answer), response) is right


def test_answers_are_right_or_wrong_per_task():
    requests = [request("a", "letters", "1"), request("b", "letters", "2"), request("#### 3", "sums", "3")]
    requests += [request("d", name="4"), request("c", "letters", "5")]
    assert solved_by_task(requests, ["a", "x", "= 3", "d.", None]) == {
        "letters": {"1": True, "2": False},
        "sums": {"3": True},
        "utility": {"4": True},
    }
    assert solved_by_task([], []) == {}


def test_a_request_without_a_reference_answer_is_named():
    with pytest.raises(UsageError, match="'q7' has no reference answer"):
        solved_by_task([request("a"), request("", name="q7")], ["a", None])
    with pytest.raises(ValueError, match="zip"):
        solved_by_task([request("a")], [])


# Perplexity


def by_hand(tiny: Tiny, windows: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = tiny.model(input_ids=torch.tensor([window])).logits[0].double()
        rows = torch.log_softmax(logits, dim=-1)
        losses += [-rows[i, token].item() for i, token in enumerate(window[1:])]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perplexity_is_that_of_a_hand_computation(architecture: str):
    tiny = tiny_model(architecture)
    ids = tiny.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = by_hand(tiny, [[tiny.tokenizer.bos_token_id, *ids]])
    assert perplexity(tiny.model, tiny.tokenizer, TEXT) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("limited_by", ["context", "window"])
def test_a_long_text_is_cut_into_windows_that_do_not_overlap(limited_by: str, monkeypatch: pytest.MonkeyPatch):
    tiny = fresh_model("llama")
    if limited_by == "context":
        tiny.model.config.max_position_embeddings = 8
    else:
        monkeypatch.setattr(utility, "WINDOW", 8)
    ids = tiny.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > 21
    assert len(ids) % 7, "the last window must be shorter"
    windows = [[tiny.tokenizer.bos_token_id, *ids[i : i + 7]] for i in range(0, len(ids), 7)]
    found = perplexity(tiny.model, tiny.tokenizer, TEXT)
    assert found == pytest.approx(by_hand(tiny, windows), rel=1e-4)
    assert found != pytest.approx(by_hand(tiny, [[tiny.tokenizer.bos_token_id, *ids]]), rel=1e-2)


def test_without_bos_the_first_token_of_a_window_is_not_scored(monkeypatch: pytest.MonkeyPatch):
    tiny = fresh_model("llama")
    tokenizer: Any = chat_tokenizer.__wrapped__("byte-level", "llama3")
    tokenizer.bos_token = None
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(utility, "WINDOW", len(ids) - 1)
    expected = by_hand(tiny, [ids[:-1]])
    assert perplexity(tiny.model, tokenizer, TEXT) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="fewer than two tokens"):
        perplexity(tiny.model, tokenizer, "a")


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    tiny = fresh_model("llama")
    torch.nn.init.zeros_(tiny.model.lm_head.weight)
    assert perplexity(tiny.model, tiny.tokenizer, TEXT) == pytest.approx(len(tiny.tokenizer), rel=1e-5)


def test_a_model_that_is_certain_and_wrong_has_a_finite_perplexity():
    tiny = fresh_model("llama")
    with torch.no_grad():
        tiny.model.lm_head.weight *= 1e4
    assert math.isfinite(perplexity(tiny.model, tiny.tokenizer, TEXT))


def test_an_empty_text_has_no_perplexity():
    tiny = tiny_model("llama")
    with pytest.raises(UsageError, match="give a longer one"):
        perplexity(tiny.model, tiny.tokenizer, "")


def test_special_tokens_in_a_text_are_its_own_and_none_are_added():
    tiny = tiny_model("llama")
    text = f"{TEXT}<|eot_id|>{TEXT}"
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tiny.tokenizer.eos_token_id in ids
    expected = by_hand(tiny, [[tiny.tokenizer.bos_token_id, *ids]])
    assert perplexity(tiny.model, tiny.tokenizer, text) == pytest.approx(expected, rel=1e-4)
