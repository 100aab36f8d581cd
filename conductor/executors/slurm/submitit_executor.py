"""submitit's Slurm executor, made to run a command of ours; imported where a job is submitted.

submitit writes the script, calls sbatch and reads the number. What it would run is a function that
it pickled, found under that number: a conductor that died in between left a job that waited for its
pickle in vain. So the script runs a module with the folder's path, and nothing is pickled.

Its warning signal is left out as well: Slurm gives it to the steps of a job and not to the script,
so it would kill the companions of a server over several nodes and reach nobody else. At the
walltime itself everything gets SIGTERM, and the time until SIGKILL that the cluster allows.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from submitit import SlurmExecutor


class Executor(SlurmExecutor):
    """Submits one command, with the words ``before`` put before ``sbatch``."""

    def __init__(self, folder: Path, *, before: Sequence[str]) -> None:
        """Keep the words; the script and the job's log come into ``folder``."""
        super().__init__(folder)
        self._before = list(before)

    def send(self, command: Sequence[str]) -> str:
        """Submit ``command`` and return the job's number.

        The command takes the place of the script's shell, which would keep signals to itself.
        """
        return str(self._submit_command(f"exec {shlex.join(command)}").job_id)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [*self._before, *super()._make_submission_command(submission_file_path)]

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        lines = super()._make_submission_file_text(command, uid).splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("#SBATCH --signal="))
