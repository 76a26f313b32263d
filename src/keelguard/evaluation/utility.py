"""Utility: tasks with exact answers, and the perplexity of a text."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from keelguard.errors import UsageError
from keelguard.models import context_length, execution_device
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 2048
"""Tokens per window of the perplexity where the model's context is not shorter."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_correct(request: Request, response: str) -> bool:
    """Whether a response gives the request's reference answer.

    A reference with a final "#### number" (as in GSM8K, Cobbe et al. 2021) is compared with the last number of
    the response; any other one must be the whole response, up to case, white space and a final full stop.
    """
    reference = request.answer
    if "####" in reference:
        wanted = _number(reference.rsplit("####", 1)[1])
        given = _number(response)
        return wanted is not None and wanted == given
    return _normal(reference) == _normal(response)


def solved_by_task(requests: Sequence[Request], responses: Iterable[str | None]) -> dict[str, dict[str, bool]]:
    """Task → request id → whether the answer is right; a response that is None does not count.

    Raises:
        UsageError: a request has no reference answer.
    """
    outcomes: dict[str, dict[str, bool]] = {}
    for request, response in zip(requests, responses, strict=True):
        if not request.answer:
            raise UsageError(f"utility: request {request.id!r} has no reference answer; add one or remove it")
        if response is not None:
            outcomes.setdefault(request.task or "utility", {})[request.id] = is_correct(request, response)
    return outcomes


def perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    *,
    reporter: Reporter = SILENT,
    label: str = "perplexity",
) -> float:
    """Perplexity of a text: exp of the mean negative log-likelihood per token, natural logarithm.

    The text is cut into windows that do not overlap; each begins with the BOS token where the tokenizer has one.
    The first token of a window without BOS is not scored.

    Raises:
        UsageError: the text is shorter than two tokens.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = min(WINDOW, context_length(model) or WINDOW) - len(start)
    windows = [start + ids[i : i + width] for i in range(0, len(ids), width)]
    total, count = 0.0, 0
    with reporter.step(label, len(windows)) as advance, torch.inference_mode():
        for window in windows:
            if len(window) > 1:
                row = torch.tensor([window], device=execution_device(model))
                loss = model(input_ids=row, labels=row, use_cache=False).loss
                total += loss.double().item() * (len(window) - 1)
                count += len(window) - 1
            advance(1)
    if count == 0:
        raise UsageError("perplexity: the text has fewer than two tokens; give a longer one")
    return math.exp(min(total / count, 700.0))


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
