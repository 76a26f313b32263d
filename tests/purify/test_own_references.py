"""The model's own answers as references: each at the place of its request, whatever the requests are called."""

import pytest

from keelguard.purify import effects
from keelguard.purify.effects import own_references
from keelguard.records import Request, user

LONG = "an answer of many words that no model repeats exactly"


def test_requests_of_the_same_id_keep_their_places(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(effects, "ask", lambda loaded, waiting, prompts, *_: [f"of {prompt} " for prompt in prompts])
    given = [
        Request("1", (user("a"),)), Request("1", (user("b"),), answer=LONG), Request("2", (user("c"),), answer="short"),
        Request("1", (user("d"),), answer=""), Request("2", (user("e"),), answer=f"{LONG} #### 4"),
    ]  # fmt: skip
    loaded: object = None
    found = own_references(loaded, given)  # pyright: ignore[reportArgumentType]
    assert [(request.prompt, request.answer) for request in found] == [
        ("a", "of a"), ("b", "of b"), ("c", "short"), ("d", "of d"), ("e", f"{LONG} #### 4"),
    ]  # fmt: skip
    assert [bool(request.meta) for request in found] == [True, True, False, True, False]
    assert found[2] is given[2]
