"""`keelguard align`: alignment inside a budget of units, by default the redundant ones of the base model.

    align("base", chats, TrainConfig(steps=300), out="runs/align", chart=UnitMap.load("runs/budget"), train="ru")

The paper (section 6) trains the least important 20 % of the units, by their importance for utility alone, since no
aligned model exists yet.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from keelguard.errors import UsageError
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model
from keelguard.progress import SILENT, Reporter
from keelguard.records import Chat
from keelguard.training import Method, Run, TrainConfig
from keelguard.units.budget import train_only
from keelguard.units.diagnose import plain
from keelguard.units.finetune import chosen_units
from keelguard.units.groups import UnitMap
from keelguard.units.index import UnitIndex, build_index
from keelguard.units.proof import Probe
from keelguard.units.protect import Others
from keelguard.units.training import Arm, TrainingResult, run_training

ALL = "all"


class TrainOnly(Method):
    """Train some units and nothing else: `units.budget` for the length of a fine-tune."""

    def __init__(self, index: UnitIndex, mask: torch.Tensor, others: Others = "freeze") -> None:
        self.index, self.mask = index, mask
        self.others: Others = others

    def begin(self, run: Run) -> None:
        """Cut the slices out before the optimiser exists."""
        run.cleanup.callback(train_only(run.model, self.index, self.mask, others=self.others).merge)


def align(
    source: str,
    chats: Sequence[Chat],
    config: TrainConfig,
    *,
    out: str | Path,
    chart: UnitMap | None = None,
    train: str = "ru",
    others: Others = "freeze",
    held_out: Sequence[Chat] = (),
    probe: Probe | None = None,
    compare: bool = False,
    load: Callable[..., LoadedModel] = load_model,
    reporter: Reporter = SILENT,
) -> TrainingResult:
    """Align a model on chats by training some of its units alone; the new checkpoint goes to OUT/model.

    Args:
        chart: a unit map of this very model, as `diagnose` without safety data makes it.
        train: which units: groups of the map, "random:0.2" and the like (see `chosen_units`), or "all" for every
            weight of the model, a full fine-tune.
        others: whether embeddings, norms and head train beside the units: train or freeze.
        compare: also train every weight, with the same settings, and list it beside.

    Raises:
        UsageError: the map is of other weights or is missing, or a LoRA is asked for beside units.
        FailureError: training does not fit in memory, or the disk is full.
    """
    if config.lora_rank and train != ALL:
        raise UsageError(f"--lora-rank {config.lora_rank}: a budget of units has no LoRA; give --train all or rank 0")
    if others not in ("train", "freeze"):
        raise UsageError(f"--others {others}: unknown; choose train or freeze")
    loaded = plain(load(source, training=True))
    index = build_index(loaded.model, chart.attention if chart else "head")  # pyright: ignore[reportArgumentType]
    if chart is not None:
        chart.place(index, loaded.weights_hash)
    arms = {"all weights": Arm()} if compare or train == ALL else {}
    units = None
    if train != ALL:
        mask = chosen_units(train, loaded.model, index, chart)
        units = sha256_of(mask.nonzero().flatten().tolist())
        arms[train] = Arm([TrainOnly(index, mask, others)])
    return run_training(
        "align",
        loaded,
        chats,
        config,
        arms,
        out=out,
        settings={"units": units, "others": others},
        held_out=held_out,
        probe=probe,
        reporter=reporter,
    )
