"""Run one command and let nothing it started outlive it, or outlive the conductor.

Started as ``python supervise.py GRACE_S COMMAND...`` with a pipe from the conductor as standard
input. The pipe is the lifeline: it closes when the conductor ends, even by ``kill -9``, and then
the whole family of the command is ended. The family is also ended when the command itself exits:
a killed vLLM API process leaves an engine and workers of gigabytes behind otherwise.

As a child subreaper (Linux ``prctl``) this process inherits every orphan of the family, also one
that started a session of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

import psutil

PR_SET_CHILD_SUBREAPER = 36
SIGNALLED = 128  # shells report death by signal N as 128 + N, and so does this process


def end_family(grace_s: float) -> None:
    """End every descendant: SIGTERM, ``grace_s`` seconds, then SIGKILL until none is left."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing may cut this short
    family = psutil.Process().children(recursive=True)
    for member in family:
        _signal(member, signal.SIGTERM)
    psutil.wait_procs(family, timeout=grace_s)
    while survivors := psutil.Process().children(recursive=True):
        for member in survivors:
            _signal(member, signal.SIGKILL)
        psutil.wait_procs(survivors, timeout=1)


def _signal(member: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        member.send_signal(number)


def main() -> int:
    """Supervise the command on the command line; return its exit status."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The conductor ends the family by closing the lifeline or by SIGTERM to this process alone;
    # a terminal's Ctrl-C goes to the conductor, which is in another session.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGNALLED + signal.SIGTERM))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        exited = os.pidfd_open(child.pid)
        ready, _, _ = select.select([exited, sys.stdin.fileno()], [], [])
        if exited not in ready:
            return SIGNALLED + signal.SIGTERM
        status = child.wait()
        return SIGNALLED - status if status < 0 else status
    finally:
        end_family(grace_s)


if __name__ == "__main__":
    sys.exit(main())
