"""A real Slurm of our own for tests: several nodes on this machine, accounting, and its faults."""

from __future__ import annotations

from .rig import SlurmRig, missing_programs

__all__ = ["SlurmRig", "missing_programs"]
