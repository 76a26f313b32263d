"""Read or edit the activations of a model's units while it runs.

    with tap(model, index, edit):                   # edit(block, x, tokens) → None, or what takes the place of x
        model(**batch)

The activations are what goes into the output projection B of f(X) = B·σ(A·X). A dense block gives all B·T tokens in
order; an expert gives the tokens that were routed to it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from keelguard.units.index import Block, UnitIndex, canonical

Edit = Callable[[Block, torch.Tensor, torch.Tensor | None], torch.Tensor | None]
"""(block, x (S, channels), tokens (S,) int64 or None where they are all tokens in order) → x or its replacement."""

_EXPERTS = "keelguard"


@contextmanager
def tap(model: Any, index: UnitIndex, edit: Edit) -> Iterator[None]:
    """Call `edit` for every block of an index on every forward pass of the model, until the context ends."""
    dense = {block.module: block for block in index.blocks if block.expert is None}
    experts: dict[str, list[Block]] = {}
    for block in index.blocks:
        if block.expert is not None:
            experts.setdefault(block.module, []).append(block)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            name = canonical(name)
            if name in dense:
                stack.enter_context(_removed(module.register_forward_pre_hook(_dense_hook(dense[name], edit))))
            elif name in experts:
                stack.enter_context(_tapped_experts(module, experts[name], edit))
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _dense_hook(block: Block, edit: Edit) -> Callable[..., Any]:
    def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
        x = inputs[0]
        edited = edit(block, x.reshape(-1, x.shape[-1]), None)
        return None if edited is None else (edited.view_as(x), *inputs[1:])

    return hook


@contextmanager
def _tapped_experts(module: Any, blocks: list[Block], edit: Edit) -> Iterator[None]:
    """Let an experts module compute expert by expert, through transformers' own interface for that."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    while hasattr(module, "base_layer"):  # PEFT wraps the whole module, once for each parameter that it adapts.
        module = module.base_layer
    ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _experts_forward)
    before = module.config._experts_implementation
    outer = getattr(module, "keelguard_taps", ())
    module.config._experts_implementation = _EXPERTS
    module.keelguard_taps = (*outer, (blocks, edit))
    try:
        yield
    finally:
        if outer:
            module.keelguard_taps = outer
        else:
            del module.keelguard_taps
        module.config._experts_implementation = before


def _experts_forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' forward pass, hidden (S, H) → (S, H), with a stop at each expert's activations."""
    result = torch.zeros_like(hidden)
    for expert in range(module.down_proj.shape[0]):
        tokens, place = torch.where(top_k_index == expert)
        if not len(tokens):
            continue
        x = module._apply_gate(F.linear(hidden[tokens], module.gate_up_proj[expert]))
        for blocks, edit in module.keelguard_taps:
            edited = edit(blocks[expert], x, tokens)
            x = x if edited is None else edited
        x = F.linear(x, module.down_proj[expert])
        result.index_add_(0, tokens, (x * top_k_weights[tokens, place, None]).to(result.dtype))
    return result
