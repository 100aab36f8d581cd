"""What a release knows: the plan it made, and what its stages left.

The stages read and fill it; the loop and the closing out read it. Nothing here starts anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conductor.chain import Stage
from conductor.compatibility import Row
from conductor.config import Config
from conductor.digests import Digests
from conductor.engines import EngineSession, Sides
from conductor.engines.opening import longest_request
from conductor.failure import Failure
from conductor.journal import Journal
from conductor.models import Model
from conductor.planning import Outlook
from conductor.probes.lm_eval import EvaluationResults
from conductor.stage_files import REQUESTS
from conductor.suites import Suite
from conductor.world import World as World
from gates import Recipe, Verdict

if TYPE_CHECKING:
    from conductor.ahead import Ahead
    from conductor.evaluation import Inquiry
    from conductor.tools import Tools


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
    themselves. ``samples`` is the samples document: what each question scored. ``server`` is what
    the servers logged meanwhile: requests by status code, and starts; None where none served.
    ``recalled_from`` is the run that asked, where it was not this one.
    """

    settings: Mapping[str, Any]
    conditions: Mapping[str, Any]
    results: EvaluationResults
    samples: Mapping[str, Any]
    summary: Mapping[str, Any]
    server: Mapping[str, Any] | None
    recalled_from: str | None

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
    ``inputs`` are the digests and settings that its results depend on, by field;
    ``source_inquiries`` are what the source was asked; ``remarks`` say how the release went.
    While it is ``replaying``, stages read what they recorded and write nothing.
    """

    config: Config
    journal: Journal
    world: World
    tools: Tools
    digests: Digests
    inputs: Mapping[str, Any] = field(default_factory=dict)
    ahead: Ahead | None = None
    source_inquiries: list[Inquiry] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    replaying: bool = False
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

    def open_engine(self) -> EngineSession:
        """Return the engine for both sides, opened when first asked for."""
        if self.session is None:
            plan = self.plan
            self.session = self.tools.open_session(
                plan.row.engine,
                Sides(source=plan.model.path, candidate=self.checkpoint),
                self.config,
                longest_request(plan.suite, plan.model),
            )
        return self.session

    def request_cache(self, directory: Path) -> Path:
        """Return where the answers to an evaluation in ``directory`` are kept as they come in.

        All attempts at the same evaluation share it, and no other does.
        """
        stage, *rest = directory.relative_to(self.journal.run_dir / "stages").parts
        steps = [step for step in rest if not step.startswith("attempt-")]
        return self.journal.run_dir / "stages" / stage / REQUESTS / "-".join(steps or ["all"])
