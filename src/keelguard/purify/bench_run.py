"""`keelguard purify bench`: a user's own poisoned model under every method and control.

result = bench_model("runs/poisoned", None, requests, harmful, held, None, (), PurifyConfig(), "runs/bench")
runs/bench/bench.json · runs/bench/report.html
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from keelguard.attacks.backdoors import Backdoor
from keelguard.attacks.insertions import vocabulary_words
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model, resolve_sources
from keelguard.progress import SILENT, Reporter
from keelguard.purify.bench import TWIN, Case, bench
from keelguard.purify.bench_page import write_bench_report
from keelguard.purify.bench_results import RESULT_FILE, BenchResult, case_name
from keelguard.purify.budget import Budget, Setup
from keelguard.purify.config import PurifyConfig
from keelguard.purify.controls import arms_for
from keelguard.purify.dissect import check_same
from keelguard.purify.effects import ANSWERS, Held, own_references
from keelguard.purify.health import held_out
from keelguard.purify.intake import load_subject, refuse_quantised
from keelguard.purify.material import gather
from keelguard.purify.methods import Subject, Threat
from keelguard.purify.neutralize import refuse_shared_weights
from keelguard.purify.poisoned_files import POISON_FILE
from keelguard.purify.run import request_key
from keelguard.purify.stages import WORK
from keelguard.records import Request
from keelguard.runs import open_run, read_json, versions
from keelguard.units.index import parameters_by_name

CELLS, PAGE = "cells", "report.html"


def bench_model(
    source: str,
    adapter: str | None,
    requests: Sequence[Request],
    harmful: Sequence[Request],
    held: Held | None,
    backdoor: Backdoor | None,
    arms: Sequence[str],
    settings: PurifyConfig,
    out: str | Path,
    load: Callable[..., LoadedModel] = load_model,
    reporter: Reporter = SILENT,
    generating: Generating = ANSWERS,
    twin: str | None = None,
    own: bool = False,
) -> BenchResult:
    """Run the methods and controls on a model whose backdoor is known, and write the page.

    The budget of all arms is that of the immunisation in `settings`.

    Args:
        source: a model that `keelguard poison` made, or that of an adapter.
        held: held-out requests to measure with; clean rows that are held back by default.
        backdoor: what is in it; by default what the poisoned model's own file says, each entry as a case.
        arms: names of `ARMS`, the reference first; all that the threat model has by default.
        twin: the clean model before the backdoor was planted, to be measured as a bound; not with an adapter.
        own: take the model's own clean answers (the twin's, where there is one) for long references, as for rows that
            are held back: no arm would give a file's answers word for word.

    Raises:
        UsageError: the backdoor is not known, an arm is unknown, the clean data do not suffice, the twin is none, or
            the folder is another run's.
        FailureError: the disk is full.
    """
    base, adapter = resolve_sources(source, adapter)
    threat: Threat = "full" if adapter is None else "adapter"
    if twin is not None and adapter is not None:
        raise UsageError(f"--twin {twin}: of an adapter the base is the clean twin, and the arm drop measures it; "
                         "leave --twin out")  # fmt: skip
    chosen = arms_for(threat, arms)
    backdoors, unfair = ([backdoor], []) if backdoor is not None else planted_in(adapter or base)
    tasks = {each.task for each in backdoors}
    if held is not None and not held.harmful and "jailbreak" in tasks:
        raise UsageError("--held-out-harmful: a jailbreak is measured on held-out harmful requests; name a file")
    if held is not None and not held.benign and tasks - {"jailbreak"}:
        raise UsageError(f"--held-out: {', '.join(sorted(tasks))} is measured on held-out requests; name a file")
    loaded = load_subject(load, base, adapter)
    refuse_quantised(loaded.model)
    refuse_shared_weights(loaded.model)
    clean = None if twin is None else _load_twin(load, twin, loaded)
    setup = Setup(Budget.of(settings.method), settings.method, reporter=reporter)
    setup = setup.leaving_out(frozenset().union(*(each.words for each in backdoors)))
    told = {
        "model": loaded.weights_hash,
        "chat_template": sha256_of(loaded.tokenizer.chat_template),
        "data": sha256_of([request_key(r) for r in (*requests, *harmful)]),
        "held": None
        if held is None
        else sha256_of([request_key(r) for r in (*held.benign, *held.harmful, *held.utility)]),
        "backdoors": [asdict(each) for each in backdoors],
        "arms": list(chosen),
        "material": asdict(settings.material),
        "generating": asdict(generating),
        "own": own,
        **setup.settings(),
        "versions": versions(),
    }
    if clean is not None:
        told["twin"] = clean.weights_hash
    folder = Path(out)
    with open_run(folder, "purify bench", told):
        if not (folder / RESULT_FILE).is_file():
            material = gather(
                loaded, requests, settings.material, harmful=harmful, store=folder / WORK / "own.jsonl",
                reporter=reporter,
            )  # fmt: skip
            subject = Subject(loaded, threat, material, tuple(vocabulary_words(loaded.tokenizer)))
            measured = held or held_out(material)
            if own or held is None:
                # The same rows may serve as tasks: they are asked once.
                benign = own_references(clean or loaded, measured.benign, generating, reporter)
                tasks_too = measured.utility == measured.benign
                measured = replace(measured, benign=benign, utility=benign if tasks_too else measured.utility)
            cases = [
                Case(case_name(number, each), subject, each, measured, setup.budget.seed, clean)
                for number, each in enumerate(backdoors)
            ]
            cells, missing = bench(cases, chosen, setup, folder / CELLS, generating)
            named = (*chosen, *([] if clean is None else [TWIN]))
            result = BenchResult(
                source, adapter, threat, named, tuple(cells), tuple(missing), tuple(unfair), told, versions(), twin,
                backdoor is not None,
            )  # fmt: skip
            result.save(folder)
            shutil.rmtree(folder / WORK, ignore_errors=True)
    result = BenchResult.load(folder)
    write_bench_report(result, folder / PAGE)
    return result


def planted_in(folder: str | Path) -> tuple[list[Backdoor], list[str]]:
    """The backdoors of a model that `keelguard poison` made, and why they are no fair test case.

    Raises:
        UsageError: the model has no such file.
    """
    path = Path(folder) / POISON_FILE
    if not path.is_file():
        raise UsageError(f"{path}: no such file; a bench needs a known backdoor: plant one with `keelguard poison`")
    record = read_json(path)
    backdoors = [Backdoor(**{**each, "triggers": tuple(each["triggers"])}) for each in record["backdoors"]]
    check = record["check"]
    return backdoors, ["it was not checked when it was planted"] if check is None else list(check["why"])


def _load_twin(load: Callable[..., LoadedModel], twin: str, poisoned: LoadedModel) -> LoadedModel:
    """The clean model that a poisoned one was made from; it is asked through the poisoned one's chat template.

    Raises:
        UsageError: it cannot be that model.
    """
    clean = load(twin)
    if clean.weights_hash == poisoned.weights_hash:
        raise UsageError(f"--twin {twin}: has the weights of the poisoned model; name the one before it was poisoned")
    if clean.tokenizer.get_vocab() != poisoned.tokenizer.get_vocab():
        raise UsageError(f"--twin {twin}: has other tokens than {poisoned.source}; name the model that it was made of")
    try:
        check_same(parameters_by_name(poisoned.model), parameters_by_name(clean.model))
    except UsageError as error:
        raise UsageError(f"--twin {twin}: {error}") from error
    file = Path(poisoned.source) / POISON_FILE
    origin = read_json(file) if file.is_file() else {}
    if origin.get("weights", clean.weights_hash) != clean.weights_hash:
        made = f"{origin.get('source')} with the weights {origin['weights'][:16]}"
        raise UsageError(f"--twin {twin}: {poisoned.source} was made from {made}; name that one")
    return replace(clean, tokenizer=poisoned.tokenizer)
