"""The worker's side of the seam between the conductor and a stage environment.

A worker is started as ``python <worker>.py <stage_dir>`` under an interpreter that does not have
this project installed. It reads ``request.json``, may report ``progress.json``, and writes
``result.json`` last, in one rename: a result that exists is whole, a crash leaves none.
Workers import it as a sibling; it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[int, int, str], None]


class WorkerFailure(Exception):
    """Stop the worker with a classified failure that the conductor can act on."""

    def __init__(self, failure_class: str, message: str) -> None:
        """Keep the failure class and one sentence that ends with the remedy."""
        super().__init__(message)
        self.failure_class = failure_class
        self.message = message


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document so that a reader sees either the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def run(main: Callable[[dict[str, Any], Progress], dict[str, Any]]) -> None:
    """Run ``main(request, progress)`` for the stage directory named on the command line.

    The returned mapping becomes ``result.json`` with ``status: ok``; a :class:`WorkerFailure`
    becomes ``status: failed``. Any other exception is a crash: it leaves its traceback in the log
    and no result, and the conductor decides what that means.
    """
    stage_dir = Path(sys.argv[1])
    request = json.loads((stage_dir / "request.json").read_text(encoding="utf-8"))

    def progress(done: int, total: int, doing: str) -> None:
        write_json(stage_dir / "progress.json", {"done": done, "total": total, "doing": doing})

    try:
        result = {"status": "ok", **main(request, progress)}
    except WorkerFailure as failure:
        result = {
            "status": "failed",
            "failure_class": failure.failure_class,
            "message": failure.message,
        }
    write_json(stage_dir / "result.json", result)
