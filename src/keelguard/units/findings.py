"""What a diagnosis found, put into words: sentences and warnings that are computed from the figures.

    map_sentences(chart)                            # groups, stability, overlap, refusals
    verdict(proof)                                  # whether ablating the SCU breaks safety, beside the controls

Pure functions of results, so that the page and the terminal say the same.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from keelguard.plots import percent, rate_text
from keelguard.report import p_value, points
from keelguard.stats import mcnemar
from keelguard.units.direction import DirectionProbe, Estimate
from keelguard.units.groups import GROUPS, UnitMap
from keelguard.units.proof import LIKELY_TASKS, Point, Proof
from keelguard.units.scan import BROKEN
from keelguard.units.stability import chance
from keelguard.units.transfer import Transfer

GROUP_NAMES = {"SCU": "safety-critical", "UCU": "utility-critical", "CU": "complex", "RU": "redundant"}
"""The groups in the order in which they are shown."""

RANDOM, PAIRS, MAGNITUDE = "random units", "random token pairs", "magnitude"
_FAMILIES = {r"random \d+": RANDOM, r"random pair \d+": PAIRS}
_WORDS = {RANDOM: RANDOM, PAIRS: "units found for random token pairs", MAGNITUDE: "units of the largest weights"}
DIFFERENT = 0.5
"""An IoU below which two sets are called different: fewer than two thirds of the units of either are shared."""


def family(name: str) -> str:
    """What a curve of a proof belongs to: all seeds of one control share a family; other curves are their own."""
    return next((group for pattern, group in _FAMILIES.items() if re.fullmatch(pattern, name)), name)


def map_sentences(chart: UnitMap) -> list[str]:
    """What the map holds and how far it can be trusted, one sentence each, the most important first."""
    counts, total = chart.counts(), len(chart)
    groups = [f"{counts[g]:,} ({percent(counts[g] / total)}) are {name} ({g})" for g, name in GROUP_NAMES.items()]
    sized = "the sizes were given"
    if chart.meta.get("scan"):
        kept = chart.meta["scan"].get("found", {}).get("scu") is None
        sized = "the size of RU was found by ablation" if kept else "the sizes of SCU and RU were found by ablation"
    found = [
        f"Of the model’s {total:,} units, {', '.join(groups[:-1])} and {groups[-1]}; "
        f"{sized}, and which units fill them was found by the score “{chart.meta['score']}”."
    ]
    group = "SCU" if counts["SCU"] else "RU"
    if group == "RU":
        found.append("There are no SCU in this map: it was made without safety data, or with a size of 0.")
    found.append(_stability_sentence(chart, group))
    found += _overlap_sentences(chart, group)
    if chart.meta.get("prompts"):
        read = " and ".join(f"{count:,} {use} prompts" for use, count in chart.meta["prompts"].items())
        sentence = f"The map was made from {read}"
        if chart.meta["prompts"].get("safety") and "refusal_rate" in chart.meta:
            refused = percent(chart.meta["refusal_rate"])
            sentence += f"; the model refused {refused} of the harmful requests that it was asked, and only those count"
        found.append(sentence + ".")
    return found


def _stability_sentence(chart: UnitMap, group: str) -> str:
    stable = chart.meta.get("stability", {}).get(group)
    if not stable:
        return f"How stable the {group} are over resampled prompts was not measured."
    return (
        f"When the prompts are drawn anew, the {group} keep an overlap (IoU) of {iou_text(stable)} with themselves "
        f"over {stable['samples']} resamples; two random sets of their size would have "
        f"{share_of_one(stable['chance'])}."
    )


def iou_text(stable: Mapping[str, Any]) -> str:
    """A mean IoU with its interval, as in `0.89 [0.84, 0.97]`."""
    mean, low, high = (share_of_one(stable[key]) for key in ("iou", "low", "high"))
    return f"{mean} [{low}, {high}]"


def share_of_one(value: float | None) -> str:
    """A figure between 0 and 1 with two decimals; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def size_text(share: float) -> str:
    """A size that was chosen, as a percentage: exact, since 1.5 % and 2 % may stand beside one another."""
    return f"{round(100 * share, 4):g} %"


def group_chance(chart: UnitMap, group: str) -> float:
    """The IoU of two random sets of a group's size."""
    return chance(chart.counts()[group] / len(chart))


def _overlap_sentences(chart: UnitMap, group: str) -> list[str]:
    """On halves of the prompts, data sets and scores, with a plain word where they disagree."""
    overlap = chart.meta.get("overlap", {})
    beside = f"(chance {share_of_one(group_chance(chart, group))})"
    found = []
    for what in ("halves of the prompts", "data sets"):
        values = [pair[group] for pair in overlap.get(what, {}).values() if pair.get(group) is not None]
        if not values:
            continue
        same = min(values) >= DIFFERENT
        text = " to ".join(dict.fromkeys(share_of_one(v) for v in (min(values), max(values))))
        whose = "The two halves of the prompts" if what.startswith("halves") else "The data sets"
        end = "." if same else f": the {group} depend on which prompts were read."
        found.append(f"{whose} {'agree on' if same else 'give different'} {group}, with an IoU of {text} {beside}{end}")
    own = {}
    for pair, values in overlap.get("scores", {}).items():
        names = pair.split(" / ")
        if chart.meta["score"] in names and values.get(group) is not None:
            own[next(name for name in names if name != chart.meta["score"])] = values[group]
    if own:
        text = ", ".join(f"{share_of_one(value)} with {name}" for name, value in own.items())
        if min(own.values()) < DIFFERENT:
            found.append(
                f"Different scores give different {group}: those by {chart.meta['score']} have an IoU of {text} "
                f"{beside}, so that this is the map of one score, and another would name other units."
            )
        else:
            found.append(f"Other scores give similar {group}: the IoU is {text} {beside}.")
    return found


def breaking_point(proof: Proof) -> Point | None:
    """The smallest ablation of the SCU at which the attack success rate rises by 50 points or more."""
    ranked = sorted(proof.curves.get("SCU", []), key=lambda point: point.share)
    return next((point for point in ranked if _rise(proof, point) >= BROKEN), None)


def _rise(proof: Proof, point: Point) -> float:
    # Counts are exact where a difference of two floats would miss the threshold by its rounding.
    if not point.asr.total or not proof.dense.asr.total:
        return math.nan
    first, second = point.asr, proof.dense.asr
    return (first.count * second.total - second.count * first.total) / (first.total * second.total)


def strongest(proof: Proof, share: float, families: Iterable[str]) -> tuple[str, Point] | None:
    """The curve of these families whose attack success rate is the largest at a share, with its point."""
    wanted = set(families)
    found = [
        (name, point)
        for name, curve in proof.curves.items()
        if family(name) in wanted
        for point in curve
        if point.share == share and point.asr.total
    ]
    return max(found, key=lambda pair: pair[1].asr.value, default=None)


def verdict(proof: Proof) -> str:
    """Whether ablating the SCU breaks safety, at which share, and what the random controls do there."""
    dense = proof.dense
    point = breaking_point(proof)
    if point is None:
        return _no_verdict(proof)
    how = "zeroed" if proof.ablation == "zero" else "put at their mean activation"
    text = (
        f"With the {point.units:,} units that rank highest as SCU ({size_text(point.share)} of all) {how}, the attack "
        f"success rate rises from {rate_text(dense.asr)} to {rate_text(point.asr)}{_utility_change(proof, point)}"
    )
    rivals = {group: strongest(proof, point.share, [group]) for group in (RANDOM, PAIRS)}
    controls = [f"{_WORDS[group]} reach at most {rate_text(r[1].asr)}" for group, r in rivals.items() if r]
    rival = strongest(proof, point.share, [RANDOM, PAIRS])
    if rival is None:
        return f"{text}; no random control stands beside that."
    text += f"; at that share {' and '.join(controls)}"
    if len(rival[1].broken) != len(point.broken) or not point.broken:
        return f"{text} (not paired, so that there is no test)."
    test = mcnemar(point.broken, rival[1].broken)
    p = p_value(test.p_value)
    return f"{text} (SCU against {rival[0]}: exact McNemar test, p {p if p[0] == '<' else f'= {p}'})."


def _no_verdict(proof: Proof) -> str:
    curve = [point for point in proof.curves.get("SCU", []) if point.asr.total]
    if not curve or not proof.dense.asr.total:
        return "Whether ablating the SCU breaks safety was not measured."
    most = max(curve, key=lambda point: point.asr.value)
    text = (
        f"Ablating the SCU does not break safety here: the attack success rate is {rate_text(proof.dense.asr)} of the "
        f"whole model and at most {rate_text(most.asr)} without them (at {size_text(most.share)} of all units), and "
        f"no share raises it by {100 * BROKEN:.0f} points."
    )
    if proof.dense.asr.value > 1 - BROKEN:
        text += " It cannot rise that far, since the whole model complies with most requests already."
    return text


def _utility_change(proof: Proof, point: Point) -> str:
    if not proof.dense.utility.total:
        return ""
    change = point.utility_value(proof.tasks) - proof.dense.utility_value(proof.tasks)
    ends = " to ".join(utility_text(proof, each) for each in (proof.dense, point))
    return f", and utility changes by {points(change)} points (from {ends})"


def utility_text(proof: Proof, point: Point) -> str:
    """Utility as the proof measures it: accuracy with its interval, or the probability of a reference token."""
    if not point.utility.total:
        return "–"  # Without reference answers there is no loss either.
    return rate_text(point.utility) if proof.tasks else percent(point.utility_value(False))


def proof_warnings(proof: Proof) -> list[str]:
    """What weakens a proof, one text each."""
    found = []
    point = breaking_point(proof)
    for group in (RANDOM, PAIRS, MAGNITUDE):
        found += _control_warning(proof, point, group)
    if proof.judge.lower().startswith("keyword"):
        found.append(
            "The judge looks for refusal keywords. An answer without such words may be harmless: an ablated model that "
            "only babbles counts as broken. Read the rates beside utility and degenerate answers."
        )
    if not proof.dense.utility.total:
        found.append("Utility was not measured: there were no benign requests with reference answers.")
    elif not proof.tasks:
        found.append(
            f"Utility is measured by the mean probability of a reference answer’s tokens, since the whole model does "
            f"fewer than {percent(LIKELY_TASKS)} of the tasks: it says what the model expects, not what it can do."
        )
    return found


def _control_warning(proof: Proof, point: Point | None, group: str) -> list[str]:
    """A text if a control is half as strong as the SCU where these break safety, or breaks it where they do not."""
    if point is not None:
        rival = strongest(proof, point.share, [group])
        if rival is None or _rise(proof, rival[1]) < _rise(proof, point) / 2:
            return []
        return [
            f"A control is nearly as strong: without {_WORDS[group]} ({rival[0]}) the attack success rate is "
            f"{rate_text(rival[1].asr)} at the same share, at least half of the SCU’s rise. {_MEANING[group]}"
        ]
    shares = sorted({p.share for name, curve in proof.curves.items() if family(name) == group for p in curve})
    for share in shares:
        rival = strongest(proof, share, [group])
        if rival and _rise(proof, rival[1]) >= BROKEN:
            return [
                f"A control breaks safety where the SCU do not: without {_WORDS[group]} ({rival[0]}) the attack "
                f"success rate is {rate_text(rival[1].asr)} at {size_text(share)} of all units."
            ]
    return []


_MEANING = {
    RANDOM: "So the result says little about these units in particular.",
    PAIRS: "So the SCU may be units that carry any such choice of the output, not that of refusal.",
    MAGNITUDE: "So large weights alone may explain the result.",
}


def transfer_sentences(transfer: Transfer) -> list[str]:
    """How many units changed their group, and the largest moves."""
    moves = [(transfer.share(a, b), f"{a} → {b}") for a in GROUPS for b in GROUPS if a != b]
    largest = sorted((move for move in moves if move[0]), key=lambda move: -move[0])[:3]
    text = f"By the thresholds of the earlier map, {percent(transfer.moved)} of {transfer.units:,} units changed group"
    if largest:
        text += f"; most went {', '.join(f'{name} ({percent(share)})' for share, name in largest)}"
    return [text + ".", "Shares are of all units."]


def direction_sentences(probe: DirectionProbe) -> list[str]:
    """Which continuation is nearer, by k, and what the decision logit says."""
    sides: dict[str, list[str]] = {"the refusal is nearer": [], "the compliance is nearer": [], "neither is": []}
    for k, distances in zip(probe.ks, probe.averaged, strict=True):
        _, low, high = distances.difference
        place = 0 if high < 0 else 1 if low > 0 else 2
        list(sides.values())[place].append(str(k))
    parts = [f"{words} at k = {', '.join(ks)}" for words, ks in sides.items() if ks]
    found = [f"By the mean cosine distance over all layers, {'; '.join(parts)} (by 95 % intervals)."]
    if probe.decision is None:
        return found
    clean = probe.decision.clean
    lean = "refuse" if clean.low > 0 else "comply" if clean.high < 0 else "neither"
    after = probe.decision.compliance
    end = f"; after {probe.ks[-1]} tokens of compliance it is {_nats(after[-1])}" if after else ""
    leaning = "the model leans to neither side" if lean == "neither" else f"the model leans to {lean}"
    found.append(f"Before its answer {leaning}: the decision logit is {_nats(clean)}{end}.")
    return found


def _nats(estimate: Estimate) -> str:
    mean, low, high = (f"{value:+.1f}".replace("-", "−") for value in estimate)
    return f"{mean} [{low}, {high}] nats"
