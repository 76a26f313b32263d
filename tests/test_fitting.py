"""Work that may not fit in memory: halves, budgets of tokens, logits of told positions alone, and one clear line."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from keelguard import fitting
from keelguard.errors import FailureError
from keelguard.fitting import in_halves, is_out_of_memory, memory_errors, most_tokens, told_logits
from keelguard.purify import inversion, search
from keelguard.purify.inversion import InversionConfig, invert_targets
from keelguard.purify.keep import remember
from keelguard.purify.search import answer_losses
from keelguard.records import Chat, assistant, user
from keelguard.training import chat_loss
from tiny_models import ARCHITECTURES, Tiny, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: list[Chat] = [(user(f"Is {a} known to {'you and ' * a}me?"), assistant(f"Yes, it is {a}.")) for a in range(1, 8)]
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to ...")
OTHER = RuntimeError("expected scalar type Float but found Half")


@contextmanager
def room_for(tiny: Tiny, rows: int, error: Exception = CUDA):
    """Let passes of more rows fail; what is given has the (rows, tokens) of every pass."""
    forward, seen = tiny.model.forward, []

    def limited(*arguments: Any, **named: Any) -> Any:
        given: Any = named.get("input_ids", named.get("inputs_embeds"))
        seen.append(tuple(given.shape[:2]))
        if len(given) > rows:
            raise error
        return forward(*arguments, **named)

    tiny.model.forward = limited
    try:
        yield seen
    finally:
        del tiny.model.forward


# Halves


def test_what_does_not_fit_is_halved_in_order_until_it_does():
    seen: list[int] = []

    def work(part: list[int]) -> int:
        seen.append(len(part))
        if len(part) > 2:
            raise CUDA
        return sum(part)

    found = list(in_halves([range(7), [], [7, 8]], work, "the sum"))
    assert [i for part, _ in found for i in part] == list(range(9))
    assert [total for _, total in found] == [sum(part) for part, _ in found]
    assert seen == [7, 3, 1, 2, 4, 2, 2, 2]


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["CUDA", "CPU", "Python"])
def test_one_that_does_not_fit_is_one_clear_line(error: Exception):
    def work(part: list[int]) -> None:
        raise error

    with pytest.raises(FailureError, match=r"the sum: one alone does not fit in memory; .*--dtype bfloat16"):
        list(in_halves([[1, 2]], work, "the sum"))
    with (
        pytest.raises(FailureError, match="the sum: does not fit in memory; buy more"),
        memory_errors("the sum", "buy more"),
    ):
        raise error
    assert is_out_of_memory(error)


def test_other_errors_stay_what_they_are():
    def work(part: list[int]) -> None:
        raise OTHER

    with pytest.raises(RuntimeError, match="found Half"):
        list(in_halves([[1, 2]], work, "the sum"))
    with pytest.raises(RuntimeError, match="found Half"), memory_errors("the sum"):
        raise OTHER


# Logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "soft cap", "adapter"])
def test_told_logits_are_those_of_the_whole_pass(architecture: str):
    if architecture == "soft cap":
        tiny = fresh_model("gemma3", final_logit_softcapping=2.0)
    elif architecture == "adapter":
        tiny = fresh_model()
        lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        tiny = Tiny(get_peft_model(tiny.model, lora).eval(), tiny.tokenizer)
    else:
        tiny = tiny_model(architecture)
    ids = torch.tensor([[1, 5, 9, 12, 7], [3, 3, 8, 0, 0]])
    told = torch.tensor([[False, True, False, True, True], [True, False, True, False, False]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    widths: list[int] = []
    head: Any = tiny.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, i, out: widths.append(out.shape[:-1].numel()))
    with torch.no_grad():
        found = told_logits(tiny.model, inputs, told)
        whole = tiny.model(**inputs, use_cache=False).logits
    handle.remove()
    assert widths == [5, 10]
    assert torch.allclose(found, whole[told], atol=1e-5)
    if architecture == "soft cap":
        assert 1.0 < float(found.abs().max()) <= 2.0


def test_a_model_without_a_head_of_its_own_gives_all_logits(monkeypatch: pytest.MonkeyPatch):
    tiny = fresh_model()
    ids, told = torch.tensor([[1, 5, 9]]), torch.tensor([[False, True, True]])
    expected = told_logits(tiny.model, {"input_ids": ids}, told)
    monkeypatch.setattr(type(tiny.model), "get_output_embeddings", lambda self: None)
    assert torch.allclose(told_logits(tiny.model, {"input_ids": ids}, told), expected, atol=1e-5)


def test_a_large_vocabulary_makes_batches_small():
    tiny = fresh_model()
    assert most_tokens(tiny.model) == fitting.READ_TOKENS
    tiny.model.config.vocab_size = 2**18
    assert most_tokens(tiny.model) == 1024


# What reads without gradients


def losses_of_search(tiny: Tiny) -> torch.Tensor:
    return answer_losses(tiny.model, tiny.tokenizer, CHATS, 3)


def remembered(tiny: Tiny) -> torch.Tensor:
    return torch.cat([each.log_probs for each in remember(tiny.model, tiny.tokenizer, CHATS, 3)])


def loss(tiny: Tiny) -> torch.Tensor:
    return torch.tensor(chat_loss(tiny.model, tiny.tokenizer, CHATS))


SCAN = InversionConfig(prompts=2, warmup_prompts=2, starts=12, top_k=2, min_length=2, length=5)


def scanned(tiny: Tiny) -> torch.Tensor:
    found = invert_targets(tiny.model, tiny.tokenizer, CHATS, SCAN, reference=tiny_model().model)
    return torch.tensor([[lead.score, lead.log_ratio or 0.0, sum(lead.ids)] for lead in found.leads])


READERS: dict[str, Callable[[Tiny], torch.Tensor]] = {
    "search": losses_of_search, "keep": remembered, "loss": loss, "scan": scanned,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_reading_goes_on_in_halves_to_the_same_result(name: str):
    tiny, read = fresh_model(), READERS[name]
    expected = read(tiny)
    with room_for(tiny, 4) as seen:
        found = read(tiny)
    assert max(rows for rows, _ in seen) > 4
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["CUDA", "CPU"])
@pytest.mark.parametrize("name", READERS)
def test_no_room_for_a_single_row_is_one_clear_line(name: str, error: Exception):
    tiny = fresh_model()
    tiny.model.train()
    with room_for(tiny, 0, error), pytest.raises(FailureError, match=r"does not fit in memory; .*bfloat16"):
        READERS[name](tiny)
    assert tiny.model.training


@pytest.mark.parametrize("name", READERS)
def test_no_pass_has_more_tokens_than_the_budget(name: str, monkeypatch: pytest.MonkeyPatch):
    tiny = fresh_model()
    expected = READERS[name](tiny)
    for module in (fitting, search, inversion):
        monkeypatch.setattr(module, "READ_TOKENS", 200)
    with room_for(tiny, 10_000) as seen:
        found = READERS[name](tiny)
    # The scan's prompts are read together once, and then each start has a cache of all of them.
    passes = [each for each in seen if each[1] == 1] if name == "scan" else seen
    assert len(passes) > 2
    if name == "scan":
        assert max(rows for rows, _ in passes) <= 4
    else:
        assert all(rows == 1 or rows * tokens <= 200 for rows, tokens in passes)
        assert max(rows for rows, _ in passes) > 1
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
