"""What a signal said of some conversations, and how well: AUROC, calibration, false and missed shares, resampled.

    before, after = collect(original, signal, rows), collect(tuned, rebound, rows)
    changes = compare(*paired(before.answers, after.answers), threshold, threshold)

Everything is resampled over requests, before and after with the same draws: the verdicts on one request rise and fall
together.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keelguard.chats import encode_chats
from keelguard.guard.adapter import Signal
from keelguard.guard.augment import frame
from keelguard.guard.labels import Labelled
from keelguard.guard.looks import Policed, make_examples
from keelguard.guard.material import MaterialConfig, gather_benign
from keelguard.guard.scoring import score_examples
from keelguard.guard.training import windows_of
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, context_length
from keelguard.progress import SILENT, Reporter
from keelguard.stats import wilson

AUROC, ERROR, BRIER, FALSE, MISSED = "AUROC", "calibration error", "Brier score", "benign flagged", "malicious missed"
"""The figures. The second and third weigh both classes alike, so that the mix of the data does not decide."""

_MATERIAL = MaterialConfig()
_BINS = 10
_CHUNK = 64


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Figure(NamedTuple):
    """One figure of two sets of verdicts on the same requests; `difference` is after less before."""

    before: Estimate
    after: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Looks:
    """Verdicts of one kind, an entry for each.

    Attributes:
        values: probabilities; what is no number counts as 1, as the policy fails closed.
        labels: whether the trajectory was malicious.
        items: the conversation, whose verdicts alarm together.
        groups: the request, in its several frames.
    """

    values: tuple[float, ...] = ()
    labels: tuple[bool, ...] = ()
    items: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def where(self, items: set[str]) -> "Looks":
        """The verdicts on some conversations."""
        kept = [i for i, item in enumerate(self.items) if item in items]
        return Looks(**{name: tuple(entries[i] for i in kept) for name, entries in vars(self).items()})


@dataclass(frozen=True)
class Verdicts:
    """What a signal said of queries, and along answers at the lengths where its policy looks."""

    queries: Looks
    answers: Looks

    def to_json(self) -> dict[str, Any]:
        """The verdicts as JSON."""
        return {name: vars(looks) for name, looks in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Verdicts":
        """The inverse of `to_json`."""
        return cls(**{name: Looks(**{k: tuple(v) for k, v in looks.items()}) for name, looks in data.items()})


def collect(
    loaded: LoadedModel,
    signal: Signal,
    rows: Sequence[Labelled],
    *,
    frames: Sequence[str] = (),
    material: MaterialConfig = _MATERIAL,
    store: Path | None = None,
    reporter: Reporter = SILENT,
    label: str = "verdicts",
) -> Verdicts:
    """The verdicts on rows, each plain and in a frame: malicious ones with the answers that they have, benign ones with
    the model's own.

    The benign ones are what `guard train` chooses thresholds on. Conversations that do not fit the model's context are
    left out.

    Args:
        frames: texts with `{request}`; one is drawn for each row. Borderline rows are not framed.
        store: keeps the model's own answers.
    """
    benign = gather_benign(
        loaded.model, loaded.tokenizer, rows, material, frames=frames, store=store, reporter=reporter
    )
    bad = [row for row in rows if row.malicious]
    framed = frame(bad, frames, random.Random(f"malicious-{material.seed}")) if frames else []
    framed = [replace(asked, answer=row.answer, parts=row.parts) for asked, row in zip(framed, bad, strict=False)]
    chosen = _fitting(loaded, [*benign, *bad, *framed])
    if not chosen:
        return Verdicts(Looks(), Looks())
    # Who looks at queries alone is measured along answers too, where the default policy looks.
    policy = replace(signal.policy, cadence="annealing") if signal.policy.cadence == "first" else signal.policy
    examples = make_examples(
        loaded.model, loaded.tokenizer, chosen, places=Policed(policy), windows=windows_of(policy), label=label
    )
    scores = score_examples(loaded.model, loaded.tokenizer, signal, examples, reporter=reporter, label=label)
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for row, example, found in zip(chosen, examples, scores, strict=True):
        item = sha256_of(list(row.messages))
        group = sha256_of(list(row.request.messages)) if row.request else item
        for look, score in zip(example.looks, found, strict=True):
            value = score if 0 <= score <= 1 else 1.0
            kinds[look.position > 0].append((value, look.malicious, item, group))
    return Verdicts(*(Looks(*map(tuple, zip(*entries, strict=True))) for entries in kinds))


def _fitting(loaded: LoadedModel, rows: list[Labelled]) -> list[Labelled]:
    limit = context_length(loaded.model)
    if limit is None or not rows:
        return rows
    chats = encode_chats(
        loaded.tokenizer, [row.messages for row in rows], prefills=[row.answer or None for row in rows]
    )
    return [row for row, chat in zip(rows, chats, strict=True) if len(chat.ids) < limit]


def paired(before: Looks, after: Looks) -> tuple[Looks, Looks]:
    """Both without the conversations that only one of them has, such as an answer that became a loop."""
    shared = set(before.items) & set(after.items)
    return before.where(shared), after.where(shared)


def compare(
    before: Looks, after: Looks, thresholds: tuple[float, float], samples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """Every figure before and after with 95 % bootstrap intervals over requests, drawn by class; see `detection`.

    No interval of a rate or an AUROC ends nearer to 0 or 1 than perfection on as many requests would, and a difference
    that is the same in every resample has the interval that none of as many requests allows.

    Args:
        before, after: verdicts on the same conversations, from `paired`.
        thresholds: a verdict above is malicious, before and after.

    Returns:
        Figures by name, those left out whose class is missing.
    """
    names = sorted({*before.groups, *after.groups})
    places = {name: number for number, name in enumerate(names)}
    malicious = np.zeros(len(names), dtype=bool)
    for looks in (before, after):
        malicious[[places[g] for g, bad in zip(looks.groups, looks.labels, strict=True) if bad]] = True
    sides = [_rules(looks, places, threshold) for looks, threshold in zip((before, after), thresholds, strict=True)]
    counts = {True: int(malicious.sum()), False: int((~malicious).sum())}
    whole = np.ones((1, len(names)))
    draws = list(_resamples(malicious, samples, seed))
    found = {}
    for name in (AUROC, ERROR, BRIER, FALSE, MISSED):
        if not all(name in side for side in sides):
            continue
        first, second = (np.concatenate([side[name](w) for w in (whole, *draws)]) for side in sides)
        known = {AUROC: min(counts.values()), FALSE: counts[False], MISSED: counts[True]}.get(name)
        apart = _interval(second - first)
        if known is not None and apart.high - apart.low < 1e-12:
            most = wilson(0, known).high
            apart = apart._replace(low=max(-1.0, apart.low - most), high=min(1.0, apart.high + most))
        found[name] = Figure(_within(_interval(first), known), _within(_interval(second), known), apart)
    return found


Rule = Callable[[np.ndarray], np.ndarray]
"""Times that each request was drawn (S, groups) → a figure of each resample (S,)."""


def _rules(looks: Looks, places: Mapping[str, int], threshold: float) -> dict[str, Rule]:
    """The figures that these verdicts allow."""
    values, bad = np.array(looks.values, dtype=np.float64), np.array(looks.labels, dtype=bool)
    members = np.array([places[group] for group in looks.groups], dtype=np.int64)
    conversations: dict[str, list[int]] = {}
    for i, item in enumerate(looks.items):
        conversations.setdefault(item, []).append(i)
    own = [(members[at[0]], values[at].max() > threshold, bad[at].any()) for at in conversations.values()]
    rules: dict[str, Rule] = {}
    for name, kind in ((FALSE, False), (MISSED, True)):
        chosen = [(place, alarm != kind) for place, alarm, label in own if label == kind]
        if chosen:
            rules[name] = _share(*map(np.array, zip(*chosen, strict=True)))
    if bad.any() and not bad.all():
        rules |= {AUROC: _auroc(values, bad, members), **_calibration(values, bad, members)}
    return rules


def _share(members: np.ndarray, outcomes: np.ndarray) -> Rule:
    return lambda times: times[:, members] @ outcomes / times[:, members].sum(1)


def _auroc(values: np.ndarray, bad: np.ndarray, members: np.ndarray) -> Rule:
    """As `guard.metrics.auroc`, with weights: a tie counts one half."""
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))

    def rule(times: np.ndarray) -> np.ndarray:
        drawn = times[:, members[order]]
        positive = np.add.reduceat(drawn * bad[order], starts, axis=1)
        negative = np.add.reduceat(drawn, starts, axis=1) - positive
        above = positive.cumsum(1) - positive / 2
        return (above * negative).sum(1) / (positive.sum(1) * negative.sum(1))

    return rule


def _calibration(values: np.ndarray, bad: np.ndarray, members: np.ndarray) -> dict[str, Rule]:
    bins = np.minimum((values * _BINS).astype(int), _BINS - 1)
    inside = (bins[:, None] == np.arange(_BINS)).astype(np.float64)

    def balanced(times: np.ndarray) -> np.ndarray:
        drawn = times[:, members]
        sides = [drawn * kind / (drawn * kind).sum(1, keepdims=True) for kind in (bad, ~bad)]
        return (sides[0] + sides[1]) / 2

    def error(times: np.ndarray) -> np.ndarray:
        weights = balanced(times)
        return np.abs(weights @ (inside * (values - bad)[:, None])).sum(1)

    return {ERROR: error, BRIER: lambda times: balanced(times) @ (values - bad) ** 2}


def _resamples(malicious: np.ndarray, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each request is drawn (at most `_CHUNK`, groups); each class keeps its number of requests."""
    random = np.random.default_rng(seed)
    for start in range(0, samples, _CHUNK):
        rows = min(_CHUNK, samples - start)
        times = np.zeros((rows, len(malicious)))
        for kind in (malicious, ~malicious):
            if kind.any():
                times[:, kind] = random.multinomial(kind.sum(), np.full(kind.sum(), 1 / kind.sum()), size=rows)
        yield times


def _interval(figures: np.ndarray) -> Estimate:
    """The first figure, which is that of all requests, and the percentiles of the others."""
    low, high = np.quantile(figures[1:], [0.025, 0.975])
    return Estimate(float(figures[0]), float(min(low, figures[0])), float(max(high, figures[0])))


def _within(found: Estimate, requests: int | None) -> Estimate:
    if requests is None:
        return found
    return found._replace(
        low=min(found.low, wilson(requests, requests).low), high=max(found.high, wilson(0, requests).high)
    )
