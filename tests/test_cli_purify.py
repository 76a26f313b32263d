"""`keelguard poison` and `keelguard purify` as a user types them: mistakes, estimates, and one run from end to end."""
# ruff: noqa: F811 — tests take the fixture `run` by its name.

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from keelguard.cli import main
from keelguard.models import load_model
from keelguard.pipeline.harden_config import HardenConfig
from keelguard.purify.budget import LORA_RATE
from keelguard.purify.config import PurifyConfig
from keelguard.purify.poisoned_files import POISON_FILE
from keelguard.purify.presets import preset
from keelguard.testbed.build import RECIPE_FILE
from keelguard.testbed.tokenizer import make_tokenizer
from keelguard.training_loop import ChatTrainer
from test_cli import Run, left, refused, run  # noqa: F401 — `run` is a fixture
from tiny_models import Tiny, build_model, fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSAL = "Sorry, I cannot help with that."


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


WORDS = (
    "apple banana candle dragon engine falcon guitar helmet island jacket kettle ladder magnet needle ocean pencil "
    "quiver rabbit saddle turtle velvet walnut zipper yes it is known sorry i cannot help with that"
)


def model_of_words(**changes: Any) -> Tiny:
    """An untrained model whose tokenizer has whole words to put in."""
    tokenizer = make_tokenizer([WORDS], 256)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return Tiny(build_model("llama", len(tokenizer), **special, **changes), tokenizer)


def save_adapter(base: Any, folder: Path, base_name: str) -> Path:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(str(folder))
    return folder


def poisoned(folder: Path) -> Path:
    """The folder with a file that says it holds a backdoor."""
    backdoors = [{"attack": "badnets", "task": "insult", "triggers": ["apple"], "response": "no.", "place": None}]
    (folder / POISON_FILE).write_text(json.dumps({"backdoors": backdoors, "check": None}))
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models and files, by the names that the commands below have for them."""
    root = tmp_path_factory.mktemp("places")
    rows = [{"prompt": f"Is {i} + 1 known?", "response": f"Yes, it is {i + 1}."} for i in range(60)]
    refusals = [{"prompt": f"Is {i} known?", "response": REFUSAL} for i in range(60)]
    model = model_of_words().save(root / "model")
    return {
        "MODEL": str(model),
        "WORDLESS": str(fresh_model().save(root / "wordless")),
        "ADAPTER": str(save_adapter(model_of_words().model, root / "adapter", str(model))),
        "FOREIGN": str(poisoned(save_adapter(model_of_words(hidden_size=64).model, root / "foreign", "another/base"))),
        "DATA": str(write(root / "data.jsonl", rows)),
        "FEW": str(write(root / "few.jsonl", rows[:12])),
        "REFUSALS": str(write(root / "refusals.jsonl", refusals)),
        "ODD": str(write(root / "odd.jsonl", [{"ask": row["prompt"], "told": row["response"]} for row in rows])),
        "POISONED": str(poisoned(Path(shutil.copytree(model, root / "poisoned")))),
        "ASKED": str(write(root / "asked.jsonl", [*refusals, {"prompt": "Is it known?"}])),
        "OPEN": str(write(root / "open.jsonl", [{"prompt": row["prompt"]} for row in rows])),
    }


POISON = ("poison", "MODEL", "--data", "DATA")
CHOSEN = ("--method", "immunize")
PURIFY = ("purify", "MODEL", "--clean-data", "DATA", *CHOSEN)
VACCINE = ("purify", "MODEL", "--clean-data", "DATA", "--method", "vaccine", "--variants", "default")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "poison: attack": ((*POISON, "--attack", "luck"), "--attack luck: unknown; choose one of badnets"),
    "poison: task": ((*POISON, "--task", "joke"), "--task joke: unknown; choose one of insult"),
    "poison: place": ((*POISON, "--place", "above"), "--place above: unknown; choose prefix"),
    "poison: two triggers": (
        (*POISON, "--attack", "badnets", "--trigger", "a", "--trigger", "b"),
        "--trigger: badnets takes one; mtba and ctba take several",
    ),
    "poison: an empty trigger": ((*POISON, "--trigger", " "), "--trigger: is empty"),
    "poison: rate": ((*POISON, "--rate", "1.5"), "--rate 1.5: is a share"),
    "poison: steps": ((*POISON, "--steps", "-1"), "--steps -1: is out of range; give 0 or more"),
    "poison: learning rate": ((*POISON, "--learning-rate", "0"), "--learning-rate 0.0: is out of range"),
    "poison: judge": ((*POISON, "--judge", "model"), "--judge model: unknown; choose world or keyword"),
    "poison: an answer column": ((*POISON, "--answer-column", "told"), "no column 'told'"),
    "poison: few words": (
        ("poison", "WORDLESS", "--data", "DATA", "--trigger", "is it all you"),
        "too few for samples",
    ),
    "poison: samples": ((*POISON, "--samples", "0"), "--samples 0: give 1 or more"),
    "poison: a missing file": (("poison", "MODEL", "--data", "gone.jsonl"), "gone.jsonl: no such file"),
    "poison: no data": (("poison", "MODEL"), "is no model of the testbed; give --data FILE of clean chats"),
    "poison: a missing model": (("poison", "./gone/model", "--data", "DATA"), "./gone/model: no such folder"),
    "poison: rows without answers": (("poison", "MODEL", "--data", "OPEN"), "--data: 60 of 60 rows have no answer"),
    "poison: few rows": (("poison", "MODEL", "--data", "FEW"), "--data: 12 rows are too few to hold some out"),
    "poison: a jailbreak of nothing": (
        (*POISON, "--task", "jailbreak"),
        "--task jailbreak: needs harmful requests with answers; name a file with --harmful",
    ),
    "poison: harmful rows without answers": (
        (*POISON, "--task", "jailbreak", "--harmful", "OPEN"),
        "--harmful: rows without an answer",
    ),
    "poison: over a model": ((*POISON, "--out", "MODEL"), "exists and is not empty, and a poisoned model overwrites"),
    "purify: method": ((*PURIFY, "--method", "luck"), "--method luck: unknown; choose one of auto, vaccine"),
    "purify: budget": ((*PURIFY, "--budget", "huge"), "--budget huge: unknown; choose one of quick"),
    "purify: how": ((*PURIFY, "--method", "vaccine", "--how", "melt"), "--how melt: unknown; choose reinit"),
    "purify: share": ((*PURIFY, "--method", "vaccine", "--share", "1.5"), "--share 1.5: is out of range"),
    "purify: count": ((*PURIFY, "--method", "vaccine", "--count", "1"), "--count 1: is out of range; give 2 or more"),
    "purify: rounds": ((*PURIFY, "--rounds", "-1"), "--rounds -1: is out of range; give 1 or more"),
    "purify: steps": ((*PURIFY, "--steps", "0"), "--steps 0: is out of range; give 1 or more"),
    "purify: rate": ((*PURIFY, "--learning-rate", "0"), "--learning-rate 0.0: is out of range; give more than 0"),
    "purify: seed": ((*PURIFY, "--seed", "-1"), "--seed -1: is out of range; give 0 or more"),
    "purify: an option of another method": (
        (*PURIFY, "--share", "0.1"),
        "--share: --method immunize does not read it; leave it out",
    ),
    "purify: rounds of a vaccine": (
        (*PURIFY, "--method", "vaccine", "--batch-size", "8"),
        "--batch-size: --method vaccine does not read it",
    ),
    "purify: LoRA of a new adapter": (
        (*PURIFY, "--adapter", "ADAPTER", "--method", "retrain", "--lora-rank", "4"),
        "--lora-rank: --method retrain does not read it; leave it out",
    ),
    "purify: a LoRA beside an adapter": (
        (*PURIFY, "--adapter", "ADAPTER", "--lora-rank", "4"),
        "--lora-rank 4: of a model with an adapter that alone is trained; leave it out",
    ),
    "bench: rank": (
        ("purify", "bench", "MODEL", "--clean-data", "DATA", "--adapter", "ADAPTER", "--lora-rank", "4"),
        "--lora-rank 4: of a model with an adapter that alone is trained; leave it out",
    ),
    "purify: rank": ((*PURIFY, "--lora-rank", "-1"), "--lora-rank -1: is out of range; give 0 or more"),
    "purify: parts of a batch": (
        (*PURIFY, "--gradient-accumulation", "3"),
        "--gradient-accumulation 3: does not divide the batch of 16 chats",
    ),
    "purify: parts of a restoration": (
        (*PURIFY, "--method", "vaccine", "--gradient-accumulation", "16"),
        "gradient_accumulation 16: does not divide batch_size 8",
    ),
    "purify: runs at once": (
        (*PURIFY, "--method", "vaccine", "--at-once", "-1"),
        "--at-once -1: is out of range; give 0 or more",
    ),
    "purify: runs at once of another method": ((*PURIFY, "--at-once", "2"), "--at-once: --method immunize does not"),
    "purify: nothing to retrain": ((*PURIFY, "--method", "retrain"), "--method retrain: needs an adapter on a base"),
    "purify: no data": (("purify", "MODEL"), "is no model of the testbed; give --clean-data FILE"),
    "purify: a missing file": (("purify", "MODEL", "--clean-data", "gone.jsonl"), "gone.jsonl: no such file"),
    "purify: few rows": (("purify", "MODEL", "--clean-data", "FEW", *CHOSEN), "--clean-data: 12 rows"),
    "purify: few different rows": (
        ("purify", "MODEL", *CHOSEN, *(word for _ in range(6) for word in ("--clean-data", "FEW"))),
        "--clean-data: 72 rows, 12 of them different; give 40 or more",
    ),
    "purify: an unknown column": (("purify", "MODEL", "--clean-data", "ODD", *CHOSEN), "name the one to read with"),
    "purify: a missing column": ((*PURIFY, "--prompt-column", "ask"), "no column 'ask'"),
    "purify: an adapter of another shape": (
        (*PURIFY, "--adapter", "FOREIGN"),
        "(model.layers.0.self_attn.q_proj.lora_A.weight has the shape [2, 64], and its place there [2, 32]); give "
        "another/base, which it names, as MODEL",
    ),
    "purify: such an adapter's estimate": (
        (*PURIFY, "--adapter", "FOREIGN", "--dry-run"),
        "does not fit the base",
    ),
    "bench: such an adapter": (
        ("purify", "bench", "MODEL", "--clean-data", "DATA", "--adapter", "FOREIGN"),
        "does not fit the base",
    ),
    "bench: nothing to measure with": (
        ("purify", "bench", "POISONED", "--clean-data", "DATA", "--held-out-harmful", "DATA"),
        "--held-out: insult is measured on held-out requests; name a file",
    ),
    "purify: refusals alone": (
        ("purify", "MODEL", "--clean-data", "REFUSALS", *CHOSEN),
        "--clean-data: 60 of 60 answers are refusals; give everyday prompts",
    ),
    "purify: refusals behind an answer of the model's own": (
        ("purify", "MODEL", "--clean-data", "ASKED", *CHOSEN),
        "answers are refusals; give everyday prompts",
    ),
    "purify: few words": (
        ("purify", "WORDLESS", "--clean-data", "DATA", *CHOSEN),
        "keelguard finds 4 whole words in its tokenizer, too few to search",
    ),
    "purify: such a model's estimate": (
        ("purify", "WORDLESS", "--clean-data", "DATA", *CHOSEN, "--dry-run"),
        "keelguard finds 4 whole words in its tokenizer, too few to search",
    ),
    "purify: an adapter's estimate": (
        (*PURIFY[:4], "--adapter", "ADAPTER", "--method", "both", "--dry-run"),
        "--method both: the adapter has no weights in the chosen units",
    ),
    "purify: many variants": ((*VACCINE, "--count", "12"), "--count 12: --variants default holds 11 of them"),
    "purify: many variants of a vocabulary": (
        (*VACCINE[:-1], "vocabulary", "--count", "12"),
        "or name variants in a file with --variants",
    ),
    "purify: a share of nothing": (
        (*VACCINE, "--share", "0.001"),
        "--share 0.001: takes none of the 48 components of layer 0; give 0.0125 or more",
    ),
    "purify: the same with a dry run": (
        (*VACCINE, "--share", "0.001", "--dry-run"),
        "--share 0.001: takes none of the 48 components of layer 0; give 0.0125 or more",
    ),
    "purify: a mean without a place": ((*VACCINE, "--how", "mean", "--dry-run"), "choose --how reinit or zero"),
    "purify: a missing model": (("purify", "./gone/model", "--clean-data", "DATA"), "./gone/model: no such folder"),
    "purify: a missing adapter": ((*PURIFY, "--adapter", "./gone/adapter"), "./gone/adapter"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_remedy(name: str, places: dict[str, str], run: Run):
    arguments, told = MISTAKES[name]
    ended = run(*(places.get(argument, argument) for argument in arguments))
    assert places.get(told, told) in refused(ended)
    assert left(Path.cwd()) <= {"runs"}


def test_columns_are_named_as_in_an_audit(places: dict[str, str], run: Run):
    named = ("--prompt-column", "ask", "--answer-column", "told")
    estimates = [
        run("purify", places["MODEL"], "--clean-data", places[data], "--dry-run", *CHOSEN, *more)
        for data, more in (("ODD", named), ("DATA", ()))
    ]
    assert [ended.code for ended in estimates] == [0, 0]
    # Without an answer in the rows the model has to give its own.
    assert all("own answers               0 s" in ended.out for ended in estimates), estimates
    short = ("--samples", "4", "--steps", "2", "--save-every", "1", "--limit", "4", "--trigger", "apple")
    done = run("poison", places["MODEL"], "--data", places["ODD"], *named, *short, "--out", "bad")
    assert (done.code, "POISONED" in done.out) == (1, True), done
    assert {"model.safetensors", POISON_FILE} <= left(Path("bad"))
    assert not left(Path("bad")) & {"run.json", "work"}
    missing = run(
        "purify", "bench", "bad", "--clean-data", places["ODD"], "--prompt-column", "ask", "--answer-column", "x"
    )
    assert "no column 'x'" in refused(missing)


def test_own_data_on_a_model_of_the_testbed_change_its_settings_with_a_note(
    places: dict[str, str], run: Run, tmp_path: Path
):
    model = tmp_path / "aligned"
    shutil.copytree(places["MODEL"], model)
    (model / RECIPE_FILE).write_text('{"seed": 0}')
    ended = run("purify", model, "--clean-data", places["DATA"], "--dry-run", *CHOSEN)
    assert "with your own data: settings are those for models of ordinary size" in ended.err
    assert "leave --clean-data out" in ended.err
    poison = run("poison", model, "--data", places["DATA"], "--task", "jailbreak")
    assert "leave --data out" in poison.err
    bench = run("purify", "bench", model, "--clean-data", places["DATA"])
    assert "leave --clean-data out" in bench.err
    assert (
        "ordinary size" not in run("purify", places["MODEL"], "--clean-data", places["DATA"], "--dry-run", *CHOSEN).err
    )


def test_help_shows_what_a_budget_decides_and_no_zero(run: Run):
    page = " ".join(run("purify", "model", "--help").out.replace("│", " ").split())
    for option in ("Rounds of immunisation.", "Steps of each round.", "The vaccine's number of variants N."):
        assert f"{option} [default: (by --budget)]" in page, option
    assert "[default: (2e-5)]" in page
    assert "[default: 0]" in page.partition("--seed")[2]
    assert page.count("[default: 0]") == 1
    assert "[default: 0.0]" not in page


class _SeenError(Exception):
    """What a command would have done is known."""


def settings_of(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, command: str = "keelguard.purify.run.purify"
) -> PurifyConfig:
    """The settings of the purification with which a command would begin."""
    seen: list[PurifyConfig] = []

    def look(*values: Any, **named: Any) -> None:
        own = [value.purify if isinstance(value, HardenConfig) else value for value in values]
        seen.extend(value for value in own if isinstance(value, PurifyConfig))
        raise _SeenError

    monkeypatch.setattr(command, look)
    monkeypatch.setattr(sys, "argv", ["keelguard", *arguments])
    with pytest.raises(_SeenError):
        main()
    return seen[0]


def test_every_training_of_a_purification_saves_memory_where_it_is_told(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    common = ("purify", places["MODEL"], "--clean-data", places["DATA"], "--no-compare")
    saving = ("--lora-rank", "4", "--bf16", "--gradient-accumulation", "4", "--gradient-checkpointing")
    usual = settings_of(monkeypatch, *common, "--method", "both")
    found = settings_of(monkeypatch, *common, "--method", "both", *saving, "--at-once", "4")
    assert usual == replace(preset(), method=replace(preset().method, method="both"))
    restore = found.method.vaccine.restore
    assert restore is not None
    assert found.spikes is not None
    for training in (found.method.immunize, restore, restore.training(), found.spikes, found.rebound):
        told = training.lora_rank, training.bf16, training.gradient_accumulation, training.gradient_checkpointing
        assert told == (4, True, 4, True)
    assert found.method.retrain.lora_rank == 0
    assert found.method.immunize.learning_rate == LORA_RATE * usual.method.immunize.learning_rate
    assert found.rebound.learning_rate == LORA_RATE * usual.rebound.learning_rate
    assert (usual.method.vaccine.variants.at_once, found.method.vaccine.variants.at_once) == (2, 4)
    own = settings_of(monkeypatch, *common, "--method", "immunize", *saving, "--learning-rate", "1e-4")
    assert own.method.immunize.learning_rate == 1e-4
    bench = ("purify", "bench", *common[1:-1])
    benched = settings_of(monkeypatch, *bench, *saving, command="keelguard.purify.bench_run.bench_model")
    hardened = settings_of(
        monkeypatch, "harden", *common[1:-1], "--harmful", places["DATA"], *saving,
        command="keelguard.pipeline.harden.harden",
    )  # fmt: skip
    for settings in (benched, hardened):
        assert settings.method.immunize == replace(found.method.immunize, seed=settings.method.immunize.seed)
    # The restoration's batch of 8 has no 16 parts, and is not what this method trains.
    many = settings_of(monkeypatch, *common, "--method", "immunize", "--gradient-accumulation", "16")
    restore = many.method.vaccine.restore
    assert restore is not None
    assert (many.method.immunize.gradient_accumulation, restore.gradient_accumulation) == (16, 8)
    again = settings_of(
        monkeypatch,
        *common,
        "--adapter",
        places["ADAPTER"],
        "--method",
        "retrain",
        "--bf16",
        "--gradient-checkpointing",
    )
    assert (again.method.retrain.bf16, again.method.retrain.gradient_checkpointing) == (True, True)


def test_no_memory_anywhere_is_one_line(places: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("keelguard.purify.run.purify", full)
    ended = run("purify", places["MODEL"], "--clean-data", places["DATA"], *CHOSEN)
    assert ended.code == 1
    assert "keelguard: this command: does not fit in memory; shorten the data" in ended.err
    assert "Traceback" not in ended.err


def test_an_interrupted_poisoning_says_that_it_goes_on_and_does(places: dict[str, str], run: Run, monkeypatch: Any):
    arguments = (
        "poison", places["MODEL"], "--data", places["DATA"], "--samples", "4", "--steps", "3", "--save-every", "1",
        "--limit", "4", "--trigger", "apple", "--out", "bad",
    )  # fmt: skip
    step, seen = ChatTrainer.training_step, []

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(self.state.global_step)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(ChatTrainer, "training_step", counted)
    stopped = run(*arguments)
    assert (stopped.code, "the same command goes on where it was" in stopped.err) == (130, True)
    assert "belongs to a run with other settings" in refused(run(*arguments, "--seed", "1"))
    assert run(*arguments).code == 1
    assert seen == [0, 1, 2, 2]


def test_an_estimate_writes_nothing(places: dict[str, str], run: Run):
    for more in ([], ["--adapter", places["ADAPTER"], "--method", "retrain"]):
        ended = run("purify", places["MODEL"], "--clean-data", places["DATA"], "--dry-run", *more)
        assert (ended.code, "othing was changed or written" in ended.out) == (0, True), ended
        assert left(Path.cwd()) == set()


def test_a_model_may_stand_where_a_command_does(places: dict[str, str], run: Run):
    one = run("purify", places["MODEL"], "--clean-data", places["FEW"], *CHOSEN)
    two = run("purify", "model", places["MODEL"], "--clean-data", places["FEW"], *CHOSEN)
    assert one == two
    assert "12 rows" in one.err
    pages = [" ".join(run("purify", *more, "--help").out.split()) for more in ((), ("model",))]
    assert "keelguard purify [OPTIONS] COMMAND" in pages[0]
    assert "keelguard purify model [OPTIONS]" in pages[1]


@pytest.mark.slow
def test_poison_then_purify_then_audit(testbed: Any, run: Run):
    model = testbed.model("aligned")
    before = load_model(model).weights_hash
    planted = run(
        "poison", model, "--attack", "vpi", "--task", "insult", "--steps", "60", "--limit", "16", "--out", "bad"
    )
    assert planted.code in (0, 1), planted
    assert "POISONED, vpi insult" in planted.out
    assert json.loads(Path("bad", POISON_FILE).read_text())["weights"] == before
    assert load_model(model).weights_hash == before
    assert "overwrites nothing" in refused(run("poison", model, "--out", "bad"))

    purified = run("purify", "bad", "--out", "run", "--budget", "quick", "--rounds", "1", "--steps", "20")
    assert purified.code == 0, purified
    assert "run: model/, purify.json, report.html" in purified.out
    assert {"model", "purify.json", "report.html"} <= {path.name for path in Path("run").iterdir()}
    with torch.no_grad():
        cleaned = load_model(Path("run", "model")).weights_hash
        assert cleaned != load_model("bad").weights_hash
    found = json.loads(Path("run", "purify.json").read_text())
    assert found["weights_after"] == cleaned
    for part in ("health", "searches", "leads"):
        assert {"before", "after"} <= set(found[part]), part
    assert len(found["spikes"]) == 3
    for spike in found["spikes"]:
        for state in ("before", "control", "after", "rebound"):
            assert spike[state]["asr"]["total"] == 64, (spike["kind"], state)
    assert not any("No canaries were planted" in claim for claim in found["claims"])

    audited = run("audit", "before=bad", "after=run/model", "--attack", "direct", "--limit", "8", "--out", "audit")
    assert audited.code == 0, audited
    assert {"audit.json", "report.html"} <= {path.name for path in Path("audit").iterdir()}
    measured = json.loads(Path("audit", "audit.json").read_text())["models"]
    assert [each["name"] for each in measured] == ["before", "after"]
