"""The unit map: every unit labelled SCU, UCU, CU or RU, with the evidence for it, as safetensors + JSON.

chart = UnitMap.load("runs/diagnose")
frozen = chart.select("scu,cu:0.06")            # all SCU, and the CU that matter most, 6 % of all units
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keelguard.errors import UsageError
from keelguard.hashes import sha256_of
from keelguard.runs import disk_errors, read_json, write_json

if TYPE_CHECKING:
    import torch

    from keelguard.units.index import UnitIndex

FORMAT = "keelguard.units/1"
GROUPS = ("CU", "SCU", "UCU", "RU")
"""The groups; a label is the place in this tuple."""

Ranking = Literal["global", "layer"]


@dataclass(frozen=True)
class Sizes:
    """Shares of all units that the groups hold; CU is the rest."""

    scu: float = field(default=0.01, metadata={"help": "share of safety-critical units"})
    ucu: float = field(default=0.02, metadata={"help": "share of utility-critical units"})
    ru: float = field(default=0.2, metadata={"help": "share of redundant units"})

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share < 1:
                raise UsageError(f"--{name} {share}: give a share of all units in [0, 1)")
        if sum(vars(self).values()) > 1:
            raise UsageError(f"--scu, --ucu and --ru add up to {sum(vars(self).values()):.2f}; give at most 1 in all")


def order(contrast: "torch.Tensor", strength: "torch.Tensor", group: str) -> "torch.Tensor":
    """Units (units,) int64 in the order in which a group takes them (paper, section 3.2).

    SCU: largest I_S − I_U; UCU: smallest; RU: smallest I_S + I_U; CU: largest I_S + I_U.

    Args:
        contrast: I_S − I_U, normalised.
        strength: I_S + I_U, normalised, with the size of I_S where it is signed: a unit that works against refusal
            is not redundant.
    """
    keys = {"SCU": contrast, "UCU": -contrast, "RU": -strength, "CU": strength}
    return keys[group].argsort(descending=True, stable=True)


def classify(
    contrast: "torch.Tensor", strength: "torch.Tensor", blocks: Sequence[int], sizes: Sizes, ranking: Ranking = "global"
) -> "torch.Tensor":
    """Labels (units,) int8 of all units.

    Args:
        contrast, strength: see `order`.
        blocks: the number of units of each block, in order.
        ranking: rank over the whole model, or the same share within each block.
    """
    import torch

    if ranking == "layer":
        parts = zip(contrast.split(list(blocks)), strength.split(list(blocks)), strict=True)
        return torch.cat([classify(c, s, [len(c)], sizes) for c, s in parts])
    labels = torch.zeros(len(contrast), dtype=torch.int8)
    for label, group in ((1, "SCU"), (2, "UCU"), (3, "RU")):
        count = round(getattr(sizes, group.lower()) * len(contrast))
        ranked = order(contrast, strength, group)
        free = ranked[labels[ranked] == 0]
        labels[free[:count]] = label
    return labels


def _share(word: str, text: str) -> float:
    """The share behind the colon of a word, in [0, 1]."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"{word!r}: {text!r} is no share of all units; write, for example, cu:0.06")
    return share


@dataclass(frozen=True)
class UnitMap:
    """What a diagnosis found.

    Attributes:
        labels: (units,) int8, places in `GROUPS`.
        contrast, strength: normalised I_S − I_U and I_S + I_U (units,) float64 by the score that ranks; see `order`.
        raw: importance as measured, by score and use: raw["decision"]["safety"] (units,).
        layout: the blocks as `UnitIndex.layout` gives them.
        weights: hash of the weights that the map describes.
        meta: score, ranking, sizes, settings, data with hashes, coverage, stability, overlap, cost.
    """

    labels: "torch.Tensor"
    contrast: "torch.Tensor"
    strength: "torch.Tensor"
    raw: Mapping[str, Mapping[str, "torch.Tensor"]]
    layout: list[dict[str, Any]]
    attention: str
    weights: str
    meta: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def blocks(self) -> list[int]:
        """The number of units of each block."""
        return [block["units"] for block in self.layout]

    @property
    def digest(self) -> str:
        """The hash of the weights and of the order of all units in every group, without the sizes of the groups."""
        ranked = {group: self.ranked(group).tolist() for group in GROUPS}
        return sha256_of([self.weights, ranked])

    def members(self, group: str) -> "torch.Tensor":
        """The units of a group as a mask (units,).

        Raises:
            UsageError: there is no such group.
        """
        if group.upper() not in GROUPS:
            raise UsageError(f"group {group!r}: unknown; choose from {', '.join(GROUPS).lower()}")
        return self.labels == GROUPS.index(group.upper())

    def ranked(self, group: str) -> "torch.Tensor":
        """All units, (units,) int64, in the order in which a group takes them."""
        return order(self.contrast, self.strength, group.upper())

    def top(self, group: str, share: float) -> "torch.Tensor":
        """A mask (units,) of that share of all units, the first in a group's order whatever their label.

        Of a map that ranks within blocks, that share of every block. CU has no order of its own, since what matters
        most to both comes first in SCU and UCU: there only units with its label are taken.
        """
        import torch

        ranked = self.ranked(group)
        if group.upper() == "CU":
            ranked = ranked[self.members("cu")[ranked]]
        places = torch.zeros(len(self), dtype=torch.bool)
        if self.meta.get("ranking") != "layer":
            places[ranked[: round(share * len(self))]] = True
            return places
        block = torch.repeat_interleave(torch.arange(len(self.blocks)), torch.tensor(self.blocks))[ranked]
        for number, size in enumerate(self.blocks):
            places[ranked[block == number][: round(share * size)]] = True
        return places

    def select(self, text: str) -> "torch.Tensor":
        """A mask (units,) from words such as "scu,cu:0.06".

        GROUP takes a whole group; GROUP:SHARE the first of it, up to that share of all units; `all` everything.

        Raises:
            UsageError: the text is not of this form.
        """
        import torch

        mask = torch.zeros(len(self), dtype=torch.bool)
        for word in filter(None, (word.strip() for word in text.replace("+", ",").split(","))):
            group, _, share = word.partition(":")
            if group.lower() == "all" and not share:
                mask[:] = True
                continue
            members = self.members(group)
            if share:
                count = round(_share(word, share) * len(self))
                ranked = self.ranked(group)
                members = torch.zeros_like(members).index_fill_(0, ranked[members[ranked]][:count], True)
            mask |= members
        if not mask.any():
            raise UsageError(f"{text!r}: selects no unit; name groups of the map, as in scu,cu:0.06")
        return mask

    def counts(self) -> dict[str, int]:
        """Units per group."""
        return {group: int(self.members(group).sum()) for group in GROUPS}

    def place(self, index: "UnitIndex", weights: str | None = None) -> "UnitMap":
        """The map itself, when it fits a model.

        Args:
            weights: the hash of the model's weights; None when a changed model is meant to be used with the map.

        Raises:
            UsageError: the map was made for another architecture or for other weights.
        """
        if index.layout != self.layout:
            raise UsageError(
                f"the unit map holds {len(self)} units in {len(self.layout)} blocks, the model has {len(index)} in "
                f"{len(index.blocks)}: it was made for another architecture. Run `keelguard diagnose` on this model"
            )
        if weights is not None and weights != self.weights:
            raise UsageError(
                f"the unit map was made for weights {self.weights[:16]} ({self.meta.get('model', 'unnamed')}), the "
                f"model has {weights[:16]}; "
                "run `keelguard diagnose` on this model, or name the model that the map was made for"
            )
        return self

    def relabelled(self, sizes: Sizes, ranking: Ranking = "global") -> "UnitMap":
        """The same scores with groups of other sizes."""
        labels = classify(self.contrast, self.strength, self.blocks, sizes, ranking)
        return replace(self, labels=labels, meta={**self.meta, "sizes": vars(sizes), "ranking": ranking})

    def save(self, folder: str | Path) -> None:
        """Write map.safetensors and map.json, each atomically; the JSON comes last and vouches for the other.

        Raises:
            FailureError: the disk is full or the folder cannot be written.
        """
        from safetensors.torch import save

        folder = Path(folder)
        tensors = {"labels": self.labels, "contrast": self.contrast, "strength": self.strength}
        for score, uses in self.raw.items():
            tensors.update({f"raw.{score}.{use}": value for use, value in uses.items()})
        temporary = folder / ".map.safetensors.tmp"
        # Copies, since safetensors refuses tensors that share memory.
        tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        content = save(tensors, metadata={"format": FORMAT})
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(folder / "map.safetensors")
        write_json(
            folder / "map.json",
            {
                "format": FORMAT,
                "tensors": hashlib.sha256(content).hexdigest(),
                "weights": self.weights,
                "attention": self.attention,
                "groups": self.counts(),
                "blocks": self.layout,
                **self.meta,
            },
        )

    @classmethod
    def load(cls, source: str | Path) -> "UnitMap":
        """Read a map from its folder, or from either of its files.

        Raises:
            UsageError: there is no map, it is damaged, or of another format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        folder = Path(source)
        folder = folder if folder.is_dir() else folder.parent
        if not (folder / "map.json").is_file():
            raise UsageError(f"--units {source}: no unit map there; make one with `keelguard diagnose MODEL --out DIR`")
        content = read_json(folder / "map.json")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else json.dumps(content)[:20]
            raise UsageError(f"{folder / 'map.json'}: has the format {found!r}, not {FORMAT}; diagnose the model again")
        try:
            data = (folder / "map.safetensors").read_bytes()
            tensors = load(data)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{folder / 'map.safetensors'}: cannot be read ({error}); diagnose again") from error
        if content.get("tensors") != hashlib.sha256(data).hexdigest():
            raise UsageError(f"{folder}: map.json and map.safetensors do not belong together; diagnose the model again")
        raw: dict[str, dict[str, Any]] = {}
        for key in sorted(tensors):
            if key.startswith("raw."):
                _, score, use = key.split(".")
                raw.setdefault(score, {})[use] = tensors[key]
        own = ("format", "tensors", "weights", "attention", "groups", "blocks")
        meta = {k: v for k, v in content.items() if k not in own}
        return cls(
            tensors["labels"], tensors["contrast"], tensors["strength"], raw, content["blocks"], content["attention"],
            content["weights"], meta,
        )  # fmt: skip
