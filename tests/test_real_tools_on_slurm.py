"""Releases of the demo model by the real tools, as jobs of a real Slurm."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import Finished, run_day0
from run_checks import all_problems, read_events, stale_files
from slurm_rig import SlurmRig

pytestmark = [pytest.mark.tools, pytest.mark.slurm]

SERVING = ("deploy", "baseline_eval", "candidate_eval")
ASKED = {"cpus": 1, "memory_gib": 4, "time": "30"}
BOTH_SIDES = {"memory_gib": 5.5}
"""What the canary's job takes, which serves both sides at a time."""
STOPPED = 130
ENDS_WITHIN_S = 15
LONGEST_S = 600


@dataclass(frozen=True, kw_only=True)
class Place:
    """A workspace, and the cluster that its releases run on."""

    rig: SlurmRig
    directory: Path

    def describe(self, stages: dict[str, Any]) -> None:
        """Write the cluster's description."""
        rig = {"device": "cpu", "poll_s": 1, "resources": ASKED, "stages": stages}
        (self.directory / "clusters.yaml").write_text(yaml.safe_dump({"clusters": {"rig": rig}}))

    def day0(self, *words: str) -> Finished:
        cluster = {"DAY0_CLUSTERS": str(self.directory / "clusters.yaml")}
        return run_day0(*words, environ={**self.rig.environ, **cluster}, timeout_s=LONGEST_S)

    def release(self, *words: str) -> Finished:
        where = ("--executor", "slurm", "--workspace", str(self.directory / "workspace"))
        return self.day0("release", "demo", "--recipe", "int8", *where, *words)

    @property
    def run(self) -> Path:
        runs = (self.directory / "workspace" / "runs").iterdir()
        (run_dir,) = (each for each in runs if not each.name.startswith("."))
        return run_dir

    def left_behind(self) -> list[str]:
        """Name jobs of the cluster, and processes of such jobs, that are still there."""
        shown = self.rig.command("squeue", "-h", "-o", "%i %j %T").splitlines()
        conf = self.rig.environ["SLURM_CONF"]
        for process in psutil.process_iter(["pid", "name", "environ"]):
            environ = process.info["environ"] or {}
            if environ.get("SLURM_CONF") == conf and "SLURM_JOB_ID" in environ:
                shown.append(f"{process.info['name']} ({process.info['pid']})")
        return shown


@pytest.fixture
def place(slurm_rig: SlurmRig, tmp_path: Path) -> Iterator[Place]:
    """A place of its own, in whose cluster nothing may be left at the end."""
    place = Place(rig=slurm_rig, directory=tmp_path)
    yield place
    end = time.monotonic() + ENDS_WITHIN_S
    while (left := place.left_behind()) and time.monotonic() < end:
        time.sleep(0.5)
    assert left == []


def test_int8_is_accepted_and_its_evidence_holds(place: Place) -> None:
    place.describe({"deploy": BOTH_SIDES})
    done = place.release("--json")
    assert (done.exit_code, done.report["decision"]) == (0, "ACCEPT"), done.stderr
    assert done.report["engine"]["name"] == "vllm"
    assert not done.report["engine"]["emulated"]
    assert all(task["samples"] >= 500 for task in done.report["tasks"])
    assert all_problems(place.run) == []
    ended = [event for event in read_events(place.run) if event["event"] == "job_ended"]
    assert {event["directory"]: event["state"] for event in ended} == {
        f"stages/{stage}": "COMPLETED" for stage in ("ptq", *SERVING)
    }
    verified = place.day0("verify", str(place.run))
    assert verified.exit_code == 0, verified.stdout + verified.stderr


def test_a_model_is_served_over_two_nodes(place: Place) -> None:
    place.describe({stage: {"nodes": 2, **BOTH_SIDES} for stage in SERVING})
    config = place.directory / "release.yaml"
    config.write_text(yaml.safe_dump({"engine": {"tensor_parallel_size": 2}}))
    done = place.release("--config", str(config), "--to-step", "deploy")
    assert done.exit_code == STOPPED, done.stderr
    assert "stopped after deploy, as asked" in done.stderr
    canary = json.loads((place.run / "verdicts" / "canary.json").read_text())
    assert canary["pass"], canary
    for side in ("source", "candidate"):
        (log,) = place.run.glob(f"stages/deploy/server-{side}-node1.log")
        assert "world_size=2 rank=1" in log.read_text(errors="replace")
    assert stale_files(place.directory / "workspace") == []
