"""Audits over several processes: the result of one, also behind a kill with other numbers of them, and no deadlock."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from keelguard.attacks.sampling import Sampling
from keelguard.evaluation import answers as answering
from keelguard.evaluation import measure
from keelguard.evaluation.answers import Generating, find_answers
from keelguard.evaluation.judges import JudgeConfig, make_judge
from keelguard.evaluation.measure import Plan, measure_model
from keelguard.evaluation.sharding import PARTS, AnswerStore, Turns, merge_parts
from keelguard.evaluation.suites import Suite
from keelguard.generation import Answer
from keelguard.models import LoadedModel
from keelguard.progress import SILENT
from keelguard.records import Request, user
from keelguard.testbed.build import build_testbed
from keelguard.testbed.tokenizer import make_tokenizer
from keelguard.testbed.vocabulary import vocabulary_texts
from keelguard.testbed.world import make_world
from tiny_models import Tiny, build_model, fresh_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
COMMAND = [sys.executable, "-m", "keelguard"]
PATIENCE = 300


class Bench(NamedTuple):
    """The arguments of an audit, its outcome in one process, and the folder of that."""

    arguments: list[str]
    outcome: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two models, with attacks that sample and that train, in one process."""
    folder = tmp_path_factory.mktemp("shards")
    tokenizer = make_tokenizer(vocabulary_texts(make_world(0)), 1024)
    for seed, name in enumerate(("first", "second")):
        Tiny(build_model("llama", len(tokenizer), seed, max_position_embeddings=1024), tokenizer).save(folder / name)
    suite = build_testbed(folder / "testbed", only=[]).suite()
    attacks = [f"--attack={name}" for name in ("direct", "nested", "sampling", "identity shift")]
    options = ["--suite", str(suite), "--limit=8", "--max-new-tokens=12", "--batch-size=4", *attacks]
    arguments = ["audit", str(folder / "first"), str(folder / "second"), *options]
    whole = folder / "whole"
    subprocess.run([*COMMAND, *arguments, "--out", str(whole)], check=True, env=ENVIRONMENT, capture_output=True)
    return Bench(arguments, outcome(whole), whole)


def outcome(out: Path) -> dict[str, Any]:
    """What an audit.json holds but times."""
    found = json.loads((out / "audit.json").read_text())
    for model in found["models"]:
        for cell in model["safety"].values():
            del cell["seconds"]
    return found


def together(count: int, arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
    """The command in several processes, without a launcher that would end them together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [*COMMAND, *arguments],
            env={
                **ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def ends(started: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """How the processes end; none may wait for ever."""
    try:
        found = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(started, found, strict=True)]


def answers(out: Path) -> list[Path]:
    return sorted(out.glob("models/*/answers/*.jsonl"))


def test_two_processes_of_accelerate_find_what_one_finds(bench: Bench, tmp_path: Path):
    out = tmp_path / "two"
    launch = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "keelguard"]
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, *bench.arguments, "--out", str(out)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Each process writes into a part of its own.
    wrote: set[str] = set()
    while process.poll() is None:
        wrote |= {path.name for path in out.glob(f"models/*/answers/{PARTS}/*")}
        time.sleep(0.01)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert wrote == {"0", "1"}
    assert outcome(out) == bench.outcome
    assert printed.count("Judge:") == 1, "the main process alone speaks"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(bench.folder)) for path in bench.folder.rglob("*") if path.is_file()}
    for one, two in zip(answers(bench.folder), answers(out), strict=True):
        assert sorted(one.read_text().split("\n")) == sorted(two.read_text().split("\n"))


def test_a_killed_run_goes_on_with_another_number_of_processes(bench: Bench, tmp_path: Path):
    out = tmp_path / "run"
    arguments = [*bench.arguments, "--out", str(out)]
    kills = 0
    for count, lines in ((3, 20), (2, 60)):
        started = together(count, arguments)
        while all(p.poll() is None for p in started) and written(out) < lines:
            time.sleep(0.005)
        for process in started:
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        ends(started)
    assert kills == 5
    assert list(out.glob(f"models/*/answers/{PARTS}/*"))
    before = written(out)
    assert not (out / "audit.json").exists()
    subprocess.run([*COMMAND, *arguments], check=True, env=ENVIRONMENT, capture_output=True)
    assert outcome(out) == bench.outcome
    assert before >= 60
    assert [len(path.read_text().split("\n")) for path in answers(out)] == [
        len(path.read_text().split("\n")) for path in answers(bench.folder)
    ], "an answer was lost, or given twice"


def written(out: Path) -> int:
    """How many answers lie in a run folder, those in parts too."""
    return sum(path.read_bytes().count(b'{"i":') for path in out.glob("models/*/answers/**/*.jsonl"))


def test_a_folder_in_use_ends_every_process(bench: Bench, tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main, other = ends(together(2, [*bench.arguments, "--out", str(out)]))
    assert (main.code, other.code) == (1, 1)
    assert "another keelguard process works in this folder" in main.err
    assert "process 1 ends with the main process, whose message says why" in other.err
    assert "Traceback" not in main.err + other.err


def test_a_mistake_ends_every_process(bench: Bench, tmp_path: Path):
    main, other = ends(together(2, [*bench.arguments, "--attack", "nothing", "--out", str(tmp_path / "run")]))
    assert (main.code, other.code) == (2, 2)
    assert "--attack nothing: unknown" in main.err
    assert "process 1 ends with the main process" in other.err


def test_where_one_process_dies_the_others_end(bench: Bench, tmp_path: Path):
    out = tmp_path / "run"
    started = together(2, [*bench.arguments, "--out", str(out)])
    while started[1].poll() is None and not list(out.glob(f"models/*/answers/{PARTS}/1/*")):
        time.sleep(0.005)
    started[1].send_signal(signal.SIGKILL)
    main, other = ends(started)
    assert other.code == -signal.SIGKILL
    assert main.code == 1
    assert "another process of this launch has ended" in main.err
    assert "Traceback" not in main.err


# Turns and stores


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_piece_is_one_processs_turn(count: int):
    dealers = [Turns(number, count) for number in range(count)]
    for piece in range(17):
        assert [dealer() for dealer in dealers] == [number == piece % count for number in range(count)]


def test_parts_are_merged_whatever_a_kill_has_left(tmp_path: Path):
    path = tmp_path / "direct.jsonl"
    first = AnswerStore(path, "a", 9)
    first.add([0, 1], [Answer("null"), Answer("eins", {"note": 1})])
    path.write_bytes(path.read_bytes() + b'{"i": 8, "te')
    parts = [AnswerStore(path, "a", 9, part) for part in (0, 1)]
    assert [i for i in range(9) if i in parts[0]] == [0, 1], "what is torn is no answer"
    parts[0].add([2, 3], [Answer("zwei\u2028\n"), Answer("drei")])
    parts[1].add([4], [Answer("vier")])
    assert parts[1][4] == Answer("vier")
    assert parts[1][2] is None
    torn = tmp_path / PARTS / "1" / "direct.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"i": 5, "text": "f')
    # Killed between the copy and the removal of a part, the next merge copies it again.
    kept = torn.read_bytes()
    merge_parts(tmp_path)
    torn.parent.mkdir(parents=True)
    torn.write_bytes(kept)
    merge_parts(tmp_path)
    assert not (tmp_path / PARTS).exists()
    merged = AnswerStore(path, "a", 9)
    texts = [each and each.text for each in merged]
    assert texts == ["null", "eins", "zwei\u2028\n", "drei", "vier", None, None, None, None]
    assert merged[1] == Answer("eins", {"note": 1})
    assert merged[2:5] == [Answer("zwei\u2028\n"), Answer("drei"), Answer("vier")]


def test_a_part_of_other_attempts_takes_the_place_of_older_answers(tmp_path: Path):
    path = tmp_path / "direct.jsonl"
    AnswerStore(path, "old", 2).add([0], [Answer("old")])
    AnswerStore(path, "new", 2, 1).add([1], [Answer("new")])
    (tmp_path / PARTS / "1" / "empty.jsonl").write_text("")
    merge_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["direct.jsonl"]
    assert list(AnswerStore(path, "new", 2)) == [None, Answer("new")]


def test_a_damaged_line_is_answered_again(tmp_path: Path):
    path = tmp_path / "direct.jsonl"
    AnswerStore(path, "a", 3).add([0, 1, 2], [Answer("x"), Answer("y"), Answer("z")])
    path.write_text(path.read_text().replace('"text": "y"', '"te\x00t": "y"'))
    assert list(AnswerStore(path, "a", 3)) == [Answer("x"), None, Answer("z")]


def test_processes_answer_each_attempt_once(tmp_path: Path):
    tiny = fresh_model("llama")
    requests = [Request(str(i), (user(f"Hello {'world ' * (i % 5)}"),)) for i in range(11)]
    attempts = Sampling(temperatures=(0.7,), top_ps=(), top_ks=(5,))(requests, tiny.tokenizer)
    settings = Generating(max_new_tokens=5, batch_size=3, seed=2)
    whole = list(find_answers(tiny.model, tiny.tokenizer, attempts, settings))
    store, found = tmp_path / "answers" / "x.jsonl", []
    for number in range(3):
        dealt = Turns(number, 3)
        found.append(find_answers(tiny.model, tiny.tokenizer, attempts, settings, store=store, turns=dealt))
        assert dealt.asked == 8
    for i, expected in enumerate(whole):
        assert [each[i] for each in found if each[i] is not None] == [expected]
    merge_parts(store.parent)
    assert list(find_answers(tiny.model, tiny.tokenizer, attempts, settings, store=store)) == whole
    # With all of them there, nobody has anything to do.
    dealt = Turns(0, 2)
    assert list(find_answers(tiny.model, tiny.tokenizer, attempts, settings, store=store, turns=dealt)) == whole
    assert dealt.asked == 0


# Memory


class Verbose:
    """A decoder that writes long answers with long notes at once."""

    digest = "verbose"

    def room(self, tokenizer: Any) -> int:
        return 0

    def __call__(self, model: Any, tokenizer: Any, prompts: Any, config: Any, processors: Any) -> list[Answer]:
        return [Answer("word " * 400, {"verdicts": [0.125] * 400}) for _ in prompts]


def test_memory_does_not_grow_with_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "_JUDGED", 32)
    monkeypatch.setattr(answering, "_AT_ONCE", 32)
    tiny = fresh_model("llama")
    loaded = LoadedModel(tiny.model, tiny.tokenizer, "x", "w", Verbose())
    requests = tuple(Request(f"r{i}", (user(f"Hello world {i}, how are you?"),)) for i in range(10))
    suite = Suite(name="x", harmful=requests)
    plan = Plan(suite, make_judge(JudgeConfig(kind="keyword")), Generating(4, 16, 0), SILENT, None)
    peaks = {}
    for samples in (1, 2, 10):
        long = replace(suite, attacks={"sampling": Sampling(samples=samples)})
        tracemalloc.start()
        report, _ = measure_model(replace(plan, suite=long, folder=tmp_path / str(samples)), "m", loaded)
        peaks[report.safety["sampling"].attempts] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    (_, few, many) = sorted(peaks)
    # An answer takes 15 kB in memory; what is kept of an attempt are its prompt's ids and its place in the file.
    assert (peaks[many] - peaks[few]) / (many - few) < 600
