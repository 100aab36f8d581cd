"""Where releases stand: one release, all of a workspace, and a release that is being watched.

Everything is read from the run directory, also while another process works there. Invariants:

* Nothing is written and no lock is taken, so looking never disturbs a release.
* That somebody works on a release is told by the process, not by what its files last said.
* A run directory that tells nothing costs its own row and not the list.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conductor.chain import Stage, State, next_stage
from conductor.event_log import parse, read_log
from conductor.failure import Failure, unusable
from conductor.files import read_regular
from conductor.history import History, timestamp
from conductor.jobs import Job, Standing, read_jobs, total_queued_s
from conductor.journal import Clock, read_history
from conductor.run_lock import holder

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

NAMED_AT_MOST = 10
"""Releases that a refusal lists."""
RUN_FILES = ("events.jsonl", "manifest.json", "stages")
"""Any of these makes a directory one of a release."""
AFTER_STOPPING = frozenset(
    {"server_stopped", "tool_finished", "state_established", "job_ended", "jobs_cancelled"}
)
"""Events that may follow ``release_stopped`` without anybody working on the release."""
SHOWN = ("tool", "directory", "side", "log")
"""Fields of the events on tools and servers; they are texts."""
LARGEST_PROGRESS_BYTES = 2**16
STYLES: Mapping[str, str] = {
    "running": "cyan",
    "interrupted": "yellow",
    "stopped": "yellow",
    "done": "green",
    "finished": "green",
    "failed": "red",
    "aborted": "red",
    "unreadable": "red",
}

Document = Mapping[str, Any]


def _now() -> datetime:
    return datetime.now(UTC)


def status_document(run_dir: Path, *, clock: Clock = _now) -> dict[str, Any]:
    """Return where a release stands (schema ``status.json``); seconds and UTC times.

    ``clock`` says for how long jobs that have not ended have waited or run.

    Raises:
        Failure: USER_CONFIG_ERROR when a newer version of day0 made the run directory.
        OSError: the run directory cannot be read.
    """
    held = holder(run_dir)  # first: who is gone by now has written all that is read below
    history, events = read_history(run_dir), _events(run_dir)
    jobs = [job.so_far(clock()) for job in read_jobs(run_dir)]
    state = _state(history, events, is_held=held is not None)
    session = _latest_session(events)
    return {
        "run_id": run_dir.name,
        "run": str(run_dir),
        "model": history.model,
        "recipe": history.recipe,
        "started_at": history.started_at and timestamp(history.started_at),
        "state": state,
        "decision": history.outcome.get("decision"),
        "exit_code": history.outcome.get("exit_code"),
        "held_by": held and {"pid": held.pid, "host": held.host, "since": held.since},
        "current": None if history.outcome else next_stage(history.states),
        "stages": [
            {
                "stage": stage,
                "state": record.state,
                "attempts": record.attempts,
                "interruptions": record.interruptions,
                "seconds": record.seconds,
                "queued_s": _queued_s(jobs, stage),
                "failure_class": record.failure_class,
                "detail": record.detail,
            }
            for stage, record in history.stages.items()
        ],
        "jobs": [_job(job, run_dir) for job in jobs],
        "tools": [
            {
                "tool": event["tool"],
                "directory": event["directory"],
                "since": event["at"],
                "progress": _progress(run_dir / event["directory"]),
            }
            for event in _open(session, "tool_started", "tool_finished", "directory", "tool")
        ],
        "servers": [
            {"side": event["side"], "since": event["at"], "log": event.get("log")}
            for event in _open(session, "server_started", "server_stopped", "side")
        ],
        "last_event": {name: events[-1][name] for name in ("at", "event")} if events else None,
        "sessions": history.sessions,
        "worked_s": round(history.worked_s, 3),
        "resume": resume_command(run_dir) if state not in ("running", "finished") else None,
        "unknown": list(history.unknown),
    }


def resume_command(run_dir: Path) -> str:
    """Return the command that goes on with a release, from whatever directory it is given."""
    return f"day0 resume {shlex.quote(str(run_dir))}"


def runs_document(workspace: Path) -> dict[str, Any]:
    """Return every release of a workspace, newest first (schema ``runs.json``)."""
    rows = [_row(run_dir) for run_dir in _run_dirs(workspace)]
    rows.sort(key=lambda row: (row["started_at"] or "", row["run_id"]), reverse=True)
    return {"workspace": str(workspace), "runs": rows}


def find_run(name_or_path: str | None, workspace: Path) -> Path:
    """Return the directory of a release.

    Args:
        name_or_path: its directory, its run id, or a beginning that no other run id has; None for
            the release of the workspace that was started last.
        workspace: where to look for run ids.

    Raises:
        Failure: USER_CONFIG_ERROR, which says what there is instead.
    """
    runs = _run_dirs(workspace)
    if name_or_path is None:
        if not runs:
            raise unusable(f"{workspace} holds no release; start one with `day0 release`, or give "
                          "--workspace")  # fmt: skip
        return max(runs, key=_started)
    path = Path(name_or_path).expanduser()
    if name_or_path and _is_run(path):
        return path.resolve()
    names = {run.name: run for run in runs}
    if name_or_path in names:
        return names[name_or_path]
    matching = [name for name in names if name_or_path and name.startswith(name_or_path)]
    if len(matching) == 1:
        return names[matching[0]]
    if matching:
        raise unusable(
            f"{name_or_path!r} begins the names of several releases; give more of one: "
            f"{_listed(matching)}"
        )
    raise unusable(
        f"there is no release {name_or_path!r}, as a directory or in {workspace}; "
        + (f"there are: {_listed(list(names))}" if names else "that workspace holds none")
    )


def status_table(document: Document) -> RenderableType:
    """Return a status document for people."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    # What is done takes the width that the others leave.
    table = Table("stage", "state", box=None, pad_edge=False, expand=True)
    for heading in ("attempts", "interrupted", "time", *(["queued"] if document["jobs"] else [])):
        table.add_column(heading, justify="right")
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in document["stages"]:
        table.add_row(
            row["stage"],
            _styled(row["state"]),
            str(row["attempts"] or ""),
            str(row["interruptions"] or ""),
            _duration(row["seconds"]),
            *([_duration(row["queued_s"])] if document["jobs"] else []),
            escape(_doing(document, row)),
        )
    lines = [escape(line) for line in (*_job_times(document), *_footer(document))]
    return Group(_headline(document), "", table, *(["", *lines] if lines else []))


def runs_table(document: Document) -> RenderableType:
    """Return a runs document for people."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    if not document["runs"]:
        return escape(f"{document['workspace']} holds no release.")
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("jobs", no_wrap=True)
    for row in document["runs"]:
        state = _styled(row["state"])
        if row["decision"]:
            state = f"[{STYLES['finished']}]{row['decision']}[/]"
        jobs = ", ".join(f"{count} {each}" for each, count in row["jobs"].items() if count)
        table.add_row(row["run_id"], state, row["current"] or "", _duration(row["worked_s"]), jobs)
    problems = [row["problem"] for row in document["runs"] if row["problem"]]
    return Group(table, *(escape(problem) for problem in problems))


def watch(
    run_dir: Path,
    console: Console,
    interval_s: float = 1.0,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Show a release until nobody works on it; return its last status document.

    On a terminal the table is drawn again every ``interval_s`` seconds; elsewhere a line is printed
    whenever something changed.

    Raises:
        Failure, OSError: as for :func:`status_document`.
    """
    if not console.is_terminal:
        return _watch_plainly(run_dir, console, interval_s, sleep)
    from rich.live import Live

    document = status_document(run_dir)
    with Live(status_table(document), console=console, auto_refresh=False) as live:
        while document["state"] == "running":
            sleep(interval_s)
            document = status_document(run_dir)
            live.update(status_table(document), refresh=True)
    return document


def _watch_plainly(
    run_dir: Path, console: Console, interval_s: float, sleep: Callable[[float], None]
) -> dict[str, Any]:
    said: list[str] = []
    while True:
        document = status_document(run_dir)
        lines = list(_plain_lines(document))
        for line in lines:
            if line not in said:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        said = lines
        if document["state"] != "running":
            return document
        sleep(interval_s)


def _plain_lines(document: Document) -> Iterator[str]:
    for row in document["stages"]:
        if row["state"] != State.PENDING or _doing(document, row):
            attempt = f", attempt {row['attempts']}" if row["attempts"] > 1 else ""
            doing = _doing(document, row)
            yield f"{row['stage']}: {row['state']}{attempt}" + (f": {doing}" if doing else "")
    if document["state"] != "running":
        yield f"{document['run_id']}: {_words(document)}"
        yield from _footer(document)


def _headline(document: Document) -> str:
    from rich.markup import escape

    style = STYLES[document["state"]]
    what = escape(f"{document['model']}, {document['recipe']}")
    return f"[bold]{document['run_id']}[/] ({what}): [{style}]{escape(_words(document))}[/]"


def _words(document: Document) -> str:
    """Say the state of a release, with its decision or who works on it."""
    held = document["held_by"]
    if document["state"] == "finished":
        return f"finished, {document['decision']}"
    if document["state"] == "aborted":
        return "aborted without a decision"
    if held:
        return f"running, by process {held['pid']} on {held['host']} since {held['since']}"
    return str(document["state"])


def _footer(document: Document) -> Iterator[str]:
    last = document["last_event"]
    if last and document["state"] != "finished":
        yield f"last event: {last['event']} at {last['at']}"
    yield from document["unknown"]
    if document["resume"]:
        yield f"to go on: {document['resume']}"


def _doing(document: Document, row: Document) -> str:
    """Say what happens in a stage now, else how it ended."""
    if document["state"] == "running":
        tools = [each for each in document["tools"] if _stage_of(each) == row["stage"]]
        if tools:
            return "; ".join(_progress_words(tool["progress"], tool["tool"]) for tool in tools)
        if jobs := [
            job for job in document["jobs"] if job["stage"] == row["stage"] and _is_open(job)
        ]:
            return "; ".join(map(_job_words, jobs))
        if row["state"] == State.RUNNING and document["servers"]:
            return f"servers: {', '.join(server['side'] for server in document['servers'])}"
    return str(row["detail"]).partition("\n")[0]


def _job_words(job: Document) -> str:
    """Say where a job is, and what it does there."""
    number = f"job {job['job_id'] or 'without a number yet'}"
    if job["standing"] == Standing.QUEUED:
        return f"{number} queued" + (f" ({job['reason']})" if job["reason"] else "")
    return f"{number} on {job['node']}: {_progress_words(job['progress'], 'it')}"


def _job_times(document: Document) -> Iterator[str]:
    """Say for how long each job that has not ended waits, and runs."""
    for job in document["jobs"]:
        if _is_open(job):
            waited = _duration(job["queued_s"]) or "for an unknown time"
            ran = _duration(job["ran_s"])
            where = f"running on {job['node']} {ran}, after " if ran else ""
            why = f" ({job['reason']})" if job["reason"] else ""
            name = job["job_id"] or job["name"]
            yield f"job {name} ({job['stage']}): {where}queued {waited}{why}"


def _is_open(job: Document) -> bool:
    return str(job["standing"]) != Standing.ENDED


def _progress_words(progress: Document | None, who: str) -> str:
    if progress is None:
        return f"{who} started"
    count = f" {progress['done']:,}/{progress['total']:,}" if progress["total"] else ""
    return f"{progress['doing']}{count}"


def _stage_of(tool: Document) -> str:
    """Return the stage in whose directory, ``stages/<stage>/...``, a tool works."""
    parts = Path(tool["directory"]).parts
    return parts[1] if len(parts) > 1 else Stage.CLOSEOUT


def _styled(state: str) -> str:
    style = STYLES.get(state)
    return f"[{style}]{state}[/]" if style else state


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _state(history: History, events: Sequence[Document], *, is_held: bool) -> str:
    if history.outcome:
        return "finished" if history.outcome.get("decision") else "aborted"
    if is_held:
        return "running"
    names = [event["event"] for event in events if event["event"] not in AFTER_STOPPING]
    return "stopped" if names and names[-1] == "release_stopped" else "interrupted"


def _events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events that can be read; a line that is torn or damaged is left out.

    So is one that has something else where a text belongs that is shown.
    """
    events = [parse(line) for line in read_log(run_dir).sound]
    return [
        event
        for event in events
        if isinstance(event.get("at"), str)
        and all(isinstance(event.get(name), str | None) for name in SHOWN)
    ]


def _latest_session(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events since the latest start or resume: earlier processes are gone."""
    starts = [
        number
        for number, event in enumerate(events)
        if event["event"] in ("release_started", "release_resumed")
    ]
    return events[starts[-1] :] if starts else []


def _open(
    events: list[dict[str, Any]], begins: str, ends: str, key: str, *also: str
) -> list[dict[str, Any]]:
    """Return the events named ``begins`` that no ``ends`` of the same ``key`` followed.

    Those that do not say ``key`` and ``also`` are left out.
    """
    begun: dict[Any, dict[str, Any]] = {}
    for event in events:
        if event["event"] == begins and all(event.get(name) for name in (key, *also)):
            begun[event[key]] = event
        elif event["event"] == ends:
            begun.pop(event.get(key), None)
    return list(begun.values())


def _queued_s(jobs: Sequence[Job], stage: Stage) -> float | None:
    """Return for how long a stage's jobs have waited; None where it has none, or one is unknown."""
    waited = [job for job in jobs if job.stage is stage]
    return total_queued_s(waited) if waited else None


def _job(job: Job, run_dir: Path) -> dict[str, Any]:
    return {
        "name": job.name,
        "job_id": job.job_id,
        "stage": job.stage,
        "standing": job.standing,
        "state": job.state,
        "reason": job.reason,
        "node": job.node,
        "queued_s": job.queued_s,
        "ran_s": job.ran_s,
        "progress": _progress(run_dir / job.folder) if job.folder else None,
    }


def _progress(directory: Path) -> dict[str, Any] | None:
    path = directory / "progress.json"
    try:
        document = json.loads(read_regular(path, LARGEST_PROGRESS_BYTES))
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        return {
            "done": int(document["done"]),
            "total": int(document["total"]),
            "doing": str(document["doing"]),
            "at": timestamp(written),
        }
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None


def _row(run_dir: Path) -> dict[str, Any]:
    try:
        is_held = holder(run_dir) is not None
        history = read_history(run_dir)
        state = _state(history, _events(run_dir), is_held=is_held)
        standings = [] if history.outcome else [job.standing for job in read_jobs(run_dir)]
    except (Failure, OSError) as error:
        return {
            "run_id": run_dir.name,
            **dict.fromkeys(("model", "recipe", "started_at", "decision", "current", "worked_s")),
            "state": "unreadable",
            "jobs": {},
            "problem": str(error),
        }
    return {
        "run_id": run_dir.name,
        "model": history.model,
        "recipe": history.recipe,
        "started_at": history.started_at and timestamp(history.started_at),
        "state": state,
        "decision": history.outcome.get("decision"),
        "current": None if history.outcome else next_stage(history.states),
        "worked_s": round(history.worked_s, 3),
        "jobs": {each: standings.count(each) for each in (Standing.RUNNING, Standing.QUEUED)},
        "problem": None,
    }


def _run_dirs(workspace: Path) -> list[Path]:
    try:
        found = sorted((workspace / "runs").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for path in found if not path.name.startswith(".") and _is_run(path)]


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in RUN_FILES)


def _started(run_dir: Path) -> tuple[str, str]:
    """Return when a release was started, by what its files tell, to order releases by."""
    try:
        started_at = read_history(run_dir).started_at
    except (Failure, OSError):
        started_at = None
    return (timestamp(started_at) if started_at else ""), run_dir.name


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[-NAMED_AT_MOST:])
    more = len(names) - NAMED_AT_MOST
    return f"{shown}, and {more} earlier" if more > 0 else shown
