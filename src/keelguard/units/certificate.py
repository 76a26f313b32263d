"""The certificate that `keelguard verify` gives: its file, signed by its own hash, and its words for a terminal.

The hash shows damage, and a change to whoever keeps the hash elsewhere: an attacker who can write the file can sign it
anew.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelguard.errors import UsageError
from keelguard.hashes import sha256_of
from keelguard.runs import disk_errors, read_json, write_json

if TYPE_CHECKING:
    import torch

FORMAT = "keelguard.certificate/1"
DIGEST = "digest"


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of all its other entries as its last one, `digest`."""
    plain = {key: value for key, value in content.items() if key != DIGEST}
    return {**plain, DIGEST: sha256_of(plain)}


def read_signed(path: str | Path, form: str, what: str, remedy: str) -> dict[str, Any]:
    """Read a JSON object that `signed` made.

    Args:
        form: its format, such as "keelguard.certificate/1"; `what` it is, and the `remedy`, are for the message.

    Raises:
        UsageError: it cannot be read, is of another format, or its content is not what was signed.
    """
    try:
        content = read_json(Path(path))
    except UsageError as error:
        raise UsageError(f"{path}: cannot be read as a {what} ({error.__cause__}); {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UsageError(f"{path}: is no {what} of the format {form} (but {found!r}); {remedy}")
    if content.get(DIGEST) != (digest := signed(content)[DIGEST]):
        named = str(content.get(DIGEST, "none"))[:16]
        raise UsageError(
            f"{path}: is damaged or was changed: its content has the hash {digest[:16]}, not {named}; {remedy}"
        )
    return content


@dataclass(frozen=True)
class Certificate:
    """What a comparison found.

    A unit is equal if every value of every row that it owns is, compared exactly after widening (0.0 and −0.0 are
    equal; so are two NaN). A row that units share moves all of them. A distance is ‖Δ‖ / ‖W‖ over all values of a
    unit; null in the JSON, and infinite in the tensor, where it is not finite.

    Attributes:
        base, tuned: source, adapter, hash of the weights on disk, architecture and dtypes of either model.
        chart: digest, hash of the labels, attention option and number of units of the unit map.
        groups: equal, moved, share moved, median and max distance of the moved units, by group.
        layers: the same for every layer: {"layer": 0, "groups": {…}}.
        outside: parameters that belong to no unit (embeddings, norms, head, rows of queries and keys under
            "channel"): how many are equal, and name, state ("moved", "resized") and distance of the others.
        config: entries of the configuration that differ, as [base, tuned]: equal weights may still compute otherwise.
        notes: what a reader must know, in sentences.
        required: the requirement, as `UnitMap.select` takes it; empty if nothing was required.
        selected, violations: how many units it selects, and how many of them moved.
        holds: none of them moved; true where nothing is required.
        broken: the first 20 of them by name, such as "layers.3.mlp[17]".
        tensors: the hash of the distances.
        distances: (units,) float64, 0 exactly where a unit is equal; None if the tensor's file is missing.
    """

    base: Mapping[str, Any]
    tuned: Mapping[str, Any]
    chart: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    layers: Sequence[Mapping[str, Any]]
    outside: Mapping[str, Any]
    config: Mapping[str, Any]
    notes: Sequence[str]
    required: str
    selected: int
    violations: int
    holds: bool
    broken: Sequence[str]
    tensors: str = ""
    distances: "torch.Tensor | None" = None

    def __post_init__(self) -> None:
        if self.distances is not None and not self.tensors:
            object.__setattr__(self, "tensors", _hash_of(self.distances))

    @property
    def digest(self) -> str:
        """The hash of all that the file says, by which it is signed."""
        return self.to_json()[DIGEST]

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        return signed({"format": FORMAT, **{k: v for k, v in vars(self).items() if k != "distances"}})

    @property
    def moved(self) -> int:
        """How many units moved."""
        return sum(group["moved"] for group in self.groups.values())

    def save(self, path: str | Path) -> None:
        """Write the JSON, and the distances beside it as safetensors; the JSON comes last and vouches for them.

        Raises:
            FailureError: the disk is full or the path cannot be written.
        """
        from safetensors.torch import save_file

        path = Path(path)
        if self.distances is not None:
            file = path.with_suffix(".safetensors")
            temporary = file.with_name(f".{file.name}.tmp")
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({"distances": self.distances.contiguous()}, temporary, metadata={"format": FORMAT})
                temporary.replace(file)
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Certificate":
        """The inverse of `save`; the file of the distances may be missing.

        Raises:
            UsageError: there is no certificate, it is damaged, or its files do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path, remedy = Path(path), "run `keelguard verify` again"
        content = read_signed(path, FORMAT, "certificate", remedy)
        file = path.with_suffix(".safetensors")
        try:
            distances = load_file(file)["distances"] if file.is_file() else None
            plain = {key: value for key, value in content.items() if key not in ("format", DIGEST)}
            certificate = cls(**plain, distances=distances)
        except (OSError, SafetensorError, TypeError, KeyError) as error:
            raise UsageError(f"{path}: is damaged ({error}); {remedy}") from error
        if distances is not None and _hash_of(distances) != certificate.tensors:
            raise UsageError(f"{file}: does not belong to {path.name}; {remedy}")
        return certificate


def _hash_of(distances: "torch.Tensor") -> str:
    return hashlib.sha256(distances.double().contiguous().numpy().astype("<f8").tobytes()).hexdigest()


def certificate_lines(certificate: Certificate) -> list[str]:
    """The certificate for a terminal, line by line: verdict, groups, layers that moved, the rest of the model."""
    lines = []
    if certificate.required:
        verdict = "holds" if certificate.holds else "BROKEN"
        lines.append(
            f"{certificate.required}: {verdict}, {certificate.violations} of {certificate.selected} units moved"
        )
        lines += [f"  {name}" for name in certificate.broken]
        if certificate.violations > len(certificate.broken):
            lines.append(f"  … and {certificate.violations - len(certificate.broken)} more")
    else:
        lines.append("Nothing was required (--require), so that nothing can be broken.")
    lines.append(f"{'':<8}{'equal':>9}{'moved':>9}{'median':>10}{'max':>10}")
    lines += [_line(group, found) for group, found in certificate.groups.items()]
    for layer in certificate.layers:
        moved = [f"{group} {found['moved']}" for group, found in layer["groups"].items() if found["moved"]]
        if moved:
            lines.append(f"layer {layer['layer']}: moved {', '.join(moved)}")
    lines.append(f"outside of units: {certificate.outside['equal']} parameters equal")
    for entry in certificate.outside["changed"]:
        lines.append(f"  {entry['name']}: {entry['state']}, distance {_figure(entry['distance'])}")
    return [*lines, *certificate.notes]


def _line(group: str, found: Mapping[str, Any]) -> str:
    median, most = (_figure(found[key]) if found["moved"] else "–" for key in ("median", "max"))
    return f"{group:<8}{found['equal']:>9}{found['moved']:>9}{median:>10}{most:>10}"


def _figure(distance: float | None) -> str:
    return "infinite" if distance is None else f"{distance:.2g}"
