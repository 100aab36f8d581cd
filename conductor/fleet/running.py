"""Carry out the releases of a fleet: several at a time in one process, each an ordinary release.

Invariants:

* A release gets one run directory: where that is there, it goes on, and a decision is kept.
* How one release ends never ends another.
* Once it is to stop, every release ends what it started and can be resumed, and so can the fleet.
* What a release knew is let go when it ends; the board keeps one line of it.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conductor.compatibility import Engine
from conductor.config import Config, Executor, Overlap, load_recorded
from conductor.digests import Digests
from conductor.documents import refuse
from conductor.engines import EngineSession, Sides
from conductor.evaluation import Inquiry
from conductor.executors.local import Note, Progress, Worker
from conductor.failure import Failure, Stopped
from conductor.files import write_json
from conductor.fleet.board import STATUS, Board, Standing, Watching
from conductor.fleet.record import Fleet, Planned
from conductor.fleet.sharing import Sharing, baseline_of, sharing_stages
from conductor.jobs import read_jobs
from conductor.journal import Clock
from conductor.looking_back import finished_report
from conductor.redaction import redact
from conductor.release import CONFIG, Conductor
from conductor.stages import choose_tools
from conductor.tools import OpenTools, Tools
from conductor.world import World
from gates import Decision, FailureClass

AT_ONCE = 8
"""Releases in progress at a time where nothing else is said: cluster jobs and waiting, mostly."""
AT_ONCE_HERE = 1
"""The same where real tools run on this machine, whose accelerators one release fills."""
JOBS_GO_ON = (
    "stopped on request; jobs on the cluster go on without us: they are found again when the fleet "
    "goes on, and `day0 stop RUN` cancels those of one release"
)
STEP_S = 1.0
"""Seconds between two looks at the board."""

Find = Callable[[Config], tuple[World, OpenTools]]
"""How a release finds its world and tools; see ``fleet.places.Places.find``."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A fleet that can begin; ``baselines`` has for each release who is the first to ask the same.

    That is a number from 1, its own where it is the first; one that shares with nobody has none.
    """

    fleet: Fleet
    releases: Sequence[Planned]
    baselines: Mapping[int, int]

    @property
    def at_once(self) -> int:
        """How many releases are in progress at a time."""
        here = any(
            each.config.executor is Executor.LOCAL and not each.config.dry_run
            for each in self.releases
        )
        return self.fleet.asked.at_once or (AT_ONCE_HERE if here else AT_ONCE)


def prepare(fleet: Fleet, find: Find) -> Prepared:
    """Resolve every release as far as that needs no model, and see who shares whose baseline.

    Raises:
        Failure: USER_CONFIG_ERROR naming all releases that cannot begin.
    """
    problems: list[str] = []
    releases = list(fleet.releases())
    groups: dict[str, list[int]] = {}
    for each in releases:
        engine = ""
        try:
            world, _ = find(each.config)
            engine = choose_tools(each.config, world).row.engine
        except Failure as failure:
            # What this machine cannot do is for the release itself to decide and to report.
            if failure.failure_class is FailureClass.USER_CONFIG_ERROR and not _is_begun(each):
                problems.append(f"{each.config.model} with {each.config.recipe}: {failure.message}")
        if (asked := baseline_of(each.config, engine)) is not None:
            groups.setdefault(asked, []).append(each.number)
    if problems:
        raise refuse(f"fleet {fleet.asked.file}", "; ".join(dict.fromkeys(problems)))
    baselines = {
        number: numbers[0] for numbers in groups.values() if len(numbers) > 1 for number in numbers
    }
    return Prepared(fleet=fleet, releases=releases, baselines=baselines)


def _is_begun(each: Planned) -> bool:
    return each.run_dir.is_dir()


def exit_code(lines: Iterable[tuple[Standing, str | None]]) -> int:
    """Return the exit code that states and decisions of releases come to; the worst one counts."""
    states, decisions = map(set, zip(*lines, strict=True))
    if Standing.ABORTED in states:
        return 5
    if not states <= {Standing.FINISHED, Standing.KEPT}:
        return 130
    return int(decisions != {Decision.ACCEPT})


class Stoppable:
    """The tools of one release, which end once it is to stop; see ``conductor.tools.Tools``."""

    def __init__(self, tools: Tools, still_wanted: Callable[[], None]) -> None:
        """Call ``still_wanted`` whenever ``tools`` would look whether to go on."""
        self._tools = tools
        self._still_wanted = still_wanted

    def _both(self, theirs: Callable[[], None]) -> Callable[[], None]:
        def check() -> None:
            self._still_wanted()
            theirs()

        return check

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
        """Run a worker to its end, or until it is to stop."""
        return self._tools.run_worker(
            worker,
            stage_dir,
            request,
            environ=environ,
            progress=progress,
            still_useful=self._both(still_useful),
            stall_s=stall_s,
        )

    def open_session(
        self, engine: Engine, sides: Sides, config: Config, max_length: int | None
    ) -> EngineSession:
        """Open an engine; nothing is started yet."""
        return self._tools.open_session(engine, sides, config, max_length)

    def ask(
        self,
        inquiry: Inquiry,
        session: EngineSession,
        world: World,
        progress: Progress,
        still_wanted: Callable[[], None],
    ) -> None:
        """Let the harness ask, until it is to stop."""
        self._tools.ask(inquiry, session, world, progress, self._both(still_wanted))


class Crew:
    """The threads that carry out a fleet, and what they have in common."""

    def __init__(self, prepared: Prepared, *, find: Find, clock: Clock) -> None:
        """Prepare the board; nothing is started yet."""
        fleet = prepared.fleet
        self.board = Board(fleet.fleet_id, prepared.releases, prepared.baselines, clock)
        self._prepared = prepared
        self._find = find
        self._clock = clock
        self._stopping = threading.Event()
        self._digests = Digests(fleet.workspace / "cache" / "digests.json")
        self._sharing = {first: Sharing() for first in set(prepared.baselines.values())}
        self._shown: Mapping[str, Any] | None = None

    def work(self, show: Callable[[Mapping[str, Any]], None]) -> None:
        """Carry out every release.

        ``show`` is given the board's document (schema ``fleet_status.json``) every second.

        Raises:
            KeyboardInterrupt: stopped on request; everything that was started has ended.
        """
        pool = ThreadPoolExecutor(self._prepared.at_once, thread_name_prefix="release")
        try:
            left = {pool.submit(self._carry_out, each) for each in self._prepared.releases}
            while left:
                _, left = wait(left, timeout=STEP_S, return_when=FIRST_COMPLETED)
                self.step(show)
        except BaseException as end:
            self._stopping.set()
            if isinstance(end, KeyboardInterrupt) and self._has_jobs():
                raise Stopped(JOBS_GO_ON) from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self.step(show)

    def _has_jobs(self) -> bool:
        """Tell whether a release runs on a cluster."""
        return any(each.config.executor is Executor.SLURM for each in self._prepared.releases)

    def step(self, show: Callable[[Mapping[str, Any]], None]) -> None:
        """Look at the board, and leave what changed where others can see it."""
        document = self.board.document()
        if document != self._shown:
            self._shown = document
            with suppress(OSError):  # it is only shown
                write_json(self._prepared.fleet.directory / STATUS, document)
        show(document)

    def _carry_out(self, each: Planned) -> None:
        """Carry out one release, whatever it comes to."""
        if self._stopping.is_set():
            return
        self.board.begin(each.number)
        try:
            self._release(each)
        except KeyboardInterrupt as stop:
            self.board.end(each.number, Standing.STOPPED, problem=str(stop) or None)
        except Failure as failure:
            self._abort(each, failure.message)
        except OSError as error:
            what = ": ".join(filter(None, [error.strerror or str(error), error.filename]))
            self._abort(each, what)
        except Exception as error:
            self._abort(each, f"a defect of day0: {type(error).__name__}: {error}")
        finally:
            if sharing := self._sharing_of(each):
                sharing.leave(each.run_id)

    def _abort(self, each: Planned, problem: str) -> None:
        said = redact(problem).partition("\n")[0]
        self.board.end(each.number, Standing.ABORTED, problem=said)

    def _release(self, each: Planned) -> None:
        """Begin a release, or go on with it; one that has come to a decision is kept."""
        begun = _is_begun(each)
        if begun:
            self._show_queued(each)
        if begun and (document := finished_report(each.run_dir, self._clock)):
            self._end(each, document, Standing.KEPT)
            return
        sharing = self._sharing_of(each)
        follows = sharing is not None and not sharing.lead(each.run_id)
        options = {"overlap": Overlap.NEVER} if follows else {}
        if begun:
            then, now = load_recorded(each.run_dir / CONFIG, None, options)
            document = self._conductor(each, now).resume(each.run_dir, then, now)
        else:
            # A fleet that was killed at the wrong moment leaves a directory that never was a run.
            shutil.rmtree(each.run_dir.with_name(f".{each.run_id}.new"), ignore_errors=True)
            config = self._prepared.fleet.asked.configure(
                each.wanted, self._prepared.fleet.workspace, options
            )
            document = self._conductor(each, config).run(config, each.run_dir)
        self._end(each, document, Standing.FINISHED)

    def _show_queued(self, each: Planned) -> None:
        """Show for how long the jobs of a release waited, as far as that is known.

        What is known when a job starts is an estimate; its end says better.
        """
        with suppress(OSError):  # it is only shown
            queued_s = sum(job.queued_s or 0.0 for job in read_jobs(each.run_dir))
            self.board.write(each.number, queued_s=round(queued_s, 3))

    def _end(self, each: Planned, document: Mapping[str, Any], state: Standing) -> None:
        decided = document["decision"] is not None
        self.board.end(
            each.number,
            state if decided else Standing.ABORTED,
            decision=document["decision"],
            problem=None if decided else document["reasons"][0].partition("\n")[0],
            seconds=document["seconds"],
        )

    def _conductor(self, each: Planned, config: Config) -> Conductor:
        world, open_tools = self._find(config)
        thread = threading.get_ident()

        def still_wanted() -> None:
            # What runs beside a release, in a thread of its own, is ended by the release.
            if self._stopping.is_set() and threading.get_ident() == thread:
                raise KeyboardInterrupt

        def sleep(seconds: float) -> None:
            self._stopping.wait(seconds)
            still_wanted()

        def open_stoppable(world: World, note: Note) -> Tools:
            def noting(event: str, **facts: Any) -> None:
                note(event, **facts)
                if event in ("job_started", "job_ended"):
                    self._show_queued(each)

            return Stoppable(open_tools(world, noting), still_wanted)

        conductor = Conductor(
            world=world,
            clock=self._clock,
            sleep=sleep,
            observer=Watching(self.board, each.number, still_wanted),
            open_tools=open_stoppable,
            digests=self._digests,
        )
        sharing = self._sharing_of(each)
        if sharing is None:
            return conductor
        return replace(conductor, stage_functions=sharing_stages(sharing, each.run_id))

    def _sharing_of(self, each: Planned) -> Sharing | None:
        first = self._prepared.baselines.get(each.number)
        return None if first is None else self._sharing[first]
