"""Figures of a diagnosis, as inline SVG: the proof's curves, the check of single units, and where units sit."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from keelguard.plots import _GRID, _INK, _LINE, _MARGIN, _MUTED, _canvas, _luminance, _shorten, _to_svg, percent
from keelguard.units.figures import _GROUP_COLOURS, _panel
from keelguard.units.findings import GROUP_NAMES, PAIRS, RANDOM, family, share_of_one, size_text
from keelguard.units.groups import GROUPS, UnitMap
from keelguard.units.proof import Point, Proof

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_WIDTH, _PANEL_HEIGHT, _PANEL_GAP = 3.05, 2.6, 0.62
_ENTRY_WIDTH = 2.55
_ROW, _COLUMN, _KIND_GAP = 0.17, 0.56, 0.3
_KINDS = ("mlp", "head", "channel")


class _Pen(NamedTuple):
    colour: str
    marker: str = ""
    style: str = "-"
    width: float = 1.3


_PENS = {
    "SCU": _Pen(_GROUP_COLOURS["SCU"], "o", "-", 2.2),
    "UCU": _Pen(_GROUP_COLOURS["UCU"], "s"),
    "CU": _Pen(_GROUP_COLOURS["CU"], "^"),
    "RU": _Pen(_GROUP_COLOURS["RU"], "D"),
    RANDOM: _Pen("#8a8a8a", "", "-", 0.8),
    PAIRS: _Pen("#a0408a", "", "--", 0.9),
    "magnitude": _Pen("#000000", "P", ":"),
    "SCU by variance": _Pen("#B8860B", "v", "--"),
}
_FAMILIES = (RANDOM, PAIRS)
_OTHER = _Pen("#444444", "x", "-.")


def curves_figure(proof: Proof, *, title: str = "Units taken out, by group and control") -> str:
    """Attack success, utility and over-refusal against the share of units ablated, with every control.

    Shares stand at equal distances, beginning with the whole model at 0. The SCU's attack success carries its 95 %
    intervals; the seeds of a random control are thin lines in a band.
    """
    shares = sorted({point.share for curve in proof.curves.values() for point in curve})
    measures: dict[str, Callable[[Point], float]] = {
        "attack success rate": lambda point: point.asr.value,
        "utility" if proof.tasks else "probability of a reference token": lambda point: (
            point.utility_value(proof.tasks) if point.utility.total else float("nan")
        ),
        "over-refusal": lambda point: point.over_refusal.value,
    }
    entries = _entries(proof)
    columns = int((3 * _PANEL_WIDTH + 2 * _PANEL_GAP) // _ENTRY_WIDTH)
    top = _MARGIN + 3.2 * _LINE
    below = top + _PANEL_HEIGHT + 0.62
    width = 2 * _MARGIN + 0.45 + 3 * _PANEL_WIDTH + 2 * _PANEL_GAP + 0.1
    with _canvas(width, below + _LINE * 1.25 * -(-len(entries) // columns) + 0.05) as axes:
        axes.text(_MARGIN, _MARGIN, title, va="top", fontsize=11)
        for number, (name, value) in enumerate(measures.items()):
            box = (_MARGIN + 0.45 + number * (_PANEL_WIDTH + _PANEL_GAP), top, _PANEL_WIDTH, _PANEL_HEIGHT)
            panel = _panel(axes, box, name, "share of all units ablated")
            _draw_curves(panel, proof, shares, value)
            if number == 0:
                _draw_intervals(panel, proof, shares)
        for number, (name, pen) in enumerate(entries.items()):
            x = _MARGIN + 0.45 + _ENTRY_WIDTH * (number % columns)
            _draw_entry(axes, x, below + _LINE * 1.25 * (number // columns), name, pen)
        rest = (
            f"{len(proof.curves)} curves at {len(shares)} shares; the page's table holds every figure with intervals."
        )
        return _to_svg(axes, title, rest, repr((proof, title)))


def _pen(name: str) -> _Pen:
    return _PENS.get(family(name) if family(name) in _FAMILIES else name, _OTHER)


def _entries(proof: Proof) -> dict[str, _Pen]:
    """The legend: one entry per curve, and one for all seeds of a random control."""
    found: dict[str, _Pen] = {}
    for name in proof.curves:
        group = family(name)
        if group in _FAMILIES:
            seeds = sum(family(other) == group for other in proof.curves)
            found[f"{group}, {seeds} {'seed' if seeds == 1 else 'seeds'}"] = _pen(name)
        else:
            found[_shorten(name, 30)] = _pen(name)
    return found


def _draw_curves(panel: "Axes", proof: Proof, shares: Sequence[float], value: Callable[[Point], float]) -> None:
    """All curves of one measure, the controls' bands below and the SCU above everything else."""
    places = {share: place + 1 for place, share in enumerate(shares)}
    bands: dict[str, dict[int, list[float]]] = {}
    for name, curve in proof.curves.items():
        points = sorted((places[point.share], value(point)) for point in curve)
        pen = _pen(name)
        xs, ys = [0, *(x for x, _ in points)], [value(proof.dense), *(y for _, y in points)]
        order = 4 if name == "SCU" else 2 if pen.marker else 1
        panel.plot(
            xs, ys, color=pen.colour, ls=pen.style, lw=pen.width, marker=pen.marker or None, ms=4, zorder=order,
            alpha=1 if pen.marker else 0.75, clip_on=False,
        )  # fmt: skip
        if family(name) in _FAMILIES:
            band = bands.setdefault(family(name), {})
            for x, y in zip(xs, ys, strict=True):
                band.setdefault(x, []).append(y)
    for group, band in bands.items():
        lows, highs = [min(band[x]) for x in sorted(band)], [max(band[x]) for x in sorted(band)]
        panel.fill_between(sorted(band), lows, highs, color=_PENS[group].colour, alpha=0.18, lw=0, zorder=0.5)
    panel.set(xlim=(-0.15, len(shares) + 0.15), ylim=(0, 1))
    panel.set_xticks(range(len(shares) + 1), ["0", *(size_text(share) for share in shares)])
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1.0], [percent(y) for y in (0, 0.25, 0.5, 0.75, 1.0)])
    panel.grid(axis="y", color=_GRID, lw=0.6)
    panel.set_axisbelow(True)


def _draw_intervals(panel: "Axes", proof: Proof, shares: Sequence[float]) -> None:
    """The 95 % intervals of the SCU's attack success rate, and of the whole model's."""
    points = [(0, proof.dense), *((shares.index(point.share) + 1, point) for point in proof.curves.get("SCU", []))]
    for x, point in points:
        if point.asr.total:
            panel.plot([x, x], list(point.asr.interval), color=_PENS["SCU"].colour, lw=1.1, zorder=3.5, clip_on=False)


def _draw_entry(axes: "Axes", x: float, y: float, name: str, pen: _Pen) -> None:
    """One entry of the legend: a stretch of line with its mark, and for a band its tint."""
    from matplotlib.patches import Rectangle

    if not pen.marker:
        axes.add_patch(Rectangle((x, y - 0.05), 0.34, 0.1, color=pen.colour, alpha=0.18, lw=0))
    axes.plot([x, x + 0.34], [y, y], color=pen.colour, ls=pen.style, lw=pen.width, clip_on=False)
    if pen.marker:
        axes.plot([x + 0.17], [y], color=pen.colour, marker=pen.marker, ms=4, ls="none", clip_on=False)
    axes.text(x + 0.43, y, name, va="center_baseline", fontsize=8.5)


def singles_figure(exact: Mapping[str, Any], *, title: str = "Single units: first order and exact") -> str:
    """What ablating one unit does to the decision, beside what the first-order score says it does."""
    first, second = exact["first_order"], exact["exact"]
    top = _MARGIN + 2.9 * _LINE
    with _canvas(3.6, top + 2.4 + 0.5) as axes:
        axes.text(_MARGIN, _MARGIN, title, va="top", fontsize=11)
        panel = _panel(
            axes, (0.62, top, 2.75, 2.4), "change of the decision (nats), exact", "first-order effect (nats)"
        )
        ends = [min(*first, *second, 0), max(*first, *second, 0)]
        panel.plot(ends, ends, color=_GRID, lw=0.9, zorder=0)
        panel.axvline(0, color=_GRID, lw=0.8, zorder=0)
        panel.plot(first, second, ls="none", marker="o", ms=4, mew=0, color=_GROUP_COLOURS["UCU"], alpha=0.6)
        panel.locator_params(axis="x", integer=False, nbins=6)
        rest = f"{len(first)} units; Spearman's rank correlation {share_of_one(exact['spearman'])}."
        return _to_svg(axes, title, rest, repr((dict(exact), title)))


def places_figure(chart: UnitMap, *, title: str = "Groups by layer and kind") -> str:
    """Units of every group by layer and kind: numbers in the cells, shares of the layer's units in colour.

    Experts of one layer are counted together. Every column has its own scale, since SCU are few and CU are many.
    """
    table = place_counts(chart)
    layers = sorted({layer for layer, _ in table})
    kinds = [kind for kind in _KINDS if any(kind == other for _, other in table)]
    kinds += sorted({kind for _, kind in table} - set(kinds))
    left, top = _MARGIN + 0.72, _MARGIN + 4.4 * _LINE
    bottom = top + _ROW * len(layers)
    wide = _COLUMN * len(GROUP_NAMES)
    width = left + len(kinds) * (wide + _KIND_GAP)
    with _canvas(max(width, 3.4), bottom + 3.2 * _LINE) as axes:
        axes.text(_MARGIN, _MARGIN, title, va="top", fontsize=11)
        for row, layer in enumerate(layers):
            axes.text(
                left - 0.1, top + _ROW * (row + 0.5), f"layer {layer}", ha="right", va="center_baseline", fontsize=7
            )
        for number, kind in enumerate(kinds):
            x = left + number * (wide + _KIND_GAP)
            sizes = sorted({sum(table[layer, kind]) for layer in layers if (layer, kind) in table})
            units = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
            heading = f"{_shorten(kind, 12)}: {units} units a layer"
            axes.text(x, top - 1.75 * _LINE, heading, va="center_baseline", fontsize=8.5)
            for column, group in enumerate(GROUP_NAMES):
                _draw_column(axes, x + _COLUMN * column, top, group, [table.get((layer, kind)) for layer in layers])
        rest = f"{len(layers)} layers; counts of units, and in colour their share of the layer's units of that kind."
        return _to_svg(axes, title, rest, repr((sorted(table.items()), title)))


def place_counts(chart: UnitMap) -> dict[tuple[int, str], list[int]]:
    """By layer and kind the numbers of units in the order of `GROUPS`."""
    import torch

    number = torch.repeat_interleave(torch.arange(len(chart.layout)), torch.tensor(chart.blocks))
    flat = (number * len(GROUPS) + chart.labels.long()).bincount(minlength=len(GROUPS) * len(chart.layout))
    table: dict[tuple[int, str], list[int]] = {}
    for block, counts in zip(chart.layout, flat.view(-1, len(GROUPS)).tolist(), strict=True):
        before = table.setdefault((block["layer"], block["kind"]), [0] * len(GROUPS))
        table[block["layer"], block["kind"]] = [a + b for a, b in zip(before, counts, strict=True)]
    return table


def _draw_column(axes: "Axes", x: float, top: float, group: str, cells: Sequence[list[int] | None]) -> None:
    """One group of one kind over all layers, with its name above and the share of the darkest cell below."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    place = GROUPS.index(group)
    shares = [cell[place] / sum(cell) if cell and sum(cell) else 0.0 for cell in cells]
    most = max(shares)
    tint = to_rgb(_GROUP_COLOURS[group])
    middle = x + _COLUMN / 2
    axes.text(middle, top - 0.55 * _LINE, group, ha="center", va="center_baseline", fontsize=8.5)
    for row, (cell, share) in enumerate(zip(cells, shares, strict=True)):
        if cell is None:
            continue
        depth = share / most if most else 0.0
        colour = tuple(1 - depth * (1 - part) for part in tint)
        y = top + _ROW * row
        axes.add_patch(Rectangle((x, y), _COLUMN, _ROW, facecolor=colour, edgecolor="white", lw=0.6, clip_on=False))
        ink = _MUTED if not cell[place] else "#ffffff" if _luminance(colour) < 0.179 else _INK
        words = f"{cell[place]:,}" if cell[place] else "·"
        axes.text(middle, y + _ROW / 2, words, ha="center", va="center_baseline", fontsize=7, color=ink)
    bottom = top + _ROW * len(cells)
    if len(cells) > 20:  # The names above have scrolled away.
        axes.text(middle, bottom + 0.5 * _LINE, group, ha="center", va="center_baseline", fontsize=8.5)
    below = bottom + (1.4 if len(cells) > 20 else 0.6) * _LINE
    text = f"≤ {percent(most)}"
    axes.text(middle, below, text, ha="center", va="center_baseline", fontsize=7, color=_MUTED)
