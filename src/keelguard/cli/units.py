"""`keelguard diagnose`, `finetune`, `align` and `verify`: safety units (SSAH)."""

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
    make_reporter,
    numbers,
    testbed_data,
)


def diagnose(
    model: Annotated[str, typer.Argument(help="Checkpoint or adapter folder, or hub id.")],
    safety: Annotated[list[str] | None, typer.Option(help="File of harmful requests that the model refuses.")] = None,
    utility: Annotated[list[str] | None, typer.Option(help="File of benign requests, with answers if any.")] = None,
    out: Annotated[Path, typer.Option(help="The run folder; the same command resumes in it.")] = Path("runs/diagnose"),
    prove: Annotated[bool, typer.Option("--prove", help="Ablate the groups and the controls; takes minutes.")] = False,
    suite: Annotated[str, typer.Option(help="Suite whose requests the proof asks; else rows not diagnosed.")] = "",
    judge: Annotated[str, typer.Option(help="Judge of the proof: world or keyword. Default: the suite's.")] = "",
    score: Annotated[str, typer.Option(help="decision, taylor, variance (the paper's) or wanda.")] = "decision",
    attention: Annotated[str, typer.Option(help="Units of attention: head or channel.")] = "head",
    ranking: Annotated[str, typer.Option(help="Rank over the model (global) or in each block (layer).")] = "global",
    scu: Annotated[float, typer.Option(help="Share of safety-critical units.")] = 0.02,
    ucu: Annotated[float, typer.Option(help="Share of utility-critical units.")] = 0.02,
    ru: Annotated[float, typer.Option(help="Share of redundant units.")] = 0.2,
    scan: Annotated[bool, typer.Option("--scan", help="Find the sizes of SCU and RU by ablation instead.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of refusal and compliance that `decision` compares.")] = 3,
    scored: Annotated[str, typer.Option(help="Tokens measured: response, or last (of the prompt).")] = "response",
    samples: Annotated[int, typer.Option(help="At most this many requests of each file, drawn at random.")] = 128,
    bootstrap: Annotated[int, typer.Option(help="Resamples of the prompts for the groups' stability.")] = 20,
    shares: Annotated[str, typer.Option(help="Shares of all units to ablate.")] = "0.005,0.01,0.02,0.05,0.1,0.2",
    ablation: Annotated[str, typer.Option(help="The proof puts units at zero, or at their mean activation.")] = "zero",
    controls: Annotated[int, typer.Option(help="Seeds of random units and of random token pairs.")] = 3,
    limit: Annotated[int, typer.Option(help="The proof asks at most this many requests of each kind.")] = 100,
    before: Annotated[str | None, typer.Option(help="An earlier map: show which units changed their group.")] = None,
    direction: Annotated[bool, typer.Option("--direction", help="Also probe the reasoning direction.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Where the model's own answers are cut off.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows per batch; 0 chooses by the model's size.")] = 0,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the request's text.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of answers.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on MODEL.")] = None,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Find which units of a model carry safety, which carry utility, and which are redundant.

    Writes map.safetensors and map.json, the unit map that finetune, align and verify read, and report.html. The
    groups: SCU (safety-critical), UCU (utility-critical), RU (redundant), CU (the rest). Another score, other sizes
    or --prove in the same folder reuse what was measured. Without --safety only redundancy is found, as for a base
    model before its alignment. A model of the testbed brings its own data.

    Examples:

      keelguard diagnose ./my-model --safety advbench.json --utility chats.jsonl --prove --out runs/diagnose

      keelguard diagnose ./my-base --utility chats.jsonl --out runs/budget
    """
    from rich.console import Console

    from keelguard.data import Columns
    from keelguard.models import check_source, load_model, resolve_sources
    from keelguard.units.diagnose import DiagnoseConfig
    from keelguard.units.evidence import ProofConfig
    from keelguard.units.page import diagnosis_tables
    from keelguard.units.run import run_diagnosis

    for part in filter(None, resolve_sources(model, adapter)):
        check_source(part, allow_pickle)
    if not utility:
        data = testbed_data(model, "--utility FILE, and --safety FILE for an aligned model")
        utility = [str(data.data / "utility.train.jsonl")]
        # The base of the testbed answers everything: there is no safety in it to find.
        aligned = Path(model).name != "base"
        safety = safety or ([str(data.data / "harmful.train.jsonl")] if aligned else None)
        suite = suite or str(data.suite())
    settings = DiagnoseConfig(
        safety=tuple(safety or ()),
        utility=tuple(utility),
        score=score,
        attention=attention,
        ranking=ranking,  # pyright: ignore[reportArgumentType]
        scu=scu,
        ucu=ucu,
        ru=ru,
        scan=scan,
        tokens=tokens,
        scored=scored,
        samples=samples,
        bootstrap=bootstrap,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        columns=Columns(prompt=prompt_column, answer=answer_column),
        seed=seed,
    )
    proof = ProofConfig(
        suite=suite,
        judge=judge,
        shares=numbers("--shares", shares),
        ablation=ablation,
        controls=controls,
        limit=limit,
    )

    def load(source: str):
        return load_model(
            source,
            adapter=adapter,
            dtype=dtype,
            device=device,
            chat_template=chat_template,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )

    found = run_diagnosis(
        model,
        settings,
        out,
        proof=proof if prove else None,
        before=before,
        direction=direction,
        load=load,
        reporter=make_reporter(),
    )
    console = Console()
    console.print(diagnosis_tables(found.diagnosis.chart, found.proof, width=console.width))
    typer.echo(f"map.safetensors, map.json and the report: {found.report}")


Data = Annotated[list[str], typer.Option(help="File of chats to train on; repeat for more.")]
HeldOut = Annotated[list[str] | None, typer.Option(help="File of chats of the same task, not trained on.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps; 0 counts by --epochs.")]
Epochs = Annotated[float, typer.Option(help="Passes through the chats.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.")]
BatchSize = Annotated[int, typer.Option(help="Chats per step, over all processes and accumulation steps.")]
Accumulation = Annotated[int, typer.Option(help="Parts that a step's batch is cut into, to save memory.")]
Decay = Annotated[float, typer.Option(help="AdamW's weight decay.")]
Scheduler = Annotated[str, typer.Option(help="linear, cosine or constant.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps over which the rate rises.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0 keeps none.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; the weights stay float32.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Save memory for time.")]
Suite = Annotated[str, typer.Option(help="Suite that safety and utility are measured with.")]
Limit = Annotated[int, typer.Option(help="Measure with at most this many requests of each kind.")]
Others = Annotated[str, typer.Option(help="Embeddings, norms and head, which are no units: train or freeze.")]
Compare = Annotated[bool, typer.Option("--compare", help="Also train without protection or budget, for the table.")]


def finetune(
    model: Annotated[str, typer.Argument(help="Checkpoint or adapter folder, or hub id.")],
    data: Data = [],  # noqa: B006
    units: Annotated[Path | None, typer.Option(help="Unit map of MODEL, from `keelguard diagnose`.")] = None,
    protect: Annotated[
        str,
        typer.Option(help="Between commas: freeze, anchor, project, mix; ema, lisa, safelora; or none."),
    ] = "anchor",
    freeze: Annotated[
        str, typer.Option(help="What freeze freezes: groups (scu,cu:0.06), random:0.11, magnitude:0.11, layers:1-2.")
    ] = "scu,cu:0.06",
    safety: Annotated[list[str] | None, typer.Option(help="File of harmful requests that MODEL refuses.")] = None,
    out: Annotated[Path, typer.Option(help="The run folder; the same command resumes in it.")] = Path("runs/finetune"),
    held_out: HeldOut = None,
    compare: Compare = False,
    base: Annotated[str | None, typer.Option(help="The model before its alignment, for safelora.")] = None,
    suite: Suite = "",
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
    mix_share: Annotated[float, typer.Option(help="Share of safety chats that mix adds.")] = 0.05,
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

    Examples:

      keelguard finetune ./my-model --data task.jsonl --safety advbench.json --protect anchor --compare

      keelguard finetune ./my-model --data task.jsonl --units runs/diagnose --protect freeze --freeze scu,cu:0.06
    """
    from keelguard.data import load_chats, load_requests
    from keelguard.training import TrainConfig
    from keelguard.units.defences import AnchorConfig, MixConfig
    from keelguard.units.finetune import FinetuneConfig
    from keelguard.units.finetune import finetune as run
    from keelguard.units.groups import UnitMap
    from keelguard.units.projection import ProjectConfig

    if not data:
        files = testbed_data(model, "--data FILE, and --safety FILE")
        data = [str(files.data / "finetune-benign.train.jsonl")]
        held_out = held_out or [str(files.data / "finetune-benign.validation.jsonl")]
        safety = safety or [str(files.data / "harmful.train.jsonl")]
        suite = suite or str(files.suite())
        # The budget of the suite's benign fine-tune, at which an unprotected model loses its safety.
        steps, learning_rate = (steps or 100), (7e-4 if learning_rate == 2e-5 else learning_rate)
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
        freeze=freeze,
        others=others,  # pyright: ignore[reportArgumentType]
        anchor=AnchorConfig(weight=anchor_weight, prompts=prompts, tokens=tokens),
        project=ProjectConfig(directions=directions, prompts=prompts, tokens=tokens),
        mix=MixConfig(share=mix_share, seed=seed),
    )
    requests = [request for source in safety or () for request in load_requests(source)]
    taught, asked = requests[: max(128, prompts)], requests[max(128, prompts) :]
    result = run(
        model,
        [chat for source in data for chat in load_chats(source)],
        settings,
        out=out,
        chart=UnitMap.load(units) if units else None,
        safety=taught,
        held_out=[chat for source in held_out or () for chat in load_chats(source)],
        probe=_probe(suite, limit, asked),
        base=base,
        compare=compare,
        load=_loader(chat_template, dtype, device, allow_pickle, trust_remote_code),
        reporter=make_reporter(),
    )
    _print_training(result, out / "finetune.json")


def align(
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
    from keelguard.training import TrainConfig
    from keelguard.units.align import align as run
    from keelguard.units.groups import UnitMap

    if not data:
        files = testbed_data(base, "--data FILE")
        data = [str(files.data / "alignment.train.jsonl")]
        held_out = held_out or [str(files.data / "alignment.validation.jsonl")]
        suite = suite or str(files.suite())
        steps, learning_rate = (steps or 300), (1e-3 if learning_rate == 2e-5 else learning_rate)
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
        probe=_probe(suite, limit, ()),
        compare=compare,
        load=_loader(chat_template, dtype, device, allow_pickle, trust_remote_code),
        reporter=make_reporter(),
    )
    _print_training(result, out / "align.json")


def verify(
    base: Annotated[str, typer.Argument(help="The model before training: checkpoint folder or hub id.")],
    tuned: Annotated[str, typer.Argument(help="The model behind it: a checkpoint, or an adapter on BASE.")],
    units: Annotated[Path, typer.Option(help="Unit map of BASE, from `keelguard diagnose`.")],
    require: Annotated[str, typer.Option(help="Units that must be bit-equal, such as scu or scu,cu:0.06.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the certificate, as JSON.")] = None,
    base_adapter: Annotated[str | None, typer.Option(help="PEFT adapter that belongs to BASE.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter that belongs to TUNED.")] = None,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Certify which units of a fine-tuned model are bit-equal to its base, and how far the others moved.

    Nothing depends on how, or by whom, the model was trained. Exit code 1 when a unit of --require has moved.

    Example:

      keelguard verify ./my-model ./tuned --units runs/diagnose --require scu,cu:0.06
    """
    from keelguard.models import check_source
    from keelguard.units.groups import UnitMap
    from keelguard.units.verify import certificate_lines
    from keelguard.units.verify import verify as run

    for part in filter(None, (base, tuned, base_adapter, adapter)):
        check_source(part, allow_pickle)
    certificate = run(
        base,
        tuned,
        UnitMap.load(units),
        base_adapter=base_adapter,
        adapter=adapter,
        require=require,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        certificate.save(out)
    for line in certificate_lines(certificate):
        typer.echo(line)
    if not certificate.holds:
        raise typer.Exit(1)


def _loader(chat_template: Path | None, dtype: str, device: str, allow_pickle: bool, trust_remote_code: bool):
    from functools import partial

    from keelguard.models import load_model

    return partial(
        load_model,
        dtype=dtype,
        device=device,
        chat_template=chat_template,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )


def _probe(suite: str, limit: int, harmful):
    """What safety is measured with: a suite, or harmful requests that no method has seen; else nothing."""
    from keelguard.units.evidence import ProofConfig, make_probe

    if not suite and not harmful:
        return None
    return make_probe(ProofConfig(suite=suite, limit=limit), harmful, ())


def _print_training(result, path: Path) -> None:
    from rich.console import Console

    from keelguard.units.training import training_table

    Console().print(training_table(result))
    typer.echo(f"{result.model}: the new checkpoint; {path}: the figures")
