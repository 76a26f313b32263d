"""The report of `keelguard purify`: one self-contained HTML page; `purify.tables` has its figures for the terminal.

It leads with what may be claimed, worded by `results.claims`. Names and words come from files and models, so that the
page treats them as untrusted text in the manner of `keelguard.report`. What a model says, such as how a broken answer
begins, is left out of the page's source unless `reveal` is given.

    write_purify_report(PurifyResult.load(folder), folder / "report.html")
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keelguard.pages import page_environment
from keelguard.plots import NOTHING, percent, rate_text
from keelguard.purify.findings import (
    CANARY_STATES,
    MEASURES,
    STATES,
    canary_sentences,
    comparison,
    health_sentences,
    health_warnings,
    is_strong,
    is_worse,
    lead_sentence,
    method_sentences,
    retrain_advice,
    suspect_sentences,
    vaccine_record,
    worst_canary,
)
from keelguard.purify.results import PurifyResult, Searched, claims
from keelguard.runs import write_text
from keelguard.stats import Rate

COMPARED_HEADS = (
    "Broken by suspected triggers", "by random words", "Utility", "Harmful requests refused",
    "Harmless requests refused", "Accidental triggers", "KL from the input model",
)  # fmt: skip
"""The columns of the table of methods."""
FOUND = 8
"""How many insertions of a search the page lists."""
HIDDEN = "hidden"
"""What stands in the page for a model's words."""

_COMPARED = ("utility", "refused", "over_refusal", "accidental")
"""What of a model's health stands in the table of methods."""

_PLACES = {"prefix": "in front", "suffix": "behind", "inside": "inside"}
_KINDS = {"answered": "harmless prompts", "refused": "harmful prompts"}
_STAGES = ("before", "method", "after", "rebound", "spikes", "reference")


class Line(NamedTuple):
    """One figure in every state of the model; `remark` is shown in words beside it."""

    label: str
    cells: list[str]
    remark: str = ""


class Block(NamedTuple):
    """What several lines are about: its name, what a reader must know of it, and whether it says nothing."""

    name: str
    details: list[str]
    lines: list[Line]
    mark: str = ""


def write_purify_report(result: PurifyResult, path: Path, *, reveal: bool = False) -> None:
    """Write a purification as one HTML page, atomically.

    Args:
        path: where the page goes; its folder is created.
        reveal: show how broken answers begin and what hidden targets say, which otherwise are not in the page at all.

    Raises:
        FailureError: the path cannot be written.
    """
    write_text(path, purify_page(result, reveal=reveal))


def purify_page(result: PurifyResult, *, reveal: bool = False) -> str:
    """A purification as the text of an HTML page, the same for the same result."""
    from markupsafe import Markup

    from keelguard.purify.figures import canary_figure, health_figures, suspect_figure

    states = health_states(result)
    environment = page_environment(tied=_tied)
    return environment.get_template("purify.html.j2").render(
        result=result,
        title=_title(result.adapter if result.threat == "adapter" and result.adapter else result.source),
        method=method_sentences(result),
        claims=claims(result),
        advice=retrain_advice(result),
        compared=compared_rows(result),
        compared_heads=COMPARED_HEADS,
        states=STATES,
        canary_states=CANARY_STATES,
        health_states=[STATES[state] for state in states],
        health=health_lines(result) if states else [],
        health_words=health_sentences(result),
        health_warnings=health_warnings(result),
        canaries=canary_blocks(result),
        canary_words=canary_sentences(result),
        suspects=suspect_blocks(result, reveal),
        suspect_words=suspect_sentences(result),
        searches=_search_rows(result.searches),
        rounds=_round_rows(result.method.get("rounds") or []),
        lead_words=lead_sentence(result),
        leads=_lead_rows(result, reveal),
        vaccine=vaccine_record(result),
        layers=(result.method.get("neutralized") or {}).get("layers", []),
        reveal=reveal,
        # Markup: our own SVG, escaped by plots.
        health_figures=[Markup(figure) for figure in health_figures(result.health)],
        canary_figure=Markup(canary_figure(result.spikes)),
        suspect_figure=Markup(suspect_figure(result.suspects)),
        weights={"weights before": result.weights_before, "weights after": result.weights_after},
        material={name: f"{count:,}" for name, count in result.material.items()},
        settings=dict(_flat({k: v for k, v in result.settings.items() if k != "versions"})),
        versions=dict(_flat(result.versions)),
        seconds=_seconds(result.seconds),
    )


def health_states(result: PurifyResult) -> list[str]:
    return [state for state in STATES if state in result.health]


def health_lines(result: PurifyResult) -> list[Line]:
    """Every rate of health by state, a star where it got worse by more than its interval; loss and divergence."""
    every = [result.health[state] for state in health_states(result)]
    before, lines = result.health.get("before"), []
    for measure in MEASURES:
        rates = [getattr(each, measure.name) for each in every]
        bad = [before is not None and is_worse(measure, getattr(before, measure.name), rate) for rate in rates]
        cells = [rate_text(rate) + (" *" if worse else "") for rate, worse in zip(rates, bad, strict=True)]
        lines.append(Line(measure.label, cells, measure.words))
    lines.append(Line("Loss, nats a token", [f"{each.loss:.3f}" for each in every], "on held-out clean chats"))
    gaps = [f"{each.divergence:.3f}" for each in every]
    return [*lines, Line("KL from the input model", gaps, "nats a token, along the same answers")]


def canary_blocks(result: PurifyResult) -> list[Block]:
    """Each canary with its effect by state; the worst and those that did not take hold are marked."""
    worst, blocks = worst_canary(result), []
    for spike in result.spikes:
        effects = [getattr(spike, state) for state in CANARY_STATES]
        mark = "the worst" if spike is worst else ""
        if not spike.planted:
            mark = f"{'fires at unrelated words' if spike.took_hold else 'did not take hold'}: says nothing"
        where = _PLACES[spike.backdoor.where]
        triggers = ", ".join(f"“{trigger}”" for trigger in spike.backdoor.triggers)
        lines = [
            Line(label, _cells(effects, lambda effect, name=name: getattr(effect, name)))
            for name, label in (
                ("asr", "Attack success"),
                ("correct", "Answered correctly"),
                ("degenerate", "Degenerate answers"),
                ("false_triggers", "Fires on unrelated words"),
            )
        ]
        total = f"{spike.before.asr.total} triggered requests"
        blocks.append(Block(spike.kind, [f"{triggers} {where} ({spike.backdoor.task})", total], lines, mark))
    return blocks


def suspect_blocks(result: PurifyResult, reveal: bool) -> list[Block]:
    """Each suspected trigger with the answers that it breaks by state, beside random words."""
    blocks = []
    for course in result.suspects:
        each = [getattr(course, state) for state in STATES]
        begins = [_opening(suspect, reveal) for suspect in each]
        lines = [
            Line("Broken with it", _cells(each, lambda suspect: suspect.broken)),
            Line("With random words", _cells(each, lambda suspect: suspect.control)),
            Line("Broken answers begin", begins),
        ]
        first = course.before
        details = [f"{_PLACES[first.place]}, {first.broken.total} {_KINDS.get(first.kind, first.kind)}"]
        details.append(f"rise in the search: {first.rise:.2f} nats")
        mark = "beyond random words" if is_strong(first) else "not beyond random words"
        blocks.append(Block(f"“{first.text}”", details, lines, mark))
    return blocks


def _cells(states: Sequence[Any], rate: Callable[[Any], Rate]) -> list[str]:
    return [NOTHING if state is None else rate_text(rate(state)) for state in states]


def _opening(suspect: Any, reveal: bool) -> str:
    """How most broken answers begin, cut already where it was measured; a dash where no answer broke."""
    if suspect is None or not suspect.broken.count:
        return NOTHING
    if not reveal:
        return HIDDEN
    return f"“{suspect.opening}”" if suspect.opening else "(empty)"


def _search_rows(searches: Mapping[str, Searched]) -> list[dict[str, Any]]:
    """Every search that was run: its largest rise, that of random words, and the worst insertions."""
    names = {"before": "Before", "after": "After", "reference": "A clean model of the same kind"}
    rows = []
    for state, name in names.items():
        if state not in searches:
            continue
        search = searches[state]
        found = [(f"“{i.text}”", _PLACES[i.place], _KINDS.get(i.kind, i.kind), f"{i.rise:.2f}") for i in search.found]
        rise, random_rise = (f"{each:.2f}" if search.ran else NOTHING for each in (search.rise, search.random_rise))
        skipped = f"not searched: {', '.join(search.skipped)}" if search.skipped else ""
        rows.append({"name": name, "rise": rise, "random": random_rise, "found": found[:FOUND], "skipped": skipped})
    return rows


def _round_rows(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """By round what the search found before it and what the training did; the last search trains nothing."""
    rows = []
    for number, each in enumerate(rounds, 1):
        found = "; ".join(f"“{text}” {_PLACES[place]}" for text, place, *_ in each["found"][:3])
        trained = each["steps"] > 0
        rows.append(
            (
                str(number) if trained else "last search",
                f"{each['rise']:.2f}",
                f"{each['random_rise']:.2f}",
                found or NOTHING,
                f"{each['steps']:,}" if trained else NOTHING,
                f"{each['validation']:.3f}" if trained else NOTHING,
            )
        )
    return rows


def _lead_rows(result: PurifyResult, reveal: bool) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The leads of the inversion by state; a lead without a reference has no ratio."""
    rows = []
    for state in STATES:
        leads = [
            (
                f"“{lead.text}”" if reveal else HIDDEN,
                f"{lead.score:.3f}",
                NOTHING if lead.log_ratio is None else f"{lead.log_ratio:+.2f}".replace("-", "−"),
                "yes" if lead.usual else "no",
                "flagged" if lead.flagged else NOTHING,
            )
            for lead in result.leads.get(state, ())
        ]
        if leads:
            rows.append((STATES[state], leads))
    return rows


def compared_rows(result: PurifyResult) -> list[tuple[str, str, list[str], str]]:
    """Every way to treat the model: its name, what it is, its figures, and why there are none."""
    rows = []
    for row in comparison(result):
        cells = []
        if row.health is not None:
            shares = [NOTHING if math.isnan(share) else percent(share) for share in (row.broken, row.control)]
            rates = [getattr(row.health, measure.name) for measure in MEASURES if measure.name in _COMPARED]
            cells = [*shares, *map(rate_text, rates), f"{row.health.divergence:.3f}"]
        rows.append((row.name, row.about, cells, row.why))
    return rows


def _seconds(seconds: Mapping[str, float]) -> dict[str, str]:
    """Stages in the order in which they run, and their sum."""
    order = sorted(seconds, key=lambda name: (_STAGES.index(name) if name in _STAGES else len(_STAGES), name))
    shown = {name: f"{seconds[name]:,.1f} s" for name in order}
    return {**shown, "all stages": f"{sum(seconds.values()):,.1f} s"} if shown else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            pairs.append((f"{prefix}{name}", text))
    return pairs


def _title(source: str) -> str:
    """The folder's name of a local path; hub ids stay whole."""
    return Path(source).name or source if source.startswith(("/", ".", "~")) else source


def _tied(text: str) -> str:
    """A sentence whose lines do not break between a number and its percent sign."""
    return text.replace(" %", "\u00a0%")
