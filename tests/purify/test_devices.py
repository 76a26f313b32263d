"""Models that accelerate has spread: what is taken out of a layer's tensors is asked for on that layer's device."""

import copy
from typing import Any

import pytest
import torch

from keelguard.chats import encode_chats
from keelguard.purify.rollout import Rollout, prompt_ids
from keelguard.purify.walk import Walk
from keelguard.records import Chat, assistant, user
from keelguard.units.index import build_index
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: tuple[Chat, ...] = tuple((user(f"Is {a} {'known ' * a}?"), assistant(f"Yes, {a}.")) for a in range(1, 4))


class FarLayer:
    """A layer of a cache on another device, which takes indices from there alone."""

    def __init__(self) -> None:
        self.keys = torch.empty(6, 2, 4, 8, device="meta")
        self.asked: list[torch.device] = []

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.asked.append(indices.device)
        assert indices.device == self.keys.device


class Cache:
    """A cache of one layer here and one far away."""

    def __init__(self, near: Any) -> None:
        self.layers: list[Any] = [near, FarLayer()]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for layer in self.layers:
            layer.batch_select_indices(indices)


@torch.no_grad()
def test_a_rollout_selects_in_each_layer_on_its_device():
    tiny = tiny_model()
    state = Rollout.open(tiny.model, tiny.tokenizer, prompt_ids(tiny.tokenizer, CHATS))
    near = copy.copy(state._cache.layers[0])
    cache: Any = Cache(near)
    chosen = Rollout(tiny.model, 3, state.first, cache, state._mask).select([0, 0])
    assert chosen._cache.layers[1].asked == [torch.device("meta")]
    assert torch.equal(chosen._cache.layers[0].keys, near.keys.repeat_interleave(2, 0))
    assert torch.equal(chosen._mask, state._mask.repeat_interleave(2, 0))


class FarTokens:
    """A mask on another device: it must be brought to the layer's before it is of any use."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.asked = tokens, []

    def to(self, device: torch.device) -> torch.Tensor:
        self.asked.append(device)
        return self.tokens


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@torch.no_grad()
def test_a_walk_brings_its_mask_to_each_layer(architecture: str):
    tiny = tiny_model(architecture)
    index = build_index(tiny.model)
    rows = [chat.ids for chat in encode_chats(tiny.tokenizer, CHATS)]
    walk = Walk.start(tiny.model, index, tiny.tokenizer, rows, batch_size=2)
    layer = walk.layers[0]
    names = [name for name, p in tiny.model.named_parameters() if name.startswith(f"{layer.name}.") and p.dim() > 1]
    expected = walk.input_squares(layer, names)
    far: list[Any] = []
    for batch in walk._batches:
        mask: Any = FarTokens(batch.tokens)
        batch.tokens = mask
        far.append(mask)
    found = walk.input_squares(layer, names)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[matrix], expected[matrix]) for matrix in expected)
    assert all({str(device) for device in mask.asked} == {"cpu"} for mask in far)
