"""The part of a release that runs inside a job: claim the folder, do its task, say how it ended.

Runs on the first node of the allocation, in place of the script's shell. ``outcome.json`` is
written last, in one rename: a folder with an outcome is done, whatever becomes of the job. A job
that Slurm ends writes none, also where the end of its servers and workers, who are told as well,
makes its task fail first: the conductor asks Slurm why.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from conductor.cluster.tasks import Node, carry_out
from conductor.evidence.environment import describe
from conductor.executors.processes import JOB
from conductor.executors.slurm.folders import JobFolder, Place
from conductor.failure import Failure, Stalled
from conductor.redaction import know, redact_document
from gates import FailureClass

REPORT_EVERY_S = 1.0
LOOK_S = 5.0
ENDED = 128 + signal.SIGTERM
"""The exit status of a job that Slurm ends, as shells have it."""


def main(path: str) -> None:
    """Carry out the task of the folder at ``path``; called on the node."""
    is_ended = _end_in_order()
    know(os.environ, ())
    folder = JobFolder(Path(path))
    job_id = os.environ["SLURM_JOB_ID"]
    if not folder.claim(job_id, os.environ["SLURMD_NODENAME"], time.time()):
        return  # another job works here
    os.environ[JOB] = job_id
    threading.Thread(target=_end_when_given_up, args=(folder,), daemon=True).start()
    notes: list[dict[str, Any]] = []
    outcome = _work(folder, notes)
    if is_ended.is_set() and outcome["status"] != "ok":
        sys.exit(ENDED)
    folder.write("outcome", {**outcome, "notes": notes, "at": time.time()})


def _end_in_order() -> threading.Event:
    """Let what Slurm sends before it kills end the servers and workers in good order.

    Returns:
        What is set as soon as Slurm has sent it.
    """
    is_ended = threading.Event()

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one would cut the good order short
        is_ended.set()
        raise SystemExit(ENDED)

    signal.signal(signal.SIGTERM, stop)
    return is_ended


def _end_when_given_up(folder: JobFolder) -> None:
    """End in good order once the conductor has written the job off.

    It does so for a node that Slurm has lost, which may still run and write beside the next job.
    """
    while folder.read("ended") is None:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _work(folder: JobFolder, notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Do the task; return its outcome."""
    try:
        task = json.loads((folder.path / "task.json").read_text(encoding="utf-8"))

        run_dir = Place.of(Path(task["directory"])).run_dir

        def within(path: Path) -> str:
            return str(path.relative_to(run_dir) if path.is_relative_to(run_dir) else path)

        def note(event: str, **facts: Any) -> None:
            plain = json.loads(json.dumps(facts, default=within))
            notes.append({"event": event, "facts": redact_document(plain)})

        node = Node.find(task, dict(os.environ), note, _Report(folder))
        names = task["environments"]["used"]
        dry_run = bool(task["config"]["dry_run"]["value"])
        folder.write("node", describe(node.world, names, dry_run=dry_run))
        return {"status": "ok", "answer": carry_out(task, node)}
    except Failure as failure:
        return _failed(failure.failure_class, failure.message, stalled=type(failure) is Stalled)
    except OSError as error:
        what = ": ".join(filter(None, [error.strerror or str(error), error.filename]))
        return _failed(FailureClass.SYSTEMIC, f"{what}; repair it, then start the release again")
    except Exception as error:
        where = "".join(traceback.format_exception(error))
        return _failed(
            FailureClass.UNKNOWN,
            f"{type(error).__name__}: {error}; this is a defect of day0, please report it\n{where}",
        )


def _failed(failure_class: FailureClass, message: str, *, stalled: bool = False) -> dict[str, Any]:
    return {
        "status": "failed",
        "failure_class": failure_class,
        "message": message,
        "stalled": stalled,
    }


class _Report:
    """Writes down how far the task is, so that the conductor can show it; not at every call."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._next_at = 0.0

    def __call__(self, done: int, total: int, doing: str) -> None:
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + REPORT_EVERY_S
            document: Mapping[str, Any] = {"done": done, "total": total, "doing": doing}
            self._folder.write("progress", document)


if __name__ == "__main__":
    main(sys.argv[1])
