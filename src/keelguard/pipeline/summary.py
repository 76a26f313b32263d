"""A gate's result in a few lines: as Markdown for a pull request, and as a table for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keelguard.pipeline.check import Check, Ruling
from keelguard.pipeline.markdown import code, plain
from keelguard.plots import legible

if TYPE_CHECKING:
    from rich.console import Group

    from keelguard.pipeline.gate_result import GateResult

_ORDER: tuple[Ruling, ...] = ("fail", "not evaluable", "pass")
_MARKS: Mapping[Ruling, str] = {"fail": "❌", "not evaluable": "❔", "pass": "✅"}
_COLOURS: Mapping[Ruling, str] = {"fail": "red", "not evaluable": "yellow", "pass": "green"}


def gate_summary(result: "GateResult") -> str:
    """The summary as Markdown: the verdict, what speaks against passing, and the rest folded away.

    Names and paths in it are taken for text; it holds nothing that a model wrote.
    """
    mark = "✅" if result.passed else "❌"
    parts = [
        f"## {mark} keelguard gate",
        f"**{plain(result.verdict)}**",
        f"{_side('Candidate', result.candidate)}  \n{_side('Reference', result.reference)}",
    ]
    against = [check for ruling in _ORDER[:2] for check in result.named(ruling)]
    if against:
        parts.append(_table(against))
    passed = result.named("pass")
    if passed:
        parts.append(f"<details><summary>{len(passed)} passed</summary>\n\n{_table(passed)}\n\n</details>")
    if result.notes:
        parts.append("\n".join(f"- {plain(note)}" for note in result.notes))
    alpha = result.policy["alpha"]
    parts.append(
        "A worsening passes where its 95 % interval ends within the margin, fails where it is shown "
        f"(p \\< {alpha:g}, Holm) and larger, and is not evaluable in between. All figures: `gate.json`."
    )
    return "\n\n".join(parts) + "\n"


def gate_table(result: "GateResult") -> "Group":
    """The same for the terminal, what speaks against passing first."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("", no_wrap=True)
    table.add_column("check", overflow="fold")
    table.add_column("why", overflow="fold")
    for ruling in _ORDER:
        for check in result.named(ruling):
            word = Text(ruling, style=_COLOURS[ruling])
            table.add_row(word, Text(legible(check.name)), Text(legible(check.reason)))
    verdict = Text(result.verdict, style="bold green" if result.passed else "bold red")
    return Group(table, *(Text(legible(note)) for note in result.notes), verdict)


def _side(role: str, side: Mapping[str, Any]) -> str:
    weights = f", weights {code(side['weights'][:16])}" if side["weights"] else ""
    return f"{role}: {code(side['name'])} ({plain(side['kind'])}{weights})"


def _table(checks: list[Check]) -> str:
    lines = ["| | check | why |", "| --- | --- | --- |"]
    lines += [f"| {_MARKS[c.ruling]} {c.ruling} | {plain(c.name)} | {plain(c.reason)} |" for c in checks]
    return "\n".join(lines)
