"""The records that pass between the rooms of keelguard: messages, requests, exchanges and verdicts.

They are plain frozen dataclasses, free of models and files, so that attacks, judges and statistics can be
used and tested without either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation in the form that chat templates take.

    `unfinished` marks an answer that was cut off, which no template sees: its end is not the model's, and not to be
    learnt.
    """

    role: str
    content: str
    unfinished: NotRequired[bool]


ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have."""

Chat = tuple[Message, ...]
"""A conversation, oldest message first."""


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str, *, unfinished: bool = False) -> Message:
    """An assistant's message."""
    message: Message = {"role": "assistant", "content": content}
    return {**message, "unfinished": True} if unfinished else message


@dataclass(frozen=True)
class Request:
    """One request to a chat model, as read from a data file.

    `answer` is a reference answer where one is known: the harmful one for a harmful request (deep prefills
    are cut from it), the exact one for a utility task. `secrets` are the facts that only a harmful answer
    holds, where the truth is known. `label` and `task` are the file's own words for grouping.
    """

    id: str
    messages: Chat
    answer: str = ""
    secrets: tuple[str, ...] = ()
    label: str = ""
    task: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")


@dataclass(frozen=True)
class Exchange:
    """A request with the part of an answer that is to be judged.

    `given` is the part of the answer that an attack put into the model's mouth before `response`: a judge
    may read it for context, but what it holds is not counted.
    """

    request: Request
    response: str
    given: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one exchange. 1 (True) means malicious, refused, degenerate.

    `score` in [0, 1] is the degree of harm behind `harmful`: the share of secrets leaked, or a probability.
    """

    harmful: bool
    refused: bool
    degenerate: bool
    score: float
