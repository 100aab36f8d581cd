"""Run scenarios one after the other, live, and hold what came against what was expected.

Nothing that a scenario starts outlives it. What it prints goes to files below a directory that is
kept; the workspace that scenarios share is removed when all of them have passed.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from conductor.digests import checkpoint_digest, file_digest
from conductor.evidence.seal import reseal
from conductor.executors.local import SupervisedProcess, describe_status
from conductor.failure import unusable
from conductor.run_lock import hold
from conductor.smoke.expectations import Came
from conductor.smoke.manifest import PLACEHOLDER, Scenario
from conductor.smoke.needs import unmet
from conductor.smoke.record import (
    Record,
    ScenarioRecord,
    code_digest,
    outcomes,
    record_path,
    write_record,
)
from conductor.stage_files import candidate_dir
from conductor.world import World
from gates.smoke import Outcome, evaluate_smoke

POLL_S = 0.05
DAY0 = (sys.executable, "-m", "conductor.cli")
STDOUT, STDERR = "stdout.log", "stderr.log"
APART = ("/bin/sh", "-c", 'exec "$@" 2>"$0"')
"""Lets a command have its errors in a file of their own: a supervised process has one log."""

Told = Callable[[ScenarioRecord], None]
Clock = Callable[[], datetime]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where scenarios run: the repository, the kept directory, the run that they are about."""

    repo: Path
    kept: Path
    run: Path | None
    world: World

    def places(self, scenario: Scenario) -> dict[str, Path]:
        """Return where the placeholders of a scenario lead to."""
        own = {"tmp": self.kept / "tmp" / scenario.name, "workspace": self.kept / "workspace"}
        return own | ({"run": self.run} if self.run else {})

    def tidy(self) -> None:
        """Remove what the scenarios made, and leave what they printed."""
        for name in ("tmp", "workspace"):
            shutil.rmtree(self.kept / name, ignore_errors=True)


def choose(
    scenarios: Sequence[Scenario], *, owners: Collection[str], full: bool
) -> tuple[Scenario, ...]:
    """Return the scenarios of ``owners`` (of all, when empty); without ``full`` the quick ones.

    Raises:
        Failure: USER_CONFIG_ERROR when nobody has heard of an owner, or nothing is quick.
    """
    known = sorted({owner for each in scenarios for owner in each.owners})
    if strangers := sorted(set(owners) - set(known)):
        names = ", ".join(strangers)
        raise unusable(f"{names}: no scenario has this owner; owners: {', '.join(known)}")
    own = [each for each in scenarios if not owners or set(owners) & set(each.owners)]
    chosen = tuple(each for each in own if full or each.quick)
    if own and not chosen:
        raise unusable(f"none of {len(own)} scenario(s) is quick; run them with --full")
    return chosen


def with_those_before(
    chosen: Collection[Scenario], scenarios: Sequence[Scenario]
) -> tuple[Scenario, ...]:
    """Return what was chosen and what has to pass before it, in the order of the manifest."""
    wanted = {each.name for each in chosen}
    for each in reversed(scenarios):  # those before stand above
        if each.name in wanted:
            wanted |= set(each.after)
    return tuple(each for each in scenarios if each.name in wanted)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be run: ``chosen`` of all ``scenarios``, and ``required`` must be among them."""

    scenarios: Sequence[Scenario]
    chosen: Sequence[Scenario]
    required: Sequence[Scenario]
    around: Surroundings
    owner: str | None = None
    strict: bool = False


def carry_out(task: Task, told: Told, clock: Clock) -> Record:
    """Run what was chosen, with what comes before it, and ask the gate.

    Raises:
        OSError: the kept directory cannot be written, or the code cannot be read.
    """
    results = Runner(task.around).run_all(with_those_before(task.chosen, task.scenarios), told)
    names = [each.name for each in task.required]
    verdict = evaluate_smoke(outcomes(results), strict=task.strict, required=names)
    if verdict.passed:
        task.around.tidy()
    return Record(
        owner=task.owner,
        passed=verdict.passed,
        detail=verdict.detail,
        when=f"{clock():%Y-%m-%dT%H:%M:%SZ}",
        code=code_digest(task.around.repo),
        checkpoint=None,
        scenarios=results,
    )


def carry_out_on_candidate(task: Task, told: Told, clock: Clock) -> tuple[Record, Path]:
    """Run scenarios on the candidate of a run, file the record there, and seal the run again.

    Returns the record and where it is. Nobody else may change the run meanwhile.

    Raises:
        Failure: USER_CONFIG_ERROR when there is no candidate, when another process holds the run,
            or when the candidate was changed meanwhile.
        OSError: a file cannot be read or written.
    """
    run_dir = task.around.run
    assert run_dir is not None
    with hold(run_dir):
        candidate = candidate_dir(run_dir)
        if not candidate.is_dir():
            raise unusable(f"{candidate}: is not there, so there is no candidate to try")
        checkpoint = checkpoint_digest(candidate)
        record = replace(carry_out(task, told, clock), checkpoint=checkpoint)
        if checkpoint_digest(candidate) != checkpoint:
            raise unusable(f"{candidate}: was changed meanwhile; run the scenarios again")
        path = record_path(run_dir, str(task.owner), of_run=True)
        write_record(path, record)
        reseal(run_dir, (path.relative_to(run_dir).as_posix(),), clock=clock)
    return record, path


@dataclass
class Runner:
    """Runs scenarios; remembers how each ended, for those that come after it."""

    around: Surroundings
    results: list[ScenarioRecord] = field(default_factory=list)

    def run_all(self, scenarios: Sequence[Scenario], told: Told) -> list[ScenarioRecord]:
        """Run ``scenarios`` in their order; ``told`` hears of each when it has ended.

        Raises:
            OSError: the kept directory cannot be written.
        """
        for scenario in scenarios:
            result = self._hindered(scenario) or self._run(scenario)
            self.results.append(result)
            told(result)
        return self.results

    def _hindered(self, scenario: Scenario) -> ScenarioRecord | None:
        """Return the result of a scenario that cannot be started, or None when it can."""
        before = {each.name: each.outcome for each in self.results if each.name in scenario.after}
        if failed := [name for name, outcome in before.items() if outcome is Outcome.FAILED]:
            return _result(scenario, Outcome.FAILED, [f"it comes after {failed[0]}, which failed"])
        reasons = [f"it comes after {name}" for name in before if before[name] is Outcome.SKIPPED]
        if scenario.uses_run and self.around.run is None:
            reasons.append("it is about the candidate of a release; name one with --run RUN")
        reasons += filter(None, (unmet(need, self.around.world) for need in scenario.needs))
        return _result(scenario, Outcome.SKIPPED, reasons) if reasons else None

    def _run(self, scenario: Scenario) -> ScenarioRecord:
        places = self.around.places(scenario)
        logs = self.around.kept / scenario.name
        for directory in (logs, places["tmp"], places["workspace"]):
            directory.mkdir(parents=True, exist_ok=True)
        stdout, stderr = logs / STDOUT, logs / STDERR
        started = time.monotonic()
        status = self._start(scenario, _command(scenario, places, self.around.repo), stdout, stderr)
        seconds = time.monotonic() - started
        stderr.touch()
        if status is None:
            problems = [f"it was not done after {scenario.timeout_s:g} s, and was ended"]
        else:
            came = Came(exit_code=status, stdout=_read(stdout), stderr=_read(stderr), places=places)
            problems = [told for each in scenario.expect if (told := each.problem(came))]
            if problems and status:
                problems.append(f"it ended with {describe_status(status)}")
        return _result(
            scenario,
            Outcome.FAILED if problems else Outcome.PASSED,
            problems,
            seconds=seconds,
            outputs={"stdout": file_digest(stdout), "stderr": file_digest(stderr)},
        )

    def _start(
        self, scenario: Scenario, command: Sequence[str], stdout: Path, stderr: Path
    ) -> int | None:
        """Run a command to its end and return its exit status; None when it took too long."""
        end = time.monotonic() + scenario.timeout_s
        with SupervisedProcess(
            [*APART, str(stderr), *command],
            environ=self.around.world.environ,
            log=stdout,
            cwd=self.around.repo,
        ) as process:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(POLL_S)
            return process.poll()


def _command(scenario: Scenario, places: Mapping[str, Path], repo: Path) -> list[str]:
    words = {"python": sys.executable, "repo": str(repo)}
    words |= {name: str(place) for name, place in places.items()}
    command: list[str] = []
    for text in scenario.command:
        if text == "{day0}":
            command += DAY0
        else:
            command.append(PLACEHOLDER.sub(lambda found: words[found[1]], text))
    return command


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _result(
    scenario: Scenario,
    outcome: Outcome,
    problems: Sequence[str],
    *,
    seconds: float = 0.0,
    outputs: Mapping[str, str] | None = None,
) -> ScenarioRecord:
    return ScenarioRecord(
        name=scenario.name,
        definition=scenario.definition,
        outcome=outcome,
        problems=list(problems),
        seconds=round(seconds, 1),
        outputs=outputs or {},
    )
