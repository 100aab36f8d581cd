"""The loop of a release with stages that fail in every way: class, exit code, report."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from conductor import closeout
from conductor.chain import Stage, State
from conductor.compatibility import TABLE
from conductor.config import load_config
from conductor.environments.builder import Environments
from conductor.failure import Failure
from conductor.models import resolve_model
from conductor.probes.lm_eval import EvaluationResults, TaskResult
from conductor.probes.machine import probe_machine
from conductor.release import Conductor
from conductor.release_state import Evaluation, Plan, Release, World
from conductor.stages import STAGE_FUNCTIONS
from conductor.suites import Suite, load_suite
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


def evaluation(suite: Suite) -> Evaluation:
    tasks = {
        name: TaskResult(
            task=name,
            metric=task.metric,
            filter=task.filter,
            score=0.9,
            stderr=0.01,
            expected_samples=500,
            scored_samples=500,
            higher_is_better=True,
            scale=1.0,
            version="1",
            fewshot=0,
        )
        for name, task in suite.tasks.items()
    }
    results = EvaluationResults(
        tasks=tasks, completion_tokens={}, model="m", versions={}, results_file=Path("r")
    )
    return Evaluation(
        settings={},
        conditions={},
        results=results,
        samples={"tasks": {}},
        summary={},
        server=None,
        recalled_from=None,
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a release whose stages pass, but for those given; tracking is answered by a fake."""
    answer = Tracking(status=TrackingStatus.UNAVAILABLE, uri=None, detail="a fake for this test")
    monkeypatch.setattr(closeout, "log_release", lambda *args, **kwargs: answer)

    def run_with(changed: dict[Stage, StageFunction], **options: Any) -> dict[str, Any]:
        machine = probe_machine()
        conductor = Conductor(
            world=World(environments=Environments(tmp_path), environ={}, machine=machine),
            clock=lambda: datetime.now(UTC),
            sleep=lambda seconds: None,
            observer=SilentObserver(),
            stage_functions={s: stage_that_passes(s) for s in STAGE_FUNCTIONS} | changed,
        )
        wanted = {"model": "demo", "recipe": "int8", "overlap": "never", **options}
        config = load_config(None, wanted)
        return conductor.run(config, tmp_path / "run")

    return run_with


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


def test_a_stop_is_written_down_and_passed_on(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run({Stage.DEPLOY: raising(KeyboardInterrupt())})
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "release_stopped" in events.splitlines()[-1]


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
