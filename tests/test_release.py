"""The loop of a release with stages that fail in every way: class, exit code, report."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation

from conductor import closeout
from conductor.chain import Stage, State
from conductor.compatibility import TABLE
from conductor.config import load_config, load_recorded
from conductor.environments.builder import Environments, Status
from conductor.evidence.environment import describe
from conductor.failure import Failure
from conductor.files import write_json
from conductor.journal import Journal
from conductor.looking_back import finished_report
from conductor.models import resolve_model
from conductor.probes.machine import probe_machine
from conductor.release import Conductor
from conductor.release_state import Plan, Release, World
from conductor.stages import STAGE_FUNCTIONS
from conductor.suites import load_suite
from conductor.tracking import Tracking, TrackingStatus
from gates import RECIPES, Check, FailureClass, Verdict

StageFunction = Callable[[Release, Any], dict[str, Verdict]]
GATES = {
    Stage.SETUP: (),
    Stage.PTQ: ("ptq",),
    Stage.DEPLOY: ("canary",),
    Stage.BASELINE_EVAL: ("baseline_run", "external"),
    Stage.CANDIDATE_EVAL: ("candidate_run",),
    Stage.COMPARE: ("conditions", "compare", "verbosity"),
}


class SilentObserver:
    def stage_started(self, stage: Stage, attempt: int) -> None: ...
    def stage_progress(self, done: int, total: int, doing: str) -> None: ...
    def stage_finished(self, stage: Stage, state: State, detail: str) -> None: ...
    def stage_kept(self, stage: Stage) -> None: ...


def verdict(gate: str, failure_class: FailureClass | None = None) -> Verdict:
    check = Check(subject="x", observed=0, limit=0, passed=failure_class is None)
    row = {"drop": 0.0, "drop_fraction": 0.0, "limit": 0.01, "within_threshold": True}
    row |= {"outcome": "pass", "drop_upper": 0.004, "drop_lower": -0.004}
    rows = dict.fromkeys(load_suite("demo").tasks if gate == "compare" else (), row)
    return Verdict(
        gate=gate,
        checks=(check,),
        failure_class=failure_class,
        detail="said the test",
        per_task=rows,
    )


def stage_that_passes(stage: Stage) -> StageFunction:
    def run(release: Release, progress: Any) -> dict[str, Verdict]:
        if stage is Stage.SETUP:
            release.resolved = Plan(
                model=resolve_model("demo"),
                recipe=RECIPES["int8"],
                suite=load_suite("demo"),
                row=TABLE[0],
                quantize_request={"scheme": "W8A8", "calibration": {"dataset": None}},
            )
        if stage in SIDES:
            release.evaluations[SIDES[stage]] = evaluation(release.plan.suite)
        return {gate: verdict(gate) for gate in GATES[stage]}

    return run


SIDES = {Stage.BASELINE_EVAL: "source", Stage.CANDIDATE_EVAL: "candidate"}


class ReadyEnvironments(Environments):
    """Environments that nobody built, and that no stage of these tests uses."""

    def status(self, name: str) -> Status:
        return Status.READY


Conduct = Callable[..., Conductor]


@pytest.fixture
def conduct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conduct:
    """Make a conductor whose stages pass, but for those given; tracking is answered by a fake."""
    answer = Tracking(status=TrackingStatus.UNAVAILABLE, uri=None, detail="a fake for this test")
    monkeypatch.setattr(closeout, "log_release", lambda *args, **kwargs: answer)

    def make(
        changed: dict[Stage, StageFunction], sleep: Callable[[float], None] = lambda seconds: None
    ) -> Conductor:
        machine = probe_machine()
        return Conductor(
            world=World(environments=ReadyEnvironments(tmp_path), environ={}, machine=machine),
            clock=lambda: datetime.now(UTC),
            sleep=sleep,
            observer=SilentObserver(),
            stage_functions={s: stage_that_passes(s) for s in STAGE_FUNCTIONS} | changed,
        )

    return make


@pytest.fixture
def run(conduct: Conduct, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a release whose stages pass, but for those given."""

    def run_with(changed: dict[Stage, StageFunction], **options: Any) -> dict[str, Any]:
        wanted = {"model": "demo", "recipe": "int8", "overlap": "never", **options}
        return conduct(changed).run(load_config(None, wanted), tmp_path / "run")

    return run_with


@pytest.fixture
def resume(conduct: Conduct, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Go on with the release of ``run``."""

    def resume_with(changed: dict[Stage, StageFunction]) -> dict[str, Any]:
        then, now = load_recorded(tmp_path / "run" / "config.resolved.yaml", None, {})
        return conduct(changed).resume(tmp_path / "run", then, now)

    return resume_with


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def raising(error: BaseException, times: int = 99) -> StageFunction:
    left = [error] * times

    def run(release: Release, progress: Any) -> dict[str, Verdict]:
        if left:
            raise left.pop()
        return {gate: verdict(gate) for gate in GATES[Stage.PTQ]}

    return run


def failing(gate: str, failure_class: FailureClass) -> StageFunction:
    return lambda release, progress: {gate: verdict(gate, failure_class)}


def test_when_every_gate_passes_the_release_is_accepted(run: Callable[..., dict[str, Any]]) -> None:
    document = run({})
    assert (document["decision"], document["exit_code"]) == ("ACCEPT", 0), document["reasons"]
    assert [stage["state"] for stage in document["stages"]] == ["done"] * 6


PTQ_ENDINGS: list[Any] = [
    pytest.param(
        raising(Failure(FailureClass.MODEL_UNSUPPORTED, "no")), "INFEASIBLE", 4, 1, id="unsupported"
    ),
    pytest.param(raising(Failure(FailureClass.SYSTEMIC, "no")), None, 5, 1, id="systemic"),
    pytest.param(raising(Failure(FailureClass.USER_CONFIG_ERROR, "no")), None, 2, 1, id="request"),
    pytest.param(
        raising(Failure(FailureClass.INFRA_TRANSIENT, "no")), None, 5, 2, id="transient-that-stays"
    ),
    pytest.param(
        raising(Failure(FailureClass.INFRA_TRANSIENT, "no"), times=1),
        "ACCEPT",
        0,
        2,
        id="transient-once",
    ),
    pytest.param(raising(OSError(28, "No space left on device")), None, 5, 1, id="disk-full"),
    pytest.param(raising(KeyError("lost")), "ANOMALOUS", 3, 1, id="defect-of-ours"),
    pytest.param(
        failing("ptq", FailureClass.SIZE_NOT_REDUCED), "INFEASIBLE", 4, 1, id="gate-says-no"
    ),
    pytest.param(
        failing("ptq", FailureClass.USER_CONFIG_ERROR), "ANOMALOUS", 3, 1, id="our-bad-evidence"
    ),
]


@pytest.mark.parametrize(("ptq", "decision", "exit_code", "attempts"), PTQ_ENDINGS)
def test_how_a_stage_ends_the_release(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    ptq: StageFunction,
    decision: str | None,
    exit_code: int,
    attempts: int,
) -> None:
    document = run({Stage.PTQ: ptq})
    assert (document["decision"], document["exit_code"]) == (decision, exit_code)
    stages = {stage["name"]: stage for stage in document["stages"]}
    assert stages["ptq"]["attempts"] == attempts
    assert stages["deploy"]["state"] == ("done" if decision == "ACCEPT" else "pending")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["exit_code"] == exit_code


def test_a_limited_release_is_not_called_publishable(run: Callable[..., dict[str, Any]]) -> None:
    document = run({}, limit=5)
    assert document["decision"] == "ACCEPT", document["reasons"]
    assert document["publish"] == "needs-human"
    assert "--limit" in document["next_action"]


def test_what_the_command_line_overrides_is_a_deviation(conduct: Conduct, tmp_path: Path) -> None:
    file = tmp_path / "release.yaml"
    file.write_text("model: demo\nrecipe: int8\nseed: 7\noverlap: never\n")
    document = conduct({}).run(load_config(file, {"seed": 8, "recipe": "int8"}), tmp_path / "run")
    told = [each for each in document["deviations"] if "command line" in each]
    assert told == [f"seed is 8 by the command line, 7 in {file}"]


def test_another_environment_on_the_way_is_a_deviation(
    run: Callable[..., dict[str, Any]], resume: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run({Stage.PTQ: raising(KeyboardInterrupt())})
    then = describe(
        World(
            environments=Environments(tmp_path, variables={}),
            environ={"OMP_NUM_THREADS": "3"},
            machine=probe_machine(),
        ),
        [],
        dry_run=False,
    )
    write_json(tmp_path / "run" / "env.json", {**then, "earlier": []})
    document = resume({})
    assert any("env.json has what they were" in each for each in document["deviations"])
    (earlier,) = json.loads((tmp_path / "run" / "env.json").read_text())["earlier"]
    assert earlier["variables"] == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("stage", [Stage.SETUP, Stage.PTQ])
def test_a_release_that_fails_leaves_its_evidence(
    run: Callable[..., dict[str, Any]], tmp_path: Path, stage: Stage
) -> None:
    run({stage: raising(Failure(FailureClass.SYSTEMIC, "no"))})
    for name in ("env.json", "checklist.md", "reproduce.sh", "reproduce/failure.json"):
        assert (tmp_path / "run" / name).is_file()


def test_a_release_that_is_mended_leaves_nothing_to_reproduce(
    run: Callable[..., dict[str, Any]], resume: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run({Stage.PTQ: raising(Failure(FailureClass.SYSTEMIC, "no"))})
    assert resume({})["decision"] == "ACCEPT"
    assert not list((tmp_path / "run").glob("reproduce*"))


def test_a_stop_is_written_down_and_passed_on(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run({Stage.DEPLOY: raising(KeyboardInterrupt())})
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "release_stopped" in events.splitlines()[-1]


def counting(stage: Stage, calls: list[Stage]) -> StageFunction:
    def run(release: Release, progress: Any) -> dict[str, Verdict]:
        if not release.replaying:
            calls.append(stage)
        return stage_that_passes(stage)(release, progress)

    return run


@pytest.mark.parametrize("killed_at", list(STAGE_FUNCTIONS))
def test_a_release_killed_in_any_stage_goes_on_there(
    run: Callable[..., dict[str, Any]], resume: Callable[..., dict[str, Any]], killed_at: Stage
) -> None:
    calls: list[Stage] = []
    counted = {stage: counting(stage, calls) for stage in STAGE_FUNCTIONS}
    with pytest.raises(Killed):
        run(counted | {killed_at: raising(Killed())})
    document = resume(counted)
    assert document["decision"] == "ACCEPT", document["reasons"]
    assert calls == list(STAGE_FUNCTIONS)
    stages = {stage["name"]: stage for stage in document["stages"]}
    assert stages[killed_at]["attempts"] == 1
    assert stages[killed_at]["interruptions"] == 1


def test_a_kill_between_two_attempts_leaves_the_retries_that_there_were(
    conduct: Conduct, resume: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def killing(seconds: float) -> None:
        raise Killed

    broken = {Stage.PTQ: raising(Failure(FailureClass.INFRA_TRANSIENT, "no"))}
    config = load_config(None, {"model": "demo", "recipe": "int8", "overlap": "never"})
    with pytest.raises(Killed):
        conduct(broken, killing).run(config, tmp_path / "run")
    document = resume(broken)
    assert (document["decision"], document["exit_code"]) == (None, 5)
    stages = {stage["name"]: stage for stage in document["stages"]}
    assert (stages["ptq"]["attempts"], stages["ptq"]["state"]) == (2, "failed")
    assert len(document["reasons"]) == 1


def test_an_aborted_release_is_tried_again_and_its_failure_forgotten(
    run: Callable[..., dict[str, Any]], resume: Callable[..., dict[str, Any]]
) -> None:
    full = Failure(FailureClass.SYSTEMIC, "the disk is full")
    assert run({Stage.DEPLOY: raising(full)})["exit_code"] == 5
    document = resume({})
    assert (document["decision"], document["exit_code"]) == ("ACCEPT", 0), document["reasons"]
    assert any("the disk is full" in each for each in document["deviations"])


@pytest.mark.parametrize("killed_at", range(1, 6))
def test_a_kill_while_a_change_is_accepted_mixes_nothing(
    run: Callable[..., dict[str, Any]],
    conduct: Conduct,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    def accept() -> dict[str, Any]:
        recorded = tmp_path / "run" / "config.resolved.yaml"
        then, now = load_recorded(recorded, None, {"seed": 1})
        return conduct({}).resume(tmp_path / "run", then, now, accept_drift=True)

    left = [killed_at]
    invalidate = Journal.invalidate

    def dying(journal: Journal, stage: Stage, reason: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        invalidate(journal, stage, reason)

    run({Stage.COMPARE: raising(Failure(FailureClass.SYSTEMIC, "no"))})
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "invalidate", dying)
        with pytest.raises(Killed):
            accept()
    document = accept()
    assert (document["decision"], document["seed"]) == ("ACCEPT", 1)
    attempts = {stage["name"]: stage["attempts"] for stage in document["stages"]}
    assert attempts == dict.fromkeys(STAGE_FUNCTIONS, 2), attempts


def test_a_verdict_that_ended_the_chain_still_does_after_a_kill(
    run: Callable[..., dict[str, Any]],
    resume: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    too_large = {Stage.PTQ: failing("ptq", FailureClass.SIZE_NOT_REDUCED)}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("conductor.release.close_out", lambda *_: (_ for _ in ()).throw(Killed()))
        run(too_large)
    document = resume(too_large)
    assert (document["decision"], document["exit_code"]) == ("INFEASIBLE", 4)
    assert [stage["attempts"] for stage in document["stages"]][:2] == [1, 1]


WAITS: list[Any] = [
    pytest.param({}, 1, id="the-table"),
    pytest.param({"retry.limit": 0}, 0, id="none"),
    pytest.param({"retry.limit": 4}, 4, id="more"),
]


@pytest.mark.parametrize(("options", "retries"), WAITS)
def test_retries_wait_longer_each_time_and_stay_within_their_limits(
    conduct: Conduct, tmp_path: Path, options: dict[str, Any], retries: int
) -> None:
    waits: list[float] = []
    broken = {Stage.PTQ: raising(Failure(FailureClass.INFRA_TRANSIENT, "no"))}
    limits = {"retry.first_wait_s": 10.0, "retry.longest_wait_s": 50.0}
    wanted = {"model": "demo", "recipe": "int8", "overlap": "never", **limits, **options}
    conduct(broken, waits.append).run(load_config(None, wanted), tmp_path / "run")
    assert len(waits) == retries
    for number, wait in enumerate(waits):
        assert min(10 * 2**number, 50) <= wait <= min(10 * 2**number + 10, 50)


def test_lack_of_memory_leaves_one_server_at_a_time(run: Callable[..., dict[str, Any]]) -> None:
    narrowed: list[bool] = []

    class Session:
        def narrow(self) -> None:
            narrowed.append(True)

        def close(self) -> None: ...

    def deploy(release: Release, progress: Any) -> dict[str, Verdict]:
        if not narrowed:
            release.session = Session()  # type: ignore[assignment]
            raise Failure(FailureClass.OUT_OF_MEMORY, "no room")
        return {"canary": verdict("canary")}

    assert run({Stage.DEPLOY: deploy})["decision"] == "ACCEPT"
    assert narrowed == [True]


def test_a_report_that_cannot_be_written_costs_an_accept_and_no_other_decision(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(closeout, "write_report", fail)
    document = run({Stage.PTQ: failing("ptq", FailureClass.SIZE_NOT_REDUCED)})
    assert document["decision"] == "INFEASIBLE"
    shutil.rmtree(tmp_path / "run")
    document = run({})
    assert (document["decision"], document["exit_code"]) == (None, 5)
    assert any("No space left" in deviation for deviation in document["deviations"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"limit": 40}, "without --limit", id="limit"),
        pytest.param(
            {"until_decided": True, "max_samples": 300}, "without --max-samples", id="most"
        ),
        pytest.param({}, "Take a suite", id="everything-was-asked"),
    ],
)
def test_what_to_do_next_fits_why_the_evidence_is_thin(
    run: Callable[..., dict[str, Any]], options: dict[str, Any], words: str
) -> None:
    compare = failing("compare", FailureClass.INSUFFICIENT_EVIDENCE)
    document = run({Stage.COMPARE: compare}, **options)
    assert document["failure_class"] == "INSUFFICIENT_EVIDENCE"
    assert words in document["next_action"]


def test_how_much_was_asked_in_batches_is_said_once_anything_was(
    run: Callable[..., dict[str, Any]],
) -> None:
    until = {"until_decided": True, "max_samples": 300, "max_repeats": 2}
    refused = Failure(FailureClass.USER_CONFIG_ERROR, "no")
    assert not run({Stage.SETUP: raising(refused)}, **until)["deviations"]


@pytest.fixture
def change_seed(conduct: Conduct, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Go on with the release of ``run`` under another seed."""

    def resume_with(
        changed: dict[Stage, StageFunction], seed: int, *, accept: bool
    ) -> dict[str, Any]:
        recorded = tmp_path / "run" / "config.resolved.yaml"
        then, now = load_recorded(recorded, None, {"seed": seed})
        return conduct(changed).resume(tmp_path / "run", then, now, accept_drift=accept)

    return resume_with


def test_a_decision_that_is_reconsidered_does_not_outlive_a_kill(
    run: Callable[..., dict[str, Any]],
    resume: Callable[..., dict[str, Any]],
    change_seed: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    assert run({})["decision"] == "ACCEPT"
    with pytest.raises(Killed):
        change_seed({Stage.PTQ: raising(Killed())}, 1, accept=True)
    assert finished_report(tmp_path / "run", lambda: datetime.now(UTC)) is None
    document = resume({Stage.PTQ: failing("ptq", FailureClass.SIZE_NOT_REDUCED)})
    assert (document["decision"], document["seed"]) == ("INFEASIBLE", 1)


def test_a_failure_of_the_world_is_tried_again_though_it_was_never_told(
    run: Callable[..., dict[str, Any]],
    resume: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = Failure(FailureClass.SYSTEMIC, "the disk is full")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("conductor.release.close_out", lambda *_: (_ for _ in ()).throw(Killed()))
        run({Stage.COMPARE: raising(full)})
    assert resume({})["decision"] == "ACCEPT"
