"""`keelguard finetune`: fine-tuning that keeps safety, by freezing units and by ways that cost the task nothing.

finetune("model", chats, FinetuneConfig(protect=("freeze", "anchor")), out="runs/ft", chart=chart, safety=requests)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from keelguard.attacks.base import Attempt
from keelguard.attacks.insertions import vocabulary_words
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating, answer
from keelguard.evaluation.judges import is_refusal
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model
from keelguard.progress import SILENT, Reporter
from keelguard.records import Chat, Request, assistant
from keelguard.training import Method, TrainConfig
from keelguard.units.baselines import Ema, EmaConfig, Lisa, LisaConfig, SafeLoraConfig, safe_lora
from keelguard.units.defences import Anchor, AnchorConfig, Freeze, Mix, MixConfig
from keelguard.units.diagnose import plain
from keelguard.units.groups import UnitMap
from keelguard.units.index import UnitIndex, build_index, parameters_by_name
from keelguard.units.masks import layer_mask, magnitude_mask, random_mask
from keelguard.units.material import FEWEST
from keelguard.units.projection import Project, ProjectConfig
from keelguard.units.proof import Probe
from keelguard.units.protect import Others
from keelguard.units.training import Arm, TrainingResult, run_training

PROTECTIONS = ("none", "freeze", "anchor", "project", "mix", "ema", "lisa", "safelora")
_WITH_REFUSALS = ("anchor", "project", "mix", "lisa")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model is fine-tuned, and what keeps it safe meanwhile."""

    train: TrainConfig = _option(TrainConfig(), "the optimiser's settings")
    protect: tuple[str, ...] = _option(("mix",), f"methods, used together: {', '.join(PROTECTIONS)}")
    freeze: str = _option("scu,cu:0.06", "what freeze freezes; see `chosen_units`")
    others: Others = _option("train", "embeddings, norms and head of a run that freezes: train or freeze")
    anchor: AnchorConfig = _option(AnchorConfig(), "the anchor's settings")
    project: ProjectConfig = _option(ProjectConfig(), "the projection's settings")
    mix: MixConfig = _option(MixConfig(), "the mixture's settings")
    ema: EmaConfig = _option(EmaConfig(), "the average's settings")
    lisa: LisaConfig = _option(LisaConfig(), "the alternation's settings")
    safelora: SafeLoraConfig = _option(SafeLoraConfig(), "SafeLoRA's settings")

    def __post_init__(self) -> None:
        shown = ",".join(self.protect)
        if not self.protect or set(self.protect) - set(PROTECTIONS):
            raise UsageError(f"--protect {shown}: choose from {', '.join(PROTECTIONS)}")
        if "none" in self.protect and len(self.protect) > 1:
            raise UsageError(f"--protect {shown}: none stands alone")
        if self.others not in ("train", "freeze"):
            raise UsageError(f"--others {self.others}: unknown; choose train or freeze")


def finetune(
    source: str,
    chats: Sequence[Chat],
    config: FinetuneConfig,
    *,
    out: str | Path,
    chart: UnitMap | None = None,
    safety: Sequence[Request] = (),
    held_out: Sequence[Chat] = (),
    probe: Probe | None = None,
    base: str | None = None,
    compare: bool = False,
    refusal_tokens: int = 64,
    bound: Mapping[str, Any] | None = None,
    load: Callable[..., LoadedModel] = load_model,
    reporter: Reporter = SILENT,
) -> TrainingResult:
    """Fine-tune a checkpoint on chats under some protection; the new checkpoint goes to OUT/model.

    Args:
        chart: the unit map of this very model, for `freeze`.
        safety: harmful requests; the model's own refusals of them are what anchor, project, mix and lisa hold on to.
        held_out: chats of the task that are not trained on.
        probe: what safety and utility are measured with, before and after.
        base: the model before its alignment, for `safelora`.
        compare: also train without protection, with the same settings, and list it beside.
        refusal_tokens: where the model's own refusals are cut off.
        bound: further settings that the run folder belongs to, for what the caller does behind the training.

    Raises:
        UsageError: the map is of other weights, or something that a method needs is missing.
        FailureError: training does not fit in memory, or the disk is full.
    """
    if "safelora" in config.protect and base is None:
        raise UsageError("--protect safelora: needs the model before its alignment; name it with --base")
    loaded = _plain_as_verified(load(source, training=True))
    index = build_index(loaded.model, chart.attention if chart else "head")  # pyright: ignore[reportArgumentType]
    if chart is not None:
        chart.place(index, loaded.weights_hash)
    needed = set(config.protect) & set(_WITH_REFUSALS)
    refusals = own_refusals(loaded, safety, refusal_tokens, reporter) if needed else []
    after = None
    if "safelora" in config.protect:
        unaligned = parameters_by_name(plain(load(base)).model)
        after = SafeLoraAfter(loaded.model, unaligned, config.safelora)
    frozen = chosen_units(config.freeze, loaded.model, index, chart) if "freeze" in config.protect else None
    bare = config.protect == ("none",)
    arms = {"unprotected": Arm()} if compare or bare else {}
    if not bare:
        words = vocabulary_words(loaded.tokenizer) if config.mix.inserted else ()
        arms["protected"] = Arm(protections(config, index, frozen, refusals, words), after)
    return run_training(
        "finetune",
        loaded,
        chats,
        config.train,
        arms,
        out=out,
        settings={
            **{name: value for name, value in asdict(config).items() if name != "train"},
            "units": sha256_of(frozen.nonzero().flatten().tolist()) if frozen is not None else None,
            # Not the refusals: generated anew on another device they may differ by rounding.
            "safety": sha256_of([list(request.messages) for request in safety]) if needed else None,
            "base": base,
            **(bound or {}),
        },
        held_out=held_out,
        probe=probe,
        reporter=reporter,
    )


def _plain_as_verified(loaded: LoadedModel) -> LoadedModel:
    """The model with its adapter merged on the CPU, as `verify` merges it: a GPU rounds the last bits otherwise, which
    would move units that are to be bit-equal. A model that is spread over devices is merged where it lies."""
    places = {parameter.device for parameter in loaded.model.parameters()}
    if len(places) > 1 or not hasattr(loaded.model, "peft_config"):
        return plain(loaded)
    merged = plain(replace(loaded, model=loaded.model.to("cpu")))  # pyright: ignore[reportArgumentType]
    merged.model.to(places.pop())  # pyright: ignore[reportArgumentType]
    return merged


def protections(
    config: FinetuneConfig,
    index: UnitIndex,
    frozen: torch.Tensor | None,
    refusals: Sequence[Chat],
    words: Sequence[str] = (),
) -> list[Method]:
    """The methods of a configuration; `safelora` acts behind the training and is none of them.

    Args:
        frozen: the units (units,) that `freeze` freezes.
        words: what `mix` inserts, where it does.

    Raises:
        UsageError: a method lacks the refusals that it needs.
    """
    for name in config.protect:
        if name in _WITH_REFUSALS and not refusals:
            raise UsageError(f"--protect {name}: needs harmful requests that the model refuses; name a --safety file")
    # Lisa numbers the chats that the others leave, and so comes last.
    makers: dict[str, Callable[[], Method]] = {
        "freeze": lambda: Freeze(index, frozen, config.others),  # pyright: ignore[reportArgumentType]
        "anchor": lambda: Anchor(refusals, config.anchor),
        "project": lambda: Project(refusals, config.project),
        "mix": lambda: Mix(refusals, config.mix, words),
        "ema": lambda: Ema(config.ema),
        "lisa": lambda: Lisa(refusals, config.lisa),
    }
    return [make() for name, make in makers.items() if name in config.protect]


def chosen_units(text: str, model: Any, index: UnitIndex, chart: UnitMap | None) -> torch.Tensor:
    """A mask (units,) from groups of a map, as in "scu,cu:0.06", or from controls that need none.

    "random:SHARE" or "random:SHARE:SEED", "magnitude:SHARE" (the largest weights), "layers:FIRST-LAST" (from 0).

    Raises:
        UsageError: the text is of no such form, or names groups and there is no map.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "random":
            share, _, seed = rest.partition(":")
            return random_mask(index, _count(share, index), int(seed or 0))
        if kind == "magnitude":
            return magnitude_mask(model, index, _count(rest, index))
        if kind == "layers":
            first, _, last = rest.partition("-")
            return layer_mask(index, int(first), int(last or first))
    except ValueError as error:
        raise UsageError(
            f"{text!r}: is not of the form random:0.11, magnitude:0.11 (a share of all units) or layers:1-2"
        ) from error
    if chart is None:
        raise UsageError(f"{text!r}: names groups of units; give the unit map that holds them with --units")
    return chart.select(text)


def _count(share: str, index: UnitIndex) -> int:
    """So many units; a ValueError where there is no such share of them."""
    count = round(float(share) * len(index))
    if not 0 < count <= len(index):
        raise ValueError
    return count


def own_refusals(
    loaded: LoadedModel, requests: Sequence[Request], max_new_tokens: int, reporter: Reporter = SILENT
) -> list[Chat]:
    """Harmful requests with the model's own refusals; those that it answers are left out.

    Raises:
        UsageError: it refuses fewer than `FEWEST`.
    """
    training = loaded.model.training
    loaded.model.eval()
    attempts = [Attempt(request, request.messages) for request in requests]
    texts = answer(
        loaded.model, loaded.tokenizer, attempts, Generating(max_new_tokens), reporter=reporter, label="own refusals"
    )
    loaded.model.train(training)
    chats: list[Chat] = [
        (*request.messages, assistant(text.strip()))
        for request, text in zip(requests, texts, strict=True)
        if text and is_refusal(text)
    ]
    if requests and len(chats) < FEWEST:
        raise UsageError(
            f"--safety: {loaded.source} refuses {len(chats)} of {len(requests)} requests; at least {FEWEST} refusals "
            "are needed to hold on to. Give requests that it refuses"
        )
    return chats


class SafeLoraAfter:
    """SafeLoRA behind the training: remembers the weights before it."""

    def __init__(self, model: Any, unaligned: Mapping[str, torch.Tensor], config: SafeLoraConfig) -> None:
        self.aligned = {name: p.detach().clone() for name, p in parameters_by_name(model).items()}
        self.unaligned, self.config = unaligned, config

    def __call__(self, model: Any) -> None:
        safe_lora(model, self.aligned, self.unaligned, self.config)
