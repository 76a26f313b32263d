"""A certificate names exactly the units whose weights moved, how far, and what moved outside of units."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from keelguard.errors import UsageError
from keelguard.hashes import hash_weights
from keelguard.units import verify as module
from keelguard.units.certificate import Certificate, certificate_lines
from keelguard.units.groups import GROUPS, Sizes, UnitMap, classify
from keelguard.units.index import UnitIndex, build_index, parameters_by_name
from keelguard.units.verify import unit_name, verify
from tiny_models import ARCHITECTURES, Tiny, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Case:
    """A base on disk with its map, and a place for what is made of it."""

    def __init__(self, folder: Path, tiny: Tiny, attention: Any = "head") -> None:
        self.folder, self.tiny = folder, tiny
        self.base = tiny.save(folder / "base")
        self.index: UnitIndex = build_index(tiny.model, attention)
        draw = torch.Generator().manual_seed(0)
        contrast, strength = torch.randn(2, len(self.index), generator=draw, dtype=torch.float64)
        labels = classify(contrast, strength, [block.size for block in self.index.blocks], Sizes(0.1, 0.1, 0.2))
        weights = hash_weights(self.base)
        self.chart = UnitMap(labels, contrast, strength, {}, self.index.layout, attention, weights, {})

    def tuned(self, change: Callable[[dict[str, torch.Tensor], Any], Any], name: str = "tuned") -> Path:
        """A checkpoint whose weights are the base's but for a change."""
        model = copy.deepcopy(self.tiny.model)
        with torch.no_grad():
            change(parameters_by_name(model), model)
        return Tiny(model, self.tiny.tokenizer).save(self.folder / name)

    def verify(self, tuned: Path, **options: Any) -> Certificate:
        return verify(self.base, tuned, self.chart, **options)


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return Case(tmp_path, tiny_model("llama"))


def distances(certificate: Certificate) -> torch.Tensor:
    assert certificate.distances is not None
    return certificate.distances


def moved(certificate: Certificate) -> list[int]:
    return (distances(certificate) > 0).nonzero().flatten().tolist()


def adapted(case: Case, name: str = "adapter", **options: Any) -> tuple[Path, Any]:
    """A LoRA with random weights on the base, saved, and the model that carries it."""
    config = LoraConfig(r=2, **{"target_modules": ["up_proj"], "init_lora_weights": False, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(case.tiny.model), config)
    model.peft_config["default"].base_model_name_or_path = str(case.base)
    return case.folder / name, model


def test_copies_are_equal_everywhere(tmp_path: Path):
    for architecture in ARCHITECTURES:
        for attention in ("head", "channel"):
            case = Case(tmp_path / architecture / attention, tiny_model(architecture), attention)
            found = case.verify(case.tuned(lambda p, m: None), require="all")
            assert not moved(found)
            assert found.holds
            assert (found.selected, found.violations, found.broken) == (len(case.index), 0, [])
            assert (found.outside["changed"], found.config, found.notes) == ([], {}, [])
            assert {g: v["equal"] for g, v in found.groups.items()} == case.chart.counts()
            assert found.base["weights"] == case.chart.weights == hash_weights(case.base)


@pytest.mark.parametrize("attention", ["head", "channel"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_single_values_move_the_units_that_own_them(architecture: str, attention: Any, tmp_path: Path):
    """One value in each kind of part (rows, columns, biases, an expert) of some unit, in one model."""
    case = Case(tmp_path, tiny_model(architecture), attention)
    draw = torch.Generator().manual_seed(1)
    expected: set[int] = set()
    chosen = [block for block in case.index.blocks if block.layer == 1]

    def change(parameters: dict[str, torch.Tensor], model: Any) -> None:
        for block in chosen:
            for part in block.parts:
                row = int(part.rows[int(torch.randint(block.size, (1,), generator=draw)), -1])
                whole = parameters[part.parameter]
                whole = whole if part.at is None else whole[part.at]
                line = whole.select(part.dim, row)
                if line.dim():
                    line[int(torch.randint(len(line), (1,), generator=draw))] += 0.5
                else:
                    line += 0.5
                expected.update(block.start + j for j in range(block.size) if row in part.rows[j].tolist())

    tuned = case.tuned(change)
    found = case.verify(tuned, require="all")
    assert set(moved(found)) == expected
    assert not found.outside["changed"]
    assert not found.holds
    assert found.violations == len(expected)
    assert found.broken == [unit_name(case.index.layout, number) for number in sorted(expected)[:20]]
    assert {unit.partition("[")[0] for unit in found.broken} <= {block.name for block in chosen}
    by_group = [sum(GROUPS[case.chart.labels[number]] == group for number in expected) for group in GROUPS]
    assert [found.groups[group]["moved"] for group in GROUPS] == by_group
    layers = {layer["layer"]: sum(g["moved"] for g in layer["groups"].values()) for layer in found.layers}
    assert layers == {0: 0, 1: len(expected)}
    # How far, by gathering each unit's weights.
    weights = [parameters_by_name(m) for m in (case.tiny.model, type(case.tiny.model).from_pretrained(tuned))]
    for number in sorted(expected)[:: max(1, len(expected) // 5)]:
        mask = torch.zeros(len(case.index), dtype=torch.bool)
        mask[number] = True
        own, other = (
            torch.cat([s.of(w[s.parameter]).flatten() for s in case.index.slices(mask)]).double() for w in weights
        )
        assert distances(found)[number].item() == pytest.approx(((other - own).norm() / own.norm()).item(), rel=1e-9)


def test_a_shared_value_row_moves_all_its_sharers(tmp_path: Path):
    case = Case(tmp_path, tiny_model("llama"), "channel")
    found = case.verify(case.tuned(lambda p, m: p["model.layers.1.self_attn.v_proj.weight"][3].add_(1.0)))
    block = next(b for b in case.index.blocks if b.layer == 1 and b.kind == "channel")
    # Two query heads of 8 channels read each of the two value heads.
    assert moved(found) == [block.start + 3, block.start + 11]


@pytest.mark.parametrize(("architecture", "name"), [("llama", "self_attn.q_proj"), ("phi3", "self_attn.qkv_proj")])
def test_rows_that_no_unit_owns_are_outside(architecture: str, name: str, tmp_path: Path):
    case = Case(tmp_path, tiny_model(architecture), "channel")
    parameter = f"model.layers.0.{name}.weight"
    found = case.verify(case.tuned(lambda p, m: p[parameter][0].add_(1.0)), require="all")
    assert found.holds
    (entry,) = found.outside["changed"]
    assert (entry["name"], entry["state"]) == (parameter, "moved")
    weight = parameters_by_name(case.tiny.model)[parameter]
    free = weight if architecture == "llama" else weight[: 32 + 16]  # Queries and keys before the values.
    assert entry["distance"] == pytest.approx(32**0.5 / free.double().norm().item(), rel=1e-5)


def test_norms_biases_and_tied_embeddings_are_outside_and_count_once(tmp_path: Path):
    for architecture, changes in {
        "gemma3": ["model.norm.weight", "model.embed_tokens.weight"],
        "gpt_neox": ["gpt_neox.layers.1.attention.dense.bias", "embed_out.weight"],
        "mixtral": ["model.layers.0.mlp.gate.weight"],
    }.items():
        case = Case(tmp_path / architecture, tiny_model(architecture))
        names = parameters_by_name(case.tiny.model)
        changes = [name if name in names else next(n for n in names if "lm_head" in n) for name in changes]
        found = case.verify(case.tuned(lambda p, m, c=changes: [p[name].view(-1)[0].add_(1.0) for name in c]))
        assert not moved(found)
        assert sorted(entry["name"] for entry in found.outside["changed"]) == sorted(changes)
        assert all(0 < entry["distance"] < 10 for entry in found.outside["changed"])
        assert found.outside["equal"] > 0


# Adapters and dtypes


def test_an_adapter_counts_as_its_merged_model(llama: Case):
    folder, model = adapted(llama, modules_to_save=["lm_head"])
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[0] += 1
    model.save_pretrained(folder)
    found = llama.verify(folder, require="scu")
    merged = Tiny(model.merge_and_unload(), llama.tiny.tokenizer).save(llama.folder / "merged")
    expected = llama.verify(merged, require="scu")
    assert moved(found) == moved(expected) != []
    assert torch.allclose(distances(found), distances(expected))
    assert [e["name"] for e in found.outside["changed"]] == ["lm_head.weight"]
    assert (found.violations, found.holds) == (expected.violations, False)
    assert found.tuned["weights"] == hash_weights(llama.base, folder) != expected.tuned["weights"]
    assert (found.tuned["adapter"], expected.tuned["adapter"]) == (str(folder), None)
    explicit = llama.verify(llama.base, adapter=folder)
    assert torch.equal(distances(explicit), distances(found))
    # All units of the feed-forward networks own a row of up_proj; attention owns none.
    kinds = {block.name: block.kind for block in llama.index.blocks}
    units = {kinds[unit_name(llama.index.layout, number).partition("[")[0]] for number in moved(found)}
    assert units == {"mlp"}


def test_rows_that_an_adapter_leaves_out_are_equal(llama: Case):
    folder, model = adapted(llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter[5:] = 0
    model.save_pretrained(folder)
    blocks = [block for block in llama.index.blocks if block.kind == "mlp"]
    assert moved(llama.verify(folder)) == [block.start + j for block in blocks for j in range(5)]


def test_what_merging_in_bfloat16_rounds_away_counts(tmp_path: Path):
    tiny = fresh_model("llama")
    case = Case(tmp_path, Tiny(tiny.model.bfloat16(), tiny.tokenizer))
    folder, model = adapted(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-5)
    model.save_pretrained(folder)
    found = case.verify(folder)
    networks = [block for block in case.index.blocks if block.kind == "mlp"]
    assert moved(found) == [block.start + j for block in networks for j in range(block.size)]
    merged = Tiny(model.merge_and_unload(), tiny.tokenizer).save(tmp_path / "merged")
    assert len(moved(case.verify(merged))) < 2 * 48
    assert any("float32" in note for note in found.notes)


@pytest.mark.parametrize("named", ["./somewhere/else", None])
def test_an_adapter_is_put_on_the_base_whatever_base_it_names(llama: Case, named: str | None):
    folder, model = adapted(llama)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    found = llama.verify(folder)
    assert found.tuned["source"] == str(llama.base)
    assert any("somewhere/else" in note for note in found.notes) == (named is not None)


def test_a_base_with_its_adapter(llama: Case):
    folder, model = adapted(llama)
    model.save_pretrained(folder)
    chart = UnitMap(**{**vars(llama.chart), "weights": hash_weights(llama.base, folder)})
    same = verify(llama.base, llama.base, chart, base_adapter=folder, adapter=folder, require="all")
    assert same.holds
    without = verify(llama.base, llama.base, chart, base_adapter=folder)
    assert len(moved(without)) == 2 * 48


def test_adapters_that_change_no_weights_are_refused(llama: Case):
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model: Any = get_peft_model(copy.deepcopy(llama.tiny.model), config)
    model.save_pretrained(llama.folder / "prefix")
    with pytest.raises(UsageError, match="PREFIX_TUNING"):
        llama.verify(llama.folder / "prefix")


def test_dtypes_are_compared_by_value(llama: Case):
    rounded = llama.tuned(lambda p, m: [t.copy_(t.bfloat16().float()) for t in p.values()], "rounded")
    narrow = llama.tuned(lambda p, m: m.bfloat16(), "narrow")
    found = llama.verify(narrow)
    assert len(moved(found)) == len(llama.index), "rounding moves every unit"
    assert 0 < found.groups["CU"]["max"] < 2**-8
    assert (found.base["dtype"], found.tuned["dtype"]) == ("float32", "bfloat16")
    assert any("bfloat16" in note for note in found.notes)
    chart = UnitMap(**{**vars(llama.chart), "weights": hash_weights(rounded)})
    exact = verify(rounded, narrow, chart, require="all")
    assert exact.holds
    assert not exact.outside["changed"]
    assert any("bfloat16" in note for note in exact.notes)


# Requirements, and what cannot be compared


def test_a_requirement_holds_where_other_units_moved(llama: Case):
    number = int(llama.chart.ranked("RU")[0])
    block = next(b for b in llama.index.blocks if number in range(len(llama.index))[b.span])

    def change(parameters: dict[str, torch.Tensor], model: Any) -> None:
        part = block.output
        parameters[part.parameter].index_fill_(part.dim, part.rows[number - block.start], 0.0)

    tuned = llama.tuned(change)
    assert llama.chart.labels[number] == GROUPS.index("RU")
    found = llama.verify(tuned, require="scu,cu:0.06")
    assert found.holds
    assert found.selected == int(llama.chart.select("scu,cu:0.06").sum())
    broken = llama.verify(tuned, require="ru")
    assert (broken.holds, broken.violations) == (False, 1)
    assert broken.broken == [f"{block.name}[{number - block.start}]"]
    assert llama.verify(tuned).holds, "nothing was required"
    with pytest.raises(UsageError, match="safe"):
        llama.verify(tuned, require="safe")


def test_at_most_twenty_units_are_named(llama: Case):
    found = llama.verify(llama.tuned(lambda p, m: [t.mul_(2) for t in p.values()]), require="all")
    assert len(found.broken) == 20
    assert found.violations == len(llama.index)
    assert found.groups["SCU"]["median"] == found.groups["RU"]["max"] == 1.0
    assert found.groups["UCU"]["share"] == 1.0


def test_another_map_is_refused(llama: Case):
    tuned = llama.tuned(lambda p, m: None)
    with pytest.raises(UsageError, match="was made for weights abc"):
        verify(llama.base, tuned, UnitMap(**{**vars(llama.chart), "weights": "abc"}))
    other = Case(llama.folder / "other", tiny_model("gpt_neox"), "head")
    with pytest.raises(UsageError, match="another architecture"):
        verify(llama.base, tuned, other.chart)


def test_models_that_cannot_be_compared_are_refused_by_the_first_difference(llama: Case):
    cases = {
        "qwen3": (fresh_model("qwen3"), "LlamaForCausalLM and TUNED a Qwen3ForCausalLM"),
        "wide": (fresh_model("llama", intermediate_size=64), r"model.layers.0.mlp.gate_proj.weight: .*\(48, 32\)"),
        "deep": (fresh_model("llama", num_hidden_layers=3), "model.layers.2.*TUNED has it and BASE has not"),
        "heads": (fresh_model("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=16), "other units"),
    }
    for name, (tiny, message) in cases.items():
        with pytest.raises(UsageError, match=message):
            llama.verify(tiny.save(llama.folder / name))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("by", [8, -8])
def test_a_resized_vocabulary_stops_nothing(architecture: str, by: int, tmp_path: Path):
    case = Case(tmp_path, tiny_model(architecture))
    size = case.tiny.model.config.vocab_size

    def change(parameters: dict[str, torch.Tensor], model: Any) -> None:
        model.resize_token_embeddings(size + by, mean_resizing=False)
        model.get_input_embeddings().weight[0] += 1

    found = case.verify(case.tuned(change), require="all")
    assert found.holds
    changed = {entry["name"]: entry for entry in found.outside["changed"]}
    assert {entry["state"] for entry in changed.values()} == {"resized"}
    assert all(entry["rows"] == [size, size + by] for entry in changed.values())
    assert len(changed) == (1 if architecture == "gemma3" else 2)
    assert [entry["distance"] > 0 for name, entry in changed.items() if "embed_tokens" in name or "embed_in" in name]
    if architecture != "gemma3":
        assert sorted(entry["distance"] > 0 for entry in changed.values()) == [False, True]


def test_a_head_that_is_no_longer_tied(tmp_path: Path):
    case = Case(tmp_path, tiny_model("gemma3"))
    model = fresh_model("gemma3", tie_word_embeddings=False).model
    model.load_state_dict(case.tiny.model.state_dict())
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    found = case.verify(Tiny(model, case.tiny.tokenizer).save(tmp_path / "untied"), require="all")
    assert found.holds
    assert [entry["name"] for entry in found.outside["changed"]] == ["lm_head.weight"]
    assert "tie_word_embeddings" in found.config


def test_a_changed_configuration_is_named(llama: Case):
    tuned = llama.tuned(lambda p, m: None)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1, "use_cache": False}))
    found = llama.verify(tuned, require="all")
    assert found.holds
    assert list(found.config) == ["rms_norm_eps"]
    assert "rms_norm_eps" in certificate_lines(found)[-1]


def test_values_that_are_no_numbers(llama: Case):
    first, second = (block for block in llama.index.blocks if block.kind == "mlp")

    def change(parameters: dict[str, torch.Tensor], model: Any) -> None:
        parameters["model.layers.0.mlp.up_proj.weight"][7, 0] = torch.nan
        parameters["model.layers.1.mlp.down_proj.weight"][0, 9] = torch.inf

    tuned = llama.tuned(change)
    found = llama.verify(tuned)
    assert moved(found) == [first.start + 7, second.start + 9]
    found.save(llama.folder / "certificate.json")
    assert "null" in (llama.folder / "certificate.json").read_text()
    chart = UnitMap(**{**vars(llama.chart), "weights": hash_weights(tuned)})
    assert verify(tuned, tuned, chart, require="all").holds, "the same NaN on both sides is no move"


def test_rows_are_the_same_in_chunks_of_any_size(llama: Case, monkeypatch: pytest.MonkeyPatch):
    tuned = llama.tuned(lambda p, m: [t.view(-1)[::7].add_(0.1) for t in p.values()])
    whole = llama.verify(tuned)
    monkeypatch.setattr(module, "_CHUNK", 100)
    pieces = llama.verify(tuned)
    assert torch.allclose(distances(whole), distances(pieces), rtol=1e-12)
    assert moved(whole) == moved(pieces)


# The file and the words


def test_certificates_come_back_from_disk(llama: Case):
    found = llama.verify(llama.tuned(lambda p, m: p["model.layers.0.mlp.up_proj.weight"][:3].mul_(1.5)), require="cu")
    path = llama.folder / "out" / "certificate.json"
    found.save(path)
    content = json.loads(path.read_text())
    assert content["format"] == "keelguard.certificate/1"
    assert content["chart"]["digest"] == llama.chart.digest
    again = Certificate.load(path)
    assert torch.equal(distances(again), distances(found))
    assert {**vars(again), "distances": 0} == {**vars(found), "distances": 0}
    assert certificate_lines(again) == certificate_lines(found)
    path.with_suffix(".safetensors").unlink()
    assert Certificate.load(path).distances is None


def test_damaged_certificates_are_refused(llama: Case):
    found = llama.verify(llama.tuned(lambda p, m: p["model.layers.0.mlp.up_proj.weight"][:3].mul_(1.5)))
    path = llama.folder / "certificate.json"
    found.save(path)
    tensors = load_file(path.with_suffix(".safetensors"))
    save_file({"distances": torch.zeros_like(tensors["distances"])}, path.with_suffix(".safetensors"))
    with pytest.raises(UsageError, match="does not belong to"):
        Certificate.load(path)
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="is damaged"):
        Certificate.load(path)
    path.write_text('{"format": "else"}')
    with pytest.raises(UsageError, match=r"no certificate of the format keelguard.certificate/1"):
        Certificate.load(path)


def test_the_lines_say_what_broke(llama: Case):
    tuned = llama.tuned(lambda p, m: [p[n].mul_(1.5) for n in ("model.norm.weight", "lm_head.weight")])
    lines = "\n".join(certificate_lines(llama.verify(tuned, require="scu")))
    assert "scu: holds, 0 of" in lines
    assert "model.norm.weight: moved, distance 0.5" in lines
    tuned = llama.tuned(lambda p, m: [t.mul_(2) for t in p.values()], "all")
    lines = "\n".join(certificate_lines(llama.verify(tuned, require="scu,cu")))
    assert "scu,cu: BROKEN" in lines
    assert "more" in lines
    assert "layer 1: moved CU" in lines
    assert "Nothing was required" in certificate_lines(llama.verify(tuned))[0]
