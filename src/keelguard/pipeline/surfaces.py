"""The closing table of a hardening: attack surfaces and costs in rows, states of the model in columns.

    table = surfaces([Column("received", before), Column("guarded", after, cost={CHECKS: 0.4})], attacks=result.attacks)
    console.print(surfaces_table(table, width=console.width))
    print(surfaces_markdown(table))

Several attacks of one surface are shown by the most successful, which a note names for every column. A maximum over
several rates reads higher than any one rate measured again would: compare states attack by attack for a test.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from keelguard.attacks import ATTACKS
from keelguard.evaluation.results import AttackInfo, ModelReport
from keelguard.pipeline.markdown import plain
from keelguard.plots import NOTHING, legible, rate_text
from keelguard.stats import Rate

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable

CHECKS, TIME = "checks per token", "seconds, relative"
"""The costs that a hardening measures; `Column.cost` may hold others."""
TRIGGER, BENIGN_TUNE, OTHER_TUNE = "trigger", "benign fine-tune", "other fine-tunes"
OVER_REFUSAL, UTILITY, DEGENERATE = "over-refusal", "utility", "degenerate answers"
ATTACK, COST = "attack", "cost"

_KINDS: Mapping[str, tuple[str, ...]] = {
    "direct": ("direct",),
    "nested": ("nested", "role_play", "persuasion"),
    "prefill": ("prefill", "prefill_answer"),
    "affixes": ("affix", "characters", "payload_split"),
    "sampling": ("sampling",),
}
SURFACES = (*_KINDS, TRIGGER, BENIGN_TUNE)
"""The surfaces in the order of the rows; further attacks follow under their own names."""

_SUMMARIES = {made.summary: kind for kind, made in ATTACKS.items()}
_LABEL_WIDTH, _CELL_WIDTH = 20, 17


@dataclass(frozen=True)
class Column:
    """A state of the model.

    Attributes:
        audit: what was measured of it, or None.
        trigger: success of a known trigger, where there is one.
        cost: numbers, or texts, by name: `CHECKS`, `TIME` and whatever else was measured.
        why: why there is no audit.
    """

    name: str
    audit: ModelReport | None = None
    trigger: Rate | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Cell:
    """One figure: `rate`, or `value` where it is none, or neither where nothing was measured.

    Attributes:
        of: the attack or the set of requests that is shown, where a row stands for several.
        note: the number of the footnote that says why there is no figure; 0 without one.
    """

    rate: Rate | None = None
    value: float | str | None = None
    of: str = ""
    note: int = 0

    @property
    def text(self) -> str:
        """The figure in words, as in `4 % [1, 10]`; a dash where there is none."""
        if self.rate is not None:
            return rate_text(self.rate)
        if isinstance(self.value, str):
            return self.value or NOTHING
        return NOTHING if self.value is None or not math.isfinite(self.value) else f"{self.value:.3g}"


@dataclass(frozen=True)
class Row:
    """What is measured in every state.

    Attributes:
        kind: `ATTACK` or `COST`.
        better: "low", "high", or "" where neither is.
        note: the number of its own footnote; 0 without one.
    """

    name: str
    kind: str
    better: str
    cells: tuple[Cell, ...]
    note: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns; note number n is `notes[n - 1]`."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The table as a JSON object, rates with their intervals."""
        rows = [{**vars(row), "cells": [_cell_json(cell) for cell in row.cells]} for row in self.rows]
        return {"columns": list(self.columns), "rows": rows, "notes": list(self.notes)}


def surface_of(attack: AttackInfo | str) -> str:
    """The surface of an attack, by what it does where that is told, else by its name; unknown ones are their own."""
    name = attack if isinstance(attack, str) else attack.name
    words = name.lower().replace("_", " ").replace("-", " ")
    trained = "fine tun" in words or "finetun" in words
    kind = ""
    if not isinstance(attack, str):
        kind = _SUMMARIES.get(attack.summary, "")
        trained = trained or "chats_sha256" in attack.settings
    if trained:
        return BENIGN_TUNE if "benign" in words else OTHER_TUNE
    for surface, kinds in _KINDS.items():
        if kind in kinds if kind else any(words.startswith(each.replace("_", " ")) for each in kinds):
            return surface
    return f"{name} (attack)" if name in (*SURFACES, OTHER_TUNE) else name


def surfaces(columns: Sequence[Column], attacks: Sequence[AttackInfo] = ()) -> Table:
    """Lay out what was measured.

    Args:
        attacks: what the audits say of their attacks; without it attacks are sorted by their names.

    Raises:
        ValueError: there are no columns.
    """
    if not columns:
        raise ValueError("a table of surfaces needs at least one column")
    notes = _Notes()
    known = {attack.name: surface_of(attack) for attack in attacks}
    names = dict.fromkeys(name for column in columns if column.audit for name in column.audit.safety)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(known.get(name) or surface_of(name), []).append(name)
    order = {surface: place for place, surface in enumerate(SURFACES)}
    rows = []
    for surface in sorted({*groups, TRIGGER}, key=lambda each: order.get(each, len(order))):
        if surface == TRIGGER:
            if any(column.trigger is not None for column in columns):
                rows.append(_trigger_row(columns, notes))
        else:
            rows.append(_worst_row(surface, ATTACK, groups[surface], columns, _asr, notes))
    rows += _cost_rows(columns, notes)
    if absent := [each for each in SURFACES if each not in {row.name for row in rows}]:
        notes.add(f"Not tried in any state, so that nothing is known of it: {', '.join(absent)}.")
    return Table(tuple(column.name for column in columns), tuple(rows), tuple(notes.texts))


def worst_attack(table: Table, column: int) -> tuple[Row, Cell] | None:
    """The surface that succeeds most in a state, fine-tunes and triggers apart; None where none was measured."""
    tried = [
        (row, row.cells[column])
        for row in table.rows
        if row.kind == ATTACK and row.name not in (TRIGGER, BENIGN_TUNE, OTHER_TUNE)
    ]
    measured = [(row, cell) for row, cell in tried if cell.rate is not None]
    return max(measured, key=lambda each: each[1].rate.value if each[1].rate else 0.0, default=None)


def surfaces_table(table: Table, *, width: int = 100) -> "Group":
    """The table for the terminal; states that do not fit beside one another go into further tables."""
    from rich.console import Group
    from rich.text import Text

    # Each column takes three characters more, for its border and padding.
    beside = max(1, (width - 1 - _LABEL_WIDTH - 3) // (_CELL_WIDTH + 3))
    starts = range(0, len(table.columns), beside)
    lines = [f"{raised(number)} {note}" for number, note in enumerate(table.notes, 1)]
    lines.append("Attacks: the share of requests that broke. In brackets the 95 % interval.")
    return Group(*(_rich(table, slice(s, s + beside)) for s in starts), *(Text(legible(line)) for line in lines))


def surfaces_markdown(table: Table) -> str:
    """The table as Markdown, its notes below; every name in it is taken for text."""
    lines = [f"| | {' | '.join(plain(name) for name in table.columns)} |", f"|---|{'---:|' * len(table.columns)}"]
    for row in table.rows:
        cells = [f"{cell.text if cell.rate else plain(cell.text)}{raised(cell.note)}" for cell in row.cells]
        lines.append(f"| {plain(row.name)}{raised(row.note)} | {' | '.join(cells)} |")
    lines += ["", "Attacks: the share of requests that broke. In brackets the 95 % interval."]
    for number, note in enumerate(table.notes, 1):
        lines += ["", f"{raised(number)} {plain(note)}"]
    return "\n".join(lines) + "\n"


def raised(number: int) -> str:
    """A footnote's number; empty for 0."""
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) if number else ""


class _Notes:
    """Footnotes by their numbers, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


Rates = Callable[[ModelReport], Mapping[str, Rate]]


def _asr(audit: ModelReport) -> Mapping[str, Rate]:
    return {name: cell.asr for name, cell in audit.safety.items()}


def _worst_row(
    name: str, kind: str, members: Iterable[str], columns: Sequence[Column], rates: Rates, notes: _Notes
) -> Row:
    """A row of the highest of some rates; a note says which it is, and where not all were measured."""
    members, cells = list(members), []
    for column in columns:
        measured = {} if column.audit is None else rates(column.audit)
        found = {each: measured[each] for each in members if each in measured and measured[each].total}
        if found:
            worst = max(found, key=lambda each: found[each].value)
            cells.append(Cell(found[worst], of=worst if len(members) > 1 else ""))
        else:
            asked = any(each in measured for each in members)
            cells.append(Cell(note=notes.add(_reason(column, "No request could be measured" if asked else ""))))
    if len(members) == 1:
        return Row(name, kind, "low", tuple(cells))
    shown = [f"{c.name}: {cell.of}" for c, cell in zip(columns, cells, strict=True) if cell.of]
    if len(same := {cell.of for cell in cells if cell.of}) == 1:
        shown = [f"{same.pop()} in every state"]
    which = f" ({'; '.join(shown)})" if shown else ""
    text = f"{name.capitalize()}: the highest of {', '.join(members)}{which}."
    for column, cell in zip(columns, cells, strict=True):
        lacking = [each for each in members if cell.of and column.audit and each not in rates(column.audit)]
        if lacking:
            text += f" In {column.name} these were not tried: {', '.join(lacking)}."
    return Row(name, kind, "low", tuple(cells), notes.add(text.replace("_", " ")))


def _trigger_row(columns: Sequence[Column], notes: _Notes) -> Row:
    cells = [
        Cell(column.trigger)
        if column.trigger is not None and column.trigger.total
        else Cell(note=notes.add("The trigger was not tried in this state."))
        for column in columns
    ]
    return Row(TRIGGER, ATTACK, "low", tuple(cells))


def _cost_rows(columns: Sequence[Column], notes: _Notes) -> list[Row]:
    """Over-refusal by the worst set, utility over all tasks, degenerate answers, and what else was measured."""
    audits = [column.audit for column in columns if column.audit is not None]
    rows = []
    if sets := dict.fromkeys(each for audit in audits for each in audit.over_refusal):
        rows.append(_worst_row(OVER_REFUSAL, COST, sets, columns, lambda audit: audit.over_refusal, notes))
    if any(audit.utility for audit in audits):
        row = _single_row(UTILITY, "high", columns, lambda audit: pooled(audit.utility.values()), notes)
        tasks = dict.fromkeys(each for audit in audits for each in audit.utility)
        uneven = [c.name for c in columns if c.audit and c.audit.utility and set(c.audit.utility) != set(tasks)]
        text = f"Utility: tasks solved, of {len(tasks)} kinds together." if len(tasks) > 1 or uneven else ""
        text += f" Not all were asked in {', '.join(uneven)}." if uneven else ""
        rows.append(Row(row.name, row.kind, row.better, row.cells, notes.add(text) if text else 0))
    if any(audit.degenerate.total for audit in audits):
        rows.append(_single_row(DEGENERATE, "low", columns, lambda audit: audit.degenerate, notes))
    for name in dict.fromkeys(name for column in columns for name in column.cost):
        values = [column.cost.get(name) for column in columns]
        cells = [Cell(note=notes.add("Not measured in this state.")) if v is None else Cell(value=v) for v in values]
        rows.append(Row(name, COST, "low" if name in (CHECKS, TIME) else "", tuple(cells)))
    return rows


def _single_row(
    name: str, better: str, columns: Sequence[Column], rate: Callable[[ModelReport], Rate], notes: _Notes
) -> Row:
    cells = []
    for column in columns:
        found = None if column.audit is None else rate(column.audit)
        cells.append(Cell(found) if found is not None and found.total else Cell(note=notes.add(_reason(column))))
    return Row(name, COST, better, tuple(cells))


def pooled(rates: Iterable[Rate]) -> Rate:
    """Several rates as one, such as a utility over all tasks."""
    every = list(rates)
    return Rate(sum(rate.count for rate in every), sum(rate.total for rate in every))


def _reason(column: Column, why: str = "") -> str:
    if column.audit is None:
        return f"{column.name}: {column.why or 'this state was not audited'}."
    return f"{why or 'The audit of this state did not ask this'}."


def _cell_json(cell: Cell) -> dict[str, Any]:
    value = cell.value if not isinstance(cell.value, float) or math.isfinite(cell.value) else None
    return {"rate": cell.rate and cell.rate.to_json(), "value": value, "of": cell.of, "note": cell.note}


def _rich(table: Table, columns: slice) -> "RichTable":
    """Some of the columns. Text objects, since names may look like rich markup."""
    from rich.table import Table as RichTable
    from rich.text import Text

    found = RichTable()
    found.add_column("", width=_LABEL_WIDTH, overflow="fold")
    for name in table.columns[columns]:
        found.add_column(Text(legible(name)), justify="right", min_width=_CELL_WIDTH, overflow="fold")
    previous = ""
    for row in table.rows:
        if previous and row.kind != previous:
            found.add_section()
        previous = row.kind
        cells = (Text(legible(f"{cell.text}{raised(cell.note)}")) for cell in row.cells[columns])
        found.add_row(Text(legible(f"{row.name}{raised(row.note)}")), *cells)
    return found
