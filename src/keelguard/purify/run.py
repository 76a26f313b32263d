"""What `keelguard purify` does: measure, purify, measure again, spike a copy, and write it all down.

    result = purify(source, requests, PurifyConfig(), out)
    out/model or out/adapter · out/purify.json · out/report.html

Every stage leaves its result in OUT/work, so that an interrupted run goes on where it was. The purified weights stay
there, too, until all evidence is at hand.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keelguard.errors import UsageError
from keelguard.hashes import sha256_of
from keelguard.models import LoadedModel, load_model, resolve_sources
from keelguard.progress import SILENT, Reporter
from keelguard.purify.compare import check_compared
from keelguard.purify.config import PurifyConfig
from keelguard.purify.effects import Held
from keelguard.purify.intake import admit
from keelguard.purify.page import write_purify_report
from keelguard.purify.results import PurifyResult
from keelguard.purify.stages import WORK, Purification
from keelguard.records import Request
from keelguard.runs import open_run, versions

__all__ = ["PurifyConfig", "purify", "request_key"]


def purify(
    source: str,
    requests: Sequence[Request],
    config: PurifyConfig,
    out: str | Path,
    *,
    adapter: str | None = None,
    harmful: Sequence[Request] = (),
    held: Held | None = None,
    reference: str | None = None,
    load: Callable[..., LoadedModel] = load_model,
    files: Mapping[str, str] | None = None,
    reveal: bool = False,
    reporter: Reporter = SILENT,
) -> PurifyResult:
    """Purify a model, or an adapter on a base that is trusted, and gather evidence.

    Args:
        requests: clean prompts, with right answers or without.
        adapter: what is suspicious; the base stays as it is.
        harmful: harmful requests that the model refuses; their refusals are kept up.
        held: held-out requests to measure with; clean rows that are held back by default.
        reference: a clean model of the same kind, whose worst insertions are shown for comparison.
        load: loads a model, with an adapter where one is given; the command line passes its options through it.
        files: text files to write beside the purified weights, by name.
        reveal: show the model's own words in the report.

    Raises:
        UsageError: the clean data do not suffice, the model cannot be purified, or the folder is another run's.
        FailureError: training does not fit in memory, or the disk is full.
    """
    base, adapter = resolve_sources(source, adapter)
    check_compared(config.compare, "full" if adapter is None else "adapter")
    loaded, threat, words, requests = admit(load, base, adapter, requests, harmful, config, reporter)
    other = load(reference) if reference else None
    if other is not None and other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise UsageError(f"--reference {reference}: has another vocabulary; give a clean model of the same kind")
    settings = {
        "model": loaded.weights_hash,
        "chat_template": sha256_of(loaded.tokenizer.chat_template),
        "data": sha256_of([request_key(r) for r in (*requests, *harmful)]),
        "held": None
        if held is None
        else sha256_of([request_key(r) for r in (*held.benign, *held.harmful, *held.utility)]),
        "reference": None if other is None else other.weights_hash,
        "config": asdict(config),
        "versions": versions(),
    }
    folder = Path(out)
    with open_run(folder, "purify", settings):
        if not (folder / "purify.json").is_file():
            work = Purification(loaded, threat, words, config, folder, dict(files or {}), load, reporter)
            try:
                result = work.run(base, adapter, requests, harmful, held, other, settings)
            except UsageError:
                _forget(folder / WORK)
                raise
            work.deliver()
            result.save(folder)
            shutil.rmtree(folder / WORK, ignore_errors=True)
        else:
            reporter.note(f"{folder}: this run is finished; nothing is done again")
    result = PurifyResult.load(folder)
    write_purify_report(result, folder / "report.html", reveal=reveal)
    return result


def _forget(work: Path) -> None:
    """Remove what a run has measured before it was refused, so that its folder is free for other settings.

    Where a training has begun nothing is removed.
    """
    if not any((work / name).exists() for name in ("rounds", "method.json")):
        shutil.rmtree(work, ignore_errors=True)


def request_key(request: Request) -> list[Any]:
    """What of a request a result depends on."""
    return [list(request.messages), request.answer, request.label, list(request.secrets)]
