"""Evaluate the source before its turn, while the candidate is being quantized.

The evaluation is left in the directory of the stage whose turn comes later, and is found there as
if that stage had been cut short just before its end. Nothing is judged ahead: the gates keep their
order, and what goes wrong here is tried again when the turn has come.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace

from conductor.compatibility import Device
from conductor.config import Config, Overlap
from conductor.engines import EngineSession
from conductor.executors.local import Progress
from conductor.world import World

FREE_CORES = 1.0
"""Cores that must lie idle for a second job to be more than a burden on the first."""


class NotWanted(Exception):
    """The release came to its end before the evaluation did."""


class Ahead:
    """An evaluation of the source that runs beside the stage at hand."""

    def __init__(self, evaluate: Callable[[Progress, Callable[[], None]], None]) -> None:
        """Start ``evaluate(progress, still_wanted)`` in a thread of its own."""
        self._cancelled = threading.Event()
        self._because: type[BaseException] = NotWanted
        self._latest: tuple[int, int, str] = (0, 0, "evaluating the source")
        self.problem: Exception | KeyboardInterrupt | None = None
        self._thread = threading.Thread(target=self._work, args=(evaluate,), daemon=True)
        self._thread.start()

    def _work(self, evaluate: Callable[[Progress, Callable[[], None]], None]) -> None:
        try:
            evaluate(self._note_progress, self._check_wanted)
        except (Exception, KeyboardInterrupt) as error:
            self.problem = error

    def _note_progress(self, done: int, total: int, doing: str) -> None:
        self._check_wanted()
        self._latest = done, total, doing

    def _check_wanted(self) -> None:
        if self._cancelled.is_set():
            raise self._because

    def wait(self, progress: Progress) -> None:
        """Wait until the evaluation has ended, well or not."""
        while self._thread.is_alive():
            progress(*self._latest)
            self._thread.join(timeout=0.5)

    def cancel(self, because: type[BaseException] = NotWanted) -> None:
        """End the evaluation where it is; what it started here has ended when this returns.

        ``because`` the release is interrupted, and to be resumed, a job on a cluster goes on.
        """
        self._because = because
        self._cancelled.set()
        self._thread.join()


def is_worthwhile(config: Config, engine: EngineSession, world: World) -> bool:
    """Tell whether quantizing and evaluating the source have room beside each other.

    ``auto`` wants a device more than the server takes, or on a machine without accelerators idle
    cores and memory for both sides. On a cluster each of them has an allocation of its own, unless
    only one job may be there. A dry run, which is to be repeatable, never overlaps by itself.
    """
    cluster = world.cluster
    match config.overlap:
        case Overlap.ALWAYS:
            return True
        case Overlap.AUTO if cluster is not None:
            return cluster.max_jobs != 1 and not config.dry_run
        case Overlap.AUTO if world.machine.device is Device.CPU:
            idle_cores = (world.machine.cores or 0) - os.getloadavg()[0]
            return engine.holds_both and not config.dry_run and idle_cores >= 1 + FREE_CORES
        case Overlap.AUTO:
            return len(devices(world)) > config.engine.tensor_parallel_size
        case Overlap.NEVER:
            return False


def devices(world: World) -> list[str]:
    """Return the accelerators that this release may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = world.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each for each in visible.split(",") if each]
    return [str(number) for number in range(len(world.machine.accelerators))]


def beside_the_server(world: World) -> World:
    """Return the world for a worker that runs beside a server, which takes the first devices.

    Jobs of a cluster share none.
    """
    there = devices(world)
    if world.cluster is not None or len(there) < 2:
        return world
    return replace(world, environ={**world.environ, "CUDA_VISIBLE_DEVICES": there[-1]})
