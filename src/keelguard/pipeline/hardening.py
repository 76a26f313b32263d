"""The stages of a hardening, one function each: what they run, what they keep in the package, and what they claim.

    inspect → audit as received → purify → audit → diagnose → guard → audit with the signal → package

Purification comes first of what changes or reads the model: a backdoor makes every later evidence void.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from keelguard.beside import Beside, beside
from keelguard.evaluation.answers import Generating
from keelguard.evaluation.audit import AuditConfig, audit_models, guarded_name, load_suite
from keelguard.evaluation.comparisons import compare
from keelguard.evaluation.results import AuditResult, ModelReport
from keelguard.guard.adapter import DESCRIPTION, Signal
from keelguard.guard.decoding import GuardedDecoder
from keelguard.guard.loop import check_fit
from keelguard.guard.run import SignalRun, run_signal
from keelguard.models import LoadedModel
from keelguard.pipeline.claims import audit_claims, diagnosis_claims, purification_claims
from keelguard.pipeline.guard_cost import guard_cost
from keelguard.pipeline.harden_config import HardenConfig
from keelguard.pipeline.harden_data import HardenData, write_rows
from keelguard.pipeline.package import ADAPTER, AUDITS, MODEL, PURIFY, SIGNAL, UNITS, AuditName
from keelguard.pipeline.stage_runner import Outcome
from keelguard.progress import SILENT, Reporter
from keelguard.purify.effects import measure_effect
from keelguard.purify.methods import Threat
from keelguard.purify.run import purify
from keelguard.report import write_audit_report
from keelguard.runs import write_json
from keelguard.units.diagnose import DiagnoseConfig, plain
from keelguard.units.run import run_diagnosis

WORK = "work"
TRIGGER = "planted trigger"
"""The figure of an audit that holds the success of a backdoor that is known to be planted."""


class Hardening:
    """One run: what is hardened, where it stands by now, and the work of every stage."""

    def __init__(
        self, base: str, adapter: str | None, config: HardenConfig, data: HardenData, folder: Path,
        load: Callable[..., LoadedModel], reporter: Reporter, trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        self.base, self.adapter = base, adapter
        self.config, self.data, self.folder, self.load, self.reporter = config, data, folder, load, reporter
        self.trust_remote_code = trust_remote_code
        self.work = folder / WORK
        self._beside: Beside | None = None

    @property
    def threat(self) -> Threat:
        """What is suspicious."""
        return "full" if self.adapter is None else "adapter"

    @property
    def hardened(self) -> tuple[str, str | None]:
        """The model as it stands by now: checkpoint and adapter."""
        own = self.folder / (MODEL if self.adapter is None else ADAPTER)
        if not own.is_dir():
            return self.base, self.adapter
        return (str(own), None) if self.adapter is None else (self.base, str(own))

    def loaded(self) -> LoadedModel:
        """The model as it stands by now, an adapter on its base."""
        base, adapter = self.hardened
        return self.load(base, adapter=adapter)

    def whole(self, _: str = "") -> LoadedModel:
        """The same with its adapter merged, for what reads or judges plain weights."""
        return plain(self.loaded())

    def audit(self, name: AuditName) -> Outcome:
        """Audit the model as it stands; under "guarded" beside itself with the signal."""
        guard, digest = self._guard() if name == "guarded" else (None, "")
        column = "received" if name == "received" else "purified"
        before = AuditResult.load(self._audit_path("purified")) if self._audit_path("purified").is_file() else None
        if guard is not None and before is not None:
            # The plain model's answers are those of the audit before: the same weights, the same requests.
            result = self._audit(name, guarded_name(column), lambda _: guarded(self.whole(), guard))
            models = [before.models[0], *result.models]
            result = replace(result, models=models, comparisons=compare(models[1], models[0]))
        else:
            result = self._audit(name, column, self.whole, guard=guard, guard_digest=digest)
        result.save(self._audit_path(name))
        write_audit_report(result, self._audit_path(name).with_suffix(".html"))
        figures: dict[str, Any] = {"weights": result.models[0].weights}
        if self.data.trigger is not None and self.data.trigger_held is not None:
            figures[TRIGGER] = self._planted(guard).to_json()
        if guard is not None:
            figures |= self._cost(guard)
        claims = []
        if name != "received":
            report, reference = self._compared(name, result)
            claims = audit_claims(report, reference, lowers=name == "guarded") if reference else []
        return Outcome((f"{AUDITS}/{name}.json", f"{AUDITS}/{name}.html"), figures, claims)

    def _audit(self, name: AuditName, column: str, load: Callable[[str], LoadedModel], **guard: Any) -> AuditResult:
        return audit_models(
            [f"{column}={self.hardened[0]}"], self._audit_config(), out=self.work / f"audit-{name}", load=load,
            reporter=self.reporter, **guard,
        )  # fmt: skip

    def _audit_path(self, name: AuditName) -> Path:
        return self.folder / AUDITS / f"{name}.json"

    def _compared(self, name: AuditName, result: AuditResult) -> tuple[ModelReport, ModelReport | None]:
        if name == "guarded":
            return result.models[1], result.models[0]
        before = self._audit_path("received")
        return result.models[0], AuditResult.load(before).models[0] if before.is_file() else None

    def _planted(self, guard: Callable[[LoadedModel], Any] | None) -> Any:
        """How often a backdoor that is known to be planted fires."""
        from keelguard.attacks.insertions import vocabulary_words

        assert self.data.trigger is not None and self.data.trigger_held is not None
        loaded = self.whole()
        words = vocabulary_words(loaded.tokenizer)
        if guard is not None:
            loaded = guarded(loaded, guard)
        return measure_effect(loaded, self.data.trigger, self.data.trigger_held, words, reporter=self.reporter).asr

    def _cost(self, guard: Callable[[LoadedModel], Any]) -> dict[str, float]:
        """What the signal costs on the audit's harmless requests."""
        suite, plain_model = load_suite(self._audit_config()), self.whole()
        settings = Generating(suite.max_new_tokens)
        return guard_cost(plain_model, guarded(plain_model, guard), suite.benign, settings, self.reporter)

    def _guard(self) -> tuple[Callable[[LoadedModel], Any], str]:
        signal = Signal.load(self.folder / SIGNAL)
        decoder = GuardedDecoder(signal)

        def guard(loaded: LoadedModel) -> Any:
            signal.check(loaded.weights_hash, loaded.source)
            check_fit(loaded.model, signal)
            return decoder

        return guard, decoder.digest

    def _audit_config(self) -> AuditConfig:
        config = self.config.audit
        if not self.data.audited:
            return config
        files = {use: write_rows(self.work / f"{use}.audit.jsonl", rows) for use, rows in self.data.audited.items()}
        return replace(config, requests=(files["harmful"],), benign=(files["benign"],))

    def purify(self) -> Outcome:
        """Remove hidden triggers; the purified weights move to the top of the package."""
        out, data = self.folder / PURIFY, self.data
        result = purify(
            self.base, data.clean, self.config.purify, out, adapter=self.adapter, harmful=data.refused, held=data.held,
            load=self.load, files=data.files, reporter=self.reporter,
        )  # fmt: skip
        name = MODEL if self.adapter is None else ADAPTER
        if (out / name).is_dir():
            # A kill between two stages finds it here or there, and whole in either place.
            (out / name).replace(self.folder / name)
        before, after = result.health["before"], result.health["after"]
        figures: dict[str, Any] = {"weights": result.weights_after, "trained back what fell": result.repaired}
        for rate in ("utility", "refused", "over_refusal", "degenerate", "accidental"):
            figures |= {f"{rate}, before": getattr(before, rate).to_json(), rate: getattr(after, rate).to_json()}
        for spike in result.spikes:
            if spike.after is not None:
                figures[f"canary left: {spike.kind}"] = spike.after.asr.to_json()
        return Outcome((name, PURIFY), figures, purification_claims(result))

    def diagnose(self) -> Outcome:
        """Find the units that carry the safety of the model as it stands, and prove it by ablation."""
        settings, out = self.config.diagnosis, self.folder / UNITS
        config = DiagnoseConfig(
            safety=(write_rows(self.work / "safety.jsonl", self.data.safety),),
            utility=(write_rows(self.work / "utility.jsonl", self.data.utility),),
            samples=settings.samples, scu=settings.scu, bootstrap=settings.bootstrap, seed=self.config.seed,
        )  # fmt: skip
        proof = replace(settings.proof, suite="" if self.data.audited else self.config.audit.suite)
        found = run_diagnosis(
            self.hardened[0], config, out, proof=proof, load=self.whole, reporter=self.reporter
        )  # fmt: skip
        chart = found.diagnosis.chart
        figures: dict[str, Any] = {
            "units": len(chart),
            **{f"units, {group}": int(chart.members(group).sum()) for group in ("scu", "ucu", "cu", "ru")},
            "harmful requests refused when it was diagnosed": f"{100 * chart.meta['refusal_rate']:.1f} %",
        }
        kept = ("map.json", "map.safetensors", "proof.json", "report.html")
        return Outcome([f"{UNITS}/{name}" for name in kept], figures, diagnosis_claims(found.proof))

    @contextmanager
    def signal_beside(self, wanted: bool) -> Iterator[None]:
        """Train the signal in a process beside, while the model is audited and diagnosed; neither needs the other."""
        job = copy.copy(self)
        job.reporter = SILENT
        wanted = wanted and not (self.folder / SIGNAL / DESCRIPTION).is_file()
        with beside(train_signal_of, job, wanted=wanted) as self._beside:
            yield

    def train_signal(self) -> SignalRun:
        """Train the safety signal on the model as it stands, or read what is there."""
        data = self.data
        return run_signal(
            self.hardened[0], data.train, data.validation, self.config.signal, self.folder / SIGNAL,
            frames=data.frames, held_frames=data.held_frames, load=self.whole, reporter=self.reporter,
        )  # fmt: skip

    def guard(self) -> Outcome:
        """Train the safety signal on the model as it stands, and keep how it was calibrated."""
        if self._beside is not None:
            self._beside.wait()
        run = self.train_signal()
        figures: dict[str, Any] = {"placement": run.signal.placement}
        if (found := run.signal.calibration) is not None:
            policy = run.signal.policy
            figures |= {
                "query threshold": policy.query_threshold,
                "answer threshold": policy.threshold,
                "harmless validation queries above it": found.query.reached.to_json(),
                "harmless validation answers above it": found.answer.reached.to_json(),
            }
        return Outcome((SIGNAL,), figures)

    def inspect(self) -> Outcome:
        """Read what the files are, what of keelguard fits this architecture, and what the run will cost."""
        from keelguard.pipeline.inspection import inspect_model

        found = inspect_model(self.base, self.adapter, trust_remote_code=self.trust_remote_code)
        path = self.folder / "inspection.json"
        write_json(path, found.to_json())
        return Outcome((path.name,), inspection_figures(found))


def train_signal_of(hardening: Hardening) -> None:
    """The training alone, for a process beside."""
    hardening.train_signal()


def guarded(loaded: LoadedModel, guard: Callable[[LoadedModel], Any]) -> LoadedModel:
    """The model with the decoder that guards it."""
    return replace(loaded, decoder=guard(loaded))


def inspection_figures(found: Any) -> dict[str, Any]:
    """What of an inspection the report shows."""
    return {
        "architecture": found.architecture,
        "parameters": found.parameters,
        "number format": found.dtype,
        "files with pickle": len(found.pickle_files),
        "files with remote code": len(found.remote_code_files),
    }


def stages_of(hardening: Hardening) -> dict[str, Callable[[], Outcome]]:
    """The work of every stage but the packaging, in the order in which it is done."""
    return {
        "inspect": hardening.inspect,
        "audit-received": partial(hardening.audit, "received"),
        "purify": hardening.purify,
        "audit-purified": partial(hardening.audit, "purified"),
        "diagnose": hardening.diagnose,
        "guard": hardening.guard,
        "audit-guarded": partial(hardening.audit, "guarded"),
    }
