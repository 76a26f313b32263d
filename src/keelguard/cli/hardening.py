"""`keelguard harden`: the whole pipeline on one checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from keelguard.cli.options import (
    AllowPickle,
    AnswerColumn,
    Budget,
    ChatTemplate,
    CleanData,
    Config,
    Device,
    Dtype,
    MessagesColumn,
    PromptColumn,
    RemoteCode,
    Seed,
    Split,
    announce,
    announce_own,
    make_reporter,
    read_requests,
    testbed_data,
)
from keelguard.cli.training_options import Accumulation, Bf16, Checkpointing, MergedRank, told_savings
from keelguard.errors import UsageError


def harden(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint or adapter folder, or hub id.")],
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter to suspect; MODEL is then its base, and trusted.")
    ] = None,
    clean_data: CleanData = None,
    harmful: Annotated[
        list[str] | None, typer.Option(help="File of harmful requests that MODEL should refuse; repeat for more.")
    ] = None,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    answer_column: AnswerColumn = None,
    split: Split = None,
    out: Annotated[Path, typer.Option(help="The package; the same command resumes in it.")] = Path("runs/harden"),
    budget: Budget = "standard",
    lora_rank: MergedRank = None,
    bf16: Bf16 = False,
    gradient_accumulation: Accumulation = 1,
    gradient_checkpointing: Checkpointing = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(help='Leave a stage out, with the reason that the report repeats: diagnose="not covered".'),
    ] = None,
    suite: Annotated[str, typer.Option(help="Suite of the audits; by default their rows are cut from the data.")] = "",
    attack: Annotated[list[str] | None, typer.Option(help="Only this attack of the suite; repeat for more.")] = None,
    limit: Annotated[int, typer.Option(help="The audits ask at most this many requests of each kind; 0: all.")] = 100,
    target: Annotated[float, typer.Option(help="Share of harmless requests that the signal may stop.")] = 0.02,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Inspect, estimate time and memory, and stop.")] = False,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Purify a suspicious chat model, map its safety units, give it a safety signal, and package the evidence.

    inspect → audit → purify → audit → diagnose → guard → audit → package. Every stage stands beside its control; one
    whose control does not hold is reported as failed, and the exit code is then 1. The data are cut in three: what
    the audits ask is in no training. A model of the testbed brings its own data. --lora-rank, --bf16 and the two
    gradient options make the trainings of the purification smaller.

    Writes OUT: model/ or adapter/, signal/, units/, audits/, purify/, certificate.json, harden.json, MODEL_CARD.md,
    harden.sarif and report.html. Then: keelguard finetune OUT, keelguard verify OUT, keelguard gate --against OUT.

    Examples:

      keelguard harden ./suspect --clean-data prompts.jsonl --harmful advbench.json --out runs/harden

      keelguard harden ./base --adapter ./suspect-lora --clean-data prompts.jsonl --harmful bad.json --dry-run
    """
    from dataclasses import replace
    from functools import partial

    from keelguard.data import Columns
    from keelguard.models import check_source, load_model, resolve_sources
    from keelguard.pipeline.harden_config import HardenConfig, read_skips
    from keelguard.purify.presets import saving_memory

    base, used = resolve_sources(model, adapter)
    for part in filter(None, (base, used)):
        check_source(part, allow_pickle)
    reporter = make_reporter()
    skips = read_skips(skip or [])
    known: Any = budget
    HardenConfig(skip=skips)  # A wrong stage is refused before any data are read.
    data, settings = _material(
        model, base, used, reporter, known, clean_data, harmful, seed,
        Columns(prompt=prompt_column, messages=messages_column, split=split), answer_column,
    )  # fmt: skip
    audit = replace(settings.audit, suite=suite or settings.audit.suite, attacks=tuple(attack or ()), limit=limit)
    signal = replace(settings.signal, target=target)
    savings = told_savings(context, used is not None)
    if savings and "purify" in skips:
        option = next(iter(savings)).replace("_", "-")
        raise UsageError(f"--{option}: belongs to the purification, which --skip leaves out; leave one of them out")
    smaller = saving_memory(settings.purify, **savings)
    settings = replace(settings, purify=smaller, audit=audit, signal=signal, skip=skips, seed=seed)
    if suite and data.audited:
        # The suite brings the requests that the audits ask; ours are then not needed.
        data = replace(data, audited={})
    load = partial(
        load_model, chat_template=chat_template, dtype=dtype, device=device, allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if dry_run:
        _print_estimate(base, used, settings, [*data.clean, *data.refused], dtype, device, trust_remote_code)
        return
    from keelguard.pipeline.harden import harden as run

    package = run(
        base, settings, data, out,
        adapter=used, load=load, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, reporter=reporter,
    )  # fmt: skip
    print_package(package)
    if any(stage.status == "failed" for stage in package.stages):
        raise typer.Exit(1)


def _material(
    model: str, base: str, used: str | None, reporter: Any, budget: Any, clean: list[str] | None,
    harmful: list[str] | None, seed: int, columns: Any, answer: str | None,
) -> tuple[Any, Any]:  # fmt: skip
    """The data of a hardening, and the settings that go with them."""
    from dataclasses import replace

    from keelguard.evaluation.audit import AuditConfig
    from keelguard.pipeline.harden_config import HardenConfig
    from keelguard.pipeline.harden_data import of_files, of_testbed
    from keelguard.purify.presets import preset

    if clean or harmful:
        for option, files in (("--clean-data", clean), ("--harmful", harmful)):
            if not files:
                raise UsageError(f"{option}: is missing; a hardening needs harmless and harmful requests, give both")
        announce_own(reporter, "--clean-data and --harmful", used, base)
        good = read_requests(clean, replace(columns, answer=answer))
        data = of_files(good, read_requests(harmful, columns), seed)
        return data, HardenConfig(purify=preset(budget))
    from keelguard.testbed.build import RECIPE_FILE
    from keelguard.testbed.poison import purify_settings

    suspect = next((p for p in (used, base) if p and (Path(p) / RECIPE_FILE).is_file()), model)
    testbed = testbed_data(suspect, "--clean-data FILE and --harmful FILE")
    preset(budget)
    announce(reporter, testbed, {"clean_data": testbed.data / "clean.train.jsonl", "suite": testbed.suite()})
    settings = HardenConfig(
        purify=purify_settings(budget, "adapter" if used else "full"), audit=AuditConfig(suite=str(testbed.suite()))
    )
    return of_testbed(testbed, suspect), settings


def print_package(package: Any) -> None:
    """The package in the terminal: the verdict, the table of attack surfaces, and where everything lies."""
    from rich.console import Console

    from keelguard.pipeline.harden import triggers_of
    from keelguard.pipeline.page import package_tables

    console = Console()
    console.print(package_tables(package, triggers=triggers_of(package), width=console.width))
    typer.echo(f"{package.folder}: harden.json, report.html, MODEL_CARD.md, harden.sarif")


def _print_estimate(
    base: str, adapter: str | None, settings: Any, requests: list[Any], dtype: str, device: str, trust_remote_code: bool
) -> None:
    from dataclasses import replace

    from keelguard.pipeline.inspection import inspect_model
    from keelguard.pipeline.workload import estimate_harden, estimate_text, lengths_of

    found = inspect_model(base, adapter, trust_remote_code=trust_remote_code)
    if dtype != "auto":
        found = replace(found, dtype=dtype)
    lengths = lengths_of(base, requests, settings.purify.material.max_new_tokens)
    typer.echo(estimate_text(found, estimate_harden(found, settings, _memory(device), settings=lengths)))


def _memory(device: str) -> int:
    """Bytes of the devices that a model is spread over; of main memory where there is no GPU, or none is wanted."""
    import os

    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
