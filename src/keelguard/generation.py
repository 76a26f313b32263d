"""Batched generation: prompts sorted by length and left-padded; every row samples from a stream of its own.

A row's stream is seeded by the prompt's place in the list, so that what it samples depends neither on the rows
beside it nor on the order of work: a resumed run samples what an undisturbed one would have sampled.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from keelguard.attacks.base import GREEDY, Decoding
from keelguard.batches import Span, batches_by_length, pad, pad_id_of
from keelguard.chats import encode_chat
from keelguard.hashes import sha256_of
from keelguard.models import execution_device
from keelguard.records import assistant, user

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

SMALL_MODEL = 50_000_000
"""Parameters below which a batch is bound by overhead, so that large batches are the default."""


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue.

    The last `prefill` ids are the start of the answer: they are read for the spacing of the continuation's text.
    """

    ids: Sequence[int]
    prefill: int = 0
    decoding: Decoding = GREEDY
    query: Span | None = None
    """The tokens of the text that is asked, for who looks at it alone."""


class Answer(NamedTuple):
    """What was added to a prompt, and what a decoder tells of it, as JSON values.

    `cut` says that plain decoding came to its limit before the answer came to its end.
    """

    text: str
    note: dict[str, Any] | None = None
    cut: bool = False

    @property
    def broken_off(self) -> bool:
        """Whether a decoder put a refusal in the place of what the model wrote, wherever in the answer it stands."""
        note = self.note or {}
        return bool(note.get("interventions") or note.get("replaced"))


class Decoder(Protocol):
    """Something that generates in the place of plain decoding."""

    @property
    def digest(self) -> str:
        """The hash of all that determines its answers beside the model."""
        ...

    def room(self, tokenizer: "PreTrainedTokenizerBase") -> int:
        """Positions that an answer may need beyond its limit."""
        ...

    def __call__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[Prompt],
        config: "GenerationConfig",
        processors: "LogitsProcessorList",
    ) -> list[Answer]:
        """Answers to a batch of prompts of one decoding."""
        ...


def default_batch_size(model: Any) -> int:
    """Rows per batch where the user gives none."""
    return 256 if sum(p.numel() for p in model.parameters()) < SMALL_MODEL else 16


def plan_batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Indices of prompts in batches of one decoding each and similar length, longest first.

    Longest first, so that a batch that does not fit fails at the start and not after hours.
    """
    by_decoding: dict[Decoding, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_decoding.setdefault(prompt.decoding, []).append(index)
    return [
        [members[i] for i in batch]
        for members in by_decoding.values()
        for batch in batches_by_length([len(prompts[i].ids) for i in members], batch_size)
    ]


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    decoder: Decoder | None = None,
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Continue prompts, batch by batch; a batch that does not fit in memory is halved.

    Args:
        prompts: all prompts.
        batches: which of them to continue, as planned by `plan_batches`.
        max_new_tokens: where an answer is cut off.
        seed: with a prompt's index, the seed of its sampling.
        decoder: generates in the place of plain decoding.

    Yields:
        Indices, and what was added to each.
    """
    import torch

    waiting = [list(batch) for batch in reversed(batches)]
    while waiting:
        batch = waiting.pop()
        try:
            yield (
                batch,
                _continue(
                    [prompts[i] for i in batch],
                    model,
                    tokenizer,
                    max_new_tokens,
                    [sha256_of([seed, i]) for i in batch],
                    decoder,
                ),
            )
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            middle = len(batch) // 2
            waiting += [batch[middle:], batch[:middle]]


def stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and what the chat template writes at a turn's end.

    A chat adapter on a base model often names only the base's own in its generation config.
    """
    configured: Any = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    turn = encode_chat(tokenizer, (user("a"), assistant("b")))
    closing = turn.ids[turn.closing.stop - 1] if turn.closing.size else None
    stops: list[Any] = [*ids, tokenizer.eos_token_id, closing]
    return list(dict.fromkeys(i for i in stops if i is not None))


def _continue(
    prompts: Sequence[Prompt],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    seeds: Sequence[str],
    decoder: Decoder | None,
) -> list[Answer]:
    """Continue one batch of prompts that share their decoding."""
    import torch
    from transformers import LogitsProcessorList

    decoding = prompts[0].decoding
    config = generation_config(model, tokenizer, max_new_tokens)
    processors = LogitsProcessorList([] if decoding.greedy else [sampler(decoding, seeds)])
    if decoder is not None:
        return decoder(model, tokenizer, prompts, config, processors)
    inputs = pad([prompt.ids for prompt in prompts], pad_id_of(tokenizer), side="left")
    device = execution_device(model)
    inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        output = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, generation_config=config, logits_processor=processors
        )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    stops = set(stop_tokens(model, tokenizer))
    return [
        Answer(
            added_text(tokenizer, list(prompt.ids[len(prompt.ids) - prompt.prefill :]), ids),
            cut=stops.isdisjoint(ids),
        )
        for prompt, ids in zip(prompts, new, strict=True)
    ]


def generation_config(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int
) -> "GenerationConfig":
    """The model's own penalties with plain decoding: one answer, the likeliest token each time.

    The fields are given values, for transformers fills what is None from the model's own settings.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(
        max_new_tokens=max_new_tokens,
        max_length=None,
        pad_token_id=pad_id_of(tokenizer),
        eos_token_id=stop_tokens(model, tokenizer),
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
    )
    return config


def sampler(decoding: Decoding, seeds: Sequence[str]) -> Any:
    """A logits processor that makes the likeliest token a sample, each of its B rows from a stream of its own.

    Temperature, top-k and top-p apply first. Adding Gumbel noise to logits and taking the largest is sampling from
    their softmax (Gumbel 1954; Maddison et al. 2014).
    """
    import torch
    from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    streams = [torch.Generator().manual_seed(int(seed[:15], 16)) for seed in seeds]
    warpers: list[Any] = [TemperatureLogitsWarper(float(decoding.temperature))]
    warpers += [TopKLogitsWarper(decoding.top_k)] if decoding.top_k else []
    warpers += [TopPLogitsWarper(decoding.top_p)] if decoding.top_p < 1 else []

    class Sampler(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            for warper in warpers:
                scores = warper(input_ids, scores)
            waits = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=s) for s in streams])
            return cast("torch.FloatTensor", scores.float() - waits.log().to(scores.device))

    return Sampler()


def added_text(tokenizer: "PreTrainedTokenizerBase", prefill: list[int], new: list[int]) -> str:
    """The text that new tokens add after a prefill, with the space that a word at a start would lose."""
    before, whole, alone = tokenizer.batch_decode([prefill, prefill + new, new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else alone
