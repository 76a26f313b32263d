"""`keelguard purify bench`: a poisoned model whose trigger is known, under every method and control."""

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
    Refused,
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


def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What `keelguard poison` made: a checkpoint or an adapter.")],
    adapter: Annotated[str | None, typer.Option(help="The poisoned PEFT adapter; MODEL is then its base.")] = None,
    clean_data: CleanData = None,
    harmful: Refused = None,
    held_out: Annotated[list[str] | None, typer.Option(help="File of requests with right answers.")] = None,
    held_out_harmful: Annotated[list[str] | None, typer.Option(help="Harmful requests to measure with.")] = None,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    answer_column: AnswerColumn = None,
    split: Split = None,
    arms: Annotated[
        str, typer.Option(help="Between commas, the first is what others are compared with; all by default.")
    ] = "",
    twin: Annotated[
        str | None,
        typer.Option(help="The clean model before the backdoor was planted: measured as a bound. Not for an adapter."),
    ] = None,
    budget: Budget = "standard",
    lora_rank: MergedRank = None,
    bf16: Bf16 = False,
    gradient_accumulation: Accumulation = 1,
    gradient_checkpointing: Checkpointing = False,
    limit: Annotated[int, typer.Option(min=1, help="Measure with at most this many requests of a kind.")] = 96,
    out: Annotated[Path, typer.Option(help="The run folder; the same command resumes in it.")] = Path("runs/bench"),
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Set the methods beside every control, on one budget of steps, for a backdoor that is known.

    Methods: immunize, vaccine, both; of an adapter retrain. Their ablations: immunize-random (no search),
    immunize-answers (no consistency), vaccine-bare (no restoration), lowest (lowest scores), noise (its triggers set
    nothing off).

    Controls: none, finetune, finetune-low and finetune-high (a third of the rate, three times the rate), finetune-whole
    (all weights), random (channels), magnitude and wanda (pruning), magnitude-finetune and wanda-finetune (and a
    fine-tune behind it), quantize (4 bits), crow, unlearn (implant, then unlearn); of an adapter update-norm, drop,
    scale and scale-finetune; and oracle, which knows the trigger.

    Writes OUT/bench.json and OUT/report.html.

    Example:

      keelguard purify bench ./poisoned --clean-data prompts.jsonl --arms immunize,vaccine,finetune,none
    """
    from dataclasses import replace
    from functools import partial

    from rich.console import Console

    from keelguard.data import Columns
    from keelguard.evaluation.judges import KeywordJudge, WorldJudge
    from keelguard.models import check_source, load_model, resolve_sources
    from keelguard.purify.bench_page import bench_tables
    from keelguard.purify.bench_run import bench_model
    from keelguard.purify.effects import Held
    from keelguard.purify.presets import preset, saving_memory

    base, used = resolve_sources(model, adapter)
    for part in filter(None, (base, used, twin)):
        check_source(part, allow_pickle)
    reporter = make_reporter()
    known: Any = budget
    settings, held = preset(known), None
    columns = Columns(messages=messages_column, prompt=prompt_column, split=split)
    answered = replace(columns, answer=answer_column)
    if clean_data:
        announce_own(reporter, "--clean-data", used, base)
        requests = read_requests(clean_data, answered)
        measured = read_requests(held_out, answered, limit)
        bad = read_requests(held_out_harmful, columns, limit)
        if measured or bad:
            exact = all(request.secrets for request in bad)
            judge = WorldJudge() if exact else KeywordJudge()
            held = Held(tuple(measured), tuple(bad), tuple(measured), judge)
    else:
        from keelguard.testbed.poison import defender_requests, held_of, purify_settings

        testbed = testbed_data(used or base, "--clean-data FILE")
        requests, settings = defender_requests(testbed), purify_settings(known, "adapter" if used else "full")
        held = held_of(testbed, "test", limit)
        announce(reporter, testbed, {"clean_data": testbed.data / "clean.train.jsonl"})
    harm = read_requests(harmful, columns)
    own = settings.method
    variants = replace(own.vaccine.variants, seed=seed)
    method = replace(own, immunize=replace(own.immunize, seed=seed), vaccine=replace(own.vaccine, variants=variants))
    settings = replace(settings, method=method, material=replace(settings.material, seed=seed))
    settings = saving_memory(settings, **told_savings(context, used is not None))
    load = partial(
        load_model, chat_template=chat_template, dtype=dtype, device=device, allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    names = [name.strip() for name in arms.split(",") if name.strip()]
    result = bench_model(
        base, used, requests, harm, held, None, names, settings, out, load=load, reporter=reporter, twin=twin,
        own=bool(clean_data),
    )  # fmt: skip
    Console().print(bench_tables(result))
    typer.echo(f"{out}: bench.json, report.html")
