"""What `keelguard shift` found, as `shift.json` holds it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.pipeline.drift import Drift
from keelguard.runs import read_json, write_json
from keelguard.stats import Rate
from keelguard.units.direction import Estimate
from keelguard.units.transfer import Transfer

FORMAT = "keelguard.shift/1"
RESULT = "shift.json"


@dataclass(frozen=True)
class Condition:
    """A model on a distribution.

    Attributes:
        model, distribution: their names.
        refused: of the harmful requests.
        margin: the likeliest refusal's log-probability less the likeliest compliance's, nats a token.
        overlap: IoU of its groups with those of the unit map, by group; empty where units were not measured.
        recall, false_alarms: of the signal's verdicts on queries, at its threshold.
        error, answer_error: its calibration errors.
    """

    model: str
    distribution: str
    refused: Rate
    margin: Estimate
    overlap: Mapping[str, float | None]
    recall: Rate | None = None
    false_alarms: Rate | None = None
    error: float | None = None
    answer_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        plain = {**vars(self), "margin": self.margin._asdict(), "overlap": dict(self.overlap)}
        return {name: value.to_json() if isinstance(value, Rate) else value for name, value in plain.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Condition":
        """The inverse of `to_json`."""
        rates = {n: data[n] and Rate.from_json(data[n]) for n in ("refused", "recall", "false_alarms")}
        return cls(**{**data, **rates, "margin": Estimate(**data["margin"])})


@dataclass(frozen=True)
class Pair:
    """Two conditions that are compared.

    Attributes:
        name: its name in the drifts.
        kind: "distributions" of one model, or "checkpoints" on one distribution.
        first, second: the conditions' places in the list.
        overlap: IoU of the two maps' groups, and `correlation` the rank correlation of their importance, from all
            prompts.
        transfer: which units change their group, from all prompts; None where units were not measured.
    """

    name: str
    kind: str
    first: int
    second: int
    overlap: Mapping[str, float | None]
    correlation: float | None
    transfer: Transfer | None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "overlap": dict(self.overlap), "transfer": self.transfer and self.transfer.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Pair":
        """The inverse of `to_json`."""
        return cls(**{**data, "transfer": data["transfer"] and Transfer.from_json(data["transfer"])})


@dataclass(frozen=True)
class Shift:
    """A finished measurement.

    Attributes:
        model, against: source, name, weights' hash and architecture.
        units: digest, score and sizes of the unit map; `signal` the signal's digest and thresholds.
        distributions: name, source, hash and numbers of requests.
        drift: by metric and pair.
        layers: the same for each layer, where the metric has layers; None where a layer gave no figure.
        limits: where the warning limits come from.
        left_out: what was not measured, and why.
    """

    model: Mapping[str, Any]
    against: Mapping[str, Any] | None
    units: Mapping[str, Any]
    signal: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    distributions: tuple[Mapping[str, Any], ...]
    conditions: tuple[Condition, ...]
    pairs: tuple[Pair, ...]
    drift: Mapping[str, Mapping[str, Drift]]
    layers: Mapping[str, Mapping[str, tuple[Drift | None, ...]]]
    limits: str
    left_out: tuple[str, ...]

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """(pair, metric) of every drift above its limit, pair by pair."""
        return [
            (pair.name, metric)
            for pair in self.pairs
            for metric, found in self.drift.items()
            if pair.name in found and found[pair.name].warn
        ]

    def with_limits(self, other: "Shift", source: str) -> "Shift":
        """The same drifts by the limits of another run: of the same pair, or else the metric's greatest there.

        Layers keep their own.

        Raises:
            UsageError: the other run has none of these metrics.
        """
        drifts: dict[str, dict[str, Drift]] = {}
        for metric, found in self.drift.items():
            theirs = {pair: each.limit for pair, each in other.drift.get(metric, {}).items()}
            drifts[metric] = {
                pair: replace(each, limit=theirs.get(pair, max(theirs.values()))) if theirs else each
                for pair, each in found.items()
            }
        if not set(self.drift) & set(other.drift):
            raise UsageError(f"--limits {source}: has none of the metrics {', '.join(self.drift)}; name another run")
        kept = sorted(set(self.drift) - set(other.drift))
        words = f"the limits are those of {source}" + (f", but for {', '.join(kept)}" if kept else "")
        return replace(self, drift=drifts, limits=words)

    def save(self, folder: str | Path) -> None:
        """Write FOLDER/shift.json, atomically."""
        plain = {
            name: getattr(self, name)
            for name in ("model", "against", "units", "signal", "settings", "versions", "limits")
        }
        write_json(
            Path(folder) / RESULT,
            {
                "format": FORMAT,
                **plain,
                "distributions": list(self.distributions),
                "conditions": [each.to_json() for each in self.conditions],
                "pairs": [each.to_json() for each in self.pairs],
                "drift": {
                    metric: {pair: each.to_json() for pair, each in found.items()}
                    for metric, found in self.drift.items()
                },
                "layers": {
                    metric: {pair: [each and each.to_json() for each in line] for pair, line in found.items()}
                    for metric, found in self.layers.items()
                },
                "left_out": list(self.left_out),
            },
        )

    @classmethod
    def load(cls, source: str | Path) -> "Shift":
        """Read a run folder, or its shift.json.

        Raises:
            UsageError: there is none, or it is damaged or of another format.
        """
        path = Path(source)
        path = path / RESULT if path.is_dir() else path
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give the folder of a finished `keelguard shift`")
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise UsageError(f"{path}: is no result of the format {FORMAT}; run `keelguard shift` again")
        try:
            return cls(
                **{
                    **data,
                    "distributions": tuple(data["distributions"]),
                    "conditions": tuple(map(Condition.from_json, data["conditions"])),
                    "pairs": tuple(map(Pair.from_json, data["pairs"])),
                    "drift": {
                        metric: {pair: Drift.from_json(each) for pair, each in found.items()}
                        for metric, found in data["drift"].items()
                    },
                    "layers": {
                        metric: {
                            pair: tuple(each and Drift.from_json(each) for each in line) for pair, line in found.items()
                        }
                        for metric, found in data["layers"].items()
                    },
                    "left_out": tuple(data["left_out"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path}: is damaged ({error}); run `keelguard shift` again") from error
