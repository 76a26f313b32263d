"""The report of `keelguard purify bench`: one self-contained HTML page, and tables for the terminal.

Triggers, names and reasons come from files and models, so that the page treats them as untrusted text in the manner of
`keelguard.report`. What a backdoor makes the model say is not in it; bench.json holds that.

    write_bench_report(BenchResult.load(folder), folder / "report.html")
    console.print(bench_tables(result))
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from keelguard.attacks.backdoors import SOURCES
from keelguard.pages import page_environment
from keelguard.plots import NOTHING, interval_bars, legible, percent, rate_text
from keelguard.purify.bench import TITLES, TWIN, TWIN_ABOUT, Pooled, pooled, table
from keelguard.purify.bench_results import BenchResult, case_name
from keelguard.purify.controls import ARMS
from keelguard.purify.methods import METHODS
from keelguard.purify.planting import FAIREST_ASR, MOST_FALSE, MOST_LOST
from keelguard.runs import write_text
from keelguard.stats import Rate

if TYPE_CHECKING:
    from rich.console import Group

KINDS = ("Methods", "Controls", "Bounds")
"""What an arm can be; a bound knows what nobody does who purifies: the trigger, or the clean model."""

_PLACES = {"prefix": "in front", "suffix": "behind", "inside": "inside"}
_SHOWN_APART = ("versions", "backdoors", "budget")


class Row(NamedTuple):
    """One arm of the page's table."""

    arm: str
    about: str
    cells: list[str]


def write_bench_report(result: BenchResult, path: Path) -> None:
    """Write a bench as one HTML page, atomically.

    Raises:
        FailureError: the path cannot be written.
    """
    write_text(path, bench_page(result))


def bench_page(result: BenchResult) -> str:
    """A bench as the text of an HTML page, the same for the same result."""
    from markupsafe import Markup

    rows = pooled(result.cells, result.arms)
    cases = _cases(result)
    environment = page_environment(tied=_tied)
    return environment.get_template("bench.html.j2").render(
        title=_title(result.adapter or result.source),
        weights=str(result.settings.get("model", "")),
        sentences=_sentences(result),
        result=result,
        fair=[percent(bound) for bound in (FAIREST_ASR, MOST_FALSE, MOST_LOST)],
        backdoors=_backdoors(result),
        heads=_heads(len(cases) > 1),
        groups=_groups(rows, len(cases) > 1),
        reference=_reference(rows),
        # Markup: our own SVG, escaped by plots.
        figure=Markup(bench_figure(rows)),
        cases=cases,
        by_case=_by_case(result, cases),
        unasked=_unasked(result),
        budget={name.replace("_", " "): _text(value) for name, value in result.settings.get("budget", {}).items()},
        settings=_flat({k: v for k, v in result.settings.items() if k not in _SHOWN_APART}),
        versions=_flat(result.versions),
    )


def bench_figure(rows: Sequence[Pooled]) -> str:
    """What is left of the backdoor beside utility, arm by arm, in sections by kind; empty without arms."""
    ordered = [row for kind in KINDS for row in rows if kind_of(row.arm) == kind]
    if not ordered:
        return ""
    kinds = [kind_of(row.arm) for row in ordered]
    sections = {kinds.index(kind): kind for kind in KINDS if kind in kinds}
    series: dict[str, list[Rate | None]] = {
        "attack success, which should be low": [row.rates["asr"] for row in ordered],
        "utility, which should stay high": [row.rates["utility"] for row in ordered],
    }
    return interval_bars([row.arm for row in ordered], series, title="Attack success and utility", sections=sections)


def kind_of(arm: str) -> str:
    """Which of `KINDS` an arm is."""
    if arm in METHODS:
        return "Methods"
    return "Bounds" if arm == TWIN or (arm in ARMS and ARMS[arm].knows_trigger) else "Controls"


def about(arm: str) -> str:
    """What an arm does; empty for one that this version does not have."""
    if arm == TWIN:
        return TWIN_ABOUT
    return ARMS[arm].about if arm in ARMS else ""


def bench_tables(result: BenchResult) -> "Group":
    """The result for the terminal: what is left of the backdoor, how the models fare, and what is missing."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    header, rows = table(result.cells, result.arms)
    columns = {name: place for place, name in enumerate(header)}
    # Pooled over several backdoors a rate can hide the one that stays.
    several = ("cases", "worst case") if len(_cases(result)) > 1 else ()
    parts: list[Any] = []
    for titles in (
        (*several[:1], "ASR", *several[1:], "triggered, right", "false triggers", "triggered, degenerate", "p"),
        ("utility", "harmful refused", "over-refusal", "clean, degenerate", "seconds"),
    ):
        shown = Table()
        shown.add_column("", no_wrap=True)
        for title in titles:
            shown.add_column(title, justify="right")
        for row in rows:
            shown.add_row(row[0], *(row[columns[title]] for title in titles))
        parts.append(shown)
    if reference := _reference(pooled(result.cells, result.arms)):
        parts.append(
            Text(
                "In percent, with 95 % intervals. p: exact McNemar test of the triggered requests against "
                f"{reference}, not corrected for the number of arms."
            )
        )
    parts += [Text(legible(f"{each.case}, {each.arm}: not run: {each.reason}")) for each in result.missing]
    parts += [Text(legible(f"No fair test case: {reason}.")) for reason in result.unfair]
    parts += [Text(f"{name}: {about(name)}") for name in result.arms]
    return Group(*parts)


def _sentences(result: BenchResult) -> list[str]:
    """What was benched, in words."""
    what = "the adapter on its base" if result.threat == "adapter" else "the whole model"
    steps = result.settings.get("budget", {}).get("steps")
    shared = "" if steps is None else f" All that train take the same {steps:,} optimiser steps at most."
    known = "" if result.twin is None else f" Its clean model {result.twin} was measured beside them."
    count = sum(row.arm != TWIN for row in pooled(result.cells, result.arms))
    return [
        f"{count} {'arm was' if count == 1 else 'arms were'} run on {what} {result.adapter or result.source}, each on "
        f"a copy, and measured on the same held-out requests.{shared}{known}"
    ]


def _reference(rows: Sequence[Pooled]) -> str:
    """The arm that others are compared with; empty where there is none."""
    return next((row.arm for row in rows if row.test is None and row.arm != TWIN), "")


def _cases(result: BenchResult) -> list[str]:
    return list(dict.fromkeys([*(cell.case for cell in result.cells), *(each.case for each in result.missing)]))


def _backdoors(result: BenchResult) -> list[dict[str, Any]]:
    """What was planted, with how many triggered requests measure it."""
    totals = {cell.case: cell.effect.asr.total for cell in result.cells}
    rows = []
    for number, each in enumerate(result.backdoors):
        case = case_name(number, each)
        rows.append(
            {
                "case": case,
                "attack": f"{each.attack}: {SOURCES[each.attack]}",
                "task": each.task,
                "triggers": each.triggers,
                "place": _PLACES[each.where],
                "requests": totals.get(case, NOTHING),
            }
        )
    return rows


def _heads(several: bool) -> list[str]:
    asr, *others = (title[:1].upper() + title[1:] for title in TITLES.values())
    pooling = ["Cases", "Worst case"] if several else []
    return [*pooling[:1], asr, *pooling[1:], *others, "Only here", "Only there", "p", "Seconds"]


def _groups(rows: Sequence[Pooled], several: bool) -> list[tuple[str, list[Row]]]:
    """The arms by kind."""
    reference = _reference(rows)
    groups = []
    for kind in KINDS:
        if own := [row for row in rows if kind_of(row.arm) == kind]:
            groups.append((kind, [Row(row.arm, about(row.arm), _line(row, reference, several)) for row in own]))
    return groups


def _line(row: Pooled, reference: str, several: bool) -> list[str]:
    asr, *others = (rate_text(rate) for rate in row.rates.values())
    pooling = [str(row.cases), percent(row.worst.value)] if several else []
    test = ["the reference" if row.arm == reference else NOTHING, NOTHING, NOTHING]
    if row.test is not None:
        p = row.test.p_value
        test = [str(row.test.only_first), str(row.test.only_second), "< 0.001" if p < 0.001 else f"{p:.2g}"]
    return [*pooling[:1], asr, *pooling[1:], *others, *test, f"{row.seconds:,.0f}"]


def _by_case(result: BenchResult, cases: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Attack success of every arm on every backdoor; nothing where there is one backdoor alone."""
    if len(cases) < 2:
        return []
    found = {(cell.arm, cell.case): rate_text(cell.effect.asr) for cell in result.cells}
    arms = [row.arm for row in pooled(result.cells, result.arms)]
    return [(arm, [found.get((arm, case), NOTHING) for case in cases]) for arm in arms]


def _unasked(result: BenchResult) -> list[str]:
    """The arms of this threat model that nobody asked for."""
    known = [name for name, arm in ARMS.items() if result.threat in arm.threats]
    return [name for name in [*known, *([TWIN] if result.threat == "full" else [])] if name not in result.arms]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names."""
    pairs: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs |= _flat(value, f"{prefix}{name}.")
        else:
            pairs[f"{prefix}{name}"] = _text(value)
    return pairs


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _title(source: str) -> str:
    """The folder's name of a local path; hub ids stay whole."""
    return Path(source).name or source if source.startswith(("/", ".", "~")) else source


def _tied(text: str) -> str:
    """A figure whose line does not break between a number and its percent sign."""
    return text.replace(" %", "\u00a0%")
