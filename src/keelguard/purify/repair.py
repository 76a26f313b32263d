"""Short clean fine-tunes behind a purification: to restore what was lost, and to see whether a backdoor comes back."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice

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


def needs_repair(before: Health, after: Health) -> bool:
    """Whether more than one harmful request in fifty is refused no longer, or one task in fifty solved no longer."""
    return fell(before.refused, after.refused) or fell(before.utility, after.utility)


def repair(
    subject: Subject,
    training: TrainConfig,
    reporter: Reporter = SILENT,
    *,
    original: LoadedModel | None = None,
    methods: Sequence[Method] = (),
) -> LoadedModel:
    """Train refusals and answers back, as many of these as of those; the model is changed in place.

    Args:
        original: hold the model to what this one says on the same chats, as to the input before a purification; not
            for an adapter that was thrown away.
        methods: what else takes part in the training, such as the freeze of what was neutralised.
    """
    chats, tokenizer = repair_chats(subject.material), subject.loaded.tokenizer
    keeping = [] if original is None else [KeepAnswers.of(original.model, tokenizer, subject.material.train)]
    result = train_on_chats(
        subject.loaded.model, tokenizer, chats, training, methods=[*methods, *keeping],
        adapter=subject.training, reporter=reporter, label="restoring what was lost",
    )  # fmt: skip
    return replace(subject.loaded, model=result.model)


def repair_chats(material: Material) -> list[Chat]:
    """What a repair trains on: every answer, and refusals in turn until there are as many."""
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
