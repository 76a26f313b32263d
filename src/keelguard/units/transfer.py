"""Attribute transfer: which units change their group between two models, by the thresholds of the first.

    transfer = attribute_transfer(before, after)    # two unit maps of one architecture
    transfer.share("RU", "CU")                      # of all units

The paper's Figure 4 (arXiv 2410.10862) classifies before and after a fine-tune. Groups of fixed shares cannot shrink or
grow, so the first map's thresholds are carried over as absolute scores: its least I_S − I_U of an SCU, its greatest of
a UCU and its greatest I_S + I_U of an RU, all on the first map's scale and in the order of `classify`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from keelguard.errors import UsageError
from keelguard.units.groups import GROUPS, UnitMap

if TYPE_CHECKING:
    import torch

Table = tuple[tuple[int, ...], ...]
"""Counts (4, 4) in the order of `GROUPS`: rows before, columns after."""


class Threshold(NamedTuple):
    """A group takes a unit whose key is above `key`, or equals it where the unit's number is at most `number`.

    Equal keys are common: units that no token reaches all have importance 0. `classify` takes them in order.
    """

    key: float
    number: int


@dataclass(frozen=True)
class Transfer:
    """What a cross-tabulation found.

    Attributes:
        score, attention, ranking: how both maps were made; `ranking` is the first map's.
        before, after: hashes of the weights that the maps describe.
        counts: units by group before (rows) and after (columns).
        layers: the same for every layer.
        thresholds: of the first map's groups on its own normalised scale, None for an empty group: one mapping by
            group for the whole model, or one for each block if the first map was ranked within blocks. Keys are the
            contrast for SCU, −contrast for UCU and −strength for RU (see `keelguard.units.groups.order`).
    """

    score: str
    attention: str
    ranking: str
    before: str
    after: str
    counts: Table
    layers: Mapping[int, Table]
    thresholds: tuple[Mapping[str, Threshold | None], ...]

    @property
    def units(self) -> int:
        """The number of all units."""
        return sum(map(sum, self.counts))

    @property
    def moved(self) -> float:
        """The share of all units that changed their group."""
        return 1 - sum(self.counts[i][i] for i in range(len(GROUPS))) / self.units

    def share(self, source: str, target: str) -> float:
        """The share of all units that went from one group to another."""
        return self.counts[GROUPS.index(source.upper())][GROUPS.index(target.upper())] / self.units

    def to_json(self) -> dict[str, Any]:
        """JSON values, with shares of all units beside the counts."""
        return {
            **{key: getattr(self, key) for key in ("score", "attention", "ranking", "before", "after")},
            "groups": list(GROUPS),
            "counts": [list(row) for row in self.counts],
            "shares": [[count / self.units for count in row] for row in self.counts],
            "moved": self.moved,
            "layers": {str(layer): [list(row) for row in table] for layer, table in self.layers.items()},
            "thresholds": [
                {group: None if found is None else found._asdict() for group, found in each.items()}
                for each in self.thresholds
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Transfer":
        """The inverse of `to_json`."""
        return cls(
            **{key: data[key] for key in ("score", "attention", "ranking", "before", "after")},
            counts=_table(data["counts"]),
            layers={int(layer): _table(table) for layer, table in data["layers"].items()},
            thresholds=tuple(
                {group: None if found is None else Threshold(**found) for group, found in each.items()}
                for each in data["thresholds"]
            ),
        )


def attribute_transfer(before: UnitMap, after: UnitMap) -> Transfer:
    """Cross-tabulate the groups of `before` with those that `after` has by the thresholds of `before`.

    Raises:
        UsageError: the maps were made with different scores, attention options or layouts, lack the raw importance,
            or the groups of `before` are not those that its scores give.
    """
    import torch

    labels, thresholds = _carried(before, after)
    pairs = len(GROUPS) * before.labels.long() + labels.long()
    places = torch.repeat_interleave(
        torch.tensor([block["layer"] for block in before.layout]), torch.tensor(before.blocks)
    )

    def table(chosen: "torch.Tensor") -> Table:
        return _table(pairs[chosen].bincount(minlength=len(GROUPS) ** 2).view(len(GROUPS), -1).tolist())

    return Transfer(
        score=before.meta["score"],
        attention=before.attention,
        ranking=before.meta.get("ranking", "global"),
        before=before.weights,
        after=after.weights,
        counts=table(torch.ones_like(places, dtype=torch.bool)),
        layers={layer: table(places == layer) for layer in places.unique().tolist()},
        thresholds=tuple(thresholds),
    )


def carried_labels(before: UnitMap, after: UnitMap) -> "torch.Tensor":
    """Labels (units,) int8 of `after` by the thresholds of `before`; raises as `attribute_transfer`."""
    return _carried(before, after)[0]


def _carried(before: UnitMap, after: UnitMap) -> "tuple[torch.Tensor, list[dict[str, Threshold | None]]]":
    """The labels of `after`, and the thresholds of `before`, one mapping for each stretch of units ranked together."""
    import torch

    from keelguard.units.importance import Importance, standardise

    score = _check_alike(before, after)
    stretches = before.blocks if before.meta.get("ranking", "global") == "layer" else [len(before)]

    def keys(chart: UnitMap) -> list[dict[str, torch.Tensor]]:
        raw, reference = (Importance(**each.raw[score]) for each in (chart, before))
        found = standardise(raw, score, before.blocks, reference)
        parts = zip(found.contrast.split(stretches), found.strength.split(stretches), strict=True)
        # The order of the groups is the precedence of `classify`.
        return [{"SCU": contrast, "UCU": -contrast, "RU": -strength} for contrast, strength in parts]

    own = keys(before)
    thresholds = [_thresholds(*pair) for pair in zip(own, before.labels.split(stretches), strict=True)]

    def labels(found: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.cat([_label(*pair) for pair in zip(found, thresholds, strict=True)])

    if not torch.equal(labels(own), before.labels):
        raise UsageError(
            "the first unit map's groups are not those that its scores give, so that it has no thresholds to carry "
            "over; run `keelguard diagnose` again"
        )
    return labels(keys(after)), thresholds


def _check_alike(before: UnitMap, after: UnitMap) -> str:
    """The score of both maps."""
    scores = [chart.meta.get("score") for chart in (before, after)]
    pairs = (("score", *scores), ("attention option", before.attention, after.attention))
    for what, first, second in pairs:
        if first != second:
            raise UsageError(f"the unit maps have different {what}s, {first} and {second}; diagnose both models alike")
    if before.layout != after.layout:
        raise UsageError(
            f"the unit maps hold {len(before)} units in {len(before.layout)} blocks and {len(after)} in "
            f"{len(after.layout)}, of different layouts; name two maps of one architecture"
        )
    for which, chart in (("first", before), ("second", after)):
        if {"safety", "utility"} - set(chart.raw.get(scores[0] or "", {})):
            raise UsageError(
                f"the {which} unit map lacks raw importance by {scores[0]}; run `keelguard diagnose` again"
            )
    return str(scores[0])


def _thresholds(keys: "Mapping[str, torch.Tensor]", labels: "torch.Tensor") -> dict[str, Threshold | None]:
    """The last unit that each group takes, as its key and its number in this stretch."""
    found: dict[str, Threshold | None] = {}
    for group, key in keys.items():
        members = (labels == GROUPS.index(group)).nonzero().flatten()
        if not len(members):
            found[group] = None
            continue
        least = key[members].min()
        found[group] = Threshold(least.item(), int(members[key[members] == least].max()))
    return found


def _label(keys: "Mapping[str, torch.Tensor]", thresholds: Mapping[str, Threshold | None]) -> "torch.Tensor":
    """Labels (units,) int8 by absolute thresholds."""
    import torch

    numbers = torch.arange(len(next(iter(keys.values()))))
    labels = torch.zeros(len(numbers), dtype=torch.int8)
    for group, key in keys.items():
        threshold = thresholds[group]
        if threshold is not None:
            taken = (key > threshold.key) | ((key == threshold.key) & (numbers <= threshold.number))
            labels[taken & (labels == 0)] = GROUPS.index(group)
    return labels


def _table(rows: Sequence[Sequence[int]]) -> Table:
    return tuple(tuple(int(count) for count in row) for row in rows)
