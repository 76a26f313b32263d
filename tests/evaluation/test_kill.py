"""kill -9 in the middle of an audit, then the same command: the result is that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keelguard.testbed.build import build_testbed
from keelguard.testbed.tokenizer import make_tokenizer
from keelguard.testbed.vocabulary import vocabulary_texts
from keelguard.testbed.world import make_world
from tiny_models import Tiny, build_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An audit of a tiny model with attacks that sample and that train."""
    folder = tmp_path_factory.mktemp("kill")
    tokenizer = make_tokenizer(vocabulary_texts(make_world(0)), 1024)
    model = build_model("llama", len(tokenizer), max_position_embeddings=1024)
    Tiny(model, tokenizer).save(folder / "model")
    suite = build_testbed(folder / "testbed", only=[]).suite()
    attacks = [f"--attack={name}" for name in ("direct", "sampling", "harmful fine-tune")]
    options = ["--suite", str(suite), "--limit=12", "--max-new-tokens=24", "--batch-size=4", *attacks]
    return [sys.executable, "-m", "keelguard", "audit", str(folder / "model"), *options]


def result(out: Path) -> dict:
    found = json.loads((out / "audit.json").read_text())
    for model in found["models"]:
        for cell in model["safety"].values():
            del cell["seconds"]
    return found


@pytest.mark.slow
def test_a_killed_audit_ends_like_an_undisturbed_one(command: list[str], tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--out", str(whole)], check=True, env=ENVIRONMENT, capture_output=True)
    kills = 0
    for lines in (20, 100):
        process = subprocess.Popen([*command, "--out", str(killed)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        while process.poll() is None and written(killed) < lines:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 2
    assert not (killed / "audit.json").exists()
    subprocess.run([*command, "--out", str(killed)], check=True, env=ENVIRONMENT, capture_output=True)
    assert result(killed) == result(whole)
    assert (killed / "report.html").exists()


def written(out: Path) -> int:
    """How many answers lie in a run folder."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("models/*/answers/*.jsonl"))
