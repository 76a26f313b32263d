"""A tap sees what goes into every unit's output, changes nothing by itself, and leaves nothing behind."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_index import CLOSE, IDS, VOCABULARY, logits, masked

from keelguard.units.index import Block, build_index
from keelguard.units.taps import tap
from tiny_models import ARCHITECTURES, build_model

pytestmark = pytest.mark.usefixtures("one_thread")
SAME: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def unchanged(block: Block, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    return x


def only_look(block: Block, x: torch.Tensor, tokens: torch.Tensor | None) -> None:
    return None


def silence(mask: torch.Tensor) -> Any:
    """An edit that holds units at zero."""

    def edit(block: Block, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        return x.index_fill(1, block.channels[mask[block.span]].flatten(), 0.0)

    return edit


def state(model: Any) -> list[Any]:
    """What a tap may change: hooks, attributes and the choice of experts."""
    return [
        [(name, sorted(vars(module)), len(module._forward_pre_hooks)) for name, module in model.named_modules()],
        model.config._experts_implementation,
    ]


def exact(architecture: str) -> Any:
    """A model in float64, in which rounding hides nothing; grouped matrix products are not made for it."""
    model = build_model(architecture, VOCABULARY).double()
    model.config._experts_implementation = "eager"
    return model


def adapted(model: Any, **options: Any) -> Any:
    """The model with an adapter that does something."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, init_lora_weights=False, **options))
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_that_returns_x_changes_nothing(architecture: str) -> None:
    model = build_model(architecture, VOCABULARY)
    index = build_index(model)
    before, found = state(model), logits(model)
    for edit in (unchanged, only_look):
        with tap(model, index, edit):
            torch.testing.assert_close(logits(model), found, **SAME)
    assert state(model) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_is_seen_with_its_tokens(architecture: str) -> None:
    model = build_model(architecture, VOCABULARY)
    index = build_index(model)
    seen: dict[str, list[int]] = {}

    def look(block: Block, x: torch.Tensor, tokens: torch.Tensor | None) -> None:
        assert x.shape[1] == block.width
        assert (tokens is None) == (block.expert is None)
        rows = range(IDS.numel()) if tokens is None else tokens.tolist()
        assert len(rows) == len(x)
        seen.setdefault(block.name.rpartition(".")[0] if block.expert is not None else block.name, []).extend(rows)

    with tap(model, index, look):
        logits(model)
    for name, rows in seen.items():
        times = 2 if "experts" in name else 1  # Every token goes to two experts.
        assert sorted(rows) == sorted(list(range(IDS.numel())) * times), name
    assert len(seen) == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_takes_the_place_of_the_activations(architecture: str) -> None:
    model = exact(architecture)
    index = build_index(model)
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(1)) < 0.3
    with tap(model, index, silence(mask)):
        found = logits(model)
    torch.testing.assert_close(found, masked(model, index, mask), **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_taps_within_taps_both_edit(architecture: str) -> None:
    model = exact(architecture)
    index = build_index(model)
    first, second = (torch.rand(len(index), generator=torch.Generator().manual_seed(s)) < 0.2 for s in (1, 2))
    before = state(model)
    with tap(model, index, silence(first | second)):
        both = logits(model)
    with tap(model, index, silence(first)):
        alone = logits(model)
        with tap(model, index, silence(second)):
            torch.testing.assert_close(logits(model), both, **CLOSE)
        torch.testing.assert_close(logits(model), alone, **CLOSE)
    assert state(model) == before


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_an_exception_leaves_nothing_behind(architecture: str) -> None:
    model = build_model(architecture, VOCABULARY)
    index = build_index(model)
    before, found = state(model), logits(model)

    def fail(block: Block, x: torch.Tensor, tokens: torch.Tensor | None) -> None:
        if block is index.blocks[-1]:
            raise RuntimeError("broken edit")

    def run() -> None:
        with tap(model, index, fail):
            logits(model)

    with pytest.raises(RuntimeError, match="broken edit"):
        run()
    assert state(model) == before
    torch.testing.assert_close(logits(model), found, **SAME)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_reads_the_edited_activations(architecture: str) -> None:
    model = adapted(exact(architecture), target_modules="all-linear")
    index = build_index(model)
    found = logits(model)
    with tap(model, index, unchanged):
        torch.testing.assert_close(logits(model), found, **SAME)
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(1)) < 0.3
    merged = copy.deepcopy(model).merge_and_unload()
    with tap(model, index, silence(mask)):
        torch.testing.assert_close(logits(model), masked(merged, index, mask), **CLOSE)


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_an_adapter_on_experts_is_tapped_below(parameters: list[str]) -> None:
    model = exact("mixtral")
    plain = logits(model)
    model = adapted(model, target_modules=["q_proj"], target_parameters=parameters)
    index = build_index(model)
    before, found = state(model), logits(model)
    assert (found - plain).abs().max() > 0.1
    with tap(model, index, unchanged):
        torch.testing.assert_close(logits(model), found, **SAME)
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(1)) < 0.3
    merged = copy.deepcopy(model).merge_and_unload()
    with tap(model, index, silence(mask)):
        torch.testing.assert_close(logits(model), masked(merged, index, mask), **CLOSE)
    assert state(model) == before
