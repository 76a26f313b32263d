"""Options and outputs that the commands share which train: `finetune`, `align` and `purify`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from keelguard.cli.options import check_probe, given
from keelguard.errors import UsageError

_SAVING = ("lora_rank", "bf16", "gradient_accumulation", "gradient_checkpointing")

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
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; the weights that train stay float32.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Save memory for time.")]
MergedRank = Annotated[
    int | None,
    typer.Option(
        help="Train and merge LoRAs of this rank, at five times the rate; not of an adapter.",
        show_default="0: all weights, in float32",
    ),
]
Suite = Annotated[str, typer.Option(help="Suite that safety and utility are measured with.")]
JudgedBy = Annotated[str, typer.Option(help="Judge of the answers: world or keyword. Default: the suite's.")]
Limit = Annotated[int, typer.Option(help="Measure with at most this many requests of each kind.")]
Others = Annotated[str, typer.Option(help="Embeddings, norms and head, which are no units: train or freeze.")]
Compare = Annotated[bool, typer.Option("--compare", help="Also train without protection or budget, for the table.")]


def unless_given(context: typer.Context, *, steps: int, learning_rate: float) -> dict[str, Any]:
    """Defaults of a testbed's model for what neither the command line nor --config gives."""
    named = {name for name in ("steps", "epochs", "learning_rate") if given(context, name)}
    found = {} if named & {"steps", "epochs"} else {"steps": steps}
    return found if "learning_rate" in named else {**found, "learning_rate": learning_rate}


def told_savings(context: typer.Context, adapter: bool) -> dict[str, Any]:
    """Of a purification's settings that save memory, those that the command line or --config gives.

    Raises:
        UsageError: a LoRA to be merged beside an adapter that is trained itself.
    """
    told = {name: context.params[name] for name in _SAVING if given(context, name)}
    if "lora_rank" in told and adapter:
        raise UsageError(
            f"--lora-rank {told['lora_rank']}: of a model with an adapter that alone is trained; leave it out"
        )
    return told


def training_probe(suite: str, judge: str, limit: int, harmful, remedy: str, reporter):
    """What safety is measured with: a suite, or harmful requests that no method has seen; else nothing."""
    from keelguard.units.evidence import ProofConfig, make_probe
    from keelguard.units.material import FEWEST

    check_probe(suite, limit, "name a suite file")
    if not suite and len(harmful) < FEWEST:
        reporter.note(f"safety is not measured; give {remedy}")
        return None
    return make_probe(ProofConfig(suite=suite, judge=judge, limit=limit), harmful, ())


def print_training(result, path: Path) -> None:
    from rich.console import Console

    from keelguard.processes import is_main
    from keelguard.units.training import training_table

    if is_main():
        Console().print(training_table(result))
        typer.echo(f"{result.model}: the new checkpoint; {path}: the figures")
