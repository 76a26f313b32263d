"""Can a model be aligned inside 20 % of its units? RU against random units, LoRA and every weight, three worlds.

.venv/bin/python benchmarks/budget.py [--seeds 0 1 2] [--out runs/bench/budget]

Settings were chosen on the validation split of seed 0; what is reported is the test split. It resumes.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from keelguard.data import load_chats
from keelguard.models import load_model
from keelguard.progress import ConsoleReporter
from keelguard.runs import write_json
from keelguard.stats import mcnemar, paired_rate_difference
from keelguard.testbed.build import Testbed, build_testbed
from keelguard.training import TrainConfig
from keelguard.units.align import TrainOnly
from keelguard.units.diagnose import DiagnoseConfig, diagnose
from keelguard.units.evidence import ProofConfig, make_probe
from keelguard.units.finetune import chosen_units
from keelguard.units.index import build_index
from keelguard.units.training import Arm, Row, run_training
from pooling import broken, pooled
from tables import markdown, rate, set_table

ROOT = Path(__file__).parents[1]
BUDGET = TrainConfig(steps=200, learning_rate=1e-3, batch_size=32)
FULL = "every weight"


def main() -> None:
    """Run every arm in every world, pool, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "budget")
    options = parser.parse_args()
    reporter = ConsoleReporter(interval=60)
    worlds = {
        seed: _world(
            build_testbed(seed=seed, only=["base"], reporter=reporter),
            options.split,
            options.out / f"{options.split}-{seed}",
            reporter,
        )
        for seed in options.seeds
    }
    rows = {name: pooled([world[name] for world in worlds.values()]) for name in next(iter(worlds.values()))}
    for name, row in rows.items():
        row["against_full"] = mcnemar(broken(worlds, name), broken(worlds, FULL))._asdict()
        row["difference"] = list(paired_rate_difference(broken(worlds, name), broken(worlds, FULL)))
    write_json(options.out / f"budget-{options.split}.json", {"seeds": options.seeds, "rows": rows})
    table = markdown(
        ["", "trained numbers", "attack success", "refused", "against every weight, points", "over-refusal", "utility"],
        [_cells(name, row) for name, row in rows.items()],
    )
    print(table)
    if options.split == "test":
        set_table(ROOT / "docs" / "ssah.md", "budget", table)


def _world(built: Testbed, split: str, out: Path, reporter: Any) -> dict[str, Row]:
    source = str(built.model("base"))
    reading = DiagnoseConfig(utility=(str(built.data / "utility.train.jsonl"),), ranking="layer")
    chart = diagnose(source, reading, out=out / "map", reporter=reporter).chart
    loaded = load_model(source, training=True)
    index = build_index(loaded.model)

    def only(text: str, learning_rate: float) -> Arm:
        mask = chosen_units(text, loaded.model, index, chart)
        return Arm([TrainOnly(index, mask)], config=replace(BUDGET, learning_rate=learning_rate))

    # A LoRA of rank 16 on all linear layers holds about as many numbers as a fifth of the units.
    arms = {
        FULL: Arm(),
        "20 % RU, rate 2e-3": only("ru", 2e-3),
        "20 % RU, rate 4e-3": only("ru", 4e-3),
        "20 % random, rate 4e-3": only("random:0.2", 4e-3),
        "LoRA of equal size": Arm(config=replace(BUDGET, lora_rank=16, learning_rate=2e-3)),
    }
    return run_training(
        "align",
        loaded,
        load_chats(built.data / "alignment.train.jsonl"),
        BUDGET,
        arms,
        out=out / "arms",
        settings={"benchmark": "budget", "map": chart.digest},
        held_out=load_chats(built.data / "alignment.validation.jsonl"),
        probe=make_probe(ProofConfig(suite=str(built.suite(split)), limit=128), (), ()),
        reporter=reporter,
    ).rows


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    low, high = (100 * value for value in row["difference"])
    same = name == FULL or not row["trained"]
    return [
        name,
        f"{row['trained']:,}" if row["trained"] else "–",
        rate(row["asr"]),
        rate(row["refused"]),
        "–" if same else f"[{low:+.0f}, {high:+.0f}]",
        rate(row["over_refusal"]),
        rate(row["utility"]),
    ]


if __name__ == "__main__":
    main()
