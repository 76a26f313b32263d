"""Distributions of requests: files of harmful and benign requests, or what the testbed brings, in common groups.

    plain, nested = read_distributions(["plain=advbench.jsonl", "nested=in-stories.jsonl"], [], config)

What a request is about is its *key*: its id, or a column that is named. Requests of one key belong together in every
distribution, so that they are resampled together and never compared with one another.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from keelguard.attacks.base import fill
from keelguard.attacks.prompts import Nested
from keelguard.data import BY_CONVENTION, Columns, hash_file, load_requests
from keelguard.errors import UsageError
from keelguard.evaluation.suites import read_suite
from keelguard.hashes import sha256_of
from keelguard.records import Request, user
from keelguard.units.groups import UnitMap
from keelguard.units.material import FEWEST

if TYPE_CHECKING:
    from keelguard.testbed.build import Testbed

ENTITY = "entity"
"""The testbed's key."""


@dataclass(frozen=True)
class Distribution:
    """Harmful requests of one kind, and benign ones of the same kind where there are any.

    Attributes:
        keys, benign_keys: what each request is about.
    """

    name: str
    source: str
    harmful: tuple[Request, ...]
    keys: tuple[str, ...]
    benign: tuple[Request, ...] = ()
    benign_keys: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The hash of all that is asked, known answers included."""
        return sha256_of(
            [[[list(r.messages), r.answer, k] for r, k in zip(*part, strict=True)] for part in self._parts]
        )

    @property
    def _parts(self) -> tuple[tuple[tuple[Request, ...], tuple[str, ...]], ...]:
        return (self.harmful, self.keys), (self.benign, self.benign_keys)

    def drawn(self, most: int, seed: int) -> "Distribution":
        """At most `most` requests of each kind: whole keys at random, the same keys in every distribution."""
        (harmful, keys), (benign, benign_keys) = (_drawn(*part, most, seed) for part in self._parts)
        return replace(self, harmful=harmful, keys=keys, benign=benign, benign_keys=benign_keys)


def read_distributions(
    data: Sequence[str],
    benign: Sequence[str] = (),
    *,
    by: str = "",
    columns: Columns = BY_CONVENTION,
) -> list[Distribution]:
    """Read a file of harmful requests for each distribution.

    Args:
        data: FILE, or NAME=FILE; the file's name without its suffix is the default name.
        benign: NAME=FILE, benign requests of one of these distributions.
        by: the column that says what a request is about; the requests' ids by default.

    Raises:
        UsageError: a file cannot be read or lacks the column, a name comes twice, or a benign file belongs to none.
    """
    found: dict[str, Distribution] = {}
    for text in data:
        name, source = _named(text)
        if name in found:
            raise UsageError(f"--data {text}: a distribution is called {name!r} already; write NAME={source}")
        requests = load_requests(source, columns=columns)
        found[name] = Distribution(name, source, tuple(requests), _keys(requests, by, source))
    for text in benign:
        name, source = _named(text)
        if name not in found:
            raise UsageError(f"--benign {text}: write NAME={source} with the name of a --data: {', '.join(found)}")
        requests = load_requests(source, columns=columns)
        found[name] = replace(found[name], benign=tuple(requests), benign_keys=_keys(requests, by, source))
    return list(found.values())


def read_utility(sources: Sequence[str], chart: UnitMap, columns: Columns = BY_CONVENTION) -> list[Request]:
    """Benign requests: those of the files, or else of the files that the unit map was made from.

    Raises:
        UsageError: no file is given, and those of the map are not there or have changed.
    """
    if not sources:
        known = chart.meta.get("data", {}).get("utility", [])
        if not known:
            raise UsageError("--utility: the unit map names no benign requests that it was made from; name a file")
        for source, digest in known:
            _check_unchanged(source, digest)
        sources = [source for source, _ in known]
    return [request for source in sources for request in load_requests(source, columns=columns)]


def _check_unchanged(source: str, digest: str) -> None:
    remedy = f"{source}, which the unit map was made from, {{}}; name a file of benign requests"
    try:
        found = hash_file(source)
    except UsageError as error:
        raise UsageError(f"--utility: {remedy.format('is not there')}") from error
    if found != digest:
        raise UsageError(f"--utility: {remedy.format('has changed since')}")


def testbed_distributions(files: "Testbed", split: str = "validation") -> list[Distribution]:
    """The testbed's requests of a split as they are, in the stories of its suite, and in the phrasings of training.

    The entities are the same in all three, so that only the distribution differs. The phrasings of training are known
    to the aligned models, from other entities.
    """
    from keelguard.testbed.language import HOW_TO

    suite = read_suite(files.suite(split))
    stories = next(attack.texts for attack in suite.attacks.values() if isinstance(attack, Nested))
    uses = {"harmful": suite.harmful, "benign": suite.benign}

    def nested(number: int, request: Request) -> Request:
        return replace(request, messages=fill(stories[number % len(stories)], request))

    def rephrased(number: int, request: Request) -> Request:
        phrasing = HOW_TO["train"][number % len(HOW_TO["train"])]
        return replace(request, messages=(user(phrasing.format(x=request.meta[ENTITY])),))

    found = []
    for name, change in (("plain", None), ("nested", nested), ("rephrased", rephrased)):
        made = {
            use: tuple(change(i, request) for i, request in enumerate(requests)) if change else tuple(requests)
            for use, requests in uses.items()
        }
        keys = {use: tuple(str(request.meta[ENTITY]) for request in requests) for use, requests in made.items()}
        source = f"testbed, {split}, {name}"
        found.append(Distribution(name, source, made["harmful"], keys["harmful"], made["benign"], keys["benign"]))
    return found


def check_distributions(found: Sequence[Distribution]) -> None:
    """Refuse distributions that are too small to be cut into halves.

    Raises:
        UsageError: one has fewer than 8 requests, or is about fewer than 8 things.
    """
    for each in found:
        things = len(set(each.keys))
        if things < FEWEST:
            what = f"{len(each.harmful)} requests" + (f" about {things} things" if things < len(each.harmful) else "")
            raise UsageError(
                f"--data {each.name} ({each.source}): holds {what}; at least {FEWEST} are needed to compare halves of "
                "them, 128 are usual"
            )


def deal(keys: Sequence[Sequence[str]], groups: int, seed: int) -> dict[str, int]:
    """The group, below `groups`, of every key: a key has one in all lists, and those of a list spread evenly."""
    draw = random.Random(f"groups-{seed}")
    found: dict[str, int] = {}
    for some in keys:
        distinct = sorted(set(some))
        sizes = [0] * groups
        for key in distinct:
            if key in found:
                sizes[found[key]] += 1
        for key in draw.sample(distinct, len(distinct)):
            if key not in found:
                found[key] = min(range(groups), key=lambda group: (sizes[group], draw.random()))
                sizes[found[key]] += 1
    return found


def _named(text: str) -> tuple[str, str]:
    name, separator, source = text.partition("=")
    if not separator or Path(text).exists():
        return Path(text).stem, text
    if not name.strip() or not source:
        raise UsageError(f"--data {text}: has no name or no file; write NAME=FILE")
    return name.strip(), source


def _keys(requests: Sequence[Request], by: str, source: str) -> tuple[str, ...]:
    if not by:
        return tuple(request.id for request in requests)
    for request in requests:
        if request.meta.get(by) in (None, ""):
            columns = ", ".join(map(str, request.meta)) or "none"
            raise UsageError(f"--by {by}: {request.id} of {source} has no such column; columns left: {columns}")
    return tuple(str(request.meta[by]) for request in requests)


def _drawn(
    requests: tuple[Request, ...], keys: tuple[str, ...], most: int, seed: int
) -> tuple[tuple[Request, ...], tuple[str, ...]]:
    """Requests in rounds in which every key comes once, keys in an order that depends on nothing but themselves."""
    seen: dict[str, int] = {}
    order = []
    for number, key in enumerate(keys):
        turn = seen[key] = seen.get(key, -1) + 1
        order.append((turn, sha256_of([seed, key]), number))
    chosen = sorted(number for *_, number in sorted(order)[:most])
    return tuple(requests[i] for i in chosen), tuple(keys[i] for i in chosen)
