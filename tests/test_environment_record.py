"""What ``env.json`` says of the machine, the environments, the revision and the container."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from job_folders import claimed, cluster, job_folder, resources
from run_checks import shape_problems

from conductor import redaction
from conductor.compatibility import Device
from conductor.environments.builder import Environments
from conductor.evidence import environment
from conductor.evidence.environment import (
    find_container,
    git_state,
    record_environment,
    recorded_variables,
)
from conductor.probes import machine as machine_probe
from conductor.probes.machine import Accelerator, Machine, probe_driver, probe_machine
from conductor.recorded_tools import RECORDED, recorded_world
from conductor.world import World

MACHINE = Machine(
    device=Device.CPU,
    accelerators=(),
    processor="a processor",
    cores=2,
    memory_bytes=8 * 2**30,
    memory_available_bytes=2**30,
    system="Linux",
)
H100 = Accelerator(
    name="NVIDIA H100 80GB HBM3", memory_bytes=2**36, driver="580.95.05", compute_capability=(9, 0)
)
SMI = """Sun Nov 22 10:00:00 2026
+-------------------------------------------------------------------------+
| NVIDIA-SMI 580.95.05     Driver Version: 580.95.05   CUDA Version: 13.0 |
+-------------------------------------------------------------------------+
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A machine with one environment, of one package with a RECORD and one without."""
    site = tmp_path / "environments" / "evaluate" / "lib" / "python3.11" / "site-packages"
    for name, record in (("tiny_package-1.0", "tiny_package.py,sha256=abc,10\n"), ("Bare-2", None)):
        (site / f"{name}.dist-info").mkdir(parents=True)
        if record:
            (site / f"{name}.dist-info" / "RECORD").write_text(record)
    (tmp_path / "environments" / "evaluate" / "pyvenv.cfg").write_text(
        "home = /usr/bin\nversion_info = 3.11.9\n"
    )
    environments = Environments(tmp_path / "environments", variables={})
    return World(environments=environments, environ={"OMP_NUM_THREADS": "2"}, machine=MACHINE)


Record = Callable[..., dict[str, Any]]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    def record_in_run(world: World, dry_run: bool = False) -> dict[str, Any]:
        document = record_environment(run_dir, world, ["evaluate"], dry_run=dry_run)
        written = json.loads((run_dir / "env.json").read_text())
        assert written == document
        assert shape_problems(written, "environment") == []
        return document

    return record_in_run


def fake_smi(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.defpath}")


def test_what_is_recorded(world: World, record: Record) -> None:
    document = record(world)
    assert document["environments"]["evaluate"]["packages"] == {
        "bare": {"version": "2", "sha256": None},
        "tiny-package": {
            "version": "1.0",
            "sha256": sha256(b"tiny_package.py,sha256=abc,10\n").hexdigest(),
        },
    }
    assert document["environments"]["evaluate"]["python"] == "3.11.9"
    assert document["environments"]["evaluate"]["status"] == "stale"
    assert document["environments"]["evaluate"]["lock_digest"] == world.environments.digest(
        "evaluate"
    )
    assert document["interpreter"]["packages"]["pyyaml"]["sha256"]
    assert document["variables"] == {"OMP_NUM_THREADS": "2"}
    assert document["earlier"] == []


def test_this_machine_can_be_recorded(record: Record) -> None:
    environ = {"DAY0_ENVIRONMENTS": "/nowhere"}
    world = World(
        environments=Environments(variables=environ), environ=environ, machine=probe_machine()
    )
    assert record(world)["environments"]["evaluate"] | {"lock_digest": ""} == {
        "path": "/nowhere/evaluate/bin/python",
        "python": None,
        "status": "absent",
        "lock_digest": "",
        "packages": {},
    }


def test_a_dry_run_asks_no_accelerator(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, "touch $0.asked")
    document = record(recorded_world(RECORDED / "int8", {}), dry_run=True)
    assert document["accelerator"]["nvidia_smi"] is None
    assert "dry run" in document["accelerator"]["statement"]
    assert not (tmp_path / "nvidia-smi.asked").exists()


DRIVERS = [
    pytest.param(
        SMI,
        0,
        (H100,),
        "1: NVIDIA H100 80GB HBM3 (driver 580.95.05, CUDA 13.0)",
        "13.0",
        id="current",
    ),
    pytest.param(
        SMI.replace("CUDA Version", "CUDA UMD Version"),
        0,
        (H100,),
        "CUDA 13.0)",
        "13.0",
        id="newer",
    ),
    pytest.param("no header", 0, (H100,), "CUDA not told)", None, id="no-version"),
    pytest.param("", 0, (), "none: nvidia-smi lists none", None, id="none-listed"),
    pytest.param(
        "NVIDIA-SMI has failed",
        9,
        (),
        "none: nvidia-smi ended with exit status 9",
        None,
        id="fails",
    ),
]


@pytest.mark.parametrize(("text", "status", "accelerators", "statement", "cuda"), DRIVERS)
def test_the_accelerator(
    world: World,
    record: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    status: int,
    accelerators: tuple[Accelerator, ...],
    statement: str,
    cuda: str | None,
) -> None:
    fake_smi(tmp_path, monkeypatch, f"cat <<'END'\n{text}\nEND\nexit {status}")
    machine = replace(MACHINE, accelerators=accelerators)
    found = record(replace(world, machine=machine))["accelerator"]
    assert statement in found["statement"]
    assert found["cuda_version"] == cuda
    assert found["nvidia_smi"].rstrip("\n") == text.rstrip("\n")


def test_without_a_driver_it_is_said(
    world: World, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record(world)["accelerator"] == {
        "statement": "none: there is no nvidia-smi on this machine",
        "cuda_version": None,
        "nvidia_smi": None,
    }


def test_a_driver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(machine_probe, "NVIDIA_SMI_TIMEOUT_S", 0.2)
    assert "did not answer" in str(probe_driver().failure)


def test_the_same_machine_leaves_the_same_file(
    world: World, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, "date +%N")
    record(world)
    before = (tmp_path / "run" / "env.json").read_bytes()
    record(replace(world, machine=replace(MACHINE, memory_available_bytes=1)))
    assert (tmp_path / "run" / "env.json").read_bytes() == before


def test_what_it_was_before_stays(world: World, record: Record) -> None:
    first = record(world)
    record(replace(world, environ={"OMP_NUM_THREADS": "4"}))
    third = record(replace(world, machine=replace(MACHINE, cores=4)))
    assert [each["variables"] for each in third["earlier"]] == [
        {"OMP_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "4"},
    ]
    assert third["earlier"][0] == {name: first[name] for name in first if name != "earlier"}


def test_environments_that_an_early_end_no_longer_names_stay(
    world: World, record: Record, tmp_path: Path
) -> None:
    before = record(world)
    assert before["environments"]
    assert record_environment(tmp_path / "run", world, [], dry_run=False) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}', '{"earlier": 1}'])
def test_what_is_not_ours_is_replaced(
    world: World, record: Record, tmp_path: Path, text: str
) -> None:
    (tmp_path / "run" / "env.json").write_text(text)
    assert record(world)["earlier"] == []


VARIABLES = [
    pytest.param("CUDA_VISIBLE_DEVICES", True, id="cuda"),
    pytest.param("HF_HOME", True, id="hf-home"),
    pytest.param("VLLM_BATCH_INVARIANT", True, id="vllm"),
    pytest.param("VLLM_API_KEY", False, id="key-of-a-server"),
    pytest.param("HF_TOKEN", False, id="token"),
    pytest.param("HF_TOKEN_PATH", False, id="token-path"),
    pytest.param("NCCL_SECRET_THING", False, id="secret-in-the-middle"),
    pytest.param("MLFLOW_TRACKING_URI", False, id="not-listed"),
    pytest.param("XCUDA_HOME", False, id="not-at-the-beginning"),
]


@pytest.mark.parametrize(("name", "recorded"), VARIABLES)
def test_which_variables_are_recorded(name: str, recorded: bool) -> None:
    assert (name in recorded_variables({name: "x"})) is recorded


ID = "0123456789abcdef" * 4
CONTAINERS = [
    pytest.param({}, None, id="none"),
    pytest.param({"proc/1/cgroup": "0::/init.scope\n"}, None, id="machine"),
    pytest.param({".dockerenv": ""}, ("docker", None), id="docker"),
    pytest.param({"run/.containerenv": ""}, ("podman", None), id="podman"),
    pytest.param(
        {"proc/1/cgroup": f"1:cpu:/docker/{ID}\n", ".dockerenv": ""}, ("docker", ID), id="with-id"
    ),
    pytest.param(
        {"proc/1/cgroup": f"0::/kubepods/pod1/cri-containerd-{ID}.scope\n"},
        ("kubernetes", ID),
        id="kubernetes",
    ),
]


@pytest.mark.parametrize(("files", "expected"), CONTAINERS)
def test_the_container(
    tmp_path: Path, files: dict[str, str], expected: tuple[str, str | None] | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = find_container(tmp_path)
    assert (found and (found["kind"], found["id"])) == expected


def git(directory: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path / "checkout", "init", "--quiet")
    git(tmp_path / "checkout", "add", ".")
    git(tmp_path / "checkout", "commit", "--quiet", "-m", "first")
    return package


def test_a_checkout_has_a_revision(checkout: Path) -> None:
    state = git_state(checkout)
    assert state is not None and len(state["revision"]) == 40 and not state["dirty"]
    (checkout.parent / "new").write_text("")
    assert git_state(checkout) == {**state, "dirty": True}


def test_a_package_inside_somebody_elses_checkout_has_none(checkout: Path) -> None:
    installed = checkout.parent / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_state(installed) is None


def test_without_git_there_is_no_revision(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_state(checkout) is None
    assert git_state(environment.PACKAGE) is None


def test_of_a_cluster_the_file_is_believed_and_said_so(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, "touch $0.asked")
    hall = cluster(tmp_path, asked=resources(gpus=2, setup=("export HF_TOKEN=planted-4711",)))
    monkeypatch.setattr(redaction._OURS, "_forms", ("planted-4711",))
    document = record(World.on(hall, {}))
    assert (document["executor"], document["cluster"]["name"]) == ("slurm", "hall")
    statement = document["accelerator"]["statement"]
    assert statement == f"of each node, as {tmp_path}/clusters.yaml says: NVIDIA H100, NVIDIA H100"
    assert document["machine"]["memory_bytes"] is None
    assert not (tmp_path / "nvidia-smi.asked").exists()
    assert "planted-4711" not in json.dumps(document)


def test_of_this_machine_there_is_no_cluster(world: World, record: Record) -> None:
    document = record(world)
    assert (document["executor"], document["cluster"], document["nodes"]) == ("local", None, [])


def test_which_nodes_ran_what_is_no_change(world: World, record: Record, tmp_path: Path) -> None:
    on_nodes = World.on(cluster(tmp_path), {})
    assert record(on_nodes)["nodes"] == []
    node = json.loads((tmp_path / "run" / "env.json").read_text())
    job_folder(tmp_path / "run", "stages/deploy", claim=claimed("18"), node=node)
    job_folder(tmp_path / "run", "stages/ptq", node=node)
    job_folder(tmp_path / "run", "stages/ptq", number=2)
    document = record(on_nodes)
    told = [(each["stage"], each["job_id"], each["node"]) for each in document["nodes"]]
    assert told == [("ptq", None, None), ("deploy", "18", "n1")]
    assert document["nodes"][1]["record"] == "stages/deploy/jobs/1/node.json"
    assert document["earlier"] == []
    assert record(on_nodes) == document
    assert len(record(world)["earlier"]) == 1


def test_a_record_from_before_there_were_clusters_holds(
    world: World, record: Record, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "env.json"
    old = record(world)
    for name in ("executor", "cluster", "nodes"):
        del old[name]
    path.write_text(json.dumps(old))
    assert record(world)["earlier"] == []
