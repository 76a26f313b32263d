"""One pass gives what every row alone would give: moments of activations, and first-order effects of units."""

import copy
import errno
import random
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import hooks
from peft import LoraConfig, get_peft_model
from test_index import VOCABULARY

from keelguard.errors import FailureError, UsageError
from keelguard.units import attribution
from keelguard.units.attribution import Row, Statistics, attribute, objectives
from keelguard.units.importance import output_norms
from keelguard.units.index import UnitIndex, build_index, parameters_by_name
from tiny_models import ARCHITECTURES, build_model

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPS = 3


def some_rows(count: int = 7, seed: int = 0) -> list[Row]:
    """Rows of different lengths, scored spans, groups and signs."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        ids = [draw.randrange(5, 90) for _ in range(draw.randrange(6, 20))]
        start = draw.randrange(1, len(ids) - 2)
        rows.append(Row(ids, start, draw.randrange(start + 1, len(ids) + 1), number % GROUPS, draw.choice((1.0, -1.0))))
    return rows


def whole(statistics: Statistics, name: str) -> torch.Tensor:
    """All blocks of one statistic, (groups, units or channels)."""
    parts = statistics.effects if name in ("signed", "absolute", "examples") else statistics.moments
    assert parts is not None
    return torch.cat([getattr(part, name).reshape(GROUPS, -1) for part in parts], dim=1)


def assert_equal(found: Statistics, wanted: Statistics, tolerance: float = 1e-4) -> None:
    """Counts are equal, everything else within a share of its size."""
    names = ["count", "mean", "m2"] + (["examples", "signed", "absolute"] if wanted.effects else [])
    for name in names:
        a, b = whole(found, name), whole(wanted, name)
        exact = name in ("count", "examples")
        assert (a - b).abs().max() <= (0 if exact else tolerance * b.abs().max()), name
        assert b.any()


def exact_model(architecture: str) -> Any:
    model = build_model(architecture, VOCABULARY).double()
    model.config._experts_implementation = "eager"
    return model


def objective(model: Any, row: Row) -> torch.Tensor:
    """The objective of one unpadded row, in float64."""
    logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double()
    scores = logits[row.start - 1 : row.stop - 1].log_softmax(-1)
    return row.sign * scores.gather(1, torch.tensor(row.ids[row.start : row.stop])[:, None]).mean()


def watch_experts(module: Any, gains: torch.Tensor, seen: list[list[tuple[int, torch.Tensor]]]) -> None:
    """Compute experts (E) token by token, with a gain (E, width) on every channel; note tokens and activations."""

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = []
        for number, (token, experts, shares) in enumerate(zip(hidden, chosen.tolist(), weights, strict=True)):
            row = torch.zeros_like(token)
            for expert, share in zip(experts, shares, strict=True):
                gate, up = (module.gate_up_proj[expert] @ token).chunk(2)
                x = module.act_fn(gate) * up * gains[expert]
                seen[expert].append((number, x.detach()))
                row += share * (module.down_proj[expert] @ x)
            rows.append(row)
        return torch.stack(rows)

    module.forward = forward


def direct(model: Any, index: UnitIndex, row: Row) -> tuple[list[torch.Tensor], list[dict[int, torch.Tensor]]]:
    """Of one row alone: Σ x·∂J/∂x of every unit as ∂J/∂gain, and each block's activations by token."""
    model = copy.deepcopy(model)
    gains = [torch.ones(block.width, dtype=torch.float64, requires_grad=True) for block in index.blocks]
    seen: list[list[tuple[int, torch.Tensor]]] = [[] for _ in index.blocks]
    experts: dict[str, list[int]] = {}
    for number, block in enumerate(index.blocks):
        if block.expert is not None:
            experts.setdefault(block.module, []).append(number)
            continue

        def hook(_: Any, inputs: Any, number: int = number) -> Any:
            seen[number] = list(enumerate(inputs[0][0].detach()))
            return (inputs[0] * gains[number], *inputs[1:])

        model.get_submodule(block.module).register_forward_pre_hook(hook)
    for name, numbers in experts.items():
        stacked = torch.stack([gains[number] for number in numbers])
        watch_experts(model.get_submodule(name), stacked, [seen[number] for number in numbers])
    slopes = torch.autograd.grad(objective(model, row), gains, allow_unused=True)
    effects = []
    for block, slope in zip(index.blocks, slopes, strict=True):
        slope = torch.zeros(block.width) if slope is None else slope
        effects.append(slope.double()[block.channels].sum(1))
    return effects, [dict(pairs) for pairs in seen]


def check_against_direct(statistics: Statistics, model: Any, index: UnitIndex, rows: Sequence[Row], last: bool) -> None:
    found = [direct(model, index, row) for row in rows]
    for number, block in enumerate(index.blocks):
        moments = statistics.moments[number]
        for group in range(GROUPS):
            picked = [pair for row, pair in zip(rows, found, strict=True) if row.group == group]
            owners = [row for row in rows if row.group == group]
            tokens = [
                seen[number][t]
                for row, (_, seen) in zip(owners, picked, strict=True)
                for t in (range(row.start - 1, row.start) if last else range(row.start, row.stop))
                if t in seen[number]
            ]
            assert moments.count[group] == len(tokens), block.name
            if tokens:
                x = torch.stack(tokens)
                torch.testing.assert_close(moments.mean[group], x.mean(0), atol=1e-8, rtol=1e-6)
                torch.testing.assert_close(
                    moments.m2[group], x.var(0, correction=0) * len(x), atol=1e-8, rtol=1e-6, msg=block.name
                )
            if statistics.effects is None:
                continue
            each = torch.stack([effects[number] for effects, _ in picked])
            part = statistics.effects[number]
            assert part.examples[group] == len(picked)
            scale = float(each.abs().max()) + 1e-6
            torch.testing.assert_close(part.signed[group], each.sum(0), atol=1e-4 * scale, rtol=1e-4)
            torch.testing.assert_close(part.absolute[group], each.abs().sum(0), atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moments_and_effects_are_those_of_each_row_alone(architecture: str) -> None:
    model, rows = exact_model(architecture), some_rows()
    index = build_index(model, "channel" if architecture in ("mistral", "phi3") else "head")
    found = attribute(model, index, rows, groups=GROUPS, effects=True, batch_size=4)
    check_against_direct(found, model, index, rows, last=False)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_moments_at_the_end_of_the_prompt(architecture: str) -> None:
    model, rows = exact_model(architecture), some_rows()
    index = build_index(model)
    for effects in (False, True):
        found = attribute(model, index, rows, groups=GROUPS, effects=effects, batch_size=4, last_token=True)
        check_against_direct(found, model, index, rows, last=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batches_and_padding_change_nothing(architecture: str) -> None:
    model, rows = build_model(architecture, VOCABULARY), some_rows()
    index = build_index(model)
    wanted = attribute(model, index, rows, groups=GROUPS, effects=True, batch_size=1)
    for batch_size, pad_id in ((2, 0), (3, 17), (16, 3)):
        found = attribute(model, index, rows, groups=GROUPS, effects=True, batch_size=batch_size, pad_id=pad_id)
        assert_equal(found, wanted, 2e-3)
    looked = attribute(model, index, rows, groups=GROUPS, effects=False, batch_size=3)
    assert looked.effects is None
    assert_equal(looked, Statistics(wanted.moments, None), 2e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_effects_foretell_a_small_change_of_a_units_output(architecture: str) -> None:
    model, rows = exact_model(architecture), some_rows(3)
    index = build_index(model)
    statistics = attribute(model, index, rows, groups=GROUPS, effects=True)
    effects = whole(statistics, "signed").sum(0)
    parameters = parameters_by_name(model)
    random_units = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:5].tolist()
    for unit in [*effects.abs().argsort(descending=True)[:5].tolist(), *random_units]:
        mask = torch.zeros(len(index), dtype=torch.bool)
        mask[unit] = True
        values = []
        for scale in (1 - 1e-3, 1 + 1e-3):
            changed = index.slices(mask, roles="out")
            kept = [piece.of(parameters[piece.parameter]) for piece in changed]
            with torch.no_grad():
                for piece, old in zip(changed, kept, strict=True):
                    piece.put(parameters[piece.parameter], old * scale)
                values.append(float(sum(objective(model, row) for row in rows)))
                for piece, old in zip(changed, kept, strict=True):
                    piece.put(parameters[piece.parameter], old)
        slope = (values[1] - values[0]) / 2e-3
        assert slope == pytest.approx(float(effects[unit]), rel=1e-2, abs=1e-3 * float(effects.abs().max()))


def test_an_adapters_effects_are_those_of_the_merged_model() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(exact_model("llama"), config).eval()
    index, rows = build_index(model), some_rows()
    found = attribute(model, index, rows, groups=GROUPS, effects=True)
    assert_equal(found, attribute(model.merge_and_unload(), index, rows, groups=GROUPS, effects=True))


def test_objectives_are_mean_log_probabilities() -> None:
    for architecture in ("llama", "mixtral"):
        model, rows = build_model(architecture, VOCABULARY), some_rows()
        with torch.no_grad():
            wanted = torch.stack([objective(model, row) for row in rows])
        for batch_size in (1, 3, 16):
            found = objectives(model, rows, batch_size=batch_size)
            torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


def out_of_memory_when(large: Any) -> Any:
    """A hook that fails as a full accelerator does."""

    def hook(module: Any, inputs: Any, *rest: Any) -> None:
        if large(inputs[0]):
            raise torch.OutOfMemoryError("fake")

    return hook


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("where", ["forward", "backward", "counting"])
def test_batches_that_do_not_fit_are_halved_and_nothing_counts_twice(
    where: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = exact_model("llama"), some_rows(9)
    index = build_index(model)
    wanted = attribute(model, index, rows, groups=GROUPS, effects=True, batch_size=1)
    failures: list[int] = []

    def fail(size: int) -> None:
        if size > most:
            failures.append(size)
            raise torch.OutOfMemoryError("fake")

    read, counted = attribution._Collector.read, attribution.group_moments
    running: dict[str, Any] = {}

    def reading(self: Any, model: Any, batch: Any, *rest: Any) -> None:
        running.update(size=len(batch), blocks=0)
        read(self, model, batch, *rest)

    def counting(*args: Any) -> Any:
        running["blocks"] += 1
        if running["blocks"] == len(index.blocks):
            fail(running["size"])
        return counted(*args)

    last = model.get_submodule(index.blocks[-1].module)
    monkeypatch.setattr(attribution._Collector, "read", reading)
    if where == "counting":
        monkeypatch.setattr(attribution, "group_moments", counting)
    elif where == "forward":
        last.register_forward_hook(lambda *_: fail(running["size"]))
    else:
        first = model.get_submodule(index.blocks[0].module)
        first.register_full_backward_hook(lambda *_: fail(running["size"]))
    found = attribute(model, index, rows, groups=GROUPS, effects=True, batch_size=8)
    assert failures
    assert_equal(found, wanted)
    assert whole(found, "examples").sum() == len(rows) * len(index.blocks)


def test_a_row_that_does_not_fit_alone_is_a_failure() -> None:
    model, rows = build_model("llama", VOCABULARY), some_rows()
    index = build_index(model)
    longest = max(len(row.ids) for row in rows)
    model.model.layers[1].register_forward_hook(out_of_memory_when(lambda x: x.shape[1] == longest))
    with pytest.raises(FailureError, match=rf"a row of {longest} tokens does not fit in memory"):
        attribute(model, index, rows, groups=GROUPS, effects=True)
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks


@pytest.mark.parametrize("effects", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(effects: bool, fails: bool) -> None:
    model, rows = build_model("llama", VOCABULARY), some_rows()
    index = build_index(model)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    bits = copy.deepcopy(model.state_dict())
    if fails:
        handle = model.model.norm.register_forward_hook(out_of_memory_when(lambda x: True))
        with pytest.raises(FailureError):
            attribute(model, index, rows, groups=GROUPS, effects=effects)
        handle.remove()
    else:
        attribute(model, index, rows, groups=GROUPS, effects=effects)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())


def test_dropout_stays_off_in_a_model_that_trains() -> None:
    model, rows = build_model("llama", VOCABULARY, attention_dropout=0.5), some_rows()
    index = build_index(model)
    wanted = attribute(model, index, rows, groups=GROUPS, effects=True)
    assert_equal(attribute(model.train(), index, rows, groups=GROUPS, effects=True), wanted, 1e-9)


@pytest.mark.parametrize("effects", [False, True])
def test_statistics_are_the_same_after_saving_and_loading(effects: bool, tmp_path: Path) -> None:
    # More than ten blocks, so that their order is not that of their names.
    model, rows = build_model("mixtral", VOCABULARY, num_hidden_layers=3), some_rows()
    index = build_index(model)
    found = attribute(model, index, rows, groups=GROUPS, effects=effects)
    found.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert_equal(again, found, 0.0)
    assert (again.effects is None) is (not effects)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_damaged_statistics_are_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    for content in (b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"garbage" * 100):
        path.write_bytes(content[:-1])
        with pytest.raises(UsageError, match=r"statistics\.safetensors: cannot be read .*remove it"):
            Statistics.load(path)


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build_model("llama", VOCABULARY), some_rows(2)
    found = attribute(model, build_index(model), rows, groups=GROUPS, effects=False)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FailureError, match="no space left on the disk"):
        found.save(tmp_path / "statistics.safetensors")


def offloaded(model: Any, where: str, folder: Path) -> Any:
    """The model with all of its weights elsewhere, run on the CPU layer by layer."""
    model = copy.deepcopy(model)
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "mixtral"])
def test_a_model_that_fits_nowhere_works_layer_by_layer(architecture: str, where: str, tmp_path: Path) -> None:
    plain, rows = build_model(architecture, VOCABULARY), some_rows()
    index = build_index(plain)
    model = offloaded(plain, where, tmp_path)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    forwards = [vars(module).get("forward") for module in model.modules()]
    for effects in (False, True):
        found = attribute(model, build_index(model), rows, groups=GROUPS, effects=effects, batch_size=4)
        assert_equal(found, attribute(plain, index, rows, groups=GROUPS, effects=effects, batch_size=4), 1e-6)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    torch.testing.assert_close(objectives(model, rows), objectives(plain, rows))
    for norm, wanted in zip(output_norms(model, index), output_norms(plain, index), strict=True):
        assert torch.equal(norm, wanted)


def test_some_layers_on_the_disk(tmp_path: Path) -> None:
    plain, rows = build_model("llama", VOCABULARY), some_rows()
    index = build_index(plain)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options: Any = {"device_map": places, "main_device": "cpu", "offload_dir": str(tmp_path)}
    model = accelerate.dispatch_model(copy.deepcopy(plain), **options)
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    found = attribute(model, index, rows, groups=GROUPS, effects=True, batch_size=4)
    assert_equal(found, attribute(plain, index, rows, groups=GROUPS, effects=True, batch_size=4), 1e-6)


def most_layers_at_once(model: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest number of layers of which any weight was in memory at a time."""
    layer_of = {id(module): number for number, layer in enumerate(model.model.layers) for module in layer.modules()}
    alive: list[tuple[int, Any]] = []
    counts = [0]
    put = hooks.set_module_tensor_to_device

    def putting(module: Any, name: str, *args: Any, **options: Any) -> None:
        put(module, name, *args, **options)
        parameter = getattr(module, name)
        if id(module) in layer_of and parameter.device.type != "meta":
            alive.append((layer_of[id(module)], weakref.ref(parameter)))
            alive[:] = [(layer, ref) for layer, ref in alive if ref() is not None]
            counts.append(len({layer for layer, _ in alive}))

    monkeypatch.setattr(hooks, "set_module_tensor_to_device", putting)
    attribute(model, build_index(model), rows, groups=GROUPS, effects=True)
    monkeypatch.undo()
    return max(counts)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_backward_pass_holds_the_weights_of_one_layer(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offloaded(build_model(architecture, VOCABULARY, num_hidden_layers=5), "disk", tmp_path)
    # As one layer is let go, the next one's first weight is there.
    assert most_layers_at_once(model, some_rows(), monkeypatch) <= 2
    # That the measure measures: without it all would be held.
    monkeypatch.setattr(attribution, "_recomputed", lambda model: nullcontext())
    assert most_layers_at_once(model, some_rows(), monkeypatch) == 5


def attributed(rank: int, world: int, folder: str) -> None:
    """One process of several; the last job has fewer rows than there are processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = build_model("mixtral", VOCABULARY)
    for count in (7, 1):
        found = attribute(model, build_index(model), some_rows(count), groups=GROUPS, effects=True, batch_size=2)
        found.save(Path(folder) / f"{count}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    mp.spawn(attributed, (2, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    model = build_model("mixtral", VOCABULARY)
    for count in (7, 1):
        wanted = attribute(model, build_index(model), some_rows(count), groups=GROUPS, effects=True, batch_size=2)
        for rank in range(2):
            assert_equal(Statistics.load(tmp_path / f"{count}-{rank}.safetensors"), wanted, 2e-3)
