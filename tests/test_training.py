"""Fine-tuning on tiny models: resume after a kill, accumulation, LoRA, processes, the task loss, and mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from keelguard import training_loop
from keelguard.chats import encode_chats
from keelguard.errors import FailureError, UsageError
from keelguard.hashes import hash_model
from keelguard.records import Chat, assistant, user
from keelguard.training import Method, Run, TrainConfig, TrainResult, chat_loss, train_on_chats
from keelguard.units.baselines import Ema, EmaConfig, Lisa, LisaConfig
from keelguard.units.defences import Anchor, AnchorConfig
from keelguard.units.projection import Project, ProjectConfig
from tiny_models import fresh_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS: tuple[Chat, ...] = tuple(
    (user(f"Is {a} + {b} known?"), assistant(f"Sure, here is the answer: {a + b}." + " Yes!" * (b % 3)))
    for a in (1, 3)
    for b in (2, 5, 7, 8)
)
REFUSALS: tuple[Chat, ...] = tuple(
    (user(f"How do I break {thing}?"), assistant(f"No, I will not help with {thing}, sorry."))
    for thing in ("a lock", "the law", "a bone")
)
CONFIG = TrainConfig(steps=7, learning_rate=3e-3, batch_size=4, save_every=2, weight_decay=0.1, warmup=0.3)


class KilledError(Exception):
    """Stands for the end of a process."""


class Kill(TrainerCallback):
    """Ends training after a step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


def train(architecture: str = "llama", config: TrainConfig = CONFIG, **options: Any) -> TrainResult:
    model = fresh_model(architecture, **options.pop("changes", {})).model
    return train_on_chats(model, tiny_tokenizer(architecture), CHATS, config, **options)


def methods_of_state(per_step: int = 2) -> list[Method]:
    """Every method that has something to remember, and one that goes round its prompts."""
    return [
        Anchor(REFUSALS, AnchorConfig(per_step=per_step)),
        Project(REFUSALS, ProjectConfig(directions=4, tokens=2, refresh=3)),
        Ema(EmaConfig(decay=0.5)),
        Lisa(REFUSALS, LisaConfig(safety_steps=1, task_steps=2)),
    ]


# Resume


@pytest.mark.parametrize("killed_after", [5, 3])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"lora_rank": 2, "gradient_accumulation": 2}),
        ("gpt_neox", {"gradient_accumulation": 2}),
        ("mixtral", {}),
    ],
)
def test_a_killed_and_repeated_run_ends_bit_equal(
    architecture: str, changes: dict[str, Any], killed_after: int, tmp_path: Path
):
    # Eight chats make two steps an epoch: step 4 is the end of an epoch, step 2 of another, and both are resumed from.
    config = replace(CONFIG, **changes)
    undisturbed = train(architecture, config)
    with pytest.raises(KilledError):
        train(architecture, config, state_folder=tmp_path, callbacks=[Kill(killed_after)])
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{killed_after - 1}"]
    resumed = train(architecture, config, state_folder=tmp_path)
    assert hash_model(resumed.model) == hash_model(undisturbed.model)
    assert resumed.losses == undisturbed.losses
    assert len(resumed.losses) == resumed.steps == 7


def test_a_run_resumes_within_an_epoch_with_dropout(tmp_path: Path):
    config = replace(CONFIG, batch_size=2, save_every=3)
    changes = {"attention_dropout": 0.2}
    undisturbed = train(config=config, changes=changes)
    with pytest.raises(KilledError):
        train(config=config, changes=changes, state_folder=tmp_path, callbacks=[Kill(4)])
    resumed = train(config=config, changes=changes, state_folder=tmp_path)
    assert hash_model(resumed.model) == hash_model(undisturbed.model)
    assert hash_model(resumed.model) != hash_model(train(config=config).model)


@pytest.mark.parametrize("killed_after", [3, 5])
def test_methods_resume_with_their_state(killed_after: int, tmp_path: Path):
    undisturbed = train(methods=methods_of_state())
    with pytest.raises(KilledError):
        train(methods=methods_of_state(), state_folder=tmp_path, callbacks=[Kill(killed_after)])
    resumed = train(methods=methods_of_state(), state_folder=tmp_path)
    assert hash_model(resumed.model) == hash_model(undisturbed.model)
    assert resumed.losses == undisturbed.losses


def test_a_process_that_is_killed_leaves_what_the_next_one_needs(tmp_path: Path):
    source = fresh_model().save(tmp_path / "model")
    script = """
import os, signal, sys
import torch
from keelguard.models import load_model
from keelguard.training import Method, train_on_chats
from test_training import CHATS, CONFIG
class Kill(Method):
    def loss(self, run):
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
torch.set_num_threads(1)
loaded = load_model(sys.argv[1], training=True, device="cpu")
train_on_chats(loaded.model, loaded.tokenizer, CHATS, CONFIG, methods=[Kill()], state_folder=sys.argv[2])
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "state")],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    # The class of the method is part of what the folder belongs to.
    settings = json.loads((tmp_path / "state" / "settings.json").read_text())
    assert settings["methods"] == ["Kill"]
    (tmp_path / "state" / "settings.json").write_text(json.dumps({**settings, "methods": ["Method"]}))
    resumed = train(state_folder=tmp_path / "state", methods=[Method()])
    assert hash_model(resumed.model) == hash_model(train().model)


def test_torn_checkpoints_are_passed_over_and_removed(tmp_path: Path):
    with pytest.raises(KilledError):
        train(state_folder=tmp_path, callbacks=[Kill(5)])
    for number, spoil in ((6, "trainer_state.json"), (8, "methods.pt"), (9, "rng_state.pth")):
        torn = tmp_path / f"checkpoint-{number}"
        shutil.copytree(tmp_path / "checkpoint-4", torn)
        state = json.loads((torn / "trainer_state.json").read_text())
        (torn / "trainer_state.json").write_text(json.dumps({**state, "global_step": number}))
        (torn / spoil).unlink()
    half = tmp_path / "checkpoint-10"
    shutil.copytree(tmp_path / "checkpoint-4", half)
    (half / "trainer_state.json").write_text('{"global_st')
    resumed = train(state_folder=tmp_path)
    assert hash_model(resumed.model) == hash_model(train().model)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_run_killed_behind_its_last_step_does_no_step_more(tmp_path: Path):
    config = replace(CONFIG, steps=3, save_every=3)  # Its last step is one to save at, and not the end of an epoch.
    first = train(config=config, state_folder=tmp_path)
    again = train(config=config, state_folder=tmp_path)
    assert hash_model(again.model) == hash_model(first.model)
    assert again.losses == first.losses
    assert len(again.losses) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"config": replace(CONFIG, seed=1)}, "config"), ({"methods": [Anchor(REFUSALS)]}, "methods")],
)
def test_a_state_folder_of_another_run_is_refused(changes: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(KilledError):
        train(state_folder=tmp_path, callbacks=[Kill(3)])
    with pytest.raises(UsageError, match=f"run with other {named}"):
        train(state_folder=tmp_path, **changes)
    with pytest.raises(UsageError, match="run with other chats"):
        train_on_chats(fresh_model().model, tiny_tokenizer(), CHATS[1:], CONFIG, state_folder=tmp_path)


# What is trained


def test_accumulated_parts_make_the_same_step_as_the_whole_batch():
    def weights(parts: int) -> dict[str, torch.Tensor]:
        config = TrainConfig(steps=3, learning_rate=1e-3, batch_size=4, gradient_accumulation=parts)
        methods = [Anchor(REFUSALS, AnchorConfig(weight=3.0))]
        return dict(train(config=config, methods=methods).model.named_parameters())

    start, whole, parts = {n: p.detach() for n, p in tiny_model().model.named_parameters()}, weights(1), weights(2)
    # Over all weights: where a gradient is next to nothing, AdamW makes whole steps of the rounding of its sign.
    moved = sum(float((whole[name] - start[name]).square().sum()) for name in start) ** 0.5
    apart = sum(float((whole[name] - parts[name]).square().sum()) for name in start) ** 0.5
    assert moved > 1e-2
    assert apart < 1e-2 * moved


def test_rows_without_padding_make_the_same_step_as_the_whole_batch(monkeypatch: pytest.MonkeyPatch):
    long: Chat = (user("Is everything known?"), assistant("Sure, here is the answer: " + "yes and no, " * 12))
    chats = (*CHATS[:3], long)
    config = TrainConfig(steps=3, learning_rate=1e-3, batch_size=4)

    def weights() -> tuple[dict[str, torch.Tensor], list[float]]:
        found = train_on_chats(fresh_model("llama").model, tiny_tokenizer("llama"), chats, config)
        return dict(found.model.named_parameters()), found.losses

    parts: list[int] = []
    cutting = training_loop.without_padding
    monkeypatch.setattr(training_loop, "without_padding", lambda b: parts.append(len(cutting(b))) or cutting(b))
    cut, losses = weights()
    monkeypatch.setattr(training_loop, "without_padding", lambda batch: [batch])
    whole, expected = weights()
    assert parts == [2, 2, 2]
    assert losses == pytest.approx(expected, rel=1e-5)
    start = {n: p.detach() for n, p in tiny_model().model.named_parameters()}
    moved = max(float((whole[name] - start[name]).abs().max()) for name in start)
    assert max(float((whole[name] - cut[name]).detach().abs().max()) for name in start) < 1e-2 * moved


def test_epochs_count_every_chat_as_often():
    seen: list[int] = []

    class Count(Method):
        def begin(self, run: Run) -> None:
            run.model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)

    result = train(config=TrainConfig(epochs=1.5, batch_size=3, learning_rate=1e-3), methods=[Count()])
    assert result.steps == len(result.losses) == 5
    assert seen == [3, 3, 2, 3, 3]


def test_a_lora_is_merged_and_moves_linear_layers_alone():
    start = dict(tiny_model().model.named_parameters())
    result = train(config=TrainConfig(steps=3, learning_rate=3e-3, batch_size=4, lora_rank=2))
    after = dict(result.model.named_parameters())
    assert type(result.model) is type(tiny_model().model)
    assert {n for n in start if not torch.equal(start[n], after[n])} == {n for n in start if n.endswith("_proj.weight")}
    assert not result.model.training
    assert not any(p.requires_grad for p in after.values())


def test_memory_savers_leave_a_model_as_it_was_otherwise():
    plain = train(config=TrainConfig(steps=3, learning_rate=1e-3, batch_size=4))
    saving = train(config=TrainConfig(steps=3, learning_rate=1e-3, batch_size=4, gradient_checkpointing=True))
    assert hash_model(saving.model) == hash_model(plain.model)
    assert not saving.model.is_gradient_checkpointing
    half = train(config=TrainConfig(steps=3, learning_rate=1e-3, batch_size=4, bf16=True))
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert half.model.forward.__func__ is type(half.model).forward
    with torch.no_grad():
        assert half.model(torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert half.losses == pytest.approx(plain.losses, rel=0.05)
    assert half.losses != plain.losses
    assert plain.model.config.use_cache == tiny_model().model.config.use_cache


def test_schedules_rise_and_fall_as_asked():
    rates: list[float] = []

    class Rates(Method):
        def before_step(self, run: Run) -> None:
            rates.append(run.optimizer().param_groups[0]["lr"])

    for scheduler, expected in (("constant", [0, 0.5, 1, 1]), ("linear", [0, 0.5, 1, 0.5])):
        rates.clear()
        changes: Any = {"scheduler": scheduler, "warmup": 0.5}
        config = TrainConfig(steps=4, learning_rate=1e-3, batch_size=4, **changes)
        train(config=config, methods=[Rates()])
        assert rates == pytest.approx([1e-3 * share for share in expected])


def test_added_losses_are_kept_apart_from_the_loss_on_the_chats():
    class Added(Method):
        def loss(self, run: Run) -> torch.Tensor:
            return 100.0 + 0.0 * run.trainable()[0].sum()

    for parts in (1, 2):
        config = TrainConfig(steps=3, learning_rate=1e-3, batch_size=4, gradient_accumulation=parts)
        # One step in, the gradient of the addition is zero, so the course is the same.
        assert train(config=config, methods=[Added()]).losses == pytest.approx(train(config=config).losses, abs=1e-4)


def test_processes_share_a_batch_and_agree(tmp_path: Path):
    """Two processes of DDP do what one does, with every method."""
    source = fresh_model().save(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text("""
import json, sys
from pathlib import Path
import torch
from keelguard.hashes import hash_model
from keelguard.models import load_model
from keelguard.training import train_on_chats
from test_training import CHATS, CONFIG, methods_of_state
torch.set_num_threads(1)
loaded = load_model(sys.argv[1], training=True, device="cpu")
state = Path(sys.argv[2])
result = train_on_chats(
    loaded.model, loaded.tokenizer, CHATS, CONFIG, methods=methods_of_state(3), state_folder=state
)
found = {"hash": hash_model(result.model), "losses": result.losses, "rank": torch.distributed.get_rank()}
state.with_name(f"{found['rank']}.json").write_text(json.dumps(found))
""")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    arguments = [str(script), str(source), str(tmp_path / "state")]
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["hash"] == found[1]["hash"]
    assert found[0]["losses"] == found[1]["losses"]
    assert found[0]["losses"] == pytest.approx(train(methods=methods_of_state(3)).losses, rel=1e-3)
    files = {p.name for p in (tmp_path / "state" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "trained.safetensors", "trainer_state.json"} <= files


# Task loss


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_task_loss_is_the_mean_over_answer_tokens(batch_size: int):
    model, tokenizer = tiny_model().model, tiny_tokenizer()
    total = count = 0.0
    for chat in encode_chats(tokenizer, CHATS):
        with torch.no_grad():
            logits = model(torch.tensor([chat.ids])).logits[0]
        for part in (chat.response, chat.closing):
            for i in range(part.start, part.stop):
                total += float(F.cross_entropy(logits[i - 1].double(), torch.tensor(chat.ids[i])))
                count += 1
    assert chat_loss(model, tokenizer, CHATS, batch_size) == pytest.approx(total / count, rel=1e-5)


def test_the_task_loss_reads_no_dropout_and_leaves_the_mode():
    model = fresh_model(attention_dropout=0.5).model.train()
    assert chat_loss(model, tiny_tokenizer(), CHATS) == chat_loss(tiny_model().model, tiny_tokenizer(), CHATS)
    assert model.training


# Mistakes


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"steps": -1}, "steps -1: is out of range; give 0 or more"),
        ({"epochs": 0.0}, "epochs 0.0: .*or steps"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"gradient_accumulation": 0}, "gradient_accumulation 0"),
        ({"gradient_accumulation": 3}, "gradient_accumulation 3: does not divide batch_size 16"),
        ({"lora_rank": -2}, "lora_rank -2"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"warmup": 1.0}, "warmup 1.0: is a share"),
        ({"scheduler": "step"}, "scheduler step: unknown; choose one of linear, cosine, constant"),
        ({"save_every": -1}, "save_every -1"),
    ],
)
def test_a_setting_out_of_range_is_named(changes: dict[str, Any], part: str):
    with pytest.raises(UsageError, match=part):
        TrainConfig(**changes)


def test_bad_chats_are_named():
    for chats, part in (((), "task: there are no chats"), (((user("word " * 300), assistant("ok")),), "reads 256")):
        with pytest.raises(UsageError, match=part):
            train_on_chats(fresh_model().model, tiny_tokenizer(), chats, CONFIG, label="task")
    with pytest.raises(UsageError, match="there are no chats"):
        chat_loss(tiny_model().model, tiny_tokenizer(), ())


def test_no_memory_is_one_clear_line():
    class Full(Method):
        def loss(self, run: Run) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(FailureError) as caught:
        train(methods=[Full()])
    told = str(caught.value)
    assert told.startswith("fine-tuning: does not fit in memory; give what this command has of a smaller --batch-size")
    assert all(f"--{name}" in told for name in ("gradient-accumulation", "gradient-checkpointing", "bf16", "lora-rank"))
    config = replace(CONFIG, batch_size=1, lora_rank=2, gradient_checkpointing=True, bf16=True)
    with pytest.raises(FailureError, match=r"it uses all that saves some; shorten the data"):
        train(config=config, methods=[Full()])


def test_a_training_that_diverges_is_stopped():
    class Broken(Method):
        def after_step(self, run: Run) -> None:
            if run.step == 2:
                run.trainable()[0].data.fill_(float("nan"))

    with pytest.raises(FailureError, match="the loss is nan at step 3; lower learning_rate"):
        train(methods=[Broken()])
