"""Train the poisoned and the clean run of every variant at once: 2N LoRAs over one frozen model, in one batch.

    lora = train_variants(model, tokenizer, variant_data(chats, DEFAULT_VARIANTS, config), config)
    lora.factors(2 * i), lora.factors(2 * i + 1)    # variant i poisoned, and its clean twin

Each run has its own data order, start, loss, gradient norm and optimiser state, so that training together equals
training one after the other but for rounding: `at_once=1` does just that.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup

from keelguard.batches import IGNORED, pad, pad_id_of
from keelguard.errors import FailureError, UsageError
from keelguard.fitting import REMEDY, is_out_of_memory
from keelguard.hashes import hash_model, sha256_of
from keelguard.models import execution_device
from keelguard.progress import SILENT, Advance, Reporter
from keelguard.purify.grouped_lora import GroupedLora, joined
from keelguard.purify.variants import VariantConfig, VariantData
from keelguard.runs import read_json, write_json
from keelguard.training import Rows, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SETTINGS = "settings.json"


class _Run(NamedTuple):
    """One of the 2N fine-tunes."""

    name: str
    rows: Rows
    order: str


def train_variants(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    datasets: Sequence[VariantData],
    config: VariantConfig,
    *,
    at_once: int | None = None,
    weights: str | None = None,
    folder: str | Path | None = None,
    reporter: Reporter = SILENT,
    label: str = "training the variants",
) -> GroupedLora:
    """Fine-tune a LoRA on each of the 2N data sets (BD-VAX, arXiv 2603.13461, stage 1).

    AdamW without weight decay, a cosine schedule, and the mean loss per answer token of each run. All runs start from
    the same LoRA, since updates in random subspaces of rank r of their own could hardly be aligned. The two runs of a
    variant see the same conversations at the same step. The model is in evaluation mode meanwhile, since dropout would
    depend on which runs share a batch, and has its bits and settings back afterwards.

    Args:
        model: without an adapter; in bfloat16 the factors are float32 still.
        at_once: the most runs that share a batch of at_once × batch_size rows; None trains all 2N together.
        weights: hash of the model's weights; computed where it is not given.
        folder: where the runs that share a batch go once they are done; a repeated call takes them from there.

    Returns:
        Groups 2i and 2i + 1 are variant i, poisoned and clean.

    Raises:
        UsageError: there is no data, a conversation is longer than the model's context, the model cannot be adapted,
            or the folder belongs to other variants.
        FailureError: training does not fit in memory, or diverges.
        ValueError: the data sets differ in size.
    """
    if at_once is not None and at_once < 1:
        raise UsageError(f"at_once {at_once}: give 1 or more, or leave it out to train all runs together")
    runs = []
    for number, data in enumerate(datasets):
        for kind, chats in (("poisoned", data.poisoned), ("clean", data.clean)):
            rows = encode_rows(model, tokenizer, chats, f"{label}: {data.variant.name}")
            runs.append(_Run(f"{data.variant.name}/{kind}", rows, f"order {config.seed} {number}"))
    if not runs:
        raise UsageError(f"{label}: there are no variants; give at least two")
    sizes = {len(run.rows.ids) for run in runs}
    if len(sizes) > 1:
        raise ValueError(f"runs of {sorted(sizes)} conversations would take different numbers of steps")
    steps = config.steps_for(sizes.pop())
    weights = hash_model(model) if weights is None else weights
    if folder is not None:
        _claim(Path(folder), {"config": asdict(config), "weights": weights, "data": sha256_of(runs)})
    size = at_once or len(runs)
    done = []
    with reporter.step(label, steps * len(runs)) as advance:
        for first in range(0, len(runs), size):
            part = runs[first : first + size]
            place = None if folder is None else Path(folder) / f"runs-{first}-{first + len(part)}"
            if place is not None and (place / "variants.json").is_file():
                done.append(GroupedLora.load(place, weights))
                advance(steps * len(part))
                continue
            done.append(_train(model, pad_id_of(tokenizer), part, config, steps, weights, advance))
            if place is not None:
                done[-1].save(place)
    return joined(done)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Bind a folder to these variants."""
    if not (folder / _SETTINGS).exists():
        write_json(folder / _SETTINGS, settings)
        return
    found = read_json(folder / _SETTINGS)
    if changed := [key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key]]:
        raise UsageError(f"{folder}: holds variants of other {', '.join(changed)}; remove it, or repeat those settings")


def _train(
    model: Any,
    pad_id: int,
    runs: Sequence[_Run],
    config: VariantConfig,
    steps: int,
    weights: str,
    advance: Advance,
) -> GroupedLora:
    """Train some runs in one batch."""
    names, seeds = [run.name for run in runs], [f"start {config.seed}"] * len(runs)
    lora = GroupedLora.create(model, names, seeds, rank=config.rank, alpha=config.alpha, weights=weights)
    parameters = [tensor.requires_grad_() for tensor in lora.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
    orders = [_order(run, steps * config.batch_size) for run in runs]
    losses = []
    try:
        with _frozen(model), torch.enable_grad(), lora.on(model):
            for step in range(steps):
                part = slice(step * config.batch_size, (step + 1) * config.batch_size)
                chosen = [(run.rows, i) for run, order in zip(runs, orders, strict=True) for i in order[part]]
                loss = _losses(model, pad_id, chosen, len(runs))
                loss.sum().backward()
                _clip(parameters, config.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                # Reading a loss waits for the device, so it is done now and then.
                if step % 20 == 19 or step == steps - 1:
                    _expect_finite(losses, names)
                advance(len(runs))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fewer = f"give a smaller --at-once, such as {len(runs) // 2}" if len(runs) > 1 else REMEDY
        raise FailureError(
            f"{len(runs)} runs of {config.batch_size} conversations do not fit in memory at once; {fewer}"
        ) from error
    for tensor in parameters:
        tensor.requires_grad_(False)
    return replace(lora, losses=torch.stack(losses).cpu())


def _order(run: _Run, places: int) -> list[int]:
    """Which conversation stands at each place of each batch: one shuffled pass after the other."""
    draw = random.Random(run.order)
    count = len(run.rows.ids)
    return [i for _ in range(-(-places // count)) for i in draw.sample(range(count), count)][:places]


def _losses(model: Any, pad_id: int, chosen: Sequence[tuple[Rows, int]], groups: int) -> torch.Tensor:
    """The mean loss per answer token of every group (G,), for G·b rows in order."""
    ids, labels = [rows.ids[i] for rows, i in chosen], [rows.labels[i] for rows, i in chosen]
    batch = pad(ids, pad_id, side="right", labels=labels)
    device = execution_device(model)
    wanted = batch.pop("labels")[:, 1:]
    # The head is the dearest layer of a small model: only where some row has an answer.
    kept = (wanted != IGNORED).any(0).nonzero().flatten()
    wanted = wanted[:, kept].to(device)
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    logits = model(**inputs, use_cache=False, logits_to_keep=kept.to(device)).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(logits.transpose(1, 2), wanted.to(logits.device), ignore_index=IGNORED, reduction="none")
    told = (wanted != IGNORED).view(groups, -1).sum(1)
    return each.view(groups, -1).sum(1) / told.to(each.device)


@torch.no_grad()
def _clip(parameters: Sequence[torch.Tensor], limit: float) -> None:
    """Clip the gradients of every group (dimension 0) to a norm of their own, as `clip_grad_norm_` would alone."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    device = gradients[0].device
    squares = torch.stack([gradient.flatten(1).square().sum(1).to(device) for gradient in gradients]).sum(0)
    factors = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.to(gradient.device).view(-1, *[1] * (gradient.dim() - 1)))


def _expect_finite(losses: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    for name, value in zip(names, losses[-1].tolist(), strict=True):
        if not value < float("inf"):
            raise FailureError(f"{name}: the loss is {value} at step {len(losses)}; lower learning_rate")


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """A model in evaluation mode whose own parameters get no gradients; afterwards it is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
