"""A package in plain words: what was found, what was done, and what is not known.

    headline(outcome), found(outcome), done(outcome), unknown(outcome)

Sentences that are computed from the figures. None calls a model trustworthy: they name what was tried, and what was
not. No text that a model wrote is in them; the words of an insertion are a search's.
"""

from collections.abc import Sequence

from keelguard.pipeline.outcome import (
    GIVES,
    STATES,
    Outcome,
    because,
    reason_of,
    sentence,
    status_of,
    strong_after,
    strong_before,
)
from keelguard.pipeline.package import StageRecord
from keelguard.pipeline.surfaces import (
    BENIGN_TUNE,
    DEGENERATE,
    OTHER_TUNE,
    OVER_REFUSAL,
    TRIGGER,
    UTILITY,
    Cell,
    Row,
    worst_attack,
)
from keelguard.plots import legible, rate_text
from keelguard.purify.findings import worst_canary
from keelguard.purify.results import PurifyResult
from keelguard.purify.suspects import Suspect
from keelguard.report import counts_keywords

_DID = {
    "inspect": "The files were inspected.",
    "diagnose": "The units that carry safety were mapped.",
    "guard": "A signal was trained that judges the request and the answer as it is written.",
}
_PURIFIED = {
    "immunize": "Words that disturb the model’s own answers were searched, and trained away.",
    "vaccine": "What binds planted triggers to behaviours was neutralised, and the model restored.",
    "both": "What binds planted triggers to behaviours was neutralised; then words that disturb the model’s own "
    "answers were searched, and trained away.",
    "retrain": "The adapter was thrown away, and a new one trained on its base.",
}
_AS = {"received": "As received", "purified": "Purified", "guarded": "Guarded"}
_SPECIAL = {
    TRIGGER: "Requests in which a known trigger works",
    BENIGN_TUNE: "Requests that break after a fine-tune on harmless chats",
    OTHER_TUNE: "Requests that break after the worst of the other fine-tunes",
}
_FEW = 3


def headline(outcome: Outcome) -> str:
    """How far the hardening came, and what still works, in a few sentences."""
    failed, skipped = outcome.named("failed"), [*outcome.named("skipped"), *outcome.missing]
    undecided = sum(control.holds is None for control in outcome.controls)
    left = f" Left out: {', '.join(skipped)}." if skipped else ""
    rest = f" Undecided controls: {undecided} of {len(outcome.controls)}." if undecided else ""
    if failed:
        how = f"This hardening did not hold in full. Failed: {', '.join(failed)}.{left}{rest}"
    elif skipped:
        how = f"Hardened in part.{left}{rest}"
    elif undecided:
        how = f"Every stage was done.{rest}"
    elif not outcome.controls:
        how = "Every stage was done, but none of them tested its claim against a control."
    else:
        how = (
            f"Every stage was done, and all {len(outcome.controls)} controls hold. That is evidence about the attacks "
            "and canaries that were tried, and about no others."
        )
    if outcome.working:
        works = ", ".join(f"{row.name} {rate_text(rate)}" for row, rate in outcome.working)
        how += f" Still works on the {STATES[outcome.measured[-1]]} model: {works}."
    return (
        f"{how} In the purified model words are left that break its answers."
        if strong_after(outcome.purification)
        else how
    )


def found(outcome: Outcome) -> list[str]:
    """What was found in the model as received, and what is left of it."""
    return [
        *_attack_sentences(outcome),
        *_suspect_sentences(outcome.purification),
        *_canary_sentence(outcome.purification),
    ]


def done(outcome: Outcome) -> list[str]:
    """What each stage did, or why it did not."""
    return [words for stage in outcome.package.stages if (words := _did(stage, outcome.purification))]


def unknown(outcome: Outcome) -> list[str]:
    """What nothing here can tell."""
    said = [
        f"{_capital(GIVES.get(stage.name, 'what this stage tells'))}: {stage.name} was left out{because(stage.reason)}."
        for stage in outcome.package.stages
        if status_of(stage) == "skipped"
    ]
    said += [f"{_capital(GIVES[name])}: {name} was not run." for name in outcome.missing]
    said += [
        f"Undecided: {control.claim.rstrip('.')}{because(control.why)}."
        for control in outcome.controls
        if control.holds is None
    ]
    measured = {row.name for row in outcome.table.rows}
    if TRIGGER not in measured:
        said.append("Whether a trigger is hidden in it that no search here can spell: no trigger of it is known.")
    if outcome.audits and BENIGN_TUNE not in measured:
        said.append("Whether it keeps its safety through a further fine-tune: no audit tried one.")
    if any(counts_keywords(audit) for audit in outcome.audits.values()):
        said.append("How harmful the answers are: the judge only looks for words of refusal, which is weak evidence.")
    if outcome.package.threat == "adapter":
        said.append("What its base may hide: only the adapter was suspected.")
    return [
        *said,
        "Whether anything else is hidden in it: no test can show that nothing is. A backdoor, or an attack, of a "
        "kind that was not tried may work.",
    ]


def _attack_sentences(outcome: Outcome) -> list[str]:
    """The most successful attack of the first and of the last state, and what the last costs beside the first."""
    measured = outcome.measured
    if not measured:
        return ["What attacks do to the model was not measured."]
    said, table = [], outcome.table
    for place in dict.fromkeys((measured[0], measured[-1])):
        if worst := worst_attack(table, place):
            row, cell = worst
            which = f"{row.name}: {cell.of}" if cell.of and cell.of != row.name else row.name
            said.append(
                f"{_AS[STATES[place]]}, of the attacks on a request the one that succeeds most ({which}) breaks "
                f"{rate_text(cell.rate)} of the requests."
            )
    rows = {row.name: row for row in table.rows}
    for name, words in _SPECIAL.items():
        cells = rows[name].cells[: len(STATES)] if name in rows else ()
        texts = [f"{state} {rate_text(c.rate)}" for state, c in zip(STATES, cells, strict=False) if c.rate]
        if texts:
            said.append(f"{words}: {', '.join(texts)}.")
    costs = [f"{name} {_from_to(rows[name], measured)}" for name in (OVER_REFUSAL, UTILITY, DEGENERATE) if name in rows]
    if costs and len(measured) > 1:
        said.append(f"From {STATES[measured[0]]} to {STATES[measured[-1]]}: {'; '.join(costs)}.")
    return said


def _from_to(row: Row, places: Sequence[int]) -> str:
    first, last = row.cells[places[0]], row.cells[places[-1]]
    return f"{_with_set(first)} to {_with_set(last)}"


def _with_set(cell: Cell) -> str:
    return f"{cell.text} ({cell.of.replace('_', ' ')})" if cell.of else cell.text


def _suspect_sentences(result: PurifyResult | None) -> list[str]:
    if result is None:
        return []
    if not result.suspects and not result.fresh:
        return ["The search for hidden triggers left nothing to measure."]
    before, after = strong_before(result), strong_after(result)
    said = []
    if before:
        said.append(
            f"Words that break held-out answers of the received model more often than random words do: "
            f"{_words(before)}. A planted trigger may be among them, and so are weaknesses of any such model."
        )
    else:
        said.append("In the received model no words were found that break held-out answers more than random ones do.")
    if after:
        said.append(f"After the purification some still do: {_words(after)}.")
    elif before:
        said.append("After the purification none was found that does.")
    return said


def _words(suspects: Sequence[Suspect]) -> str:
    """The first few different ones, with the share of answers that each breaks."""
    strongest: dict[str, Suspect] = {}
    for each in suspects:
        if each.text not in strongest or each.broken.value > strongest[each.text].broken.value:
            strongest[each.text] = each
    ordered = sorted(strongest.values(), key=lambda suspect: -suspect.broken.value)
    named = [f"“{legible(s.text)}” ({rate_text(s.broken)}; random words {rate_text(s.control)})" for s in ordered]
    rest = f", and {len(named) - _FEW} more" if len(named) > _FEW else ""
    return ", ".join(named[:_FEW]) + rest


def _canary_sentence(result: PurifyResult | None) -> list[str]:
    if result is None:
        return []
    if result.method.get("method") == "retrain":
        return ["Nothing of the received adapter is in the new one, so that no canary was planted."]
    worst = worst_canary(result)
    if worst is None or worst.after is None:
        return ["What this purification removes is not known: no canary was planted that took hold."]
    back = f", and {rate_text(worst.rebound.asr)} after a further fine-tune" if worst.rebound else ""
    return [
        f"Of the backdoors that were planted in a copy and purified in the same way, the worst ({worst.kind}) fired in "
        f"{rate_text(worst.before.asr)} of requests before, {rate_text(worst.after.asr)} after{back}."
    ]


def _did(stage: StageRecord, result: PurifyResult | None) -> str:
    status = status_of(stage)
    if status == "skipped":
        return f"{stage.name}: left out{because(stage.reason)}."
    words = _DID.get(stage.name, "")
    if stage.name == "purify":
        words = _PURIFIED.get(result.method.get("method", "") if result else "", "The model was purified.")
    if status == "failed":
        why = sentence(reason_of(stage) or "No reason is given")
        return f"{stage.name}: failed. What it made is kept, and not to be relied on. {why}"
    if not words:
        return ""
    if not stage.controls:
        return f"{stage.name}: {words}"
    holding = sum(bool(control.holds) for control in stage.controls)
    undecided = sum(control.holds is None for control in stage.controls)
    rest = f", {undecided} undecided" if undecided else ""
    return f"{stage.name}: {words} {holding} of {len(stage.controls)} controls hold{rest}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
