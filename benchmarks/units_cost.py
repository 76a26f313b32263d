"""What do attribution, protection and a budget cost? Both sides alternate in one run; JSON and the docs' table.

.venv/bin/python benchmarks/units_cost.py [--rounds 9] [--out runs/bench/units_cost.json]

A random Llama of hidden size 512, 4 layers, 512 tokens at a time: large enough that arithmetic and not Python decides.
Ratios are medians over rounds of paired times; the least and the greatest stand beside them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keelguard.runs import versions, write_json
from keelguard.units.attribution import Row, attribute
from keelguard.units.budget import train_only
from keelguard.units.index import build_index
from keelguard.units.masks import random_mask
from keelguard.units.protect import protect
from tables import markdown, set_table

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
CONFIG: dict[str, Any] = {"vocab_size": 4096, **SIZES}
ROWS, TOKENS, PROMPT = 32, 128, 48


class Step(NamedTuple):
    """A training step to time, the bytes that it holds, and what `protect` or `train_only` gave."""

    run: Callable[[], None]
    held: Callable[[], int]
    handle: Any


def main() -> None:
    """Time every pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "units_cost.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    found = {**_attribution(model, options.rounds), **_training(options.rounds)}
    result = {"config": CONFIG, "threads": torch.get_num_threads(), "versions": versions(), "found": found}
    write_json(options.out, result)
    table = markdown(
        ["", "against", "ratio", "least–most", "target"],
        [
            [name, row["against"], f"{row['ratio']:.2f}", f"{row['least']:.2f}–{row['most']:.2f}", row["target"]]
            for name, row in found.items()
        ],
    )
    print(table)
    set_table(ROOT / "docs" / "ssah.md", "cost", table)


def _paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Seconds of `second` over seconds of `first`, alternating which goes first."""
    first()
    second()
    ratios, plain = [], []
    for turn in range(rounds):
        times = {}
        for run in (first, second) if turn % 2 == 0 else (second, first):
            start = time.perf_counter()
            run()
            times[run] = time.perf_counter() - start
        ratios.append(times[second] / times[first])
        plain.append(times[first])
    return {
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "plain_seconds": statistics.median(plain),
    }


def _attribution(model: Any, rounds: int) -> dict[str, Any]:
    index = build_index(model)
    draw = torch.Generator().manual_seed(0)
    rows = [Row(torch.randint(4096, (TOKENS,), generator=draw).tolist(), PROMPT, TOKENS, i % 32) for i in range(ROWS)]
    ids = torch.tensor([list(row.ids) for row in rows])

    @torch.inference_mode()
    def forward() -> None:
        # Without the head, which statistics of activations do not need either.
        for part in ids.split(8):
            model.get_decoder()(input_ids=part, use_cache=False)

    def pass_with(effects: bool) -> Callable[[], Any]:
        return lambda: attribute(model, index, rows, groups=32, effects=effects, batch_size=8)

    return {
        "variance scores": {
            "against": "forward pass", "target": "≤ 1.3", **_paired(forward, pass_with(False), rounds)
        },
        "Taylor scores": {"against": "forward pass", "target": "≤ 3.5", **_paired(forward, pass_with(True), rounds)},
    }  # fmt: skip


def _training(rounds: int) -> dict[str, Any]:
    def step_of(prepare: Callable[[Any, Any], Any], units_alone: bool = False) -> Step:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
        model.requires_grad_(True)
        if units_alone:
            # What a budget leaves alone by default would make the full step look dearer than it is.
            for part in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
                part.requires_grad_(False)
        handle = prepare(model, build_index(model))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        ids = torch.randint(4096, (4, TOKENS), generator=torch.Generator().manual_seed(1))

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        def held() -> int:
            """Bytes of gradients and optimiser state at the end of a backward pass."""
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            grads = sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
            states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()]
            optimizer.zero_grad()
            return grads + sum(t.numel() * t.element_size() for t in states)

        return Step(step, held, handle)

    plain, layers = step_of(lambda model, index: None), step_of(lambda model, index: None, units_alone=True)
    found: dict[str, Any] = {}
    for share in (0.08, 0.5):
        guarded = step_of(lambda m, i, s=share: protect(m, i, random_mask(i, round(s * len(i)), 0)))
        found[f"protect, {share:.0%} of the units frozen"] = {
            "against": "full step", "target": "≤ 1.05", **_paired(plain.run, guarded.run, rounds)
        }  # fmt: skip
        # Its hooks see every optimiser, also those of the next pair.
        guarded.handle.remove()
    budget = step_of(lambda m, i: train_only(m, i, random_mask(i, round(0.2 * len(i)), 0)))
    for against, full in (("full step", plain), ("step on the layers alone", layers)):
        found[f"train_only, 20 % of the units, against a {against}"] = {
            "against": against, "target": "≤ 0.8", **_paired(full.run, budget.run, rounds)
        }  # fmt: skip
        memory = budget.held() / full.held()
        found[f"train_only, gradients + optimiser state, against a {against}"] = {
            "against": f"{against} (bytes)", "target": "≤ 0.4", "ratio": memory, "least": memory, "most": memory
        }  # fmt: skip
    return found


if __name__ == "__main__":
    main()
