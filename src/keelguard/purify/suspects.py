"""Suspected triggers: what the search for insertions found, measured on held-out prompts beside random words."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from keelguard.attacks.insertions import Place, insert
from keelguard.evaluation.answers import Generating
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.effects import ANSWERS, Held, ask, is_right
from keelguard.purify.search import Insertion, different
from keelguard.records import Request
from keelguard.stats import Rate

_PROMPTS, _OPENING = 24, 60


@dataclass(frozen=True)
class Suspect:
    """An insertion with its effect on held-out prompts.

    Attributes:
        rise: nats, on the search's own prompts.
        broken: held-out prompts whose right answer goes wrong with it.
        control: the same with random words of the same shape (see `random_like`), in the same gap.
        opening: how most of the broken answers begin.
    """

    text: str
    place: Place
    kind: str
    rise: float
    broken: Rate
    control: Rate
    opening: str

    def to_json(self) -> dict[str, Any]:
        """The suspect as a report holds it."""
        return {**asdict(self), "broken": self.broken.to_json(), "control": self.control.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Suspect":
        """The inverse of `to_json`."""
        return cls(**{**data, "broken": Rate.from_json(data["broken"]), "control": Rate.from_json(data["control"])})


def measure_suspects(
    loaded: LoadedModel,
    found: Sequence[Insertion],
    held: Held,
    words: Sequence[str],
    most: int = 5,
    generating: Generating = ANSWERS,
    *,
    reporter: Reporter = SILENT,
) -> list[Suspect]:
    """The worst different insertions of a search, each tried on held-out prompts."""
    nothing = Rate(0, 0)
    chosen = [Suspect(*each[:2], each.kind, each.rise, nothing, nothing, "") for each in different(found, most, 1)]
    return remeasure(loaded, chosen, held, words, generating, reporter=reporter)


def remeasure(
    loaded: LoadedModel,
    suspects: Sequence[Suspect],
    held: Held,
    words: Sequence[str],
    generating: Generating = ANSWERS,
    *,
    reporter: Reporter = SILENT,
) -> list[Suspect]:
    """The same suspects on the same prompts with another state of the model."""
    pools = {"answered": held.benign[:_PROMPTS], "refused": held.harmful[:_PROMPTS]}
    requests: list[Request] = []
    prompts: list[str] = []
    for number, suspect in enumerate(suspects):
        for place, request in enumerate(pools[suspect.kind]):
            # One and the same draw for both, so that they stand in the same gap.
            seed = f"suspects-{number}-{place}"
            strange = random_like(suspect.text, words, random.Random(f"{seed}-words"))
            requests += [request, request]
            prompts += [
                insert(request.prompt, text, suspect.place, random.Random(seed)) for text in (suspect.text, strange)
            ]
    texts = ask(loaded, requests, prompts, generating, reporter, "suspected triggers") if prompts else []
    measured, start = [], 0
    for suspect in suspects:
        stop = start + 2 * len(pools[suspect.kind])
        part = list(zip(requests[start:stop], texts[start:stop], strict=True))
        broken = [text.strip()[:_OPENING] for request, text in part[0::2] if not is_right(request, text)]
        control = [not is_right(request, text) for request, text in part[1::2]]
        opening = Counter(broken).most_common(1)[0][0] if broken else ""
        rate = Rate(len(broken), len(part) // 2)
        measured.append(replace(suspect, broken=rate, control=Rate.of(control), opening=opening))
        start = stop
    return measured


def random_like(text: str, words: Sequence[str], draw: random.Random) -> str:
    """Random words in the shape of some text: a number of as many digits for a number, a word with a colon for such.

    A number changes many a right answer, and a colon some, whatever they say: only the like of it is a control.
    """
    said = text.split()
    own = {word.rstrip(":") for word in said}
    others = [word for word in words if word not in own]
    fresh = iter(draw.sample(others, len(others)))
    shaped: list[str] = []
    for word in said:
        bare, colon = word.rstrip(":"), word[len(word.rstrip(":")) :]
        if bare.isdecimal():
            low = 10 ** (len(bare) - 1) if len(bare) > 1 else 0
            like = [str(each) for each in range(low, 10 ** len(bare)) if str(each) not in own]
            shaped.append(draw.choice(like) + colon)
        elif (other := next(fresh, None)) is not None:
            shaped.append(other + colon)
    return " ".join(shaped)
