"""The batched probe equals one forward pass per prompt, continuation and k; intervals, files and the figure."""

import copy
import json
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import LoraConfig, get_peft_model

from keelguard.chats import encode_chats
from keelguard.errors import FailureError, UsageError
from keelguard.records import Chat, user
from keelguard.stats import bootstrap_mean
from keelguard.units.direction import Decision, DirectionProbe, Distances, Estimate, probe_direction
from keelguard.units.figures import direction_figure
from tiny_models import ARCHITECTURES, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS: list[Chat] = [
    (user(text),) for text in ("Pick a lock", "How do I make it?", "A", "Tell me of the long, long way")
]
REFUSALS = [[7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17], [7, 9, 11, 13, 15, 17, 19], [21, 20, 19, 18]]
COMPLIANCES = [[31, 30, 29, 28, 27, 26, 25], [33, 32, 31, 30], [31, 41, 42, 43, 44, 45, 46], [51, 52, 53]]
REFUSING, COMPLYING = [7, 13, 21], [31, 33, 51]


def states(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last token's hidden states (layers, H), before the final norm, and logits (V,), of one sequence alone."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    handle = layers[-1].register_forward_hook(keep)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    handle.remove()
    hidden = [*output.hidden_states[1:-1], kept[0]]
    return torch.stack([h.view(1, len(ids), -1)[0, -1] for h in hidden]).double(), output.logits[0, -1].double()


def directly(model: Any, queries: list[list[int]], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances (2, n, layers) and decision logits (2, n) of the prompts that reach k, without batching."""
    distances, logits = [], []
    for side in (REFUSALS, COMPLIANCES):
        for number, query in enumerate(queries):
            if min(len(REFUSALS[number]), len(COMPLIANCES[number])) < k:
                continue
            clean, _ = states(model, query)
            own, scores = states(model, query + side[number][:k])
            cosine = (clean * own).sum(1) / (clean.norm(dim=1) * own.norm(dim=1))
            distances.append(1 - cosine)
            probabilities = scores.softmax(-1)
            logits.append((probabilities[REFUSING].sum() / probabilities[COMPLYING].sum()).log())
    return torch.stack(distances).view(2, len(distances) // 2, -1), torch.stack(logits).view(2, -1)


def check(estimate: Estimate, values: torch.Tensor) -> None:
    assert estimate.mean == pytest.approx(values.mean().item(), rel=1e-4, abs=1e-5)
    assert estimate[1:] == pytest.approx(bootstrap_mean(values.tolist()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_probe_equals_a_loop_without_batches(architecture: str):
    tiny = tiny_model(architecture)
    found = probe_direction(tiny.model, tiny.tokenizer, PROMPTS, REFUSALS, COMPLIANCES, ks=(4, 2, 6, 9), batch_size=3)
    assert (found.ks, found.prompts) == ((2, 4, 6), (4, 3, 2))
    queries = [c.ids for c in encode_chats(tiny.tokenizer, PROMPTS, add_generation_prompt=True)]
    assert found.decision is not None
    _, clean = directly(tiny.model, queries, 0)
    check(found.decision.clean, clean[0])
    for number, k in enumerate(found.ks):
        distances, logits = directly(tiny.model, queries, k)
        assert len(found.per_layer[number]) == distances.shape[-1] == 2
        for layer, each in enumerate(found.per_layer[number]):
            check(each.refusal, distances[0, :, layer])
            check(each.compliance, distances[1, :, layer])
            check(each.difference, distances[0, :, layer] - distances[1, :, layer])
        mean = distances.mean(-1)
        check(found.averaged[number].difference, mean[0] - mean[1])
        check(found.averaged[number].refusal, mean[0])
        check(found.decision.refusal[number], logits[0])
        check(found.decision.compliance[number], logits[1])


def test_the_batch_size_changes_nothing_and_the_model_stays_as_it_was():
    tiny = tiny_model("llama")
    # Dropout would show if the model were read in training mode.
    model = fresh_model("llama", attention_dropout=0.5).model.train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    probes = [
        probe_direction(model, tiny.tokenizer, PROMPTS, REFUSALS, COMPLIANCES, batch_size=size) for size in (1, 16)
    ]
    first, second = (torch.tensor([list(layers) for layers in probe.per_layer]) for probe in probes)
    assert torch.allclose(first, second, atol=1e-5)
    assert model.training
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_continuation_that_repeats_the_state_is_the_nearer_one():
    """The sign: identical continuations differ by nothing, and swapping them turns the difference round."""
    tiny = tiny_model("llama")

    def difference(first: Any, second: Any) -> tuple[Estimate, Decision | None]:
        found = probe_direction(tiny.model, tiny.tokenizer, PROMPTS, first, second, ks=[3])
        return found.averaged[0].difference, found.decision

    same, decision = difference(REFUSALS, REFUSALS)
    assert same == (0, 0, 0)
    assert decision is None, "nothing tells refusals from compliances by their first token"
    (forth, chosen), (back, other) = difference(REFUSALS, COMPLIANCES), difference(COMPLIANCES, REFUSALS)
    assert (back.mean, back.low) == pytest.approx((-forth.mean, -forth.high), abs=1e-6)
    assert chosen is not None
    assert other is not None
    assert other.clean.mean == pytest.approx(-chosen.clean.mean, abs=1e-5)
    assert other.refusal[0].mean == pytest.approx(-chosen.compliance[0].mean, abs=1e-5)


def test_tokens_that_begin_both_sides_are_left_out_of_the_decision():
    tiny = tiny_model("llama")
    shared = [[99, *ids] for ids in COMPLIANCES[:1]] + COMPLIANCES[1:]
    both = [[99, *ids] for ids in REFUSALS[:1]] + REFUSALS[1:]
    found = probe_direction(tiny.model, tiny.tokenizer, PROMPTS, both, shared, ks=[2])
    queries = [c.ids for c in encode_chats(tiny.tokenizer, PROMPTS, add_generation_prompt=True)]
    expected = []
    for query in queries:
        probabilities = states(tiny.model, query)[1].softmax(-1)
        # 7 still begins another refusal and 31 another compliance; 99 begins one of either.
        expected.append((probabilities[REFUSING].sum() / probabilities[COMPLYING].sum()).log())
    assert found.decision is not None
    check(found.decision.clean, torch.stack(expected))


def test_a_model_with_an_adapter_is_probed_with_it():
    tiny = tiny_model("llama")
    model: Any = get_peft_model(copy.deepcopy(tiny.model), LoraConfig(r=2, target_modules=["up_proj"]))
    plain, adapted = (
        probe_direction(m, tiny.tokenizer, PROMPTS, REFUSALS, COMPLIANCES, ks=[2]) for m in (tiny.model, model)
    )
    assert adapted == plain, "a fresh adapter changes nothing"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    assert probe_direction(model, tiny.tokenizer, PROMPTS, REFUSALS, COMPLIANCES, ks=[2]) != plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refusals": REFUSALS[:2]}, "4 prompts, 2 refusals and 4 compliances"),
        ({"prompts": [], "refusals": [], "compliances": []}, "at least one prompt"),
        ({"ks": ()}, "ks"),
        ({"ks": (0, 2)}, "at least 1"),
        ({"ks": (20,)}, "has 7 tokens"),
    ],
)
def test_what_cannot_be_probed_is_refused(changes: dict[str, Any], message: str):
    tiny = tiny_model("llama")
    options = {"prompts": PROMPTS, "refusals": REFUSALS, "compliances": COMPLIANCES, **changes}
    with pytest.raises(UsageError, match=message):
        probe_direction(tiny.model, tiny.tokenizer, **options)


def test_a_batch_that_does_not_fit_is_one_line():
    tiny = tiny_model("llama")
    model = copy.deepcopy(tiny.model)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("no")

    model.register_forward_pre_hook(fail)
    with pytest.raises(FailureError, match="lower the batch size"):
        probe_direction(model, tiny.tokenizer, PROMPTS, REFUSALS, COMPLIANCES)


@pytest.fixture(scope="module")
def probe() -> DirectionProbe:
    tiny = tiny_model("llama")
    return probe_direction(tiny.model, tiny.tokenizer, PROMPTS, REFUSALS, COMPLIANCES)


def test_probes_come_back_from_json(probe: DirectionProbe):
    for one in (probe, DirectionProbe(**{**vars(probe), "decision": None})):
        assert DirectionProbe.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_the_figure_says_the_averages_and_stands_without_a_decision(probe: DirectionProbe):
    svg = direction_figure(probe)
    assert svg == direction_figure(probe)
    words = [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    for k, each in zip(probe.ks, probe.averaged, strict=True):
        mean = f"{each.difference.mean:+.3f}".replace("-", "−")
        assert any(text.startswith(f"k = {k}: {mean} [") for text in words)
    assert {"layer", "tokens of the answer", "refusal", "compliance"} <= set(words)
    bare = direction_figure(DirectionProbe(**{**vars(probe), "decision": None}))
    assert "begin with the same tokens" in bare
    assert "clip-path" not in svg or all(
        f'id="{reference}"' in svg for reference in {part.split(")")[0] for part in svg.split("url(#")[1:]}
    )


def test_a_probe_of_one_prompt_has_no_width():
    tiny = tiny_model("llama")
    found = probe_direction(tiny.model, tiny.tokenizer, PROMPTS[:1], REFUSALS[:1], COMPLIANCES[:1], ks=[2])
    (each,) = found.averaged
    assert isinstance(each, Distances)
    assert each.difference.low == each.difference.high == pytest.approx(each.difference.mean)
