"""A seal alone tells whether a checkpoint still has the safety units of the model that was sealed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from keelguard.errors import UsageError
from keelguard.hashes import hash_weights
from keelguard.pipeline import seal as module
from keelguard.pipeline.package import Package, StageRecord, hash_artefacts
from keelguard.pipeline.seal import SealCheck, check_seal, read_seal, seal
from keelguard.runs import write_json
from keelguard.units.certificate import Certificate, signed
from keelguard.units.groups import GROUPS, Sizes, UnitMap, classify
from keelguard.units.index import Part, build_index, parameters_by_name
from keelguard.units.protect import protect
from keelguard.units.verify import unit_name, verify
from test_cli import Run, run  # noqa: F401 — `run` is a fixture
from tiny_models import Tiny, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def map_of(model: Any, weights: str, attention: Any = "head") -> UnitMap:
    """A map with groups drawn at random."""
    index = build_index(model, attention)
    contrast, strength = torch.randn(2, len(index), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = classify(contrast, strength, [block.size for block in index.blocks], Sizes(0.1, 0.1, 0.2))
    return UnitMap(labels, contrast, strength, {}, index.layout, attention, weights, {})


class Case:
    """A hardened model on disk, its map, and its certificate."""

    def __init__(self, folder: Path, tiny: Tiny, attention: Any = "head") -> None:
        self.folder, self.tiny = folder, tiny
        self.model = tiny.save(folder / "model")
        self.index = build_index(tiny.model, attention)
        self.chart = map_of(tiny.model, hash_weights(self.model), attention)
        self.path = folder / "certificate.json"
        write_json(self.path, seal(self.model, self.chart))

    def tuned(self, change: Callable[[dict[str, torch.Tensor], Any], Any], name: str = "tuned") -> Path:
        """A checkpoint whose weights are the hardened ones but for a change."""
        model = copy.deepcopy(self.tiny.model)
        with torch.no_grad():
            change(parameters_by_name(model), model)
        return Tiny(model, self.tiny.tokenizer).save(self.folder / name)

    def check(self, tuned: Path, **options: Any) -> SealCheck:
        return check_seal(read_seal(self.path), tuned, **options)

    def first(self, group: str) -> int:
        """The number of some unit of a group, in a feed-forward network, where units share no row."""
        spans = [n for block in self.index.blocks if block.kind == "mlp" for n in range(len(self.index))[block.span]]
        return next(n for n in spans if self.chart.labels[n] == GROUPS.index(group))

    def nudge(self, number: int, role: str = "out") -> Callable[[dict[str, torch.Tensor], Any], None]:
        """One value of a unit moved by one unit in the last place."""
        block = next(b for b in self.index.blocks if number in range(len(self.index))[b.span])
        part: Part = next(p for p in block.parts if p.role == role)
        row = int(part.rows[number - block.start, 0])

        def change(parameters: dict[str, torch.Tensor], model: Any) -> None:
            line = parameters[part.parameter].select(part.dim, row)
            line[1] = torch.nextafter(line[1], torch.tensor(torch.inf))

        return change


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return Case(tmp_path, tiny_model("llama"))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("attention", ["head", "channel"])
def test_a_copy_holds_in_any_dtype_that_keeps_its_values(architecture: str, attention: Any, tmp_path: Path):
    tiny = fresh_model(architecture)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    case = Case(tmp_path, tiny, attention)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = case.check(case.tuned(lambda p, m, dtype=dtype: m.to(dtype), str(dtype)))
        assert found.holds
        assert found.selected == case.chart.counts()["SCU"] > 0
        assert all(same is not False for same in found.groups.values())
        assert not found.outside
        assert any("rounding to a narrower type" in note for note in found.notes) == (dtype != torch.float32)


@pytest.mark.parametrize("role", ["in", "out"])
def test_the_last_bit_of_a_safety_unit_breaks_it_by_name(llama: Case, role: str):
    number = llama.first("SCU")
    found = llama.check(llama.tuned(llama.nudge(number, role)))
    assert not found.holds
    assert found.broken == (unit_name(llama.index.layout, number),)
    assert found.groups == {"CU": True, "SCU": False, "UCU": True, "RU": True}
    lines = found.lines()
    assert lines[0] == f"scu: BROKEN, 1 of {found.selected} units moved"
    assert found.broken[0] in lines[1]


def test_other_units_may_move(llama: Case):
    found = llama.check(llama.tuned(llama.nudge(llama.first("RU"))))
    assert found.holds
    assert found.groups == {"CU": True, "SCU": True, "UCU": True, "RU": False}
    assert found.lines()[0].startswith("scu: holds, 0 of ")
    assert "RU moved" in found.lines()[1]


def test_it_says_the_same_as_a_comparison_of_weights(llama: Case):
    def change(parameters: dict[str, torch.Tensor], model: Any) -> None:
        for number in (llama.first("SCU"), llama.first("CU")):
            llama.nudge(number)(parameters, model)
        parameters["model.layers.1.self_attn.k_proj.weight"][0, 0] += 1
        parameters["model.norm.weight"][0] += 1

    tuned = llama.tuned(change)
    found, expected = llama.check(tuned), verify(llama.model, tuned, llama.chart, require="scu")
    assert list(found.broken) == expected.broken
    assert {g for g, same in found.groups.items() if same is False} == {
        g for g, own in expected.groups.items() if own["moved"]
    }
    assert list(found.outside) == [entry["name"] for entry in expected.outside["changed"]] == ["model.norm.weight"]


def test_swapped_units_are_other_weights(llama: Case):
    first, second = [n for n in range(48) if llama.chart.labels[n] == GROUPS.index("SCU")][:2] or (0, 1)

    def change(parameters: dict[str, torch.Tensor], model: Any) -> None:
        for name in ("gate_proj", "up_proj"):
            rows = parameters[f"model.layers.0.mlp.{name}.weight"]
            rows[[first, second]] = rows[[second, first]].clone()
        columns = parameters["model.layers.0.mlp.down_proj.weight"]
        columns[:, [first, second]] = columns[:, [second, first]].clone()

    block = next(b for b in llama.index.blocks if b.name == "layers.0.mlp")
    write_json(llama.path, seal(llama.model, llama.chart, units="all"))
    found = llama.check(llama.tuned(change))
    assert set(found.broken) == {f"{block.name}[{first}]", f"{block.name}[{second}]"}


def test_zeros_and_numbers_that_are_none_are_compared_by_value(llama: Case):
    number = llama.first("SCU")
    block = next(b for b in llama.index.blocks if number in range(len(llama.index))[b.span])
    row = number - block.start

    def value(of: float) -> Path:
        name = f"model.layers.{block.layer}.mlp.up_proj.weight"
        return llama.tuned(lambda p, m: p[name][row].fill_(of), f"value {of}")

    for one, other in ((0.0, -0.0), (torch.nan, -torch.nan)):
        first = value(one)
        chart = UnitMap(**{**vars(llama.chart), "weights": hash_weights(first)})
        write_json(llama.path, seal(first, chart))
        assert llama.check(value(other)).holds
        assert not llama.check(llama.model).holds


def test_chunks_of_any_size_give_the_same_hashes(llama: Case, monkeypatch: pytest.MonkeyPatch):
    whole = seal(llama.model, llama.chart)
    monkeypatch.setattr(module, "_CHUNK", 50)
    assert seal(llama.model, llama.chart) == whole


# Adapters


def lora(case: Case, frozen: torch.Tensor | None, name: str) -> tuple[Path, Any]:
    """A LoRA trained for a step on the hardened model, some units kept off it; its folder and the model with it."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(case.tiny.model), LoraConfig(r=3, target_modules=LINEAR))
    model.peft_config["default"].base_model_name_or_path = str(case.model)
    ids = torch.arange(12)[None] % 7
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    mask = torch.zeros(len(case.index), dtype=torch.bool) if frozen is None else frozen
    with protect(model, case.index, mask):
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(str(case.folder / name))
    return case.folder / name, model.eval()


def test_adapters_hold_merged_and_unmerged_where_units_were_kept_off_them(llama: Case):
    kept, model = lora(llama, llama.chart.select("scu"), "kept")
    found = llama.check(kept)
    assert found.holds
    assert found.groups["CU"] is False
    assert llama.check(llama.model, adapter=kept).groups == found.groups
    merged = Tiny(model.merge_and_unload(), llama.tiny.tokenizer).save(llama.folder / "merged")
    assert llama.check(merged).holds
    moved, model = lora(llama, None, "moved")
    unmerged = llama.check(moved)
    assert not unmerged.holds
    merged = Tiny(model.merge_and_unload(), llama.tiny.tokenizer).save(llama.folder / "merged too")
    assert llama.check(merged).broken == unmerged.broken


def test_the_seal_of_an_adapter_is_of_the_merged_model_in_float32(tmp_path: Path):
    tiny = fresh_model("llama")
    tiny.model.bfloat16()
    case = Case(tmp_path, tiny)
    case.tiny.model.float()
    adapter, model = lora(case, None, "hardened")
    case.tiny.model.bfloat16()
    chart = UnitMap(**{**vars(case.chart), "weights": hash_weights(case.model, adapter)})
    content = seal(case.model, chart, adapter=adapter)
    assert content["weights"] == hash_weights(case.model, adapter)
    assert content["merged"]
    write_json(case.path, content)
    found = case.check(adapter)
    assert found.holds
    assert not found.outside
    assert any("last bits" in note for note in found.notes)
    merged = model.merge_and_unload()
    assert case.check(Tiny(merged, tiny.tokenizer).save(tmp_path / "merged")).holds
    assert not case.check(Tiny(merged.bfloat16(), tiny.tokenizer).save(tmp_path / "rounded")).holds
    assert not case.check(case.model).holds, "the base alone is not the hardened model"


# What does not fit, and what is damaged


def test_another_model_or_map_is_refused(llama: Case):
    with pytest.raises(UsageError, match="was made for weights abc"):
        seal(llama.model, UnitMap(**{**vars(llama.chart), "weights": "abc"}))
    with pytest.raises(UsageError, match="group 'safe': unknown"):
        seal(llama.model, llama.chart, units="safe")
    cases = {
        "qwen3": (fresh_model("qwen3"), "is a Qwen3ForCausalLM, the certificate is of a LlamaForCausalLM"),
        "deep": (fresh_model("llama", num_hidden_layers=3), "its layers hold other units"),
        "wide": (fresh_model("llama", hidden_size=64, head_dim=8), "has the hidden size 64, the certificate .* 32"),
    }
    for name, (tiny, message) in cases.items():
        with pytest.raises(UsageError, match=message):
            llama.check(tiny.save(llama.folder / name))


def test_a_changed_configuration_is_named(llama: Case):
    tuned = llama.tuned(lambda p, m: None)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    found = llama.check(tuned)
    assert found.holds
    assert found.config == {"rms_norm_eps": [1e-6, 0.1]}
    assert "rms_norm_eps" in " ".join(found.lines())


def test_a_damaged_certificate_is_refused(llama: Case):
    content = json.loads(llama.path.read_text())
    assert content["digest"] == signed(content)["digest"]
    name = next(iter(content["units"]))
    changes: dict[str, Any] = {
        "a unit's hash": {**content, "units": {**content["units"], name: "0" * 64}},
        "a unit left out": {**content, "units": {k: v for k, v in content["units"].items() if k != name}},
        "the group of a unit": {**content, "blocks": [{**content["blocks"][0], "groups": "0"}, *content["blocks"][1:]]},
        "no signature": {k: v for k, v in content.items() if k != "digest"},
    }
    for changed in changes.values():
        llama.path.write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=r"is damaged or was changed: its content has the hash [0-9a-f]{16}, not"):
            read_seal(llama.path)
    for text, message in {
        "{": "cannot be read",
        "[]": "is no certificate of a hardened model",
        '{"format": "keelguard.certificate/1"}': "of the format keelguard.seal/1 .but 'keelguard.certificate/1'",
        json.dumps(signed({"format": "keelguard.seal/1"})): "names no units",
        json.dumps(signed({"format": "keelguard.seal/1", "units": {"a": "b"}})): "is damaged .'architecture'",
    }.items():
        llama.path.write_text(text)
        with pytest.raises(UsageError, match=message):
            llama.check(llama.model)
    with pytest.raises(UsageError, match="cannot be read"):
        read_seal(llama.folder / "gone.json")


def test_a_comparison_is_signed_by_its_hash_too(llama: Case):
    found = verify(llama.model, llama.tuned(llama.nudge(llama.first("CU"))), llama.chart, require="scu")
    path = llama.folder / "comparison.json"
    found.save(path)
    assert Certificate.load(path).digest == found.digest == json.loads(path.read_text())["digest"]
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "violations": 1, "holds": False}))
    with pytest.raises(UsageError, match="is damaged or was changed"):
        Certificate.load(path)
    path.write_text(json.dumps(content))
    other = verify(llama.model, llama.tuned(llama.nudge(llama.first("RU")), "other"), llama.chart, require="scu")
    other.save(llama.folder / "other.json")
    (llama.folder / "other.safetensors").replace(path.with_suffix(".safetensors"))
    with pytest.raises(UsageError, match=r"does not belong to comparison\.json"):
        Certificate.load(path)


# The command


@pytest.fixture
def package(llama: Case) -> Path:
    """The folder of a finished hardening with the model, the map and the certificate."""
    llama.chart.save(llama.folder / "units")
    weights = {"received": llama.chart.weights, "hardened": llama.chart.weights}
    stage = StageRecord(
        "package", "done", artefacts=hash_artefacts(llama.folder, ["model", "units", "certificate.json"])
    )
    Package(llama.folder, "gone", None, "full", weights, {}, {}, 0, (stage,)).save()
    return llama.folder


def test_verify_takes_a_package_or_its_certificate(run: Run, llama: Case, package: Path):  # noqa: F811
    good, bad = llama.tuned(llama.nudge(llama.first("RU"))), llama.tuned(llama.nudge(llama.first("SCU")), "bad")
    for base in (package, package / "certificate.json"):
        ended = run("verify", base, good, "--out", "found.json")
        assert ended.code == 0, ended
        assert ended.out.startswith("scu: holds, 0 of ")
        assert ended.out.splitlines()[-1].startswith("certificate ")
        content = json.loads(Path("found.json").read_text())
        assert signed(content) == content
        ended = run("verify", base, bad)
        assert ended.code == 1, ended
        assert ended.out.startswith("scu: BROKEN, 1 of ")
    assert run("verify", package, good, "--require", "ru").code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CERTIFICATE", "MODEL", "--units", "units"), "--units: a certificate names its units itself"),
        (("CERTIFICATE", "MODEL", "--require", "ru"), "--require: a certificate names its units itself"),
        (("CERTIFICATE", "./gone/model"), "./gone/model: no such folder"),
        (("PACKAGE", "MODEL", "--base-adapter", "x/y"), "--base-adapter x/y: "),
        (("DAMAGED", "MODEL"), "is damaged or was changed"),
    ],
)
def test_mistakes_at_verify_are_one_line(
    run: Run,  # noqa: F811
    llama: Case,
    package: Path,
    arguments: tuple[str, ...],
    message: str,
):
    damaged = package / "damaged.json"
    damaged.write_text(llama.path.read_text().replace('"scu"', '"ru"'))
    places = {"CERTIFICATE": llama.path, "MODEL": llama.model, "PACKAGE": package, "DAMAGED": damaged}
    ended = run("verify", *(places.get(argument, argument) for argument in arguments))
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_a_package_whose_model_was_exchanged_is_refused(run: Run, llama: Case, package: Path):  # noqa: F811
    assert run("verify", package, llama.model).code == 0
    llama.tuned(llama.nudge(llama.first("SCU")), "model")
    ended = run("verify", package, llama.model)
    assert ended.code == 2
    assert "model.safetensors: has changed since it was written" in ended.err
