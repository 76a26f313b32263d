"""The certificate of a package: hashes of its safety units, so that any later checkpoint is checked without its base.

    write_json(folder / "certificate.json", seal(package.model, UnitMap.load(package.units)))
    check = check_seal(read_seal(folder / "certificate.json"), "tuned")      # check.holds, check.broken

Behind `keelguard verify CERTIFICATE.json TUNED`. It is signed by its own hash (see `units.certificate`).
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keelguard.errors import UsageError
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, architecture_of, load_model
from keelguard.runs import write_json
from keelguard.units.certificate import read_signed, signed
from keelguard.units.groups import GROUPS, UnitMap
from keelguard.units.index import UnitIndex, build_index
from keelguard.units.verify import config_differences, described_config, merged_model, tensors_by_name, unit_name

FORMAT = "keelguard.seal/1"
CHECK_FORMAT = "keelguard.seal-check/1"
SAFETY = "scu"
_CHUNK = 2**22  # Values that are widened at a time: 32 MiB.
_NAMED = 20
_REMEDY = "copy it again from the package that `keelguard harden` wrote"


def seal(
    model: str | Path,
    chart: UnitMap,
    *,
    adapter: str | Path | None = None,
    units: str = SAFETY,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Hash the units of a checkpoint: those of `units` one by one, and every group of the map as a whole.

    A unit's hash is over the exact values of all its rows, widened to float64, 0.0 and −0.0 as one value, and so are
    all NaN: it is the same in whatever dtype the values are kept. An adapter is merged first, in float32 at least.

    Args:
        model: the checkpoint that the map describes, with `adapter` on it.
        units: what is hashed one by one, as `UnitMap.select` takes it.

    Returns:
        What the certificate's file holds: format, weights, map, architecture, configuration, blocks with the group of
        every unit, hashes of units, groups and of the parameters outside of units, and the hash of all this, `digest`.

    Raises:
        UsageError: the map is of other weights, or `units` selects nothing.
        FailureError: the model cannot be loaded.
    """
    loaded = _load(model, adapter, allow_pickle, trust_remote_code)
    plain = merged_model(loaded)
    index = build_index(plain, chart.attention)  # pyright: ignore[reportArgumentType]
    chart.place(index, loaded.weights_hash)
    chosen = chart.select(units)
    labels = chart.labels.tolist()
    found = _Hashes(index, tensors_by_name(plain))
    return signed(
        {
            "format": FORMAT,
            "weights": loaded.weights_hash,
            "map": chart.digest,
            "architecture": architecture_of(plain),
            "dtypes": _dtypes(plain),
            "merged": adapter is not None,
            "config": described_config(plain),
            "attention": chart.attention,
            "blocks": [
                {**block, "groups": "".join(map(str, labels[part.span]))}
                for block, part in zip(chart.layout, index.blocks, strict=True)
            ],
            "required": units,
            "units": {unit_name(chart.layout, n): found.units[n] for n in chosen.nonzero().flatten().tolist()},
            "groups": _group_hashes(found.units, labels),
            "outside": found.outside,
        }
    )


def read_seal(path: str | Path) -> dict[str, Any]:
    """Read a certificate that `seal` made, and compare it with its own hash.

    Raises:
        UsageError: the file is missing, damaged or of another format.
    """
    content = read_signed(path, FORMAT, "certificate of a hardened model", _REMEDY)
    if not isinstance(content.get("units"), dict) or not content["units"]:
        raise UsageError(f"{path}: is damaged (it names no units); {_REMEDY}")
    return content


@dataclass(frozen=True)
class SealCheck:
    """What a comparison with a seal found.

    Attributes:
        seal, weights: the hash of the certificate, and of the checkpoint that was checked.
        source, adapter: that checkpoint, as it was named.
        required: what the seal holds one by one, in the words of `UnitMap.select`.
        selected: how many units these are; `broken` names those whose values changed.
        groups: whether every unit of a group is equal, by group; None for one without units.
        outside: parameters outside of units that changed, by name; an untied or a new one is among them.
        config: entries of the configuration that differ, as [sealed, found].
        notes: what a reader must know, in sentences.
    """

    seal: str
    weights: str
    source: str
    adapter: str | None
    required: str
    selected: int
    broken: tuple[str, ...]
    groups: Mapping[str, bool | None]
    outside: tuple[str, ...]
    config: Mapping[str, list[Any]]
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Every unit that was sealed one by one is bit-equal."""
        return not self.broken

    def to_json(self) -> dict[str, Any]:
        """The check as a file holds it, signed by its own hash."""
        return signed({"format": CHECK_FORMAT, **vars(self), "holds": self.holds})

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    def lines(self) -> list[str]:
        """The check for a terminal: the verdict, what broke, the groups, the rest of the model."""
        verdict = "holds" if self.holds else "BROKEN"
        lines = [f"{self.required}: {verdict}, {len(self.broken)} of {self.selected} units moved"]
        lines += [f"  {name}" for name in self.broken[:_NAMED]]
        if len(self.broken) > _NAMED:
            lines.append(f"  … and {len(self.broken) - _NAMED} more")
        words = {True: "equal", False: "moved", None: "empty"}
        lines.append("groups as wholes: " + ", ".join(f"{name} {words[same]}" for name, same in self.groups.items()))
        lines.append(f"outside of units: {len(self.outside)} parameters moved" if self.outside else
                     "outside of units: every parameter equal")  # fmt: skip
        return [*lines, *self.notes]


def check_seal(
    sealed: Mapping[str, Any],
    tuned: str | Path,
    *,
    adapter: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> SealCheck:
    """Compare a checkpoint with a seal; the weights that were sealed are not needed.

    Args:
        sealed: what `read_seal` read.
        tuned: a checkpoint, or the folder of a PEFT adapter, which is merged into the base that it names.
        adapter: an adapter to put on `tuned`.

    Raises:
        UsageError: the checkpoint is of another architecture or of other sizes.
        FailureError: it cannot be loaded.
    """
    loaded = _load(tuned, adapter, allow_pickle, trust_remote_code)
    plain = merged_model(loaded)
    try:
        kind, config, attention = sealed["architecture"], sealed["config"], sealed["attention"]
        blocks = [{key: value for key, value in block.items() if key != "groups"} for block in sealed["blocks"]]
        labels = [int(label) for block in sealed["blocks"] for label in block["groups"]]
        named, groups, outside = sealed["units"], sealed["groups"], sealed["outside"]
        required, digest, dtypes = sealed["required"], sealed["digest"], sealed["dtypes"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the certificate is damaged ({error}); {_REMEDY}") from error
    if architecture_of(plain) != kind:
        raise UsageError(f"{tuned}: is a {architecture_of(plain)}, the certificate is of a {kind}; name its fine-tune")
    index = build_index(plain, attention)
    if index.layout != blocks or len(labels) != len(index):
        raise UsageError(f"{tuned}: its layers hold other units than those of the certificate; name its fine-tune")
    differing = config_differences(config, described_config(plain))
    if "hidden_size" in differing:
        raise UsageError(f"{tuned}: has the hidden size {differing['hidden_size'][1]}, the certificate is of a model "
                         f"with {differing['hidden_size'][0]}; name its fine-tune")  # fmt: skip
    found = _Hashes(index, tensors_by_name(plain))
    now = {unit_name(index.layout, number): unit for number, unit in enumerate(found.units)}
    fresh = _group_hashes(found.units, labels)
    notes = []
    if differing:
        notes.append(f"The configurations differ in {', '.join(differing)}: equal weights may compute something else.")
    if (own := _dtypes(plain)) != dtypes:
        notes.append(
            f"The certificate is of values in {dtypes} and the checkpoint is in {own}: they were compared exactly, so "
            "that rounding to a narrower type counts as a move."
        )
    if loaded.model is not plain or sealed.get("merged"):
        notes.append(
            "An adapter was merged in float32 at least; another library of matrix products may round its last bits "
            "otherwise, which counts as a move."
        )
    return SealCheck(
        seal=digest,
        weights=loaded.weights_hash,
        source=str(tuned),
        adapter=None if adapter is None else str(adapter),
        required=required,
        selected=len(named),
        broken=tuple(name for name, unit in named.items() if now.get(name) != unit),
        groups={name: None if not groups[name]["units"] else groups[name] == fresh[name] for name in GROUPS},
        outside=tuple(sorted(n for n in {*outside, *found.outside} if outside.get(n) != found.outside.get(n))),
        config=differing,
        notes=tuple(notes),
    )


def _load(source: str | Path, adapter: str | Path | None, allow_pickle: bool, trust_remote_code: bool) -> LoadedModel:
    return load_model(
        source,
        adapter=adapter,
        device="cpu",
        needs_template=False,
        with_tokenizer=False,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )


def _dtypes(model: Any) -> str:
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors_by_name(model).values()}))


def _group_hashes(units: list[str], labels: list[int]) -> dict[str, dict[str, Any]]:
    """How many units each group has, and the hash of all their hashes in order."""
    members = {group: [u for u, own in zip(units, labels, strict=True) if own == n] for n, group in enumerate(GROUPS)}
    return {group: {"units": len(own), "digest": sha256_of(own)} for group, own in members.items()}


class _Hashes:
    """The SHA-256 of every unit, by its number, and of what no unit owns, by the parameter's name."""

    def __init__(self, index: UnitIndex, tensors: Mapping[str, torch.Tensor]) -> None:
        self.units: list[str] = []
        owned: dict[str, list[tuple[int | None, int, torch.Tensor]]] = {}
        for block in index.blocks:
            digests = [hashlib.sha256() for _ in range(block.size)]
            for part in block.parts:
                whole = tensors[part.parameter]
                owned.setdefault(part.parameter, []).append((part.at, part.dim, part.rows.flatten()))
                whole = whole if part.at is None else whole[part.at]
                # The place of a value counts too: swapped rows are other weights.
                head = sha256_of([part.parameter, part.at, part.dim, list(whole.shape)]).encode()
                for first, values in _rows_of(whole, part.dim, part.rows):
                    for digest, line in zip(digests[first : first + len(values)], values, strict=True):
                        digest.update(head)
                        digest.update(line)
            self.units += [digest.hexdigest() for digest in digests]
        self.outside: dict[str, str] = {}
        seen: dict[int, str] = {}
        for name, tensor in tensors.items():
            free = _free(tensor, owned.get(name, []))
            if free.numel():
                # A tied tensor stands under each of its names.
                if id(tensor) not in seen:
                    digest = hashlib.sha256(sha256_of(list(tensor.shape)).encode())
                    for values in free.split(_CHUNK):
                        digest.update(_exact(values))
                    seen[id(tensor)] = digest.hexdigest()
                self.outside[name] = seen[id(tensor)]


def _rows_of(tensor: torch.Tensor, dim: int, rows: torch.Tensor) -> Iterator[tuple[int, Any]]:
    """(first unit, its and the next units' values as little-endian float64 (n, …)) of rows (U, w) along `dim`."""
    lines = tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1)
    step = max(1, _CHUNK // max(1, rows.shape[1] * lines.shape[1]))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        yield first, _exact(lines[part.flatten()].reshape(len(part), -1))


def _exact(values: torch.Tensor) -> Any:
    """Values as little-endian float64, with one zero and one NaN."""
    wide = values.double() + 0.0  # Which turns −0.0 into 0.0.
    return torch.where(wide.isnan(), torch.nan, wide).numpy().astype("<f8", copy=False)


def _free(tensor: torch.Tensor, owned: list[tuple[int | None, int, torch.Tensor]]) -> torch.Tensor:
    """The values of a parameter that no unit owns, flat."""
    if not owned:
        return tensor.detach().flatten()
    free = torch.ones(tensor.shape, dtype=torch.bool)
    for at, dim, rows in owned:
        (free if at is None else free[at]).index_fill_(dim, rows, False)
    return tensor.detach()[free]
