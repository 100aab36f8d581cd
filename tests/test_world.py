"""What a release takes a cluster's nodes for, and what is refused before any job is submitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from job_folders import H100, cluster, resources

from conductor.chain import Stage
from conductor.cluster.description import Cluster
from conductor.compatibility import Device
from conductor.config import load_config
from conductor.failure import Failure
from conductor.inputs import accelerators
from conductor.preconditions import check_environment, check_parallel
from conductor.world import World
from gates import FailureClass


def test_a_node_is_what_the_file_says() -> None:
    hall = cluster(Path("/shared"), asked=resources(gpus=4, cpus=32))
    world = World.on(hall, {"A": "1"})
    assert world.cluster is hall and world.environ == {"A": "1"}
    assert (world.machine.device, world.machine.accelerators) == (Device.CUDA, (H100,) * 4)
    assert world.environments.root == Path("/shared/environments")
    assert world.environments.device is Device.CUDA
    assert world.machine.cores == 32
    unknown = world.machine.memory_bytes, world.machine.memory_available_bytes, world.machine.system
    assert unknown == (None, None, None)


@pytest.mark.parametrize(
    ("others", "computes"),
    [
        pytest.param({}, "NVIDIA H100", id="named"),
        pytest.param({"accelerator": None}, "accelerator of cluster hall", id="not-named"),
        pytest.param(
            {"device": Device.CPU, "accelerator": None}, "processor of cluster hall", id="processor"
        ),
    ],
)
def test_two_clusters_are_not_taken_for_one(others: dict[str, Any], computes: str) -> None:
    assert accelerators(World.on(cluster(**others), {}).machine) == computes


def asking(**stages: Any) -> Cluster:
    hall = cluster()
    return replace(hall, resources={**hall.resources, **stages})


@pytest.mark.parametrize(
    ("hall", "parallel", "short"),
    [
        pytest.param(cluster(), 1, None, id="one-of-one"),
        pytest.param(cluster(asked=resources(gpus=4)), 4, None, id="all-of-a-node"),
        pytest.param(cluster(asked=resources(gpus=4, nodes=2)), 8, None, id="over-two-nodes"),
        pytest.param(cluster(asked=resources(gpus=4, nodes=2)), 9, "deploy has 8", id="beyond"),
        pytest.param(cluster(asked=resources(gpus=0)), 1, None, id="no-gpus-asked-for"),
        pytest.param(
            asking(**{Stage.CANDIDATE_EVAL: resources(gpus=2), Stage.BASELINE_EVAL: resources(),
                      Stage.DEPLOY: resources(gpus=2)}),
            2, "ask for in /shared/clusters.yaml, baseline_eval has 1 (", id="one-stage",
        ),
        pytest.param(
            asking(**{Stage.PTQ: resources(gpus=0)}), 1, None, id="the-quantizer-serves-nobody"
        ),
    ],
)  # fmt: skip
def test_a_model_fits_the_devices_of_its_jobs(
    hall: Cluster, parallel: int, short: str | None
) -> None:
    options = {"model": "demo", "recipe": "int8", "engine.tensor_parallel_size": parallel}
    config, world = load_config(None, options), World.on(hall, {})
    if short is None:
        check_parallel(config, world)
        return
    with pytest.raises(Failure) as caught:
        check_parallel(config, world)
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert short in caught.value.message


def test_an_environment_is_built_for_the_nodes(tmp_path: Path) -> None:
    with pytest.raises(Failure) as caught:
        check_environment(World.on(cluster(tmp_path), {}), "serve-cuda")
    for part in (
        f"--root {tmp_path}/environments --device cuda serve-cuda",
        f"name an interpreter for it in {tmp_path}/clusters.yaml",
    ):
        assert part in caught.value.message
