"""Random units to neutralise, as many as the vaccine takes: the control of a signature, and of the canaries."""

from typing import Any

import torch

from keelguard.purify.components import select
from keelguard.purify.methods import MethodConfig, Subject, share_of
from keelguard.units.index import Block, build_index, canonical


def random_units(subject: Subject, method: MethodConfig, seed: int) -> torch.Tensor:
    """As many units as the vaccine takes, drawn at random, (units,) bool over the model's index.

    Of an adapter only units in which it has weights are drawn, and attention heads where it has no MLP channels.

    Raises:
        UsageError: the model's units cannot be mapped, or the share selects none.
    """
    index = build_index(subject.loaded.model)
    blocks = list(index.blocks)
    if subject.threat == "adapter":
        # An adapter that reaches nothing is refused where its units are neutralised.
        blocks = [block for block in blocks if _adapted(subject.loaded.model, block)] or blocks
    kinds = {"mlp"} & {block.kind for block in blocks} or {index.attention}
    if method.vaccine.signature.attention:
        kinds |= {index.attention}
    scores = torch.full((len(index),), torch.nan, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    for block in blocks:
        if block.kind in kinds:
            scores[block.span] = torch.rand(block.size, generator=draw, dtype=torch.float64)
    return select(index, scores, share_of(method.vaccine, subject.threat))


def _adapted(model: Any, block: Block) -> bool:
    """Whether a LoRA has weights in the layers of a block."""
    modules = {canonical(name).partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    return any(part.parameter.rpartition(".")[0] in modules for part in block.parts)
