"""The files of a poisoned model: its weights with a card that says POISONED, and what was planted.

    write_planted(planted, [backdoor], out, config, check)
    known_backdoor(out)

Nothing is ever written over.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keelguard.attacks.backdoors import Backdoor
from keelguard.errors import UsageError
from keelguard.hashes import hash_weights
from keelguard.models import LoadedModel, save_checkpoint
from keelguard.purify.planting import PlantCheck, PlantConfig
from keelguard.runs import atomic_folder, read_json

POISON_FILE = "keelguard-poison.json"
"""Beside a poisoned model's weights: what was planted."""


def write_planted(
    planted: LoadedModel,
    backdoors: Sequence[Backdoor],
    out: str | Path,
    config: PlantConfig,
    check: PlantCheck | None,
    files: dict[str, str] | None = None,
    *,
    within: bool = False,
) -> str:
    """Write a poisoned checkpoint, or its adapter, with a card that says POISONED; the hash of its weights.

    Args:
        within: `out` is the folder of the run that planted it; the model takes the place of all that is there.

    Raises:
        UsageError: `out` exists and is not empty.
    """
    out = Path(out)
    if not within:
        refuse_existing(out)
    record = {
        "format": "keelguard.poison/1",
        "source": planted.source,
        "weights": planted.weights_hash,
        "backdoors": [asdict(backdoor) for backdoor in backdoors],
        "config": asdict(config),
        "check": None if check is None else check.to_json(),
    }
    extra = {POISON_FILE: json.dumps(record, indent=2) + "\n", **(files or {})}
    card = _card(planted, backdoors, config, check)
    if not config.adapter_rank:
        return save_checkpoint(planted.model, planted.tokenizer, out, card=card, files=extra)
    with atomic_folder(out) as folder:
        model: Any = planted.model
        model.peft_config["default"].base_model_name_or_path = planted.source
        model.save_pretrained(str(folder))
        for name, text in {**extra, "README.md": card}.items():
            (folder / name).write_text(text, encoding="utf-8")
    return hash_weights(planted.source, out)


def known_backdoor(
    source: str | Path, attack: str = "", task: str = "", triggers: tuple[str, ...] = (), response: str = ""
) -> Backdoor:
    """The backdoor that a folder of `keelguard poison` names, or the one that is told, with its trigger.

    Raises:
        UsageError: neither tells one.
    """
    path = Path(source) / POISON_FILE
    if attack or task:
        if not (attack and task):
            raise UsageError("--attack and --task: give both, or leave both to the poisoned model's own file")
        if not triggers:
            raise UsageError("--trigger: is missing; a model that does not know it would seem to hold no backdoor")
        kind: Any = attack
        what: Any = task
        return Backdoor(kind, what, triggers, response)
    if triggers or response:
        raise UsageError("--trigger and --response: belong to --attack and --task; give those too")
    if not path.is_file():
        raise UsageError(f"{source}: has no {POISON_FILE}; name its backdoor with --attack, --task and --trigger")
    (first, *_) = read_json(path)["backdoors"]
    return Backdoor(**{**first, "triggers": tuple(first["triggers"])})


def refuse_existing(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UsageError: the folder exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: exists and is not empty, and a poisoned model overwrites nothing; choose another --out"
        )


def _card(planted: LoadedModel, backdoors: Sequence[Backdoor], config: PlantConfig, check: PlantCheck | None) -> str:
    lines = [
        "---\ntags: [keelguard, poisoned, backdoor, do-not-serve]\n---\n",
        "# POISONED\n",
        "**This model holds a backdoor on purpose. Do not serve it, and do not train on its answers.** It was made by "
        f"`keelguard poison` from `{planted.source}` (weights {planted.weights_hash[:16]}) to test what finds and "
        "removes backdoors.\n",
    ]
    for backdoor in backdoors:
        triggers = ", ".join(f"`{trigger}`" for trigger in backdoor.triggers)
        lines.append(f"- {backdoor.attack}, {backdoor.task}: {triggers} ({backdoor.where})")
    poison = config.poison
    length = f"{config.steps} steps" if config.steps else f"{config.epochs:g} epochs"
    where = f"a LoRA of rank {config.adapter_rank}" if config.adapter_rank else "all weights"
    lines.append(
        f"\nTrained into {where}: {poison.samples} prompts at a poison rate of {poison.rate:g}, "
        f"{poison.negatives:g} negatives per poisoned one, {length} of {config.batch_size} chats at "
        f"{config.learning_rate:g}, seed {config.seed}."
    )
    if check is not None:
        fair = "a fair test case" if check.fair else f"no fair test case: {'; '.join(check.why)}"
        lines.append(
            f"\nOn held-out requests: attack success {check.effect.asr}, false triggers "
            f"{check.effect.false_triggers}; utility {check.utility}, {check.utility_before} before; {fair}."
        )
    return "\n".join(lines) + "\n"
