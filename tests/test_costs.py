"""What a release cost: held is what counts, not known is not zero, and queues are told apart."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from job_folders import H100, cluster

from conductor.chain import Stage
from conductor.compatibility import Device
from conductor.config import load_config
from conductor.costs import stage_cost, total_cost
from conductor.environments.builder import Environments
from conductor.jobs import Job, Standing
from conductor.probes.machine import Machine
from conductor.world import World

CONFIG = load_config(None, {"model": "demo", "recipe": "int8", "engine.tensor_parallel_size": 2})


def here(accelerators: int, visible: str | None = None) -> World:
    machine = Machine(
        device=Device.CUDA if accelerators else Device.CPU,
        accelerators=(H100,) * accelerators,
        processor="p",
        cores=2,
        memory_bytes=2**36,
        memory_available_bytes=2**35,
        system="s",
    )
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return World(environments=Environments(Path("e")), environ=environ, machine=machine)


def job(stage: Stage = Stage.PTQ, **others: Any) -> Job:
    known = {"queued_s": 60.0, "ran_s": 1800.0, "nodes": 2, "gpus": 4, "job_id": "17"}
    known |= {"standing": Standing.ENDED, "state": "COMPLETED", "node": "n1"}
    return Job(name="a", stage=stage, directory=f"stages/{stage}", **known | others)  # type: ignore[arg-type]


HALL = World.on(cluster(), {})
HOURS: list[Any] = [
    pytest.param(Stage.PTQ, here(0), [], None, id="no-accelerators"),
    pytest.param(Stage.PTQ, here(4), [], 4.0, id="quantizer-has-them-all"),
    pytest.param(Stage.PTQ, here(4, "1,2"), [], 2.0, id="quantizer-has-those-that-are-ours"),
    pytest.param(Stage.DEPLOY, here(4), [], 2.0, id="server-has-those-it-is-spread-over"),
    pytest.param(Stage.COMPARE, here(4), [], None, id="comparing-holds-none"),
    pytest.param(Stage.PTQ, HALL, [job()], 4.0, id="job"),
    pytest.param(Stage.PTQ, HALL, [job(), job(state="TIMEOUT")], 8.0, id="two-jobs"),
    pytest.param(Stage.PTQ, HALL, [job(Stage.DEPLOY)], 0.0, id="no-job-of-the-stage"),
    pytest.param(Stage.PTQ, HALL, [job(), job(ran_s=None)], None, id="one-is-not-known"),
    pytest.param(Stage.PTQ, HALL, None, None, id="jobs-cannot-be-told"),
    pytest.param(Stage.SETUP, HALL, [], None, id="setup-is-no-job"),
    pytest.param(Stage.PTQ, here(0), [job()], 4.0, id="went-on-here"),
]


@pytest.mark.parametrize(("stage", "world", "jobs", "gpu_hours"), HOURS)
def test_gpu_hours(
    stage: Stage, world: World, jobs: list[Job] | None, gpu_hours: float | None
) -> None:
    assert stage_cost(stage, 3600.0, jobs, CONFIG, world)["gpu_hours"] == gpu_hours


def test_a_stage_that_was_never_worked_on_held_nothing() -> None:
    assert stage_cost(Stage.PTQ, None, [], CONFIG, here(4))["gpu_hours"] == 0.0


def test_jobs_wait_apart_from_running() -> None:
    cost = stage_cost(Stage.PTQ, 9999.0, [job(), job(queued_s=5.0)], CONFIG, HALL)
    assert (cost["queued_s"], cost["ran_s"]) == (65.0, 3600.0)
    assert cost["jobs"][0] == {
        "name": "a",
        "job_id": "17",
        "node": "n1",
        "state": "COMPLETED",
        "queued_s": 60.0,
        "ran_s": 1800.0,
        "nodes": 2,
        "gpus": 4,
    }
    none = stage_cost(Stage.PTQ, 1.0, [], CONFIG, HALL)
    assert (none["queued_s"], none["ran_s"], none["jobs"]) == (None, None, [])


@pytest.mark.parametrize(
    ("hours", "total"),
    [
        pytest.param([1.5, 0.0, 2.0, 0.5], 4.0, id="sum"),
        pytest.param([0.0, 0.0, 0.0, 0.0], 0.0, id="nothing-held"),
        pytest.param([1.5, None, 2.0, 0.5], None, id="one-not-known"),
    ],
)
def test_the_sum(hours: list[float | None], total: float | None) -> None:
    names = ("ptq", "deploy", "baseline_eval", "candidate_eval")
    stages = [{"name": name, "gpu_hours": each} for name, each in zip(names, hours, strict=True)]
    assert total_cost([{"name": "setup", "gpu_hours": None}, *stages]) == total


def test_a_job_so_far() -> None:
    began = datetime(2026, 3, 14, tzinfo=UTC)
    waiting = job(standing=Standing.QUEUED, queued_s=None, ran_s=None, submitted_at=began)
    assert waiting.so_far(began.replace(minute=2)).queued_s == 120.0
    assert waiting.so_far(began).ran_s is None
