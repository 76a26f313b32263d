"""Bytes of a model's parts by its shape: weights, what training keeps beside them, activations, logits, cache.

Coefficients are counted from what autograd saves of transformers' gated decoders with sdpa attention; the bytes of a
layer's small tensors, such as masks and statistics of norms, are left out.
"""

from keelguard.generation import SMALL_MODEL
from keelguard.pipeline.inspection import Inspection

FLOAT = 4
_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


class Sizes:
    """Bytes of a model's parts, from its inspection."""

    def __init__(self, found: Inspection) -> None:
        s = found.shape
        self.layers, self.hidden, self.vocabulary = s["layers"], s["hidden"], s["vocabulary"]
        self.queries = s["heads"] * s["head size"]
        self.values = s["key-value heads"] * s["head size"]
        # A token meets some experts only.
        self.inner = s["intermediate"] * max(1, s["experts of a token"])
        self.parameters, self.adapter = found.parameters, found.adapter_parameters
        idle = max(0, s["experts"] - s["experts of a token"]) if s["experts"] else 0
        self.active = self.parameters - idle * 3 * s["intermediate"] * self.hidden * self.layers
        self.width = _WIDTHS.get(found.dtype, 2)
        self.linear = self.layers * (4 * self.hidden + 2 * self.queries + 2 * self.values)
        self.linear += 0 if s["experts"] else self.layers * 3 * (self.hidden + self.inner)
        self.channels = self.layers * (self.queries + s["intermediate"] * max(1, s["experts"]))
        self.units = self.layers * (s["key-value heads"] + s["intermediate"] * max(1, s["experts"]))

    @property
    def weights(self) -> int:
        """The model as it is loaded, with its adapter."""
        return (self.parameters + self.adapter) * self.width

    @property
    def rows(self) -> int:
        """Rows per batch of generation, as `default_batch_size` has them."""
        return 256 if self.parameters < SMALL_MODEL else 16

    def cache(self, rows: int, tokens: int) -> int:
        """Keys and values."""
        return 2 * self.layers * self.values * rows * tokens * self.width

    def reading(self, tokens: int, width: int) -> int:
        """The most that a pass without gradients holds at once: a feed-forward network's or an attention's."""
        return tokens * width * max(3 * self.inner + 2 * self.hidden, 4 * self.queries + 3 * self.hidden)

    def saved(self, tokens: int, width: int, frozen: bool = False, checkpointing: bool = False) -> int:
        """What autograd keeps of a forward pass.

        Of a layer: both norms (their input in float32, and with trained weights what comes out of them twice), queries,
        keys, values and their mix at the width of all heads, and of the gated network its two halves, their product's
        factor and the product. With frozen weights the inputs of linear layers are not needed.
        """
        norm = (FLOAT if frozen else FLOAT + 2 * width) * self.hidden
        layer = 2 * norm + width * (4 * self.queries + (3 if frozen else 4) * self.inner)
        if checkpointing:
            return tokens * (self.layers * self.hidden * width + layer + norm)
        return tokens * (self.layers * layer + norm)

    def backward(self, tokens: int, width: int) -> int:
        """What the backward pass of one layer holds beside what was saved: gradients at its inner and outer widths."""
        return tokens * width * (5 * self.inner + 4 * self.hidden)

    def logits(self, tokens: int, width: int) -> int:
        """What a loss over the vocabulary holds: logits, log-probabilities, and in short formats a float32 copy."""
        return tokens * self.vocabulary * (2 * FLOAT if width == FLOAT else width + 2 * FLOAT)


def training(
    sizes: Sizes, tokens: int, *, adapter: int = 0, checkpointing: bool = False, shards: int = 1, bf16: bool = False
) -> dict[str, int]:
    """A device's bytes at the peak of a fine-tune: everything in float32, or a LoRA on the weights as they are.

    Gradients come as activations go, so that the larger of the two counts.

    Args:
        tokens: of a batch; sharded, of one device's part of it.
        adapter: the LoRA's values; 0 trains the whole model.
        shards: the devices over which FSDP2 shards weights, gradients and moments.
        bf16: activations are in bfloat16 by autocast, which keeps copies of float32 weights so.
    """
    trained, width = (adapter, sizes.width) if adapter else (sizes.parameters, FLOAT)
    # In bfloat16 most steps would be rounded away.
    weights = sizes.parameters * width + (adapter * FLOAT if adapter else 0)
    cast = 2 * sizes.parameters if bf16 and width == FLOAT else 0
    width = 2 if bf16 else width
    saved = sizes.saved(tokens, width, frozen=bool(adapter), checkpointing=checkpointing)
    saved += sizes.backward(tokens, width) + cast
    logits = sizes.logits(tokens, width)
    # Two layers are whole at a time: the one at work, and the one that is fetched meanwhile.
    gathered = 2 * weights // sizes.layers if shards > 1 else 0
    gradients = trained * FLOAT // shards
    found = {"weights": weights // shards + gathered, "optimiser": 2 * trained * FLOAT // shards}
    if saved + logits > gradients:
        return {**found, "activations": saved, "logits": logits}
    return {**found, "gradients": gradients}
