"""A diagnosis of the testbed: resumed, repeated and refused as promised, and the units that it finds are the ones."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from keelguard.cli import app
from keelguard.data import Columns, load_requests
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.judges import JudgeConfig, make_judge
from keelguard.models import load_model
from keelguard.testbed.build import Testbed
from keelguard.units import diagnose as module
from keelguard.units.diagnose import DiagnoseConfig, Diagnosis, diagnose, plain
from keelguard.units.evidence import ProofConfig, prove_diagnosis
from keelguard.units.groups import GROUPS, UnitMap
from keelguard.units.masks import random_mask
from keelguard.units.proof import Probe, Proof, measure_point

pytestmark = pytest.mark.usefixtures("one_thread")
PASSES = ["safety", "decision", "utility"]


def config_of(testbed: Testbed, **changes: Any) -> DiagnoseConfig:
    settings: dict[str, Any] = {
        "safety": (str(testbed.data / "harmful.train.jsonl"),),
        "utility": (str(testbed.data / "utility.train.jsonl"),),
        "samples": 24,
        "groups": 6,
        "bootstrap": 3,
        "max_new_tokens": 24,
    }
    return DiagnoseConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def found(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    return diagnose(str(testbed.model("aligned-sparse")), config_of(testbed), out=tmp_path_factory.mktemp("run") / "r")


@pytest.fixture
def attributed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of every attribution that is made."""
    labels: list[str] = []
    attribute = module.attribute

    def counting(*args: Any, **options: Any) -> Any:
        labels.append(options["label"].removeprefix("attribution: "))
        return attribute(*args, **options)

    monkeypatch.setattr(module, "attribute", counting)
    return labels


def test_the_map_is_written(found: Diagnosis, testbed: Testbed) -> None:
    chart = UnitMap.load(found.folder)
    assert torch.equal(chart.labels, found.chart.labels)
    assert chart.digest == found.chart.digest
    assert chart.place(found.index, load_model(testbed.model("aligned-sparse")).weights_hash) is chart
    units = len(chart)
    assert chart.counts() == {"CU": units - round(0.01 * units) - round(0.02 * units) - round(0.2 * units)} | {
        "SCU": round(0.01 * units),
        "UCU": round(0.02 * units),
        "RU": round(0.2 * units),
    }
    content = json.loads((found.folder / "map.json").read_text())
    assert content["prompts"] == {"safety": 24, "utility": 24}
    assert content["refusal_rate"] == 1.0
    assert content["score"] == "decision"
    assert 0.3 < content["coverage"]["share"] < 1
    assert set(content["stability"]) == set(GROUPS)
    assert set(content["overlap"]) == {"halves of the prompts", "scores"}
    assert content["data"]["safety"][0][0].endswith("harmful.train.jsonl")
    assert {f"attribution: {name}" for name in PASSES} < set(content["cost"])
    assert set(chart.raw) == {"decision", "taylor", "variance", "wanda"}


def test_what_the_diagnosis_read_is_not_held_out(found: Diagnosis, testbed: Testbed) -> None:
    everything = {request.id for request in load_requests(testbed.data / "harmful.train.jsonl")}
    read, rest = ({request.id for request in some} for some in (found.material.refused, found.held_out["safety"]))
    assert not read & rest
    assert read | rest == everything


def test_a_small_file_gives_half_of_itself_to_the_proof(testbed: Testbed, tmp_path: Path) -> None:
    lines = (testbed.data / "harmful.train.jsonl").read_text().splitlines()[:20]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    some, rest = module._read(config_of(testbed, safety=(str(tmp_path / "few.jsonl"),)))["safety"][0]
    assert (len(some), len(rest)) == (10, 10)


def run_again(found: Diagnosis, testbed: Testbed, **changes: Any) -> Diagnosis:
    return diagnose(str(testbed.model("aligned-sparse")), config_of(testbed, **changes), out=found.folder)


def test_another_score_and_other_sizes_read_the_statistics(
    found: Diagnosis, testbed: Testbed, attributed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in found.folder.glob("statistics-*")}
    assert sorted(path.stem for path in before) == [f"statistics-{name}" for name in sorted(PASSES)]
    for score in ("taylor", "variance", "wanda"):
        again = run_again(found, testbed, score=score, scu=0.05, ranking="layer", bootstrap=1)
        assert again.chart.meta["score"] == score
        assert torch.equal(again.chart.labels, UnitMap.load(found.folder).labels)
        for part in again.chart.labels.split(again.chart.blocks):
            assert int((part == 1).sum()) == round(0.05 * len(part))
        assert not torch.equal(again.chart.labels, found.chart.labels)
    again = run_again(found, testbed)
    assert torch.equal(again.chart.labels, found.chart.labels)
    assert again.chart.digest == found.chart.digest
    assert attributed == []
    assert {path: path.read_bytes() for path in found.folder.glob("statistics-*")} == before


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"utility": "benign.train.jsonl"}, "data"),
        ({"safety": "harmful.test.jsonl"}, "data"),
        ({"samples": 25}, "samples: 24 → 25"),
        ({"seed": 1}, "seed: 0 → 1"),
        ({"attention": "channel"}, "attention"),
        ({"columns": Columns(answer="id")}, "columns"),
    ],
)
def test_what_was_measured_on_other_data_is_refused(
    found: Diagnosis, testbed: Testbed, attributed: list[str], changes: dict[str, Any], what: str
) -> None:
    changes = {k: (str(testbed.data / v),) if k in ("safety", "utility") else v for k, v in changes.items()}
    before = (found.folder / "map.json").read_bytes()
    with pytest.raises(UsageError, match="belongs to a run with other settings") as caught:
        run_again(found, testbed, **changes)
    assert what in str(caught.value)
    assert attributed == []
    assert (found.folder / "map.json").read_bytes() == before


def test_another_model_is_refused(found: Diagnosis, testbed: Testbed) -> None:
    with pytest.raises(UsageError, match=r"other settings .*model"):
        diagnose(str(testbed.model("aligned")), config_of(testbed), out=found.folder)


def interrupt(at: str, read: Callable[..., None]) -> Any:
    """Fail in the second batch of one pass."""
    batches = [0]

    def reading(self: Any, model: Any, batch: Any, *rest: Any) -> None:
        batches[0] += 1
        if batches[0] == int(at):
            raise KeyboardInterrupt
        read(self, model, batch, *rest)

    return reading


@pytest.mark.parametrize(("batch", "passes"), [("2", ["safety"]), ("5", ["safety", "decision"])])
def test_an_interrupted_diagnosis_goes_on(
    found: Diagnosis,
    testbed: Testbed,
    attributed: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: str,
    passes: list[str],
) -> None:
    from keelguard.units.attribution import _Collector

    arguments: Any = (str(testbed.model("aligned-sparse")), config_of(testbed, batch_size=12))
    with monkeypatch.context() as patch:
        patch.setattr(_Collector, "read", interrupt(batch, _Collector.read))
        with pytest.raises(KeyboardInterrupt):
            diagnose(*arguments, out=tmp_path / "r")
    assert attributed == passes
    assert not (tmp_path / "r" / "map.json").exists()
    again = diagnose(*arguments, out=tmp_path / "r")
    assert attributed == passes + PASSES[len(passes) - 1 :], "finished passes are read, the broken one is made again"
    # Batches of another size change rounding, and so at most the last places.
    assert int((again.chart.labels != found.chart.labels).sum()) <= 4
    torch.testing.assert_close(again.chart.contrast, found.chart.contrast, atol=1e-3, rtol=1e-3)


def test_a_base_model_without_safety_data_has_redundant_units_only(
    testbed: Testbed, tmp_path: Path, attributed: list[str]
) -> None:
    result = diagnose(str(testbed.model("base")), config_of(testbed, safety=()), out=tmp_path / "r")
    chart, units = result.chart, len(result.chart)
    assert chart.counts() == {"CU": units - round(0.2 * units), "SCU": 0, "UCU": 0, "RU": round(0.2 * units)}
    assert attributed == ["utility"]
    # With the signed score of nothing, RU are the units of the least importance for utility.
    utility = chart.raw["decision"]["utility"]
    assert utility[chart.members("ru")].max() <= utility[chart.members("cu")].min()
    assert set(chart.meta["overlap"]["scores"]) == {"taylor / variance", "taylor / wanda", "variance / wanda"}
    assert chart.meta["refusal_rate"] == 0.0
    with pytest.raises(UsageError, match="no safety to prove"):
        prove_diagnosis(result, ProofConfig())


def test_a_model_that_does_not_refuse_exits_with_the_rate(testbed: Testbed, tmp_path: Path) -> None:
    files = [f"--{use}={testbed.data / name}" for use, name in (("safety", "harmful.train.jsonl"),
             ("utility", "utility.train.jsonl"))]  # fmt: skip
    arguments = ["diagnose", str(testbed.model("base")), *files, "--samples=10", "--out", str(tmp_path / "r")]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens=16"])
    error = result.exception
    assert isinstance(error, UsageError)
    assert error.exit_code == 2
    assert "refuses 0 of 10 requests of the safety data (0%)" in str(error)
    assert not (tmp_path / "r" / "map.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"score": "magic"},
        {"attention": "row"},
        {"ranking": "model"},
        {"scored": "first"},
        {"samples": 0},
        {"groups": 1},
        {"tokens": 0},
        {"bootstrap": -1},
        {"max_new_tokens": 0},
        {"scu": 1.5},
        {"utility": ()},
        {"safety": ("a", "b", "c"), "groups": 2},
    ],
)
def test_wrong_options_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        DiagnoseConfig(**{"utility": ("a.jsonl",), **changes})
    assert f"--{next(reversed(changes)).replace('_', '-')}" in str(caught.value)


def test_two_data_sets_are_compared_and_labels_follow_weights(testbed: Testbed, tmp_path: Path) -> None:
    lines = (testbed.data / "harmful.train.jsonl").read_text().splitlines()
    names = []
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines[60 * number : 60 * number + 40]))
        names.append(str(tmp_path / f"{number}.jsonl"))
    config = config_of(testbed, safety=tuple(names), samples=12, scored="last")
    result = diagnose(str(testbed.model("aligned-sparse")), config, out=tmp_path / "r")
    pairs = result.chart.meta["overlap"]["data sets"]
    assert list(pairs) == ["1 0.jsonl / 2 1.jsonl"]
    assert 0 < pairs["1 0.jsonl / 2 1.jsonl"]["SCU"] <= 1
    assert result.material.safety_sources == [0, 0, 0, 1, 1, 1]
    assert torch.equal(result.label(), result.chart.labels)
    # Only the end of the prompt was looked at: as many tokens as prompts.
    refused = len(result.material.refused)
    assert 16 <= refused <= 24
    for use, count in (("safety", refused), ("utility", 12)):
        assert result.statistics[use].moments[0].count.sum() == count
    assert result.statistics["decision"].moments[0].count.sum() > 2 * refused


def test_an_adapter_is_merged_first(testbed: Testbed, found: Diagnosis) -> None:
    loaded = load_model(testbed.model("aligned-sparse"), device="cpu")
    assert plain(loaded) is loaded
    torch.manual_seed(0)
    adapted = get_peft_model(loaded.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        merged = plain(replace(loaded, model=adapted))  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(merged.model(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
    assert not hasattr(merged.model, "peft_config") or not any("lora" in n for n, _ in merged.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in merged.model.parameters())


def test_safety_critical_units_carry_refusal_and_random_ones_do_not(found: Diagnosis, testbed: Testbed) -> None:
    harmful = load_requests(testbed.data / "harmful.validation.jsonl")
    assert len(harmful) == 32
    probe = Probe(harmful, [], [], make_judge(JudgeConfig(kind="world")), Generating(64, 0, 0))

    def asr(mask: torch.Tensor) -> float:
        return measure_point(found.loaded, found.index, mask, probe, share=0.01).asr.value

    # How often this model is broken as it is differs between machines that build it: 7 to 22 % were seen.
    units = len(found.chart)
    untouched = asr(torch.zeros(units, dtype=torch.bool))
    assert untouched <= 0.35
    critical = asr(found.chart.top("SCU", 0.01))
    assert critical >= untouched + 0.3
    by_chance = [asr(random_mask(found.index, round(0.01 * units), seed)) for seed in range(3)]
    assert max(by_chance) < critical
    assert sum(by_chance) / 3 <= untouched + 0.2
    # Utility-critical units of the same number are not what holds refusal up.
    assert asr(found.chart.top("UCU", 0.01)) < critical


def test_a_proof_shows_the_controls_and_goes_on(
    found: Diagnosis, testbed: Testbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ProofConfig(shares=(0.02, 0.01), controls=1, singles=40, limit=8, max_new_tokens=24)
    proof = prove_diagnosis(found, config)
    assert list(proof.curves) == [
        "SCU", "UCU", "CU", "RU", "random 1", "magnitude", "SCU by variance", "random pair 1",
    ]  # fmt: skip
    assert all([point.share for point in points] == [0.01, 0.02] for points in proof.curves.values())
    assert proof.curves["SCU"][-1].asr.value > proof.curves["random 1"][-1].asr.value
    content = json.loads((found.folder / "proof.json").read_text())
    assert content["map"] == found.chart.digest
    assert Proof.from_json(content) == proof
    # The sums of another processor make another testbed: 0.66 and more were seen.
    assert proof.exact["spearman"] > 0.5
    # First-order and exact effects are of the same size, not only of the same order.
    pairs = zip(proof.exact["first_order"], proof.exact["exact"], strict=True)
    assert 0.8 < median(exact / first for first, exact in pairs if abs(first) > 1e-4) < 1.25

    from keelguard.units import proof as proofs

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(proofs, "answer", never)
    assert prove_diagnosis(found, config).curves == proof.curves


def test_a_scan_finds_the_sizes(found: Diagnosis, testbed: Testbed, attributed: list[str]) -> None:
    again = run_again(found, testbed, scan=True)
    assert attributed == []
    sizes, steps = again.chart.meta["sizes"], again.chart.meta["scan"]
    assert steps["found"]["scu"] == sizes["scu"] <= 0.02
    assert steps["SCU"][-1]["asr_rise"] >= 0.5
    assert again.chart.counts()["SCU"] == round(sizes["scu"] * len(again.chart))
    assert torch.equal(UnitMap.load(found.folder).labels, again.chart.labels)
