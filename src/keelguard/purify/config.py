"""Everything that a purification can be told."""

from dataclasses import dataclass, field

from keelguard.purify.inversion import InversionConfig
from keelguard.purify.material import MaterialConfig
from keelguard.purify.methods import MethodConfig
from keelguard.purify.spikes import SpikeConfig
from keelguard.training import TrainConfig


@dataclass(frozen=True)
class PurifyConfig:
    """Everything that a purification can be told."""

    method: MethodConfig = field(default=MethodConfig(), metadata={"help": "how the model is purified"})
    material: MaterialConfig = field(default=MaterialConfig(), metadata={"help": "how clean data are read"})
    spikes: SpikeConfig | None = field(default=SpikeConfig(), metadata={"help": "canaries in a copy; null: none"})
    inversion: InversionConfig | None = field(
        default=InversionConfig(), metadata={"help": "the scan for hidden target texts; null: none"}
    )
    compare: tuple[str, ...] = field(
        default=(),
        metadata={"help": "methods and controls to try beside it on copies of the model: arms of `purify bench`"},
    )
    rebound: TrainConfig = field(
        default=TrainConfig(steps=40, learning_rate=2e-5),
        metadata={"help": "the clean fine-tune that must not bring a backdoor back"},
    )
