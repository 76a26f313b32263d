"""What saves memory reaches every training of a purification: canaries, controls and the vaccine's fine-tunes."""

from typing import Any

import pytest
import torch
from small_world import CHATS, STRANGE, fresh_small, held, loaded, tokenizer

from keelguard.errors import FailureError
from keelguard.purify import grouped, planting, spikes
from keelguard.purify.budget import Budget
from keelguard.purify.effects import Effect
from keelguard.purify.grouped import train_variants
from keelguard.purify.immunize_config import ImmunizeConfig
from keelguard.purify.methods import MethodConfig
from keelguard.purify.spikes import SpikeConfig, plant_spikes
from keelguard.purify.variants import DEFAULT_VARIANTS, VariantConfig, variant_data
from keelguard.stats import Rate
from keelguard.training import TrainConfig, train_on_chats

pytestmark = pytest.mark.usefixtures("one_thread")

SAVING = {"gradient_accumulation": 2, "lora_rank": 3, "bf16": True, "gradient_checkpointing": True}
NONE = Rate(0, 1)
NOTHING = Effect(NONE, NONE, NONE, NONE, NONE, (False,))


def told(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SAVING}


def test_canaries_are_planted_with_a_lora_that_is_merged(monkeypatch: pytest.MonkeyPatch):
    seen: list[TrainConfig] = []

    def trained(model: Any, words: Any, chats: Any, config: TrainConfig, **options: Any) -> Any:
        seen.append(config)
        return train_on_chats(model, words, chats, config, **options)

    monkeypatch.setattr(planting, "train_on_chats", trained)
    monkeypatch.setattr(spikes, "measure_effect", lambda *_, **__: NOTHING)
    config = SpikeConfig(samples=6, steps=2, batch_size=4, learning_rate=1e-2, **SAVING)
    base = loaded(fresh_small().to(torch.bfloat16))
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    spiked, found = plant_spikes(base, CHATS, held(), STRANGE, config)
    assert [told(each) for each in seen] == [SAVING]
    assert len(found) == 3
    after = spiked.model.state_dict()
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_control_has_the_budget_of_the_immunisation_and_its_savings():
    config = MethodConfig(
        immunize=ImmunizeConfig(rounds=2, steps=3, learning_rate=1e-4, batch_size=8, seed=5, **SAVING)
    )
    training = Budget.of(config).training()
    assert told(training) == SAVING
    assert (training.steps, training.learning_rate, training.batch_size, training.seed) == (6, 1e-4, 8, 5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_variants_that_do_not_fit_together_name_the_option(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(grouped, "_losses", full)
    config = VariantConfig(count=2, samples=4, steps=1, batch_size=2, rank=2)
    data = variant_data(CHATS, DEFAULT_VARIANTS, config)
    with pytest.raises(FailureError, match=r"4 runs of 2 .* at once; give a smaller --at-once, such as 2"):
        train_variants(fresh_small(), tokenizer(), data, config)
    with pytest.raises(FailureError, match=r"1 runs of 2 .* at once; shorten the data"):
        train_variants(fresh_small(), tokenizer(), data, config, at_once=1)
