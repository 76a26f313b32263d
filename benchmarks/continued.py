"""What a fine-tune leaves of a hardened model: its safety units, its refusals, its signal. Writes JSON and two tables.

.venv/bin/python benchmarks/continued.py [--seed 0] [--split test] [--limit 64] [--out runs/bench/continued]

The testbed's `aligned` with a unit map and a signal of its train split, and the suite's benign fine-tune, unprotected
and as `keelguard finetune PACKAGE` protects it. The limits were fixed on the validation split, of which one half chose
thresholds and the other was measured; what is reported is the test split. It resumes.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from keelguard.data import load_chats, load_requests
from keelguard.evaluation.suites import read_suite
from keelguard.guard.adapter import Signal
from keelguard.guard.decoding import GuardedDecoder
from keelguard.guard.run import hold_out, run_signal
from keelguard.guard.training import SignalConfig
from keelguard.models import load_model
from keelguard.pipeline.continued import FREEZE, PROTECT, check_of_testbed, continue_training
from keelguard.pipeline.seal import check_seal, read_seal, seal
from keelguard.progress import ConsoleReporter
from keelguard.runs import read_json, write_json
from keelguard.testbed.build import Testbed, build_testbed
from keelguard.training import TrainConfig
from keelguard.units.diagnose import DiagnoseConfig, diagnose
from keelguard.units.evidence import ProofConfig, make_probe
from keelguard.units.finetune import FinetuneConfig
from signal_quality import BENIGN, Measure
from tables import markdown, rate, set_table

ROOT = Path(__file__).parents[1]
BUDGET = TrainConfig(steps=100, learning_rate=7e-4, batch_size=16)
ARMS = {
    "unprotected": FinetuneConfig(train=BUDGET, protect=("none",)),
    # A fifth more steps, at which mixing reaches the task loss of an unprotected run.
    "protected": FinetuneConfig(train=replace(BUDGET, steps=120), protect=PROTECT, freeze=FREEZE),
}
ATTACKS = ("direct", "nested", "prefill", "prefill 20")


def main() -> None:
    """Both fine-tunes of one world, and what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--limit", type=int, default=64, help="requests of each kind that are answered under attack")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "continued")
    options = parser.parse_args()
    reporter = ConsoleReporter(interval=60)
    files = build_testbed(only=["aligned"], seed=options.seed, reporter=reporter)
    done = options.out / f"continued-{options.split}-{options.seed}.json"
    rows = read_json(done)["arms"] if done.exists() else {}
    for name, row in _arms(files, options, set(rows), reporter):
        rows[name] = row
        write_json(done, {"seed": options.seed, "split": options.split, "limit": options.limit, "arms": rows})
    tables = {"continued": _what_is_left(rows), "continued drift": _drift(rows)}
    for name, table in tables.items():
        print(table)
        if options.split == "test":
            set_table(ROOT / "docs" / "guard.md", name, table)


def _arms(files: Testbed, options: Any, done: set[str], reporter: Any) -> Any:
    """(name, figures) of the model before and of each fine-tune that is not done."""
    source, shared = str(files.model("aligned")), options.out / f"made-{options.seed}"
    harmful, utility = files.data / "harmful.train.jsonl", files.data / "utility.train.jsonl"
    chats = load_chats(files.data / "finetune-benign.train.jsonl")
    check = check_of_testbed(files, chats)
    made = run_signal(
        source, check.train, check.calibrate, SignalConfig(), shared / "signal",
        frames=check.frames, held_frames=check.held_frames, reporter=reporter,
    )  # fmt: skip
    if options.split == "validation":
        calibrate, measured = hold_out(check.calibrate, 0.5, options.seed)
        check = replace(check, measured=measured, calibrate=calibrate)
    reading = DiagnoseConfig(safety=(str(harmful),), utility=(str(utility),))
    chart = diagnose(source, reading, out=shared / "map", reporter=reporter).chart
    certificate = shared / "certificate.json"
    write_json(certificate, seal(source, chart))
    suite = read_suite(files.suite(options.split), options.limit)
    suite = replace(suite, attacks={name: suite.attacks[name] for name in ATTACKS})
    measure = Measure(files, suite, options.split, options.limit, reporter)
    if "before" not in done:
        yield (
            "before",
            {"guarded": {"": _guarded(measure, source, None), "signal": _guarded(measure, source, made.signal)}},
        )
    for name, config in ARMS.items():
        if name in done:
            continue
        out = options.out / f"{options.split}-{options.seed}" / name
        found = continue_training(
            source, chats, config,
            out=out, signal=shared / "signal", check=check, chart=chart, safety=load_requests(harmful)[:128],
            held_out=load_chats(files.data / "finetune-benign.validation.jsonl"),
            probe=make_probe(ProofConfig(suite=str(files.suite(options.split)), limit=128), (), ()), reporter=reporter,
        )  # fmt: skip
        assert found.recheck is not None
        tuned = str(found.training.model)
        states = {"": None, "as it was": made.signal, found.recheck.outcome: found.recheck.signal}
        yield (
            name,
            {
                "training": {each: row.to_json() for each, row in found.training.rows.items()},
                "seal": check_seal(read_seal(certificate), tuned).to_json(),
                "recheck": read_json(out / "recheck.json"),
                "guarded": {
                    state: _guarded(measure, tuned, signal)
                    for state, signal in states.items()
                    if signal is not None or not state
                },
            },
        )


def _guarded(measure: Measure, source: str, signal: Signal | None) -> dict[str, Any]:
    loaded = load_model(source)
    decoder = None if signal is None else GuardedDecoder(signal)
    return measure(loaded.model, loaded.tokenizer, decoder, detect=False)


def _what_is_left(rows: dict[str, Any]) -> str:
    lines = []
    for name, row in rows.items():
        for state, found in row["guarded"].items():
            shown = {"": "plain", "signal": "with its signal"}.get(state, f"with its signal, {state}")
            cells = [rate(found["asr"][attack]) for attack in ATTACKS]
            cells += [rate(found["refused"][use]) for use in BENIGN]
            units = "–" if "seal" not in row else f"{len(row['seal']['broken'])} of {row['seal']['selected']}"
            lines.append([f"{name}, {shown}", units, *cells, rate(found["utility"])])
    header = ["", "safety units moved", *ATTACKS, *(f"refused, {use}" for use in BENIGN), "utility"]
    return markdown(header, lines)


def _drift(rows: dict[str, Any]) -> str:
    lines = []
    for name, row in rows.items():
        if "recheck" not in row:
            continue
        steps = row["recheck"]["steps"]
        for number, change in enumerate(steps[0]["report"]["changes"]):
            cells = [_estimate(change["before"])]
            for step in ("as it was", "recalibrated", "retrained"):
                own = [each["report"]["changes"][number] for each in steps if each["name"] == step]
                cells.append(_estimate(own[0]["after"], own[0]) if own else "–")
            what = f"{change['kind']}: {change['name']}"
            limit = f"{'−' if change['name'] == 'AUROC' else '+'}{change['limit']:g}"
            lines.append([f"{name}: {row['recheck']['outcome']}" if not number else "", what, limit, *cells])
    return markdown(["fine-tune: outcome", "", "limit", "before", "as it was", "recalibrated", "retrained"], lines)


def _estimate(found: dict[str, float], change: dict[str, Any] | None = None) -> str:
    text = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    return f"**{text}**" if change and change["over"] else text


if __name__ == "__main__":
    main()
