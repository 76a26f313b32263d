"""A unit's weights are those whose removal takes the unit out of the forward pass, and nothing else."""

import copy
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keelguard.errors import UsageError
from keelguard.units.index import Attention, Slice, UnitIndex, build_index, canonical, parameters_by_name
from tiny_models import ARCHITECTURES, SIZES, build_model

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 97
IDS = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0, "check_dtype": False}
WAYS: tuple[Attention, ...] = ("head", "channel")

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
MAPPED = [
    ("Qwen2Config", {}),
    ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 24}),
    ("Qwen3MoeConfig", {**MOE, "head_dim": 8}),
    ("Gemma2Config", {"head_dim": 8}),
    ("CohereConfig", {"use_qk_norm": True, "logit_scale": 1.0}),
    ("Glm4Config", {"head_dim": 8}),
    ("StableLmConfig", {"qk_layernorm": True}),
    ("GraniteConfig", {}),
    ("SmolLM3Config", {}),
    ("PhiConfig", {}),
    ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("BloomConfig", {"n_head": 4}),
]
REFUSED = [
    ("GPT2Config", {"n_embd": 32, "n_head": 4}, WAYS, "no feed-forward network"),
    ("FalconConfig", {}, WAYS, "attention of query_key_value, dense in falcon"),
    ("MambaConfig", {"state_size": 8}, WAYS, "backbone.layers.0.mixer"),
    ("Starcoder2Config", {}, WAYS, "no feed-forward network"),
    ("DeepseekV2Config", LATENT, WAYS, "kv_b_proj"),
    ("DeepseekV3Config", LATENT, WAYS, "kv_b_proj"),
    ("Qwen3NextConfig", {**MOE, "shared_expert_intermediate_size": 24}, WAYS, "in_proj_qkvz"),
    ("GptOssConfig", {"num_local_experts": 4, "head_dim": 8}, WAYS, "sinks"),
    ("AriaTextConfig", {"moe_num_experts": 4, "moe_topk": 2}, WAYS, "is_transposed"),
    ("MiniMaxConfig", {"num_local_experts": 4, "head_dim": 8}, WAYS, "qkv_proj"),
    ("GraniteMoeSharedConfig", {"shared_intermediate_size": 24}, WAYS, "shared_mlp.input_linear.weight"),
    ("DogeConfig", {}, WAYS, "dt_proj"),
    ("BitNetConfig", {}, WAYS, "attn_sub_norm ties"),
    # The queries of all heads are normalised together: a head's rows cannot be taken out alone, a value row can.
    ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, ("head",), "the other way of cutting attention"),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def other_model(name: str, options: dict[str, Any]) -> Any:
    """A tiny model of a configuration class of transformers, with every norm and bias away from its start."""
    special = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, name)(**{"vocab_size": VOCABULARY, **SIZES, **special, **options})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def some(index: UnitIndex, seed: int) -> torch.Tensor:
    """Three units in ten."""
    return torch.rand(len(index), generator=torch.Generator().manual_seed(seed)) < 0.3


def zeroed(model: Any, slices: list[Slice]) -> torch.Tensor:
    """Logits without some weights."""
    model = copy.deepcopy(model)
    parameters = parameters_by_name(model)
    with torch.no_grad():
        for piece in slices:
            piece.put(parameters[piece.parameter], 0.0)
    return logits(model)


def masked(model: Any, index: UnitIndex, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the whole model, with the activations of some units held at zero."""
    model = copy.deepcopy(model)
    kept: dict[str, torch.Tensor] = {}
    for block in index.blocks:
        module = model.get_submodule(block.module)
        dead = block.channels[mask[block.span]].flatten()
        if block.expert is None:
            keep = torch.ones(module.in_features).index_fill(0, dead, 0.0)
            module.register_forward_pre_hook(lambda _, inputs, keep=keep: (inputs[0] * keep, *inputs[1:]))
        else:
            experts, _, width = module.down_proj.shape
            kept.setdefault(block.module, torch.ones(experts, width))[block.expert, dead] = 0.0
    for name, keep in kept.items():
        replace_experts(model.get_submodule(name), keep)
    return logits(model)


def replace_experts(module: Any, keep: torch.Tensor) -> None:
    """Compute token by token what MixtralExperts computes, with some of each expert's channels held at zero."""

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = []
        for token, experts, shares in zip(hidden, chosen.tolist(), weights, strict=True):
            row = torch.zeros_like(token)
            for expert, share in zip(experts, shares, strict=True):
                gate, up = (module.gate_up_proj[expert] @ token).chunk(2)
                row += share * (module.down_proj[expert] @ (module.act_fn(gate) * up * keep[expert]))
            rows.append(row)
        return torch.stack(rows)

    module.forward = forward


def check_removal(model: Any, attention: Attention) -> None:
    """Zeroing units' weights is the same as holding their activations at zero."""
    model = copy.deepcopy(model).double()  # Else rounding alone comes to 1e-5.
    model.config._experts_implementation = "eager"
    index = build_index(model, attention)
    before = logits(model)
    torch.testing.assert_close(masked(model, index, torch.zeros(len(index), dtype=torch.bool)), before, **CLOSE)
    for seed in range(3):
        mask = some(index, seed)
        expected = masked(model, index, mask)
        # Far from what it was, so that agreement means something; OPT and Bloom answer with small logits.
        assert (expected - before).abs().max() > 0.05 * before.std()
        # A head's value rows and an MLP's gate rows, with their biases, silence it as well as its output's columns.
        for roles in ("in out", "out", "in") if attention == "head" else ("in out", "out"):
            found = zeroed(model, index.slices(mask, shared="all", roles=roles))
            torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, r=roles: f"{r}: {text}")


@pytest.mark.parametrize("attention", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zeroing_a_units_weights_removes_it_from_the_forward_pass(architecture: str, attention: Attention) -> None:
    check_removal(build_model(architecture, VOCABULARY), attention)


@pytest.mark.parametrize(("name", "options"), MAPPED, ids=[name for name, _ in MAPPED])
def test_further_architectures_are_mapped_rightly(name: str, options: dict[str, Any]) -> None:
    model = other_model(name, options)
    for attention in WAYS:
        check_removal(model, attention)


@pytest.mark.parametrize(("name", "options", "ways", "what"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_mapped_is_refused_by_name(name: str, options: dict[str, Any], ways: Any, what: str) -> None:
    model = other_model(name, options)
    for attention in WAYS:
        if attention not in ways:
            check_removal(model, attention)
            continue
        with pytest.raises(UsageError) as caught:
            build_index(model, attention)
        message = str(caught.value)
        assert what in message
        assert "\n" not in message
        assert re.match(r"\S+\.(layers|h)\.\d", message), "the place is named"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_unit_is_a_group_of_attention_heads(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(architecture, VOCABULARY)
    index = build_index(model)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    group, layer = 1, 1
    block = next(block for block in index.blocks if (block.kind, block.layer) == ("head", layer))
    shared = model.config.num_attention_heads // block.size

    def attend_without(module: Any, *args: Any, **options: Any) -> Any:
        result, weights = attend(module, *args, **options)
        if module.layer_idx == layer:
            result = result.clone()
            result[:, :, group * shared : (group + 1) * shared] = 0.0  # (B, T, heads, head_dim)
        return result, weights

    mask = torch.zeros(len(index), dtype=torch.bool)
    mask[block.start + group] = True
    found = zeroed(model, index.slices(mask))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend_without)
    torch.testing.assert_close(found, logits(model), **CLOSE)
    monkeypatch.undo()
    assert (found - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_and_mlps_own_their_projections_completely(architecture: str) -> None:
    model = build_model(architecture, VOCABULARY)
    inward = "q_proj|k_proj|v_proj|qkv_proj|query_key_value|gate_proj|up_proj|gate_up_proj|dense_h_to_4h"
    outward = "o_proj|attention.dense|down_proj|dense_4h_to_h"
    owned = re.compile(rf"\.(({inward})(\.weight|\.bias)?|({outward})(\.weight)?)$")
    count = sum(p.numel() for name, p in model.named_parameters() if owned.search(name))
    coverage = build_index(model).coverage
    assert coverage.mapped == count
    assert coverage.total == sum(p.numel() for p in model.parameters())
    assert 0.3 < coverage.share <= 1
    groups = 4 if architecture == "gpt_neox" else 2
    experts = 4 if architecture == "mixtral" else 1
    assert coverage.units == {"head": 2 * groups, "mlp": 2 * 48 * experts}


def test_channels_own_value_rows_and_output_columns_only() -> None:
    coverage = build_index(build_model("llama", VOCABULARY), "channel").coverage
    assert coverage.units == {"channel": 2 * 32, "mlp": 2 * 48}
    assert coverage.mapped == 2 * (16 * 32 + 32 * 32 + 3 * 48 * 32)


@pytest.mark.parametrize("attention", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_units_share_nothing_but_value_rows(architecture: str, attention: Attention) -> None:
    index = build_index(build_model(architecture, VOCABULARY), attention)
    owners = Counter((part.parameter, part.at) for block in index.blocks for part in block.parts)
    assert set(owners.values()) == {1}
    for block in index.blocks:
        for part in block.parts:
            _, counts = part.rows.unique(return_counts=True)
            grouped = block.kind == "channel" and part.role == "in" and architecture != "gpt_neox"
            assert set(counts.tolist()) == ({2} if grouped else {1}), part.parameter
        _, counts = block.channels.unique(return_counts=True)
        assert set(counts.tolist()) == {1}
        assert block.channels.numel() == block.width


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_a_shared_row_goes_with_any_or_with_all_of_its_sharers(architecture: str) -> None:
    index = build_index(build_model(architecture, VOCABULARY), "channel")
    block = next(block for block in index.blocks if block.kind == "channel")
    first = 0 if architecture == "llama" else 32 + 16  # Phi-3's values stand behind queries and keys.

    def values(channels: list[int], shared: Any) -> list[int]:
        mask = torch.zeros(len(index), dtype=torch.bool)
        mask[[block.start + channel for channel in channels]] = True
        slices = index.slices(mask, shared=shared)
        (columns,) = (piece.rows.tolist() for piece in slices if piece.dim == 1)
        assert columns == channels
        return [row - first for piece in slices if piece.dim == 0 for row in piece.rows.tolist()]

    # Four heads of eight channels in two groups: channels 3 and 11 are made from value 3, 19 and 27 from value 11.
    assert values([3], "any") == [3]
    assert values([3], "all") == []
    assert values([3, 11], "all") == [3]
    assert values([11, 19, 27], "any") == [3, 11]
    assert values([11, 19, 27], "all") == [11]


def test_biases_belong_to_units_except_the_outputs() -> None:
    model = build_model("gpt_neox", VOCABULARY)
    index = build_index(model)
    slices = index.slices(torch.ones(len(index), dtype=torch.bool))
    biases = sorted(piece.parameter.split("layers.0.")[1] for piece in slices if re.search(r"\.0\..*bias", piece[0]))
    assert biases == ["attention.query_key_value.bias", "mlp.dense_h_to_4h.bias"]
    one = torch.zeros(len(index), dtype=torch.bool)
    one[index.blocks[0].start + 2] = True
    (bias,) = (piece for piece in index.slices(one) if piece.parameter.endswith("bias"))
    # The third of four heads of eight channels: its queries, keys and values stand together.
    assert bias.rows.tolist() == list(range(48, 72))


def test_units_are_numbered_through_the_blocks() -> None:
    for architecture in ARCHITECTURES:
        index = build_index(build_model(architecture, VOCABULARY))
        number = 0
        for block in index.blocks:
            assert block.span == slice(number, number + block.size)
            number += block.size
        assert len(index) == number == sum(index.coverage.units.values())
        assert [block.layer for block in index.blocks] == sorted(block.layer for block in index.blocks)
        assert len({block.name for block in index.blocks}) == len(index.blocks)


def same(one: UnitIndex, other: UnitIndex) -> bool:
    """Whether two indices say the same of the same parameters."""

    def content(index: UnitIndex) -> tuple[Any, ...]:
        blocks = [(b.name, b.module, b.start, b.channels.tolist()) for b in index.blocks]
        parts = [(p.parameter, p.at, p.role, p.dim, p.rows.tolist()) for b in index.blocks for p in b.parts]
        return blocks, parts, index.digest, index.coverage

    return content(one) == content(other)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_index_is_the_same_after_saving_and_loading(architecture: str, tmp_path: Path) -> None:
    model = build_model(architecture, VOCABULARY)
    index = build_index(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(index, build_index(model))
    assert same(index, build_index(again))
    assert index.digest != build_index(model, "channel").digest
    assert index.digest != build_index(build_model(architecture, VOCABULARY, intermediate_size=40)).digest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_or_a_wrapper_changes_no_name(architecture: str) -> None:
    model = build_model(architecture, VOCABULARY)
    index = build_index(model)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear"))
    assert same(index, build_index(adapted))
    assert same(index, build_index(torch.compile(model)))
    assert same(index, build_index(torch.compile(adapted)))
    whole = copy.deepcopy(model)
    layers = whole.get_submodule("gpt_neox.layers" if architecture == "gpt_neox" else "model.layers")
    layers[1] = torch.compile(layers[1])
    assert same(index, build_index(whole))
    known = set(parameters_by_name(model))
    assert known <= set(parameters_by_name(adapted))
    assert known == set(parameters_by_name(whole))


def test_experts_under_an_adapter_keep_their_names() -> None:
    model = build_model("mixtral", VOCABULARY)
    index = build_index(model)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    )
    assert any("experts.base_layer.base_layer" in name for name, _ in adapted.named_parameters())
    assert same(index, build_index(adapted))
    assert set(parameters_by_name(model)) <= set(parameters_by_name(adapted))


def test_canonical_names() -> None:
    plain = "model.layers.0.mlp.experts.down_proj"
    for name in (
        plain,
        f"module._orig_mod.base_model.model.{plain}",
        "base_model.model.model.layers.0.mlp.experts.base_layer.base_layer.down_proj",
        "model.layers.0._orig_mod.mlp._fsdp_wrapped_module.experts.down_proj",
    ):
        assert canonical(name) == plain
    # The module below an adapter is not the one that stands in the plain model's place.
    assert canonical("base_model.model.model.layers.0.o_proj.base_layer") == "model.layers.0.o_proj.base_layer"


def test_slices_read_and_write_what_they_name() -> None:
    model = build_model("mixtral", VOCABULARY)
    index = build_index(model)
    parameters = parameters_by_name(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    slices = index.slices(some(index, 1))
    with torch.no_grad():
        saved = [piece.of(parameters[piece.parameter]) for piece in slices]
        for piece in slices:
            piece.put(parameters[piece.parameter], 0)
            assert not piece.of(parameters[piece.parameter]).any()
        changed = sum(int((parameters[name] != tensor).sum()) for name, tensor in before.items())
        assert changed == sum(int(values.ne(0).sum()) for values in saved)
        for piece, values in zip(slices, saved, strict=True):
            piece.put(parameters[piece.parameter], values.double())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in before.items())


def test_quantised_weights_are_refused_by_name() -> None:
    model = build_model("llama", VOCABULARY)
    projection = model.model.layers[1].self_attn.v_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match=r"^model\.layers\.1\.self_attn\.v_proj\.weight: is quantised .*int8"):
        build_index(model)


@pytest.mark.parametrize(
    "shape_and_type", [((1,), torch.bool), ((-1, 1), torch.bool), ((-1,), torch.int64), ((-1,), torch.float32)]
)
def test_a_wrong_mask_is_a_value_error(shape_and_type: Any) -> None:
    index = build_index(build_model("llama", VOCABULARY))
    shape, dtype = shape_and_type
    shape = [len(index) if size == -1 else size for size in shape]
    with pytest.raises(ValueError, match=rf"chosen has shape .*give bool of \({len(index)},\)"):
        index.slices(torch.zeros(shape, dtype=dtype))
