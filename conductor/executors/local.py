"""Run workers and servers on this machine.

Every process is started through :mod:`conductor.executors.supervise`, in a session of its own, so
that it ends with the release whatever ends the release. A worker's truth is its ``result.json``;
an exit code alone proves nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from types import TracebackType
from typing import Any

from conductor.executors import processes
from conductor.executors.environ import on_path
from conductor.failure import Failure, Stalled
from conductor.files import read_json, redact_files, write_json, write_text
from conductor.redaction import know, redact, redact_document
from gates import FailureClass

SUPERVISOR = Path(__file__).with_name("supervise.py")
WORKERS = Path(__file__).parent.parent / "workers"
GRACE_S = processes.GRACE_S
POLL_S = 0.1
LOG_TAIL_LINES = 15
SIGNALLED = 128  # an exit status above this is 128 + the signal that ended the process
PLACES = frozenset({"model_path", "output_dir"})
"""Fields of a request that say where something is, not what it is."""
RECORD = "worker.process.json"
LOG = "stdout.log"
AT_ONCE_S = 2.0
ANSWER_S = 5.0  # beyond its grace a supervisor gets this long before its family is killed
LONGEST_LOOK_S = 30.0
FULL_DISK_BYTES = 8 * 2**20
# Programs that retitle themselves (vLLM's engine does) write over the environment that the kernel
# shows, and with it over our token, unless setproctitle is told to spare it.
SPARED_ENVIRONMENT = {"SPT_NOENV": "1"}
TEMPORARY = "DAY0_TEMPORARY"  # where the supervisor reads what to remove, should we be killed

Progress = Callable[[int, int, str], None]
Note = Callable[..., None]


def ignore(event: str, **facts: object) -> None:
    """Note nothing."""


class SupervisedProcess:
    """A running command whose whole family ends with it and with us; a context manager."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
        grace_s: float = GRACE_S,
        record: Path | None = None,
        temporary: Path | None = None,
    ) -> None:
        """Start ``command`` with ``environ`` and a token; what it prints is appended to ``log``.

        ``record``, a path that ends in ``.process.json``, names the family on disk while it lives,
        so that another conductor can end it. ``temporary``, a directory, is removed when it ends.

        Raises:
            OSError: log or record cannot be written; nothing was started, or nothing of it lives.
        """
        self.log = log
        self._grace_s = grace_s
        self._record = record
        self._temporary = temporary
        self._status: int | None = None
        self._out_of_memory = False
        self._memory_kills = processes.memory_kills()
        self._family = processes.Family(token=secrets.token_hex(16), root=None)
        if record:
            processes.write_record(record, self._family.token, None)
        know(environ, command)
        _LIVE.add(self)  # before the start, so that no signal falls between
        try:
            with log.open("ab") as stream:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", str(SUPERVISOR), str(grace_s), *command],
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env={
                        **environ,
                        **SPARED_ENVIRONMENT,
                        processes.MARK: self._family.token,
                        **({TEMPORARY: str(temporary)} if temporary else {}),
                    },
                    cwd=cwd,
                    start_new_session=True,
                )
            root = processes.identify(self.pid)
            self._family = replace(self._family, root=root)
            if record:
                processes.write_record(record, self._family.token, root)
        except BaseException:
            self._forget(self._family.end(0)[1])
            raise

    @property
    def pid(self) -> int:
        """The supervisor's process id, which is also its session and process group."""
        return self._process.pid

    @property
    def out_of_memory(self) -> bool:
        """Whether it ended while the kernel killed processes of our group for want of memory."""
        return self._out_of_memory

    def poll(self) -> int | None:
        """Return the exit status (128 + N for death by signal N), or None while it runs."""
        if self._status is None and self._process.poll() is not None:
            self._settle(self._process.returncode)
        return self._status

    def stop(self) -> None:
        """End the process and its family; return when nothing of it is left."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGCONT)  # it may be stopped
            self._process.wait(self._grace_s + ANSWER_S)
        except subprocess.TimeoutExpired:
            self._family.end(0)
            self._process.wait()
        self.poll()

    def quit(self) -> None:
        """Tell the supervisor to kill the whole family without grace; do not wait."""
        root = self._family.root
        if root and processes.is_alive(root):
            processes.send(root.pid, root.start_ticks, signal.SIGQUIT, signal.SIGCONT)

    def kill(self, at: float) -> None:
        """Kill what the supervisor leaves of the family until ``at`` on the monotonic clock."""
        root = self._family.root
        while root and processes.is_alive(root) and time.monotonic() < at:
            time.sleep(POLL_S / 10)
        self._forget(self._family.end(0)[1])

    def _settle(self, returncode: int) -> None:
        """Keep the exit status, and end what a supervisor that was killed or failed has left.

        Once only: later the number of the process group may be a stranger's.
        """
        self._status = SIGNALLED - returncode if returncode < 0 else returncode
        self._out_of_memory = processes.memory_kills() > self._memory_kills
        if returncode < 0:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._forget(self._family.end(0)[1])

    def _forget(self, left: set[int]) -> None:
        """Remove record and temporary files of a family of which nothing is left."""
        if not left:
            _LIVE.discard(self)
            if self._temporary:
                shutil.rmtree(self._temporary, ignore_errors=True)
            if self._record:
                with suppress(OSError):  # it may stay: it names nothing that lives
                    self._record.unlink(missing_ok=True)

    def __enter__(self) -> SupervisedProcess:
        """Return the running process."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it, however the block was left."""
        self.stop()


_LIVE: set[SupervisedProcess] = set()


def end_at_once() -> None:
    """Kill every family that this process started, without grace: for a second signal.

    May be called in a signal handler, whatever it interrupted: it takes no lock and reaps nothing.
    """
    families = list(_LIVE)
    for family in families:
        family.quit()
    kill_at = time.monotonic() + AT_ONCE_S
    for family in families:
        family.kill(kill_at)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of the scripts in ``workers/`` and the interpreter of the environment it needs."""

    script: str
    interpreter: Path

    @property
    def command(self) -> tuple[str, str]:
        """The command without its stage directory."""
        return str(self.interpreter), str(WORKERS / self.script)


def run_worker(
    worker: Worker,
    stage_dir: Path,
    request: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    progress: Progress,
    still_useful: Callable[[], None] = lambda: None,
    note: Note = ignore,
    stall_s: float | None = None,
) -> dict[str, Any]:
    """Run ``worker`` to its end and return its result document.

    Args:
        worker: what to run.
        stage_dir: receives ``request.json``, ``stdout.log``, ``progress.json``, ``result.json``,
            and ``worker.process.json`` while it runs. What an earlier start left there is ended
            and its result removed first.
        request: the worker's input, a JSON mapping; what lies in its ``output_dir`` is removed.
        environ: the worker's environment; a token by which its processes are known is added.
        progress: called with (done, total, doing) whenever the worker reports something new.
        still_useful: called at every poll; raises to end the worker early (a dead server, say).
        note: called with ``tool_started`` before the start, ``tool_finished`` after the end, and
            ``secrets_hidden`` where a file that the worker wrote held one.
        stall_s: end a worker that reported nothing new for so many seconds.

    Raises:
        Failure: the worker reported a failure, crashed, hung, ran out of memory or disk space, or
            left no result.
        OSError: the stage directory cannot be written.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    processes.end_recorded(stage_dir / RECORD)
    # The old result goes before the new request comes: the two on disk always belong together.
    for stale in ("result.json", "progress.json", exit_code_file(Path(LOG)).name):
        (stage_dir / stale).unlink(missing_ok=True)
    if "output_dir" in request:
        shutil.rmtree(request["output_dir"], ignore_errors=True)
    write_json(stage_dir / "request.json", request)
    tool = {"tool": worker.script, "directory": stage_dir}
    ended_as = "ended"
    note("tool_started", **tool)
    try:
        result = _run(worker, stage_dir, environ, progress, still_useful, note, stall_s)
        ended_as = "ok"
    except _WorkerEnd as end:
        ended_as = end.ended_as
        if ended_as == "stalled":
            raise Stalled(end.message) from None
        raise Failure(end.failure_class, end.message) from None
    finally:
        note("tool_finished", **tool, status=ended_as)
    return result


def kept_result(stage_dir: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the good result that an earlier worker left for the same request, or None.

    Where the model lies, and where the result went, may be told by another path.
    """
    with suppress(OSError, ValueError, AttributeError):
        result = _read_result(stage_dir)
        if result and result["status"] == "ok":
            asked = read_json(stage_dir / "request.json")
            wanted = redact_document(json.loads(json.dumps(request)))
            differing = {n for n in {*asked, *wanted} if asked.get(n) != wanted.get(n)}
            return result if differing <= PLACES else None
    return None


class _WorkerEnd(Failure):
    """A worker's bad end, with the word under which it is noted."""

    def __init__(self, ended_as: str, failure_class: FailureClass, message: str) -> None:
        super().__init__(failure_class, message)
        self.ended_as = ended_as


def _run(
    worker: Worker,
    stage_dir: Path,
    environ: Mapping[str, str],
    progress: Progress,
    still_useful: Callable[[], None],
    note: Note,
    stall_s: float | None,
) -> dict[str, Any]:
    watchdog = _Watchdog(stall_s)
    with (
        _without_secrets(stage_dir, note),
        SupervisedProcess(
            [*worker.command, str(stage_dir)],
            environ=on_path(environ, worker.interpreter),
            log=stage_dir / LOG,
            record=stage_dir / RECORD,
        ) as process,
    ):
        reported = None
        while process.poll() is None and not watchdog.barks:
            still_useful()
            latest = _read_progress(stage_dir)
            if latest and latest != reported:
                progress(*latest)
                reported = latest
            watchdog.see(latest)
            time.sleep(POLL_S)
    result = _read_result(stage_dir)
    if result is None or result["status"] != "ok":
        keep_exit_code(stage_dir / LOG, process.poll())
    if result is None:
        still_useful()  # what ended the worker may be what it depends on
        raise _explain(worker, stage_dir, environ, process, watchdog)
    if result["status"] != "ok":
        raise _WorkerEnd("failed", FailureClass(result["failure_class"]), result["message"])
    return result


@contextmanager
def _without_secrets(stage_dir: Path, note: Note) -> Iterator[None]:
    """Hide the secrets in what a worker wrote, however it ended, before anybody reads it."""
    try:
        yield
    finally:
        if hidden := redact_files(stage_dir):
            note("secrets_hidden", files=hidden)


class _Watchdog:
    """Counts the seconds without anything new; barks after ``limit_s`` of them.

    While this process itself was stopped, suspended or busy, the worker may have been as well, so
    a single look counts ``LONGEST_LOOK_S`` at most.
    """

    def __init__(self, limit_s: float | None) -> None:
        self.limit_s = limit_s
        self._seen: object = None
        self._silent_s = 0.0
        self._looked_at = time.monotonic()

    @property
    def barks(self) -> bool:
        return self.limit_s is not None and self._silent_s >= self.limit_s

    def see(self, report: object) -> None:
        """Count the time since the last look, or start over when ``report`` is new."""
        now = time.monotonic()
        self._silent_s += min(now - self._looked_at, LONGEST_LOOK_S)
        self._looked_at = now
        if report != self._seen:
            self._seen, self._silent_s = report, 0.0


def _read_progress(stage_dir: Path) -> tuple[int, int, str] | None:
    try:
        document = read_json(stage_dir / "progress.json")
        return document["done"], document["total"], redact(document["doing"])
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _read_result(stage_dir: Path) -> dict[str, Any] | None:
    """Return a whole result: one that is ok, or that says what failed."""
    try:
        result: dict[str, Any] = read_json(stage_dir / "result.json")
        if result["status"] != "ok":
            FailureClass(result["failure_class"]), str(result["message"])
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return result


def _explain(
    worker: Worker,
    stage_dir: Path,
    environ: Mapping[str, str],
    process: SupervisedProcess,
    watchdog: _Watchdog,
) -> _WorkerEnd:
    """Say why a worker left no result."""
    log = stage_dir / LOG
    if watchdog.barks:
        return _WorkerEnd(
            "stalled",
            FailureClass.INFRA_TRANSIENT,
            f"{worker.script} reported nothing new for {watchdog.limit_s:.0f} s and was ended; "
            "where it was still working, raise its limit under watchdog in the configuration; "
            f"its log is {log}\n{tail(log)}",
        )
    ending = f"{worker.script} ended with {describe_status(process.poll() or 0)}"
    seen = f"its log is {log}\n{tail(log)}"
    if process.out_of_memory:
        return _WorkerEnd(
            "crashed",
            FailureClass.OUT_OF_MEMORY,
            f"{ending}: the host ran out of memory, and the kernel killed it or a process of its "
            f"own; free memory on the host or give the release more of it; {seen}",
        )
    if full := _full_disk([stage_dir, Path(environ.get("TMPDIR", gettempdir()))]):
        return _WorkerEnd(
            "crashed",
            FailureClass.SYSTEMIC,
            f"{ending}: the disk of {full} is full; free some space, then start the release "
            f"again; {seen}",
        )
    return _WorkerEnd(
        "crashed", FailureClass.INFRA_TRANSIENT, f"{ending} and left no result.json; {seen}"
    )


def _full_disk(directories: Iterable[Path]) -> Path | None:
    """Return the first directory whose file system takes nothing more."""
    for directory in directories:
        with suppress(OSError):
            room = os.statvfs(directory)
            no_files = room.f_files > 0 and room.f_favail == 0
            if room.f_bavail * room.f_frsize < FULL_DISK_BYTES or no_files:
                return directory
    return None


def exit_code_file(log: Path) -> Path:
    """Return where the exit code of a process that did not end well lies, beside its log."""
    return log.with_suffix(".exit_code")


def keep_exit_code(log: Path, status: int | None) -> None:
    """Write the exit code of the process that wrote ``log`` beside it; None is of one that runs.

    A disk that is full must not hide what the process came to.
    """
    if status is not None:
        with suppress(OSError):
            write_text(exit_code_file(log), f"{status}\n")


def describe_status(status: int) -> str:
    """Say an exit status in words: ``exit status 1``, ``SIGKILL (often: out of memory)``."""
    if status <= SIGNALLED:
        return f"exit status {status}"
    try:
        name = signal.Signals(status - SIGNALLED).name
    except ValueError:
        return f"exit status {status}"
    return f"{name} (often: out of memory)" if name == "SIGKILL" else name


def tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a log, indented for a message; empty when there is no log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
