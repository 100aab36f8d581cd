"""Read what a server logged: status codes, how often it started, whether memory ran out.

Only lines of a fixed form count: the access lines and the start and end of a process as uvicorn
writes them, which vLLM serves with, and the last line of a traceback as Python and vLLM write it;
colours are passed over. Prose is not searched, and a prompt
that a server logged can only be mistaken for such a line where it stands at a line's beginning.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from conductor.probes.reading import open_regular

_LONGEST_LINE_BYTES = 1 << 16
_REMEDY = "give the log that the server wrote"

_COLOUR = re.compile(rb"\x1b\[[\d;]*m")
_LINE = re.compile(
    rb"(?:\(\w+ pid=\d+\) )?(?:"
    rb'INFO: +\S+:\d+ - "POST \S+ HTTP/[\d.]+" (?P<status>\d{3})\b'
    rb"|INFO: +(?P<start>Started server process \[\d+\])"
    rb"|INFO: +(?P<end>Finished server process \[\d+\]|Shutting down)"
    rb"|(?:ERROR [\d-]+ [\d:]+ \[[\w.]+:\d+\] )?"
    rb"(?P<memory>(?:torch\.(?:\w+\.)?)?OutOfMemoryError(?=:|\s)|MemoryError(?=:|\s)"
    # PyTorch has no type of its own for the main memory.
    rb"|RuntimeError: \[enforce fail at alloc_cpu\.cpp:)"
    rb")"
)


def read_server_log(path: Path, offset: int = 0) -> dict[str, Any]:
    """Return ``{"status_codes": {"200": requests}, "starts": n, "out_of_memory": bool}`` of a log.

    Only requests that ask for something (POST) count. Processes that start together, before any
    request, are one start. Memory ran out where an exception that says so ended something.

    Args:
        path: the server's log.
        offset: count requests from this byte on; starts and exceptions count in the whole log.

    Raises:
        ProbeError: the log cannot be read.
    """
    codes: Counter[str] = Counter()
    starts = 0
    starting = out_of_memory = False
    with open_regular(path, _REMEDY) as stream:
        at_line_start = True
        position = 0
        while line := stream.readline(_LONGEST_LINE_BYTES):
            found = _LINE.match(_COLOUR.sub(b"", line)) if at_line_start else None
            at_line_start = line.endswith(b"\n")
            is_counted = position >= offset
            position += len(line)
            if found is None:
                continue
            if found["memory"]:
                out_of_memory = True
                continue
            if found["start"]:
                starts += not starting
            if found["status"] and is_counted:
                codes[found["status"].decode()] += 1
            starting = found["start"] is not None
    return {
        "status_codes": dict(sorted(codes.items())),
        "starts": starts,
        "out_of_memory": out_of_memory,
    }
