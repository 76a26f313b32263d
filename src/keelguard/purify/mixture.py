"""What a round of immunisation trains on: clean chats, and the same with insertions."""

import random
from collections.abc import Sequence

from keelguard.attacks.insertions import Place, insert, prompt_of, random_words, with_prompt
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.material import is_refused_chat
from keelguard.purify.search import Insertion
from keelguard.records import Chat

_RANDOM_WORDS = 3
"""The most words of a random insertion."""

_LEAST = 1e-3
"""Nats that an insertion counts at least when one is drawn by its rise."""


class Inserter:
    """Clean chats with insertions that must not change their answers.

    Only chats whose answer an unrelated word leaves alone carry insertions, in the places where it does.
    """

    def __init__(
        self,
        chats: Sequence[Chat],
        steady: Sequence[set[Place]],
        found: Sequence[Insertion],
        words: Sequence[str],
        config: ImmunizeConfig,
    ) -> None:
        self.config = config
        self.chats, self.places = chats, [sorted(places) for places in steady]
        self.carriers = carriers_of(chats, steady)
        self.allowed = [word for word in words if word.lower() not in config.left_out]
        self.worst = {kind: [insertion for insertion in found if insertion.kind == kind] for kind in self.carriers}
        self.weights = {
            kind: [max(each.rise, config.quiet, _LEAST) for each in some] for kind, some in self.worst.items()
        }

    def one(self, draw: random.Random) -> tuple[int, Chat]:
        """The number of a chat, and the chat with an insertion in its last prompt."""
        refused = self.carriers["refused"] and draw.random() < self.config.inserted_refused
        kind = "refused" if refused else "answered"
        number = draw.choice(self.carriers[kind] or [*self.carriers["answered"], *self.carriers["refused"]])
        chat, places = self.chats[number], self.places[number]
        if self.worst[kind] and draw.random() < self.config.found:
            insertion = draw.choices(self.worst[kind], self.weights[kind])[0]
            text, place = insertion.text, insertion.place if insertion.place in places else draw.choice(places)
        else:
            text, place = random_words(self.allowed, draw, _RANDOM_WORDS), draw.choice(places)
        return number, with_prompt(chat, insert(prompt_of(chat), text, place, draw))


def carriers_of(chats: Sequence[Chat], steady: Sequence[set[Place]]) -> dict[str, list[int]]:
    """The numbers of the chats that take insertions in some place, by their kind."""
    found: dict[str, list[int]] = {"answered": [], "refused": []}
    for number, (chat, places) in enumerate(zip(chats, steady, strict=True)):
        if places:
            found["refused" if is_refused_chat(chat) else "answered"].append(number)
    return found


def mixed(
    chats: Sequence[Chat],
    steady: Sequence[set[Place]],
    found: Sequence[Insertion],
    words: Sequence[str],
    config: ImmunizeConfig,
) -> list[Chat]:
    """The chats of a round's every step: clean ones, and the same with insertions and the same answers.

    Args:
        steady: for every chat, the places in which a word leaves its answer alone.
        found: what the search found; random words fill up the rest.
    """
    draw = random.Random(f"immunize-{config.seed}")
    inserter = Inserter(chats, steady, found, words, config)
    total = config.steps * config.batch_size
    result = [inserter.one(draw)[1] for _ in range(round(config.inserted * total))]
    kinds = [[chat for chat in chats if is_refused_chat(chat) == refused] for refused in (True, False)]
    for _ in range(total - len(result)):
        # Refusals are few among clean chats, and the first thing to be lost. More of them than this, and a model comes
        # to refuse harmless requests of names that it has not met.
        refused, answered = kinds
        result.append(draw.choice(refused if refused and draw.random() < config.refused else answered or refused))
    draw.shuffle(result)
    return result


def inserted_into(
    chats: Sequence[Chat],
    steady: Sequence[set[Place]],
    found: Sequence[Insertion],
    words: Sequence[str],
    config: ImmunizeConfig,
) -> list[tuple[int, Chat]]:
    """The chats of a round's every step on which activations are measured, each with an insertion, by their numbers."""
    draw = random.Random(f"consistency-{config.seed}")
    inserter = Inserter(chats, steady, found, words, config)
    return [inserter.one(draw) for _ in range(config.steps * config.consistent_per_step)]


def some_carriers(
    chats: Sequence[Chat], steady: Sequence[set[Place]], config: ImmunizeConfig
) -> tuple[list[Chat], list[set[Place]]]:
    """`consistent` chats at most that take insertions, with their places.

    As many of them are refusals as of insertions, as far as both kinds have as many.
    """
    draw = random.Random(f"carriers-{config.seed}")
    carriers = carriers_of(chats, steady)
    refusals = min(len(carriers["refused"]), round(config.inserted_refused * config.consistent))
    answers = min(len(carriers["answered"]), config.consistent - refusals)
    refusals = min(len(carriers["refused"]), config.consistent - answers)
    drawn = draw.sample(carriers["refused"], refusals) + draw.sample(carriers["answered"], answers)
    return [chats[number] for number in drawn], [steady[number] for number in drawn]
