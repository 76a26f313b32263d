"""Train a safety signal: `keelguard guard train MODEL --harmful FILE --benign FILE --out DIR`.

    signal = train_signal(model, tokenizer, weights, rows, validation, SignalConfig())

labelled data → material (variants, the model's own answers) → looks → a Trainer → thresholds on benign validation data.
The default, a probe row, leaves the model as it is; the paper's prefix fine-tunes it.
"""

import random
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import set_seed

from keelguard.batches import pad_id_of
from keelguard.chats import encode_chat
from keelguard.errors import UsageError
from keelguard.evaluation.judges import Judge
from keelguard.guard.adapter import PLACEMENTS, Placement, Signal
from keelguard.guard.augment import FRAMES, HELD_FRAMES
from keelguard.guard.calibration import Calibration, highest_per_item, reliability, threshold_for
from keelguard.guard.labels import Labelled, require_both
from keelguard.guard.linear import fit_linear
from keelguard.guard.looks import Drawn, Example, Policed, Scheduled, make_examples, split_classes
from keelguard.guard.masks import check_attention
from keelguard.guard.material import Material, MaterialConfig, gather, gather_benign
from keelguard.guard.modules import ProbeModule, probe_batch
from keelguard.guard.policy import PolicyConfig
from keelguard.guard.scoring import score_examples
from keelguard.hashes import sha256_of
from keelguard.processes import is_main
from keelguard.progress import SILENT, Reporter
from keelguard.records import user
from keelguard.training import SCHEDULERS, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SignalConfig:
    """How a signal is trained and calibrated.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    placement: Placement = _option("probe", "probe, prefix (the paper's) or linear (the baseline)")
    steps: int = _option(300, "optimiser steps; 0 counts by epochs")
    epochs: float = _option(1.0, "passes through the material; not read where steps are given")
    learning_rate: float = _option(2e-3, "peak learning rate of AdamW")
    cls_weight: float = _option(0.1, "prefix: weight of the verdict's loss beside the language model's (the paper's λ)")
    pretrain_weight: float = _option(0.01, "prefix: the same while pre-training on labelled plain text")
    recovery: float = _option(0.0, "prefix: share of answers that start harmfully and are taught to recover")
    batch_size: int = _option(32, "conversations per step")
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    scheduler: Literal["linear", "cosine", "constant"] = _option("linear", "linear, cosine or constant")
    warmup: float = _option(0.05, "share of the steps over which the learning rate rises")
    lora_rank: int = _option(8, "rank of the row's own weights; for a prefix, of the model's LoRA; 0 for none")
    looks: int = _option(16, "lengths at which each answer is judged in training")
    target: float = _option(0.02, "share of benign validation answers that may be refused, and of queries")
    floor: float = _option(0.5, "least threshold, whatever the validation data allow")
    policy: PolicyConfig = _option(PolicyConfig(), "when to look and what to do; thresholds are calibrated")
    material: MaterialConfig = _option(MaterialConfig(), "what is made of the data")
    seed: int = _option(0, "start of the row, order of the material")
    save_every: int = _option(0, "steps between two checkpoints to resume from; 0 keeps none")
    bf16: bool = _option(False, "compute in bfloat16 (autocast); what trains stays float32")

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise UsageError(f"placement {self.placement}: unknown; choose one of {', '.join(PLACEMENTS)}")
        for name, least in (("looks", 1), ("lora_rank", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)}: give {least} or more")
        for name in ("cls_weight", "pretrain_weight"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} {getattr(self, name)}: give 0 or more")
        for name in ("target", "floor"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: give at least 0 and less than 1")
        if self.scheduler not in SCHEDULERS:
            raise UsageError(f"scheduler {self.scheduler}: unknown; choose one of {', '.join(SCHEDULERS)}")
        self.budget()

    def budget(self) -> TrainConfig:
        """The settings that every training of keelguard has."""
        return TrainConfig(
            steps=self.steps,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            scheduler=self.scheduler,
            warmup=self.warmup,
            seed=self.seed,
            save_every=self.save_every,
            bf16=self.bf16,
        )


def train_signal(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    weights: str,
    data: Sequence[Labelled],
    validation: Sequence[Labelled],
    config: SignalConfig = SignalConfig(),
    *,
    frames: Sequence[str] = FRAMES,
    held_frames: Sequence[str] = HELD_FRAMES,
    judge: Judge | None = None,
    state_folder: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> Signal:
    """Train a probe row or a linear probe beside a model, which stays as it is, and calibrate it.

    Args:
        weights: the hash of the model's weights.
        data: labelled conversations of both classes.
        validation: others; the benign ones choose the thresholds, all of them show how reliable probabilities are.
        frames: texts with `{request}` that queries are also asked in.
        held_frames: others, in which benign validation queries are asked for the thresholds.
        judge: labels the model's own answers.
        state_folder: where checkpoints go, and where a repeated call resumes from; the caller removes it.

    Raises:
        UsageError: a class is missing, a conversation is too long, or the model's attention cannot be looked into.
        FailureError: training does not fit in memory, or diverges.
    """
    check_attention(model)
    require_both(validation, "validation")
    store = None if state_folder is None else Path(state_folder)
    material = gather(
        model, tokenizer, data, config.material, frames=frames, judge=judge, store=store, reporter=reporter
    )
    return fit_signal(
        model, tokenizer, weights, material, validation, config,
        frames=frames, held_frames=held_frames, judge=judge, state_folder=state_folder, reporter=reporter,
    )  # fmt: skip


def fit_signal(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    weights: str,
    material: Material,
    validation: Sequence[Labelled],
    config: SignalConfig,
    *,
    frames: Sequence[str] = FRAMES,
    held_frames: Sequence[str] = HELD_FRAMES,
    judge: Judge | None = None,
    state_folder: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> Signal:
    """As `train_signal`, from material that is there; several signals can share it."""
    places = Drawn(config.looks, random.Random(f"looks-{config.seed}"))
    examples = make_examples(model, tokenizer, material.rows, places=places, windows=windows_of(config.policy))
    set_seed(config.seed)
    if config.placement == "linear":
        held = make_examples(model, tokenizer, validation, places=Scheduled())
        signal = fit_linear(model, tokenizer, weights, examples, held, reporter=reporter)
    elif config.placement == "probe":
        signal = Signal.create(model, weights, "probe", config.lora_rank, start=deciding_token(tokenizer))
        train_probe(model, tokenizer, signal, examples, config, state_folder, reporter)
    else:
        raise UsageError(f"placement {config.placement}: changes the model; use train_prefix")
    signal.refusals = material.refusals
    signal.training = {
        **describe(config),
        "material": len(material.rows),
        "looks": {f"{'answer' if at else 'query'} {'malicious' if bad else 'benign'}": n
                  for (at, bad), n in sorted(split_classes(examples).items())},
    }  # fmt: skip
    signal.policy = config.policy
    store = None if state_folder is None or not is_main() else Path(state_folder) / "benign.jsonl"
    return calibrate(model, tokenizer, signal, validation, config, frames=held_frames, store=store, reporter=reporter)


def windows_of(policy: PolicyConfig) -> int:
    """How many of the latest tokens a look at an answer sees under a policy; 0 for all before it."""
    return policy.r2 if policy.attention == "windows" else 0


def deciding_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The last token before an answer begins: behind it the model itself decides whether to refuse."""
    return encode_chat(tokenizer, [user("a")], add_generation_prompt=True).ids[-1]


def describe(config: SignalConfig) -> dict[str, Any]:
    """The settings as the signal keeps them."""
    return {"config": {name: value for name, value in asdict(config).items() if name != "policy"}}


def train_probe(
    model: Any,
    tokenizer: Any,
    signal: Signal,
    examples: Sequence[Example],
    config: SignalConfig,
    state_folder: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> list[float]:
    """Train a probe's row, head and LoRA in place; the loss of every step."""
    from keelguard.training_loop import Data

    module = ProbeModule(model, signal)
    counts = split_classes(examples)
    # The four kinds of looks count alike, however many there are of each.
    share = {key: sum(counts.values()) / (len(counts) * count) for key, count in counts.items()}
    items = [
        {"example": example, "weights": [share[look.position > 0, look.malicious] for look in example.looks]}
        for example in examples
    ]
    pad_id = pad_id_of(tokenizer)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return probe_batch([item["example"] for item in batch], [item["weights"] for item in batch], pad_id)

    digest = sha256_of([[e.ids, [[*look.view, look.malicious] for look in e.looks]] for e in examples])
    lengths = [len(example.ids) for example in examples]
    order = by_length(lengths, config.batch_size, config.budget().steps_for(len(items)), config.seed)
    losses = run_trainer(module, tokenizer, Data(items, collate, digest), config, state_folder, reporter, order=order)
    module.detach()
    return losses


def by_length(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Items for every place of every batch: shuffled passes, in which items of a batch are of like length.

    The frozen model's pass over the tokens is most of a step's cost, and padding would be half of it.
    """
    draw = random.Random(f"order-{seed}")
    batches: list[list[int]] = []
    while len(batches) < steps:
        shuffled = draw.sample(range(len(lengths)), len(lengths))
        # The pass is cut into stretches, so that batches stay mixed in all but their length.
        stretch = 16 * batch_size
        parts = [sorted(shuffled[i : i + stretch], key=lengths.__getitem__) for i in range(0, len(shuffled), stretch)]
        cut = [part[i : i + batch_size] for part in parts for i in range(0, len(part), batch_size)]
        whole = [batch for batch in cut if len(batch) == batch_size] or [
            draw.choices(range(len(lengths)), k=batch_size)
        ]
        draw.shuffle(whole)
        batches += whole
    return [i for batch in batches[:steps] for i in batch]


def run_trainer(
    module: Any, tokenizer: Any, data: Any, config: SignalConfig,
    state_folder: str | Path | None, reporter: Reporter, label: str = "training the signal",
    order: list[int] | None = None,
) -> list[float]:  # fmt: skip
    """Train a module by the loop that fine-tuning shares, with its checkpoints and its progress."""
    from keelguard.guard.trainer import SignalTrainer
    from keelguard.training_loop import fit

    budget = config.budget()
    with ExitStack() as stack:
        folder = state_folder or stack.enter_context(tempfile.TemporaryDirectory())
        return fit(
            module,
            tokenizer,
            data,
            budget,
            order=order,
            steps=budget.steps_for(len(data.items)),
            methods=(),
            callbacks=(),
            folder=Path(folder),
            resumable=state_folder is not None and budget.save_every > 0,
            reporter=reporter,
            label=label,
            trainer_class=SignalTrainer,
        )


def calibrate(
    model: Any,
    tokenizer: Any,
    signal: Signal,
    validation: Sequence[Labelled],
    config: SignalConfig,
    *,
    frames: Sequence[str] = HELD_FRAMES,
    store: Path | None = None,
    reporter: Reporter = SILENT,
) -> Signal:
    """Choose both thresholds on benign validation data, and keep how reliable the probabilities are.

    An answer counts by its highest verdict over the lengths at which the policy looks: false refusals are mostly
    multiple testing.
    """
    benign = gather_benign(model, tokenizer, validation, config.material, frames=frames, store=store, reporter=reporter)
    rows = [*benign, *(row for row in validation if row.malicious)]
    # Who looks at queries alone still gets a threshold for answers, that of the default schedule.
    looking = replace(signal.policy, cadence="annealing") if signal.policy.cadence == "first" else signal.policy
    examples = make_examples(model, tokenizer, rows, places=Policed(looking), windows=windows_of(looking))
    scores = score_examples(model, tokenizer, signal, examples, reporter=reporter, label="calibration")
    triples = [
        (i, look, score)
        for i, (example, found) in enumerate(zip(examples, scores, strict=True))
        for look, score in zip(example.looks, found, strict=True)
    ]
    query = [(i, look, score) for i, look, score in triples if look.position == 0]
    answers = [(i, look, score) for i, look, score in triples if look.position > 0]
    kept = [(i, score) for i, _, score in answers if i < len(benign)]
    calibration = Calibration(
        query=threshold_for([score for i, _, score in query if i < len(benign)], config.target, config.floor),
        answer=threshold_for(
            highest_per_item([score for _, score in kept], [i for i, _ in kept]), config.target, config.floor
        ),
        curve=tuple(reliability([s for _, _, s in answers], [int(look.malicious) for _, look, _ in answers])),
        query_curve=tuple(reliability([s for _, _, s in query], [int(look.malicious) for _, look, _ in query])),
    )
    policy = replace(signal.policy, threshold=calibration.answer.threshold, query_threshold=calibration.query.threshold)
    return replace(signal, calibration=calibration, policy=policy)
