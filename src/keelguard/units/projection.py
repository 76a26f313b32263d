"""Fine-tune off the decision: no step may move, to first order, what the model says where it refuses.

    train_on_chats(model, tokenizer, chats, config, methods=[Project(refusals)])

The idea is that of orthogonal gradient descent (Farajtabar et al. 2020, arXiv 1910.07104, algorithm 1), which keeps
gradients orthogonal to those of outputs on earlier tasks; here the earlier task is the decision to refuse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from keelguard.batches import pad_id_of
from keelguard.errors import UsageError
from keelguard.records import Chat
from keelguard.training import Method, Run
from keelguard.units.defences import Decision, decision_log_probs, encode_decisions, require_at_least

if TYPE_CHECKING:
    import torch

_RANK = 1e-6
"""Directions whose squared singular value is below this share of the largest are float32's rounding, not directions."""


@dataclass(frozen=True)
class ProjectConfig:
    """Which directions are closed to a fine-tune, and how."""

    directions: int = field(default=32, metadata={"help": "most directions to close, shared by the positions"})
    tokens: int = field(default=6, metadata={"help": "tokens of the refusal whose probability is kept"})
    prompts: int = field(default=16, metadata={"help": "safety prompts to take directions from, the first ones given"})
    target: Literal["update", "gradient"] = field(
        default="update",
        metadata={"help": "what is projected: the step that was taken, or the gradient before the optimiser"},
    )
    refresh: int = field(default=0, metadata={"help": "steps after which directions are taken anew; 0 keeps the first"})
    memory_gb: float = field(default=16.0, metadata={"help": "most memory (GB) that the directions may take"})

    def __post_init__(self) -> None:
        require_at_least("project", self, directions=1, tokens=1, prompts=1, refresh=0, memory_gb=0)
        if self.target not in ("update", "gradient"):
            raise UsageError(f"project: target {self.target} is unknown; choose update or gradient")
        if self.directions < self.tokens:
            raise UsageError(
                f"project: directions {self.directions} are fewer than tokens {self.tokens}; every token needs one, so "
                "raise directions or lower tokens"
            )


class Project(Method):
    """Project every step off the decision directions.

    A direction is the gradient of log P(token t of the refusal | prompt, tokens before it) by the parameters that
    train, mean over a group of prompts. Of K directions every one of the k positions gets K // k, so that many groups
    of prompts are made: several positions, because a model that keeps the first token alone learns to say "Sorry,
    here is how to …". Every direction is scaled to 1 before all are made orthonormal (rows of Q, through the Gram
    matrix in float64).

    With target="gradient", g ← g − QᵀQg before the optimiser. AdamW's preconditioning, momentum and weight decay
    leave the orthogonal complement again; with target="update" the step itself, w₁ − w₀, is projected behind the
    optimiser, at the cost of one more copy of the parameters.

    Where a LoRA starts at B = 0 the first directions touch B alone: `refresh` closes those of A as well. Directions
    take K × trainable parameters × 4 bytes.
    """

    def __init__(self, refusals: Sequence[Chat], config: ProjectConfig = ProjectConfig()) -> None:
        self.refusals, self.config = refusals[: config.prompts], config
        self.directions: list[torch.Tensor] = []
        """Q by parameter: (K, parameter's size) each, orthonormal over all of them; on the parameters' devices."""
        self._rows: list[Decision] = []
        self._before: list[torch.Tensor] = []
        self._refreshed = False

    def begin(self, run: Run) -> None:
        run.require_whole_weights("project")
        self._rows = encode_decisions(run.tokenizer, self.refusals, self.config.tokens, "project")
        size = sum(p.numel() for p in run.trainable())
        need = (len(self._plan()) + (self.config.target == "update")) * size * 4 / 1e9
        if need > self.config.memory_gb:
            raise UsageError(
                f"project: {self.config.directions} directions of {size} parameters take {need:.1f} GB, more than "
                f"memory_gb {self.config.memory_gb}; train a LoRA (lora_rank 16), take fewer directions and tokens, or "
                "raise memory_gb"
            )
        self.directions = self._measure(run)

    def start(self, run: Run) -> None:
        if self._refreshed:
            parameters = run.trainable()
            self.directions = [q.to(p.device) for q, p in zip(self.directions, parameters, strict=True)]
        if self.config.target == "update":
            optimizer, parameters = run.optimizer(), run.trainable()
            run.cleanup.callback(optimizer.register_step_pre_hook(lambda *_: self._remember(parameters)).remove)
            run.cleanup.callback(optimizer.register_step_post_hook(lambda *_: self._project_step(parameters)).remove)

    def before_step(self, run: Run) -> None:
        if self.config.target == "gradient":
            grads = [p.grad for p in run.trainable() if p.grad is not None]
            if len(grads) != len(self.directions):
                raise UsageError('project: some parameters that train have no gradient; choose target="update"')
            subtract_projection(grads, self.directions)

    def after_step(self, run: Run) -> None:
        if self.config.refresh and run.step % self.config.refresh == 0 and run.step < run.steps:
            self.directions = self._measure(run)
            self._refreshed = True

    def state(self) -> dict[str, Any]:
        # The first directions come from the original, which a resumed run has again.
        return {"directions": [q.cpu() for q in self.directions]} if self._refreshed else {}

    def load(self, state: Mapping[str, Any]) -> None:
        if state:
            self.directions, self._refreshed = state["directions"], True

    def _remember(self, parameters: "list[torch.Tensor]") -> None:
        import torch

        with torch.no_grad():
            if not self._before:
                self._before = [torch.empty_like(p) for p in parameters]
            for before, parameter in zip(self._before, parameters, strict=True):
                before.copy_(parameter)

    def _project_step(self, parameters: "list[torch.Tensor]") -> None:
        import torch

        with torch.no_grad():
            for before, parameter in zip(self._before, parameters, strict=True):
                torch.sub(parameter, before, out=before)
            steps = self._before
            for parameter, part in zip(parameters, projection(steps, self.directions), strict=True):
                parameter.sub_(part)

    def _plan(self) -> list[tuple[int, list[int]]]:
        """(position, prompts) of every direction; prompts too short for a position are left out of it."""
        groups = max(1, min(self.config.directions // self.config.tokens, len(self._rows)))
        plan = []
        for group in range(groups):
            members = range(group, len(self._rows), groups)
            for position in range(self.config.tokens):
                prompts = [i for i in members if self._rows[i].positions > position + 1]
                if prompts:
                    plan.append((position, prompts))
        return plan

    def _measure(self, run: Run) -> "list[torch.Tensor]":
        """Q by parameter, from the model as it is; gradients are left empty."""
        import torch

        parameters = run.trainable()
        plan = self._plan()
        directions = [torch.zeros(len(plan), p.numel(), device=p.device) for p in parameters]
        mode = run.model.training
        run.model.eval()
        for number, (position, prompts) in enumerate(plan):
            rows = [self._rows[i] for i in prompts]
            found, told = decision_log_probs(run.model, rows, pad_id_of(run.tokenizer), run.device)
            # Rows end at their last token, so positions are counted from where each row's first one stands.
            at = told.int().argmax(1) + position
            tokens = torch.tensor([r.ids[len(r.ids) - r.positions + position + 1] for r in rows], device=found.device)
            # Through .grad, so that hooks which freeze units have their say in the directions, too.
            found[torch.arange(len(rows), device=found.device), at, tokens].mean().backward()
            for direction, parameter in zip(directions, parameters, strict=True):
                if parameter.grad is not None:
                    direction[number] = parameter.grad.flatten()
                    parameter.grad = None
        run.model.train(mode)
        directions = orthonormal(directions)
        if run.processes > 1:
            # Processes must agree on the step to the last bit, and a GPU's gradients may not.
            for direction in directions:
                torch.distributed.broadcast(direction, 0)
        return directions


def orthonormal(blocks: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
    """An orthonormal basis of the rows of [blocks[0], blocks[1], …], in the same blocks.

    Args:
        blocks: (K, size) each. Rows are scaled to 1 first; what they have twice is dropped, so K may fall.
    """
    import torch

    blocks = list(blocks)
    for _ in range(2):  # Once leaves the square root of the precision in directions that nearly coincide.
        gram = _gram(blocks, blocks)
        scale = gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
        scale[gram.diagonal() == 0] = 0
        values, vectors = torch.linalg.eigh(gram * scale * scale[:, None])
        kept = values > max(_RANK * float(values[-1:].sum()), torch.finfo(torch.float64).tiny)
        mixing = (vectors[:, kept] * values[kept].rsqrt()).T * scale
        blocks = [mixing.to(block.device, block.dtype) @ block for block in blocks]
    return blocks


def projection(vector: "Sequence[torch.Tensor]", directions: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
    """QᵀQv for a vector in parts of any shapes and Q in blocks (K, part's size); the parts in their shapes."""
    import torch

    if not directions or not len(directions[0]):
        return [torch.zeros_like(part) for part in vector]
    along = _gram(directions, [part.reshape(1, -1).to(q.dtype) for part, q in zip(vector, directions, strict=True)])
    return [
        (along.T.to(q.device, q.dtype) @ q).view(part.shape).to(part.dtype)
        for part, q in zip(vector, directions, strict=True)
    ]


def subtract_projection(vector: "Sequence[torch.Tensor]", directions: "Sequence[torch.Tensor]") -> None:
    """v ← v − QᵀQv in place."""
    for part, off in zip(vector, projection(vector, directions), strict=True):
        part.sub_(off)


def _gram(left: "Sequence[torch.Tensor]", right: "Sequence[torch.Tensor]") -> "torch.Tensor":
    """Σ over blocks of left · rightᵀ, float64 on the CPU."""
    import torch

    return torch.stack([(a @ b.T).double().cpu() for a, b in zip(left, right, strict=True)]).sum(0)
