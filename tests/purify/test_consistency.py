"""Activations with and without an insertion: their distance by hand, its gradient, and what training on it does."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keelguard.attacks.insertions import insert, prompt_of, with_prompt
from keelguard.batches import pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.purify import consistency as module
from keelguard.purify.consistency import (
    ActivationConsistency,
    Pair,
    Plain,
    activation_distance,
    pair_of,
    remember_activations,
)
from keelguard.records import Chat, assistant, user
from keelguard.training import TrainConfig, train_on_chats
from tiny_models import ARCHITECTURES, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: list[Chat] = [(user(f"Is {a} + {a} known to us?"), assistant(f"Yes, it is {2 * a}.")) for a in range(6)]


def with_words(place: Any, text: str = "blue zebra") -> list[Chat]:
    draw = random.Random(0)
    return [with_prompt(chat, insert(prompt_of(chat), text, place, draw)) for chat in CHATS]


INSERTED = [
    *enumerate(with_words("prefix")),
    *enumerate(with_words("suffix", "zebra")),
    *enumerate(with_words("inside")),
]
"""Chats with insertions, by the number of what they were."""


def pairs_of(model: Any, tokenizer: Any, inserted: list[tuple[int, Chat]]) -> list[Pair]:
    kept = remember_activations(model, tokenizer, CHATS)
    return [pair_of(kept[number], encode_chats(tokenizer, [chat])[0].ids) for number, chat in inserted]


def by_hand(before: Any, model: Any, tokenizer: Any, inserted: list[tuple[int, Chat]]) -> torch.Tensor:
    """One pair at a time, without padding, layer by layer and token by token from the end."""
    found = []
    for number, chat in inserted:
        first, second = ([*each.ids] for each in encode_chats(tokenizer, [CHATS[number], chat]))
        with torch.no_grad():
            plain = before(torch.tensor([first]), output_hidden_states=True).hidden_states[1:]
        strange = model(torch.tensor([second]), output_hidden_states=True).hidden_states[1:]
        distances = []
        for without, with_it in zip(plain, strange, strict=True):
            for back in range(1, min(len(first), len(second)) + 1):
                if first[-back] != second[-back]:
                    break
                gap = without[0, -back] - with_it[0, -back]
                distances.append(gap @ gap / (without[0, -back] @ without[0, -back]))
        found.append(torch.stack(distances).mean())
    return torch.stack(found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_distance_is_that_of_single_rows(architecture: str):
    tiny = tiny_model(architecture)
    some = INSERTED[::3]
    found = activation_distance(tiny.model, pairs_of(tiny.model, tiny.tokenizer, some), pad_id_of(tiny.tokenizer))
    assert found.tolist() == pytest.approx(by_hand(tiny.model, tiny.model, tiny.tokenizer, some).tolist(), rel=1e-3)
    assert float(found.min()) > 0


def test_what_is_kept_is_the_model_s_as_it_came():
    tiny, moved = fresh_model(), fresh_model()
    with torch.no_grad():
        for parameter in moved.model.parameters():
            parameter *= 1.3
    pairs = pairs_of(tiny.model, tiny.tokenizer, INSERTED[:6])
    found = activation_distance(moved.model, pairs, pad_id_of(tiny.tokenizer))
    expected = by_hand(tiny.model, moved.model, moved.tokenizer, INSERTED[:6])
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    found.mean().backward()
    gradients = {name: p.grad for name, p in moved.model.named_parameters() if p.grad is not None}
    moved.model.zero_grad()
    expected.mean().backward()
    for name, parameter in moved.model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5), name


def test_a_chat_is_at_no_distance_from_itself_nor_from_one_that_shares_nothing():
    tiny = tiny_model()
    (plain,) = remember_activations(tiny.model, tiny.tokenizer, CHATS[:1])
    pair = pair_of(plain, list(plain.ids))
    assert pair.shared == len(plain.ids)
    strange = pair_of(plain, [token + 1 for token in plain.ids])
    assert strange.shared == 0
    for pairs in ([pair, strange], [strange]):
        found = activation_distance(tiny.model, pairs, pad_id_of(tiny.tokenizer)).tolist()
        assert found == pytest.approx([0.0] * len(pairs), abs=1e-9)


def test_the_shared_suffix_begins_behind_the_insertion():
    tiny = tiny_model()
    nothing = torch.zeros(0)
    assert [pair_of(Plain(ids, nothing), [9, 3, 4]).shared for ids in ([1, 2, 3, 4], [3, 4], [1])] == [2, 2, 0]
    behind, before = (
        pairs_of(tiny.model, tiny.tokenizer, [(0, with_words(place, "zebra")[0])])[0] for place in ("suffix", "prefix")
    )
    assert 0 < behind.shared < before.shared < len(before.plain.ids)
    for pair in (behind, before):
        assert pair.plain.ids[-pair.shared :] == pair.inserted[-pair.shared :]
        assert pair.plain.ids[-pair.shared - 1] != pair.inserted[-pair.shared - 1]


def test_of_many_layers_eight_are_compared_evenly_spaced_and_the_last_among_them():
    tiny = tiny_model()
    config = LlamaConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
    )
    deep = LlamaForCausalLM(config).eval()
    (plain,) = remember_activations(deep, tiny.tokenizer, CHATS[:1])
    with torch.no_grad():
        every = deep(torch.tensor([plain.ids]), output_hidden_states=True).hidden_states[1:]
    assert len(plain.activations) == 8
    for kept, number in zip(plain.activations, (0, 2, 3, 5, 6, 8, 9, 11), strict=True):
        assert torch.allclose(kept, every[number][0], atol=1e-5), number


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_gradients_are_the_same_where_activations_are_computed_twice(architecture: str):
    found = []
    for checkpointing in (False, True):
        tiny = fresh_model(architecture)
        pairs = pairs_of(tiny.model, tiny.tokenizer, INSERTED[:6])
        if checkpointing:
            tiny.model.gradient_checkpointing_enable()
        tiny.model.train()
        activation_distance(tiny.model, pairs, pad_id_of(tiny.tokenizer)).sum().backward()
        found.append({name: p.grad for name, p in tiny.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert max(float(gradient.abs().max()) for gradient in found[0].values()) > 1e-3
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-5), name


def test_a_chat_beyond_the_context_is_refused():
    tiny = fresh_model()
    long: Chat = (user("Is it? " * 500), assistant("Yes."))
    with pytest.raises(UsageError, match=r"activation consistency: a chat has .* tokens"):
        remember_activations(tiny.model, tiny.tokenizer, [long])
    method = ActivationConsistency(remember_activations(tiny.model, tiny.tokenizer, CHATS), [(0, long)])
    with pytest.raises(UsageError, match=r"activation consistency: a chat has .* tokens"):
        train_on_chats(tiny.model, tiny.tokenizer, CHATS, TrainConfig(steps=1), methods=[method])


def test_processes_share_the_pairs_of_a_step():
    tiny = fresh_model()
    method = ActivationConsistency(remember_activations(tiny.model, tiny.tokenizer, CHATS), INSERTED[:7], 1.0, 2)
    seen: list[Any] = []
    method.pairs = list(range(7))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "activation_distance", lambda model, pairs, pad_id: seen.append(pairs) or torch.zeros(1))
        for step, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
            method.loss(SimpleNamespace(step=step, rank=rank, processes=2, model=None, tokenizer=tiny.tokenizer))  # pyright: ignore[reportArgumentType]
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 0]]


def trained(weight: float) -> float:
    """The distance behind a fine-tune on the plain chats."""
    tiny = fresh_model()
    kept = remember_activations(tiny.model, tiny.tokenizer, CHATS)
    methods = [ActivationConsistency(kept, INSERTED, weight, per_step=6)] if weight else []
    config = TrainConfig(steps=30, learning_rate=3e-3, batch_size=4)
    result = train_on_chats(tiny.model, tiny.tokenizer, CHATS, config, methods=methods)
    with torch.no_grad():
        now = pairs_of(result.model, tiny.tokenizer, INSERTED)
        return float(activation_distance(result.model, now, pad_id_of(tiny.tokenizer)).mean())


def test_training_makes_insertions_leave_less_of_a_trace():
    assert trained(20.0) < 0.7 * trained(0.0)


def test_every_step_takes_the_next_pairs_and_begins_again_at_the_end(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[Pair]] = []

    def noted(model: Any, pairs: list[Pair], pad_id: int) -> torch.Tensor:
        seen.append(pairs)
        return activation_distance(model, pairs, pad_id)

    monkeypatch.setattr(module, "activation_distance", noted)
    tiny = fresh_model()
    config = TrainConfig(steps=4, learning_rate=1e-3, batch_size=4)
    method = ActivationConsistency(remember_activations(tiny.model, tiny.tokenizer, CHATS), INSERTED[:5], 1.0, 2)
    train_on_chats(tiny.model, tiny.tokenizer, CHATS, config, methods=[method])
    expected = [encode_chats(tiny.tokenizer, [chat])[0].ids for _, chat in INSERTED[:5]]
    numbers = ([0, 1], [2, 3], [4, 0], [1, 2])
    assert [[pair.inserted for pair in step] for step in seen] == [[expected[i] for i in step] for step in numbers]
    assert [[pair.plain.ids for pair in step] for step in seen] == [
        [encode_chats(tiny.tokenizer, [CHATS[INSERTED[i][0]]])[0].ids for i in step] for step in numbers
    ]


def test_without_insertions_it_is_refused():
    with pytest.raises(ValueError, match="needs chats"):
        ActivationConsistency([], [])
    tiny = tiny_model()
    assert remember_activations(tiny.model, tiny.tokenizer, []) == []
