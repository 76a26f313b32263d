"""`keelguard diagnose`: which units of a model carry safety, how sure that is, and the proof by ablation.

    found = diagnose("model", DiagnoseConfig(safety=("harmful.jsonl",), utility=("chats.jsonl",)), out="runs/diagnose")
    found.chart.members("scu")

The run folder keeps the model's own answers and the statistics of its activations. The same command with another
score, other sizes or a proof added reads those.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keelguard.batches import pad_id_of
from keelguard.data import BY_CONVENTION, Columns, hash_file, load_requests
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.judges import JudgeConfig, make_judge
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, architecture_of, load_model
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request
from keelguard.runs import open_run, read_json, versions, write_json
from keelguard.units import material as materials
from keelguard.units.attribution import Row, Statistics, attribute, objectives, reading_batch
from keelguard.units.groups import Ranking, Sizes, UnitMap, classify
from keelguard.units.importance import SCORES, WITHIN_BLOCK, Importance, importance, output_norms, standardise
from keelguard.units.index import UnitIndex, build_index
from keelguard.units.proof import Probe


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DiagnoseConfig:
    """What a diagnosis reads and how it ranks."""

    safety: tuple[str, ...] = _option((), "files of harmful requests that the model refuses; none finds only RU")
    utility: tuple[str, ...] = _option((), "files of benign requests, with answers where there are some")
    score: str = _option("decision", "decision, taylor, variance (the paper's) or wanda")
    attention: str = _option("head", "units of attention: head or channel")
    ranking: Ranking = _option("global", "rank over the whole model (global) or within each block (layer)")
    scu: float = _option(0.01, "share of safety-critical units")
    ucu: float = _option(0.02, "share of utility-critical units")
    ru: float = _option(0.2, "share of redundant units")
    scan: bool = _option(False, "find the sizes of SCU and RU by ablation instead")
    tokens: int = _option(3, "tokens of the refusal and of the compliance that the decision score compares")
    scored: str = _option("response", "tokens whose activations are measured: response, or last (of the prompt)")
    samples: int = _option(128, "at most this many requests of each file, drawn at random")
    groups: int = _option(32, "groups of prompts that are resampled together")
    bootstrap: int = _option(20, "resamples for the stability of the groups")
    max_new_tokens: int = _option(64, "where the model's own answers are cut off")
    batch_size: int = _option(0, "rows per batch; 0 chooses by the size of the model")
    columns: Columns = _option(BY_CONVENTION, "columns of the files, where convention does not find them")
    seed: int = _option(0, "which requests are drawn, and how they are grouped")

    def __post_init__(self) -> None:
        choices = {"score": SCORES, "attention": ("head", "channel"), "ranking": ("global", "layer")}
        for name, allowed in {**choices, "scored": ("response", "last")}.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"--{name} {getattr(self, name)}: unknown; choose from {', '.join(allowed)}")
        for name, least in (("samples", 1), ("groups", 2), ("tokens", 1), ("max_new_tokens", 1), ("bootstrap", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {least} or more")
        if self.groups < len(self.safety):
            raise UsageError(f"--groups {self.groups}: give at least one group for each of {len(self.safety)} files")
        if self.scan and not self.safety:
            raise UsageError("--scan: looks for the units that break safety; give harmful requests with --safety")
        if not self.utility:
            raise UsageError("no utility data: name a file of benign requests with --utility")
        Sizes(self.scu, self.ucu, self.ru)

    @property
    def sizes(self) -> Sizes:
        """The groups' sizes; without safety data there is only redundancy to find."""
        return Sizes(self.scu, self.ucu, self.ru) if self.safety else Sizes(0.0, 0.0, self.ru)


@dataclass(frozen=True)
class Diagnosis:
    """A finished diagnosis: the map, and what a proof needs to go on from it."""

    chart: UnitMap
    index: UnitIndex
    loaded: LoadedModel
    statistics: Mapping[str, Statistics]
    norms: Sequence[torch.Tensor]
    material: materials.Material
    decision: list[Row]
    held_out: dict[str, list[Request]]
    folder: Path

    def label(self, weights: Mapping[str, torch.Tensor] | None = None, score: str | None = None) -> torch.Tensor:
        """Labels (units,) from prompts weighted anew, or by another score, at the map's sizes."""
        meta = self.chart.meta
        found = importance(score or meta["score"], self.index, self.statistics, self.norms, weights)  # pyright: ignore[reportArgumentType]
        standard = standardise(found, score or meta["score"], self.chart.blocks)
        return classify(*standard, self.chart.blocks, Sizes(**meta["sizes"]), meta["ranking"])


def diagnose(
    source: str,
    config: DiagnoseConfig,
    *,
    out: str | Path,
    load: Callable[[str], LoadedModel] = load_model,
    reporter: Reporter = SILENT,
) -> Diagnosis:
    """Diagnose a checkpoint in a run folder, or go on from what an earlier run left there.

    Args:
        out: the run folder; `map.safetensors` and `map.json` are written into it.

    Raises:
        UsageError: the model cannot be mapped or does not refuse, or data or options are unusable.
        FailureError: a row does not fit in memory, or the disk is full.
    """
    with diagnosing(source, config, out=out, load=load, reporter=reporter) as found:
        return found


@contextmanager
def diagnosing(
    source: str,
    config: DiagnoseConfig,
    *,
    out: str | Path,
    load: Callable[[str], LoadedModel] = load_model,
    reporter: Reporter = SILENT,
) -> Iterator[Diagnosis]:
    """As `diagnose`, with the run folder still locked for what follows, such as a proof."""
    data = _read(config)
    loaded = plain(load(source))
    index = build_index(loaded.model, config.attention)  # pyright: ignore[reportArgumentType]
    settings = {
        "model": loaded.weights_hash,
        "data": {use: [hash_file(s, split=config.columns.split) for s in getattr(config, use)] for use in _USES},
        "columns": vars(config.columns),
        **{name: getattr(config, name) for name in _MEASURING},
        "definition": STATISTICS,
        "chat_template": sha256_of(loaded.tokenizer.chat_template),
        "dtype": str(loaded.model.dtype),
        "versions": versions(),
    }
    with open_run(Path(out), "diagnose", settings) as folder:
        clock = _Clock(folder / "cost.json")
        batch = reading_batch(loaded.model, config.batch_size)
        with clock("own answers"):
            material = materials.prepare(
                loaded,
                [some for some, _ in data["safety"]],
                [request for some, _ in data["utility"] for request in some],
                groups=config.groups,
                tokens=config.tokens,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
                seed=config.seed,
                store=folder / "answers",
                reporter=reporter,
            )
        decision = _decision_rows(loaded, material, config.tokens, batch)
        passes = {
            "safety": materials.answer_rows(material.safety, material.safety_groups),
            "decision": decision,
            "utility": materials.answer_rows(material.utility, material.utility_groups),
        }
        statistics: dict[str, Statistics] = {}
        for name, rows in passes.items():
            if rows:
                statistics[name] = _statistics(loaded, index, config, folder, name, rows, batch, clock, reporter)
        norms = output_norms(loaded.model, index)
        raw = {
            score: vars(importance(score, index, statistics, norms))  # pyright: ignore[reportArgumentType]
            for score in SCORES
        }
        chart = _chart(loaded, index, config, raw, material, settings["data"])
        held_out = {use: [r for _, rest in data[use] for r in rest] for use in _USES}
        found = Diagnosis(chart, index, loaded, statistics, norms, material, decision, held_out, folder)
        if config.scan:
            found = _scanned(found, config, reporter)
        from keelguard.units.evidence import stability_of

        with clock("stability"):
            evidence = stability_of(found, config)
        meta = {**found.chart.meta, **evidence, "cost": clock.seconds}
        chart = UnitMap(**{**vars(found.chart), "meta": meta})
        chart.save(folder)
        yield Diagnosis(**{**vars(found), "chart": chart})


_USES = ("safety", "utility")
STATISTICS = 2
"""Version of what the statistics are: raise it when a pass comes to collect something else."""

_MEASURING = ("attention", "tokens", "scored", "samples", "groups", "max_new_tokens", "seed")
"""Options that the statistics depend on; the others only rank, and may change in the same folder."""


def plain(loaded: LoadedModel) -> LoadedModel:
    """The model with its adapter, if any, merged into its weights: units are slices of whole weights."""
    from peft import PeftModel

    if not isinstance(loaded.model, PeftModel):
        return loaded
    merged = loaded.model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    return LoadedModel(merged.eval().requires_grad_(False), loaded.tokenizer, loaded.source, loaded.weights_hash)


def _read(config: DiagnoseConfig) -> dict[str, list[tuple[list[Request], list[Request]]]]:
    """By use, for each file: the requests that are drawn for the diagnosis, and the rest, which it never sees."""
    found: dict[str, list[tuple[list[Request], list[Request]]]] = {}
    drawn: set[str] = set()
    for use in _USES:
        found[use] = []
        for source in getattr(config, use):
            requests = load_requests(source, columns=config.columns)
            taken, rest = materials.draw(requests, use, config.samples, config.seed)
            found[use].append((taken, rest))
            drawn |= {sha256_of(list(request.messages)) for request in taken}
    # The same request may stand twice in a file, or in two.
    return {
        use: [(some, [r for r in rest if sha256_of(list(r.messages)) not in drawn]) for some, rest in parts]
        for use, parts in found.items()
    }


def _decision_rows(loaded: LoadedModel, material: materials.Material, tokens: int, batch: int) -> list[Row]:
    """The choice of every harmful prompt: its refusal against the likeliest of the model's own compliances."""
    if not material.safety:
        return []
    pad_id = pad_id_of(loaded.tokenizer)
    likely = []
    for opening in material.compliances:
        rows = []
        for chat, group in zip(material.safety, material.safety_groups, strict=True):
            start = chat.response.start
            rows.append(Row([*chat.ids[:start], *opening], start, start + len(opening), group))
        likely.append(objectives(loaded.model, rows, batch_size=batch, pad_id=pad_id))
    best = torch.stack(likely).argmax(0).tolist()
    return materials.decision_rows(material, [material.compliances[number] for number in best], tokens)


def _statistics(
    loaded: LoadedModel,
    index: UnitIndex,
    config: DiagnoseConfig,
    folder: Path,
    name: str,
    rows: list[Row],
    batch: int,
    clock: "_Clock",
    reporter: Reporter,
) -> Statistics:
    kept = folder / f"statistics-{name}.safetensors"
    if kept.exists():
        return Statistics.load(kept)
    with clock(f"attribution: {name}"):
        found = attribute(
            loaded.model,
            index,
            rows,
            groups=config.groups,
            effects=True,
            batch_size=batch,
            pad_id=pad_id_of(loaded.tokenizer),
            last_token=config.scored == "last" and name != "decision",
            reporter=reporter,
            label=f"attribution: {name}",
        )
    found.save(kept)
    return found


def _chart(
    loaded: LoadedModel,
    index: UnitIndex,
    config: DiagnoseConfig,
    raw: Mapping[str, Mapping[str, torch.Tensor]],
    material: materials.Material,
    data: Mapping[str, Any],
) -> UnitMap:
    blocks = [block.size for block in index.blocks]
    standard = standardise(Importance(**raw[config.score]), config.score, blocks)
    meta = {
        "model": loaded.source,
        "architecture": architecture_of(loaded.model),
        "score": config.score,
        "normalised": "within each block" if config.score in WITHIN_BLOCK else "over the whole model",
        "ranking": config.ranking,
        "sizes": vars(config.sizes),
        "settings": {name: getattr(config, name) for name in _MEASURING},
        "data": {use: list(zip(getattr(config, use), data[use], strict=True)) for use in _USES},
        "prompts": {"safety": len(material.safety), "utility": len(material.utility)},
        "refusal_rate": material.refusal_rate,
        "coverage": {**vars(index.coverage), "share": index.coverage.share},
        "versions": versions(),
    }
    labels = classify(*standard, blocks, config.sizes, config.ranking)
    return UnitMap(labels, *standard, raw, index.layout, index.attention, loaded.weights_hash, meta)


SCANNED = 64
"""Requests of each kind that a scan asks."""


def _scanned(found: Diagnosis, config: DiagnoseConfig, reporter: Reporter) -> Diagnosis:
    from keelguard.units.scan import scan_sizes

    # The sizes are fitted to prompts that the diagnosis has read, so that the proof's stay unseen.
    data = _read(config)
    harmful = [request for some, _ in data["safety"] for request in some][:SCANNED]
    utility = [request for some, _ in data["utility"] for request in some if request.answer][:SCANNED]
    if not utility:
        raise UsageError("--scan: the utility data brings no answers, so that a loss of utility cannot show; add some")
    probe = Probe(
        harmful=harmful,
        benign=[],
        utility=utility,
        judge=make_judge(JudgeConfig(kind="world" if all(request.secrets for request in harmful) else "keyword")),
        # Harm shows in a whole answer, where a refusal shows in its first words.
        generating=Generating(max(config.max_new_tokens, 128), config.batch_size, config.seed),
    )
    sizes, steps = scan_sizes(found.loaded, found.index, found.chart, probe, found.folder / "points", reporter)
    chart = found.chart.relabelled(sizes, config.ranking)
    chart = UnitMap(**{**vars(chart), "meta": {**chart.meta, "scan": steps}})
    return Diagnosis(**{**vars(found), "chart": chart})


class _Clock:
    """Seconds of each stage, kept over interruptions; a stage that was read from disk keeps its first time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds.setdefault(stage, round(time.monotonic() - start, 3))
        write_json(self.path, self.seconds)
