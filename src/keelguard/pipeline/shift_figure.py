"""The drifts layer by layer, as inline SVG in the manner of `keelguard.plots`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keelguard.pipeline.drift import Drift
from keelguard.pipeline.shift_metrics import LAYERED
from keelguard.pipeline.shift_results import Shift
from keelguard.plots import _COLOURS, _LINE, _MARGIN, _MARKERS, _MUTED, _canvas, _shorten, _to_svg, legible
from keelguard.units.figures import _panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {"importance": "importance: 1 − ρ", "groups": "share that changes group", "direction": "reasoning direction"}
_WIDE, _HIGH, _STEP = 2.5, 2.1, 3.15


def layers_figure(shift: Shift, *, title: str = "Drift at each layer") -> str:
    """One panel per metric and one line per pair with its interval; the dashed line is that pair's warning limit.

    Raises:
        ValueError: no metric is known by layers.
    """
    shown = [metric for metric in LAYERED if shift.layers.get(metric)]
    if not shown:
        raise ValueError("no metric is known by layers")
    names = [pair.name for pair in shift.pairs]
    top = _MARGIN + 1.6 * _LINE
    below = top + _HIGH + 0.7
    with _canvas(_STEP * len(shown) + 0.4, below + _LINE * (len(names) + 1.5)) as axes:
        axes.text(_MARGIN, _MARGIN, legible(title), va="top", fontsize=11)
        for place, metric in enumerate(shown):
            panel = _panel(axes, (0.55 + _STEP * place, top + 0.25, _WIDE, _HIGH), _TITLES[metric], "layer")
            for number, name in enumerate(names):
                if name in shift.layers[metric]:
                    _draw(panel, shift.layers[metric][name], number)
            panel.set_ylim(bottom=0)
        words = (
            "Bands are 95 % bootstrap intervals over prompts; dashed is what 95 % of the halves of one kind stay below:"
        )
        axes.text(_MARGIN, below + _LINE / 2, words, va="center_baseline", color=_MUTED, fontsize=8)
        for number, name in enumerate(names):
            y = below + _LINE * (number + 1.5)
            colour, marker = _mark(number)
            axes.plot([_MARGIN + 0.08], [y], marker=marker, ms=4.5, color=colour, ls="none", clip_on=False)
            axes.text(_MARGIN + 0.24, y, _shorten(name, 90), va="center_baseline", fontsize=8)
        rest = f"{len(shown)} metrics, {len(names)} pairs of conditions; the figures over all layers are in the table."
        return _to_svg(axes, title, rest, repr((shift.layers, names, title)))


def _draw(panel: "Axes", line: Sequence[Drift | None], number: int) -> None:
    """A pair's drifts over the layers; layers without a figure leave a gap."""
    colour, marker = _mark(number)
    nan = float("nan")
    values, lows, highs, limits = (
        [nan if each is None else getattr(each, name) for each in line] for name in ("value", "low", "high", "limit")
    )
    places = list(range(len(line)))
    panel.fill_between(places, lows, highs, color=colour, alpha=0.15, lw=0)
    panel.plot(places, values, color=colour, marker=marker, ms=3.5, lw=1.2)
    panel.plot(places, limits, color=colour, lw=0.9, ls="--")


def _mark(number: int) -> tuple[str, str]:
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
