"""How far do importance, groups, direction and signal move between kinds of requests, and between checkpoints?

.venv/bin/python benchmarks/shift.py [--seed 0] [--out runs/bench/shift]

Model `aligned` of one world. The settings are the defaults of `keelguard shift` and were fixed before the test split
was read; one set of limits comes from the validation split. About ten minutes on two quiet cores; it resumes.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from keelguard.data import load_chats, load_requests
from keelguard.guard.run import run_signal
from keelguard.guard.training import SignalConfig
from keelguard.pipeline.drift import Drift, Resampling
from keelguard.pipeline.shift import ShiftConfig, measure_shift
from keelguard.pipeline.shift_data import Distribution, testbed_distributions
from keelguard.pipeline.shift_metrics import METRICS
from keelguard.pipeline.shift_page import WORDS, condition_rows
from keelguard.pipeline.shift_results import Shift
from keelguard.progress import ConsoleReporter
from keelguard.runs import write_json
from keelguard.testbed.build import build_testbed
from keelguard.testbed.frames import HELD_FRAMES, TRAINING_FRAMES
from keelguard.training import TrainConfig
from keelguard.units.diagnose import DiagnoseConfig, diagnose
from keelguard.units.finetune import FinetuneConfig, finetune
from signal_quality import rows_of
from tables import markdown, set_table

ROOT = Path(__file__).parents[1]
BUDGET = TrainConfig(steps=100, learning_rate=7e-4, batch_size=16)
TUNED = {
    "unprotected": FinetuneConfig(train=BUDGET, protect=("none",)),
    "protected": FinetuneConfig(train=replace(BUDGET, steps=120), protect=("mix",)),
}
"""The benign fine-tune of the testbed's suite, and the best protection of docs/ssah.md at equal task loss."""
DEFAULTS = ShiftConfig()
CUTS = 10
"""Pairs of disjoint halves of the plain requests: between them nothing shifts, and every warning is a false one."""


def main() -> None:
    """Map, signal and fine-tunes; the shift on both splits, against both checkpoints, and where there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "shift")
    options = parser.parse_args()
    out, reporter = options.out, ConsoleReporter(interval=60)
    files = build_testbed(only=["aligned"], seed=options.seed, reporter=reporter)
    model = str(files.model("aligned"))
    harmful, utility = files.data / "harmful.train.jsonl", files.data / "utility.train.jsonl"
    reading = DiagnoseConfig(safety=(str(harmful),), utility=(str(utility),))
    chart = diagnose(model, reading, out=out / "map", reporter=reporter).chart
    rows = rows_of(files, "train"), rows_of(files, "validation")
    frames: Any = {"frames": TRAINING_FRAMES, "held_frames": HELD_FRAMES, "reporter": reporter}
    signal = run_signal(model, *rows, SignalConfig(), out / "signal", **frames).signal
    chats, refused = load_chats(files.data / "finetune-benign.train.jsonl"), load_requests(harmful)[:128]
    for name, config in TUNED.items():
        finetune(model, chats, config, out=out / name, safety=refused, reporter=reporter)

    def measure(
        distributions: list[Distribution], folder: str, config: ShiftConfig = DEFAULTS, against: str | None = None
    ) -> Shift:
        return measure_shift(
            model, distributions, load_requests(utility), chart, config,
            out=out / folder, signal=signal, against=against, reporter=reporter,
        )  # fmt: skip

    held = measure(testbed_distributions(files, "validation"), "shift-validation")
    test = testbed_distributions(files, "test")
    kinds = measure(test, "shift-test")
    tuned = {name: measure(test, f"shift-{name}", against=str(out / name / "model")) for name in TUNED}
    few = ShiftConfig(samples=len(test[0].harmful), resampling=Resampling(samples=20))
    nothing = [measure(_halved(test[0], cut), f"nothing-{cut}", few) for cut in range(CUTS)]
    report(held, kinds, tuned, nothing, out)


def _halved(whole: Distribution, seed: int) -> list[Distribution]:
    """Two distributions that share no entity."""
    keys = sorted(set(whole.keys)), sorted(set(whole.benign_keys))
    draw = random.Random(f"halves-{seed}")
    chosen = [set(draw.sample(some, len(some) // 2)) for some in keys]
    found = []
    for name, wanted in (("one half", True), ("other half", False)):
        kept = [i for i, key in enumerate(whole.keys) if (key in chosen[0]) == wanted]
        benign = [i for i, key in enumerate(whole.benign_keys) if (key in chosen[1]) == wanted]
        found.append(
            replace(
                whole, name=name,
                harmful=tuple(whole.harmful[i] for i in kept), keys=tuple(whole.keys[i] for i in kept),
                benign=tuple(whole.benign[i] for i in benign), benign_keys=tuple(whole.benign_keys[i] for i in benign),
            )
        )  # fmt: skip
    return found


def report(held: Shift, kinds: Shift, tuned: dict[str, Shift], nothing: list[Shift], out: Path) -> None:
    """JSON, and the tables of the page."""
    by_validation = kinds.with_limits(held, "the validation split")
    false = {metric: sum(each.drift[metric][each.pairs[0].name].warn for each in nothing) for metric in METRICS}
    write_json(
        out / "shift.json",
        {
            "limits": {m: {pair: each.limit for pair, each in found.items()} for m, found in held.drift.items()},
            "validation": _drifts(held),
            "test": _drifts(kinds),
            "checkpoints": {name: _drifts(each) for name, each in tuned.items()},
            "conditions": [each.to_json() for shift in (kinds, *tuned.values()) for each in shift.conditions],
            "false_warnings": {"cuts": len(nothing), **false},
        },
    )
    page = ROOT / "docs" / "shift.md"
    header, *lines = condition_rows(kinds)
    for shift in tuned.values():
        lines += [row for row in condition_rows(shift)[1:] if row[0] != "aligned"]
    tables = {"conditions": markdown(header, lines), "distributions": _distributions(kinds, by_validation)}
    tables["checkpoints"] = _checkpoints(kinds, tuned)
    cells = [[WORDS[metric], f"{count} of {len(nothing)}"] for metric, count in false.items()]
    tables["nothing"] = markdown(["what moves", "false warnings"], cells)
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
        set_table(page, name, table)


def _drifts(shift: Shift) -> dict[str, Any]:
    return {metric: {pair: each.to_json() for pair, each in found.items()} for metric, found in shift.drift.items()}


def _distributions(kinds: Shift, by_validation: Shift) -> str:
    rows = []
    for pair in kinds.pairs:
        for metric, found in kinds.drift.items():
            each, other = found[pair.name], by_validation.drift[metric][pair.name]
            name = WORDS[metric]
            above = {(True, True): "both", (True, False): "this run’s", (False, True): "validation’s"}
            words = above.get((each.warn, other.warn), "")
            rows.append(
                [pair.name, name, _value(each), f"{each.control:.3f}", f"{each.limit:.3f}", f"{other.limit:.3f}", words]
            )
    return markdown(["pair", "what moves", "drift", "control", "limit", "limit of validation", "above"], rows)


def _checkpoints(kinds: Shift, tuned: dict[str, Shift]) -> str:
    """Plain and nested requests, before and after each fine-tune."""
    names = [each["name"] for each in kinds.distributions if each["name"] != "rephrased"]
    rows = []
    for metric in METRICS:
        cells = [WORDS[metric]]
        for shift in tuned.values():
            for pair in shift.pairs:
                if pair.kind == "checkpoints" and shift.conditions[pair.first].distribution in names:
                    each = shift.drift[metric][pair.name]
                    text = f"{_value(each)}, limit {each.limit:.3f}"
                    cells.append(f"**{text}**" if each.warn else text)
        rows.append(cells)
    return markdown(["what moves", *(f"{model}, {name}" for model in tuned for name in names)], rows)


def _value(each: Drift) -> str:
    return f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"


if __name__ == "__main__":
    main()
