"""One release from request to decision: next stage, worker, evidence, gate, journal.

The loop never starts a stage after a failed gate, tries a stage again only when the triage table
says so, ends every process it started, and always closes out with a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from conductor.stages import STAGE_FUNCTIONS, Release, World
from gates import TRIAGE, FailureClass, Triage, Verdict


class Observer(Protocol):
    """Who is told how the release gets on."""

    def stage_started(self, stage: Stage, attempt: int) -> None:
        """An attempt at ``stage`` begins."""

    def stage_progress(self, done: int, total: int, doing: str) -> None:
        """The running stage is ``done`` of ``total`` through ``doing``; total 0 is unknown."""

    def stage_finished(self, stage: Stage, state: State, detail: str) -> None:
        """The attempt ended; ``detail`` is one line."""


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
    sleep: Any
    observer: Observer

    def run(self, config: Config, run_dir: Path) -> dict[str, Any]:
        """Run the whole release and return its report document.

        Raises:
            OSError: the run directory cannot be written.
            KeyboardInterrupt: stopped on request; everything that was started has ended.
        """
        journal = Journal.create(
            run_dir, clock=self.clock, model=config.model, recipe=config.recipe
        )
        resolved = yaml.safe_dump(config.document(), sort_keys=False)
        write_text(run_dir / "config.resolved.yaml", resolved)
        release = Release(config=config, journal=journal, world=self.world)
        try:
            while (stage := next_stage(journal.states)) not in (None, Stage.CLOSEOUT):
                self._run_stage(release, stage)
        except KeyboardInterrupt:
            journal.record("release_stopped")
            raise
        finally:
            if release.session:
                release.session.close()
        return self._close_out(release)

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
        journal.start(stage)
        self.observer.stage_started(stage, journal.stages[stage].attempts)
        try:
            verdicts = STAGE_FUNCTIONS[stage](release, self.observer.stage_progress)
            self._keep(release, stage, verdicts)
        except (Failure, GateFailed) as error:
            self._finish(release, stage, State.FAILED, str(error), error.failure_class)
            raise
        except OSError as error:
            failure = Failure(
                FailureClass.SYSTEMIC, f"{error.strerror or error}: {error.filename or stage}"
            )
            self._finish(release, stage, State.FAILED, failure.message, failure.failure_class)
            raise failure from error
        detail = "; ".join(f"{gate}: {verdict.detail}" for gate, verdict in verdicts.items())
        self._finish(release, stage, State.DONE, detail, None)

    def _keep(self, release: Release, stage: Stage, verdicts: Mapping[str, Verdict]) -> None:
        release.verdicts.update(verdicts)
        for gate, verdict in verdicts.items():
            path = release.journal.run_dir / "verdicts" / f"{gate}.json"
            write_json(path, verdict.document())
        for gate, verdict in verdicts.items():
            if not verdict.passed:
                raise GateFailed(gate, verdict)

    def _finish(
        self,
        release: Release,
        stage: Stage,
        state: State,
        detail: str,
        failure_class: FailureClass | None,
    ) -> None:
        release.journal.finish(stage, state, detail=detail, failure_class=failure_class)
        self.observer.stage_finished(stage, state, detail)

    def _close_out(self, release: Release) -> dict[str, Any]:
        release.journal.start(Stage.CLOSEOUT)
        self.observer.stage_started(Stage.CLOSEOUT, 1)
        document = close_out(release, self.observer.stage_progress)
        release.journal.finish(Stage.CLOSEOUT, State.DONE)
        release.journal.close(decision=document["decision"], exit_code=document["exit_code"])
        self.observer.stage_finished(Stage.CLOSEOUT, State.DONE, document["next_action"])
        return document


def _is_to_be_retried(state: RetryCallState) -> bool:
    error = state.outcome and state.outcome.exception()
    if not isinstance(error, Failure | GateFailed):
        return False
    return state.attempt_number <= _triage(state).retries


def _triage(state: RetryCallState) -> Triage:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, Failure | GateFailed)
    return TRIAGE[error.failure_class]
