"""`keelguard finetune`: training that keeps safety."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from keelguard.cli.options import (
    AllowPickle,
    ChatTemplate,
    Config,
    Device,
    Dtype,
    RemoteCode,
    Seed,
    announce,
    given,
    loader,
    main_reporter,
    one,
    testbed_data,
)
from keelguard.cli.training_options import (
    Accumulation,
    BatchSize,
    Bf16,
    Checkpointing,
    Compare,
    Data,
    Decay,
    Epochs,
    HeldOut,
    JudgedBy,
    Limit,
    Others,
    Rate,
    SaveEvery,
    Scheduler,
    Steps,
    Suite,
    Warmup,
    print_training,
    training_probe,
    unless_given,
)
from keelguard.errors import FailureError, UsageError


def finetune(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Checkpoint or adapter folder, hub id, or the package of `keelguard harden`.")
    ],
    data: Data = [],  # noqa: B006
    units: Annotated[
        Path | None, typer.Option(help="Unit map of MODEL, from `keelguard diagnose`. A package brings its own.")
    ] = None,
    signal: Annotated[
        Path | None,
        typer.Option(help="Signal of MODEL, to be checked on the new weights. A package brings its own."),
    ] = None,
    protect: Annotated[
        str | None,
        typer.Option(
            help="Between commas: freeze, anchor, project, mix; ema, lisa, safelora; or none. "
            "Default: mix; freeze,mix where there is a unit map."
        ),
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            help="What freeze freezes: groups (scu,cu:0.06), random:0.11, magnitude:0.11, layers:1-2. "
            "Default: scu,cu:0.06; scu where --protect is left out."
        ),
    ] = None,
    safety: Annotated[list[str] | None, typer.Option(help="File of harmful requests that MODEL refuses.")] = None,
    benign: Annotated[
        list[str] | None, typer.Option(help="File of benign requests that the signal is checked on, beside --held-out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The run folder; the same command resumes in it.")] = Path("runs/finetune"),
    held_out: HeldOut = None,
    compare: Compare = False,
    base: Annotated[str | None, typer.Option(help="The model before its alignment, for safelora.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on MODEL; it is merged first.")] = None,
    suite: Suite = "",
    judge: JudgedBy = "",
    limit: Limit = 100,
    others: Others = "train",
    steps: Steps = 0,
    epochs: Epochs = 1.0,
    learning_rate: Rate = 2e-5,
    batch_size: BatchSize = 16,
    gradient_accumulation: Accumulation = 1,
    lora_rank: Annotated[int, typer.Option(help="Rank of a LoRA, merged at the end; 0 trains everything.")] = 0,
    weight_decay: Decay = 0.0,
    scheduler: Scheduler = "linear",
    warmup: Warmup = 0.0,
    save_every: SaveEvery = 100,
    bf16: Bf16 = False,
    gradient_checkpointing: Checkpointing = False,
    prompts: Annotated[int, typer.Option(help="Harmful prompts that anchor and project hold on to.")] = 16,
    tokens: Annotated[int, typer.Option(help="First tokens of the refusals that they hold on to.")] = 6,
    anchor_weight: Annotated[float, typer.Option(help="Weight of the anchor in the loss.")] = 1.0,
    directions: Annotated[int, typer.Option(help="Decision directions that project takes out.")] = 32,
    mix_share: Annotated[float, typer.Option(help="Share of safety chats that mix adds.")] = 0.1,
    mix_inserted: Annotated[
        float,
        typer.Option(help="Share of those with random words in their prompt, to keep a purification. A package: 0.5."),
    ] = 0.0,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fine-tune a model on chats and keep its safety; lists task loss and safety side by side.

    `freeze` leaves units of a map bit-equal (SSAH), which `keelguard verify` certifies; it costs task loss. `anchor`
    ties the first words of the model's own refusals to what they were, `project` takes their directions out of every
    step, `mix` trains on some refusals too. They go together, as in --protect freeze,anchor. Writes OUT/model and
    OUT/finetune.json. Runs under `accelerate launch`, too. A model of the testbed brings its own data.

    A signal is measured on the new weights: within the limits it is bound to them, beyond them it is calibrated or
    trained anew, into OUT/signal. Exit code 1 where that fails too.

    Examples:

      keelguard finetune runs/harden --data task.jsonl --safety advbench.json --benign alpaca.json

      keelguard finetune ./my-model --data task.jsonl --safety advbench.json --compare

      keelguard finetune ./my-model --data task.jsonl --units runs/diagnose --protect freeze --freeze scu,cu:0.06
    """
    from keelguard.data import load_chats, load_requests
    from keelguard.models import check_source, resolve_sources
    from keelguard.pipeline.continued import (
        FREEZE,
        INSERTED,
        PROTECT,
        check_of_files,
        check_of_testbed,
        continue_training,
        source_of,
    )
    from keelguard.processes import is_main
    from keelguard.training import TrainConfig
    from keelguard.units.defences import AnchorConfig, MixConfig
    from keelguard.units.finetune import FinetuneConfig
    from keelguard.units.groups import UnitMap
    from keelguard.units.projection import ProjectConfig

    source = source_of(model, adapter)
    own_units, own_signal = units or source.units, signal or source.signal
    if protect is None:
        protect, freeze = (",".join(PROTECT), freeze or FREEZE) if own_units else ("mix", freeze)
    _refuse_unread(context, protect)
    if source.is_package and "mix" in protect and not given(context, "mix_inserted"):
        mix_inserted = INSERTED
    reporter = main_reporter()
    for part in filter(None, (*resolve_sources(source.model, source.adapter), base)):
        check_source(part, allow_pickle)
    if benign and not own_signal:
        raise UsageError("--benign: only the check of a signal reads it; give --signal, or leave it out")
    files = None
    if not data:
        files = testbed_data(source.received, "--data FILE, and --safety FILE")
        taken: dict[str, Any] = {"data": files.data / "finetune-benign.train.jsonl"}
        if not held_out:
            taken["held_out"] = files.data / "finetune-benign.validation.jsonl"
        if not safety:
            taken["safety"] = files.data / "harmful.train.jsonl"
        if not suite:
            taken["suite"] = files.suite()
        # The budget of the suite's benign fine-tune, at which an unprotected model loses its safety.
        taken |= unless_given(context, steps=100, learning_rate=7e-4)
        data, held_out, safety = (
            [str(taken["data"])],
            held_out or one(taken["held_out"]),
            safety or one(taken["safety"]),
        )
        suite = suite or str(taken["suite"])
        steps, learning_rate = taken.get("steps", steps), taken.get("learning_rate", learning_rate)
        announce(reporter, files, taken)
    settings = FinetuneConfig(
        train=TrainConfig(
            steps=steps,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            lora_rank=lora_rank,
            weight_decay=weight_decay,
            scheduler=scheduler,  # pyright: ignore[reportArgumentType]
            warmup=warmup,
            seed=seed,
            save_every=save_every,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
        ),
        protect=tuple(name.strip() for name in protect.split(",") if name.strip()),
        freeze=freeze or FinetuneConfig.freeze,
        others=others,  # pyright: ignore[reportArgumentType]
        anchor=AnchorConfig(weight=anchor_weight, prompts=prompts, tokens=tokens),
        project=ProjectConfig(directions=directions, prompts=prompts, tokens=tokens),
        mix=MixConfig(share=mix_share, inserted=mix_inserted, seed=seed),
    )
    taught, asked = _split(safety or (), max(128, prompts), seed)
    chats = [chat for file in data for chat in load_chats(file)]
    check = None
    if own_signal and files is not None and not benign:
        check = check_of_testbed(files, chats)
    elif own_signal:
        good = [request for file in (*(benign or ()), *(held_out or ())) for request in load_requests(file)]
        check = check_of_files(taught, asked, good, chats, seed)
    found = continue_training(
        source.model,
        chats,
        settings,
        out=out,
        signal=own_signal,
        check=check,
        chart=UnitMap.load(own_units) if own_units else None,
        safety=taught,
        held_out=[chat for file in held_out or () for chat in load_chats(file)],
        probe=training_probe(suite, judge, limit, asked, "--suite, or --safety with 16 requests or more", reporter),
        base=base,
        compare=compare,
        load=loader(source.model, source.adapter, chat_template, dtype, device, allow_pickle, trust_remote_code),
        reporter=reporter,
    )
    print_training(found.training, out / "finetune.json")
    if own_units and "freeze" in settings.protect and is_main():
        named = "" if source.is_package and not units else f" --units {own_units} --require {settings.freeze}"
        typer.echo(f"certify: keelguard verify {model} {found.training.model}{named}")
    _print_recheck(found.recheck, out)


_READ_BY = {
    "units": ("freeze",),
    "freeze": ("freeze",),
    "others": ("freeze",),
    "base": ("safelora",),
    "prompts": ("anchor", "project"),
    "tokens": ("anchor", "project"),
    "anchor_weight": ("anchor",),
    "directions": ("project",),
    "mix_share": ("mix",),
    "mix_inserted": ("mix",),
}
"""Options of `finetune` that only some protections read."""


def _refuse_unread(context: typer.Context, protect: str) -> None:
    """Somebody who types --units without --protect freeze must not believe that the units are frozen."""
    chosen = {name.strip() for name in protect.split(",")}
    for name, readers in _READ_BY.items():
        if given(context, name) and not chosen & {*readers}:
            option, reader = name.replace("_", "-"), " or ".join(readers)
            raise UsageError(f"--{option}: only {reader} reads it; add that to --protect {protect}, or leave it out")


def _split(sources: Sequence[str], most: int, seed: int):
    """Harmful requests to hold on to, and others to measure with: those that a diagnosis reads, and those it leaves."""
    from keelguard.data import load_requests
    from keelguard.units.material import draw

    parts = [draw(load_requests(source), "safety", most, seed) for source in sources]
    return [r for taken, _ in parts for r in taken], [r for _, rest in parts for r in rest]


def _print_recheck(found, out: Path) -> None:
    from rich.console import Console

    from keelguard.pipeline.continued import recheck_table

    if found is None:
        return
    Console().print(recheck_table(found))
    if found.signal is None:
        raise FailureError(
            f"{out}: the model is there, and its signal is lost: {found.reason}. Train another with `keelguard guard "
            f"train {out / 'model'}`, or fine-tune less: fewer steps, or a lower learning rate"
        )
    typer.echo(f"{out / 'signal'}: the signal for these weights, {found.outcome}")
