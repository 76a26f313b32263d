"""The shift of the testbed's model: what moves between its kinds of requests, resumed, refused, shown and limited."""
# ruff: noqa: F811 — tests take the fixture `run` by its name.

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from guard_signals import make_signal
from keelguard.data import load_requests
from keelguard.errors import UsageError
from keelguard.guard.adapter import Signal
from keelguard.guard.calibration import expected_calibration_error, reliability
from keelguard.guard.detect import Scores
from keelguard.models import load_model, save_checkpoint
from keelguard.pipeline import shift_reading as reading_module
from keelguard.pipeline import shift_words as words_module
from keelguard.pipeline.drift import Drift, Resampling
from keelguard.pipeline.shift import ShiftConfig, measure_shift
from keelguard.pipeline.shift_data import (
    Distribution,
    deal,
    read_distributions,
    read_utility,
)
from keelguard.pipeline.shift_data import testbed_distributions as distributions_of
from keelguard.pipeline.shift_figure import layers_figure
from keelguard.pipeline.shift_metrics import METRICS, Mapped, compare_units, judged_side, leaning_side
from keelguard.pipeline.shift_page import condition_rows, drift_rows, shift_page, shift_sentences
from keelguard.pipeline.shift_reading import Reading
from keelguard.pipeline.shift_results import Shift
from keelguard.records import Request, user
from keelguard.testbed.build import RECIPE_FILE, Testbed
from keelguard.units.diagnose import DiagnoseConfig, diagnose
from keelguard.units.groups import GROUPS, UnitMap
from keelguard.units.importance import Importance, standardise
from keelguard.units.proof import spearman
from keelguard.units.stability import iou
from keelguard.units.transfer import attribute_transfer
from test_cli import Run, refused, run  # noqa: F401 — `run` is a fixture
from tiny_models import Tiny, fresh_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ShiftConfig(max_new_tokens=24, resampling=Resampling(splits=20, samples=20))
HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e"


class Bench(NamedTuple):
    """The testbed's aligned model with a map, a signal of random numbers, and its kinds of requests cut short."""

    testbed: Testbed
    model: str
    chart: UnitMap
    signal: Signal
    kinds: list[Distribution]
    utility: list[Request]
    folder: Path

    def measure(self, out: Path, config: ShiftConfig = SMALL, **changes: Any) -> Shift:
        given: dict[str, Any] = {
            "distributions": self.kinds, "utility": self.utility, "chart": self.chart, "signal": self.signal,
        }  # fmt: skip
        return measure_shift(self.model, config=config, out=out, **{**given, **changes})


@pytest.fixture(scope="module")
def bench(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shift")
    model = str(testbed.model("aligned"))
    config = DiagnoseConfig(
        safety=(str(testbed.data / "harmful.train.jsonl"),), utility=(str(testbed.data / "utility.train.jsonl"),),
        samples=24, groups=6, bootstrap=3, max_new_tokens=24,
    )  # fmt: skip
    chart = diagnose(model, config, out=folder / "map").chart
    loaded = load_model(model)
    signal = replace(make_signal(Tiny(loaded.model, loaded.tokenizer)), weights=loaded.weights_hash)
    signal.save(folder / "signal")
    kinds = [each.drawn(16, 0) for each in distributions_of(testbed)]
    utility = load_requests(testbed.data / "utility.train.jsonl")
    yield Bench(testbed, model, chart, signal, kinds, utility, folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(bench: Bench) -> Shift:
    return bench.measure(bench.folder / "run")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the model, pass by pass."""
    made: list[str] = []

    def counted(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            return plain(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    for name in ("attribute", "objectives", "probe_direction", "judge_cases"):
        counted(reading_module, name)
    return made


# What is measured


def test_the_result_is_complete(found: Shift, bench: Bench):
    content = json.loads((bench.folder / "run" / "shift.json").read_text())
    assert content["format"] == "keelguard.shift/1"
    assert list(content["drift"]) == list(METRICS)
    pairs = ["plain / nested", "plain / rephrased", "nested / rephrased"]
    for metric in content["drift"].values():
        assert list(metric) == pairs
        for each in metric.values():
            assert set(each) == {"value", "low", "high", "control", "limit", "warn"}
            assert 0 <= each["low"] <= each["value"] <= each["high"]
            assert each["warn"] == (each["value"] > each["limit"])
    assert set(content["layers"]) == {"importance", "groups", "direction"}
    layers = load_model(bench.model).model.config.num_hidden_layers
    assert all(len(line) == layers for metric in content["layers"].values() for line in metric.values())
    assert content["distributions"][1] == {
        "name": "nested", "source": "testbed, validation, nested", "sha256": bench.kinds[1].digest,
        "requests": 16, "things": 16, "benign": 16,
    }  # fmt: skip
    assert found.left_out == ()
    assert Shift.load(bench.folder / "run") == found


def test_stories_move_the_decision_and_other_phrasings_do_not(found: Shift):
    """The aligned model refuses plain requests and answers those inside stories."""
    plain, nested, _ = found.conditions
    assert plain.refused.value > 0.7
    assert nested.refused.value < plain.refused.value
    assert nested.margin.high < plain.margin.low
    for metric in ("decision", "importance", "scu"):
        away, near = (found.drift[metric][f"plain / {name}"] for name in ("nested", "rephrased"))
        assert away.warn
        assert away.value > near.value
        assert away.low > away.control
    assert ("plain / nested", "decision") in found.warnings


def test_figures_of_all_prompts_are_those_of_the_parts(found: Shift, bench: Bench):
    assert bench.chart.meta["sizes"] == found.units["sizes"]
    for pair in found.pairs:
        assert pair.transfer is not None
        assert pair.transfer.units == len(bench.chart)
        assert pair.correlation is not None
        # More prompts agree better than halves of them.
        assert 1 - pair.correlation < found.drift["importance"][pair.name].value + 0.05
    assert found.conditions[0].overlap["SCU"] > 0.3  # pyright: ignore[reportOptionalOperand]


def random_map(chart: UnitMap, seed: int) -> Mapped:
    safety, utility = torch.randn(2, len(chart), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raw = Importance(safety, utility.abs())
    standard = standardise(raw, "decision", chart.blocks)
    again = replace(chart, contrast=standard.contrast, strength=standard.strength, raw={"decision": vars(raw)})
    from keelguard.units.groups import Sizes

    return Mapped.of(again.relabelled(Sizes(**chart.meta["sizes"])))


def test_units_are_compared_as_elsewhere(bench: Bench):
    first, second = random_map(bench.chart, 0), random_map(bench.chart, 1)
    values = compare_units(first, second)
    raw = [each.chart.raw["decision"]["safety"] for each in (first, second)]
    correlation = spearman(*(values.tolist() for values in raw))
    assert values["importance"][0] == pytest.approx(1 - correlation)  # pyright: ignore[reportOperatorIssue]
    shared = iou(first.chart.labels == 1, second.chart.labels == 1)
    assert values["scu"] == [1 - shared]  # pyright: ignore[reportOperatorIssue]
    transfer = attribute_transfer(first.chart, second.chart)
    assert values["groups"][0] == pytest.approx(transfer.moved)
    for layer, table in transfer.layers.items():
        moved = 1 - sum(table[i][i] for i in range(len(GROUPS))) / sum(map(sum, table))
        assert values["groups"][1 + layer] == pytest.approx(moved)


def test_leanings_are_means_over_prompts():
    direction = np.array([[1.0, 0.0], [4.0, 1.0], [np.nan, np.nan]])
    reading = Reading([], [0, 0, 1], [1.0, 2.0, 9.0], None, direction, None)
    side = leaning_side(reading, 3)
    assert side.present.tolist() == [True, True, False]
    whole = side.at(np.array([1, 1, 1]))
    assert whole.margin == pytest.approx(4.0)
    assert whole.direction == pytest.approx(np.array([2.0, 1 / 3]))
    again = side.at(np.array([0, 2, 5]))
    assert (again.margin, again.direction.tolist()) == (9.0, [4.0, 1.0])  # pyright: ignore[reportOptionalMemberAccess]


def test_verdicts_count_as_often_as_their_prompts():
    kinds = ["harmful", "harmful", "benign", "harmful answer", "benign answer"]
    scores = Scores([0.9, 0.2, 0.6, 0.7, 0.1], [True, True, False, True, False], list("01012"), [0, 1, 2, 3, 4], kinds,
                    [0, 0, 0, 3, 3])  # fmt: skip
    side = judged_side(scores, 0.5, 4)
    assert side.present.tolist() == [True, True, False, False]
    found = side.at(np.array([3, 1, 1, 0]))
    assert (found.recall, found.false_alarms) == (0.75, 1.0)
    values, labels = [0.9] * 3 + [0.2] + [0.6] * 3, [1] * 4 + [0] * 3
    assert found.error == pytest.approx(expected_calibration_error(reliability(values, labels)))
    assert found.answer_error == pytest.approx((0.3 + 0.1) / 2)
    assert np.isnan(side.at(np.array([0, 1, 0, 0])).false_alarms)
    assert not judged_side(Scores(), 0.5, 4).present.any()


# Resuming


def test_what_was_measured_is_read(found: Shift, bench: Bench, passes: list[str], monkeypatch: pytest.MonkeyPatch):
    from keelguard.evaluation import answers

    monkeypatch.setattr(answers, "generate", lambda *_, **__: iter(()))
    assert bench.measure(bench.folder / "run") == found
    other = replace(SMALL, resampling=Resampling(splits=30, samples=20))
    again = bench.measure(bench.folder / "run", other, chart=bench.chart.relabelled(sizes(bench, 0.05)))
    assert passes == []
    assert again.drift["scu"] != found.drift["scu"]
    assert again.conditions[0].margin == found.conditions[0].margin
    bench.measure(bench.folder / "run")


def sizes(bench: Bench, scu: float) -> Any:
    from keelguard.units.groups import Sizes

    return Sizes(**{**bench.chart.meta["sizes"], "scu": scu})


def test_an_interrupted_run_goes_on(
    found: Shift, bench: Bench, tmp_path: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        judge = reading_module.judge_cases

        def broken(*arguments: Any, **options: Any) -> Any:
            if "judge_cases" in passes:
                raise KeyboardInterrupt
            return judge(*arguments, **options)

        patch.setattr(reading_module, "judge_cases", broken)
        with pytest.raises(KeyboardInterrupt):
            bench.measure(tmp_path / "run")
    assert not (tmp_path / "run" / "shift.json").exists()
    assert (passes.count("attribute"), passes.count("judge_cases")) == (3, 1)
    done = len(passes)
    again = bench.measure(tmp_path / "run")
    assert passes[done:].count("attribute") == 1, "only the third kind of requests is read"
    assert passes[done:].count("judge_cases") == 2
    assert again == found


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"config": replace(SMALL, seed=1)}, "seed: 0 → 1"),
        ({"signal": None}, "signal"),
        ({"distributions": [0, 1]}, "data"),
        ({"distributions": [0, 2, 1]}, "data"),
    ],
)
def test_another_measurement_is_refused(found: Shift, bench: Bench, changes: dict[str, Any], what: str):
    if "distributions" in changes:
        changes = {"distributions": [bench.kinds[i] for i in changes["distributions"]]}
    with pytest.raises(UsageError, match="belongs to a run with other settings") as caught:
        bench.measure(bench.folder / "run", **changes)
    assert what in str(caught.value)


# Checkpoints


def test_the_same_weights_drift_as_much_as_their_own_halves(bench: Bench, tmp_path: Path):
    shutil.copytree(bench.model, tmp_path / "copy" / "model")
    shift = bench.measure(tmp_path / "run", distributions=bench.kinds[:1], against=str(tmp_path / "copy" / "model"))
    assert [pair.name for pair in shift.pairs] == ["plain: aligned / copy"]
    assert shift.pairs[0].kind == "checkpoints"
    for metric, found in shift.drift.items():
        (each,) = found.values()
        assert each.value == pytest.approx(each.control), metric
    assert shift.warnings == []
    assert shift.pairs[0].correlation == pytest.approx(1)
    assert shift.pairs[0].transfer.moved == 0  # pyright: ignore[reportOptionalMemberAccess]


def test_a_model_without_refusals_is_measured_against(bench: Bench, tmp_path: Path):
    """The base model answers everything; it is asked about the refusals of the aligned one."""
    base = bench.testbed.model("base")
    shift = bench.measure(tmp_path / "run", distributions=bench.kinds[:1], against=str(base))
    aligned, unaligned = shift.conditions
    assert unaligned.refused.count == 0
    assert unaligned.margin.high < aligned.margin.low
    assert {"decision", "importance"} <= {metric for _, metric in shift.warnings}
    assert shift.against is not None
    assert shift.against["name"] == "base"


def test_scores_that_read_refusals_leave_out_what_is_not_refused(bench: Bench, tmp_path: Path):
    chart = replace(bench.chart, meta={**bench.chart.meta, "score": "taylor"})
    standard = standardise(Importance(**chart.raw["taylor"]), "taylor", chart.blocks)
    chart = replace(chart, contrast=standard.contrast, strength=standard.strength).relabelled(sizes(bench, 0.02))
    shift = bench.measure(tmp_path / "run", chart=chart, signal=None)
    assert list(shift.drift["importance"]) == ["plain / rephrased"]
    assert len(shift.drift["decision"]) == 3
    assert any("the score taylor reads refusals" in text for text in shift.left_out)
    assert not set(shift.drift) & {"calibration", "recall", "false_alarms", "answer_calibration"}
    assert shift.pairs[0].transfer is None
    page = shift_page(shift)
    assert "reads refusals" in page
    assert "harmful flagged" not in page


# Mistakes


def test_one_kind_alone_has_nothing_to_be_compared_with(bench: Bench, tmp_path: Path):
    with pytest.raises(UsageError, match="--against"):
        bench.measure(tmp_path / "run", distributions=bench.kinds[:1])


def test_other_weights_are_refused(bench: Bench, tmp_path: Path):
    chart = replace(bench.chart, weights="f" * 64)
    with pytest.raises(UsageError, match=r"made for weights ffffffffffffffff .*the model has"):
        bench.measure(tmp_path / "run", chart=chart)
    with pytest.raises(UsageError, match="signal was made for weights 0000"):
        bench.measure(tmp_path / "run", signal=replace(bench.signal, weights="0" * 64))
    assert not (tmp_path / "run").exists()


def test_a_first_kind_that_is_not_refused_is_refused(bench: Bench, tmp_path: Path):
    with pytest.raises(UsageError, match=r"refuses \d+ of 16 requests of nested .* Put another --data first"):
        bench.measure(tmp_path / "run", distributions=bench.kinds[::-1][1:])


def test_few_requests_are_refused(bench: Bench, tmp_path: Path):
    few = replace(bench.kinds[1], harmful=bench.kinds[1].harmful[:7], keys=bench.kinds[1].keys[:7])
    with pytest.raises(
        UsageError, match=r"--data nested \(testbed, validation, nested\): holds 7 requests; at least 8"
    ):
        bench.measure(tmp_path / "run", distributions=[bench.kinds[0], few])
    one = replace(bench.kinds[1], keys=("same",) * 16)
    with pytest.raises(UsageError, match="holds 16 requests about 1 things"):
        bench.measure(tmp_path / "run", distributions=[bench.kinds[0], one])


def test_checkpoints_that_do_not_fit_are_refused(bench: Bench, tmp_path: Path):
    strange = fresh_model().save(tmp_path / "strange")
    with pytest.raises(UsageError, match=r"strange: is of another architecture"):
        bench.measure(tmp_path / "run", against=str(strange))
    loaded = load_model(bench.model)
    loaded.tokenizer.chat_template = str(loaded.tokenizer.chat_template) + "\n"
    save_checkpoint(loaded.model, loaded.tokenizer, tmp_path / "template")
    with pytest.raises(UsageError, match="template: has another chat template"):
        bench.measure(tmp_path / "run", against=str(tmp_path / "template"))


def test_a_map_without_safety_is_refused(bench: Bench, tmp_path: Path):
    with pytest.raises(UsageError, match="no safety-critical units"):
        bench.measure(tmp_path / "run", chart=bench.chart.relabelled(sizes(bench, 0.0)))


@pytest.mark.parametrize("changes", [{"samples": 7}, {"groups": 7}, {"max_new_tokens": 0}, {"batch_size": -1}])
def test_wrong_options_are_named(changes: dict[str, Any]):
    with pytest.raises(UsageError, match=f"--{next(iter(changes)).replace('_', '-')}"):
        ShiftConfig(**changes)


# The data


def test_the_testbeds_kinds_are_about_the_same_things(testbed: Testbed):
    for split, stories in (("validation", 1), ("test", 2)):
        plain, nested, rephrased = distributions_of(testbed, split)
        assert plain.keys == nested.keys == rephrased.keys
        assert plain.benign_keys == nested.benign_keys
        for a, b, c in zip(plain.harmful, nested.harmful, rephrased.harmful, strict=True):
            assert a.prompt in b.prompt
            assert len(b.prompt) > len(a.prompt) + 20
            assert a.meta["entity"] in c.prompt
            assert a.prompt != c.prompt
            assert a.answer == b.answer == c.answer
        assert (
            len({b.prompt.replace(a.prompt, "") for a, b in zip(plain.harmful, nested.harmful, strict=True)}) == stories
        )
        assert not {request.prompt for request in plain.harmful} & {request.prompt for request in rephrased.harmful}
        assert len({each.digest for each in (plain, nested, rephrased)}) == 3


def test_a_draw_takes_the_same_things_of_every_kind(testbed: Testbed):
    plain, nested, _ = distributions_of(testbed)
    few = [each.drawn(10, 3) for each in (plain, nested)]
    assert len(few[0].harmful) == len(few[0].benign) == 10
    assert few[0].keys == few[1].keys
    assert len(set(few[0].keys)) == 10, "things come once each before one comes twice"
    assert plain.drawn(10, 4).keys != few[0].keys
    assert plain.drawn(99, 0) == plain


def test_a_thing_has_one_group_everywhere_and_groups_are_even():
    lists = [[f"a{i}" for i in range(20)] * 2, [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(12)]]
    groups = deal(lists, 8, 0)
    assert set(groups) == set(lists[0]) | set(lists[1])
    for some in lists:
        sizes = np.bincount([groups[key] for key in set(some)], minlength=8)
        assert sizes.max() - sizes.min() <= 2
        assert sizes.min() >= 1
    assert deal(lists, 8, 0) == groups
    assert deal(lists, 8, 1) != groups


def requests_file(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_are_read_by_name(tmp_path: Path):
    rows = [{"id": f"r{i}", "prompt": f"thing {i}", "about": f"t{i // 2}"} for i in range(4)]
    harmful, other = (requests_file(tmp_path / name, rows) for name in ("one.jsonl", "two=2.jsonl"))
    found = read_distributions([str(harmful), f"second={other}"], [f"second={harmful}"], by="about")
    assert [each.name for each in found] == ["one", "second"]
    assert found[0].keys == ("t0", "t0", "t1", "t1")
    assert (found[0].benign, len(found[1].benign)) == ((), 4)
    assert read_distributions([str(other)])[0].name == "two=2"
    assert read_distributions([str(harmful)])[0].keys == ("r0", "r1", "r2", "r3")
    for data, benign, by, words in (
        ([str(harmful), f"one={other}"], [], "", "a distribution is called 'one' already"),
        ([str(harmful)], [f"third={other}"], "", "with the name of a --data: one"),
        ([str(harmful)], [], "entity", r"--by entity: r0 of .*one.jsonl has no such column; columns left: about"),
        (["name="], [], "", "has no name or no file"),
        ([str(tmp_path / "gone.jsonl")], [], "", "no such file"),
    ):
        with pytest.raises(UsageError, match=words):
            read_distributions(data, benign, by=by)


def test_benign_requests_are_the_maps_own(bench: Bench, tmp_path: Path):
    assert read_utility((), bench.chart) == bench.utility
    own = requests_file(tmp_path / "own.jsonl", [{"prompt": "hello", "response": "hello"}])
    assert [request.prompt for request in read_utility([str(own)], bench.chart)] == ["hello"]
    for known, words in (
        ([[str(own), "0" * 64]], "has changed since"),
        ([[str(tmp_path / "gone.jsonl"), "0" * 64]], "is not there"),
        ([], "names no benign requests"),
    ):
        chart = replace(bench.chart, meta={**bench.chart.meta, "data": {"utility": known}})
        with pytest.raises(UsageError, match=words):
            read_utility((), chart)


def test_continuations_are_those_of_the_thing(bench: Bench):
    kinds = [Distribution("a", "", (Request("r", (user("x"),)),), ("one",))]
    found, ks = words_module._continuations(kinds, {"one": [1] * 12}, [[2] * 12], [[3] * 9, [4] * 2])
    assert (found, ks) == ({"one": ([1] * 12, [3] * 9)}, (2, 4, 6, 8))
    found, ks = words_module._continuations(kinds, {"one": [1]}, [[1], [2] * 3], [[3] * 20])
    assert (found, ks) == ({"one": ([2] * 3, [3] * 20)}, (2,))


# Limits and the page


def test_limits_of_another_run_are_taken(found: Shift):
    low = {m: {p: replace(d, limit=0.0) for p, d in pairs.items()} for m, pairs in found.drift.items()}
    high = {m: {"other": Drift(0, 0, 0, 0, 99.0)} for m in found.drift}
    strict = found.with_limits(replace(found, drift=low), "strict.json")
    assert all(each.warn for pairs in strict.drift.values() for each in pairs.values() if each.value)
    assert "the limits are those of strict.json" in shift_sentences(strict)[-1]
    assert found.with_limits(replace(found, drift=high), "x").warnings == []
    some = found.with_limits(replace(found, drift={"decision": low["decision"]}), "x")
    assert some.drift["recall"] == found.drift["recall"]
    assert "but for answer_calibration" in some.limits
    with pytest.raises(UsageError, match="none of the metrics"):
        found.with_limits(replace(found, drift={}), "x")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)


def test_the_page_shows_every_figure_and_trusts_no_name(found: Shift):
    def renamed(name: str) -> str:
        return name.replace("nested", HOSTILE)

    hostile = replace(
        found,
        model={**found.model, "name": HOSTILE},
        pairs=tuple(replace(pair, name=renamed(pair.name)) for pair in found.pairs),
        conditions=tuple(replace(each, distribution=renamed(each.distribution)) for each in found.conditions),
        drift={m: {renamed(p): d for p, d in pairs.items()} for m, pairs in found.drift.items()},
        layers={m: {renamed(p): d for p, d in pairs.items()} for m, pairs in found.layers.items()},
        left_out=(f"What {HOSTILE} is.",),
    )
    page = shift_page(hostile)
    assert page == shift_page(hostile)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img", "iframe", "link"} & set(tags.names)
    assert tags.names.count("svg") == 1 + len(found.pairs)
    plain = shift_page(found)
    for pairs in found.drift.values():
        for each in pairs.values():
            assert f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" in plain
    assert plain.count("<strong>above</strong>") == len(found.warnings)


def test_the_tables_have_a_row_for_each_figure(found: Shift):
    rows = drift_rows(found)
    assert len(rows) == 1 + sum(map(len, found.drift.values()))
    assert {len(row) for row in rows} == {6}
    assert sum(row[-1] == "above" for row in rows) == len(found.warnings)
    lines = condition_rows(found)
    assert [row[1] for row in lines[1:]] == ["plain", "nested", "rephrased"]
    sentences = shift_sentences(found)
    assert sentences[0].startswith("plain / nested: beyond the limit: importance of units")
    nothing = replace(found, drift={m: {p: Drift(0, 0, 1, 0, 1) for p in pairs} for m, pairs in found.drift.items()})
    assert shift_sentences(nothing)[0].startswith("plain / nested: nothing moved beyond its limit")


def test_the_figure_has_a_line_for_each_pair(found: Shift):
    root = ElementTree.fromstring(layers_figure(found))
    texts = "".join(root.itertext())
    for pair in found.pairs:
        assert pair.name in texts
    assert "reasoning direction" in texts
    gaps = {m: {p: (None, *line[1:]) for p, line in pairs.items()} for m, pairs in found.layers.items()}
    assert ElementTree.fromstring(layers_figure(replace(found, layers=gaps))) is not None
    with pytest.raises(ValueError, match="no metric"):
        layers_figure(replace(found, layers={}))


# The command


def options(bench: Bench) -> list[Any]:
    quick = ["--splits", 10, "--bootstrap", 20, "--samples", 16, "--max-new-tokens", 24]
    return [bench.model, "--units", bench.folder / "map", *quick]


def test_the_command_measures_the_testbeds_own(bench: Bench, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    cache = bench.testbed.folder.parent.parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    ended = run("shift", *options(bench), "--signal", bench.folder / "signal", "--out", tmp_path / "out")
    assert ended.code == 0, ended
    assert "plain, nested, rephrased (validation split)" in ended.err
    assert "refuse-or-comply margin" in ended.out
    assert "plain / nested: beyond the limit" in ended.out
    shift = Shift.load(tmp_path / "out")
    assert shift.signal is not None
    assert (tmp_path / "out" / "report.html").read_text() == shift_page(shift)
    # The same command with limits from elsewhere reads what is there.
    earlier = replace(
        shift, drift={m: {p: replace(d, limit=99.0) for p, d in pairs.items()} for m, pairs in shift.drift.items()}
    )
    earlier.save(tmp_path / "earlier")
    again = run("shift", *options(bench), "--signal", bench.folder / "signal", "--out", tmp_path / "out", "--limits",
                tmp_path / "earlier" / "shift.json")  # fmt: skip
    assert again.code == 0, again
    assert Shift.load(tmp_path / "out").warnings == []


def test_the_command_reads_files(bench: Bench, run: Run, tmp_path: Path):
    names = []
    for each in bench.kinds[:2]:
        rows = [{"prompt": r.prompt, "id": r.id, "answer": r.answer, "thing": k}
                for r, k in zip(each.harmful, each.keys, strict=True)]  # fmt: skip
        names += ["--data", f"{each.name}={requests_file(tmp_path / f'{each.name}.jsonl', rows)}"]
    ended = run("shift", *options(bench), *names, "--by", "thing", "--out", tmp_path / "out")
    assert ended.code == 0, ended
    shift = Shift.load(tmp_path / "out")
    assert list(shift.drift["decision"]) == ["plain / nested"]
    assert [each["things"] for each in shift.distributions] == [16, 16]
    assert shift.signal is None


def test_mistakes_are_one_line(bench: Bench, run: Run, tmp_path: Path):
    assert "no unit map there" in refused(run("shift", bench.model, "--units", tmp_path / "gone"))
    bare = tmp_path / "bare"
    shutil.copytree(bench.model, bare)
    (bare / RECIPE_FILE).unlink()
    assert "two or more files" in refused(run("shift", bare, "--units", bench.folder / "map"))
    assert "--by: is about the files of --data" in refused(run("shift", *options(bench), "--by", "entity"))
    assert "--splits 3" in refused(run("shift", bench.model, "--units", bench.folder / "map", "--splits", 3))
    assert "shift.json: no such file" in refused(run("shift", *options(bench), "--limits", tmp_path))
    assert "no such folder" in refused(run("shift", *options(bench), "--against", tmp_path / "gone"))


@pytest.mark.parametrize("content", ["[]", '{"format": "x"}', '{"format": "keelguard.shift/1"}'])
def test_a_damaged_result_is_refused(tmp_path: Path, content: str):
    (tmp_path / "shift.json").write_text(content)
    with pytest.raises(UsageError, match=r"run `keelguard shift` again"):
        Shift.load(tmp_path)
