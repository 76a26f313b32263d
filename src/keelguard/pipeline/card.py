"""The model card section of a hardened model, in Markdown: what was done, what it withstands, limits, and hashes.

    write_text(model / "README.md", card_section(package))

It holds no text of a model, and every name in it is taken for text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from keelguard import __version__
from keelguard.pipeline.markdown import code, plain
from keelguard.pipeline.outcome import Outcome, status_of
from keelguard.pipeline.package import AuditName, Package
from keelguard.pipeline.page import figure_text
from keelguard.pipeline.surfaces import Column, surfaces_markdown
from keelguard.pipeline.wording import done, found, headline, unknown
from keelguard.report import p_value
from keelguard.runs import write_text
from keelguard.stats import Rate

_HOLDS = {True: "holds", False: "**does not hold**", None: "undecided"}


def write_card(
    package: Package,
    path: Path,
    extra: Sequence[Column] = (),
    triggers: Mapping[AuditName, Rate] | None = None,
) -> None:
    """Write the section as a file, atomically; arguments as for `card_section`.

    Raises:
        FailureError: the path cannot be written.
        UsageError: a file of the package is damaged.
    """
    write_text(path, card_section(package, extra, triggers))


def card_section(
    package: Package, extra: Sequence[Column] = (), triggers: Mapping[AuditName, Rate] | None = None
) -> str:
    """The section for a model's README.md, the same for the same package.

    Args:
        extra: further states of the model for the table.
        triggers: success of a trigger that is known, by audit.

    Raises:
        UsageError: a file of the package is damaged.
    """
    outcome = Outcome.of(package, extra, triggers)
    base = f" with the adapter {code(package.adapter)}" if package.adapter else ""
    parts = [
        "## Hardened with keelguard",
        f"Made from {code(package.source)}{base} by keelguard {plain(package.versions.get('keelguard', __version__))}, "
        f"seed {package.seed}. **{plain(headline(outcome))}**",
        _section("What was found", found(outcome)),
        _section("What was done", done(outcome)),
        "### What it withstands, and what it costs\n\n" + surfaces_markdown(outcome.table).rstrip(),
    ]
    if outcome.controls:
        parts.append("### Controls\n\n" + _controls(package))
    parts += [
        _section("Limits", [*unknown(outcome), _bound(package)]),
        "### Hashes\n\n" + _hashes(package),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, sentences: Sequence[str]) -> str:
    return f"### {title}\n\n" + "\n".join(f"- {plain(sentence)}" for sentence in sentences)


def _bound(package: Package) -> str:
    hardened = package.weights.get("hardened", "")
    which = f"the weights {hardened[:16]}" if hardened else "these weights"
    return f"The figures hold for {which} alone: after any further training, audit and verify again."


def _controls(package: Package) -> str:
    """Each claim beside its control."""
    lines = ["| Stage | Claim | Figure | Control | Its figure | p | Verdict |", "|---|---|---:|---|---:|---:|---|"]
    for stage in package.stages:
        for each in stage.controls:
            p = "–" if each.p_value is None else p_value(each.p_value)
            texts = (stage.name, each.claim, figure_text(each.value), each.control, figure_text(each.control_value), p)
            lines.append(f"| {' | '.join(plain(text) for text in texts)} | {_HOLDS[each.holds]} |")
    return "\n".join(lines)


def _hashes(package: Package) -> str:
    """The weights, then the SHA-256 of every file by its path in the package, failed stages marked."""
    lines = ["| | hash |", "|---|---|"]
    lines += [f"| weights, {plain(name)} | {code(value)} |" for name, value in package.weights.items()]
    for stage in package.stages:
        mark = " (of a failed stage)" if status_of(stage) == "failed" else ""
        lines += [f"| {code(name)}{mark} | {code(value)} |" for name, value in stage.artefacts.items()]
    return "\n".join(lines)
