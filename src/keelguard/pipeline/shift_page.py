"""The report of `keelguard shift`: one self-contained HTML page, and tables for the terminal.

write_shift_report(Path("report.html"), shift)
print_rows(drift_rows(shift))
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keelguard.pages import page_environment
from keelguard.pipeline.drift import Drift
from keelguard.pipeline.shift_metrics import METRICS
from keelguard.pipeline.shift_results import Condition, Shift
from keelguard.plots import NOTHING, legible, rate_text
from keelguard.runs import write_text

WORDS = {
    "importance": "importance of units",
    "scu": "safety-critical units",
    "groups": "groups of units",
    "direction": "reasoning direction",
    "decision": "refuse-or-comply margin",
    "calibration": "calibration on queries",
    "recall": "harmful queries flagged",
    "false_alarms": "benign queries flagged",
    "answer_calibration": "calibration along answers",
}
"""The metrics as a table names them."""


def write_shift_report(path: Path, shift: Shift) -> None:
    """Write the page, atomically.

    Raises:
        FailureError: the path cannot be written.
    """
    write_text(path, shift_page(shift))


def shift_page(shift: Shift) -> str:
    """The measurement as the text of an HTML page, the same for the same result."""
    from markupsafe import Markup

    from keelguard.pipeline.shift_figure import layers_figure
    from keelguard.units.figures import transfer_figure

    # Markup: our own SVG, escaped by plots.
    return page_environment().get_template("shift.html.j2").render(
        shift=shift,
        summary=shift_sentences(shift),
        left_out=shift.left_out,
        conditions=condition_rows(shift),
        pairs=[
            (pair.name, [(WORDS[name], METRICS[name], *_cells(each)) for name, each in _of(shift, pair.name).items()])
            for pair in shift.pairs
        ],
        overlaps=_overlap_rows(shift),
        layers=Markup(layers_figure(shift)) if shift.layers else "",
        transfers=[
            (pair.name, Markup(transfer_figure(pair.transfer, title=f"Groups, {legible(pair.name)[:60]}")))
            for pair in shift.pairs
            if pair.transfer
        ],
        settings={name: _text(value) for name, value in shift.settings.items()},
        versions={name: _text(value) for name, value in shift.versions.items()},
    )  # fmt: skip


def shift_sentences(shift: Shift) -> list[str]:
    """By pair what moved more than its limit and what did not, and what the limit is."""
    found = []
    for pair in shift.pairs:
        measured = _of(shift, pair.name)
        above = [WORDS[metric] for metric, each in measured.items() if each.warn]
        within = [WORDS[metric] for metric, each in measured.items() if not each.warn]
        if not measured:
            found.append(f"{pair.name}: nothing could be measured.")
        elif not above:
            found.append(f"{pair.name}: nothing moved beyond its limit ({', '.join(within)}).")
        else:
            rest = f"; within it: {', '.join(within)}" if within else "; nothing stayed within"
            found.append(f"{pair.name}: beyond the limit: {', '.join(above)}{rest}.")
    found.append(
        "A limit is what 95 % of random cuts of one kind of request into halves stay below: to be above it says that "
        "something moved, not that it moved too much. There are many figures, so that one alone above may be chance; "
        f"{shift.limits}."
    )
    return found


def drift_rows(shift: Shift) -> list[list[str]]:
    """A header and one row per pair and metric, as text."""
    rows = [["pair", "metric", "drift [95 %]", "control", "limit", ""]]
    for pair in shift.pairs:
        for number, (metric, each) in enumerate(_of(shift, pair.name).items()):
            rows.append(["" if number else pair.name, WORDS[metric], *_cells(each)])
    return rows


def condition_rows(shift: Shift) -> list[list[str]]:
    """A header and one row per condition, as text; columns of a signal only where there is one."""
    header = ["model", "requests", "refused", "margin, nats", "SCU as the map’s"]
    signal = ["harmful flagged", "benign flagged", "error, queries", "error, answers"] if shift.signal else []
    rows = [header + signal]
    for each in shift.conditions:
        margin = " ".join([_number(each.margin.mean, 2), _interval(each.margin.low, each.margin.high, 2)])
        row = [each.model, each.distribution, rate_text(each.refused), margin, _share(each.overlap.get("SCU"))]
        rows.append(row + (_signal_cells(each) if signal else []))
    return rows


def _signal_cells(each: Condition) -> list[str]:
    errors = [NOTHING if error is None else f"{error:.3f}" for error in (each.error, each.answer_error)]
    return [rate_text(each.recall), rate_text(each.false_alarms), *errors]


def _of(shift: Shift, pair: str) -> dict[str, Drift]:
    """The pair's drifts by metric."""
    return {metric: found[pair] for metric, found in shift.drift.items() if pair in found}


def _cells(each: Drift) -> tuple[str, str, str, str]:
    drift = f"{each.value:.3f} {_interval(each.low, each.high, 3)}"
    return drift, f"{each.control:.3f}", f"{each.limit:.3f}", "above" if each.warn else ""


def _overlap_rows(shift: Shift) -> list[tuple[str, list[str]]]:
    """By pair the rank correlation of importance and the IoU of each group, from all prompts."""
    rows = []
    for pair in shift.pairs:
        if pair.transfer:
            shared = [_share(pair.overlap.get(group)) for group in ("SCU", "UCU", "CU", "RU")]
            rows.append((pair.name, [_share(pair.correlation), *shared]))
    return rows


def _number(value: float, places: int) -> str:
    return f"{value:+.{places}f}".replace("-", "−")


def _interval(low: float, high: float, places: int) -> str:
    return f"[{low:.{places}f}, {high:.{places}f}]".replace("-", "−")


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}".replace("-", "−")


def _text(value: Any) -> str:
    plain = dict(value) if isinstance(value, Mapping) else value
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=str)
