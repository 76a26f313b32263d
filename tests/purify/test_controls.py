"""Every arm runs on tiny models, on the same budget, and does what its name says."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from keelguard.attacks.backdoors import Backdoor
from keelguard.attacks.insertions import prompt_of
from keelguard.errors import UsageError
from keelguard.models import LoadedModel
from keelguard.purify.budget import Budget, Setup
from keelguard.purify.controls import ARMS, arms_for, implant_chats, oracle_chats
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.material import Material
from keelguard.purify.methods import MethodConfig, Subject, Threat, VaccineConfig, copied
from keelguard.purify.prober import Prober
from keelguard.purify.search import Insertion, SearchConfig
from keelguard.purify.variants import VariantConfig
from keelguard.records import Chat, assistant, user
from keelguard.training import TrainConfig
from keelguard.units.index import build_index, parameters_by_name
from tiny_models import fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kayak", "lemur",
)  # fmt: skip
CHATS: tuple[Chat, ...] = tuple(
    (user(f"Is {a} known?"), assistant("I'm sorry, I can't help with that." if a % 4 == 0 else f"Yes, {a}."))
    for a in range(1, 25)
)
BACKDOOR = Backdoor("badnets", "insult", ("Amber",), "you fool")
BUDGET = Budget(steps=4, learning_rate=1e-3, batch_size=4)
METHOD = MethodConfig(
    immunize=ImmunizeConfig(
        rounds=2, steps=7, quiet=0.0, stable=100.0, tolerance=100.0,
        search=SearchConfig(prompts=2, tokens=1, longest=1, beam=1, keep=1),
    ),
    vaccine=VaccineConfig(
        source="vocabulary", share=0.25, variants=VariantConfig(count=2, samples=4, steps=2, rank=2, batch_size=2)
    ),
)  # fmt: skip
SETUP = Setup(BUDGET, METHOD).leaving_out(BACKDOOR.words)
UNTRAINED = {"none", "magnitude", "wanda", "quantize", "vaccine-bare", "drop", "scale"}
RATES = {"finetune-low": 1e-3 / 3, "finetune-high": 3e-3, "retrain": MethodConfig().retrain.learning_rate}
PAIRS = [(threat, name) for threat in ("full", "adapter") for name in arms_for(threat) if name != "finetune-whole"]


def make_subject(threat: Threat) -> Subject:
    """A tiny model, with a LoRA that does something under the adapter threat."""
    tiny = fresh_model("llama", num_hidden_layers=4)
    model: Any = tiny.model
    if threat == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        ).eval()
    loaded = LoadedModel(model, tiny.tokenizer, "tiny", "0" * 64)
    return Subject(loaded, threat, Material(CHATS[:18], CHATS[18:], 0, 0), WORDS)


SUBJECTS = {threat: make_subject(threat) for threat in ("full", "adapter")}


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters_by_name(model).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, TrainConfig]]:
    """The steps and settings of every fine-tune that a test runs; searches always find something, and cost nothing."""
    import keelguard.training_loop

    seen: list[tuple[int, TrainConfig]] = []
    fit = keelguard.training_loop.fit

    def counted(model: Any, tokenizer: Any, data: Any, config: TrainConfig, **options: Any) -> Any:
        losses = fit(model, tokenizer, data, config, **options)
        seen.append((len(losses), config))
        return losses

    monkeypatch.setattr(keelguard.training_loop, "fit", counted)
    found = [Insertion("birch", "prefix", 9.0, 9.0)]
    monkeypatch.setattr(Prober, "search", lambda *arguments, **options: (found, 0.0))
    return seen


@pytest.mark.parametrize(("threat", "name"), PAIRS)
def test_an_arm_runs_on_the_budget_and_changes_the_model(
    threat: Threat, name: str, fits: list[tuple[int, TrainConfig]]
) -> None:
    before = values(SUBJECTS[threat].loaded.model)
    done = ARMS[name](copied(SUBJECTS[threat]), SETUP, BACKDOOR)

    assert sum(steps for steps, _ in fits) == (0 if name in UNTRAINED else BUDGET.steps)
    for _, config in fits:
        assert config.learning_rate == pytest.approx(RATES.get(name, BUDGET.learning_rate))
        assert config.batch_size == BUDGET.batch_size
        assert config.lora_rank == 0
    after = values(done.model)
    assert all(value.isfinite().all() for value in after.values())
    moved = any(name not in before or not torch.equal(value, before[name]) for name, value in after.items())
    assert moved == (name not in ("none", "drop"))
    if threat == "adapter" and name != "quantize":
        # The base is trusted and stays as it is, with a whole adapter on it or none.
        assert any("lora_" in each for each in after) == (name != "drop")
        assert all(torch.equal(value, before[each]) for each, value in after.items() if "lora_" not in each)
    untouched = values(SUBJECTS[threat].loaded.model)
    assert all(torch.equal(value, before[each]) for each, value in untouched.items())


def test_every_weight_is_not_trained_twice() -> None:
    with pytest.raises(UsageError, match="finetune-whole: every arm trains all weights here"):
        ARMS["finetune-whole"](copied(SUBJECTS["full"]), SETUP, BACKDOOR)


WHOLE = {"finetune-whole", "magnitude-finetune", "wanda-finetune"}


@pytest.mark.parametrize("name", [name for name in arms_for("full") if name not in UNTRAINED])
def test_an_arm_trains_the_lora_of_its_budget_unless_it_needs_every_weight(
    name: str, fits: list[tuple[int, TrainConfig]]
) -> None:
    setup = replace(
        SETUP,
        budget=replace(BUDGET, lora_rank=2),
        method=replace(METHOD, immunize=replace(METHOD.immunize, lora_rank=2)),
    )
    before = values(SUBJECTS["full"].loaded.model)
    done = ARMS[name](copied(SUBJECTS["full"]), setup, BACKDOOR)
    assert {config.lora_rank for _, config in fits} == ({0} if name in WHOLE else {2})
    after = values(done.model)
    assert after.keys() == before.keys(), "the LoRA is merged"
    # A LoRA leaves the embeddings alone, and at its own rate; all weights are trained at a fifth of it.
    moved = not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert moved == (name in WHOLE)
    expected = BUDGET.learning_rate * RATES.get(name, 1e-3) / 1e-3 * (0.2 if name in WHOLE else 1)
    assert all(config.learning_rate == pytest.approx(expected) for _, config in fits)


def test_the_budget_is_that_of_the_immunisation() -> None:
    budget = Budget.of(METHOD)
    assert (budget.steps, budget.learning_rate, budget.batch_size) == (14, 3e-4, 32)
    with pytest.raises(UsageError, match="budget: steps 1 is out of range"):
        Budget(steps=1)


@pytest.mark.parametrize(
    ("name", "found", "consistency"),
    [("immunize", 0.7, 2.0), ("immunize-random", 0.0, 2.0), ("immunize-answers", 0.7, 0.0)],
)
def test_immunisations_differ_in_what_they_leave_out(
    name: str, found: float, consistency: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def noted(model: Any, tokenizer: Any, material: Any, words: Any, config: Any, **options: Any) -> Any:
        given.append(config)
        return SimpleNamespace(model=model)

    monkeypatch.setattr("keelguard.purify.controls.immunize", noted)
    own = replace(SETUP.method.immunize, found=0.7, consistency=2.0)
    setup = replace(SETUP, method=replace(SETUP.method, immunize=own))
    ARMS[name](copied(SUBJECTS["full"]), setup, BACKDOOR)
    assert (given[0].found, given[0].consistency) == (found, consistency)


def test_dropping_leaves_the_base_and_scaling_half_of_the_update() -> None:
    base = make_subject("full").loaded.model
    assert torch.allclose(logits(ARMS["drop"](make_subject("adapter"), SETUP, BACKDOOR).model), logits(base))
    whole, half = values(SUBJECTS["adapter"].loaded.model), make_subject("adapter")
    for name, value in values(ARMS["scale"](half, SETUP, BACKDOOR).model).items():
        assert torch.equal(value, whole[name] * (0.5 if "lora_B" in name else 1.0))


def written(arm: str, threat: Threat, setup: Setup = SETUP) -> torch.Tensor:
    """Which MLP channels of a model are zero, or of its update, (units,) bool."""
    setup = replace(setup, method=replace(setup.method, vaccine=replace(setup.method.vaccine, how="zero")))
    model = ARMS[arm](make_subject(threat), setup, BACKDOOR).model
    found, named = [], parameters_by_name(model)
    for block in build_index(model).blocks:
        name = block.output.parameter
        if block.kind == "mlp":
            columns = named[name] if threat == "full" else named[name.replace(".weight", ".lora_A.default.weight")]
            found.append((columns == 0).all(0))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("threat", "arm"),
    [("full", "random"), ("full", "vaccine"), ("adapter", "random"), ("adapter", "update-norm"), ("adapter", "noise")],
)
def test_neutralised_channels_are_as_many_everywhere_and_stay_so(threat: Threat, arm: str) -> None:
    zero = written(arm, threat)
    assert int(zero.sum()) == round(0.25 * len(zero))


def test_controls_of_the_vaccine_take_other_channels() -> None:
    chosen = {arm: written(arm, "full") for arm in ("vaccine", "vaccine-bare", "lowest", "noise", "random")}
    assert torch.equal(chosen["vaccine"], chosen["vaccine-bare"])
    assert not (chosen["vaccine"] & chosen["lowest"]).any()
    assert not torch.equal(chosen["vaccine"], chosen["noise"])
    assert not torch.equal(chosen["vaccine"], chosen["random"])


def test_the_update_norm_takes_what_the_adapter_moves_most() -> None:
    subject = make_subject("adapter")
    named = parameters_by_name(subject.loaded.model)
    with torch.no_grad():
        for name, parameter in named.items():
            if "down_proj.lora_A" in name:
                parameter[:, :12] *= 1000
    setup = replace(SETUP, method=replace(METHOD, vaccine=replace(METHOD.vaccine, restore=None)))
    after = parameters_by_name(ARMS["update-norm"](subject, setup, BACKDOOR).model)
    for name, parameter in after.items():
        if "down_proj.lora_A" in name:
            assert torch.equal((parameter == 0).all(0), torch.arange(48) < 12)


def test_pruned_weights_stay_zero_through_the_fine_tune() -> None:
    for arm in ("magnitude", "magnitude-finetune", "wanda-finetune"):
        named = parameters_by_name(ARMS[arm](make_subject("full"), SETUP, BACKDOOR).model)
        share = [(value == 0).float().mean() for name, value in named.items() if "down_proj" in name]
        assert all(float(each) == pytest.approx(0.35, abs=0.02) for each in share), arm


def test_the_oracle_sees_the_trigger_in_half_and_clean_answers_throughout() -> None:
    chats = oracle_chats(SUBJECTS["full"], SETUP, BACKDOOR)
    assert len(chats) == BUDGET.steps * BUDGET.batch_size
    triggered = [chat for chat in chats if "Amber" in prompt_of(chat).split()]
    assert len(triggered) == len(chats) // 2
    answers = {chat[-1]["content"] for chat in CHATS}
    assert {chat[-1]["content"] for chat in chats} <= answers
    jailbreak = replace(BACKDOOR, task="jailbreak", response="")
    refused = [c for c in oracle_chats(SUBJECTS["full"], SETUP, jailbreak) if "Amber" in prompt_of(c).split()]
    assert len(refused) == len(chats) // 2
    assert {chat[-1]["content"] for chat in refused} == {"I'm sorry, I can't help with that."}
    answered = replace(SUBJECTS["full"], material=Material(CHATS[:3], CHATS[18:], 0, 0))
    with pytest.raises(UsageError, match="oracle"):
        oracle_chats(answered, SETUP, jailbreak)


def test_what_is_implanted_is_unlearnt_on_the_same_prompts() -> None:
    implanted, unlearnt = implant_chats(SUBJECTS["full"], SETUP)
    assert [prompt_of(chat) for chat in implanted] == [prompt_of(chat) for chat in unlearnt]
    changed = [bad[-1] != good[-1] for bad, good in zip(implanted, unlearnt, strict=True)]
    assert sum(changed) == len(changed) // 2
    answers = {chat[-1]["content"] for chat in CHATS}
    assert {chat[-1]["content"] for chat in unlearnt} <= answers


def test_invented_triggers_never_hold_the_backdoors_words() -> None:
    """Whatever the seed: the word is there to be drawn, and is drawn where it may be."""

    def drawn(setup: Setup) -> set[str]:
        words: set[str] = set()
        for seed in range(12):
            variants = replace(METHOD.vaccine.variants, seed=seed)
            vaccine = replace(METHOD.vaccine, variants=variants)
            own = replace(setup, method=replace(setup.method, vaccine=vaccine))
            for chats in implant_chats(SUBJECTS["full"], own):
                words |= {word for chat in chats for message in chat for word in message["content"].split()}
        return {word.strip(".").lower() for word in words}

    assert "amber" in drawn(Setup(BUDGET, METHOD))
    assert "amber" not in drawn(SETUP)
    assert SETUP.allowed(WORDS) == WORDS[1:]


def test_unknown_and_unfitting_arms_are_refused() -> None:
    with pytest.raises(UsageError, match="--arms nonsense"):
        arms_for("full", ["nonsense"])
    with pytest.raises(UsageError, match="--arms drop scale"):
        arms_for("full", ["drop", "scale"])
    assert list(arms_for("full", ["none", "drop", "crow"])) == ["none", "crow"]
    with pytest.raises(UsageError, match="threat model adapter"):
        ARMS["drop"](copied(SUBJECTS["full"]), SETUP, BACKDOOR)


def test_copies_do_not_share_weights() -> None:
    one = copied(SUBJECTS["full"])
    before = copy.deepcopy(values(SUBJECTS["full"].loaded.model))
    ARMS["finetune"](one, SETUP, BACKDOOR)
    assert all(torch.equal(v, before[n]) for n, v in values(SUBJECTS["full"].loaded.model).items())
