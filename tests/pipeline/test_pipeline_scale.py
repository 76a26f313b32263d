"""Training stages in two processes over gloo: what one process trains, by DDP and sharded by FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from keelguard.guard.adapter import Signal
from keelguard.models import load_model
from keelguard.units.finetune import chosen_units
from keelguard.units.index import build_index, parameters_by_name
from tiny_models import fresh_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]

SIGNALS = """
import sys
from pathlib import Path
import torch
from keelguard.guard.labels import Labelled
from keelguard.guard.material import MaterialConfig
from keelguard.guard.run import run_signal
from keelguard.guard.training import SignalConfig
from keelguard.models import load_model
from keelguard.records import user

torch.set_num_threads(1)

def rows(count):
    # Of unequal lengths, so that the processes' parts of a batch hold unequal numbers of looks and tokens.
    bad = [Labelled((user(f"bad {i}"),), True).answered(f"do {i} then it. " * (1 + i % 5), True) for i in range(count)]
    good = [Labelled((user(f"good {i}"),), False).answered(f"nice {i}. " * (1 + i % 3), False) for i in range(count)]
    sorry = [row.answered("Sorry, I cannot help with that." + " No." * (i % 4), False) for i, row in enumerate(bad)]
    return bad + sorry + good

material = MaterialConfig(limit=6, own_answers=2, variants=1, max_new_tokens=4)
for placement, rate in (("probe", 2e-3), ("prefix", 1e-3)):
    config = SignalConfig(placement=placement, steps=6, batch_size=8, learning_rate=rate, lora_rank=0, target=0.2,
                          material=material)
    run_signal(sys.argv[1], rows(8), rows(4), config, Path(sys.argv[2]) / placement,
               load=lambda source: load_model(source, device="cpu"))
"""

FINETUNE = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist

torch.set_num_threads(1)
if "RANK" in os.environ:
    # accelerate shards on accelerators alone: it is told that the CPUs were some.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2",
                      FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **options: ("gloo", DistributedType.MULTI_GPU)

from torch.distributed.tensor import DTensor
from keelguard.models import load_model
from keelguard.records import assistant, user
from keelguard.training import TrainConfig
from keelguard.units import training
from keelguard.units.finetune import FinetuneConfig, finetune

sharded = training._is_sharded
def watched(model):
    if "RANK" in os.environ and Path(sys.argv[2], "state-0").is_dir():
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return sharded(model)
training._is_sharded = watched

chats = [(user(f"Hello world {i}, how are you?"), assistant("I am fine. " * (1 + i % 4))) for i in range(12)]
train = TrainConfig(steps=4, batch_size=4, learning_rate=1e-3, weight_decay=0.1)
config = FinetuneConfig(train, protect=("freeze",), freeze="random:0.3")
finetune(sys.argv[1], chats, config, out=sys.argv[2],
         load=lambda source, **options: load_model(source, device="cpu", **options))
"""


def run(script: str, source: Path, out: Path, processes: int) -> None:
    """Run a script on a model in one process, or in several of a launcher."""
    file = out.with_suffix(".py")
    file.write_text(script)
    launcher = [*("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(file), str(source), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "false" if script is FINETUNE else "true"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_model().save(tmp_path_factory.mktemp("source") / "model")


def test_two_processes_train_the_signal_of_one(source: Path, tmp_path: Path):
    for processes in (1, 2):
        run(SIGNALS, source, tmp_path / str(processes), processes)
    one, two = (tmp_path / "1", tmp_path / "2")
    for placement in ("probe", "prefix"):
        first, second = (load_file(folder / placement / "signal.safetensors") for folder in (one, two))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5)
        policies = [Signal.load(folder / placement).policy for folder in (one, two)]
        assert policies[0].threshold == pytest.approx(policies[1].threshold, abs=1e-4)
        assert policies[0].query_threshold == pytest.approx(policies[1].query_threshold, abs=1e-4)
    start = load_file(source / "model.safetensors")
    first, second = (load_file(folder / "prefix" / "model" / "model.safetensors") for folder in (one, two))
    moved = max(float((first[name] - start[name]).abs().max()) for name in start)
    apart = max(float((first[name] - second[name]).abs().max()) for name in start)
    assert moved > 1e-3
    # Where a gradient is nearly zero, rounding turns AdamW's first steps.
    assert apart < 0.1 * moved


@pytest.mark.slow
def test_a_sharded_fine_tune_keeps_frozen_units_and_trains_the_rest_alike(source: Path, tmp_path: Path):
    for processes in (1, 2):
        run(FINETUNE, source, tmp_path / str(processes), processes)
    before, one, two = (
        parameters_by_name(load_model(path, device="cpu").model)
        for path in (source, tmp_path / "1" / "model", tmp_path / "2" / "model")
    )
    model = load_model(source, device="cpu").model
    index = build_index(model)
    mask = chosen_units("random:0.3", model, index, None)
    assert mask.sum() == round(0.3 * len(index))
    for piece in index.slices(mask):
        kept = piece.of(before[piece.parameter])
        assert torch.equal(piece.of(two[piece.parameter]), kept)
        assert torch.equal(piece.of(one[piece.parameter]), kept)
    moved = max(float((one[name] - before[name]).detach().abs().max()) for name in before)
    apart = max(float((one[name] - two[name]).detach().abs().max()) for name in before)
    assert moved > 1e-3
    assert apart < 0.02 * moved
