"""Where the releases of a fleet stand, in memory: their threads write, the main thread shows.

The document of a board is written to ``status.json`` whenever it changes, so that another terminal
can show it. It tells and proves nothing: what became of a release is in its run directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from threading import Lock
from typing import Any

from conductor.chain import Stage, State
from conductor.fleet.record import Planned
from conductor.history import timestamp
from conductor.journal import Clock

STATUS = "status.json"


class Standing(StrEnum):
    """How far one release is."""

    WAITING = "waiting"
    RUNNING = "running"
    KEPT = "kept"
    FINISHED = "finished"
    ABORTED = "aborted"
    STOPPED = "stopped"


@dataclass(kw_only=True)
class Line:
    """One release on the board, as ``fleet_status.json`` has it."""

    number: int
    run_id: str
    model: str
    recipe: str
    suite: str
    settings: str
    baseline: int | None
    state: Standing = Standing.WAITING
    stage: Stage | None = None
    doing: str = ""
    decision: str | None = None
    since: str | None = None
    seconds: float | None = None
    queued_s: float = 0.0
    problem: str | None = None


class Board:
    """All lines, in the order of the fleet."""

    def __init__(
        self, fleet_id: str, releases: Iterable[Planned], baselines: Mapping[int, int], clock: Clock
    ) -> None:
        """Begin with every release waiting; ``baselines`` has the number of who asks for whom."""
        self._fleet_id = fleet_id
        self._clock = clock
        self._lock = Lock()
        self._lines = {
            each.number: Line(
                number=each.number,
                run_id=each.run_id,
                model=each.config.model,
                recipe=each.config.recipe,
                suite=each.config.suite,
                settings=each.wanted.own_words(),
                baseline=baselines.get(each.number),
            )
            for each in releases
        }

    def write(self, number: int, **facts: Any) -> None:
        """Change what is known of one release."""
        with self._lock:
            for name, value in facts.items():
                setattr(self._lines[number], name, value)

    def begin(self, number: int) -> None:
        """A release is taken up."""
        self.write(number, state=Standing.RUNNING, since=timestamp(self._clock()))

    def end(
        self,
        number: int,
        state: Standing,
        *,
        decision: str | None = None,
        problem: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """A release came to its end, or to where it is left."""
        self.write(
            number, state=state, decision=decision, problem=problem, seconds=seconds, doing=""
        )

    def states(self) -> list[tuple[Standing, str | None]]:
        """Return state and decision of every release."""
        with self._lock:
            return [(line.state, line.decision) for line in self._lines.values()]

    def document(self) -> dict[str, Any]:
        """Return all lines (schema ``fleet_status.json``)."""
        with self._lock:
            return {
                "fleet": self._fleet_id,
                "releases": [asdict(line) for line in self._lines.values()],
            }


class Watching:
    """Follow one release for the board; raise in its thread once it is to stop.

    See ``conductor.release.Observer``.
    """

    def __init__(self, board: Board, number: int, still_wanted: Callable[[], None]) -> None:
        """Write to the line of ``number``."""
        self._board = board
        self._number = number
        self._still_wanted = still_wanted

    def stage_started(self, stage: Stage, attempt: int) -> None:
        """Show the stage."""
        self._board.write(
            self._number, stage=stage, doing=f"attempt {attempt}" if attempt > 1 else ""
        )
        self._still_wanted()

    def stage_progress(self, done: int, total: int, doing: str) -> None:
        """Show what it does."""
        count = f" {done:,}/{total:,}" if total else ""
        self._board.write(self._number, doing=f"{doing}{count}")
        self._still_wanted()

    def stage_finished(self, stage: Stage, state: State, detail: str) -> None:
        """Show a failure until the next attempt, or the end."""
        said = detail.partition("\n")[0] if state is State.FAILED else ""
        self._board.write(self._number, doing=f"failed: {said}" if said else "")

    def stage_kept(self, stage: Stage) -> None:
        """Show the stage; it is done before and goes by at once."""
        self._board.write(self._number, stage=stage, doing="kept, done before")
