"""What goes into the linear layers of a decoder on some chats, layer by layer, while the layers are being changed.

    walk = Walk.start(model, index, tokenizer, rows, batch_size=16)
    for layer in walk.layers:
        squares = walk.input_squares(layer, names)                     # Σ x² of every input channel
        ...                                                            # change the layer's weights
        walk.go_through(layer)                                         # the next layer reads what it makes now

It holds the hidden states of all chats between two layers, and what the model gives each layer beside them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from keelguard.batches import batches_by_length, pad, pad_id_of
from keelguard.models import execution_device
from keelguard.units.index import Block, UnitIndex
from keelguard.units.taps import tap


class Matrix(NamedTuple):
    """A linear weight: its parameter, and the expert of a 3-D one."""

    parameter: str
    expert: int | None


class Layer(NamedTuple):
    """A decoder layer: its number from 0, its name in the model, itself."""

    number: int
    name: str
    module: Any


@dataclass
class _Batch:
    """A batch on its way: hidden states (B, T, H), and which of the B·T tokens are no padding.

    `calls` holds what the model gives each layer beside the hidden states.
    """

    hidden: torch.Tensor
    tokens: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def through(self, layer: Layer) -> torch.Tensor:
        """What a layer makes of the hidden states."""
        others, named = self.calls[layer.number]
        out = layer.module(self.hidden, *others, **named)
        return out if isinstance(out, torch.Tensor) else out[0]


class Walk:
    """Chats on their way through a model's decoder. Call everything under `no_grad`, the model in evaluation mode."""

    def __init__(self, model: Any, index: UnitIndex, layers: list[Layer], batches: list[_Batch]) -> None:
        self.layers = layers
        self._model, self._index, self._batches = model, index, batches

    @classmethod
    def start(
        cls, model: Any, index: UnitIndex, tokenizer: Any, rows: Sequence[Sequence[int]], batch_size: int
    ) -> "Walk":
        """Bring encoded chats to the door of the first layer; `index` is of this model, without an adapter."""
        layers = _layers(model, index)
        device = execution_device(model)
        batches: list[_Batch] = []
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(_hooked(layer.module, _recorder(batches, layer.number)))
            for part in batches_by_length([len(ids) for ids in rows], batch_size):
                batch = pad([rows[i] for i in part], pad_id_of(tokenizer), side="right")
                tokens = batch["attention_mask"].bool().flatten().to(device)
                batches.append(_Batch(torch.empty(0), tokens, []))
                model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False, logits_to_keep=1)
        return cls(model, index, layers, batches)

    def go_through(self, layer: Layer) -> None:
        """Pass all chats through a layer as its weights are now."""
        for batch in self._batches:
            batch.hidden = batch.through(layer)

    def input_squares(self, layer: Layer, names: Sequence[str]) -> dict[Matrix, torch.Tensor]:
        """Σ x² over tokens of every input channel (in,), float32, of the layer's linear weights of these names.

        An expert's are over the tokens routed to it; one that got none is missing.
        """
        sums: dict[Matrix, torch.Tensor] = {}
        now: dict[str, torch.Tensor] = {}

        def add(matrix: Matrix, x: torch.Tensor) -> None:
            if len(x):
                squares = x.float().square().sum(0)
                sums[matrix] = sums[matrix] + squares if matrix in sums else squares

        def dense(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                # A spread model has its layers on several devices.
                add(Matrix(name, None), x[now["tokens"].to(x.device)])

            return hook

        def keep_hidden(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            now["hidden"] = inputs[0]

        def expert(block: Block, x: torch.Tensor, tokens: torch.Tensor | None) -> None:
            assert tokens is not None
            told = now["tokens"].to(tokens.device)[tokens]
            add(Matrix(f"{block.module}.gate_up_proj", block.expert), now["hidden"][tokens[told]])
            add(Matrix(f"{block.module}.down_proj", block.expert), x[told])

        experts = tuple(b for b in self._index.blocks if b.layer == layer.number and b.expert is not None)
        with ExitStack() as stack:
            for name in names:
                owner = self._model.get_submodule(name.rpartition(".")[0])
                if isinstance(owner, torch.nn.Linear):
                    stack.enter_context(_hooked(owner, dense(name)))
            for module in {block.module for block in experts}:
                stack.enter_context(_hooked(self._model.get_submodule(module), keep_hidden))
            if experts:
                stack.enter_context(tap(self._model, replace(self._index, blocks=experts), expert))
            for batch in self._batches:
                now["tokens"] = batch.tokens
                batch.through(layer)
        return sums


def _layers(model: Any, index: UnitIndex) -> list[Layer]:
    names: dict[int, str] = {}
    for block in index.blocks:
        found = re.match(rf".*?\.{block.layer}(?=\.)", block.module)
        assert found is not None
        names[block.layer] = found[0]
    return [Layer(number, names[number], model.get_submodule(names[number])) for number in sorted(names)]


def _recorder(batches: list[_Batch], number: int) -> Callable[..., None]:
    def record(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        others = {key: value for key, value in named.items() if key != "hidden_states"}
        if number == 0:
            batches[-1].hidden = inputs[0] if inputs else named["hidden_states"]
        batches[-1].calls.append((inputs[1:], others))

    return record


@contextmanager
def _hooked(module: Any, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
