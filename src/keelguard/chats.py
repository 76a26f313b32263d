"""Messages to token ids through the tokenizer's own chat template, with the exact span of every part.

    encoded = encode_chat(tokenizer, [user("Hello")], prefill="Sure,")
    encoded.ids[encoded.query.start : encoded.query.stop]      # the tokens of "Hello"

No role marker is written here: the template says where each text stands. It is rendered twice, once with a
mark in place of every text (the *skeleton*: the template's own words around each slot) and once with the
texts. Walking the second rendering along the first gives the characters of every text, whatever the texts
hold, and the tokenizer's offsets turn characters into tokens of the one tokenisation that the model reads.

A template may trim texts, drop or re-emit reasoning that stands before `</think>`, add a system prompt or a
date, fold, merge or move turns. One that leaves a text out or rewrites it is refused by name.

Texts are not trusted, and not cleaned either. One that holds the string of a special token (`<|im_end|>`)
becomes that token, as it does in `apply_chat_template`, and may look to the model like the end of its turn.
The spans stay true to who wrote it, because they come from positions and not from a search for markers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from keelguard.batches import IGNORED, Span, Tokens, check_fast, check_text, tokenize
from keelguard.errors import UsageError
from keelguard.records import ROLES, Message, assistant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY = "leave the message out, or give another template with --chat-template"
_THINK, _UNTHINK = "<think>", "</think>"
_MARK = re.compile(r"keelguard(text|reasoning)(\d+)slot")
_Draft = tuple[str, tuple[str, ...], tuple[Span, ...]]  # The text, the roles, the characters of every message.
_PROBES = {
    "text": "keelguardtext{0}slot",
    "reasoning": f"{_THINK}\nkeelguardreasoning{{0}}slot\n{_UNTHINK}\n\nkeelguardtext{{0}}slot",
    "blank": "",
}


@dataclass(frozen=True)
class EncodedChat:
    """A rendered and tokenised conversation: T token ids with the spans of its parts.

    Spans count tokens but for `characters`. A text owns the range from the first to the last token that
    carries one of its characters, so a token that straddles the border to the template belongs to the text.
    A token that carries characters of two texts belongs to the one that stands first. Where there was a
    prefill, it is the last message.

    Attributes:
        ids: the T token ids, equal to those of `text` tokenised without added special tokens.
        text: the rendered conversation.
        roles: one role per message.
        contents: one span of tokens per message.
        characters: one span of characters of `text` per message.
        query: the span of the last user message.
        response: the span of the last message if it is the assistant's, else empty at the end.
        closing: the tokens behind the response up to and including the first special token; empty if none, and
            behind a response that is marked as unfinished.
    """

    ids: list[int]
    text: str
    roles: tuple[str, ...]
    contents: tuple[Span, ...]
    characters: tuple[Span, ...]
    query: Span
    response: Span
    closing: Span

    def template_mask(self) -> list[bool]:
        """The T flags of the tokens that the template wrote: those in no message's span."""
        mask = [True] * len(self.ids)
        for start, stop in self.contents:
            mask[start:stop] = [False] * (stop - start)
        return mask

    def labels(self) -> list[int]:
        """The T labels of a language-modelling loss: the ids of response and closing, `IGNORED` elsewhere."""
        labels = [IGNORED] * len(self.ids)
        for start, stop in (self.response, self.closing):
            labels[start:stop] = self.ids[start:stop]
        return labels


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    prefill: str | None = None,
    add_generation_prompt: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> EncodedChat:
    """Encode one conversation.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the conversation; only `role` and `content` reach the template.
        prefill: the beginning of the assistant's answer. The text is what the template writes before an
            assistant's content that follows `messages`, then the prefill verbatim, then nothing.
        add_generation_prompt: whether the assistant's header ends the text; by default it does unless the
            last message is the assistant's. It is not read with a prefill.
        options: further variables of the template, such as `{"enable_thinking": False}`.

    Raises:
        UsageError: the tokenizer has no template or no offsets, the conversation is not one, or the
            template refuses it or rewrites its texts.
    """
    return encode_chats(
        tokenizer,
        [messages],
        prefills=[prefill],
        add_generation_prompt=add_generation_prompt,
        options=options,
    )[0]


def encode_chats(
    tokenizer: "PreTrainedTokenizerBase",
    chats: Sequence[Sequence[Message]],
    *,
    prefills: Sequence[str | None] | None = None,
    add_generation_prompt: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[EncodedChat]:
    """Encode many conversations, as `encode_chat` does each; `prefills` has one entry per conversation.

    Raises:
        UsageError: as `encode_chat`; the message begins with the number of the conversation, from 0.
        ValueError: `chats` and `prefills` differ in length.
    """
    check_fast(tokenizer)
    template = _Template(tokenizer, options or {})
    openings = [None] * len(chats) if prefills is None else prefills
    drafts = []
    for number, (chat, prefill) in enumerate(zip(chats, openings, strict=True)):
        try:
            drafts.append(template.draft(chat, prefill, add_generation_prompt))
        except UsageError as error:
            raise UsageError(f"conversation {number}: {error}" if len(chats) > 1 else str(error)) from error
    special: set[Any] = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.discard(tokenizer.unk_token_id)
    special.add(tokenizer.eos_token_id)
    rows = tokenize(tokenizer, [text for text, _, _ in drafts])
    encoded = [_encoded(draft, tokens, special) for draft, tokens in zip(drafts, rows, strict=True)]
    for i, chat in enumerate(chats):
        if chat[-1].get("unfinished"):
            # Where an answer was cut off, the end of turn that the template writes is not the model's.
            end = encoded[i].response.stop
            encoded[i] = replace(encoded[i], closing=Span(end, end))
    return encoded


def _encoded(draft: _Draft, tokens: Tokens, special: set[Any]) -> EncodedChat:
    text, roles, characters = draft
    ids, end = tokens.ids, len(tokens.ids)
    contents = tokens.spans(characters)
    query = contents[max(i for i, role in enumerate(roles) if role == "user")]
    response = contents[-1] if roles[-1] == "assistant" else Span(end, end)
    after = next((i + 1 for i in range(response.stop, end) if ids[i] in special), response.stop)
    return EncodedChat(ids, text, roles, contents, characters, query, response, Span(response.stop, after))


def _checked(chat: Sequence[Message]) -> list[Message]:
    if not chat:
        raise UsageError("the conversation has no messages: give at least one user message")
    messages: list[Message] = []
    for i, message in enumerate(chat):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UsageError(f"message {i} has the unknown role {role!r}: use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UsageError(f"message {i} ({role}) has no text: its content is {type(content).__name__}")
        check_text(content, f"message {i} ({role})")
        messages.append({"role": role, "content": content})
    if all(message["role"] != "user" for message in messages):
        raise UsageError("the conversation has no user message: give at least one")
    return messages


class _Skeleton(NamedTuple):
    """The template's words around its slots: literals[0], slots[0], literals[1] … literals[-1].

    A slot is the number of a message and whether the slot holds that message's reasoning.
    """

    literals: list[str]
    slots: list[tuple[int, bool]]


class _Template:
    """A tokenizer's chat template with the skeletons that it has shown so far.

    A skeleton is asked for by the shape of each message: "text" for a slot in place of its content,
    "reasoning" for one slot before and one behind `</think>`, "blank" for an empty content without a slot,
    which shows what a template that asks `if content` writes.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any]):
        if not tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template: give one with --chat-template")
        self.tokenizer, self.options = tokenizer, options
        self.skeletons: dict[tuple, _Skeleton] = {}

    def draft(self, chat: Sequence[Message], prefill: str | None, generation: bool | None) -> _Draft:
        """The conversation's text with the characters of every message."""
        messages = _checked(chat)
        last = messages[-1]["role"]
        if prefill is not None:
            if last == "assistant":
                raise UsageError("a prefill begins the assistant's turn, but the last message is one already")
            check_text(prefill, "the prefill")
            # A stand-in that no template trims or parses, as it would a prefill that ends in a space.
            messages.append(assistant("prefill"))
            generation = False
        elif generation is None:
            generation = last != "assistant"
        text = self.render(messages, generation)
        spans = self.locate(text, messages, generation)
        if prefill is not None:
            text = text[: spans[-1].start] + prefill
            spans[-1] = Span(spans[-1].start, len(text))
        return text, tuple(message["role"] for message in messages), tuple(spans)

    def render(self, messages: list[Any], generation: bool) -> str:
        """The conversation's text; a `UsageError` carries the words of a template that refuses it."""
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **self.options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def skeleton(self, roles: tuple[str, ...], shapes: tuple[str, ...], generation: bool) -> _Skeleton:
        """The skeleton of such a conversation; a `UsageError` if it leaves a text out or repeats it."""
        key = (roles, shapes, generation)
        if key not in self.skeletons:
            kinds = list(enumerate(zip(roles, shapes, strict=True)))
            turns = [{"role": role, "content": _PROBES[shape].format(i)} for i, (role, shape) in kinds]
            pieces = _MARK.split(self.render(turns, generation))
            slots = [(int(i), kind == "reasoning") for kind, i in zip(pieces[1::3], pieces[2::3], strict=True)]
            for i, (role, shape) in kinds:
                if shape != "blank" and (count := slots.count((i, False))) != 1:
                    fault = "repeats its text" if count else "leaves its text out"
                    raise UsageError(f"message {i} ({role}): the chat template {fault}; {_REMEDY}")
            self.skeletons[key] = _Skeleton(pieces[0::3], slots)
        return self.skeletons[key]

    def locate(self, text: str, messages: list[Message], generation: bool) -> list[Span]:
        """The characters of `text` that each content became; a `UsageError` if no skeleton explains them."""
        roles = tuple(message["role"] for message in messages)
        blame = 0
        for shapes in _shapings(messages):
            skeleton = self.skeleton(roles, shapes, generation)
            choices = [_choices(messages[i], shapes[i], reasoning) for i, reasoning in skeleton.slots]
            for elastic in (False, True):
                # Where the template trims whole turns, the shorter reading of white space is the likelier.
                words = [sorted(choice, key=len) for choice in choices] if elastic else choices
                found, reached = _walk(text, skeleton.literals, words, elastic)
                if found is not None:
                    return _spans(text, skeleton, found, len(messages))
            blame = skeleton.slots[reached][0] if skeleton.slots else 0
        raise UsageError(
            f"message {blame} ({roles[blame]}): the chat template rewrites its text, so that its place cannot "
            f"be told; {_REMEDY}"
        )


def _shapings(messages: Sequence[Message]) -> Iterable[tuple[str, ...]]:
    """The shapes to try, the likeliest first."""
    plain = ("text",) * len(messages)
    thinking = tuple("reasoning" if _reasons(message) else "text" for message in messages)
    blanks = tuple(s if m["content"].strip() else "blank" for s, m in zip(thinking, messages, strict=True))
    return dict.fromkeys((plain, thinking, blanks))


def _reasons(message: Message) -> bool:
    return message["role"] == "assistant" and _UNTHINK in message["content"]


def _choices(message: Message, shape: str, reasoning: bool) -> list[str]:
    """What a template may write in a slot of a message, the content as it is first."""
    content = message["content"]
    texts = [content] if shape == "text" else []
    if reasoning:
        texts.append(content.partition(_UNTHINK)[0].rpartition(_THINK)[2])
    elif _reasons(message):
        texts.append(content.rpartition(_UNTHINK)[2])
    trims = [(t, t.strip(), t.lstrip(), t.rstrip(), t.strip("\n"), t.lstrip("\n"), t.rstrip("\n")) for t in texts]
    return list(dict.fromkeys(trim for versions in trims for trim in versions))


def _walk(text: str, literals: list[str], choices: list[list[str]], elastic: bool) -> tuple[list[Span] | None, int]:
    """Spell `text` as literals with one of the choices in each slot between them.

    A template that trims a turn also trims its own words where a text at the turn's end is blank: where
    `elastic`, a literal may lack its outer white space beside a slot that is left empty.

    Returns:
        The span of every slot, or None; and the last slot that the walk reached.
    """
    reached = 0
    stack: list[tuple[int, int, Any]] = [(0, 0, None)]
    seen = set()
    while stack:
        slot, at, path = stack.pop()
        if slot == len(literals):
            if at < len(text):
                continue
            found = []
            while path is not None:
                span, path = path
                found.append(span)
            return found[:0:-1], reached
        empty = path is not None and not path[0].size
        if (slot, at, empty) in seen:
            continue
        seen.add((slot, at, empty))
        words = choices[slot] if slot < len(choices) else [""]
        heads = [literals[slot], literals[slot].lstrip()] if elastic and empty else [literals[slot]]
        forms = [(head, words) for head in heads]
        if elastic and "" in words:
            forms += [(head.rstrip(), [""]) for head in heads]
        forms = [(at + len(head), fitting) for head, fitting in forms if text.startswith(head, at)]
        reached = max(reached, slot if forms else slot - 1)
        steps = []
        for start, fitting in forms:
            spans = [Span(start, start + len(word)) for word in fitting if text.startswith(word, start)]
            steps += [(slot + 1, span.stop, (span, path)) for span in spans]
        stack += reversed(steps)
    return None, min(reached, len(choices) - 1)


def _spans(text: str, skeleton: _Skeleton, found: list[Span], count: int) -> list[Span]:
    """One span per message from one per slot; a message without a slot stands where the next one begins."""
    spans: dict[int, Span] = {}
    opened: dict[int, int] = {}
    before = 0
    for (i, reasoning), span in zip(skeleton.slots, found, strict=True):
        if reasoning:
            tag = text.rfind(_THINK, before, span.start)
            opened[i] = span.start if tag < 0 else tag
        else:
            spans[i] = Span(opened.get(i, span.start), span.stop)
        before = span.stop
    place = len(text)
    for i in reversed(range(count)):
        place = spans.setdefault(i, Span(place, place)).start
    return [spans[i] for i in range(count)]
