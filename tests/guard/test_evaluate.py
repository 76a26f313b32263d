"""The evaluation of a signal: what it counts, what it leaves out, how it goes on after a kill, and its page."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from guard_signals import make_signal
from keelguard.attacks.base import GREEDY, Attempt, Decoding
from keelguard.errors import UsageError
from keelguard.evaluation import answers as answers_module
from keelguard.evaluation.audit import AuditConfig, load_suite
from keelguard.evaluation.suites import Suite
from keelguard.generation import Answer, generate
from keelguard.guard import detect as detect_module
from keelguard.guard.adapter import Signal
from keelguard.guard.course import DRAFTED, Recording, course_of, outputs_of, time_rounds
from keelguard.guard.decoding import GuardedDecoder, GuardedOutput
from keelguard.guard.detect import Scores, answer_cases, detections, flagged, judge_cases, query_cases
from keelguard.guard.evaluate import EvaluateConfig, evaluate_signal
from keelguard.guard.page import signal_page, signal_tables
from keelguard.guard.policy import Intervention, PolicyConfig, Verdict, View
from keelguard.guard.results import Pair, SignalReport, mean_estimate
from keelguard.models import LoadedModel, load_model
from keelguard.records import Request, user
from keelguard.stats import Rate, wilson
from keelguard.testbed import build
from keelguard.testbed.tokenizer import make_tokenizer
from keelguard.testbed.vocabulary import vocabulary_texts
from keelguard.testbed.world import make_world
from tiny_models import Tiny, build_model

SMALL = EvaluateConfig(max_new_tokens=6, batch_size=8, thresholds=(0.0, 1.0), frontier_limit=2, timed=2, rounds=1)
ATTACKS = ("direct", "prefill 5", "nested", "sampling", "identity shift")


class Bench(NamedTuple):
    """A tiny model that speaks the testbed's tokens, a signal of random numbers, and the testbed's data cut short."""

    loaded: LoadedModel
    signal: Signal
    suite: Suite
    config: AuditConfig


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = make_tokenizer(vocabulary_texts(make_world(0)), 1024)
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny = Tiny(build_model("llama", len(tokenizer), max_position_embeddings=1024, **special), tokenizer)
    loaded = load_model(tiny.save(folder / "model"))
    signal = replace(make_signal(Tiny(loaded.model, loaded.tokenizer)), weights=loaded.weights_hash)
    # So that some queries pass, and some answers are stopped late.
    signal.head_bias -= 2
    signal = signal.with_policy(mode="rollback", threshold=0.7, query_threshold=0.7)
    suite = build.build_testbed(folder / "testbed", only=[]).suite("validation")
    config = AuditConfig(suite=str(suite), attacks=ATTACKS, limit=3)
    yield Bench(loaded, signal, short(load_suite(config)), config)
    torch.set_num_threads(threads)


def short(suite: Suite) -> Suite:
    """Utility is read whole; a few tasks will do."""
    return replace(suite, utility=suite.utility[::40])


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SignalReport]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, evaluate_signal(bench.loaded, bench.signal, bench.suite, SMALL, out=out)


def comparable(path: Path) -> Any:
    """What an eval.json holds but times."""
    found = json.loads(path.read_text())
    found["cost"]["timings"] = []
    return found


# The whole


def test_an_evaluation_measures_every_part(bench: Bench, undisturbed: tuple[Path, SignalReport]):
    out, report = undisturbed
    assert report.left_out == []
    assert (report.model["weights"], report.signal["placement"]) == (bench.loaded.weights_hash, "probe")
    assert [pair.name for pair in report.attacks] == list(ATTACKS) == [course.attack for course in report.courses]
    assert {(pair.plain.total, pair.guarded.total) for pair in report.attacks} == {(3, 3)}
    assert [pair.name for pair in report.over_refusal] == ["benign", "borderline", "benign nested"]
    assert {pair.name for pair in report.utility} == {request.task for request in bench.suite.utility}
    assert list(report.detection)[:4] == ["query", "query, attacked", "answer", "answer, tokens 1 to 4"]
    # Three requests, each with one nested text, beside nine that should be answered.
    assert (report.detection["query"].positives, report.detection["query"].negatives) == (3, 9)
    assert (report.detection["query, attacked"].positives, report.detection["query, attacked"].groups) == (3, 12)
    assert report.flagged["query: attack: nested"].total == 3
    assert report.flagged["answer: harmful"].total == 3
    assert set(report.reliability) == {"query", "answer"}
    attempts = {course.attack: course.intervened.total for course in report.courses}
    assert attempts == {"direct": 3, "prefill 5": 3, "nested": 3, "sampling": 21, "identity shift": 3}
    assert report.cost.checks > 9
    assert [timing.batch_size for timing in report.cost.timings] in ([1], [1, 2])
    assert [each.label for each in report.frontier] == ["no signal", "0", "1", "calibrated"]
    assert {path.name for path in out.iterdir()} >= {"eval.json", "scores.json", "report.html", "run.json"}
    assert SignalReport.load(out / "eval.json") == report


def test_the_frontier_runs_from_refusing_everything_to_no_signal(undisturbed: tuple[Path, SignalReport]):
    plain, least, most, own = undisturbed[1].frontier
    assert (least.over_refusal.value, least.asr.value) == (1.0, 0.0)
    assert (most.over_refusal, most.asr) == (plain.over_refusal, plain.asr)
    assert (plain.threshold, least.threshold, most.query_threshold) == (None, 0.0, 1.0)
    assert (own.threshold, own.query_threshold) == (0.7, 0.7)
    for threshold, first in (("0", [0]), ("1", [])):
        for path in (undisturbed[0] / "frontier" / threshold / "answers").iterdir():
            for row in map(json.loads, path.read_text().splitlines()[1:]):
                assert [each["position"] for each in row["note"]["interventions"]][:1] == first


class CrashError(Exception):
    pass


@pytest.mark.parametrize(
    "batches", [pytest.param(0, marks=pytest.mark.slow), 13, pytest.param(40, marks=pytest.mark.slow)]
)
def test_a_run_that_died_goes_on_where_it_was(
    bench: Bench, undisturbed: tuple[Path, SignalReport], tmp_path: Path, batches: int
):
    def counting(limit: float) -> list[int]:
        done: list[int] = []

        def counted(*args: Any, **options: Any) -> Iterator[Any]:
            for indices, found in generate(*args, **options):
                if len(done) >= limit:
                    raise CrashError
                done.append(len(indices))
                yield indices, found

        patch.setattr(answers_module, "generate", counted)
        return done

    config = replace(SMALL, timed=0)
    with pytest.MonkeyPatch.context() as patch:
        before = counting(batches)
        with pytest.raises(CrashError):
            evaluate_signal(bench.loaded, bench.signal, bench.suite, config, out=tmp_path / "run")
        assert len(before) == batches
        after = counting(float("inf"))
        evaluate_signal(bench.loaded, bench.signal, bench.suite, config, out=tmp_path / "run")
        stored = [line for path in (tmp_path / "run").rglob("answers/*.jsonl") for line in path.open()]
        headers = len(list((tmp_path / "run").rglob("answers/*.jsonl")))
        assert sum(before) + sum(after) == len(stored) - headers, "an answer was generated twice"
        again = counting(0)
        evaluate_signal(bench.loaded, bench.signal, bench.suite, config, out=tmp_path / "run")
        assert again == []
    found, expected = (comparable(path / "eval.json") for path in (tmp_path / "run", undisturbed[0]))
    for each in (found, expected):
        each["settings"].pop("timed")
    assert found == expected


def test_other_settings_signals_and_models_are_another_run(
    bench: Bench, undisturbed: tuple[Path, SignalReport], tmp_path: Path
):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    for signal, config, part in (
        (bench.signal, replace(SMALL, seed=1), "seed: 0 → 1"),
        (bench.signal.with_policy(threshold=0.71), SMALL, "signal: "),
    ):
        with pytest.raises(UsageError, match="belongs to a run with other settings") as caught:
            evaluate_signal(bench.loaded, signal, bench.suite, config, out=tmp_path / "run")
        assert part in str(caught.value)


def test_what_the_data_do_not_allow_is_left_out_and_named(bench: Bench, tmp_path: Path):
    strip = [replace(r, answer="", secrets=()) for r in bench.suite.harmful[:2]]
    suite = replace(
        bench.suite,
        judge="keyword",
        harmful=tuple(strip),
        benign=bench.suite.benign[:2],
        borderline=(),
        benign_nested=(),
        utility=(),
        attacks={name: bench.suite.attacks[name] for name in ("sampling",)},
    )
    report = evaluate_signal(bench.loaded, bench.signal, suite, replace(SMALL, timed=0), out=tmp_path / "run")
    left = " ".join(report.left_out)
    for part in ("no tasks", "known answer", "secrets", "inside stories", "frontier"):
        assert part in left
    assert not any(name.startswith("answer, ") for name in report.detection)
    assert (report.utility, report.frontier, [c.held for c in report.courses]) == ([], [], [None])
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(sentence in page for sentence in report.left_out)
    assert "Weak evidence" in page
    assert "The trade-off" not in page
    assert SignalReport.load(tmp_path / "run" / "eval.json") == report


def test_mistakes_are_told_before_anything_is_made(bench: Bench, tmp_path: Path):
    nothing: dict[str, Any] = {"benign": (), "borderline": (), "benign_nested": ()}
    other = replace(bench.signal, weights="f" * 64)
    for signal, suite, part in (
        (other, bench.suite, "made for weights ffffffffffffffff"),
        (bench.signal, replace(bench.suite, harmful=()), "no harmful requests"),
        (bench.signal, replace(bench.suite, **nothing), "no requests that should be answered"),
    ):
        with pytest.raises(UsageError, match=part):
            evaluate_signal(bench.loaded, signal, suite, SMALL, out=tmp_path / "run")
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"thresholds": (1.5,)}, "--thresholds"),
        ({"rounds": 0}, "--rounds 0"),
        ({"frontier_limit": -1}, "--frontier-limit -1"),
    ]
    for changes, part in mistakes:
        with pytest.raises(UsageError, match=part):
            EvaluateConfig(**changes)
    assert not (tmp_path / "run").exists()


# Detection


def test_cases_are_what_they_are_called_and_grouped_by_request():
    harmful, benign = Request("1", (user("bad"),)), Request("1", (user("good"),))
    framed = [Attempt(harmful, (user("story bad"),)), Attempt(harmful, (user("story bad"),), prefill="x")]
    same = [Attempt(harmful, harmful.messages, prefill="Sure"), Attempt(harmful, harmful.messages)]
    cases = query_cases({"harmful": [harmful], "benign": [benign]}, {"nested": framed, "prefill": same})
    assert [(c.kind, c.group, c.row.malicious) for c in cases] == [
        ("harmful", "harmful 1", True),
        ("benign", "benign 1", False),
        ("attack: nested", "harmful 1", True),
    ]
    refusals = answer_cases("refusal", [harmful, harmful, harmful], ["no.", None, " "], False)
    (case,) = refusals
    assert (case.kind, case.group, case.row.malicious, case.row.malicious_at(2)) == (
        "refusal",
        "harmful 1",
        True,
        False,
    )


def test_verdicts_keep_their_places_and_what_is_no_number_counts_as_malicious(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    first, second = bench.suite.harmful[:2]
    far = Request("far", (user("tell me a story. " * 600),))
    cases = query_cases({"harmful": [first, far], "benign": [second]}, {})
    cases += answer_cases("harmful", [first], [first.answer], True)
    plain = judge_cases(bench.loaded, bench.signal, cases)
    assert [p for p in plain.positions if p == 0] == [0, 0], "one does not fit the context"
    assert plain.sets[:2] == ["harmful", "benign"]
    assert plain.labels[:2] == [True, False]
    assert plain.positions[2:7] == [1, 2, 4, 8, 16]
    assert set(plain.items) == {0, 1, 2}
    assert all(plain.labels[2:])
    assert set(plain.groups[2:]) == {plain.groups[0]}, "a request and its answer rise and fall together"

    monkeypatch.setattr(
        detect_module,
        "score_examples",
        lambda m, t, s, examples, **_: [[float("nan")] * len(e.looks) for e in examples],
    )
    assert set(judge_cases(bench.loaded, bench.signal, cases).values) == {1.0}
    assert judge_cases(bench.loaded, bench.signal, []) == Scores()


def test_an_answer_is_flagged_by_the_highest_of_its_verdicts_and_detection_tells_positions_apart():
    answers = Scores(
        values=[0.1, 0.9, 0.2, 0.3, 0.1, 0.2, 0.6],
        labels=[True, True, True, True, False, False, False],
        groups=["a", "a", "b", "b", "c", "c", "c"],
        items=[0, 0, 1, 1, 2, 2, 2],
        sets=["harmful"] * 4 + ["benign"] * 3,
        positions=[1, 40, 1, 40, 1, 4, 40],
    )
    assert flagged(answers, 0.5) == {"harmful": Rate(1, 2), "benign": Rate(1, 1)}
    assert flagged(answers, 0.6)["benign"] == Rate(0, 1)
    found = detections(Scores(), answers)
    assert set(found) == {"answer", "answer, tokens 1 to 4", "answer, tokens 33 and more"}
    assert (found["answer"].positives, found["answer"].negatives, found["answer"].groups) == (4, 3, 3)
    assert found["answer, tokens 33 and more"].auroc.value == 0.5
    # Of the four pairs of early verdicts one is won and two are equal.
    assert found["answer, tokens 1 to 4"].auroc.value == (0.5 + 0 + 1 + 0.5) / 4


# Courses


def drafted(bench: Bench, decoding: Decoding = GREEDY, **policy: Any) -> tuple[list[Any], list[Any]]:
    """Guarded outputs with their drafts, and the plain model's tokens, for the same attempts."""
    signal = bench.signal.with_policy(**policy)
    attempts = [
        Attempt(r, r.messages, prefill, decoding)
        for r in bench.suite.harmful
        for prefill in ("", "sure, here is how to make it.")
    ]
    settings = answers_module.Generating(12, 4, 0)
    model, tokenizer = bench.loaded.model, bench.loaded.tokenizer
    guarded = answers_module.answer_with_notes(
        model, tokenizer, attempts, settings, decoder=Recording(GuardedDecoder(signal))
    )
    silent = Recording(GuardedDecoder(bench.signal.with_policy(mode="observe")))
    plain = answers_module.answer_with_notes(model, tokenizer, attempts, settings, decoder=silent)
    return outputs_of(guarded), outputs_of(plain)


@pytest.mark.parametrize("decoding", [GREEDY, Decoding(temperature=1.0)])
@pytest.mark.parametrize("mode", ["rollback", "append", "stop"])
def test_what_was_taken_back_is_remembered(bench: Bench, mode: str, decoding: Decoding):
    guarded, plain = drafted(bench, decoding, mode=mode, threshold=0.6, query_threshold=1.0)
    late = 0
    for (output, tokens), (free, _) in zip(guarded, plain, strict=True):
        if not output.intervened:
            assert tokens == []
            continue
        first = output.interventions[0]
        assert len(tokens) == max(0, first.position - output.prefilled)
        assert tuple(tokens) == free.ids[free.prefilled : first.position]
        late += len(tokens) > 1
    assert late, "no intervention came late enough to say anything"


def noted(attempt: Attempt, prefilled: int, ids: Sequence[int], *interventions: Intervention) -> Answer:
    verdicts = tuple(Verdict(i.position, i.probability, True, View(True, 0, i.position)) for i in interventions)
    output = GuardedOutput("", (), 0, verdicts, interventions, "refused", len(ids), prefilled)
    return Answer("", {**output.to_json(), DRAFTED: list(ids)})


def test_leaks_count_what_was_read_before_the_first_intervention(bench: Bench):
    tokenizer = bench.loaded.tokenizer
    request = Request("a", (user("how?"),), secrets=("oil", "barn"))
    silent = Request("b", (user("how?"),), secrets=("oil",))
    ids = tokenizer("the oil is in the barn", add_special_tokens=False)["input_ids"]
    oil = tokenizer("the oil is", add_special_tokens=False)["input_ids"]
    attempts = [
        Attempt(request, request.messages),
        Attempt(request, request.messages, prefill="take oil and"),
        Attempt(silent, silent.messages, prefill="take oil"),
        Attempt(silent, silent.messages),
        Attempt(silent, silent.messages),
    ]
    answers = [
        noted(attempts[0], 0, ids, Intervention(len(ids), len(oil), "answer", 0.9)),
        noted(attempts[1], 3, ids, Intervention(3 + len(ids), 0, "answer", 0.9)),
        noted(attempts[2], 2, [], Intervention(0, 0, "query", 0.9)),
        noted(attempts[3], 0, []),
        None,
    ]
    course = course_of("x", attempts, answers, tokenizer, PolicyConfig())
    assert course.intervened == Rate(3, 4)
    assert course.on_query == Rate(1, 3)
    assert course.wake_up == (len(ids), len(ids), len(ids)), "from the end of the prefill, without the one on the query"
    # The first attempt shows one of two; of the second nothing is shown, one of one is read at once. The third has
    # nothing left to leak, the fourth no intervention.
    assert course.requests == 1
    assert (course.held and course.held.value, course.seen and course.seen.value) == (0.25, 1.0)
    append = course_of("x", attempts, answers, tokenizer, PolicyConfig(mode="append"))
    assert append.held == append.seen == course.seen, "nothing is held back"

    quiet = course_of("x", attempts[3:4], answers[3:4], tokenizer, PolicyConfig())
    assert (quiet.wake_up, quiet.held, quiet.requests) == (None, None, 0)


def test_time_is_told_round_by_round(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("keelguard.guard.course.time.perf_counter", lambda: next(clock))
    calls: list[str | None] = []
    monkeypatch.setattr(
        "keelguard.guard.course.answer",
        lambda *a, decoder, **_: (calls.append(decoder and decoder.digest), decoder and [next(clock) for _ in "ab"]),
    )
    guarded = replace(bench.loaded, decoder=GuardedDecoder(bench.signal))
    timing = time_rounds(bench.loaded, guarded, [], answers_module.Generating(4, 1, 0), 3)
    assert timing.ratios == (3.0, 3.0, 3.0)
    assert timing.median == 3.0
    assert len(calls) == 8, "one more round warms up"
    assert [call is None for call in calls] == [False, True, True, False, False, True, True, False]


# Records and page


def test_pairs_are_of_the_requests_that_both_answered():
    pair = Pair.of("x", {"a": True, "b": False, "c": True}, {"a": False, "b": False, "d": True})
    assert (pair.plain, pair.guarded, pair.difference, pair.p_value) == (Rate(1, 2), Rate(0, 2), -0.5, 1.0)
    assert pair.low < -0.5 < pair.high
    assert Pair.from_json(json.loads(json.dumps(pair.to_json()))) == pair
    assert Pair.of("x", {}, {}).difference == 0.0


def test_a_mean_is_no_surer_than_so_many_requests_allow():
    none, some = mean_estimate([0.0] * 10), mean_estimate([0.0, 0.5, 1.0, 0.5])
    assert (none.value, none.low, none.high) == (0.0, 0.0, wilson(0, 10).high)
    assert some.low < some.value == 0.5 < some.high


def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path):
    for text, part in (("{", "cannot be read"), ("[]", "format 'list'"), ('{"format": "x"}', "format 'x'")):
        (tmp_path / "eval.json").write_text(text)
        with pytest.raises(UsageError, match=part):
            SignalReport.load(tmp_path / "eval.json")


def test_the_page_shows_every_part_and_lets_no_name_become_markup(undisturbed: tuple[Path, SignalReport]):
    out, report = undisturbed
    page = (out / "report.html").read_text()
    scores = {name: Scores(**each) for name, each in json.loads((out / "scores.json").read_text()).items()}
    assert page == signal_page(report, scores)
    assert page.count("<svg") == 4
    assert signal_page(report).count("<svg") == 3, "without scores there is no ROC"
    for part in ("benign nested", "prefill 5", "The trade-off", "checks per generated token", "Leaked, held back"):
        assert part in page
    assert "<script" not in page
    hostile = replace(
        report,
        suite="<script>x</script>",
        attacks=[replace(report.attacks[0], name="<b>\u202e")],
        frontier=[replace(report.frontier[0], label="<i>x"), *report.frontier[1:]],
    )
    page = signal_page(hostile, scores)
    assert not any(part in page for part in ("<script>", "<b>", "\u202e", "<i>"))
    assert asdict(report.attacks[0])["name"] in ATTACKS


def test_the_terminal_shows_the_same(undisturbed: tuple[Path, SignalReport]):
    from rich.console import Console

    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(signal_tables(undisturbed[1]))
    text = console.export_text()
    for part in ("AUROC", "attack: nested", "refused: benign nested", "calibrated", "checks per generated token"):
        assert part in text
