"""The two sides of a gate: what a folder or a model's name stands for, and whether its files are those it vouches for.

side = open_side("runs/harden")
side.kind, side.model, side.adapter, side.audit, side.report, side.wrong
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from keelguard.errors import FailureError, UsageError
from keelguard.evaluation.audit import guarded_name
from keelguard.evaluation.results import AuditResult, ModelReport
from keelguard.hashes import hash_weights
from keelguard.models import check_source, resolve_sources
from keelguard.pipeline.package import PACKAGE_FILE, AuditName, Package
from keelguard.runs import MANIFEST, read_json

Kind = Literal["package", "training run", "audit run", "model"]
TRAINING_FILES, AUDIT_FILE = ("finetune.json", "align.json"), "audit.json"
_PLAIN_FIRST: tuple[AuditName, ...] = ("purified", "guarded", "received")
"""The audits of a package in which the plain hardened model is looked for."""


@dataclass(frozen=True)
class Side:
    """The candidate or the reference.

    Attributes:
        name: as it was typed.
        model, adapter: the checkpoint, where its files are at hand; a model may be an adapter's folder.
        weights: its hash, as the folder's records have it; "" for a model that nothing vouches for.
        audit, report: what was measured of it, and the audit that says how; None where it was not audited.
        guarded: the same under its signal; its audit is `guarded_audit`.
        signal, units: folders of what was made for these weights.
        hints: settings of the run that audited it, for repeating the audit.
        wrong: which file is not the one that the records vouch for; empty where all hashes are right.
        absent: why the model's files cannot be used; empty where they can.
    """

    name: str
    kind: Kind
    model: str | None = None
    adapter: str | None = None
    weights: str = ""
    audit: AuditResult | None = None
    report: ModelReport | None = None
    guarded_audit: AuditResult | None = None
    guarded: ModelReport | None = None
    signal: Path | None = None
    units: Path | None = None
    package: Package | None = None
    training: dict[str, Any] | None = None
    hints: dict[str, Any] | None = None
    wrong: str = ""
    absent: str = ""

    def to_json(self) -> dict[str, Any]:
        """What `gate.json` says of the side."""
        weights = self.weights or (self.report.weights if self.report else "")
        return {"name": self.name, "kind": self.kind, "model": self.model, "adapter": self.adapter, "weights": weights}

    def audited(self, audit: AuditResult) -> "Side":
        """The side with an audit of this very model: the plain column, and the guarded one where there is one."""
        report = audit.models[0]
        guarded = next((each for each in audit.models if each.name == guarded_name(report.name)), None)
        side = replace(self, audit=audit, report=report, weights=self.weights or report.weights)
        return replace(side, guarded=guarded, guarded_audit=audit) if guarded else side


def open_side(
    source: str, *, adapter: str | None = None, column: str = "", pinned: str | None = None, allow_pickle: bool = False
) -> Side:
    """What a folder of keelguard, a checkpoint, an adapter or a hub id stands for. Nothing is loaded.

    Args:
        adapter: a PEFT adapter on a model.
        column: the model of an audit run, where it has several.
        pinned: the SHA-256 that a package's `harden.json` must have.

    Raises:
        UsageError: the folder holds none of these, an unfinished run, or one of another format.
    """
    folder = Path(source)
    if adapter is not None and any((folder / name).is_file() for name in (PACKAGE_FILE, *TRAINING_FILES)):
        raise UsageError(f"--adapter {adapter}: {source} is a run with a model of its own; leave it out")
    if (folder / PACKAGE_FILE).is_file():
        return _package(source, folder, pinned)
    for name in TRAINING_FILES:
        if (folder / name).is_file():
            return _training(source, folder, folder / name)
    if (folder / AUDIT_FILE).is_file():
        return _audit(source, folder, adapter, column)
    if (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        command = (read_json(folder / MANIFEST) or {}).get("command", "of keelguard")
        raise UsageError(f"{source}: the run `keelguard {command}` is not finished; repeat its command first")
    for part in filter(None, resolve_sources(source, adapter)):
        check_source(part, allow_pickle)
    return Side(source, "model", source, adapter)


def _package(source: str, folder: Path, pinned: str | None) -> Side:
    with (folder / PACKAGE_FILE).open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if pinned is not None and found != pinned.strip().lower():
        wrong = f"{folder / PACKAGE_FILE}: has the SHA-256 {found[:16]}, the policy demands {pinned.strip()[:16]}"
        return Side(source, "package", wrong=wrong, absent=wrong)
    package = Package.load(folder, check=False)
    try:
        package = Package.load(folder, check=True)
    except FailureError as error:
        return Side(source, "package", package=package, wrong=str(error), absent=str(error))
    side = Side(
        source,
        "package",
        package.model,
        package.hardened_adapter,
        package.weights["hardened"],
        signal=package.signal,
        units=package.units,
        package=package,
        hints=package.settings.get("audit"),
    )
    side = _vouched(side)
    for name in _PLAIN_FIRST:
        audit = package.audit(name)
        plain = [each for each in audit.models if each.weights == side.weights] if audit else []
        if audit and plain and not _is_guarded(plain[0].name, audit):
            side = replace(side, audit=audit, report=plain[0])
            break
    audit = package.audit("guarded")
    found_guarded = [each for each in audit.models if _is_guarded(each.name, audit)] if audit else []
    if found_guarded and found_guarded[0].weights == side.weights:
        side = replace(side, guarded_audit=audit, guarded=found_guarded[0])
    return side


def _training(source: str, folder: Path, record: Path) -> Side:
    data = read_json(record)
    if not isinstance(data, dict) or not isinstance(data.get("weights"), str):
        raise UsageError(f"{record}: is no record of a training; run its command again")
    signal = folder / "signal"
    side = Side(
        source,
        "training run",
        str(folder / "model"),
        weights=data["weights"],
        training=data,
        signal=signal if signal.is_dir() else None,
    )
    return _vouched(side)


def _audit(source: str, folder: Path, adapter: str | None, column: str) -> Side:
    audit = AuditResult.load(folder / AUDIT_FILE)
    named = {each.name: each for each in audit.models}
    plain = [name for name in named if not _is_guarded(name, audit)]
    if column and column not in plain:
        raise UsageError(f"{source}: has no model {column!r}; choose from {', '.join(plain)}")
    if not column and len(plain) != 1:
        raise UsageError(
            f"{source}: has {len(plain)} models ({', '.join(plain)}); choose one with --name or --against-name"
        )
    report = named[column or plain[0]]
    guarded = named.get(guarded_name(report.name))
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    side = Side(
        source,
        "audit run",
        report.source,
        adapter,
        report.weights,
        audit,
        report,
        guarded_audit=audit if guarded else None,
        guarded=guarded,
        hints=manifest.get("settings") if isinstance(manifest, dict) else None,
    )
    return _vouched(side)


def _vouched(side: Side) -> Side:
    """The side, or why its weights are not those of its records."""
    assert side.model is not None
    try:
        base, adapter = resolve_sources(side.model, side.adapter)
        found = hash_weights(base, adapter)
    except (UsageError, FailureError) as error:
        return replace(side, absent=str(error))
    if found != side.weights:
        place = f"{side.model} with {side.adapter}" if side.adapter else side.model
        wrong = f"{place}: holds the weights {found[:16]}, the records of {side.name} say {side.weights[:16]}"
        if side.kind == "audit run" and side.adapter is None:
            wrong += "; an adapter that was audited on it is named with --adapter"
        return replace(side, wrong=wrong, absent=wrong)
    return side


def _is_guarded(name: str, audit: AuditResult) -> bool:
    """Whether a column is that of a guarded model."""
    return any(guarded_name(each.name) == name for each in audit.models)
