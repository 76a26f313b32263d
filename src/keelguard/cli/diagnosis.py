"""`keelguard diagnose` and `keelguard verify`: which units carry safety, and which of them a training left alone."""

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
    check_probe,
    loader,
    make_reporter,
    numbers,
    one,
    testbed_data,
)
from keelguard.errors import FailureError, UsageError

_OF_THE_PROOF = ("suite", "judge", "shares", "ablation", "controls", "limit")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


def diagnose(
    context: typer.Context,
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
    scu: Annotated[float, typer.Option(help="Share of safety-critical units.")] = 0.01,
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
    from keelguard.models import check_source, resolve_sources
    from keelguard.units.diagnose import DiagnoseConfig
    from keelguard.units.evidence import ProofConfig
    from keelguard.units.groups import UnitMap
    from keelguard.units.page import diagnosis_tables
    from keelguard.units.run import run_diagnosis

    reporter = make_reporter()
    for part in filter(None, resolve_sources(model, adapter)):
        check_source(part, allow_pickle)
    if not utility:
        files = testbed_data(model, "--utility FILE, and --safety FILE for an aligned model")
        taken: dict[str, Any] = {"utility": files.data / "utility.train.jsonl"}
        # The base of the testbed answers everything: there is no safety in it to find.
        if not safety and Path(model).name != "base":
            taken["safety"] = files.data / "harmful.train.jsonl"
        if not suite and prove:
            taken["suite"] = files.suite()
        utility, safety = [str(taken["utility"])], safety or one(taken.get("safety"))
        suite = suite or str(taken.get("suite", ""))
        announce(reporter, files, taken)
    for option, asked in (("--prove", prove), ("--direction", direction)):
        if asked and not safety:
            raise UsageError(f"{option}: needs harmful requests that the model refuses; name a file with --safety")
    unread = [n for n in _OF_THE_PROOF if _is_given(context, n)]
    if unread and not prove:
        raise UsageError(f"--{unread[0]}: only the proof reads it; add --prove, or leave it out")
    if prove:
        check_probe(suite, limit, "name a suite file, or none, to ask rows that the diagnosis has not read")
    if before is not None:
        try:
            UnitMap.load(before)
        except UsageError as error:
            raise UsageError(str(error).replace("--units", "--before")) from error
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

    found = run_diagnosis(
        model,
        settings,
        out,
        proof=proof if prove else None,
        before=before,
        direction=direction,
        load=loader(model, adapter, chat_template, dtype, device, allow_pickle, trust_remote_code),
        reporter=reporter,
    )
    console = Console()
    console.print(diagnosis_tables(found.diagnosis.chart, found.proof, width=console.width))
    from keelguard.units.findings import direction_sentences, transfer_sentences

    for sentence in transfer_sentences(found.transfer) if found.transfer else []:
        typer.echo(sentence)
    for sentence in direction_sentences(found.probe) if found.probe else []:
        typer.echo(sentence)
    typer.echo(f"map.safetensors, map.json and the report: {found.report}")


def verify(
    base: Annotated[
        str,
        typer.Argument(help="The model before training: checkpoint folder or hub id; a package, or its certificate."),
    ],
    tuned: Annotated[str, typer.Argument(help="The model behind it: a checkpoint, or an adapter.")],
    units: Annotated[
        Path | None, typer.Option(help="Unit map of BASE, from `keelguard diagnose`. A package brings its own.")
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(help="Units that must be bit-equal, such as scu or scu,cu:0.06. Default: scu of a package."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write what was found, as JSON.")] = None,
    base_adapter: Annotated[str | None, typer.Option(help="PEFT adapter that belongs to BASE.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter that belongs to TUNED.")] = None,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Certify which units of a fine-tuned model are bit-equal to its base, and how far the others moved.

    Nothing depends on how, or by whom, the model was trained. With the certificate.json of a package the base is not
    needed: hashes of its safety units are compared. Exit code 1 when a unit of --require has moved.

    Examples:

      keelguard verify ./my-model ./tuned --units runs/diagnose --require scu,cu:0.06

      keelguard verify runs/harden/certificate.json ./tuned
    """
    from keelguard.models import check_source

    options: dict[str, Any] = {"adapter": adapter, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    for part in filter(None, (tuned, adapter)):
        check_source(part, allow_pickle)
    try:
        if Path(base).is_file() and base.endswith(".json"):
            for option, value in (("--units", units), ("--require", require), ("--base-adapter", base_adapter)):
                if value is not None:
                    raise UsageError(f"{option}: a certificate names its units itself; leave it out, or name a model")
            found, lines = _by_seal(base, tuned, options)
        else:
            found, lines = _by_weights(base, tuned, units, require, base_adapter, options)
    except FailureError as error:
        # Exit code 1 says that a unit has moved; a model that does not load says nothing of units.
        raise UsageError(str(error)) from error
    if out is not None:
        found.save(out)
    for line in lines:
        typer.echo(line)
    if not found.holds:
        raise typer.Exit(1)


def _by_seal(base: str, tuned: str, options: dict[str, Any]) -> tuple[Any, list[str]]:
    from keelguard.pipeline.seal import check_seal, read_seal

    found = check_seal(read_seal(base), tuned, **options)
    return found, [*found.lines(), f"certificate {found.seal}"]


def _by_weights(
    base: str, tuned: str, units: Path | None, require: str | None, base_adapter: str | None, options: dict[str, Any]
) -> tuple[Any, list[str]]:
    from keelguard.models import check_source
    from keelguard.pipeline.continued import source_of
    from keelguard.units.groups import UnitMap
    from keelguard.units.verify import certificate_lines
    from keelguard.units.verify import verify as run

    source = source_of(base, base_adapter, "--base-adapter")
    chart = units or source.units
    if chart is None:
        why = "the package has no unit map" if source.is_package else "give the unit map of BASE"
        raise typer.BadParameter(f"{why}; make one with `keelguard diagnose`", param_hint="'--units'")
    for part in filter(None, (source.model, source.adapter)):
        check_source(part, options["allow_pickle"])
    wanted = require if require is not None else "scu" if source.is_package else ""
    found = run(source.model, tuned, UnitMap.load(chart), base_adapter=source.adapter, require=wanted, **options)
    return found, [*certificate_lines(found), f"certificate {found.digest}"]
