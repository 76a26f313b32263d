"""What becomes of a safety signal whose model was trained on: kept, calibrated anew, trained anew, or given up.

    found = recheck(original, tuned, signal, data, folder=folder)            # found.outcome, found.signal

A signal refuses other weights until it was measured on them. Within the limits (`DriftConfig`) it is bound to them as
it is; beyond, its probabilities and thresholds are chosen anew; and where that is not enough, another one is trained.
Of these the best is taken, and none where it is worse for certain. Every step is measured, and no threshold comes from
the requests that are reported; but they choose among the steps, so audit the result on others.
"""

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keelguard.attacks.base import Attempt
from keelguard.evaluation.answers import Generating, answer
from keelguard.evaluation.judges import is_refusal
from keelguard.guard.adapter import Signal
from keelguard.guard.augment import FRAMES, HELD_FRAMES
from keelguard.guard.labels import Labelled, require_both
from keelguard.guard.material import OPENINGS, gather
from keelguard.guard.training import SignalConfig, calibrate, fit_signal
from keelguard.models import LoadedModel
from keelguard.pipeline.signal_drift import (
    LIMITS,
    DriftConfig,
    DriftReport,
    chosen_rows,
    config_of,
    material_of,
    measure_drift,
)
from keelguard.pipeline.verdicts import Verdicts, collect
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request
from keelguard.runs import read_json, write_json

Outcome = Literal["kept", "recalibrated", "retrained", "failed"]


@dataclass(frozen=True)
class CheckData:
    """What a re-check reads: three parts that share no request.

    Attributes:
        measured: what is reported; neither the fine-tune nor the signal was trained on it.
        calibrate: what thresholds are chosen on.
        train: what a new signal is trained on.
        frames, held_frames: frames for training, and those in which benign queries are asked otherwise.
    """

    measured: Sequence[Labelled]
    calibrate: Sequence[Labelled]
    train: Sequence[Labelled]
    frames: Sequence[str] = FRAMES
    held_frames: Sequence[str] = HELD_FRAMES


@dataclass(frozen=True)
class Step:
    """One attempt: what was done to the signal, and its figures on the new weights against the first ones."""

    name: str
    report: DriftReport
    thresholds: Mapping[str, float]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The step as JSON."""
        return {**vars(self), "report": self.report.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Step":
        """The inverse of `to_json`."""
        return cls(**{**data, "report": DriftReport.from_json(data["report"])})


@dataclass(frozen=True)
class Recheck:
    """What became of a signal.

    Attributes:
        outcome: "failed" where even the best step leaves a figure beyond its limit for certain (`Change.certain`).
        signal: bound to the new weights; None where it failed.
        reason: why it failed.
    """

    outcome: Outcome
    steps: tuple[Step, ...]
    signal: Signal | None
    reason: str = ""


def recheck(
    original: Callable[[], LoadedModel],
    tuned: Callable[[], LoadedModel],
    signal: Signal,
    data: CheckData,
    *,
    folder: Path,
    config: DriftConfig = LIMITS,
    reporter: Reporter = SILENT,
) -> Recheck:
    """Measure a signal on the weights behind a fine-tune; re-bind it, calibrate it anew, or train another.

    Args:
        original, tuned: load the models, one after the other, adapters merged.
        folder: keeps what an interrupted call has done; the caller removes it.

    Raises:
        UsageError: the signal is not of `original`, or a part of the data lacks requests of a class.
        FailureError: training does not fit in memory, or diverges, or the disk is full.
    """
    rows = chosen_rows(data.measured, config)
    for name, part in (("calibration", data.calibrate), ("training", data.train)):
        require_both(part, name)
    folder.mkdir(parents=True, exist_ok=True)
    reporter.note("checking the signal on the new weights …")
    rows, before = _before(original, signal, rows, data, folder, config, reporter)
    loaded = tuned()
    settings = config_of(signal)
    measured = {
        "original": before, "before": signal, "frames": data.held_frames, "config": config,
        "store": folder / "measured.jsonl", "reporter": reporter,
    }  # fmt: skip
    steps: list[Step] = []
    tried: list[tuple[Outcome, Signal]] = []

    def within(name: str, outcome: Outcome, found: Signal, note: str = "") -> bool:
        report, policy = measure_drift(loaded, found, rows, **measured), found.policy
        steps.append(Step(name, report, {"query": policy.query_threshold, "answer": policy.threshold}, note))
        tried.append((outcome, found))
        return not report.over

    def best() -> Recheck:
        """The first step that is within the limits, or else the one that exceeds them least."""
        place = min(range(len(steps)), key=lambda n: (len(steps[n].report.certain), steps[n].report.excess))
        certain = ", ".join(f"{change.kind}: {change.name}" for change in steps[place].report.certain)
        if certain:
            return Recheck(
                "failed", tuple(steps), None, f"at best ({steps[place].name}) it is beyond limits in {certain}"
            )
        outcome, found = tried[place]
        record = {"outcome": outcome, "made_for": signal.weights}
        return Recheck(outcome, tuple(steps), replace(found, training={**found.training, "recheck": record}))

    bound = replace(signal, weights=loaded.weights_hash)
    if "model" in signal.training:
        bound = replace(bound, training={**signal.training, "model": loaded.source})
    if within("as it was", "kept", bound):
        return best()
    reporter.note("it has drifted beyond its limits: calibrating it anew …")
    anew, scaling = recalibrate(loaded, bound, data.calibrate, settings, data.held_frames, folder, reporter)
    # A prefix cannot be trained without its model, whose weights are not to move.
    if within("recalibrated", "recalibrated", anew, scaling) or signal.placement == "prefix":
        return best()
    reporter.note("that is not enough: training another …")
    model, tokenizer = loaded.model, loaded.tokenizer
    material = gather(
        model, tokenizer, data.train, settings.material, frames=data.frames, store=folder, reporter=reporter
    )
    fresh = fit_signal(
        model, tokenizer, loaded.weights_hash, material, data.calibrate, settings,
        held_frames=data.held_frames, state_folder=folder, reporter=reporter,
    )  # fmt: skip
    within("retrained", "retrained", fresh)
    return best()


def recalibrate(
    loaded: LoadedModel,
    signal: Signal,
    rows: Sequence[Labelled],
    config: SignalConfig,
    frames: Sequence[str] = HELD_FRAMES,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
) -> tuple[Signal, str]:
    """Scale and shift the logit (Platt 1999), and choose both thresholds anew; AUROC stays what it was.

    Args:
        rows: of both classes; the benign ones choose the thresholds.
        folder: keeps the model's own answers.

    Returns:
        The signal, and what was done to its logit, in words.
    """
    store = None if folder is None else folder / "benign.jsonl"
    found = collect(
        loaded, signal, rows,
        frames=frames, material=config.material, store=store, reporter=reporter, label="calibration",
    )  # fmt: skip
    scale, shift = platt(found)
    head = {"head_weight": signal.head_weight * scale, "head_bias": signal.head_bias * scale + shift}
    anew = calibrate(
        loaded.model, loaded.tokenizer, replace(signal, **head), rows, config,
        frames=frames, store=store, reporter=reporter,
    )  # fmt: skip
    return anew, f"the logit times {scale:.3f} {shift:+.3f}"


def platt(found: Verdicts, steps: int = 100) -> tuple[float, float]:
    """The scale and the shift of the logit that fit the labels best (Platt 1999, with his smoothed targets).

    Queries and answers of either label count alike, as in training. A scale that would turn verdicts round is refused:
    (1, 0) is given then.
    """
    values, targets, weights = [], [], []
    for looks in (found.queries, found.answers):
        labels = np.array(looks.labels, dtype=bool)
        for malicious in (True, False):
            chosen = labels == malicious
            requests = len({group for group, own in zip(looks.groups, chosen, strict=True) if own})
            if requests:
                values.append(np.array(looks.values)[chosen])
                smoothed = (requests + 1) / (requests + 2)
                targets.append(np.full(chosen.sum(), smoothed if malicious else 1 - smoothed))
                weights.append(np.full(chosen.sum(), 1 / chosen.sum()))
    p = np.concatenate(values).clip(1e-7, 1 - 1e-7)
    logits, target, weight = np.log(p / (1 - p)), np.concatenate(targets), np.concatenate(weights)
    inputs = np.stack([logits, np.ones_like(logits)])

    def loss(at: np.ndarray) -> float:
        z = at @ inputs
        return float((weight * (np.logaddexp(0, z) - target * z)).sum())

    at = np.array([1.0, 0.0])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-(at @ inputs).clip(-50, 50)))
        slope = inputs @ (weight * (p - target))
        bend = (inputs * (weight * p * (1 - p))) @ inputs.T + 1e-9 * np.eye(2)
        move, size = np.linalg.solve(bend, slope), 1.0
        while size > 1e-6 and loss(at - size * move) > loss(at):
            size /= 2
        at = at - size * move if size > 1e-6 else at
        if np.abs(size * move).max() < 1e-8 or size <= 1e-6:
            break
    return (float(at[0]), float(at[1])) if at[0] > 0 else (1.0, 0.0)


def _before(
    original: Callable[[], LoadedModel],
    signal: Signal,
    rows: list[Labelled],
    data: CheckData,
    folder: Path,
    config: DriftConfig,
    reporter: Reporter,
) -> tuple[list[Labelled], Verdicts]:
    """The rows with harmful answers, and what the signal says on the model that it was made for."""
    kept = folder / "before.json"
    if not kept.exists():
        loaded = original()
        signal.check(loaded.weights_hash, loaded.source)
        said = _elicited(loaded, signal, rows, config, reporter)
        found = collect(
            loaded, signal, _with(rows, said),
            frames=data.held_frames, material=material_of(signal, config), reporter=reporter, label="the signal before",
        )  # fmt: skip
        write_json(kept, {"said": said, "verdicts": found.to_json()})
        del loaded
        gc.collect()
    read = read_json(kept)
    return _with(rows, read["said"]), Verdicts.from_json(read["verdicts"])


def _elicited(
    loaded: LoadedModel, signal: Signal, rows: Sequence[Labelled], config: DriftConfig, reporter: Reporter
) -> list[str]:
    """Harmful answers for malicious rows: none where the data know some, else the model's own, begun for it."""
    if any(row.harmful_answer for row in rows):
        return ["" for _ in rows]
    draw = random.Random(f"openings-{config.seed}")
    asked = [i for i, row in enumerate(rows) if row.malicious and not row.answer]
    begun = [draw.choice(OPENINGS) for _ in asked]
    attempts = [
        Attempt(Request("", rows[i].messages), rows[i].messages, prefill=opening)
        for i, opening in zip(asked, begun, strict=True)
    ]
    generating = Generating(material_of(signal, config).max_new_tokens, 0, config.seed)
    texts = answer(loaded.model, loaded.tokenizer, attempts, generating, reporter=reporter, label="harmful answers")
    said = ["" for _ in rows]
    for i, opening, text in zip(asked, begun, texts, strict=True):
        if text and not is_refusal(text.strip()):
            said[i] = f"{opening}{text}".strip()
    return said


def _with(rows: Sequence[Labelled], said: Sequence[str]) -> list[Labelled]:
    return [row.answered(text, True) if text else row for row, text in zip(rows, said, strict=True)]
