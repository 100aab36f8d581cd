"""The part of a release that runs inside a job: what it leaves when Slurm ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conductor.cluster import job
from conductor.executors.processes import JOB
from conductor.executors.slurm.folders import JobFolder

OK = {"status": "ok", "answer": 42}
FAILED = {"status": "failed", "failure_class": "INFRA_TRANSIENT", "message": "no", "stalled": False}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobFolder]:
    """The folder of job 7, in whose process we are."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv(JOB, "")
    monkeypatch.setattr(job, "_end_when_given_up", lambda folder: None)
    before = signal.getsignal(signal.SIGTERM)
    yield JobFolder(tmp_path)
    signal.signal(signal.SIGTERM, before)


def told_to_end(*_: Any) -> dict[str, Any]:
    """Fail as a task does whose worker heard SIGTERM as well, a moment before."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    except SystemExit:
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the end
    return FAILED


@pytest.mark.parametrize(
    ("work", "status"),
    [
        pytest.param(lambda *_: OK, "ok", id="done"),
        pytest.param(lambda *_: FAILED, "failed", id="failed"),
        pytest.param(lambda *_: {**told_to_end(), **OK}, "ok", id="done-when-told-to-end"),
    ],
)
def test_a_task_that_came_to_its_end_leaves_an_outcome(
    folder: JobFolder,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[..., dict[str, Any]],
    status: str,
) -> None:
    monkeypatch.setattr(job, "_work", work)
    job.main(str(folder.path))
    outcome = folder.read("outcome")
    assert outcome is not None and outcome["status"] == status


def test_a_job_that_slurm_ends_leaves_none(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_work", told_to_end)
    with pytest.raises(SystemExit) as ended:
        job.main(str(folder.path))
    assert ended.value.code == 143
    assert folder.read("claim") is not None
    assert folder.read("outcome") is None


STAND_IN_FOR_A_LONG_TASK = """
import sys, time
from conductor.cluster import job
job.LOOK_S = 0.1
job._work = lambda *_: time.sleep(60)
job.main(sys.argv[1])
"""


def test_a_job_that_was_written_off_ends_by_itself(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    started = subprocess.Popen(
        [sys.executable, "-c", STAND_IN_FOR_A_LONG_TASK, str(tmp_path)],
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"},
    )
    try:
        while folder.read("claim") is None:
            time.sleep(0.05)
        folder.write("ended", {"state": "NODE_FAIL", "reason": ""})
        assert started.wait(30) == job.ENDED
    finally:
        started.kill()
    assert folder.read("outcome") is None
