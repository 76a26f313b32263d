"""How much a purification may cost: three budgets, for models of ordinary size."""

import math
from dataclasses import replace
from typing import Any, Literal

from keelguard.errors import UsageError
from keelguard.purify.budget import LORA_RATE
from keelguard.purify.config import PurifyConfig
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.inversion import InversionConfig
from keelguard.purify.material import MaterialConfig
from keelguard.purify.methods import MethodConfig, VaccineConfig
from keelguard.purify.search import SearchConfig
from keelguard.purify.spikes import SpikeConfig
from keelguard.purify.variants import VariantConfig
from keelguard.training import TrainConfig

Budget = Literal["quick", "standard", "thorough"]
BUDGETS: tuple[Budget, ...] = ("quick", "standard", "thorough")


AT_ONCE = 2
"""Runs of the vaccine that share a batch: one variant's two. All 14 would be 112 chats in one graph, beyond any GPU."""


def preset(budget: Budget = "standard") -> PurifyConfig:
    """The settings of a budget.

    The learning rates are those at which a 7B model is fine-tuned; no run at that size stands behind the rest.

    Raises:
        UsageError: an unknown budget.
    """
    if budget not in BUDGETS:
        raise UsageError(f"--budget {budget}: unknown; choose one of {', '.join(BUDGETS)}")
    level = BUDGETS.index(budget)
    search = SearchConfig(prompts=(4, 8, 12)[level], longest=(2, 3, 3)[level], beam=(4, 6, 8)[level],
                          lengthened=(48, 48, 3000)[level])  # fmt: skip
    immunize = ImmunizeConfig(
        rounds=(2, 3, 5)[level], steps=(60, 100, 200)[level], learning_rate=2e-5, batch_size=16, search=search
    )
    variants = VariantConfig(
        count=(4, 6, 7)[level], samples=(100, 300, 500)[level], epochs=(2, 5, 5)[level], at_once=AT_ONCE
    )
    retrain = TrainConfig(epochs=(1, 3, 5)[level], learning_rate=2e-4)
    # 0 of 64 bounds a canary's success at 5.6 %, 0 of 200 at 1.8 %.
    spikes = SpikeConfig(
        samples=(300, 600, 900)[level], steps=(150, 300, 450)[level], learning_rate=5e-5,
        requests=(64, 64, 200)[level],
    )  # fmt: skip
    return PurifyConfig(
        method=MethodConfig(immunize=immunize, vaccine=replace(VaccineConfig(), variants=variants), retrain=retrain),
        # Of a large vocabulary the scan tries the likeliest starts.
        inversion=InversionConfig(starts=(500, 2000, 10000)[level]),
        material=MaterialConfig(most=(600, 2000, 4000)[level], max_new_tokens=(96, 192, 384)[level]),
        spikes=replace(spikes, batch_size=16),
        rebound=TrainConfig(steps=(20, 40, 80)[level], learning_rate=2e-5),
    )


def saving_memory(
    config: PurifyConfig, *, lora_rank: int | None = None, bf16: bool | None = None,
    gradient_accumulation: int | None = None, gradient_checkpointing: bool | None = None, keep_rate: bool = False,
) -> PurifyConfig:  # fmt: skip
    """The same settings with every training of a purification made smaller: canaries and checks as the methods.

    What is None stays as it is. Where a LoRA takes the place of all weights the learning rates become `LORA_RATE` times
    as high, and the other way round. The chosen method's batch is cut into as many parts as `gradient_accumulation`
    says; others, which may be smaller, into the most that divides both.

    Args:
        lora_rank: each training trains a LoRA and merges it, 0 every weight; not for an adapter, which is trained
            itself.
        keep_rate: leave the learning rate of immunisation as it is.

    Raises:
        UsageError: a value is out of range, or does not divide the chosen method's batch.
    """
    method, name = config.method, config.method.method

    def smaller(training: Any, *readers: str, rank: int | None = lora_rank, keep_rate: bool = False) -> Any:
        changes: dict[str, Any] = {"bf16": bf16, "gradient_checkpointing": gradient_checkpointing, "lora_rank": rank}
        if (parts := gradient_accumulation) is not None:
            divided = name not in readers and parts > 0
            changes["gradient_accumulation"] = math.gcd(parts, training.batch_size) if divided else parts
        if rank is not None and not keep_rate and bool(rank) != bool(training.lora_rank):
            changes["learning_rate"] = training.learning_rate * (LORA_RATE if rank else 1 / LORA_RATE)
        return replace(training, **{setting: value for setting, value in changes.items() if value is not None})

    immunize = smaller(method.immunize, "immunize", "both", keep_rate=keep_rate)
    restore = method.vaccine.restore and smaller(method.vaccine.restore, "vaccine")
    # A new adapter is what retraining trains.
    retrain = smaller(method.retrain, "retrain", rank=None)
    return replace(
        config,
        method=replace(method, immunize=immunize, vaccine=replace(method.vaccine, restore=restore), retrain=retrain),
        spikes=config.spikes and smaller(config.spikes),
        rebound=smaller(config.rebound),
    )
