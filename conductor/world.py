"""What this machine has for a release: environments to run in, variables, hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from conductor.environments.builder import Environments
from conductor.probes.machine import Machine, probe_machine


@dataclass(frozen=True, kw_only=True)
class World:
    """What a release finds on this machine: environments to run in, variables, hardware."""

    environments: Environments
    environ: Mapping[str, str]
    machine: Machine

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> World:
        """Look at this machine, with the process variables ``environ``."""
        machine = probe_machine()
        return cls(
            environments=Environments(device=machine.device, variables=environ),
            environ=environ,
            machine=machine,
        )
