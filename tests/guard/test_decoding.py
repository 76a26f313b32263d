"""`generate_guarded` and its stream: outputs that tell what happened, pieces that are never taken back."""

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria

from guard_signals import QUESTIONS, chats_of, make_signal, once, plain_generation, script
from keelguard.attacks.base import Attempt, Decoding
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating, answer_with_notes
from keelguard.guard import decoding as module
from keelguard.guard.adapter import Refusals, Signal
from keelguard.guard.decoding import (
    GuardedDecoder,
    GuardedOutput,
    generate_guarded,
    generate_guarded_batch,
    stream_guarded,
)
from keelguard.guard.lora import RowLora
from keelguard.guard.policy import View
from keelguard.records import Request, assistant, user
from tiny_models import Tiny, build_model, endless, fresh_model, tiny_model
from tokenizers_for_tests import chat_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CHATS = [[user(text)] for text in QUESTIONS]
HOT = Decoding(temperature=1.2, top_k=50)


def short(tiny: Tiny, **policy: Any) -> Signal:
    signal = make_signal(tiny, **{"mode": "rollback", **policy})
    signal.refusals = Refusals("Sorry, I", "Sorry.")
    return signal


def answer_of(tiny: Tiny, signal: Signal, **options: Any) -> GuardedOutput:
    return generate_guarded(tiny.model, tiny.tokenizer, signal, CHATS[0], **{"max_new_tokens": 12, **options})


def text_of(tiny: Tiny, output: GuardedOutput) -> str:
    return tiny.tokenizer.decode(list(output.ids), skip_special_tokens=True)


# Outputs


def test_an_output_is_the_plain_answer_with_its_verdicts():
    tiny = endless("llama")
    signal = make_signal(tiny, cadence="periodic", period=5)
    chats = chats_of(tiny)
    plain = plain_generation(tiny, [chat.ids for chat in chats], 12)[0]
    found = generate_guarded_batch(tiny.model, tiny.tokenizer, signal, CHATS, max_new_tokens=12)
    assert [list(output.ids) for output in found] == plain
    assert [output.text for output in found] == tiny.tokenizer.batch_decode(plain, skip_special_tokens=True)
    for output in found:
        assert [v.position for v in output.verdicts] == [0, 5, 10, 12]
        assert all(0 < v.probability < 1 for v in output.verdicts)
        assert (output.reason, output.forwarded, output.intervened, output.prefilled) == ("length", 12, False, 0)
    alone = [answer_of(tiny, signal), generate_guarded(tiny.model, tiny.tokenizer, signal, CHATS[2], max_new_tokens=12)]
    assert [output.text for output in alone] == [found[0].text, found[2].text]


def test_the_text_follows_a_prefill_that_was_kept_and_is_the_whole_answer_where_it_was_not(
    monkeypatch: pytest.MonkeyPatch,
):
    tiny = tiny_model("mistral")
    prefill = "Sure, here is"
    kept = answer_of(tiny, short(tiny, mode="observe"), prefill=prefill)
    assert kept.prefill_kept == kept.prefilled > 0
    assert f"{prefill}{kept.text}" == text_of(tiny, kept).lstrip()
    script(monkeypatch, once((0, kept.prefilled)))
    dropped = answer_of(tiny, short(tiny), prefill=prefill, max_new_tokens=40)
    assert (dropped.prefill_kept, dropped.interventions[0].reason) == (0, "prefill")
    assert dropped.text == text_of(tiny, dropped)
    assert dropped.text.startswith("Sorry, I")


def test_outputs_come_back_from_json_with_numbers_that_are_none():
    tiny = tiny_model("llama")
    signal = short(tiny)
    signal.head_bias = torch.tensor(torch.nan)
    output = answer_of(tiny, signal)
    data = json.loads(json.dumps(output.to_json(), allow_nan=False))
    assert data["verdicts"][0]["probability"] is None
    again = GuardedOutput.from_json(data)
    assert again.interventions[0].probability != again.interventions[0].probability
    assert again.to_json() == output.to_json()
    assert isinstance(again.verdicts[0].view, View)
    plain = answer_of(tiny, make_signal(tiny))
    assert GuardedOutput.from_json(json.loads(json.dumps(plain.to_json()))) == plain


# Sampling


def test_samples_depend_on_the_seed_and_not_on_the_batch():
    tiny = tiny_model("llama")
    signal = make_signal(tiny)

    def texts(chats: Any, seed: int, **options: Any) -> list[str]:
        outputs = generate_guarded_batch(
            tiny.model, tiny.tokenizer, signal, chats, max_new_tokens=10, decoding=HOT, seed=seed, **options
        )
        return [output.text for output in outputs]

    whole = texts(CHATS, 1)
    torch.manual_seed(99)
    assert texts(CHATS, 1) == whole
    assert texts(CHATS, 1, exact=True) == whole
    assert texts(CHATS[:2], 1) == whole[:2]
    assert texts(CHATS[:1], 1) == whole[:1]
    assert texts(CHATS, 2) != whole


def test_an_audits_samples_are_those_of_plain_decoding_where_the_signal_only_observes():
    tiny = tiny_model("llama")
    attempts = [
        Attempt(Request(str(i), tuple(chat)), tuple(chat), "Sure" if i == 2 else "", HOT if i % 2 else Decoding())
        for i, chat in enumerate(CHATS)
    ]
    settings = Generating(max_new_tokens=8, batch_size=3, seed=3)
    plain = answer_with_notes(tiny.model, tiny.tokenizer, attempts, settings)
    decoder = GuardedDecoder(make_signal(tiny))
    found = answer_with_notes(tiny.model, tiny.tokenizer, attempts, settings, decoder=decoder)
    for mine, yours in zip(found, plain, strict=True):
        assert mine is not None
        assert yours is not None
        assert (mine.text, yours.note) == (yours.text, None)
        assert mine.note is not None
        assert GuardedOutput.from_json(mine.note).text == mine.text


# Streaming


def pieces_of(tiny: Tiny, signal: Signal, **options: Any) -> tuple[list[str], GuardedOutput]:
    stream = stream_guarded(tiny.model, tiny.tokenizer, signal, CHATS[0], **{"max_new_tokens": 30, **options})
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3"])
@pytest.mark.parametrize(
    ("policy", "bad"),
    [
        ({}, ()),
        ({}, ((0, 6),)),
        ({"tau": 2}, ((0, 6), (0, 7))),
        ({"cadence": "periodic", "period": 4}, ((0, 8),)),
        ({"cadence": "annealing"}, ((0, 8),)),
        ({"mode": "stop"}, ((0, 6),)),
        ({"mode": "append"}, ((0, 6),)),
        ({}, ((0, 0),)),
    ],
)
def test_pieces_make_up_the_answer_and_none_is_taken_back(
    architecture: str, policy: dict[str, Any], bad: Any, monkeypatch: pytest.MonkeyPatch
):
    tiny = tiny_model(architecture)
    script(monkeypatch, once(*bad))
    pieces, output = pieces_of(tiny, short(tiny, **policy))
    assert output.intervened == bool(bad)
    assert "".join(pieces) == output.text == text_of(tiny, output)
    assert all(pieces)
    if not bad:
        assert len(pieces) > 5, "it streams"


def test_what_was_judged_malicious_is_never_shown(monkeypatch: pytest.MonkeyPatch):
    """Under hold-back every shown token was covered by a benign verdict."""
    tiny = tiny_model("llama")
    plain = answer_of(tiny, make_signal(tiny))
    shown: list[list[int]] = []
    asked: list[int] = []
    decide = once((0, 8))

    def watch(row: int, view: View) -> float:
        asked.append(view.stop)
        return decide(row, view)

    script(monkeypatch, watch)

    def listen(row: int, ids: list[int]) -> None:
        shown.append(list(ids))
        cleared = [stop for stop in asked if stop != 8]
        if 8 not in asked:
            assert len(ids) <= max(cleared)

    signal = short(tiny, cadence="periodic", period=4)
    output = generate_guarded_batch(tiny.model, tiny.tokenizer, signal, CHATS[:1], max_new_tokens=40, listener=listen)[
        0
    ]
    assert output.interventions[0].to == 4
    assert plain.ids[:8] not in [tuple(ids[:8]) for ids in shown]
    assert all(list(output.ids[: len(ids)]) == ids for ids in shown)
    assert sorted({len(ids) for ids in shown if 0 < len(ids) < 8}) == [4], "and it is shown as soon as it may be"


def test_a_prefill_is_part_of_what_is_shown():
    tiny = tiny_model("mistral")
    pieces, output = pieces_of(tiny, make_signal(tiny), prefill="Sure, here is")
    assert "".join(pieces) == text_of(tiny, output)
    assert "".join(pieces).endswith(output.text)


def test_a_character_of_several_tokens_is_shown_whole():
    tiny = tiny_model("llama")
    ids = tiny.tokenizer("naïve 日本語 👍", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    shown = module._Shown(tiny.tokenizer, pieces.append)
    for stop in range(1, len(ids) + 1):
        shown.hear(0, ids[:stop])
    assert "".join(pieces) == "naïve 日本語 👍"
    assert not any("\ufffd" in piece for piece in pieces)
    half = ids[:-1]
    other = module._Shown(tiny.tokenizer, pieces.append)
    pieces.clear()
    other.hear(0, half)
    other.finish(GuardedOutput("", tuple(half), 0, (), (), "length", len(half), 0))
    assert "".join(pieces) == tiny.tokenizer.decode(half)


def test_a_failure_in_the_thread_reaches_who_reads_the_stream(monkeypatch: pytest.MonkeyPatch):
    tiny = tiny_model("llama")

    def fail(row: int, view: View) -> float:
        if view.stop == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.1

    script(monkeypatch, fail)
    stream = stream_guarded(tiny.model, tiny.tokenizer, short(tiny), CHATS[0], max_new_tokens=12)
    pieces = []
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        pieces.extend(stream)
    assert pieces
    with pytest.raises(UsageError, match="max_new_tokens 0"):
        next(stream_guarded(tiny.model, tiny.tokenizer, short(tiny), CHATS[0], max_new_tokens=0))
    assert threading.active_count() < 10


def test_stopping_criteria_reach_generate():
    tiny = tiny_model("llama")

    class Third(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
            size = len(chats_of(tiny)[0].ids) + 3
            return torch.full((len(input_ids),), input_ids.shape[1] >= size)

    output = answer_of(tiny, make_signal(tiny), stopping_criteria=StoppingCriteriaList([Third()]))
    assert (len(output.ids), output.reason) == (3, "stopped")


# The digest


def test_a_digest_tells_signals_apart_and_survives_the_disk(tmp_path: Any):
    tiny = tiny_model("llama")
    signal = make_signal(tiny)
    digest = GuardedDecoder(signal).digest
    signal.save(tmp_path / "signal")
    assert GuardedDecoder(Signal.load(tmp_path / "signal")).digest == digest
    lora = signal.lora
    assert lora is not None
    other = RowLora.load(tmp_path / "signal")
    other.requires_grad_(False).up[3][0, 0] += 1
    changed: list[GuardedDecoder] = [
        GuardedDecoder(replace(signal, lora=other)),
        GuardedDecoder(replace(signal, lora=None)),
        GuardedDecoder(replace(signal, cls=signal.cls + 1)),
        GuardedDecoder(replace(signal, head_bias=signal.head_bias + 1)),
        GuardedDecoder(replace(signal, refusals=Refusals("No, I", "No."))),
        GuardedDecoder(signal.with_policy(threshold=0.4)),
        GuardedDecoder(signal, exact=True),
        GuardedDecoder(signal, chunk=4),
        GuardedDecoder(signal, weight=0.5),
    ]
    assert len({digest, *(each.digest for each in changed)}) == 1 + len(changed)
    assert GuardedDecoder(replace(signal, training={"a": 1})).digest == digest


# Errors


def empty(tiny: Tiny, signal: Signal) -> None:
    generate_guarded(tiny.model, tiny.tokenizer, signal, [user("  \n")])


def no_chat(tiny: Tiny, signal: Signal) -> None:
    generate_guarded_batch(tiny.model, tiny.tokenizer, signal, [])


def no_messages(tiny: Tiny, signal: Signal) -> None:
    generate_guarded(tiny.model, tiny.tokenizer, signal, [])


def too_long(tiny: Tiny, signal: Signal) -> None:
    generate_guarded(tiny.model, tiny.tokenizer, signal, [user("fox " * 400)], max_new_tokens=5)


def no_room(tiny: Tiny, signal: Signal) -> None:
    generate_guarded(tiny.model, tiny.tokenizer, signal, CHATS[0], max_new_tokens=250)


def no_template(tiny: Tiny, signal: Signal) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = None
    generate_guarded(tiny.model, tokenizer, signal, CHATS[0])


def other_width(tiny: Tiny, signal: Signal) -> None:
    model = build_model("llama", len(tiny.tokenizer), hidden_size=16)
    generate_guarded(model, tiny.tokenizer, signal, CHATS[0])


def other_layers(tiny: Tiny, signal: Signal) -> None:
    generate_guarded(tiny_model("gpt_neox").model, tiny.tokenizer, signal, CHATS[0])


def half_a_character(tiny: Tiny, signal: Signal) -> None:
    generate_guarded(tiny.model, tiny.tokenizer, signal, [user("\ud800")])


def after_an_answer(tiny: Tiny, signal: Signal) -> None:
    generate_guarded(tiny.model, tiny.tokenizer, signal, [user("a"), assistant("b")], prefill="c")


def unknown_layers(tiny: Tiny, signal: Signal) -> None:
    other = fresh_model("llama")
    other.model.config.layer_types = ["full_attention", "linear_attention"]
    generate_guarded(other.model, tiny.tokenizer, signal, CHATS[0], max_new_tokens=4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (empty, "the last message is empty"),
        (no_chat, "no conversation"),
        (no_messages, "empty: give"),
        (
            too_long,
            r"the prompt has \d+ tokens, the context 256: at most 0 new tokens fit beside a refusal, 5 are asked",
        ),
        (no_room, r"the prompt has \d+ tokens, the context 256: at most \d+ new tokens fit beside a refusal, 250"),
        (no_template, "no chat template.*--chat-template"),
        (other_width, "vectors of 32 numbers, the model of 16"),
        (other_layers, "layers that the model lacks, such as model.layers.0"),
        (half_a_character, "not valid Unicode"),
        (after_an_answer, "a prefill begins the assistant's turn"),
        (unknown_layers, "linear_attention"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(wrong: Callable[[Tiny, Signal], None], words: str):
    tiny = tiny_model("llama")
    with pytest.raises(UsageError, match=words):
        wrong(tiny, make_signal(tiny))


def test_a_prompt_and_its_answer_leave_room_for_a_refusal_and_the_row():
    tiny = tiny_model("llama")
    signal = make_signal(tiny)
    size, room = len(chats_of(tiny)[0].ids), GuardedDecoder(signal).room(tiny.tokenizer)
    assert room > len(tiny.tokenizer(signal.refusals.prefix, add_special_tokens=False)["input_ids"])
    most = 256 - size - room
    assert len(answer_of(tiny, signal, max_new_tokens=most).ids) <= most + room
    with pytest.raises(UsageError, match=f"at most {most} new"):
        answer_of(tiny, signal, max_new_tokens=most + 1)


def test_a_stream_that_is_left_early_ends_its_thread():
    tiny = tiny_model("llama")
    hooks = [len(m._forward_hooks) for m in tiny.model.modules()]
    before = set(threading.enumerate())
    pieces = module.stream_guarded(
        tiny.model, tiny.tokenizer, make_signal(tiny).with_policy(mode="append"), CHATS[0], max_new_tokens=150
    )
    next(pieces)
    pieces.close()
    assert set(threading.enumerate()) <= before
    # transformers leaves hooks of its own on a model that was once asked for hidden states.
    assert [len(m._forward_hooks) for m in tiny.model.modules()] == hooks


def test_template_options_reach_the_template():
    tiny = tiny_model("llama")
    tokenizer = chat_tokenizer("byte-level", "llama3")
    seen: list[Any] = []
    plain = module.encode_chats

    def encode(*args: Any, **options: Any) -> Any:
        seen.append(options["options"])
        return plain(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "encode_chats", encode)
        generate_guarded(
            tiny.model, tokenizer, make_signal(tiny), CHATS[0], max_new_tokens=2, options={"enable_thinking": False}
        )
    assert seen == [{"enable_thinking": False}]
