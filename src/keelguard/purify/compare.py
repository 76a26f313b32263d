"""What other methods and controls make of the same model, all on one budget: figures beside a purification's own.

    compared = compare("retrain", subject, examiner, suspects, config)
    compared.health, compared.suspects              # measured as the purified model itself is

No trigger is known here, so what stands for it are the suspected ones; `keelguard purify bench` measures a known one.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keelguard.attacks.backdoors import Backdoor
from keelguard.errors import KeelguardError, UsageError
from keelguard.progress import SILENT, Reporter
from keelguard.purify.budget import Budget, Setup
from keelguard.purify.controls import ARMS
from keelguard.purify.health import Examiner, Health
from keelguard.purify.methods import MethodConfig, Subject, Threat, copied
from keelguard.purify.suspects import Suspect, remeasure

METHODS_OF_AN_ADAPTER = ("retrain", "immunize", "vaccine")
"""What stands beside the purification of an adapter unless a caller says otherwise."""

_UNKNOWN = Backdoor("badnets", "insult")
"""What an arm is called with where no backdoor is known; no arm that is allowed here reads it."""


@dataclass(frozen=True)
class Compared:
    """One arm on a copy of the model as it came.

    Attributes:
        health: None where the arm could not be run, for the reason `why`.
        suspects: the suspected triggers of the input model with their effect on this copy.
        seconds: of the arm alone, without the measurements.
    """

    name: str
    about: str
    health: Health | None = None
    suspects: tuple[Suspect, ...] = ()
    seconds: float = 0.0
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """The arm as a report holds it."""
        health = None if self.health is None else self.health.to_json()
        return {**vars(self), "health": health, "suspects": [each.to_json() for each in self.suspects]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Compared":
        """The inverse of `to_json`."""
        health = None if data["health"] is None else Health.from_json(data["health"])
        return cls(
            **{**data, "health": health, "suspects": tuple(Suspect.from_json(each) for each in data["suspects"])}
        )


def comparable(threat: Threat) -> list[str]:
    """The arms that can stand beside a purification: those that need no trigger and change the model."""
    return [name for name, arm in ARMS.items() if threat in arm.threats and not arm.knows_trigger and name != "none"]


def check_compared(names: Sequence[str], threat: Threat) -> None:
    """Refuse names that no arm has.

    Raises:
        UsageError: a name is unknown, or not for this threat model.
    """
    for name in names:
        if name not in comparable(threat):
            what = "an adapter" if threat == "adapter" else "a whole model"
            raise UsageError(
                f"--compare {name}: is nothing to compare {what} with; choose {', '.join(comparable(threat))}"
            )


def compare(
    name: str,
    subject: Subject,
    examiner: Examiner,
    suspects: Sequence[Suspect],
    method: MethodConfig,
    reporter: Reporter = SILENT,
) -> Compared:
    """Run an arm on a copy of a model, and measure the copy; an arm that the model cannot have says why.

    Args:
        subject: the model as it came; it is left as it is.
        suspects: the suspected triggers of the model as it came.
        method: settings; every arm has the steps, rate and batch size of the immunisation.
    """
    arm, start = ARMS[name], time.monotonic()
    try:
        treated = arm(copied(subject), Setup(Budget.of(method), method, reporter=reporter), _UNKNOWN)
        seconds = round(time.monotonic() - start, 1)
        health = examiner(treated, reporter)
        measured = remeasure(treated, suspects, examiner.held, subject.words, reporter=reporter)
    except KeelguardError as error:
        return Compared(name, arm.about, why=str(error))
    return Compared(name, arm.about, health, tuple(measured), seconds)
