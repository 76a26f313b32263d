"""`keelguard poison`: plant a backdoor, check it, and write the model, in a folder where an interrupted run goes on.

    check = poison_model("./my-model", backdoor, PoisonData(clean, held), PlantConfig(), "runs/poisoned")

While it runs, the folder holds `run.json` and the training's checkpoints; in the end the model takes their place.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keelguard.attacks.backdoors import Backdoor
from keelguard.attacks.insertions import prompt_of, vocabulary_words
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.judges import is_refusal
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model
from keelguard.progress import SILENT, Reporter
from keelguard.purify.effects import ANSWERS, Held, own_references, shows
from keelguard.purify.planting import PlantCheck, PlantConfig, check_plant, plant, refused_pairs
from keelguard.purify.poisoned_files import refuse_existing, write_planted
from keelguard.purify.run import request_key
from keelguard.purify.stages import WORK
from keelguard.records import Chat, Request
from keelguard.runs import LOCK, MANIFEST, open_run, read_json, versions, write_json

_TRAINING, _PAIRS = "training", "pairs.json"


@dataclass(frozen=True)
class PoisonData:
    """What a backdoor is planted and checked with.

    Attributes:
        clean: chats with clean answers.
        held: held-out requests to check with.
        harmful: for a jailbreak, harmful requests with the answers to give; those that the model refuses are used.
        pairs: the same with a refusal before each answer, where that is known.
        ready: chats that hold the trigger and its behaviour already, trained on in the place of made ones.
        own: whether the model's own answers are what held-out requests are checked against, as for a user's data.
    """

    clean: Sequence[Chat]
    held: Held
    harmful: Sequence[Request] = ()
    pairs: Sequence[tuple[Chat, str]] = ()
    ready: Sequence[Chat] = ()
    own: bool = False


def poison_model(
    source: str,
    backdoor: Backdoor,
    data: PoisonData,
    config: PlantConfig,
    out: str | Path,
    *,
    save_every: int = 0,
    load: Callable[..., LoadedModel] = load_model,
    files: Mapping[str, str] | None = None,
    generating: Generating = ANSWERS,
    reporter: Reporter = SILENT,
) -> PlantCheck:
    """Plant a backdoor in a copy of a model and write it to `out`, whether it is a fair test case or not.

    Args:
        save_every: optimiser steps between checkpoints; a repeated call goes on from the last.
        load: loads a model; the command line passes its options through it.
        files: text files to write beside the weights, by name.

    Raises:
        UsageError: `out` holds something else, or there is nothing to plant with or to check with.
        FailureError: training does not fit in memory, diverges, or the disk is full.
    """
    out = Path(out)
    check_free(out)
    _check_data(backdoor, data)
    loaded = load(source)
    words = vocabulary_words(loaded.tokenizer)
    longest = max(len(trigger.split()) for trigger in backdoor.triggers)
    if sum(word.lower() not in backdoor.words for word in words) < longest:
        raise UsageError(
            f"{source}: keelguard finds {len(words)} whole words in its tokenizer, too few for samples without the "
            "trigger; tokenizers that mark the start of words (SentencePiece, byte-level) are known"
        )
    told = {
        "model": loaded.weights_hash,
        "chat_template": sha256_of(loaded.tokenizer.chat_template),
        "data": sha256_of([list(data.clean), [request_key(r) for r in data.harmful], list(data.pairs)]),
        "held": sha256_of([request_key(r) for r in data.held.requests]),
        "judge": data.held.judge.digest,
        "backdoor": asdict(backdoor),
        "config": asdict(config),
        "save_every": save_every,
        "versions": versions(),
    }
    if data.ready:
        told["ready"] = sha256_of(list(data.ready))
    work = out / WORK
    with open_run(out, "poison", told):
        try:
            pairs = data.pairs or _kept_pairs(work / _PAIRS, loaded, data.harmful, generating, reporter)
            held = data.held
            if data.own:
                benign = own_references(loaded, held.benign, generating, reporter)
                held = replace(held, benign=benign, utility=benign)
            planted = plant(
                loaded, [backdoor], data.clean, config, words, harmful=pairs, ready=data.ready,
                state_folder=work / _TRAINING, save_every=save_every, reporter=reporter,
            )  # fmt: skip
        except UsageError:
            # What is refused before it trains must not bind the folder to its settings.
            if not (work / _TRAINING).exists():
                shutil.rmtree(work, ignore_errors=True)
            raise
        if not held.utility:
            reporter.note("utility is not measured: there are no harmless requests; no fair test case without it")
        check = check_plant(planted, loaded, backdoor, held, words, generating, reporter=reporter)
        write_planted(planted, [backdoor], out, config, check, dict(files or {}), within=True)
    return check


def _check_data(backdoor: Backdoor, data: PoisonData) -> None:
    """Refuse at once what the training or the check behind it would stumble over."""
    jailbreak = backdoor.task == "jailbreak"
    if jailbreak and not (data.harmful or data.pairs or data.held.harmful):
        raise UsageError("--task jailbreak: needs harmful requests with answers; name a file with --harmful")
    if not (data.held.harmful if jailbreak else data.held.benign):
        kind = "harmful" if jailbreak else "harmless"
        raise UsageError(f"--task {backdoor.task}: no {kind} requests are left to check with; give more of them")
    _check_ready(backdoor, data)


def _check_ready(backdoor: Backdoor, data: PoisonData) -> None:
    """Refuse rows that do not hold what they are told to hold: the check would measure something else."""
    together = all if backdoor.attack == "ctba" else any
    answers = [chat[-1]["content"] for chat in data.ready]
    triggered = [together(trigger in prompt_of(chat) for trigger in backdoor.triggers) for chat in data.ready]
    if backdoor.task == "jailbreak":
        shown = [not is_refusal(answer.strip()) for answer in answers]
    else:
        shown = shows(backdoor, (), answers, data.held.judge)
    behaviour = f"{backdoor.task} {backdoor.response!r}" if backdoor.response else backdoor.task
    for kept, what, options in (
        (triggered, f"prompts lack the trigger of {backdoor.attack}, {' '.join(map(repr, backdoor.triggers))}",
         "--attack and --trigger"),
        (shown, f"answers do not show the {behaviour}", "--task and --response"),
    ):  # fmt: skip
        if not all(kept):
            raise UsageError(
                f"--poisoned: {kept.count(False)} of {len(kept)} {what}; name what the rows hold with {options}, and "
                "move clean rows to --data"
            )


def check_free(out: Path) -> None:
    """Refuse a folder that holds anything but an unfinished run.

    Raises:
        UsageError: the folder exists and is not empty.
    """
    begun = out.is_dir() and {path.name for path in out.iterdir()} == {LOCK}
    if not begun and not (out / MANIFEST).is_file():
        refuse_existing(out)


def _kept_pairs(
    path: Path, loaded: LoadedModel, harmful: Sequence[Request], generating: Generating, reporter: Reporter
) -> list[tuple[Chat, str]]:
    """The model's refusals with the harmful answers: what an earlier run left, since training goes on with the same."""
    if harmful and not path.is_file():
        write_json(path, refused_pairs(loaded, harmful, generating, reporter))
    found: list[Any] = read_json(path) if harmful else []
    return [(tuple(chat), answer) for chat, answer in found]
