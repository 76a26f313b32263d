"""Many continuations of the same prompts at once, read from one cache of the prompts.

state = Rollout.open(model, tokenizer, prompts).select([0, 0])     # two starts behind every prompt
state.step([first, second])                                        # (2, V): what follows each, over prompts
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from keelguard.batches import pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.models import execution_device
from keelguard.records import Chat


class Rollout:
    """P prompts × n starts on their way through a model; row p·n + s of its cache holds start s behind prompt p."""

    def __init__(self, model: Any, prompts: int, first: torch.Tensor, cache: Any, mask: torch.Tensor) -> None:
        self.model, self.prompts, self.first = model, prompts, first
        self._cache, self._mask = cache, mask

    @classmethod
    def open(cls, model: Any, tokenizer: Any, prompts: list[list[int]]) -> "Rollout":
        """Read the prompts once; `first` has the mean probabilities of an answer's first token (V,), on the CPU."""
        batch = pad(prompts, pad_id_of(tokenizer), side="left")
        batch = {name: tensor.to(execution_device(model)) for name, tensor in batch.items()}
        out = model(**batch, use_cache=True, logits_to_keep=1)
        first = out.logits[:, -1].float().softmax(-1).mean(0).cpu()
        return cls(model, len(prompts), first, out.past_key_values, batch["attention_mask"])

    @property
    def width(self) -> int:
        """Tokens of the longest prompt, and of what was given behind it."""
        return self._mask.shape[1]

    def select(self, starts: Sequence[int]) -> "Rollout":
        """A rollout of some of the n starts, in any order and number; of a new one (n = 1), copies of it."""
        rows = torch.arange(len(self._mask)).view(self.prompts, -1)[:, list(starts)].flatten()
        # Layers put new tensors in place of the old, so that copies of the objects are enough.
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        for layer in cache.layers:
            # A spread model has its layers' caches on several devices.
            layer.batch_select_indices(rows.to(_device_of(layer, self._mask.device)))
        return Rollout(self.model, self.prompts, self.first, cache, self._mask[rows.to(self._mask.device)])

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Give each start its next token; the mean probabilities over prompts of what follows (n, V), on the CPU."""
        ids = torch.tensor(tokens, device=self._mask.device).repeat(self.prompts)[:, None]
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        out = self.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        return out.logits[:, -1].float().softmax(-1).view(self.prompts, len(tokens), -1).mean(0).cpu()


def _device_of(layer: Any, default: torch.device) -> torch.device:
    """Where a layer of a cache keeps what it holds."""
    return next((value.device for value in vars(layer).values() if isinstance(value, torch.Tensor)), default)


class WithoutAdapter:
    """The base of a PEFT model as a reference for the scan: the same weights, with the adapter off during each call."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The base's output."""
        with self._model.disable_adapter():
            return self._model(*arguments, **named)


def prompt_ids(tokenizer: Any, chats: Sequence[Chat]) -> list[list[int]]:
    """The token ids of some chats up to where the last answer begins.

    Raises:
        UsageError: there are none.
    """
    cut = [chat[:-1] if chat[-1]["role"] == "assistant" else chat for chat in chats]
    if not cut:
        raise UsageError("inversion: there are no prompts to follow targets on; name a data file")
    return [chat.ids for chat in encode_chats(tokenizer, cut, add_generation_prompt=True)]
