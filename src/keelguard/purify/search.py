"""The worst-case insertion search: which few words, put into a prompt, most disturb the model's own clean answer.

    found = search_insertions(model, tokenizer, probes, words, SearchConfig())
    found[0]                                        # Insertion(text="…", place="prefix", loss=…, rise=…)

A trigger is such an insertion. On a small vocabulary every word is tried, and the best are lengthened by a beam; on a
real one the gradient at the gap chooses which words are tried, as in GCG (Zou et al. 2023, arXiv 2307.15043). An
attacker who trains against false triggers leaves little trace of either half of one. So the worst words are tried in
pairs, and the very worst with all words in front of them and behind: all of a small vocabulary, and of a large one
those that the gradient favours, which sees the other half poorly.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from keelguard.attacks.insertions import PLACES, Place
from keelguard.batches import pad, pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.fitting import READ_TOKENS, in_halves, memory_errors
from keelguard.models import execution_device
from keelguard.progress import SILENT, Reporter
from keelguard.purify.frames import Frame, WordIds, make_frames, with_gap, word_ids
from keelguard.records import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CAP = 10.0
"""Nats at which the loss of a token is cut off, so that one odd prompt cannot outweigh the others."""
_NEARLY = 0.9
"""The share of an insertion's rise that fewer of its words must have to stand for it."""


@dataclass(frozen=True)
class SearchConfig:
    """How far and how finely insertions are searched."""

    prompts: int = field(default=8, metadata={"help": "prompts of each kind (answered, refused) to measure on"})
    tokens: int = field(default=3, metadata={"help": "first tokens of the answer whose loss counts"})
    longest: int = field(default=3, metadata={"help": "words of the longest insertion"})
    glance: int = field(default=1, metadata={"help": "prompts that every insertion is tried on"})
    first_look: int = field(default=3, metadata={"help": "prompts that the worst of these are tried on"})
    second_look: int = field(
        default=48, metadata={"help": "worst insertions tried on all prompts; four times as many in the look before"}
    )
    beam: int = field(default=6, metadata={"help": "insertions that are lengthened by a word, per place"})
    tried: int = field(
        default=1000, metadata={"help": "words tried at a time; of more, those that the gradient favours"}
    )
    completed: int = field(
        default=2,
        metadata={"help": "worst single words, per place, with others put in front and behind: `tried` of each"},
    )
    paired: int = field(
        default=28, metadata={"help": "worst single words that are tried in pairs, as half a trigger may do little"}
    )
    lengthened: int = field(
        default=48, metadata={"help": "longer insertions tried per place and word, those that the gradient favours"}
    )
    keep: int = field(
        default=6, metadata={"help": "worst insertions to return per place, two at most with a word in common"}
    )
    batch_size: int = field(default=256, metadata={"help": "sequences per forward pass at most; long ones go in fewer"})
    seed: int = field(default=0, metadata={"help": "gaps inside the prompts"})

    def __post_init__(self) -> None:
        for name in (
            "prompts",
            "tokens",
            "longest",
            "glance",
            "first_look",
            "second_look",
            "beam",
            "tried",
            "lengthened",
            "keep",
            "batch_size",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"search: {name} {getattr(self, name)} is out of range; give 1 or more")
        for name in ("completed", "paired"):
            if getattr(self, name) < 0:
                raise UsageError(f"search: {name} {getattr(self, name)} is out of range; give 0 or more")


class Insertion(NamedTuple):
    """Words in a place with their effect.

    `loss` is the mean negative log-likelihood (nats, each token capped at 10) of the first answer tokens with them,
    `rise` what that is above the loss without, both over the search's prompts of one kind.
    """

    text: str
    place: Place
    loss: float
    rise: float
    kind: str = "answered"


def search_insertions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    probes: Sequence[Chat],
    words: Sequence[str],
    config: SearchConfig = SearchConfig(),
    *,
    kind: str = "answered",
    places: Sequence[Place] = PLACES,
    reporter: Reporter = SILENT,
    label: str = "worst insertions",
) -> list[Insertion]:
    """The worst insertions of one to `longest` words into some prompts, worst first.

    Args:
        probes: conversations that end in the model's own clean answer, which an unrelated word does not change. Those
            of one word are left out of the gap inside, unless all are such.
        words: the vocabulary to search.
        kind: what the probes are called in the result.

    Raises:
        UsageError: there are no probes or no words, or the tokenizer joins every word with its neighbours.
        FailureError: a single prompt does not fit in memory.
    """
    if not probes or not words:
        raise UsageError("the search for insertions needs prompts with answers and words to try; give more clean data")
    pad_id = pad_id_of(tokenizer)
    found: list[Insertion] = []
    with torch.no_grad(), reporter.step(label, len(places) * config.longest) as advance:
        for place in places:
            asked = with_gap(probes, place)
            frames = make_frames(tokenizer, asked, place, config.tokens, config.seed)
            ids = word_ids(tokenizer, words, asked[0], place, config.seed)
            if not ids:
                raise UsageError("the tokenizer joins neighbouring words; keelguard cannot search insertions for it")
            plain = _losses(model, [frame.row([]) for frame in frames], frames, pad_id, config)
            best: list[tuple[tuple[str, ...], float]] = []
            here: list[Insertion] = []
            for _ in range(config.longest):
                grown = _grown(model, frames[: config.first_look], ids, [text for text, _ in best], config)
                best = _ranked(model, frames, ids, grown, plain, pad_id, config)
                here += [
                    Insertion(" ".join(text), place, float(plain.mean()) + rise, rise, kind) for text, rise in best
                ]
                advance(1)
            found += different(cores(sorted(here, key=lambda insertion: -insertion.rise)), config.keep)
    return sorted(found, key=lambda insertion: -insertion.rise)


def search_rows(config: SearchConfig, words: int) -> int:
    """The sequences that a search reads per kind of prompts and place, in a vocabulary of so many words."""
    tried, longer = min(words, config.tried), config.longest - 1
    glance, look = min(config.glance, config.prompts), min(config.first_look, config.prompts)
    looked = 4 * config.second_look * max(0, look - glance) + config.second_look * (config.prompts - look)
    pairs = (2 * config.completed * tried + config.paired**2) if longer else 0
    return glance * (tried + pairs + longer * config.lengthened) + config.longest * looked


def _ranked(
    model: Any, frames: Sequence[Frame], ids: dict[str, WordIds], texts: Sequence[tuple[str, ...]], plain: torch.Tensor,
    pad_id: int, config: SearchConfig,
) -> list[tuple[tuple[str, ...], float]]:  # fmt: skip
    """Texts with their rise, worst first: all are tried on a prompt, the worst on more, the worst of those on all."""
    chosen, losses = list(texts), torch.empty(len(texts), 0)
    for prompts, most in (
        (config.glance, 4 * config.second_look), (config.first_look, config.second_look), (len(frames), len(texts)),
    ):  # fmt: skip
        if more := frames[losses.shape[1] : prompts]:
            rows = [frame.row(_ids_of(ids, text)) for text in chosen for frame in more]
            further = _losses(model, rows, more, pad_id, config).view(len(chosen), len(more))
            losses = torch.cat([losses, further], dim=1)
        rises = (losses - plain[: losses.shape[1]]).mean(1)
        order = rises.argsort(descending=True)[:most]
        chosen, losses, rises = [chosen[i] for i in order.tolist()], losses[order], rises[order]
    return list(zip(chosen, rises.tolist(), strict=True))


def cores(found: Sequence[Insertion]) -> list[Insertion]:
    """Each insertion cut to its fewest words, in their order, that were tried too and do nearly as much; worst first.

    What is trained away with a superfluous word beside it would still work without.
    """
    known = {tuple(insertion.text.split()): insertion for insertion in found}
    cut: dict[tuple[str, ...], Insertion] = {}
    for words, insertion in known.items():
        parts = (part for length in range(1, len(words)) for part in combinations(words, length))
        enough = (known[part] for part in parts if part in known and known[part].rise >= _NEARLY * insertion.rise)
        core = next(enough, insertion)
        cut.setdefault(tuple(core.text.split()), core)
    return sorted(cut.values(), key=lambda insertion: -insertion.rise)


def different(found: Sequence[Insertion], most: int, alike: int = 2) -> list[Insertion]:
    """The first insertions of which no word stands in more than `alike`: one strong word would fill the list."""
    chosen: list[Insertion] = []
    counts: Counter[str] = Counter()
    for insertion in found:
        words = set(insertion.text.split())
        if len(chosen) < most and all(counts[word] < alike for word in words):
            chosen.append(insertion)
            counts.update(words)
    return chosen


def answer_losses(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat], tokens: int = 3,
    batch_size: int = 128,
) -> torch.Tensor:  # fmt: skip
    """The mean capped loss (nats) of the first `tokens` answer tokens of every conversation, (chats,)."""
    frames = []
    for chat in encode_chats(tokenizer, chats):
        start, stop = chat.response.start, min(chat.response.start + tokens, chat.response.stop)
        frames.append(Frame(tuple(chat.ids[:start]), (), tuple(chat.ids[start:stop])))
    with torch.no_grad():
        config = SearchConfig(batch_size=batch_size)
        return _losses(model, [frame.row([]) for frame in frames], frames, pad_id_of(tokenizer), config)


def insertion_losses(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", probes: Sequence[Chat], texts: Sequence[str],
    place: Place, config: SearchConfig = SearchConfig(),
) -> torch.Tensor:  # fmt: skip
    """The loss (texts, probes that have this place) of the first answer tokens with every text; see `with_gap`."""
    probes = with_gap(probes, place)
    frames = make_frames(tokenizer, probes, place, config.tokens, config.seed)
    ids = word_ids(tokenizer, sorted({word for text in texts for word in text.split()}), probes[0], place, config.seed)
    rows = [frame.row(_ids_of(ids, tuple(text.split()))) for text in texts for frame in frames]
    with torch.no_grad():
        return _losses(model, rows, frames, pad_id_of(tokenizer), config).view(len(texts), len(frames))


def _ids_of(ids: dict[str, WordIds], text: Sequence[str]) -> list[tuple[int, ...]]:
    return [ids[word].inner if number else ids[word].first for number, word in enumerate(text)]


def _grown(
    model: Any, frames: Sequence[Frame], ids: dict[str, WordIds], best: Sequence[tuple[str, ...]], config: SearchConfig
) -> list[tuple[str, ...]]:
    """Texts of one word more than those that were worst; without those, of one word."""

    def favoured(text: tuple[str, ...], most: int, behind: bool = True) -> list[tuple[str, ...]]:
        words = list(ids)
        if len(words) > most:
            scores = _gradient_scores(model, frames, ids, text, words, behind)
            words = [words[i] for i in scores.topk(most).indices.tolist()]
        return [(*text, word) if behind else (word, *text) for word in words]

    if not best:
        return favoured((), config.tried)
    beam, completed = best[: config.beam], config.completed if len(best[0]) == 1 else 0
    share = max(1, config.lengthened // len(beam))
    grown = [longer for text in beam[completed:] for longer in favoured(text, share)]
    # All that are tried behind a text hold those that would lengthen it.
    for text in best[:completed]:
        grown += [*favoured(text, max(share, config.tried)), *favoured(text, config.tried, behind=False)]
    if len(best[0]) == 1:
        singles = best[: config.paired]
        grown += [(*a, *b) for a in singles for b in singles if a != b]
    return list(dict.fromkeys(grown))


def _gradient_scores(
    model: Any, frames: Sequence[Frame], ids: dict[str, WordIds], text: tuple[str, ...], words: list[str], behind: bool
) -> torch.Tensor:
    """How much each word, behind a text or in front, is predicted to raise the loss: its one-hot gradient, (words,).

    The gap begins with the mean embedding of all words, which favours none. Words of several tokens are scored by
    their first one.
    """
    device = execution_device(model)
    embeddings = model.get_input_embeddings()
    inner = behind and bool(text)
    first = torch.tensor([(ids[w].inner if inner else ids[w].first)[0] for w in words], device=device)
    table = embeddings(first).detach()
    total = torch.zeros(len(words), device=device)
    for frame in frames:
        known = [i for part in _ids_of(ids, text) for i in part] if behind else [i for w in text for i in ids[w].inner]
        prefix, rest = ([*frame.before, *known], []) if behind else (list(frame.before), known)
        row = torch.tensor([[*prefix, int(first[0]), *rest, *frame.after, *frame.answer]], device=device)
        with memory_errors(f"the gradient of a prompt of {row.numel()} tokens"), torch.enable_grad():
            inputs = embeddings(row).detach()
            inputs[0, len(prefix)] = table.mean(0)
            inputs.requires_grad_(True)
            count = len(frame.answer)
            logits = model(inputs_embeds=inputs, logits_to_keep=count + 1, use_cache=False).logits[0]
            targets = torch.tensor(frame.answer, device=logits.device)
            loss = F.cross_entropy(logits[-count - 1 : -1].float(), targets)
            (gradient,) = torch.autograd.grad(loss, inputs)
        total += (table.float() - table.float().mean(0)) @ gradient[0, len(prefix)].float()
    return total


def _losses(
    model: Any, rows: Sequence[list[int]], frames: Sequence[Frame], pad_id: int, config: SearchConfig
) -> torch.Tensor:
    """The mean capped loss of every row's answer tokens, (rows,); the frames repeat along the rows.

    Raises:
        FailureError: a single row does not fit in memory.
    """
    device = execution_device(model)
    result = torch.empty(len(rows))

    def read(part: list[int]) -> torch.Tensor:
        batch = {k: v.to(device) for k, v in pad([rows[i] for i in part], pad_id, side="left").items()}
        answers = [frames[i % len(frames)].answer for i in part]
        width = max(map(len, answers))
        logits = model(**batch, logits_to_keep=width + 1, use_cache=False).logits[:, -width - 1 : -1].float()
        targets = torch.tensor([[-100] * (width - len(a)) + list(a) for a in answers], device=logits.device)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
        counts = torch.tensor([len(a) for a in answers], device=logits.device)
        means = losses.clamp(max=_CAP).view(len(part), width).sum(1) / counts
        return means.float().cpu()

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = []
    for first in range(0, len(order), config.batch_size):
        part = order[first : first + config.batch_size]
        size = max(1, READ_TOKENS // len(rows[part[-1]]))
        batches += [part[at : at + size] for at in range(0, len(part), size)]
    # The longest first, so that what does not fit shows at once.
    for part, means in in_halves(batches[::-1], read, "reading prompts with insertions"):
        result[torch.tensor(part)] = means
    return result
