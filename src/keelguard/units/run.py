"""What `keelguard diagnose` leaves in its folder: the map, the proof, transfer, direction, and the page about them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keelguard.errors import UsageError
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model
from keelguard.progress import SILENT, Reporter
from keelguard.runs import read_json, write_json
from keelguard.units.diagnose import DiagnoseConfig, Diagnosis, diagnosing
from keelguard.units.direction import DirectionProbe, probe_direction
from keelguard.units.evidence import ProofConfig, prove_diagnosis
from keelguard.units.groups import UnitMap
from keelguard.units.page import write_diagnosis_report
from keelguard.units.proof import Proof
from keelguard.units.transfer import Transfer, attribute_transfer

PROBED = 64
"""Prompts of the direction probe."""


@dataclass(frozen=True)
class DiagnosisRun:
    """Everything of one run folder."""

    diagnosis: Diagnosis
    proof: Proof | None
    transfer: Transfer | None
    probe: DirectionProbe | None
    report: Path


def run_diagnosis(
    source: str,
    config: DiagnoseConfig,
    out: str | Path,
    *,
    proof: ProofConfig | None = None,
    before: str | Path | None = None,
    direction: bool = False,
    load: Callable[[str], LoadedModel] = load_model,
    reporter: Reporter = SILENT,
) -> DiagnosisRun:
    """Diagnose a model, prove and compare where that is asked for, and write the page.

    Args:
        before: a unit map of an earlier state of the model; its units' change of group is shown.
        direction: probe the reasoning direction too.

    Raises:
        UsageError: as `diagnose`; or the earlier map does not fit, or there is no safety data to probe or prove with.
    """
    earlier = None if before is None else UnitMap.load(before)
    for what in ("score", "attention", "ranking"):
        was = None if earlier is None else earlier.attention if what == "attention" else earlier.meta.get(what)
        if was is not None and was != getattr(config, what):
            raise UsageError(f"--before {before}: was made with --{what} {was}, which does not compare with this map's")
    with diagnosing(source, config, out=out, load=load, reporter=reporter) as found:
        transfer = None
        if earlier is not None:
            transfer = attribute_transfer(earlier, found.chart)
            write_json(found.folder / "transfer.json", transfer.to_json())
        probe = _probe_direction(found, reporter) if direction else None
        shown = _kept(found)
        if proof is not None:
            shown = prove_diagnosis(found, proof, batch_size=config.batch_size, reporter=reporter)
        report = found.folder / "report.html"
        write_diagnosis_report(report, found.chart, shown, transfer, probe)
    return DiagnosisRun(found, shown, transfer, probe, report)


def _kept(found: Diagnosis) -> Proof | None:
    """The proof that an earlier run made of this very map, if any; one of other groups would prove nothing."""
    path = found.folder / "proof.json"
    if not path.exists():
        return None
    data = read_json(path)
    same = data.get("map") == found.chart.digest and data.get("labels") == sha256_of(found.chart.labels.tolist())
    return Proof.from_json(data) if same else None


def _probe_direction(found: Diagnosis, reporter: Reporter) -> DirectionProbe:
    if not found.decision:
        raise UsageError("--direction: needs the model's refusals; give harmful requests with --safety")
    material = found.material
    longest = sorted(material.answers, key=len)[-PROBED:]
    probe = probe_direction(
        found.loaded.model,
        found.loaded.tokenizer,
        [request.messages for request in material.refused[:PROBED]],
        [chat.ids[chat.response.start : chat.response.stop] for chat in material.safety[:PROBED]],
        [longest[i % len(longest)] for i in range(len(material.refused[:PROBED]))],
        reporter=reporter,
    )
    write_json(found.folder / "direction.json", probe.to_json())
    return probe
