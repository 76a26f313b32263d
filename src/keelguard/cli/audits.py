"""`keelguard audit` and `keelguard attack`."""

from pathlib import Path
from typing import Annotated

import typer

from keelguard.cli.options import (
    AllowPickle,
    ChatTemplate,
    Config,
    Device,
    Dtype,
    RemoteCode,
    Seed,
    main_reporter,
    make_reporter,
    merged,
    testbed_suite,
)
from keelguard.errors import UsageError

attack_app = typer.Typer(
    no_args_is_help=True, help="What attacks there are, and fine-tuning attacks as a run of their own."
)


def audit(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL…", help="Checkpoint or adapter folders or hub ids, or NAME=one of these."),
    ],
    suite: Annotated[
        str, typer.Option(help="testbed, general, or a YAML suite. Default: general; the testbed's for its own models.")
    ] = "",
    requests: Annotated[list[str] | None, typer.Option(help="File or data set of harmful requests.")] = None,
    benign: Annotated[list[str] | None, typer.Option(help="File of benign requests that should be answered.")] = None,
    borderline: Annotated[list[str] | None, typer.Option(help="File of safe requests that look unsafe.")] = None,
    benign_nested: Annotated[list[str] | None, typer.Option(help="File of benign requests inside stories.")] = None,
    utility: Annotated[list[str] | None, typer.Option(help="File of tasks with reference answers.")] = None,
    perplexity: Annotated[str | None, typer.Option(help="Text file whose perplexity is measured.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Only this attack; repeat for more.")] = None,
    judge: Annotated[str, typer.Option(help="world, keyword, model or endpoint. Default: the suite's.")] = "",
    judge_model: Annotated[str | None, typer.Option(help="Local judge, or the judge's name at --judge-url.")] = None,
    judge_template: Annotated[str, typer.Option(help="llama-guard-3, harmbench, or a Jinja file.")] = "llama-guard-3",
    judge_chat_template: Annotated[str | None, typer.Option(help="Jinja chat template of a local judge.")] = None,
    judge_dtype: Annotated[str, typer.Option(help="Number format of a local judge.")] = "auto",
    judge_device: Annotated[str, typer.Option(help="Device of a local judge.")] = "auto",
    judge_batch_size: Annotated[int, typer.Option(help="Answers judged at once, or requests in parallel.")] = 8,
    judge_max_new_tokens: Annotated[int, typer.Option(help="Tokens that the judge may answer with.")] = 8,
    judge_timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer of --judge-url.")] = 60.0,
    judge_url: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible server.")] = None,
    out: Annotated[Path, typer.Option(help="The run folder; the same command resumes in it.")] = Path("runs/audit"),
    limit: Annotated[int, typer.Option(help="At most this many requests of each file; 0 takes all.")] = 100,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the request's text.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column of whole conversations.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of known answers.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of identifiers.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set.")] = None,
    where: Annotated[str | None, typer.Option(help="Only rows with this value, as in label=unsafe.")] = None,
    reference: Annotated[str | None, typer.Option(help="Model that the others are compared with; the first.")] = None,
    signal: Annotated[
        Path | None, typer.Option(help="Safety signal of the models: measure each with and without it.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on every MODEL.")] = None,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Where answers are cut off; 0 takes the suite's setting.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows per batch; 0 chooses by the model's size.")] = 0,
    seed: Seed = 0,
    config: Config = None,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Show harmful answers in the report and audit.json.")
    ] = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Run every attack of a suite on every model; print the table, write audit.json and report.html.

    A suite is a YAML file with `harmful` (a file of requests) and `attacks` (names, or mappings with settings);
    optional are `name`, `judge`, `max_new_tokens`, `benign`, `borderline`, `benign_nested`, `utility`
    and `perplexity`. The testbed's own is an example: see `suite-test.yaml` in its data folder.

    Under `accelerate launch` the processes share the requests, and the result is that of one process.

    Examples:

      keelguard audit ./my-model --requests requests.jsonl --judge keyword --limit 20

      keelguard audit before=./model after=./tuned --suite my-suite.yaml --judge model --judge-model ./guard
    """
    from keelguard.data import Columns
    from keelguard.evaluation.audit import AuditConfig, audit_models, name_models
    from keelguard.evaluation.judges import JudgeConfig
    from keelguard.models import check_source, load_model, resolve_sources
    from keelguard.processes import is_main
    from keelguard.report import write_audit_report

    # Look at every model's folder before anything is loaded: a typing error costs no time.
    sources = list(name_models(models).values())
    for source in sources:
        for part in filter(None, resolve_sources(source, adapter)):
            check_source(part, allow_pickle)
    if not judge and (judge_model or judge_url):
        judge = "endpoint" if judge_url else "model"
    settings = AuditConfig(
        suite=suite or ("general" if requests else testbed_suite(sources)),
        requests=tuple(requests or ()),
        benign=tuple(benign or ()),
        borderline=tuple(borderline or ()),
        benign_nested=tuple(benign_nested or ()),
        utility=tuple(utility or ()),
        perplexity=perplexity,
        attacks=tuple(attack or ()),
        judge=JudgeConfig(
            kind=judge,
            template=judge_template,
            model=judge_model,
            url=judge_url,
            model_name=judge_model,
            chat_template=judge_chat_template,
            dtype=judge_dtype,
            device=judge_device,
            batch_size=judge_batch_size,
            max_new_tokens=judge_max_new_tokens,
            timeout=judge_timeout,
        )
        if judge
        else None,
        columns=Columns(
            messages=messages_column,
            prompt=prompt_column,
            answer=answer_column,
            label=label_column,
            id=id_column,
            split=split,
        ),
        where=where,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        reference=reference,
    )

    def load(source: str):
        loaded = load_model(
            source,
            adapter=adapter,
            dtype=dtype,
            device=device,
            chat_template=chat_template,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        return merged(loaded) if signal else loaded

    guard, digest = guard_of(signal)
    result = audit_models(
        models,
        settings,
        out=out,
        reporter=main_reporter(),
        load=load,
        guard=guard,
        guard_digest=digest,
        reveal=reveal,
    )
    if is_main():
        write_audit_report(result, out / "report.html", reveal=reveal)
        print_audit(result, out / "report.html")


@attack_app.command("list")
def attack_list() -> None:
    """List every attack with what it does, its settings and its source."""
    from dataclasses import fields

    from rich.console import Console
    from rich.table import Table

    from keelguard.attacks import ATTACKS
    from keelguard.attacks.finetuning import Finetune, FinetuneConfig

    table = Table("attack", "what it does", "settings", "source")
    for name, attack in ATTACKS.items():
        table.add_row(name, attack.summary, ", ".join(field.name for field in fields(attack)), attack.source)
    settings = ", ".join(["chats", *(field.name for field in fields(FinetuneConfig))])
    table.add_row("finetune", Finetune.summary, settings, Finetune.source)
    Console().print(table)


@attack_app.command("finetune")
def attack_finetune(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The folder of the new checkpoint.")],
    data: Annotated[
        str, typer.Option(help="File or data set of chats to train on; `identity` is the built-in identity shift.")
    ],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, decayed linearly to 0.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(help="Chats per step.")] = 16,
    lora_rank: Annotated[int, typer.Option(help="Rank of a LoRA, merged at the end; 0 trains everything.")] = 0,
    limit: Annotated[int, typer.Option(help="At most this many chats; 0 takes all.")] = 0,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fine-tune a model for a few steps, as an attacker (or an unlucky user) would; write a checkpoint.

    Benign data, an identity shift or a few harmful answers break shallow alignment (Qi et al. 2023).
    """
    from keelguard.attacks.finetuning import IDENTITY, FinetuneConfig, finetune_checkpoint
    from keelguard.data import load_chats

    if limit < 0:
        raise UsageError(f"--limit {limit}: give 0 or more")
    chats = IDENTITY if data == "identity" else load_chats(data, limit=limit or None)
    budget = FinetuneConfig(steps, learning_rate, batch_size, lora_rank, seed)
    finetune_checkpoint(
        model,
        chats,
        out,
        budget,
        reporter=make_reporter(),
        chat_template=chat_template,
        dtype=dtype,
        device=device,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(f"{out}: written; compare: keelguard audit before={model} after={out} --requests FILE")


def guard_of(signal: Path | None):
    """What guards the models of an audit, and the hash of all that determines it; without a signal nothing does."""
    if signal is None:
        return None, ""
    from keelguard.guard.adapter import Signal
    from keelguard.guard.decoding import GuardedDecoder
    from keelguard.guard.loop import check_fit

    loaded_signal = Signal.load(signal)
    decoder = GuardedDecoder(loaded_signal)

    def guard(loaded):
        loaded_signal.check(loaded.weights_hash, loaded.source)
        check_fit(loaded.model, loaded_signal)
        return decoder

    return guard, decoder.digest


def print_audit(result, report: Path) -> None:
    from rich.console import Console

    from keelguard.report import audit_tables

    console = Console()
    console.print(audit_tables(result, width=console.width))
    typer.echo(f"audit.json and the report: {report}")
