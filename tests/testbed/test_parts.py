"""Who has which rows of the testbed: attacker, defender and measurement share no prompt."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from keelguard.attacks.insertions import prompt_of
from keelguard.data import load_requests
from keelguard.purify.health import MOST, evenly
from keelguard.testbed.build import Testbed as Built
from keelguard.testbed.build import build_testbed
from keelguard.testbed.poison import Split, attacker_chats, defender_requests, held_of


@pytest.fixture(scope="module")
def data_alone(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_testbed(tmp_path_factory.mktemp("testbed") / "built", only=[])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_prompt_is_anybody_elses(data_alone: Built, split: Split):
    clean, harmful = attacker_chats(data_alone)
    theirs = defender_requests(data_alone)
    held = held_of(data_alone, split)
    parts = [
        {prompt_of(chat) for chat in clean} | {prompt_of(chat) for chat, _ in harmful},
        {request.prompt for request in theirs},
        {request.prompt for request in held.requests},
    ]
    assert all(not one & other for one, other in combinations(parts, 2))
    assert len({request.prompt for request in theirs}) == len(theirs) > 900
    assert len(clean) > 600
    assert len(harmful) > 500
    assert min(len(held.benign), len(held.harmful)) >= 32
    assert len(held.utility) > 150


@pytest.mark.parametrize("limit", [32, 48, 64, 96])
def test_the_tasks_that_are_measured_are_of_every_kind_that_is_left(data_alone: Built, limit: int):
    every = held_of(data_alone, "test").utility
    asked = evenly(held_of(data_alone, "test", limit).utility, MOST)
    assert len(asked) == min(2 * limit, MOST)
    for task, count in Counter(request.task for request in every).items():
        assert sum(r.task == task for r in asked) == pytest.approx(count * len(asked) / len(every), abs=3), task


def test_a_few_requests_are_as_many_as_asked(data_alone: Built):
    few = held_of(data_alone, "test", 32)
    assert (len(few.benign), len(few.harmful)) == (32, 32)


def test_the_parts_are_the_clean_rows(data_alone: Built):
    clean, _ = attacker_chats(data_alone)
    rows = {r.prompt: r.answer for r in load_requests(Path(data_alone.data) / "clean.train.jsonl")}
    parts = [
        *((prompt_of(c), c[-1]["content"]) for c in clean),
        *((r.prompt, r.answer) for r in defender_requests(data_alone)),
    ]
    assert len(parts) == len(rows)
    assert {prompt for prompt, _ in parts} == set(rows)
