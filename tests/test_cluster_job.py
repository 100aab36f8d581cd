"""The part of a release that runs inside a job: what it leaves when Slurm ends it."""

from __future__ import annotations

import os
import signal
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
