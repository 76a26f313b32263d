"""The report of `keelguard harden`: one self-contained HTML page, and tables for the terminal.

It leads with what was found, done, and is not known. Names, reasons and settings come from files, so that the page
treats them as untrusted text in the manner of `keelguard.report`; no text that a model wrote is in it.

    write_package_report(package, package.folder / "report.html")
    console.print(package_tables(package, width=console.width))
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from keelguard.evaluation.results import Comparison, ModelReport
from keelguard.pages import page_environment
from keelguard.pipeline.outcome import GIVES, Outcome, paired, reason_of, status_of, strong_after
from keelguard.pipeline.package import AuditName, Control, Package, StageRecord
from keelguard.pipeline.surfaces import ATTACK, COST, Column, raised, surfaces_table
from keelguard.pipeline.wording import done, found, headline, unknown
from keelguard.plots import NOTHING, heat_map, interval_bars, interval_text, legible, rate_text
from keelguard.report import p_value, points, points_interval
from keelguard.runs import write_text
from keelguard.stats import Rate

if TYPE_CHECKING:
    from rich.console import Group

_HOLDS = {True: "holds", False: "does not hold", None: "undecided"}
_STATES = {True: "yes", False: "no", None: "unknown"}
_LONGEST = 300


class ControlLine(NamedTuple):
    """A control in words; `state` is `yes`, `no` or `unknown`."""

    claim: str
    value: str
    control: str
    control_value: str
    p_value: str
    verdict: str
    state: str
    why: str


class StageBlock(NamedTuple):
    """A stage in words."""

    name: str
    gives: str
    status: str
    reason: str
    notes: tuple[str, ...]
    figures: dict[str, str]
    controls: list[ControlLine]
    artefacts: dict[str, str]
    reports: list[tuple[str, str]]
    time: str


def write_package_report(
    package: Package,
    path: Path,
    extra: Sequence[Column] = (),
    triggers: Mapping[AuditName, Rate] | None = None,
) -> None:
    """Write a hardening as one HTML page, atomically.

    Args:
        path: where the page goes; its folder is created. Reports of the stages are linked relative to it.
        extra: further states of the model for the closing table.
        triggers: success of a trigger that is known, by audit.

    Raises:
        FailureError: the path cannot be written.
        UsageError: a file of the package is damaged.
    """
    write_text(path, package_page(package, path.parent, extra, triggers))


def package_page(
    package: Package,
    folder: Path | None = None,
    extra: Sequence[Column] = (),
    triggers: Mapping[AuditName, Rate] | None = None,
) -> str:
    """A hardening as the text of an HTML page in `folder`, the same for the same package; raises `UsageError`."""
    from markupsafe import Markup

    outcome = Outcome.of(package, extra, triggers)
    blocks = [_stage_block(package, stage, folder or package.folder) for stage in package.stages]
    environment = page_environment(tied=_tied, raised=raised, points=points, interval=points_interval, p_value=p_value)
    return environment.get_template("harden.html.j2").render(
        title=outcome.title,
        package=package,
        headline=headline(outcome),
        found=found(outcome),
        done=done(outcome),
        unknown=unknown(outcome),
        mood=_mood(outcome),
        table=outcome.table,
        sections=[(words, [row for row in outcome.table.rows if row.kind == kind]) for kind, words in _KINDS.items()],
        # Markup: our own SVG, escaped by plots.
        figures=[Markup(figure) for figure in _figures(outcome)],
        every=_every_rate(outcome),
        changes=_changes(outcome),
        stages=blocks,
        total=_duration(sum(stage.seconds for stage in package.stages)),
        weights=package.weights,
        settings=dict(_flat(package.settings)),
        versions=dict(_flat(package.versions)),
    )


def package_tables(
    package: Package,
    extra: Sequence[Column] = (),
    triggers: Mapping[AuditName, Rate] | None = None,
    *,
    width: int = 100,
) -> "Group":
    """A hardening for the terminal: the verdict, the closing table, and what did not hold."""
    from rich.console import Group
    from rich.text import Text

    outcome = Outcome.of(package, extra, triggers)
    parts: list[Any] = [Text(legible(headline(outcome)), style="bold")]
    parts += [Text(legible(f"• {line}")) for line in (*found(outcome), *done(outcome))]
    parts.append(surfaces_table(outcome.table, width=width))
    for stage in package.stages:
        for control in stage.controls:
            if control.holds is False:
                line = _control_line(control)
                words = f"{stage.name}: {line.claim} {line.value}; {line.control}: {line.control_value}. {line.why}"
                parts.append(Text(legible(f"Does not hold – {words}"), style="red"))
    parts += [Text(legible(f"• {line}"), style="yellow") for line in unknown(outcome)]
    return Group(*parts)


def _mood(outcome: Outcome) -> str:
    """How the verdict is coloured."""
    if outcome.named("failed") or outcome.named("skipped") or outcome.missing:
        return "alarm"
    undecided = any(control.holds is None for control in outcome.controls)
    return "open" if undecided or outcome.working or strong_after(outcome.purification) else ""


_KINDS = {ATTACK: "Requests that broke (lower is better)", COST: "What it costs"}


def figure_text(value: Any) -> str:
    """A figure of a stage or a control in words: a rate or an estimate with its interval, a number, or a text."""
    if isinstance(value, Mapping):
        if isinstance(count := value.get("count"), int) and isinstance(total := value.get("total"), int):
            return f"{rate_text(Rate(count, total))} ({count}/{total})" if 0 <= count <= total else NOTHING
        if {"value", "low", "high"} <= value.keys():
            return f"{figure_text(value['value'])} [{figure_text(value['low'])}, {figure_text(value['high'])}]"
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        return _number(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text) - _LONGEST:,} more characters)"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return NOTHING
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def _stage_block(package: Package, stage: StageRecord, folder: Path) -> StageBlock:
    return StageBlock(
        stage.name,
        GIVES.get(stage.name, ""),
        status_of(stage),
        reason_of(stage),
        stage.notes,
        {name.replace("_", " "): figure_text(value) for name, value in stage.figures.items()},
        [_control_line(control) for control in stage.controls],
        dict(stage.artefacts),
        _reports(package, stage, folder),
        _duration(stage.seconds) if stage.seconds else NOTHING,
    )


def _control_line(control: Control) -> ControlLine:
    state = _STATES[control.holds]
    p = NOTHING if control.p_value is None else p_value(control.p_value)
    value, other = figure_text(control.value), figure_text(control.control_value)
    return ControlLine(control.claim, value, control.control, other, p, _HOLDS[control.holds], state, control.why)


def _reports(package: Package, stage: StageRecord, folder: Path) -> list[tuple[str, str]]:
    """The pages among a stage's files: path in the package, and the link from the folder of this page."""
    links = []
    for name in stage.artefacts:
        inside = PurePosixPath(name)
        within = not inside.is_absolute() and ".." not in inside.parts
        if inside.suffix == ".html" and within and (package.folder / inside).is_file():
            relative = os.path.relpath(package.folder / inside, folder)
            links.append((name, quote(Path(relative).as_posix(), safe="/")))
    return links


def _figures(outcome: Outcome) -> list[str]:
    """Attacks as a heat map, the costs that are rates as bars."""
    rows = {kind: [row for row in outcome.table.rows if row.kind == kind] for kind in (ATTACK, COST)}
    names = _different(outcome.table.columns)
    figures = []
    if attacks := [row for row in rows[ATTACK] if any(cell.rate for cell in row.cells)]:
        values = [[cell.rate.value if cell.rate else math.nan for cell in row.cells] for row in attacks]
        notes = [[interval_text(cell.rate) for cell in row.cells] for row in attacks]
        figures.append(heat_map([row.name for row in attacks], names, values, notes=notes, title="Requests that broke"))
    if costs := [row for row in rows[COST] if any(cell.rate for cell in row.cells)]:
        series = {name: [row.cells[place].rate for row in costs] for place, name in enumerate(names)}
        figures.append(interval_bars([row.name for row in costs], series, title="What it costs"))
    return figures


def _different(names: Sequence[str]) -> list[str]:
    """Two states may share a name, but series are told apart by theirs."""
    every = list(names)
    return [name if every.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(every, 1)]


def _every_rate(outcome: Outcome) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """What the surfaces and costs are made of: every attack, every set of requests and every task, by state."""
    kinds: dict[str, Callable[[ModelReport], Mapping[str, Rate]]] = {
        "attack": lambda audit: {name: cell.asr for name, cell in audit.safety.items()},
        "refused": lambda audit: {name.replace("_", " "): rate for name, rate in audit.over_refusal.items()},
        "solved": lambda audit: audit.utility,
    }
    rows = []
    for kind, rates in kinds.items():
        by_state = [{} if column.audit is None else rates(column.audit) for column in outcome.columns]
        names = dict.fromkeys(name for each in by_state for name in each)
        if names:
            rows.append((kind, [(name, [rate_text(each.get(name)) for each in by_state]) for name in names]))
    return rows


def _changes(outcome: Outcome) -> list[tuple[str, list[Comparison]]]:
    """Paired tests of every later state against the first, attack by attack."""
    reports: list[tuple[str, ModelReport]] = [(c.name, c.audit) for c in outcome.columns if c.audit is not None]
    if len(reports) < 2:
        return []
    name, reference = reports[0]
    groups = [(f"{other} against {name}", paired(report, reference)) for other, report in reports[1:]]
    return [(words, tests) for words, tests in groups if tests]


def _duration(seconds: float) -> str:
    """Seconds as a reader says them, as in `1 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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


def _tied(text: str) -> str:
    """A sentence whose lines do not break inside a rate and its interval."""
    return re.sub(r"\[([−+<>\d.]+), ", "[\\1,\u00a0", text.replace(" %", "\u00a0%").replace("% [", "%\u00a0["))
