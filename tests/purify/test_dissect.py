"""Parts of an update are put back and return bit-equal, and the parts of every architecture are all of it."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from keelguard.errors import UsageError
from keelguard.purify.dissect import PARTS, Part, dissect, partition, reverted
from keelguard.units.index import parameters_by_name
from tiny_models import ARCHITECTURES, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 97
IDS = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
WORDS: dict[str, tuple[str, ...]] = {
    "embeddings": ("embed_tokens", "lm_head", "embed_in", "embed_out"),
    "norms": ("norm",),
    "attention": ("self_attn", "attention."),
    "mlp": ("mlp",),
}
"""What the names of each part hold; of a name that holds several the first counts."""


def pair(architecture: str, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model, and the weights that it comes from."""
    poisoned = build_model(architecture, VOCABULARY, **changes)
    clean = {name: p.detach().clone() for name, p in parameters_by_name(poisoned).items()}
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in poisoned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return poisoned, clean


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters_by_name(model).items()}


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, weight in weights.items() if torch.equal(weight, others[name])}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_has_one_part(architecture: str, tied: bool) -> None:
    model = build_model(architecture, VOCABULARY, tie_word_embeddings=tied)
    places = partition(model)
    assert set(places) == set(parameters_by_name(model))
    for name, (part, layer) in places.items():
        assert part == next(part for part, words in WORDS.items() if any(word in name for word in words)), name
        inside = [number for number in (0, 1) if f"layers.{number}." in name]
        assert [layer] == (inside or [None]), name
    assert {place.part for place in places.values()} == set(PARTS)


def test_routers_and_the_norms_of_queries_have_a_part() -> None:
    assert partition(build_model("mixtral", VOCABULARY))["model.layers.1.mlp.gate.weight"] == ("mlp", 1)
    assert partition(build_model("qwen3", VOCABULARY))["model.layers.0.self_attn.q_norm.weight"] == ("norms", 0)
    assert partition(build_model("gpt_neox", VOCABULARY))["gpt_neox.layers.0.attention.dense.bias"] == ("attention", 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reverting_puts_back_that_part_alone_and_returns_bit_equal(architecture: str) -> None:
    poisoned, clean = pair(architecture)
    before, places = snapshot(poisoned), partition(poisoned)
    cases: list[tuple[tuple[Part, ...], tuple[int, ...] | None]] = [
        *(((part,), None) for part in PARTS),
        (("mlp",), (1,)),
        (("attention", "mlp"), (0,)),
        (("attention", "norms"), (0, 1)),
        (PARTS, None),
    ]
    for parts, layers in cases:
        expected = {
            n for n, place in places.items() if place.part in parts and place.layer in (layers or [place.layer])
        }
        assert expected
        with reverted(poisoned, clean, parts, layers):
            inside = snapshot(poisoned)
            assert same(inside, clean) == expected
            assert same(inside, before) == set(before) - expected
        assert same(snapshot(poisoned), before) == set(before)


def test_signs_of_zeros_and_bfloat16_return_bit_equal_after_an_error() -> None:
    poisoned, clean = pair("llama")
    poisoned.bfloat16()
    with torch.no_grad():
        poisoned.model.norm.weight[::2] = -0.0
    before = snapshot(poisoned)

    def fail() -> None:
        with reverted(poisoned, clean, PARTS):
            assert all(torch.equal(weight, clean[name].bfloat16()) for name, weight in snapshot(poisoned).items())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    for name, weight in snapshot(poisoned).items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.view(torch.int16), before[name].view(torch.int16)), name


def test_a_dissection_measures_every_cut_with_its_controls() -> None:
    poisoned, clean = pair("llama", num_hidden_layers=3)
    before, places = snapshot(poisoned), partition(poisoned)
    cuts = dissect(poisoned, clean, lambda model: same(snapshot(model), clean), blocks=(1, 2))
    assert same(snapshot(poisoned), before) == set(before)
    assert [(cut.parts, cut.layers) for cut in cuts] == [
        ((), None), (PARTS, None), (("attention",), None), (("mlp",), None), (("embeddings",), None),
        (("norms",), None), (("mlp",), (0,)), (("mlp",), (1,)), (("mlp",), (2,)), (("mlp",), (0, 1)),
        (("mlp",), (1, 2)), (("attention", "mlp"), (0,)), (("attention", "mlp"), (1,)), (("attention", "mlp"), (2,)),
        (("attention", "mlp"), (0, 1)), (("attention", "mlp"), (1, 2)),
    ]  # fmt: skip
    squares = {name: float((before[name] - clean[name]).double().square().sum()) for name in before}
    for cut in cuts:
        layers = [None, 0, 1, 2] if cut.layers is None else cut.layers
        expected = {n for n, place in places.items() if place.part in cut.parts and place.layer in layers}
        assert cut.value == expected
        assert cut.weights == sum(clean[name].numel() for name in expected)
        assert cut.update == pytest.approx(sum(squares[n] for n in expected) / sum(squares.values()), rel=1e-5)
    assert cuts[1].value == set(clean)


def test_the_measured_model_computes_with_the_reverted_weights() -> None:
    poisoned, clean = pair("gpt_neox")
    original = copy.deepcopy(poisoned)
    with torch.no_grad():
        for name, parameter in parameters_by_name(original).items():
            parameter.copy_(clean[name])
    answers = {}
    for cut in dissect(poisoned, clean, lambda model: model(input_ids=IDS, use_cache=False).logits.detach(), blocks=()):
        answers[cut.parts] = cut.value
    assert torch.equal(answers[PARTS], original(input_ids=IDS, use_cache=False).logits)
    assert torch.equal(answers[()], poisoned(input_ids=IDS, use_cache=False).logits)
    assert all((answers[part,] - answers[()]).abs().max() > 1e-3 for part in PARTS)


def test_a_model_without_an_update_has_no_share() -> None:
    poisoned, _ = pair("llama")
    cuts = dissect(poisoned, snapshot(poisoned), lambda model: 0, blocks=(2,))
    assert [cut.update for cut in cuts] == [0.0] * 8


def test_other_architectures_and_unknown_cuts_are_refused() -> None:
    poisoned, clean = pair("llama")
    before = snapshot(poisoned)
    smaller = snapshot(build_model("llama", VOCABULARY, intermediate_size=40))
    deeper = snapshot(build_model("llama", VOCABULARY, num_hidden_layers=3))
    shallower = snapshot(build_model("llama", VOCABULARY, num_hidden_layers=1))
    for weights, named in (
        (smaller, r"gate_proj.weight: has the shape \(48, 32\) in the poisoned model and \(40, 32\)"),
        (deeper, r"layers\.2\..*missing in the poisoned"),
        (shallower, r"layers\.1\..*missing in the clean"),
        (dict(clean, **{"lm_head.weight": torch.empty(97, 32, device="meta")}), "on the disk"),
    ):
        with pytest.raises(UsageError, match=named):
            dissect(poisoned, weights, lambda model: 0, blocks=(1,))
        with pytest.raises(UsageError, match=named), reverted(poisoned, weights, ["mlp"]):
            pass
    for width in (0, 3):
        with pytest.raises(UsageError, match=f"--blocks {width}: the model has 2 layers"):
            dissect(poisoned, clean, lambda model: 0, blocks=(1, width))
    with pytest.raises(UsageError, match="parts heads"), reverted(poisoned, clean, ["heads"]):  # pyright: ignore
        pass
    with pytest.raises(UsageError, match="layers 2"), reverted(poisoned, clean, ["mlp"], [1, 2]):
        pass
    assert same(snapshot(poisoned), before) == set(before)
    with pytest.raises(UsageError, match="merge it first"):
        partition(get_peft_model(poisoned, LoraConfig(target_modules=["q_proj"])))


def test_a_parameter_of_no_part_is_refused_by_name() -> None:
    model = build_model("llama", VOCABULARY)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"extra\.weight: is neither in a layer nor a norm nor an embedding"):
        partition(model)
