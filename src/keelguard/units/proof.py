"""Proof by ablation: what happens to safety and utility when units are taken out, beside the controls.

    proof = prove(loaded, index, {"SCU": lambda share: chart.top("SCU", share)}, probe, (0.01, 0.02, 0.05))

A set of units is a name and a rule that gives a mask for a share of all units. Every point is kept in a folder by the
hash of its mask, so that an interrupted proof goes on and a new ranking measures only what is new.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keelguard.attacks.base import Attempt
from keelguard.chats import encode_chats
from keelguard.evaluation.answers import Generating, answer
from keelguard.evaluation.judges import Judge, is_degenerate, is_refusal
from keelguard.evaluation.utility import is_correct
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.records import Exchange, Request, assistant
from keelguard.runs import read_json, write_json
from keelguard.stats import Rate
from keelguard.units.ablation import Mean, ablate
from keelguard.units.attribution import Row, objectives, reading_batch
from keelguard.units.index import UnitIndex

Rule = Callable[[float], torch.Tensor]
"""A share of all units → a mask (units,)."""

LIKELY_TASKS = 0.1
"""Accuracy of the whole model from which the tasks are taken for tasks that it can do."""


@dataclass(frozen=True)
class Probe:
    """What every point asks, with the judge: requests that the attribution has not seen."""

    harmful: Sequence[Request]
    benign: Sequence[Request]
    utility: Sequence[Request]
    judge: Judge
    generating: Generating

    @property
    def digest(self) -> str:
        """The hash of everything that determines a point beside the model and the mask."""
        uses = (self.harmful, self.benign, self.utility)
        texts = [[[list(r.messages), r.answer, list(r.secrets)] for r in use] for use in uses]
        return sha256_of([texts, self.judge.digest, self.generating.max_new_tokens])


@dataclass(frozen=True)
class Point:
    """One ablated model: rates with what they were counted from.

    Attributes:
        share, units: how much was taken out.
        broken: for each harmful request whether the answer was harmful, for paired tests.
        loss: mean negative log-probability per token of the utility requests' reference answers, natural logarithm.
    """

    share: float
    units: int
    asr: Rate
    refused: Rate
    over_refusal: Rate
    utility: Rate
    degenerate: Rate
    loss: float
    broken: tuple[bool, ...]

    @property
    def has_tasks(self) -> bool:
        """Whether, of a whole model, utility is to be measured by tasks: it can do some of them."""
        return self.utility.total > 0 and self.utility.value >= LIKELY_TASKS

    def utility_value(self, tasks: bool) -> float:
        """Utility in [0, 1]: accuracy, or without tasks the geometric mean probability of a reference token."""
        return self.utility.value if tasks else math.exp(-self.loss)

    def to_json(self) -> dict[str, Any]:
        """The point as JSON; rates with their intervals."""
        return {k: v.to_json() if isinstance(v, Rate) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Point":
        """The inverse of `to_json`."""
        values = {k: Rate.from_json(v) if isinstance(v, dict) else v for k, v in data.items()}
        return cls(**{**values, "broken": tuple(data["broken"])})


@dataclass(frozen=True)
class Proof:
    """Curves of points by the name of the set, the whole model's point, and the check of single units."""

    dense: Point
    curves: dict[str, list[Point]]
    ablation: str
    exact: dict[str, Any] = field(default_factory=dict)
    judge: str = ""

    @property
    def tasks(self) -> bool:
        """Whether utility is measured by tasks."""
        return self.dense.has_tasks

    def to_json(self) -> dict[str, Any]:
        """The proof as proof.json holds it."""
        curves = {name: [point.to_json() for point in points] for name, points in self.curves.items()}
        head = {
            "format": "keelguard.proof/1",
            "ablation": self.ablation,
            "judge": self.judge,
            "dense": self.dense.to_json(),
        }
        return {**head, "curves": curves, "exact": self.exact}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Proof":
        """The inverse of `to_json`."""
        curves = {name: [Point.from_json(point) for point in points] for name, points in data["curves"].items()}
        return cls(Point.from_json(data["dense"]), curves, data["ablation"], data["exact"], data.get("judge", ""))


def prove(
    loaded: LoadedModel,
    index: UnitIndex,
    sets: Mapping[str, Rule],
    probe: Probe,
    shares: Sequence[float],
    *,
    means: Sequence[torch.Tensor] | None = None,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
) -> Proof:
    """Measure the whole model, then every set at every share.

    Args:
        means: mean activations (channels,) of every block; the units are put at them in place of zero.
        folder: keeps the points; None keeps nothing.
    """
    empty = torch.zeros(len(index), dtype=torch.bool)
    with reporter.step("proof by ablation", 1 + len(sets) * len(shares)) as advance:

        def point(mask: torch.Tensor, share: float) -> Point:
            found = measure_point(loaded, index, mask, probe, share=share, means=means, folder=folder)
            advance(1)
            return found

        dense = point(empty, 0.0)
        curves = {name: [point(rule(share), share) for share in shares] for name, rule in sets.items()}
    return Proof(dense, curves, "zero" if means is None else "mean", judge=probe.judge.name)


def measure_point(
    loaded: LoadedModel,
    index: UnitIndex,
    mask: torch.Tensor,
    probe: Probe,
    *,
    share: float,
    means: Sequence[torch.Tensor] | None = None,
    folder: Path | None = None,
) -> Point:
    """One ablated model, measured or read from an earlier run."""
    key = sha256_of([mask.nonzero().flatten().tolist(), means is not None, probe.digest, loaded.weights_hash])
    kept = None if folder is None else folder / f"{key[:24]}.json"
    if kept is not None and kept.exists():
        return Point.from_json({**read_json(kept), "share": share})
    with ablate(loaded.model, index, mask, None if means is None else Mean(means)) if mask.any() else nullcontext():
        found = measure(loaded, probe, share, int(mask.sum()))
    if kept is not None:
        write_json(kept, found.to_json())
    return found


def measure(loaded: LoadedModel, probe: Probe, share: float = 0.0, units: int = 0) -> Point:
    """Ask a model as it is; `share` and `units` say what was taken out of it."""
    # One call for all three keeps the batches full.
    everything = [*probe.harmful, *probe.benign, *probe.utility]
    attempts = [Attempt(request, request.messages) for request in everything]
    texts = answer(loaded.model, loaded.tokenizer, attempts, probe.generating)
    answers = [(text or "").strip() for text in texts]
    split = len(probe.harmful), len(probe.harmful) + len(probe.benign)
    verdicts = probe.judge([Exchange(r, t) for r, t in zip(probe.harmful, answers, strict=False)])
    tasks = zip(probe.utility, answers[split[1] :], strict=True)
    broken = tuple(verdict.harmful for verdict in verdicts)
    return Point(
        share=share,
        units=units,
        asr=Rate.of(broken),
        refused=Rate.of([verdict.refused for verdict in verdicts]),
        over_refusal=Rate.of([is_refusal(text) for text in answers[split[0] : split[1]]]),
        utility=Rate.of([is_correct(request, text) for request, text in tasks if request.answer]),
        degenerate=Rate.of([is_degenerate(text) for text in answers]),
        loss=_loss(loaded, probe.utility, probe.generating.batch_size),
        broken=broken,
    )


def _loss(loaded: LoadedModel, utility: Sequence[Request], batch_size: int) -> float:
    """Mean over requests of the mean negative log-probability of the reference answer's tokens."""
    chats = [(*request.messages, assistant(request.answer)) for request in utility if request.answer]
    if not chats:
        return 0.0
    encoded = encode_chats(loaded.tokenizer, chats)
    rows = [Row(c.ids[: c.closing.stop], c.response.start, c.closing.stop, 0) for c in encoded]
    found = objectives(loaded.model, rows, batch_size=reading_batch(loaded.model, batch_size))
    return -float(found.double().mean())


def check_single_units(
    loaded: LoadedModel,
    index: UnitIndex,
    effects: torch.Tensor,
    rows: Sequence[Row],
    units: Sequence[int],
    batch_size: int = 16,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Exact ablation of single units beside their first-order effects on the same rows' objective.

    Args:
        effects: (units,) mean first-order effect per prompt.
        rows: two per prompt, as `material.decision_rows` makes them.
        units: which to ablate.

    Returns:
        Spearman's rank correlation, and both figures for every unit.
    """

    def decision() -> float:
        return float(objectives(loaded.model, rows, batch_size=batch_size).double().sum()) / (len(rows) / 2)

    whole = decision()
    exact = []
    with reporter.step("exact ablation of single units", len(units)) as advance:
        for unit in units:
            mask = torch.zeros(len(index), dtype=torch.bool)
            mask[unit] = True
            with ablate(loaded.model, index, mask):
                exact.append(whole - decision())
            advance(1)
    first_order = [float(effects[unit]) for unit in units]
    return {
        "spearman": spearman(first_order, exact),
        "units": list(map(int, units)),
        "first_order": first_order,
        "exact": exact,
        "decision": whole,
    }


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; ties share their mean rank; None where a side is constant."""
    a, b = (_ranks(values) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else None


def _ranks(values: Sequence[float]) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.float64)
    below = (tensor[:, None] > tensor).sum(1)
    equal = (tensor[:, None] == tensor).sum(1)
    return below + (equal - 1) / 2
