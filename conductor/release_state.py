"""What a release knows: the world it finds, the plan it made, and what its stages left.

The stages read and fill it; the loop and the closing out read it. Nothing here starts anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conductor.chain import Stage
from conductor.compatibility import Row
from conductor.config import Config
from conductor.engines import EngineSession
from conductor.environments.builder import Environments
from conductor.failure import Failure
from conductor.journal import Journal
from conductor.models import Model
from conductor.planning import Outlook
from conductor.probes.lm_eval import EvaluationResults
from conductor.probes.machine import Machine, probe_machine
from conductor.suites import Suite
from gates import Recipe, Verdict


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What setup resolved the request to; every later stage works from this."""

    model: Model
    recipe: Recipe
    suite: Suite
    row: Row
    quantize_request: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """The plan as a JSON mapping."""
        return {
            "model": {**asdict(self.model), "path": str(self.model.path)},
            "recipe": asdict(self.recipe),
            "suite": {"name": self.suite.name, "path": str(self.suite.path)},
            "combination": asdict(self.row),
            "quantize": dict(self.quantize_request),
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One side's evaluation: how it was asked, what came out, and the run summary.

    ``settings`` are what harness and engine were told, ``conditions`` those and what they say
    themselves. ``samples`` is the samples document: what each question scored.
    """

    settings: Mapping[str, Any]
    conditions: Mapping[str, Any]
    results: EvaluationResults
    samples: Mapping[str, Any]
    summary: Mapping[str, Any]
    server_logs: frozenset[Path]

    @property
    def asked(self) -> dict[str, tuple[int, int]]:
        """How many questions of each task were asked, of how many, where that is known."""
        return {
            name: (len(task["questions"]), task["size"])
            for name, task in self.samples["tasks"].items()
            if task["size"] is not None
        }


@dataclass(kw_only=True)
class Release:
    """One release in progress: what was asked for, what setup planned, what stages left.

    ``batches`` hold the evaluations of each side round by round, ``evaluations`` all of a side put
    together, and ``path`` what each look at them came to, where a release looks before it is done.
    """

    config: Config
    journal: Journal
    world: World
    resolved: Plan | None = None
    outlook: Outlook | None = None
    session: EngineSession | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    failures: list[tuple[Stage, Failure]] = field(default_factory=list)
    calibration: Mapping[str, Any] | None = None
    checkpoint_summary: Mapping[str, Any] | None = None
    batches: dict[str, list[list[Evaluation]]] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    noise_floor: Mapping[str, Mapping[str, Any]] | None = None
    path: list[dict[str, Any]] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        """The plan; only stages after setup may ask for it."""
        assert self.resolved is not None, "setup has not run"
        return self.resolved

    @property
    def checkpoint(self) -> Path:
        """Where the candidate is written."""
        return self.journal.run_dir / "checkpoint"
