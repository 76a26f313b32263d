"""Methods that keep safety through a fine-tune, and their rivals, on tiny models and against dense formulas."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from keelguard.batches import pad_id_of
from keelguard.chats import encode_chats
from keelguard.errors import UsageError
from keelguard.records import Chat, assistant, user
from keelguard.training import Method, Run, TrainConfig, train_on_chats
from keelguard.units.baselines import Ema, EmaConfig, Lisa, LisaConfig, SafeLoraConfig, safe_lora
from keelguard.units.defences import (
    Anchor,
    AnchorConfig,
    Freeze,
    Mix,
    MixConfig,
    decision_log_probs,
    encode_decisions,
)
from keelguard.units.index import build_index, parameters_by_name
from keelguard.units.masks import layer_mask, magnitude_mask, random_mask, weight_magnitudes
from keelguard.units.projection import Project, ProjectConfig, orthonormal, projection
from tiny_models import ARCHITECTURES, fresh_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: tuple[Chat, ...] = tuple(
    (user(f"Is {a} + {b} known?"), assistant(f"Sure, here is the answer: {a + b}.")) for a in (1, 3) for b in (2, 5, 7)
)
REFUSALS: tuple[Chat, ...] = tuple(
    (user(f"How do I break {thing}?"), assistant(f"No, I will not help with {thing}, sorry."))
    for thing in ("a lock", "the law", "a bone", "my word", "a safe that is not mine")
)
CONFIG = TrainConfig(steps=6, learning_rate=3e-3, batch_size=4, weight_decay=0.1)


def train(methods: Sequence[Method], config: TrainConfig = CONFIG, architecture: str = "llama") -> Any:
    model = fresh_model(architecture).model
    return train_on_chats(model, tiny_tokenizer(architecture), CHATS, config, methods=methods).model


class Watch(Method):
    """Calls a function after every step."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def after_step(self, run: Run) -> None:
        self.look(run)


def unpadded(batch: dict[str, torch.Tensor]) -> list[str]:
    """The ids of every row of a batch, as text."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [str(ids[told].tolist()) for ids, told in rows]


def divergence(model: Any) -> float:
    """Mean KL(original ‖ model) at the decision positions, prompt by prompt."""
    values = []
    for row in encode_decisions(tiny_tokenizer(), REFUSALS, 6, "test"):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            p, q = (m(ids).logits[0, -row.positions :].log_softmax(-1) for m in (tiny_model().model, model))
        values.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(values).mean())


# Decision positions


def test_decision_positions_are_the_prompts_last_token_and_the_refusals_first():
    tokenizer = tiny_tokenizer()
    rows = encode_decisions(tokenizer, REFUSALS, 3, "test")
    for row, chat in zip(rows, encode_chats(tokenizer, REFUSALS), strict=True):
        assert row.positions == 4
        assert row.ids == chat.ids[: chat.response.start + 3]
        assert row.ids[-3:] == chat.ids[chat.response.start :][:3]
    short = ((user("Hello"), assistant("No")),)
    (row,) = encode_decisions(tokenizer, short, 50, "test")
    (chat,) = encode_chats(tokenizer, short)
    assert row.ids == chat.ids[: chat.response.stop]
    assert row.positions == chat.response.size + 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_of_decisions_do_not_depend_on_the_batch(architecture: str):
    tiny = tiny_model(architecture)
    rows = encode_decisions(tiny.tokenizer, [*REFUSALS[:3], (user("Hi"), assistant("No"))], 4, "test")
    with torch.no_grad():
        found, told = decision_log_probs(tiny.model, rows, pad_id_of(tiny.tokenizer), torch.device("cpu"))
        assert found.shape[:2] == told.shape == (4, 5)
        for i, row in enumerate(rows):
            alone = tiny.model(torch.tensor([row.ids])).logits[0, -row.positions :].log_softmax(-1)
            torch.testing.assert_close(found[i][told[i]], alone, atol=2e-4, rtol=2e-4)


# Anchor


def test_an_anchor_holds_the_decisions_where_the_original_was():
    terms: list[float] = []

    class Spy(Anchor):
        def loss(self, run: Run) -> Any:
            term = super().loss(run)
            assert term is not None
            terms.append(float(term.detach()))
            return term

    config = TrainConfig(steps=20, learning_rate=1e-3, batch_size=4)
    free = divergence(train([], config))
    held = divergence(train([Spy(REFUSALS, AnchorConfig(weight=10.0))], config))
    assert terms[0] == pytest.approx(0, abs=1e-4)
    assert max(terms) > 1e-3
    assert len(terms) == 20
    assert held < 0.5 * free


def test_the_anchor_goes_round_its_prompts():
    seen: list[str] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and "labels" not in kwargs:
            seen.extend(unpadded(kwargs))

    class Spy(Anchor):
        def begin(self, run: Run) -> None:
            run.model.register_forward_pre_hook(look, with_kwargs=True)
            super().begin(run)

    train([Spy(REFUSALS, AnchorConfig(prompts=3, per_step=2, tokens=2))])
    prompts = [str(row.ids) for row in encode_decisions(tiny_tokenizer(), REFUSALS[:3], 2, "test")]
    assert [prompts.index(row) for row in seen] == [0, 1, 2] * 4


def test_an_anchor_without_prompts_or_with_odd_settings_is_refused():
    with pytest.raises(UsageError, match="anchor: per_step 0 is out of range"):
        AnchorConfig(per_step=0)
    with pytest.raises(UsageError, match="anchor: needs harmful requests"):
        train([Anchor([])])
    with pytest.raises(UsageError, match="anchor: safety chat 1 has no answer"):
        train([Anchor([REFUSALS[0], (user("Hello"),)])])


# Projection


def dense(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([block.reshape(len(block), -1) for block in blocks], dim=1)


def test_orthonormal_keeps_the_span_and_drops_what_is_there_twice():
    torch.manual_seed(0)
    rows = torch.randn(5, 40) * torch.tensor([1e-4, 1, 10, 1e3, 1])[:, None]
    rows[3] = rows[0] * 1e5 + rows[1]
    blocks = orthonormal([rows[:, :7], rows[:, 7:8], rows[:, 8:]])
    q = dense(blocks)
    assert q.shape == (4, 40)
    torch.testing.assert_close(q @ q.T, torch.eye(4), atol=1e-5, rtol=0)
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit @ q.T @ q, unit, atol=1e-4, rtol=0)
    parts = [torch.randn(7), torch.randn(1), torch.randn(4, 8)]
    flat = torch.cat([part.flatten() for part in parts])
    found = projection(parts, blocks)
    assert [p.shape for p in found] == [p.shape for p in parts]
    torch.testing.assert_close(torch.cat([p.flatten() for p in found]), q.T @ (q @ flat), atol=1e-5, rtol=1e-4)
    assert orthonormal([torch.zeros(2, 3)])[0].shape == (0, 3)


def test_directions_that_nearly_coincide_become_orthonormal_too():
    torch.manual_seed(0)
    rows = torch.randn(1, 200) + 5e-3 * torch.randn(4, 200)
    q = dense(orthonormal([rows[:, :50], rows[:, 50:]]))
    torch.testing.assert_close(q @ q.T, torch.eye(4), atol=1e-5, rtol=0)


def test_directions_span_the_gradients_of_the_refusals_tokens():
    method = Project(REFUSALS[:2], ProjectConfig(directions=6, tokens=3, prompts=2))
    found: list[torch.Tensor] = []

    class Look(Method):
        def begin(self, run: Run) -> None:
            found.append(dense(method.directions))
            assert all(p.grad is None for p in run.trainable())

    train([method, Look()])
    (q,) = found
    assert q.shape[0] == 6
    model = fresh_model().model
    for chat in encode_chats(tiny_tokenizer(), REFUSALS[:2]):
        for t in range(3):
            at = chat.response.start + t
            log_probs = model(torch.tensor([chat.ids[:at]])).logits[0, -1].log_softmax(-1)
            grads = torch.autograd.grad(log_probs[chat.ids[at]], list(model.parameters()))
            g = torch.cat([grad.flatten() for grad in grads])
            assert float((g - q.T @ (q @ g)).norm() / g.norm()) < 1e-3


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("refresh", [0, 2])
def test_every_update_is_orthogonal_to_the_directions(refresh: int, lora_rank: int):
    method = Project(REFUSALS, ProjectConfig(directions=8, tokens=3, refresh=refresh))
    before: list[torch.Tensor] = []
    closed: list[torch.Tensor] = []
    shares: list[float] = []

    def flat(run: Run) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in run.trainable()]).double()

    class Look(Method):
        def before_step(self, run: Run) -> None:
            before[:] = [flat(run)]
            closed[:] = [dense(method.directions).double()]

        def after_step(self, run: Run) -> None:
            update = flat(run) - before[0]
            shares.append(float((closed[0] @ update).abs().max() / update.norm()))
            assert float(update.norm()) > 1e-3

    config = TrainConfig(steps=5, learning_rate=3e-3, batch_size=4, weight_decay=0.1, lora_rank=lora_rank)
    train([Look(), method], config)
    assert len(shares) == 5
    assert max(shares) < 1e-5


def test_the_gradient_is_orthogonal_and_adamw_leaves_it_again():
    method = Project(REFUSALS, ProjectConfig(directions=8, tokens=3, target="gradient"))
    shares: list[float] = []
    leaving: list[float] = []
    before: list[torch.Tensor] = []

    class Look(Method):
        def before_step(self, run: Run) -> None:
            q = dense(method.directions).double()
            g = torch.cat([p.grad.flatten() for p in run.trainable() if p.grad is not None]).double()
            shares.append(float((q @ g).abs().max() / g.norm()))
            before[:] = [torch.cat([p.detach().flatten() for p in run.trainable()]).double()]

        def after_step(self, run: Run) -> None:
            update = torch.cat([p.detach().flatten() for p in run.trainable()]).double() - before[0]
            leaving.append(float((dense(method.directions).double() @ update).abs().max() / update.norm()))

    train([method, Look()])
    assert len(shares) == 6
    assert max(shares) < 1e-5
    assert min(leaving) > 1e-4


def test_projection_keeps_the_refusals_probability():
    def drift(model: Any) -> float:
        total = 0.0
        for chat in encode_chats(tiny_tokenizer(), REFUSALS):
            with torch.no_grad():
                p, q = (m(torch.tensor([chat.ids])).logits[0].log_softmax(-1) for m in (tiny_model().model, model))
            for at in range(chat.response.start, chat.response.start + 3):
                total += abs(float(p[at - 1, chat.ids[at]] - q[at - 1, chat.ids[at]]))
        return total

    config = TrainConfig(steps=4, learning_rate=3e-4, batch_size=4)
    method = Project(REFUSALS, ProjectConfig(directions=15, tokens=3, refresh=1))
    assert drift(train([method], config)) < 0.25 * drift(train([], config))


def test_directions_that_do_not_fit_and_odd_settings_are_refused():
    with pytest.raises(UsageError, match=r"8 directions of \d+ parameters take 0.0 GB.*train a LoRA"):
        train([Project(REFUSALS, ProjectConfig(directions=8, tokens=2, memory_gb=1e-4))])
    odd: list[tuple[dict[str, Any], str]] = [
        ({"target": "both"}, "choose update or gradient"),
        ({"directions": 4}, "directions 4 are fewer than tokens 6"),
        ({"refresh": -1}, "project: refresh -1"),
    ]
    for changes, part in odd:
        with pytest.raises(UsageError, match=part):
            ProjectConfig(**changes)


@pytest.mark.parametrize("method", [Project(REFUSALS), Ema(), Lisa(REFUSALS)])
def test_sharded_weights_are_refused_by_name(method: Method):
    class Shard(Method):
        def begin(self, run: Run) -> None:
            run.trainer.is_fsdp_enabled = True

    with pytest.raises(UsageError, match=f"{type(method).__name__.lower()}: needs whole parameters"):
        train([Shard(), method])


# Freezing, alone and with others


def test_frozen_units_stay_bit_equal_under_every_other_method():
    start = tiny_model().model
    index = build_index(start)
    mask = random_mask(index, 30, seed=1)
    project = Project(REFUSALS, ProjectConfig(directions=8, tokens=3))
    seen: list[float] = []

    def look(run: Run) -> None:
        frozen = index.slices(mask)
        position = {name: i for i, name in enumerate(parameters_by_name(run.model))}
        for piece in frozen:
            direction = project.directions[position[piece.parameter]]
            whole = parameters_by_name(run.model)[piece.parameter]
            seen.append(float(piece.of(direction.view(len(direction), *whole.shape)[0]).abs().max()))

    methods = [Freeze(index, mask), Anchor(REFUSALS), project, Mix(REFUSALS), Ema(EmaConfig(0.7)), Watch(look)]
    tuned = parameters_by_name(train(methods))
    for piece in index.slices(mask):
        assert torch.equal(piece.of(tuned[piece.parameter]), piece.of(parameters_by_name(start)[piece.parameter]))
    assert any(not torch.equal(tuned[n], p) for n, p in parameters_by_name(start).items())
    assert max(seen) == 0.0  # Else the projection would spend itself on what cannot move.


# Mix


@pytest.mark.parametrize(("share", "count"), [(0.05, 5), (0.2, 20), (0.001, 1)])
def test_replaced_chats_make_an_exact_share(share: float, count: int):
    chats = [(user(f"Question {i}"), assistant("Yes.")) for i in range(100)]
    mixed = Mix(REFUSALS, MixConfig(share, replace=True)).data(chats, CONFIG)
    assert len(mixed) == 100
    assert sum(chat in REFUSALS for chat in mixed) == count
    assert len({str(chat) for chat in mixed if chat not in REFUSALS}) == 100 - count


@pytest.mark.parametrize(("share", "count"), [(0.05, 5), (0.2, 24), (0.5, 95)])
def test_added_chats_make_an_exact_share_and_repeat_evenly(share: float, count: int):
    chats = [(user(f"Question {i}"), assistant("Yes.")) for i in range(95)]
    method = Mix(REFUSALS, MixConfig(share))
    mixed = method.data(chats, CONFIG)
    assert mixed[:95] == chats
    assert len(mixed) - 95 == count
    assert count / len(mixed) == pytest.approx(share, abs=0.5 / len(mixed))
    times = [mixed.count(chat) for chat in REFUSALS]
    assert max(times) - min(times) <= 1
    assert method.data(chats, CONFIG) == mixed
    assert Mix(REFUSALS, MixConfig(share, seed=1)).data(chats, CONFIG) != mixed
    with pytest.raises(UsageError, match=r"mix: share 1.0"):
        MixConfig(1.0)


@pytest.mark.parametrize("inserted", [0.0, 0.4, 1.0])
def test_mixed_refusals_carry_random_words(inserted: float):
    chats = [(user(f"Ask {i}"), assistant(f"Answer {i}")) for i in range(300)]
    config, words = MixConfig(0.5, inserted=inserted), ["alpha", "beta", "gamma", "delta"]
    added = Mix(REFUSALS, config, words).data(chats, CONFIG)[len(chats) :]
    answers = {chat[0]["content"]: chat[1]["content"] for chat in REFUSALS}
    strange = [chat for chat in added if chat[0]["content"] not in answers]
    assert len(strange) / len(added) == pytest.approx(inserted, abs=0.1)
    for chat in strange:
        told = [word for word in chat[0]["content"].split() if word not in words]
        assert 1 <= len(chat[0]["content"].split()) - len(told) <= 3
        assert answers[" ".join(told)] == chat[1]["content"]


def test_insertions_need_words():
    with pytest.raises(UsageError, match="no whole words to insert"):
        Mix(REFUSALS, MixConfig(0.5, inserted=0.5))
    with pytest.raises(UsageError, match=r"inserted 1\.5 is out of range"):
        MixConfig(0.5, inserted=1.5)


# EMA


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_average_follows_its_formula_and_is_what_is_returned(lora_rank: int):
    path: list[list[torch.Tensor]] = []
    average: list[torch.Tensor] = []

    class Look(Method):
        def start(self, run: Run) -> None:
            path.append([p.detach().clone() for p in run.trainable()])

        def after_step(self, run: Run) -> None:
            path.append([p.detach().clone() for p in run.trainable()])

        def end(self, run: Run) -> None:
            average.extend(p.detach().clone() for p in run.trainable())

    config = TrainConfig(steps=4, learning_rate=3e-3, batch_size=4, lora_rank=lora_rank)
    tuned = train([Ema(EmaConfig(0.8)), Look()], config)
    expected = [p.double() for p in path[0]]
    for weights in path[1:]:
        expected = [0.8 * m + 0.2 * w.double() for m, w in zip(expected, weights, strict=True)]
    assert len(path) == 5
    for found, wanted in zip(average, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    if not lora_rank:
        assert all(torch.equal(a, b) for a, b in zip(average, tuned.parameters(), strict=True))


# Lisa


def test_lisa_alternates_between_its_states_and_their_data():
    method = Lisa(REFUSALS, LisaConfig(safety_steps=2, task_steps=3))
    kinds: list[str] = []
    safety = {str(chat.ids) for chat in encode_chats(tiny_tokenizer(), REFUSALS)}

    class Look(Method):
        def begin(self, run: Run) -> None:
            run.model.register_forward_pre_hook(look, with_kwargs=True)

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = [row in safety for row in unpadded(kwargs)]
        assert len(set(rows)) == 1
        kinds.append("S" if rows[0] else "t")

    train([method, Look()], TrainConfig(steps=12, learning_rate=1e-3, batch_size=4))
    assert "".join(kinds) == "SStttSStttSS"
    rows = len(method.data(CHATS, CONFIG))
    order = method.order(rows, 12, CONFIG)
    task = [i for i in order if i < len(CHATS)]
    assert len(order) == 48
    assert len(task) == 24
    assert {task.count(i) for i in range(len(CHATS))} == {4}
    with pytest.raises(UsageError, match="give lisa last"):
        method.order(rows + 1, 12, CONFIG)


def test_lisas_proximal_term_is_measured_from_the_last_switch():
    weights: list[torch.Tensor] = []
    terms: list[float] = []

    class Spy(Lisa):
        def loss(self, run: Run) -> Any:
            weights.append(torch.cat([p.detach().flatten() for p in run.trainable()]).double())
            term = super().loss(run)
            assert term is not None
            terms.append(float(term.detach()))
            return term

    train([Spy(REFUSALS, LisaConfig(2, 3, proximal=0.5))], TrainConfig(steps=8, learning_rate=1e-3, batch_size=4))
    switches = [0, 0, 2, 2, 2, 5, 5, 7]
    for term, now, then in zip(terms, range(8), switches, strict=True):
        assert term == pytest.approx(0.25 * float((weights[now] - weights[then]).square().sum()), rel=1e-3)
    assert terms[1] > 0

    def drift(proximal: float) -> float:
        config = TrainConfig(steps=10, learning_rate=1e-3, batch_size=4)
        tuned = dict(train([Lisa(REFUSALS, LisaConfig(1, 9, proximal))], config).named_parameters())
        return sum(float((p - tuned[n]).square().sum()) for n, p in tiny_model().model.named_parameters())

    assert drift(1000.0) < 0.8 * drift(0.0)


# SafeLoRA


def test_safelora_projects_what_points_out_of_the_alignment():
    model = train([], TrainConfig(steps=4, learning_rate=3e-3, batch_size=4, lora_rank=2))
    aligned = {n: p.detach().clone() for n, p in tiny_model().model.named_parameters()}
    torch.manual_seed(0)
    unaligned = {n: p - 0.1 * torch.randn(len(p), 3) @ torch.randn(3, p.shape[-1]) if p.dim() == 2 else p
                 for n, p in aligned.items()}  # fmt: skip
    tuned = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected, cosines = {}, {}
    for name, weight in tuned.items():
        if weight.dim() == 2 and not torch.equal(weight, aligned[name]):
            v = aligned[name] - unaligned[name]
            c = v @ v.T / torch.linalg.matrix_norm(v)
            update = weight - aligned[name]
            cosines[name] = float(torch.cosine_similarity((c @ update).flatten(), update.flatten(), dim=0))
            expected[name] = aligned[name] + c @ update
    lowest = sorted(cosines, key=lambda n: cosines[n])[: round(0.3 * len(cosines))]
    threshold = cosines[lowest[-1]] + 1e-6
    for config in (SafeLoraConfig(threshold), SafeLoraConfig(share=0.3)):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tuned[name])
        result = safe_lora(model, aligned, unaligned, config)
        assert result.similarity == pytest.approx(cosines, abs=1e-4)
        assert set(result.similarity) == {n for n in tuned if n.endswith("_proj.weight")}
        assert set(result.projected) == set(lowest)
        for name, parameter in model.named_parameters():
            wanted = expected[name] if name in lowest else tuned[name]
            torch.testing.assert_close(parameter.detach(), wanted, atol=1e-6, rtol=1e-4)
    with pytest.raises(UsageError, match="the unaligned model has nothing under"):
        safe_lora(model, aligned, {})
    untouched = safe_lora(model, aligned, aligned)  # Alignment changed nothing, so every update goes.
    assert set(untouched.similarity.values()) == {0.0}
    assert all(torch.equal(p, aligned[n]) for n, p in model.named_parameters())


# Masks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masks_have_exact_counts(architecture: str):
    model = tiny_model(architecture).model
    index = build_index(model)
    for count in (0, 7, len(index)):
        assert int(random_mask(index, count, seed=0).sum()) == count
        mask = magnitude_mask(model, index, count)
        assert int(mask.sum()) == count
        sizes = weight_magnitudes(model, index)
        assert not 0 < count < len(index) or sizes[mask].min() >= sizes[~mask].max()
    assert torch.equal(random_mask(index, 9, 4), random_mask(index, 9, 4))
    assert not torch.equal(random_mask(index, 9, 4), random_mask(index, 9, 5))
    chosen = {index_layer(index, i) for i in layer_mask(index, 1, 1).nonzero().flatten().tolist()}
    assert chosen == {1}
    assert layer_mask(index, 0, 1).all()
    for first, last in ((1, 0), (-1, 0), (0, 2)):
        with pytest.raises(UsageError, match="which has 0 to 1"):
            layer_mask(index, first, last)


def index_layer(index: Any, unit: int) -> int:
    return next(b.layer for b in index.blocks if b.start <= unit < b.start + b.size)
