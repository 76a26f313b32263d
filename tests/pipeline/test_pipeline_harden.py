"""A hardening from end to end on the testbed, small: what it leaves, what it repeats, and what a kill costs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keelguard.errors import FailureError, UsageError
from keelguard.evaluation.audit import AuditConfig
from keelguard.guard.training import SignalConfig
from keelguard.hashes import hash_weights
from keelguard.pipeline import harden as module
from keelguard.pipeline.harden import harden
from keelguard.pipeline.harden_config import DiagnosisSettings, HardenConfig
from keelguard.pipeline.harden_data import HardenData, of_testbed
from keelguard.pipeline.package import PACKAGE_FILE, Package
from keelguard.pipeline.surfaces import CHECKS, TIME
from keelguard.purify.config import PurifyConfig
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.methods import MethodConfig
from keelguard.purify.search import SearchConfig
from keelguard.purify.spikes import SpikeConfig
from keelguard.testbed.build import Testbed
from keelguard.training import TrainConfig
from keelguard.units.evidence import ProofConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = ("inspect", "audit-received", "purify", "audit-purified", "diagnose", "guard", "audit-guarded", "package")
SEARCH = SearchConfig(prompts=2, longest=1, keep=2, tokens=2)


def small_config(suite: str) -> HardenConfig:
    """Every stage in some seconds: the figures mean nothing."""
    immunize = ImmunizeConfig(rounds=1, steps=2, learning_rate=1e-5, batch_size=8, keep=0.0, search=SEARCH)
    return HardenConfig(
        purify=PurifyConfig(
            method=MethodConfig(immunize=immunize),
            spikes=SpikeConfig(samples=6, steps=2, learning_rate=1e-5, batch_size=4, requests=4),
            inversion=None,
            rebound=TrainConfig(steps=1, learning_rate=1e-5, batch_size=4),
        ),
        diagnosis=DiagnosisSettings(
            samples=32, bootstrap=2, proof=ProofConfig(shares=(0.01,), controls=1, singles=0, limit=16)
        ),
        signal=SignalConfig(steps=6, batch_size=8, save_every=2),
        audit=AuditConfig(suite=suite, attacks=("direct", "prefill"), limit=16),
    )


def small_data(built: Testbed) -> HardenData:
    """A few rows of every part."""
    data = of_testbed(built, built.model("aligned"))
    assert data.held is not None
    held = replace(data.held, benign=data.held.benign[:8], harmful=data.held.harmful[:8], utility=data.held.utility[:8])
    harmful = [row for row in data.train if row.malicious]
    benign = [row for row in data.train if not row.malicious]
    late = [row for row in data.validation if row.malicious], [row for row in data.validation if not row.malicious]
    return replace(
        data, clean=data.clean[:60], held=held, safety=data.safety[:64], utility=data.utility[::5],
        train=[*harmful[:12], *benign[:12]], validation=[*late[0][:8], *late[1][:8]],
    )  # fmt: skip


def go(built: Testbed, out: Path, **changes: Any) -> Package:
    config = replace(small_config(str(built.suite())), **changes)
    return harden(str(built.model("aligned")), config, small_data(built), out)


@pytest.fixture(scope="module")
def done(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """One finished hardening; tests copy what they change."""
    return go(testbed, tmp_path_factory.mktemp("harden") / "run")


def figures(package: Package) -> dict[str, Any]:
    """What must not depend on when, and how often, a run was cut off."""
    stages = [{**stage.to_json(), "seconds": 0, "artefacts": sorted(stage.artefacts)} for stage in package.stages]
    stages = json.loads(json.dumps(stages))
    for stage in stages:
        stage["figures"].pop(TIME, None)  # A time is another one in every run.
    return {"weights": dict(package.weights), "stages": stages}


def test_a_hardening_leaves_a_package(testbed: Testbed, done: Package):
    assert tuple(stage.name for stage in done.stages) == STAGES
    assert all(stage.status != "skipped" for stage in done.stages)
    assert done.weights["received"] == hash_weights(str(testbed.model("aligned")))
    assert done.weights["hardened"] == hash_weights(str(done.folder / "model")) != done.weights["received"]
    there = {path.name for path in done.folder.iterdir()}
    assert there >= {
        "model", "signal", "units", "purify", "audits", "certificate.json", "harden.json", "MODEL_CARD.md",
        "harden.sarif", "report.html", "inspection.json",
    }  # fmt: skip
    received, purified, guarded = (done.audit(name) for name in ("received", "purified", "guarded"))
    assert received is not None
    assert purified is not None
    assert guarded is not None
    assert purified.models[0].weights == guarded.models[0].weights == done.weights["hardened"]
    assert len(guarded.models) == 2
    assert json.loads((done.folder / "signal" / "signal.json").read_text())["weights"] == done.weights["hardened"]
    claims = {stage.name: len(stage.controls) for stage in done.stages}
    assert claims["purify"] == 3
    assert claims["audit-purified"] == 3
    assert claims["diagnose"] == 1
    assert claims["audit-guarded"] == 4
    costs = done.stage("audit-guarded").figures
    assert 0 < costs[CHECKS] <= 1
    assert costs[TIME] > 0


def test_a_finished_hardening_is_read_and_a_changed_file_stops_it(testbed: Testbed, done: Package):
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module, "stages_of", lambda _: pytest.fail("a finished run was repeated"))
    try:
        assert go(testbed, done.folder) == Package.load(done.folder)
        path = done.folder / "units" / "map.json"
        text = path.read_text()
        path.write_text(text + " ")
        try:
            with pytest.raises(FailureError, match=r"units/map\.json: has changed"):
                go(testbed, done.folder)
        finally:
            path.write_text(text)
        with pytest.raises(UsageError, match="other settings"):
            go(testbed, done.folder, seed=1)
    finally:
        monkey.undo()


def test_left_out_stages_are_named_with_their_reason(testbed: Testbed, tmp_path: Path):
    skip = dict.fromkeys(("purify", "audit-purified", "diagnose", "guard"), "for a test")
    package = go(testbed, tmp_path / "run", skip=skip)
    status = {stage.name: stage.status for stage in package.stages}
    assert status["package"] == status["audit-received"] == "done"
    assert {status[name] for name in (*skip, "audit-guarded")} == {"skipped"}
    assert package.model == str(testbed.model("aligned"))
    assert package.weights["received"] == package.weights["hardened"]
    assert not (package.folder / "certificate.json").exists()
    assert "for a test" in (package.folder / "report.html").read_text()
    assert "for a test" in (package.folder / "MODEL_CARD.md").read_text()


_RUN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from keelguard.testbed.build import Testbed
from test_pipeline_harden import go
go(Testbed(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_moment_lose_nothing(seed: int, testbed: Testbed, done: Package, tmp_path: Path):
    out, draw = tmp_path / "run", random.Random(seed)
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", _RUN, str(testbed.folder), str(out)]
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    total, killed = sum(stage.seconds for stage in done.stages), 0
    for _ in range(6):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 8 + draw.random() * total / 2
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    subprocess.run(command, env=environment, check=True)
    assert killed >= 2
    assert figures(Package.load(out)) == figures(done)
    assert not list(out.glob(".*.tmp"))
    assert (out / PACKAGE_FILE).is_file()
