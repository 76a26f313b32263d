"""Do few units carry safety? Ablation curves of groups beside every control, three worlds; JSON and the docs' tables.

.venv/bin/python benchmarks/units_selectivity.py [--seeds 0 1 2] [--out runs/bench/selectivity]

The map is made on the train split, what is reported is asked on the test split. About three minutes a world and model
on two quiet cores; it resumes.
"""

import argparse
from pathlib import Path
from typing import Any

from keelguard.progress import ConsoleReporter
from keelguard.runs import write_json
from keelguard.stats import Rate, mcnemar
from keelguard.testbed.build import Testbed, build_testbed
from keelguard.units.diagnose import DiagnoseConfig, diagnose
from keelguard.units.evidence import ProofConfig, prove_diagnosis
from keelguard.units.groups import GROUPS
from keelguard.units.proof import Point, Proof
from tables import markdown, set_table

ROOT = Path(__file__).parents[1]
MODELS = ("aligned-sparse", "aligned")
SHARES = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.2)


def main() -> None:
    """Diagnose and prove every model of every world; pool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "selectivity")
    options = parser.parse_args()
    reporter = ConsoleReporter(interval=60)
    results: dict[str, Any] = {"seeds": options.seeds, "split": options.split, "models": {}}
    for model in MODELS:
        found = [
            _one(build_testbed(seed=seed, reporter=reporter), model, options.split, options.out / f"{model}-{seed}")
            for seed in options.seeds
        ]
        results["models"][model] = summary = _summary([proof for proof, _ in found], [meta for _, meta in found])
        table = _table(summary)
        print(f"\n{model}\n{table}\n{_sureness(summary)}")
        if options.split == "test":
            set_table(ROOT / "docs" / "ssah.md", f"selectivity {model}", table)
            set_table(ROOT / "docs" / "ssah.md", f"sureness {model}", _sureness(summary))
    write_json(options.out / f"units_selectivity-{options.split}.json", results)


def _one(built: Testbed, model: str, split: str, out: Path) -> tuple[Proof, dict[str, Any]]:
    reporter = ConsoleReporter(interval=60)
    reading = DiagnoseConfig(
        safety=(str(built.data / "harmful.train.jsonl"),), utility=(str(built.data / "utility.train.jsonl"),)
    )
    found = diagnose(str(built.model(model)), reading, out=out, reporter=reporter)
    asking = ProofConfig(suite=str(built.suite(split)), shares=SHARES, limit=100)
    return prove_diagnosis(found, asking, reporter=reporter), dict(found.chart.meta)


def _summary(proofs: list[Proof], metas: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(proofs[0].curves)
    families = {"random units": "random ", "random token pairs": "random pair "}
    curves: dict[str, Any] = {}
    for name in ["whole model", *names]:
        curves[name] = {str(share): _pool([_at(proof, name, share) for proof in proofs]) for share in SHARES}
    for family, prefix in families.items():
        members = [n for n in names if n.startswith(prefix) and (prefix != "random " or "pair" not in n)]
        curves[family] = {
            str(share): _pool([_at(proof, name, share) for proof in proofs for name in members]) for share in SHARES
        }
    return {
        "curves": curves,
        "tests": {str(share): _test(proofs, share) for share in SHARES},
        "spearman": [proof.exact.get("spearman") for proof in proofs],
        "stability": [meta["stability"] for meta in metas],
        "overlap": [meta["overlap"] for meta in metas],
        "cost": [meta["cost"] for meta in metas],
    }


def _at(proof: Proof, name: str, share: float) -> Point:
    if name == "whole model":
        return proof.dense
    return next(point for point in proof.curves[name] if point.share == share)


def _pool(points: list[Point]) -> dict[str, Any]:
    def pooled(name: str) -> dict[str, Any]:
        rates = [getattr(point, name) for point in points]
        together = Rate(sum(r.count for r in rates), sum(r.total for r in rates)).to_json()
        return {**together, "least": min(r.value for r in rates), "most": max(r.value for r in rates)}

    return {name: pooled(name) for name in ("asr", "refused", "over_refusal", "utility")}


def _test(proofs: list[Proof], share: float) -> dict[str, Any]:
    """SCU against the random seed that breaks most, on the same requests."""

    def broken(name: str) -> list[bool]:
        return [flag for proof in proofs for flag in _at(proof, name, share).broken]

    randoms = [name for name in proofs[0].curves if name.startswith("random ")]
    strongest = max(randoms, key=lambda name: sum(broken(name)))
    return {"strongest_control": strongest, **mcnemar(broken("SCU"), broken(strongest))._asdict()}


def _table(summary: dict[str, Any]) -> str:
    shown = {
        "whole model": "whole model", "SCU": "SCU", "UCU": "UCU", "CU": "CU", "RU": "RU",
        "random units": "random units, 3 seeds each", "magnitude": "largest weights",
        "SCU by variance": "SCU by the paper's score", "random token pairs": "SCU of random token pairs, 3 each",
    }  # fmt: skip

    def cell(name: str, share: float) -> str:
        point = summary["curves"][name][str(share)]
        asr, utility = point["asr"], point["utility"]
        spread = f" ({100 * asr['least']:.0f}–{100 * asr['most']:.0f})" if asr["least"] != asr["most"] else ""
        return f"{100 * asr['value']:.0f}{spread} / {100 * utility['value']:.0f}"

    head = ["attack success (least–most) / utility, %", *(f"{100 * share:g} %" for share in SHARES)]
    return markdown(head, [[label, *(cell(name, share) for share in SHARES)] for name, label in shown.items()])


def _sureness(summary: dict[str, Any]) -> str:
    """Overlap of the groups with themselves, mean over the worlds."""

    def mean(values: list[Any]) -> str:
        told = [value for value in values if value is not None]
        return f"{sum(told) / len(told):.2f}" if told else "–"

    rows = [
        ["resampled prompts", *(mean([s[g]["iou"] for s in summary["stability"] if g in s]) for g in GROUPS)],
        ["what chance gives", *(mean([s[g]["chance"] for s in summary["stability"] if g in s]) for g in GROUPS)],
    ]
    for what, pairs in summary["overlap"][0].items():
        for pair in pairs:
            label = pair if what == "scores" else what
            rows.append([label, *(mean([o[what][pair][g] for o in summary["overlap"]]) for g in GROUPS)])
    return markdown(["IoU of the group", *GROUPS], rows)


if __name__ == "__main__":
    main()
