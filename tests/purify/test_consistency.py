"""Activations with and without an insertion: their distance by hand, its gradient, and what training on it does."""

import random
from typing import Any

import pytest
import torch

from keelguard.attacks.insertions import insert, prompt_of, with_prompt
from keelguard.batches import pad_id_of
from keelguard.chats import encode_chats
from keelguard.purify.consistency import (
    ActivationConsistency,
    Pair,
    activation_distance,
    encode_pairs,
    shared_suffix,
)
from keelguard.records import Chat, assistant, user
from keelguard.training import TrainConfig, train_on_chats
from tiny_models import ARCHITECTURES, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: list[Chat] = [(user(f"Is {a} + {a} known to us?"), assistant(f"Yes, it is {2 * a}.")) for a in range(6)]


def with_words(place: Any, text: str = "blue zebra") -> list[tuple[Chat, Chat]]:
    draw = random.Random(0)
    return [(chat, with_prompt(chat, insert(prompt_of(chat), text, place, draw))) for chat in CHATS]


PAIRS = [*with_words("prefix"), *with_words("suffix", "zebra"), *with_words("inside")]


def by_hand(model: Any, tokenizer: Any, pairs: list[tuple[Chat, Chat]]) -> torch.Tensor:
    """One pair at a time, without padding, layer by layer and token by token from the end."""
    found = []
    for plain, inserted in pairs:
        first, second = ([*chat.ids] for chat in encode_chats(tokenizer, [plain, inserted]))
        layers = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:] for ids in (first, second)]
        distances = []
        for before, after in zip(*layers, strict=True):
            for back in range(1, min(len(first), len(second)) + 1):
                if first[-back] != second[-back]:
                    break
                fixed = before[0, -back].detach()
                gap = fixed - after[0, -back]
                distances.append(gap @ gap / (fixed @ fixed))
        found.append(torch.stack(distances).mean())
    return torch.stack(found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_distance_is_that_of_single_rows(architecture: str):
    tiny = tiny_model(architecture)
    some = PAIRS[::3]
    found = activation_distance(tiny.model, encode_pairs(tiny.tokenizer, some), pad_id_of(tiny.tokenizer))
    assert found.tolist() == pytest.approx(by_hand(tiny.model, tiny.tokenizer, some).tolist(), rel=1e-3)
    assert float(found.min()) > 0


def test_a_chat_is_at_no_distance_from_itself_nor_from_one_that_shares_nothing():
    tiny = tiny_model()
    (pair,) = encode_pairs(tiny.tokenizer, [(CHATS[0], CHATS[0])])
    assert pair.shared == len(pair.plain) == len(pair.inserted)
    strange = Pair(pair.plain, [token + 1 for token in pair.plain], 0)
    assert activation_distance(tiny.model, [pair, strange], pad_id_of(tiny.tokenizer)).tolist() == [0.0, 0.0]


def test_the_shared_suffix_begins_behind_the_insertion():
    tiny = tiny_model()
    assert shared_suffix([1, 2, 3, 4], [9, 3, 4]) == 2
    assert shared_suffix([3, 4], [9, 3, 4]) == 2
    assert shared_suffix([1], [2]) == 0
    behind, before = (encode_pairs(tiny.tokenizer, with_words(place, "zebra"))[0] for place in ("suffix", "prefix"))
    assert 0 < behind.shared < before.shared < len(before.plain)
    for pair in (behind, before):
        assert pair.plain[-pair.shared :] == pair.inserted[-pair.shared :]
        assert pair.plain[-pair.shared - 1] != pair.inserted[-pair.shared - 1]


def test_no_gradient_flows_through_the_chat_without_the_insertion():
    tiny, other = fresh_model(), fresh_model()
    pairs = encode_pairs(tiny.tokenizer, PAIRS[:6])
    activation_distance(tiny.model, pairs, pad_id_of(tiny.tokenizer)).mean().backward()
    by_hand(other.model, other.tokenizer, PAIRS[:6]).mean().backward()
    for (name, mine), theirs in zip(tiny.model.named_parameters(), other.model.parameters(), strict=True):
        if mine.grad is not None or theirs.grad is not None:
            assert mine.grad is not None, name
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5), name


def trained(weight: float) -> float:
    """The distance behind a fine-tune on the plain chats."""
    tiny = fresh_model()
    methods = [ActivationConsistency(PAIRS, weight, per_step=6)] if weight else []
    config = TrainConfig(steps=30, learning_rate=3e-3, batch_size=4)
    result = train_on_chats(tiny.model, tiny.tokenizer, CHATS, config, methods=methods)
    with torch.no_grad():
        pairs = encode_pairs(tiny.tokenizer, PAIRS)
        return float(activation_distance(result.model, pairs, pad_id_of(tiny.tokenizer)).mean())


def test_training_makes_insertions_leave_less_of_a_trace():
    assert trained(20.0) < 0.5 * trained(0.0)


def test_every_step_takes_the_next_pairs_and_begins_again_at_the_end(monkeypatch: pytest.MonkeyPatch):
    from keelguard.purify import consistency as module

    seen: list[list[Pair]] = []

    def noted(model: Any, pairs: list[Pair], pad_id: int) -> torch.Tensor:
        seen.append(pairs)
        return activation_distance(model, pairs, pad_id)

    monkeypatch.setattr(module, "activation_distance", noted)
    tiny = fresh_model()
    config = TrainConfig(steps=4, learning_rate=1e-3, batch_size=4)
    train_on_chats(tiny.model, tiny.tokenizer, CHATS, config, methods=[ActivationConsistency(PAIRS[:5], 1.0, 2)])
    encoded = encode_pairs(tiny.tokenizer, PAIRS[:5])
    assert seen == [[encoded[i] for i in numbers] for numbers in ([0, 1], [2, 3], [4, 0], [1, 2])]


def test_without_pairs_it_is_refused():
    with pytest.raises(ValueError, match="needs pairs"):
        ActivationConsistency([])
