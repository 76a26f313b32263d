"""Rows of the same arm in several worlds as one: rates over all requests, and every world's own figures."""

from typing import Any

from keelguard.stats import Rate
from keelguard.units.training import Row


def pooled(rows: list[Row]) -> dict[str, Any]:
    """One arm in every world."""
    points = [row.point for row in rows if row.point]

    def pool(name: str) -> dict[str, Any]:
        rates = [getattr(point, name) for point in points]
        return Rate(sum(r.count for r in rates), sum(r.total for r in rates)).to_json()

    return {
        "trained": rows[0].trained,
        "task_loss": [row.task_loss for row in rows],
        "held_out_loss": [row.held_out_loss for row in rows],
        "asr_by_seed": [point.asr.value for point in points],
        "seconds": [row.seconds for row in rows],
        **{name: pool(name) for name in ("asr", "refused", "over_refusal", "utility")},
    }


def broken(worlds: dict[int, dict[str, Row]], name: str) -> list[bool]:
    """Which requests an arm answers with harm, over all worlds, for paired tests."""
    return [flag for world in worlds.values() if (point := world[name].point) for flag in point.broken]
