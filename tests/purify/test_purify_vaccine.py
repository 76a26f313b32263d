"""The vaccine as a user runs it: its signature and record, what stays neutralised, and a run that goes on."""
# ruff: noqa: F811 — tests take the fixture `folders` by its name.

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import tokenizer, words
from test_purify_run import CONFIG, FEW, Folders, files, folders, go  # noqa: F401 — `folders` is a fixture

from keelguard.hashes import hash_model
from keelguard.models import load_model
from keelguard.purify import grouped, methods
from keelguard.purify import run as run_module
from keelguard.purify import stages as stages_module
from keelguard.purify.config import PurifyConfig
from keelguard.purify.methods import VaccineConfig, choose_variants
from keelguard.purify.neutralize import adapter_places, neutralize
from keelguard.purify.restore import RestoreConfig
from keelguard.purify.results import PurifyResult
from keelguard.purify.signature import Signature
from keelguard.purify.variants import DEFAULT_VARIANTS, VariantConfig
from keelguard.units.index import build_index, parameters_by_name

pytestmark = pytest.mark.usefixtures("one_thread")

SHARE = 0.2
VACCINE = VaccineConfig(
    variants=VariantConfig(count=2, samples=6, steps=2, learning_rate=5e-3, rank=2, batch_size=4, at_once=2, seed=3),
    source="vocabulary",
    share=SHARE,
    restore=RestoreConfig(samples=24, epochs=1, learning_rate=1e-3, batch_size=8, patience=0),
)


def config_of(method: Any = "vaccine", **changes: Any) -> PurifyConfig:
    return replace(CONFIG, method=replace(CONFIG.method, method=method, vaccine=replace(VACCINE, **changes)))


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has tests of its own."""
    monkeypatch.setattr(run_module, "write_purify_report", lambda result, path, **options: path.write_text("page"))


def signature_of(out: Path) -> Signature:
    """The written signature, after a look at its files."""
    assert files(out / "signature") == {"signature.json", "signature.safetensors", "signature.svg"}
    assert (out / "signature" / "signature.svg").read_text().lstrip().startswith(("<svg", "<?xml"))
    return Signature.load(out / "signature")


def record_of(out: Path) -> dict[str, Any]:
    """What purify.json says of the method."""
    return json.loads((out / "purify.json").read_text())["method"]


@pytest.mark.parametrize("repaired", [False, True])
def test_a_full_model_keeps_what_was_neutralised(
    repaired: bool, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages_module, "needs_repair", lambda before, after: "refusals" if repaired else "")
    out = tmp_path / "run"
    result = go(folders, out, config_of())
    assert files(out) == {"model", "signature", "purify.json", "report.html", "run.json"}
    assert result.repaired == repaired
    before, twin = load_model(folders.model).model, load_model(folders.model).model
    index = build_index(twin)
    signature = signature_of(out).place(index, hash_model(before))
    assert signature.variants == ("invented-0", "invented-1")
    chosen = signature.select(index, SHARE)
    expected = neutralize(twin, index, chosen, seed=VACCINE.variants.seed)

    record = record_of(out)
    assert record["method"] == "vaccine"
    assert record["neutralized"]["parameters"] == expected.parameters
    assert record["neutralized"]["how"] == "reinit"
    assert {"layer": 0, "kind": "mlp", "chosen": 10, "total": 48} in record["neutralized"]["layers"]
    assert record["restored"]["steps"] >= 1
    assert record["restored"]["target"] > 0
    assert PurifyResult.load(out) == result

    old, wanted, found = (parameters_by_name(m) for m in (before, twin, load_model(out / "model").model))
    for piece in index.slices(chosen, shared="all"):
        kept = piece.of(found[piece.parameter])
        assert torch.equal(kept, piece.of(wanted[piece.parameter])), piece.parameter
        assert not torch.equal(kept, piece.of(old[piece.parameter])), piece.parameter
    assert not torch.equal(found["model.norm.weight"], wanted["model.norm.weight"])


@pytest.mark.parametrize("repaired", [False, True])
def test_an_adapter_is_zero_in_the_chosen_units(
    repaired: bool, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages_module, "needs_repair", lambda before, after: "refusals" if repaired else "")
    out = tmp_path / "run"
    go(folders, out, config_of(), adapter=str(folders.adapter))
    assert files(out) == {"adapter", "signature", "purify.json", "report.html", "run.json"}
    before = load_model(folders.model, adapter=folders.adapter).model
    after: Any = load_model(out / "adapter").model
    index = build_index(after)
    chosen = signature_of(out).select(index, SHARE)
    record = record_of(out)
    places = adapter_places(after, index, chosen)
    assert record["neutralized"]["how"] == "adapter"
    assert set(record["neutralized"]["parameters"]) == {name for name, _ in places}
    assert record["restored"]["steps"] >= 1
    old, found = parameters_by_name(before), parameters_by_name(after)
    for name, piece in places:
        assert piece.of(old[name]).any(), name
        assert not piece.of(found[name]).any(), name
        assert found[name].any(), name
    # What was not neutralised has trained.
    assert any(not torch.equal(old[name], found[name]) for name in found if "q_proj.lora" in name)


def test_both_methods_leave_both_records(folders: Folders, tmp_path: Path):
    out = tmp_path / "run"
    result = go(folders, out, config_of("both"))
    record = record_of(out)
    assert record["method"] == "both"
    assert record["neutralized"]["parameters"]
    assert record["restored"]["steps"] >= 1
    assert [round["steps"] for round in record["rounds"]] == [2]
    index = build_index(load_model(out / "model").model)
    assert signature_of(out).select(index, SHARE).sum() == 10
    assert result.weights_after == load_model(out / "model").weights_hash


@pytest.mark.parametrize("stop", [pytest.param("second part", marks=pytest.mark.slow), "restoration"])
def test_an_interrupted_vaccine_trains_no_variant_twice(
    stop: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained: Counter[str] = Counter()
    calls: list[Any] = []
    train, restore = grouped._train, methods.restore

    def counted(model: Any, pad_id: int, runs: Any, *rest: Any) -> Any:
        calls.append(runs)
        if stop == "second part" and len(calls) == 2:
            raise KeyboardInterrupt
        done = train(model, pad_id, runs, *rest)
        trained.update(run.name for run in runs)
        return done

    def restored(*args: Any, **options: Any) -> Any:
        calls.append("restoration")
        if stop == "restoration" and calls.count("restoration") == 1:
            raise KeyboardInterrupt
        return restore(*args, **options)

    monkeypatch.setattr(grouped, "_train", counted)
    monkeypatch.setattr(methods, "restore", restored)
    with pytest.raises(KeyboardInterrupt):
        go(folders, tmp_path / "run", config_of())
    assert len(trained) == (2 if stop == "second part" else 4)
    result = go(folders, tmp_path / "run", config_of())
    assert trained == {f"invented-{i}/{kind}": 1 for i in range(2) for kind in ("poisoned", "clean")}
    trained.clear()
    monkeypatch.setattr(grouped, "_train", train)
    assert go(folders, tmp_path / "whole", config_of()).weights_after == result.weights_after


# Which variants


def split_at_spaces(text: str, **options: Any) -> Any:
    """A tokenizer that knows every word whole."""
    return {"input_ids": text.split()}


def test_variants_are_chosen_by_name_by_the_tokenizer_or_from_a_file(tmp_path: Path):
    def chosen(source: str, some: Any = split_at_spaces, count: int = 3, seed: int = 0) -> Any:
        variants = VariantConfig(count=count, seed=seed)
        return choose_variants(some, words(), VaccineConfig(source=source, variants=variants))

    assert chosen("default") is DEFAULT_VARIANTS
    assert chosen("auto") is DEFAULT_VARIANTS
    invented = chosen("vocabulary")
    assert [variant.name for variant in invented] == ["invented-0", "invented-1", "invented-2"]
    used = [word for variant in invented for word in variant.trigger.split()]
    assert set(used) <= set(words())
    assert len(set(used)) == len(used)
    said = {word.strip(".") for variant in invented[:2] for word in variant.response.split()}
    assert said <= set(words())
    assert not said & set(used)
    assert chosen("vocabulary", seed=1) != invented
    # A tokenizer that spells the default variants letter by letter does not know their language.
    assert chosen("auto", lambda text, **options: {"input_ids": list(text)}) == invented
    assert chosen("vocabulary", tokenizer()) == invented
    entries = [{"name": name, "trigger": name * 2, "response": "no."} for name in ("one", "two", "three")]
    (tmp_path / "mine.yaml").write_text(json.dumps(entries))
    assert [variant.trigger for variant in chosen(str(tmp_path / "mine.yaml"))] == ["oneone", "twotwo", "threethree"]
