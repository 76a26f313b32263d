"""The package that `keelguard harden` leaves: what each stage did, with the hash of every file that it wrote.

    package = Package.load("runs/harden")      # every file is hashed and compared
    package.model, package.signal, package.units, package.audit("guarded")

`harden.json` holds the hashes and is their only witness: keep it, or its own hash, where an attacker cannot write.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from keelguard.errors import FailureError, UsageError
from keelguard.evaluation.results import AuditResult
from keelguard.purify.results import PurifyResult
from keelguard.runs import read_json, write_json

FORMAT = "keelguard.harden/1"
PACKAGE_FILE = "harden.json"
MODEL, ADAPTER, SIGNAL, UNITS, PURIFY, AUDITS, CERTIFICATE = (
    "model", "adapter", "signal", "units", "purify", "audits", "certificate.json",
)  # fmt: skip
AuditName = Literal["received", "purified", "guarded"]
Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class Control:
    """A claim of a stage beside what would be seen if it were untrue.

    Attributes:
        claim: what the stage claims, as a sentence.
        value, control_value: the figures: a rate's JSON, a number, or None where nothing was measured.
        control: what the claim is compared with.
        p_value: of the paired test, where there is one.
        holds: whether the claim stands; None where it could not be tested.
        why: the rule by which `holds` was decided.
    """

    claim: str
    value: Any
    control: str
    control_value: Any
    p_value: float | None = None
    holds: bool | None = None
    why: str = ""


@dataclass(frozen=True)
class StageRecord:
    """What one stage of a hardening did.

    Attributes:
        status: "failed" is a stage whose work is there and whose control does not hold.
        reason: why it was skipped or failed.
        artefacts: the SHA-256 of every file that it wrote, by its path in the package.
        figures: rates as `Rate.to_json` writes them, numbers or texts, by name.
    """

    name: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    artefacts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    controls: tuple[Control, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as `harden.json` holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StageRecord":
        """The inverse of `to_json`."""
        controls = tuple(Control(**each) for each in data["controls"])
        return cls(**{**data, "controls": controls, "notes": tuple(data["notes"])})


@dataclass(frozen=True)
class Package:
    """A finished hardening.

    Attributes:
        source, adapter: what was hardened, as it was named.
        weights: hashes by "received" and "hardened".
        stages: in the order in which they ran.
    """

    folder: Path
    source: str
    adapter: str | None
    threat: str
    weights: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    stages: tuple[StageRecord, ...]

    def save(self) -> None:
        """Write FOLDER/harden.json, whole or not at all."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        stages = [stage.to_json() for stage in self.stages]
        write_json(self.folder / PACKAGE_FILE, {"format": FORMAT, **plain, "stages": stages})

    @classmethod
    def load(cls, folder: str | Path, check: bool = True) -> "Package":
        """Read a package.

        Args:
            check: hash every file of it, and compare.

        Raises:
            UsageError: the folder holds no finished hardening, or one of another format.
            FailureError: a file is missing or has changed since; the message names it.
        """
        folder = Path(folder)
        path = folder / PACKAGE_FILE
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give the folder of a finished `keelguard harden`")
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UsageError(f"{path}: is no package of the format {FORMAT}; run `keelguard harden` again")
        try:
            stages = tuple(StageRecord.from_json(each) for each in data["stages"])
            package = cls(folder, **{name: data[name] for name in _PLAIN}, stages=stages)
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path}: is damaged ({error}); run `keelguard harden` again") from error
        if check:
            for stage in package.stages:
                check_artefacts(folder, stage.artefacts)
            package.refuse_strangers()
        return package

    @property
    def listed(self) -> dict[str, str]:
        """The SHA-256 of every file that a stage has vouched for, by its path in the package."""
        return {name: digest for stage in self.stages for name, digest in stage.artefacts.items()}

    def refuse_strangers(self) -> None:
        """Refuse a file that no stage has written, where a program would take it for the package's own.

        Raises:
            FailureError: there is one; the message names it.
        """
        listed = self.listed
        for name in hash_artefacts(self.folder, [name for name in _OWN if (self.folder / name).exists()]):
            if name not in listed:
                raise FailureError(f"{self.folder / name}: is none of the package's files; remove it")

    @property
    def model(self) -> str:
        """The hardened checkpoint; for an adapter, its base."""
        own = self._present(MODEL)
        return self.source if own is None else str(own)

    @property
    def hardened_adapter(self) -> str | None:
        """The hardened adapter, or the one as received where nothing was purified; None for a whole model."""
        if self.threat != "adapter":
            return None
        own = self._present(ADAPTER)
        return self.adapter if own is None else str(own)

    @property
    def units(self) -> Path | None:
        """The unit map, if there is one."""
        return self._present(UNITS)

    @property
    def signal(self) -> Path | None:
        """The signal, if there is one."""
        return self._present(SIGNAL)

    def stage(self, name: str) -> StageRecord:
        """The record of a stage.

        Raises:
            KeyError: there is no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def audit(self, name: AuditName) -> AuditResult | None:
        """An audit of the package, or None where that stage was skipped."""
        path = f"{AUDITS}/{name}.json"
        return AuditResult.load(self.folder / path) if path in self.listed else None

    @property
    def purification(self) -> PurifyResult | None:
        """What the purification found, or None where it was skipped."""
        own = self._present(PURIFY)
        return None if own is None else PurifyResult.load(own)

    def _present(self, name: str) -> Path | None:
        return self.folder / name if any(each.startswith(f"{name}/") for each in self.listed) else None


_OWN = (MODEL, ADAPTER, SIGNAL, AUDITS, CERTIFICATE)
"""Where nothing but what a stage has written may lie."""
_PLAIN = ("source", "adapter", "threat", "weights", "settings", "versions", "seed")


def hash_artefacts(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files, and of all files in folders, by their path below `folder`; hidden ones are left out."""
    found: dict[str, str] = {}
    for name in names:
        path = folder / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            inside = file.relative_to(folder)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                with file.open("rb") as stream:
                    found[inside.as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def check_artefacts(folder: Path, artefacts: Mapping[str, str]) -> None:
    """Compare files with the hashes that were written down.

    Raises:
        FailureError: a file is missing or differs; the message names it, both hashes and the remedy.
    """
    for name, expected in artefacts.items():
        path = folder / name
        if not path.is_file():
            raise FailureError(f"{path}: is missing; restore it, or remove the folder and harden again")
        if (found := hash_artefacts(folder, [name])[name]) != expected:
            raise FailureError(
                f"{path}: has changed since it was written (SHA-256 {found[:16]}, not {expected[:16]}); restore it, or "
                "remove the folder and harden again"
            )
