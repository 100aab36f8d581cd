"""The name that a rejected candidate lies under, so that nobody takes it for one to publish.

Renaming the directory is all that happens to it: its files stay as they were evaluated, the seal of
the run is made again over the new name, and a release that goes on puts the old name back. A death
between the two is made good by the next attempt to publish.
"""

from __future__ import annotations

from pathlib import Path

from conductor.evidence.seal import RUN_MANIFEST, reseal
from conductor.files import sync_directory
from conductor.journal import Clock
from conductor.repair import read_object
from conductor.stage_files import CHECKPOINT, REJECTED


def move_rejected(run_dir: Path, *, clock: Clock) -> Path | None:
    """Give a rejected candidate its name, and return where it lies; None where there is none.

    Done again, it changes nothing. The caller holds the run.

    Raises:
        Failure: the journal of the run is damaged.
        OSError: the run directory cannot be written.
    """
    candidate, rejected = run_dir / CHECKPOINT, run_dir / REJECTED
    if candidate.is_dir() and not rejected.exists():
        candidate.rename(rejected)
        sync_directory(run_dir)
    if not rejected.is_dir():
        return None
    if any(name.startswith(f"{CHECKPOINT}/") for name in _sealed(run_dir)):
        reseal(run_dir, (CHECKPOINT, REJECTED), clock=clock)
    return rejected


def put_back(run_dir: Path) -> None:
    """Give a candidate its own name again, because its release goes on; the caller holds the run.

    Raises:
        OSError: the run directory cannot be written.
    """
    candidate, rejected = run_dir / CHECKPOINT, run_dir / REJECTED
    if rejected.is_dir() and not candidate.exists():
        rejected.rename(candidate)
        sync_directory(run_dir)


def _sealed(run_dir: Path) -> list[str]:
    """Return the files that the seal of a run names; none where there is no seal."""
    files = read_object(run_dir / RUN_MANIFEST).get("files")
    return list(files) if isinstance(files, dict) else []
