"""Read what a server logged of its requests: status codes, and how often it started.

Only lines of a fixed form count: the access lines and the start and end of a process as uvicorn
writes them, which vLLM serves with; colours are passed over. Prose is not searched, and a prompt
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
    rb"(?:\(\w+ pid=\d+\) )?INFO: +(?:"
    rb'\S+:\d+ - "POST \S+ HTTP/[\d.]+" (?P<status>\d{3})\b'
    rb"|(?P<start>Started server process \[\d+\])"
    rb"|(?P<end>Finished server process \[\d+\]|Shutting down))"
)


def read_server_log(path: Path) -> dict[str, Any]:
    """Return ``{"status_codes": {"200": requests}, "starts": n}`` of a server's log.

    Only requests that ask for something (POST) count. Processes that start together, before any
    request, are one start.

    Raises:
        ProbeError: the log cannot be read.
    """
    codes: Counter[str] = Counter()
    starts = 0
    starting = False
    with open_regular(path, _REMEDY) as stream:
        at_line_start = True
        while line := stream.readline(_LONGEST_LINE_BYTES):
            found = _LINE.match(_COLOUR.sub(b"", line)) if at_line_start else None
            at_line_start = line.endswith(b"\n")
            if found is None:
                continue
            if found["start"]:
                starts += not starting
            if found["status"]:
                codes[found["status"].decode()] += 1
            starting = found["start"] is not None
    return {"status_codes": dict(sorted(codes.items())), "starts": starts}
