"""An ablated unit is out of the forward pass, and its weights come back bit for bit."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_index import CLOSE, VOCABULARY, WAYS, logits, masked, some
from test_taps import EXPERTS, adapted, exact, silence

from keelguard.errors import UsageError
from keelguard.units.ablation import Mean, Revert, ablate
from keelguard.units.index import Attention, UnitIndex, build_index, parameters_by_name
from keelguard.units.taps import tap
from tiny_models import ARCHITECTURES, build_model

pytestmark = pytest.mark.usefixtures("one_thread")


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_untouched(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, old in before.items():
        assert torch.equal(after[name].view(torch.int32), old.view(torch.int32)), name


@pytest.mark.parametrize("attention", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zeroing_is_a_forward_pass_without_the_units(architecture: str, attention: Attention) -> None:
    model = exact(architecture)
    index = build_index(model, attention)
    mask, whole = some(index, 1), logits(model)
    expected = masked(model, index, mask)
    with ablate(model, index, mask):
        found = logits(model)
    torch.testing.assert_close(found, expected, **CLOSE)
    with tap(model, index, silence(mask)):
        torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert (found - whole).abs().max() > 0.1
    assert torch.equal(logits(model), whole)


def base_of(model: Any) -> Any:
    """Another model of the same shape."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return other


def values(model: Any, index: UnitIndex) -> dict[str, Any]:
    means = [torch.full((block.width,), 0.3) for block in index.blocks]
    return {"zero": None, "mean": Mean(means), "revert": Revert(parameters_by_name(base_of(model)))}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("way", ["zero", "mean", "revert"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_weights_come_back_bit_for_bit(architecture: str, way: str, fails: bool) -> None:
    model = build_model(architecture, VOCABULARY)
    with torch.no_grad():  # A zero keeps its sign, too.
        next(p for name, p in model.named_parameters() if "o_proj" in name or "dense" in name)[:, ::2] = -0.0
    index = build_index(model)
    before, whole = bits(model), logits(model)

    def run() -> None:
        with ablate(model, index, some(index, 2), values(model, index)[way]):
            assert not torch.equal(logits(model), whole)
            if fails:
                raise RuntimeError("inside")

    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            run()
    else:
        run()
    assert_untouched(model, before)
    assert torch.equal(logits(model), whole)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("attention", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mean_takes_the_place_of_the_activations(architecture: str, attention: Attention) -> None:
    model = exact(architecture)
    index = build_index(model, attention)
    means = [torch.randn(b.width, generator=torch.Generator().manual_seed(b.start)) for b in index.blocks]
    mask = some(index, 3)

    def put(block: Any, x: torch.Tensor, tokens: Any) -> torch.Tensor:
        held = torch.zeros(block.width, dtype=torch.bool)
        held[block.channels[mask[block.span]].flatten()] = True
        return torch.where(held, means[index.blocks.index(block)].to(x.dtype), x)

    with tap(model, index, put):
        wanted = logits(model)
    with ablate(model, index, mask, Mean(means)):
        found = logits(model)
    torch.testing.assert_close(found, wanted, **CLOSE)
    zeros = Mean([torch.zeros(b.width) for b in index.blocks])
    with ablate(model, index, mask, zeros):
        torch.testing.assert_close(logits(model), masked(model, index, mask), **CLOSE)
    assert (found - masked(model, index, mask)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reverted_units_have_the_weights_of_the_base(architecture: str) -> None:
    model = build_model(architecture, VOCABULARY)
    index = build_index(model)
    mask, other = some(index, 4), base_of(model)
    base, own = bits(other), bits(model)
    slices = index.slices(mask)
    with ablate(model, index, mask, Revert(parameters_by_name(other))):
        inside = bits(model)
    for name in own:
        wanted = own[name].clone()
        for piece in slices:
            if piece.parameter == name:
                piece.put(wanted, piece.of(base[name]))
        assert torch.equal(inside[name], wanted), name
    assert_untouched(model, own)
    everything = torch.ones(len(index), dtype=torch.bool)
    with ablate(model, index, everything, Revert(parameters_by_name(other))):
        rest = {name for name, value in bits(model).items() if not torch.equal(value, base[name])}
    inside_units = ("q_proj", "up_proj", "down_proj", "query_key_value", "dense_h_to_4h.weight")
    assert not any(word in name for name in rest for word in inside_units)


def test_a_shared_value_row_goes_back_only_with_all_of_its_sharers() -> None:
    model = build_model("llama", VOCABULARY)
    index = build_index(model, "channel")
    block = next(block for block in index.blocks if block.kind == "channel")
    other = base_of(model)
    values = "model.layers.0.self_attn.v_proj.weight"
    for channels, changed in (([3], []), ([3, 11], [3])):
        mask = torch.zeros(len(index), dtype=torch.bool)
        mask[[block.start + channel for channel in channels]] = True
        own = bits(model)[values]
        with ablate(model, index, mask, Revert(parameters_by_name(other))):
            rows = (bits(model)[values] != own).any(1).nonzero().flatten().tolist()
        assert rows == changed


def test_a_model_to_revert_to_must_fit() -> None:
    model = build_model("llama", VOCABULARY)
    index = build_index(model)
    mask, before = torch.ones(len(index), dtype=torch.bool), bits(model)
    weights = dict(parameters_by_name(base_of(model)))
    wider = parameters_by_name(build_model("llama", VOCABULARY, intermediate_size=64))
    lacking = {name: value for name, value in weights.items() if "layers.1.mlp.up_proj" not in name}
    for bad, what in (
        (wider, r"has the shape \(64, 32\), not \(48, 32\)"),
        (lacking, "layers.1.mlp.up_proj.weight is missing"),
    ):
        with pytest.raises(UsageError, match=what), ablate(model, index, mask, Revert(bad)):
            pass
        assert_untouched(model, before)


def test_no_unit_and_a_wrong_mask() -> None:
    model = build_model("llama", VOCABULARY)
    index = build_index(model)
    whole = logits(model)
    for value in values(model, index).values():
        with ablate(model, index, torch.zeros(len(index), dtype=torch.bool), value):
            assert torch.equal(logits(model), whole)
    with pytest.raises(ValueError, match="chosen has shape"), ablate(model, index, torch.zeros(3, dtype=torch.bool)):
        pass


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("mixtral", {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    ],
)
def test_an_adapter_does_not_read_an_ablated_unit(architecture: str, options: dict[str, Any]) -> None:
    model = adapted(exact(architecture), **options)
    index = build_index(model)
    mask = some(index, 5)
    with ablate(model, index, mask):
        found = logits(model)
    with pytest.raises(UsageError, match="merge it first"), ablate(model, index, mask, Revert({})):
        pass
    torch.testing.assert_close(found, masked(model.merge_and_unload(), index, mask), **CLOSE)


def test_a_merged_model_is_ablated_as_any_other() -> None:
    merged = get_peft_model(exact("llama"), LoraConfig(r=2, target_modules="all-linear")).merge_and_unload()
    index = build_index(merged)
    mask = some(index, 6)
    with ablate(merged, index, mask):
        found = logits(merged)
    torch.testing.assert_close(found, masked(merged, index, mask), **CLOSE)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_units_whose_weights_are_elsewhere_are_ablated_too(architecture: str, where: str, tmp_path: Path) -> None:
    plain = build_model(architecture, VOCABULARY)
    index = build_index(plain)
    mask, device = some(index, 7), torch.device("cpu")
    model = copy.deepcopy(plain)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=device)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=device)
    with ablate(plain, index, mask):
        wanted = logits(plain)
    with ablate(model, index, mask):
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="cannot be put back"), ablate(model, index, mask, Revert({})):
        pass
