"""`keelguard gate`: whether a later model keeps what a reference had."""

from dataclasses import replace
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
    make_reporter,
)


def gate(
    candidate: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Run of finetune, audit or harden; or a checkpoint or adapter.")
    ],
    against: Annotated[str, typer.Option(metavar="RUN", help="The reference: a run of harden, audit or finetune.")],
    policy: Annotated[Path | None, typer.Option(help="YAML with what is demanded; see docs/gate.md.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result, and of what has yet to be audited.")] = Path(
        "runs/gate"
    ),
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter that belongs to MODEL.")] = None,
    name: Annotated[str, typer.Option(help="The model, where RUN is an audit of several.")] = "",
    against_name: Annotated[str, typer.Option(help="The same for the reference.")] = "",
    suite: Annotated[str, typer.Option(help="The reference's suite, where it is not found by itself.")] = "",
    limit: Annotated[int, typer.Option(help="Requests of each file, where the reference was never audited.")] = 100,
    judge: Annotated[str, typer.Option(help="The reference's judge, where it asks a model: model or endpoint.")] = "",
    judge_model: Annotated[str | None, typer.Option(help="Local judge, or the judge's name at --judge-url.")] = None,
    judge_template: Annotated[str, typer.Option(help="llama-guard-3, harmbench, or a Jinja file.")] = "llama-guard-3",
    judge_url: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible server.")] = None,
    units: Annotated[Path | None, typer.Option(help="Unit map of a reference that is no package.")] = None,
    shift: Annotated[
        Path | None, typer.Option(help="A finished `keelguard shift REFERENCE --against MODEL`, whose limits count.")
    ] = None,
    allow_not_evaluable: Annotated[
        bool, typer.Option("--allow-not-evaluable", help="Let checks through that cannot be decided.")
    ] = False,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Check that a model keeps what a reference had: safety, utility, safety units, signal; for continuous integration.

    A model that nobody has audited is audited as the reference was. Writes gate.json, gate.xml (JUnit), gate.sarif and
    summary.md. Exit code 0: passed. 1: a check failed, or is not evaluable. 2: the input must change.

    Examples:

      keelguard gate ./adapters/new --against runs/harden --policy policy.yaml

      keelguard gate runs/tuned --against runs/harden --out runs/gate
    """
    from rich.console import Console

    from keelguard.evaluation.judges import JudgeConfig
    from keelguard.models import load_model
    from keelguard.pipeline.gate import GateOptions
    from keelguard.pipeline.gate import gate as run
    from keelguard.pipeline.policy import GatePolicy
    from keelguard.pipeline.summary import gate_table

    demanded = GatePolicy() if policy is None else GatePolicy.load(policy)
    if allow_not_evaluable:
        demanded = replace(demanded, not_evaluable="pass")
    if not judge and (judge_model or judge_url):
        judge = "endpoint" if judge_url else "model"
    chosen = JudgeConfig(kind=judge, template=judge_template, model=judge_model, url=judge_url, model_name=judge_model)

    def load(source: str, *, adapter: str | None = None):
        return load_model(
            source,
            adapter=adapter,
            dtype=dtype,
            device=device,
            chat_template=chat_template,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )

    options = GateOptions(
        adapter=adapter,
        name=name,
        against_name=against_name,
        suite=suite,
        limit=limit,
        judge=chosen if judge else None,
        units=units,
        shift=shift,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        load=load,
    )
    result = run(candidate, against, demanded, out, options=options, reporter=make_reporter())
    Console().print(gate_table(result))
    typer.echo(f"gate.json, gate.xml, gate.sarif and summary.md: {out}")
    if not result.passed:
        raise typer.Exit(1)
