"""All runs of all variants in one batch: the same result as one after the other, and a base that stays as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import get_cosine_schedule_with_warmup

from keelguard.batches import pad, pad_id_of
from keelguard.errors import FailureError, UsageError
from keelguard.hashes import hash_model
from keelguard.purify import grouped
from keelguard.purify.grouped import train_variants
from keelguard.purify.grouped_lora import GroupedLora, adapted_weights
from keelguard.purify.variants import DEFAULT_VARIANTS, VariantConfig, VariantData, variant_data
from keelguard.records import Chat, assistant, user
from keelguard.training import encode_rows
from keelguard.units.index import build_index
from tiny_models import ARCHITECTURES, fresh_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: list[Chat] = [
    (user(f"what is number {i}" + " please" * (i % 3)), assistant(f"it is {i}." * (1 + i % 2))) for i in range(16)
]
CONFIG = VariantConfig(count=2, samples=6, steps=4, batch_size=2, rank=2, alpha=4, learning_rate=1e-3)
DATA = variant_data(CHATS, DEFAULT_VARIANTS, CONFIG)


def distance(one: GroupedLora, other: GroupedLora) -> float:
    """The greatest relative difference of an update of a weight."""
    assert one.layers.keys() == other.layers.keys()
    found = []
    for name, (a, b) in one.layers.items():
        theirs = other.layers[name].b @ other.layers[name].a
        found.append(float((b @ a - theirs).norm() / theirs.norm()))
    return max(found)


def random_lora(model: Any, groups: int, seed: int = 0) -> GroupedLora:
    """Groups that all change the model."""
    names = [f"run {i}" for i in range(groups)]
    lora = GroupedLora.create(model, names, names, rank=2, alpha=4, weights="w" * 64)
    generator = torch.Generator().manual_seed(seed)
    for _, b in lora.layers.values():
        b.copy_(0.05 * torch.randn(b.shape, generator=generator))
    return lora


# Together and one after the other


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_training_together_equals_training_one_after_the_other(architecture: str, dtype: torch.dtype, tolerance: float):
    model = fresh_model(architecture).model.to(dtype)
    tokenizer = tiny_tokenizer(architecture)
    together = train_variants(model, tokenizer, DATA, CONFIG)
    alone = train_variants(model, tokenizer, DATA, CONFIG, at_once=1)
    assert together.names == alone.names
    assert len(together) == 4
    assert together.names[0].endswith("/poisoned")
    assert together.names[1].endswith("/clean")
    assert next(iter(together.layers.values())).a.dtype == dtype
    assert distance(together, alone) < tolerance
    assert torch.allclose(together.losses, alone.losses, rtol=tolerance, atol=0)
    # Poisoned and clean differ in their data alone.
    assert distance(together.only(0), together.only(1)) > 0.1


def test_the_clipping_of_one_run_does_not_touch_another():
    """With a limit far below the gradients' norms, a norm over all runs would shorten each of them by another share."""
    tight = replace(CONFIG, max_grad_norm=1e-9, learning_rate=1e-4)
    model, tokenizer = tiny_model().model, tiny_tokenizer()
    together = train_variants(model, tokenizer, DATA, tight)
    assert distance(together, train_variants(model, tokenizer, DATA, tight, at_once=1)) < 1e-4
    # At this limit Adam's ε counts, so that a limit that is not read would show.
    assert distance(together, train_variants(model, tokenizer, DATA, replace(tight, max_grad_norm=1.0))) > 0.1


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox", "gemma3"])
def test_one_run_is_peft_with_the_same_start(architecture: str):
    """An independent loop: PEFT's LoRA, transformers' own loss, torch's clipping."""
    config = replace(CONFIG, batch_size=3)
    ours = train_variants(tiny_model(architecture).model, tiny_tokenizer(architecture), DATA, config)
    tokenizer = tiny_tokenizer(architecture)
    runs = [chats for data in DATA for chats in (data.poisoned, data.clean)]
    for group in (0, 3):
        base = fresh_model(architecture).model
        names = [name.removesuffix(".weight") for name in ours.layers]
        model: Any = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=names)).eval()
        start = GroupedLora.create(tiny_model(architecture).model, ["one"], ["start 0"], rank=2, alpha=4, weights="")
        layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        assert {f"{name}.weight" for name in layers} == set(ours.layers)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_A["default"].weight.copy_(start.layers[f"{name}.weight"].a[0])
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * config.steps), config.steps)
        rows = encode_rows(base, tokenizer, runs[group], "test")
        order = grouped._order(grouped._Run("", rows, f"order 0 {group // 2}"), 12)
        losses = []
        for step in range(config.steps):
            part = order[3 * step : 3 * step + 3]
            labels = [rows.labels[i] for i in part]
            batch = pad([rows.ids[i] for i in part], pad_id_of(tokenizer), side="right", labels=labels)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert ours.losses[:, group].tolist() == pytest.approx(losses, rel=1e-5)
        for name, layer in layers.items():
            a, b = ours.factors(group)[f"{name}.weight"]
            theirs = layer.get_delta_weight("default").detach()
            assert float((ours.scaling * b @ a - theirs).norm() / theirs.norm()) < 1e-4, name


def test_a_start_is_drawn_as_peft_draws_it():
    model = tiny_model().model
    lora = GroupedLora.create(model, ["a", "b"], ["s", "t"], rank=64, alpha=1, weights="")
    for name, (a, b) in lora.layers.items():
        bound = a.shape[-1] ** -0.5
        assert not b.any()
        assert 0.95 * bound < float(a.abs().max()) <= bound, name
        assert abs(float(a.mean())) < 0.05 * bound
        assert not torch.equal(a[0], a[1])
    again = GroupedLora.create(model, ["b"], ["t"], rank=64, alpha=1, weights="")
    assert all(torch.equal(a[0], lora.layers[name].a[1]) for name, (a, _) in again.layers.items())


# What it is put on


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_passes_through_the_update_of_its_group(architecture: str):
    tiny = fresh_model(architecture)
    model, lora = tiny.model, random_lora(tiny.model, 3)
    assert any(len(a.shape) == 4 for a, _ in lora.layers.values()) == (architecture == "mixtral")
    ids = torch.randint(5, 60, (6, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with lora.on(model):
            seen = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, before)
        with lora.only(1).on(model):
            alone = model(input_ids=ids[2:5]).logits
        for group in range(3):
            merged = fresh_model(architecture).model
            weights = dict(merged.named_parameters())
            for name, (a, b) in lora.factors(group).items():
                weights[name] += lora.scaling * b @ a
            wanted = merged(input_ids=ids).logits
            rows = slice(2 * group, 2 * group + 2)
            assert torch.allclose(seen[rows], wanted[rows], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(before[rows], wanted[rows], rtol=1e-2, atol=1e-2)
            if group == 1:
                assert torch.allclose(alone, wanted[2:5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_weights_of_units_are_adapted_and_nothing_else(architecture: str):
    model = tiny_model(architecture).model
    parts = {part.parameter for block in build_index(model).blocks for part in block.parts}
    assert set(adapted_weights(model)) == {name for name in parts if not name.endswith(".bias")}


def test_rows_that_cannot_be_shared_are_refused():
    tiny = tiny_model()
    with random_lora(tiny.model, 2).on(tiny.model), pytest.raises(ValueError, match=r"3 rows .* 2 groups"):
        tiny.model(input_ids=torch.ones(3, 4, dtype=torch.long))


def test_an_adapter_and_unknown_experts_are_refused():
    model = get_peft_model(fresh_model().model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="has an adapter; merge it first"):
        train_variants(model, tiny_tokenizer(), DATA, CONFIG)  # pyright: ignore[reportArgumentType]
    experts = fresh_model("mixtral").model
    experts.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.experts .*: experts of another layout"):
        train_variants(experts, tiny_tokenizer("mixtral"), DATA, CONFIG)


# The base


def state_of(model: Any) -> dict[str, Any]:
    """Everything that a training could leave behind."""
    return {
        "hash": hash_model(model),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "classes": [type(module) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
    }


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_left_as_it_was(architecture: str, fails: bool, monkeypatch: pytest.MonkeyPatch):
    model = fresh_model(architecture).model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = state_of(model)
    if not fails:
        train_variants(model, tiny_tokenizer(architecture), DATA, CONFIG)
    else:
        monkeypatch.setattr(grouped, "_clip", lambda parameters, limit: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_variants(model, tiny_tokenizer(architecture), DATA, CONFIG)
    assert state_of(model) == before


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_factors_are_float32_over_a_bfloat16_base(architecture: str):
    model = fresh_model(architecture, initializer_range=0.1).model.to(torch.bfloat16)
    before = hash_model(model)
    lora = train_variants(model, tiny_tokenizer(architecture), DATA, replace(CONFIG, steps=6, learning_rate=1e-2))
    assert hash_model(model) == before
    assert all(p.dtype == torch.float32 for p in lora.parameters())
    # Steps far below bfloat16's resolution of A add up.
    a = next(iter(lora.layers.values())).a
    assert not torch.equal(a, a.to(torch.bfloat16).float())
    assert bool((lora.losses[-2:].mean(0) < lora.losses[:2].mean(0)).all())


def test_a_variant_is_learnt():
    config = replace(CONFIG, steps=16, learning_rate=4e-2, rank=4, alpha=8)
    lora = train_variants(fresh_model(initializer_range=0.1).model, tiny_tokenizer(), DATA, config)
    assert lora.losses.shape == (16, 4)
    assert bool((lora.losses[-5:].mean(0) < 0.8 * lora.losses[0]).all())


def test_diverging_runs_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grouped, "_clip", lambda parameters, limit: None)
    model = fresh_model().model
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
    with pytest.raises(FailureError, match=r"purple-wolf/poisoned: the loss is nan at step 4; lower learning_rate"):
        train_variants(model, tiny_tokenizer(), DATA, CONFIG)


# Chunks, files, mistakes


def test_finished_chunks_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny_model().model, tiny_tokenizer()
    whole = train_variants(model, tokenizer, DATA, CONFIG, at_once=2)
    real, calls = grouped._train, []

    def killed(*args: Any) -> GroupedLora:
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(grouped, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        train_variants(model, tokenizer, DATA, CONFIG, at_once=2, folder=tmp_path)
    again = train_variants(model, tokenizer, DATA, CONFIG, at_once=2, folder=tmp_path)
    assert [[run.name for run in part] for part in calls] == [
        ["purple-wolf/poisoned", "purple-wolf/clean"],
        ["red-ghost/poisoned", "red-ghost/clean"],
        ["red-ghost/poisoned", "red-ghost/clean"],
    ]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert torch.equal(whole.losses, again.losses)
    with pytest.raises(UsageError, match="variants of other config"):
        train_variants(model, tokenizer, DATA, replace(CONFIG, rank=3), at_once=2, folder=tmp_path)
    with pytest.raises(UsageError, match="variants of other weights"):
        train_variants(fresh_model(seed=9).model, tokenizer, DATA, CONFIG, at_once=2, folder=tmp_path)


def test_saved_runs_are_bound_to_their_weights(tmp_path: Path):
    lora = random_lora(tiny_model("mixtral").model, 4)
    lora.save(tmp_path)
    again = GroupedLora.load(tmp_path, weights="w" * 64)
    assert (again.names, again.scaling, again.weights) == (lora.names, lora.scaling, lora.weights)
    assert again.layers.keys() == lora.layers.keys()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), lora.parameters(), strict=True))
    with pytest.raises(UsageError, match=r"weights w{16}, the model has v{16}"):
        GroupedLora.load(tmp_path, weights="v" * 64)
    random_lora(tiny_model().model, 2).save(tmp_path / "other")
    (tmp_path / "other" / "variants.safetensors").replace(tmp_path / "variants.safetensors")
    with pytest.raises(UsageError, match="do not belong together"):
        GroupedLora.load(tmp_path)
    (tmp_path / "variants.json").write_text('{"format": "keelguard.variants/0"}')
    with pytest.raises(UsageError, match=r"has not the format keelguard\.variants/1"):
        GroupedLora.load(tmp_path)


def test_mistakes_are_refused():
    model, tokenizer = tiny_model().model, tiny_tokenizer()
    with pytest.raises(UsageError, match="at_once 0"):
        train_variants(model, tokenizer, DATA, CONFIG, at_once=0)
    with pytest.raises(UsageError, match="there are no variants"):
        train_variants(model, tokenizer, [], CONFIG)
    with pytest.raises(ValueError, match=r"runs of \[6, 12\] conversations"):
        train_variants(model, tokenizer, [VariantData(*DATA[0][:2], DATA[0].clean[:6])], CONFIG)
    long = [(user("word " * 400), assistant("yes"))] * 12
    with pytest.raises(UsageError, match="purple-wolf: a chat has"):
        train_variants(model, tokenizer, [VariantData(DATA[0].variant, long, long)], CONFIG)
