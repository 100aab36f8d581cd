"""One conductor a run: a lock that the kernel takes back when its holder dies.

The lock decides, the words beside it only tell: ``holder.json`` may be missing, damaged or left by
a process that was killed, and the run is free all the same.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from conductor.executors.processes import Identity, identify, is_alive, this_host
from conductor.failure import Failure
from conductor.files import read_regular, write_json
from conductor.history import timestamp
from gates import FailureClass

LOCK = "lock"
HOLDER = "holder.json"
LARGEST_HOLDER_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who works on a run: the process, since when (UTC), and what it was started as."""

    pid: int
    start_ticks: int
    boot_id: str
    host: str
    since: str
    command: str


class Taken(Failure):
    """Another process holds the run; ``who`` is None where it has not said who it is."""

    def __init__(self, directory: Path, who: Holder | None) -> None:
        """Say who it is, and how to end the wait."""
        super().__init__(FailureClass.USER_CONFIG_ERROR, _taken(directory, who))
        self.who = who


@contextmanager
def hold(directory: Path, *, wait_s: float = 0) -> Iterator[None]:
    """Keep every other conductor away from a run while the block runs.

    ``wait_s`` is for how long another one is waited for.

    Raises:
        Taken: another process holds it.
        Failure: USER_CONFIG_ERROR when there is no such run; SYSTEMIC when the lock cannot be taken
            because of the file system.
    """
    if not directory.is_dir():
        raise Failure(
            FailureClass.USER_CONFIG_ERROR, f"{directory}: is no directory; name a run that exists"
        )
    # A lock without the kernel's help would outlive a crash, so there is none.
    lock = FileLock(directory / LOCK, timeout=wait_s, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise Taken(directory, holder(directory)) from None
    except (OSError, NotImplementedError) as error:
        raise _unusable(directory, error) from None
    try:
        try:
            write_json(directory / HOLDER, asdict(_this_process()))
        except OSError as error:
            raise _unusable(directory, error) from None
        yield
    finally:
        with suppress(OSError):
            (directory / HOLDER).unlink(missing_ok=True)
        lock.release()


def holder(directory: Path) -> Holder | None:
    """Return who works on a run now, without taking the lock; None when nobody is known to.

    A process on another host cannot be seen from here and is believed.
    """
    try:
        there = Holder(**json.loads(read_regular(directory / HOLDER, LARGEST_HOLDER_BYTES)))
        if type(there.pid) is not int or not isinstance(there.host, str):
            return None
        identity = Identity(there.pid, there.start_ticks, there.boot_id, there.host)
        gone = there.host == this_host() and not is_alive(identity)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return None if gone else there


def _this_process() -> Holder:
    identity = identify(os.getpid())
    return Holder(
        pid=identity.pid,
        start_ticks=identity.start_ticks,
        boot_id=identity.boot_id,
        host=identity.host,
        since=timestamp(datetime.now(UTC)),
        command=" ".join(sys.argv),
    )


def _taken(directory: Path, who: Holder | None) -> str:
    if who is None:
        return (
            f"{directory}: another process works on it and has not said who it is; wait for it, or "
            f"find it with: fuser -v {directory / LOCK}"
        )
    return (
        f"{directory}: process {who.pid} on {who.host} works on it since {who.since} "
        f"({who.command}); wait for it, or stop it with: kill {who.pid}, or, with "
        f"its jobs on a cluster: day0 stop {shlex.quote(str(directory))}"
    )


def _unusable(directory: Path, error: Exception) -> Failure:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return Failure(
        FailureClass.SYSTEMIC,
        f"{directory / LOCK}: cannot be locked ({reason}); make the directory writable, with room "
        "left, on a file system that has locks",
    )
