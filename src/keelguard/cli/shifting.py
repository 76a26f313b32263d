"""`keelguard shift`: how what safety rests on moves between kinds of requests, and between two checkpoints."""

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
    make_reporter,
    testbed_data,
)
from keelguard.errors import UsageError


def shift(
    model: Annotated[str, typer.Argument(help="Checkpoint or adapter folder, or hub id.")],
    units: Annotated[Path, typer.Option(help="Unit map of MODEL, from `keelguard diagnose`.")],
    signal: Annotated[Path | None, typer.Option(help="Signal of MODEL, from `keelguard guard train`.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="[NAME=]FILE, harmful requests of one kind; repeat for each kind.")
    ] = None,
    benign: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE, benign requests of that kind, for the signal's false alarms.")
    ] = None,
    utility: Annotated[
        list[str] | None, typer.Option(help="File of benign requests. Default: those that the map was made from.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another checkpoint, such as a fine-tune of MODEL.")] = None,
    out: Annotated[Path, typer.Option(help="The run folder; the same command resumes in it.")] = Path("runs/shift"),
    by: Annotated[
        str, typer.Option(help="Column that says what a request is about; the same in two files belongs together.")
    ] = "",
    samples: Annotated[int, typer.Option(help="At most this many requests of each file, drawn at random.")] = 128,
    groups: Annotated[int, typer.Option(help="Groups of prompts that are resampled together.")] = 32,
    splits: Annotated[int, typer.Option(help="Random cuts of the prompts into halves.")] = 100,
    bootstrap: Annotated[int, typer.Option(help="Resamples of the prompts for the intervals.")] = 200,
    limits: Annotated[
        Path | None, typer.Option(help="Take the warning limits from this shift.json instead of this run's halves.")
    ] = None,
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
    """Measure how importance, groups, the reasoning direction and the signal move with the requests.

    Each --data is a kind of request: plain, nested, in other phrasings, in another language. The first must be one that
    MODEL refuses. Every drift stands beside that of two halves of one and the same kind, with a bootstrap interval and
    a warning limit. Writes shift.json, which gate reads, and report.html. A model of the testbed brings its own kinds.

    Examples:

      keelguard shift ./my-model --units runs/diagnose --data plain=advbench.json --data nested.jsonl --signal ./signal

      keelguard shift ./my-model --units runs/diagnose --data advbench.json --against ./tuned --out runs/drift
    """
    from keelguard.cli.study import print_rows
    from keelguard.data import Columns
    from keelguard.guard.adapter import Signal
    from keelguard.models import check_source, resolve_sources
    from keelguard.pipeline.drift import Resampling
    from keelguard.pipeline.shift import ShiftConfig, measure_shift
    from keelguard.pipeline.shift_data import read_distributions, read_utility, testbed_distributions
    from keelguard.pipeline.shift_page import condition_rows, drift_rows, shift_sentences, write_shift_report
    from keelguard.pipeline.shift_results import Shift
    from keelguard.units.groups import UnitMap

    reporter = make_reporter()
    for part in filter(None, (*resolve_sources(model, adapter), *(resolve_sources(against) if against else ()))):
        check_source(part, allow_pickle)
    settings = ShiftConfig(
        samples=samples,
        groups=groups,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        resampling=Resampling(splits=splits, samples=bootstrap, seed=seed),
    )
    chart = UnitMap.load(units)
    found = None if signal is None else Signal.load(signal)
    if limits is not None:
        Shift.load(limits)  # A wrong file is refused before anything is read.
    columns = Columns(prompt=prompt_column, answer=answer_column)
    if data:
        distributions = read_distributions(data, benign or (), by=by, columns=columns)
    elif benign or by:
        raise UsageError(f"--{'benign' if benign else 'by'}: is about the files of --data; name some")
    else:
        files = testbed_data(model, "two or more files of harmful requests with --data, or one and --against MODEL")
        distributions = testbed_distributions(files)
        taken: dict[str, Any] = {"data": Path("plain, nested, rephrased (validation split)")}
        announce(reporter, files, taken)
    requests = read_utility(utility or (), chart, columns)
    measured = measure_shift(
        model,
        distributions,
        requests,
        chart,
        settings,
        out=out,
        signal=found,
        against=against,
        limits=limits,
        load=loader(model, adapter, chat_template, dtype, device, allow_pickle, trust_remote_code),
        reporter=reporter,
    )
    report = out / "report.html"
    write_shift_report(report, measured)
    print_rows(condition_rows(measured))
    print_rows(drift_rows(measured))
    for sentence in (*shift_sentences(measured), *measured.left_out):
        typer.echo(sentence)
    typer.echo(f"shift.json and the report: {report}")
