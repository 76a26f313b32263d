"""A model before and after a fine-tune: in float32, with a LoRA, or with its own adapter to train."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from keelguard.errors import UsageError
from keelguard.models import quiet_peft
from keelguard.training import TrainConfig


def prepare(model: Any, config: TrainConfig, adapter: str = "merge") -> Any:
    """The model as it will train: float32, with a LoRA, or its own adapter alone where `adapter` is "train".

    Raises:
        UsageError: there is no LoRA to train.
    """
    if not config.lora_rank and adapter == "merge":
        model = model.float()
    if isinstance(model, PeftModel) and adapter == "merge":
        # Saved as it is, a trained model with an adapter would leave what its base has learnt behind.
        model = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    # Trainer sets its seed too late for the start of the LoRA.
    set_seed(config.seed)
    if adapter == "train":
        return _only_adapter(model, config)
    if not config.lora_rank:
        return model.requires_grad_(True)
    return with_lora(model, usual_lora(config.lora_rank))


def usual_lora(rank: int) -> LoraConfig:
    """A LoRA of this rank on all linear layers, with α twice the rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def with_lora(model: Any, lora: Any) -> Any:
    """A model with a new LoRA on it."""
    with quiet_peft():
        return get_peft_model(model, lora)


def _only_adapter(model: Any, config: TrainConfig) -> Any:
    if not isinstance(model, PeftModel) or config.lora_rank:
        raise UsageError("adapter 'train': the model must bring an adapter, and lora_rank must be 0")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            # In bfloat16 most steps would be rounded away; the base stays as it is.
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("the model's adapter is no LoRA; merge it first with merge_and_unload()")
    return model


def finished(model: Any, config: TrainConfig) -> Any:
    """The trained model in evaluation mode, the LoRA of `lora_rank` merged."""
    merged = model.merge_and_unload() if config.lora_rank else model
    return merged.eval().requires_grad_(False)
