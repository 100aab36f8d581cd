"""Run workers and servers on this machine.

Every process is started through :mod:`conductor.executors.supervise`, in a session of its own, so
that it ends with the release whatever ends the release. A worker's truth is its ``result.json``;
an exit code alone proves nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from conductor.executors.environ import on_path
from conductor.failure import Failure
from conductor.files import read_json, write_json
from gates import FailureClass

SUPERVISOR = Path(__file__).with_name("supervise.py")
WORKERS = Path(__file__).parent.parent / "workers"
GRACE_S = 10.0
POLL_S = 0.1
LOG_TAIL_LINES = 15
SIGNALLED = 128  # an exit status above this is 128 + the signal that ended the process

Progress = Callable[[int, int, str], None]


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
    ) -> None:
        """Start ``command`` with exactly ``environ``; what it prints is appended to ``log``."""
        self.log = log
        self._grace_s = grace_s
        self._status: int | None = None
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(SUPERVISOR), str(grace_s), *command],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The supervisor's process id, which is also its session and process group."""
        return self._process.pid

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
            self._process.wait(self._grace_s + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.poll()

    def _settle(self, returncode: int) -> None:
        """Keep the exit status, and end what is left where somebody killed the supervisor.

        Once only: later the number of the process group may be a stranger's.
        """
        self._status = SIGNALLED - returncode if returncode < 0 else returncode
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

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
) -> dict[str, Any]:
    """Run ``worker`` to its end and return its result document.

    Args:
        worker: what to run.
        stage_dir: receives ``request.json``, ``stdout.log``, ``progress.json``, ``result.json``.
        request: the worker's input, a JSON mapping.
        environ: the worker's whole environment.
        progress: called with (done, total, doing) whenever the worker reports.
        still_useful: called at every poll; raises to end the worker early (a dead server, say).

    Raises:
        Failure: the worker reported a failure, crashed, or left no result.
        OSError: the stage directory cannot be written.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    write_json(stage_dir / "request.json", request)
    reported = None
    with SupervisedProcess(
        [*worker.command, str(stage_dir)],
        environ=on_path(environ, worker.interpreter),
        log=stage_dir / "stdout.log",
    ) as process:
        while process.poll() is None:
            still_useful()
            latest = _read_progress(stage_dir)
            if latest and latest != reported:
                progress(*latest)
                reported = latest
            time.sleep(POLL_S)
        status = process.poll() or 0
    if not (stage_dir / "result.json").exists():
        still_useful()  # what ended the worker may be what it depends on
    return _read_result(worker, stage_dir, status)


def _read_progress(stage_dir: Path) -> tuple[int, int, str] | None:
    try:
        document = read_json(stage_dir / "progress.json")
    except (FileNotFoundError, ValueError):
        return None
    return document["done"], document["total"], document["doing"]


def _read_result(worker: Worker, stage_dir: Path, status: int) -> dict[str, Any]:
    try:
        result: dict[str, Any] = read_json(stage_dir / "result.json")
    except (FileNotFoundError, ValueError):
        raise Failure(
            FailureClass.INFRA_TRANSIENT,
            f"{worker.script} ended with {describe_status(status)} and left no result.json; "
            f"its log is {stage_dir / 'stdout.log'}\n{tail(stage_dir / 'stdout.log')}",
        ) from None
    if result["status"] != "ok":
        raise Failure(FailureClass(result["failure_class"]), result["message"])
    return result


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
