"""submitit's Slurm executor, with our guards before ``sbatch``; imported where a job is submitted.

A module of its own, because submitit is needed for nothing else.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from submitit import SlurmExecutor


class Executor(SlurmExecutor):
    """Submits with the words ``before`` put before ``sbatch``."""

    def __init__(self, folder: Path, *, python: str, before: Sequence[str]) -> None:
        """Keep the words; ``python`` is the path of an interpreter."""
        super().__init__(folder, python=shlex.quote(python))
        self._before = list(before)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [*self._before, *super()._make_submission_command(submission_file_path)]
