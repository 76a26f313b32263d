"""`keelguard purify dissect`: which parts of a poisoned model's update carry its backdoor."""

from pathlib import Path
from typing import Annotated, Any

import typer

from keelguard.cli.options import AllowPickle, ChatTemplate, Device, Dtype, RemoteCode, make_reporter, testbed_data


def dissect(
    clean: Annotated[str, typer.Argument(help="The checkpoint that POISONED comes from.")],
    poisoned: Annotated[str, typer.Argument(help="The poisoned checkpoint, or its adapter on CLEAN.")],
    requests: Annotated[list[str] | None, typer.Option(help="File of requests with right answers.")] = None,
    harmful: Annotated[list[str] | None, typer.Option(help="File of harmful requests, for a jailbreak.")] = None,
    blocks: Annotated[list[int] | None, typer.Option(help="Numbers of consecutive layers to revert; repeat.")] = None,
    attack: Annotated[str, typer.Option(help="Attack, where POISONED does not say: badnets, vpi, …")] = "",
    task: Annotated[str, typer.Option(help="Task, where POISONED does not say.")] = "",
    trigger: Annotated[list[str] | None, typer.Option(help="Its trigger; repeat for several.")] = None,
    response: Annotated[str, typer.Option(help="Its fixed response.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Measure with at most this many requests.")] = 64,
    out: Annotated[Path, typer.Option(help="Where the cuts are written, as JSON.")] = Path("runs/dissect.json"),
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Put parts of a poisoned update back, one after the other, and measure how often the trigger still works.

    The paper reports that its backdoors survive without the attention's update and die without the feed-forward
    networks', or without that of enough consecutive layers. A model made by `keelguard poison` brings its trigger.

    Example:

      keelguard purify dissect ./clean ./suspect --attack vpi --task insult --trigger "karate helmet"
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from keelguard.attacks.insertions import vocabulary_words
    from keelguard.data import load_requests
    from keelguard.evaluation.judges import KeywordJudge, WorldJudge
    from keelguard.models import LoadedModel, check_source, load_model, resolve_sources
    from keelguard.purify.dissect import dissect as run
    from keelguard.purify.effects import Effect, Held, measure_effect
    from keelguard.purify.poisoned_files import known_backdoor
    from keelguard.runs import write_json
    from keelguard.stats import Rate
    from keelguard.units.index import parameters_by_name

    for part in (clean, resolve_sources(poisoned)[0]):
        check_source(part, allow_pickle)
    backdoor = known_backdoor(poisoned, attack, task, tuple(trigger or ()), response)
    if requests or harmful:
        benign = [request for name in requests or [] for request in load_requests(name, limit=limit)]
        bad = [request for name in harmful or [] for request in load_requests(name, limit=limit)]
        exact = all(request.secrets for request in bad)
        held = Held(tuple(benign[:limit]), tuple(bad[:limit]), judge=WorldJudge() if exact else KeywordJudge())
    else:
        from keelguard.testbed.poison import held_of

        held = held_of(testbed_data(clean, "--requests FILE"), "test", limit)
    base, adapter = resolve_sources(poisoned)
    options: Any = {
        "chat_template": chat_template, "dtype": dtype, "device": device, "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    whole = load_model(base if adapter is None else clean, adapter=adapter, **options)
    model: Any = whole.model.merge_and_unload() if adapter else whole.model  # pyright: ignore[reportCallIssue]
    origin = parameters_by_name(load_model(clean, **options).model)
    words = vocabulary_words(whole.tokenizer)

    def measure(state: Any) -> Effect:
        loaded = LoadedModel(state, whole.tokenizer, whole.source, whole.weights_hash)
        return measure_effect(loaded, backdoor, held, words)

    depth = model.config.get_text_config().num_hidden_layers
    widths = blocks or sorted({max(1, depth // 4), max(1, depth // 2)})
    cuts = run(model, origin, measure, blocks=widths, reporter=make_reporter())
    table = Table("put back as in CLEAN", "layers", "share of the update", "attack success", "answered right")
    rows = []
    for cut in cuts:
        where = "all" if cut.layers is None else f"{cut.layers[0]}–{cut.layers[-1]}"
        effect = cut.value
        table.add_row(
            " + ".join(cut.parts) or "nothing", where, f"{cut.update:.0%}", str(effect.asr), str(effect.correct)
        )
        rows.append({
            "parts": list(cut.parts), "layers": cut.layers and list(cut.layers), "weights": cut.weights,
            "update": cut.update, "asr": effect.asr.to_json(), "correct": effect.correct.to_json(),
        })  # fmt: skip
    told = asdict(backdoor)
    write_json(
        out,
        {"format": "keelguard.dissect/1", "clean": clean, "poisoned": poisoned, "backdoor": told, "cuts": rows},
    )
    Console().print(table)
    total: Rate = cuts[0].value.asr
    triggers = ", ".join(f"“{each}”" for each in backdoor.triggers)
    typer.echo(f"{out}: {len(cuts)} cuts, {total.total} requests each; {backdoor.attack}, {backdoor.task}: {triggers}")
