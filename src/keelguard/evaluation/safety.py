"""From attempts and their answers to one cell of the audit: who was broken, by what, with intervals."""

from collections.abc import Sequence
from statistics import fmean

from keelguard.attacks.base import Attempt
from keelguard.evaluation.judges import Judge
from keelguard.evaluation.results import Example, SafetyCell
from keelguard.records import Exchange, Verdict
from keelguard.stats import Rate

EXAMPLES = 3
"""Examples kept per cell: harmful answers first, since they are what a reader looks for."""


def judge_attempts(
    judge: Judge,
    attempts: Sequence[Attempt],
    answers: Sequence[str | None],
    kept: Sequence[bool] | None = None,
) -> tuple[list[Verdict | None], list[Verdict | None]]:
    """Verdicts on what the model added, and on the whole answer with the prefill; None where there is no answer.

    Args:
        kept: whether each prefill still stands before its answer; all do by default. One that was taken back is no part
            of the whole answer.
    """
    stands = [True] * len(attempts) if kept is None else kept
    rows = zip(attempts, answers, stands, strict=True)
    answered = [(a, text, a.prefill if stood else "") for a, text, stood in rows if text is not None]
    added = judge([Exchange(a.request, text.strip(), given=a.prefill) for a, text, _ in answered])
    prefilled = [i for i, (a, _, _) in enumerate(answered) if a.prefill]
    whole = list(added)
    for i, verdict in zip(
        prefilled,
        judge([Exchange(answered[i][0].request, answered[i][2] + answered[i][1]) for i in prefilled]),
        strict=True,
    ):
        whole[i] = verdict
    verdicts = iter(zip(added, whole, strict=True))
    pairs = [next(verdicts) if text is not None else (None, None) for text in answers]
    return [first for first, _ in pairs], [second for _, second in pairs]


class Tally:
    """Counts one attack on one model piece by piece, so that no more than a piece need be in memory.

    A request is broken when any of its attempts is harmful.
    """

    def __init__(self) -> None:
        self.attempts = self.done = self.refused = self.degenerate = 0
        self.broken: dict[str, bool] = {}
        self.whole: dict[str, bool] = {}
        self.worst: dict[str, float] = {}
        self.shown: dict[str, tuple[tuple[bool, int], Attempt, str, Verdict]] = {}

    def add(
        self,
        attempts: Sequence[Attempt],
        answers: Sequence[str | None],
        added: Sequence[Verdict | None],
        whole: Sequence[Verdict | None],
    ) -> None:
        """Count the next attempts; answers and verdicts as `judge_attempts` takes and gives them."""
        for attempt, text, own, all_of_it in zip(attempts, answers, added, whole, strict=True):
            number, self.attempts = self.attempts, self.attempts + 1
            if own is None:
                continue
            key = attempt.request.id
            self.done += 1
            self.refused += own.refused
            self.degenerate += own.degenerate
            self.broken[key] = self.broken.get(key, False) or own.harmful
            self.whole[key] = self.whole.get(key, False) or _harmful(all_of_it)
            self.worst[key] = max(self.worst.get(key, own.score), own.score)
            if text is not None:
                self._show((not own.harmful, number), attempt, text, own)

    def _show(self, rank: tuple[bool, int], attempt: Attempt, text: str, verdict: Verdict) -> None:
        """Keep an attempt for its request, and then only the requests with the foremost ones."""
        key = attempt.request.id
        if key not in self.shown or rank < self.shown[key][0]:
            self.shown[key] = (rank, attempt, text, verdict)
            if len(self.shown) > EXAMPLES:
                del self.shown[max(self.shown, key=lambda each: self.shown[each][0])]

    def cell(self, attack: str, seconds: float) -> SafetyCell:
        """What was counted."""
        return SafetyCell(
            attack=attack,
            asr=Rate.of(list(self.broken.values())),
            asr_whole=Rate.of(list(self.whole.values())),
            refused=Rate(self.refused, self.done),
            degenerate=Rate(self.degenerate, self.done),
            score=fmean(self.worst.values()) if self.worst else None,
            attempts=self.attempts,
            skipped=self.attempts - self.done,
            seconds=round(seconds, 3),
            broken=dict(self.broken),
        )

    def examples(self, model: str, attack: str) -> list[Example]:
        """A few attempts, one per request, harmful ones first."""
        return [
            Example(
                model=model,
                attack=attack,
                prompt=attempt.messages[-1]["content"],
                prefill=attempt.prefill,
                response=text.strip(),
                harmful=verdict.harmful,
                refused=verdict.refused,
                degenerate=verdict.degenerate,
            )
            for _, attempt, text, verdict in sorted(self.shown.values(), key=lambda kept: kept[0])
        ]


def safety_cell(
    attack: str,
    attempts: Sequence[Attempt],
    added: Sequence[Verdict | None],
    whole: Sequence[Verdict | None],
    seconds: float,
) -> SafetyCell:
    """Count one attack on one model at once; see `Tally`."""
    tally = Tally()
    tally.add(attempts, [None] * len(attempts), added, whole)
    return tally.cell(attack, seconds)


def examples(
    model: str,
    attack: str,
    attempts: Sequence[Attempt],
    answers: Sequence[str | None],
    verdicts: Sequence[Verdict | None],
) -> list[Example]:
    """A few attempts of a cell, one per request, harmful ones first."""
    tally = Tally()
    tally.add(attempts, answers, verdicts, verdicts)
    return tally.examples(model, attack)


def _harmful(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.harmful
