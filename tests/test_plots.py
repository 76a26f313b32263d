"""Figures hold every value in words, are the same twice, and let no label become markup."""

import itertools
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keelguard.plots import heat_map, interval_bars, interval_text, legible, percent, rate_text
from keelguard.stats import Rate

NAN = math.nan
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</svg><script>alert(1)</script><img src=x onerror=alert(1)> \"' & $x_1$ \\frac"


def texts(svg: str) -> list[str]:
    """What the figure shows, without its title and description for screen readers."""
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def fills(svg: str) -> list[str]:
    """The fills of the cells: what lies between the background and the 24 steps of the colour scale."""
    paths = [element.get("style", "") for element in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    found = [match[1] for style in paths if (match := re.search(r"fill: (#\w+)", style))]
    return found[1:-24]


def tags(html: str) -> set[str]:
    found = set()

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.update([tag, *(name for name, _ in attrs if name.startswith("on"))])

    Tags().feed(html)
    return found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 %"),
        (1e-9, "<0.1 %"),
        (0.004, "0.4 %"),
        (0.0099, "1 %"),
        (0.124, "12 %"),
        (0.99, "99 %"),
        (0.996, "99.6 %"),
        (0.99999, ">99.9 %"),
        (1.0, "100 %"),
        (NAN, "–"),
    ],
)
def test_percent(value, text):
    assert percent(value) == text


def test_rate_text_is_never_a_bare_percentage():
    assert rate_text(Rate(12, 100)) == "12 % [7, 20]"
    assert rate_text(Rate(0, 50)) == "0 % [0, 7]"
    assert interval_text(Rate(12, 100)) == "[7, 20]"
    for nothing in (None, Rate(0, 0)):
        assert (rate_text(nothing), interval_text(nothing)) == ("–", "")


@given(st.integers(1, 500), st.data())
def test_only_the_extremes_read_as_none_and_all(total, data):
    rate = Rate(data.draw(st.integers(0, total)), total)
    assert (percent(rate.value) == "0 %") == (rate.count == 0)
    assert (percent(rate.value) == "100 %") == (rate.count == total)


def test_legible_writes_out_what_cannot_be_seen():
    assert legible("a\x1b[2J\u202eb\u200b\ud800\x7f\U000e0041") == (
        "a⟨U+001B⟩[2J⟨U+202E⟩b⟨U+200B⟩⟨U+D800⟩⟨U+007F⟩⟨U+E0041⟩"
    )
    untouched = "tab\tline\n\u00a0née 漢字 עברית 👩\u200d🔬"
    assert legible(untouched) == untouched


def test_heat_map_prints_every_cell_with_its_note():
    svg = heat_map(
        ["direct", "prefill"], ["base", "guarded"], [[0.12, NAN], [1, 0]], notes=[["[8, 18]", "x"], ["", ""]]
    )
    shown = texts(svg)
    assert [text for text in shown if "%" in text or text == "–"][:4] == ["12 %", "–", "100 %", "0 %"]
    assert {"direct", "prefill", "base", "guarded", "[8, 18]"} <= set(shown)
    assert "x" not in shown, "a note on a cell without a value"


def test_heat_map_scale_does_not_depend_on_the_values():
    one, *_ = fills(heat_map(["a"], ["m"], [[0.5]]))
    low, same, high = fills(heat_map(["a"], ["m", "n", "o"], [[0.0, 0.5, 1.0]]))
    assert one == same
    lightness = [sum(bytes.fromhex(colour[1:])) for colour in (low, same, high)]
    assert lightness == sorted(lightness, reverse=True)
    assert fills(heat_map(["a"], ["m"], [[NAN]])) == ["#efefef"]


def test_heat_map_words_stand_out_from_their_cell():
    def luminance(colour: str) -> float:
        shares = [c / 255 for c in bytes.fromhex(colour[1:])]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    values = [step / 50 for step in range(51)]
    svg = heat_map([f"a{i}" for i in range(51)], ["m"], [[value] for value in values])
    words = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if "%" in (e.text or "")][:51]
    for value, fill, word in zip(values, fills(svg), words, strict=True):
        assert word.text == percent(value)
        colour = re.search(r"fill: (#\w+)", word.get("style", ""))
        ends = sorted([luminance(fill), luminance(colour[1] if colour else "#000000")])
        assert (ends[1] + 0.05) / (ends[0] + 0.05) >= 4.5, value


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 8), (1, 8), (40, 1)])
def test_heat_map_text_stays_inside_the_figure(rows, columns):
    svg = heat_map(
        [f"attack-with-a-rather-long-name-{i}" for i in range(rows)],
        [f"org/some-model-8b-instruct-{i}" for i in range(columns)],
        [[0.5] * columns] * rows,
        notes=[["[40, 60]"] * columns] * rows,
    )
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    assert width <= 800
    assert len([text for text in texts(svg) if text == "50 %"]) == rows * columns
    for element in root.iter(f"{SVG}text"):
        x, y = (float(element.get(key) or places) for key, places in zip("xy", position(element), strict=True))
        assert 0 <= x < width
        assert 0 < y < height


def position(element: ElementTree.Element) -> tuple[float, float]:
    """Where a text without x and y stands: its translation."""
    found = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", element.get("transform", ""))
    return (float(found[1]), float(found[2])) if found else (NAN, NAN)


def test_interval_bars_print_every_rate_and_series():
    rates = {"base": [Rate(90, 100), None], "guarded": [Rate(50, 100), Rate(1, 100)]}
    shown = texts(interval_bars(["arithmetic", "copying"], rates, title="Utility"))
    for text in ("Utility", "arithmetic", "copying", "base", "guarded", "90 % [83, 94]", "50 % [40, 60]", "–"):
        assert text in shown


def test_interval_bars_lie_where_the_rates_say():
    svg = interval_bars(["task"], {"m": [Rate(50, 100)]})
    lines = [
        (re.findall(r"[ML] ([\d.]+) ([\d.]+)", element.get("d", "")), element.get("style", ""))
        for element in ElementTree.fromstring(svg).iter(f"{SVG}path")
    ]
    grid = [float(points[0][0]) for points, style in lines if "#d9d9d9" in style]
    ((left, right),) = [[float(x) for x, _ in points] for points, style in lines if "stroke-width: 1.6" in style]
    dot = [float(e.get("x", "")) for e in ElementTree.fromstring(svg).iter(f"{SVG}use")][-1]
    width = grid[-1] - grid[0]
    low, high = Rate(50, 100).interval
    assert [(x - grid[0]) / width for x in (left, dot, right)] == pytest.approx([low, 0.5, high], abs=1e-4)


def test_sections_name_what_begins_and_move_what_follows():
    rates = {"m": [Rate(1, 2), Rate(1, 2), Rate(1, 2)]}
    plain, parted = (interval_bars(["a", "b", "c"], rates, sections=each) for each in (None, {0: "Ours", 2: "Others"}))
    assert set(texts(parted)) - set(texts(plain)) == {"Ours", "Others"}
    assert texts(parted).index("b") < texts(parted).index("Others") < texts(parted).index("c")

    def dots(svg: str) -> list[float]:
        return [float(e.get("y", "")) for e in ElementTree.fromstring(svg).iter(f"{SVG}use") if e.get("y")][-3:]

    moved = [after - before for before, after in zip(dots(plain), dots(parted), strict=True)]
    assert moved[0] == pytest.approx(moved[1])
    assert moved[2] == pytest.approx(2 * moved[0])
    assert moved[0] > 0


def test_figures_are_the_same_twice_and_hold_nothing_foreign():
    for make in (
        lambda: heat_map(["a"], ["m"], [[0.5]]),
        lambda: interval_bars(["a"], {"m": [Rate(1, 2)]}),
    ):
        svg = make()
        assert svg == make()
        assert not re.search(r"<image|<style|<metadata|Matplotlib|data:|<!|<\?", svg)
        assert re.findall(r"https?://[^\"]*", svg) == ["http://www.w3.org/2000/svg"]


def test_figures_ignore_the_users_matplotlibrc():
    import matplotlib

    before = interval_bars(["a"], {"m": [Rate(1, 2)]})
    with matplotlib.rc_context({"font.family": "serif", "lines.solid_capstyle": "round", "lines.linewidth": 9}):
        assert interval_bars(["a"], {"m": [Rate(1, 2)]}) == before
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_ids_do_not_clash_and_references_resolve():
    figures = [
        heat_map(["a"], ["m"], [[0.5]]),
        heat_map(["a"], ["m"], [[0.6]]),
        interval_bars(["a"], {"m": [Rate(1, 2)], "n": [Rate(1, 3)]}),
        interval_bars(["b"], {"m": [Rate(1, 2)], "n": [Rate(1, 3)]}),
    ]
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in figures]
    for first, second in itertools.combinations(ids, 2):
        assert not first & second
    for svg, own in zip(figures, ids, strict=True):
        references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert {a or b for a, b in references} <= own
        assert set(re.findall(r'aria-labelledby="([^"]+)"', svg)[0].split()) <= own
    assert 'href="#' in figures[2]


@pytest.mark.parametrize(
    "svg",
    [
        heat_map([HOSTILE], [HOSTILE], [[0.5]], notes=[[HOSTILE]], title=HOSTILE),
        interval_bars([HOSTILE], {HOSTILE: [Rate(1, 2)]}, title=HOSTILE),
    ],
)
def test_labels_are_text(svg):
    assert tags(svg) == {"svg", "title", "desc", "defs", "g", "path", "text"} | ({"use"} if "<use" in svg else set())
    assert HOSTILE in texts(svg), "the title, whole and neither markup nor mathematics"
    assert ElementTree.fromstring(svg).findtext(f"{SVG}title") == HOSTILE


@settings(max_examples=20, deadline=None)
@given(st.text(min_size=0, max_size=60))
def test_any_name_gives_a_well_formed_figure(name):
    for svg in (heat_map([name], [name], [[0.5]]), interval_bars([name], {name: [Rate(1, 2)]}, title=name)):
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
        svg.encode("utf-8")


def test_long_names_keep_both_ends():
    shown = " ".join(texts(heat_map(["start" + "x" * 200 + "end"], ["m"], [[0.5]])))
    assert re.search(r"startx+…x+end", shown)
    assert "x" * 40 not in shown


@pytest.mark.parametrize(
    ("rows", "columns", "values", "notes"),
    [
        ([], ["m"], [], None),
        (["a"], [], [[]], None),
        (["a"], ["m"], [[0.1, 0.2]], None),
        (["a", "b"], ["m"], [[0.1]], None),
        (["a"], ["m"], [[0.1]], [[]]),
        (["a"], ["m"], [[1.2]], None),
        (["a"], ["m"], [[-0.1]], None),
    ],
)
def test_heat_map_refuses_what_it_cannot_show(rows, columns, values, notes):
    with pytest.raises(ValueError, match=r"heat map|values|notes"):
        heat_map(rows, columns, values, notes=notes)


@pytest.mark.parametrize(("labels", "rates"), [([], {"m": []}), (["a"], {}), (["a", "b"], {"m": [Rate(1, 2)]})])
def test_interval_bars_refuse_what_they_cannot_show(labels, rates):
    with pytest.raises(ValueError, match=r"interval_bars|series"):
        interval_bars(labels, rates)


def test_importing_plots_is_cheap():
    code = "import sys, keelguard.plots; sys.exit(any(m in sys.modules for m in ('matplotlib', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
