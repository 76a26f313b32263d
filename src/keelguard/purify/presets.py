"""How much a purification may cost: three budgets, for models of ordinary size."""

import math
from dataclasses import replace
from typing import Any, Literal

from keelguard.errors import UsageError
from keelguard.purify.config import PurifyConfig
from keelguard.purify.immunize import ImmunizeConfig
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

LORA_RATE = 10.0
"""How many times the learning rate of all weights a LoRA has, as its steps move the model far less."""


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
    config: PurifyConfig, *, lora_rank: int = 0, bf16: bool = False, gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False, keep_rate: bool = False,
) -> PurifyConfig:  # fmt: skip
    """The same settings with every training of a purification made smaller: canaries and checks as the methods.

    With a LoRA the learning rates are `LORA_RATE` times as high. The chosen method's batch is cut into as many parts as
    `gradient_accumulation` says; others, which may be smaller, into the most that divides both.

    Args:
        lora_rank: each training trains a LoRA and merges it; not for an adapter, which is trained itself.
        keep_rate: leave the learning rate of immunisation as it is.

    Raises:
        UsageError: a value is out of range, or does not divide the chosen method's batch.
    """
    method, name = config.method, config.method.method
    rate = LORA_RATE if lora_rank else 1.0

    def smaller(training: Any, *readers: str, faster: float = rate, rank: int = lora_rank) -> Any:
        parts = gradient_accumulation
        if name not in readers and parts > 0:
            parts = math.gcd(parts, training.batch_size)
        return replace(
            training, learning_rate=faster * training.learning_rate, lora_rank=rank, bf16=bf16,
            gradient_accumulation=parts, gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip

    immunize = smaller(method.immunize, "immunize", "both", faster=1.0 if keep_rate else rate)
    restore = method.vaccine.restore and smaller(method.vaccine.restore, "vaccine")
    # A new adapter is what retraining trains.
    retrain = smaller(method.retrain, "retrain", faster=1.0, rank=0)
    return replace(
        config,
        method=replace(method, immunize=immunize, vaccine=replace(method.vaccine, restore=restore), retrain=retrain),
        spikes=config.spikes and smaller(config.spikes),
        rebound=smaller(config.rebound),
    )
