"""The worker's side of the seam between the conductor and a stage environment.

A worker is started as ``python <worker>.py <stage_dir>`` under an interpreter that does not have
this project installed. It reads ``request.json``, may report ``progress.json``, and writes
``result.json`` last, in one rename: a result that exists is whole, a crash leaves none.
Workers import it as a sibling; it needs nothing but the standard library.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Progress = Callable[[int, int, str], None]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What libraries in other languages leave of an error of the system: safetensors says Rust's "No
# space left on device", torch raises errors without a type of their own.
NO_ROOM_WORDS = os.strerror(errno.ENOSPC)
NO_HOST_MEMORY_WORDS = "DefaultCPUAllocator: can't allocate memory"
NO_DEVICE_MEMORY_WORDS = "CUDA error: out of memory"


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
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what led to it; libraries wrap what the system told them."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _want_of_room(error: BaseException) -> WorkerFailure | None:
    """Return what to report of an error that is the machine's want of memory or disk space."""
    text = str(error)
    said = (text.splitlines() or [type(error).__name__])[0]
    # By name: the worker's libraries are not ours to import, and torch has the type in two places.
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names or NO_DEVICE_MEMORY_WORDS in text:
        return WorkerFailure(
            "OUT_OF_MEMORY",
            f"the device ran out of memory ({said}); free memory on it, or use a larger one",
        )
    if "MemoryError" in names or NO_HOST_MEMORY_WORDS in text:
        return WorkerFailure(
            "OUT_OF_MEMORY",
            f"the host ran out of memory ({said}); free memory on it, or use a larger one",
        )
    if getattr(error, "errno", None) in NO_ROOM or NO_ROOM_WORDS in text:
        return WorkerFailure("SYSTEMIC", f"the disk is full ({text}); free some space")
    return None


def _classified(error: Exception) -> WorkerFailure | None:
    """Return the failure to report, or None for a crash.

    Want of room counts more than the sense that a worker made of it: a model is not unsupported
    because the machine is too small. The worker's own words stay.
    """
    own = error if isinstance(error, WorkerFailure) else None
    for cause in _causes(error):
        found = None if isinstance(cause, WorkerFailure) else _want_of_room(cause)
        if found and own is None:
            return found
        if found and own and own.failure_class != found.failure_class:
            return WorkerFailure(found.failure_class, f"{found.message}: {own.message}")
    return own


def run(main: Callable[[dict[str, Any], Progress], dict[str, Any]]) -> None:
    """Run ``main(request, progress)`` for the stage directory named on the command line.

    The returned mapping becomes ``result.json`` with ``status: ok``. A :class:`WorkerFailure`
    becomes ``status: failed``, and so does want of memory (``OUT_OF_MEMORY``) or of disk space
    (``SYSTEMIC``), however the worker's libraries wrapped it. Any other exception is a crash: it
    leaves its traceback in the log and no result, and the conductor decides what that means.
    """
    stage_dir = Path(sys.argv[1])
    request = json.loads((stage_dir / "request.json").read_text(encoding="utf-8"))

    def progress(done: int, total: int, doing: str) -> None:
        write_json(stage_dir / "progress.json", {"done": done, "total": total, "doing": doing})

    try:
        result = {"status": "ok", **main(request, progress)}
    except Exception as error:
        failure = _classified(error)
        if failure is None:
            raise
        if failure is not error:
            traceback.print_exception(error)
        result = {
            "status": "failed",
            "failure_class": failure.failure_class,
            "message": failure.message,
        }
    write_json(stage_dir / "result.json", result)
