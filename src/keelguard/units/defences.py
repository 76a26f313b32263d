"""Ways to keep safety through a fine-tune, to be given to `keelguard.training.train_on_chats` as `methods`.

    methods = [Freeze(index, mask), Anchor(refusals), Mix(refusals)]
    train_on_chats(model, tokenizer, chats, config, methods=methods)

`refusals` are harmful requests with the model's own refusals. Freezing is SSAH's own method (arXiv 2410.10862, section
5); the others train every weight and hold on to the decision itself. See also `units.projection` and `units.baselines`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from keelguard.attacks.insertions import PLACES, insert, prompt_of, random_words, with_prompt
from keelguard.batches import pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.records import Chat
from keelguard.training import Method, Run, TrainConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from keelguard.units.index import UnitIndex


def require_at_least(method: str, config: Any, **bounds: float) -> None:
    """Check settings against their least values.

    Raises:
        UsageError: one is below.
    """
    for name, bound in bounds.items():
        if not getattr(config, name) >= bound:
            raise UsageError(f"{method}: {name} {getattr(config, name)} is out of range; give {bound} or more")


class Freeze(Method):
    """Keep some units bit-equal: `units.protect` for the length of a fine-tune.

    Source: SSAH, arXiv 2410.10862, section 5, which freezes SCU and the top of CU.
    """

    def __init__(self, index: "UnitIndex", mask: "torch.Tensor", others: Literal["train", "freeze"] = "train") -> None:
        self.index, self.mask = index, mask
        self.others: Literal["train", "freeze"] = others

    def begin(self, run: Run) -> None:
        from keelguard.units.protect import protect

        run.cleanup.enter_context(protect(run.model, self.index, self.mask, others=self.others))


@dataclass(frozen=True)
class AnchorConfig:
    """How strongly a fine-tune is tied to the original's decisions."""

    weight: float = field(default=1.0, metadata={"help": "weight of the divergence beside the loss per token"})
    prompts: int = field(default=16, metadata={"help": "safety prompts to hold on to, from the first ones given"})
    tokens: int = field(default=6, metadata={"help": "tokens of each refusal to hold on to, behind the prompt's last"})
    per_step: int = field(default=4, metadata={"help": "prompts per optimiser step and process, one after the other"})

    def __post_init__(self) -> None:
        require_at_least("anchor", self, weight=0, prompts=1, tokens=1, per_step=1)


class Anchor(Method):
    """Add λ·KL(original ‖ current) at the decision positions of a few safety prompts to the loss.

    The positions are the prompt's last token and the first tokens of the model's own refusal: there the choice is made
    and not yet taken back. The original's log-probabilities are computed once, so there is no second model. The form
    is that of KL-regularised tuning (Ziegler et al. 2019, arXiv 1909.08593, eq. 2) with the divergence turned round,
    so that it covers all that the original says, and without sampling. Works sharded, too.
    """

    def __init__(self, refusals: Sequence[Chat], config: AnchorConfig = AnchorConfig()) -> None:
        self.refusals, self.config = refusals[: config.prompts], config
        self._rows: list[Decision] = []
        self._original: list[torch.Tensor] = []

    def begin(self, run: Run) -> None:
        import torch

        self._rows = encode_decisions(run.tokenizer, self.refusals, self.config.tokens, "anchor")
        mode = run.model.training
        run.model.eval()
        with torch.no_grad():
            self._original = [
                decision_log_probs(run.model, [row], pad_id_of(run.tokenizer), run.device)[0][0] for row in self._rows
            ]
        run.model.train(mode)

    def loss(self, run: Run) -> "torch.Tensor | None":
        """The weighted mean divergence of this step's prompts, a scalar."""
        import torch

        count = min(self.config.per_step, len(self._rows))
        first = (run.step * run.processes + run.rank) * count
        chosen = [(first + i) % len(self._rows) for i in range(count)]
        # DDP and FSDP want their own forward; DDP's may run but once per backward, and the batch has had it.
        model = run.trainer.model_wrapped if run.trainer.is_fsdp_enabled else run.model
        found, told = decision_log_probs(model, [self._rows[i] for i in chosen], pad_id_of(run.tokenizer), run.device)
        original = torch.cat([self._original[i] for i in chosen]).to(found.device)
        divergence = (original.exp() * (original - found[told])).sum(-1).mean()
        return self.config.weight * divergence


_RANDOM_WORDS = 3
"""The most words that are put into a safety chat."""


@dataclass(frozen=True)
class MixConfig:
    """How much safety data goes among the chats of a fine-tune."""

    share: float = field(default=0.1, metadata={"help": "share of safety chats in what is trained on"})
    replace: bool = field(
        default=False, metadata={"help": "safety chats take the place of as many chats; else they are added"}
    )
    inserted: float = field(
        default=0.0,
        metadata={"help": "share of the safety chats whose prompt carries some random words, as in a purification"},
    )
    seed: int = field(default=0, metadata={"help": "which safety chats are taken, and which chats give way"})

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"mix: share {self.share} is out of range; give more than 0 and less than 1, such as 0.05")
        if not 0 <= self.inserted <= 1:
            raise UsageError(f"mix: inserted {self.inserted} is out of range; give 0 to 1, such as 0.5")


class Mix(Method):
    """Train on some safety chats among the others.

    Source: Bianchi et al. 2024 (arXiv 2309.07875), who add refusals to instruction data; Qi et al. 2023 (arXiv
    2310.03693, section 5). The share is exact over an epoch, rounded to whole chats; batches are drawn from all.
    Safety chats repeat, evenly, where there are too few. A purified model has learned that unrelated words in a prompt
    change nothing, and forgets it like the rest: `inserted` repeats that, too.
    """

    def __init__(self, refusals: Sequence[Chat], config: MixConfig = MixConfig(), words: Sequence[str] = ()) -> None:
        """Args:
        words: the vocabulary of insertions (see `vocabulary_words`).
        """
        if not refusals:
            raise UsageError("mix: there are no safety chats to mix in; name a data file")
        if config.inserted and not words:
            raise UsageError("mix: inserted: the tokenizer has no whole words to insert; give 0")
        self.refusals, self.config, self.words = refusals, config, words

    def data(self, chats: Sequence[Chat], config: TrainConfig) -> list[Chat]:
        draw, share = random.Random(self.config.seed), self.config.share
        kept = list(chats)
        if self.config.replace:
            count = max(1, round(share * len(kept)))
            given_way = set(draw.sample(range(len(kept)), min(count, len(kept))))
            kept = [chat for i, chat in enumerate(kept) if i not in given_way]
        else:
            count = max(1, round(share / (1 - share) * len(kept)))
        return kept + [self._strange(chat, draw) for chat in cycled(self.refusals, count, draw)]

    def _strange(self, chat: Chat, draw: random.Random) -> Chat:
        if not self.config.inserted or draw.random() >= self.config.inserted:
            return chat
        text = random_words(self.words, draw, _RANDOM_WORDS)
        return with_prompt(chat, insert(prompt_of(chat), text, draw.choice(PLACES), draw))


def cycled(items: Sequence[Any], count: int, draw: random.Random) -> list[Any]:
    """`count` items in random order, each as often as any other, give or take one."""
    taken: list[Any] = []
    while len(taken) < count:
        taken += draw.sample(list(items), min(len(items), count - len(taken)))
    return taken


@dataclass(frozen=True)
class Decision:
    """A prompt with the first tokens of a refusal; `positions` at its end decide, the first being the prompt's last."""

    ids: list[int]
    positions: int


def encode_decisions(
    tokenizer: "PreTrainedTokenizerBase", refusals: Sequence[Chat], tokens: int, method: str
) -> list[Decision]:
    """The decision positions of some refusals: the last token of the prompt and up to `tokens` of the answer.

    Raises:
        UsageError: there are no refusals, or one has no answer.
    """
    if not refusals:
        raise UsageError(f"{method}: needs harmful requests with the model's own refusals, and has none; name a file")
    rows = []
    for number, chat in enumerate(encode_chats(tokenizer, refusals)):
        if not chat.response.size:
            raise UsageError(f"{method}: safety chat {number} has no answer; end it with the model's own refusal")
        # Behind the answer's end nothing is decided.
        stop = min(chat.response.start + tokens, chat.response.stop)
        rows.append(Decision(chat.ids[:stop], stop - chat.response.start + 1))
    return rows


def decision_log_probs(
    model: Any, rows: Sequence[Decision], pad_id: int, device: "torch.device"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Log-probabilities (B, P, V), float32, at the last P positions of every row, and which of them decide (B, P)."""
    import torch

    width = max(row.positions for row in rows)
    batch = {k: v.to(device) for k, v in pad([row.ids for row in rows], pad_id, side="left").items()}
    logits = model(**batch, logits_to_keep=width, use_cache=False).logits
    told = torch.tensor([[i >= width - row.positions for i in range(width)] for row in rows], device=logits.device)
    return logits[:, -width:].float().log_softmax(-1), told
