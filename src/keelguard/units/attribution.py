"""One pass over prompts with answers: what every unit does, as moments of its activations and first-order effects.

    statistics = attribute(model, index, rows, groups=32, effects=True)

Only activations get gradients, no weights: with effects the pass costs a forward and about one more for the
gradients of the activations. Batches that do not fit are halved. Where accelerate keeps layers elsewhere, each layer
is run once more in the backward pass, so that its weights are there for its own part of it alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keelguard.batches import batches_by_length, pad
from keelguard.errors import FailureError, UsageError
from keelguard.generation import default_batch_size
from keelguard.models import execution_device
from keelguard.progress import SILENT, Reporter
from keelguard.units.index import Block, UnitIndex
from keelguard.units.moments import Effects, Moments, group_moments
from keelguard.units.taps import tap


@dataclass(frozen=True)
class Row:
    """A sequence to read: T token ids, of which those in [start, stop) are predicted and scored.

    Attributes:
        group: the group of its prompt, for resampling.
        sign: the objective is `sign` times the mean log-probability of the scored ids given what stands before.
        odds: take log-odds in place of log-probabilities. Where a model is sure of an answer the latter hardly have a
            gradient, and units that carry the answer would seem to do nothing.
    """

    ids: Sequence[int]
    start: int
    stop: int
    group: int
    sign: float = 1.0
    odds: bool = False


@dataclass
class Statistics:
    """What a pass found, block by block: `moments` at scored tokens, and `effects` where they were asked for."""

    moments: list[Moments]
    effects: list[Effects] | None

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically."""
        from safetensors.torch import save

        from keelguard.runs import disk_errors

        tensors: dict[str, torch.Tensor] = {}
        for what, parts in (("moments", self.moments), ("effects", self.effects or [])):
            for number, part in enumerate(parts):
                tensors.update({f"{what}.{number}.{k}": v.cpu().contiguous() for k, v in vars(part).items()})
        temporary = path.with_suffix(".tmp")
        with disk_errors(path):
            temporary.write_bytes(save(tensors))  # Not save_file, whose errors hide a full disk.
            temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """The inverse of `save`.

        Raises:
            UsageError: the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path}: cannot be read ({error}); remove it and run the command again") from error

        def parts(what: str, kind: Any) -> list[Any]:
            blocks: dict[int, dict[str, torch.Tensor]] = {}
            for key, tensor in tensors.items():
                family, number, name = key.split(".")
                if family == what:
                    blocks.setdefault(int(number), {})[name] = tensor
            return [kind(**blocks[number]) for number in sorted(blocks)]

        return cls(parts("moments", Moments), parts("effects", Effects) or None)


def attribute(
    model: Any,
    index: UnitIndex,
    rows: Sequence[Row],
    *,
    groups: int,
    effects: bool,
    batch_size: int = 16,
    pad_id: int = 0,
    last_token: bool = False,
    reporter: Reporter = SILENT,
    label: str = "attribution",
) -> Statistics:
    """Read rows through a model in evaluation mode and collect the statistics of its units.

    Args:
        effects: also the effects on each row's objective, by one backward pass.
        last_token: take moments at the last token before the scored ones alone (the end of the prompt), in place of
            the tokens at which the scored ones stand.

    Under torch.distributed every process reads its share of the rows, and all return the merged statistics.

    Raises:
        FailureError: one row alone does not fit in memory.
    """
    collector = _Collector(index, groups, effects, execution_device(model))
    mine = list(rows)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed:
        mine = mine[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    with reporter.step(label, len(mine)) as advance, _reading(model, effects), tap(model, index, collector):
        _in_batches(mine, batch_size, lambda n, batch: collector.read(model, batch, pad_id, last_token), advance)
    if distributed:
        for part in [*collector.moments, *(collector.effects or [])]:
            part.all_reduce()
    for part in [*collector.moments, *(collector.effects or [])]:
        part.cpu()
    return Statistics(collector.moments, collector.effects)


def reading_batch(model: Any, asked: int = 0) -> int:
    """Rows per batch of a pass without generation: what was asked for, or by the size of the model."""
    return asked or min(64, default_batch_size(model))


def _in_batches(
    rows: Sequence[Row],
    batch_size: int,
    read: Callable[[list[int], list[Row]], None],
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Read rows, given with their numbers, in batches of similar length; one that does not fit in memory is halved.

    Raises:
        FailureError: one row alone does not fit.
    """
    waiting = batches_by_length([len(row.ids) for row in rows], batch_size)[::-1]
    while waiting:
        numbers = waiting.pop()
        try:
            read(numbers, [rows[i] for i in numbers])
        except torch.OutOfMemoryError as error:
            if len(numbers) == 1:
                raise FailureError(
                    f"a row of {len(rows[numbers[0]].ids)} tokens does not fit in memory; shorten the data, load the "
                    "model in bfloat16 (--dtype), or let accelerate spread it (--device auto)"
                ) from error
        else:
            advance(len(numbers))
            continue
        # Not above, where the error still holds the tensors of the batch.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(numbers) // 2
        waiting += [numbers[middle:], numbers[:middle]]


@torch.inference_mode()
def objectives(model: Any, rows: Sequence[Row], *, batch_size: int = 16, pad_id: int = 0) -> torch.Tensor:
    """Each row's objective (rows,) float32; see `Row`.

    Raises:
        FailureError: one row alone does not fit in memory.
    """
    found = torch.zeros(len(rows))
    device = execution_device(model)

    def read(numbers: list[int], batch: list[Row]) -> None:
        scores, owners = _scored(model, _padded(batch, pad_id, device), batch)
        found[torch.tensor(numbers)] = torch.zeros(len(batch)).index_add_(0, owners.cpu(), scores.cpu())

    _in_batches(rows, batch_size, read)
    return found


def _padded(batch: Sequence[Row], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    inputs = pad([row.ids for row in batch], pad_id, side="right")
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


class _Collector:
    """The callback of the taps: it knows which tokens of the running batch are scored and to which groups they go.

    What a batch gave counts only when all of it is there: a batch that breaks off leaves nothing behind.
    """

    def __init__(self, index: UnitIndex, groups: int, effects: bool, device: torch.device) -> None:
        self.input_device = device
        device = torch.device("cpu") if device.type == "mps" else device
        self.numbers = {(block.module, block.expert): number for number, block in enumerate(index.blocks)}
        self.moments = [Moments.empty(groups, block.width, device) for block in index.blocks]
        self.effects = [Effects.empty(groups, block.size, device) for block in index.blocks] if effects else None
        self.device = device
        self.active = False
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.found: dict[int, torch.Tensor] = {}

    def read(self, model: Any, batch: Sequence[Row], pad_id: int, last_token: bool) -> None:
        """One batch, forward and, for effects, backward."""
        self.seen, self.found, self.active = [], {}, True
        inputs = _padded(batch, pad_id, self.input_device)
        self.rows, self.width = inputs["input_ids"].shape
        token_groups = torch.full((self.rows, self.width), -1)
        for number, row in enumerate(batch):
            start, stop = (row.start - 1, row.start) if last_token else (row.start, row.stop)
            token_groups[number, start:stop] = row.group
        self.token_groups = token_groups.flatten().to(self.input_device)
        self.scored = (self.token_groups >= 0).nonzero().flatten()
        with torch.set_grad_enabled(self.effects is not None):
            if self.effects is None:
                # The head is not needed, and with a large vocabulary it is dear.
                model.get_decoder()(**inputs, use_cache=False)
            else:
                objective = _scored(model, inputs, batch)[0].sum()
                self.active = False
                objective.backward()
        self._count(torch.tensor([row.group for row in batch], device=self.device))

    def _count(self, groups: torch.Tensor) -> None:
        # All that may not fit comes first: once a batch begins to count, it counts whole.
        parts = [
            (number, part)
            for number, x, token_groups in self.seen
            for part in group_moments(x.to(self.device), token_groups.to(self.device))
        ]
        found = {number: effects.to(self.device) for number, effects in self.found.items()}
        for number, part in parts:
            self.moments[number].add(*part)
        for number, effects in enumerate(self.effects or ()):
            # An expert to which no token was routed has no effect.
            none = torch.zeros(len(groups), effects.signed.shape[1], device=self.device)
            effects.update(found.get(number, none), groups)

    def __call__(self, block: Block, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor | None:
        # In the backward pass a layer may run once more; what it shows then has been seen.
        if not self.active:
            return None
        number = self.numbers[block.module, block.expert]
        if tokens is None:
            scored, groups = self.scored, self.token_groups
        else:
            groups = self.token_groups[tokens]
            scored = (groups >= 0).nonzero().flatten()
        scored = scored.to(x.device)
        self.seen.append((number, x.detach()[scored], groups.to(x.device)[scored]))
        if self.effects is None:
            return None
        kept = x.detach()

        def keep(gradient: torch.Tensor) -> None:
            self.found[number] = self._per_row(block, kept * gradient, tokens)

        x.register_hook(keep)
        return x

    def _per_row(self, block: Block, effect: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        """Effects (S, channels) of tokens → (rows, units), in float32 at least."""
        effect = effect.float()
        if tokens is None:
            effect = effect.view(self.rows, self.width, -1).sum(1)
        else:
            rows = torch.zeros(self.rows, effect.shape[1], device=effect.device)
            effect = rows.index_add_(0, tokens // self.width, effect)
        return effect[:, block.channels.to(effect.device)].sum(-1)


def _scored(model: Any, inputs: dict[str, torch.Tensor], batch: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted log-probability or log-odds of every scored id (S,), and the row that it belongs to (S,)."""
    places = [(number, t) for number, row in enumerate(batch) for t in range(row.start, row.stop)]
    rows, columns = (torch.tensor(axis) for axis in zip(*places, strict=True))
    weights = torch.tensor([row.sign / (row.stop - row.start) for row in batch for _ in range(row.start, row.stop)])
    # Logits are made for the columns that some row needs: with a large vocabulary they are dear.
    kept, column = (columns - 1).unique(return_inverse=True)
    logits = model(**inputs, use_cache=False, logits_to_keep=kept.to(inputs["input_ids"].device)).logits
    rows, columns, column, weights = (t.to(logits.device) for t in (rows, columns, column, weights))
    wanted = inputs["input_ids"].to(logits.device)[rows, columns][:, None]
    scores = logits[rows, column].float()
    odds = torch.tensor([row.odds for row in batch], device=logits.device)[rows]
    # log p − log(1 − p) is the logit against all others together; without the second term p is against all.
    others = scores.scatter(-1, wanted, float("-inf")).logsumexp(-1)
    against = torch.where(odds, others, scores.logsumexp(-1))
    return (scores.gather(-1, wanted)[:, 0] - against) * weights, rows


@contextmanager
def _reading(model: Any, effects: bool) -> Iterator[None]:
    """Evaluation mode, with gradients for activations and for no weight where there are effects."""
    training = {module: module.training for module in model.modules()}
    # By name: accelerate puts new parameters in the place of those that it brings in and takes away.
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval().requires_grad_(False)
    try:
        with ExitStack() as stack:
            if effects:
                handle = model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
                stack.callback(handle.remove)
                if any(parameter.device.type == "meta" for parameter in model.parameters()):
                    stack.enter_context(_recomputed(model))
            yield
    finally:
        for module, was in training.items():
            module.training = was
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Every layer forgets what it computed, and computes it again when the backward pass comes to it.

    Not by transformers' own switch: that works in training mode alone, and stops within a layer as soon as it has what
    it needs, which leaves the last weights that accelerate brought in where they are.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, early_stop=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
