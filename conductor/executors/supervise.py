"""Run one command and let nothing it started outlive it, or outlive the conductor.

Started as ``python supervise.py GRACE_S COMMAND...`` with a pipe from the conductor as standard
input. The pipe is the lifeline: it closes when the conductor ends, even by ``kill -9``, and then
the whole family of the command is ended. The family is also ended when the command itself exits:
a killed vLLM API process leaves an engine and workers of gigabytes behind otherwise.

What the family prints goes through this process into the log, with secrets hidden: no file shall
hold one, not even for a moment. Where the log takes nothing more, it is dropped; nobody waits.

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
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).resolve().parents[2]))  # isolated, we find nothing beside us
from conductor.redaction import Secrets

PR_SET_CHILD_SUBREAPER = 36
TEMPORARY = "DAY0_TEMPORARY"  # names a directory that ends with the family
CHUNK_BYTES = 2**16
LONGEST_LINE_BYTES = 2**20  # of a longer one the parts are redacted one by one
PARTIAL_LINE_S = 0.5  # a line that is not ended is shown after so long: a question, a progress bar
DRAIN_S = 2.0  # the family is dead; whoever else holds its output is a stranger
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


def carry(source: int, log: int, secrets: Secrets) -> None:
    """Copy what is read from ``source`` to ``log`` until its end, a line at a time, redacted.

    Bytes that are no UTF-8 stay as they are. The end of a line that is not finished is held back
    where it may be the beginning of a secret.
    """
    held, since = b"", 0.0
    with open(source, "rb", buffering=0) as stream:
        while True:
            wait_s = max(0.0, since + PARTIAL_LINE_S - time.monotonic()) if held else None
            ready, _, _ = select.select([stream], [], [], wait_s)
            chunk = stream.read(CHUNK_BYTES) if ready else None
            if chunk == b"":
                return _write(log, _redacted(held, secrets))
            since = since if held else time.monotonic()
            held += chunk or b""
            end = max(held.rfind(b"\n"), held.rfind(b"\r")) + 1
            late = time.monotonic() - since >= PARTIAL_LINE_S
            if not end and (late or len(held) >= LONGEST_LINE_BYTES):
                end = len(held) - _begun(held, secrets)
            if end or late:
                _write(log, _redacted(held[:end], secrets))
                held, since = held[end:], time.monotonic()


def _redacted(content: bytes, secrets: Secrets) -> bytes:
    return _encode(secrets.redact(_decode(content)))


def _begun(content: bytes, secrets: Secrets) -> int:
    """Return how many bytes at the end may be the beginning of a secret."""
    text = _decode(content)
    return len(_encode(text[len(text) - secrets.begun(text) :]))


def _decode(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _write(log: int, content: bytes) -> None:
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(log, content) :]


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
    secrets = Secrets()
    secrets.know(os.environ, command)
    source, sink = os.pipe()
    pump = threading.Thread(target=carry, args=(source, sys.stdout.fileno(), secrets), daemon=True)
    pump.start()
    try:
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        finally:
            os.close(sink)
        exited = os.pidfd_open(child.pid)
        ready, _, _ = select.select([exited, sys.stdin.fileno(), terminated], [], [])
        if exited not in ready:
            return SIGNALLED + signal.SIGTERM
        status = child.wait()
        return SIGNALLED - status if status < 0 else status
    finally:
        end_family(grace_s)
        pump.join(DRAIN_S)


if __name__ == "__main__":
    sys.exit(main())
