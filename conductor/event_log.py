"""The file that a release is remembered by: ``events.jsonl``, one JSON object a line, append-only.

A line counts once its newline is on disk. What a kill or a full disk left of a last line is cut off
before anything is appended, so a part of one event never runs into the next. An event that could
not be written is kept, and written before the next one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conductor.files import read_regular, sync_directory
from conductor.history import EventError, History, apply, render

NAME = "events.jsonl"
LARGEST_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A line that is no event: its number from 1, its bytes, and what is wrong with it."""

    number: int
    line: bytes
    problem: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a log holds: the state that its sound lines lead to, and what is not sound.

    ``version`` is the newest that a conductor wrote into it. ``torn`` tells whether the last line
    was cut off while it was written.
    """

    history: History = field(default_factory=History)
    sound: tuple[bytes, ...] = ()
    damaged: tuple[Damaged, ...] = ()
    torn: bool = False
    version: int = 0


def read_log(run_dir: Path) -> Reading:
    """Read the log of a run; one that is not there is empty.

    Raises:
        OSError: the log cannot be read, is no regular file, or is larger than ``LARGEST_BYTES``.
    """
    try:
        *lines, tail = read_regular(run_dir / NAME, LARGEST_BYTES).split(b"\n")
    except FileNotFoundError:
        return Reading()
    torn = not _is_whole(tail)
    if not torn:
        lines.append(tail)
    history, version = History(), 0
    sound, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = parse(line)
            if event.get("event") == "release_started" and type(event.get("version")) is int:
                version = max(version, event["version"])
            apply(history, event)
        except ValueError as error:
            damaged.append(Damaged(number=number, line=line, problem=str(error)))
        else:
            sound.append(line)
    return Reading(
        history=history,
        sound=tuple(sound),
        damaged=tuple(damaged),
        torn=torn,
        version=version,
    )


def parse(line: bytes) -> dict[str, Any]:
    """Return the event in one line.

    Raises:
        EventError: it is not a JSON object.
    """
    try:
        event = json.loads(line.decode("utf-8-sig"), parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        raise EventError("not JSON") from None
    if not isinstance(event, dict):
        raise EventError("not a JSON object")
    return event


def finite(number: str) -> float:
    """Refuse what Python reads as a number and JSON does not know: NaN, infinity, and 1e999.

    Raises:
        ValueError: it is such a number.
    """
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


def _is_whole(tail: bytes) -> bool:
    """Tell whether what follows the last newline is nothing, or an event without its newline."""
    if not tail:
        return True
    try:
        parse(tail)
    except EventError:
        return False
    return True


@dataclass(kw_only=True)
class EventLog:
    """Append to the log of one run; one process at a time, which the run's lock sees to."""

    run_dir: Path
    _unwritten: list[bytes] = field(default_factory=list)

    def append(self, event: Mapping[str, Any]) -> None:
        """Put ``event`` on disk, after those that could not be written before.

        Raises:
            OSError: the disk is full or gone; the log is as it was, and the event is kept.
        """
        self._unwritten.append(render(event) + b"\n")
        descriptor = self._open()
        try:
            end = _cut_torn(descriptor)
            try:
                _write_all(descriptor, b"".join(self._unwritten))
                os.fsync(descriptor)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        self._unwritten.clear()
        if end == 0:
            sync_directory(self.run_dir)

    def cut_torn(self) -> None:
        """Drop what is left of a last line that was cut off while it was written.

        Raises:
            OSError: the log cannot be written.
        """
        descriptor = self._open()
        try:
            _cut_torn(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.run_dir / NAME, flags, 0o666)


def _cut_torn(descriptor: int) -> int:
    """Make the log end with a whole line; return its length in bytes."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    tail = os.pread(descriptor, size, 0).rpartition(b"\n")[2]
    if _is_whole(tail):
        _write_all(descriptor, b"\n")
        return size + 1
    os.ftruncate(descriptor, size - len(tail))
    return size - len(tail)


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
