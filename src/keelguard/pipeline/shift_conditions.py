"""The conditions of a shift: every distribution with the model, then with the other checkpoint, to be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from keelguard.guard.adapter import Signal
from keelguard.models import LoadedModel
from keelguard.pipeline import shift_metrics as metrics
from keelguard.pipeline.drift import FEWEST_GROUPS, Side
from keelguard.pipeline.shift_data import Distribution, deal
from keelguard.pipeline.shift_reading import BENIGN, HARMFUL, Reading, read_condition, utility_statistics
from keelguard.pipeline.shift_results import Condition
from keelguard.pipeline.shift_words import Words, agree_on_words, own_answers
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request
from keelguard.stats import Rate
from keelguard.units.direction import Estimate
from keelguard.units.groups import UnitMap
from keelguard.units.importance import output_norms
from keelguard.units.index import build_index
from keelguard.units.stability import overlap

if TYPE_CHECKING:
    from keelguard.pipeline.shift import ShiftConfig

COMPARE = {"units": metrics.compare_units, "direction": metrics.compare_leanings, "signal": metrics.compare_judged}
"""The families of metrics: how two conditions are compared in each."""


@dataclass(frozen=True)
class Measured:
    """A condition as it was measured.

    Attributes:
        model: the name of its checkpoint.
        whole: the map from all of its prompts; None where units could not be measured.
        sides: by family of metrics, as far as it was measured.
    """

    model: str
    distribution: str
    reading: Reading
    whole: metrics.Mapped | None
    sides: Mapping[str, Side[Any]]


class Conditions:
    """What is asked, and the folder that keeps what was found.

    Attributes:
        count: how many groups of prompts there are.
        left_out: what could not be measured, and why.
    """

    def __init__(
        self, chart: UnitMap, config: "ShiftConfig", signal: Signal | None, distributions: Sequence[Distribution],
        utility: Sequence[Request], folder: Path, reporter: Reporter = SILENT,
    ) -> None:  # fmt: skip
        self.chart, self.config, self.signal, self.folder, self.reporter = chart, config, signal, folder, reporter
        self.distributions, self.utility = distributions, utility
        self.tokens, self.last_token = openings_of(chart)
        self.count = min(config.groups, *(len(set(each.keys)) for each in distributions))
        self.groups = deal([each.keys for each in distributions], self.count, config.seed)
        benign = [each.benign_keys for each in distributions]
        self.benign_groups = deal([*benign, [r.id for r in utility]], self.count, config.seed)
        self.left_out: list[str] = []

    def read(self, models: Sequence[LoadedModel], names: Sequence[str]) -> list[Measured]:
        """All distributions with each model; the first one's words are those of all."""
        words = agree_on_words(
            models[0], self.distributions, self.utility, self.config, self.tokens, self.folder / "answers",
            self.reporter,
        )  # fmt: skip
        found = []
        for number, (loaded, name) in enumerate(zip(models, names, strict=True)):
            found += self._read_model(loaded, number, name, words)
        return found

    def _read_model(self, loaded: LoadedModel, number: int, name: str, words: Words) -> list[Measured]:
        folder, score = self.folder / f"model-{number}", self.chart.meta["score"]
        index = build_index(loaded.model, self.chart.attention)  # pyright: ignore[reportArgumentType]
        utility = utility_statistics(
            loaded, index, words, self.config, folder / "utility.safetensors",
            effects=score in ("decision", "taylor"), last_token=self.last_token, reporter=self.reporter,
        )  # fmt: skip
        units = metrics.Units(self.chart, index, output_norms(loaded.model, index), utility, loaded.weights_hash)
        found = []
        for place, distribution in enumerate(self.distributions):
            own = folder / f"data-{place}"
            own.mkdir(parents=True, exist_ok=True)
            answers = words.texts[distribution.name]
            if number:
                answers = own_answers(loaded, distribution, self.config, own / "answers.jsonl", self.reporter)
            reading = read_condition(
                loaded, index, distribution, words, self.config, own,
                score=score, last_token=self.last_token, groups=self.groups, benign_groups=self.benign_groups,
                count=self.count, answers=answers, signal=self.signal, reporter=self.reporter,
            )  # fmt: skip
            found.append(self._measured(name, distribution.name, reading, units))
        return found

    def _measured(self, model: str, distribution: str, reading: Reading, units: metrics.Units) -> Measured:
        where = f"{model} on {distribution}"
        sides: dict[str, Side[Any]] = {"direction": metrics.leaning_side(reading, self.count)}
        whole, side = None, units.side(reading)
        if side is not None and side.present.sum() >= FEWEST_GROUPS:
            sides["units"] = side
            whole = side.at(np.ones(self.count, dtype=np.int64))
        else:
            why = f"the score {units.score} reads refusals, and too few of these requests are refused"
            self.left_out.append(f"Importance and groups of {where}: {why}.")
        if reading.direction is None:
            self.left_out.append(f"The direction of {where}: refusals or compliances are too short.")
        if reading.verdicts is not None and self.signal is not None:
            judged = metrics.judged_side(reading.verdicts, self.signal.policy.query_threshold, self.count)
            if judged.present.sum() >= FEWEST_GROUPS:
                sides["signal"] = judged
            else:
                self.left_out.append(f"The signal of {where}: too few requests fit the model’s context.")
        return Measured(model, distribution, reading, whole, sides)

    def described(self, measured: Measured) -> Condition:
        """The condition's own figures, from all prompts."""
        reading = measured.reading
        rates: Mapping[str, Rate] = {}
        errors: Mapping[str, float | None] = {}
        if reading.verdicts is not None and self.signal is not None:
            rates = metrics.flagged_rates(reading.verdicts, self.signal.policy.query_threshold)
            errors = metrics.calibration_errors(reading.verdicts)
        return Condition(
            model=measured.model,
            distribution=measured.distribution,
            refused=Rate.of(reading.refused),
            margin=Estimate.of(torch.tensor(reading.margins, dtype=torch.float64)),
            overlap=shared_groups(self.chart, measured.whole.chart) if measured.whole else {},
            recall=rates.get(HARMFUL),
            false_alarms=rates.get(BENIGN),
            error=errors.get("queries"),
            answer_error=errors.get("answers"),
        )


def openings_of(chart: UnitMap) -> tuple[int, bool]:
    """How many tokens of an opening the map compares, and whether it measured at the prompt's last token."""
    measured = chart.meta.get("settings", {})
    return int(measured.get("tokens", 3)), measured.get("scored") == "last"


def shared_groups(first: UnitMap, second: UnitMap) -> dict[str, float | None]:
    """IoU of each group in two maps."""
    (shared,) = overlap({"first": first.labels, "second": second.labels}).values()
    return shared
