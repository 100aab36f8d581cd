"""Which files are the outputs of a stage: what it is held to when a release goes on.

Logs, progress and records of processes come and go, an earlier attempt's files are nobody's
result, and verdicts follow from the rest; everything else that a stage left counts, with the
checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conductor.chain import Stage
from conductor.digests import Digests
from conductor.executors.processes import JOBS

STAGE_GATES: Mapping[Stage, tuple[str, ...]] = {
    Stage.PTQ: ("ptq",),
    Stage.DEPLOY: ("canary",),
    Stage.BASELINE_EVAL: ("baseline_run", "external"),
    Stage.CANDIDATE_EVAL: ("candidate_run",),
    Stage.COMPARE: ("conditions", "compare", "verbosity"),
}
"""The gates that each stage asks, by the names under which their verdicts are filed."""

PASSING = (
    *("*.log", "*.exit_code", "progress.json", "*.process.json"),
    *("attempt-*", "datasets-cache-*", ".*.tmp", JOBS),
)
"""What is no output, wherever it lies below a stage."""

CHECKPOINT = "checkpoint"
"""The directory of the candidate, below that of the run."""

REJECTED = "REJECTED-checkpoint"
"""Where the candidate lies once it was rejected; its files are recorded under ``CHECKPOINT``."""

REQUESTS = "requests"
"""Answers as they came in, below the directory of a stage, until they are complete."""


def candidate_dir(run_dir: Path) -> Path:
    """Return where the candidate lies, or would: under its own name, unless it was rejected."""
    rejected = run_dir / REJECTED
    return rejected if rejected.is_dir() else run_dir / CHECKPOINT


def outputs_of(
    run_dir: Path, stage: Stage, attempt_dir: Path, digests: Digests
) -> dict[str, dict[str, Any]]:
    """Return ``{path relative to run_dir: {"sha256", "bytes"}}`` of what a stage left.

    Raises:
        OSError: a file cannot be read.
    """
    roots = [attempt_dir, *([run_dir / CHECKPOINT] if stage is Stage.PTQ else [])]
    return {
        (root / relative).relative_to(run_dir).as_posix(): facts
        for root in roots
        if root.is_dir()
        for relative, facts in digests.tree(root, _is_passing).items()
    }


def forget_requests(run_dir: Path, stage: Stage) -> None:
    """Remove answers that a stage has kept, because the next attempt must ask anew."""
    shutil.rmtree(run_dir / "stages" / stage / REQUESTS, ignore_errors=True)


def _is_passing(relative: str) -> bool:
    name = Path(relative).name
    return relative == REQUESTS or any(fnmatch(name, pattern) for pattern in PASSING)
