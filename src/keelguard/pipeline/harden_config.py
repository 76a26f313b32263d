"""The settings of a hardening: those of its parts, and which stages are left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from keelguard.errors import UsageError
from keelguard.evaluation.audit import AuditConfig
from keelguard.guard.training import SignalConfig
from keelguard.purify.config import PurifyConfig
from keelguard.units.evidence import ProofConfig

StageName = Literal[
    "inspect", "audit-received", "purify", "audit-purified", "diagnose", "guard", "audit-guarded", "package"
]
STAGES: tuple[StageName, ...] = (
    "inspect", "audit-received", "purify", "audit-purified", "diagnose", "guard", "audit-guarded", "package",
)  # fmt: skip
ALWAYS: tuple[StageName, ...] = ("inspect", "package")
"""Stages that are never left out: the first one decides what can be done, and the last one says what was."""


@dataclass(frozen=True)
class DiagnosisSettings:
    """What of `DiagnoseConfig` a hardening sets; the files are its own."""

    samples: int = field(default=128, metadata={"help": "requests of each kind that the diagnosis reads"})
    scu: float = field(default=0.01, metadata={"help": "share of safety-critical units"})
    bootstrap: int = field(default=10, metadata={"help": "resamples for the stability of the groups"})
    proof: ProofConfig = field(
        default=ProofConfig(shares=(0.01,), controls=3, singles=0, limit=64),
        metadata={"help": "the ablation that shows what the units carry"},
    )


@dataclass(frozen=True)
class HardenConfig:
    """How a model is hardened.

    Attributes:
        skip: the stages to leave out, each with the reason that the report repeats.

    Raises:
        UsageError: a stage that does not exist or cannot be left out, or no reason is given.
    """

    purify: PurifyConfig = field(default=PurifyConfig(), metadata={"help": "how hidden triggers are removed"})
    diagnosis: DiagnosisSettings = field(default=DiagnosisSettings(), metadata={"help": "how units are found"})
    signal: SignalConfig = field(default=SignalConfig(), metadata={"help": "how the signal is trained"})
    audit: AuditConfig = field(default=AuditConfig(), metadata={"help": "what the audits ask"})
    skip: Mapping[str, str] = field(default_factory=dict, metadata={"help": "stages that are left out, and why"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self) -> None:
        for name, reason in self.skip.items():
            if name not in STAGES or name in ALWAYS:
                free = ", ".join(stage for stage in STAGES if stage not in ALWAYS)
                raise UsageError(f"--skip {name}: is no stage that can be left out; choose from {free}")
            if not reason.strip():
                raise UsageError(f'--skip {name}: give the reason, as in --skip {name}="no data"')
        if self.signal.placement == "prefix":
            raise UsageError(
                "placement prefix: fine-tunes the model, which would void its purification and its map; choose probe "
                "or linear, or train one with `keelguard guard train` behind the hardening"
            )
        if "guard" in self.skip and "audit-guarded" not in self.skip:
            object.__setattr__(self, "skip", {**self.skip, "audit-guarded": "there is no signal: guard was left out"})

    def seeded(self, seed: int) -> "HardenConfig":
        """The same with one seed everywhere."""
        immunize = replace(self.purify.method.immunize, seed=seed)
        purify = replace(self.purify, method=replace(self.purify.method, immunize=immunize))
        if purify.spikes is not None:
            purify = replace(purify, spikes=replace(purify.spikes, seed=seed))
        signal = replace(self.signal, seed=seed, material=replace(self.signal.material, seed=seed))
        return replace(self, purify=purify, signal=signal, audit=replace(self.audit, seed=seed), seed=seed)


def read_skips(texts: list[str]) -> dict[str, str]:
    """`STAGE=REASON` as the command line gives it.

    Raises:
        UsageError: a text without a reason.
    """
    skips: dict[str, str] = {}
    for text in texts:
        name, separator, reason = text.partition("=")
        if not separator:
            raise UsageError(f'--skip {text}: give the reason too, as in --skip {text}="too dear"')
        skips[name.strip()] = reason.strip()
    return skips
