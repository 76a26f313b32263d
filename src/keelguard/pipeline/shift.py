"""`keelguard shift`: how importance, groups, the reasoning direction and the signal move with the requests.

    distributions = read_distributions(["plain=harmful.jsonl", "nested=in-stories.jsonl"])
    found = measure_shift("./model", distributions, utility, chart, ShiftConfig(), out="runs/shift", signal=signal)
    found.drift["importance"]["plain / nested"].warn

The run folder keeps answers and statistics of every distribution, and the figures can be drawn anew from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from keelguard.errors import UsageError
from keelguard.guard.adapter import Signal
from keelguard.guard.loop import check_fit
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, architecture_of, load_model
from keelguard.pipeline import shift_metrics as metrics
from keelguard.pipeline.drift import Drift, Resampling, drifts
from keelguard.pipeline.shift_conditions import COMPARE, Conditions, Measured, openings_of, shared_groups
from keelguard.pipeline.shift_data import Distribution, check_distributions
from keelguard.pipeline.shift_results import Pair, Shift
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request
from keelguard.runs import open_run, versions
from keelguard.units.diagnose import plain
from keelguard.units.groups import UnitMap
from keelguard.units.index import build_index
from keelguard.units.material import draw
from keelguard.units.transfer import attribute_transfer

MEASUREMENT = 1
"""Version of what the run folder keeps: raise it when a pass comes to collect something else."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ShiftConfig:
    """What is read of each distribution; the score, the groups' sizes and the openings' length are the unit map's."""

    samples: int = _option(128, "at most this many requests of each file, drawn by what they are about")
    groups: int = _option(32, "groups of prompts that are resampled together")
    max_new_tokens: int = _option(64, "where the model's own answers are cut off")
    batch_size: int = _option(0, "rows per batch; 0 chooses by the size of the model")
    seed: int = _option(0, "which requests are drawn, and how they are grouped")
    resampling: Resampling = _option(Resampling(), "how often prompts are cut and drawn anew")

    def __post_init__(self) -> None:
        for name, least in (("samples", 8), ("groups", 8), ("max_new_tokens", 1), ("batch_size", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {least} or more")


def measure_shift(
    source: str,
    distributions: Sequence[Distribution],
    utility: Sequence[Request],
    chart: UnitMap,
    config: ShiftConfig = ShiftConfig(),
    *,
    out: str | Path,
    signal: Signal | None = None,
    against: str | None = None,
    limits: str | Path | None = None,
    load: Callable[[str], LoadedModel] = load_model,
    reporter: Reporter = SILENT,
) -> Shift:
    """Measure a model on every distribution in a run folder, and another checkpoint beside it.

    Args:
        utility: benign requests, as the unit map's; the same of them are drawn as in a diagnosis.
        chart: the unit map of this model.
        signal: the signal of this model; on the other checkpoint it is read too, since that is what is asked.
        against: another checkpoint of the same architecture and tokenizer, such as a fine-tune of the model.
        limits: a `shift.json` whose warning limits are taken in place of those of this run's own halves.
        out: the run folder; `shift.json` is written into it.

    Raises:
        UsageError: there is nothing to compare, a distribution is too small, the map or the signal is of other weights,
            the model does not refuse the first distribution, or the checkpoints do not fit.
        FailureError: a row does not fit in memory, or the disk is full.
    """
    if len(distributions) < 2 and against is None:
        raise UsageError(
            f"--data: {len(distributions)} distribution of requests has nothing to be compared with; give two or more, "
            "or another checkpoint with --against"
        )
    earlier = None if limits is None else Shift.load(limits)
    distributions = [each.drawn(config.samples, config.seed) for each in distributions]
    check_distributions(distributions)
    loaded = plain(load(source))
    index = build_index(loaded.model, chart.attention)  # pyright: ignore[reportArgumentType]
    chart.place(index, loaded.weights_hash)
    if not chart.members("scu").any():
        raise UsageError("--units: the map has no safety-critical units; diagnose the model again with --safety FILE")
    if signal is not None:
        signal.check(loaded.weights_hash, source)
        check_fit(loaded.model, signal)
    other = None if against is None else _checked(plain(load(against)), loaded, chart)
    utility = draw(utility, "utility", config.samples, config.seed)[0]
    settings = {
        "model": loaded.weights_hash,
        "against": other and other.weights_hash,
        # Of the map only what is measured by: its sizes rank, and may change in the same folder.
        "units": [chart.meta["score"], chart.attention, *openings_of(chart)],
        "signal": signal and signal.tensors_hash(),
        # A list, since the folder numbers them, and the first one's refusals are the measure of all.
        "data": [[each.name, each.digest] for each in distributions],
        "utility": sha256_of([[list(r.messages), r.answer] for r in utility]),
        **{name: getattr(config, name) for name in ("samples", "groups", "max_new_tokens", "seed")},
        "measurement": MEASUREMENT,
        "chat_template": sha256_of(loaded.tokenizer.chat_template),
        "dtype": str(loaded.model.dtype),
        "versions": versions(),
    }
    with open_run(Path(out), "shift", settings) as folder:
        models = [each for each in (loaded, other) if each is not None]
        conditions = Conditions(chart, config, signal, distributions, utility, folder, reporter)
        shift = _compared(conditions, conditions.read(models, _names(models)), models)
        if earlier is not None:
            shift = shift.with_limits(earlier, str(limits))
        shift.save(folder)
    return shift


def _checked(other: LoadedModel, loaded: LoadedModel, chart: UnitMap) -> LoadedModel:
    """The other checkpoint, where it has the same units and the same words."""
    if build_index(other.model, chart.attention).layout != chart.layout:  # pyright: ignore[reportArgumentType]
        raise UsageError(f"--against {other.source}: is of another architecture than {loaded.source}; name a fine-tune")
    same = other.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    if not same or other.tokenizer.chat_template != loaded.tokenizer.chat_template:
        what = "chat template" if same else "vocabulary"
        raise UsageError(
            f"--against {other.source}: has another {what} than {loaded.source}, so that the two cannot be asked the "
            "same; give one template for both with --chat-template, or name a checkpoint with the same tokenizer"
        )
    return other


def _compared(conditions: Conditions, found: Sequence[Measured], models: Sequence[LoadedModel]) -> Shift:
    """All pairs, with their drifts."""
    config, chart, signal = conditions.config, conditions.chart, conditions.signal
    several = len(conditions.distributions)
    pairs = [_pair(found, i, j, "distributions") for i, j in combinations(range(several), 2)]
    pairs += [_pair(found, i, i + several, "checkpoints") for i in range(len(found) - several)]
    overall: dict[str, dict[str, Drift]] = {}
    layers: dict[str, dict[str, tuple[Drift | None, ...]]] = {}
    left_out = list(conditions.left_out)
    for pair, measured in zip(pairs, _drifts(conditions, found, pairs), strict=True):
        for metric, (first, *each) in measured.items():
            if first is None:
                left_out.append(f"{metric} of {pair.name}: too few halves of the prompts gave a figure.")
                continue
            overall.setdefault(metric, {})[pair.name] = first
            if each:
                layers.setdefault(metric, {})[pair.name] = tuple(each)
    described = [_described(each, name) for each, name in zip(models, _names(models), strict=True)]
    return Shift(
        model=described[0],
        against=described[1] if len(described) > 1 else None,
        units={
            "digest": chart.digest, "weights": chart.weights, "score": chart.meta["score"],
            "sizes": chart.meta["sizes"], "counts": chart.counts(),
        },
        signal=signal and _described_signal(signal),
        settings={
            **{name: value for name, value in vars(config).items() if name not in ("resampling", "batch_size")},
            **vars(config.resampling), "groups": conditions.count, "tokens": conditions.tokens,
        },
        versions=versions(),
        distributions=tuple(
            {
                "name": each.name, "source": each.source, "sha256": each.digest, "requests": len(each.harmful),
                "things": len(set(each.keys)), "benign": len(each.benign),
            }
            for each in conditions.distributions
        ),
        conditions=tuple(conditions.described(each) for each in found),
        pairs=tuple(pairs),
        drift={metric: overall[metric] for metric in metrics.METRICS if metric in overall},
        layers=layers,
        limits="the limits are those of this run’s own halves",
        left_out=tuple(left_out),
    )  # fmt: skip


def _drifts(
    conditions: Conditions, found: Sequence[Measured], pairs: Sequence[Pair]
) -> list[dict[str, tuple[Drift | None, ...]]]:
    """For each pair, by metric the drift over all and of each layer."""
    result: list[dict[str, tuple[Drift | None, ...]]] = [{} for _ in pairs]
    again = conditions.config.resampling
    for family, compare in COMPARE.items():
        known = [i for i, each in enumerate(found) if family in each.sides]
        some = [number for number, pair in enumerate(pairs) if {pair.first, pair.second} <= set(known)]
        if not some:
            continue
        sides = [found[i].sides[family] for i in known]
        inside = [(known.index(pairs[number].first), known.index(pairs[number].second)) for number in some]
        with conditions.reporter.step(f"drift: {family}", again.splits + again.samples) as advance:
            measured = drifts(sides, inside, compare, again, advance)
        for number, each in zip(some, measured, strict=True):
            result[number] |= each
    return result


def _pair(found: Sequence[Measured], i: int, j: int, kind: str) -> Pair:
    """What all prompts say; the drifts are figures of halves of them."""
    first, second = found[i], found[j]
    name = f"{first.distribution} / {second.distribution}"
    if kind == "checkpoints":
        name = f"{first.distribution}: {first.model} / {second.model}"
    if first.whole is None or second.whole is None:
        return Pair(name, kind, i, j, {}, None, None)
    correlation = float(first.whole.ranks[0] @ second.whole.ranks[0])
    maps = first.whole.chart, second.whole.chart
    known = None if np.isnan(correlation) else correlation
    return Pair(name, kind, i, j, shared_groups(*maps), known, attribute_transfer(*maps))


def _names(models: Sequence[LoadedModel]) -> list[str]:
    """Short names of the checkpoints: a run's `model` is called after the run, and equal names are numbered."""
    paths = [Path(each.source) for each in models]
    names = [(path.parent.name if path.name in ("model", "adapter") else "") or path.name for path in paths]
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]


def _described(loaded: LoadedModel, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "source": loaded.source,
        "weights": loaded.weights_hash,
        "architecture": architecture_of(loaded.model),
    }


def _described_signal(signal: Signal) -> dict[str, Any]:
    found = signal.calibration
    return {
        "digest": signal.tensors_hash(),
        "placement": signal.placement,
        "query_threshold": signal.policy.query_threshold,
        "calibration": None if found is None else {"error": found.error, "query_error": found.query_error},
    }
