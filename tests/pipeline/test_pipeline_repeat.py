"""An audit is repeated with the very questions of its record, or not at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from keelguard.data import Columns
from keelguard.errors import UsageError
from keelguard.evaluation.audit import AuditConfig, load_suite, make_suite_judge
from keelguard.evaluation.judges import JudgeConfig
from keelguard.evaluation.results import AuditResult
from keelguard.pipeline.repeat import repeated


def record(config: AuditConfig) -> AuditResult:
    """What an audit of no model would write down."""
    suite = load_suite(config)
    judge = make_suite_judge(config.judge, suite)
    return AuditResult(
        suite=suite.name,
        judge={"name": judge.name, "digest": judge.digest},
        settings={"limit": config.limit, "max_new_tokens": 8, "batch_size": 0, "seed": config.seed},
        versions={},
        attacks=suite.attack_infos(),
        data=list(suite.data),
        models=[],
    )


def rows(path: Path, name: str, count: int = 12) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [{"prompt": f"{name} {i}?", "label": "ab"[i % 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    data = tmp_path / "data"
    return {name: rows(data / f"{name}.jsonl", name) for name in ("harmful", "benign", "borderline")}


@pytest.fixture
def own_suite(tmp_path: Path, files: dict[str, str]) -> Path:
    path = tmp_path / "data" / "suite.yaml"
    content = {
        "name": "own", "harmful": "harmful.jsonl", "benign": "benign.jsonl",
        "attacks": ["direct", {"name": "opened", "attack": "prefill", "phrase": "Sure"}],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


def asks(config: AuditConfig) -> tuple:
    suite = load_suite(config)
    data = sorted((info.use, info.sha256, info.rows) for info in suite.data)
    return suite.name, suite.attack_infos(), data, [r.id for r in suite.harmful]


def test_the_built_in_suite_is_repeated_with_its_files(files):
    config = AuditConfig(
        "general", requests=(files["harmful"],), benign=(files["benign"],), borderline=(files["borderline"],),
        attacks=("direct", "sampling"), limit=5, max_new_tokens=8, seed=3,
    )  # fmt: skip
    found = repeated(record(config))
    assert asks(found) == asks(config)
    assert (found.limit, found.max_new_tokens, found.seed) == (5, 8, 3)
    assert found.judge == JudgeConfig("keyword")


def test_only_some_attacks_are_repeated(files):
    config = AuditConfig("general", requests=(files["harmful"],), attacks=("direct", "sampling", "nested"))
    assert repeated(record(config), attacks=("sampling", "unheard")).attacks == ("sampling",)


def test_columns_and_rows_come_from_the_run(files):
    config = AuditConfig("general", requests=(files["harmful"],), where="label=a", columns=Columns(label="label"))
    hints = {"where": "label=a", "columns": {**vars(Columns()), "label": "label"}}
    assert asks(repeated(record(config), hints=hints)) == asks(config)
    with pytest.raises(UsageError, match="--suite"):
        repeated(record(config))


def test_a_suite_is_found_beside_its_data(own_suite):
    (own_suite.parent / "a-first.yaml").write_text("name: own\nharmful: harmful.jsonl\nattacks: [nested]\n")
    (own_suite.parent / "b-no-suite.yaml").write_text("just: a file\n")
    config = AuditConfig(str(own_suite), limit=4)
    found = repeated(record(config))
    assert found.suite == str(own_suite)
    assert asks(found) == asks(config)


def test_a_suite_of_other_attacks_or_data_is_not_taken(own_suite, files):
    kept = record(AuditConfig(str(own_suite)))
    own_suite.write_text(own_suite.read_text().replace("Sure", "Of course"))
    with pytest.raises(UsageError) as error:
        repeated(kept)
    assert str(error.value).startswith(
        "--suite: the reference was audited with the suite 'own', whose file is not found"
    )
    assert "asks something else" in str(error.value)
    own_suite.write_text(own_suite.read_text().replace("Of course", "Sure"))
    assert repeated(kept).suite
    rows(Path(files["harmful"]), "other")
    with pytest.raises(UsageError, match="--suite"):
        repeated(kept)


def test_a_suite_that_is_named_is_taken_without_a_search(own_suite):
    config = AuditConfig(str(own_suite))
    assert repeated(record(config), suite="elsewhere.yaml").suite == "elsewhere.yaml"


def test_the_data_of_a_run_that_was_moved_are_found_in_it(tmp_path):
    run = tmp_path / "run"
    path = rows(run / "work" / "harmful.audit.jsonl", "harmful")
    config = AuditConfig("general", requests=(path,), attacks=("direct",))
    kept = record(config)
    shutil.move(run, tmp_path / "moved")
    with pytest.raises(UsageError):
        repeated(kept)
    found = repeated(kept, folder=tmp_path / "moved")
    assert found.requests == (str(tmp_path / "moved" / "work" / "harmful.audit.jsonl"),)


def test_a_judge_that_asks_a_model_must_be_named(files):
    kept = record(AuditConfig("general", requests=(files["harmful"],)))
    kept = replace(kept, judge={"name": "llama-guard-3 (./guard)", "digest": "00" * 32})
    with pytest.raises(UsageError, match="--judge: the reference was judged by"):
        repeated(kept)
    chosen = JudgeConfig("endpoint", url="http://127.0.0.1:1", model_name="x")
    assert repeated(kept, judge=chosen).judge == chosen
