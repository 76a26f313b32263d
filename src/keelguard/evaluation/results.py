"""What an audit found, as typed records that save to `audit.json` and load from it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.runs import write_json
from keelguard.stats import Rate

FORMAT = "keelguard.audit/1"


@dataclass(frozen=True)
class SafetyCell:
    """One attack on one model.

    A request counts as broken when any of its attempts is harmful. `asr` judges what the model itself
    added, `asr_whole` the answer with any prefill; `score` is the mean over requests of the worst score, None
    without any.
    `refused` and `degenerate` are shares of attempts. `skipped` attempts did not fit the model's context.
    """

    attack: str
    asr: Rate
    asr_whole: Rate
    refused: Rate
    degenerate: Rate
    score: float | None
    attempts: int
    skipped: int
    seconds: float
    broken: dict[str, bool]
    """Request id → broken, for paired tests between models."""


@dataclass(frozen=True)
class ModelReport:
    """Everything measured on one model. Rates are keyed by attack, task or request set.

    `degenerate` counts the answers to requests that should be answered; it is empty where the suite has none.
    `outcomes` holds what the rates count, for paired tests: measure ("utility", "over_refusal", "degenerate") → task or
    request set → request id → outcome. It is empty in audits of earlier versions.
    """

    name: str
    source: str
    weights: str
    parameters: int
    architecture: str
    safety: dict[str, SafetyCell]
    utility: dict[str, Rate]
    over_refusal: dict[str, Rate]
    degenerate: Rate
    perplexity: float | None = None
    outcomes: dict[str, dict[str, dict[str, bool]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A paired test of two models under one attack: ASR(model) − ASR(reference) on the same requests."""

    attack: str
    model: str
    reference: str
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Example:
    """One attempt, kept for the report. `response` is untrusted text: escape it, hide it if harmful."""

    model: str
    attack: str
    prompt: str
    prefill: str
    response: str
    harmful: bool
    refused: bool
    degenerate: bool


@dataclass(frozen=True)
class AttackInfo:
    """An attack as it was run: its name, one sentence on what it does, its source and its settings."""

    name: str
    summary: str
    source: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class DataInfo:
    """A data file that the audit read: what it was used for, where it was, its hash and its rows."""

    use: str
    source: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class AuditResult:
    """The result of an audit: models × attacks, utility, comparisons, examples, and how it was done."""

    suite: str
    judge: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
    attacks: list[AttackInfo]
    data: list[DataInfo]
    models: list[ModelReport]
    comparisons: list[Comparison] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object, rates with their intervals."""
        return {"format": FORMAT, **_plain(self)}

    def save(self, path: Path, *, reveal: bool = False) -> None:
        """Write the result atomically as JSON; harmful answers and prefills are withheld unless `reveal` is set."""
        result = self if reveal else replace(self, examples=[_withheld(example) for example in self.examples])
        write_json(path, result.to_json())

    @classmethod
    def load(cls, path: Path) -> "AuditResult":
        """Read what `save` wrote.

        Raises:
            UsageError: the file is missing, is no JSON, is damaged, or has another format version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{path}: cannot be read as an audit ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise UsageError(f"{path}: format {found!r} is not {FORMAT!r}; run the audit again")
        data.pop("format")
        try:
            data["attacks"] = [AttackInfo(**a) for a in data["attacks"]]
            data["data"] = [DataInfo(**d) for d in data["data"]]
            data["models"] = [_model(m) for m in data["models"]]
            data["comparisons"] = [Comparison(**c) for c in data["comparisons"]]
            data["examples"] = [Example(**e) for e in data["examples"]]
            return cls(**data)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: is damaged ({error!r}); run the audit again") from error


def _withheld(example: Example) -> Example:
    """The example without the text of a harmful answer, and without what an attack put before any answer.

    A deep prefill is the beginning of a harmful answer, whatever the model made of it.
    """
    note = "[withheld: {} characters; run with --reveal to keep them]"
    if example.prefill:
        example = replace(example, prefill=note.format(len(example.prefill)))
    return replace(example, response=note.format(len(example.response))) if example.harmful else example


def _plain(value: Any) -> Any:
    """Dataclasses, dicts and lists to JSON values, rates through their own form."""
    if isinstance(value, Rate):
        return value.to_json()
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def cell_to_json(cell: SafetyCell) -> dict[str, Any]:
    """One cell as JSON, for the run folder."""
    return _plain(cell)


def cell_from_json(data: dict[str, Any]) -> SafetyCell:
    """The inverse of `cell_to_json`."""
    rates = {key: Rate.from_json(data[key]) for key in ("asr", "asr_whole", "refused", "degenerate")}
    return SafetyCell(**{**data, **rates})


def _model(data: dict[str, Any]) -> ModelReport:
    return ModelReport(
        **{
            **data,
            "safety": {name: cell_from_json(cell) for name, cell in data["safety"].items()},
            "utility": {name: Rate.from_json(rate) for name, rate in data["utility"].items()},
            "over_refusal": {name: Rate.from_json(rate) for name, rate in data["over_refusal"].items()},
            "degenerate": Rate.from_json(data["degenerate"]),
        }
    )
