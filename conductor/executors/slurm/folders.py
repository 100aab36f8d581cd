"""What is written of one job: why, as what, how far it got, and how it ended.

A task works in a directory of its own; each job that is submitted for it gets a folder below,
``jobs/1``, ``jobs/2``, ... Who writes what, in this order:

* the conductor ``task.json`` and then ``intent.json``, before anything is submitted: the name of
  the job is known before the job exists; ``submitted.json`` once Slurm gave it a number, and
  ``seen.json`` when the state of it is another;
* the job ``claim.json``, made exclusively, so that of two jobs for one folder one works; then
  ``node.json``, ``progress.json``, and last ``outcome.json``, which is the truth;
* the conductor ``ended.json`` when it has seen the end of it, with an outcome or without.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conductor.digests import document_digest
from conductor.executors.processes import JOBS as JOBS
from conductor.files import read_json, write_json

LONGEST_NAME = 120
LOCK_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a task works, and whose it is: directory, run id and stage."""

    directory: Path
    run_dir: Path
    stage: str

    @classmethod
    def of(cls, directory: Path) -> Place:
        """Read the place off a directory ``<run>/stages/<stage>/...``."""
        parts = directory.parts
        at = len(parts) - 1 - parts[::-1].index("stages")
        return cls(directory=directory, run_dir=Path(*parts[:at]), stage=parts[at + 1])

    @property
    def relative(self) -> str:
        """The directory, as it lies in the run."""
        return self.directory.relative_to(self.run_dir).as_posix()


@dataclass(frozen=True)
class JobFolder:
    """The folder of one job."""

    path: Path

    @classmethod
    def all_of(cls, directory: Path) -> list[JobFolder]:
        """Return the folders of a task's jobs, the first submitted first."""
        found = [each for each in (directory / JOBS).glob("*") if each.name.isdecimal()]
        return [cls(each) for each in sorted(found, key=lambda each: int(each.name))]

    @classmethod
    def intend(
        cls, place: Place, task: Mapping[str, Any], facts: Mapping[str, Any], at: float
    ) -> JobFolder:
        """Write down that a job is to be submitted for ``task``, and under which name.

        A folder whose intent was never finished is used again.

        Args:
            place: where the task works.
            task: what the job is to do.
            facts: what else is to be known of it: cluster and resources.
            at: UTC epoch seconds.
        """
        last = cls.all_of(place.directory)
        number = int(last[-1].path.name) + last[-1].is_intended if last else 1
        folder = cls(place.directory / JOBS / str(number))
        folder.path.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(4)
        where = re.sub(r"[^A-Za-z0-9]+", "-", f"{place.run_dir.name}-{place.stage}")
        write_json(folder.path / "task.json", task)
        write_json(
            folder.path / "intent.json",
            {
                "name": f"day0-{where[:LONGEST_NAME]}-{number}-{token}",
                "token": token,
                "task_sha256": document_digest(task),
                "at": at,
                **facts,
            },
        )
        return folder

    @classmethod
    def are_over(cls, directory: Path) -> bool:
        """True when every job of the task in ``directory`` was seen to end; also without any."""
        return all(each.read("ended") or not each.is_intended for each in cls.all_of(directory))

    def read(self, name: str) -> dict[str, Any] | None:
        """Return ``<name>.json``, or None where it is not there yet, or not whole yet."""
        try:
            document = read_json(self.path / f"{name}.json")
        except (OSError, ValueError):
            return None
        return document if isinstance(document, dict) else None

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write ``<name>.json`` durably."""
        write_json(self.path / f"{name}.json", document)

    @property
    def is_intended(self) -> bool:
        """True when the name of the job is on disk, so that it may have been submitted."""
        return self.read("intent") is not None

    @property
    def name(self) -> str:
        """The unique name under which Slurm knows the job."""
        name: str = (self.read("intent") or {})["name"]
        return name

    def is_for(self, task: Mapping[str, Any]) -> bool:
        """Tell whether the job was submitted for this very task."""
        return (self.read("intent") or {}).get("task_sha256") == document_digest(task)

    @property
    def job_id(self) -> str | None:
        """The number that Slurm gave the job, where that is on disk."""
        known = self.read("claim") or self.read("submitted")
        return str(known["job_id"]) if known else None

    @property
    def lock(self) -> Path:
        """The file that ``flock`` holds while the job is being submitted."""
        return self.path / "submitting.lock"

    @contextmanager
    def nobody_submits(self, timeout_s: float, sleep: Callable[[float], None]) -> Iterator[bool]:
        """Wait until no submission is under way, also one that outlived its conductor.

        Yields whether that is so; after ``timeout_s`` seconds, in which ``sbatch`` itself would
        have been ended, it is not.
        """
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield _locked(descriptor, timeout_s, sleep)
        finally:
            os.close(descriptor)

    def claim(self, job_id: str, node: str, at: float) -> bool:
        """Take the folder for job ``job_id``; False when another job has it.

        The same job may take it again: Slurm requeues under one number.
        """
        path = self.path / "claim.json"
        claim = {"job_id": job_id, "node": node, "at": at, "restarts": 0}
        draft = self.path / f".claim.{job_id}.json"
        write_json(draft, claim)
        try:
            os.link(draft, path)
        except FileExistsError:
            there = self.read("claim") or {}
            if there.get("job_id") != job_id:
                return False
            write_json(path, {**claim, "restarts": int(there["restarts"]) + 1})
        finally:
            draft.unlink(missing_ok=True)
        return True


def _locked(descriptor: int, timeout_s: float, sleep: Callable[[float], None]) -> bool:
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up_at:
                return False
            sleep(LOCK_POLL_S)
        else:
            return True
