"""Figures of the units' methods, as inline SVG in the manner of `keelguard.plots`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from keelguard.plots import _COLOURS, _GRID, _INK, _LINE, _MARGIN, _MARKERS, _MUTED, _canvas, _to_svg, percent
from keelguard.units.direction import DirectionProbe, Estimate
from keelguard.units.groups import GROUPS
from keelguard.units.transfer import Transfer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ORDER = ("SCU", "CU", "UCU", "RU")
"""From top to bottom; the two small groups stand apart, so that their names do too."""
_GROUP_COLOURS = {"SCU": "#D55E00", "CU": "#777777", "UCU": "#0072B2", "RU": "#009E73"}
_FLOW_HEIGHT, _FLOW_WIDTH, _BAR, _GAP = 2.6, 3.2, 0.14, 0.1
_COLUMN = 0.75


def transfer_figure(transfer: Transfer, *, title: str = "Attribute transfer") -> str:
    """Which groups units come from and go to: bars before and after with flows between, and the shares in a table."""
    left, top = _MARGIN + 1.35, _MARGIN + 3.2 * _LINE
    right = left + _FLOW_WIDTH
    below = top + _FLOW_HEIGHT + 3 * _GAP + 2.2 * _LINE
    sources = {group: sum(transfer.share(group, other) for other in GROUPS) for group in _ORDER}
    targets = {group: sum(transfer.share(other, group) for other in GROUPS) for group in _ORDER}
    with _canvas(right + 1.4, below + 6.4 * _LINE) as axes:
        axes.text(_MARGIN, _MARGIN, title, va="top", fontsize=11)
        axes.text(left + _BAR, top - 0.08, "before", ha="right", va="bottom", color=_MUTED)
        axes.text(right - _BAR, top - 0.08, "after", ha="left", va="bottom", color=_MUTED)
        starts, ends = _draw_bars(axes, left, top, sources), _draw_bars(axes, right - _BAR, top, targets)
        _draw_names(axes, left - 0.08, starts, sources, "right")
        _draw_names(axes, right + 0.08, ends, targets, "left")
        for source in _ORDER:
            for target in _ORDER:
                share = transfer.share(source, target)
                height = _FLOW_HEIGHT * share
                if share:
                    span = (left + _BAR, starts[source], right - _BAR, ends[target])
                    _draw_flow(axes, span, height, _GROUP_COLOURS[source], 0.25 if source == target else 0.65)
                starts[source] += height
                ends[target] += height
        _draw_shares(axes, below, transfer)
        rest = f"{percent(transfer.moved)} of {transfer.units} units changed their group; shares are of all units."
        return _to_svg(axes, title, rest, repr((transfer.counts, title)))


def _draw_bars(axes: "Axes", x: float, top: float, shares: Mapping[str, float]) -> dict[str, float]:
    """One bar per group below another; returns where each begins."""
    from matplotlib.patches import Rectangle

    places = {}
    for group, share in shares.items():
        places[group] = top
        axes.add_patch(Rectangle((x, top), _BAR, _FLOW_HEIGHT * share, color=_GROUP_COLOURS[group], lw=0))
        top += _FLOW_HEIGHT * share + _GAP
    return places


def _draw_names(axes: "Axes", x: float, places: Mapping[str, float], shares: Mapping[str, float], side: str) -> None:
    """The groups with their shares beside their bars, no two closer than a line."""
    lowest = -1.0
    for group, start in places.items():
        lowest = max(start + _FLOW_HEIGHT * shares[group] / 2, lowest + _LINE)
        axes.text(x, lowest, f"{group}  {percent(shares[group])}", ha=side, va="center_baseline")


def _draw_flow(axes: "Axes", span: tuple[float, float, float, float], height: float, colour: str, alpha: float) -> None:
    """A band of constant height from (x, y) to (x, y), both its upper corners."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    x, y, end, to = span
    middle = (x + end) / 2
    points = [(x, y), (middle, y), (middle, to), (end, to)]
    back = [(x, y + height) for x, y in reversed(points)]
    curve = [Path.CURVE4] * 3
    path = Path([*points, *back, (x, y)], [Path.MOVETO, *curve, Path.LINETO, *curve, Path.CLOSEPOLY])
    axes.add_patch(PathPatch(path, facecolor=colour, alpha=alpha, lw=0))


def _draw_shares(axes: "Axes", top: float, transfer: Transfer) -> None:
    """The table of shares of all units, rows before and columns after."""
    first = _MARGIN + 1.5
    axes.text(_MARGIN, top, "share of all units", va="center_baseline", color=_MUTED)
    for column, target in enumerate(_ORDER):
        axes.text(first + _COLUMN * column, top, f"→ {target}", ha="center", va="center_baseline", color=_MUTED)
    for row, source in enumerate(_ORDER):
        y = top + _LINE * (row + 1.2)
        axes.text(_MARGIN, y, source, va="center_baseline")
        for column, target in enumerate(_ORDER):
            colour = _MUTED if source == target else _INK
            text = percent(transfer.share(source, target))
            axes.text(first + _COLUMN * column, y, text, ha="center", va="center_baseline", color=colour)


def direction_figure(probe: DirectionProbe, *, title: str = "Reasoning direction") -> str:
    """Left: by which the refusal is nearer (below 0) at every layer; right: the decision logit along the answer."""
    entries = [f"k = {k}: {_words(each.difference)}" for k, each in zip(probe.ks, probe.averaged, strict=True)]
    top = _MARGIN + 1.6 * _LINE
    below = top + 2.9
    with _canvas(7.4, below + _LINE * (len(entries) + 1.5)) as axes:
        axes.text(_MARGIN, _MARGIN, title, va="top", fontsize=11)
        layers = _panel(axes, (0.7, top + 0.25, 2.8, 2.2), "distance to refusal − to compliance", "layer")
        for number, per_layer in enumerate(probe.per_layer):
            differences = [each.difference for each in per_layer]
            _draw_line(layers, list(range(len(differences))), differences, number)
        answer = _panel(axes, (4.4, top + 0.25, 2.8, 2.2), "decision logit (nats)", "tokens of the answer")
        if probe.decision is None:
            note = "refusals and compliances\nbegin with the same tokens"
            answer.text(0.5, 0.5, note, ha="center", va="center", transform=answer.transAxes)
        else:
            for number, side in enumerate(("refusal", "compliance")):
                _draw_line(answer, [0, *probe.ks], [probe.decision.clean, *getattr(probe.decision, side)], number, side)
            answer.legend(frameon=False, fontsize=8)
        words = "Mean over layers with its 95 % interval; below 0 the refusal is nearer to the query:"
        axes.text(_MARGIN, below + _LINE / 2, words, va="center_baseline", color=_MUTED, fontsize=8)
        for number, text in enumerate(entries):
            y = below + _LINE * (number + 1.5)
            colour, marker = _mark(number)
            axes.plot([_MARGIN + 0.08], [y], marker=marker, ms=4.5, color=colour, ls="none", clip_on=False)
            axes.text(_MARGIN + 0.24, y, text, va="center_baseline", fontsize=8)
        rest = f"{len(probe.ks)} lengths of continuation; bands are 95 % bootstrap intervals over prompts."
        return _to_svg(axes, title, rest, repr((probe, title)))


def _panel(axes: "Axes", box: tuple[float, float, float, float], y_label: str, x_label: str) -> "Axes":
    """Axes with a zero line in a box (left, top, width, height) in inches of a canvas."""
    from matplotlib.ticker import MaxNLocator

    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    left, top, wide, high = box
    panel = figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))
    panel.axhline(0, color=_GRID, lw=0.8)
    panel.set_xlabel(x_label, fontsize=8)
    panel.set_title(y_label, fontsize=8.5, loc="left", color=_INK)
    panel.tick_params(labelsize=7, colors=_MUTED)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return panel


def _draw_line(axes: "Axes", xs: Sequence[int], estimates: Sequence[Estimate], number: int, label: str = "") -> None:
    """Means with a band of their intervals."""
    colour, marker = _mark(number)
    lows, highs = [e.low for e in estimates], [e.high for e in estimates]
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, lw=0)
    axes.plot(xs, [e.mean for e in estimates], color=colour, marker=marker, ms=3.5, lw=1.2, label=label or "_")


def _mark(number: int) -> tuple[str, str]:
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]


def _words(estimate: Estimate) -> str:
    """An estimate with its interval, with signs as typeset."""
    mean, low, high = (f"{value:+.3f}".replace("-", "−") for value in estimate)
    return f"{mean} [{low}, {high}]"
