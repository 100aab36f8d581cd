"""The real Slurm that tests run on: it does what a cluster does, and it dies when it is told to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import descendants_with
from slurm_rig import SlurmRig
from slurm_rig.rig import CommandFailed, remove_cgroups

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parent.parent
LAG_S = 20
"""Longest that accounting, or the end of a process, is waited for."""
ALL_CPUS = ("--exclusive",)
SLEEP = "exec sleep 60"


def soon(there: Callable[[], object], timeout_s: float = LAG_S) -> None:
    """Wait until ``there`` returns something true."""
    end = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < end, f"still {there()!r} after {timeout_s} s"
        time.sleep(0.1)


def accounted(rig: SlurmRig, job_id: str, *states: str) -> None:
    """Wait until accounting has these states of a job, one for each start."""
    soon(lambda: [row[1] for row in rig.account("-j", job_id)] == list(states))


def test_jobs_run_on_every_node_and_are_accounted(slurm_rig: SlurmRig) -> None:
    assert len(slurm_rig.nodes) == 2
    jobs = [slurm_rig.submit("echo $SLURMD_NODENAME", "-w", node) for node in slurm_rig.nodes]
    for job_id, node in zip(jobs, slurm_rig.nodes, strict=True):
        slurm_rig.await_state(job_id, "COMPLETED")
        assert slurm_rig.output(job_id).strip() == node
        accounted(slurm_rig, job_id, "COMPLETED")


def test_small_jobs_share_a_node(slurm_rig: SlurmRig) -> None:
    node = slurm_rig.nodes[0]
    jobs = [slurm_rig.submit(SLEEP, "-w", node, "--gpus-per-node=1") for _ in range(4)]
    for job_id in jobs:
        slurm_rig.await_state(job_id, "RUNNING")
    slurm_rig.cancel(*jobs)


def test_a_job_that_takes_too_much_memory_is_ended(slurm_rig: SlurmRig) -> None:
    if not slurm_rig.memory_enforced:
        pytest.skip("memory is not enforced without control groups")
    job_id = slurm_rig.submit(f"{sys.executable} -c 'bytearray(2**29)'", "--mem=64")
    assert slurm_rig.await_state(job_id, "OUT_OF_MEMORY") == "OutOfMemory"
    soon(lambda: slurm_rig.account("-j", job_id) == [[job_id, "OUT_OF_MEMORY", "0:125"]])


def test_nothing_of_a_job_outlives_it(slurm_rig: SlurmRig, tmp_path: Path) -> None:
    if not slurm_rig.memory_enforced:
        pytest.skip("a process in a session of its own escapes without control groups")
    sleeper = f"{sys.executable} -c 'import time; time.sleep(60)' {tmp_path}"
    job_id = slurm_rig.submit(f"setsid {sleeper} & {sleeper}")
    soon(lambda: len(descendants_with(tmp_path)) == 2)
    slurm_rig.cancel(job_id)
    soon(lambda: not descendants_with(tmp_path))


def test_the_controller_stops_and_knows_its_jobs_again(slurm_rig: SlurmRig) -> None:
    ending, lasting = slurm_rig.submit("sleep 1"), slurm_rig.submit(SLEEP)
    slurm_rig.await_state(ending, "RUNNING")
    slurm_rig.await_state(lasting, "RUNNING")
    slurm_rig.stop_controller()
    assert slurm_rig.try_command("scontrol", "ping").returncode != 0
    time.sleep(1)
    slurm_rig.start_controller()
    slurm_rig.await_state(ending, "COMPLETED")
    assert slurm_rig.state(lasting)[0] == "RUNNING"
    slurm_rig.cancel(lasting)


def test_accounting_dies_and_catches_up(slurm_rig: SlurmRig) -> None:
    slurm_rig.kill_accounting()
    job_id = slurm_rig.submit("true")
    slurm_rig.await_state(job_id, "COMPLETED")
    with pytest.raises(CommandFailed, match="sacct: error"):
        slurm_rig.account("-j", job_id)
    slurm_rig.start_accounting()
    accounted(slurm_rig, job_id, "COMPLETED")


def test_a_node_dies_and_comes_back(slurm_rig: SlurmRig) -> None:
    node = slurm_rig.nodes[1]
    job_id = slurm_rig.submit(SLEEP, "-w", node, "--no-requeue")
    slurm_rig.await_state(job_id, "RUNNING")
    slurm_rig.kill_node(node)
    assert slurm_rig.await_state(job_id, "NODE_FAIL") == "NodeDown"
    slurm_rig.start_node(node)
    slurm_rig.await_state(slurm_rig.submit("true", "-w", node), "COMPLETED")


def test_a_drained_node_takes_no_job(slurm_rig: SlurmRig) -> None:
    node = slurm_rig.nodes[1]
    slurm_rig.drain(node)
    job_id = slurm_rig.submit("true", "-w", node)
    why = f"ReqNodeNotAvail, UnavailableNodes:{node}"
    soon(lambda: slurm_rig.state(job_id) == ("PENDING", why))
    slurm_rig.undrain(node)
    slurm_rig.await_state(job_id, "COMPLETED")


@pytest.mark.parametrize(
    ("partition", "options", "state"),
    [
        pytest.param("requeued", (), "PENDING", id="requeued"),
        pytest.param("requeued", ("--no-requeue",), "PREEMPTED", id="may-not-be-requeued"),
        pytest.param("cancelled", (), "PREEMPTED", id="cancelled"),
    ],
)
def test_an_urgent_job_preempts(
    slurm_rig: SlurmRig, partition: str, options: tuple[str, ...], state: str
) -> None:
    where = ("-w", slurm_rig.nodes[0], *ALL_CPUS)
    job_id = slurm_rig.submit(SLEEP, "-p", partition, *where, *options)
    slurm_rig.await_state(job_id, "RUNNING")
    urgent = slurm_rig.submit("true", "-p", "urgent", *where)
    slurm_rig.await_state(urgent, "COMPLETED")
    slurm_rig.await_state(job_id, state)
    soon(lambda: slurm_rig.account("-j", job_id)[0][1] == "PREEMPTED")
    slurm_rig.cancel(job_id)


def test_a_requeued_job_keeps_its_number(slurm_rig: SlurmRig) -> None:
    job_id = slurm_rig.submit(SLEEP)
    slurm_rig.await_state(job_id, "RUNNING")
    slurm_rig.command("scontrol", "requeue", job_id)
    assert slurm_rig.await_state(job_id, "PENDING") == "BeginTime"
    accounted(slurm_rig, job_id, "REQUEUED", "PENDING")
    slurm_rig.cancel(job_id)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param(("--hold",), "JobHeldUser", id="held"),
        pytest.param(("-p", "short", "--time=5"), "PartitionTimeLimit", id="walltime"),
        pytest.param(("-N", "5"), "PartitionNodeLimit", id="nodes"),
        pytest.param(("-c", "99"), "PartitionConfig", id="cpus"),
        pytest.param(("--begin=now+1hours",), "BeginTime", id="later"),
    ],
)
def test_a_job_that_does_not_start_says_why(
    slurm_rig: SlurmRig, options: tuple[str, ...], reason: str
) -> None:
    job_id = slurm_rig.submit("true", *options)
    soon(lambda: slurm_rig.state(job_id) == ("PENDING", reason))
    slurm_rig.cancel(job_id)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        pytest.param("--mem=900G", "Memory specification can not be satisfied", id="memory"),
        pytest.param("--gpus=9", "node configuration is not available", id="gpus"),
        pytest.param("--partition=nope", "Invalid partition name", id="partition"),
        pytest.param("--constraint=nope", "Invalid feature", id="constraint"),
        pytest.param("--time=soon", "Invalid --time", id="time"),
    ],
)
def test_what_sbatch_refuses(slurm_rig: SlurmRig, option: str, words: str) -> None:
    with pytest.raises(CommandFailed, match=words):
        slurm_rig.submit("true", option)


def test_a_job_whose_walltime_is_over_is_ended(slurm_rig: SlurmRig) -> None:
    job_id = slurm_rig.submit(SLEEP, "--time=1")
    slurm_rig.await_state(job_id, "RUNNING")
    slurm_rig.end_walltime(job_id)
    assert slurm_rig.await_state(job_id, "TIMEOUT") == "TimeLimit"
    soon(lambda: slurm_rig.account("-j", job_id) == [[job_id, "TIMEOUT", "0:0"]])


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path, as sockets want it."""
    with TemporaryDirectory(prefix="rig-") as path:
        yield Path(path)


def test_a_cluster_that_lost_its_state_counts_its_jobs_anew(directory: Path) -> None:
    with SlurmRig(directory, nodes=1, accounting=False) as rig:
        assert rig.submit("true") == "1"
        rig.await_state(rig.submit("true"), "COMPLETED")
        rig.forget_jobs()
        assert rig.submit("true") == "1"
    assert not descendants_with(directory)


def test_nothing_of_it_outlives_who_started_it(directory: Path) -> None:
    command = [sys.executable, "-m", "tests.slurm_rig", str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as starter:
        try:
            assert starter.stdout is not None
            assert starter.stdout.readline() == f"export SLURM_CONF={directory}/slurm.conf\n"
            environ = {**os.environ, "SLURM_CONF": f"{directory}/slurm.conf"}
            words = f"echo $$ >{directory}/job; {SLEEP}"
            script = ("sbatch", "--output=/dev/null", "--wrap", words)
            subprocess.run(script, env=environ, check=True, stdout=subprocess.DEVNULL)
            soon((directory / "job").exists)
        finally:
            starter.send_signal(signal.SIGKILL)
    soon(lambda: not descendants_with(directory))
    job = Path("/proc", (directory / "job").read_text().strip())
    soon(lambda: not job.exists())
    remove_cgroups(re.findall(r"NodeName=(\S+)", (directory / "slurm.conf").read_text()))


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long a path"):
        SlurmRig(tmp_path / ("long" * 30))
