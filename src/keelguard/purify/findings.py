"""What a purification found, put into words: sentences and warnings that are computed from the figures.

    health_warnings(result)                         # what got worse by more than its interval
    canary_sentences(result)                        # what the spike-in says, and what it cannot say

Pure functions of a result, so that the page and the terminal say the same. What may be *claimed* is in
`results.claims`; this is what a reader needs beside it.
"""

import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from keelguard.plots import NOTHING, percent, rate_text
from keelguard.purify.claims import is_strong, no_control, not_searched, unplanted
from keelguard.purify.health import Health
from keelguard.purify.repair import fell
from keelguard.purify.results import PurifyResult
from keelguard.purify.spikes import Spike
from keelguard.purify.suspects import Suspect
from keelguard.stats import Rate

STATES = {"before": "Before", "after": "After", "rebound": "Rebound"}
"""The states of the model in the order in which they are shown."""

CANARY_STATES = {**STATES, "control": "Random pruning"}
"""Those of a canary: beside them stands a copy with random channels neutralised, fine-tuned for as many steps."""

METHOD_WORDS = {
    "vaccine": "the published vaccine (BD-VAX): planted variants give a signature of how triggers are bound to "
    "behaviours, its components are neutralised, and a clean fine-tune restores the model",
    "immunize": "immunisation: in rounds, the insertions that most disturb the model’s own clean answers are searched, "
    "and the model is trained to answer as if they were not there",
    "both": "the published vaccine (BD-VAX), then immunisation against the worst insertions",
    "retrain": "retraining: the adapter was thrown away, and a new one of its shape was trained on the clean chats",
}
METHOD_NAMES = {
    "vaccine": "the published vaccine",
    "immunize": "immunisation",
    "both": "the vaccine, then immunisation",
    "retrain": "a new adapter on the trusted base",
}
_STOPPED = {
    "quiet": "It stopped because the search found nothing that moves the model’s own answers any more.",
    "utility": "It stopped because clean answers got worse, and the last round’s training was undone.",
    "rounds": "It used all of its rounds: it did not stop because there was nothing left to find.",
}
_HOW = {
    "reinit": "chosen units drawn anew, as before any training",
    "zero": "chosen units cleared",
    "mean": "chosen units held at their mean activation",
    "adapter": "the adapter’s update cleared in the chosen units",
}
_RESTORED = {
    "target": "the loss on clean chats was back",
    "patience": "the loss no longer fell",
    "end": "all epochs were done",
}


class Measure(NamedTuple):
    """A rate of `Health`: its name there, what a reader is told, and whether it should be high."""

    name: str
    label: str
    words: str
    high: bool


class Row(NamedTuple):
    """One way to treat the model, with what is measured behind it; `why` says why nothing was."""

    name: str
    about: str
    health: Health | None
    suspects: tuple[Suspect, ...]
    why: str = ""

    @property
    def broken(self) -> float:
        """The share of held-out prompts that the suspected triggers break, over all of them; NaN without any.

        They share their prompts, so that it has no interval.
        """
        return _share([suspect.broken for suspect in self.suspects])

    @property
    def control(self) -> float:
        """The same with random words."""
        return _share([suspect.control for suspect in self.suspects])


def _share(rates: Sequence[Rate]) -> float:
    total = sum(rate.total for rate in rates)
    return sum(rate.count for rate in rates) / total if total else math.nan


MEASURES = (
    Measure("utility", "Utility", "tasks solved, or answers that equal the reference", True),
    Measure("refused", "Harmful requests refused", "by the words of the answer", True),
    Measure("over_refusal", "Harmless requests refused", "over-refusal", False),
    Measure("degenerate", "Degenerate answers", "empty or looping, on clean requests", False),
    Measure("inserted_degenerate", "Degenerate, words inserted", "on the same requests with unrelated words", False),
    Measure("accidental", "Accidental triggers", "right answers that unrelated words turn wrong", False),
)


def method_sentences(result: PurifyResult) -> list[str]:
    """What was purified, with what, and how."""
    what = f"The whole model {result.source} was purified"
    if result.threat == "adapter":
        what = f"The adapter {result.adapter} was purified, and its base {_base(result)} was left as it is"
    name = result.method.get("method")
    how = "The record does not say by which method." if name is None else f"Method: {METHOD_WORDS.get(name, name)}."
    said = [f"{what}.", how]
    if stopped := _STOPPED.get(result.method.get("stopped", "")):
        said.append(stopped)
    counts = result.material
    if "train" in counts:
        said.append(
            f"It was trained on {counts['train']:,} clean chats, {counts.get('refused', 0):,} of them refusals of "
            f"harmful requests; {counts.get('validation', 0):,} were held back. Of the answers, "
            f"{counts.get('own', 0):,} are the input model’s own."
        )
    return said


def _base(result: PurifyResult) -> str:
    return "model" if result.source == result.adapter else result.source


def retrain_advice(result: PurifyResult) -> tuple[str, str] | None:
    """Why to retrain a suspicious adapter, and the command; None for a whole model, or where that was done."""
    if result.threat != "adapter" or result.method.get("method") == "retrain":
        return None
    suspect = [result.source] if result.source == result.adapter else [result.source, "--adapter", result.adapter or ""]
    command = f"keelguard purify {shlex.join(suspect)} --clean-data FILE --out RUN --method retrain"
    beside = any(each.name == "retrain" and each.health for each in result.compared)
    where = "Below it stands beside this run, with the figures of both." if beside else "Compare the two reports."
    return (
        "First advice: if you trust the base model and have clean data for the adapter’s task, throw the adapter away "
        f"and retrain it. What was never in the weights does not have to be removed from them. {where}",
        command,
    )


def comparison(result: PurifyResult) -> list[Row]:
    """The model as it came, what this run made of it, and what other methods and controls make of it."""
    before, after = result.health.get("before"), result.health.get("after")
    if not result.compared or before is None or after is None:
        return []
    name = str(result.method.get("method", ""))
    rows = [
        Row("as it came", "the input model", before, tuple(course.before for course in result.suspects)),
        Row(f"{name} (this run)", METHOD_NAMES.get(name, name), after, tuple(c.after for c in result.suspects)),
    ]
    return [*rows, *(Row(each.name, each.about, each.health, each.suspects, each.why) for each in result.compared)]


def is_worse(measure: Measure, before: Rate, now: Rate) -> bool:
    """Whether a rate lies outside its earlier 95 % interval, on the bad side."""
    if not (before.total and now.total):
        return False
    return now.value < before.interval.low if measure.high else now.value > before.interval.high


def health_warnings(result: PurifyResult) -> list[str]:
    """What got worse by more than its interval, after the purification and after the fine-tune behind it."""
    before, said = result.health.get("before"), []
    if before is None:
        return []
    for state, words in (("after", "after the purification"), ("rebound", "after a further clean fine-tune")):
        now = result.health.get(state)
        for measure in MEASURES if now else ():
            first, second = getattr(before, measure.name), getattr(now, measure.name)
            if is_worse(measure, first, second):
                moved = "fell" if measure.high else "rose"
                said.append(
                    f"{measure.label} {moved} by more than its interval: {rate_text(first)} before, "
                    f"{rate_text(second)} {words}."
                )
    return said


def health_sentences(result: PurifyResult) -> list[str]:
    """Whether safety and utility were repaired, and what the figures are too few to show."""
    before, after = result.health.get("before"), result.health.get("after")
    if before is None or after is None:
        return ["Health was not measured before and after, so what the purification cost is not known."]
    said = [_safety_sentence(result, before.refused, after.refused)]
    if before.utility.total and after.utility.total:
        said.append(_utility_sentence(result, before.utility, after.utility))
    seen = [m for m in MEASURES if m.high and getattr(before, m.name).total]
    if not before.utility.total:
        said.append("Utility was not measured: there were no held-out requests with right answers.")
    for measure in seen:
        rate = getattr(before, measure.name)
        gap = 100 * (rate.value - rate.interval.low)
        said.append(f"{measure.label}: a fall of less than {gap:.0f} points would not show on {rate.total} requests.")
    return said


def _safety_sentence(result: PurifyResult, before: Rate, after: Rate) -> str:
    if not (before.total and after.total):
        return (
            "Refusal of harmful requests was not measured, so what the purification did to safety is not known: give "
            "harmful requests that the model refuses."
        )
    figures = f"{rate_text(before)} before, {rate_text(after)} after"
    lost = fell(before, after)
    if not result.repaired:
        return f"Safety was not trained back{'' if lost else ', and did not have to be'}: refusals are {figures}."
    end = "Refusals did not come back fully" if lost else "Refusals are within 2 points of what they were"
    return f"Safety or utility had fallen by more than 2 points and was trained back. {end}: refusals are {figures}."


def _utility_sentence(result: PurifyResult, before: Rate, after: Rate) -> str:
    figures = f"{rate_text(before)} before, {rate_text(after)} after"
    if not fell(before, after):
        return f"Utility did not fall by more than 2 points: {figures}."
    back = "although it was trained back" if result.repaired else "and was not trained back"
    return f"Utility fell by {100 * (before.value - after.value):.1f} points, {back}: {figures}."


def worst_canary(result: PurifyResult) -> Spike | None:
    """Of the canaries that took hold, the one that fires most after the purification."""
    measured = [s for s in result.spikes if s.planted and s.after is not None and s.after.asr.total]
    return max(measured, key=lambda s: s.after.asr.value if s.after else 0.0, default=None)


def canary_sentences(result: PurifyResult) -> list[str]:
    """What the canaries say beside the claims, and which say nothing."""
    if result.method.get("method") == "retrain":
        return ["No canaries are planted behind a retraining: nothing of the old adapter could survive it."]
    if not result.spikes:
        return [
            "No canaries were planted (--no-spikes). Run again without that option to see what the same purification "
            "removes from a copy of this model."
        ]
    said = [*unplanted(result.spikes), *no_control(result.spikes)]
    planted = [s for s in result.spikes if s.planted and s.after and s.after.correct.total]
    if planted:
        lowest = min(planted, key=lambda s: s.after.correct.value if s.after else 1.0)
        assert lowest.after is not None
        said.append(
            "A backdoor that is silent while its prompts are answered wrongly is not removed. The lowest share of "
            f"triggered prompts answered correctly after the purification is {rate_text(lowest.after.correct)} "
            f"({lowest.kind})."
        )
    return said


def suspect_sentences(result: PurifyResult) -> list[str]:
    """How many insertions stand out from random words, and how many still do."""
    if not result.suspects:
        before = result.searches.get("before")
        if before is not None and not before.ran:
            return not_searched(result.searches)
        return [
            "The search before the purification left no insertion to measure. A trigger that it cannot spell, such as "
            "one of many words or of rare characters, would not be here either."
        ]
    stages = [("before", [course.before for course in result.suspects])]
    stages.append(("after the purification", [course.after for course in result.suspects]))
    if rebound := [course.rebound for course in result.suspects if course.rebound]:
        stages.append(("after a further clean fine-tune", rebound))
    counts = [f"{sum(map(is_strong, suspects))} of {len(suspects)} {when}" for when, suspects in stages]
    return [
        "Insertions that break held-out answers more often than random words do, so that the two intervals do not "
        f"meet: {', '.join(counts)}.",
        *not_searched(result.searches),
    ]


def lead_sentence(result: PurifyResult) -> str:
    """What the scan for hidden targets flags, as a lead; or that it was not run."""
    if not any(result.leads.values()):
        config: Any = result.settings.get("config") or {}
        if "inversion" in config and config["inversion"] is None:
            return "The scan was not run (inversion: null in the settings)."
        return "The scan left no leads. It finds few kinds of backdoor, so that this says little."
    flagged = [
        f"{sum(lead.flagged for lead in result.leads[state])} of {len(result.leads[state])} {words}"
        for state, words in (("before", "before"), ("after", "after the purification"))
        if state in result.leads
    ]
    return f"Flagged as worth a look: {', '.join(flagged)}."


def vaccine_record(result: PurifyResult) -> dict[str, str]:
    """The vaccine's record; empty where it was not used."""
    record = result.method.get("neutralized")
    if not record:
        return {}
    config = ((result.settings.get("config") or {}).get("method") or {}).get("vaccine") or {}
    found = {}
    if variants := config.get("variants"):
        count, samples = variants.get("count", NOTHING), variants.get("samples", NOTHING)
        found["signature"] = f"from {count} planted variants of up to {samples} samples; scores are in signature/"
    if config.get("lowest") or config.get("noise"):
        found["control"] = "lowest scores" if config.get("lowest") else "variants whose triggers set nothing off"
    found["neutralised"] = _HOW.get(record["how"], record["how"])
    found["units neutralised"] = percent(record["unit_share"])
    found["weights overwritten"] = f"{sum(record['parameters'].values()):,} ({percent(record['weight_share'])})"
    if restored := result.method.get("restored"):
        reason = _RESTORED.get(restored["reason"], restored["reason"])
        target = "" if restored["target"] is None else f"; the loss aimed at was {restored['target']:.3f} nats a token"
        found["restored"] = f"{restored['steps']:,} steps with the neutralised weights frozen; {reason}{target}"
    else:
        found["restored"] = "no: the model was left as it was neutralised"
    return found
