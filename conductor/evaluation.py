"""Evaluate one side with lm-eval, in one piece or in batches, and put batches together.

What a side was asked is the sum of its batches: the run gate, the conditions and the comparison
see all of them, and never one batch in place of the whole.

An evaluation is what lies in its directory: ``request.json`` and ``engine.json`` say how it was
asked, ``result.json`` that the harness came to its end, ``results/`` what was answered, and
``evaluation.json``, written last, how the servers fared meanwhile. One that is there is read and
not asked again; one that was cut short goes on with the answers that its request cache holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from conductor.config import Config
from conductor.engines import EngineSession
from conductor.engines.opening import longest_request
from conductor.executors.environ import worker_environ
from conductor.executors.local import Progress, Worker
from conductor.executors.slurm.folders import JobFolder
from conductor.failure import Failure, Stalled
from conductor.files import read_json, write_json
from conductor.harnesses.lm_eval import (
    HARNESS_ENVIRON,
    MAY_DIFFER,
    HarnessSettings,
    evaluation_request,
    metric_choices,
)
from conductor.models import Model
from conductor.probes.lm_eval import EvaluationResults, merge_results, probe_results
from conductor.probes.reading import ProbeError
from conductor.probes.server_log import read_server_log
from conductor.redaction import redact_document
from conductor.release_state import Evaluation, World
from conductor.rounds import EVERYTHING, Batch
from conductor.suites import Suite
from gates import FailureClass

if TYPE_CHECKING:
    from conductor.tools import Tools


def harness_settings(config: Config, suite: Suite, model: Model) -> HarnessSettings:
    """Return how the harness asks, for either side."""
    return HarnessSettings(
        seed=config.seed,
        limit=config.limit,
        concurrency=config.concurrency,
        request_timeout_s=config.request_timeout_s,
        max_length=longest_request(suite, model),
    )


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """What is asked of one side, and where it is kept.

    ``directory`` receives the evaluation; ``request_cache`` the answers as they come in, which
    outlive a failed attempt and are of this side and batch alone. ``stall_s`` seconds without
    progress count as a hang.
    """

    side: str
    suite: Suite
    settings: HarnessSettings
    directory: Path
    request_cache: Path
    stall_s: float | None = None
    batch: Batch = EVERYTHING

    def request(self) -> dict[str, Any]:
        """Return the request to the harness, less how the engine is reached."""
        return evaluation_request(
            self.suite,
            self.settings,
            self.batch,
            output_dir=self.directory / "results",
            request_cache=self.request_cache,
        )

    def adopt(self, recalled_from: str, tokenizer: Path) -> None:
        """Take an evaluation that was put into ``directory`` from elsewhere for one's own.

        It answers this inquiry by its content, not by where the files lay that were asked of.
        """
        request, sealed = self.directory / "request.json", self.directory / "evaluation.json"
        places = {"tokenizer": str(tokenizer)}
        write_json(request, {**read_json(request), **self.request(), **places})
        write_json(sealed, {**read_json(sealed), "recalled_from": recalled_from})

    def is_answered(self) -> bool:
        """True when this very question was put and answered to its end."""
        try:
            request = read_json(self.directory / "request.json")
            result = read_json(self.directory / "result.json")
            return bool(result["status"] == "ok") and all(
                request[name] == value
                for name, value in redact_document(self.request()).items()
                if name not in MAY_DIFFER
            )
        except (OSError, ValueError, LookupError, TypeError):
            return False


def evaluate(
    inquiry: Inquiry,
    open_engine: Callable[[], EngineSession],
    tools: Tools,
    world: World,
    progress: Progress,
    still_wanted: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return the answers to ``inquiry``, asking with lm-eval what was not answered yet.

    The engine is opened only where something is to be asked. ``still_wanted`` is called all the
    time, and raises to end the asking early.

    Raises:
        Failure: the engine or the harness failed, or what it left cannot be accounted for.
    """
    # A job that has answered may still be ending its server, and is waited for.
    if not (inquiry.is_answered() and JobFolder.are_over(inquiry.directory)):
        session = open_engine()
        try:
            tools.ask(inquiry, session, world, progress, still_wanted)
        except Stalled:
            session.discard(inquiry.side)  # the next attempt shall not meet a server that hangs
            raise
        except Failure:
            session.check(inquiry.side)  # what a dying server did to the harness is the server's
            raise
    return read_evaluation(inquiry.directory, inquiry.suite)


def ask(
    inquiry: Inquiry,
    session: EngineSession,
    tools: Tools,
    world: World,
    progress: Progress,
    still_wanted: Callable[[], None],
) -> None:
    """Put ``inquiry`` to one side of an open engine, here; its directory receives the answers.

    Raises:
        Failure: as for :func:`evaluate`.
    """

    def still_useful() -> None:
        still_wanted()
        session.check(side)

    side, directory, suite = inquiry.side, inquiry.directory, inquiry.suite
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / "results", ignore_errors=True)
    (directory / "evaluation.json").unlink(missing_ok=True)
    backend = session.backend(side, directory, progress)
    _note_engine(inquiry, session)
    inquiry.request_cache.mkdir(parents=True, exist_ok=True)
    environ = {
        **worker_environ(world.environ, offline=suite.is_local),
        **HARNESS_ENVIRON,
        **session.secrets(side),
    }
    environment = "reference" if backend["backend"] == "in_process" else "evaluate"
    with TemporaryDirectory(dir=directory, prefix="datasets-cache-") as cache:
        if suite.is_local:
            # The datasets cache recognizes local files by their times, not by their content.
            environ["HF_DATASETS_CACHE"] = cache
        tools.run_worker(
            Worker(script="evaluate.py", interpreter=world.environments.interpreter(environment)),
            directory,
            {**inquiry.request(), **backend},
            environ=environ,
            progress=progress,
            still_useful=still_useful,
            stall_s=inquiry.stall_s,
        )


def _note_engine(inquiry: Inquiry, session: EngineSession) -> None:
    """Write down who is about to answer, and from which byte on its log is about this."""
    path = inquiry.directory / "engine.json"
    log = session.log(inquiry.side)
    servers = []
    with suppress(OSError, ValueError, LookupError):  # an earlier try that was cut short
        servers = read_json(path)["servers"]
    if log is not None:
        servers.append({"log": str(log), "offset": log.stat().st_size})
    settings = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in session.settings(inquiry.side).items()
    }
    write_json(path, {"settings": settings, "servers": servers})


def read_evaluation(directory: Path, suite: Suite) -> Evaluation:
    """Read an evaluation that came to its end, and seal it where that was not done yet.

    Raises:
        Failure: SAMPLE_ACCOUNTING_FAILED for results that cannot be read; USER_CONFIG_ERROR where
            suite and harness disagree on which way a score is better.
    """
    with _accounting():
        results = probe_results(
            directory / "results",
            choices=metric_choices(suite),
            clusters={task.name: task.clusters for task in suite.tasks.values() if task.clusters},
        )
    _check_directions(suite, results)
    sealed = _seal(directory)
    engine = {f"engine.{name}": value for name, value in sealed["settings"].items()}
    request = read_json(directory / "request.json")
    settings = {**request, **engine}
    return _evaluation(suite, results, settings, sealed["server"], sealed.get("recalled_from"))


def _seal(directory: Path) -> dict[str, Any]:
    """Return ``evaluation.json``, made from ``engine.json`` and the servers' logs if need be."""
    path = directory / "evaluation.json"
    if path.exists():
        sealed: dict[str, Any] = read_json(path)
        return sealed
    engine = read_json(directory / "engine.json")
    with _accounting():
        read = [
            read_server_log(Path(server["log"]), server["offset"]) for server in engine["servers"]
        ]
    sealed = {"settings": engine["settings"], "server": _all_servers(read)}
    write_json(path, sealed)
    return sealed


def _all_servers(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Add up what servers logged: status codes, and the most often that any of them started.

    A server that was ended and started anew by the conductor is another one, with its own log.
    """
    if not facts:
        return None
    codes: dict[str, int] = {}
    for each in facts:
        for code, count in each["status_codes"].items():
            codes[code] = codes.get(code, 0) + count
    return {"status_codes": codes, "starts": max(each["starts"] for each in facts)}


@contextmanager
def _accounting() -> Iterator[None]:
    """Classify what a probe cannot read: samples that are not there are not accounted for."""
    try:
        yield
    except ProbeError as error:
        raise Failure(FailureClass.SAMPLE_ACCOUNTING_FAILED, str(error)) from None


def _evaluation(
    suite: Suite,
    results: EvaluationResults,
    settings: Mapping[str, Any],
    server: Mapping[str, Any] | None,
    recalled_from: str | None,
) -> Evaluation:
    with _accounting():
        return Evaluation(
            settings=settings,
            conditions={**settings, **results.conditions()},
            results=results,
            samples=results.samples(),
            summary=run_summary(suite, results, server),
            server=server,
            recalled_from=recalled_from,
        )


def merge(parts: Sequence[Evaluation], suite: Suite) -> Evaluation:
    """Put the batches of one side together, in the order in which they were asked."""
    if len(parts) == 1:
        return parts[0]
    with _accounting():
        results = merge_results([part.results for part in parts])
    server = _all_servers([part.server for part in parts if part.server is not None])
    settings = _all_settings([part.settings for part in parts])
    return _evaluation(suite, results, settings, server, parts[0].recalled_from)


def _all_settings(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first batch's settings, and of each later one what was otherwise there."""
    merged = dict(batches[0])
    for number, settings in enumerate(batches[1:], start=2):
        merged |= {
            f"batch-{number}.{name}": value
            for name, value in settings.items()
            if name not in MAY_DIFFER and merged.get(name) != value
        }
    return merged


def _check_directions(suite: Suite, results: EvaluationResults) -> None:
    """Refuse a suite that calls better what the harness calls worse."""
    for name, result in results.tasks.items():
        task = suite.tasks.get(name)
        if task and result.higher_is_better not in (None, task.higher_is_better):
            raise Failure(
                FailureClass.USER_CONFIG_ERROR,
                f"suite {suite.path}: tasks.{name}.higher_is_better is {task.higher_is_better}, "
                f"but lm-eval says {result.higher_is_better} of {result.metric}; correct it",
            )


def run_summary(
    suite: Suite, results: EvaluationResults, server: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the run summary against what the suite names; a task without a result has failed."""
    found = results.run_summary()["tasks"]
    lost = {"status": "FAILED", "errors": ["no result was written"]}
    tasks = {}
    for task in suite.tasks.values():
        tasks[task.name] = {**found.get(task.name, lost), "scale": task.scale}
        if task.limits:
            tasks[task.name]["limits"] = dict(task.limits)
    return {"tasks": tasks, **({"server": dict(server)} if server else {})}
