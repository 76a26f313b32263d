"""Short clean fine-tunes behind a purification: to restore what was lost, and to see whether a backdoor comes back."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Literal

from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.health import Health
from keelguard.purify.keep import KeepAnswers
from keelguard.purify.material import Material
from keelguard.purify.methods import Subject
from keelguard.records import Chat
from keelguard.stats import Rate
from keelguard.training import Method, TrainConfig, train_on_chats

FALL = 0.02
"""By how much the share of refusals, or of tasks solved, must fall before it is trained back."""
_ROUNDING = 1e-9


def fell(before: Rate, after: Rate) -> bool:
    """Whether a share is lower by more than 2 points; of what was not measured nothing is said."""
    return bool(before.total and after.total) and before.value - after.value > FALL + _ROUNDING


Lost = Literal["", "utility", "refusals"]
"""What a purification has cost by more than `FALL`; of both, refusals."""


def needs_repair(before: Health, after: Health) -> Lost:
    """Whether more than one harmful request in fifty is refused no longer, or one task in fifty solved no longer."""
    if fell(before.refused, after.refused):
        return "refusals"
    return "utility" if fell(before.utility, after.utility) else ""


def repair(
    subject: Subject,
    training: TrainConfig,
    reporter: Reporter = SILENT,
    *,
    lost: Lost = "refusals",
    original: LoadedModel | None = None,
    methods: Sequence[Method] = (),
) -> LoadedModel:
    """Train back what was lost; the model is changed in place.

    Args:
        lost: see `repair_chats`.
        original: hold the model to what this one says on the same chats, as to the input before a purification; not
            for an adapter that was thrown away.
        methods: what else takes part in the training, such as the freeze of what was neutralised.
    """
    chats, tokenizer = repair_chats(subject.material, lost), subject.loaded.tokenizer
    keeping = [] if original is None else [KeepAnswers.of(original.model, tokenizer, subject.material.train)]
    result = train_on_chats(
        subject.loaded.model, tokenizer, chats, training, methods=[*methods, *keeping],
        adapter=subject.training, reporter=reporter, label="restoring what was lost",
    )  # fmt: skip
    return replace(subject.loaded, model=result.model)


def repair_chats(material: Material, lost: Lost = "refusals") -> list[Chat]:
    """What a repair trains on: the clean chats, and where refusals were lost as many refusals as answers.

    So many teach a model to refuse harmless requests, too, so that they are kept for where they are needed.
    """
    if lost == "utility":
        return list(material.train)
    refused, answered = material.refused(), material.answered()
    # Few refusals come often, so that the answers beside them stay various.
    return [*answered, *islice(cycle(refused), len(answered))]


def settle(subject: Subject, training: TrainConfig, reporter: Reporter = SILENT) -> LoadedModel:
    """A copy of a model behind a clean fine-tune, as its user might do one."""
    chats = subject.material.train
    result = train_on_chats(
        copy.deepcopy(subject.loaded.model), subject.loaded.tokenizer, chats, training,
        adapter=subject.training, reporter=reporter, label="a further clean fine-tune",
    )  # fmt: skip
    return replace(subject.loaded, model=result.model)
