"""The ways to purify a model: the published vaccine, immunisation, both, or retraining an adapter.

    purified = apply_method(subject, config)        # subject.loaded is changed; give a copy

The vaccine is BD-VAX (arXiv 2603.13461): variants, signature, neutralisation, restoration. Immunisation is ours.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from keelguard.errors import UsageError
from keelguard.models import LoadedModel
from keelguard.progress import SILENT, Reporter
from keelguard.purify.grouped import train_variants
from keelguard.purify.immunize import Round, immunize
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.material import Material
from keelguard.purify.mixture import mixed
from keelguard.purify.neutralize import Neutralized, mean_activations, neutralize, neutralize_adapter
from keelguard.purify.prober import Prober
from keelguard.purify.restore import FreezeWritten, RestoreConfig, Restored, restore, split_chats
from keelguard.purify.signature import Signature, SignatureConfig, measure_signature
from keelguard.purify.variants import (
    DEFAULT_VARIANTS,
    Variant,
    VariantConfig,
    read_variants,
    variant_data,
    variants_in_vocabulary,
)
from keelguard.training import Method, TrainConfig, chat_loss, train_on_chats
from keelguard.units.index import UnitIndex, build_index

Threat = Literal["full", "adapter"]
MethodName = Literal["vaccine", "immunize", "both", "retrain"]
METHODS: tuple[MethodName, ...] = ("vaccine", "immunize", "both", "retrain")
_TOKENS_PER_WORD = 4.0
"""Above this many tokens per word a tokenizer does not know the default variants' language."""


@dataclass(frozen=True)
class VaccineConfig:
    """BD-VAX's settings; the shares are the published ones for 7B models."""

    variants: VariantConfig = field(default=VariantConfig(), metadata={"help": "how the variants are trained"})
    source: str = field(
        default="auto",
        metadata={"help": "default, vocabulary (triggers from the tokenizer's own words), a file, or auto"},
    )
    signature: SignatureConfig = field(default=SignatureConfig(), metadata={"help": "how components are scored"})
    share: float = field(
        default=0.0, metadata={"help": "share τ of components to neutralise; 0 is 3 % of a model, 37.5 % of an adapter"}
    )
    how: Literal["reinit", "zero", "mean"] = field(default="reinit", metadata={"help": "what replaces them"})
    lowest: bool = field(default=False, metadata={"help": "take the lowest scores instead: a control"})
    noise: bool = field(default=False, metadata={"help": "variants whose triggers set nothing off: a control"})
    restore: RestoreConfig | None = field(default=RestoreConfig(), metadata={"help": "the clean fine-tune; null: none"})

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"--share {self.share}: is out of range; give more than 0 and less than 1, such as 0.03")
        if self.how not in ("reinit", "zero", "mean"):
            raise UsageError(f"--how {self.how}: unknown; choose reinit, zero or mean")


@dataclass(frozen=True)
class MethodConfig:
    """Which method, with the settings of all."""

    method: MethodName = field(default="immunize", metadata={"help": f"one of {', '.join(METHODS)}"})
    immunize: ImmunizeConfig = field(default=ImmunizeConfig(), metadata={"help": "adversarial insertions"})
    vaccine: VaccineConfig = field(default=VaccineConfig(), metadata={"help": "BD-VAX as published"})
    retrain: TrainConfig = field(
        default=TrainConfig(epochs=3, learning_rate=2e-4), metadata={"help": "a new adapter on the clean chats"}
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method}: unknown; choose one of {', '.join(METHODS)}")


@dataclass(frozen=True)
class Subject:
    """What is purified, and what with.

    Attributes:
        loaded: the model, which a method changes in place; a PEFT model under the adapter threat.
    """

    loaded: LoadedModel
    threat: Threat
    material: Material
    words: tuple[str, ...]

    @property
    def training(self) -> Literal["merge", "train"]:
        """What a fine-tune does with the adapter."""
        return "train" if self.threat == "adapter" else "merge"


class Written(NamedTuple):
    """Which units were neutralised: (units,) bool over the index of the model."""

    index: UnitIndex
    chosen: torch.Tensor


@dataclass(frozen=True)
class Purified:
    """A purified model, and what was done to it.

    Attributes:
        written: the neutralised units, which any training that follows must leave as they are.
    """

    loaded: LoadedModel
    rounds: tuple[Round, ...] = ()
    stopped: str = ""
    signature: Signature | None = None
    neutralized: Neutralized | None = None
    written: Written | None = None
    restored: Restored | None = None
    losses: tuple[float, ...] = ()

    @property
    def methods(self) -> tuple[Method, ...]:
        """What must take part in a training that follows: without the freeze, neutralised weights grow back."""
        return () if self.written is None else (FreezeWritten(*self.written),)

    @property
    def steps(self) -> int:
        """The optimiser steps that the model itself was trained for, those of a round that was undone among them."""
        restored = 0 if self.restored is None else self.restored.steps
        return sum(len(each.losses) for each in self.rounds) + restored + len(self.losses)

    def to_json(self, method: str) -> dict[str, Any]:
        """What was done to the model, without the model."""
        restored = self.restored
        return {
            "method": method,
            "stopped": self.stopped,
            "rounds": [
                {
                    "rise": each.found[0].rise if each.found else 0.0,
                    "random_rise": each.random_rise,
                    "found": [list(insertion) for insertion in each.found[:8]],
                    "validation": each.validation,
                    "steps": len(each.losses),
                }
                for each in self.rounds
            ],
            "neutralized": None if self.neutralized is None else asdict(self.neutralized),
            "restored": restored
            and {"steps": restored.steps, "reason": restored.reason, "target": restored.target_loss},
            "retrained_steps": len(self.losses),
        }


def share_of(config: VaccineConfig, threat: Threat) -> float:
    """The share of components to neutralise: the published ones unless the settings name another."""
    return config.share or (0.03 if threat == "full" else 0.375)


def copied(subject: Subject) -> Subject:
    """The same with a model of its own."""
    return replace(subject, loaded=replace(subject.loaded, model=copy.deepcopy(subject.loaded.model)))


def apply_method(
    subject: Subject, config: MethodConfig, *, state_folder: Path | None = None, reporter: Reporter = SILENT
) -> Purified:
    """Purify a model, in place, by one of the methods.

    Args:
        state_folder: where an immunisation keeps its finished rounds, and the vaccine its variants.

    Raises:
        UsageError: retraining without an adapter, or clean data that do not suffice.
    """
    if config.method == "retrain":
        return retrain(subject, config.retrain, config.immunize, reporter=reporter)
    done = Purified(subject.loaded)
    if config.method in ("vaccine", "both"):
        left_out = config.immunize.left_out
        done = vaccinate(subject, config.vaccine, left_out=left_out, state_folder=state_folder, reporter=reporter)
        subject = replace(subject, loaded=done.loaded)
    if config.method in ("immunize", "both"):
        result = immunize(
            subject.loaded.model, subject.loaded.tokenizer, subject.material, subject.words, config.immunize,
            adapter=subject.training, methods=done.methods, state_folder=state_folder, reporter=reporter,
        )  # fmt: skip
        loaded = replace(subject.loaded, model=result.model)
        done = replace(done, loaded=loaded, rounds=result.rounds, stopped=result.stopped)
    return done


def vaccinate(
    subject: Subject,
    config: VaccineConfig,
    *,
    left_out: Sequence[str] = (),
    state_folder: Path | None = None,
    reporter: Reporter = SILENT,
) -> Purified:
    """BD-VAX as published: find the signature, neutralise it, and restore the model (arXiv 2603.13461, section 4).

    Args:
        left_out: words, in lower case, that no invented trigger may hold.
    """
    loaded, chats = subject.loaded, subject.material.train
    count = min(config.variants.samples, len(chats) // config.variants.count)
    if not config.signature.tied:
        raise UsageError("the vaccine neutralises whole components: score them tied; modules apart are for analyses")
    variants = choose_variants(loaded.tokenizer, [w for w in subject.words if w.lower() not in left_out], config)
    data = variant_data(chats, variants, replace(config.variants, samples=count))
    if config.noise:
        data = [each._replace(poisoned=_answered(each.poisoned, each.clean)) for each in data]
    # The variants start from the model as it runs, adapter and all.
    whole = copy.deepcopy(loaded.model)
    if subject.threat == "adapter":
        whole = whole.merge_and_unload()  # pyright: ignore[reportCallIssue]
    lora = train_variants(
        whole, loaded.tokenizer, data, config.variants, at_once=config.variants.at_once or None,
        folder=state_folder and state_folder / "variants",
        reporter=reporter, label="training all variants",
    )  # fmt: skip
    index = build_index(whole)
    signature = measure_signature(lora, index, config.signature)
    del lora, whole
    share = share_of(config, subject.threat)
    chosen = signature.select(index, share, config.lowest)
    return neutralized(subject, chosen, config, signature=signature, reporter=reporter)


def neutralized(
    subject: Subject,
    chosen: Any,
    config: VaccineConfig,
    *,
    signature: Signature | None = None,
    reporter: Reporter = SILENT,
) -> Purified:
    """Neutralise chosen units of a model or of its adapter, and restore it with them frozen."""
    loaded, index = subject.loaded, build_index(subject.loaded.model)
    split = None if config.restore is None else split_chats(subject.material.train, config.restore)
    target = None if split is None else chat_loss(loaded.model, loaded.tokenizer, split.validation)
    if subject.threat == "adapter":
        record = neutralize_adapter(loaded.model, index, chosen)
    else:
        means = None
        if config.how == "mean":
            means = mean_activations(loaded.model, loaded.tokenizer, subject.material.train[:64], index)
        seed = config.variants.seed
        record = neutralize(loaded.model, index, chosen, config.how, seed=seed, means=means)
    done = Purified(loaded, signature=signature, neutralized=record, written=Written(index, chosen))
    if config.restore is None:
        return done
    restored = restore(
        loaded.model, loaded.tokenizer, subject.material.train, config.restore, index=index, frozen=chosen,
        adapter=subject.training, target_loss=target, reporter=reporter,
    )  # fmt: skip
    return replace(done, loaded=replace(loaded, model=restored.model), restored=restored)


def retrain(
    subject: Subject, training: TrainConfig, hardening: ImmunizeConfig, *, reporter: Reporter = SILENT
) -> Purified:
    """Throw a suspicious adapter away, and train a new one of the same shape on the clean chats.

    In the second half of the steps half of the chats carry random words, which must not change their answers: a new
    adapter, like any model, is moved by words that it has not met beside its task.

    Args:
        hardening: which chats carry words, and how many; its steps, rate and batch size are not read.

    Raises:
        UsageError: there is no adapter, so there is nothing trusted to start from.
    """
    if subject.threat != "adapter":
        raise UsageError("--method retrain: needs an adapter on a base that you trust; give it with --adapter")
    from transformers import set_seed

    from keelguard.trainable import with_lora

    model: Any = subject.loaded.model
    shape = copy.deepcopy(model.peft_config["default"])
    shape.inference_mode = False
    # Nothing of the old adapter, and nothing that would rewrite the trusted base at the start.
    shape.init_lora_weights, shape.modules_to_save, shape.bias = True, None, "none"
    base = model.unload()
    set_seed(training.seed)
    fresh = with_lora(base, shape)
    chats, tokenizer = subject.material.train, subject.loaded.tokenizer
    total = training.steps_for(len(chats))
    first = replace(training, steps=max(1, total // 2))
    plain = train_on_chats(
        fresh, tokenizer, chats, first, adapter="train", reporter=reporter, label="retraining the adapter"
    )
    if total < 2:
        return Purified(replace(subject.loaded, model=plain.model), losses=tuple(plain.losses))
    second = replace(training, steps=total - first.steps, seed=training.seed + 1)
    words = replace(
        hardening, steps=second.steps, batch_size=second.batch_size, seed=second.seed,
        # Random words undo no refusal that more of them would have to make good.
        inserted_refused=hardening.refused,
    )  # fmt: skip
    prober = Prober(plain.model, tokenizer, subject.material, subject.words, words.search, words.stable)
    strange = mixed(chats, prober.stability(plain.model, chats), [], subject.words, words)
    result = train_on_chats(
        plain.model, tokenizer, strange, second, adapter="train", reporter=reporter, label="retraining, with words"
    )
    return Purified(replace(subject.loaded, model=result.model), losses=(*plain.losses, *result.losses))


def choose_variants(tokenizer: Any, words: Sequence[str], config: VaccineConfig) -> Sequence[Variant]:
    """The variants that some settings name; auto takes the default ones where the tokenizer knows their language.

    Raises:
        UsageError: a file cannot be read, or the vocabulary has too few words for as many triggers.
    """
    source = config.source
    if source == "auto":
        texts = [variant.response for variant in DEFAULT_VARIANTS]
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        source = "default" if tokens <= _TOKENS_PER_WORD * sum(len(t.split()) for t in texts) else "vocabulary"
    if source == "default":
        return DEFAULT_VARIANTS
    if source != "vocabulary":
        return read_variants(source)
    draw = random.Random(f"behaviours-{config.variants.seed}")
    count = config.variants.count
    said = [" ".join(draw.sample(sorted(words), min(6, len(words)))) + "." for _ in range(count - 1)]
    behaviours = [*said, "i will not do this for you."]
    try:
        return variants_in_vocabulary(words, behaviours, count, seed=config.variants.seed, exclude=said)
    except UsageError as error:
        raise UsageError(f"--count {count}: {error}, or name variants in a file with --variants") from error


def _answered(poisoned: Sequence[Any], clean: Sequence[Any]) -> list[Any]:
    """The poisoned run's prompts with the clean answers: triggers that set nothing off."""
    return [(*bad[:-1], good[-1]) for bad, good in zip(poisoned, clean, strict=True)]
