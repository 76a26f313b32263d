"""`keelguard align`: alignment inside a budget of units."""

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


def align(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Checkpoint folder or hub id of the model to align.")],
    data: Data = [],  # noqa: B006
    units: Annotated[Path | None, typer.Option(help="Unit map of BASE, from `keelguard diagnose --utility`.")] = None,
    train: Annotated[
        str, typer.Option(help="What trains: groups of the map (ru), random:0.2, magnitude:0.2, or all.")
    ] = "ru",
    out: Annotated[Path, typer.Option(help="The run folder; the same command resumes in it.")] = Path("runs/align"),
    held_out: HeldOut = None,
    compare: Compare = False,
    suite: Suite = "",
    judge: JudgedBy = "",
    limit: Limit = 100,
    others: Others = "freeze",
    steps: Steps = 0,
    epochs: Epochs = 1.0,
    learning_rate: Rate = 2e-5,
    batch_size: BatchSize = 16,
    gradient_accumulation: Accumulation = 1,
    weight_decay: Decay = 0.0,
    scheduler: Scheduler = "linear",
    warmup: Warmup = 0.0,
    save_every: SaveEvery = 100,
    bf16: Bf16 = False,
    gradient_checkpointing: Checkpointing = False,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Align a base model inside a budget of units, by default the redundant ones of its map.

    Gradients and optimiser state exist for those units alone; everything else stays bit-equal. Writes OUT/model and
    OUT/align.json. The base of the testbed brings its own data.

    Examples:

      keelguard diagnose ./my-base --utility chats.jsonl --ranking layer --out runs/budget

      keelguard align ./my-base --data alignment.jsonl --units runs/budget --train ru --compare
    """
    from keelguard.data import load_chats
    from keelguard.models import check_source, resolve_sources
    from keelguard.training import TrainConfig
    from keelguard.units.align import align as run
    from keelguard.units.groups import UnitMap

    reporter = main_reporter()
    for part in filter(None, resolve_sources(base, None)):
        check_source(part, allow_pickle)
    if not data:
        files = testbed_data(base, "--data FILE")
        taken: dict[str, Any] = {"data": files.data / "alignment.train.jsonl"}
        if not held_out:
            taken["held_out"] = files.data / "alignment.validation.jsonl"
        if not suite:
            taken["suite"] = files.suite()
        taken |= unless_given(context, steps=300, learning_rate=1e-3)
        data, held_out, suite = [str(taken["data"])], held_out or one(taken["held_out"]), suite or str(taken["suite"])
        steps, learning_rate = taken.get("steps", steps), taken.get("learning_rate", learning_rate)
        announce(reporter, files, taken)
    result = run(
        base,
        [chat for source in data for chat in load_chats(source)],
        TrainConfig(
            steps=steps,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            weight_decay=weight_decay,
            scheduler=scheduler,  # pyright: ignore[reportArgumentType]
            warmup=warmup,
            seed=seed,
            save_every=save_every,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
        ),
        out=out,
        chart=UnitMap.load(units) if units else None,
        train=train,
        others=others,  # pyright: ignore[reportArgumentType]
        held_out=[chat for source in held_out or () for chat in load_chats(source)],
        probe=training_probe(suite, judge, limit, (), "--suite", reporter),
        compare=compare,
        load=loader(base, None, chat_template, dtype, device, allow_pickle, trust_remote_code),
        reporter=reporter,
    )
    print_training(result, out / "align.json")
