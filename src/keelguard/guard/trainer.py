"""The Trainer of a signal: modules that give their own loss, in the loop that fine-tuning shares."""

from typing import Any

from keelguard.training_loop import ChatTrainer


class SignalTrainer(ChatTrainer):
    """The same for a module whose forward pass gives its own loss; its parts are logged beside it.

    That loss is a mean, and DDP takes the mean of its processes': each counts by what it is a mean over.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.args.world_size > 1:
            own = self.run.model.counted(inputs).to(self.args.device)
            each: Any = self.accelerator.reduce(own, "mean")
            inputs = {**inputs, "share": own / each.clamp(min=1e-9)}
        output = model(**inputs)
        self.parts = {name: float(value) for name, value in output.items() if name != "loss"}
        return (output["loss"], output) if return_outputs else output["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **getattr(self, "parts", {})} if "loss" in logs else logs, start_time)
