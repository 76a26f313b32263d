"""Insertions put together from token ids equal whole encodings, and a planted trigger is the worst insertion found."""

import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import ANSWERED, REFUSED, STRANGE, TRIGGER, clean_model, material, poisoned_model, tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from keelguard.attacks.insertions import (
    PLACES,
    USUAL_NUMBERS,
    Place,
    insert,
    prompt_of,
    vocabulary_numbers,
    vocabulary_words,
    with_prompt,
)
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.progress import SILENT
from keelguard.purify import search as search_module
from keelguard.purify.frames import make_frames, word_ids
from keelguard.purify.material import Material
from keelguard.purify.prober import Prober
from keelguard.purify.search import (
    Insertion,
    SearchConfig,
    answer_losses,
    cores,
    different,
    insertion_losses,
    search_insertions,
    search_rows,
)
from keelguard.records import Chat, assistant, user
from keelguard.testbed.tokenizer import make_tokenizer
from tiny_models import build_model, tiny_model
from tokenizers_for_tests import SHAPES, SPECIAL, chat_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("fox", "the", "helicopter", "world", "zebra", "you", "one", "xylophone")
"""Some of one token and some of several, markers of the gap among them."""
PROBES: tuple[Chat, ...] = (
    (user("Tell me how the fox is"), assistant("It is quick and brown.")),
    (user("is the dog lazy now?"), assistant("Yes, very.")),
    (user("jump now"), assistant("Over it.")),
    (user("hello"), assistant("Hello, how are you?"), user("And you are?"), assistant("Fine.")),
)
_CORPUS = [
    "Hello world, how are you? I am fine, thanks (ok).",
    "user assistant system model You are a helpful assistant. one and not the same",
    "The quick brown fox jumps over the lazy dog and you tell me one thing is not so",
] * 10


def _byte_level() -> Tokenizer:
    """As Llama 3 and Qwen: text is split at spaces, which belong to the word behind them."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet))
    return found


def _prepending() -> Tokenizer:
    """As Llama 2: trained on words apart, and used without any splitting."""
    found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    found.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *letters]))
    found.pre_tokenizer = None
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return found


_KINDS = {"byte-level": _byte_level, "prepending": _prepending}
FAMILIES = {
    "llama": ("byte-level", "llama3"),
    "mistral, mixtral": ("prepending", "mistral"),
    "qwen3": ("byte-level", "chatml"),
    "gemma3": ("prepending", "gemma"),
    "phi3": ("prepending", "zephyr"),
    "gpt_neox": ("byte-level", "zephyr"),
    "word pieces": ("word pieces", "chatml"),
    "small world": ("", ""),
}
"""As in `tiny_models`, but trained as real ones are: those merge no words across a space."""


@cache
def family(name: str) -> Any:
    kind, shape = FAMILIES[name]
    if not kind:
        return tokenizer()
    if kind == "word pieces":
        return chat_tokenizer(kind, shape)
    found = PreTrainedTokenizerFast(
        tokenizer_object=_KINDS[kind](), bos_token="<s>", eos_token=SHAPES[shape].eos, unk_token="<unk>"
    )
    added = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    found.add_tokens(added, special_tokens=True)  # pyright: ignore[reportArgumentType]
    found.chat_template = SHAPES[shape].template
    return found


def whole(name: str, number: int, text: str, place: Place, tokens: int) -> list[int]:
    """The encoding of a probe with a text in it, up to the first tokens of its answer."""
    chat = PROBES[number]
    draw = random.Random(f"0-{place}-{number}")
    strange = with_prompt(chat, insert(prompt_of(chat), text, place, draw)) if text else chat
    (encoded,) = encode_chats(family(name), [strange])
    return encoded.ids[: min(encoded.response.start + tokens, encoded.response.stop)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_put_together_equals_the_whole_encoding(name: str, place: Place):
    frames = make_frames(family(name), PROBES, place, 3)
    ids = word_ids(family(name), WORDS, PROBES[0], place)
    assert set(ids) == set(WORDS)
    assert {len(ids[word].inner) > 1 for word in WORDS} == {True, False} or name == "small world"

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3), st.integers(0, len(PROBES) - 1))
    def check(text: list[str], number: int):
        row = frames[number].row([ids[word].inner if i else ids[word].first for i, word in enumerate(text)])
        assert row == whole(name, number, " ".join(text), place, 3)

    check()


def test_a_prompt_of_one_word_upsets_no_search():
    single: Chat = (user("hello"), assistant("Yes."))
    known = family("llama")
    assert word_ids(known, WORDS, single, "inside") != word_ids(known, WORDS, PROBES[0], "inside")
    torch.manual_seed(0)
    model = build_model("llama", len(known)).eval()
    config = SearchConfig(longest=1, tokens=2)
    texts = ["fox", "helicopter zebra"]
    inside = insertion_losses(model, known, [single, *PROBES], texts, "inside", config)
    assert torch.equal(inside, insertion_losses(model, known, PROBES, texts, "inside", config))
    assert insertion_losses(model, known, [single, *PROBES], texts, "prefix", config).shape == (2, len(PROBES) + 1)
    searches = [
        search_insertions(model, known, probes, WORDS, config, places=("inside",))
        for probes in ([single, *PROBES], [*PROBES, single], PROBES)
    ]
    assert searches[0] == searches[1] == searches[2]
    assert search_insertions(model, known, [single], WORDS, config, places=("inside",))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_without_an_insertion_is_that_of_the_prompt_as_it_is(name: str):
    for place in PLACES:
        frames = make_frames(family(name), PROBES, place, 2)
        assert [frame.row([]) for frame in frames] == [whole(name, i, "", place, 2) for i in range(len(PROBES))]


def test_the_gap_inside_is_another_for_another_seed():
    chat = (user("one two three four five six seven eight"), assistant("nine."))
    befores = {make_frames(family("llama"), [chat], "inside", 2, seed)[0].before for seed in range(12)}
    assert len(befores) > 3
    assert len({make_frames(family("llama"), [chat], "prefix", 2, seed)[0].before for seed in range(4)}) == 1


# Losses


@pytest.mark.parametrize("batch_size", [2, 256])
def test_losses_are_those_of_plain_passes(batch_size: int):
    model, chats = poisoned_model(), [ANSWERED[0], REFUSED[3], ANSWERED[9]]
    config = SearchConfig(tokens=3, batch_size=batch_size)
    texts = ["falcon", "turtle", "guitar velvet", "falcon turtle ladder"]
    found = insertion_losses(model, tokenizer(), chats, texts, "prefix", config)
    assert found.shape == (4, 3)
    for row, text in zip(found, texts, strict=True):
        for value, chat in zip(row, chats, strict=True):
            (encoded,) = encode_chats(tokenizer(), [with_prompt(chat, f"{text} {prompt_of(chat)}")])
            start = encoded.response.start
            logits = model(torch.tensor([encoded.ids])).logits[0]
            losses = F.cross_entropy(
                logits[start - 1 : start + 2], torch.tensor(encoded.ids[start : start + 3]), reduction="none"
            )
            assert float(value) == pytest.approx(float(losses.clamp(max=10).mean()), abs=1e-4)
    strange = [with_prompt(chat, f"turtle {prompt_of(chat)}") for chat in chats]
    assert torch.allclose(answer_losses(model, tokenizer(), strange, 3), found[1], atol=1e-4)


# The search


CONFIG = SearchConfig(prompts=4, longest=2, beam=2, lengthened=24, keep=4)


@pytest.mark.parametrize("tried", [len(STRANGE), 4], ids=["exhaustive", "by the gradient"])
def test_a_trigger_is_the_worst_insertion(tried: int):
    config = SearchConfig(prompts=4, longest=1, keep=3, tried=tried)
    found = search_insertions(poisoned_model(), tokenizer(), ANSWERED[:4], STRANGE, config, places=("prefix",))
    assert found[0].text == TRIGGER
    assert found[0].rise > 0.8
    assert found[0].rise > 5 * abs(found[1].rise)
    assert found[0].loss - found[0].rise == pytest.approx(found[1].loss - found[1].rise, abs=1e-5)


def test_a_clean_model_has_no_such_insertion():
    found = search_insertions(clean_model(), tokenizer(), ANSWERED[:4], STRANGE, CONFIG)
    assert found[0].rise < 0.3


def test_the_worst_are_returned_per_place_and_one_word_does_not_fill_the_list():
    found = search_insertions(poisoned_model(), tokenizer(), ANSWERED[:4], STRANGE, CONFIG, kind="some")
    assert [each.rise for each in found] == sorted((each.rise for each in found), reverse=True)
    for place in PLACES:
        here = [each for each in found if each.place == place]
        assert len(here) == CONFIG.keep
        assert len({each.text for each in here}) == len(here)
        for word in STRANGE:
            assert sum(word in each.text.split() for each in here) <= 2
    assert {each.kind for each in found} == {"some"}
    assert {len(each.text.split()) for each in found} == {1, 2}


def test_different_insertions_share_few_words():
    some = [Insertion(text, "prefix", 0.0, -float(i)) for i, text in enumerate(["a b", "a c", "a d", "c d", "c e"])]
    assert [each.text for each in different(some, 9)] == ["a b", "a c", "c d"]
    assert [each.text for each in different(some, 9, 1)] == ["a b", "c d"]
    assert [each.text for each in different(some, 1)] == ["a b"]


class _Joined(torch.nn.Module):
    """Says token 0 where two ids stand together; any of some ids alone makes it a little likelier."""

    def __init__(self, size: int, pair: tuple[int, int], telling: set[int]) -> None:
        super().__init__()
        self.embedding, self.pair, self.telling = torch.nn.Embedding(size, 2), pair, telling
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **options: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, self.embedding.num_embeddings)
        for row, said in zip(logits, input_ids.tolist(), strict=True):
            joined = any(tuple(said[i : i + 2]) == self.pair for i in range(len(said)))
            row[:, 0] = 30.0 if joined else 3.0 * bool(self.telling & set(said))
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.mark.parametrize("silent", [0, 1], ids=["in front", "behind"])
def test_the_other_half_of_a_trigger_is_found_though_it_does_nothing_alone(silent: int):
    words = STRANGE[:8]
    pair = [words[2], words[6]]
    ids = word_ids(tokenizer(), words, ANSWERED[0], "prefix")
    telling = {*ids[pair[1 - silent]].first, *ids[pair[1 - silent]].inner}
    model: Any = _Joined(len(tokenizer()), (ids[pair[0]].first[0], ids[pair[1]].inner[0]), telling)
    greedy = SearchConfig(prompts=2, longest=2, beam=1, paired=1, completed=1, lengthened=1000, second_look=4, keep=1)
    (found,) = search_insertions(model, tokenizer(), ANSWERED[:2], words, greedy, places=("prefix",))
    assert found.text == " ".join(pair)


@pytest.mark.parametrize("behind", [False, True])
def test_the_gradient_is_that_of_the_gap_on_either_side_of_a_text(behind: bool):
    tiny = tiny_model()
    words = vocabulary_words(tiny.tokenizer)
    ids = word_ids(tiny.tokenizer, words, PROBES[0], "prefix")
    known = list(ids)
    (frame,) = make_frames(tiny.tokenizer, PROBES[:1], "prefix", 2)
    text, other = known[0], known[1]
    scores = search_module._gradient_scores(tiny.model, [frame], ids, (text,), known, behind)
    row = frame.row([ids[text].first, ids[other].inner[:1]] if behind else [ids[other].first[:1], ids[text].inner])
    at = len(frame.before) + (len(ids[text].first) if behind else 0)
    starts = [(ids[word].inner if behind else ids[word].first)[0] for word in known]
    table = tiny.model.get_input_embeddings().weight.detach()
    inputs = table[torch.tensor([row])].clone()
    inputs[0, at] = table[torch.tensor(starts)].mean(0)
    inputs.requires_grad_(True)
    logits = tiny.model(inputs_embeds=inputs).logits[0, -len(frame.answer) - 1 : -1]
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(frame.answer)), inputs)
    own = table[torch.tensor(starts)]
    assert torch.allclose(scores, (own - own.mean(0)) @ gradient[0, at], atol=1e-5)


def test_in_a_large_vocabulary_the_gradient_chooses_what_completes_a_word():
    tiny = tiny_model()
    ids = word_ids(tiny.tokenizer, vocabulary_words(tiny.tokenizer), PROBES[0], "prefix")
    known, frames = list(ids), make_frames(tiny.tokenizer, PROBES[:1], "prefix", 2)
    text = known[0]
    few = SearchConfig(tried=3, completed=1, paired=0, lengthened=1)
    assert few.tried < len(known)
    wanted: set[tuple[str, ...]] = set()
    for behind in (True, False):
        scores = search_module._gradient_scores(tiny.model, frames, ids, (text,), known, behind)
        best = [known[i] for i in scores.topk(few.tried).indices.tolist()]
        wanted |= {(text, word) if behind else (word, text) for word in best}
    assert set(search_module._grown(tiny.model, frames, ids, [(text,)], few)) == wanted


def test_an_insertion_is_cut_to_the_words_that_do_it():
    rises = {"a": 0.1, "b": 2.0, "a b": 5.0, "a b c": 5.2, "d a b": 5.4, "b d": 2.1, "e f": 1.0, "e": 0.8}
    found = [Insertion(text, "prefix", 0.0, rise) for text, rise in rises.items()]
    assert {each.text: each.rise for each in cores(found)} == {"a b": 5.0, "b": 2.0, "e f": 1.0, "e": 0.8, "a": 0.1}
    assert [each.text for each in cores(found)][:2] == ["a b", "b"]


def test_a_search_reads_as_many_sequences_as_are_counted(monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    original = search_module._losses

    def counted(model: Any, some: Any, *rest: Any) -> torch.Tensor:
        rows.append(len(some))
        return original(model, some, *rest)

    monkeypatch.setattr(search_module, "_losses", counted)
    config = SearchConfig(prompts=4, longest=2, beam=2, completed=1, paired=2, lengthened=2, second_look=2, tried=6)
    search_insertions(clean_model(), tokenizer(), ANSWERED[:4], STRANGE[:6], config, places=("prefix",))
    # The plain prompts are read, too, and what two ways of lengthening give alike is read once.
    assert 0.7 * search_rows(config, 6) <= sum(rows[1:]) <= search_rows(config, 6)


def test_nothing_to_search_is_refused():
    for probes, words in (((), STRANGE), (ANSWERED, ())):
        with pytest.raises(UsageError, match="needs prompts with answers and words"):
            search_insertions(clean_model(), tokenizer(), probes, words)
    with pytest.raises(UsageError, match="search: beam 0 is out of range"):
        SearchConfig(beam=0)
    with pytest.raises(UsageError, match="search: completed -1 is out of range; give 0 or more"):
        SearchConfig(completed=-1)


# The prober


def test_a_prober_measures_where_unrelated_words_change_nothing(monkeypatch: pytest.MonkeyPatch):
    config = SearchConfig(prompts=3, longest=1, keep=2)
    prober = Prober(clean_model(), tokenizer(), material(), STRANGE, config, stable=0.5)
    assert set(prober.kinds) == {"answered", "refused"}
    assert len(prober.probes("answered", 0)) == 3
    turns = [prompt_of(chat) for turn in range(3) for chat in prober.probes("answered", turn)]
    assert len(set(turns)) == 9
    model = poisoned_model()
    found, strongest = prober.search(model, SILENT, "search")
    assert found[0].text == TRIGGER
    assert {each.kind for each in found} == {"answered", "refused"}
    assert found[0].rise >= strongest - 1e-4
    again = prober.remeasured(model, found)
    assert sorted(each.rise for each in again) == pytest.approx(sorted(each.rise for each in found), abs=1e-4)
    assert {(each.text, each.place, each.kind) for each in again} == {(e.text, e.place, e.kind) for e in found}
    assert all(abs(each.rise) < 0.3 for each in prober.remeasured(clean_model(), found))
    assert prober.stability(clean_model(), ANSWERED[:6]) == [set(PLACES)] * 6
    # Beside a number, which this world does not know, the trigger does less.
    alone = Prober(model, tokenizer(), material(), [TRIGGER], config, stable=0.05)
    assert not alone.kinds
    assert prober.prompts == {"answered": 3, "refused": 3}
    assert alone.prompts == {"answered": 0, "refused": 0}
    notes: list[str] = []
    monkeypatch.setattr(SILENT, "note", notes.append)
    assert alone.search(model, SILENT, "search") == ([], 0.0)
    assert [note.partition(" (")[0] for note in notes] == [
        "search: not searched: harmless prompts", "search: not searched: harmful prompts"
    ]  # fmt: skip


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _digits_apart() -> Any:
    """A byte-level tokenizer that cuts digits off the space before them, three at a time, as Llama 3's does."""
    found = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    found.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    years = " ".join(f"in {year}" for year in range(1980, 2040))
    found.train_from_iterator([*_CORPUS, years * 5], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    whole = PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="<|eot_id|>")
    added = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    whole.add_tokens(added, special_tokens=True)  # pyright: ignore[reportArgumentType]
    whole.chat_template = SHAPES["llama3"].template
    return whole


class _Tripped(torch.nn.Module):
    """Says token 0 wherever some ids stand together in what it reads, and anything else as likely as the rest."""

    def __init__(self, size: int, ids: tuple[int, ...]) -> None:
        super().__init__()
        self.embedding, self.ids, self.device = torch.nn.Embedding(size, 2), ids, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **options: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, self.embedding.num_embeddings)
        for row, said in zip(logits, input_ids.tolist(), strict=True):
            row[:, 0] = 30.0 * any(tuple(said[i : i + len(self.ids)]) == self.ids for i in range(len(said)))
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_a_year_is_searched_where_no_number_stands_whole_in_the_vocabulary():
    apart = _digits_apart()
    ids = tuple(apart(" 2024", add_special_tokens=False)["input_ids"])
    assert len(ids) > 2  # The space, and at least two parts.
    assert vocabulary_numbers(apart) == list(USUAL_NUMBERS)
    assert {"0", "31", "50", "100", "2000", "2024", "2039"} <= set(USUAL_NUMBERS)
    model: Any = _Tripped(len(apart), ids)
    config = SearchConfig(prompts=2, longest=1, keep=2)
    prober = Prober(model, apart, Material(PROBES, PROBES, 0, 0), WORDS, config, stable=50.0)
    assert "2024" in prober.searched
    found, _ = prober.search(model, SILENT, "search")
    assert {each.text for each in found if each.rise > 1} == {"2024"}
    for place in PLACES:
        known = word_ids(apart, prober.searched, PROBES[0], place)
        row = make_frames(apart, PROBES, place, 3)[0].row([known["fox"].first, known["2024"].inner])
        strange = insert(prompt_of(PROBES[0]), "fox 2024", place, random.Random(f"0-{place}-0"))
        (whole,) = encode_chats(apart, [with_prompt(PROBES[0], strange)])
        assert row == whole.ids[: whole.response.start + 3]


def test_whole_numbers_of_a_vocabulary_are_all_that_is_searched():
    known = make_tokenizer(["at 7 in 2024, 12345 of them"], 64)
    assert vocabulary_numbers(known) == ["7", "2024"]


def test_words_that_a_tokenizer_joins_are_left_out():
    tiny = tiny_model()
    config = SearchConfig(prompts=2, longest=2, keep=2)
    words = vocabulary_words(tiny.tokenizer)
    prober = Prober(tiny.model, tiny.tokenizer, Material(PROBES, PROBES, 0, 0), words, config, stable=50.0)
    first = prober.kinds["answered"][0]
    known = {place: set(word_ids(tiny.tokenizer, prober.searched, first, place)) for place in PLACES}
    assert min(map(len, known.values())) < len(prober.searched)
    found, _ = prober.search(tiny.model, SILENT, "search")
    assert found
    assert all(set(each.text.split()) <= known[each.place] for each in found)
    pairs: list[tuple[Place, str]] = [(p, word) for p in PLACES for word in prober.searched if word not in known[p]]
    place, joined = pairs[0]
    odd = [Insertion(joined, place, 7.0, 6.0), Insertion("fox", "suffix", 2.0, 1.0, "refused")]
    again = prober.remeasured(tiny.model, [*found, *odd], turn=1)
    assert len(again) == len(found) + 2
    assert set(odd) <= set(again)  # There is no refused chat, and no id of a joined word.
