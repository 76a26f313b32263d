"""The guarded loop: without interventions it is plain decoding; with them each row has its own course."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria

from guard_signals import (
    SOME,
    chats_of,
    left_padded,
    make_signal,
    once,
    plain_generation,
    prompts_of,
    recorded_logits,
    script,
    until,
)
from keelguard.chats import encode_chat
from keelguard.errors import UsageError
from keelguard.generation import generation_config, stop_tokens
from keelguard.guard.adapter import Refusals, Signal
from keelguard.guard.loop import GuardedLoop, check_chunk
from keelguard.guard.policy import View
from keelguard.guard.words import Words
from keelguard.hashes import hash_model
from keelguard.records import user
from tiny_models import ARCHITECTURES, Tiny, endless, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 12
CLOSE = 2e-4
"""Logits of the wide random models reach 50; a fused pass rounds differently."""


def guarded(
    tiny: Tiny, signal: Signal, chats: Sequence[Any], count: int = COUNT, *, config: Any = None, **options: Any
) -> GuardedLoop:
    """Generate greedily under a signal; the loop with its traces."""
    prompts = prompts_of(chats)
    extra = {name: options.pop(name) for name in ("stopping_criteria",) if name in options}
    ids, mask = left_padded([prompt.ids for prompt in prompts], tiny.tokenizer.eos_token_id)
    loop = GuardedLoop(
        signal,
        tiny.tokenizer,
        prefills=[prompt.prefill for prompt in prompts],
        queries=[prompt.query or (0, 0) for prompt in prompts],
        **options,
    )
    with torch.inference_mode():
        loop.output = tiny.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            ids,
            attention_mask=mask,
            generation_config=config or generation_config(tiny.model, tiny.tokenizer, count),
            custom_generate=loop,
            **extra,
        )
    return loop


def tokens_of(loop: GuardedLoop) -> list[list[int]]:
    return [trace.answer for trace in loop.traces]


def plain_tokens(tiny: Tiny, rows: Sequence[Sequence[int]], count: int = COUNT) -> list[list[int]]:
    return plain_generation(tiny, rows, count)[0]


def refusal_of(tiny: Tiny, signal: Signal, place: int) -> list[int]:
    return Words(tiny.tokenizer, signal.refusals.prefix).at(place)


SHORT = Refusals("Sorry, I", "Sorry.")
"""The tiny tokenizers spell a refusal in dozens of tokens."""


def scripted_signal(tiny: Tiny, **policy: Any) -> Signal:
    signal = make_signal(tiny, **{"mode": "rollback", **policy})
    signal.refusals = SHORT
    return signal


# Plain decoding


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_token_judged_beside_it_leaves_the_tokens_as_they_are(architecture: str, monkeypatch: pytest.MonkeyPatch):
    tiny = tiny_model(architecture)
    chats, signal = chats_of(tiny), make_signal(tiny)
    expected, plain = plain_generation(tiny, [chat.ids for chat in chats], COUNT)
    with recorded_logits(monkeypatch) as seen:
        loop = guarded(tiny, signal, chats)
    assert tokens_of(loop) == expected
    logits = torch.stack(seen, 1)[:, : plain.shape[1]]
    for i, row in enumerate(expected):
        assert torch.allclose(logits[i, : len(row)], plain[i, : len(row)], atol=CLOSE)
    alone = [tokens_of(guarded(tiny, signal, [chat]))[0] for chat in chats]
    assert alone == expected
    assert [len(trace.policy.verdicts) for trace in loop.traces] == [len(row) + 1 for row in expected]


@pytest.mark.parametrize("attention", ["full", "windows"])
@pytest.mark.parametrize("architecture", SOME)
def test_exact_logits_are_those_of_plain_decoding_bit_by_bit(
    architecture: str, attention: str, monkeypatch: pytest.MonkeyPatch
):
    """In a padded batch and alone. Only beyond a sliding window can a bit differ: the cache keeps what slid out."""
    tiny = tiny_model(architecture)
    signal = make_signal(tiny, attention=attention)
    window = getattr(tiny.model.config, "sliding_window", None)
    for chats in (chats_of(tiny), chats_of(tiny)[1:2]):
        expected, plain = plain_generation(tiny, [chat.ids for chat in chats], COUNT)
        with recorded_logits(monkeypatch) as seen:
            loop = guarded(tiny, signal, chats, exact=True)
        assert tokens_of(loop) == expected
        logits = torch.stack(seen, 1)
        size = min(logits.shape[1], plain.shape[1])
        if window is None:
            assert torch.equal(logits[:, :size], plain[:, :size])
        else:
            assert torch.allclose(logits[:, :size], plain[:, :size], atol=CLOSE)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_exact_logits_inside_a_sliding_window_are_bit_identical(architecture: str, monkeypatch: pytest.MonkeyPatch):
    tiny = fresh_model(architecture, sliding_window=64)
    chats = chats_of(tiny, ["Hello", "x = f(a)"])
    expected, plain = plain_generation(tiny, [chat.ids for chat in chats], COUNT)
    assert max(len(chat.ids) for chat in chats) + COUNT < 64
    with recorded_logits(monkeypatch) as seen:
        assert tokens_of(guarded(tiny, make_signal(tiny), chats, exact=True)) == expected
    assert torch.equal(torch.stack(seen, 1)[:, : plain.shape[1]], plain)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_answers_far_beyond_a_sliding_window_stay_the_same(architecture: str):
    tiny = tiny_model(architecture)
    chats = chats_of(tiny)
    expected = plain_tokens(tiny, [chat.ids for chat in chats], 40)
    for exact in (False, True):
        assert tokens_of(guarded(tiny, make_signal(tiny), chats, 40, exact=exact)) == expected


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_the_model_is_what_it_was(architecture: str):
    tiny = fresh_model(architecture)
    before, weights = hash_model(tiny.model), {n: p.clone() for n, p in tiny.model.named_parameters()}
    for placement in ("probe", "prefix", "linear"):
        guarded(tiny, make_signal(tiny, placement), chats_of(tiny))
    assert hash_model(tiny.model) == before
    assert all(torch.equal(p, weights[n]) for n, p in tiny.model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())


@pytest.mark.parametrize("architecture", SOME)
def test_fused_exact_and_chunked_verdicts_agree(architecture: str):
    tiny = tiny_model(architecture)
    chats = chats_of(tiny)
    ways: list[dict[str, Any]] = [{}, {"exact": True}, {"chunk": 1}, {"chunk": 5}, {"chunk": 50}]
    found = [guarded(tiny, make_signal(tiny), chats, **way) for way in ways]
    reference = found[0]
    for loop in found[1:]:
        assert tokens_of(loop) == tokens_of(reference)
        for mine, yours in zip(loop.traces, reference.traces, strict=True):
            ours = {v.position: v.probability for v in mine.policy.verdicts}
            theirs = {v.position: v.probability for v in yours.policy.verdicts}
            assert ours == pytest.approx(theirs, abs=1e-5)
            assert len(ours) == len(yours.answer) + 1
    windows = [guarded(tiny, make_signal(tiny, attention="windows", r2=3), chats, exact=e) for e in (False, True)]
    for mine, yours in zip(*(loop.traces for loop in windows), strict=True):
        assert [v.view for v in mine.policy.verdicts] == [v.view for v in yours.policy.verdicts]
        probabilities = [[v.probability for v in trace.policy.verdicts] for trace in (mine, yours)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)


@pytest.mark.parametrize("placement", ["probe", "prefix", "linear"])
def test_verdicts_do_not_depend_on_the_batch(placement: Any):
    tiny = tiny_model("llama")
    signal, chats = make_signal(tiny, placement), chats_of(tiny)
    together = guarded(tiny, signal, chats)
    for chat, trace in zip(chats, together.traces, strict=True):
        alone = guarded(tiny, signal, [chat]).traces[0]
        assert alone.answer == trace.answer
        mine, yours = ([v.probability for v in t.policy.verdicts] for t in (alone, trace))
        assert mine == pytest.approx(yours, abs=1e-5)


# Interventions


@pytest.mark.parametrize("way", [{}, {"exact": True}, {"chunk": 4}])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_after_a_rollback_a_row_goes_on_as_if_it_had_said_nothing_else_and_the_others_do_not_notice(
    architecture: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    tiny = endless(architecture)
    signal, chats = scripted_signal(tiny), chats_of(tiny)
    plain = plain_tokens(tiny, [chat.ids for chat in chats], 60)
    assert all(len(row) > 8 for row in plain[:2])
    script(monkeypatch, once((1, 8)))
    loop = guarded(tiny, signal, chats, 60, **way)
    kept = plain[1][:7]
    begun = [*chats[1].ids, *kept, *refusal_of(tiny, signal, 7)]
    rest = plain_tokens(tiny, [begun], 60 - len(begun) + len(chats[1].ids))[0]
    assert loop.traces[1].answer == [*kept, *refusal_of(tiny, signal, 7), *rest]
    assert [tokens_of(loop)[i] for i in (0, 2, 3)] == [plain[i] for i in (0, 2, 3)]
    (event,) = loop.traces[1].policy.interventions
    assert (event.position, event.to, event.reason) == (8, 7, "answer")
    assert loop.traces[1].forwarded == len(loop.traces[1].answer) + 1


def test_append_keeps_everything_and_goes_on_behind_it(monkeypatch: pytest.MonkeyPatch):
    tiny = tiny_model("llama")
    signal, chats = scripted_signal(tiny, mode="append", tau=2), chats_of(tiny)
    plain = plain_tokens(tiny, [chat.ids for chat in chats], 40)
    script(monkeypatch, once((0, 4), (0, 6), (0, 7)))
    answer = guarded(tiny, signal, chats, 40).traces[0].answer
    begun = plain[0][:7] + refusal_of(tiny, signal, 7)
    assert answer == begun + plain_tokens(tiny, [[*chats[0].ids, *begun]], 40 - len(begun))[0]


def test_stop_ends_with_the_fixed_refusal(monkeypatch: pytest.MonkeyPatch):
    tiny = tiny_model("llama")
    signal, chats = scripted_signal(tiny, mode="stop"), chats_of(tiny)
    plain = plain_tokens(tiny, [chat.ids for chat in chats])
    script(monkeypatch, once((2, 5)))
    loop = guarded(tiny, signal, chats)
    trace = loop.traces[2]
    assert trace.answer == plain[2][:4] + Words(tiny.tokenizer, "Sorry.").at(4)
    assert (trace.reason, trace.policy.finished) == ("refused", True)
    assert [tokens_of(loop)[i] for i in (0, 1, 3)] == [plain[i] for i in (0, 1, 3)]


def test_observe_records_and_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    tiny = tiny_model("llama")
    signal, chats = scripted_signal(tiny, mode="observe"), chats_of(tiny)
    script(monkeypatch, lambda row, view: 0.9)
    loop = guarded(tiny, signal, chats)
    assert tokens_of(loop) == plain_tokens(tiny, [chat.ids for chat in chats])
    assert all(v.malicious for trace in loop.traces for v in trace.policy.verdicts)
    assert not any(trace.policy.interventions for trace in loop.traces)


@pytest.mark.parametrize("mode", ["append", "rollback"])
def test_a_malicious_query_is_refused_from_the_first_token(mode: str, monkeypatch: pytest.MonkeyPatch):
    tiny = tiny_model("llama")
    signal, chats = scripted_signal(tiny, mode=mode), chats_of(tiny)
    script(monkeypatch, once((3, 0)))
    loop = guarded(tiny, signal, chats, 40)
    begun = refusal_of(tiny, signal, 0)
    assert loop.traces[3].answer == begun + plain_tokens(tiny, [[*chats[3].ids, *begun]], 40 - len(begun))[0]
    assert loop.traces[3].policy.interventions[0].reason == "query"
    assert tokens_of(loop)[:3] == plain_tokens(tiny, [chat.ids for chat in chats], 40)[:3]


def test_a_malicious_prefill_is_dropped_for_that_row_alone(monkeypatch: pytest.MonkeyPatch):
    tiny = tiny_model("llama")
    signal, chats = scripted_signal(tiny), chats_of(tiny, prefills=["Sure, here is", None, "The", None])
    sizes = [prompt.prefill for prompt in prompts_of(chats)]
    script(monkeypatch, once((0, sizes[0])))
    loop = guarded(tiny, signal, chats, 40)
    trace, begun = loop.traces[0], refusal_of(tiny, signal, 0)
    prompt = chats[0].ids[: -sizes[0]]
    assert trace.answer == begun + plain_tokens(tiny, [[*prompt, *begun]], 40 + sizes[0] - len(begun))[0]
    assert (trace.kept, trace.policy.interventions[0].reason) == (0, "prefill")
    assert loop.traces[2].kept == sizes[2] > 0
    assert loop.traces[2].answer == chats[2].ids[-sizes[2] :] + plain_tokens(tiny, [chats[2].ids], 40)[0]
    output: Any = loop.output  # pyright: ignore[reportAttributeAccessIssue]
    row = output[0].tolist()
    width = max(len(chat.ids) for chat in chats)
    assert row[width - sizes[0] :][: len(trace.answer)] == trace.answer
    assert row[width - len(chats[0].ids) : width - sizes[0]] == prompt


@pytest.mark.parametrize("most", [1, 2])
def test_a_relapse_ends_with_the_fixed_refusal_in_the_place_of_the_forced_one(
    most: int, monkeypatch: pytest.MonkeyPatch
):
    tiny = tiny_model("llama")
    signal, chats = scripted_signal(tiny, max_interventions=most), chats_of(tiny)
    script(monkeypatch, lambda row, view: 0.9 if row == 0 and view.stop else 0.1)
    trace = guarded(tiny, signal, chats, 60).traces[0]
    assert (trace.reason, len(trace.policy.interventions)) == ("refused", most + 1)
    ending = Words(tiny.tokenizer, "Sorry.")
    to = trace.policy.interventions[-1].to
    assert trace.answer == (refusal_of(tiny, signal, 0) * (most - 1))[:to] + ending.at(to)
    assert (to > 0) is (most > 1), "a second refusal goes behind the first, whose place is the fixed one's"


def test_a_verdict_that_is_no_number_is_an_intervention():
    tiny = tiny_model("llama")
    signal = scripted_signal(tiny)
    signal.head_weight = signal.head_weight * torch.nan
    trace = guarded(tiny, signal, chats_of(tiny)).traces[0]
    assert [event.reason for event in trace.policy.interventions] == ["nan", "nan"]
    assert trace.answer == Words(tiny.tokenizer, "Sorry.").at(0)


# Ends


def ending_tiny(row: int, place: int) -> tuple[Tiny, list[Any], list[list[int]]]:
    """A model for which a token of one answer is an end token."""
    tiny = fresh_model("llama")
    chats = chats_of(tiny)
    plain = plain_tokens(tiny, [chat.ids for chat in chats])
    token = plain[row][place]
    assert token not in plain[row][:place]
    tiny.model.generation_config.eos_token_id = [token]
    return tiny, chats, [until(r, [token]) for r in plain]


def test_an_end_token_ends_its_row_and_is_no_part_of_the_answer():
    tiny, chats, expected = ending_tiny(0, 5)
    for way in ({}, {"exact": True}, {"chunk": 3}):
        loop = guarded(tiny, make_signal(tiny), chats, **way)
        assert tokens_of(loop) == expected
        assert (loop.traces[0].reason, len(expected[0])) == ("end", 5)
        full = [i for i, row in enumerate(expected) if len(row) == COUNT]
        assert full
        assert all(loop.traces[i].reason == "length" for i in full)
        assert [v.position for v in loop.traces[0].policy.verdicts] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("check_end", [True, False])
def test_what_no_check_has_covered_is_judged_before_the_answer_ends(check_end: bool, monkeypatch: pytest.MonkeyPatch):
    tiny, chats, expected = ending_tiny(0, 5)
    signal = scripted_signal(tiny, cadence="periodic", period=3, check_end=check_end)
    asked = script(monkeypatch, once((0, 5)))
    loop = guarded(tiny, signal, chats, 40)
    assert ((0, View(True, 0, 5)) in asked) is check_end
    if not check_end:
        assert loop.traces[0].answer == expected[0]
        return
    begun = expected[0][:3] + refusal_of(tiny, signal, 3)
    answer = begun + plain_tokens(tiny, [[*chats[0].ids, *begun]], 40 - len(begun))[0]
    assert loop.traces[0].answer == until(answer, stop_tokens(tiny.model, tiny.tokenizer))
    assert loop.traces[0].policy.interventions[0].reason == "end"


def test_the_last_token_is_judged_and_a_refusal_may_pass_the_limit(monkeypatch: pytest.MonkeyPatch):
    tiny = tiny_model("llama")
    signal, chats = scripted_signal(tiny, cadence="periodic", period=5), chats_of(tiny)
    script(monkeypatch, once((0, COUNT)))
    loop = guarded(tiny, signal, chats)
    plain = plain_tokens(tiny, [chat.ids for chat in chats])
    assert loop.traces[0].answer == plain[0][:10] + refusal_of(tiny, signal, 10)
    assert loop.traces[0].reason == "length"
    assert tokens_of(loop)[1:] == plain[1:]


def test_a_limit_counts_what_follows_a_prefill():
    tiny = tiny_model("llama")
    chats = chats_of(tiny, prefills=["Sure, here is", None, "The", None])
    loop = guarded(tiny, make_signal(tiny), chats, 3)
    sizes = [prompt.prefill for prompt in prompts_of(chats)]
    assert [len(trace.answer) - size for trace, size in zip(loop.traces, sizes, strict=True)] == [3, 3, 3, 3]
    assert {trace.reason for trace in loop.traces} == {"length"}


class StopAt(StoppingCriteria):
    """Stops a row whose last token is one of these; remembers what it saw."""

    def __init__(self, tokens: set[int]) -> None:
        self.tokens, self.seen = tokens, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        self.seen.append(input_ids.shape[1])
        return torch.tensor([int(row[-1]) in self.tokens for row in input_ids])


def test_stopping_criteria_stop_as_in_generate_and_never_at_the_prompt():
    tiny = tiny_model("llama")
    chats = chats_of(tiny)
    plain = plain_tokens(tiny, [chat.ids for chat in chats])
    stop = StopAt({plain[0][4], chats[0].ids[-1]})
    loop = guarded(tiny, make_signal(tiny), chats, stopping_criteria=StoppingCriteriaList([stop]))
    first = next(i for i, token in enumerate(plain[0]) if token in stop.tokens)
    assert loop.traces[0].answer == plain[0][: first + 1]
    assert loop.traces[0].reason == "stopped"
    assert min(stop.seen) == max(len(chat.ids) for chat in chats) + 1


# What `generate` asks for


def test_sampling_by_generate_itself_draws_what_plain_generation_draws():
    tiny = tiny_model("llama")
    chats = chats_of(tiny)
    ids, mask = left_padded([chat.ids for chat in chats], tiny.tokenizer.eos_token_id)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20, "max_new_tokens": 8, "pad_token_id": 1}
    torch.manual_seed(7)
    expected = tiny.model.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(7)
    loop = GuardedLoop(make_signal(tiny), tiny.tokenizer, exact=True)
    found = tiny.model.generate(ids, attention_mask=mask, custom_generate=loop, **options)
    assert [t.answer for t in loop.traces] == [
        until(row, [tiny.tokenizer.eos_token_id]) for row in expected[:, ids.shape[1] :].tolist()
    ]
    assert torch.equal(found[:, : ids.shape[1]], ids)
    greedy = tiny.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert not torch.equal(greedy, expected)


def test_a_repetition_penalty_of_the_model_is_heeded():
    tiny = fresh_model("llama")
    tiny.model.generation_config.repetition_penalty = 5.0
    chats = chats_of(tiny)[:1]
    expected = plain_tokens(tiny, [chats[0].ids], 25)
    assert tokens_of(guarded(tiny, make_signal(tiny), chats, 25)) == expected
    assert expected != plain_tokens(tiny_model("llama"), [chats[0].ids], 25)


def test_without_a_mask_every_token_counts():
    tiny = tiny_model("llama")
    chat = chats_of(tiny)[1]
    loop = GuardedLoop(make_signal(tiny), tiny.tokenizer)
    config = GenerationConfig(max_new_tokens=6, eos_token_id=tiny.tokenizer.eos_token_id, pad_token_id=0)
    tiny.model.generate(torch.tensor([chat.ids]), generation_config=config, custom_generate=loop)
    assert loop.traces[0].answer == plain_tokens(tiny, [chat.ids], 6)[0]


def test_beams_and_chunks_of_the_wrong_cadence_are_refused():
    tiny = tiny_model("llama")
    config = generation_config(tiny.model, tiny.tokenizer, 5)
    config.num_beams = 2
    with pytest.raises(UsageError, match="num_beams 2"):
        guarded(tiny, make_signal(tiny), chats_of(tiny), config=config)
    for chunk, signal in (
        (4, make_signal(tiny, cadence="annealing")),
        (4, make_signal(tiny, attention="windows")),
        (4, make_signal(tiny, "prefix")),
        (4, make_signal(tiny, "linear")),
        (-1, make_signal(tiny)),
    ):
        with pytest.raises(UsageError, match=f"chunk {chunk}"):
            GuardedLoop(signal, tiny.tokenizer, chunk=chunk)
    check_chunk(4, make_signal(tiny).policy, make_signal(tiny))


def test_a_query_spans_what_the_user_wrote():
    tiny = tiny_model("llama")
    chats = chats_of(tiny)
    loop = guarded(tiny, make_signal(tiny, attention="windows"), chats, 2)
    for i, chat in enumerate(chats):
        assert loop.watcher.ids[i][loop.watcher.query[i]].tolist() == chat.ids[chat.query.start : chat.query.stop]


# The words that are forced


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "phi3"])
def test_a_forced_text_reads_as_it_was_written_at_the_start_and_within(architecture: str):
    tiny = tiny_model(architecture)
    words = Words(tiny.tokenizer, "Sorry, I cannot")
    begun = encode_chat(tiny.tokenizer, [user("a")], prefill="Sure.")
    alone = encode_chat(tiny.tokenizer, [user("a")], prefill="Sorry, I cannot")
    assert words.at(0) == alone.ids[alone.response.start :]
    text = tiny.tokenizer.decode(begun.ids[begun.response.start :] + words.at(3))
    assert " ".join(text.split()) == "Sure. Sorry, I cannot"
