"""One release from request to decision: next stage, worker, evidence, gate, journal.

The loop never starts a stage after a failed gate, tries a stage again only when the triage table
says so, ends every process it started, and always closes out with a report.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import yaml
from tenacity import RetryCallState, Retrying

from conductor.chain import Stage, State, next_stage
from conductor.closeout import close_out
from conductor.config import Config
from conductor.failure import Failure
from conductor.files import write_json, write_text
from conductor.journal import Clock, Journal
from conductor.noise_floor import say_noise_floor
from conductor.release_state import Release, World
from conductor.stages import STAGE_FUNCTIONS, StageFunction
from gates import TRIAGE, FailureClass, Triage, Verdict


class Observer(Protocol):
    """Who is told how the release gets on."""

    def stage_started(self, stage: Stage, attempt: int) -> None:
        """An attempt at ``stage`` begins."""

    def stage_progress(self, done: int, total: int, doing: str) -> None:
        """The running stage is ``done`` of ``total`` through ``doing``; total 0 is unknown."""

    def stage_finished(self, stage: Stage, state: State, detail: str) -> None:
        """The attempt ended; ``detail`` says how, and may go on over many lines."""


class GateFailed(Exception):
    """A gate said no."""

    def __init__(self, gate: str, verdict: Verdict) -> None:
        """Keep what the triage table and the journal need."""
        super().__init__(f"{gate}: {verdict.detail}")
        self.failure_class = verdict.failure_class or FailureClass.UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Conductor:
    """What a release needs from the world: where things are, what time it is, who watches."""

    world: World
    clock: Clock
    sleep: Callable[[float], None]
    observer: Observer
    stage_functions: Mapping[Stage, StageFunction] = field(default_factory=lambda: STAGE_FUNCTIONS)

    def run(self, config: Config, run_dir: Path) -> dict[str, Any]:
        """Run the whole release and return its report document.

        Raises:
            OSError: the run directory cannot be made or written at the start.
            KeyboardInterrupt: stopped on request; everything that was started has ended.
        """
        journal = Journal.create(
            run_dir, clock=self.clock, model=config.model, recipe=config.recipe
        )
        resolved = yaml.safe_dump(config.document(), sort_keys=False)
        write_text(run_dir / "config.resolved.yaml", resolved)
        release = Release(config=config, journal=journal, world=self.world)
        try:
            self._run_stages(release)
            return self._close_out(release)
        except KeyboardInterrupt:
            with suppress(OSError):
                journal.record("release_stopped")
            raise

    def _run_stages(self, release: Release) -> None:
        try:
            while (stage := next_stage(release.journal.states)) not in (None, Stage.CLOSEOUT):
                self._run_stage(release, stage)
        finally:
            if release.session:
                release.session.close()

    def _run_stage(self, release: Release, stage: Stage) -> None:
        attempts = Retrying(
            retry=_is_to_be_retried,
            stop=lambda state: False,
            wait=lambda state: _triage(state).wait_s,
            sleep=self.sleep,
            reraise=True,
        )
        try:
            attempts(self._attempt, release, stage)
        except Failure as failure:
            release.failures.append((stage, failure))
        except GateFailed:
            pass  # its verdicts are kept, and the failed state ends the chain

    def _attempt(self, release: Release, stage: Stage) -> None:
        journal = release.journal
        try:
            journal.start(stage)
            self.observer.stage_started(stage, journal.stages[stage].attempts)
            stage_dir = journal.attempt_dir(stage)
            # A stage with a worker replaces both files by the worker's.
            write_json(stage_dir / "request.json", _request_document(release, stage))
            verdicts = self.stage_functions[stage](release, self.observer.stage_progress)
            if not (stage_dir / "result.json").exists():
                write_json(stage_dir / "result.json", _result_document(release, verdicts))
            self._keep(release, verdicts)
        except Exception as error:
            failure = _classified(error, journal.run_dir)
            self._finish(release, stage, State.FAILED, str(failure), failure.failure_class)
            if failure is error:
                raise
            raise failure from error
        found = [f"{gate}: {verdict.detail}" for gate, verdict in verdicts.items()]
        found += _remarks(release, stage)
        self._finish(release, stage, State.DONE, "; ".join(found), None)

    def _keep(self, release: Release, verdicts: Mapping[str, Verdict]) -> None:
        for gate, verdict in verdicts.items():
            if verdict.failure_class is FailureClass.USER_CONFIG_ERROR:
                # Evidence that we collected and the gate cannot read is our fault, not the user's.
                verdict = replace(verdict, failure_class=FailureClass.UNKNOWN)
            release.verdicts[gate] = verdict
            path = release.journal.run_dir / "verdicts" / f"{gate}.json"
            write_json(path, verdict.document())
        for gate in verdicts:
            if not release.verdicts[gate].passed:
                raise GateFailed(gate, release.verdicts[gate])

    def _finish(
        self,
        release: Release,
        stage: Stage,
        state: State,
        detail: str,
        failure_class: FailureClass | None,
    ) -> None:
        # A full disk must not cost the decision: the state is kept in memory in any case.
        with suppress(OSError):
            release.journal.finish(stage, state, detail=detail, failure_class=failure_class)
        self.observer.stage_finished(stage, state, detail)

    def _close_out(self, release: Release) -> dict[str, Any]:
        with suppress(OSError):
            release.journal.start(Stage.CLOSEOUT)
        self.observer.stage_started(Stage.CLOSEOUT, 1)
        document = close_out(release, self.observer.stage_progress)
        self._finish(release, Stage.CLOSEOUT, State.DONE, document["next_action"], None)
        with suppress(OSError):
            release.journal.close(decision=document["decision"], exit_code=document["exit_code"])
        return document


def _request_document(release: Release, stage: Stage) -> dict[str, Any]:
    return {
        "stage": stage,
        "attempt": release.journal.stages[stage].attempts,
        "config": {name: value for name, (value, _) in release.config.origins.items()},
    }


def _result_document(release: Release, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """Return what a stage without a worker came to: what setup planned, or the verdicts."""
    document: dict[str, Any] = {"status": "ok"}
    if verdicts:
        return document | {"verdicts": {gate: v.passed for gate, v in verdicts.items()}}
    document |= {"plan": release.plan.document()}
    return document | ({"outlook": release.outlook.document()} if release.outlook else {})


def _remarks(release: Release, stage: Stage) -> list[str]:
    """Return what a person should know of a stage besides its verdicts."""
    if stage is Stage.SETUP and release.outlook and release.outlook.warning:
        return [f"warning: {release.outlook.warning} (day0 plan shows the tasks)"]
    if stage is Stage.BASELINE_EVAL and release.noise_floor:
        return [say_noise_floor(release.noise_floor)]
    return []


def _classified(error: Exception, run_dir: Path) -> Failure | GateFailed:
    """Return what ended a stage with its failure class.

    An exception that nobody expected is a defect of ours, and says where it came from.
    """
    if isinstance(error, Failure | GateFailed):
        return error
    if isinstance(error, OSError):
        return Failure(
            FailureClass.SYSTEMIC,
            f"{error.strerror or error}: {error.filename or run_dir}; free some space or repair "
            "the disk, then start the release again",
        )
    where = traceback.format_exception(error)
    return Failure(
        FailureClass.UNKNOWN,
        f"{type(error).__name__}: {error}; this is a defect of day0, please report it\n"
        + "".join(where),
    )


def _is_to_be_retried(state: RetryCallState) -> bool:
    error = state.outcome and state.outcome.exception()
    if not isinstance(error, Failure | GateFailed):
        return False
    return state.attempt_number <= _triage(state).retries


def _triage(state: RetryCallState) -> Triage:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, Failure | GateFailed)
    return TRIAGE[error.failure_class]
