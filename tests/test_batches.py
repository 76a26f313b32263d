"""Tokens with their characters, padding, grouping by length."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keelguard.batches import (
    IGNORED,
    Side,
    Span,
    Tokens,
    batches_by_length,
    cut_by_length,
    pad,
    pad_id_of,
    token_prefix,
    tokenize,
)
from keelguard.errors import UsageError
from tokenizers_for_tests import KINDS, chat_tokenizer

EXAMPLES = settings(max_examples=60, deadline=None)
rows_of_ids = st.lists(st.lists(st.integers(1, 99), max_size=7), min_size=1, max_size=5)
texts = st.one_of(st.text(max_size=20), st.text(alphabet=" \nabé👍(", max_size=12))


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=texts)
def test_tokens_carry_ascending_characters(kind: str, text: str):
    tokens = tokenize(chat_tokenizer(kind), [text])[0]
    assert tokens.ids == chat_tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    assert tokens.starts == sorted(tokens.starts)
    assert tokens.stops == sorted(tokens.stops)
    assert all(0 <= a <= b <= len(text) for a, b in zip(tokens.starts, tokens.stops, strict=True))


@EXAMPLES
@given(text=texts)
def test_byte_level_tokens_carry_every_character_though_trimmed(text: str):
    tokens = tokenize(chat_tokenizer("byte-level trimmed"), [text])[0]
    assert tokens == tokenize(chat_tokenizer("byte-level"), [text])[0]
    covered = {i for a, b in zip(tokens.starts, tokens.stops, strict=True) for i in range(a, b)}
    assert covered == set(range(len(text)))


def test_texts_beyond_one_call_keep_their_order():
    texts = [f"text {i}" for i in range(2500)]
    tokenizer = chat_tokenizer()
    assert [row.ids for row in tokenize(tokenizer, texts)] == tokenizer(texts)["input_ids"]


def test_ranges_that_share_a_token_leave_it_to_the_first():
    tokens = Tokens([5, 6, 7], [0, 2, 6], [2, 6, 8])
    assert tokens.spans([Span(4, 7), Span(1, 3)]) == (Span(2, 3), Span(0, 2))
    assert tokens.spans([Span(0, 0), Span(2, 2), Span(8, 8)]) == (Span(0, 0), Span(1, 1), Span(3, 3))
    assert tokens.spans([Span(4, 4)]) == (Span(1, 1),)


def test_spaces_at_the_end_of_a_token_are_its_own_though_trimmed():
    whole, trimmed = chat_tokenizer("byte-level"), chat_tokenizer("byte-level trimmed")
    words = [word.replace("Ġ", " ") for word in whole.get_vocab() if word.isascii() or word.strip("Ġ").isascii()]
    spaced = [word for word in words if word.rstrip() and word != word.rstrip()]
    assert len(spaced) > 5
    texts = [word + tail for word in spaced for tail in ("", "👍", "</s>", " x")]
    assert tokenize(trimmed, texts) == tokenize(whole, texts)


def test_a_space_that_the_tokenizer_adds_takes_nothing_from_a_swallowing_token():
    backend = Tokenizer.from_str(chat_tokenizer("swallowing").backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokens = tokenize(PreTrainedTokenizerFast(tokenizer_object=backend), ["<s> a"])[0]
    assert (tokens.starts[0], tokens.stops[0]) == (0, 3)
    assert tokens.starts[1:] == [4] * (len(tokens.ids) - 1)


# Prefixes


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=texts, k=st.integers(0, 25))
def test_a_prefix_is_cut_from_the_text_itself(kind: str, text: str, k: int):
    prefix = token_prefix(chat_tokenizer(kind), text, k)
    assert text.startswith(prefix)
    assert len(prefix) >= len(token_prefix(chat_tokenizer(kind), text, max(k - 1, 0)))
    if k == 0 and tokenize(chat_tokenizer(kind), [text])[0].ids:
        assert prefix == ""


@EXAMPLES
@given(text=st.text(alphabet=" \nabc(", max_size=20), k=st.integers(0, 25))
def test_a_prefix_of_single_byte_characters_spells_its_tokens(text: str, k: int):
    tokenizer = chat_tokenizer("byte-level trimmed")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_prefix(tokenizer, text, k) == tokenizer.decode(ids[:k])


def test_a_prefix_keeps_a_character_of_many_tokens_whole():
    tokenizer = chat_tokenizer("byte-level")
    assert len(tokenizer("👍", add_special_tokens=False)["input_ids"]) == 4
    assert [token_prefix(tokenizer, "👍a", k) for k in range(6)] == ["", "👍", "👍", "👍", "👍", "👍a"]


def test_prefixes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="-1"):
        token_prefix(chat_tokenizer(), "a", -1)
    with pytest.raises(UsageError, match="Unicode"):
        token_prefix(chat_tokenizer(), "\ud83d", 1)
    with pytest.raises(UsageError, match="SimpleNamespace"):
        token_prefix(_stub(is_fast=False), "a", 1)


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
@EXAMPLES
@given(rows=rows_of_ids, multiple=st.sampled_from([None, 1, 4]))
def test_padding_goes_round(side: Side, rows: list[list[int]], multiple: int | None):
    batch = pad(rows, 0, side, labels=rows, pad_to_multiple_of=multiple)
    width = batch["input_ids"].shape[1]
    assert {tuple(t.shape) for t in batch.values()} == {(len(rows), width)}
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert max(map(len, rows)) <= width < max(map(len, rows)) + (multiple or 1)
    assert width % (multiple or 1) == 0
    for i, row in enumerate(rows):
        place = slice(*Span(0, len(row)).padded(len(row), width, side))
        kept = batch["attention_mask"][i].bool()
        assert kept[place].all()
        assert kept.sum() == len(row)
        assert batch["input_ids"][i, place].tolist() == row
        assert (batch["input_ids"][i][~kept] == 0).all()
        assert batch["position_ids"][i, place].tolist() == list(range(len(row)))
        assert batch["labels"][i, place].tolist() == row
        assert (batch["labels"][i][~kept] == IGNORED).all()


def test_padding_sides():
    left, right = pad([[1, 2, 3], [4]], 9, "left"), pad([[1, 2, 3], [4]], 9, "right")
    assert left["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert right["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert "labels" not in left
    assert Span(0, 1).padded(1, 3, "left") == (2, 3)
    assert Span(0, 1).padded(1, 3, "right") == (0, 1)


def test_padding_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="no rows"):
        pad([], 0, "left")
    with pytest.raises(ValueError, match="labels"):
        pad([[1, 2]], 0, "left", labels=[[1]])
    with pytest.raises(ValueError, match="'middle'"):
        pad([[1]], 0, "middle")  # pyright: ignore[reportArgumentType]


def _stub(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def test_the_pad_id_falls_back_to_the_end_of_sequence():
    assert pad_id_of(_stub(pad_token_id=0, eos_token_id=2)) == 0
    assert pad_id_of(_stub(pad_token_id=None, eos_token_id=2)) == 2
    assert pad_id_of(chat_tokenizer()) == chat_tokenizer().eos_token_id
    with pytest.raises(UsageError, match="pad_token"):
        pad_id_of(_stub(pad_token_id=None, eos_token_id=None))


# Grouping


@EXAMPLES
@given(
    lengths=st.lists(st.integers(0, 50), max_size=40),
    max_rows=st.integers(1, 8),
    max_tokens=st.none() | st.integers(1, 120),
)
def test_batches_hold_every_row_once_and_keep_their_limits(lengths: list[int], max_rows: int, max_tokens: int | None):
    batches = batches_by_length(lengths, max_rows, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    for number, batch in enumerate(batches):
        longest = max(lengths[i] for i in batch)
        assert 1 <= len(batch) <= max_rows
        assert max_tokens is None or len(batch) == 1 or len(batch) * longest <= max_tokens
        full = len(batch) == max_rows or (max_tokens is not None and (len(batch) + 1) * longest > max_tokens)
        assert full or number + 1 == len(batches)


def test_batches_are_the_same_every_time():
    assert batches_by_length([3, 9, 3, 1], 2) == [[1, 0], [2, 3]]
    assert batches_by_length([3, 9, 3, 1], 4, max_tokens=6) == [[1], [0, 2], [3]]
    for limits in ((0, None), (1, 0)):
        with pytest.raises(ValueError):
            batches_by_length([1], *limits)


@EXAMPLES
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=24))
def test_a_cut_saves_a_fifth_or_is_none(lengths: list[int]):
    parts = cut_by_length(lengths)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) in (1, 2)
    assert all(parts)
    padded = sum(len(part) * max(lengths[i] for i in part) for part in parts)
    assert len(parts) == 1 or padded <= 0.8 * len(lengths) * max(lengths)


def test_short_rows_are_cut_from_long_ones():
    assert cut_by_length([80, 17, 25, 81, 18]) == [[1, 4, 2], [0, 3]]
    assert cut_by_length([20, 21, 22]) == [[0, 1, 2]]
