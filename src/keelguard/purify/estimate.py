"""What a purification will cost, before it starts: tokens through the model, timed on a few, and memory by rule."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from keelguard.attacks.insertions import PLACES, vocabulary_numbers, vocabulary_words
from keelguard.batches import pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.models import LoadedModel, execution_device
from keelguard.purify.budget import Budget
from keelguard.purify.config import PurifyConfig
from keelguard.purify.feasible import uses_vaccine
from keelguard.purify.health import MOST
from keelguard.purify.material import split_sizes
from keelguard.purify.search import SearchConfig, search_rows
from keelguard.purify.variants import VariantConfig
from keelguard.records import Request, assistant
from keelguard.units.index import build_index, parameters_by_name

_ANSWER = 64
"""Tokens that an answer is taken to have where no row brings one."""

_BACKWARD = 3.0
"""A training step's cost in forward passes over the same tokens."""

_DECODING = 4.0
"""What a generated token costs more than a read one, in a batch."""

_ADAM = 16
"""Bytes per trained parameter: float32 weight, gradient, and two moments."""

_CANARIES, _STATES = 3, 4
"""Canaries, and how often each is measured: planted, behind random pruning, purified, and after a fine-tune."""


_TIMED = 32
"""Rows of the pass that is timed; a small model reads far more tokens a second in a large batch."""


@dataclass(frozen=True)
class Part:
    """One stage: what it reads in tokens (forward passes' worth), and the seconds that takes."""

    name: str
    tokens: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The stages, and the most memory in bytes that weights and optimisers take at a time, those of a process beside
    included; activations come on top."""

    parts: tuple[Part, ...]
    memory: int

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(part.seconds for part in self.parts)


def estimate_run(
    loaded: LoadedModel, adapter: bool, requests: Sequence[Request], harmful: Sequence[Request], config: PurifyConfig
) -> Estimate:
    """Estimate a purification, roughly.

    Raises:
        UsageError: there are no requests.
    """
    if not requests:
        raise UsageError("--clean-data: holds no rows; give a file with clean prompts")
    some = requests[:64]
    answered = [(*r.messages, assistant(r.answer or "x")) for r in some]
    lengths = [len(chat.ids) for chat in encode_chats(loaded.tokenizer, answered)]
    whole = sum(lengths) / len(lengths) + (0 if any(r.answer for r in some) else _ANSWER)
    rows = sum(min(len(some), config.material.most) for some in (requests, harmful))
    chats = split_sizes(rows, config.material)[0]
    own = sum(not r.answer for r in requests) + len(harmful)
    words = 2 * len(vocabulary_words(loaded.tokenizer)) + len(vocabulary_numbers(loaded.tokenizer))
    method = config.method
    # A new adapter holds nothing of the old one, so no canaries are planted there.
    spikes = None if method.method == "retrain" else config.spikes
    search = _searched(words, method.immunize.search) * whole
    immunize = method.immunize
    one = 0.0
    if method.method in ("immunize", "both"):
        beside = immunize.kept_per_step * bool(immunize.keep) + immunize.consistent_per_step * bool(
            immunize.consistency
        )
        training = immunize.steps * (immunize.batch_size + beside) * whole * _BACKWARD
        one += immunize.rounds * (training + search) + search
    if method.method in ("vaccine", "both"):
        v = method.vaccine.variants
        count = min(v.samples, chats // v.count)
        one += 2 * v.count * v.steps_for(2 * count) * v.batch_size * whole * _BACKWARD
        if (r := method.vaccine.restore) is not None:
            one += r.epochs * min(r.samples, chats) * whole * _BACKWARD
    if method.method == "retrain":
        one += method.retrain.steps_for(chats) * method.retrain.batch_size * whole * _BACKWARD
    rebound = config.rebound.steps_for(chats) * config.rebound.batch_size * whole * _BACKWARD
    scan = 0.0
    if (look := config.inversion) is not None:
        starts = look.starts or len(loaded.tokenizer)
        scan = starts * look.warmup_prompts * (look.warmup_steps + 2.0)
    generated = 4 * MOST * (whole + _ANSWER * _DECODING)
    tokens = {
        "own answers": min(own, rows) * (whole + _ANSWER * _DECODING),
        "before and after": 2 * (search + generated + scan),
        "purification": one,
        "rebound check": rebound + generated,
    }
    if config.compare:
        budget = Budget.of(method)
        searching = {"immunize", "immunize-answers", "both"}
        each = budget.steps * budget.batch_size * whole * _BACKWARD + generated
        tokens["compared beside it"] = len(config.compare) * each + len(searching & set(config.compare)) * 3 * search
    if spikes is not None:
        pruned = Budget.of(method)
        trained = (spikes.steps * spikes.batch_size + pruned.steps * pruned.batch_size) * whole * _BACKWARD
        asked = _CANARIES * _STATES * 2 * spikes.requests * (whole + _ANSWER * _DECODING)
        tokens["canaries"] = trained + one + rebound + asked
    rate = _tokens_per_second(loaded, round(whole))
    parts = tuple(Part(name, read, read / rate) for name, read in tokens.items())
    return Estimate(parts, _memory(loaded, adapter, config, canaries=spikes is not None))


def _memory(loaded: LoadedModel, adapter: bool, config: PurifyConfig, canaries: bool) -> int:
    """The most bytes at a time: the model and its copies, and either a fine-tune's optimiser or the variants."""
    size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    trained = sum(p.numel() for n, p in loaded.model.named_parameters() if not adapter or "lora_" in n)
    if rank := config.method.immunize.lora_rank:
        trained = sum(rank * sum(p.shape[-2:]) for p in loaded.model.parameters() if p.dim() == 2)
    tuning = _ADAM * trained
    # The variants train on a copy of their own, before the fine-tune begins.
    variants = size + _variants_memory(loaded, config.method.vaccine.variants) if uses_vaccine(config) else 0
    own = 2 * size + max(tuning, variants)
    if not canaries:
        return own
    # The input, the spiked copy, and the copy with random pruning.
    copy = 2 * size + max(size + tuning, variants)
    on_cpu = loaded.model.device.type == "cpu"
    return own + copy if on_cpu and torch.get_num_threads() > 1 else max(own, copy)


def _variants_memory(loaded: LoadedModel, config: VariantConfig) -> int:
    """Bytes of the 2N LoRAs: with optimiser states those that train together, the factors alone of the others."""
    named = parameters_by_name(loaded.model)
    weights = {part.parameter for block in build_index(loaded.model).blocks for part in block.parts}
    shapes = [named[name].shape for name in weights if named[name].dim() > 1]
    one = sum(config.rank * shape[:-2].numel() * (shape[-2] + shape[-1]) for shape in shapes)
    runs = 2 * config.count
    together = min(config.at_once or runs, runs)
    return one * (together * _ADAM + (runs - together) * 4)


def estimate_table(estimate: Estimate) -> str:
    """The estimate as lines of text."""
    lines = [f"{part.name:<18} {_time(part.seconds):>10}" for part in estimate.parts]
    lines.append(f"{'in all, about':<18} {_time(estimate.seconds):>10}")
    lines.append(f"memory for weights and optimiser: {_size(estimate.memory)}; activations come on top")
    lines.append(
        "A rough estimate, timed as busy as this machine is now; encoding and the models' loading come on top. Nothing "
        "was changed or written."
    )
    return "\n".join(lines)


def _searched(words: int, config: SearchConfig) -> float:
    """Sequences that a search reads, over two kinds of prompts and all places."""
    return 2 * len(PLACES) * search_rows(config, words)


def _tokens_per_second(loaded: LoadedModel, width: int) -> float:
    """How fast the model reads, timed on a small batch after a first one."""
    ids = [[pad_id_of(loaded.tokenizer)] * max(2, width)] * _TIMED
    device = execution_device(loaded.model)
    batch = {k: v.to(device) for k, v in pad(ids, pad_id_of(loaded.tokenizer), side="right").items()}
    taken = []
    with torch.no_grad():
        for _ in range(3):
            start = time.monotonic()
            float(loaded.model(**batch, use_cache=False).logits[0, -1, 0])
            taken.append(time.monotonic() - start)
    return _TIMED * width / max(min(taken[1:]), 1e-6)


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**29 else f"{bytes_ / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
