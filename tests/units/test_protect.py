"""Protected units keep their bits under every optimiser; everything else trains."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch.optim.optimizer import _global_optimizer_post_hooks as post_hooks
from transformers import Trainer, TrainingArguments

from keelguard.errors import FailureError, UsageError
from keelguard.units.index import Slice, UnitIndex, build_index, parameters_by_name
from keelguard.units.protect import protect
from tiny_models import ARCHITECTURES, fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def some_units(index: UnitIndex, share: float = 0.3, seed: int = 0) -> torch.Tensor:
    """A random mask with the first and the last unit in it."""
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(seed)) < share
    mask[0] = mask[-1] = True
    return mask


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters_by_name(model).items()}


def assert_frozen(slices: list[Slice], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """The slices kept their bits, and in their parameters most else moved (a bias of keys has no gradient)."""
    for piece in slices:
        assert torch.equal(piece.of(before[piece.parameter]), piece.of(after[piece.parameter])), piece.parameter
    for name in {piece.parameter for piece in slices}:
        free = torch.ones_like(before[name], dtype=torch.bool)
        for piece in slices:
            if piece.parameter == name:
                piece.put(free, 0)
        moved = before[name] != after[name]
        assert not free.any() or moved[free].float().mean() > 0.6, name


def backward(model: Any, seed: int = 0) -> None:
    """The gradient of a batch of random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def train(model: Any, optimizers: list[torch.optim.Optimizer], steps: int = 3, clip: float | None = 1.0) -> None:
    for step in range(steps):
        backward(model, step)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def optimizers_for(model: Any, kind: str) -> list[torch.optim.Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return [torch.optim.SGD(trained, lr=0.05, momentum=0.9)]
    if kind == "adamw":
        return [torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)]
    square = [p for p in trained if p.ndim == 2]
    return [
        torch.optim.Muon(square, lr=1e-2, weight_decay=0.5),
        torch.optim.AdamW([p for p in trained if p.ndim != 2], lr=1e-2),
    ]


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_units_keep_their_bits(architecture: str, kind: str):
    model = fresh_model(architecture).model
    index = build_index(model)
    mask = some_units(index)
    optimizers = optimizers_for(model, kind)
    train(model, optimizers)  # Momentum that would go on moving the units.
    before = snapshot(model)
    with protect(model, index, mask):
        train(model, optimizers)
    assert_frozen(index.slices(mask), before, snapshot(model))


def test_without_protection_a_zero_gradient_does_not_freeze():
    """The control: what `protect` must do beyond gradients."""
    model = fresh_model().model
    index = build_index(model)
    slices = index.slices(some_units(index))
    optimizers = optimizers_for(model, "adamw")
    train(model, optimizers)
    before = snapshot(model)
    backward(model)
    for piece in slices:
        piece.put(parameters_by_name(model)[piece.parameter].grad, 0)  # pyright: ignore[reportArgumentType]
    optimizers[0].step()
    after = snapshot(model)
    assert not any(torch.equal(p.of(before[p.parameter]), p.of(after[p.parameter])) for p in slices)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox"])
def test_a_value_row_that_channels_share_is_frozen_if_any_of_them_is(architecture: str):
    model = fresh_model(architecture).model
    index = build_index(model, attention="channel")
    block = next(block for block in index.blocks if block.kind == "channel")
    mask = torch.zeros(len(index), dtype=torch.bool)
    mask[block.start] = True
    before = snapshot(model)
    with protect(model, index, mask):
        train(model, optimizers_for(model, "adamw"))
    after = snapshot(model)
    assert_frozen(index.slices(mask), before, after)
    name, rows = block.parts[0].parameter, block.parts[0].rows[0]
    assert torch.equal(before[name][rows], after[name][rows])


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mixtral"])
def test_gradient_clipping_does_not_count_frozen_rows(architecture: str):
    model = fresh_model(architecture).model
    index = build_index(model)
    mask = some_units(index, 0.6)
    backward(model)
    for piece in index.slices(mask):
        piece.put(parameters_by_name(model)[piece.parameter].grad, 0)  # pyright: ignore[reportArgumentType]
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    backward(model)
    with protect(model, index, mask):
        waiting = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert torch.equal(waiting, expected)
        model.zero_grad()
        backward(model)
        found = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(found, expected)


def test_free_weights_train_as_if_the_frozen_ones_were_put_back_by_hand():
    model = fresh_model().model
    index = build_index(model)
    slices = index.slices(some_units(index))
    twin = copy.deepcopy(model)
    with protect(model, index, some_units(index)):
        train(model, [torch.optim.AdamW(model.parameters(), lr=1e-3)], clip=None)
    kept = snapshot(twin)
    named = parameters_by_name(twin)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    for step in range(3):
        backward(twin, step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for piece in slices:
                piece.put(named[piece.parameter], piece.of(kept[piece.parameter]))
    for name, found in snapshot(model).items():
        assert torch.equal(found, named[name]), name


def test_others_train_or_freeze_as_asked():
    for others in ("train", "freeze"):
        model = fresh_model("gpt_neox").model
        index = build_index(model)
        mask = some_units(index)
        units = {part.parameter for block in index.blocks for part in block.parts}
        optimizers = optimizers_for(model, "adamw")
        backward(model)  # A gradient that waits for the next step, too, must not reach what is frozen.
        before = snapshot(model)
        with protect(model, index, mask, others=others):
            train(model, optimizers)
        after = snapshot(model)
        assert_frozen(index.slices(mask), before, after)
        for name in set(before) - units:
            assert torch.equal(before[name], after[name]) == (others == "freeze"), (name, others)
        assert all(p.requires_grad for p in model.parameters())


def test_removal_restores_normal_training():
    model = fresh_model().model
    index = build_index(model)
    mask = some_units(index)
    protection = protect(model, index, mask, others="freeze")
    optimizers = optimizers_for(model, "adamw")
    train(model, optimizers)
    protection.remove()
    protection.remove()
    before = snapshot(model)
    train(model, optimizers_for(model, "adamw"))
    after = snapshot(model)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not any(torch.equal(p.of(before[p.parameter]), p.of(after[p.parameter])) for p in index.slices(mask))


def test_other_models_are_left_alone_and_a_discarded_model_goes():
    model, other = fresh_model().model, fresh_model().model
    index = build_index(model)
    protect(model, index, some_units(index))
    before = snapshot(other)
    train(other, optimizers_for(other, "adamw"))
    after = snapshot(other)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    hooks = len(post_hooks)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(post_hooks) == hooks - 1


def test_what_is_unfrozen_later_is_protected_too():
    model = fresh_model().model.requires_grad_(False)
    index = build_index(model)
    mask = some_units(index)
    before = snapshot(model)
    with protect(model, index, mask):
        model.requires_grad_(True)
        train(model, optimizers_for(model, "adamw"))
    assert_frozen(index.slices(mask), before, snapshot(model))


def test_the_end_of_the_context_notices_what_got_past():
    model = fresh_model().model
    index = build_index(model)
    protection = protect(model, index, some_units(index))
    protection.check()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    with pytest.raises(FailureError, match=r"q_proj.*changed"), protection:
        pass


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_bfloat16_with_accumulation_and_checkpointing(architecture: str):
    model = fresh_model(architecture).model.bfloat16().train()
    model.gradient_checkpointing_enable()
    index = build_index(model)
    mask = some_units(index)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    before = snapshot(model)
    with protect(model, index, mask):
        for step in range(4):
            backward(model, step)
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert_frozen(index.slices(mask), before, snapshot(model))


def run_trainer(model: Any, folder: Path, steps: int = 3, **options: Any) -> None:
    ids = torch.randint(0, model.config.vocab_size, (16, 10), generator=torch.Generator().manual_seed(1)).tolist()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=1e-2,
            weight_decay=0.5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # pyright: ignore[reportArgumentType]
    )
    trainer.train()


def test_transformers_trainer(tmp_path: Path):
    model = fresh_model().model
    index = build_index(model)
    mask = some_units(index)
    before = snapshot(model)
    with protect(model, index, mask):
        run_trainer(model, tmp_path)
    assert_frozen(index.slices(mask), before, snapshot(model))


def lora(model: Any, **options: Any) -> Any:
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options}))


@pytest.mark.parametrize("when", ["index first", "adapter first"])
def test_lora_merged_weights_of_frozen_units_keep_their_bits(when: str, tmp_path: Path):
    plain = fresh_model().model
    before = snapshot(plain)
    index = build_index(plain)
    model = lora(plain)
    if when == "adapter first":
        index = build_index(model)
    mask = some_units(index)
    with protect(model, index, mask):
        train(model, optimizers_for(model, "adamw"))
        run_trainer(model, tmp_path)
    merged = snapshot(model.merge_and_unload())
    assert_frozen(index.slices(mask), before, merged)


def test_lora_is_clean_from_the_start():
    model = lora(fresh_model().model)
    index = build_index(model)
    with protect(model, index, some_units(index)) as protection:
        protection.check()
        for piece in index.slices(some_units(index)):
            matrix = f"{piece.parameter.removesuffix('.weight')}.lora_{'AB'[piece.dim == 0]}.default.weight"
            assert not piece.of(parameters_by_name(model)[matrix]).any()


def test_lora_with_trained_biases_and_others_frozen():
    plain = fresh_model("gpt_neox").model
    before = snapshot(plain)
    index = build_index(plain)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "embed_out"]
    model = lora(plain, target_modules=targets, bias="all")
    mask = some_units(index)
    with protect(model, index, mask, others="freeze"):
        train(model, optimizers_for(model, "adamw"))
    merged = snapshot(model.merge_and_unload())
    assert_frozen(index.slices(mask), before, merged)
    units = {part.parameter for block in index.blocks for part in block.parts}
    assert all(torch.equal(before[name], merged[name]) for name in set(before) - units)


def test_an_adapter_attached_later_is_found_at_the_first_step():
    plain = fresh_model().model
    before = snapshot(plain)
    index = build_index(plain)
    mask = some_units(index)
    with protect(plain, index, mask):
        model = lora(plain)
        train(model, optimizers_for(model, "adamw"))
    assert_frozen(index.slices(mask), before, snapshot(model.merge_and_unload()))


def test_adapters_elsewhere_do_not_matter():
    plain = fresh_model().model
    index = build_index(plain)
    mask = torch.zeros(len(index), dtype=torch.bool)
    mask[next(block.start for block in index.blocks if block.kind == "mlp")] = True
    before = snapshot(plain)
    model = lora(plain, target_modules=["q_proj", "v_proj"], use_dora=True)
    with protect(model, index, mask):
        train(model, optimizers_for(model, "adamw"))
    after = snapshot(model.merge_and_unload())
    assert all(torch.equal(p.of(before[p.parameter]), p.of(after[p.parameter])) for p in index.slices(mask))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_lora_weights": False}, "already moves"),
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True, "target_modules": ["dense_h_to_4h"]}, "lora_bias"),
        ({"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}, "ParamWrapper"),
    ],
)
def test_adapters_that_cannot_be_kept_off_are_refused(options: dict[str, Any], named: str):
    text = str(options)
    architecture = "mixtral" if "experts" in text else "gpt_neox" if "dense" in text else "llama"
    plain = fresh_model(architecture).model
    index = build_index(plain)
    model = lora(plain, **options)
    with pytest.raises(UsageError, match=rf"(?s){named}.*merge_and_unload"):
        protect(model, index, some_units(index))


def test_other_kinds_of_adapters_are_refused():
    plain = fresh_model().model
    index = build_index(plain)
    model = get_peft_model(
        plain, IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with pytest.raises(UsageError, match=r"ia3.*merge_and_unload"):
        protect(model, index, some_units(index))


def test_an_index_of_another_model_is_refused():
    index = build_index(fresh_model("llama").model)
    with pytest.raises(UsageError, match="not in the model"):
        protect(fresh_model("gpt_neox").model, index, some_units(index))
