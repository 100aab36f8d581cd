"""A release on a real Slurm comes to the same end, whatever becomes of its conductor and its jobs.

The tools are recorded ones, so a job takes a second; the jobs, their queue, and everything that
goes wrong with them are real. What goes wrong inside a job is done by the cluster's ``setup``
lines, which the shell of every job runs before our code.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Finished, run_day0
from run_checks import all_problems, outcome, read_events
from slurm_rig import SlurmRig

pytestmark = pytest.mark.slurm

INTERRUPTED = Path(__file__).parent / "interrupted.py"
ACCEPT, UNUSABLE, ABORTED, STOPPED, KILLED = 0, 2, 5, 130, -9
BEFORE, AFTER = 1, 2
"""Which point of a file's writing: its rename into place is still to come, or done."""
LONGEST_S = 120
LAG_S = 15
SEED = 0
DEATHS = 3
"""How many releases die twice at random points."""
AT_ONCE = 3
POINTS = 300
"""Durable writes of a release on Slurm, roughly: the last numbers may lie after its end."""
DOWN_S = 20


def soon(there: Callable[[], Any], timeout_s: float = LONGEST_S) -> Any:
    """Return what ``there`` returns as soon as that is something true."""
    end = time.monotonic() + timeout_s
    while not (found := there()):
        assert time.monotonic() < end, f"still {found!r} after {timeout_s} s"
        time.sleep(0.1)
    return found


@dataclass(frozen=True, kw_only=True)
class Place:
    """A workspace, and a cluster whose jobs do what a test needs."""

    rig: SlurmRig
    directory: Path

    @property
    def workspace(self) -> Path:
        return self.directory / "workspace"

    @property
    def once(self) -> Path:
        """A file that the first job makes, by which the others know that they are not the first."""
        return self.directory / "once"

    @property
    def gate(self) -> Path:
        """A file that jobs wait for where a test asked for it."""
        return self.directory / "gate"

    def describe(self, *setup: str, stage: str = "", **resources: Any) -> None:
        """Write the cluster's description; jobs of ``stage``, or all, run ``setup`` first."""
        asked = {"memory_gib": 0.5, "cpus": 1, "time": "10", **resources}
        rig = {"device": "cpu", "poll_s": 2, "command_timeout_s": 10, "resources": asked}
        if stage:
            rig["stages"] = {stage: {"setup": list(setup)}}
        else:
            asked["setup"] = list(setup)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "clusters.yaml").write_text(yaml.safe_dump({"clusters": {"rig": rig}}))

    def the_first_job(self, line: str) -> str:
        """Return a setup line that does ``line`` in the first job that runs it, and in no other."""
        return f"[ -e {self.once} ] || {{ touch {self.once}; {line}; }}"

    @property
    def behind_gate(self) -> str:
        """A setup line that waits for the gate."""
        return f"until [ -e {self.gate} ]; do sleep 0.1; done"

    @property
    def environ(self) -> Mapping[str, str]:
        return {**self.rig.environ, "DAY0_CLUSTERS": str(self.directory / "clusters.yaml")}

    @property
    def words(self) -> tuple[str, ...]:
        """The command line of the release."""
        where = ("--executor", "slurm", "--workspace", str(self.workspace))
        return ("release", "demo", "--recipe", "int8", "--dry-run", *where)

    @contextmanager
    def conductor(self) -> Iterator[subprocess.Popen[str]]:
        """Start the release in the background; whatever is left of it is killed."""
        with subprocess.Popen(
            [sys.executable, "-m", "conductor.cli", *self.words],
            env={**os.environ, **self.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def day0(self, *words: str) -> Finished:
        return run_day0(*words, environ=self.environ, timeout_s=LONGEST_S)

    def release(self) -> Finished:
        return self.day0(*self.words)

    def resume(self) -> Finished:
        return self.day0("resume", str(self.run))

    def die_at(self, number: int, *words: str, at: str = "") -> int:
        """Run day0 until it dies at a durable write (``interrupted.py``); return its exit code."""
        script = [sys.executable, str(INTERRUPTED), "--at", at, str(number)]
        return subprocess.run(
            [*script, *words],
            env={**os.environ, **self.environ},
            capture_output=True,
            timeout=LONGEST_S,
        ).returncode

    @property
    def run(self) -> Path:
        (run_dir,) = (
            each for each in (self.workspace / "runs").iterdir() if not each.name.startswith(".")
        )
        return run_dir

    def jobs(self) -> list[Path]:
        """Return the folders of the jobs that were intended, by the time of that."""
        intents = self.workspace.glob("runs/*/stages/**/jobs/*/intent.json")
        return [path.parent for path in sorted(intents, key=lambda path: path.stat().st_mtime)]

    def names(self) -> list[str]:
        return [json.loads((job / "intent.json").read_text())["name"] for job in self.jobs()]

    def queued(self, *states: str) -> str | None:
        """Return the number of the release's job that is in one of ``states``."""
        shown = self.rig.command("squeue", "-h", "-t", ",".join(states), "-o", "%i %j")
        jobs = [line.split() for line in shown.splitlines()]
        return next((number for number, name in jobs if name in self.names()), None)

    def accounted(self, number_of_jobs: int) -> list[tuple[str, str]]:
        """Return name and last state of every job that the release has in accounting.

        Accounting lags behind: so many jobs are waited for, and more than that are found as well.
        """

        def known() -> dict[str, tuple[str, str]]:
            fields = "JobID,JobName%200,State"
            rows = self.rig.account("--name", ",".join(self.names()), fields=fields)
            return {number: (name, state.partition(" ")[0]) for number, name, state in rows}

        end = time.monotonic() + LAG_S
        while time.monotonic() < end:
            going_on = [state for _, state in known().values() if state in ("PENDING", "RUNNING")]
            if len(known()) >= number_of_jobs and not going_on:
                break
            time.sleep(0.2)
        return list(known().values())

    def problems(self, whole: Path) -> list[str]:
        """Say what is wrong with the release, which is to have come to the same end as another."""
        found = all_problems(self.run)
        if outcome(self.run) != outcome(whole):
            found.append("decision, scores or verdicts are others")
        submitted = [name for name, _ in self.accounted(number_of_jobs=len(self.names()))]
        if sorted(submitted) != sorted(self.names()):
            found.append(f"{submitted} were submitted for {self.names()}")
        return found


@pytest.fixture
def place(slurm_rig: SlurmRig, tmp_path: Path) -> Iterator[Place]:
    """A place of its own; nothing of it may be in the queue at the end."""
    place = Place(rig=slurm_rig, directory=tmp_path)
    yield place
    place.gate.touch()
    soon(lambda: not place.queued("PENDING", "RUNNING"), 15)


@pytest.fixture(scope="module")
def whole(slurm_rig: SlurmRig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a release that nothing happened to."""
    place = Place(rig=slurm_rig, directory=tmp_path_factory.mktemp("whole"))
    place.describe()
    finished = place.release()
    assert finished.exit_code == ACCEPT, finished.stderr
    assert place.problems(place.run) == []
    return place.run


def test_a_release_runs_from_start_to_decision(whole: Path) -> None:
    events = read_events(whole)
    submitted = [event["stage"] for event in events if event["event"] == "job_submitted"]
    assert submitted == ["ptq", "deploy", "baseline_eval", "candidate_eval"]
    ends = [event for event in events if event["event"] == "job_ended"]
    assert [event["state"] for event in ends] == ["COMPLETED"] * 4
    assert all(event["queued_s"] >= 0 and event["ran_s"] >= 0 for event in ends)


def test_a_release_has_the_outcome_of_one_on_this_machine(whole: Path, finished_run: Path) -> None:
    assert outcome(whole)["decision"] == outcome(finished_run)["decision"] == "ACCEPT"
    assert outcome(whole)["tasks"] == outcome(finished_run)["tasks"]


def comes_to_its_end(place: Place, whole: Path) -> None:
    finished = place.resume()
    assert finished.exit_code == ACCEPT, finished.stderr
    assert place.problems(whole) == []


@pytest.mark.parametrize(
    ("path", "number"),
    [
        pytest.param("stages/ptq/jobs/1/intent.json", AFTER, id="before-sbatch"),
        pytest.param("stages/ptq/jobs/1/submitted.json", BEFORE, id="after-sbatch"),
        pytest.param("stages/baseline_eval/jobs/1/ended.json", BEFORE, id="after-its-end"),
    ],
)
def test_a_conductor_that_dies_around_a_submission(
    place: Place, whole: Path, path: str, number: int
) -> None:
    place.describe()
    assert place.die_at(number, *place.words, at=path) == KILLED
    comes_to_its_end(place, whole)


def sbatch_that_first(place: Place, line: str) -> str:
    """Return a PATH on which the first ``sbatch`` does ``line`` before it is the real one."""
    stand_in = place.directory / "bin" / "sbatch"
    stand_in.parent.mkdir()
    first = place.the_first_job(line)
    stand_in.write_text(f'#!/bin/sh\n{first}\nexec {shutil.which("sbatch")} "$@"\n')
    stand_in.chmod(0o755)
    return f"{stand_in.parent}:{os.environ['PATH']}"


def test_a_conductor_that_dies_while_sbatch_runs(
    place: Place, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.describe()
    monkeypatch.setenv("PATH", sbatch_that_first(place, "sleep 2"))
    with place.conductor() as conductor:
        soon(place.once.exists)
        conductor.kill()
    comes_to_its_end(place, whole)


def test_an_sbatch_that_hangs_is_tried_again(
    place: Place, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.describe()
    monkeypatch.setenv("PATH", sbatch_that_first(place, "exec sleep 600"))
    finished = place.release()
    assert finished.exit_code == ACCEPT, finished.stderr
    assert place.problems(whole) == []


def test_a_conductor_that_dies_while_its_job_is_queued(place: Place, whole: Path) -> None:
    node = place.rig.nodes[1]
    place.describe(extra={"nodelist": node})
    blocker = place.rig.submit("exec sleep 600", "-w", node, "--exclusive")
    with place.conductor() as conductor:
        soon(lambda: place.jobs() and place.queued("PENDING"))
        conductor.kill()
    place.rig.cancel(blocker)
    comes_to_its_end(place, whole)


@pytest.mark.parametrize("ends", [False, True], ids=["while-it-runs", "after-it-ended"])
def test_a_conductor_that_dies_beside_its_job(place: Place, whole: Path, ends: bool) -> None:
    place.describe(place.behind_gate)
    with place.conductor() as conductor:
        soon(lambda: place.jobs() and place.queued("RUNNING"))
        conductor.send_signal(signal.SIGSTOP)
        if ends:
            place.gate.touch()
            soon(lambda: place.queued("COMPLETED"))
        conductor.kill()
    place.gate.touch()
    comes_to_its_end(place, whole)


def test_conductors_that_die_twice_at_random_points(
    slurm_rig: SlurmRig, tmp_path: Path, whole: Path
) -> None:
    chance = random.Random(SEED)
    deaths = [sorted(chance.sample(range(20, POINTS), 2)) for _ in range(DEATHS)]

    def die(points: list[int]) -> list[str]:
        place = Place(rig=slurm_rig, directory=tmp_path / "-".join(map(str, points)))
        place.describe()
        codes = [place.die_at(points[0], *place.words)]
        codes.append(place.die_at(points[1] - points[0], "resume", str(place.run)))
        if not {*codes} <= {ACCEPT, KILLED}:
            return [f"the conductor ended with {codes}"]
        finished = place.resume()
        if finished.exit_code != ACCEPT:
            return [finished.stderr]
        return place.problems(whole)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert dict(zip(map(str, deaths), pool.map(die, deaths), strict=True)) == {
            str(points): [] for points in deaths
        }


def test_an_evaluation_that_runs_into_its_walltime_is_continued(place: Place) -> None:
    place.describe(place.the_first_job("exec sleep 600"), stage="baseline_eval")
    with place.conductor() as conductor:
        place.rig.end_walltime(soon(lambda: place.once.exists() and place.queued("RUNNING")))
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == ACCEPT, said
    states = [state for _, state in place.accounted(number_of_jobs=5)]
    assert sorted(states) == [*["COMPLETED"] * 4, "TIMEOUT"]
    folders = [job.relative_to(place.run).as_posix() for job in place.jobs()]
    assert [each for each in folders if "baseline_eval" in each] == [
        "stages/baseline_eval/jobs/1",
        "stages/baseline_eval/jobs/2",
    ]


def test_a_job_that_takes_too_much_memory_is_an_attempt(place: Place) -> None:
    if not place.rig.memory_enforced:
        pytest.skip("memory is not enforced without control groups")
    place.describe(f"exec {sys.executable} -c 'bytearray(2**30)'", memory_gib=0.1)
    finished = place.release()
    assert finished.exit_code not in (ACCEPT, STOPPED), finished.stderr
    assert "memory" in finished.stderr
    attempts = place.accounted(number_of_jobs=len(place.jobs()))
    assert {state for _, state in attempts} == {"OUT_OF_MEMORY"}


def test_a_job_whose_process_is_killed_is_tried_again(place: Place) -> None:
    place.describe(place.the_first_job("exec sh -c 'kill -KILL $$'"))
    finished = place.release()
    assert finished.exit_code == ACCEPT, finished.stderr
    assert len(place.jobs()) == 5


def test_a_job_on_a_node_that_dies_is_tried_again(place: Place) -> None:
    node = place.rig.nodes[1]
    place.describe(place.the_first_job("exec sleep 600"), extra={"nodelist": node})
    with place.conductor() as conductor:
        soon(lambda: place.once.exists() and place.queued("RUNNING"))
        place.rig.kill_node(node)
        place.rig.start_node(node)
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == ACCEPT, said
    rows = place.accounted(number_of_jobs=5)
    assert rows[0][1] == "NODE_FAIL"


def test_a_job_that_is_preempted_is_tried_again(place: Place) -> None:
    node = place.rig.nodes[1]
    place.describe(
        place.the_first_job("exec sleep 600"), partition="cancelled", extra={"nodelist": node}
    )
    with place.conductor() as conductor:
        soon(lambda: place.once.exists() and place.queued("RUNNING"))
        place.rig.submit("true", "-p", "urgent", "-w", node, "--exclusive")
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == ACCEPT, said
    rows = place.accounted(number_of_jobs=5)
    assert rows[0][1] == "PREEMPTED"


def test_a_job_that_somebody_cancels_stops_the_release(place: Place, whole: Path) -> None:
    place.describe(place.behind_gate)
    with place.conductor() as conductor:
        job_id = soon(lambda: place.jobs() and place.queued("RUNNING"))
        place.rig.cancel(job_id)
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == STOPPED, said
    assert job_id in said
    place.gate.touch()
    comes_to_its_end(place, whole)


def test_a_job_that_somebody_requeues_goes_on(place: Place, whole: Path) -> None:
    place.describe(place.the_first_job("exec sleep 600"))
    with place.conductor() as conductor:
        job_id = soon(lambda: place.once.exists() and place.queued("RUNNING"))
        place.rig.command("scontrol", "update", f"JobId={job_id}", "Requeue=1")
        place.rig.command("scontrol", "requeue", job_id)
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == ACCEPT, said
    assert place.problems(whole) == []


def test_a_held_job_says_so(place: Place, whole: Path) -> None:
    node = place.rig.nodes[1]
    place.describe(extra={"nodelist": node})
    blocker = place.rig.submit("exec sleep 600", "-w", node, "--exclusive")
    with place.conductor() as conductor:
        job_id = soon(lambda: place.jobs() and place.queued("PENDING"))
        place.rig.command("scontrol", "hold", job_id)
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == STOPPED, said
    assert "JobHeld" in said
    place.rig.command("scontrol", "release", job_id)
    place.rig.cancel(blocker)
    comes_to_its_end(place, whole)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        pytest.param({"partition": "short", "time": "5"}, "PartitionTimeLimit", id="never-starts"),
        pytest.param({"partition": "nope"}, "nope", id="no-such-partition"),
        pytest.param({"gpus": 9}, "node configuration is not available", id="too-many-gpus"),
    ],
)
def test_an_impossible_job_says_why(place: Place, resources: dict[str, Any], words: str) -> None:
    place.describe(**resources)
    finished = place.release()
    assert finished.exit_code == UNUSABLE, finished.stderr
    assert words in finished.stderr
    assert str(place.directory / "clusters.yaml") in finished.stdout + finished.stderr, finished


def test_a_controller_that_is_down_is_waited_for(place: Place, whole: Path) -> None:
    place.describe(place.behind_gate)
    with place.conductor() as conductor:
        soon(lambda: place.jobs() and place.queued("RUNNING"))
        place.rig.stop_controller()
        place.gate.touch()
        time.sleep(DOWN_S)
        place.rig.start_controller()
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == ACCEPT, said
    assert place.problems(whole) == []


def test_a_job_that_its_controller_forgot_is_an_attempt(place: Place) -> None:
    """A controller that dies knows nothing of the last seconds."""
    place.describe(place.behind_gate)
    with place.conductor() as conductor:
        soon(lambda: any((job / "submitted.json").exists() for job in place.jobs()))
        place.rig.kill_controller()
        place.rig.start_controller()
        place.gate.touch()
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == ACCEPT, said
    assert all_problems(place.run) == []


def test_a_cluster_whose_numbers_begin_anew(place: Place) -> None:
    """The job at hand is lost, and the next one has a number that another had before."""
    place.describe(place.the_first_job("exec sleep 600"))
    with place.conductor() as conductor:
        soon(lambda: place.once.exists() and place.queued("RUNNING"))
        place.rig.forget_jobs()
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == ACCEPT, said
    assert len(place.jobs()) == 5
    assert all_problems(place.run) == []


def test_a_release_needs_no_accounting(place: Place, whole: Path) -> None:
    place.describe()
    place.rig.kill_accounting()
    try:
        finished = place.release()
    finally:
        place.rig.start_accounting()
    assert finished.exit_code == ACCEPT, finished.stderr
    assert place.problems(whole) == []


def test_one_conductor_has_a_run_and_stop_ends_it_with_its_jobs(place: Place, whole: Path) -> None:
    place.describe(place.behind_gate)
    with place.conductor() as conductor:
        job_id = soon(lambda: place.jobs() and place.queued("RUNNING"))
        second = place.resume()
        assert second.exit_code == UNUSABLE, second.stderr
        assert str(conductor.pid) in second.stderr
        stopped = place.day0("stop", str(place.run))
        assert stopped.exit_code == ACCEPT, stopped.stderr
        assert job_id in stopped.stdout
        assert conductor.wait(LONGEST_S) == STOPPED
    soon(lambda: not place.queued("PENDING", "RUNNING", "COMPLETING"))
    place.gate.touch()
    comes_to_its_end(place, whole)


def test_an_interrupted_conductor_leaves_its_job(place: Place, whole: Path) -> None:
    place.describe(place.behind_gate)
    with place.conductor() as conductor:
        job_id = soon(lambda: place.jobs() and place.queued("RUNNING"))
        conductor.send_signal(signal.SIGINT)
        said, _ = conductor.communicate(timeout=LONGEST_S)
    assert conductor.returncode == STOPPED, said
    assert re.search(rf"\bjob {job_id}\b", said)
    assert place.queued("RUNNING") == job_id
    place.gate.touch()
    comes_to_its_end(place, whole)


def test_two_releases_at_once(slurm_rig: SlurmRig, tmp_path: Path, whole: Path) -> None:
    place = Place(rig=slurm_rig, directory=tmp_path)
    place.describe()
    with ThreadPoolExecutor(2) as pool:
        finished = list(pool.map(lambda _: place.release(), range(2)))
    assert [each.exit_code for each in finished] == [ACCEPT, ACCEPT]
    assert len(place.accounted(number_of_jobs=8)) == len({*place.names()}) == 8
    for run_dir in (place.workspace / "runs").iterdir():
        assert outcome(run_dir)["tasks"] == outcome(whole)["tasks"]


def test_quantizing_and_the_baseline_are_submitted_together(place: Place, whole: Path) -> None:
    place.describe(place.behind_gate, stage="ptq")
    with ThreadPoolExecutor(1) as pool:
        releasing = pool.submit(place.day0, *place.words, "--overlap", "always")
        ended = soon(lambda: [job for job in place.jobs() if (job / "ended.json").exists()])
        assert "baseline_eval" in str(ended), "the quantizer still waits behind the gate"
        place.gate.touch()
        finished = releasing.result()
    assert finished.exit_code == ACCEPT, finished.stderr
    assert place.problems(whole) == []


def test_a_fleet_shares_a_queue_and_bounds_its_jobs(place: Place, whole: Path) -> None:
    place.describe()
    rows = [{"model": "demo", "recipe": "int8", "settings": {"run_name": name}}
            for name in ("a", "b", "c")]  # fmt: skip
    fleet = {"settings": {"dry_run": True, "executor": "slurm"}, "releases": rows, "max_jobs": 2}
    file = place.directory / "fleet.yaml"
    file.write_text(yaml.safe_dump(fleet))
    words = ("fleet", str(file), "--workspace", str(place.workspace), "--json")
    with ThreadPoolExecutor(1) as pool:
        at_work = pool.submit(place.day0, *words)
        most = 0
        while not at_work.done():
            most = max(most, place.rig.command("squeue", "-h", "-t", "PD,R,CG").count("day0"))
            time.sleep(0.2)
        finished = at_work.result()
    assert finished.exit_code == ACCEPT, finished.stderr
    assert 1 <= most <= 2
    assert finished.report["totals"]["decisions"]["ACCEPT"] == 3
    assert len(place.accounted(number_of_jobs=12)) == len({*place.names()}) == 12
    for run_dir in (place.workspace / "runs").iterdir():
        assert outcome(run_dir)["tasks"] == outcome(whole)["tasks"]
