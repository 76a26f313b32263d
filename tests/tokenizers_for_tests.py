"""Tiny tokenizers trained in process, and chat templates in the shapes that real models use.

The kinds differ in how their tokens report the characters that they carry; the shapes differ in what a
template does to the texts. Each shape comes with its own words for what must become of a text.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from keelguard.records import Message

SPECIAL = (
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_CORPUS = [
    "Hello world, how are you?\n\nI am fine,  thanks (ok).\n",
    "user assistant system model You are a helpful assistant. [INST] [/INST] <<SYS>> <</SYS>>",
    "The quick brown fox jumps over the lazy dog; naïve café, 日本語 and x = f(a) + 1",
    "### User: ### Assistant: Sure, here is the answer: <think>\n\n</think>\n\n",
] * 10


def _byte_level(trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Without the usual splitting pattern, merges run over spaces and give tokens with spaces at either end.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets, add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _metaspace_unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["model"]["vocab"] += [[byte, -20.0] for byte in _BYTES]
    return Tokenizer.from_str(json.dumps(state))


def _prepending_bpe() -> Tokenizer:
    """As Llama 2: spaces are normalised to ▁, one is put before every stretch, bytes where a character lacks."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *_BYTES], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: _byte_level(trim_offsets=False),
    "byte-level trimmed": lambda: _byte_level(trim_offsets=True),
    "swallowing": lambda: _byte_level(trim_offsets=False),
    "swallowing trimmed": lambda: _byte_level(trim_offsets=True),
    "metaspace": _metaspace_unigram,
    "prepending": _prepending_bpe,
    "word pieces": _word_piece,
}
KINDS = tuple(_KINDS)


@cache
def _state(kind: str) -> str:
    return _KINDS[kind]().to_str()


@cache
def chat_tokenizer(kind: str = "byte-level", shape: str = "chatml") -> PreTrainedTokenizerFast:
    """A tokenizer of this kind with a template of this shape. Shared: a test must not change it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_state(kind)),
        bos_token="<s>",
        eos_token=SHAPES[shape].eos,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    swallows = kind.startswith("swallowing")
    added = [AddedToken(t, lstrip=swallows, rstrip=swallows, normalized=False, special=True) for t in SPECIAL]
    tokenizer.add_tokens(added, special_tokens=True)  # pyright: ignore[reportArgumentType]
    tokenizer.chat_template = SHAPES[shape].template
    return tokenizer


@dataclass(frozen=True)
class Shape:
    """A chat template and what it does.

    Attributes:
        template: the jinja source.
        header: what stands right before an assistant's text that ends the conversation.
        becomes: (messages, i) → what the template writes for the content of message i.
        eos: the token that ends a turn.
        alternates: whether the template insists on user and assistant in turn.
    """

    template: str
    header: str
    becomes: Callable[[Sequence[Message], int], str]
    eos: str = "</s>"
    alternates: bool = True


def _verbatim(messages: Sequence[Message], i: int) -> str:
    return messages[i]["content"]


def _stripped(messages: Sequence[Message], i: int) -> str:
    return messages[i]["content"].strip()


def _stripped_but_system(messages: Sequence[Message], i: int) -> str:
    return (_verbatim if messages[i]["role"] == "system" else _stripped)(messages, i)


def _llama2(messages: Sequence[Message], i: int) -> str:
    content = messages[i]["content"]
    if messages[i]["role"] == "system":
        return content
    return content.rstrip() if i == 1 and messages[0]["role"] == "system" else content.strip()


def _merged(messages: Sequence[Message], i: int) -> str:
    """Consecutive turns of one role are joined by an empty line, and the whole is trimmed."""
    first, last = i, i
    while first and messages[first - 1]["role"] == messages[i]["role"]:
        first -= 1
    while last + 1 < len(messages) and messages[last + 1]["role"] == messages[i]["role"]:
        last += 1
    turn = "\n\n".join(m["content"] for m in messages[first : last + 1])
    start = sum(len(m["content"]) + 2 for m in messages[first:i])
    low, high = len(turn) - len(turn.lstrip()), len(turn.rstrip())
    return turn[max(start, low) : max(min(start + len(messages[i]["content"]), high), low)]


def _qwen3(messages: Sequence[Message], i: int) -> str:
    content = messages[i]["content"]
    if messages[i]["role"] != "assistant":
        return content
    reasoning, last = "", i + 1 == len(messages)
    if "</think>" in content:
        reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    answers_last_query = all(m["role"] != "user" for m in messages[i:])
    if not answers_last_query or not (last or reasoning):
        return content
    content = content.lstrip("\n")
    return f"<think>\n{reasoning}\n</think>\n\n{content}" if reasoning else content


_CHATML = """\
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# It asks the clock as the real one does, for a day that never changes: the tests know what tiny models answer.
_LLAMA3 = """\
{{- bos_token }}
{%- set date = strftime_now('29 Nov 2026') %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_LLAMA2 = """\
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = false %}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if loop.index0 == 0 and system != false %}
{%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message.content %}
{%- else %}{% set content = message.content %}{% endif %}
{%- if message.role == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

_GEMMA = """\
{{- bos_token }}
{%- set prefix = '' %}
{%- if messages[0].role == 'system' %}
{%- set prefix = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') + message.content | trim }}
{{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_QWEN3 = """\
{%- set ns = namespace(query=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- set content = message.content %}{% set reasoning = '' %}
{%- if message.role == 'assistant' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.query and (loop.last or reasoning) %}
{%- set content = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
{%- endif %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

_MISTRAL = """\
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '[INST] ' }}
{%- if loop.index0 == ns.last and system is defined %}{{ system + '\\n\\n' }}{% endif %}
{{- message.content + '[/INST]' }}
{%- else %}{{ ' ' + message.content | trim + eos_token }}{% endif %}
{%- endfor %}"""

_ZEPHYR = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

_MERGING = """\
{%- set ns = namespace(turn='', role='') %}
{%- for message in messages %}
{%- if message.role == ns.role %}{% set ns.turn = ns.turn + '\\n\\n' + message.content %}
{%- else %}
{%- if ns.role %}{{ '### ' + ns.role + ':\\n' + ns.turn | trim + '\\n\\n' }}{% endif %}
{%- set ns.turn = message.content %}{% set ns.role = message.role %}
{%- endif %}
{%- endfor %}
{{- '### ' + ns.role + ':\\n' + ns.turn | trim + eos_token }}
{%- if add_generation_prompt %}{{ '\\n\\n### assistant:\\n' }}{% endif %}"""

SHAPES = {
    "chatml": Shape(_CHATML, "<|im_start|>assistant\n", _verbatim, eos="<|im_end|>", alternates=False),
    "llama3": Shape(
        _LLAMA3,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        _stripped,
        eos="<|eot_id|>",
        alternates=False,
    ),
    "llama2": Shape(_LLAMA2, " [/INST] ", _llama2),
    "gemma": Shape(_GEMMA, "<start_of_turn>model\n", _stripped_but_system, eos="<end_of_turn>"),
    "qwen3": Shape(
        _QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", _qwen3, eos="<|im_end|>", alternates=False
    ),
    "mistral": Shape(
        _MISTRAL, "[/INST] ", lambda ms, i: (_stripped if ms[i]["role"] == "assistant" else _verbatim)(ms, i)
    ),
    "zephyr": Shape(_ZEPHYR, "<|assistant|>\n", _verbatim, alternates=False),
    "merging": Shape(_MERGING, "### assistant:\n", _merged, alternates=False),
}
