"""Tiny random-weight models of real architectures, with tokenizers and chat templates of the same families.

    tiny = tiny_model("gemma3")
    folder = tiny.save(tmp_path / "model")

The weights are drawn wide (`initializer_range` 0.5), so that answers differ between prompts and the most likely
token leads clearly: batching may change rounding, and must not change a text.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keelguard.generation import stop_tokens
from tokenizers_for_tests import chat_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
}


class _Family(NamedTuple):
    """A configuration and a model class, what its configuration adds to `SIZES`, and its tokenizer."""

    config: type
    model: type
    extra: dict[str, Any]
    kind: str
    shape: str


_FAMILIES = {
    "llama": _Family(LlamaConfig, LlamaForCausalLM, {}, "byte-level", "llama3"),
    "mistral": _Family(MistralConfig, MistralForCausalLM, {"sliding_window": 16}, "prepending", "mistral"),
    "qwen3": _Family(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}, "byte-level", "chatml"),
    "gemma3": _Family(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 8,
            "initializer_range": 0.25,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "prepending",
        "gemma",
    ),
    "phi3": _Family(Phi3Config, Phi3ForCausalLM, {}, "prepending", "zephyr"),
    "gpt_neox": _Family(GPTNeoXConfig, GPTNeoXForCausalLM, {}, "byte-level", "zephyr"),
    "mixtral": _Family(
        MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}, "prepending", "mistral"
    ),
}
ARCHITECTURES = tuple(_FAMILIES)


@dataclass(frozen=True)
class Tiny:
    """A model in evaluation mode with its tokenizer."""

    model: Any
    tokenizer: Any

    def save(self, folder: Path, **options: Any) -> Path:
        """Write both as an ordinary checkpoint; `options` go to the model's `save_pretrained`."""
        self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)
        return folder


def endless(architecture: str = "llama") -> Tiny:
    """A fresh tiny model that ends no answer of itself, whatever weights are drawn: its stop tokens get no logit."""
    tiny = fresh_model(architecture)
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight[stop_tokens(tiny.model, tiny.tokenizer)] = 0
    return tiny


def tiny_tokenizer(architecture: str = "llama") -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template as this architecture's models bring them. Shared: a test must not change it."""
    family = _FAMILIES[architecture]
    return chat_tokenizer(family.kind, family.shape)


def tiny_config(architecture: str, vocab_size: int, **changes: Any) -> Any:
    """The configuration of a tiny model of this architecture."""
    family = _FAMILIES[architecture]
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return family.config(**{"vocab_size": vocab_size, **SIZES, **special, **family.extra, **changes})


def build_model(architecture: str, vocab_size: int, seed: int = 3, **changes: Any) -> Any:
    """A float32 model with random weights in evaluation mode; `changes` go to its configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _FAMILIES[architecture].model(tiny_config(architecture, vocab_size, **changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # Norms and biases, which would start as ones and zeros.
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if "post_" in name and architecture == "gemma3":
                    parameter.add_(4.0)  # Else the scaled, tied embedding drowns the layers and every token echoes.
    return model.eval()


@cache
def _shared_model(architecture: str) -> Tiny:
    return fresh_model(architecture)


def tiny_model(architecture: str = "llama") -> Tiny:
    """A model of this architecture with its tokenizer. Shared: a test must not change it.

    What freezes a model that it wraps (a guard does) is undone here, so that no test depends on the ones before it.
    """
    tiny = _shared_model(architecture)
    tiny.model.requires_grad_(True)
    return tiny


def fresh_model(architecture: str = "llama", seed: int = 3, **changes: Any) -> Tiny:
    """As `tiny_model`, but a model that the test may change; the tokenizer is still the shared one."""
    tokenizer = tiny_tokenizer(architecture)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return Tiny(build_model(architecture, len(tokenizer), seed, **{**special, **changes}), tokenizer)
