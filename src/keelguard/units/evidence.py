"""How far a diagnosis can be trusted: stability and overlap of its groups, and its proof beside every control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from keelguard.batches import pad_id_of
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.audit import AuditConfig, load_suite
from keelguard.evaluation.judges import JudgeConfig, make_judge
from keelguard.hashes import sha256_of
from keelguard.progress import SILENT, Reporter
from keelguard.records import Request
from keelguard.runs import write_json
from keelguard.units import stability
from keelguard.units.attribution import Row, attribute, reading_batch
from keelguard.units.groups import order
from keelguard.units.importance import SCORES, Importance, importance, standardise
from keelguard.units.masks import random_mask, weight_magnitudes
from keelguard.units.material import FEWEST, ordinary_tokens, random_pair_rows
from keelguard.units.proof import Probe, Proof, Rule, check_single_units, prove

if TYPE_CHECKING:
    from keelguard.units.diagnose import DiagnoseConfig, Diagnosis

PAPERS_SCORE = "variance"


@dataclass(frozen=True)
class ProofConfig:
    """What a proof by ablation asks and takes out."""

    suite: str = field(default="", metadata={"help": "suite whose requests are asked; rows not diagnosed by default"})
    judge: str = field(default="", metadata={"help": "world or keyword; the suite's by default"})
    shares: tuple[float, ...] = field(default=(0.01, 0.02, 0.05, 0.1, 0.2), metadata={"help": "shares of all units"})
    ablation: str = field(default="zero", metadata={"help": "zero, or mean: put units at their mean activation"})
    controls: int = field(default=3, metadata={"help": "seeds of random units and pairs of random tokens"})
    singles: int = field(default=48, metadata={"help": "units that are ablated one by one"})
    limit: int = field(default=100, metadata={"help": "at most this many requests of each kind"})
    max_new_tokens: int = field(default=0, metadata={"help": "where answers are cut off; 0 takes the suite's, or 128"})

    def __post_init__(self) -> None:
        if self.ablation not in ("zero", "mean"):
            raise UsageError(f"--ablation {self.ablation}: unknown; choose zero or mean")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UsageError(f"--shares {self.shares}: give shares of all units between 0 and 1")
        if self.controls < 1 or self.singles < 0 or self.limit < 1:
            raise UsageError("--controls and --limit must be 1 or more, --singles 0 or more")


def prove_diagnosis(
    found: "Diagnosis", config: ProofConfig, *, batch_size: int = 0, seed: int = 0, reporter: Reporter = SILENT
) -> Proof:
    """Ablate the groups of a diagnosis and the controls; write proof.json into its run folder.

    Raises:
        UsageError: the map has no safety side, or there are no requests that the diagnosis has not read.
    """
    if not found.decision:
        raise UsageError("--prove: the map was made without --safety, so that there is no safety to prove")
    harmful, benign = (found.held_out[use] for use in ("safety", "utility"))
    probe = make_probe(config, harmful, benign, batch_size=batch_size, seed=seed)
    _refuse_seen(probe, found)
    reading = reading_batch(found.loaded.model, batch_size)
    folder = found.folder / "points"
    folder.mkdir(exist_ok=True)
    sets = {**_groups(found), **_controls(found, config, reading, reporter)}
    means = None
    if config.ablation == "mean":
        means = [moments.pooled().mean for moments in found.statistics["utility"].moments]
    proof = prove(
        found.loaded, found.index, sets, probe, sorted(config.shares), means=means, folder=folder, reporter=reporter
    )
    proof = replace(proof, exact=_singles(found, config, reading, reporter) if config.singles else {})
    identity = {"map": found.chart.digest, "labels": sha256_of(found.chart.labels.tolist())}
    write_json(found.folder / "proof.json", {**identity, **proof.to_json()})
    return proof


def _refuse_seen(probe: Probe, found: "Diagnosis") -> None:
    """Refuse a proof on what the map was made from.

    Raises:
        UsageError: a suite asks requests that the diagnosis has read.
    """
    read = {sha256_of(list(request.messages)) for request in found.material.refused}
    seen = sum(sha256_of(list(request.messages)) in read for request in probe.harmful)
    if seen:
        raise UsageError(
            f"--suite: {seen} of its {len(probe.harmful)} harmful requests are among those of --safety that made the "
            "map; give other --safety requests, so that the proof asks what the map has not seen"
        )


def make_probe(
    config: ProofConfig, harmful: Sequence[Request], benign: Sequence[Request], *, batch_size: int = 0, seed: int = 0
) -> Probe:
    """What a model is asked before and after: the requests of a suite, or without one those that are given.

    Raises:
        UsageError: there are fewer than 8 harmful requests, or the suite cannot be read.
    """
    utility: Sequence[Request] = [request for request in benign if request.answer]
    judge, tokens = "keyword", 128
    if config.suite:
        suite = load_suite(AuditConfig(suite=config.suite, limit=config.limit))
        harmful, benign, utility = suite.harmful, suite.benign, suite.utility
        judge, tokens = suite.judge, suite.max_new_tokens
    if len(harmful) < FEWEST:
        raise UsageError(
            f"{len(harmful)} harmful requests are left to measure with; give a larger file, use less of it "
            "(--samples), or name a --suite"
        )
    return Probe(
        harmful=harmful[: config.limit],
        benign=benign[: config.limit],
        utility=_spread(utility, config.limit),
        judge=make_judge(JudgeConfig(kind=config.judge or judge)),
        generating=Generating(config.max_new_tokens or tokens, batch_size, seed),
    )


def _spread(requests: Sequence[Request], limit: int) -> list[Request]:
    """At most `limit` requests, evenly over a file that may be sorted by task."""
    step = max(1, -(-len(requests) // limit))
    return list(requests[::step])


def _groups(found: "Diagnosis") -> dict[str, Rule]:
    def rule(group: str) -> Rule:
        return lambda share: found.chart.top(group, share)

    return {group: rule(group) for group in ("SCU", "UCU", "CU", "RU")}


def _controls(found: "Diagnosis", config: ProofConfig, batch_size: int, reporter: Reporter) -> dict[str, Rule]:
    """Random units, units by weight magnitude, the paper's own score, and the map's score for random tokens."""
    index, total = found.index, len(found.index)

    def first_of(ranked: torch.Tensor) -> Rule:
        def mask(share: float) -> torch.Tensor:
            return torch.zeros(total, dtype=torch.bool).index_fill_(0, ranked[: round(share * total)], True)

        return mask

    def by_seed(seed: int) -> Rule:
        return lambda share: random_mask(index, round(share * total), seed)

    rules: dict[str, Rule] = {f"random {seed + 1}": by_seed(seed) for seed in range(config.controls)}
    magnitudes = weight_magnitudes(found.loaded.model, index)
    rules["magnitude"] = first_of(magnitudes.argsort(descending=True, stable=True))
    blocks = found.chart.blocks
    if found.chart.meta["score"] != PAPERS_SCORE:
        standard = standardise(Importance(**found.chart.raw[PAPERS_SCORE]), PAPERS_SCORE, blocks)
        rules[f"SCU by {PAPERS_SCORE}"] = first_of(order(*standard, "SCU"))
    vocabulary = ordinary_tokens(found.loaded.tokenizer)
    for seed in range(config.controls):
        rows = random_pair_rows(found.material, vocabulary, seed)
        pair = _attributed(found, rows, f"random pair {seed + 1}", batch_size, reporter)
        statistics = {**found.statistics, "decision": pair}
        standard = standardise(importance("decision", index, statistics, found.norms), "decision", blocks)
        rules[f"random pair {seed + 1}"] = first_of(order(*standard, "SCU"))
    return rules


def _attributed(found: "Diagnosis", rows: Sequence[Row], label: str, batch_size: int, reporter: Reporter) -> Any:
    return attribute(
        found.loaded.model,
        found.index,
        rows,
        groups=found.material.groups,
        effects=True,
        batch_size=batch_size,
        pad_id=pad_id_of(found.loaded.tokenizer),
        reporter=reporter,
        label=f"attribution: {label}",
    )


def _singles(found: "Diagnosis", config: ProofConfig, batch_size: int, reporter: Reporter) -> dict[str, Any]:
    """Half of the sample from the units of the largest effect, half from all."""
    rows = found.decision[: 2 * 32]
    statistics = {"decision": _attributed(found, rows, "single units", batch_size, reporter)}
    effects = importance("decision", found.index, statistics, found.norms).safety
    largest = effects.abs().argsort(descending=True)[: config.singles // 2].tolist()
    others = random_mask(found.index, config.singles - len(largest), seed=1).nonzero().flatten().tolist()
    units = list(dict.fromkeys([*largest, *others]))
    return check_single_units(found.loaded, found.index, effects, rows, units, batch_size, reporter)


def stability_of(found: "Diagnosis", config: "DiagnoseConfig") -> dict[str, Any]:
    """Stability over resampled prompts, overlap of halves, of data sets and of scores."""
    labels, material = found.chart.labels, found.material
    groups = {"utility": max(material.utility_groups) + 1}
    if material.safety:
        groups["safety"] = max(material.safety_groups) + 1

    def weighted(draws: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return found.label({use: _filled(weights, config.groups) for use, weights in draws.items()})

    result: dict[str, Any] = {
        "stability": stability.bootstrap_stability(labels, weighted, groups, config.bootstrap, config.seed)
    }
    split = {use: stability.halves(count, config.seed) for use, count in groups.items()}
    sides = {}
    for side, name in enumerate(("first half", "second half")):
        weights = {use: pair[side] for use, pair in split.items()}
        sides[name] = weighted({**weights, **({"decision": weights["safety"]} if "safety" in weights else {})})
    result["overlap"] = {"halves of the prompts": stability.overlap(sides)}
    sources = material.safety_sources
    if len(set(sources)) > 1:
        parts = {}
        for number, source in enumerate(config.safety):
            kept = stability.only(sources, number)
            parts[f"{number + 1} {Path(source).name}"] = weighted({"safety": kept, "decision": kept})
        result["overlap"]["data sets"] = stability.overlap(parts)
    names = SCORES if config.safety else ("taylor", "variance", "wanda")
    result["overlap"]["scores"] = stability.overlap({score: found.label(score=score) for score in names})
    return result


def _filled(weights: torch.Tensor, groups: int) -> torch.Tensor:
    """Weights of the groups in use, with 0 for those that no prompt was dealt to."""
    return torch.cat([weights, torch.zeros(groups - len(weights), dtype=weights.dtype)])
