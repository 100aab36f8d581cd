"""The tools of a release whose stages run as jobs of a Slurm cluster: the conductor's side.

Each call becomes one task (:mod:`conductor.cluster.tasks`) and returns when a job has carried it
out. Nothing that is needed for a model is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from conductor.chain import Stage
from conductor.cluster.tasks import (
    Opened,
    canary_task,
    evaluation_task,
    on_node,
    worker_task,
)
from conductor.compatibility import Engine
from conductor.config import Config
from conductor.engines import EngineSession, Sides
from conductor.evaluation import Inquiry
from conductor.event_log import parse, read_log
from conductor.executors.local import Note, Progress, Worker
from conductor.executors.slurm.folders import Place
from conductor.executors.slurm.following import Connection, Errand, carry_out
from conductor.failure import Failure
from conductor.files import read_json
from conductor.preconditions import environments_of
from conductor.world import World
from gates import FailureClass

JOB_MODULE = "conductor.cluster.job"


class SlurmTools:
    """Workers and engines in jobs; ``note`` is told of every job."""

    def __init__(self, world: World, note: Note, config: Config, connection: Connection) -> None:
        """Keep how to reach the cluster; releases may share a ``connection``."""
        self._world = world
        self._note = note
        self._config = config
        self._connection = connection

    def run_worker(
        self,
        worker: Worker,
        stage_dir: Path,
        request: Mapping[str, Any],
        *,
        environ: Mapping[str, str],
        progress: Progress,
        still_useful: Callable[[], None] = lambda: None,
        stall_s: float | None = None,
    ) -> dict[str, Any]:
        """Run a worker in a job; return what its ``result.json`` says."""
        task = worker_task(worker, stage_dir, request, environ, self._world.environ, stall_s)
        self._carry_out(task, ("quantize",), progress, still_useful, goes_on=False)
        result: dict[str, Any] = read_json(stage_dir / "result.json")
        return result

    def open_session(
        self, engine: Engine, sides: Sides, config: Config, max_length: int | None
    ) -> EngineSession:
        """Return an engine that is opened anew in each job."""
        opened = Opened(engine=engine, sides=sides, config=config, max_length=max_length)
        return ClusterSession(opened, self)

    def ask(
        self,
        inquiry: Inquiry,
        session: EngineSession,
        world: World,
        progress: Progress,
        still_wanted: Callable[[], None],
    ) -> None:
        """Serve one side and evaluate it in a job."""
        assert isinstance(session, ClusterSession)
        task = evaluation_task(session.opened, inquiry)
        self._carry_out(task, session.environments(world), progress, still_wanted, goes_on=True)

    def answer_canary(
        self,
        opened: Opened,
        prompts: Sequence[str],
        stage_dir: Path,
        progress: Progress,
        source_answers: Sequence[Mapping[str, Any]] | None,
    ) -> dict[str, Any]:
        """Serve both sides in a job and return the canary's evidence."""
        task = canary_task(opened, prompts, stage_dir, source_answers)
        names = environments_of(opened.engine, self._world.machine.device)
        outcome = self._carry_out(task, names, progress, lambda: None, goes_on=False)
        answer: dict[str, Any] = outcome["answer"]
        return answer

    def _carry_out(
        self,
        task: Mapping[str, Any],
        environments: Sequence[str],
        progress: Progress,
        still_wanted: Callable[[], None],
        *,
        goes_on: bool,
    ) -> dict[str, Any]:
        cluster = self._connection.cluster
        place = Place.of(Path(task["directory"]))
        given = {
            "root": cluster.environments and str(cluster.environments),
            "interpreters": {name: str(path) for name, path in cluster.interpreters.items()},
            "used": list(environments),
        }
        errand = Errand(
            place=place,
            task=on_node(task, self._config, self._world.machine.device, given),
            resources=cluster.resources[Stage(place.stage)],
            goes_on=goes_on,
            module=JOB_MODULE,
            note=self._note,
            noted=lambda name: _count_notes(place.run_dir, name),
            progress=progress,
            still_wanted=still_wanted,
        )
        return carry_out(errand, self._connection)


def _count_notes(run_dir: Path, job: str) -> int:
    """Return how many events of a run came from the job of that name."""
    return sum(1 for line in read_log(run_dir).sound if parse(line).get("job") == job)


class ClusterSession:
    """An engine of a cluster: each question to it is a job that opens it, asks, and closes it."""

    def __init__(self, opened: Opened, tools: SlurmTools) -> None:
        """Keep what is to be opened; nothing runs between two jobs."""
        self.opened = opened
        self._tools = tools

    @property
    def holds_both(self) -> bool:
        """True: each job has an allocation of its own."""
        return True

    def environments(self, world: World) -> list[str]:
        """Name the environments that a job needs which opens this engine."""
        return environments_of(self.opened.engine, world.machine.device)

    def answer_canary(
        self,
        prompts: Sequence[str],
        stage_dir: Path,
        progress: Progress,
        source_answers: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Let both sides answer ``prompts`` in one job."""
        return self._tools.answer_canary(self.opened, prompts, stage_dir, progress, source_answers)

    def backend(self, side: str, stage_dir: Path, progress: Progress) -> NoReturn:
        """Refuse: nobody outside of a job may reach a server of one."""
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            "a server on a cluster answers inside its job only; use executor: local to serve",
        )

    def secrets(self, side: str) -> Mapping[str, str]:
        """Return none: a key is made in the job, and stays there."""
        return {}

    def check(self, side: str) -> None:
        """Nothing runs between two jobs that could have died."""

    def settings(self, side: str) -> Mapping[str, Any]:
        """Return nothing: the job writes down the settings under which it asked."""
        return {}

    def log(self, side: str) -> None:
        """Return none: a server's log lies with the task that it answered for."""

    def begin(self, side: str, stage_dir: Path) -> None:
        """Begin nothing: a job serves what it asks."""

    def discard(self, side: str) -> None:
        """Nothing runs between two jobs that could be stopped."""

    def narrow(self) -> None:
        """Let later jobs load one side at a time."""
        self.opened = replace(self.opened, one_at_a_time=True)

    def close(self) -> None:
        """Nothing is open."""
