"""The report of `keelguard diagnose`: one self-contained HTML page, and tables for the terminal.

It leads with how far the map can be trusted. Names and settings come from files, so that the page treats them as
untrusted text in the manner of `keelguard.report`: every value is escaped, control characters are written out.

    write_diagnosis_report(Path("report.html"), chart, proof)
    console.print(diagnosis_tables(chart, proof, width=console.width))

Of a map's `meta`, model, architecture and score are required. All else is optional, since maps that were not made by
`keelguard diagnose`, or were made without some step, lack it: the page leaves out what is not there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelguard.errors import UsageError
from keelguard.pages import page_environment
from keelguard.plots import legible, percent, rate_text
from keelguard.report import points
from keelguard.runs import write_text
from keelguard.units.findings import (
    GROUP_NAMES,
    direction_sentences,
    family,
    group_chance,
    iou_text,
    map_sentences,
    proof_warnings,
    share_of_one,
    size_text,
    transfer_sentences,
    utility_text,
    verdict,
)
from keelguard.units.groups import UnitMap
from keelguard.units.proof import Point, Proof

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from keelguard.units.direction import DirectionProbe
    from keelguard.units.transfer import Transfer

REQUIRED = ("model", "architecture", "score")
"""Keys that a map's `meta` must hold."""
TOP = 20
"""How many SCU the page names."""
_LABEL_WIDTH, _CELL_WIDTH = 22, 9


def write_diagnosis_report(
    path: Path,
    chart: UnitMap,
    proof: Proof | None = None,
    transfer: "Transfer | None" = None,
    probe: "DirectionProbe | None" = None,
) -> None:
    """Write the diagnosis as one HTML page, atomically.

    Args:
        path: where the page goes; its folder is created.

    Raises:
        UsageError: the map lacks one of `REQUIRED`.
        FailureError: the path cannot be written.
    """
    write_text(path, diagnosis_page(chart, proof, transfer, probe))


def diagnosis_page(
    chart: UnitMap,
    proof: Proof | None = None,
    transfer: "Transfer | None" = None,
    probe: "DirectionProbe | None" = None,
) -> str:
    """The diagnosis as the text of an HTML page, the same for the same results; raises as `write_diagnosis_report`."""
    from markupsafe import Markup

    from keelguard.units.figures import direction_figure, transfer_figure
    from keelguard.units.proof_figures import curves_figure, places_figure, singles_figure

    _check(chart)
    meta = chart.meta
    exact = proof.exact if proof and proof.exact.get("units") else {}
    # Markup: our own SVG, escaped by plots.
    figures = {
        "curves": Markup(curves_figure(proof)) if proof and proof.curves else "",
        "singles": Markup(singles_figure(exact)) if exact else "",
        "places": Markup(places_figure(chart)),
        "transfer": Markup(transfer_figure(transfer)) if transfer else "",
        "direction": Markup(direction_figure(probe)) if probe else "",
    }
    environment = page_environment(rate=rate_text, decimals=share_of_one, tied=_tied)
    return environment.get_template("units.html.j2").render(
        chart=chart,
        meta=meta,
        title=_title(meta["model"]),
        names=GROUP_NAMES,
        summary=map_sentences(chart),
        groups=_group_rows(chart),
        overlaps=_overlap_rows(chart),
        proof=proof,
        verdict=verdict(proof) if proof else "",
        warnings=proof_warnings(proof) if proof else [],
        judge=proof.judge if proof else "",
        curves=_curve_rows(proof) if proof else [],
        exact=exact,
        top=_top_rows(chart),
        scan=_scan_rows(meta.get("scan")),
        transfer=transfer,
        transfer_words=transfer_sentences(transfer) if transfer else [],
        direction_words=direction_sentences(probe) if probe else [],
        figures=figures,
        coverage=_coverage(chart),
        cost={stage: f"{seconds:,.1f} s" for stage, seconds in meta.get("cost", {}).items()},
        settings={name: _setting(meta[name]) for name in _SETTINGS if name in meta}
        | {name: _setting(value) for name, value in meta.get("settings", {}).items()},
        versions={name: _setting(value) for name, value in meta.get("versions", {}).items()},
        data=[(use, *file) for use, files in meta.get("data", {}).items() for file in files],
    )  # fmt: skip


_SETTINGS = ("model", "score", "normalised", "ranking", "sizes")


def _check(chart: UnitMap) -> None:
    lacking = [key for key in REQUIRED if key not in chart.meta]
    if lacking:
        raise UsageError(f"the unit map says nothing of its {', '.join(lacking)}; run `keelguard diagnose` again")


def _title(model: str) -> str:
    """The folder's name of a local path; hub ids stay whole."""
    return Path(model).name or model if model.startswith(("/", ".", "~")) else model


def _tied(text: str) -> str:
    """A sentence whose lines do not break between a number and its percent sign."""
    return text.replace(" %", "\u00a0%")


def _group_rows(chart: UnitMap) -> list[tuple[str, ...]]:
    """By group: name, words, units, share, stability and chance."""
    counts, stability = chart.counts(), chart.meta.get("stability", {})
    rows = []
    for group, words in GROUP_NAMES.items():
        stable = iou_text(stability[group]) if group in stability else "–"
        expected = share_of_one(group_chance(chart, group))
        rows.append((group, words, f"{counts[group]:,}", percent(counts[group] / len(chart)), stable, expected))
    return rows


def _overlap_rows(chart: UnitMap) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """By what is compared, each pair with one IoU per group; chance first, to read the others by."""
    rows = [("chance", [("two random sets", [share_of_one(group_chance(chart, group)) for group in GROUP_NAMES])])]
    for what, pairs in chart.meta.get("overlap", {}).items():
        cells = [(pair, [share_of_one(v.get(group)) for group in GROUP_NAMES]) for pair, v in pairs.items()]
        rows.append((what, cells))
    return rows if len(rows) > 1 else []


def _curve_rows(proof: Proof) -> list[tuple[str, list[dict[str, str]]]]:
    """The proof's every point as text, by curve; the whole model first."""
    curves = {"whole model": [proof.dense], **proof.curves}
    return [(name, [_point_row(proof, point) for point in points]) for name, points in curves.items()]


def _point_row(proof: Proof, point: Point) -> dict[str, str]:
    return {
        "share": size_text(point.share),
        "units": f"{point.units:,}",
        "asr": rate_text(point.asr),
        "broken": f"{point.asr.count}/{point.asr.total}",
        "refused": rate_text(point.refused),
        "utility": rate_text(point.utility),
        "probability": percent(point.utility_value(False)) if point.utility.total else "–",
        "over_refusal": rate_text(point.over_refusal),
        "degenerate": rate_text(point.degenerate),
    }


def _top_rows(chart: UnitMap) -> list[tuple[str, int, str, str]]:
    """The SCU that rank highest: block, number inside the block, normalised contrast and strength."""
    import torch

    members, ranked = chart.members("scu"), chart.ranked("SCU")
    units = ranked[members[ranked]][:TOP]
    ends = torch.tensor(chart.blocks).cumsum(0)
    rows = []
    for unit, block in zip(units.tolist(), torch.bucketize(units, ends, right=True).tolist(), strict=True):
        inside = unit - (int(ends[block]) - chart.blocks[block])
        values = (f"{float(v[unit]):+.2f}".replace("-", "−") for v in (chart.contrast, chart.strength))
        rows.append((str(chart.layout[block]["name"]), inside, *values))
    return rows


def _scan_rows(scan: Mapping[str, Any] | None) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """By group what the scan found in words, and every step."""
    rows = []
    for group in ("SCU", "RU") if scan else ():
        found = (scan or {}).get("found", {}).get(group.lower())
        words = "no share breaks safety; its size was kept" if found is None else f"{size_text(found)} of all units"
        steps = (scan or {}).get(group, [])
        cells = [(size_text(s["share"]), points(s["asr_rise"]), points(-s["utility_drop"])) for s in steps]
        rows.append((group, words, cells))
    return rows


def _coverage(chart: UnitMap) -> dict[str, str]:
    """What the map covers and which weights it describes."""
    found = {"hash of the weights": chart.weights, "units of attention": chart.attention}
    coverage = chart.meta.get("coverage")
    if coverage:
        found |= {f"units of kind {kind}": f"{count:,}" for kind, count in coverage["units"].items()}
        share = percent(coverage["share"])
        found["parameters in units"] = f"{coverage['mapped']:,} of {coverage['total']:,} ({share})"
    return found


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def diagnosis_tables(chart: UnitMap, proof: Proof | None = None, *, width: int = 100) -> "Group":
    """The diagnosis for the terminal: what can be printed with one `console.print`.

    Raises:
        UsageError: the map lacks one of `REQUIRED`.
    """
    from rich.console import Group
    from rich.text import Text

    _check(chart)
    parts: list[Any] = [Text(legible("\n".join(map_sentences(chart)))), _groups_table(chart)]
    if proof:
        curves = _proof_lines(proof)
        shares = sorted({point.share for curve in proof.curves.values() for point in curve})
        # Shares that do not fit beside one another go into further tables: a figure cut off is worse.
        beside = max(1, (width - 1 - _LABEL_WIDTH - 3) // (_CELL_WIDTH + 3))
        tables = [shares[first : first + beside] for first in range(0, len(shares), beside)]
        parts += [_proof_table(proof, curves, some) for some in tables]
        parts.append(Text(legible(verdict(proof))))
        parts += [Text(legible(f"Warning: {warning}"), style="yellow") for warning in proof_warnings(proof)]
    return Group(*parts)


def _groups_table(chart: UnitMap) -> "Table":
    from rich.table import Table

    table = Table()
    table.add_column("Group", overflow="fold")
    for name in ("Units", "Share", "Stability (IoU)", "Chance"):
        table.add_column(name, justify="right", overflow="fold")
    for group, _, *cells in _group_rows(chart):
        table.add_row(group, *cells)
    return table


def _proof_lines(proof: Proof) -> dict[str, list[list[Point]]]:
    """Curves by the line that shows them: all seeds of a control in one."""
    lines: dict[str, list[list[Point]]] = {}
    for name, curve in proof.curves.items():
        lines.setdefault(family(name), []).append(curve)
    return lines


def _proof_table(proof: Proof, lines: Mapping[str, list[list[Point]]], shares: Sequence[float]) -> "Table":
    """Attack success and utility of some shares, as ranges over the seeds of a control."""
    from rich.table import Table
    from rich.text import Text

    measures = {
        "Attack success rate": lambda point: percent(point.asr.value),
        "Utility": lambda point: utility_text(proof, point).partition(" [")[0],
    }
    table = Table()
    table.add_column("share of units ablated", width=_LABEL_WIDTH, overflow="fold")
    for share in shares:
        table.add_column(size_text(share), justify="right", min_width=_CELL_WIDTH, overflow="fold")
    for title, words in measures.items():
        table.add_section()
        table.add_row(Text(f"{title} (whole: {words(proof.dense)})", style="bold"))
        for name, curves in lines.items():
            cells = []
            for share in shares:
                here = [point for curve in curves for point in curve if point.share == share]
                here.sort(key=lambda p: p.asr.value if title != "Utility" else p.utility_value(proof.tasks))
                ends = list(dict.fromkeys(words(point) for point in here[:1] + here[-1:]))
                cells.append(Text("–".join([*(end.removesuffix(" %") for end in ends[:-1]), *ends[-1:]]) or "–"))
            table.add_row(Text(legible(name)), *cells)
    return table
