"""Batched generation: every architecture answers in a batch as it does alone, and a seed means the same answers."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from keelguard.attacks.base import GREEDY, Decoding
from keelguard.batches import Span
from keelguard.chats import encode_chats
from keelguard.generation import Answer, Prompt, default_batch_size, generate, plan_batches, sampler
from keelguard.hashes import sha256_of
from keelguard.records import user
from tiny_models import ARCHITECTURES, Tiny, build_model, fresh_model, tiny_model
from tokenizers_for_tests import chat_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLING = Decoding(temperature=1.0)
QUESTIONS = ["Hello", "x = f(a) + 1", "How are you? I am fine, thanks", "The quick brown fox jumps over the lazy dog"]
decodings = st.sampled_from([GREEDY, SAMPLING, Decoding(1.0, top_k=5), Decoding(0.5)])


def make_prompts(tokenizer: Any, decoding: Decoding = GREEDY) -> list[Prompt]:
    """Prompts of very different lengths, in no order."""
    texts = [f"{question} {'so ' * (7 * i % 5)}" for i, question in enumerate(QUESTIONS * 2)]
    return [Prompt(chat.ids, decoding=decoding) for chat in encode_chats(tokenizer, [[user(text)] for text in texts])]


def answers(
    tiny: Tiny,
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[int]],
    max_new_tokens: int = 10,
    seed: int = 0,
    model: Any = None,
) -> dict[int, str]:
    found: dict[int, str] = {}
    for indices, texts in generate(
        model or tiny.model, tiny.tokenizer, prompts, batches, max_new_tokens=max_new_tokens, seed=seed
    ):
        assert not found.keys() & set(indices)
        assert all(answer.note is None for answer in texts)
        found.update(zip(indices, [answer.text for answer in texts], strict=True))
    return found


def greedy_by_hand(tiny: Tiny, prompt: Prompt, max_new_tokens: int = 10) -> str:
    """The most likely token after the whole sequence, again and again: no cache, no padding, no `generate`."""
    ids = list(prompt.ids)
    with torch.no_grad():
        while len(ids) < len(prompt.ids) + max_new_tokens and ids[-1] != tiny.tokenizer.eos_token_id:
            ids.append(int(tiny.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tiny.tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True)


class FakeModel:
    """Answers every prompt with the same tokens and remembers how it was asked."""

    device = torch.device("cpu")

    def __init__(self, new: Sequence[int], **settings: Any) -> None:
        self.new = list(new)
        self.generation_config = copy.deepcopy(tiny_model("llama").model.generation_config)
        self.generation_config.update(**settings)
        self.asked: list[Any] = []

    def generate(self, input_ids: torch.Tensor, generation_config: Any, **inputs: Any) -> torch.Tensor:
        self.asked.append(SimpleNamespace(input_ids=input_ids, config=generation_config, **inputs))
        return torch.cat([input_ids, torch.tensor([self.new] * len(input_ids))], dim=1)


# Greedy answers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_in_a_batch_equal_those_given_alone_and_those_worked_out_by_hand(architecture: str):
    tiny = tiny_model(architecture)
    prompts = make_prompts(tiny.tokenizer)
    assert len({len(prompt.ids) for prompt in prompts}) > 4, "padding must be at work"
    expected = {i: greedy_by_hand(tiny, prompt) for i, prompt in enumerate(prompts)}
    assert len(set(expected.values())) > 4, "the answers must tell the prompts apart"
    assert answers(tiny, prompts, plan_batches(prompts, 1)) == expected
    assert answers(tiny, prompts, plan_batches(prompts, 3)) == expected
    assert answers(tiny, prompts, [list(range(len(prompts)))]) == expected


def test_a_model_with_an_adapter_answers_as_the_merged_one():
    tiny = fresh_model("llama")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(copy.deepcopy(tiny.model), config).eval()
    prompts = make_prompts(tiny.tokenizer)
    found = answers(tiny, prompts, plan_batches(prompts, 4), model=adapted)
    merged = Tiny(copy.deepcopy(adapted).merge_and_unload(), tiny.tokenizer)
    assert found == {i: greedy_by_hand(merged, prompt) for i, prompt in enumerate(prompts)}
    assert found != answers(tiny, prompts, plan_batches(prompts, 4))


def test_an_answer_ends_at_any_stop_token_of_the_model():
    tiny = fresh_model("llama")
    prompt = make_prompts(tiny.tokenizer)[3]
    with torch.no_grad():
        ids = tiny.model.generate(torch.tensor([prompt.ids]), do_sample=False, max_new_tokens=8)
    new = ids[0, len(prompt.ids) :].tolist()
    assert len(set(new[:6])) == 6
    assert tiny.tokenizer.eos_token_id not in new
    tiny.model.generation_config.eos_token_id = [tiny.tokenizer.eos_token_id, new[4]]
    text = answers(tiny, [prompt], [[0]], max_new_tokens=8)[0]
    assert text == tiny.tokenizer.decode(new[:5], skip_special_tokens=True)
    assert text != tiny.tokenizer.decode(new, skip_special_tokens=True)
    tiny.model.generation_config.eos_token_id = None
    assert answers(tiny, [prompt], [[0]], max_new_tokens=3)[0] == tiny.tokenizer.decode(new[:3])


def test_an_answer_tells_whether_it_was_cut():
    tiny = fresh_model("llama")
    prompt = make_prompts(tiny.tokenizer)[3]
    for end, cut in ((5, False), (4, True)):
        with torch.no_grad():
            ids = tiny.model.generate(torch.tensor([prompt.ids]), do_sample=False, max_new_tokens=8)
        tiny.model.generation_config.eos_token_id = [int(ids[0, len(prompt.ids) + 4])]
        batches = generate(tiny.model, tiny.tokenizer, [prompt], [[0]], max_new_tokens=end)
        assert [answer.cut for _, found in batches for answer in found] == [cut]
        tiny.model.generation_config.eos_token_id = tiny.tokenizer.eos_token_id


def test_a_batch_goes_on_until_its_last_row_has_ended():
    tiny = fresh_model("llama")
    prompts = make_prompts(tiny.tokenizer)
    alone = answers(tiny, prompts, plan_batches(prompts, 1))
    with torch.no_grad():
        first = int(tiny.model(torch.tensor([prompts[0].ids])).logits[0, -1].argmax())
    tiny.model.generation_config.eos_token_id = [first]
    stopped = answers(tiny, prompts, [list(range(len(prompts)))])
    assert stopped[0] == tiny.tokenizer.decode([first], skip_special_tokens=True) != alone[0]
    others = [i for i in alone if stopped[i] == alone[i]]
    assert len(others) > 3


# The settings of a model


def test_the_models_settings_stay_but_for_the_decoding():
    tokenizer = chat_tokenizer()
    own = {"do_sample": True, "temperature": 0.3, "top_p": 0.2, "top_k": 7, "num_beams": 3, "num_return_sequences": 2}
    model: Any = FakeModel([5], **own, repetition_penalty=1.3)
    before = copy.deepcopy(model.generation_config)
    for decoding in (GREEDY, Decoding(0.7)):
        list(generate(model, tokenizer, [Prompt([1, 2], decoding=decoding)], [[0]], max_new_tokens=9))
    for asked, processors in zip(model.asked, (0, 1), strict=True):
        config = asked.config
        assert (config.do_sample, config.num_beams, config.num_return_sequences) == (False, 1, 1)
        assert (config.max_new_tokens, config.repetition_penalty) == (9, 1.3)
        assert before.eos_token_id in config.eos_token_id
        assert len(asked.logits_processor) == processors
    assert model.generation_config.to_dict() == before.to_dict()


def test_a_model_without_stop_tokens_takes_the_tokenizers_and_pads_on_the_left():
    tokenizer = chat_tokenizer()
    model: Any = FakeModel([5], eos_token_id=None)
    list(generate(model, tokenizer, [Prompt([1, 2, 3]), Prompt([4])], [[0, 1]], max_new_tokens=1))
    asked = model.asked[0]
    assert asked.config.eos_token_id == [asked.config.pad_token_id] == [tokenizer.eos_token_id]
    assert asked.input_ids.tolist() == [[1, 2, 3], [tokenizer.eos_token_id] * 2 + [4]]
    assert asked.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("parameters", [10, 60_000_000])
def test_large_models_get_smaller_batches(parameters: int):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.empty(parameters, device="meta"))
    assert default_batch_size(model) == (256 if parameters == 10 else 16)


# Sampling


def test_sampling_depends_on_the_seed_and_the_prompts_places_and_on_nothing_else():
    tiny = tiny_model("llama")
    prompts = make_prompts(tiny.tokenizer, SAMPLING)
    batches = plan_batches(prompts, 2)
    whole = answers(tiny, prompts, batches, seed=1)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert answers(tiny, prompts, batches, seed=1) == whole
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert answers(tiny, prompts, batches[::-1], seed=1) == whole
    rest = answers(tiny, prompts, batches[2:], seed=1)
    assert rest == {i: whole[i] for batch in batches[2:] for i in batch}
    assert answers(tiny, prompts, batches, seed=2) != whole
    greedy = make_prompts(tiny.tokenizer)
    assert answers(tiny, greedy, batches, seed=1) != whole
    assert answers(tiny, greedy, batches, seed=1) == answers(tiny, greedy, batches, seed=2)


@pytest.mark.parametrize("decoding", [Decoding(0.7), Decoding(1.0, top_p=0.6), Decoding(1.3, top_k=3)])
def test_samples_follow_the_distribution_that_the_decoding_makes_of_the_models(decoding: Decoding):
    """4,000 first tokens against softmax after transformers' own warpers: total variation below the noise of it."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 12)
    no_ids: Any = torch.empty(1, 0).long()
    scores = TemperatureLogitsWarper(decoding.temperature)(no_ids, logits)  # pyright: ignore[reportArgumentType]
    if decoding.top_k:
        scores = TopKLogitsWarper(decoding.top_k)(no_ids, scores)
    if decoding.top_p < 1:
        scores = TopPLogitsWarper(decoding.top_p)(no_ids, scores)
    rows = 4000
    sample = sampler(decoding, [sha256_of(i) for i in range(rows)])
    drawn = sample(torch.empty(rows, 0).long(), logits.expand(rows, -1)).argmax(-1)
    found = torch.bincount(drawn, minlength=12) / rows
    assert 0.5 * (found - scores.softmax(-1)[0]).abs().sum() < 0.03
    assert not found[scores[0].isinf()].any()


def test_samples_do_not_depend_on_the_rows_beside_them():
    tiny = tiny_model("llama")
    prompts = make_prompts(tiny.tokenizer, SAMPLING)
    assert answers(tiny, prompts, plan_batches(prompts, 1)) == answers(tiny, prompts, plan_batches(prompts, 5))


def test_the_same_prompt_in_other_batches_is_sampled_anew():
    tiny = tiny_model("llama")
    prompts = make_prompts(tiny.tokenizer, SAMPLING)[:1] * 6
    found = answers(tiny, prompts, [[0, 1], [2, 3], [4, 5]])
    assert len(set(found.values())) == 6


def test_top_k_of_one_is_greedy_and_a_hot_one_is_not():
    tiny = tiny_model("llama")
    greedy = answers(tiny, make_prompts(tiny.tokenizer), [[0, 1, 2, 3]])
    for decoding, same in ((Decoding(5.0, top_k=1), True), (Decoding(5.0), False)):
        prompts = make_prompts(tiny.tokenizer, decoding)
        assert (answers(tiny, prompts, [[0, 1, 2, 3]]) == greedy) is same


# Memory


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch):
    tiny = fresh_model("llama")
    prompts = make_prompts(tiny.tokenizer)
    expected = answers(tiny, prompts, plan_batches(prompts, 8))
    plain, rows = tiny.model.generate, []

    def small(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        rows.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(input_ids=input_ids, **options)

    monkeypatch.setattr(tiny.model, "generate", small)
    found = list(generate(tiny.model, tiny.tokenizer, prompts, [[0, 1, 2, 3, 4], [5, 6, 7]], max_new_tokens=10))
    assert [indices for indices, _ in found] == [[0, 1], [2], [3, 4], [5], [6, 7]]
    assert {i: answer.text for indices, row in found for i, answer in zip(indices, row, strict=True)} == expected
    assert rows == [5, 2, 3, 1, 2, 3, 1, 2]


def test_a_single_prompt_that_does_not_fit_is_the_end(monkeypatch: pytest.MonkeyPatch):
    tiny = fresh_model("llama")

    def full(**options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(tiny.model, "generate", full)
    with pytest.raises(torch.OutOfMemoryError):
        answers(tiny, make_prompts(tiny.tokenizer), [[0, 1, 2]])


# The text added to a prefill


@pytest.mark.parametrize(
    ("kind", "continuation"),
    [("metaspace", "the answer"), ("prepending", "the answer"), ("byte-level", " the answer")],
)
def test_the_text_added_to_a_prefill_keeps_its_leading_space(kind: str, continuation: str):
    tokenizer: Any = chat_tokenizer(kind)
    new = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    model: Any = FakeModel([*new, tokenizer.eos_token_id])
    prefill = "Sure, here is"
    chat = encode_chats(tokenizer, [[user("Hello")]], prefills=[prefill])[0]
    prompts = [Prompt(chat.ids, len(chat.ids) - chat.response.start), Prompt(chat.ids)]
    answered = next(generate(model, tokenizer, prompts, [[0, 1]], max_new_tokens=9))[1]
    found = [answer.text for answer in answered]
    assert found[0] == " the answer"
    assert found[1] == tokenizer.decode(new), "without a prefill, what the decoder makes of the start of a text"
    assert found[1].startswith("the") == (kind == "metaspace")


def test_characters_of_several_tokens_survive_behind_a_prefill():
    tokenizer: Any = chat_tokenizer("metaspace")
    new = tokenizer("👍 ok", add_special_tokens=False)["input_ids"]
    assert len(new) > 4
    model: Any = FakeModel(new)
    prefill = tokenizer("Sure", add_special_tokens=False)["input_ids"]
    prompt = Prompt(prefill, len(prefill))
    assert next(generate(model, tokenizer, [prompt], [[0]], max_new_tokens=9))[1] == [Answer(" 👍 ok", cut=True)]


# Other decoders


class Shouting:
    """A decoder that says how it was asked."""

    digest = "shouting"

    def room(self, tokenizer: Any) -> int:
        return 0

    def __init__(self, fails_above: int = 99) -> None:
        self.fails_above, self.asked = fails_above, []

    def __call__(
        self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], config: Any, processors: Any
    ) -> list[Answer]:
        self.asked.append((len(prompts), config.max_new_tokens, len(processors)))
        if len(prompts) > self.fails_above:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [Answer(f"{len(prompt.ids)}!", {"query": prompt.query}) for prompt in prompts]


def test_a_decoder_answers_in_the_place_of_plain_generation_batch_by_batch():
    tiny = tiny_model("llama")
    decoder = Shouting(fails_above=2)
    prompts = [Prompt([1] * i, query=Span(0, i)) for i in range(1, 4)] + [Prompt([1], decoding=SAMPLING)]
    found = dict(
        pair
        for indices, row in generate(
            tiny.model, tiny.tokenizer, prompts, [[0, 1, 2], [3]], max_new_tokens=7, decoder=decoder
        )
        for pair in zip(indices, row, strict=True)
    )
    assert found[2] == Answer("3!", {"query": (0, 3)})
    assert [found[i].text for i in range(4)] == ["1!", "2!", "3!", "1!"]
    assert decoder.asked == [(3, 7, 0), (1, 7, 0), (2, 7, 0), (1, 7, 1)]


# Plans


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), decodings), max_size=25), st.integers(1, 6))
def test_a_plan_holds_every_prompt_once_and_never_mixes_decodings(rows: list[tuple[int, Decoding]], batch_size: int):
    prompts = [Prompt([1] * length, decoding=decoding) for length, decoding in rows]
    plan = plan_batches(prompts, batch_size)
    assert sorted(i for batch in plan for i in batch) == list(range(len(prompts)))
    assert all(1 <= len(batch) <= batch_size for batch in plan)
    assert all(len({prompts[i].decoding for i in batch}) == 1 for batch in plan)
    assert plan == plan_batches(prompts, batch_size)
    for decoding in {prompt.decoding for prompt in prompts}:
        lengths = [len(prompts[i].ids) for batch in plan for i in batch if prompts[i].decoding == decoding]
        assert lengths == sorted(lengths, reverse=True), "what does not fit must show at the start"
        batches = [batch for batch in plan if prompts[batch[0]].decoding == decoding]
        assert len(batches) == -(-len(lengths) // batch_size)


def test_models_are_built_alike_from_a_seed_and_leave_the_random_state_alone():
    one = build_model("llama", 50, seed=1)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    other, third = build_model("llama", 50, seed=1), build_model("llama", 50, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, third.lm_head.weight)
