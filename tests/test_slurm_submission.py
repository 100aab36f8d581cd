"""Handing one job to Slurm: what the script says, and what becomes of an sbatch that misbehaves.

In the place of ``sbatch`` there is a script that does as told.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_slurm_following import CLUSTER, RESOURCES

from conductor.executors.slurm.folders import JobFolder, Place
from conductor.executors.slurm.submission import NotSubmitted, submit

MODULE = "conductor.cluster.job"
SUBMITTED = "echo Submitted batch job 7"
WAIT_S = 10


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    place = Place.of(tmp_path / "run" / "stages" / "ptq")
    return JobFolder.intend(place, {"task": "worker"}, {}, at=1.0)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to write in place of sbatch; what it writes to ``$SEEN`` lies beside it."""
    file = tmp_path / "bin" / "sbatch"
    file.parent.mkdir()
    file.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(file.with_name("seen")))
    return file


def hand_over(folder: JobFolder) -> str:
    return submit(folder, CLUSTER, RESOURCES, MODULE, os.environ)


def test_the_script_runs_our_module_under_its_name(folder: JobFolder, sbatch: Path) -> None:
    sbatch.write_text(f'#!/bin/sh\ncp "$1" $SEEN\n{SUBMITTED}\n')
    assert hand_over(folder) == "7"
    lines = sbatch.with_name("seen").read_text().splitlines()
    assert f"#SBATCH --job-name={folder.name}" in lines
    assert "#SBATCH --no-requeue" in lines
    assert lines[-1] == f"exec {CLUSTER.python} -m {MODULE} {folder.path}"


def test_no_signal_comes_before_the_walltime(folder: JobFolder, sbatch: Path) -> None:
    """It would kill the companions of a server over several nodes, which are steps of the job."""
    sbatch.write_text(f'#!/bin/sh\ncp "$1" $SEEN\n{SUBMITTED}\n')
    hand_over(folder)
    assert "--signal" not in sbatch.with_name("seen").read_text()


def test_variables_of_a_job_that_we_are_in_stay_behind(
    folder: JobFolder, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch.write_text(f"#!/bin/sh\nenv > $SEEN\n{SUBMITTED}\n")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/there")
    hand_over(folder)
    seen = sbatch.with_name("seen").read_text().splitlines()
    assert "SLURM_CONF=/etc/there" in seen
    assert not any(line.startswith("SLURM_JOB_ID=") for line in seen)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        pytest.param(
            "echo 'sbatch: error: no\n  such thing' >&2; exit 1", "no; such", id="refuses"
        ),
        pytest.param("echo something else", "something else", id="says-no-number"),
        pytest.param("exit 1", "sbatch", id="says-nothing"),
        pytest.param("kill -9 $$", "sbatch", id="is-killed"),
    ],
)
def test_a_submission_without_a_number_is_none(
    folder: JobFolder, sbatch: Path, does: str, said: str
) -> None:
    sbatch.write_text(f"#!/bin/sh\n{does}\n")
    with pytest.raises(NotSubmitted, match=said):
        hand_over(folder)


def test_an_sbatch_that_hangs_is_ended_and_its_lock_with_it(
    folder: JobFolder, sbatch: Path
) -> None:
    sbatch.write_text("#!/bin/sh\nexec sleep 600\n")
    begun = time.monotonic()
    with pytest.raises(NotSubmitted, match="neither a number nor a reason in 1 s"):
        hand_over(folder)
    assert time.monotonic() - begun < CLUSTER.command_timeout_s + WAIT_S
    with folder.nobody_submits(0, time.sleep) as alone:
        assert alone


def test_a_submission_outlives_whoever_made_it_and_keeps_the_lock(
    folder: JobFolder, sbatch: Path
) -> None:
    sbatch.write_text(f"#!/bin/sh\ntouch $SEEN\nsleep 0.7\n{SUBMITTED}\n")
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from test_slurm_submission import JobFolder, hand_over\n"
        f"hand_over(JobFolder(Path({str(folder.path)!r})))\n"
    )
    repository = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script], cwd=repository) as conductor:
        end = time.monotonic() + WAIT_S
        while not sbatch.with_name("seen").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        conductor.kill()
    with folder.nobody_submits(0, time.sleep) as alone:
        assert not alone
    with folder.nobody_submits(WAIT_S, time.sleep) as alone:
        assert alone
