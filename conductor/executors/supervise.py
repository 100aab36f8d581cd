"""Run one command and let nothing it started outlive it, or outlive the conductor.

Started as ``python supervise.py GRACE_S COMMAND...`` with a pipe from the conductor as standard
input. The pipe is the lifeline: it closes when the conductor ends, even by ``kill -9``, and then
the whole family of the command is ended. The family is also ended when the command itself exits:
a killed vLLM API process leaves an engine and workers of gigabytes behind otherwise.

As a child subreaper (Linux ``prctl``) this process inherits every orphan of the family, also one
that started a session of its own. SIGTERM ends the family in an orderly way, SIGQUIT at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable

import psutil

PR_SET_CHILD_SUBREAPER = 36
TEMPORARY = "DAY0_TEMPORARY"  # names a directory that ends with the family
SIGNALLED = 128  # shells report death by signal N as 128 + N, and so does this process


def end_family(grace_s: float) -> None:
    """End every descendant: SIGTERM, ``grace_s`` seconds, then SIGKILL until none is left."""
    family = psutil.Process().children(recursive=True)
    # One that is stopped hears SIGTERM only when it goes on.
    _signal(family, signal.SIGTERM, signal.SIGCONT)
    psutil.wait_procs(family, timeout=grace_s)
    kill_family()


def kill_family() -> None:
    """Kill every descendant, also those born meanwhile; remove their temporary files."""
    while family := psutil.Process().children(recursive=True):
        _signal(family, signal.SIGKILL)
        psutil.wait_procs(family, timeout=1)
    if temporary := os.environ.get(TEMPORARY):
        shutil.rmtree(temporary, ignore_errors=True)


def _signal(family: Iterable[psutil.Process], *numbers: signal.Signals) -> None:
    for member in family:
        for number in numbers:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)


def _end_at_once(*_: object) -> None:
    kill_family()
    os._exit(SIGNALLED + signal.SIGQUIT)


def _hear_signals() -> int:
    """Listen for both signals; return a descriptor that becomes readable when SIGTERM comes.

    The conductor ends the family by closing the lifeline or by a signal to this process alone; a
    terminal's Ctrl-C goes to the conductor, which is in another session. SIGTERM interrupts
    nothing, least of all the ending of the family.
    """
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGQUIT, _end_at_once)
    return heard


def main() -> int:
    """Supervise the command on the command line; return its exit status."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    terminated = _hear_signals()
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        exited = os.pidfd_open(child.pid)
        ready, _, _ = select.select([exited, sys.stdin.fileno(), terminated], [], [])
        if exited not in ready:
            return SIGNALLED + signal.SIGTERM
        status = child.wait()
        return SIGNALLED - status if status < 0 else status
    finally:
        end_family(grace_s)


if __name__ == "__main__":
    sys.exit(main())
