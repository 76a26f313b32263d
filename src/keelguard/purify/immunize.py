"""Cut the association of triggers with behaviours without a signature: adversarial training on insertions.

    result = immunize(model, tokenizer, material, words, ImmunizeConfig())

Round by round: search the insertions that most disturb the model's own clean answers, then fine-tune on clean prompts,
half of them with such insertions, with the clean answers, while an insertion is to leave no trace in the activations
behind it. A trigger is such an insertion; so are other weaknesses. Counter-examples follow the trial of this project;
the search is adversarial training (Madry et al. 2018, arXiv 1706.06083) in the space of words.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file

from keelguard.errors import UsageError
from keelguard.progress import SILENT, Reporter
from keelguard.purify.consistency import ActivationConsistency, remember_activations
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.keep import KeepAnswers, KeepConfig
from keelguard.purify.material import Material
from keelguard.purify.mixture import inserted_into, mixed, some_carriers
from keelguard.purify.prober import Prober
from keelguard.purify.search import Insertion
from keelguard.runs import disk_errors, read_json, write_json
from keelguard.training import Method, TrainConfig, chat_loss, train_on_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROUNDS = "rounds.json"
_USUAL = ImmunizeConfig()


@dataclass(frozen=True)
class Round:
    """One round: what the search found before its training, and what the training did.

    `random_rise` is the largest rise of some random insertions, far fewer than the search tries.
    """

    found: tuple[Insertion, ...]
    random_rise: float
    losses: tuple[float, ...] = ()
    validation: float = 0.0


@dataclass(frozen=True)
class Immunized:
    """An immunised model with the course of its rounds.

    The last round of one that stopped since the search was `quiet` has no training, and that of one that stopped for
    `utility` was taken back.
    """

    model: Any
    rounds: tuple[Round, ...]
    validation_before: float
    stopped: Literal["quiet", "utility", "rounds"]


def immunize(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    material: Material,
    words: Sequence[str],
    config: ImmunizeConfig = _USUAL,
    *,
    adapter: Literal["merge", "train"] = "merge",
    methods: Sequence[Method] = (),
    state_folder: Path | None = None,
    reporter: Reporter = SILENT,
) -> Immunized:
    """Immunise a model in place.

    Args:
        words: the vocabulary of insertions (see `vocabulary_words`).
        adapter: "train" trains the adapter that the model brings, and nothing else.
        methods: what else takes part in the training.
        state_folder: where finished rounds are kept; a repeated call goes on behind the last.

    Returns:
        The model after the last round whose loss on clean validation chats was within the tolerance.

    Raises:
        UsageError: no prompt's answer withstands an unrelated word, so that there is nothing to search on, or a LoRA is
            asked for beside the adapter that is trained.
        FailureError: searching or training does not fit in memory, training diverges, or the disk is full.
    """
    if config.lora_rank and adapter == "train":
        raise UsageError(f"--lora-rank {config.lora_rank}: the adapter itself is trained; leave it out")
    prober = Prober(model, tokenizer, material, words, config.search, config.stable)
    if not prober.kinds:
        raise UsageError(
            "immunize: every answer changes with any unrelated word, so that triggers cannot be told from noise; give "
            "more clean data, or raise the setting `stable`"
        )
    steady = prober.stability(model, material.train)
    before = chat_loss(model, tokenizer, material.validation)
    holding = KeepConfig(weight=config.keep, chats=config.kept, per_step=config.kept_per_step)
    keeping = [KeepAnswers.of(model, tokenizer, material.train, holding)] if config.keep else []
    carriers, places = some_carriers(material.train, steady, config) if config.consistency else ([], [])
    # Of the model as it came, before an earlier run's rounds are taken up.
    activations = remember_activations(model, tokenizer, carriers)
    rounds = _resumed(model, state_folder, config, adapter)
    if rounds:
        reporter.note(f"immunising: {len(rounds)} of {config.rounds} rounds are kept from an earlier run")
    for number in range(len(rounds), config.rounds):
        found, strongest = [], 0.0
        if config.found:
            found, strongest = prober.search(model, reporter, f"search {number + 1}", number)
            if not found or found[0].rise <= config.quiet:
                return Immunized(model, (*rounds, Round(tuple(found), strongest)), before, "quiet")
        kept = trained_values(model, adapter)
        # What an earlier round found stays in: a trigger that is half unlearned would come back. One that is found
        # again counts again.
        earlier = [insertion for each in rounds for insertion in each.found]
        known = prober.remeasured(model, earlier, number) + found
        own = replace(config, seed=config.seed + number)
        chats = mixed(material.train, steady, known, words, own)
        agreeing: list[Method] = []
        if activations:
            inserted = inserted_into(carriers, places, known, words, own)
            agreeing = [ActivationConsistency(activations, inserted, config.consistency, config.consistent_per_step)]
        budget = TrainConfig(
            steps=config.steps,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            gradient_accumulation=config.gradient_accumulation,
            lora_rank=config.lora_rank,
            bf16=config.bf16,
            gradient_checkpointing=config.gradient_checkpointing,
            warmup=0.1,
            seed=config.seed + number,
        )
        result = train_on_chats(
            model, tokenizer, chats, budget, methods=[*keeping, *agreeing, *methods], adapter=adapter,
            reporter=reporter, label=f"immunising, round {number + 1}",
        )  # fmt: skip
        model = result.model
        after = chat_loss(model, tokenizer, material.validation)
        rounds.append(Round(tuple(found), strongest, tuple(result.losses), after))
        if after > before + config.tolerance:
            put_back(model, kept)
            return Immunized(model, tuple(rounds), before, "utility")
        _keep_round(model, state_folder, config, rounds, adapter)
    return Immunized(model, tuple(rounds), before, "rounds")


def _keep_round(model: Any, folder: Path | None, config: ImmunizeConfig, rounds: Sequence[Round], adapter: str) -> None:
    """Keep the weights behind a finished round, and then what tells of it."""
    if folder is None:
        return
    path = folder / f"round-{len(rounds)}.safetensors"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in trained_values(model, adapter).items()}, path)
    write_json(folder / _ROUNDS, {"config": _of_a_round(config), "rounds": [asdict(each) for each in rounds]})
    if len(rounds) > 1:
        (folder / f"round-{len(rounds) - 1}.safetensors").unlink(missing_ok=True)


def _resumed(model: Any, folder: Path | None, config: ImmunizeConfig, adapter: str) -> list[Round]:
    """The rounds of an earlier run of these settings; the model takes the weights behind the last.

    Raises:
        UsageError: the folder holds rounds of other settings.
    """
    if folder is None or not (folder / _ROUNDS).is_file():
        return []
    kept = read_json(folder / _ROUNDS)
    rounds = [round_from_json(each) for each in kept["rounds"]]
    if kept["config"] != _of_a_round(config) or len(rounds) > config.rounds:
        raise UsageError(f"{folder}: holds rounds of other settings; remove the folder, or choose another --out")
    values = load_file(folder / f"round-{len(rounds)}.safetensors")
    if adapter == "merge" and not config.lora_rank:
        model.float()
    for name, parameter in model.named_parameters():
        # As behind a round: what trains is float32; what is below an adapter, or took a LoRA in, stays as it is.
        if name in values and not config.lora_rank:
            parameter.data = parameter.data.float()
    put_back(model, values)
    return rounds


def _of_a_round(config: ImmunizeConfig) -> dict[str, Any]:
    """What a round depends on, as JSON gives it back: everything but how many there are."""
    settings = json.loads(json.dumps(asdict(config)))
    del settings["rounds"]
    return settings


def round_from_json(data: dict[str, Any]) -> Round:
    """A round as `asdict` and JSON have left it."""
    found = tuple(Insertion(**each) if isinstance(each, dict) else Insertion(*each) for each in data["found"])
    return Round(found, data["random_rise"], tuple(data["losses"]), data["validation"])


def trained_values(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """A copy of what a round can change."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if adapter == "merge" or "lora_" in name
    }


@torch.no_grad()
def put_back(model: Any, values: dict[str, torch.Tensor]) -> None:
    """Give a model the values of an earlier round."""
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])
