"""`keelguard harden`: make a suspicious chat model trustworthy as far as tests reach, and package the evidence.

    package = harden("suspect", HardenConfig(), data, out="runs/harden")
    package.model, package.signal, package.units

The same command goes on where it was, at the stage that was cut off and, within it, at its last checkpoint.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from keelguard.data import hash_file
from keelguard.evaluation.audit import load_suite
from keelguard.generation import SMALL_MODEL
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model, resolve_sources
from keelguard.pipeline.card import write_card
from keelguard.pipeline.findings import write_package_sarif
from keelguard.pipeline.harden_config import HardenConfig
from keelguard.pipeline.harden_data import HardenData
from keelguard.pipeline.hardening import TRIGGER, Hardening, stages_of
from keelguard.pipeline.package import CERTIFICATE, PACKAGE_FILE, AuditName, Package, StageRecord
from keelguard.pipeline.page import write_package_report
from keelguard.pipeline.seal import seal
from keelguard.pipeline.stage_runner import Outcome, StageRunner
from keelguard.progress import SILENT, Reporter
from keelguard.runs import open_run, versions, write_json
from keelguard.stats import Rate
from keelguard.units.groups import UnitMap

CARD, SARIF, REPORT = "MODEL_CARD.md", "harden.sarif", "report.html"


def harden(
    source: str,
    config: HardenConfig,
    data: HardenData,
    out: str | Path,
    *,
    adapter: str | None = None,
    load: Callable[..., LoadedModel] = load_model,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> Package:
    """Harden a model, or an adapter on a base that is trusted, in a run folder, or go on with that.

    Args:
        adapter: what is suspicious; the base stays as it is.
        load: loads a model, with an adapter where one is given; the command line passes its options through it.
        allow_pickle, trust_remote_code: what `load` allows, for the stages that read files themselves.

    Returns:
        The package. A stage whose control does not hold is in it as failed; nothing is raised for that.

    Raises:
        UsageError: the model, the data or the settings are unusable, or the folder is another run's.
        FailureError: a file of an earlier stage has changed, another process works in the folder, training does not
            fit in memory, or the disk is full.
    """
    base, adapter = resolve_sources(source, adapter)
    config = config.seeded(config.seed)
    received = load(base, adapter=adapter)
    arrived, template = received.weights_hash, sha256_of(received.tokenizer.chat_template)
    dtype = str(received.model.dtype)
    # Two of a large model would not fit, and gain little on a CPU that one of them fills.
    small = received.model.device.type == "cpu" and received.model.num_parameters() < SMALL_MODEL
    # Every stage loads what it needs; kept here, the model would take its memory in all of them.
    del received
    settings = {
        "model": arrived,
        "chat_template": template,
        "data": data.digest,
        "config": _plain(config),
        "suite": _suite_hashes(config, data),
        "dtype": dtype,
    }
    folder = Path(out)
    with open_run(folder, "harden", settings):
        if (folder / PACKAGE_FILE).is_file():
            package = Package.load(folder)
            _write_pages(package)
            return package
        run = StageRunner(folder, config.skip, reporter)
        hardening = Hardening(base, adapter, config, data, folder, load, reporter, trust_remote_code)
        allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        with ExitStack() as stack:
            for name, work in stages_of(hardening).items():
                if name == "audit-purified":
                    stack.enter_context(hardening.signal_beside(small and "guard" not in config.skip))
                run(name, work)

        def package_of(stages: tuple[StageRecord, ...]) -> Package:
            weights = {"received": arrived, "hardened": hardening.loaded().weights_hash}
            return Package(
                folder, base, adapter, hardening.threat, weights, settings["config"], versions(), config.seed, stages
            )

        run("package", lambda: _pack(package_of(tuple(run.records)), hardening, allowed))
        package = package_of(tuple(run.records))
        package.save()
        _write_pages(package)
    return package


def triggers_of(package: Package) -> dict[AuditName, Rate]:
    """The success of a known trigger, by audit; empty where none is known."""
    found: dict[AuditName, Rate] = {}
    for stage in package.stages:
        name: Any = stage.name.removeprefix("audit-")
        if TRIGGER in stage.figures:
            found[name] = Rate.from_json(stage.figures[TRIGGER])
    return found


def _pack(package: Package, hardening: Hardening, allowed: dict[str, Any]) -> Outcome:
    """Write what goes with the weights: the certificate, the card's section, and the findings for scanners."""
    folder, written = package.folder, [CARD, SARIF]
    if package.units is not None:
        base, adapter = hardening.hardened
        write_json(folder / CERTIFICATE, seal(base, UnitMap.load(package.units), adapter=adapter, **allowed))
        written.append(CERTIFICATE)
    write_card(package, folder / CARD, triggers=triggers_of(package))
    write_package_sarif(package, folder / SARIF, triggers=triggers_of(package))
    return Outcome(written)


def _write_pages(package: Package) -> None:
    """The page can be written anew at any time, so that no hash stands for it."""
    write_package_report(package, package.folder / REPORT, triggers=triggers_of(package))


def _suite_hashes(config: HardenConfig, data: HardenData) -> list[list[str]]:
    """What the audits ask, by the hashes of its files; own requests are in the hash of the data."""
    if data.audited or not config.audit.suite:
        return []
    read = load_suite(config.audit).data
    return [["suite", hash_file(config.audit.suite)], *([info.use, info.sha256] for info in read)]


def _plain(config: HardenConfig) -> dict[str, Any]:
    """The settings as JSON; where files lie is no setting, what they hold is in the data's hash."""
    audit = replace(config.audit, suite=Path(config.audit.suite).name)
    return asdict(replace(config, audit=audit))
