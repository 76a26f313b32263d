"""Is the memory model of `keelguard harden --dry-run` right? Measured peaks beside it, and its figures for 7B and 70B.

.venv/bin/python benchmarks/memory.py [--shape testbed 60M] [--stage audit purify …] [--out runs/bench/memory.json]

Every stage runs in a process of its own with few steps, since its peak does not depend on their number, and on one
thread, so that canaries are not planted in a second process. What is measured is by how much the process's peak of
resident memory (ru_maxrss) grows from the moment before the model is loaded, behind a small fine-tune that brings all
libraries in. Sets the tables of docs/scale.md. About ten minutes on one quiet core.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from keelguard.batches import pad_id_of
from keelguard.chats import encode_chats
from keelguard.data import load_requests, write_jsonl
from keelguard.evaluation.audit import AuditConfig, audit_models
from keelguard.evaluation.judges import JudgeConfig
from keelguard.guard.labels import Labelled
from keelguard.guard.material import MaterialConfig as SignalMaterial
from keelguard.guard.training import SignalConfig, train_signal
from keelguard.models import load_model
from keelguard.pipeline.harden_config import HardenConfig
from keelguard.pipeline.inspection import inspect_model
from keelguard.pipeline.memory import GIB, CostSettings, StageCost, estimate
from keelguard.pipeline.workload import estimate_harden
from keelguard.purify.config import PurifyConfig
from keelguard.purify.effects import Held
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.material import MaterialConfig
from keelguard.purify.methods import MethodConfig
from keelguard.purify.presets import preset, saving_memory
from keelguard.purify.run import purify
from keelguard.purify.search import SearchConfig
from keelguard.purify.spikes import SpikeConfig
from keelguard.records import Request, assistant, user
from keelguard.runs import read_json, versions, write_json
from keelguard.testbed.build import build_testbed
from keelguard.testbed.tokenizer import make_tokenizer
from keelguard.training import TrainConfig, train_on_chats
from keelguard.units.attribution import Row, attribute, reading_batch
from keelguard.units.finetune import FinetuneConfig, finetune
from keelguard.units.index import build_index
from tables import markdown, set_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
MIB = 2**20
SHAPES: dict[str, dict[str, int]] = {
    "60M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
}
REAL: dict[str, dict[str, Any]] = {
    "7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "70B": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
_SMALLER = "purify, LoRA of rank 16 with checkpointing, batches in 4 parts"
NEW_TOKENS, BATCH, STEPS, FROZEN = 24, 8, 2, 0.07


@dataclass(frozen=True)
class Case:
    """A model's folder, and requests with answers."""

    model: Path
    requests: Sequence[Request]


def main() -> None:
    """Measure every stage of every shape, and write the JSON and the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=["testbed", *SHAPES], default=["testbed", *SHAPES])
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "memory.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _measure(options.shape[0], options.stage[0], options.out)
        return
    found = read_json(options.out)["found"] if options.out.is_file() else {}
    for shape, stage in itertools.product(options.shape, options.stage):
        print(f"{shape}, {stage} …", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--child", "--shape", shape, "--stage", stage, "--out", folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
            subprocess.run(command, check=True, env=environment)
            found.setdefault(shape, {})[stage] = json.loads((Path(folder) / "measured.json").read_text())
        write_json(options.out, {"found": found, "versions": versions()})
    set_table(PAGE, "measured", _measured_table(found))
    for name in REAL:
        set_table(PAGE, f"memory {name}", _real_table(name))


def _measure(shape: str, stage: str, folder: Path) -> None:
    """Run one stage, and write by how much the peak has grown beside what the model says."""
    case = _case(shape, folder)
    _warm_up(folder)
    before = _peak()
    cost = STAGES[stage](case, folder)
    record = {"measured": _peak() - before, "model": cost.device_bytes + cost.host_bytes, "before": before,
              "parts": {**cost.device, **{f"host: {name}": size for name, size in cost.host.items()}}}  # fmt: skip
    print(json.dumps(record))
    write_json(folder / "measured.json", record)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _case(shape: str, folder: Path) -> Case:
    """The testbed's aligned model with its clean requests, or a random Llama with invented words of a token each."""
    if shape == "testbed":
        built = build_testbed(only=["aligned"])
        rows = [r for r in load_requests(built.data / "clean.train.jsonl", limit=400) if r.answer]
        return Case(built.model("aligned"), rows[:160])
    torch.manual_seed(0)
    words = ["".join(letters) for letters in itertools.product("bdfglm", "aeiou", "nrst", "ao")]
    tokenizer = make_tokenizer([" ".join(words)], 2048)
    # A head of a real size: one for these words would flatter the shape.
    config: Any = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **SHAPES[shape])  # pyright: ignore
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    requests = [
        Request(str(i), (user(" ".join(draw.choices(words, k=56))),), answer=" ".join(draw.choices(words, k=64)))
        for i in range(80)
    ]
    return Case(folder / "model", requests)


def _warm_up(folder: Path) -> None:
    """Train and ask a model of some kilobytes, so that libraries count before the measurement."""
    tokenizer = make_tokenizer(["a b c"], 64)
    config: Any = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                              num_attention_heads=2)  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    train_on_chats(model, tokenizer, [(user("a"), assistant("b"))] * 4, TrainConfig(steps=1, batch_size=2))
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)
    model.save_pretrained(folder / "warm")


def _lengths(case: Case) -> CostSettings:
    """Settings with the case's lengths."""
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    prompts = encode_chats(tokenizer, [request.messages for request in case.requests])
    chats = encode_chats(tokenizer, [(*request.messages, assistant(request.answer)) for request in case.requests])
    longest = [max(len(chat.ids) for chat in some) for some in (prompts, chats)]
    return CostSettings(prompt=longest[0], chat=longest[1], answer=NEW_TOKENS)


def _cost(case: Case, name: str, settings: CostSettings) -> StageCost:
    return _named(estimate(inspect_model(str(case.model)), None, settings), name)


def _named(costs: Sequence[StageCost], name: str) -> StageCost:
    return next(cost for cost in costs if cost.name == name)


def _audit(case: Case, folder: Path) -> StageCost:
    rows = [{"id": r.id, "prompt": r.prompt} for r in case.requests[:64]]
    write_jsonl(folder / "requests.jsonl", rows)
    config = AuditConfig(
        requests=(str(folder / "requests.jsonl"),), attacks=("direct",), judge=JudgeConfig("keyword"),
        max_new_tokens=NEW_TOKENS, batch_size=64,
    )  # fmt: skip
    audit_models([str(case.model)], config, out=folder / "audit", load=_load)
    return _cost(case, "audit-received", replace(_lengths(case), audit_rows=64))


def _load(source: str, **options: Any) -> Any:
    return load_model(source, device="cpu", **options)


def _purify(case: Case, folder: Path) -> StageCost:
    search = SearchConfig(prompts=2, longest=1, first_look=1, second_look=2, beam=1, tried=6, paired=2, lengthened=2,
                          batch_size=32)  # fmt: skip
    immunize = ImmunizeConfig(rounds=1, steps=STEPS, batch_size=BATCH, search=search, quiet=0.0, stable=9.0,
                              tolerance=99.0, learning_rate=1e-5)  # fmt: skip
    config = PurifyConfig(
        method=MethodConfig(immunize=immunize),
        material=MaterialConfig(max_new_tokens=NEW_TOKENS),
        spikes=SpikeConfig(samples=24, steps=STEPS, batch_size=BATCH, requests=4, learning_rate=1e-5),
        inversion=None,
        rebound=TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=1e-5),
    )
    held = Held(benign=tuple(case.requests[:4]))
    purify(str(case.model), case.requests[4:], config, folder / "purify", held=held, load=_load)
    settings = replace(_lengths(case), rounds=1, steps=STEPS, rows=BATCH, search_rows=32, spike_steps=STEPS)
    return _cost(case, "purify", settings)


def _diagnose(case: Case, folder: Path) -> StageCost:
    """The passes whose statistics a diagnosis keeps, without the requests that a random model would not refuse."""
    loaded = _load(str(case.model))
    index = build_index(loaded.model)
    chats = encode_chats(loaded.tokenizer, [(*r.messages, assistant(r.answer)) for r in case.requests])
    rows = [Row(c.ids, c.response.start, c.response.stop, i % 32) for i, c in enumerate(chats)]
    kept = []
    for number in range(3):
        found = attribute(
            loaded.model, index, rows, groups=32, effects=True, batch_size=reading_batch(loaded.model),
            pad_id=pad_id_of(loaded.tokenizer),
        )  # fmt: skip
        found.save(folder / f"statistics-{number}.safetensors")
        kept.append(found)
    settings = _lengths(case)
    # Every chat is scored along its answer; the longest prompt is not the longest chat's.
    scored = max(chat.response.size for chat in chats)
    return _cost(case, "diagnose", replace(settings, prompt=settings.chat - scored))


def _guard(case: Case, folder: Path) -> StageCost:
    loaded = _load(str(case.model))
    rows = [
        Labelled(r.messages, malicious=i % 2 == 0).answered(r.answer, i % 2 == 0) for i, r in enumerate(case.requests)
    ]
    config = SignalConfig(
        steps=STEPS, batch_size=32,
        material=SignalMaterial(limit=32, variants=1, own_answers=16, max_new_tokens=NEW_TOKENS),
    )  # fmt: skip
    train_signal(loaded.model, loaded.tokenizer, loaded.weights_hash, rows[16:], rows[:16], config)
    return _cost(case, "guard", replace(_lengths(case), guard_rows=32, looks=config.looks))


def _finetune(case: Case, folder: Path, checkpointing: bool = False) -> StageCost:
    config = FinetuneConfig(
        TrainConfig(steps=STEPS + 1, batch_size=BATCH, learning_rate=1e-5, gradient_checkpointing=checkpointing),
        protect=("freeze",), freeze=f"random:{FROZEN}",
    )  # fmt: skip
    chats = [(*r.messages, assistant(r.answer)) for r in case.requests]
    finetune(str(case.model), chats, config, out=folder / "tuned", load=_load)
    settings = replace(_lengths(case), tune_rows=BATCH, frozen=FROZEN, checkpointing=checkpointing)
    return _cost(case, "finetune, protected", settings)


STAGES: dict[str, Callable[[Case, Path], StageCost]] = {
    "audit": _audit,
    "purify": _purify,
    "diagnose": _diagnose,
    "guard": _guard,
    "finetune": _finetune,
    "finetune, checkpointing": lambda case, folder: _finetune(case, folder, checkpointing=True),
}


def _measured_table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [f"{shape}, {stage}", f"{one['measured'] / MIB:.0f}", f"{one['model'] / MIB:.0f}",
         f"{one['measured'] / one['model']:.2f}", f"{(one['measured'] - one['model']) / MIB:+.0f}"]
        for shape, stages in found.items()
        for stage, one in stages.items()
    ]  # fmt: skip
    return markdown(["", "measured (MiB)", "model (MiB)", "measured / model", "difference"], rows)


def _real_table(name: str) -> str:
    """The model's figures for a shape of a real checkpoint in bfloat16; nothing of it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(dtype="bfloat16", architectures=["LlamaForCausalLM"], **REAL[name])
        config.save_pretrained(folder)
        found = inspect_model(folder)
    costs = estimate_harden(found, HardenConfig(purify=preset("standard")))
    adapter = replace(found, adapter="adapter", adapter_parameters=_lora(REAL[name]))
    only = {cost.name: cost for cost in estimate_harden(adapter, HardenConfig(purify=preset("standard")))}
    more = {
        "finetune, FSDP2 on 8 with checkpointing, each": CostSettings(checkpointing=True, shards=8),
        "finetune, LoRA of rank 16 in bfloat16 with checkpointing": CostSettings(checkpointing=True, tune_rank=16),
    }
    rows = [_row(cost.name, cost) for cost in costs]
    lora = saving_memory(preset("standard"), lora_rank=16, gradient_accumulation=4, gradient_checkpointing=True)
    rows.append(_row(_SMALLER, _named(estimate_harden(found, HardenConfig(purify=lora)), "purify")))
    rows.append(_row("purify, an adapter of rank 16 alone", only["purify"]))
    rows += [_row(label, _named(estimate(found, None, s), "finetune, protected")) for label, s in more.items()]
    return markdown(["", "device (GiB)", "host besides (GiB)", "10¹⁵ FLOP", "hours at 10¹⁴ FLOP/s"], rows)


def _row(name: str, cost: StageCost) -> list[str]:
    return [name, f"{cost.device_bytes / GIB:.0f}", f"{cost.host_bytes / GIB:.0f}", f"{cost.flops / 1e15:.0f}",
            f"{cost.hours():.1f}"]  # fmt: skip


def _lora(shape: dict[str, Any], rank: int = 16) -> int:
    """Values of a LoRA on all linear layers."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    values = hidden * shape.get("num_key_value_heads", shape["num_attention_heads"]) // shape["num_attention_heads"]
    return shape["num_hidden_layers"] * rank * (4 * hidden + 2 * (hidden + values) + 3 * (hidden + inner))


if __name__ == "__main__":
    main()
