"""How much a purification may cost: three budgets, for models of ordinary size."""

from dataclasses import replace
from typing import Literal

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
    variants = VariantConfig(count=(4, 6, 7)[level], samples=(100, 300, 500)[level], epochs=(2, 5, 5)[level])
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
