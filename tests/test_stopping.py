"""Ending a conductor and cancelling its jobs: only ours, and nothing taken for gone that is not."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from job_folders import T0, claimed, job_folder, row, submitted
from typer.testing import CliRunner

from conductor import stopping
from conductor.cli import app
from conductor.event_log import parse, read_log
from conductor.executors.slurm.commands import Refused, Row, Unreachable
from conductor.failure import Failure
from conductor.journal import Journal
from conductor.run_lock import HOLDER, hold
from conductor.run_status import status_document
from conductor.stopping import stop_run
from gates import FailureClass

NOW = datetime.fromtimestamp(T0 + 900.0, UTC)
CONDUCTOR = """
import signal, sys, time
from pathlib import Path
from conductor.run_lock import hold
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    while len(asked) < int(sys.argv[2]):
        time.sleep(0.01)
"""


class QueueOnPaper:
    """A queue that shows what is written here, and forgets jobs a few looks after a cancel."""

    def __init__(self, *rows: Row, looks: int = 1, says: Exception | None = None) -> None:
        self.rows = list(rows)
        self.looks, self.says = looks, says
        self.cancelled: list[str] = []

    def queue(self) -> list[Row]:
        if isinstance(self.says, Unreachable):
            raise self.says
        if self.cancelled:
            self.looks -= 1
        return [each for each in self.rows if self.looks >= 0 or each.job_id not in self.cancelled]

    def cancel(self, job_ids: Collection[str]) -> None:
        if self.says:
            raise self.says
        self.cancelled += job_ids


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "demo-int8-1"
    Journal.create(path, clock=lambda: NOW, model="demo", recipe="int8")
    return path


def stop(run_dir: Path, slurm: Any = None, **others: Any) -> stopping.Halted:
    slurm = slurm or QueueOnPaper(says=Unreachable("nobody should ask"))
    timing = {"clock": lambda: NOW, "sleep": lambda _: None, "graces_s": (0, 20, 20)}
    return stop_run(run_dir, slurm=slurm, **timing | others)


@contextmanager
def conductor(run_dir: Path, interrupts: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run until it was interrupted so often."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONDUCTOR, str(run_dir), str(interrupts)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [parse(line) for line in read_log(run_dir).sound]


def test_nothing_to_stop(run_dir: Path) -> None:
    halted = stop(run_dir)
    assert (halted.conductor, halted.jobs) == (None, {})
    assert halted.words.startswith("nothing to stop")
    assert [each["event"] for each in events(run_dir)] == ["release_started"]


@pytest.mark.parametrize("interrupts", [pytest.param(1, id="at-once"), pytest.param(2, id="twice")])
def test_a_conductor_is_interrupted_until_it_ends(run_dir: Path, interrupts: int) -> None:
    with conductor(run_dir, interrupts) as process:
        halted = stop(run_dir, graces_s=(0, 1, 20))
        assert process.wait(20) == 0
    assert halted.conductor is not None and halted.conductor.pid == process.pid
    assert f"ended process {process.pid}; resume with: day0 resume {run_dir}" == halted.words


def test_a_conductor_that_does_not_end_is_named(run_dir: Path) -> None:
    with conductor(run_dir, 99) as process, pytest.raises(Failure) as caught:
        stop(run_dir, graces_s=(0, 0.2, 0.2))
    assert caught.value.failure_class is FailureClass.SYSTEMIC
    assert f"kill -KILL {process.pid}" in caught.value.message


def test_a_conductor_on_another_host_is_left_alone(run_dir: Path) -> None:
    with conductor(run_dir) as process:
        record = json.loads((run_dir / HOLDER).read_text())
        (run_dir / HOLDER).write_text(json.dumps(record | {"host": "login2"}))
        with pytest.raises(Failure, match="log in to login2") as caught:
            stop(run_dir)
        assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
        assert process.poll() is None


def test_a_fleet_with_one_release_in_progress_is_left_alone(run_dir: Path) -> None:
    fleet = run_dir.parent.parent / "fleets" / "week"
    fleet.mkdir(parents=True)
    with conductor(run_dir) as process:
        (fleet / HOLDER).write_bytes((run_dir / HOLDER).read_bytes())
        with pytest.raises(Failure, match=r"1 more \(fleet week, .*kill -INT") as caught:
            stop(run_dir)
        assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
        assert process.poll() is None


def test_a_conductor_of_several_releases_is_left_alone(run_dir: Path) -> None:
    other = run_dir.with_name("demo-fp8-1")
    other.mkdir()
    with conductor(run_dir) as process:
        (other / HOLDER).write_bytes((run_dir / HOLDER).read_bytes())
        with pytest.raises(Failure, match=r"1 more \(demo-fp8-1"):
            stop(run_dir)
        assert process.poll() is None


def test_another_process_under_the_same_number_is_left_alone(run_dir: Path) -> None:
    with conductor(run_dir) as process:
        record = json.loads((run_dir / HOLDER).read_text())
        changed = record | {"start_ticks": record["start_ticks"] - 1}
        (run_dir / HOLDER).write_text(json.dumps(changed))
        with pytest.raises(Failure, match="has not said who it is"):
            stop(run_dir, graces_s=(0, 0.1, 0.1))
        assert process.poll() is None


def test_jobs_that_are_alive_are_cancelled_and_written_down(run_dir: Path) -> None:
    running = job_folder(run_dir, "stages/ptq", submitted=submitted(), claim=claimed())
    waiting = job_folder(run_dir, "stages/baseline_eval", submitted=submitted("18"))
    queue = QueueOnPaper(
        row(running), row(waiting, "18", "PENDING", started_at=None, reason="Priority")
    )
    halted = stop(run_dir, queue)
    assert queue.cancelled == ["17", "18"]
    assert halted.jobs == {"17": running.name, "18": waiting.name}
    assert "cancelled jobs 17, 18" in halted.words
    times = {"state": "CANCELLED", "reason": None, "exit_code": None, "by": "day0 stop"}
    assert running.read("ended") == {**times, "queued_s": 180.0, "ran_s": 720.0, "at": T0 + 900.0}
    assert waiting.read("ended") == {**times, "queued_s": 900.0, "ran_s": 0.0, "at": T0 + 900.0}
    recorded = events(run_dir)[1:]
    assert [each["event"] for each in recorded] == ["job_ended", "job_ended", "jobs_cancelled"]
    assert recorded[0]["directory"] == "stages/ptq" and recorded[0]["gpus"] == 1
    assert recorded[2]["job_ids"] == ["17", "18"]
    assert [each["standing"] for each in status_document(run_dir)["jobs"]] == ["ended", "ended"]


OTHERS: list[Any] = [
    pytest.param({"outcome": {"status": "ok"}}, "RUNNING", id="has-its-outcome"),
    pytest.param({"ended": {"state": "TIMEOUT"}}, "RUNNING", id="has-its-end"),
    pytest.param({"submitted": submitted()}, "NODE_FAIL", id="has-ended-in-slurm"),
    pytest.param({"submitted": submitted()}, None, id="is-nowhere"),
]


@pytest.mark.parametrize(("files", "state"), OTHERS)
def test_what_is_not_alive_is_left_to_whoever_resumes(
    run_dir: Path, files: dict[str, Any], state: str | None
) -> None:
    folder = job_folder(run_dir, **files)
    queue = QueueOnPaper(*([row(folder, state=state)] if state else []))
    assert stop(run_dir, queue).jobs == {}
    assert queue.cancelled == [] and folder.read("ended") == files.get("ended")


def test_jobs_of_others_are_left_alone(run_dir: Path, tmp_path: Path) -> None:
    ours, theirs = job_folder(run_dir, number=2), job_folder(tmp_path / "other", number=1)
    queue = QueueOnPaper(row(theirs, "16"), row(ours, "17"))
    assert stop(run_dir, queue).jobs == {"17": ours.name}
    assert queue.cancelled == ["17"]


def test_a_job_that_does_not_go_is_named_and_not_written_down(run_dir: Path) -> None:
    folder = job_folder(run_dir, submitted=submitted())
    with pytest.raises(Failure, match=r"job 17 of .* is still there") as caught:
        stop(run_dir, QueueOnPaper(row(folder), looks=10**6))
    assert caught.value.failure_class is FailureClass.SYSTEMIC
    assert folder.read("ended") is None


@pytest.mark.parametrize(
    ("says", "words"),
    [
        pytest.param(Unreachable("connect failure"), "jobs 17, .* may still run", id="down"),
        pytest.param(Refused("Access denied"), "Slurm refuses to cancel", id="refused"),
    ],
)
def test_what_slurm_cannot_do_is_said(run_dir: Path, says: Exception, words: str) -> None:
    first = job_folder(run_dir, submitted=submitted())
    job_folder(run_dir, "stages/deploy")
    with pytest.raises(Failure, match=words) as caught:
        stop(run_dir, QueueOnPaper(row(first), says=says))
    assert caught.value.failure_class is FailureClass.SYSTEMIC
    assert first.read("ended") is None


def test_a_submission_under_way_is_waited_for(run_dir: Path) -> None:
    folder = job_folder(run_dir)
    held = os.open(folder.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    queue = QueueOnPaper(looks=0)

    def sleep(_: float) -> None:
        queue.rows = [row(folder)]
        os.close(held)

    halted = stop(run_dir, queue, sleep=sleep)
    assert halted.jobs == {"17": folder.name}


def test_a_submission_that_does_not_end_is_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "SUBMISSION_S", 0.0)
    folder = job_folder(run_dir)
    held = os.open(folder.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(Failure, match="fuser -v"):
        stop(run_dir, QueueOnPaper())
    os.close(held)


def test_the_command(run_dir: Path, tmp_path: Path) -> None:
    with conductor(run_dir) as process:
        asked = ["stop", "demo-int8", "--workspace", str(tmp_path)]
        done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["conductor"]["pid"] == process.pid
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 0 and again.stdout.startswith("nothing to stop")
    assert signal.getsignal(signal.SIGINT) is not None


def test_the_command_without_slurm_says_what_may_still_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_folder(run_dir, submitted=submitted())
    monkeypatch.setenv("PATH", "/nowhere")
    done = CliRunner().invoke(app, ["stop", str(run_dir)])
    assert done.exit_code == 5
    assert "job 17 may still run" in done.stderr


def test_whoever_is_told_that_a_run_is_taken_is_told_how_to_stop_it(run_dir: Path) -> None:
    with conductor(run_dir), pytest.raises(Failure, match="day0 stop"), hold(run_dir):
        pass
