"""The tools of a release, behind one seam: workers that run, and an engine that answers.

Everything that starts a process goes through here, so that a release can be carried out by the
real tools of this machine, or tried out on what they left behind once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from conductor.compatibility import Engine
from conductor.config import Config, Executor
from conductor.deterministic import pin_world
from conductor.engines import EngineSession, Sides
from conductor.engines.opening import engine_version, open_session
from conductor.executors.local import Note, Progress, Worker, run_worker
from conductor.world import World


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


def find_world(config: Config, environ: Mapping[str, str]) -> World:
    """Look at this machine, with the variables that ``config`` has for the tools added."""
    world = World.find(environ)
    if not config.deterministic:
        return world
    version = engine_version(Engine.VLLM, world.machine.device, world.environments)
    return pin_world(world, config.seed, version)


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


EXECUTORS: Mapping[Executor, Callable[[World, Note], Tools]] = {Executor.LOCAL: LocalTools}
"""The tools of each place where workers and servers run."""


class NothingStarts:
    """Tools that refuse: while recorded results are read again, nothing may be made anew."""

    def run_worker(self, worker: Worker, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to run a worker."""
        raise NotRecorded(f"{worker.script} would have to run again")

    def open_session(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to open an engine."""
        raise NotRecorded("an engine would have to answer again")


class NotRecorded(Exception):
    """What a stage is said to have left is not all there."""
