"""What one model shows on one distribution of requests, by groups of prompts, kept in a folder as it is found.

    reading = read_condition(loaded, index, distribution, words, config, folder, ...)

Every pass leaves its file before the next begins, so that an interrupted run repeats one pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from keelguard.batches import pad_id_of
from keelguard.chats import encode_chats
from keelguard.evaluation.judges import is_refusal
from keelguard.guard.adapter import Signal
from keelguard.guard.detect import Case, Scores, judge_cases
from keelguard.guard.labels import Labelled
from keelguard.models import LoadedModel
from keelguard.pipeline.shift_data import Distribution
from keelguard.pipeline.shift_words import Words
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request, assistant
from keelguard.runs import read_json, write_json
from keelguard.units import material as materials
from keelguard.units.attribution import Row, Statistics, attribute, objectives, reading_batch
from keelguard.units.direction import probe_direction
from keelguard.units.index import UnitIndex
from keelguard.units.material import FEWEST

if TYPE_CHECKING:
    from keelguard.pipeline.shift import ShiftConfig

HARMFUL, BENIGN, HARMFUL_ANSWER, BENIGN_ANSWER = "harmful", "benign", "harmful answer", "benign answer"


@dataclass(frozen=True)
class Reading:
    """What a model shows on a distribution.

    Attributes:
        refused: by request, whether its answer opens with a refusal.
        groups: by request, its group of prompts, below G.
        margins: by request, the log-probability of its likeliest refusal less that of its likeliest compliance, in
            nats a token of the openings.
        statistics: of the units, by group; None where the score reads refusals and too few requests are refused.
        direction: (G, layers) mean distance to the refusal less that to the compliance, NaN for an empty group; None
            without continuations.
        verdicts: the signal's, on queries and known answers; the groups are those of the requests, as text.
    """

    refused: list[bool]
    groups: list[int]
    margins: list[float]
    statistics: Statistics | None
    direction: np.ndarray | None
    verdicts: Scores | None


def read_condition(
    loaded: LoadedModel,
    index: UnitIndex,
    distribution: Distribution,
    words: Words,
    config: "ShiftConfig",
    folder: Path,
    *,
    score: str,
    last_token: bool,
    groups: Mapping[str, int],
    benign_groups: Mapping[str, int],
    count: int,
    answers: Sequence[str],
    signal: Signal | None = None,
    reporter: Reporter = SILENT,
) -> Reading:
    """Read a distribution with a model, or what an earlier run found in the folder.

    Args:
        score, last_token: those of the unit map.
        groups, benign_groups: the groups of keys, below `count`.
        answers: the model's own, to say what is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batch = reading_batch(loaded.model, config.batch_size)
    places = [groups[key] for key in distribution.keys]
    queries = encode_chats(loaded.tokenizer, [r.messages for r in distribution.harmful], add_generation_prompt=True)
    ids = [chat.ids for chat in queries]
    label = f"{distribution.name} with {Path(loaded.source).name}"

    def choose() -> dict[str, Any]:
        """The likeliest refusal and compliance of every request, and by how much the refusal is likelier."""
        sides = [_likeliest(loaded, ids, openings, batch) for openings in (words.refusals, words.compliances)]
        (refusals, toward), (compliances, against) = sides
        return {"pairs": list(zip(refusals, compliances, strict=True)), "margins": (toward - against).tolist()}

    chosen = _kept(folder / "openings.json", choose)

    def statistics() -> Statistics | None:
        if score == "decision":
            rows = [
                Row([*q, *opening], len(q), len(q) + len(opening), group, sign)
                for q, group, pair in zip(ids, places, chosen["pairs"], strict=True)
                for opening, sign in zip(pair, (1.0, -1.0), strict=True)
            ]
        else:
            rows = _refusal_rows(loaded, distribution, words.texts[distribution.name], places)
            if len(rows) < FEWEST:
                return None
        return attribute(
            loaded.model,
            index,
            rows,
            groups=count,
            effects=score in ("decision", "taylor"),
            batch_size=batch,
            pad_id=pad_id_of(loaded.tokenizer),
            last_token=last_token and score != "decision",
            reporter=reporter,
            label=f"attribution: {label}",
        )

    kept = folder / "statistics.safetensors"
    if kept.exists():
        found = Statistics.load(kept)
    elif (found := statistics()) is not None:
        found.save(kept)
    return Reading(
        refused=[is_refusal(text) for text in answers],
        groups=places,
        margins=chosen["margins"],
        statistics=found,
        direction=_direction(loaded, distribution, words, places, count, batch, folder, reporter),
        verdicts=None
        if signal is None
        else _verdicts(loaded, signal, distribution, words, groups, benign_groups, config, folder, reporter),
    )


def utility_statistics(
    loaded: LoadedModel, index: UnitIndex, words: Words, config: "ShiftConfig", kept: Path, *, effects: bool,
    last_token: bool, reporter: Reporter = SILENT,
) -> Statistics:  # fmt: skip
    """The statistics of the benign answers, all in one group: utility is the same in every distribution."""
    if kept.exists():
        return Statistics.load(kept)
    found = attribute(
        loaded.model,
        index,
        materials.answer_rows(words.utility, [0] * len(words.utility)),
        groups=1,
        effects=effects,
        batch_size=reading_batch(loaded.model, config.batch_size),
        pad_id=pad_id_of(loaded.tokenizer),
        last_token=last_token,
        reporter=reporter,
        label=f"attribution: utility of {Path(loaded.source).name}",
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    found.save(kept)
    return found


def _likeliest(
    loaded: LoadedModel, queries: Sequence[list[int]], openings: Sequence[tuple[int, ...]], batch: int
) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """By query the likeliest of the openings, and its mean log-probability (N,) float64."""
    rows = [[Row([*q, *opening], len(q), len(q) + len(opening), 0) for q in queries] for opening in openings]
    pad_id = pad_id_of(loaded.tokenizer)
    scores = torch.stack([objectives(loaded.model, some, batch_size=batch, pad_id=pad_id) for some in rows])
    return [openings[best] for best in scores.argmax(0).tolist()], scores.max(0).values.double()


def _refusal_rows(
    loaded: LoadedModel, distribution: Distribution, texts: Sequence[str], places: Sequence[int]
) -> list[Row]:
    """The requests that the first model refuses, with those refusals."""
    some = [
        ((*request.messages, assistant(text)), group)
        for request, text, group in zip(distribution.harmful, texts, places, strict=True)
        if is_refusal(text)
    ]
    if not some:
        return []
    return materials.answer_rows(encode_chats(loaded.tokenizer, [chat for chat, _ in some]), [g for _, g in some])


def _direction(
    loaded: LoadedModel, distribution: Distribution, words: Words, places: Sequence[int], count: int, batch: int,
    folder: Path, reporter: Reporter,
) -> np.ndarray | None:  # fmt: skip
    """(G, layers) of the reasoning direction, meaned over the lengths, one probe for each group of prompts."""
    if not words.ks:
        return None

    def probe() -> list[list[float] | None]:
        found: list[list[float] | None] = [None] * count
        with reporter.step(f"reasoning direction: {distribution.name}", len(places)) as advance:
            for group in sorted(set(places)):
                chosen = [i for i, place in enumerate(places) if place == group]
                pairs = [words.continuations[distribution.keys[i]] for i in chosen]
                probed = probe_direction(
                    loaded.model,
                    loaded.tokenizer,
                    [distribution.harmful[i].messages for i in chosen],
                    [refusal for refusal, _ in pairs],
                    [compliance for _, compliance in pairs],
                    ks=words.ks,
                    batch_size=batch,
                )
                differences = [[each.difference.mean for each in layers] for layers in probed.per_layer]
                found[group] = np.mean(differences, axis=0).tolist()
                advance(len(chosen))
        return found

    rows = _kept(folder / "direction.json", probe)
    layers = next(len(row) for row in rows if row)
    return np.array([row or [np.nan] * layers for row in rows])


def _verdicts(
    loaded: LoadedModel, signal: Signal, distribution: Distribution, words: Words, groups: Mapping[str, int],
    benign_groups: Mapping[str, int], config: "ShiftConfig", folder: Path, reporter: Reporter,
) -> Scores:  # fmt: skip
    """Verdicts on the queries and, where answers are known, along these."""

    def cases(requests: Sequence[Request], places: Sequence[int], harmful: bool) -> list[Case]:
        query, whole = (HARMFUL, HARMFUL_ANSWER) if harmful else (BENIGN, BENIGN_ANSWER)
        found = []
        for request, place in zip(requests, places, strict=True):
            row = Labelled(request.messages, harmful)
            found.append(Case(row, str(place), query))
            if request.answer.strip():
                found.append(Case(row.answered(request.answer, harmful), str(place), whole))
        return found

    def judge() -> dict[str, Any]:
        asked = cases(distribution.harmful, [groups[key] for key in distribution.keys], True)
        benign = distribution.benign or words.benign
        keys = distribution.benign_keys or tuple(request.id for request in words.benign)
        asked += cases(benign, [benign_groups[key] for key in keys], False)
        label = f"verdicts: {distribution.name}"
        return vars(judge_cases(loaded, signal, asked, batch_size=config.batch_size, reporter=reporter, label=label))

    return Scores(**_kept(folder / "verdicts.json", judge))


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, or what is made and then held."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)
