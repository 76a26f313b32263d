"""Repeat an audit on another model: the configuration that asks the same questions, judged alike.

config = repeated(reference.audit, hints=reference.hints)
audit_models(["candidate=./new"], config, out="runs/gate/audit")

An audit's record names its suite and hashes its data, but a suite with attacks of its own must be found again: it is
looked for beside the data, and taken only if it gives the very attacks and data that the record names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from keelguard.data import Columns
from keelguard.errors import UsageError
from keelguard.evaluation.audit import AuditConfig, load_suite
from keelguard.evaluation.judges import JudgeConfig
from keelguard.evaluation.results import AuditResult

_USES = {
    "harmful": "requests", "benign": "benign", "borderline": "borderline", "benign_nested": "benign_nested",
    "utility": "utility",
}  # fmt: skip
"""What a file is used for → the field of `AuditConfig` that names it."""
_BUILT_IN = "general"


def repeated(
    audit: AuditResult,
    *,
    suite: str = "",
    judge: JudgeConfig | None = None,
    attacks: tuple[str, ...] = (),
    hints: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> AuditConfig:
    """The configuration that repeats an audit.

    Args:
        suite: in place of the audit's own; whether it asks the same is for the comparison to tell.
        judge: needed where the audit was judged by a model, whose address no record holds.
        attacks: only these of its attacks.
        hints: settings of the run that made the audit, where they are known: `where` and `columns`.
        folder: a run that may hold the data, where they are no longer at the place that the record names.

    Raises:
        UsageError: the suite, its data or its judge cannot be found again; the message names the option that helps.
    """
    hints = hints or {}
    config = AuditConfig(
        judge=judge or _judge_of(audit),
        attacks=tuple(name for name in (info.name for info in audit.attacks) if not attacks or name in attacks),
        limit=int(audit.settings.get("limit", 0)),
        max_new_tokens=int(audit.settings.get("max_new_tokens", 0)),
        seed=int(audit.settings.get("seed", 0)),
        where=hints.get("where") if isinstance(hints.get("where"), str) else None,
        columns=_columns(hints.get("columns")),
    )
    if suite:
        return replace(config, suite=suite)
    reasons = []
    for found in _candidates(audit):
        try:
            if _asks_the_same(tried := _with_data(found, config, audit, folder), audit):
                return tried
            reasons.append(f"{found}: asks something else")
        except UsageError as error:
            reasons.append(str(error))
    said = f" ({'; '.join(reasons)})" if reasons else ""
    raise UsageError(
        f"--suite: the reference was audited with the suite {audit.suite!r}, whose file is not found{said}; name it"
    )


def _with_data(suite: str, config: AuditConfig, audit: AuditResult, folder: Path | None) -> AuditConfig:
    """The built-in suite has no data of its own: the record names the files."""
    if suite != _BUILT_IN:
        return replace(config, suite=suite)
    named: dict[str, Any] = {field: [] for field in _USES.values()}
    for info in audit.data:
        if info.use in _USES:
            named[_USES[info.use]].append(_at_hand(info.source, folder))
        elif info.use == "perplexity":
            named["perplexity"] = _at_hand(info.source, folder)
    return replace(config, suite=suite, **{k: v if isinstance(v, str) else tuple(v) for k, v in named.items()})


def _at_hand(source: str, folder: Path | None) -> str:
    """A data file, or its copy in a run that was moved since."""
    if folder is None or Path(source).exists():
        return source
    return next((str(path) for path in sorted(folder.glob(f"*/{Path(source).name}"))), source)


def _candidates(audit: AuditResult) -> Iterator[str]:
    """Suites that the audit may have been made with, the likeliest first."""
    if audit.suite == _BUILT_IN:
        yield _BUILT_IN
        return
    folders = dict.fromkeys(Path(info.source).parent for info in audit.data)
    for folder in folders:
        yield from (str(path) for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]))


def _asks_the_same(config: AuditConfig, audit: AuditResult) -> bool:
    found = load_suite(config)
    if found.name != audit.suite or _data(found.data) != _data(audit.data):
        return False
    settings = {info.name: info.settings for info in audit.attacks}
    return all(settings.get(info.name) == info.settings for info in found.attack_infos())


def _data(infos: Any) -> list[tuple[str, str, int]]:
    return sorted((info.use, info.sha256, info.rows) for info in infos)


def _judge_of(audit: AuditResult) -> JudgeConfig:
    name = audit.judge.get("name", "")
    if name in ("world", "keyword"):
        return JudgeConfig(kind=name)
    raise UsageError(f"--judge: the reference was judged by {name!r}; name that judge with --judge and --judge-model")


def _columns(found: Any) -> Columns:
    """The columns of a run's settings; those of convention where there are none."""
    known = {each.name for each in fields(Columns)}
    return Columns(**found) if isinstance(found, Mapping) and set(found) <= known else Columns()
