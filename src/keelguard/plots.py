"""Figures as inline SVG, and how a rate is put into words.

Each figure is one `<svg>` element that needs nothing from elsewhere, is the same byte for byte for the same
arguments, and shares no id with another figure on the page. matplotlib is imported on the first figure only.

    svg = heat_map(["direct", "prefill"], ["base", "guarded"], [[0.04, 0.0], [0.91, 0.12]])
"""

import hashlib
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from keelguard.stats import Rate

NOTHING = "–"
_KEPT = "\n\t\u200c\u200d"
_INK, _MUTED, _GRID, _EMPTY = "#1a1a1a", "#5a5a5a", "#d9d9d9", "#efefef"
# Okabe and Ito's palette with grey for its yellow, which is too light on white; shapes tell them apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
_MARKERS = "os^DvPX*"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "keelguard",
    "text.parse_math": False,
    "text.color": _INK,
    "font.family": "DejaVu Sans",
    "font.size": 9,
}
_MARGIN, _LINE, _HEAD = 0.03, 0.17, 0.3
_CELL_WIDTH, _CELL_HEIGHT = 0.92, 0.38
_SCALE_WIDTH = 2.5


def legible(text: str) -> str:
    """The text with every invisible control character written out as ⟨U+202E⟩.

    Covers terminal escapes, bidirectional overrides, zero-width characters and lone surrogates. Newlines,
    tabs, spaces of any width and the joiners that scripts and emoji need are kept.
    """
    return "".join(c if _is_legible(c) else f"⟨U+{ord(c):04X}⟩" for c in text.replace("\r\n", "\n"))


def percent(value: float) -> str:
    """A share as a percentage: no decimals, but one below 1 % and between 99 % and 100 %."""
    return NOTHING if math.isnan(value) else f"{_hundredths(value)} %"


def rate_text(rate: "Rate | None") -> str:
    """A rate with its 95 % interval, as in `12 % [8, 18]`; a dash where nothing was measured."""
    if rate is None or not rate.total:
        return NOTHING
    return f"{percent(rate.value)} {interval_text(rate)}"


def interval_text(rate: "Rate | None") -> str:
    """The 95 % interval alone, as in `[8, 18]`; empty where nothing was measured."""
    if rate is None or not rate.total:
        return ""
    return f"[{_hundredths(rate.interval.low)}, {_hundredths(rate.interval.high)}]"


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    notes: Sequence[Sequence[str]] | None = None,
    title: str = "Attack success rate",
) -> str:
    """A table of shares in colour, one row per attack and one column per model, as SVG.

    `values[row][column]` lies in [0, 1], or is NaN where nothing was measured. Colours run from 0 to 1
    whatever the values are, so that two figures can be compared. `notes` has the shape of `values` and is
    printed small under each percentage: the intervals belong there.

    Raises:
        ValueError: there are no rows or columns, a shape does not match them, or a value is not a share.
    """
    _check_shape(rows, columns, values, "values")
    if notes is not None:
        _check_shape(rows, columns, notes, "notes")
    if any(not (math.isnan(value) or 0 <= value <= 1) for line in values for value in line):
        raise ValueError("values must lie between 0 and 1, or be NaN")
    names = [_shorten(row, 36) for row in rows]
    heads = [_wrap(_shorten(column, 36), 12) for column in columns]
    head_height = _LINE * max(len(head) for head in heads) + 0.08
    left = _MARGIN + _text_width(names) + 0.12
    top = _MARGIN + 1.6 * _LINE + head_height
    bottom = top + _CELL_HEIGHT * len(rows)
    # In a long table the columns' names are repeated below, since those above have scrolled away.
    twice = len(rows) > 20
    key = bottom + (head_height if twice else 0) + 0.16
    width = left + max(_CELL_WIDTH * len(columns), 2.0) + _MARGIN
    width = max(width, 2 * _MARGIN + _text_width([title], 11))
    with _canvas(width, key + 0.3) as axes:
        axes.text(_MARGIN, _MARGIN, legible(title), va="top", fontsize=11)
        for column, head in enumerate(heads):
            middle = left + _CELL_WIDTH * (column + 0.5)
            axes.text(middle, top - 0.06, "\n".join(head), ha="center", va="bottom", fontsize=8.5)
            if twice:
                axes.text(middle, bottom + 0.06, "\n".join(head), ha="center", va="top", fontsize=8.5)
        for row, name in enumerate(names):
            y = top + _CELL_HEIGHT * row
            axes.text(_MARGIN, y + _CELL_HEIGHT / 2, name, va="center_baseline")
            for column, value in enumerate(values[row]):
                note = notes[row][column] if notes is not None else ""
                _draw_cell(axes, left + _CELL_WIDTH * column, y, value, note)
        _draw_key(axes, left, key)
        rest = f"{len(rows)} rows, {len(columns)} columns; the same figures are in the page's table."
        return _to_svg(axes, title, rest, repr((rows, columns, values, notes, title)))


def interval_bars(
    labels: Sequence[str],
    rates_by_series: Mapping[str, "Sequence[Rate | None]"],
    *,
    title: str = "Rates",
    sections: Mapping[int, str] | None = None,
) -> str:
    """Dots with their 95 % intervals on a scale from 0 % to 100 %, as SVG.

    Each label is a group of lines, one per series; the rate stands in words at the right. `sections` names what begins
    with the label of that number.

    Raises:
        ValueError: there are no labels or series, or a series has not one rate per label.
    """
    if not labels or not rates_by_series:
        raise ValueError("interval_bars needs at least one label and one series")
    for name, rates in rates_by_series.items():
        if len(rates) != len(labels):
            raise ValueError(f"series {name!r} has {len(rates)} rates for {len(labels)} labels")
    names = [_shorten(label, 30) for label in labels]
    series = [_shorten(name, 44) for name in rates_by_series]
    group = _LINE * len(series) + 0.14
    left = _MARGIN + _text_width(names) + 0.15
    top = _MARGIN + 1.6 * _LINE + _LINE * len(series) + 0.12
    heads = {row: _shorten(head, 44) for row, head in (sections or {}).items()}
    tops = [top + group * row + _HEAD * sum(head <= row for head in heads) for row in range(len(labels))]
    bottom = tops[-1] + group
    width = left + _SCALE_WIDTH + 1.35
    width = max(width, 2 * _MARGIN + _text_width([title], 11), 0.5 + _text_width([*series, *heads.values()]))
    with _canvas(width, bottom + 0.35) as axes:
        axes.text(_MARGIN, _MARGIN, legible(title), va="top", fontsize=11)
        _draw_scale(axes, left, top, bottom)
        for index, name in enumerate(series):
            y = _MARGIN + 1.6 * _LINE + _LINE * (index + 0.5)
            _draw_dot(axes, _MARGIN + 0.08, y, index)
            axes.text(_MARGIN + 0.24, y, name, va="center_baseline")
        for row, name in enumerate(names):
            y = tops[row]
            if row in heads:
                axes.text(_MARGIN, y - _HEAD / 2, heads[row], va="center_baseline", fontweight="bold")
            axes.text(_MARGIN, y + group / 2, name, va="center_baseline")
            for index, rates in enumerate(rates_by_series.values()):
                _draw_rate(axes, left, y + 0.07 + _LINE * (index + 0.5), index, rates[row])
        rest = f"{len(labels)} groups, {len(series)} series; brackets hold 95 % intervals."
        content = repr((labels, list(rates_by_series.items()), title, *([sections] if sections else [])))
        return _to_svg(axes, title, rest, content)


def _draw_cell(axes: "Axes", x: float, y: float, value: float, note: str) -> None:
    """One coloured cell with its percentage and its note."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    known = not math.isnan(value)
    colour = colormaps["OrRd"](float(value)) if known else _EMPTY
    # Black and white contrast equally, 4.6 : 1, with this luminance.
    ink = "#ffffff" if _luminance(to_rgb(colour)) < 0.179 else "#000000"
    axes.add_patch(Rectangle((x, y), _CELL_WIDTH, _CELL_HEIGHT, facecolor=colour, edgecolor="white", clip_on=False))
    middle, centre = x + _CELL_WIDTH / 2, y + _CELL_HEIGHT / 2
    note = note if known else ""
    lift = 0.06 if note else 0.0
    axes.text(middle, centre - lift, percent(value), ha="center", va="center_baseline", color=ink)
    if note:
        note = _shorten(note, 16)
        axes.text(middle, centre + 0.1, note, ha="center", va="center_baseline", fontsize=7, color=ink)


def _draw_key(axes: "Axes", x: float, y: float) -> None:
    """The colour scale, 0 % to 100 %."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    axes.text(x, y + 0.06, "0 %", va="center_baseline", fontsize=7, color=_MUTED)
    for step in range(24):
        colour = colormaps["OrRd"](step / 23)
        axes.add_patch(Rectangle((x + 0.3 + 0.05 * step, y), 0.05, 0.12, color=colour, lw=0, clip_on=False))
    axes.text(x + 1.57, y + 0.06, "100 %", va="center_baseline", fontsize=7, color=_MUTED)


def _draw_scale(axes: "Axes", left: float, top: float, bottom: float) -> None:
    """Vertical lines at quarters, with their percentages below."""
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + _SCALE_WIDTH * share
        axes.plot([x, x], [top, bottom], color=_GRID, lw=0.8, clip_on=False)
        axes.text(x, bottom + 0.06, percent(share), ha="center", va="top", fontsize=7, color=_MUTED)


def _draw_dot(axes: "Axes", x: float, y: float, index: int) -> None:
    """The mark of a series."""
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    axes.plot([x], [y], marker=marker, ms=5.5, color=colour, ls="none", clip_on=False)


def _draw_rate(axes: "Axes", left: float, y: float, index: int, rate: "Rate | None") -> None:
    """A dot, its interval, and both in words."""
    if rate is not None and rate.total:
        ends = [left + _SCALE_WIDTH * bound for bound in rate.interval]
        axes.plot(ends, [y, y], color=_COLOURS[index % len(_COLOURS)], lw=1.6, clip_on=False)
        _draw_dot(axes, left + _SCALE_WIDTH * rate.value, y, index)
    axes.text(left + _SCALE_WIDTH + 0.15, y, rate_text(rate), va="center_baseline", fontsize=8)


@contextmanager
def _canvas(width: float, height: float) -> Iterator["Axes"]:
    """Bare axes measured in inches from the top left, in a style that no matplotlibrc changes."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # The reader's browser brings the fonts, so a glyph that matplotlib's own font lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(height, 0))
        yield axes


def _to_svg(axes: "Axes", title: str, description: str, content: str) -> str:
    """The canvas as one element with a title, a description, and ids that begin with a hash of `content`."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    axes.get_figure(root=True).savefig(buffer, format="svg", metadata=nothing)  # pyright: ignore
    prefix = "k" + hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()[:10]
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.rpartition("}")[2], _renamed(key, value, prefix))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    root.attrib.update(
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "role": "img",
            "aria-labelledby": f"{prefix}-title {prefix}-desc",
        }
    )
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{prefix}-{tag}")
        element.text = legible(text)
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _renamed(key: str, value: str, prefix: str) -> str:
    """An attribute's value with its ids prefixed, and with the page's font for matplotlib's."""
    if key == "id":
        return f"{prefix}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}-").replace("'DejaVu Sans'", "system-ui, sans-serif")


def _check_shape(rows: Sequence, columns: Sequence, table: Sequence[Sequence], name: str) -> None:
    if not rows or not columns:
        raise ValueError("a heat map needs at least one row and one column")
    if len(table) != len(rows) or any(len(line) != len(columns) for line in table):
        raise ValueError(f"{name} must have {len(rows)} rows of {len(columns)}")


def _is_legible(character: str) -> bool:
    return character.isprintable() or character in _KEPT or unicodedata.category(character) == "Zs"


def _hundredths(value: float) -> str:
    hundred = 100 * value
    if hundred in (0, 100):
        return f"{hundred:.0f}"
    if hundred < 0.05:
        return "<0.1"
    if hundred > 99.95:
        return ">99.9"
    return f"{hundred:.1f}" if hundred < 0.95 or hundred > 99.05 else f"{hundred:.0f}"


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an RGB colour (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters, cut in the middle, since names differ at either end."""
    text = " ".join(legible(text).split())
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def _wrap(text: str, limit: int) -> list[str]:
    """Lines of at most `limit` characters, broken after a separator where there is one."""
    lines = [""]
    for part in re.split(r"(?<=[-_/. ])", text):
        while part:
            room = limit - len(lines[-1])
            if len(part) > room and lines[-1]:
                lines.append("")
                continue
            lines[-1], part = lines[-1] + part[:room], part[room:]
    return lines


def _text_width(lines: Sequence[str], size: float = 9) -> float:
    """The width in inches that the longest line may need; East Asian characters count double."""
    counts = (sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) for line in lines)
    return max(counts) * size * 0.6 / 72
