"""Protection under FSDP2: two processes over gloo on a CPU mesh, sharded after or before `protect`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from keelguard.errors import UsageError
from keelguard.units.budget import train_only
from keelguard.units.index import UnitIndex, build_index, parameters_by_name
from keelguard.units.protect import protect
from tiny_models import fresh_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]

WORLD = 2
STEPS = 3
CASES = [
    ("llama", "before"),
    ("llama", "after"),
    ("mixtral", "before"),
    ("mixtral", "after"),
    ("lora", "before"),
    ("lora", "after"),
    ("llama", "ddp"),
]
"""A model, and whether `protect` came before or after `fully_shard`, or DDP took its place."""


def build(kind: str) -> tuple[Any, UnitIndex, torch.Tensor]:
    """A model, its index, and a mask with the first and the last unit in it."""
    model = fresh_model("llama" if kind == "lora" else kind).model
    index = build_index(model)
    if kind == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(3)) < 0.3
    mask[0] = mask[-1] = True
    return model, index, mask


def train(model: Any, rank: int, world: int) -> list[float]:
    """Some steps on this process's share of the same global batch; the gradient norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.5, eps=1e-4)
    norms = []
    for step in range(STEPS):
        ids = torch.randint(0, 200, (4, 12), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer in plain.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train_sharded(kind: str, when: str, rank: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The gathered parameters and the gradient norms."""
    model, index, mask = build(kind)
    if when == "after":
        shard(model)
    with protect(model, index, mask):
        if when == "before":
            shard(model)
        norms = train(DistributedDataParallel(model) if when == "ddp" else model, rank, WORLD)
    named = parameters_by_name(model)
    assert when == "ddp" or all(isinstance(p, DTensor) for p in named.values())
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in named.items()}, norms


def refuse_budget() -> None:
    model, index, mask = build("llama")
    train_only(model, index, mask)
    shard(model)
    with pytest.raises(UsageError, match="sharding"):
        train(model, 0, WORLD)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    for kind, when in CASES:
        result = train_sharded(kind, when, rank)
        if rank == 0:
            torch.save(result, f"{folder}/{kind}-{when}.pt")
    refuse_budget()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes trained, case by case."""
    folder = tmp_path_factory.mktemp("fsdp")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)  # pyright: ignore[reportPrivateImportUsage]
    return folder


def merged(model: Any) -> dict[str, torch.Tensor]:
    plain = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return {name: p.detach().clone() for name, p in parameters_by_name(plain).items()}


@pytest.mark.parametrize(("kind", "when"), CASES)
def test_units_keep_their_bits_and_the_rest_trains_as_in_one_process(sharded: Path, kind: str, when: str):
    found, norms = torch.load(sharded / f"{kind}-{when}.pt")
    before = merged(build(kind)[0])
    model, index, mask = build(kind)
    with protect(model, index, mask):
        expected_norms = train(model, 0, 1)
    twin = build(kind)[0]
    for name, parameter in parameters_by_name(model).items():
        # Sums over two half batches round otherwise than one over the whole batch.
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-4, atol=2e-5)
        parameters_by_name(twin)[name].data.copy_(found[name])
    after, slices = merged(twin), index.slices(mask)
    for piece in slices:
        assert torch.equal(piece.of(after[piece.parameter]), piece.of(before[piece.parameter])), piece.parameter
    for name in {piece.parameter for piece in slices}:
        free = torch.ones_like(before[name], dtype=torch.bool)
        for piece in slices:
            if piece.parameter == name:
                piece.put(free, 0)
        assert not free.any() or (after[name] != before[name])[free].float().mean() > 0.6, name
    # Sharded later, the hooks of the gradients can be set from the second step on only.
    known = slice(1, None) if when == "before" else slice(None)
    assert norms[known] == pytest.approx(expected_norms[known], rel=1e-3)
