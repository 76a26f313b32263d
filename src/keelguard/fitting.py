"""Work that may not fit in memory: batches within a budget, halved where that does not do, and one line that says so.

    batches = batches_by_length(lengths, 32, max_tokens=most_tokens(model))
    for part, found in in_halves(batches, read, "the chats"):
        ...

torch is imported late, so that importing this module stays cheap.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from keelguard.errors import FailureError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

READ_TOKENS = 32_768
"""Tokens of a padded batch that is read without gradients: about 3 GiB of activations in a 7B model in bfloat16."""

_LOGITS = 2**28
"""Logits that a batch may have where every token may get some: 1 GiB in float32."""

REMEDY = "shorten the data, load the model in bfloat16 (--dtype bfloat16), or spread it over GPUs (--device auto)"
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short; a CPU's allocator and MPS say so in a plain RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


@contextmanager
def memory_errors(what: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn a lack of memory into one clear line.

    Raises:
        FailureError: `what` does not fit in memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FailureError(f"{what}: does not fit in memory; {remedy}") from error


def in_halves(
    batches: Sequence[Sequence[T]], work: Callable[[list[T]], R], what: str, remedy: str = REMEDY
) -> Iterator[tuple[list[T], R]]:
    """Work at batches in their order; one that does not fit in memory is halved until it does.

    Raises:
        FailureError: a batch of one does not fit; `what` and `remedy` are in the message.
    """
    waiting = [list(batch) for batch in reversed(batches) if batch]
    while waiting:
        batch = waiting.pop()
        try:
            yield batch, _tried(batch, work, what, remedy)
        except _TooLargeError:
            middle = len(batch) // 2
            waiting += [batch[middle:], batch[:middle]]
            _free_cache()


def read_in_order(
    model: Any,
    lengths: Sequence[int],
    max_rows: int,
    max_tokens: int,
    read: "Callable[[list[int]], list[R]]",
    what: str,
) -> list[R]:
    """What `read` finds for every row, in the rows' order: in evaluation mode, without gradients, in batches that fit.

    Args:
        lengths: the number of tokens of each row.
        read: takes the numbers of some rows, and gives as many results.

    Raises:
        FailureError: a single row does not fit in memory.
    """
    import torch

    from keelguard.batches import batches_by_length

    found: dict[int, R] = {}
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            for part, results in in_halves(batches_by_length(lengths, max_rows, max_tokens), read, what):
                found.update(zip(part, results, strict=True))
    finally:
        model.train(mode)
    return [found[i] for i in range(len(lengths))]


class _TooLargeError(Exception):
    """A batch that can be halved did not fit."""


def _tried(batch: list[T], work: Callable[[list[T]], R], what: str, remedy: str) -> R:
    try:
        return work(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise FailureError(f"{what}: one alone does not fit in memory; {remedy}") from error
    # Not above, where the error still holds the tensors of the batch.
    raise _TooLargeError


def _free_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def most_tokens(model: Any) -> int:
    """Tokens of a padded batch whose answers' logits are all computed, by the size of the vocabulary."""
    return reading_tokens(model.config.get_text_config().vocab_size)


def reading_tokens(vocabulary: int) -> int:
    """The same for a vocabulary of this size."""
    return max(1, min(READ_TOKENS, _LOGITS // vocabulary))


def told_logits(model: Any, inputs: "dict[str, torch.Tensor]", told: "torch.Tensor") -> "torch.Tensor":
    """The logits (P, V) at P of the B × T positions of a batch, row by row; the others never meet the head.

    With a large vocabulary the logits of whole chats are far larger than all else. What the model does to logits behind
    its head, such as a soft cap, is done to these as well.

    Args:
        inputs: input_ids (B, T) and what goes with them, where the model takes them.
        told: (B, T) bool, which positions.
    """
    head = model.get_output_embeddings()
    if head is None:
        logits = model(**inputs, use_cache=False).logits
        return logits[told.to(logits.device)]

    def keep(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        return hidden[told.to(hidden.device)][None], *arguments[1:]

    handle = head.register_forward_pre_hook(keep)
    try:
        return model(**inputs, use_cache=False).logits[0]
    finally:
        handle.remove()
