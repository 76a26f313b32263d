"""What a folder stands for as a side of the gate, and the refusal of files that nobody vouches for."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gate_audits_for_tests import audit, report
from small_package import audits, write_package

from keelguard.errors import UsageError
from keelguard.evaluation.audit import guarded_name
from keelguard.hashes import hash_weights
from keelguard.pipeline.package import Package
from keelguard.pipeline.sides import open_side
from keelguard.runs import write_json
from tiny_models import fresh_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_model().save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def weights(model: Path) -> str:
    return hash_weights(model)


def packaged(folder: Path, model: Path, weights: str) -> Package:
    """A package with this model in it, and audits of it."""
    shutil.copytree(model, folder / "model")
    found: dict[str, Any] = {
        name: dataclasses.replace(each, models=[dataclasses.replace(m, weights=weights) for m in each.models])
        for name, each in audits().items()
    }
    plain = found["guarded"].models[0]
    found["guarded"].models[1] = dataclasses.replace(found["guarded"].models[1], name=guarded_name(plain.name))
    return write_package(folder, found=found, weights={"received": "ab" * 32, "hardened": weights})


def tuned(folder: Path, model: Path, weights: str, **more: Any) -> Path:
    shutil.copytree(model, folder / "model")
    write_json(folder / "finetune.json", {"format": "keelguard.training/1", "weights": weights, **more})
    return folder


# Packages


def test_a_package_has_its_model_and_the_audits_of_these_weights(tmp_path, model, weights):
    packaged(tmp_path / "run", model, weights)
    side = open_side(str(tmp_path / "run"))
    assert (side.kind, side.weights, side.wrong, side.absent) == ("package", weights, "", "")
    assert side.model == str(tmp_path / "run" / "model")
    assert side.report is not None
    assert side.report.name == "purified"
    assert side.guarded is not None
    assert side.guarded.name == "hardened guarded"


def test_audits_of_other_weights_are_not_those_of_the_package(tmp_path, model, weights):
    shutil.copytree(model, tmp_path / "run" / "model")
    write_package(tmp_path / "run", weights={"received": "ab" * 32, "hardened": weights})
    side = open_side(str(tmp_path / "run"))
    assert side.report is None
    assert side.guarded is None


@pytest.mark.parametrize("name", ["model/model.safetensors", "audits/purified.json", "purify/purify.json"])
def test_a_changed_file_of_a_package_is_named(tmp_path, model, weights, name):
    packaged(tmp_path / "run", model, weights)
    path = tmp_path / "run" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    side = open_side(str(tmp_path / "run"))
    assert f"{path}: has changed" in side.wrong
    assert side.report is None


@pytest.mark.parametrize("name", ["model/chat_template.jinja", "audits/received-2.json", "signal/signal.json"])
def test_a_file_that_no_stage_has_written_is_named(tmp_path, model, weights, name):
    package = packaged(tmp_path / "run", model, weights)
    assert open_side(str(package.folder)).wrong == ""
    path = package.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    side = open_side(str(package.folder))
    if name in package.listed:
        assert "has changed" in side.wrong
    else:
        assert "is none of the package's files" in side.wrong
    assert package.signal is None


def test_a_missing_file_of_a_package_is_named(tmp_path, model, weights):
    packaged(tmp_path / "run", model, weights)
    (tmp_path / "run" / "audits" / "purified.json").unlink()
    assert "audits/purified.json: is missing" in open_side(str(tmp_path / "run")).wrong


def test_a_pinned_record_is_compared(tmp_path, model, weights):
    packaged(tmp_path / "run", model, weights)
    right = hashlib.sha256((tmp_path / "run" / "harden.json").read_bytes()).hexdigest()
    assert open_side(str(tmp_path / "run"), pinned=right.upper()).wrong == ""
    assert "the policy demands 0000000000000000" in open_side(str(tmp_path / "run"), pinned="0" * 64).wrong


def test_a_package_without_its_base_at_hand_is_not_wrong(tmp_path):
    """Of an adapter the package holds no base."""
    write_package(tmp_path / "run")
    side = open_side(str(tmp_path / "run"))
    assert side.wrong == ""
    assert "/models/suspicious" in side.absent


# Training runs


def test_a_training_run_has_its_model_and_its_signal(tmp_path, model, weights):
    folder = tuned(tmp_path / "run", model, weights)
    (folder / "signal").mkdir()
    side = open_side(str(folder))
    assert (side.kind, side.model, side.weights) == ("training run", str(folder / "model"), weights)
    assert side.signal == folder / "signal"
    assert side.report is None


def test_other_weights_than_those_of_the_record_are_wrong(tmp_path, model):
    side = open_side(str(tuned(tmp_path / "run", model, "00" * 32)))
    assert f"{tmp_path / 'run' / 'model'}: holds the weights" in side.wrong
    assert "the records of" in side.wrong


def test_a_damaged_record_is_a_mistake(tmp_path, model):
    folder = tuned(tmp_path / "run", model, "00" * 32)
    (folder / "finetune.json").write_text(json.dumps({"weights": None}))
    with pytest.raises(UsageError, match="is no record of a training"):
        open_side(str(folder))


# Audit runs


def audited(folder: Path, *models: Any) -> Path:
    audit(*models).save(folder / "audit.json")
    return folder


def test_an_audit_run_has_its_only_model(tmp_path, model, weights):
    side = open_side(str(audited(tmp_path, report(source=str(model), weights=weights))))
    assert (side.kind, side.model, side.wrong) == ("audit run", str(model), "")


def test_of_several_models_one_must_be_chosen(tmp_path, model, weights):
    audited(tmp_path, report(name="before"), report(name="after", source=str(model), weights=weights))
    with pytest.raises(UsageError, match=r"has 2 models \(before, after\); choose one with --name"):
        open_side(str(tmp_path))
    side = open_side(str(tmp_path), column="after")
    assert side.report is not None
    assert side.report.name == "after"
    with pytest.raises(UsageError, match="has no model 'between'; choose from before, after"):
        open_side(str(tmp_path), column="between")


def test_a_guarded_column_is_no_second_model(tmp_path):
    side = open_side(str(audited(tmp_path, report(), report(name=guarded_name("model")))))
    assert side.guarded is not None
    assert side.report is not None
    assert side.report.name == "model"


def test_an_audit_of_a_model_that_is_gone_still_counts(tmp_path):
    side = open_side(str(audited(tmp_path, report(source=str(tmp_path / "gone")))))
    assert (side.wrong, bool(side.absent)) == ("", True)
    assert side.report is not None


def test_an_audit_of_what_the_model_was_before_is_wrong(tmp_path, model):
    side = open_side(str(audited(tmp_path, report(source=str(model), weights="00" * 32))))
    assert "holds the weights" in side.wrong
    assert "--adapter" in side.wrong


# Models, and what is none of all this


def test_a_model_is_a_model(model):
    side = open_side(str(model))
    assert (side.kind, side.model, side.weights) == ("model", str(model), "")
    assert open_side("someone/some-model").kind == "model"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "has no config.json"),
        (lambda folder: write_json(folder / "run.json", {"command": "harden"}), "`keelguard harden` is not finished"),
    ],
)
def test_what_is_no_side_is_a_mistake(tmp_path, make, said):
    make(tmp_path / "x")
    with pytest.raises(UsageError, match=said):
        open_side(str(tmp_path / "x"))


def test_an_adapter_beside_a_run_of_its_own_is_a_mistake(tmp_path, model, weights):
    with pytest.raises(UsageError, match="leave it out"):
        open_side(str(tuned(tmp_path / "run", model, weights)), adapter="x")
