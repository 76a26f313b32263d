"""The audit: every attack of a suite on every model, utility and over-refusal beside it, with intervals.

    result = audit(model, tokenizer, AuditConfig(suite="suite.yaml"))
    result = audit_models(["base", "aligned"], AuditConfig(suite="testbed"), out="runs/audit")

A run folder keeps every batch of answers, so that an interrupted audit goes on where it was. Under `accelerate launch`
every process answers its share, and the main one judges and writes.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelguard.attacks.prompts import PrefillAnswer
from keelguard.data import BY_CONVENTION, Columns
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.comparisons import compare
from keelguard.evaluation.judges import Judge, JudgeConfig, WorldJudge, make_judge
from keelguard.evaluation.measure import Plan, answer_share, answers_folder, measure_model
from keelguard.evaluation.results import AuditResult, Example, ModelReport
from keelguard.evaluation.sharding import Turns, merge_parts
from keelguard.evaluation.suites import (
    Suite,
    general_suite,
    read_suite,
    select_attacks,
    with_perplexity,
    with_requests,
)
from keelguard.generation import Decoder
from keelguard.hashes import hash_model
from keelguard.models import LoadedModel, load_model
from keelguard.processes import barrier, is_main, main_first, open_shared_run, process, processes
from keelguard.progress import SILENT, Reporter
from keelguard.records import Exchange
from keelguard.runs import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class AuditConfig:
    """What an audit tests and how. Files replace what the suite names."""

    suite: str = _option("general", "testbed, general, or a YAML suite file")
    requests: tuple[str, ...] = _option((), "files or data sets of harmful requests, in place of the suite's")
    benign: tuple[str, ...] = _option((), "files of benign requests that should be answered")
    borderline: tuple[str, ...] = _option((), "files of safe requests that look unsafe")
    benign_nested: tuple[str, ...] = _option((), "files of benign requests inside stories and roles")
    utility: tuple[str, ...] = _option((), "files of tasks with reference answers")
    perplexity: str | None = _option(None, "a text file whose perplexity is measured")
    attacks: tuple[str, ...] = _option((), "names of attacks; all of the suite by default")
    judge: JudgeConfig | None = _option(None, "who judges; the suite's judge by default")
    columns: Columns = _option(BY_CONVENTION, "columns of the request files, where convention does not find them")
    where: str | None = _option(None, "only rows of the request files with this value, as in label=unsafe")
    limit: int = _option(100, "at most this many requests of each file but utility; 0 takes all")
    max_new_tokens: int = _option(0, "where answers are cut off; 0 takes the suite's setting")
    batch_size: int = _option(0, "rows per batch; 0 chooses by the size of the model")
    seed: int = _option(0, "seed of sampled answers")
    reference: str | None = _option(None, "name of the model that the others are compared with; the first by default")

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give 0 or more")


def audit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    config: AuditConfig = AuditConfig(),
    *,
    name: str = "model",
    decoder: Decoder | None = None,
    reporter: Reporter = SILENT,
) -> AuditResult:
    """Audit one model in memory; nothing is written.

    Args:
        model: left as it is; a fine-tuning attack trains a copy.
        decoder: measure the model a second time with its answers, such as `GuardedDecoder(signal)`, beside the plain.

    Raises:
        UsageError: the configuration, the suite or its data are unusable.
        FailureError: a judge failed.
    """
    suite = load_suite(config)
    plan = Plan(suite, make_suite_judge(config.judge, suite), _generating(config, suite), reporter, None)
    loaded = LoadedModel(model, tokenizer, name, hash_model(model))
    measured = _measure(plan, name, loaded, None if decoder is None else lambda _: decoder)
    return _result(plan, config, [report for report, _ in measured], [each for _, kept in measured for each in kept])


def audit_models(
    models: Sequence[str],
    config: AuditConfig,
    *,
    out: str | Path,
    reporter: Reporter = SILENT,
    load: Callable[[str], LoadedModel] = load_model,
    guard: Callable[[LoadedModel], Decoder] | None = None,
    guard_digest: str = "",
    reveal: bool = False,
) -> AuditResult:
    """Audit checkpoints one after the other in a run folder, or continue that.

    Args:
        models: what `load` takes, or NAME=that.
        out: the run folder; `audit.json` is written into it.
        load: loads a model; the command line passes its options through it.
        guard: makes of a loaded model the decoder that guards it, or refuses the model. Each model is then measured
            plain and as "NAME guarded", and the two are compared.
        guard_digest: the hash of all that determines these decoders, for the run's settings.
        reveal: keep the text of harmful answers in `audit.json`.

    Under `accelerate launch` every process gets the result, but for the main one as `audit.json` has it.

    Raises:
        UsageError: a model, the configuration, the suite or its data are unusable, or `out` is another run's.
        FailureError: a judge failed, or the disk is full.
    """
    with main_first():
        suite = load_suite(config)
        # The others judge nothing, and a local judge would take their memory.
        judge: Any = make_suite_judge(config.judge, suite) if is_main() else None
        named = name_models(models)
        if guard is not None:
            _check_guarded_names(named)
        if config.reference is not None and config.reference not in named:
            raise UsageError(f"--reference {config.reference}: no such model; choose from {', '.join(named)}")
        settings = {**_settings(config, suite, judge), "models": named} if is_main() else {}
        if guard is not None:
            settings["guard"] = guard_digest
    folder = Path(out)
    with open_shared_run(folder, "audit", settings):
        with main_first():
            if is_main():
                # Of an earlier run of these settings, whatever the number of its processes.
                for part in folder.glob("models/*"):
                    merge_parts(answers_folder(part))
        plan = Plan(suite, judge, _generating(config, suite), reporter, folder)
        reports: list[ModelReport] = []
        shown: list[Example] = []
        for name, source in named.items():
            # The model lives in this call alone, so that the next one finds the memory free.
            for report, kept in _measure(plan, name, load(source), guard):
                reports.append(report)
                shown += kept
            gc.collect()
        if is_main():
            result = _result(plan, config, reports, shown)
            result.save(folder / "audit.json", reveal=reveal)
            barrier()
            return result
        barrier()
        return AuditResult.load(folder / "audit.json")


def _measure(
    plan: Plan, name: str, loaded: LoadedModel, guard: Callable[[LoadedModel], Decoder] | None
) -> list[tuple[ModelReport, list[Example]]]:
    """One model, and the same under its guard where there is one; nothing in a process that is not the main one."""
    # A signal for other weights is refused before anything is measured.
    decoder = None if guard is None else guard(loaded)
    columns = {name: loaded}
    if decoder is not None:
        columns[guarded_name(name)] = replace(loaded, decoder=decoder)
    measured: list[tuple[ModelReport, list[Example]]] = []
    for column, each in columns.items():
        own = replace(plan, folder=plan.folder and plan.folder / "models" / column)
        if own.folder is not None and processes() > 1:
            answer_share(own, column, each, Turns(process(), processes()))
            barrier()
            if not is_main():
                continue
            merge_parts(answers_folder(own.folder))
        measured.append(measure_model(own, column, each))
    return measured


def guarded_name(name: str) -> str:
    """What a model is called while it is guarded."""
    return f"{name} guarded"


def _check_guarded_names(named: dict[str, str]) -> None:
    for name, source in named.items():
        if guarded_name(name) in named:
            raise UsageError(f"two models would be called {guarded_name(name)!r}; write NAME={source} for one of them")


def load_suite(config: AuditConfig) -> Suite:
    """The suite of a configuration, with the files that replace or complete its own.

    Raises:
        UsageError: the suite or a file is missing or malformed, or there is nothing to ask.
    """
    limit = config.limit or None
    if config.suite == "general":
        suite = general_suite()
    elif config.suite == "testbed":
        from keelguard.testbed.build import build_testbed

        suite = read_suite(build_testbed(only=[]).suite(), limit)
    else:
        suite = read_suite(config.suite, limit)
    for use, sources in (
        ("harmful", config.requests),
        ("benign", config.benign),
        ("borderline", config.borderline),
        ("benign_nested", config.benign_nested),
        ("utility", config.utility),
    ):
        if sources:
            own = {"columns": config.columns, "where": config.where} if use == "harmful" else {}
            suite = with_requests(suite, use, sources, limit=None if use == "utility" else limit, **own)
    if config.perplexity is not None:
        suite = with_perplexity(suite, config.perplexity)
    if not suite.harmful:
        raise UsageError("there are no harmful requests; name a file with --requests, or take --suite testbed")
    suite = select_attacks(suite, config.attacks)
    for name, attack in suite.attacks.items():
        if isinstance(attack, PrefillAnswer) and not any(request.answer for request in suite.harmful):
            raise UsageError(f"attack {name!r}: no harmful request has a known answer; choose others with --attack")
    return suite


def name_models(models: Sequence[str]) -> dict[str, str]:
    """Short names for models: NAME=SOURCE gives one, the last part of the path is the default.

    Raises:
        UsageError: there is no model, two have the same name, or a name cannot be a folder's.
    """
    if not models:
        raise UsageError("no model given; name a checkpoint folder or a hub id")
    named: dict[str, str] = {}
    for model in models:
        name, separator, source = model.partition("=")
        if not separator or "/" in name:
            source = model
            # `.` and `..` have names of their own.
            name = Path(source).name if Path(source).name not in ("", "..") else Path(source).resolve().name
        if not source or name in ("", ".", ".."):
            raise UsageError(f"model {model!r}: has no name or no source; write NAME=SOURCE")
        if name in named:
            raise UsageError(f"two models are called {name!r}; write NAME={source} for one of them")
        named[name] = source
    return named


def make_suite_judge(config: JudgeConfig | None, suite: Suite) -> Judge:
    """The judge that was asked for, the suite's own by default.

    Raises:
        UsageError: it cannot be made, or cannot judge the suite's requests.
        FailureError: its checkpoint could not be loaded.
    """
    judge = make_judge(config or JudgeConfig(kind=suite.judge))
    if isinstance(judge, WorldJudge):
        # It refuses requests without secrets: better now than after a model has answered them.
        judge([Exchange(request, "") for request in suite.harmful])
    return judge


def _generating(config: AuditConfig, suite: Suite) -> Generating:
    return Generating(config.max_new_tokens or suite.max_new_tokens, config.batch_size, config.seed)


def _settings(config: AuditConfig, suite: Suite, judge: Judge) -> dict[str, Any]:
    """Everything that determines an audit's result; files by their content."""
    generating = _generating(config, suite)
    return {
        "suite": suite.name,
        "judge": {"name": judge.name, "digest": judge.digest},
        "attacks": {info.name: info.settings for info in suite.attack_infos()},
        "data": [{"use": info.use, "sha256": info.sha256, "rows": info.rows} for info in suite.data],
        "where": config.where,
        "columns": {f.name: getattr(config.columns, f.name) for f in fields(config.columns)},
        "limit": config.limit,
        "max_new_tokens": generating.max_new_tokens,
        "seed": generating.seed,
        "versions": versions(),
    }


def _result(plan: Plan, config: AuditConfig, reports: list[ModelReport], shown: list[Example]) -> AuditResult:
    by_name = {report.name: report for report in reports}
    reference = by_name[config.reference or reports[0].name]
    guarded = {guarded_name(name) for name in by_name} & set(by_name)
    pairs = [(each, reference) for each in reports if each is not reference and each.name not in guarded]
    # A guard is compared with the model that it guards.
    pairs += [(by_name[guarded_name(name)], by_name[name]) for name in by_name if guarded_name(name) in guarded]
    return AuditResult(
        suite=plan.suite.name,
        judge={"name": plan.judge.name, "digest": plan.judge.digest},
        settings={
            "limit": config.limit,
            "max_new_tokens": plan.generating.max_new_tokens,
            "batch_size": plan.generating.batch_size,
            "seed": plan.generating.seed,
        },
        versions=versions(),
        attacks=plan.suite.attack_infos(),
        data=list(plan.suite.data),
        models=reports,
        comparisons=[comparison for report, other in pairs for comparison in compare(report, other)],
        examples=shown,
    )
