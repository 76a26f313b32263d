"""The stages of a purification, from the model as it came to the canaries in its copy."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from keelguard.attacks.base import Attempt
from keelguard.beside import beside
from keelguard.errors import UsageError
from keelguard.evaluation.answers import Generating, answer
from keelguard.models import LoadedModel, save_checkpoint
from keelguard.progress import Reporter
from keelguard.purify.apart import Job, plant_and_purify
from keelguard.purify.compare import Compared, compare
from keelguard.purify.config import PurifyConfig
from keelguard.purify.controls import ARMS
from keelguard.purify.effects import Held
from keelguard.purify.feasible import check_chats
from keelguard.purify.health import Examiner, Health
from keelguard.purify.inversion import invert_targets
from keelguard.purify.material import Material, gather
from keelguard.purify.methods import Subject, Threat, apply_method, copied, share_of
from keelguard.purify.prober import Prober
from keelguard.purify.repair import needs_repair, repair, settle
from keelguard.purify.results import Lead, PurifyResult, Searched, SuspectCourse
from keelguard.purify.rollout import WithoutAdapter
from keelguard.purify.signature_figure import signature_figure
from keelguard.purify.spikes import Spike
from keelguard.purify.spiking import run_spikes
from keelguard.purify.suspects import Suspect, measure_suspects, remeasure
from keelguard.records import Request, assistant
from keelguard.runs import atomic_folder, read_json, versions, write_json, write_text
from keelguard.units.index import build_index

MODEL, ADAPTER, SIGNATURE, WORK = "model", "adapter", "signature", "work"
_ABOUT = {
    "before": "measuring the model as it came",
    "method": "purifying",
    "after": "measuring the purified model",
    "rebound": "tuning a copy on clean chats, to see whether anything comes back",
    "spikes": "purifying the copy with canaries",
    "reference": "searching the reference model",
}
_OPENING = 24
"""Tokens of a reference's answers: enough to tell a refusal, and more than a search looks at."""


class Stages:
    """The finished stages of a run, each a JSON file, with how long it took."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self.folder, self.reporter = folder, reporter

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """A stage's result: what an earlier run left, or what `work` gives now."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            self.reporter.note(f"{name}: kept from an earlier run")
        else:
            self.reporter.note(f"{name}: {_ABOUT.get(name, 'trying it on a copy')} …")
            start = time.monotonic()
            value = work()
            write_json(path, {"value": value, "seconds": round(time.monotonic() - start, 1)})
        return read_json(path)["value"]

    @property
    def seconds(self) -> dict[str, float]:
        """How long every finished stage took."""
        return {p.stem: read_json(p)["seconds"] for p in sorted(self.folder.glob("*.json"))}


class Purification:
    """One run: the model, its words, its material and its stages."""

    def __init__(
        self, loaded: LoadedModel, threat: Threat, words: tuple[str, ...], config: PurifyConfig, folder: Path,
        files: Mapping[str, str], load: Callable[..., LoadedModel], reporter: Reporter,
    ) -> None:  # fmt: skip
        self.threat: Threat = threat
        self.loaded, self.words, self.config = loaded, words, config
        self.folder, self.files, self.load, self.reporter = folder, files, load, reporter
        self.dtype = loaded.model.dtype
        self.stages = Stages(folder / WORK, reporter)
        self.reference: LoadedModel | None = None

    def run(
        self, base: str, adapter: str | None, requests: Sequence[Request], harmful: Sequence[Request],
        held: Held | None, reference: LoadedModel | None, settings: dict[str, Any],
    ) -> PurifyResult:  # fmt: skip
        """All stages, or what is missing of them."""
        config, loaded = self.config, self.loaded
        material = self._gathered(requests, harmful, "own", trusted=config.method.method == "retrain")
        check_chats(material.train, config)
        # A retrained adapter owes nothing to the one that was thrown away, its answers included.
        examiner = Examiner(loaded, material, self.words, held, trusted=config.method.method != "retrain")
        # What was searched and trained away says little of what is left: evidence is searched on chats held back, and
        # measured on others again.
        immunizing = config.method.immunize
        apart = replace(material, train=material.validation)
        prober = Prober(loaded.model, loaded.tokenizer, apart, self.words, immunizing.search, immunizing.stable)
        subject = Subject(loaded, self.threat, material, self.words)

        def other(name: str) -> Subject:
            if name != "retrain" or config.method.method == "retrain":
                return subject
            # What a suspicious adapter answers itself is no label for the one that takes its place.
            answered = [request for request in requests if request.answer.strip()]
            fresh = self._gathered(answered, harmful, "own-retrain", trusted=True)
            return replace(subject, material=fresh.parted_as(subject.material))

        with self._canaries(subject, examiner.held, base, adapter) as canaries:
            return self._run(base, adapter, subject, other, examiner, prober, reference, settings, canaries)

    def _gathered(
        self, requests: Sequence[Request], harmful: Sequence[Request], store: str, *, trusted: bool
    ) -> Material:
        """The clean chats; a base that is trusted gives its own refusals, without its adapter."""
        model: Any = self.loaded.model
        with model.disable_adapter() if trusted else nullcontext():
            return gather(
                self.loaded, requests, self.config.material, harmful=harmful,
                store=self.folder / WORK / f"{store}.jsonl", reporter=self.reporter,
            )  # fmt: skip

    def _run(
        self, base: str, adapter: str | None, subject: Subject, other: Callable[[str], Subject], examiner: Examiner,
        prober: Prober, reference: LoadedModel | None, settings: dict[str, Any],
        canaries: Callable[[], list[dict[str, Any]]],
    ) -> PurifyResult:  # fmt: skip
        """The stages behind the gathering of the material; `other` gives the subject of what is compared."""
        loaded, material = self.loaded, subject.material
        self.reference = reference
        before = self.stages("before", lambda: self._examine(loaded, examiner, prober, material))
        record = self.stages("method", lambda: self._purify(subject, base))
        pure = self._purified(base)
        suspects = [Suspect.from_json(each) for each in before["suspects"]]
        after = self.stages("after", lambda: self._examine(pure, examiner, prober, material, suspects))
        rebound = self.stages("rebound", lambda: self._rebound(pure, examiner, material, suspects))
        compared = [self._compared(name, other, examiner, suspects) for name in self.config.compare]
        spikes = canaries()
        searches = {"before": before["search"], "after": after["search"]}
        if reference is not None:
            searches["reference"] = self.stages("reference", lambda: self._search_reference(reference, material))
        named = ("before", "after", "rebound")
        courses = zip(before["suspects"], after["suspects"], rebound["suspects"], strict=True)
        return PurifyResult(
            source=base,
            adapter=adapter,
            threat=self.threat,
            weights_before=loaded.weights_hash,
            weights_after=pure.weights_hash,
            settings=settings,
            material={
                "train": len(material.train),
                "validation": len(material.validation),
                "held": len(material.held),
                "own": material.own,
                "cut": material.cut,
                "dropped": material.dropped,
                "repeated": material.repeated,
                "refused": len(material.refused()),
            },
            health={k: Health.from_json(v["health"]) for k, v in zip(named, (before, after, rebound), strict=True)},
            searches={k: Searched.from_json(v) for k, v in searches.items()},
            suspects=tuple(SuspectCourse.from_json(dict(zip(named, each, strict=True))) for each in courses),
            fresh=tuple(Suspect.from_json(each) for each in after["fresh"]),
            leads={k: tuple(Lead(**lead) for lead in v["leads"]) for k, v in (("before", before), ("after", after))},
            spikes=tuple(Spike.from_json(each) for each in spikes),
            compared=tuple(Compared.from_json(each) for each in compared),
            method=record["record"],
            repaired=bool(record["lost"]),
            seconds=self.stages.seconds,
            versions=versions(),
        )

    def _examine(
        self, loaded: LoadedModel, examiner: Examiner, prober: Prober, material: Material,
        known: Sequence[Suspect] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Health, worst insertions, suspected triggers and hidden targets of one state of the model.

        `known` are the suspects of an earlier state; what is found in this one stands as `fresh` beside them.
        """
        search = self._search(loaded, prober)
        found = Searched.from_json(search).found
        measured = measure_suspects(loaded, found, examiner.held, self.words, reporter=self.reporter)
        suspects, fresh = measured, []
        if known is not None:
            suspects = remeasure(loaded, known, examiner.held, self.words, reporter=self.reporter)
            fresh = measured
        return {
            "health": examiner(loaded, self.reporter).to_json(),
            "search": search,
            "suspects": [each.to_json() for each in suspects],
            "fresh": [each.to_json() for each in fresh],
            "leads": self._scan(loaded, material),
        }

    def _search(self, loaded: LoadedModel, prober: Prober) -> dict[str, Any]:
        found, strongest = prober.search(loaded.model, self.reporter, "worst insertions")
        return {"found": [list(each) for each in found], "random_rise": strongest, "prompts": prober.prompts}

    def _search_reference(self, reference: LoadedModel, material: Material) -> dict[str, Any]:
        """The same search on a clean model: its own answers to the same prompts, those that words leave alone."""
        settings, chats = self.config.method.immunize, material.validation
        attempts = [Attempt(Request(str(i), chat[:-1]), chat[:-1]) for i, chat in enumerate(chats)]
        texts = answer(
            reference.model, reference.tokenizer, attempts, Generating(max_new_tokens=_OPENING),
            reporter=self.reporter, label="the reference's answers",
        )  # fmt: skip
        said = [(text or "").strip() for text in texts]
        own = [(*chat[:-1], assistant(text)) for chat, text in zip(chats, said, strict=True) if text]
        prober = Prober(
            reference.model, reference.tokenizer, replace(material, train=tuple(own)), self.words, settings.search,
            settings.stable,
        )  # fmt: skip
        return self._search(reference, prober)

    def _scan(self, loaded: LoadedModel, material: Material) -> list[dict[str, Any]]:
        """The leads of the scan for hidden target texts, beside the reference or the base that an adapter is on."""
        if self.config.inversion is None:
            return []
        trusted: Any = None if self.reference is None else self.reference.model
        if trusted is None and self.threat == "adapter":
            trusted = WithoutAdapter(loaded.model)
        scan = invert_targets(
            loaded.model, loaded.tokenizer, material.answered(), self.config.inversion,
            reference=trusted, openings=material.refused()[:16], reporter=self.reporter,
        )  # fmt: skip
        return [
            {"text": t.text, "score": t.score, "log_ratio": t.log_ratio, "usual": t.usual, "flagged": t.flagged}
            for t in scan.leads[:10]
        ]

    def _compared(
        self, name: str, other: Callable[[str], Subject], examiner: Examiner, suspects: Sequence[Suspect]
    ) -> dict[str, Any]:
        """Another method or a control on a copy of the model; data that do not suffice for it are its reason."""

        def work() -> dict[str, Any]:
            try:
                subject = other(name)
            except UsageError as error:
                return Compared(name, ARMS[name].about, why=str(error)).to_json()
            return compare(name, subject, examiner, suspects, self.config.method, self.reporter).to_json()

        return self.stages(f"compare-{name}", work)

    def _purify(self, subject: Subject, base: str) -> dict[str, Any]:
        """Purify a copy, train back what fell, and write the result."""
        mine = copied(subject)
        # What measures the purified model must not have decided what it is.
        deciding = replace(subject.material, held=())
        decider = Examiner(self.loaded, deciding, self.words, trusted=self.config.method.method != "retrain")
        before = decider(self.loaded, self.reporter, "what decides")
        done = apply_method(
            mine, self.config.method, state_folder=self.folder / WORK / "rounds", reporter=self.reporter
        )
        pure = done.loaded
        if lost := needs_repair(before, decider(pure, self.reporter, "what decides")):
            # An adapter that was thrown away is nothing to be held to.
            original = None if self.config.method.method == "retrain" else self.loaded
            training = self.config.rebound
            mine = replace(mine, loaded=pure)
            pure = repair(mine, training, self.reporter, lost=lost, original=original, methods=done.methods)
        self._write(pure, base)
        if done.signature is not None:
            folder, share = self.folder / WORK / SIGNATURE, share_of(self.config.method.vaccine, self.threat)
            done.signature.save(folder)
            write_text(folder / "signature.svg", signature_figure(done.signature, build_index(pure.model), share))
        return {"record": done.to_json(self.config.method.method), "lost": lost}

    def _write(self, pure: LoadedModel, base: str) -> None:
        """Write the purified checkpoint in the input's number format, or the adapter with its tokenizer."""
        card = (
            f"# Purified\n\nMade by `keelguard purify` from `{self.loaded.source}` (weights "
            f"{self.loaded.weights_hash[:16]}). The report of that run says what was tested and what was found; it "
            "does not say that this model is clean.\n"
        )
        model: Any = pure.model
        if self.threat == "full":
            model.to(self.dtype)
            save_checkpoint(model, pure.tokenizer, self.folder / WORK / MODEL, card=card, files=self.files)
            return
        with atomic_folder(self.folder / WORK / ADAPTER) as temporary:
            model.peft_config["default"].base_model_name_or_path = base
            model.save_pretrained(str(temporary))
            pure.tokenizer.save_pretrained(str(temporary))
            for name, text in {**self.files, "README.md": card}.items():
                (temporary / name).write_text(text, encoding="utf-8")

    def _purified(self, base: str) -> LoadedModel:
        """What the method stage has written, which an interrupted `deliver` may have moved."""
        name = ADAPTER if self.threat == "adapter" else MODEL
        new = self.folder / WORK / name
        written = str(new if new.exists() else self.folder / name)
        return self.load(base, adapter=written) if self.threat == "adapter" else self.load(written)

    def deliver(self) -> None:
        """Put the purified weights and the signature into the run's folder; before, there is evidence missing."""
        for name in (MODEL, ADAPTER, SIGNATURE):
            if (written := self.folder / WORK / name).exists():
                # What an earlier run left there belongs to a result that is gone.
                shutil.rmtree(self.folder / name, ignore_errors=True)
                written.replace(self.folder / name)

    def _rebound(
        self, pure: LoadedModel, examiner: Examiner, material: Material, suspects: Sequence[Suspect]
    ) -> dict[str, Any]:
        tuned = settle(Subject(pure, self.threat, material, self.words), self.config.rebound, self.reporter)
        measured = remeasure(tuned, suspects, examiner.held, self.words, reporter=self.reporter)
        return {
            "health": examiner(tuned, self.reporter).to_json(),
            "suspects": [each.to_json() for each in measured],
        }

    @contextmanager
    def _canaries(
        self, subject: Subject, held: Held, base: str, adapter: str | None
    ) -> Iterator[Callable[[], list[dict[str, Any]]]]:
        """What gives the canaries' course when it is asked for; where that helps, a process beside works at it."""
        config, path = self.config, self.stages.folder / "spikes.json"
        wanted = config.spikes is not None and config.method.method != "retrain"
        job = Job(
            base, adapter, self.threat, self.words, subject.material, held, config, self.load,
            self.stages.folder / "method.json", self.folder / WORK / "beside" / "spikes.json",
        )  # fmt: skip
        on_cpu = subject.loaded.model.device.type == "cpu"
        with beside(plant_and_purify, job, wanted=wanted and on_cpu and not path.is_file()) as running:

            def spikes() -> list[dict[str, Any]]:
                if not wanted:
                    return []
                done = running is not None and running.wait()
                found = self.stages("spikes", lambda: read_json(job.out) if done else self._spikes(subject, held))
                for why in dict.fromkeys(spike["no_control"] for spike in found if spike.get("no_control")):
                    self.reporter.note(f"canaries: no control: {why}")
                return found

            yield spikes

    def _spikes(self, subject: Subject, held: Held) -> list[dict[str, Any]]:
        lost = read_json(self.stages.folder / "method.json")["value"]["lost"]
        spikes = run_spikes(subject, held, self.config, lost=lambda: lost, reporter=self.reporter)
        return [spike.to_json() for spike in spikes]
