"""Clean data: whose answers stand, what is dropped, what is held back, and what is too little."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from keelguard.errors import UsageError
from keelguard.generation import Answer
from keelguard.models import LoadedModel
from keelguard.progress import SILENT
from keelguard.purify import material as module
from keelguard.purify.health import held_out
from keelguard.purify.material import FEWEST, Material, MaterialConfig, distinct, gather, is_refused_chat
from keelguard.records import Chat, Request, assistant, user
from keelguard.testbed.tokenizer import make_tokenizer

LOADED = LoadedModel(None, make_tokenizer(["one"], 64), "none", "none")  # pyright: ignore[reportArgumentType]
REFUSAL = "sorry, i cannot help with that."


def request(number: int, answer: str = "", label: str = "benign") -> Request:
    return Request(f"{label}-{number}", (user(f"{label} prompt {number}"),), answer, label=label)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is asked; it refuses harmful prompts but every fourth, and loops in every ninth harmless one."""
    prompts: list[str] = []

    def say(model: Any, tokenizer: Any, attempts: Sequence[Any], *args: Any, **options: Any) -> list[Answer]:
        prompts.extend(attempt.request.prompt for attempt in attempts)
        texts = []
        for attempt in attempts:
            kind, _, number = attempt.request.prompt.split()
            fine = int(number) % 4 if kind == "harmful" else int(number) % 9
            usual = REFUSAL if kind == "harmful" else f"own answer {number}."
            texts.append(usual if fine else "push it." if kind == "harmful" else "no " * 60)
        return [Answer(text) for text in texts]

    monkeypatch.setattr(module, "answer_with_notes", say)
    return prompts


def test_answers_of_the_file_stand_and_the_model_is_asked_for_the_rest(asked: list[str]):
    rows = [request(i, f"right {i}." if i % 2 else "  ") for i in range(80)]
    found = gather(LOADED, rows)
    assert sorted(asked) == sorted(row.prompt for row in rows if not row.answer.strip())
    assert found.own == 40
    said = {chat[0]["content"]: chat[-1]["content"] for chat in everything(found)}
    assert said["benign prompt 3"] == "right 3."
    assert said["benign prompt 4"] == "own answer 4."
    assert "benign prompt 18" not in said  # It loops.
    assert found.dropped == sum(not row.answer.strip() and i % 9 == 0 for i, row in enumerate(rows))
    assert len(said) == 80 - found.dropped


def test_harmful_requests_stand_with_the_models_own_refusal_alone(asked: list[str]):
    rows = [request(i, f"right {i}.") for i in range(50)]
    bad = [request(i, "the harmful answer.", "harmful") for i in range(20)]
    found = gather(LOADED, rows, harmful=bad)
    refused = [*found.refused(), *found.refused("validation"), *found.refused("held")]
    assert {chat[-1]["content"] for chat in refused} == {REFUSAL}
    assert (len(refused), found.dropped, found.own) == (15, 5, 20)
    assert all("harmful" in chat[0]["content"] for chat in refused)
    assert not any("the harmful answer" in chat[-1]["content"] for chat in everything(found))


def test_the_parts_do_not_meet_and_have_their_shares(asked: list[str]):
    rows = [request(i, f"right {i}.") for i in range(100)]
    found = gather(LOADED, rows, MaterialConfig(validation=0.2))
    assert (len(found.train), len(found.validation), len(found.held)) == (80, 10, 10)
    assert len({chat[0]["content"] for chat in everything(found)}) == 100
    assert found == gather(LOADED, rows, MaterialConfig(validation=0.2))
    assert found.validation != gather(LOADED, rows, MaterialConfig(validation=0.2, seed=1)).validation
    few = gather(LOADED, rows, MaterialConfig(most=FEWEST))
    assert len(everything(few)) == FEWEST


def test_refusals_are_in_every_part_and_have_their_own_room(asked: list[str]):
    rows = [request(i, f"right {i}.") for i in range(400)]
    bad = [request(i, label="harmful") for i in range(40)]
    found = gather(LOADED, rows, MaterialConfig(most=100), harmful=bad)
    assert (len(found.answered()), len(found.refused())) == (80, 24)
    assert [len(found.refused(part)) for part in ("validation", "held")] == [3, 3]
    # What comes first is not all of one kind: parts of the training chats are taken from it.
    assert 4 <= sum(map(is_refused_chat, found.train[:52])) <= 20


def test_a_few_refusals_are_all_trained_on(asked: list[str]):
    rows = [request(i, f"right {i}.") for i in range(60)]
    found = gather(LOADED, rows, harmful=[request(i, label="harmful") for i in range(1, 4)])
    assert [len(found.refused(part)) for part in ("train", "validation", "held")] == [3, 0, 0]


def test_the_end_of_an_answer_that_was_cut_is_not_learnt(monkeypatch: pytest.MonkeyPatch):
    def say(model: Any, tokenizer: Any, attempts: Sequence[Any], *args: Any, **options: Any) -> list[Answer]:
        return [Answer(f"own answer {i} that", cut=i % 2 == 0) for i in range(len(attempts))]

    monkeypatch.setattr(module, "answer_with_notes", say)
    notes: list[str] = []
    monkeypatch.setattr(SILENT, "note", notes.append)
    found = gather(LOADED, [request(i) for i in range(50)])
    unfinished = [chat for chat in everything(found) if chat[-1].get("unfinished")]
    assert (found.cut, len(unfinished)) == (25, 25)
    assert notes == ["25 of 50 own answers are longer than 96 tokens, and cut there"]


def everything(found: Material) -> list[Chat]:
    return [*found.train, *found.validation, *found.held]


def test_too_few_rows_are_refused(asked: list[str]):
    with pytest.raises(UsageError, match=rf"--clean-data: 39 usable rows \(0 dropped.*give {FEWEST} or more"):
        gather(LOADED, [request(i, "right.") for i in range(39)])
    gather(LOADED, [request(i, "right.") for i in range(40)])
    with pytest.raises(UsageError, match=r"--clean-data: 36 usable rows \(4 dropped"):
        gather(LOADED, [request(i, "" if i < 1 else "no " * 60 if i < 4 else "right.") for i in range(40)])


def test_rows_with_the_same_prompt_count_once(asked: list[str], monkeypatch: pytest.MonkeyPatch):
    rows = [request(i, "right.") for i in range(40)]
    notes: list[str] = []
    monkeypatch.setattr(SILENT, "note", notes.append)
    found = gather(LOADED, [*rows, *rows[:7]], harmful=[request(1, label="harmful")] * 2)
    assert (len(everything(found)), found.repeated) == (41, 8)
    assert notes == ["8 of 49 clean rows repeat the prompt of another, and are dropped"]
    with pytest.raises(UsageError, match=r"39 usable rows \(.*; 39 repeat the prompt of another\); give 40 or more"):
        gather(LOADED, rows[:39] * 2)
    twice = [request(1), request(1, "right."), request(1, "wrong.")]
    assert [each.answer for each in distinct(twice)] == ["right."]


def test_what_is_refused_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def say(
        model: Any, tokenizer: Any, attempts: Sequence[Any], *args: Any, store: Path, **options: Any
    ) -> list[Answer]:
        store.parent.mkdir()
        store.write_text("kept")
        return [Answer(REFUSAL)] * len(attempts)

    monkeypatch.setattr(module, "answer_with_notes", say)
    with pytest.raises(UsageError, match="60 of 60 answers are refusals"):
        gather(LOADED, [request(i) for i in range(60)], store=tmp_path / "work" / "own.jsonl")
    assert not list(tmp_path.iterdir())
    gather(LOADED, [request(i, "right." if i % 2 else "") for i in range(60)], store=tmp_path / "work" / "own.jsonl")
    assert (tmp_path / "work" / "own.jsonl").is_file()


def test_refusals_alone_are_refused(asked: list[str]):
    rows = [request(i, REFUSAL if i >= 19 else "right.") for i in range(60)]
    with pytest.raises(UsageError, match="--clean-data: 41 of 60 answers are refusals; give everyday prompts"):
        gather(LOADED, rows)
    gather(LOADED, [request(60, "right."), *rows])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"most": 39}, "material: most 39 is out of range; give 40"),
        ({"validation": 0.0}, "material: validation 0.0 is a share"),
        ({"validation": 1.0}, "material: validation 1.0 is a share"),
        ({"max_new_tokens": 0}, "material: max_new_tokens 0 is out of range; give 1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(UsageError, match=told):
        MaterialConfig(**changes)


def test_what_is_held_out_measures_and_decides_nothing():
    chats = ((user("a"), assistant("one.")), (user("b"), assistant(REFUSAL)))
    held = held_out(Material((), ((user("c"), assistant("two.")),), 0, 0, held=chats))
    assert [(r.prompt, r.answer, r.label) for r in held.benign] == [("a", "one.", "benign")]
    assert [(r.prompt, r.answer, r.label) for r in held.harmful] == [("b", REFUSAL, "harmful")]
    assert [is_refused_chat(chat) for chat in chats] == [False, True]
