"""Record every release in MLflow, and never let MLflow hold a release up.

What is to be logged is planned by a pure function and written to ``tracking-pending.json``; then a
child process, ``python -m conductor.tracking <that file>``, sends it and leaves what became of it
in ``tracking-result.json``. The child keeps mlflow, its environment variables and its output (in
``tracking.log``) out of the conductor, is ended when a server hangs, and ends with the conductor.

Invariants:
- The pending file exists until a server has everything; ``day0 sync`` sends it later.
- Sending again changes nothing: runs are found by the tag ``day0.run_id``, and values that a run
  already has are not logged again.
- User names, passwords and queries in a tracking URI reach the child's environment and no file.
- What is logged was redacted when it was planned: the child sends what is in the files, and adds
  nothing.
- One process at a time uses a SQLite store, and its file appears with every table in it: migrations
  that run twice at once, or are killed halfway, would leave a database that nothing opens again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from conductor.evidence.checklist import NAME as CHECKLIST
from conductor.evidence.checklist import write_checklist
from conductor.evidence.seal import reseal, seals
from conductor.executors.environ import LOOPBACK_HOSTS
from conductor.executors.local import POLL_S, Note, SupervisedProcess, describe_status, ignore
from conductor.failure import Failure
from conductor.files import read_json, write_bytes, write_json
from conductor.redaction import (
    REDACTED,
    know,
    redact,
    redact_document,
    uri_secrets,
    without_credentials,
)
from conductor.report import validated, write_report
from conductor.report.wording import Document, split_reason
from conductor.run_lock import hold

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PENDING = "tracking-pending.json"
RESULT = "tracking-result.json"
LOG = "tracking.log"
RECORD = "tracking.process.json"
SENDER = "conductor.tracking"
REPORT_FILES = ("report.json", "report.md", "report.html")
EXPERIMENT = "day0"
LIMIT_S = 60.0
"""Longest time the child may take; a dead or hanging server is noticed long before."""
LOCK_WAIT_S = 45.0
"""Longest wait for a local store that another release uses; it leaves time to send."""
GRACE_S = 1.0
"""Time the child has to end by itself at the limit; it holds nothing that must be put away."""
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
}
"""Settings a user may override; mlflow's own defaults wait four minutes for a dead server."""
FIXED = {
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
RUN_TAG = "day0.run_id"
STAGE_TAG = "day0.stage"
LONGEST_TEXT = 5000
"""Characters of a parameter or a tag that every supported MLflow server keeps."""
LONGEST_KEY = 200
"""Characters of a metric's task name; MLflow keeps 250 for the whole key."""
BATCH = 500
"""Metrics sent in one request; MLflow takes at most 1000 entities."""
TASK_METRICS = (
    *("baseline", "baseline_stderr", "candidate", "candidate_stderr", "drop", "drop_lower"),
    *("drop_upper", "limit", "questions", "repeats", "clusters", "lost", "gained"),
    *("p_within", "p_worse", "p_worse_adjusted"),
)
"""Numbers of a task's row that are logged as they are."""
LONGEST_DETAIL = 400


class TrackingStatus(StrEnum):
    """What became of the record of a release."""

    PENDING = "pending"
    LOGGED = "logged"
    UNAVAILABLE = "unavailable"
    DISABLED = "disabled"


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where a release is recorded; ``uri`` and ``detail`` hold no credentials."""

    status: TrackingStatus
    uri: str | None
    detail: str = ""
    run_id: str | None = None
    stage_run_ids: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the ``tracking`` part of a report document."""
        return {**asdict(self), "status": self.status.value}


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One MLflow run to be: times in milliseconds since 1970; metrics are logged at its end."""

    name: str
    status: str
    started_ms: int
    finished_ms: int
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class TrackingPlan:
    """Everything that a release logs beside the files of its report."""

    run_id: str
    workspace: str
    release: PlannedRun
    stages: Mapping[str, PlannedRun]
    verdicts: Mapping[str, Any]
    uri: str | None = None
    experiment: str = EXPERIMENT

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> TrackingPlan:
        """Read a plan back from its JSON form.

        Raises:
            TypeError, KeyError: the document is not a plan.
        """
        stages = {name: PlannedRun(**run) for name, run in document["stages"].items()}
        release = PlannedRun(**document["release"])
        return cls(**{**document, "release": release, "stages": stages})


def log_release(
    document: Document,
    run_dir: Path,
    *,
    workspace: Path,
    environ: Mapping[str, str],
    uri: str | None = None,
    experiment: str = EXPERIMENT,
    limit_s: float = LIMIT_S,
    note: Note = ignore,
) -> Tracking:
    """Log a release to ``MLFLOW_TRACKING_URI``, else ``uri``, else ``<workspace>/mlflow.db``.

    The report is in ``run_dir`` already; when all is logged, it holds the run IDs and equals the
    attached one. Whatever goes wrong, the answer is a ``Tracking`` with the status ``unavailable``,
    and the plan stays in ``<run_dir>/tracking-pending.json``. ``note`` is told when the sender is
    started and when it has ended.

    Raises:
        ReportError: ``document`` is not a report document.
    """
    planned = plan_release(validated(redact_document(document)), workspace=workspace)
    plan = replace(planned, uri=uri, experiment=experiment)
    pending = (run_dir / PENDING).resolve()
    uri = tracking_uri(environ, Path(plan.workspace), plan.uri)
    try:
        write_json(pending, asdict(plan))
    except OSError as error:
        return _not_taken(pending, uri, str(error))
    sender = {"tool": SENDER, "directory": run_dir}
    note("tool_started", **sender)
    tracking = _send_bounded(pending, uri=uri, environ=environ, limit_s=limit_s)
    note("tool_finished", **sender, status=tracking.status.value)
    return tracking


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What became of what one release could not log when it ended."""

    run_id: str
    tracking: Tracking

    @property
    def logged(self) -> bool:
        """True when the store has all of it now."""
        return self.tracking.status is TrackingStatus.LOGGED

    @property
    def words(self) -> str:
        """What became of it, as one line for people."""
        if self.logged:
            return f"{self.run_id}: logged at {self.tracking.uri} as run {self.tracking.run_id}"
        return f"{self.run_id}: not sent: {self.tracking.detail}"


def sync_runs(
    run_dirs: Iterable[Path], *, environ: Mapping[str, str], limit_s: float = LIMIT_S
) -> list[Synced]:
    """Send what releases could not log when they ended; those without such a thing are left out.

    Each takes at most ``limit_s`` seconds. A store that leaves one waiting for so long would leave
    the others waiting as well, so they are kept for another time.
    """
    outcomes: list[Synced] = []
    hangs = False
    for run_dir in run_dirs:
        if not (run_dir / PENDING).exists():
            if seals(run_dir, PENDING):  # an earlier sync died when all was sent
                with contextlib.suppress(Failure, OSError), hold(run_dir):
                    _seal_sent(run_dir)
            continue
        started = time.monotonic()
        if hangs:
            detail = "not tried, because the store did not answer in time before"
            tracking = Tracking(status=TrackingStatus.PENDING, uri=None, detail=detail)
        else:
            tracking = _sync(run_dir, environ=environ, limit_s=limit_s)
        hangs = hangs or time.monotonic() - started >= limit_s
        outcomes.append(Synced(run_id=run_dir.name, tracking=tracking))
    return outcomes


def _sync(run_dir: Path, *, environ: Mapping[str, str], limit_s: float) -> Tracking:
    """Send what one release left, unless a conductor works on it, which sends it itself."""
    pending = (run_dir / PENDING).resolve()
    try:
        plan = _read_plan(pending)
        with hold(run_dir):
            uri = tracking_uri(environ, Path(plan.workspace), plan.uri)
            tracking = _send_bounded(pending, uri=uri, environ=environ, limit_s=limit_s)
            _seal_sent(run_dir)
            return tracking
    except (Failure, OSError, ValueError) as error:
        return Tracking(status=TrackingStatus.UNAVAILABLE, uri=None, detail=str(error))


def _seal_sent(run_dir: Path) -> None:
    """Seal again what sending writes into a finished run, with the checklist that tells of it."""
    write_checklist(run_dir)
    changed = (*REPORT_FILES, CHECKLIST, PENDING, RESULT, LOG)
    reseal(run_dir, changed, clock=lambda: datetime.now(UTC))


def _send_bounded(
    pending: Path, *, uri: str, environ: Mapping[str, str], limit_s: float
) -> Tracking:
    """Send a pending file within ``limit_s`` seconds and say what became of it."""
    try:
        answer = _send_in_child(pending, uri=uri, environ=environ, limit_s=limit_s)
    except OSError as error:
        return _not_taken(pending, uri, str(error))
    if answer["status"] == TrackingStatus.LOGGED:
        return Tracking(**{**answer, "status": TrackingStatus.LOGGED})
    return _not_taken(pending, uri, answer["detail"])


def _not_taken(pending: Path, uri: str, problem: str) -> Tracking:
    shown = without_credentials(uri)
    detail = (
        f"MLflow at {shown} did not take the release: {problem}. What it would have logged is "
        f"kept; send it with: day0 sync {shlex.quote(str(pending.parent))}"
    )
    return Tracking(status=TrackingStatus.UNAVAILABLE, uri=shown, detail=detail)


def _read_plan(pending: Path) -> TrackingPlan:
    """Read a pending file.

    Raises:
        ValueError: it cannot be read, or holds no plan.
    """
    try:
        return TrackingPlan.from_document(read_json(pending))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{pending}: not a pending record of a release: {error}") from None


def plan_release(document: Document, *, workspace: Path) -> TrackingPlan:
    """Plan the runs, parameters, metrics, tags and artifacts of a validated report document."""
    return TrackingPlan(
        run_id=document["run_id"],
        workspace=str(workspace.resolve()),
        release=_plan_parent(document),
        stages=dict(_plan_stages(document)),
        verdicts={
            f"verdicts/{_key(gate['stage'])}-{_key(gate['gate'])}.json": gate["document"]
            for gate in document["gates"]
        },
    )


def tracking_uri(environ: Mapping[str, str], workspace: Path, configured: str | None = None) -> str:
    """Return the tracking URI in force, credentials included."""
    own = f"sqlite:///{workspace.resolve()}/mlflow.db"
    return environ.get("MLFLOW_TRACKING_URI") or configured or own


def send(plan: TrackingPlan, run_dir: Path, *, uri: str, experiment: str) -> Tracking:
    """Send ``plan`` to the store at ``uri``; runs that an earlier try began are completed.

    The report is attached with the run IDs in it; the one in ``run_dir`` gets them last, so that it
    never says ``logged`` too early.

    Raises:
        Exception: whatever mlflow raises when the store is down or refuses.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment_id = _find_experiment(client, experiment, plan=plan, uri=uri)
    known = _find_runs(client, experiment_id, plan.run_id)
    parent = known.get(None) or _create(client, experiment_id, plan.release)
    parent_id = parent.info.run_id
    _log(client, parent, plan.release)
    stage_run_ids = {}
    for stage, planned in plan.stages.items():
        tags = {"mlflow.parentRunId": parent_id}
        run = known.get(stage) or _create(client, experiment_id, planned, tags)
        _log(client, run, planned)
        _end(client, run, planned)
        stage_run_ids[stage] = run.info.run_id
    tracking = Tracking(
        status=TrackingStatus.LOGGED,
        uri=without_credentials(uri),
        run_id=parent_id,
        stage_run_ids=stage_run_ids,
    )
    for name, verdict in plan.verdicts.items():
        client.log_dict(parent_id, verdict, name)
    report = {**read_json(run_dir / "report.json"), "tracking": tracking.document()}
    with TemporaryDirectory() as directory:
        write_report(report, Path(directory))
        for name in REPORT_FILES:
            client.log_artifact(parent_id, str(Path(directory) / name))
        _end(client, parent, plan.release)
        for name in REPORT_FILES:
            write_bytes(run_dir / name, (Path(directory) / name).read_bytes())
    return tracking


def main(arguments: Sequence[str] | None = None) -> int:
    """Send one pending file and remove it; write what became of it to ``tracking-result.json``.

    Returns:
        0 when logged, 1 when the store is unavailable, 2 when the file is not a plan.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m conductor.tracking RUN_DIR/tracking-pending.json\n")
        return 2
    know(os.environ)
    pending = Path(arguments[0])
    try:
        plan = _read_plan(pending)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    uri = tracking_uri(os.environ, Path(plan.workspace), plan.uri)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or plan.experiment
    os.environ.update(_settings(os.environ))
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), _sole_use(uri, Path(plan.workspace)):
            tracking = send(plan, pending.parent, uri=uri, experiment=experiment)
        write_json(pending.with_name(RESULT), tracking.document())
        pending.unlink()
    except Exception as error:
        tracking = Tracking(
            status=TrackingStatus.UNAVAILABLE,
            uri=without_credentials(uri),
            detail=_redact(_cause(error), uri)[:LONGEST_DETAIL],
        )
        with contextlib.suppress(OSError):  # a directory that takes no file: the line below says it
            write_json(pending.with_name(RESULT), tracking.document())
    said = f": {tracking.detail}" if tracking.detail else f" as run {tracking.run_id}"
    sys.stdout.write(f"{tracking.status} at {tracking.uri}{said}\n")
    return 0 if tracking.status is TrackingStatus.LOGGED else 1


def _plan_parent(document: Document) -> PlannedRun:
    status = "FINISHED" if document["decision"] else "FAILED"
    sentences = [split_reason(reason)[0] for reason in document["reasons"]]
    lines = [*sentences, f"Next: {document['next_action']}"]
    return PlannedRun(
        name=document["run_id"],
        status=status,
        started_ms=_milliseconds(document["started_at"]),
        finished_ms=_milliseconds(document["finished_at"]),
        params=_texts(_parameters(document)),
        metrics=dict(_metrics(document)),
        tags=_texts(
            {
                RUN_TAG: document["run_id"],
                "day0.version": document["day0_version"],
                "day0.decision": document["decision"] or "none",
                "day0.failure_class": document["failure_class"] or "none",
                "day0.exit_code": document["exit_code"],
                "day0.publish": document["publish"],
                "mlflow.note.content": "\n\n".join(lines),
            }
        ),
    )


def _parameters(document: Document) -> Mapping[str, Any]:
    """Name what was asked for; facts that were not reached are None."""
    model, recipe, engine = document["model"], document["recipe"], document["engine"]
    calibration = recipe.get("calibration") or {}
    return {
        "model": model["requested"],
        "model_revision": model["revision"],
        "architecture": model["architecture"],
        "recipe": recipe["name"],
        "quantizer": recipe["quantizer"],
        "scheme": recipe["scheme"],
        **{f"calibration_{name}": value for name, value in calibration.items()},
        "engine": engine["name"],
        "engine_version": engine["version"],
        "device": engine["device"],
        "emulated": engine["emulated"] if engine["name"] else None,
        "suite": document["suite"]["name"],
        "threshold": document["threshold"],
        "rule": document.get("rule"),
        "relative": document["relative"],
        "seed": document["seed"],
        "limit": document["limit"] or "all",
    }


def _metrics(document: Document) -> Iterator[tuple[str, float]]:
    """Yield the duration, the size ratio, and ``name/task`` for every number of a task."""
    yield "seconds", document["seconds"]
    if document["size"] and document["size"]["ratio"] is not None:
        yield "size_ratio", document["size"]["ratio"]
    keys: set[str] = set()
    for task in document["tasks"]:
        key = _unused(_key(task["task"]), keys)
        keys.add(key)
        for name, number in _task_metrics(document, task):
            if number is not None:
                yield f"{name}/{key}", number


def _task_metrics(document: Document, task: Document) -> Iterator[tuple[str, float | None]]:
    """Yield the numbers of a task; those that were not measured are None."""
    for name in TASK_METRICS:
        yield name, task.get(name)
    beside = task.get("beside") or {}
    for name in ("agreement", "changed_answers"):
        yield name, (beside.get(name) or {}).get("rate")
    yield "mcnemar_p", beside.get("mcnemar_p")
    for name in ("kl", "logprob_shift"):
        yield name, (beside.get(name) or {}).get("mean")
    lengths = beside.get("length") or {}
    for side in ("baseline", "candidate"):
        yield f"{side}_length", lengths.get(f"{side}_mean")
    for name in ("change", "change_lower", "change_upper"):
        yield f"length_{name}", lengths.get(name)
    yield "external_difference", (task.get("external") or {}).get("difference")
    noise = (document.get("noise_floor") or {}).get(task["task"], {})
    for name in ("discordance", "changed"):
        yield f"noise_{name}", noise.get(name)


def _plan_stages(document: Document) -> Iterator[tuple[str, PlannedRun]]:
    """Plan a run for every stage that came to an end."""
    for stage in document["stages"]:
        if None in (stage["started_at"], stage["finished_at"], stage["seconds"]):
            continue
        gates = {
            f"day0.gate.{_key(gate['gate'])}": _result(gate["document"])
            for gate in document["gates"]
            if gate["stage"] == stage["name"]
        }
        yield (
            stage["name"],
            PlannedRun(
                name=stage["name"],
                status="FINISHED" if stage["state"] == "done" else "FAILED",
                started_ms=_milliseconds(stage["started_at"]),
                finished_ms=_milliseconds(stage["finished_at"]),
                params={},
                metrics={"seconds": stage["seconds"], "attempts": stage["attempts"]},
                tags=_texts(
                    {
                        RUN_TAG: document["run_id"],
                        STAGE_TAG: stage["name"],
                        "day0.state": stage["state"],
                        **gates,
                    }
                ),
            ),
        )


def _result(verdict: Document) -> str:
    return "passed" if verdict["pass"] else verdict["failure_class"] or "failed"


def _milliseconds(time: str) -> int:
    return round(1000 * datetime.fromisoformat(time).timestamp())


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value)[:LONGEST_TEXT] for name, value in values.items() if value is not None}


def _key(name: str) -> str:
    """Make a name that MLflow takes as one step of a metric or artifact path."""
    key = re.sub(r"[^A-Za-z0-9_. -]", "_", name)[:LONGEST_KEY]
    return key if key.strip(". ") else "_" * len(key)


def _unused(key: str, keys: Iterable[str]) -> str:
    """Number a key that another task already has."""
    candidates = [key, *(f"{key}-{number}" for number in range(2, len(list(keys)) + 3))]
    return next(candidate for candidate in candidates if candidate not in keys)


def _send_in_child(
    pending: Path, *, uri: str, environ: Mapping[str, str], limit_s: float
) -> Mapping[str, Any]:
    """Run ``main`` on ``pending`` in another process and return the result it leaves.

    ``-P`` keeps the working directory off the import path; a relative tracking URI still means a
    path under it.
    """
    result, log = pending.with_name(RESULT), pending.with_name(LOG)
    for stale in (result, log):
        stale.unlink(missing_ok=True)
    package_root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package_root, environ.get("PYTHONPATH"))))
    deadline = time.monotonic() + limit_s
    with SupervisedProcess(
        [sys.executable, "-P", "-m", SENDER, str(pending)],
        environ={**environ, "PYTHONPATH": path},
        log=log,
        grace_s=GRACE_S,
        record=pending.with_name(RECORD),
    ) as child:
        while (status := child.poll()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
    try:
        answer: Mapping[str, Any] = read_json(result)
    except FileNotFoundError:
        ended = f"not done within {limit_s:g} s" if status is None else describe_status(status)
        return {
            "status": TrackingStatus.UNAVAILABLE,
            "detail": f"the sender left no result ({ended}); its log is {log}",
        }
    return answer


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that must stand before mlflow is imported."""
    proxies = [environ.get("NO_PROXY"), environ.get("no_proxy"), LOOPBACK_HOSTS]
    no_proxy = ",".join(filter(None, proxies))
    chosen = {name: environ.get(name) or default for name, default in DEFAULTS.items()}
    return {**chosen, **FIXED, "NO_PROXY": no_proxy, "no_proxy": no_proxy}


@contextlib.contextmanager
def _sole_use(uri: str, workspace: Path) -> Iterator[None]:
    """Keep other releases off a SQLite store, and make it first if need be; a server needs neither.

    Raises:
        TimeoutError: another process did not let go of the store in time.
    """
    if not uri.startswith("sqlite"):
        yield
        return
    from sqlalchemy import make_url

    name = make_url(uri).database or ":memory:"
    if name.startswith((":memory:", "file:")):
        yield
        return
    database = Path(name)
    lock = FileLock(f"{database}.lock")
    try:
        held = lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        problem = f"another process has held {lock.lock_file} for {LOCK_WAIT_S:g} s"
        raise TimeoutError(problem) from None
    with held:
        if not database.exists():
            _make_store(database, artifacts=workspace / "mlartifacts")
        yield


def _make_store(database: Path, *, artifacts: Path) -> None:
    """Make an empty MLflow store under another name and put it in place when it is whole."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = database.with_name(f"{database.name}.new")
    for stale in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        stale.unlink(missing_ok=True)  # SQLite would replay a journal into the new file
    make: Any = SqlAlchemyStore
    make(f"sqlite:///{unfinished}", artifacts.as_uri()).engine.dispose()
    unfinished.replace(database)


def _find_experiment(client: MlflowClient, name: str, *, plan: TrackingPlan, uri: str) -> str:
    """Return the experiment's ID; a server says where artifacts go, a local store has a place."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    served = urlsplit(uri).scheme in {"http", "https"}
    artifacts = None if served else (Path(plan.workspace) / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=artifacts))


def _find_runs(client: MlflowClient, experiment_id: str, run_id: str) -> dict[str | None, Run]:
    """Return the runs of a release by stage; the key of the parent is None."""
    runs = client.search_runs([experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{run_id}'")
    return {run.data.tags.get(STAGE_TAG): run for run in runs}


def _create(
    client: MlflowClient,
    experiment_id: str,
    planned: PlannedRun,
    tags: Mapping[str, str] | None = None,
) -> Run:
    return client.create_run(
        experiment_id,
        start_time=planned.started_ms,
        run_name=planned.name,
        tags={**planned.tags, **(tags or {})},
    )


def _log(client: MlflowClient, run: Run, planned: PlannedRun) -> None:
    """Log what the run does not hold yet; MLflow refuses a parameter that changed."""
    from mlflow.entities import Metric, Param, RunTag

    had = run.data
    params = [Param(*item) for item in planned.params.items() if item not in had.params.items()]
    tags = [RunTag(*item) for item in planned.tags.items() if item not in had.tags.items()]
    metrics = [
        Metric(key, value, planned.finished_ms, 0)
        for key, value in planned.metrics.items()
        if had.metrics.get(key) != value
    ]
    client.log_batch(run.info.run_id, metrics=metrics[:BATCH], params=params, tags=tags)
    for first in range(BATCH, len(metrics), BATCH):
        client.log_batch(run.info.run_id, metrics=metrics[first : first + BATCH])


def _end(client: MlflowClient, run: Run, planned: PlannedRun) -> None:
    client.set_terminated(run.info.run_id, planned.status, end_time=planned.finished_ms)


def _cause(error: BaseException) -> str:
    """Say why in one line: the operating system's reason where there is one."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, (ConnectionError, TimeoutError)):
            return str(reason) or type(reason).__name__
        reason = reason.__cause__ or reason.__context__
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.rstrip(".")


def _redact(text: str, uri: str) -> str:
    """Drop the credentials of ``uri``, and those in any other URL or header, from ``text``."""
    secrets = sorted(uri_secrets(uri), key=len, reverse=True)
    return without_credentials(uri).join(_hide(part, secrets) for part in text.split(uri))


def _hide(text: str, secrets: Sequence[str]) -> str:
    """Hide ``secrets``, and what may be one in a message about some other URI."""
    if secrets:
        text = re.sub("|".join(map(re.escape, secrets)), REDACTED, text)
    text = re.sub(r"[^\s/:@'\"]+:[^\s/@]+@", "", text)
    return redact(re.sub(r"\?\S+", f"?{REDACTED}", text))


if __name__ == "__main__":
    sys.exit(main())
