"""What several commands share: their options, their progress, and where a testbed's model finds its data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from keelguard.errors import UsageError


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a command's defaults from a YAML file; what the command line gives still wins."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read ({str(error).splitlines()[0]}); give a YAML file") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must hold a mapping of options to values")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = [param.name for param in context.command.params if param.name not in ("config", "help")]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"--config {path}: no option {unknown[0]!r}; this command has {', '.join(map(str, known))}")
    # An option that may be repeated takes one value without a list too, as a suite file does.
    repeated = {param.name for param in context.command.params if getattr(param, "multiple", False) or param.nargs < 0}
    for name in repeated & set(values):
        values[name] = [values[name]] if isinstance(values[name], str) else values[name]
    context.default_map = {**(context.default_map or {}), **values}
    return path


Config = Annotated[
    Path | None, typer.Option(callback=read_config, is_eager=True, help="A YAML file with values of these options.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
ChatTemplate = Annotated[Path | None, typer.Option(help="A Jinja file that replaces the tokenizer's chat template.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; auto spreads a model over the GPUs.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickle weights too: they can run code.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python files that a checkpoint brings.")]

CleanData = Annotated[
    list[str] | None, typer.Option(help="File of clean prompts, with right answers or without; repeat for more.")
]
Refused = Annotated[list[str] | None, typer.Option(help="File of harmful requests that MODEL refuses.")]
Budget = Annotated[str, typer.Option(help="quick, standard or thorough: how much training a run may cost.")]
SaveEvery = Annotated[int, typer.Option(min=0, help="Steps between checkpoints to resume from; 0 keeps none.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column of the prompt's text, in every file.")]
MessagesColumn = Annotated[str | None, typer.Option(help="Column of whole conversations, in every file.")]
AnswerColumn = Annotated[str | None, typer.Option(help="Column of answers, in every file whose answers are read.")]
Split = Annotated[str | None, typer.Option(help="Split of a data set.")]


def given(context: typer.Context, name: str) -> bool:
    """Whether the command line or --config gives an option."""
    source = context.get_parameter_source(name)
    # typer brings its own click, so that its sources are no members of click's.
    return source is not None and source.name != "DEFAULT"


def make_reporter():
    from transformers.utils import logging

    from keelguard.progress import ConsoleReporter

    logging.disable_progress_bar()
    return ConsoleReporter()


def main_reporter():
    """Progress of the main process alone, for what a launcher may run in several."""
    from keelguard.processes import is_main
    from keelguard.progress import SILENT

    return make_reporter() if is_main() else SILENT


def merged(loaded: Any) -> Any:
    """The model with its adapter merged: rows of a signal go through plain layers."""
    from dataclasses import replace

    if not hasattr(loaded.model, "peft_config"):
        return loaded
    return replace(loaded, model=loaded.model.merge_and_unload().eval())


def testbed_suite(sources: list[str]) -> str:
    """The suite of the testbed that made these models; others speak of another world, and need requests."""
    from keelguard.runs import read_json
    from keelguard.testbed.build import RECIPE_FILE, build_testbed

    recipes = [Path(source) / RECIPE_FILE for source in sources]
    if not all(recipe.is_file() for recipe in recipes):
        raise UsageError("no requests: name a file with --requests FILE, or a suite with --suite testbed or FILE")
    seeds = {read_json(recipe).get("seed") for recipe in recipes}
    if len(seeds) > 1:
        raise UsageError(f"the models come from testbeds of different seeds ({sorted(seeds)}); audit them apart")
    return str(build_testbed(only=[], seed=seeds.pop()).suite())


def testbed_data(source: str, remedy: str):
    """The testbed whose recipe made a model.

    Raises:
        UsageError: the model is none of a testbed's; the message asks for `remedy`.
    """
    from keelguard.runs import read_json
    from keelguard.testbed.build import RECIPE_FILE, build_testbed

    recipe = Path(source) / RECIPE_FILE
    if not recipe.is_file():
        raise UsageError(f"no data: {source} is no model of the testbed; give {remedy}")
    return build_testbed(only=[], seed=read_json(recipe).get("seed"))


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        UsageError: something else stands there.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"{option} {text}: give numbers between commas, such as 0.01,0.02") from error


def announce(reporter, files, taken: dict[str, Any]) -> None:
    """Say in one line what a model of the testbed brought by default."""
    parts = [f"--{k.replace('_', '-')} {v.name if isinstance(v, Path) else f'{v:g}'}" for k, v in taken.items()]
    reporter.note(f"a model of the testbed, so by default {' '.join(parts)} (files in {files.data})")


def announce_own(reporter, option: str, *sources: str | None) -> None:
    """Say that a user's own data go with settings for models of ordinary size, also on a model of the testbed."""
    from keelguard.testbed.build import RECIPE_FILE

    if any(source and (Path(source) / RECIPE_FILE).is_file() for source in sources):
        reporter.note(
            f"a model of the testbed with your own data: settings are those for models of ordinary size, which suit it "
            f"badly; leave {option} out for the testbed's data and settings, or set them"
        )


def read_requests(sources: list[str] | None, columns: Any, limit: int | None = None) -> list[Any]:
    """The requests of some files, all with the same `Columns`."""
    from keelguard.data import load_requests

    return [request for source in sources or [] for request in load_requests(source, columns=columns, limit=limit)]


def check_probe(suite: str, limit: int, remedy: str) -> None:
    """Refuse at once what the command would stumble over at its end."""
    from keelguard.evaluation.audit import AuditConfig, load_suite
    from keelguard.units.material import FEWEST

    if limit < FEWEST:
        raise UsageError(f"--limit {limit}: give {FEWEST} or more; fewer requests say nothing")
    if suite == "general":
        raise UsageError(f"--suite general: brings no harmful requests of its own; {remedy}")
    if suite:
        load_suite(AuditConfig(suite=suite, limit=1))


def one(path: Path | None) -> list[str] | None:
    """A default file as the list that an option holds."""
    return None if path is None else [str(path)]


def loader(
    source: str,
    adapter: str | None,
    chat_template: Path | None,
    dtype: str,
    device: str,
    allow_pickle: bool,
    trust_remote_code: bool,
):
    """`load_model` with a command's options; the adapter is that of `source`."""
    from keelguard.models import load_model

    def load(wanted: str, **options: Any):
        return load_model(
            wanted,
            adapter=adapter if wanted == source else None,
            dtype=dtype,
            device=device,
            chat_template=chat_template,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            **options,
        )

    return load
