"""From texts to batches: tokens with the characters that they carry, rows grouped by length, padding.

    for batch in batches_by_length([len(row) for row in rows], max_rows=16, max_tokens=8192):
        inputs = pad([rows[i] for i in batch], pad_id_of(tokenizer), side="left")

torch is imported by `pad` alone, so that importing this module stays cheap.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from keelguard.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that carries no loss."""

Side = Literal["left", "right"]

_TEXTS_PER_CALL = 1024  # Offsets are lists of tuples, about 100 bytes a token, until they become `Tokens`.


class Span(NamedTuple):
    """A half-open range [start, stop). An empty one stands where its text would."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of tokens or characters in it."""
        return self.stop - self.start

    def padded(self, length: int, width: int, side: Side) -> "Span":
        """Where the span of a row of `length` tokens lies once `pad` has made the row `width` tokens wide."""
        by = width - length if side == "left" else 0
        return Span(self.start + by, self.stop + by)


class Tokens(NamedTuple):
    """T tokens with the characters [start, stop) that each carries; starts and stops never fall."""

    ids: list[int]
    starts: list[int]
    stops: list[int]

    def spans(self, characters: Sequence[Span]) -> tuple[Span, ...]:
        """From the first to the last token that carries a character of each range of characters.

        A token that carries characters of two ranges goes to the one that stands first, so that the spans
        are disjoint where the ranges are.
        """
        spans = [Span(0, 0)] * len(characters)
        taken = 0
        for i in sorted(range(len(characters)), key=characters.__getitem__):
            start, stop = characters[i]
            first = max(bisect_right(self.stops, start), taken)
            last = bisect_left(self.starts, stop) if start < stop else first
            taken = max(first, last)
            spans[i] = Span(first, taken)
        return tuple(spans)


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Tokens]:
    """Tokenise every text without added special tokens and say which characters each token truly carries.

    The tokenizer's offsets tell it but for two habits, which are undone here. Byte-level tokenizers with
    `trim_offsets` leave out the spaces that their tokens do carry. Added tokens that swallow the white space
    around them (`lstrip`, `rstrip`) report it, although their ids do not hold it.

    Raises:
        UsageError: the tokenizer reports no offsets.
    """
    check_fast(tokenizer)
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    rows = []
    for first in range(0, len(texts), _TEXTS_PER_CALL):
        part = list(texts[first : first + _TEXTS_PER_CALL])
        batch = tokenizer(
            part,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for text, ids, offsets in zip(part, batch["input_ids"], batch["offset_mapping"], strict=True):
            rows.append(_carried(tokenizer, added, text, ids, offsets))
    return rows


def _carried(
    tokenizer: "PreTrainedTokenizerBase",
    added: dict[int, str],
    text: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
) -> Tokens:
    starts: list[int] = []
    stops: list[int] = []
    floor = ceiling = covered = 0  # covered: the end of the characters that some token has reported.
    last = -1
    for token, (start, stop) in zip(ids, offsets, strict=True):
        end, own = stop, added.get(token)
        if start > covered:
            start -= min(_spaces(tokenizer, token)[0], start - covered)
        if stops and start > covered:
            ceiling += min(_spaces(tokenizer, last)[1], start - covered)
            stops[-1] = ceiling
        if own is not None and stop - start != len(own) and (at := text.find(own, start, stop)) >= 0:
            start, stop = at, at + len(own)
        floor, ceiling, covered, last = max(start, floor), max(stop, ceiling), max(end, covered), token
        starts.append(floor)
        stops.append(ceiling)
    if stops and covered < len(text):
        stops[-1] += min(_spaces(tokenizer, last)[1], len(text) - covered)
    return Tokens(ids, starts, stops)


def _spaces(tokenizer: "PreTrainedTokenizerBase", token: int) -> tuple[int, int]:
    """The spaces that a byte-level token begins and ends with."""
    word = tokenizer.convert_ids_to_tokens(token)
    assert isinstance(word, str)
    return len(word) - len(word.lstrip("Ġ")), len(word) - len(word.rstrip("Ġ"))


def token_prefix(tokenizer: "PreTrainedTokenizerBase", text: str, k: int) -> str:
    """The characters of `text` that its first `k` tokens cover; all of it if it has no more than `k`.

    A cut of the text itself, so that a prefill of `k` tokens of a known answer is exact text: decoding ids
    would lose spaces. A character whose bytes are spread over several tokens is kept whole.

    Raises:
        UsageError: the tokenizer has no offsets.
        ValueError: `k` is negative.
    """
    if k < 0:
        raise ValueError(f"k is {k}: a number of tokens cannot be negative")
    check_text(text, "the text")
    tokens = tokenize(tokenizer, [text])[0]
    if k >= len(tokens.ids):
        return text
    return text[: tokens.stops[k - 1]] if k else ""


def check_fast(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer without offsets.

    Raises:
        UsageError: its tokens do not tell their characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{type(tokenizer).__name__} does not report which characters its tokens cover: "
            "give the model a tokenizer.json, which loads as a fast tokenizer"
        )


def check_text(text: str, what: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        UsageError: `text`, called `what` in the message, holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not valid Unicode at character {error.start}: {error.reason}") from None


def pad_id_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad with: the pad token's, else the end-of-sequence token's (padding is masked either way).

    Raises:
        UsageError: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UsageError(
        "the tokenizer has neither a pad token nor an end-of-sequence token: "
        'set "pad_token" in its tokenizer_config.json'
    )


def pad(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    side: Side,
    labels: Sequence[Sequence[int]] | None = None,
    pad_to_multiple_of: int | None = None,
) -> "dict[str, torch.Tensor]":
    """Make one batch of B rows of token ids, as wide as the longest (T).

    Args:
        sequences: B rows of ids, of any lengths.
        pad_id: the id in the places of padding.
        side: where the padding goes: "left" to generate, "right" to train.
        labels: B rows of labels, each as long as its ids; `IGNORED` is put on the padding.
        pad_to_multiple_of: widen T to a multiple of this.

    Returns:
        int64 tensors (B, T): `input_ids`, `attention_mask` (1 = a token), `position_ids` (from 0 at each
        row's first token, 0 on padding) and, where given, `labels`.

    Raises:
        ValueError: no rows, an unknown side, or labels that do not fit their ids.
    """
    import torch

    if not sequences:
        raise ValueError("there are no rows to pad")
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}: use 'left' or 'right'")
    if labels is not None and [len(row) for row in labels] != [len(row) for row in sequences]:
        raise ValueError("labels and sequences differ in their lengths")
    width = max(len(row) for row in sequences)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of

    def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        fills = ([fill] * (width - len(row)) for row in rows)
        if side == "left":
            full = [[*gap, *row] for gap, row in zip(fills, rows, strict=True)]
        else:
            full = [[*row, *gap] for gap, row in zip(fills, rows, strict=True)]
        return torch.tensor(full, dtype=torch.long)

    batch = {
        "input_ids": padded(sequences, pad_id),
        "attention_mask": padded([[1] * len(row) for row in sequences], 0),
        "position_ids": padded([range(len(row)) for row in sequences], 0),
    }
    if labels is not None:
        batch["labels"] = padded(labels, IGNORED)
    return batch


def cut_by_length(lengths: Sequence[int], worth: float = 0.8) -> list[list[int]]:
    """The rows of one batch in one part, or in a short and a long one where both padded apart are that much less.

    Chats are of very different lengths: short ones would be computed at the length of the longest.

    Args:
        worth: the share of the whole padded batch that the two parts may have at most.

    Returns:
        Row numbers; each part, padded to its own longest row, is a batch.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    rows, longest = len(order), lengths[order[-1]] if order else 0
    costs = [cut * lengths[order[cut - 1]] + (rows - cut) * longest for cut in range(1, rows)]
    if not costs or min(costs) > worth * rows * longest:
        return [list(range(rows))]
    cut = costs.index(min(costs)) + 1
    return [order[:cut], order[cut:]]


def batches_by_length(lengths: Sequence[int], max_rows: int, max_tokens: int | None = None) -> list[list[int]]:
    """Group rows of similar length, so that little of a padded batch is padding.

    The longest rows come first: what does not fit into memory shows at once. Rows of equal length keep
    their order, so that the same lengths always give the same batches.

    Args:
        lengths: the number of tokens of each row.
        max_rows: the most rows in a batch.
        max_tokens: the most tokens in a padded batch, rows × longest. A longer row stands alone.

    Returns:
        Indices into `lengths`, each exactly once.

    Raises:
        ValueError: a limit below 1.
    """
    if max_rows < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"max_rows {max_rows} and max_tokens {max_tokens} must be at least 1")
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room == 0:
            batches.append([])
            room = max_rows
            if max_tokens is not None and lengths[i]:
                room = max(1, min(max_rows, max_tokens // lengths[i]))
        batches[-1].append(i)
        room -= 1
    return batches
