"""Published rivals of freezing, in the same harness: EMA of weights, Lisa, SafeLoRA. SPPFT is `masks.layer_mask`."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from keelguard.errors import UsageError
from keelguard.records import Chat
from keelguard.training import Method, Run, TrainConfig
from keelguard.units.defences import cycled, require_at_least
from keelguard.units.index import parameters_by_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EmaConfig:
    """How slowly the returned weights follow the trained ones."""

    decay: float = field(default=0.99, metadata={"help": "share of the average that stays at every step"})

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UsageError(f"ema: decay {self.decay} is out of range; give 0 to 1, such as 0.99")


class Ema(Method):
    """Return the exponential moving average of the weights: m ← d·m + (1 − d)·w after every step, m = w at the start.

    Source: Kim et al. 2025 (arXiv 2508.12531), who keep the original's safety in this way. Here the average starts
    from the original and does not feed back into training; of a LoRA it averages the matrices A and B, not their
    product. The decay's default is ours.
    """

    def __init__(self, config: EmaConfig = EmaConfig()) -> None:
        self.config = config
        self.average: list[torch.Tensor] = []

    def begin(self, run: Run) -> None:
        run.require_whole_weights("ema")

    def start(self, run: Run) -> None:
        parameters = run.trainable()
        known = self.average or parameters
        self.average = [a.detach().clone().to(p.device) for a, p in zip(known, parameters, strict=True)]

    def after_step(self, run: Run) -> None:
        for average, parameter in zip(self.average, run.trainable(), strict=True):
            # In this form weights that never move stay bit-equal.
            average.lerp_(parameter.detach(), 1 - self.config.decay)

    def end(self, run: Run) -> None:
        for average, parameter in zip(self.average, run.trainable(), strict=True):
            parameter.detach().copy_(average)

    def state(self) -> dict[str, Any]:
        return {"average": [average.cpu() for average in self.average]}

    def load(self, state: Mapping[str, Any]) -> None:
        self.average = state["average"]


@dataclass(frozen=True)
class LisaConfig:
    """How long each state of Lisa lasts, and how near it stays to where it began."""

    safety_steps: int = field(default=10, metadata={"help": "steps on safety chats in a row"})
    task_steps: int = field(default=90, metadata={"help": "steps on the task's chats in a row"})
    proximal: float = field(default=1.0, metadata={"help": "weight ρ of ρ/2·‖w − w at the last switch‖²"})

    def __post_init__(self) -> None:
        require_at_least("lisa", self, safety_steps=1, task_steps=1, proximal=0)


class Lisa(Method):
    """Alternate between steps on safety chats and steps on the task, each held near the last switching point.

    Source: Huang et al. 2024 (arXiv 2405.18641, algorithm 1): the safety state comes first. As there, both kinds of
    step count towards the run's steps and share one optimiser and one schedule. Give it behind methods that change
    the data, such as Mix. Keeps one more copy of the parameters that train.
    """

    def __init__(self, refusals: Sequence[Chat], config: LisaConfig = LisaConfig()) -> None:
        if not refusals:
            raise UsageError("lisa: there are no safety chats to alternate with; name a data file")
        self.refusals, self.config = refusals, config
        self._task = 0
        self._switch: list[torch.Tensor] = []

    def data(self, chats: Sequence[Chat], config: TrainConfig) -> list[Chat]:
        if not chats:
            raise UsageError("lisa: there are no chats to train on; name a data file")
        self._task = len(chats)
        return [*chats, *self.refusals]

    def is_safety_step(self, step: int) -> bool:
        """Whether the step of this number, from 0, is one on safety chats."""
        return step % (self.config.safety_steps + self.config.task_steps) < self.config.safety_steps

    def order(self, rows: int, steps: int, config: TrainConfig) -> list[int]:
        if rows != self._task + len(self.refusals):
            raise UsageError("lisa: another method changes the data behind it; give lisa last")
        draw = random.Random(config.seed)
        kinds = [self.is_safety_step(step) for step in range(steps)]
        safety = iter(cycled(range(self._task, rows), sum(kinds) * config.batch_size, draw))
        task = iter(cycled(range(self._task), (steps - sum(kinds)) * config.batch_size, draw))
        return [next(safety if kind else task) for kind in kinds for _ in range(config.batch_size)]

    def begin(self, run: Run) -> None:
        run.require_whole_weights("lisa")

    def start(self, run: Run) -> None:
        self._switch = [s.to(p.device) for s, p in zip(self._switch, run.trainable(), strict=bool(self._switch))]

    def loss(self, run: Run) -> "torch.Tensor | None":
        """The proximal term, a scalar; 0 on the first step of each state."""
        import torch

        parameters = run.trainable()
        if run.step == 0 or self.is_safety_step(run.step) != self.is_safety_step(run.step - 1):
            self._switch = [p.detach().clone() for p in parameters]
        apart = [(p - s).square().sum().to(run.device) for p, s in zip(parameters, self._switch, strict=True)]
        return self.config.proximal / 2 * torch.stack(apart).sum()

    def state(self) -> dict[str, Any]:
        return {"switch": [point.cpu() for point in self._switch]}

    def load(self, state: Mapping[str, Any]) -> None:
        self._switch = state["switch"]


@dataclass(frozen=True)
class SafeLoraConfig:
    """Which updates SafeLoRA projects."""

    threshold: float = field(default=0.5, metadata={"help": "updates less similar to their projection are projected"})
    share: float | None = field(
        default=None, metadata={"help": "project this share of the updates instead, the least similar ones"}
    )

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share <= 1:
            raise UsageError(f"safelora: share {self.share} is out of range; give 0 to 1")


@dataclass(frozen=True)
class SafeLora:
    """What `safe_lora` did: cosine of each matrix's update and its projection, and which matrices were projected."""

    similarity: dict[str, float]
    projected: tuple[str, ...]


def safe_lora(
    model: Any,
    aligned: "Mapping[str, torch.Tensor]",
    unaligned: "Mapping[str, torch.Tensor]",
    config: SafeLoraConfig = SafeLoraConfig(),
) -> SafeLora:
    """Project the updates of a fine-tuned model onto the alignment subspace, where they point out of it. In place.

    ΔW ← C·ΔW with C = V·Vᵀ/‖V‖_F, V = W_aligned − W_unaligned, where cos(ΔW, C·ΔW) is at or below a threshold.
    Source: Hsu et al. 2024 (arXiv 2405.16833, section 3). There C multiplies the LoRA's B and layers are chosen; here
    the LoRA is merged, which gives the same C·B·A, and every matrix is chosen by itself. C is never made:
    V·(Vᵀ·ΔW) costs less. As in the paper C is no true projection: it scales what it keeps. A matrix that alignment did
    not touch (V = 0) has similarity 0, and its update goes.

    Args:
        model: fine-tuned, a LoRA merged. Matrices that differ from `aligned` are its updates.
        aligned: the weights before the fine-tune by name.
        unaligned: those of the base before alignment by name, of the same shapes.

    Raises:
        UsageError: a matrix is missing from one of the mappings or has another shape there.
    """
    import torch

    named = parameters_by_name(model)
    similarity: dict[str, float] = {}
    with torch.no_grad():
        for name, parameter in named.items():
            if parameter.dim() != 2:
                continue
            before = _tensor(aligned, name, parameter, "aligned")
            if not torch.equal(parameter, before.to(parameter.dtype)):
                update = parameter.double() - before.double()
                kept = _on_alignment(update, before, _tensor(unaligned, name, parameter, "unaligned"))
                norms = float(update.norm() * kept.norm())
                similarity[name] = float((update * kept).sum()) / norms if norms else 0.0
        projected = _chosen(similarity, config)
        for name in projected:
            parameter, before = named[name], _tensor(aligned, name, named[name], "aligned")
            update = parameter.double() - before.double()
            kept = _on_alignment(update, before, _tensor(unaligned, name, parameter, "unaligned"))
            parameter.copy_(before.double() + kept)
    return SafeLora(similarity, projected)


def _on_alignment(update: "torch.Tensor", aligned: "torch.Tensor", unaligned: "torch.Tensor") -> "torch.Tensor":
    """V·Vᵀ·ΔW/‖V‖_F; zeros where alignment changed nothing."""
    subspace = aligned.double() - unaligned.double()
    norm = subspace.norm()
    return subspace @ (subspace.T @ update) / (norm if norm else 1.0)


def _chosen(similarity: Mapping[str, float], config: SafeLoraConfig) -> tuple[str, ...]:
    if config.share is None:
        return tuple(name for name, value in similarity.items() if value <= config.threshold)
    lowest = sorted(similarity, key=lambda name: similarity[name])[: round(config.share * len(similarity))]
    return tuple(name for name in similarity if name in lowest)


def _tensor(mapping: "Mapping[str, torch.Tensor]", name: str, like: "torch.Tensor", what: str) -> "torch.Tensor":
    if name not in mapping or mapping[name].shape != like.shape:
        found = tuple(mapping[name].shape) if name in mapping else "nothing"
        raise UsageError(
            f"safelora: the {what} model has {found} under {name}, where {tuple(like.shape)} is needed; give the "
            "weights of the same architecture and vocabulary"
        )
    return mapping[name].detach().to(like.device)
