"""The `keelguard` command: one function is one command. torch is imported late, so that `--help` is instant."""

import os
import sys
from typing import Annotated

import typer

from keelguard import __version__
from keelguard.cli import (
    aligning,
    answering,
    audits,
    benching,
    diagnosis,
    dissecting,
    gating,
    guards,
    hardening,
    poisoning,
    purifying,
    shifting,
    signals,
    studies,
    testbeds,
    tuning,
)
from keelguard.errors import KeelguardError
from keelguard.fitting import memory_errors

app = typer.Typer(
    name="keelguard",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make an open-weight chat model's safety mechanism explicit, durable and free of hidden control.\n\n"
    "Start with [bold]keelguard quickstart[/bold]; audit your own with [bold]keelguard audit MODEL --requests FILE"
    "[/bold].",
    rich_markup_mode="rich",
)
app.command()(testbeds.quickstart)
app.command()(audits.audit)
for command in (
    hardening.harden,
    diagnosis.diagnose,
    tuning.finetune,
    aligning.align,
    diagnosis.verify,
    gating.gate,
    shifting.shift,
    poisoning.poison,
    answering.generate,
    answering.chat,
):
    app.command()(command)
app.add_typer(testbeds.testbed_app, name="testbed")
app.add_typer(audits.attack_app, name="attack")
for command in (signals.train, signals.recover, studies.attack, studies.ablate, studies.implicit, studies.certainty):
    guards.guard_app.command()(command)
app.add_typer(guards.guard_app, name="guard")
purifying.purify_app.command("bench")(benching.bench)
purifying.purify_app.command("dissect")(dissecting.dissect)
app.add_typer(purifying.purify_app, name="purify")


@app.callback(invoke_without_command=True)
def version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Handle what stands before a command."""
    if version:
        typer.echo(f"keelguard {__version__}")
        raise typer.Exit


@app.command()
def doctor() -> None:
    """Print versions, device, free memory, and what is missing."""
    from rich.console import Console

    from keelguard.doctor import examine

    console = Console(highlight=False)
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "[green]ok[/green]" if finding.fine else "[red]!![/red]"
        console.print(f"{mark}  {finding.name:<{width}}  ", end="")
        console.print(finding.value, markup=False)
    if not all(finding.fine for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2, a failure one line and exit code 1."""
    # Idle threads that spin for long make a busy machine many times slower; libraries' bars would break up our own.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        with memory_errors("this command"):
            app()
    except KeelguardError as error:
        from keelguard.plots import legible

        # A message may quote a checkpoint's own text, which is not trusted with the terminal.
        typer.echo(f"keelguard: {legible(' '.join(str(error).split()))}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns an interrupt into exit code 130 and says nothing.
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        typer.echo("keelguard: interrupted; the same command goes on where it was", err=True)
        sys.exit(130)
