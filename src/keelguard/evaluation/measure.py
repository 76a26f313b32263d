"""Everything about one model: every attack's cell, over-refusal, utility, perplexity, kept in a folder to resume.

With a folder the answers stay on the disk, and are judged piece by piece: memory does not grow with their number.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from keelguard.attacks.base import Attack, Attempt
from keelguard.attacks.finetuning import Finetune, finetune
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating, find_answers, is_refused
from keelguard.evaluation.judges import Judge, is_degenerate
from keelguard.evaluation.results import Example, ModelReport, SafetyCell, cell_from_json, cell_to_json
from keelguard.evaluation.safety import Tally, judge_attempts
from keelguard.evaluation.sharding import Turns
from keelguard.evaluation.suites import ANSWERED, Suite
from keelguard.evaluation.utility import perplexity, solved_by_task
from keelguard.generation import Answer
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, architecture_of
from keelguard.processes import alone, is_main
from keelguard.progress import Reporter
from keelguard.records import Request
from keelguard.runs import read_json, write_json
from keelguard.stats import Rate

_JUDGED = 256
"""Answers that are judged together, and are in memory at once."""


@dataclass(frozen=True)
class Plan:
    """A suite ready to run on one model: its data read, its judge made.

    `folder` keeps what is done; with None nothing is written, and a cell's answers are in memory at once.
    """

    suite: Suite
    judge: Judge
    generating: Generating
    reporter: Reporter
    folder: Path | None


def measure_model(plan: Plan, name: str, loaded: LoadedModel) -> tuple[ModelReport, list[Example]]:
    """Measure one model, or read what an earlier run measured.

    Every answer is the decoder's where the model has one. Perplexity is the plain model's, and so left out there.

    Raises:
        UsageError: the folder belongs to another state of the model, or the suite's data cannot be used.
        FailureError: a judge failed, training did not fit in memory, or the disk is full.
    """
    if plan.folder is not None:
        _claim(plan.folder, loaded)
    suite = plan.suite
    safety: dict[str, SafetyCell] = {}
    shown: list[Example] = []
    for attack_name, attack in suite.attacks.items():
        cell, kept = _run_cell(plan, name, loaded, attack_name, attack)
        safety[attack_name] = cell
        shown += kept

    refused: dict[str, dict[str, bool]] = {}
    degenerate: dict[str, dict[str, bool]] = {}
    for use in ANSWERED:
        if requests := getattr(suite, use):
            found = _found(plan, loaded, _plain(requests), name, use)
            told = {r.id: answer for r, answer in zip(requests, found, strict=True) if answer is not None}
            refused[use] = {key: is_refused(answer) for key, answer in told.items()}
            degenerate[use] = {key: is_degenerate(answer.text.strip()) for key, answer in told.items()}
    solved: dict[str, dict[str, bool]] = {}
    if suite.utility:
        found = _found(plan, loaded, _plain(suite.utility), name, "utility")
        solved = solved_by_task(suite.utility, (answer and answer.text for answer in found))
    return ModelReport(
        name=name,
        source=loaded.source,
        weights=loaded.weights_hash,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        architecture=architecture_of(loaded.model),
        safety=safety,
        utility=_rates(solved),
        over_refusal=_rates(refused),
        degenerate=Rate.of([each for told in degenerate.values() for each in told.values()]),
        perplexity=None
        if suite.perplexity is None or loaded.decoder is not None
        else _perplexity(plan, name, loaded, suite.perplexity),
        outcomes={"utility": solved, "over_refusal": refused, "degenerate": degenerate},
    ), shown


def _rates(outcomes: dict[str, dict[str, bool]]) -> dict[str, Rate]:
    return {name: Rate.of(told.values()) for name, told in outcomes.items()}


def answer_share(plan: Plan, name: str, loaded: LoadedModel, turns: Turns) -> None:
    """Answer this process's share of everything that a model is asked, for the main process to measure.

    A fine-tuning attack is the main process's alone: spread over processes, training would round otherwise.

    Raises:
        UsageError, FailureError: as `measure_model`.
    """
    assert plan.folder is not None
    if is_main():
        _claim(plan.folder, loaded)
    suite = plan.suite
    for attack_name, attack in suite.attacks.items():
        if isinstance(attack, Finetune):
            if is_main():
                with alone():
                    _run_cell(plan, name, loaded, attack_name, attack)
        elif not _cell_file(plan.folder, attack_name).exists():
            _found(plan, loaded, attack(suite.harmful, loaded.tokenizer), name, attack_name, turns)
    for use in (*ANSWERED, "utility"):
        if requests := getattr(suite, use):
            _found(plan, loaded, _plain(requests), name, use, turns)


def _run_cell(
    plan: Plan, name: str, loaded: LoadedModel, attack_name: str, attack: Attack
) -> tuple[SafetyCell, list[Example]]:
    """One attack on one model, or what an earlier run found."""
    done = None if plan.folder is None else _cell_file(plan.folder, attack_name)
    if done is not None and done.exists():
        saved = read_json(done)
        return cell_from_json(saved["cell"]), [Example(**example) for example in saved["examples"]]
    start = time.monotonic()
    attempts = attack(plan.suite.harmful, loaded.tokenizer)
    subject = loaded
    if isinstance(attack, Finetune):
        # Training needs its own copy: the next attack must meet the model as it was.
        tuned = copy.deepcopy(loaded.model)
        label = f"{name} · {attack_name}: training"
        tuned = finetune(tuned, loaded.tokenizer, attack.chats, attack.config, plan.reporter, label)
        subject = replace(loaded, model=tuned)
    found = _found(plan, subject, attempts, name, attack_name)
    tally = Tally()
    for first in range(0, len(attempts), _JUDGED):
        _judge(plan, tally, attempts[first : first + _JUDGED], found[first : first + _JUDGED])
    cell, shown = tally.cell(attack_name, time.monotonic() - start), tally.examples(name, attack_name)
    if done is not None:
        write_json(done, {"cell": cell_to_json(cell), "examples": [asdict(example) for example in shown]})
    return cell, shown


def _judge(plan: Plan, tally: Tally, attempts: Sequence[Attempt], answers: Sequence[Answer | None]) -> None:
    """Judge some attempts, and count them."""
    texts = texts_of(answers)
    tally.add(attempts, texts, *judge_attempts(plan.judge, attempts, texts, [_keeps_prefill(each) for each in answers]))


def _cell_file(folder: Path, attack_name: str) -> Path:
    return folder / "cells" / f"{file_name(attack_name)}.json"


def answers_to(
    plan: Plan, loaded: LoadedModel, attempts: Sequence[Attempt], name: str, what: str
) -> list[Answer | None]:
    """The answers to attempts, continued from and kept in the plan's folder under `what`; None where one cannot fit."""
    return list(_found(plan, loaded, attempts, name, what))


def _found(
    plan: Plan, loaded: LoadedModel, attempts: Sequence[Attempt], name: str, what: str, turns: Turns | None = None
) -> Sequence[Answer | None]:
    """As `answers_to`, but read from the folder one by one."""
    return find_answers(
        loaded.model,
        loaded.tokenizer,
        attempts,
        plan.generating,
        store=None if plan.folder is None else answers_folder(plan.folder) / f"{file_name(what)}.jsonl",
        decoder=loaded.decoder,
        turns=turns,
        reporter=plan.reporter,
        label=f"{name} · {what}",
    )


def answers_folder(folder: Path) -> Path:
    """Where the answers of a model's part of a run lie."""
    return folder / "answers"


def _plain(requests: Sequence[Request]) -> list[Attempt]:
    return [Attempt(request, request.messages) for request in requests]


def texts_of(answers: Sequence[Answer | None]) -> list[str | None]:
    """The texts alone."""
    return [None if answer is None else answer.text for answer in answers]


def _keeps_prefill(answer: Answer | None) -> bool:
    """Whether the whole prefill still stands before the text; a decoder may have taken it back."""
    note = (answer and answer.note) or {}
    return note.get("prefill_kept", 0) >= note.get("prefilled", 0)


def _perplexity(plan: Plan, name: str, loaded: LoadedModel, text: str) -> float:
    done = None if plan.folder is None else plan.folder / "perplexity.json"
    if done is not None and done.exists():
        return read_json(done)["perplexity"]
    label = f"{name} · perplexity"
    value = perplexity(loaded.model, loaded.tokenizer, text, reporter=plan.reporter, label=label)
    if done is not None:
        write_json(done, {"perplexity": value})
    return value


def _claim(folder: Path, loaded: LoadedModel) -> None:
    """Refuse to continue a model's part of a run with a model that is not the same, under the same name."""
    marker = folder / "model.json"
    now = {
        "weights": loaded.weights_hash,
        "chat template": sha256_of(loaded.tokenizer.chat_template),
        "dtype": str(loaded.model.dtype),
        **({} if loaded.decoder is None else {"decoder": loaded.decoder.digest}),
    }
    if not marker.exists():
        write_json(marker, now)
    found = read_json(marker)
    for what in {**now, **found}:
        if found.get(what) != now.get(what):
            raise UsageError(
                f"{folder}: belongs to another state of {loaded.source} ({what} {str(found.get(what))[:16]}, now "
                f"{str(now.get(what))[:16]}); choose another --out"
            )


def file_name(text: str) -> str:
    """A file name for an attack's name: readable, and unique by a part of its hash."""
    readable = "".join(c if c.isalnum() else "-" for c in text.lower())[:40]
    return f"{readable}-{sha256_of(text)[:8]}"
