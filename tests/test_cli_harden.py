"""What `keelguard harden` refuses, and its dry run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keelguard.cli import app
from keelguard.errors import UsageError
from tiny_models import tiny_model


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["harden", *arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    loaded = tiny_model()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    found = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--skip", "guard"], "--skip guard: give the reason too"),
        (["--skip", "package=why"], "--skip package: is no stage that can be left out"),
        (["--clean-data", "ROWS"], "--harmful: is missing"),
        (
            ["--clean-data", "ROWS", "--harmful", "ROWS", "--skip", "purify=trusted", "--lora-rank", "4"],
            "--lora-rank: belongs to the purification, which --skip leaves out",
        ),
        (["--harmful", "ROWS"], "--clean-data: is missing"),
        ([], "no data: .* is no model of the testbed"),
        (["--clean-data", "nowhere.jsonl", "--harmful", "ROWS"], "nowhere.jsonl"),
        (["--clean-data", "ROWS", "--harmful", "ROWS", "--budget", "huge"], "--budget huge"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, model: Path, rows: Path, tmp_path: Path):
    given = [str(rows) if part == "ROWS" else part for part in arguments]
    result = run(str(model), *given, "--out", str(tmp_path / "run"))
    assert isinstance(result.exception, UsageError)
    assert re.search(message, str(result.exception))
    assert not (tmp_path / "run").exists()


def test_a_wrong_path_is_one_line(tmp_path: Path):
    result = run(str(tmp_path / "nowhere"))
    assert isinstance(result.exception, UsageError)
    assert "no such folder" in str(result.exception)


def test_a_dry_run_estimates_and_writes_nothing(model: Path, rows: Path, tmp_path: Path):
    result = run(
        str(model), "--clean-data", str(rows), "--harmful", str(rows), "--dry-run", "--out", str(tmp_path / "run")
    )
    assert result.exit_code == 0, result.exception
    for stage in ("purify", "diagnose", "guard"):
        assert stage in result.stdout
    assert not (tmp_path / "run").exists()
