"""What a signal costs on harmless requests: verdicts per token, and wall time beside the plain model's."""

from collections.abc import Sequence
from dataclasses import replace

from keelguard.attacks.base import Attempt
from keelguard.evaluation.answers import Generating, answer_with_notes
from keelguard.guard.course import Recording, outputs_of, time_rounds
from keelguard.models import LoadedModel
from keelguard.pipeline.surfaces import CHECKS, TIME
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request

ASKED, TIMED, ROUNDS = 32, 8, 3


def guard_cost(
    plain: LoadedModel,
    guarded: LoadedModel,
    requests: Sequence[Request],
    generating: Generating,
    reporter: Reporter = SILENT,
) -> dict[str, float]:
    """Verdicts per generated token, and the median ratio of wall times over some rounds in which both take turns.

    Args:
        guarded: the same model with its decoder.
        requests: harmless ones. Those in which the signal intervenes are not timed: an answer cut short would flatter
            it.

    Returns:
        `surfaces.CHECKS` and `surfaces.TIME`; what could not be measured is missing.
    """
    assert guarded.decoder is not None
    attempts = [Attempt(request, request.messages) for request in requests[:ASKED]]
    recording = Recording(guarded.decoder)
    answers = answer_with_notes(
        plain.model, plain.tokenizer, attempts, generating, decoder=recording, reporter=reporter, label="verdicts"
    )
    found = [
        (attempt, each[0]) for attempt, each in zip(attempts, outputs_of(answers), strict=True) if each is not None
    ]
    tokens = sum(output.forwarded for _, output in found)
    costs = {CHECKS: sum(len(output.verdicts) for _, output in found) / tokens} if tokens else {}
    quiet = [attempt for attempt, output in found if not output.intervened][:TIMED]
    if quiet:
        settings = replace(generating, batch_size=len(quiet))
        costs[TIME] = time_rounds(plain, guarded, quiet, settings, ROUNDS, reporter).median
    return costs
