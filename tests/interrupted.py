"""Run the day0 command line and let a signal meet it at a chosen durable write.

Run as ``python tests/interrupted.py [--at WORDS] [--signal NAME] N ARGUMENTS...``: the process
gets the signal (SIGKILL) at its N-th point, or at the N-th whose name holds the words. With N = 0
nothing happens, every point is named on standard error, and the last line of standard output is
their number.

Points are where a death may leave something half done below the workspace: between a temporary
file's fsync and its rename, after the rename, and after an event was appended and before the
manifest follows. They are found by watching ``os.fsync``, ``os.replace`` and ``os.rename``, so
nothing in the conductor knows of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


class Points:
    """Count the points below ``workspace``, and send the signal at the chosen one."""

    def __init__(self, workspace: Path, chosen: int, words: str, number: signal.Signals) -> None:
        self.names: list[str] = []
        self._workspace = workspace
        self._chosen = chosen
        self._words = words
        self._number = number
        self._lock = threading.RLock()

    def watch(self) -> None:
        """Take the place of the calls that make something durable."""
        os.fsync = self._watch_fsync(os.fsync)
        os.replace = self._watch_rename(os.replace)
        os.rename = self._watch_rename(os.rename)

    def _watch_fsync(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def watched(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.name == EVENTS:
                self._reach("appended", path, last_event(path))

        return watched

    def _watch_rename(self, rename: Callable[..., None]) -> Callable[..., None]:
        def watched(source: Any, target: Any, **more: Any) -> None:
            self._reach("before", Path(target))
            rename(source, target, **more)
            self._reach("after", Path(target))

        return watched

    def _reach(self, when: str, path: Path, what: str = "") -> None:
        path = path.resolve()
        if not path.is_relative_to(self._workspace):
            return
        name = " ".join([when, str(path.relative_to(self._workspace)), what]).strip()
        with self._lock:
            if self._words not in name:
                return
            self.names.append(name)
            if len(self.names) == self._chosen:
                os.kill(os.getpid(), self._number)


def last_event(path: Path) -> str:
    """Name the last event of a log, and its stage or tool."""
    event = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return " ".join(str(event[key]) for key in ("event", "stage", "tool", "side") if event.get(key))


def workspace_of(arguments: list[str]) -> Path:
    """Return the workspace that a command works in: as named, or around the run that is named."""
    if "--workspace" in arguments:
        return Path(arguments[arguments.index("--workspace") + 1]).resolve()
    run_dir = next(Path(each) for each in arguments if (Path(each) / EVENTS).exists())
    return run_dir.resolve().parent.parent


def run(words: list[str]) -> None:
    """Run what ``words``, a command line of this script, ask for; ends with day0's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", default="", metavar="WORDS")
    parser.add_argument("--signal", default="SIGKILL", metavar="NAME")
    parser.add_argument("number", type=int)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    asked = parser.parse_args(words)
    points = Points(
        workspace_of(asked.arguments), asked.number, asked.at, signal.Signals[asked.signal]
    )
    points.watch()
    from conductor import cli

    sys.argv = ["day0", *asked.arguments]
    try:
        cli.main()
    finally:
        if asked.number == 0:
            sys.stderr.writelines(f"{name}\n" for name in points.names)
            sys.stdout.write(f"{len(points.names)}\n")


def run_quietly(log: Path, words: list[str]) -> None:
    """Run with both outputs in ``log``: for processes that are forked and not started."""
    with log.open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    run(words)


if __name__ == "__main__":
    run(sys.argv[1:])
