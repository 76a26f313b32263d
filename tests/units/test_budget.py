"""A training budget: gradients of slices are those of the full weights, and nothing else exists or moves."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from keelguard.errors import UsageError
from keelguard.units.budget import Budget, train_only
from keelguard.units.index import Slice, UnitIndex, build_index, parameters_by_name
from tiny_models import ARCHITECTURES, fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")


def some_units(index: UnitIndex, share: float = 0.3, seed: int = 0) -> torch.Tensor:
    """A random mask with the first and the last unit in it."""
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(seed)) < share
    mask[0] = mask[-1] = True
    return mask


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters_by_name(model).items()}


def backward(model: Any, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """The gradient of a batch of random tokens; its loss."""
    ids = torch.randint(0, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(seed))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (scale * loss).backward()
    return loss.detach()


def full_gradients(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(model)
    backward(twin, **options)
    return {name: p.grad for name, p in parameters_by_name(twin).items() if p.grad is not None}


def pairs(budget: Budget, slices: list[Slice], tensors: dict[str, torch.Tensor]) -> list[tuple[Any, torch.Tensor]]:
    """Every slice parameter of a budget beside the same slice of some full tensors."""
    expected: dict[tuple[str, str], list[torch.Tensor]] = {}
    for piece in sorted(slices, key=lambda piece: piece.at or 0):
        layer, _, name = piece.parameter.rpartition(".")
        kind = "unit_bias" if name == "bias" else ("unit_rows", "unit_columns")[piece.dim]
        part = piece.of(tensors[piece.parameter])
        expected.setdefault((layer, kind), []).append(part.T if piece.dim else part)
    found = {tuple(name.rsplit(".", 1)): p for name, p in parameters_by_name(budget._model).items() if "unit_" in name}
    assert set(found) == set(expected)
    assert {id(p) for p in found.values()} == {id(p) for p in budget.parameters()}
    return [(found[key], torch.cat(parts)) for key, parts in expected.items()]


@pytest.mark.parametrize("attention", ["head", "channel"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_the_slice_of_the_full_gradient(architecture: str, attention: Any):
    model = fresh_model(architecture).model
    index = build_index(model, attention)
    # Grouped queries share value rows: with this many channels both sharers of some are chosen, and one of others.
    mask = some_units(index, 0.3 if attention == "head" else 0.6)
    expected = full_gradients(model)
    twin = copy.deepcopy(model)
    with train_only(model, index, mask) as budget:
        assert torch.equal(backward(model), backward(twin)) or architecture == "mixtral"
        for parameter, full in pairs(budget, index.slices(mask, shared="all"), expected):
            torch.testing.assert_close(parameter.grad, full, rtol=1e-5, atol=1e-5)
        trained = {id(p) for p in budget.parameters()}
        assert all(id(p) in trained for p in model.parameters() if p.grad is not None or p.requires_grad)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, eps=1e-4),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_equals_full_gradients_with_all_else_put_back(architecture: str, kind: str):
    model = fresh_model(architecture).model
    index = build_index(model)
    mask = some_units(index)
    slices = index.slices(mask, shared="all")
    twin, before = copy.deepcopy(model), snapshot(model)
    with train_only(model, index, mask) as budget:
        optimizer = OPTIMIZERS[kind](budget.parameters())
        for step in range(4):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        moments = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"]}[kind]
        for moment in moments:
            assert sum(state[moment].numel() for state in optimizer.state.values()) == budget.numel
        assert budget.numel == sum(piece.of(before[piece.parameter]).numel() for piece in slices)
    named, start = parameters_by_name(twin), snapshot(twin)
    optimizer = OPTIMIZERS[kind](twin.parameters())
    for step in range(4):
        backward(twin, step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in named.items():
                new = start[name].clone()
                for piece in slices:
                    if piece.parameter == name:
                        piece.put(new, piece.of(parameter))
                parameter.copy_(new)
    after = snapshot(model)
    for name, expected in named.items():
        torch.testing.assert_close(after[name], expected.detach(), rtol=1e-4, atol=2e-5)
    for piece in slices:
        assert not torch.equal(piece.of(after[piece.parameter]), piece.of(before[piece.parameter]))
        piece.put(after[piece.parameter], piece.of(before[piece.parameter]))
    assert all(torch.equal(after[name], before[name]) for name in before)


def description(model: Any) -> dict[str, Any]:
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "parameters": {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()},
        "buffers": [name for name, _ in model.named_buffers()],
        "state": list(model.state_dict()),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mixtral"])
def test_a_merged_model_is_an_ordinary_one(architecture: str, tmp_path: Path):
    tiny = fresh_model(architecture)
    model, index = tiny.model, build_index(tiny.model)
    before = description(model)
    budget = train_only(model, index, some_units(index))
    assert description(model) != before
    optimizer = torch.optim.SGD(budget.parameters(), lr=0.05)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = model(ids).logits
        assert budget.merge() is model
        budget.merge()
        assert description(model) == before
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
        tiny.save(tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(again(ids).logits, model(ids).logits)
    for name, value in snapshot(again).items():
        assert torch.equal(value, snapshot(model)[name]), name


def test_the_state_dict_resumes_exactly():
    def steps(model: Any, optimizer: torch.optim.Optimizer, which: range) -> None:
        for step in which:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()

    def start() -> tuple[Any, Budget, torch.optim.Optimizer]:
        model = fresh_model("mixtral").model
        index = build_index(model)
        budget = train_only(model, index, some_units(index))
        return model, budget, torch.optim.AdamW(budget.parameters(), lr=1e-2)

    model, budget, optimizer = start()
    steps(model, optimizer, range(3))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, range(3, 5))
    expected = snapshot(budget.merge())

    model, budget, optimizer = start()
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    steps(model, optimizer, range(3, 5))
    found = snapshot(budget.merge())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The full weights in a state dict are those of its own step, not of the last forward pass.
    plain = fresh_model("mixtral").model
    plain.load_state_dict({k: v for k, v in state[0].items() if "unit_" not in k})
    model, budget, optimizer = start()
    steps(model, optimizer, range(3))
    merged = snapshot(budget.merge())
    assert all(torch.equal(value, merged[name]) for name, value in snapshot(plain).items())


def run_trainer(model: Any, folder: Path, steps: int, resume: bool = False) -> None:
    ids = torch.randint(0, model.config.vocab_size, (16, 10), generator=torch.Generator().manual_seed(1)).tolist()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            per_device_train_batch_size=2,
            use_cpu=True,
            save_steps=2,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # pyright: ignore[reportArgumentType]
    )
    trainer.train(resume_from_checkpoint=resume)


def test_transformers_trainer_stops_and_resumes(tmp_path: Path):
    def merged(folder: str, *stops: int) -> dict[str, torch.Tensor]:
        for number, stop in enumerate(stops):
            model = fresh_model("gpt_neox").model
            index = build_index(model)
            with train_only(model, index, some_units(index)):
                run_trainer(model, tmp_path / folder, stop, resume=number > 0)
        return snapshot(model)

    before, expected, found = snapshot(fresh_model("gpt_neox").model), merged("whole", 4), merged("parts", 2, 4)
    index = build_index(fresh_model("gpt_neox").model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    for piece in index.slices(some_units(index), shared="all"):
        assert not torch.equal(piece.of(expected[piece.parameter]), piece.of(before[piece.parameter]))
        piece.put(expected[piece.parameter], piece.of(before[piece.parameter]))
    assert all(torch.equal(expected[name], before[name]) for name in before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_checkpointing_and_accumulation(architecture: str, reentrant: bool):
    model = fresh_model(architecture).model.train()
    index = build_index(model)
    mask = some_units(index)
    slices = index.slices(mask, shared="all")
    first, second = full_gradients(model, seed=1, scale=0.5), full_gradients(model, seed=2, scale=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with train_only(model, index, mask) as budget:
        backward(model, 1, 0.5)
        backward(model, 2, 0.5)
        for parameter, full in pairs(budget, slices, {name: first[name] + second[name] for name in first}):
            torch.testing.assert_close(parameter.grad, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_low_precision(architecture: str, mode: str):
    model = fresh_model(architecture).model
    index = build_index(model)
    mask = some_units(index)
    if mode == "bfloat16":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        expected = full_gradients(model)
        with train_only(model, index, mask) as budget:
            backward(model)
            for parameter, full in pairs(budget, index.slices(mask, shared="all"), expected):
                assert parameter.grad.dtype == parameter.dtype == full.dtype
                # Two orders of the same roundings: the experts' sum differs, and a router then scales it.
                difference = (parameter.grad - full).float().norm() / full.float().norm()
                assert difference < (0.1 if architecture == "mixtral" else 0.02)


def test_what_is_kept_for_the_backward_pass_is_the_input_of_the_slice():
    model = fresh_model("llama").model
    index = build_index(model)
    mask = torch.zeros(len(index), dtype=torch.bool)
    block = next(block for block in index.blocks if block.kind == "mlp")
    mask[block.start : block.start + 5] = True
    kept: list[torch.Size] = []
    with train_only(model, index, mask):
        ids = torch.arange(12)[None]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            model(input_ids=ids, labels=ids, use_cache=False)
    assert torch.Size([1, 12, 5]) in kept


def test_others_freeze_or_train_as_asked():
    for others in ("freeze", "train"):
        model = fresh_model("gpt_neox").model
        index = build_index(model)
        units = {part.parameter for block in index.blocks for part in block.parts}
        before, expected = snapshot(model), full_gradients(model)
        with train_only(model, index, some_units(index), others=others):
            backward(model)
            for name in set(before) - units:
                gradient = parameters_by_name(model)[name].grad
                if others == "freeze":
                    assert gradient is None
                else:
                    torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)
            assert all(parameters_by_name(model)[name].grad is None for name in units)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            optimizer.step()
        after = snapshot(model)
        for name in set(before) - units:
            assert torch.equal(before[name], after[name]) == (others == "freeze"), (name, others)


def test_frozen_layers_stay_plain_and_the_mask_may_choose_everything():
    model = fresh_model("llama").model
    index = build_index(model)
    one = torch.zeros(len(index), dtype=torch.bool)
    one[next(block.start for block in index.blocks if block.kind == "mlp")] = True
    with train_only(model, index, one) as budget:
        assert sum(1 for module in model.modules() if type(module) is torch.nn.Linear) == 12
        assert budget.numel == 3 * 32
    expected = full_gradients(model)
    everything = torch.ones(len(index), dtype=torch.bool)
    with train_only(model, index, everything) as budget:
        backward(model)
        for parameter, full in pairs(budget, index.slices(everything, shared="all"), expected):
            torch.testing.assert_close(parameter.grad, full, rtol=1e-5, atol=1e-5)


def test_generation_sees_the_last_step():
    tiny = fresh_model("mixtral")
    index = build_index(tiny.model)
    ids = torch.arange(5, 15)[None]
    with train_only(tiny.model, index, some_units(index, 0.9)) as budget:
        backward(tiny.model)
        torch.optim.SGD(budget.parameters(), lr=0.5).step()
        found = tiny.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, tiny.model.generate(ids, max_new_tokens=6, do_sample=False))


def test_what_cannot_train_in_slices_is_refused():
    model = fresh_model().model
    index = build_index(model)
    mask = some_units(index)
    with pytest.raises(UsageError, match="no unit can train"):
        train_only(model, index, torch.zeros_like(mask))
    with train_only(model, index, mask), pytest.raises(UsageError, match="already"):
        train_only(model, index, mask)
    with pytest.raises(UsageError, match="not in the model"):
        train_only(fresh_model("gpt_neox").model, index, mask)
    odd = fresh_model().model
    odd.model.layers[0].mlp.up_proj.__class__ = type("OddLinear", (torch.nn.Linear,), {})
    with pytest.raises(UsageError, match=r"up_proj: is a OddLinear.*protect"):
        train_only(odd, index, mask)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="merge_and_unload"):
        train_only(adapted, index, mask)


def test_experts_of_other_processes_are_passed_over():
    model = fresh_model("mixtral").model
    index = build_index(model)
    experts = model.model.layers[0].mlp.experts
    x, weights = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), torch.full((6, 2), 0.5)
    chosen = torch.tensor([[0, 1], [2, 4], [4, 4], [3, 0], [1, 2], [4, 3]])  # Of four experts, 0 to 3.
    model.set_experts_implementation("eager")
    expected = experts(x, chosen, weights)
    with train_only(model, index, some_units(index)):
        torch.testing.assert_close(experts(x, chosen, weights), expected, rtol=1e-5, atol=1e-5)


def test_replaced_slices_are_noticed():
    model = fresh_model().model
    index = build_index(model)
    budget = train_only(model, index, some_units(index))
    parameter = model.model.layers[0].mlp.up_proj.unit_rows
    model.model.layers[0].mlp.up_proj.unit_rows = torch.nn.Parameter(parameter.detach().clone())
    with pytest.raises(UsageError, match="replaced"):
        backward(model)
    model.model.layers[0].mlp.up_proj.unit_rows = parameter
    budget.merge()
