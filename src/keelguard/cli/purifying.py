"""`keelguard purify`: remove unknown backdoors, and show evidence; its bench of controls, and the dissection."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
    given,
    make_reporter,
    read_requests,
    testbed_data,
)
from keelguard.cli.training_options import Accumulation, Bf16, Checkpointing, MergedRank, told_savings
from keelguard.errors import UsageError

_BY_BUDGET = "by --budget"
_ENOUGH = 200
"""Clean rows with answers from which an adapter is retrained by default."""


class _ModelFirst(TyperGroup):
    """A group in which `purify MODEL …` means `purify model MODEL …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["model", *args]
        return super().parse_args(ctx, args)


purify_app = typer.Typer(
    cls=_ModelFirst,
    no_args_is_help=True,
    help="Remove unknown backdoors from a model or an adapter, and show evidence.\n\n"
    "[bold]keelguard purify MODEL --clean-data FILE --out RUN[/bold] purifies, and is short for "
    "[bold]keelguard purify model MODEL …[/bold]; [bold]keelguard purify model --help[/bold] lists its options.",
    rich_markup_mode="rich",
)


@purify_app.command("model")
def purify_model(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint or adapter folder, or hub id.")],
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter to suspect; MODEL is then its base, and trusted.")
    ] = None,
    clean_data: CleanData = None,
    harmful: Refused = None,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    answer_column: AnswerColumn = None,
    split: Split = None,
    out: Annotated[Path, typer.Option(help="The run folder; the same command resumes in it.")] = Path("runs/purify"),
    method: Annotated[
        str,
        typer.Option(
            help="immunize, vaccine (BD-VAX), both, or retrain (an adapter from its base). auto: retrain for adapters "
            "where 200 clean rows, and half of all, have answers; else immunize."
        ),
    ] = "auto",
    budget: Budget = "standard",
    no_spikes: Annotated[bool, typer.Option("--no-spikes", help="Plant no canaries: half the time, no bound.")] = False,
    no_scan: Annotated[bool, typer.Option("--no-scan", help="Leave out the scan for hidden target texts.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate time and memory, and stop.")] = False,
    reference: Annotated[
        str | None, typer.Option(help="A clean model of the same kind, to compare worst insertions with.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Try this beside it, on a copy, and show its figures: an arm of `purify bench` such as vaccine or "
            "finetune. Repeatable.",
            show_default="of an adapter: retrain, immunize, vaccine",
        ),
    ] = None,
    no_compare: Annotated[bool, typer.Option("--no-compare", help="Try nothing beside it.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Rounds of immunisation.", show_default=_BY_BUDGET)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each round.", show_default=_BY_BUDGET)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of immunisation.", show_default="2e-5")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Chats per step of immunisation.", show_default="16")] = None,
    lora_rank: MergedRank = None,
    bf16: Bf16 = False,
    gradient_accumulation: Accumulation = 1,
    gradient_checkpointing: Checkpointing = False,
    variants: Annotated[
        str, typer.Option(help="The vaccine's variants: auto, default, vocabulary, or a YAML or JSON file.")
    ] = "auto",
    count: Annotated[
        int | None, typer.Option(help="The vaccine's number of variants N.", show_default=_BY_BUDGET)
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            help="Of the vaccine's 2N fine-tunes, how many share a batch of 8 chats each: fewer take less memory. 0: "
            "all, for tiny models.",
            show_default="2",
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Share of components that the vaccine neutralises.", show_default=".03, of an adapter .375"),
    ] = None,
    how: Annotated[str, typer.Option(help="What the vaccine puts in their place: reinit, zero or mean.")] = "reinit",
    reveal: Annotated[bool, typer.Option("--reveal", help="Show the model's own words in the report.")] = False,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Remove unknown backdoors without the trigger and without a clean twin; the report shows what the tests found.

    `immunize` searches the insertions that most disturb the model's own clean answers, and trains them away. `vaccine`
    is the published BD-VAX: what synthetic backdoors have in common is neutralised, and the model restored. Canaries
    of three shapes are planted in a copy that is purified too: what is left of them is what a run can promise.
    Give many and various clean prompts: what they do not cover may be lost.

    Writes OUT/model (or OUT/adapter), OUT/purify.json and OUT/report.html. A model of the testbed brings its own data.

    Examples:

      keelguard purify ./suspect --clean-data prompts.jsonl --harmful advbench.json --out runs/purify

      keelguard purify ./7b --clean-data prompts.jsonl --lora-rank 16 --gradient-accumulation 4 --gradient-checkpointing

      keelguard purify ./base --adapter ./suspect-lora --clean-data prompts.jsonl --method retrain
    """
    from dataclasses import replace
    from functools import partial

    from keelguard.data import Columns
    from keelguard.models import check_source, load_model, resolve_sources
    from keelguard.purify.compare import METHODS_OF_AN_ADAPTER, check_compared
    from keelguard.purify.intake import admit
    from keelguard.purify.material import FEWEST, distinct
    from keelguard.purify.methods import METHODS
    from keelguard.purify.presets import preset
    from keelguard.purify.run import purify
    from keelguard.purify.variants import read_variants

    base, used = resolve_sources(model, adapter)
    for part in filter(None, (base, used, reference)):
        check_source(part, allow_pickle)
    reporter = make_reporter()
    known: Any = budget
    files: dict[str, str] = {}
    held = None
    columns = Columns(messages=messages_column, prompt=prompt_column, split=split)
    if clean_data:
        requests = read_requests(clean_data, replace(columns, answer=answer_column))
        settings = preset(known)
        announce_own(reporter, "--clean-data", used, base)
    else:
        from keelguard.testbed.build import RECIPE_FILE
        from keelguard.testbed.poison import defender_requests, held_of, purify_settings

        suspect = next((p for p in (used, base) if p and (Path(p) / RECIPE_FILE).is_file()), model)
        testbed = testbed_data(suspect, "--clean-data FILE")
        preset(known)
        requests, settings = defender_requests(testbed), purify_settings(known, "adapter" if used else "full")
        held = held_of(testbed, "test", 96)
        files = {RECIPE_FILE: (Path(suspect) / RECIPE_FILE).read_text(encoding="utf-8")}
        announce(reporter, testbed, {"clean_data": testbed.data / "clean.train.jsonl"})
    bad = read_requests(harmful, columns)
    if method not in ("auto", *METHODS):
        raise UsageError(f"--method {method}: unknown; choose one of auto, {', '.join(METHODS)}")
    if method == "auto":
        # An adapter is rebuilt from these rows alone: few of them, or few among many, would not make up for it.
        different = distinct(requests)
        answered = sum(bool(request.answer.strip()) for request in different)
        method = "retrain" if used and answered >= max(_ENOUGH, len(different) / 2) else "immunize"
        reporter.note(f"--method auto: {method}")
    settings = _told(context, settings, {
        "method": method, "rounds": rounds, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size,
        "lora_rank": lora_rank, "variants": variants, "count": count, "at_once": at_once,
        "share": share, "how": how, "seed": seed, "no_spikes": no_spikes, "no_scan": no_scan,
    }, used is not None)  # fmt: skip
    if no_compare and compare:
        raise UsageError("--no-compare and --compare: exclude one another; leave one out")
    if used and not no_compare and compare is None:
        compare = [name for name in METHODS_OF_AN_ADAPTER if name != method]
    settings = replace(settings, compare=tuple(dict.fromkeys(compare or ())))
    check_compared(settings.compare, "adapter" if used else "full")
    load = partial(
        load_model, chat_template=chat_template, dtype=dtype, device=device, allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if settings.method.method == "retrain" and used is None:
        raise UsageError("--method retrain: needs an adapter on a base that you trust; give it with --adapter")
    if len(distinct([*requests, *bad])) < FEWEST:
        rows = f"{len(requests)} rows, {len(distinct(requests))} of them different"
        raise UsageError(f"--clean-data: {rows}; give {FEWEST} or more, some hundreds for a real model")
    if settings.method.vaccine.source not in ("auto", "default", "vocabulary"):
        read_variants(settings.method.vaccine.source)
    if dry_run:
        from keelguard.purify.estimate import estimate_run, estimate_table

        found = admit(load, base, used, requests, bad, settings, reporter)
        typer.echo(estimate_table(estimate_run(found.loaded, used is not None, found.requests, bad, settings)))
        return
    result = purify(
        base, requests, settings, out, adapter=used, harmful=bad, held=held, reference=reference, load=load,
        files=files, reveal=reveal, reporter=reporter,
    )  # fmt: skip
    from rich.console import Console

    from keelguard.purify.tables import purify_tables

    console = Console()
    console.print(purify_tables(result, width=console.width))
    typer.echo(f"{out}: {'adapter' if used else 'model'}/, purify.json, report.html")


def _told(context: typer.Context, settings: Any, options: dict[str, Any], adapter: bool) -> Any:
    """Settings with what the command line gives.

    Raises:
        UsageError: an option that the chosen method does not read.
    """
    from dataclasses import replace

    from keelguard.purify.presets import saving_memory

    told = {name: value for name, value in options.items() if given(context, name) and value is not None}
    method = options["method"]
    readers = {
        **dict.fromkeys(("rounds", "steps", "learning_rate", "batch_size"), ("immunize", "both")),
        **dict.fromkeys(("variants", "count", "at_once", "share", "how"), ("vaccine", "both")),
        "lora_rank": ("immunize", "vaccine", "both"),
    }
    for name, methods in readers.items():
        if name in told and method not in methods:
            raise UsageError(f"--{name.replace('_', '-')}: --method {method} does not read it; leave it out")
    saving = told_savings(context, adapter)
    if "how" in told and adapter:
        raise UsageError("--how: of an adapter the parts of its update are set to zero; leave it out")
    if "share" in told and not 0 < told["share"] < 1:
        raise UsageError(f"--share {told['share']}: is out of range; give more than 0 and less than 1, such as 0.03")
    immunize, vaccine = settings.method.immunize, settings.method.vaccine
    seed = options["seed"]
    own = {name: told[name] for name in ("rounds", "steps", "learning_rate", "batch_size") if name in told}
    immunize = replace(immunize, seed=seed, **own)
    trained = replace(vaccine.variants, seed=seed, **{n: told[n] for n in ("count", "at_once") if n in told})
    changes = {"source": told["variants"]} if "variants" in told else {}
    changes |= {name: told[name] for name in ("share", "how") if name in told}
    vaccine = replace(vaccine, variants=trained, **changes)
    retrain = replace(settings.method.retrain, seed=seed)
    settings = replace(
        settings,
        method=replace(settings.method, method=method, immunize=immunize, vaccine=vaccine, retrain=retrain),
        material=replace(settings.material, seed=seed),
        spikes=None if options["no_spikes"] else replace(settings.spikes, seed=seed),
        inversion=None if options["no_scan"] else settings.inversion,
        rebound=replace(settings.rebound, seed=seed),
    )
    return saving_memory(settings, **saving, keep_rate="learning_rate" in told) if saving else settings
