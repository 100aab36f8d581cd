"""Evaluate one side with lm-eval, in one piece or in batches, and put batches together.

What a side was asked is the sum of its batches: the run gate, the conditions and the comparison
see all of them, and never one batch in place of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conductor.config import Config
from conductor.engines import EngineSession
from conductor.engines.opening import longest_request
from conductor.executors.environ import worker_environ
from conductor.executors.local import Progress, Worker, run_worker
from conductor.failure import Failure
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
from conductor.release_state import Evaluation, World
from conductor.rounds import EVERYTHING, Batch
from conductor.suites import Suite
from gates import FailureClass


def harness_settings(config: Config, suite: Suite, model: Model) -> HarnessSettings:
    """Return how the harness asks, for either side."""
    return HarnessSettings(
        seed=config.seed,
        limit=config.limit,
        concurrency=config.concurrency,
        request_timeout_s=config.request_timeout_s,
        max_length=longest_request(suite, model),
    )


def evaluate(
    session: EngineSession,
    side: str,
    suite: Suite,
    settings: HarnessSettings,
    stage_dir: Path,
    world: World,
    progress: Progress,
    batch: Batch = EVERYTHING,
) -> Evaluation:
    """Ask one side ``batch`` with lm-eval; return its conditions, results and summary."""
    stage_dir.mkdir(parents=True, exist_ok=True)
    backend = session.backend(side, stage_dir, progress)
    results_dir = stage_dir / "results"
    request = evaluation_request(suite, settings, backend, results_dir, batch)
    environ = {
        **worker_environ(world.environ, offline=suite.is_local),
        **HARNESS_ENVIRON,
        **session.secrets(side),
    }
    environment = "reference" if backend["backend"] == "in_process" else "evaluate"
    with TemporaryDirectory(dir=stage_dir, prefix="datasets-cache-") as cache:
        if suite.is_local:
            # The datasets cache recognizes local files by their times, not by their content.
            environ["HF_DATASETS_CACHE"] = cache
        run_worker(
            Worker(script="evaluate.py", interpreter=world.environments.interpreter(environment)),
            stage_dir,
            request,
            environ=environ,
            progress=progress,
            still_useful=lambda: session.check(side),
        )
    with _accounting():
        results = probe_results(
            results_dir,
            choices=metric_choices(suite),
            clusters={task.name: task.clusters for task in suite.tasks.values() if task.clusters},
        )
    _check_directions(suite, results)
    engine = {
        f"engine.{name}": value.value if isinstance(value, Enum) else value
        for name, value in session.settings(side).items()
    }
    log = session.log(side)
    return _evaluation(suite, results, {**request, **engine}, frozenset([log] if log else []))


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
    server_logs: frozenset[Path],
) -> Evaluation:
    with _accounting():
        return Evaluation(
            settings=settings,
            conditions={**settings, **results.conditions()},
            results=results,
            samples=results.samples(),
            summary=run_summary(suite, results, server_logs),
            server_logs=server_logs,
        )


def merge(parts: Sequence[Evaluation], suite: Suite) -> Evaluation:
    """Put the batches of one side together, in the order in which they were asked."""
    if len(parts) == 1:
        return parts[0]
    with _accounting():
        results = merge_results([part.results for part in parts])
    logs: frozenset[Path] = frozenset().union(*(part.server_logs for part in parts))
    return _evaluation(suite, results, _all_settings([part.settings for part in parts]), logs)


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
    suite: Suite, results: EvaluationResults, server_logs: Iterable[Path]
) -> dict[str, Any]:
    """Return the run summary against what the suite names; a task without a result has failed."""
    found = results.run_summary()["tasks"]
    lost = {"status": "FAILED", "errors": ["no result was written"]}
    tasks = {}
    for task in suite.tasks.values():
        tasks[task.name] = {**found.get(task.name, lost), "scale": task.scale}
        if task.limits:
            tasks[task.name]["limits"] = dict(task.limits)
    facts = server_facts(server_logs)
    return {"tasks": tasks, **({"server": facts} if facts else {})}


def server_facts(logs: Iterable[Path]) -> dict[str, Any] | None:
    """Return what the servers of one side logged, added up: status codes, and starts."""
    total: dict[str, Any] = {"status_codes": {}, "starts": 0}
    read = [read_server_log(log) for log in sorted(logs)]
    for facts in read:
        total["starts"] += facts["starts"]
        for code, count in facts["status_codes"].items():
            total["status_codes"][code] = total["status_codes"].get(code, 0) + count
    return total if read else None
