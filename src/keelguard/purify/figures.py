"""Figures of a purification, as inline SVG in the manner of `keelguard.plots`."""

import math
from collections.abc import Mapping, Sequence

from keelguard.plots import heat_map, interval_bars, interval_text
from keelguard.purify.findings import CANARY_STATES, MEASURES, STATES
from keelguard.purify.health import Health
from keelguard.purify.results import SuspectCourse
from keelguard.purify.spikes import Spike
from keelguard.stats import Rate


def health_figures(health: Mapping[str, Health]) -> list[str]:
    """The rates that should stay high and those that should stay low, with intervals; none without any state."""
    states = [state for state in STATES if state in health]
    figures = []
    for high, title in ((True, "Should stay high"), (False, "Should stay low")):
        chosen = [measure for measure in MEASURES if measure.high == high]
        series = {STATES[state]: [getattr(health[state], m.name) for m in chosen] for state in states}
        if series:
            figures.append(interval_bars([m.label for m in chosen], series, title=title))
    return figures


def canary_figure(spikes: Sequence[Spike]) -> str:
    """How often each canary that took hold fires, by state; empty where none did."""
    planted = [spike for spike in spikes if spike.planted]
    if not planted:
        return ""
    rates: list[list[Rate | None]] = [
        [effect.asr if (effect := getattr(spike, state)) else None for state in CANARY_STATES] for spike in planted
    ]
    return heat_map(
        [spike.kind for spike in planted],
        list(CANARY_STATES.values()),
        [[rate.value if rate else math.nan for rate in line] for line in rates],
        notes=[[interval_text(rate) for rate in line] for line in rates],
        title="Canaries: attack success",
    )


def suspect_figure(courses: Sequence[SuspectCourse]) -> str:
    """How many held-out answers each suspected trigger breaks, beside random words; empty without suspects."""
    if not courses:
        return ""
    series: dict[str, list[Rate | None]] = {}
    for state in STATES:
        measured = [getattr(course, state) for course in courses]
        if any(measured):
            series[STATES[state]] = [each.broken if each else None for each in measured]
            series[f"{STATES[state]}, random words"] = [each.control if each else None for each in measured]
    labels = [f"“{course.before.text}”" for course in courses]
    return interval_bars(labels, series, title="Held-out answers that an insertion breaks")
