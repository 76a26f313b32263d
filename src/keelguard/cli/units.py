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
    ranking: Annotated[str, typer.Option(help="Rank over the whole model (global) or in each block (layer).")] = "global",
    scu: Annotated[float, typer.Option(help="Share of safety-critical units.")] = 0.02,
    ucu: Annotated[float, typer.Option(help="Share of utility-critical units.")] = 0.02,
    ru: Annotated[float, typer.Option(help="Share of redundant units.")] = 0.2,
    scan: Annotated[bool, typer.Option("--scan", help="Find the sizes of SCU and RU by ablation instead.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of refusal and compliance that `decision` compares.")] = 3,
    scored: Annotated[str, typer.Option(help="Tokens measured: response, or last (of the prompt).")] = "response",
    samples: Annotated[int, typer.Option(help="At most this many requests of each file, drawn at random.")] = 128,
    bootstrap: Annotated[int, typer.Option(help="Resamples of the prompts for the groups' stability.")] = 20,
    shares: Annotated[str, typer.Option(help="Shares of all units that the proof ablates.")] = "0.005,0.01,0.02,0.05,0.1,0.2",
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
