"""Which step ended a release: the worker, the server, the gate, or day0 itself.

It is read from what was recorded at the time: the events, the files beside a tool's log, and what
the canary found. Nothing is guessed from a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from conductor.chain import Stage, State
from conductor.compatibility import Engine
from conductor.event_log import parse, read_log
from conductor.executors.local import LOG, exit_code_file
from conductor.files import read_json
from conductor.history import StageRecord
from conductor.jobs import job_folders
from conductor.release_state import Release
from gates.canary import Health

STARTS_AND_ENDS = frozenset(
    {"tool_started", "tool_finished", "server_started", "job_submitted", "job_ended"}
)
TASK_SCRIPTS = {"evaluation": "evaluate.py"}
"""The workers of tasks that do not name theirs."""


class Kind(StrEnum):
    """What has to run again to see a step fail."""

    WORKER = "worker"
    WORKER_AND_SERVER = "worker and server"
    SERVER = "server"
    GATE = "gate"
    CONDUCTOR = "conductor"


@dataclass(frozen=True, kw_only=True)
class FailingStep:
    """The step that ended a release; paths are relative to the run directory.

    ``tool`` is a worker's script, in ``directory``; ``side`` is whose server it is about.
    ``process_exit_code`` is that of its process, None where it had none, or we ended it.
    ``exit_code`` is what a caller gets: the same, but never 0, because a worker that reports its
    failure leaves with 0.
    """

    kind: Kind
    stage: Stage
    attempt: int
    gate: str | None
    failure_class: str | None
    message: str
    tool: str | None
    side: str | None
    directory: str
    log: str | None
    process_exit_code: int | None
    exit_code: int

    def document(self) -> dict[str, Any]:
        """The step as a JSON mapping."""
        return asdict(self)


def find_failing_step(release: Release, exit_code: int) -> FailingStep | None:
    """Return what ended ``release``; None where nothing failed. ``exit_code`` is the release's."""
    stage = next((s for s, state in release.journal.states.items() if state is State.FAILED), None)
    if stage is None:
        return None
    run_dir, record = release.journal.run_dir, release.journal.stages[stage]
    attempt_dir = release.journal.attempt_dir(stage)
    found = _find_tool(release, stage, record, attempt_dir)
    codes = {Kind.GATE: 1, Kind.CONDUCTOR: exit_code}
    status = None if found.kind in codes else _exit_code(found.log)
    return FailingStep(
        kind=found.kind,
        stage=stage,
        attempt=record.attempts,
        gate=record.gate,
        failure_class=record.failure_class,
        message=record.detail,
        tool=found.tool,
        side=found.side,
        directory=str(found.directory.relative_to(run_dir)),
        log=None if found.log is None else str(found.log.relative_to(run_dir)),
        process_exit_code=status,
        exit_code=codes.get(found.kind, status or 1),
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    kind: Kind
    directory: Path
    tool: str | None = None
    side: str | None = None
    log: Path | None = None


def _find_tool(release: Release, stage: Stage, record: StageRecord, where: Path) -> _Found:
    log = release.journal.log_of(stage)
    if release.config.dry_run:
        return _Found(kind=Kind.GATE if record.gate else Kind.CONDUCTOR, directory=where, log=log)
    if record.gate == "canary" and (side := _unhealthy_side(where)):
        if release.plan.row.engine is Engine.TRANSFORMERS:
            return _worker("answer_prompts.py", where)
        return _server(side, where)
    if record.gate:
        return _Found(kind=Kind.GATE, directory=where, log=log)
    last = _last_start_or_end(release.journal.run_dir, stage)
    match last.get("event"):
        case "tool_finished" if last.get("status") != "ok":
            return _worker(last["tool"], release.journal.run_dir / last["directory"])
        case "server_started":
            directory = (release.journal.run_dir / last["log"]).parent
            return _server(_ended_side(directory) or last["side"], directory)
        case "job_ended":
            return _in_job(release.journal.run_dir, last["name"], where)
    return _Found(kind=Kind.CONDUCTOR, directory=where, log=log)


def _worker(tool: str, directory: Path) -> _Found:
    request = read_json(directory / "request.json")
    served = request.get("backend") == "endpoint"
    return _Found(
        kind=Kind.WORKER_AND_SERVER if served else Kind.WORKER,
        directory=directory,
        tool=tool,
        side=request["served_name"] if served else None,
        log=directory / LOG,
    )


def _in_job(run_dir: Path, name: str, where: Path) -> _Found:
    """Return what ran in a job that was ended before it could say how its task went."""
    for folder in job_folders(run_dir):
        if folder.name == name:
            directory, task = folder.path.parent.parent, folder.read("task") or {}
            script = task.get("script", TASK_SCRIPTS.get(task.get("task", "")))
            if script and (directory / LOG).exists():
                return _worker(script, directory)
            log = next(iter(sorted(folder.path.glob("*.out"))), None)
            return _Found(kind=Kind.CONDUCTOR, directory=directory, log=log)
    return _Found(kind=Kind.CONDUCTOR, directory=where)


def _server(side: str, directory: Path) -> _Found:
    logs = [log for log in directory.glob(f"server-{side}*.log") if "-node" not in log.stem]
    logs.sort(key=lambda log: log.stat().st_mtime_ns)
    return _Found(kind=Kind.SERVER, directory=directory, side=side, log=next(reversed(logs), None))


def _unhealthy_side(directory: Path) -> str | None:
    """Return the side that the canary could not load or serve.

    Where it is both, the settings are at fault, and the source shows that without the candidate.
    """
    evidence = read_json(directory / "canary.json")
    healths = {"source": evidence["source_health"], "candidate": evidence["health"]}
    return next((side for side, health in healths.items() if health != Health.OK), None)


def _ended_side(directory: Path) -> str | None:
    """Return the side whose server left by itself."""
    sides = ("source", "candidate")
    return next((side for side in sides if [*directory.glob(f"server-{side}*.exit_code")]), None)


def _last_start_or_end(run_dir: Path, stage: Stage) -> dict[str, Any]:
    """Return the last event of a tool or a server in the latest attempt at ``stage``.

    A job tells of those in it when it has ended; where it told of none, its own end is the event.
    """
    below = run_dir / "stages" / stage
    last: dict[str, Any] = {}
    for event in _events(run_dir):
        name, place = event.get("event"), event.get("directory") or event.get("log") or ""
        if name == "stage_started" and event.get("stage") == stage:
            last = {}
        elif name in STARTS_AND_ENDS and (run_dir / place).is_relative_to(below):
            ended_as_told = name == "job_ended" and last.get("event") != "job_submitted"
            last = last if ended_as_told else event
    return last


def _events(run_dir: Path) -> Iterator[dict[str, Any]]:
    return (parse(line) for line in read_log(run_dir).sound)


def _exit_code(log: Path | None) -> int | None:
    if log is not None:
        with suppress(OSError, ValueError):
            return int(exit_code_file(log).read_text(encoding="ascii"))
    return None
