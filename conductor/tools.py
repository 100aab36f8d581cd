"""The tools of a release, behind one seam: workers that run, and an engine that answers.

Everything that starts a process goes through here, so that a release can be carried out by the
real tools of this machine, or tried out on what they left behind once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from conductor.cluster.description import Cluster, load_cluster
from conductor.compatibility import Engine
from conductor.config import Config, Executor
from conductor.deterministic import pin_world
from conductor.engines import EngineSession, Sides
from conductor.engines.opening import engine_version, open_session
from conductor.environments.builder import Environments
from conductor.evaluation import Inquiry, ask
from conductor.executors.local import Note, Progress, Worker, run_worker
from conductor.world import World

if TYPE_CHECKING:
    from conductor.executors.slurm.following import Connection


class Tools(Protocol):
    """What a release starts."""

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
        """Run a worker to its end and return its result document; see ``local.run_worker``."""

    def open_session(
        self, engine: Engine, sides: Sides, config: Config, max_length: int | None
    ) -> EngineSession:
        """Open an engine for both checkpoints; nothing is started yet."""

    def ask(
        self,
        inquiry: Inquiry,
        session: EngineSession,
        world: World,
        progress: Progress,
        still_wanted: Callable[[], None],
    ) -> None:
        """Let the harness put ``inquiry`` to one side; see ``evaluation.ask``."""


OpenTools = Callable[[World, Note], Tools]


def find_tools(
    config: Config, environ: Mapping[str, str], connection: Connection | None = None
) -> tuple[World, OpenTools]:
    """Return where a release runs, and what opens its tools: here or in jobs, real or recorded.

    Releases of one cluster may share a ``connection`` to it.

    Raises:
        Failure: USER_CONFIG_ERROR when the cluster is not described, or nothing is recorded.
    """
    cluster = find_cluster(config, environ)
    if cluster is None:
        return tools_here(config, environ)
    from conductor.cluster.tools import SlurmTools
    from conductor.executors.slurm.following import connect

    there = connection or connect(cluster, environ)
    if config.dry_run:
        world = replace(tools_here(config, environ)[0], cluster=cluster)
    else:
        world = _pinned(World.on(cluster, environ), config)
    return world, lambda world, note: SlurmTools(world, note, config, there)


def tools_here(
    config: Config, environ: Mapping[str, str], environments: Environments | None = None
) -> tuple[World, OpenTools]:
    """Return this machine and its tools, or those that were recorded, for a dry run.

    ``environments`` stand in place of the usual ones.

    Raises:
        Failure: USER_CONFIG_ERROR when nothing is recorded.
    """
    from conductor.recorded_tools import RecordedTools, find_record, recorded_world

    if config.dry_run:
        record = find_record(config)
        return recorded_world(record, environ), lambda _, note: RecordedTools(record, note)
    found = World.find(environ)
    world = found if environments is None else replace(found, environments=environments)
    return _pinned(world, config), LocalTools


def _pinned(world: World, config: Config) -> World:
    """Return ``world`` with the variables that a deterministic release has for the tools."""
    if not config.deterministic:
        return world
    version = engine_version(Engine.VLLM, world.machine.device, world.environments)
    return pin_world(world, config.seed, version)


def find_cluster(config: Config, environ: Mapping[str, str]) -> Cluster | None:
    """Return the cluster that ``config`` runs on, as described for the working directory, or None.

    Raises:
        Failure: USER_CONFIG_ERROR when it is not described.
    """
    if config.executor is Executor.LOCAL:
        return None
    return load_cluster(config.cluster, environ, Path.cwd())


class LocalTools:
    """The real tools, on this machine; ``note`` is told of every start before it happens."""

    def __init__(self, world: World, note: Note) -> None:
        """Keep where the tools are."""
        self._world = world
        self._note = note
        self.run_worker = partial(run_worker, note=note)

    def open_session(
        self, engine: Engine, sides: Sides, config: Config, max_length: int | None
    ) -> EngineSession:
        """Open an engine of this machine."""
        return open_session(engine, sides, config, max_length, self._world, self._note)

    def ask(
        self,
        inquiry: Inquiry,
        session: EngineSession,
        world: World,
        progress: Progress,
        still_wanted: Callable[[], None],
    ) -> None:
        """Let the harness of this machine ask."""
        ask(inquiry, session, self, world, progress, still_wanted)


class NothingStarts:
    """Tools that refuse: while recorded results are read again, nothing may be made anew."""

    def run_worker(self, worker: Worker, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to run a worker."""
        raise NotRecorded(f"{worker.script} would have to run again")

    def open_session(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to open an engine."""
        raise NotRecorded("an engine would have to answer again")

    def ask(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to ask."""
        raise NotRecorded("the harness would have to ask again")


class NotRecorded(Exception):
    """What a stage is said to have left is not all there."""
