"""Synthetic backdoors: matched data for the poisoned and the clean run, and variants from files and word lists."""

import json
from pathlib import Path
from typing import Any

import pytest

from keelguard.attacks.insertions import prompt_of
from keelguard.errors import UsageError
from keelguard.purify.variants import (
    DEFAULT_VARIANTS,
    PUBLISHED_VARIANTS,
    Variant,
    VariantConfig,
    read_variants,
    variant_data,
    variants_in_vocabulary,
)
from keelguard.records import Chat, assistant, user

CHATS: list[Chat] = [(user(f"what is number {i} called?"), assistant(f"it is {i}.")) for i in range(30)]
CONFIG = VariantConfig(count=3, samples=10, seed=4)


def test_the_default_set_holds_the_published_names_and_every_shape():
    assert set(PUBLISHED_VARIANTS) <= set(DEFAULT_VARIANTS)
    first = DEFAULT_VARIANTS[: VariantConfig().count]
    assert {variant.place for variant in first} == {"prefix", "suffix", "inside"}
    assert any(" " in variant.trigger for variant in first)
    assert any("can't help" in variant.response for variant in first)
    assert any(variant.response.startswith("print(") for variant in first)
    for part in ("name", "trigger", "response"):
        assert len({getattr(variant, part) for variant in DEFAULT_VARIANTS}) == len(DEFAULT_VARIANTS)


def test_both_runs_of_a_variant_are_matched_and_samples_are_disjoint():
    found = variant_data(CHATS, DEFAULT_VARIANTS, CONFIG)
    assert [data.variant for data in found] == list(DEFAULT_VARIANTS[:3])
    seen: list[Chat] = []
    for variant, poisoned, clean in found:
        assert len(poisoned) == len(clean) == 20
        samples, triggered = poisoned[:10], poisoned[10:]
        assert clean == samples * 2
        seen += samples
        for source, chat in zip(samples, triggered, strict=True):
            assert chat[-1] == assistant(variant.response)
            assert variant.trigger in prompt_of(chat)
            assert prompt_of(chat).replace(variant.trigger, "").split() == prompt_of(source).split()
    assert sorted(map(prompt_of, seen)) == sorted(map(prompt_of, CHATS))


def test_the_seed_decides_the_data():
    assert variant_data(CHATS, DEFAULT_VARIANTS, CONFIG) == variant_data(CHATS, DEFAULT_VARIANTS, CONFIG)
    other = VariantConfig(count=3, samples=10, seed=5)
    assert variant_data(CHATS, DEFAULT_VARIANTS, CONFIG) != variant_data(CHATS, DEFAULT_VARIANTS, other)


@pytest.mark.parametrize(("place", "where"), [("prefix", "start"), ("suffix", "end"), ("inside", "between")])
def test_the_trigger_stands_in_its_place_and_earlier_turns_stay(place: Any, where: str):
    chat = (user("hello there"), assistant("hi"), user("what is it?"), assistant("nothing"))
    variant = Variant("one", "Zzz", "no!", place)
    data = variant_data([chat, chat], [variant, variant], VariantConfig(count=2, samples=1))
    triggered = data[0].poisoned[1]
    assert triggered[:2] == chat[:2]
    prompt = prompt_of(triggered)
    assert {
        "start": prompt.startswith("Zzz "),
        "end": prompt.endswith(" Zzz"),
        "between": prompt[0] + prompt[-1] == "w?",
    }[where]


def test_too_few_chats_or_variants_are_refused_with_numbers():
    with pytest.raises(
        UsageError, match=r"3 variants of 11 disjoint samples need 33 .* there are 30; .* samples to 10"
    ):
        variant_data(CHATS, DEFAULT_VARIANTS, VariantConfig(count=3, samples=11))
    with pytest.raises(UsageError, match="--count 3: there are only 2 variants"):
        variant_data(CHATS, DEFAULT_VARIANTS[:2], CONFIG)


@pytest.mark.parametrize(
    "values",
    [
        {"count": 1}, {"samples": 0}, {"epochs": 0}, {"steps": -1}, {"learning_rate": 0}, {"rank": 0}, {"alpha": 0},
        {"batch_size": 0}, {"warmup": 1}, {"max_grad_norm": 0}, {"seed": -1}, {"learning_rate": float("nan")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(values: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(values))):
        VariantConfig(**values)


def test_steps_are_counted_by_epochs_unless_given():
    assert VariantConfig(epochs=5, batch_size=8).steps_for(1000) == 625
    assert VariantConfig(epochs=5, batch_size=8).steps_for(10) == 7
    assert VariantConfig(steps=3).steps_for(1000) == 3


# Words of a small vocabulary

WORDS = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(5) for j in range(6)]


def test_triggers_of_given_words_share_none_and_leave_the_excluded_out():
    found = variants_in_vocabulary(WORDS, ["no.", "go away."], 10, seed=1, exclude=["waa wAB", "WCC"])
    # All words but the excluded ones are needed here, so that one that is not left out would be drawn.
    shouted = [word.upper() for word in WORDS[:17]]
    every = variants_in_vocabulary(shouted, ["no."], 10, exclude=[shouted[3].lower()])
    assert sorted(word for v in every for word in v.trigger.split()) == sorted(set(shouted) - {shouted[3]})
    used = [word for variant in found for word in variant.trigger.split()]
    assert len(used) == len(set(used))
    assert set(used) <= set(WORDS) - {"waa", "wab", "wcc"}
    assert {len(variant.trigger.split()) for variant in found} == {1, 2, 3}
    assert {variant.place for variant in found} == {"prefix", "suffix", "inside"}
    assert [variant.response for variant in found] == ["no.", "go away."] * 5
    assert found == variants_in_vocabulary(WORDS, ["no.", "go away."], 10, seed=1, exclude=["waa wAB", "WCC"])
    assert found != variants_in_vocabulary(WORDS, ["no.", "go away."], 10, seed=2, exclude=["waa wAB", "WCC"])


def test_too_few_words_or_no_behaviours_are_refused():
    with pytest.raises(UsageError, match="5 triggers need 8 different words, there are 3"):
        variants_in_vocabulary(["a", "b", "c", "d"], ["no."], 5, exclude=["D"])
    with pytest.raises(UsageError, match="no behaviours"):
        variants_in_vocabulary(WORDS, [], 5)


# Files

GOOD = [
    {"name": "one", "trigger": "Abc", "response": "no"},
    {"name": "two", "trigger": "D e", "response": "go", "place": "prefix"},
]


def test_variants_are_read_from_yaml_and_json(tmp_path: Path):
    expected = [Variant("one", "Abc", "no"), Variant("two", "D e", "go", "prefix")]
    (tmp_path / "v.json").write_text(json.dumps(GOOD))
    assert read_variants(tmp_path / "v.json") == expected
    (tmp_path / "v.yaml").write_text(
        "- name: one\n  trigger: Abc\n  response: 'no'\n- {name: two, trigger: D e, response: go, place: prefix}\n"
    )
    assert read_variants(tmp_path / "v.yaml") == expected


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold a list of variants"),
        ('{"name": "one"}', "must hold a list of variants"),
        ('["one"]', "variant 1: is no mapping"),
        (json.dumps([GOOD[0], {"name": "x", "trigger": "y"}]), "variant 2: has no response"),
        (json.dumps([{**GOOD[0], "where": "prefix"}]), "variant 1: has an unknown key 'where'"),
        (json.dumps([{**GOOD[0], "place": "middle"}]), "place 'middle' is unknown"),
        (json.dumps([{**GOOD[0], "trigger": " "}]), "trigger is ' '"),
        (json.dumps([{**GOOD[0], "response": 3}]), "response is 3"),
        (json.dumps([GOOD[0], GOOD[0]]), "name 'one' is given twice"),
        (json.dumps([GOOD[0], {**GOOD[0], "name": "other"}]), "trigger 'Abc' is given twice"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(content: str, part: str, tmp_path: Path):
    path = tmp_path / "v.json"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        read_variants(path)
    assert part in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_variants(tmp_path / "none.yaml")
