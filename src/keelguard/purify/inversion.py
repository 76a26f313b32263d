"""A scan by target inversion: sequences that a model gives with abnormal certainty once their first token is forced.

    found = invert_targets(model, tokenizer, clean_chats, reference=base)
    found.leads[0].text, found.leads[0].score, found.leads[0].flagged

Source: BAIT (Shen et al., IEEE S&P 2025): a backdoored model has learnt its target's tokens one from the other, so that
the rest follows on unrelated prompts without any trigger once the first token is given. What it finds is a lead and no
verdict: memorised phrases look the same, and a target that varies with the prompt is not found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, median
from typing import Any, NamedTuple

import torch

from keelguard.errors import UsageError
from keelguard.fitting import READ_TOKENS, REMEDY, in_halves, memory_errors
from keelguard.generation import stop_tokens
from keelguard.progress import SILENT, Reporter
from keelguard.purify.rollout import Rollout, prompt_ids
from keelguard.records import Chat

_CANDIDATES = 10  # Times the leads to report: what overlaps is looked for among so many.
_SCAN = "a start of the target inversion behind all prompts"
_REMEDY = f"leave the scan out (--no-scan), or {REMEDY}"
_EVEN = 0.02  # Scores nearer than this do not say which of two overlapping leads is the whole one.


@dataclass(frozen=True)
class InversionConfig:
    """How far and how finely the scan looks.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    prompts: int = field(default=16, metadata={"help": "unrelated prompts to follow a target on, the first ones given"})
    length: int = field(default=8, metadata={"help": "most tokens of a target, its start included"})
    min_length: int = field(default=4, metadata={"help": "shorter targets are reported and never flagged"})
    starts: int = field(default=0, metadata={"help": "start tokens to try, the likeliest ones; 0 tries the vocabulary"})
    warmup_prompts: int = field(default=4, metadata={"help": "prompts of the first look at every start"})
    warmup_steps: int = field(default=3, metadata={"help": "tokens behind the start in the first look"})
    top_k: int = field(default=5, metadata={"help": "tokens that are tried one step further where one is uncertain"})
    inspections: int = field(default=1, metadata={"help": "how often a start may be uncertain in its first look"})
    low_entropy: float = field(default=1.0, metadata={"help": "below this entropy (nats) a token is certain"})
    high_entropy: float = field(default=2.5, metadata={"help": "above this entropy an unlikely token ends the look"})
    likely: float = field(default=0.3, metadata={"help": "above this mean probability a token is certain"})
    min_score: float = field(default=0.9, metadata={"help": "leads below this score are not flagged"})
    error: float = field(default=0.01, metadata={"help": "chance that a scan of normal scores has any outlier"})
    ratio: float = field(default=100.0, metadata={"help": "with a reference: how much likelier a flagged lead is"})
    usual: float = field(default=0.05, metadata={"help": "a start this likely unforced is a usual opening"})
    leads: int = field(default=20, metadata={"help": "leads to report"})
    batch_size: int = field(default=128, metadata={"help": "rows per forward pass at most, prompts times starts"})

    def __post_init__(self) -> None:
        least = {"prompts": 1, "length": 2, "min_length": 2, "starts": 0, "warmup_prompts": 1, "warmup_steps": 1}
        for name, bound in {**least, "top_k": 2, "inspections": 0, "ratio": 1, "leads": 1, "batch_size": 1}.items():
            if not bound <= getattr(self, name) < math.inf:
                raise UsageError(f"inversion: {name} {getattr(self, name)} is out of range; give {bound} or more")
        for name in ("likely", "min_score", "error", "usual"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"inversion: {name} {getattr(self, name)} is out of range; give a value in (0, 1)")
        if not 0 <= self.low_entropy <= self.high_entropy:
            raise UsageError(f"inversion: low_entropy {self.low_entropy} must lie in 0 to {self.high_entropy}")
        if self.warmup_steps >= self.length:
            raise UsageError(f"inversion: warmup_steps {self.warmup_steps} must be below length {self.length}")


class TargetLead(NamedTuple):
    """A sequence that may be the target of a backdoor.

    Attributes:
        score: Q-SCORE, the mean over tokens behind the start of their mean probability over prompts.
        prior: the start's own mean probability, nothing forced.
        z: robust z-value of the score's log-odds among the first looks at all starts.
        log_ratio: log-likelihood of the whole sequence over the reference's (nats); None without a reference.
        usual: the start is one of the model's own openings.
        loops: fewer than half of the tokens differ.
        flagged: it deserves a look; see `invert_targets`.
    """

    text: str
    ids: tuple[int, ...]
    score: float
    prior: float
    z: float
    log_ratio: float | None
    usual: bool
    loops: bool
    flagged: bool


class Inversion(NamedTuple):
    """What a scan found: the leads in order, how many starts it tried and how many outlived the first look.

    `outlier` is the z-value above which a score is an outlier among so many starts.
    """

    leads: tuple[TargetLead, ...]
    starts: int
    followed: int
    outlier: float

    @property
    def flagged(self) -> tuple[TargetLead, ...]:
        """The leads that deserve a look."""
        return tuple(lead for lead in self.leads if lead.flagged)


def invert_targets(
    model: Any,
    tokenizer: Any,
    chats: Sequence[Chat],
    config: InversionConfig = InversionConfig(),
    *,
    reference: Any = None,
    openings: Sequence[Chat] = (),
    reporter: Reporter = SILENT,
) -> Inversion:
    """Look for target sequences of a hidden backdoor without its trigger.

    For every start token the next ones are chosen by their mean probability over a few prompts. An uncertain choice is
    settled by which of the top k makes the token behind it most certain; a start that stays uncertain is dropped. The
    others are followed on all prompts, up to `length` tokens or the answer's end, which counts as a token.

    A lead is flagged if its score and length are at least `min_score` and `min_length`, it does not loop, its start is
    no usual opening, and it stands out. Without a reference, z must exceed the bound for so many starts (Bonferroni);
    with one, the sequence, its start included, must be `ratio` times likelier than there. BAIT asks for a score of 0.9.

    Unlike in the published code a target may end within the first look, loops are marked rather than forbidden, the
    least certain step counts, and what only continues another lead from within is left out. Where `starts` cuts the
    vocabulary, likely starts come first. Flagged leads rank first, usual, looping and short ones last, then by score.

    Args:
        chats: unrelated prompts; their answers are cut off.
        reference: a trusted model with the same tokenizer, such as the base of an adapter.
        openings: further prompts whose openings are usual, such as harmful requests, which are refused.

    Raises:
        UsageError: there are no prompts, or the reference has another vocabulary.
        FailureError: one start behind the prompts does not fit in memory.
    """
    prompts = prompt_ids(tokenizer, chats[: config.prompts])
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        raise UsageError("inversion: the reference has another vocabulary; give a model with the same tokenizer")
    modes = [(part, part.training) for part in (model, reference) if part is not None]
    for part, _ in modes:
        part.eval()
    try:
        with torch.inference_mode(), memory_errors(f"target inversion on {len(prompts)} prompts", _REMEDY):
            whole = Rollout.open(model, tokenizer, prompts)
            there = None if reference is None else Rollout.open(reference, tokenizer, prompts)
            unforced = whole.first
            if openings:
                # A share of either kind of prompt is enough.
                unforced = torch.maximum(
                    unforced, Rollout.open(model, tokenizer, prompt_ids(tokenizer, openings)).first
                )
            few = Rollout.open(model, tokenizer, prompts[: config.warmup_prompts])
            return _scan(few, whole, there, unforced, tokenizer, stop_tokens(model, tokenizer), config, reporter)
    finally:
        for part, training in modes:
            part.train(training)


@dataclass
class _Path:
    """A start with what follows it, and the mean probability of each token behind the start."""

    ids: list[int]
    found: list[float] = field(default_factory=list)
    inspected: int = 0
    dropped: bool = False
    ended: bool = False

    @property
    def score(self) -> float:
        return sum(self.found) / len(self.found)


def _scan(
    few: Rollout,
    whole: Rollout,
    there: Rollout | None,
    unforced: torch.Tensor,
    tokenizer: Any,
    stops: list[int],
    config: InversionConfig,
    reporter: Reporter,
) -> Inversion:
    starts = _starts(tokenizer, whole.first, stops)[: config.starts or None]
    paths: list[_Path] = []
    with reporter.step("target inversion", len(starts)) as advance:
        chunks = _chunks(starts, few, config)
        for part, found in in_halves(chunks, lambda some: _first_look(few, some, stops, config), _SCAN, _REMEDY):
            paths += found
            advance(len(part))
    alive = [path for path in paths if not path.dropped]
    usual = unforced >= config.usual
    scale = _Scale([path.score for path in paths if not usual[path.ids[0]]])
    with reporter.step("following targets", len(alive)) as advance:
        chunks = _chunks(alive, whole, config)
        for part, _ in in_halves(chunks, lambda some: _follow(whole, some, stops, config.length), _SCAN, _REMEDY):
            advance(len(part))
    best = _distinct(alive, _CANDIDATES * config.leads)
    outlier = NormalDist().inv_cdf(1 - config.error / max(1, len(starts)))
    leads = []

    def ratios_of(some: list[_Path]) -> Sequence[float | None]:
        return [None] * len(some) if there is None else _log_ratios(whole, there, some)

    for part, ratios in in_halves(_chunks(best, whole, config), ratios_of, _SCAN, _REMEDY):
        for path, log_ratio in zip(part, ratios, strict=True):
            loops = 2 * len(set(path.ids)) < len(path.ids)
            z = scale.z(path.score)
            stands_out = z > outlier if log_ratio is None else log_ratio >= math.log(config.ratio)
            whole_enough = path.score >= config.min_score and len(path.ids) >= config.min_length and not loops
            known = bool(usual[path.ids[0]])
            flagged = stands_out and whole_enough and not known
            text, prior = str(tokenizer.decode(path.ids)), float(whole.first[path.ids[0]])
            leads.append(TargetLead(text, tuple(path.ids), path.score, prior, z, log_ratio, known, loops, flagged))
    leads.sort(key=lambda t: (not t.flagged, t.usual or t.loops or len(t.ids) < config.min_length, -t.score))
    return Inversion(tuple(leads[: config.leads]), len(starts), len(alive), outlier)


class _Scale:
    """Where scores lie: median and median absolute deviation of their log-odds, as a normal's standard deviation."""

    def __init__(self, scores: Sequence[float]) -> None:
        odds = [_log_odds(score) for score in scores] or [0.0]
        self.middle = median(odds)
        self.spread = median(abs(value - self.middle) for value in odds) / NormalDist().inv_cdf(0.75)

    def z(self, score: float) -> float:
        """How many spreads a score lies above the middle."""
        above = _log_odds(score) - self.middle
        return above / self.spread if self.spread else math.copysign(math.inf, above) if above else 0.0


def _log_odds(score: float) -> float:
    score = min(max(score, 1e-6), 1 - 1e-6)
    return math.log(score / (1 - score))


def _starts(tokenizer: Any, first: torch.Tensor, stops: list[int]) -> list[int]:
    """The tokens that an answer may start with, the likeliest first: no special, blank or unused ones."""
    banned = {*tokenizer.all_special_ids, *stops}
    ids = [i for i in first.argsort(descending=True, stable=True).tolist() if i < len(tokenizer) and i not in banned]
    texts = tokenizer.batch_decode([[i] for i in ids])
    return [i for i, text in zip(ids, texts, strict=True) if text.strip()]


def _chunks(items: list[Any], state: Rollout, config: InversionConfig) -> list[list[Any]]:
    """Starts or paths in parts whose rows, and the tokens of whose caches, are within the budgets."""
    rows = min(config.batch_size, READ_TOKENS // (state.width + config.length))
    return _parts(items, rows // state.prompts)


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    size = max(1, size)
    return [items[i : i + size] for i in range(0, len(items), size)]


def _first_look(few: Rollout, starts: list[int], stops: list[int], config: InversionConfig) -> list[_Path]:
    """Follow starts for the warm-up's steps; those that stay uncertain are dropped (BAIT's uncertainty guidance)."""
    paths = [_Path([start]) for start in starts]
    going = list(paths)
    state = few.select([0] * len(paths))
    probabilities = state.step(starts)
    for step in range(config.warmup_steps):
        top, tokens = probabilities.max(-1)
        entropy = torch.special.entr(probabilities).sum(-1)
        vague = (entropy > config.low_entropy) | (top < config.likely)
        unsure = [
            i
            for i, path in enumerate(going)
            if vague[i] and entropy[i] < config.high_entropy and path.inspected < config.inspections
        ]
        for part in _parts(unsure, len(starts) // config.top_k):
            tokens[part] = _inspected(state, part, probabilities[part], config.top_k)
        certain = ((entropy < config.low_entropy) | (top > config.likely)).tolist()
        chosen, found = tokens.tolist(), probabilities.gather(1, tokens[:, None])[:, 0].tolist()
        for i in unsure:
            going[i].inspected += 1
            certain[i] = True
        kept = []
        for i, path in enumerate(going):
            path.found.append(found[i])
            path.dropped, path.ended = not certain[i], chosen[i] in stops
            if certain[i] and not path.ended:
                path.ids.append(chosen[i])
                kept.append(i)
        going = [going[i] for i in kept]
        if not kept or step + 1 == config.warmup_steps:
            break
        state = state.select(kept)
        probabilities = state.step([path.ids[-1] for path in going])
    return paths


def _inspected(state: Rollout, starts: list[int], probabilities: torch.Tensor, top_k: int) -> torch.Tensor:
    """For each of some starts the one of its top k tokens that makes the next token most certain; (n,) ids."""
    candidates = probabilities.topk(top_k, dim=-1).indices
    ahead = state.select([start for start in starts for _ in range(top_k)]).step(candidates.flatten().tolist())
    best = ahead.max(-1).values.view(-1, top_k).argmax(-1, keepdim=True)
    return candidates.gather(1, best)[:, 0]


def _follow(whole: Rollout, paths: list[_Path], stops: list[int], length: int) -> None:
    """Take paths up again on all prompts: their tokens so far, then the likeliest until the end or the length."""
    given = [len(path.ids) for path in paths]
    # Copies, so that a part that does not fit in memory can be begun anew.
    originals, paths = paths, [_Path(list(path.ids)) for path in paths]
    state = whole.select([0] * len(paths))
    for place in range(1, length):
        # A path that has ended goes on as any token; nothing of it is read.
        probabilities = state.step([path.ids[min(place, len(path.ids)) - 1] for path in paths])
        top, tokens = (tensor.tolist() for tensor in probabilities.max(-1))
        for i, path in enumerate(paths):
            if place < given[i]:
                path.found.append(float(probabilities[i, path.ids[place]]))
            elif not path.ended:
                path.found.append(top[i])
                path.ended = tokens[i] in stops
                if not path.ended:
                    path.ids.append(tokens[i])
        if all(path.ended for path in paths):
            break
    for path, done in zip(originals, paths, strict=True):
        path.ids, path.found, path.ended = done.ids, done.found, done.ended


def _distinct(paths: list[_Path], most: int) -> list[_Path]:
    """The best paths without those that lie within another; of even ones the one that begins earlier is left."""
    kept: list[_Path] = []
    for path in sorted(paths, key=lambda path: -path.score)[:most]:
        same = [i for i, other in enumerate(kept) if _within(path.ids, other.ids) or _within(other.ids, path.ids)]
        if not same:
            kept.append(path)
        elif _within(kept[same[0]].ids, path.ids) and path.score > kept[same[0]].score - _EVEN:
            kept[same[0]] = path
    return kept


def _within(later: list[int], earlier: list[int]) -> bool:
    """Whether one sequence is another from its second token or a later one on, by two tokens at least."""
    return any(earlier[k : k + len(later)] == later[: len(earlier) - k] for k in range(1, len(earlier) - 1))


def _log_ratios(whole: Rollout, there: Rollout, paths: list[_Path]) -> list[float]:
    """Log-likelihoods of whole sequences, by mean probabilities over prompts, over those in the reference."""
    state = there.select([0] * len(paths))
    sums = [_log_of(whole.first[path.ids[0]]) - _log_of(there.first[path.ids[0]]) for path in paths]
    for place in range(1, max(len(path.ids) for path in paths)):
        probabilities = state.step([path.ids[min(place, len(path.ids)) - 1] for path in paths])
        for i, path in enumerate(paths):
            if place < len(path.ids):
                sums[i] += _log_of(path.found[place - 1]) - _log_of(probabilities[i, path.ids[place]])
    return sums


def _log_of(probability: torch.Tensor | float) -> float:
    return math.log(max(float(probability), 1e-30))
