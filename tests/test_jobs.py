"""What events and folders tell of jobs: every standing, what is damaged, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from job_folders import T0, claimed, job_ended, job_folder, name_of, submitted

from conductor.chain import Stage, State
from conductor.jobs import (
    Job,
    Standing,
    jobs_of,
    read_jobs,
    total_gpu_hours,
    total_queued_s,
    total_ran_s,
)
from conductor.journal import Journal

NOW = datetime.fromtimestamp(T0, UTC) + timedelta(minutes=15)
SUBMITTED = {
    "at": "2026-03-14T10:00:00.000Z",
    "event": "job_submitted",
    "name": name_of("stages/ptq"),
    "directory": "stages/ptq",
    "stage": "ptq",
    "resources": {},
}
STARTED = {**SUBMITTED, "event": "job_started", "job_id": "17", "node": "n1", "queued_s": 180.0}
NAME, FACTS = job_ended()
ENDED = {"at": "2026-03-14T10:15:00.000Z", "event": NAME, **FACTS}


def only(events: list[Mapping[str, Any]]) -> Job:
    (job,) = jobs_of(events).values()
    return job


@pytest.mark.parametrize(
    ("events", "standing", "number", "queued_s", "ran_s"),
    [
        pytest.param([SUBMITTED], "queued", None, 900.0, None, id="queued"),
        pytest.param(
            [SUBMITTED, {**STARTED, "at": "2026-03-14T10:03:00.000Z"}],
            "running", "17", 180.0, 720.0, id="running",
        ),
        pytest.param([SUBMITTED, STARTED, ENDED], "ended", "17", 180.0, 720.0, id="ended"),
        pytest.param([ENDED], "ended", "17", 180.0, 720.0, id="ended-unseen-before"),
    ],
)  # fmt: skip
def test_how_far_a_job_is(
    events: list[Mapping[str, Any]],
    standing: str,
    number: str | None,
    queued_s: float | None,
    ran_s: float | None,
) -> None:
    job = only(events).so_far(NOW)
    assert (job.standing, job.stage, job.job_id) == (standing, Stage.PTQ, number)
    assert (job.queued_s, job.ran_s) == (queued_s, ran_s)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"name": 5}, id="name"),
        pytest.param({"directory": None}, id="no-directory"),
        pytest.param({"directory": "stages/lunch"}, id="no-such-stage"),
        pytest.param({"directory": "ptq"}, id="no-stage"),
    ],
)
def test_events_that_name_no_job_tell_of_none(changed: dict[str, Any]) -> None:
    assert jobs_of([{**SUBMITTED, **changed}]) == {}


@pytest.mark.parametrize(
    "value", [None, "720", True, -1.0, float("nan"), float("inf"), 10**400, [1], {}]
)
def test_a_figure_that_is_none_is_unknown_and_not_zero(value: Any) -> None:
    job = only([{**ENDED, "ran_s": value}])
    assert job.ran_s is None and job.gpu_hours is None
    assert total_gpu_hours([job, only([ENDED])]) is None


@pytest.mark.parametrize(
    ("facts", "gpu_hours"),
    [
        pytest.param({}, 1.6, id="gpus-of-each-node"),
        pytest.param({"gpus": 0}, 0.0, id="no-gpus"),
        pytest.param({"ran_s": 0.0}, 0.0, id="never-ran"),
        pytest.param({"gpus": None}, None, id="gpus-unknown"),
        pytest.param({"nodes": 1.5}, None, id="nodes-unknown"),
    ],
)
def test_gpu_hours_of_a_job(facts: dict[str, Any], gpu_hours: float | None) -> None:
    assert only([{**ENDED, **facts}]).gpu_hours == gpu_hours


def test_sums() -> None:
    jobs = [only([ENDED]), only([{**ENDED, "queued_s": 20.0}])]
    sums = total_queued_s(jobs), total_ran_s(jobs), total_gpu_hours(jobs)
    assert sums == (200.0, 1440.0, 3.2)
    assert total_gpu_hours([]) == 0.0


FILES: list[Any] = [
    pytest.param({}, "queued", None, None, id="intended"),
    pytest.param({"submitted": submitted()}, "queued", "17", None, id="submitted"),
    pytest.param(
        {"submitted": submitted(), "seen": {"state": "PENDING", "reason": "Priority"}},
        "queued", "17", "Priority", id="seen-in-the-queue",
    ),
    pytest.param(
        {"claim": claimed(), "seen": {"state": "PENDING", "reason": "Priority"}},
        "running", "17", None, id="claimed",
    ),
    pytest.param({"claim": claimed(), "outcome": {"status": "ok"}}, "ended", "17", None, id="done"),
    pytest.param({"ended": {"state": "CANCELLED"}}, "ended", None, None, id="cancelled"),
    pytest.param({"claim": {"job_id": 17, "at": "now"}}, "running", None, None, id="damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "standing", "number", "reason"), FILES)
def test_folders_tell_of_what_no_event_told(
    tmp_path: Path, files: dict[str, Any], standing: str, number: str | None, reason: str | None
) -> None:
    job_folder(tmp_path, "stages/baseline_eval/attempt-2", **files)
    (job,) = read_jobs(tmp_path)
    assert (job.stage, job.directory) == (Stage.BASELINE_EVAL, "stages/baseline_eval/attempt-2")
    assert (job.standing, job.job_id, job.reason) == (standing, number, reason)
    assert job.folder == "stages/baseline_eval/attempt-2/jobs/1"


def test_stamps_tell_of_a_job_whose_end_nobody_saw(tmp_path: Path) -> None:
    outcome = {"status": "ok", "at": T0 + 240.0}
    job_folder(tmp_path, submitted=submitted(), claim=claimed(), outcome=outcome)
    (job,) = read_jobs(tmp_path)
    assert (job.standing, job.queued_s, job.ran_s) == (Standing.ENDED, 180.0, 60.0)
    assert total_gpu_hours([job]) == round(60 / 3600, 6)


@pytest.mark.parametrize(
    ("then", "standing"),
    [
        pytest.param([], "queued", id="being-submitted"),
        pytest.param(["stage_finished"], "ended", id="given-up"),
        pytest.param(["stage_finished", "stage_started"], "queued", id="begun-again"),
    ],
)
def test_a_job_that_slurm_refused_waits_in_no_queue(
    tmp_path: Path, then: list[str], standing: str
) -> None:
    journal = Journal.create(tmp_path / "run", clock=lambda: NOW, model="m", recipe="r")
    journal.start(Stage.PTQ)
    job_folder(journal.run_dir)
    journal.record("job_submitted", **{n: SUBMITTED[n] for n in ("name", "directory", "stage")})
    for each in then:
        if each == "stage_finished":
            journal.finish(Stage.PTQ, State.FAILED, detail="refused")
        else:
            journal.start(Stage.PTQ)
    (job,) = read_jobs(journal.run_dir)
    assert job.standing == standing
    assert (job.so_far(NOW).queued_s is None) is (standing == "ended")


def test_an_intent_that_is_not_whole_is_no_job(tmp_path: Path) -> None:
    folder = job_folder(tmp_path)
    (folder.path / "intent.json").write_text("{")
    assert read_jobs(tmp_path) == []


def test_what_has_ended_is_told_by_events(tmp_path: Path) -> None:
    job_folder(tmp_path, claim=claimed())
    (tmp_path / "events.jsonl").write_text(json.dumps({**ENDED, "elapsed_s": 1.0}) + "\n")
    (job,) = read_jobs(tmp_path)
    assert (job.standing, job.state, job.ran_s) == (Standing.ENDED, "COMPLETED", 720.0)
    assert job.node == "n1", "which nobody saw it start on"
