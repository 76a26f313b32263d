"""A purification for the terminal: the figures of its page, and no text of a model's answer.

console.print(purify_tables(result, width=console.width))
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keelguard.plots import legible
from keelguard.purify.findings import (
    CANARY_STATES,
    STATES,
    canary_sentences,
    health_sentences,
    health_warnings,
    method_sentences,
    retrain_advice,
    suspect_sentences,
)
from keelguard.purify.page import (
    COMPARED_HEADS,
    Block,
    canary_blocks,
    compared_rows,
    health_lines,
    health_states,
    suspect_blocks,
)
from keelguard.purify.results import PurifyResult, claims

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# The commonest long cell is "99.5 % [97, 99.9]"; a longer one folds at its space.
_LABEL_WIDTH, _CELL_WIDTH = 30, 17


def purify_tables(result: PurifyResult, *, width: int = 100) -> "Group":
    """A purification for the terminal: what can be printed with one `console.print`.

    States of the model that do not fit beside one another in `width` characters go into further tables, since a
    figure that the terminal cuts off is worse than a longer summary. No text of a model's answer is in it.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(legible(line)) for line in method_sentences(result)]
    parts += [Text(legible(f"• {claim}"), style="bold") for claim in claims(result)]
    if advice := retrain_advice(result):
        parts.append(Text(legible("\n".join(advice)), style="yellow"))
    health = [Block("", [], health_lines(result))] if health_states(result) else []
    heads_of_health = [STATES[state] for state in health_states(result)]
    suspects = [block._replace(lines=block.lines[:2]) for block in suspect_blocks(result, reveal=False)]
    if rows := compared_rows(result):
        parts.append(_compared_table(rows, width))
    sections: list[tuple[str, list[str], list[Block], list[str], list[str]]] = [
        ("Held-out clean requests", heads_of_health, health, health_sentences(result), health_warnings(result)),
        (
            "Canary backdoors in a copy", list(CANARY_STATES.values()), canary_blocks(result),
            canary_sentences(result), [],
        ),
        (
            "Suspected triggers, held-out answers broken", list(STATES.values()), suspects,
            suspect_sentences(result), [],
        ),
    ]  # fmt: skip
    for title, heads, blocks, sentences, warnings in sections:
        parts += _tables(title, heads, blocks, width)
        parts += [Text(legible(f"Warning: {warning}"), style="yellow") for warning in warnings]
        parts += [Text(legible(sentence)) for sentence in sentences]
    parts.append(Text("In brackets the 95 % interval. Rebound: after a further clean fine-tune."))
    return Group(*parts)


def _compared_table(rows: Sequence[tuple[str, str, list[str], str]], width: int) -> "Table":
    """The ways to treat the model, a block each: beside one another they would be too wide."""
    from rich.table import Table
    from rich.text import Text

    table = Table(width=min(width, 100))
    table.add_column("Other methods and controls, on copies", overflow="fold")
    table.add_column("", justify="right", overflow="fold")
    for name, about, cells, why in rows:
        table.add_section()
        table.add_row(Text(legible(f"{name}: {about}"), style="bold"), Text(legible(why)))
        for label, cell in zip(COMPARED_HEADS, cells, strict=False):
            table.add_row(label, cell)
    return table


def _tables(title: str, heads: Sequence[str], blocks: Sequence[Block], width: int) -> "list[Table]":
    from rich.table import Table
    from rich.text import Text

    # Each column takes three characters more, for its border and padding.
    beside = max(1, (width - 1 - _LABEL_WIDTH - 3) // (_CELL_WIDTH + 3))
    tables = []
    for first in range(0, len(heads) if blocks else 0, beside):
        table = Table()
        table.add_column(title, width=_LABEL_WIDTH, overflow="fold")
        for head in heads[first : first + beside]:
            table.add_column(head, justify="right", overflow="fold")
        for block in blocks:
            table.add_section()
            if block.name:
                name = f"{block.name} – {block.mark}" if block.mark else block.name
                table.add_row(Text(legible(name), style="bold"))
            for line in block.lines:
                table.add_row(*(Text(legible(cell)) for cell in (line.label, *line.cells[first : first + beside])))
        tables.append(table)
    return tables
