"""Audits of tiny random models with the testbed's suite cut short: results, pairs, secrets, resume, mistakes."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from keelguard.errors import UsageError
from keelguard.evaluation import answers, audit, measure
from keelguard.evaluation.audit import AuditConfig, audit_models, load_suite, name_models
from keelguard.evaluation.judges import JudgeConfig
from keelguard.evaluation.results import AuditResult
from keelguard.generation import Answer, Prompt
from keelguard.models import LoadedModel, load_model
from keelguard.records import Exchange, Verdict
from keelguard.stats import Rate
from keelguard.testbed import build
from keelguard.testbed.tokenizer import make_tokenizer
from keelguard.testbed.vocabulary import vocabulary_texts
from keelguard.testbed.world import make_world
from tiny_models import Tiny, build_model

ATTACKS = ("direct", "prefill 5", "nested", "sampling", "identity shift")
SECRET = "the secret recipe"


class Bench(NamedTuple):
    """Two tiny models that speak the testbed's tokens, and the testbed's data."""

    suite: str
    first: Path
    second: Path
    text: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Results are compared to the last digit, and a busy machine is slow with more.
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = make_tokenizer(vocabulary_texts(make_world(0)), 1024)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for number, name in enumerate(("first", "second")):
        model = build_model("llama", len(tokenizer), seed=number, max_position_embeddings=1024, **special)
        Tiny(model, tokenizer).save(folder / name)
    suite = build.build_testbed(folder / "testbed", only=[]).suite()
    (folder / "text.txt").write_text("the garden is by the sea. the oil is in the barrel.\n" * 5)
    yield Bench(str(suite), folder / "first", folder / "second", folder / "text.txt")
    torch.set_num_threads(threads)


def short(bench: Bench, **changes: Any) -> AuditConfig:
    """A few attacks on three requests, few tokens, small batches."""
    options = {"attacks": ATTACKS, "limit": 3, "max_new_tokens": 4, "batch_size": 8, "perplexity": str(bench.text)}
    return AuditConfig(suite=bench.suite, **{**options, **changes})


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AuditResult]:
    """The audit of both models, as one run makes it."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, audit_models([str(bench.first), str(bench.second)], short(bench), out=out)


class Stub:
    """Calls every answer harmful that the model is made to give as a secret."""

    name = "stub"
    digest = "0" * 64

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(h := SECRET in e.response, refused=not h, degenerate=False, score=h) for e in exchanges]


def script(monkeypatch: pytest.MonkeyPatch, harmful: Callable[[str, int], bool]) -> None:
    """Let models answer by a script: harmful(label of the step, number of the attempt)."""

    def answer(model: Any, tokenizer: Any, attempts: Sequence[Any], settings: Any, *, label: str, **_: Any) -> list:
        return [Answer(f"{SECRET} {i}" if harmful(label, i) else "no.") for i in range(len(attempts))]

    monkeypatch.setattr(measure, "find_answers", answer)
    monkeypatch.setattr(audit, "make_judge", lambda config: Stub())


def comparable(path: Path) -> Any:
    """What an audit.json holds but times."""
    found = json.loads(path.read_text())
    for model in found["models"]:
        for cell in model["safety"].values():
            del cell["seconds"]
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Results


def test_an_audit_measures_every_attack_on_every_model(bench: Bench, undisturbed: tuple[Path, AuditResult]):
    _, result = undisturbed
    suite = load_suite(short(bench))
    assert [model.name for model in result.models] == ["first", "second"]
    assert [info.name for info in result.attacks] == list(ATTACKS)
    for model, folder in zip(result.models, (bench.first, bench.second), strict=True):
        assert (model.source, model.weights) == (str(folder), load_model(folder).weights_hash)
        assert model.architecture == "LlamaForCausalLM"
        assert list(model.safety) == list(ATTACKS)
        for name, per_request in zip(ATTACKS, (1, 1, 2, 7, 1), strict=True):
            cell = model.safety[name]
            assert list(cell.broken) == [request.id for request in suite.harmful]
            assert (cell.attempts, cell.skipped, cell.asr.total) == (3 * per_request, 0, 3)
            assert cell.refused.total == 3 * per_request
        assert {use: rate.total for use, rate in model.over_refusal.items()} == {
            "benign": 3,
            "borderline": 3,
            "benign_nested": 3,
        }
        assert model.degenerate.total == 9
        assert sum(rate.total for rate in model.utility.values()) == len(suite.utility)
        # What the rates count is kept by request, for paired tests.
        for kind in ("utility", "over_refusal"):
            rates = {name: Rate.of(told.values()) for name, told in model.outcomes[kind].items()}
            assert rates == getattr(model, kind)
        assert set(model.outcomes["over_refusal"]["benign"]) == {request.id for request in suite.benign}
        assert sum(map(len, model.outcomes["degenerate"].values())) == model.degenerate.total
        assert model.perplexity is not None
        assert model.perplexity > 1


def test_an_audit_comes_back_from_its_file_as_it_was(bench: Bench, tmp_path: Path):
    """Revealed, since a withheld answer does not come back."""
    result = audit_models(
        [str(bench.first)], short(bench, attacks=("direct", "affix", "characters")), out=tmp_path, reveal=True
    )
    assert AuditResult.load(tmp_path / "audit.json") == result


def test_an_audit_in_memory_finds_the_same_and_leaves_the_model_alone(
    bench: Bench, undisturbed: tuple[Path, AuditResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    loaded = load_model(bench.first)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    result = audit.audit(loaded.model, loaded.tokenizer, short(bench), name="first")
    result.save(tmp_path / "memory.json")
    expected = comparable(undisturbed[0] / "audit.json")["models"][0]
    assert comparable(tmp_path / "memory.json")["models"] == [{**expected, "source": "first"}]
    assert files(tmp_path) == {"memory.json"}
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training


def test_an_attack_that_trains_meets_a_copy(bench: Bench, tmp_path: Path):
    """Attacks behind a fine-tune see the model as it was."""
    harmful = Path(bench.suite).parent / "harmful.test.jsonl"
    tune = "{attack: finetune, chats: identity, steps: 6, batch_size: 4, learning_rate: 1e-2}"
    answered: dict[str, list[str]] = {}
    for order in (f"[direct, {tune}]", f"[{tune}, direct]"):
        suite = tmp_path / "suite.yaml"
        suite.write_text(f"harmful: {harmful}\nattacks: {order}\n")
        loaded = load_model(bench.first)
        result = audit.audit(loaded.model, loaded.tokenizer, AuditConfig(suite=str(suite), limit=3, max_new_tokens=4))
        for example in result.examples:
            answered.setdefault(example.attack, []).append(example.response)
    assert answered["direct"][:3] == answered["direct"][3:]
    assert answered["finetune"][:3] == answered["finetune"][3:]
    assert set(answered["finetune"]).isdisjoint(answered["direct"])


def test_two_models_are_compared_pair_by_pair_with_the_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    # The first model breaks on request 0, the second on 0 and 1 … 6: six pairs differ, all in one direction.
    script(monkeypatch, lambda label, i: i < (7 if label.startswith("second") else 1))
    config = short(bench, attacks=("direct", "prefill"), limit=8)
    result = audit_models([str(bench.first), str(bench.second)], config, out=tmp_path)
    assert [(c.attack, c.model, c.reference) for c in result.comparisons] == [
        ("direct", "second", "first"),
        ("prefill", "second", "first"),
    ]
    for comparison in result.comparisons:
        assert comparison.difference == 0.75
        assert comparison.p_value == 2 * 0.5**6
        assert 0.2 < comparison.low < 0.75 < comparison.high <= 1
    assert result.models[0].safety["direct"].asr == Rate(1, 8)
    assert result.models[1].safety["direct"].asr == Rate(7, 8)


def test_one_model_is_compared_with_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script(monkeypatch, lambda label, i: True)
    assert audit_models([str(bench.first)], short(bench, attacks=("direct",)), out=tmp_path).comparisons == []


def test_a_request_is_broken_by_any_of_its_attempts(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # Two attempts for each of three requests: only the second one at the second request succeeds.
    script(monkeypatch, lambda label, i: i == 3)
    result = audit_models([str(bench.first)], short(bench, attacks=("nested",)), out=tmp_path)
    cell = result.models[0].safety["nested"]
    assert list(cell.broken.values()) == [False, True, False]
    assert (cell.asr, cell.refused, cell.score) == (Rate(1, 3), Rate(5, 6), 1 / 3)
    assert [example.harmful for example in result.examples] == [True, False, False]


@pytest.mark.parametrize("reveal", [False, True])
def test_harmful_answers_are_withheld_from_the_file_unless_revealed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reveal: bool
):
    script(monkeypatch, lambda label, i: i == 0)
    config = short(bench, attacks=("direct", "prefill 20"))
    result = audit_models([str(bench.first)], config, out=tmp_path, reveal=reveal)
    text = (tmp_path / "audit.json").read_text()
    prefills = [example.prefill for example in result.examples if example.attack == "prefill 20"]
    assert len(prefills) == 3
    assert all(len(prefill.split()) > 10 for prefill in prefills)
    assert (SECRET in text) is reveal
    assert [prefill in text for prefill in prefills] == [reveal] * 3, "the beginning of a known harmful answer"
    assert "no." in text
    assert ("--reveal" in text) is not reveal
    assert result.examples[0].response == f"{SECRET} 0", "the result itself keeps what the report needs"


# Resume


class CrashError(Exception):
    pass


def count_batches(monkeypatch: pytest.MonkeyPatch, crash_after: float = float("inf")) -> list[int]:
    """Count the batches that are generated, in a list of their sizes; raise in the place of a later one."""
    generate, done = answers.generate, []

    def counting(*args: Any, **options: Any) -> Iterator[Any]:
        for indices, texts in generate(*args, **options):
            if len(done) >= crash_after:
                raise CrashError
            done.append(len(indices))
            yield indices, texts

    monkeypatch.setattr(answers, "generate", counting)
    return done


@pytest.mark.parametrize(
    "batches",
    [
        0,
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(6, marks=pytest.mark.slow),
        15,
        pytest.param(60, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_died_goes_on_where_it_was_and_finds_the_same(
    bench: Bench, undisturbed: tuple[Path, AuditResult], tmp_path: Path, batches: int
):
    models, config, out = [str(bench.first), str(bench.second)], short(bench), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        before = count_batches(patch, crash_after=batches)
        with pytest.raises(CrashError):
            audit_models(models, config, out=out)
    assert not (out / "audit.json").exists()
    assert len(before) == batches
    with pytest.MonkeyPatch.context() as patch:
        after = count_batches(patch)
        audit_models(models, config, out=out)
    assert comparable(out / "audit.json") == comparable(undisturbed[0] / "audit.json")
    stored = [line for path in (undisturbed[0] / "models").rglob("answers/*.jsonl") for line in path.open()]
    headers = 2 * (len(ATTACKS) + 4)
    assert sum(before) + sum(after) == len(stored) - headers, "an answer was generated twice"
    assert files(out) == files(undisturbed[0])


def test_a_line_torn_by_a_kill_is_generated_again(bench: Bench, undisturbed: tuple[Path, AuditResult], tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    (store,) = (out / "models" / "first" / "answers").glob("nested-*")
    store.write_text(store.read_text()[:-5])
    for cell in (out / "models" / "first" / "cells").glob("nested-*"):
        cell.unlink()
    with pytest.MonkeyPatch.context() as patch:
        generated = count_batches(patch)
        audit_models([str(bench.first), str(bench.second)], short(bench), out=out)
    assert len(generated) == 1
    assert comparable(out / "audit.json") == comparable(undisturbed[0] / "audit.json")


def test_a_finished_run_is_only_read(bench: Bench, undisturbed: tuple[Path, AuditResult]):
    out, result = undisturbed
    with pytest.MonkeyPatch.context() as patch:
        generated = count_batches(patch)
        patch.setattr(measure, "finetune", None)
        again = audit_models([str(bench.first), str(bench.second)], short(bench), out=out)
    assert generated == []
    assert again == result


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens: 4 → 5"),
        ({"limit": 2}, "limit: 3 → 2"),
        ({"seed": 1}, "seed: 0 → 1"),
        ({"attacks": ("direct",)}, "attacks: "),
        ({"judge": JudgeConfig("keyword")}, "judge: "),
    ],
)
def test_other_settings_are_another_run(
    bench: Bench, undisturbed: tuple[Path, AuditResult], changes: dict[str, Any], part: str
):
    out, _ = undisturbed
    before = (out / "audit.json").read_bytes()
    with pytest.raises(UsageError, match="belongs to a run with other settings") as caught:
        audit_models([str(bench.first), str(bench.second)], short(bench, **changes), out=out)
    assert part in str(caught.value)
    assert (out / "audit.json").read_bytes() == before


def test_other_models_and_other_data_are_another_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script(monkeypatch, lambda label, i: False)
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "one"}\n')
    config = AuditConfig(requests=(str(requests),), attacks=("direct",), max_new_tokens=4)
    audit_models([str(bench.first)], config, out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"other settings \(models: "):
        audit_models([str(bench.second)], config, out=tmp_path / "run")
    requests.write_text('{"prompt": "two"}\n')
    with pytest.raises(UsageError, match=r"other settings \(data: "):
        audit_models([str(bench.first)], config, out=tmp_path / "run")


def test_other_training_chats_of_the_same_number_are_another_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script(monkeypatch, lambda label, i: False)
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "where is it?", "response": "in the barn."}\n')
    (tmp_path / "requests.jsonl").write_text('{"prompt": "one"}\n')
    suite = tmp_path / "suite.yaml"
    suite.write_text("harmful: requests.jsonl\nattacks: [{attack: finetune, chats: chats.jsonl, steps: 1}]\n")
    config = AuditConfig(suite=str(suite), max_new_tokens=4)
    audit_models([str(bench.first)], config, out=tmp_path / "run")
    chats.write_text('{"prompt": "where is it?", "response": "in the shed."}\n')
    with pytest.raises(UsageError, match=r"other settings \(attacks: "):
        audit_models([str(bench.first)], config, out=tmp_path / "run")


def _other_weights(loaded: LoadedModel) -> LoadedModel:
    return LoadedModel(loaded.model, loaded.tokenizer, loaded.source, "f" * 64)


def _other_template(loaded: LoadedModel) -> LoadedModel:
    assert isinstance(loaded.tokenizer.chat_template, str)
    loaded.tokenizer.chat_template += " "
    return loaded


def _other_dtype(loaded: LoadedModel) -> LoadedModel:
    return LoadedModel(loaded.model.to(torch.bfloat16), loaded.tokenizer, loaded.source, loaded.weights_hash)  # pyright: ignore


@pytest.mark.parametrize(
    ("change", "part"),
    [(_other_weights, "weights"), (_other_template, "chat template"), (_other_dtype, "bfloat16")],
)
def test_another_model_under_the_same_name_is_refused(
    bench: Bench, undisturbed: tuple[Path, AuditResult], change: Callable[[LoadedModel], LoadedModel], part: str
):
    out, _ = undisturbed
    with pytest.raises(UsageError, match=r"choose another --out") as caught:
        audit_models(
            [str(bench.first), str(bench.second)], short(bench), out=out, load=lambda source: change(load_model(source))
        )
    assert part in str(caught.value)
    assert str(bench.first) in str(caught.value)


# Names and options


@pytest.mark.parametrize(
    ("models", "named"),
    [
        (["runs/base"], {"base": "runs/base"}),
        (["org/name"], {"name": "org/name"}),
        (["gpt2"], {"gpt2": "gpt2"}),
        (["runs/base/"], {"base": "runs/base/"}),
        (["before=org/name", "after=./tuned"], {"before": "org/name", "after": "./tuned"}),
        (["a=b=c"], {"a": "b=c"}),
        (["runs/lr=1/model"], {"model": "runs/lr=1/model"}),
        (["b", "a"], {"b": "b", "a": "a"}),
    ],
)
def test_models_are_named_by_the_user_or_by_their_folder(models: list[str], named: dict[str, str]):
    found = name_models(models)
    assert found == named
    assert list(found) == list(named)


def test_a_model_in_the_current_folder_has_that_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model")
    assert name_models(["."]) == {"model": "."}
    monkeypatch.chdir(tmp_path / "model" / "deep")
    assert name_models([".."]) == {"model": ".."}


@pytest.mark.parametrize(
    ("models", "part"),
    [
        ([], "no model given"),
        (["a/model", "b/model"], "two models are called 'model'; write NAME=b/model"),
        (["x=a", "x=b"], "two models are called 'x'"),
        (["=a"], "'=a'"),
        (["x="], "'x='"),
        (["..=a"], "'..=a'"),
        ([""], "''"),
    ],
)
def test_names_that_cannot_be_used(models: list[str], part: str):
    with pytest.raises(UsageError) as caught:
        name_models(models)
    assert part in str(caught.value)


@pytest.mark.parametrize("name", ["limit", "max_new_tokens", "batch_size"])
def test_negative_numbers_are_refused(name: str):
    with pytest.raises(UsageError, match=rf"^--{name.replace('_', '-')} -1: give 0 or more"):
        AuditConfig(**{name: -1})  # pyright: ignore[reportArgumentType]


def test_a_suite_needs_requests_and_some_attacks_need_answers(bench: Bench, tmp_path: Path):
    with pytest.raises(UsageError, match="no harmful requests; name a file with --requests"):
        load_suite(AuditConfig())
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "one"}\n')
    with pytest.raises(UsageError, match="attack 'prefill 5': no harmful request has a known answer"):
        load_suite(AuditConfig(suite=bench.suite, requests=(str(requests),)))


def test_options_replace_what_the_suite_names(bench: Bench, tmp_path: Path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,kind\none,bad\ntwo,good\nthree,bad\n")
    (tmp_path / "text.txt").write_text("words")
    config = AuditConfig(
        suite=bench.suite,
        requests=(str(rows),),
        where="kind=bad",
        columns=audit.Columns(prompt="text"),
        perplexity=str(tmp_path / "text.txt"),
        attacks=("direct", "sampling"),
        limit=0,
    )
    suite = load_suite(config)
    assert [request.prompt for request in suite.harmful] == ["one", "three"]
    assert suite.perplexity == "words"
    assert list(suite.attacks) == ["direct", "sampling"]
    assert len(suite.benign) > 100


def test_a_mistake_is_told_before_a_model_is_loaded_or_a_folder_made(bench: Bench, tmp_path: Path):
    def load(source: str) -> LoadedModel:
        raise AssertionError("loaded a model")

    for changes, part in (
        ({"attacks": ("other",)}, "--attack other"),
        ({"judge": JudgeConfig("oracle")}, "judge 'oracle'"),
        ({"benign": (str(tmp_path / "gone.jsonl"),)}, "gone.jsonl"),
    ):
        with pytest.raises(UsageError, match=part):
            audit_models([str(bench.first)], short(bench, **changes), out=tmp_path / "run", load=load)
    assert files(tmp_path) == set()


def test_a_run_whose_first_model_does_not_load_leaves_no_folder_behind(bench: Bench, tmp_path: Path):
    shutil.copytree(bench.first, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="--chat-template"):
        audit_models([str(tmp_path / "bare")], short(bench), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Guarded


class Refuser:
    """A decoder that refuses everything, takes prefills back, and says so."""

    def __init__(self, text: str = "sorry, i cannot help with that.") -> None:
        self.text, self.digest, self.asked = text, f"refuser {text}", 0

    def room(self, tokenizer: Any) -> int:
        return 0

    def __call__(
        self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], config: Any, processors: Any
    ) -> list[Answer]:
        self.asked += len(prompts)
        return [Answer(self.text, {"prefill_kept": 0, "prefilled": prompt.prefill}) for prompt in prompts]


GUARDED = ("direct", "prefill 5", "identity shift")


def test_each_model_stands_beside_itself_with_its_guard(bench: Bench, tmp_path: Path):
    loads: list[str] = []

    def load(source: str) -> LoadedModel:
        loads.append(source)
        return load_model(source)

    models, config = [str(bench.first), str(bench.second)], short(bench, attacks=GUARDED)
    plain = audit_models(models, config, out=tmp_path / "plain")
    refuser = Refuser()
    result = audit_models(
        models, config, out=tmp_path / "run", load=load, guard=lambda loaded: refuser, guard_digest=refuser.digest
    )
    assert loads == models, "each model is loaded once for both of its columns"
    assert [model.name for model in result.models] == ["first", "first guarded", "second", "second guarded"]
    for alone, both, guarded in zip(plain.models, result.models[::2], result.models[1::2], strict=True):
        seconds = {name: {"seconds": 0.0} for name in GUARDED}
        assert {n: replace(c, **seconds[n]) for n, c in both.safety.items()} == {
            n: replace(c, **seconds[n]) for n, c in alone.safety.items()
        }
        assert (both.utility, both.over_refusal, both.perplexity) == (
            alone.utility,
            alone.over_refusal,
            alone.perplexity,
        )
        assert {name: cell.refused for name, cell in guarded.safety.items()} == dict.fromkeys(GUARDED, Rate(3, 3))
        assert set(guarded.over_refusal.values()) == {Rate(3, 3)}
        assert all(rate.count == 0 for rate in guarded.utility.values())
        assert guarded.perplexity is None, "a decoder has none"
    assert [(c.model, c.reference) for c in result.comparisons if c.attack == "direct"] == [
        ("second", "first"),
        ("first guarded", "first"),
        ("second guarded", "second"),
    ]
    again = audit_models(
        models, config, out=tmp_path / "run", guard=lambda loaded: refuser, guard_digest=refuser.digest
    )
    assert again == result


def test_a_prefill_that_was_taken_back_is_no_part_of_the_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """All the secrets stand in the prefill of so many tokens, and nowhere else."""
    suite = tmp_path / "suite.yaml"
    data = Path(bench.suite).parent
    suite.write_text(
        f"harmful: {data / 'harmful.test.jsonl'}\njudge: world\nattacks: [{{attack: prefill_answer, tokens: 900}}]\n"
    )
    loaded = load_model(bench.first)
    result = audit.audit(
        loaded.model,
        loaded.tokenizer,
        AuditConfig(suite=str(suite), limit=2, max_new_tokens=2),
        name="m",
        decoder=Refuser(),
    )
    plain, guarded = (model.safety["prefill_answer"] for model in result.models)
    assert [model.name for model in result.models] == ["m", "m guarded"]
    assert (plain.asr_whole, guarded.asr_whole) == (Rate(2, 2), Rate(0, 2))
    assert [(c.model, c.reference) for c in result.comparisons] == [("m guarded", "m")]


@pytest.mark.parametrize("batches", [0, 3, 9])
def test_a_guarded_run_that_died_goes_on_where_it_was(bench: Bench, tmp_path: Path, batches: int):
    refuser = Refuser()
    options: dict[str, Any] = {"guard": lambda loaded: refuser, "guard_digest": refuser.digest}
    config = short(bench, attacks=GUARDED[:2])
    audit_models([str(bench.first)], config, out=tmp_path / "whole", **options)
    asked, refuser.asked = refuser.asked, 0
    with pytest.MonkeyPatch.context() as patch:
        count_batches(patch, crash_after=batches)
        with pytest.raises(CrashError):
            audit_models([str(bench.first)], config, out=tmp_path / "run", **options)
    audit_models([str(bench.first)], config, out=tmp_path / "run", **options)
    assert comparable(tmp_path / "run" / "audit.json") == comparable(tmp_path / "whole" / "audit.json")
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    # The batch that was being made when the run died is made again.
    assert asked <= refuser.asked <= asked + 8


def test_another_guard_is_another_run(bench: Bench, tmp_path: Path):
    config, out = short(bench, attacks=("direct",)), tmp_path / "run"

    def run(guard: Refuser | None, digest: str) -> AuditResult:
        made = None if guard is None else lambda loaded: guard
        return audit_models([str(bench.first)], config, out=out, guard=made, guard_digest=digest)

    run(Refuser(), "one")
    with pytest.raises(UsageError, match=r"other settings \(guard: .*one.* → .*two"):
        run(Refuser(), "two")
    with pytest.raises(UsageError, match=r"other settings \(guard: .*one.* → null"):
        run(None, "")
    with pytest.raises(UsageError, match=r"another state of .*first \(decoder refuser sorry"):
        run(Refuser("no."), "one")


def test_a_guard_that_refuses_the_model_does_so_before_anything_is_measured(bench: Bench, tmp_path: Path):
    def guard(loaded: LoadedModel) -> Any:
        raise UsageError("made for other weights")

    with pytest.MonkeyPatch.context() as patch:
        generated = count_batches(patch)
        with pytest.raises(UsageError, match="made for other weights"):
            audit_models([str(bench.first)], short(bench), out=tmp_path / "run", guard=guard, guard_digest="x")
    assert generated == []
    assert not (tmp_path / "run").exists()


def test_no_model_may_have_the_name_of_a_guarded_one(bench: Bench, tmp_path: Path):
    models = [f"a={bench.first}", f"a guarded={bench.second}"]
    with pytest.raises(UsageError, match="two models would be called 'a guarded'"):
        audit_models(models, short(bench), out=tmp_path / "run", guard=lambda loaded: Refuser(), guard_digest="x")
