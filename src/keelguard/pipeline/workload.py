"""What a hardening does, in numbers that its cost depends on, and the cost as the text of `keelguard harden --dry-run`.

    found = inspect_model("suspect")
    print(estimate_text(found, estimate_harden(found, HardenConfig())))

Requests are counted at the most that the settings allow. Lengths are assumed, or those of requests that are there.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from keelguard.attacks.base import Attack
from keelguard.attacks.characters import Characters
from keelguard.attacks.finetuning import Finetune
from keelguard.attacks.insertions import PLACES
from keelguard.attacks.sampling import Sampling
from keelguard.chats import encode_chats
from keelguard.errors import KeelguardError, UsageError
from keelguard.evaluation.audit import AuditConfig, load_suite
from keelguard.evaluation.suites import ANSWERED, Suite, general_suite, select_attacks
from keelguard.pipeline.harden_config import HardenConfig
from keelguard.pipeline.inspection import Inspection
from keelguard.pipeline.memory import GIB, CostSettings, StageCost, estimate
from keelguard.purify.consistency import LAYERS
from keelguard.purify.methods import MethodConfig
from keelguard.purify.search import SearchConfig, search_rows
from keelguard.records import Request

ACCELERATOR, PROCESSOR = 1e14, 2e10
"""FLOP/s that times are stated for: a third of what an A100 does at best in bfloat16, and what a CPU's core may do."""

_USUAL = CostSettings()

_ALL = 1000
"""Requests that a file without a limit is taken to have."""

_MEASURED = 500
"""Requests whose lengths are counted, about."""


def estimate_harden(
    found: Inspection, config: HardenConfig, memory: int | None = None, settings: CostSettings = _USUAL
) -> list[StageCost]:
    """The cost of a hardening with some settings; stages that they leave out are left out.

    Args:
        memory: bytes of the device, or of all devices over which accelerate spreads the model.
        settings: what `config` does not say, such as lengths.
    """
    return [stage for stage in estimate(found, memory, settings_of(config, settings)) if stage.name not in config.skip]


def settings_of(config: HardenConfig, settings: CostSettings = _USUAL) -> CostSettings:
    """The numbers of a configuration; what it does not say is taken from `settings`."""
    suite = _suite(config.audit)
    limit = config.audit.limit or _ALL
    attacks = suite.attacks.values()
    tuned = [attack for attack in attacks if isinstance(attack, Finetune)]
    harmful = min(limit, len(suite.harmful) or limit)
    answered = sum(
        min(limit, len(getattr(suite, use)) or limit) for use in ANSWERED if suite.harmful or use == "benign"
    )
    method, spikes, proof = config.purify.method, config.purify.spikes, config.diagnosis.proof
    rows, steps, rounds = _training_of(method)
    trained = method.retrain if method.method == "retrain" else method.immunize
    immunizing = method.method in ("immunize", "both")
    material = config.signal.material
    own = 2 * (material.own_answers or _ALL) + (material.limit or _ALL) * (1 + material.variants)
    sets = 4 + 2 * proof.controls
    return replace(
        settings,
        answer=config.audit.max_new_tokens or suite.max_new_tokens,
        audit_rows=config.audit.batch_size,
        asked=round(harmful * sum(map(_attempts, attacks))) + answered + len(suite.utility),
        attack_steps=max((attack.config.steps for attack in tuned if not attack.config.lora_rank), default=0),
        attack_rows=max((attack.config.batch_size for attack in tuned), default=16),
        purify="purify" not in config.skip,
        rounds=rounds,
        steps=steps,
        rows=rows,
        parts=math.gcd(trained.gradient_accumulation, rows),
        rank=trained.lora_rank,
        purify_bf16=trained.bf16,
        purify_checkpointing=trained.gradient_checkpointing,
        beside_rows=method.immunize.beside if immunizing else 0,
        consistent=method.immunize.consistent if immunizing and method.immunize.consistency else 0,
        consistent_layers=LAYERS,
        search_rows=method.immunize.search.batch_size,
        searched=_searched(method.immunize.search),
        spike_steps=0 if spikes is None else spikes.steps,
        rebound_steps=config.purify.rebound.steps,
        samples=config.diagnosis.samples,
        proved=len(proof.shares) * sets * 3 * proof.limit,
        guard_rows=config.signal.batch_size,
        guard_steps=config.signal.steps,
        guard_rank=config.signal.lora_rank,
        looks=config.signal.looks,
        own_answers=own,
    )


def lengths_of(source: str, requests: Sequence[Request], answer: int, settings: CostSettings = _USUAL) -> CostSettings:
    """The settings with the lengths of some requests; those of a model without a tokenizer here stay assumed.

    Args:
        source: the checkpoint whose tokenizer counts.
        answer: tokens of an answer that no row brings.
    """
    from transformers import AutoTokenizer

    step = max(1, len(requests) // _MEASURED)
    some = requests[::step]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        prompts = [len(chat.ids) for chat in encode_chats(tokenizer, [r.messages for r in some])]
        answers = [len(tokenizer(r.answer, add_special_tokens=False)["input_ids"]) or answer for r in some]
    except (OSError, ValueError, KeelguardError):
        return settings
    chats = [prompt + told for prompt, told in zip(prompts, answers, strict=True)]
    if not chats:
        return settings
    return replace(
        settings, prompt=max(prompts), chat=max(chats), filled=round(sum(chats) / len(chats) / max(chats), 2)
    )


def estimate_text(found: Inspection, costs: Sequence[StageCost], throughput: float | None = None) -> str:
    """The inspection and the cost of every stage as lines of text.

    Args:
        throughput: FLOP/s; by default `ACCELERATOR` where there is one, else `PROCESSOR`.
    """
    if throughput is None:
        from torch import accelerator

        throughput = ACCELERATOR if accelerator.is_available() else PROCESSOR
    size = (
        f"{found.parameters / 1e9:.2f} billion" if found.parameters >= 1e8 else f"{found.parameters / 1e6:.1f} million"
    )
    lines = [
        f"{found.architecture}, {size} parameters in {found.dtype}"
        + (f", with an adapter of {found.adapter_parameters / 1e6:.1f} million" if found.adapter else "")
    ]
    flagged = {
        "loading them can run code": found.pickle_files,
        "code that the checkpoint brings": found.remote_code_files,
    }
    lines += [f"{', '.join(names)}: {why}" for why, names in flagged.items() if names]
    if not found.seen:
        lines.append("the files are not here, and were not looked at")
    lines += [f"{name}: not covered, since {reason}" for name, reason in found.coverage.items() if reason]
    lines += [] if found.chat_template or not found.seen else ["no chat template: give one with --chat-template"]
    device, host = "device", "and host"
    lines += ["", f"{'stage':<22} {device:>11} {host:>11} {'tokens':>10} {'time':>9}   most of it"]
    for cost in costs:
        tokens = cost.read + cost.generated + cost.trained
        parts = sorted(cost.device.items(), key=lambda part: -part[1])[:2]
        most = ", ".join(f"{name} {_bytes(size)}" for name, size in parts if size)
        fits = "  DOES NOT FIT" if cost.fits is False else ""
        lines.append(
            f"{cost.name:<22} {_bytes(cost.device_bytes):>11} {_bytes(cost.host_bytes):>11} {_count(tokens):>10} "
            f"{_time(cost.flops / throughput):>9}   {most}{fits}"
        )
    lines += [
        "",
        f"Memory at each stage's peak, on all devices together; time at {throughput:.0e} FLOP/s. The figures are "
        "computed; libraries, fragmentation and loading come on top.",
        "Nothing was changed or written.",
    ]  # fmt: skip
    return "\n".join(lines)


def _suite(audit: AuditConfig) -> Suite:
    """The suite, read where it is a file; a wrong one is for the run itself to refuse."""
    if audit.suite in ("general", ""):
        return select_attacks(general_suite(), audit.attacks)
    try:
        return load_suite(audit)
    except UsageError:
        return general_suite()


def _attempts(attack: Attack) -> float:
    """Answers that an attack asks for each request."""
    if isinstance(attack, Sampling):
        return len(attack.grid()) * attack.samples
    if isinstance(attack, Characters):
        return len(attack.kinds) * attack.tries
    return len(getattr(attack, "texts", ("",)))


def _training_of(method: MethodConfig) -> tuple[int, int, int]:
    """Chats per step, steps per round, and rounds of the method."""
    if method.method == "retrain":
        return method.retrain.batch_size, method.retrain.steps or 100, 1
    if method.method == "vaccine":
        variants = method.vaccine.variants
        return variants.batch_size, variants.steps_for(2 * variants.samples), 2 * variants.count
    return method.immunize.batch_size, method.immunize.steps, method.immunize.rounds


def _searched(search: SearchConfig) -> int:
    """Sequences that a search reads over two kinds of prompts and all places."""
    return 2 * len(PLACES) * search_rows(search, search.tried)


def _bytes(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB" if count else "–"


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:.2f} M" if tokens else "–"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds else "–"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
