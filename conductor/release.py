"""One release from request to decision: next stage, worker, evidence, gate, journal.

The loop never starts a stage after a failed gate, tries a stage again only when the triage table
says so, ends every process it started, and always closes out with a report.

A release that was stopped or killed is resumed by replay: the journal says what came to its end,
the digests say whether its files are still what they were, and the stage functions read them again
without starting anything. What was cut short goes on where it was.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from tenacity import RetryCallState, Retrying, wait_exponential_jitter

from conductor.ahead import Ahead, is_worthwhile
from conductor.chain import EVERY_STEP, STAGES, Stage, State, Steps, next_stage
from conductor.closeout import close_out
from conductor.config import Config
from conductor.digests import Digests
from conductor.evidence.gate_inputs import on_our_evidence
from conductor.evidence.seal import SEALED, seal
from conductor.executors.processes import end_leftovers
from conductor.failure import Failure
from conductor.files import write_json, write_text
from conductor.history import StageRecord
from conductor.inputs import Change, Scalar, differences
from conductor.journal import Clock, Journal
from conductor.looking_back import (
    damaged_outputs,
    look_back,
    say_drift,
    whole_report,
)
from conductor.models import check_disk
from conductor.noise_floor import say_noise_floor
from conductor.publishing.rejected import put_back
from conductor.release_state import Release
from conductor.report import read_report, report_digest
from conductor.run_lock import hold
from conductor.stage_files import forget_requests, outputs_of
from conductor.stages import (
    DISK_RESERVE_BYTES,
    STAGE_FUNCTIONS,
    StageFunction,
    check_machine,
    evaluate_source_ahead,
    look_around,
)
from conductor.tools import LocalTools, NothingStarts, Tools
from conductor.world import World
from gates import TRIAGE, Action, FailureClass, Triage, Verdict

CONFIG = "config.resolved.yaml"
ABORTING = (Action.ABORT_SYSTEMIC, Action.REFUSE_INPUT)
"""What leaves no decision: the world or the request may be mended."""

WITH_TOOLS = (Stage.PTQ, Stage.DEPLOY, Stage.BASELINE_EVAL, Stage.CANDIDATE_EVAL)
"""The stages that need the machine; the others read files and count."""


class Observer(Protocol):
    """Who is told how the release gets on."""

    def stage_started(self, stage: Stage, attempt: int) -> None:
        """An attempt at ``stage`` begins, or goes on."""

    def stage_progress(self, done: int, total: int, doing: str) -> None:
        """The running stage is ``done`` of ``total`` through ``doing``; total 0 is unknown."""

    def stage_finished(self, stage: Stage, state: State, detail: str) -> None:
        """The attempt ended; ``detail`` says how, and may go on over many lines."""

    def stage_kept(self, stage: Stage) -> None:
        """``stage`` came to its end before, and is not run again."""


class GateFailed(Exception):
    """A gate said no."""

    def __init__(self, gate: str, verdict: Verdict) -> None:
        """Keep what the triage table and the journal need."""
        super().__init__(f"{gate}: {verdict.detail}")
        self.gate = gate
        self.failure_class = verdict.failure_class or FailureClass.UNKNOWN


class StoppedAsAsked(Exception):
    """The last step that was asked for is done, and the release is not."""

    def __init__(self, stage: Stage) -> None:
        """Keep which one it was."""
        super().__init__(f"stopped after {stage}, as asked")


@dataclass(frozen=True, kw_only=True)
class Conductor:
    """What a release needs from the world: where things are, what time it is, who watches."""

    world: World
    clock: Clock
    sleep: Callable[[float], None]
    observer: Observer
    stage_functions: Mapping[Stage, StageFunction] = field(default_factory=lambda: STAGE_FUNCTIONS)
    open_tools: Callable[[World, Callable[..., None]], Tools] = LocalTools
    digests: Digests | None = None
    """Shared with other releases of this process; without it a release has its own."""

    def run(self, config: Config, run_dir: Path, steps: Steps = EVERY_STEP) -> dict[str, Any]:
        """Run a whole release, or its first steps, and return its report document.

        Raises:
            OSError: the run directory cannot be made or written at the start.
            StoppedAsAsked: the last of ``steps`` is done.
            KeyboardInterrupt: stopped on request; everything that was started has ended.
        """
        journal = Journal.create(
            run_dir,
            clock=self.clock,
            model=config.model,
            recipe=config.recipe,
            files={CONFIG: _yaml(config)},
        )
        with hold(run_dir):
            return self._carry_on(self._release(config, journal), steps)

    def resume(
        self,
        run_dir: Path,
        then: Config,
        now: Config,
        steps: Steps = EVERY_STEP,
        *,
        accept_drift: bool = False,
    ) -> dict[str, Any]:
        """Go on with a release that was stopped, killed or aborted; return its report document.

        Args:
            run_dir: the directory of the release.
            then: the configuration it began with, as ``config.load_recorded`` has it.
            now: the configuration it is to go on with.
            steps: what to do again, and where to stop.
            accept_drift: go on although what it depends on has changed.

        Raises:
            Failure: USER_CONFIG_ERROR when somebody else works on it, when what it depends on has
                changed, or when steps to be skipped have no valid outputs.
            OSError, StoppedAsAsked, KeyboardInterrupt: as :meth:`run`.
        """
        with hold(run_dir):
            ended = end_leftovers(run_dir)
            journal = Journal.open(run_dir, clock=self.clock)
            release = self._release(now, journal)
            release.remarks += [f"left by a conductor that died: {each}" for each in ended]
            release.resolved, release.inputs, changes = look_back(
                run_dir, journal.history, then, now, self.world, release.digests
            )
            if changes and not accept_drift:
                raise Failure(FailureClass.USER_CONFIG_ERROR, say_drift(changes, journal))
            whole = whole_report(run_dir, journal.history)
            if whole and not changes and steps.first is None:
                return whole
            if any(journal.states[stage] is not State.DONE for stage in WITH_TOOLS):
                check_machine(now, release.resolved.row, self.world)
            self._take_up(release, changes, steps)
            return self._carry_on(release, steps)

    def _release(self, config: Config, journal: Journal) -> Release:
        return Release(
            config=config,
            journal=journal,
            world=self.world,
            tools=self.open_tools(self.world, journal.record),
            digests=self.digests or Digests(config.workspace / "cache" / "digests.json"),
        )

    def _take_up(self, release: Release, changes: Sequence[Change], steps: Steps) -> None:
        """Bring the journal to where the release goes on, and the release to what it knew."""
        journal = release.journal
        put_back(journal.run_dir)
        if steps.first is not None:
            self._check_skipped(release, steps.first, changes)
        journal.resume()
        if changes:
            journal.record("drift_accepted", changes=[asdict(change) for change in changes])
        decided = journal.outcome.get("decision") is not None
        anew = steps.first is not None or (decided and changes)
        if anew or (journal.outcome and not decided) or _was_aborting(release):
            journal.reopen("resumed")
        elif journal.stages[Stage.CLOSEOUT].state is State.DONE:
            journal.invalidate(Stage.CLOSEOUT, "it was cut short, or its report is not whole")
        void = [stage for stage in STAGES if any(stage in change.invalidates for change in changes)]
        if void:
            fields = [change.field for change in changes if void[0] in change.invalidates]
            self._invalidate(release, void[0], f"changed: {', '.join(fields)}")
        if changes and journal.stages[Stage.SETUP].state is not State.PENDING:
            journal.invalidate(Stage.SETUP, "what it depends on changed")
        # After what is void was taken back: what setup and this file say is how a change is known.
        write_text(journal.run_dir / CONFIG, _yaml(release.config))
        if steps.first is not None:
            self._invalidate(release, steps.first, f"asked for with --from-step {steps.first}")
        self._check_outputs(release)
        self._check_order(release)
        if journal.stages[Stage.SETUP].state is State.DONE:
            look_around(release)
            self.observer.stage_kept(Stage.SETUP)

    def _invalidate(self, release: Release, first: Stage, reason: str) -> None:
        """Take back a stage and all after it; what was asked for them is not answered again.

        The last goes first, and its answers before it: a kill in between leaves no stage done
        whose ground is gone, and none to be done again with the answers of another checkpoint.
        """
        journal = release.journal
        for stage in reversed(STAGES[STAGES.index(first) :]):
            if journal.stages[stage].state is not State.PENDING:
                forget_requests(journal.run_dir, stage)
                journal.invalidate(stage, reason)

    def _check_skipped(self, release: Release, first: Stage, changes: Sequence[Change]) -> None:
        """Refuse to skip a stage that is not done, or whose outputs no longer hold."""
        journal = release.journal
        for stage in STAGES[: STAGES.index(first)]:
            record = journal.stages[stage]
            problems = [
                f"{change.field} has changed" for change in changes if stage in change.invalidates
            ]
            problems += release.digests.verify(journal.run_dir, record.outputs or {})
            if record.state is not State.DONE:
                problems.append(f"it is {record.state}")
            if problems:
                why = "; ".join(problems)
                raise Failure(
                    FailureClass.USER_CONFIG_ERROR,
                    f"--from-step {first}: {stage} would be skipped and has no valid outputs "
                    f"({why}); begin with an earlier step",
                )

    def _check_outputs(self, release: Release) -> None:
        """Take back the first stage whose files are not what they were, and all after it."""
        journal = release.journal
        damaged = damaged_outputs(journal.run_dir, journal.history, release.digests)
        for stage, problems in damaged.items():
            self._invalidate(release, stage, "; ".join(problems))
            return

    def _check_order(self, release: Release) -> None:
        """Take back what was done after a stage that is not done: events may be lost or edited.

        Setup alone may be repeated under what was done after it, and the source asked ahead.
        """
        states = release.journal.states
        for number, stage in enumerate(STAGES[1:-1], start=1):
            if states[stage] is not State.DONE:
                after = STAGES[number + 1 : -1]
                begun = {each: states[each] for each in after if states[each] is not State.PENDING}
                if begun not in ({}, {Stage.BASELINE_EVAL: State.RUNNING}):
                    self._invalidate(release, after[0], f"{stage} before it is not done")
                return

    def _replay(self, release: Release) -> None:
        """Let the stages that came to their end read what they left, and their gates judge it."""
        journal, tools = release.journal, release.tools
        release.tools, release.replaying = NothingStarts(), True
        try:
            for stage in STAGES[:-1]:
                record = journal.stages[stage]
                if record.state in {State.PENDING, State.RUNNING}:
                    return
                if record.state is State.FAILED and not record.gate:
                    if _has_retries(release, stage):
                        return
                    failure = Failure(_failure_class(record), record.detail)
                    release.failures.append((stage, failure))
                    return
                if stage is Stage.SETUP:
                    continue
                try:
                    verdicts = self.stage_functions[stage](release, lambda *_: None)
                except Exception as error:
                    self._invalidate(release, stage, f"its files cannot be read again: {error}")
                    return
                self._keep_replayed(release, stage, verdicts)
        finally:
            release.tools, release.replaying = tools, False

    def _keep_replayed(
        self, release: Release, stage: Stage, verdicts: Mapping[str, Verdict]
    ) -> None:
        """File what the gates say of recorded files; another day0 may judge otherwise."""
        before = release.journal.stages[stage]
        try:
            self._keep(release, verdicts)
        except GateFailed as error:
            if before.state is State.DONE:
                self._finish_failed(release, stage, error)
            return
        if before.state is State.FAILED:
            self._finish_done(release, stage, "judged again")
        self.observer.stage_kept(stage)

    def _carry_on(self, release: Release, steps: Steps) -> dict[str, Any]:
        try:
            self._run_stages(release, steps)
            if steps.last and next_stage(release.journal.states, steps.last) is None:
                release.journal.record("release_stopped", stage=steps.last)
                raise StoppedAsAsked(steps.last)
            return self._close_out(release)
        except KeyboardInterrupt:
            with suppress(OSError):
                release.journal.record("release_stopped", stage=None)
            raise

    def _run_stages(self, release: Release, steps: Steps) -> None:
        if self._next(release, steps) is Stage.SETUP:
            self._run_stage(release, Stage.SETUP)
        if not release.failures:
            self._replay(release)
        try:
            while (stage := self._next(release, steps)) not in (None, Stage.CLOSEOUT):
                if stage is Stage.PTQ:
                    self._start_ahead(release, steps)
                self._run_stage(release, stage)
        except KeyboardInterrupt:
            if release.ahead:
                release.ahead.cancel(because=KeyboardInterrupt)
            raise
        finally:
            if release.ahead:
                release.ahead.cancel()
            if release.session:
                release.session.close()

    def _next(self, release: Release, steps: Steps) -> Stage | None:
        """Return the stage to run; a failed one whose retries are not used up goes first."""
        for stage, record in release.journal.stages.items():
            if record.state is State.FAILED and _has_retries(release, stage):
                return stage
        return next_stage(release.journal.states, steps.last)

    def _start_ahead(self, release: Release, steps: Steps) -> None:
        """Evaluate the source beside PTQ where there is room, into its stage's directory."""
        stage = Stage.BASELINE_EVAL
        wanted = steps.last is None or STAGES.index(steps.last) >= STAGES.index(stage)
        if not wanted or not is_worthwhile(release.config, release.open_engine(), self.world):
            return
        self._begin(release, stage)
        where = release.journal.attempt_dir(stage)
        release.ahead = Ahead(
            lambda progress, still_wanted: evaluate_source_ahead(
                release, where, progress, still_wanted
            )
        )

    def _run_stage(self, release: Release, stage: Stage) -> None:
        retry = release.config.retry
        backoff = wait_exponential_jitter(
            multiplier=retry.first_wait_s, max=retry.longest_wait_s, jitter=retry.first_wait_s
        )
        attempts = Retrying(
            retry=lambda state: _is_to_be_retried(state, release, stage),
            stop=lambda state: False,
            wait=lambda state: max(_triage(state).wait_s, backoff(state)),
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
            self._begin(release, stage)
            self.observer.stage_started(stage, journal.stages[stage].attempts)
            check_disk(journal.run_dir, DISK_RESERVE_BYTES, "the workspace")
            stage_dir = journal.attempt_dir(stage)
            # A stage with a worker has both files from its worker.
            if not (stage_dir / "request.json").exists():
                write_json(stage_dir / "request.json", _request_document(release, stage))
            verdicts = self.stage_functions[stage](release, self.observer.stage_progress)
            if not (stage_dir / "result.json").exists():
                write_json(stage_dir / "result.json", _result_document(release, verdicts))
            self._keep(release, verdicts)
            found = [f"{gate}: {verdict.detail}" for gate, verdict in verdicts.items()]
            self._finish_done(release, stage, "; ".join([*found, *_remarks(release, stage)]))
        except Exception as error:
            failure = _classified(error, journal.run_dir)
            self._finish_failed(release, stage, failure)
            if failure.failure_class is FailureClass.OUT_OF_MEMORY:
                _free_memory(release)
            if failure is error:
                raise
            raise failure from error

    def _begin(self, release: Release, stage: Stage) -> None:
        """Record that a stage begins, or that one goes on which was cut short."""
        journal = release.journal
        if journal.stages[stage].state is not State.RUNNING:
            journal.start(stage, inputs=_inputs_of(stage, release.inputs))
        elif release.ahead is None or stage is not Stage.BASELINE_EVAL:
            journal.go_on(stage)

    def _keep(self, release: Release, verdicts: Mapping[str, Verdict]) -> None:
        for gate, verdict in verdicts.items():
            release.verdicts[gate] = on_our_evidence(verdict)
            path = release.journal.run_dir / "verdicts" / f"{gate}.json"
            write_json(path, release.verdicts[gate].document())
        for gate in verdicts:
            if not release.verdicts[gate].passed:
                raise GateFailed(gate, release.verdicts[gate])

    def _finish_done(self, release: Release, stage: Stage, detail: str) -> None:
        journal = release.journal
        outputs = outputs_of(journal.run_dir, stage, journal.attempt_dir(stage), release.digests)
        journal.finish(stage, State.DONE, outputs=outputs, detail=detail)
        self.observer.stage_finished(stage, State.DONE, detail)

    def _finish_failed(self, release: Release, stage: Stage, failure: Failure | GateFailed) -> None:
        gate = failure.gate if isinstance(failure, GateFailed) else None
        # A full disk must not cost the decision: the state is kept in memory in any case.
        with suppress(OSError):
            release.journal.finish(
                stage,
                State.FAILED,
                detail=str(failure),
                failure_class=failure.failure_class,
                gate=gate,
            )
        self.observer.stage_finished(stage, State.FAILED, str(failure))

    def _close_out(self, release: Release) -> dict[str, Any]:
        journal = release.journal
        if journal.stages[Stage.BASELINE_EVAL].state is State.RUNNING:
            with suppress(OSError):  # it ran beside a stage that failed
                journal.invalidate(Stage.BASELINE_EVAL, "its turn never came")
        with suppress(OSError):
            self._begin(release, Stage.CLOSEOUT)
        self.observer.stage_started(Stage.CLOSEOUT, 1)
        document = close_out(release, self.observer.stage_progress)
        with suppress(OSError):
            journal.finish(Stage.CLOSEOUT, State.DONE, detail=document["next_action"])
            journal.record(SEALED, sha256=seal(journal.run_dir, release.digests.file))
            journal.close(
                decision=document["decision"],
                exit_code=document["exit_code"],
                report=report_digest(read_report(journal.run_dir)),
            )
        self.observer.stage_finished(Stage.CLOSEOUT, State.DONE, document["next_action"])
        return document


def _free_memory(release: Release) -> None:
    """Do one thing at a time from now on; jobs of a cluster share no memory."""
    if release.ahead and release.world.cluster is None:
        release.ahead.cancel()
        release.ahead = None
    if release.session:
        release.session.narrow()


def _inputs_of(stage: Stage, inputs: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the fields whose change would make a stage void."""
    all_fields = differences(inputs, {})
    return {each.field: each.was for each in all_fields if stage in each.invalidates}


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


def _has_retries(release: Release, stage: Stage) -> bool:
    """True when the triage table lets a failed stage be tried again."""
    record = release.journal.stages[stage]
    triage = TRIAGE[_failure_class(record)]
    limit = release.config.retry.limit
    allowed = triage.retries if limit is None or not triage.retries else limit
    return record.failures <= allowed and allowed > 0


def _was_aborting(release: Release) -> bool:
    """True when a stage failed for good because of the world, whether or not that was told."""
    return any(
        record.state is State.FAILED
        and not _has_retries(release, stage)
        and TRIAGE[_failure_class(record)].after_retries in ABORTING
        for stage, record in release.journal.stages.items()
    )


def _failure_class(record: StageRecord) -> FailureClass:
    """Return why a stage failed; a word that the table does not know tells nothing."""
    names = {str(each): each for each in FailureClass}
    return names.get(record.failure_class or "", FailureClass.UNKNOWN)


def _is_to_be_retried(state: RetryCallState, release: Release, stage: Stage) -> bool:
    error = state.outcome and state.outcome.exception()
    return isinstance(error, Failure | GateFailed) and _has_retries(release, stage)


def _triage(state: RetryCallState) -> Triage:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, Failure | GateFailed)
    return TRIAGE[error.failure_class]


def _yaml(config: Config) -> str:
    text: str = yaml.safe_dump(config.document(), sort_keys=False)
    return text
