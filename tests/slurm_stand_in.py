"""Stand-ins for Slurm's commands: for faults that a real Slurm does not have on demand.

The lines are those of Slurm 22.05.8.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence

FIELD, RECORD = "\x1f", "\x1e"

QUEUED = {
    "JobID": "7",
    "State": "PENDING",
    "Reason": "Priority",
    "NodeList": "",
    "SubmitTime": "2026-11-23T02:20:41",
    "StartTime": "N/A",
    "EndTime": "N/A",
    "RestartCnt": "0",
    "exit_code": "0",
    "Name": "day0-a",
}
RECORDED = {
    "JobIDRaw": "7",
    "State": "COMPLETED",
    "Reason": "None",
    "NodeList": "n1",
    "Submit": "2026-11-23T02:20:41",
    "Start": "2026-11-23T02:20:45",
    "End": "2026-11-23T02:20:46",
    "ExitCode": "0:0",
    "JobName": "day0-a",
}
UP, DOWN = (0, "Slurmctld(primary) at login is UP\n", ""), (1, "Slurmctld is DOWN\n", "")
NOT_CONTACTED = (1, "", "slurm_load_jobs error: Unable to contact slurm controller\n")
NO_ACCOUNTING = (1, "", "Slurm accounting storage is disabled\n")

Answer = tuple[int, str, str] | Exception


def queue_of(*jobs: Mapping[str, str]) -> Answer:
    """Return what squeue prints of these jobs; each says in what it differs from ``QUEUED``."""
    return 0, "".join(FIELD.join({**QUEUED, **job}.values()) + f"{RECORD}\n" for job in jobs), ""


def history_of(*jobs: Mapping[str, str]) -> Answer:
    """Return what sacct prints of these jobs; each says in what it differs from ``RECORDED``."""
    return 0, "".join(FIELD.join({**RECORDED, **job}.values()) + "\n" for job in jobs), ""


class StandInCommands:
    """Stands in for ``subprocess.run``: gives each of Slurm's commands its answer, or its fault."""

    def __init__(self, **answers: Answer | Callable[[Sequence[str]], Answer]) -> None:
        """Keep the answers by the name of the program; they may be changed at any time."""
        self.answers = {"scontrol": UP, "squeue": queue_of(), "sacct": history_of(), **answers}
        self.commands: list[list[str]] = []
        self.options: list[Mapping[str, object]] = []

    def __call__(
        self, command: Sequence[str], **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Answer for the program, and note how it was called."""
        self.commands.append([*command])
        self.options.append(options)
        answer = self.answers[command[0]]
        if callable(answer):
            answer = answer(command)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess([*command], *answer)

    def called(self, program: str) -> list[list[str]]:
        """Return every call of a program."""
        return [command for command in self.commands if command[0] == program]
