"""What each stage of a hardening needs, before anything is loaded: bytes by what they are for, and tokens as FLOPs.

    costs = estimate(inspect_model("suspect"), 80 * 2**30, CostSettings())
    costs[1].device_bytes, costs[1].fits, costs[1].hours(1e14)

A model of what the code does, without torch: which copies a stage makes, what a Trainer keeps, what autograd saves.
`benchmarks/memory.py` compares it with measured peaks; docs/scale.md has the ratios.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from keelguard.fitting import READ_TOKENS, reading_tokens
from keelguard.pipeline.inspection import Inspection
from keelguard.pipeline.sizes import FLOAT, Sizes, training

GIB = 2**30
_LOSS_ROWS = 16
"""Chats per batch of `training.chat_loss`."""
DECODING = 4.0
"""What a generated token costs more than one that is read: decoding waits for memory."""


@dataclass(frozen=True)
class CostSettings:
    """What the cost depends on beside the model, with the defaults of `harden` and lengths that are assumed.

    Attributes:
        prompt, answer, chat: tokens of the longest prompt with its template, of a generated answer at most, and of the
            longest chat that is trained on.
        filled: how long a text is on average, as a share of the longest; only times depend on it.
        asked: answers that one audit generates.
        attack_steps: steps of an audit's fine-tuning attacks, on a copy of the model; 0 where its suite has none.
    """

    prompt: int = 128
    answer: int = 256
    chat: int = 384
    filled: float = 0.6
    audit_rows: int = field(default=0, metadata={"help": "rows per batch; 0 chooses by the model's size"})
    asked: int = 2000
    attack_steps: int = 0
    attack_rows: int = 16
    purify: bool = True
    rounds: int = 3
    steps: int = 100
    rows: int = field(default=16, metadata={"help": "chats per step of a purification, as of its canaries"})
    parts: int = field(default=1, metadata={"help": "parts that a step of a purification is cut into"})
    rank: int = field(default=0, metadata={"help": "rank of a purification's LoRAs; 0 trains everything in float32"})
    purify_bf16: bool = field(default=False, metadata={"help": "whether a purification computes in bfloat16"})
    purify_checkpointing: bool = field(default=False, metadata={"help": "whether it computes activations twice"})
    beside_rows: int = field(
        default=16,
        metadata={"help": "chats per step beside the batch, on which further losses are measured"},
    )
    consistent: int = field(default=256, metadata={"help": "chats whose activations are kept; 0 keeps none"})
    consistent_layers: int = field(default=8, metadata={"help": "layers at most whose activations are kept"})
    search_rows: int = 256
    searched: int = field(default=46_500, metadata={"help": "sequences that one search for insertions reads"})
    spike_steps: int = field(default=300, metadata={"help": "steps of planting canaries; 0 plants none"})
    rebound_steps: int = 40
    samples: int = field(default=128, metadata={"help": "requests of each kind that a diagnosis reads"})
    groups: int = 32
    proved: int = field(default=4000, metadata={"help": "answers that the proof by ablation generates"})
    guard_rows: int = 32
    guard_steps: int = 300
    guard_rank: int = 8
    looks: int = 16
    own_answers: int = field(default=3000, metadata={"help": "answers that the signal's material and thresholds need"})
    tune_rows: int = 16
    tune_steps: int = 500
    tune_rank: int = field(default=0, metadata={"help": "rank of a fine-tune's LoRA; 0 trains everything in float32"})
    frozen: float = field(default=0.07, metadata={"help": "share of the units that a fine-tune freezes"})
    checkpointing: bool = field(default=False, metadata={"help": "whether a fine-tune computes activations twice"})
    shards: int = field(default=1, metadata={"help": "devices over which FSDP2 shards a fine-tune"})


@dataclass(frozen=True)
class StageCost:
    """One stage at its peak.

    Attributes:
        device: bytes where the model lies, over all devices together, by what they are for. On a CPU they and `host`
            are the same memory.
        host: bytes of main memory besides.
        read, generated, trained: tokens through the model forward, one by one, and forward and backward.
        flops: of all of them, two for each parameter that a token meets, and six where it trains.
        memory: what there is of the device, in bytes; None where that is not known.
        shards: over how many devices `device` is for one of them.
    """

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)
    read: int = 0
    generated: int = 0
    trained: int = 0
    flops: float = 0.0
    memory: int | None = None
    shards: int = 1

    @property
    def device_bytes(self) -> int:
        """All that lies where the model does."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All that lies in main memory besides."""
        return sum(self.host.values())

    @property
    def fits(self) -> bool | None:
        """Whether the device suffices; None where nothing is known of it."""
        return None if self.memory is None else self.device_bytes <= self.memory

    def hours(self, throughput: float = 1e14) -> float:
        """The time at so many FLOP/s of reading and training; generation takes `DECODING` times as long."""
        return self.flops / throughput / 3600

    def to_json(self) -> dict[str, Any]:
        """The cost as JSON values."""
        return {**vars(self), "device": dict(self.device), "host": dict(self.host),
                "device_bytes": self.device_bytes, "host_bytes": self.host_bytes, "fits": self.fits}  # fmt: skip


def estimate(found: Inspection, memory: int | None = None, settings: CostSettings = CostSettings()) -> list[StageCost]:
    """The cost of every stage of a hardening, and of a protected fine-tune behind it.

    Args:
        memory: bytes of the device, or of all devices over which accelerate spreads the model.
    """
    sizes = Sizes(found)
    adapter = found.adapter is not None
    stages = [
        StageCost("inspect", {}),
        _audit("audit-received", sizes, settings),
        *([_purify(sizes, settings, adapter)] if settings.purify else []),
        _audit("audit-purified", sizes, settings),
        _diagnose(sizes, settings),
        _guard(sizes, settings),
        _audit("audit-guarded", sizes, settings),
        StageCost("package", {"weights": sizes.weights}),
        _finetune(sizes, settings),
    ]
    return [_finished(stage, sizes, settings, memory) for stage in stages]


def _finished(stage: StageCost, sizes: Sizes, s: CostSettings, memory: int | None) -> StageCost:
    """The stage with texts of ordinary length, and what they take to compute."""
    counts = {name: round(s.filled * getattr(stage, name)) for name in ("read", "generated", "trained")}
    per_token = {"read": 2.0, "generated": 2.0 * DECODING, "trained": 6.0}
    flops = sizes.active * sum(per_token[name] * count for name, count in counts.items())
    return replace(stage, **counts, flops=flops, memory=memory)


def _largest(*peaks: dict[str, int]) -> dict[str, int]:
    return max(peaks, key=lambda peak: sum(peak.values()))


def _generation(sizes: Sizes, rows: int, prompt: int, answer: int) -> dict[str, int]:
    return {"cache": sizes.cache(rows, prompt + answer), "activations": sizes.reading(rows * prompt, sizes.width)}


def _audit(name: str, sizes: Sizes, s: CostSettings) -> StageCost:
    rows = s.audit_rows or sizes.rows
    peak = {"weights": sizes.weights, **_generation(sizes, rows, s.prompt, s.answer)}
    if s.attack_steps:
        # The attack trains a copy, and the next one must meet the model as it was.
        tuned = training(sizes, s.attack_rows * s.chat)
        peak = _largest(peak, {"copies": sizes.weights, **tuned})
    return StageCost(
        name, peak, read=s.asked * s.prompt, generated=s.asked * s.answer,
        trained=s.attack_steps * s.attack_rows * s.chat,
    )  # fmt: skip


def _purify(sizes: Sizes, s: CostSettings, adapter: bool) -> StageCost:
    def tuned(beside: int) -> dict[str, int]:
        # What further losses are measured on goes with the last part of a step.
        return training(
            sizes, (s.rows // s.parts + beside) * s.chat, adapter=sizes.adapter if adapter else s.rank * sizes.linear,
            checkpointing=s.purify_checkpointing, bf16=s.purify_bf16,
        )  # fmt: skip

    searching = {"activations": sizes.reading(min(s.search_rows * s.chat, READ_TOKENS), sizes.width)}
    # What takes a LoRA in stays in its number format; what trains whole becomes float32.
    merged = sizes.weights if s.rank else sizes.parameters * FLOAT
    whole = sizes.weights if adapter else merged
    outputs = min(s.consistent_layers, sizes.layers) * sizes.hidden * sizes.width
    activations = {"kept activations": s.consistent * s.chat * outputs}
    back = {"kept for a step back": sizes.adapter * FLOAT if adapter else merged}
    # As it came and, behind the method, as it was written; a round keeps what it may have to put back.
    peaks = [({"copies": sizes.weights, "weights": sizes.weights, **searching}, activations),
             ({"copies": sizes.weights, **tuned(s.beside_rows)}, {**activations, **back}),
             ({"copies": 2 * sizes.weights, **tuned(0)}, {})]  # fmt: skip
    if s.spike_steps:
        # The copy with canaries is itself copied, for random pruning and for the further fine-tune.
        peaks += [({"copies": 2 * sizes.weights + whole, **tuned(0)}, {}),
                  ({"copies": 2 * sizes.weights, **tuned(s.beside_rows)}, {**activations, **back})]  # fmt: skip
    device, host = (max((peak[side] for peak in peaks), key=lambda peak: sum(peak.values())) for side in (0, 1))
    runs = 2 if s.spike_steps else 1
    treated = runs * s.rounds * s.steps
    plain = runs * s.rebound_steps + s.spike_steps
    plain += s.rounds * s.steps if s.spike_steps else 0  # The copy that is pruned at random has the same budget.
    return StageCost(
        "purify", device, host,
        read=(runs * s.rounds + 2) * s.searched * s.chat // 2, generated=12 * 96 * s.answer,
        trained=((treated + plain) * s.rows + treated * s.beside_rows) * s.chat,
    )  # fmt: skip


def _diagnose(sizes: Sizes, s: CostSettings) -> StageCost:
    rows = min(64, sizes.rows)
    tokens = rows * s.chat
    scored = rows * (s.chat - s.prompt)
    statistics = 8 * s.groups * 2 * (sizes.channels + sizes.units)
    # Units' activations are kept at all tokens for their gradients, and at scored ones for their moments.
    kept = (tokens + scored) * sizes.layers * (sizes.queries + sizes.inner) * sizes.width
    pass_ = {
        "activations": sizes.saved(tokens, sizes.width, frozen=True) + sizes.backward(tokens, sizes.width) + kept,
        # Scores with and without the wanted token, and the gradients of both, of their sum and of the logits.
        "logits": scored * sizes.vocabulary * (sizes.width + 6 * FLOAT),
        "statistics": statistics,
    }
    asking = _generation(sizes, sizes.rows, s.prompt, s.answer)
    return StageCost(
        "diagnose", {"weights": sizes.weights, **_largest(pass_, asking)}, {"statistics": 3 * statistics},
        read=4 * s.samples * s.chat + s.proved * s.prompt, generated=(2 * s.samples + s.proved) * s.answer,
    )  # fmt: skip


def _guard(sizes: Sizes, s: CostSettings) -> StageCost:
    looks, rows = s.looks + 1, s.guard_rows
    keys = s.chat + looks
    own = s.guard_rank * sizes.linear
    # The looks' rows meet the whole conversation's keys, which are put together with theirs, and at all heads' width.
    attention = 2 * sizes.layers * rows * keys * (sizes.values + sizes.queries) * sizes.width
    step = {
        "cache": sizes.cache(rows, s.chat),
        "activations": sizes.saved(rows * looks, sizes.width, frozen=True)
        + sizes.backward(rows * looks, sizes.width)
        + attention,
        "signal": 4 * own * FLOAT,
    }
    asking = _generation(sizes, sizes.rows, s.prompt, s.answer)
    return StageCost(
        "guard", {"weights": sizes.weights, **_largest(step, asking)},
        read=s.guard_steps * rows * s.chat, generated=s.own_answers * s.answer, trained=s.guard_steps * rows * looks,
    )  # fmt: skip


def _finetune(sizes: Sizes, s: CostSettings) -> StageCost:
    tokens = s.tune_rows * s.chat // s.shards
    adapter = s.tune_rank * sizes.linear
    options = {"adapter": adapter, "checkpointing": s.checkpointing, "shards": s.shards}
    peak, host = training(sizes, tokens, **options), {}
    if not adapter:
        peak["frozen units"] = int(s.frozen * sizes.parameters) * FLOAT // s.shards
    # Behind the training its loss is read, chats of either kind at once, with the logits of their answers.
    width = sizes.width if adapter else FLOAT
    read = min(_LOSS_ROWS * s.chat, reading_tokens(sizes.vocabulary))
    logits = sizes.logits(read * (s.chat - s.prompt) // s.chat, width)
    whole = {"weights": sizes.parameters * width, "activations": sizes.reading(read, width), "logits": logits}
    if s.shards > 1:
        # Every process loads the whole model, and the main one once more to measure it beside its shard.
        whole["shard"] = sizes.parameters * FLOAT // s.shards
        host = {"checkpoint": sizes.parameters * FLOAT}
    return StageCost(
        "finetune, protected", _largest(peak, whole), host, trained=s.tune_steps * s.tune_rows * s.chat,
        shards=s.shards,
    )  # fmt: skip
