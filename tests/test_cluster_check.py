"""What ``day0 cluster check`` finds: commands that answer as Slurm 22.05 does, one fault at a time.

The commands are shell scripts that repeat what the real ones said; ``--probe`` is tried against a
real Slurm elsewhere, and here what a node tells of itself is judged.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from conductor.chain import Stage
from conductor.cli import app
from conductor.cluster.check import PACKAGES, Check, Grade, Site, check_cluster, sbatch_options
from conductor.cluster.description import GIB, Cluster, load_cluster
from conductor.cluster.files import SUBMITTED
from conductor.cluster.probe import describe_node, memory_limit_bytes
from conductor.cluster.trial import judge
from conductor.environments.builder import ENVIRONMENTS
from conductor.executors.slurm.commands import Slurm
from conductor.executors.slurm.following import COMMANDS

PARTITIONS = (
    "PartitionName=main AllowAccounts=ALL Default=YES MaxTime=1-00:00:00 Nodes=n[1-2] State=UP\n"
    "PartitionName=old AllowAccounts=ALL Default=NO MaxTime=UNLIMITED Nodes=n3 State=DOWN"
)
SBATCH = """
case "$*" in
  *--version*) echo "slurm-wlm 22.05.8" ;;
  *--help*) echo "  --container=...  an OCI container" ;;
  *) echo "sbatch: Job 1 to start at 2026-11-23T02:37:07 on nodes n1 in partition main" >&2 ;;
esac
"""
SCONTROL = f"""
case "$*" in
  ping) echo "Slurmctld(primary) at login is UP" ;;
  *) echo "{PARTITIONS}" ;;
esac
"""
HEALTHY = {
    "sbatch": SBATCH,
    "squeue": "exit 0",
    "scancel": "exit 0",
    "scontrol": SCONTROL,
    "sacct": "exit 0",
    "sacctmgr": 'echo "models|normal,high"; echo "other|normal"',
    **dict.fromkeys(["srun", "flock", "timeout"], "exit 0"),
}
GIVEN = {"quantize": "nvidia-modelopt", "reference": "lm-eval"}
"""What the given interpreters have."""

Checked = Callable[..., dict[str, Check]]


def listing(path: Path, package: str) -> str:
    """Write an interpreter that lists one package; return its path."""
    said = json.dumps({"python": "3.11.7", "packages": {package: {"version": "1"}}})
    path.write_text(f"#!/bin/sh\necho '{said}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Site]:
    """Return a cluster described by an entry, with commands that say what they are told to."""

    def make(entry: str = "{device: cpu}", **commands: str | None) -> Site:
        described = yaml.safe_load(entry)
        given = {name: listing(tmp_path / name, package) for name, package in GIVEN.items()}
        described.setdefault("interpreters", given)
        path = tmp_path / "clusters.yaml"
        path.write_text(yaml.safe_dump({"clusters": {"c": described}}))
        binaries = tmp_path / "bin"
        binaries.mkdir()
        for name, body in {**HEALTHY, **commands}.items():
            if body is not None:
                (binaries / name).write_text(f"#!/bin/sh\n{body}\n")
                (binaries / name).chmod(0o755)
        (binaries / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
        environ = {
            "PATH": str(binaries),
            "HOME": str(tmp_path),
            "DAY0_CLUSTERS": str(path),
            "DAY0_ENVIRONMENTS": str(tmp_path / "environments"),
        }
        cluster = load_cluster("c", environ, tmp_path)
        return Site(
            cluster=cluster,
            slurm=Slurm(timeout_s=cluster.command_timeout_s, environ=environ),
            environ=environ,
            workspace=tmp_path / "workspace",
        )

    return make


def checked(site: Site) -> dict[str, Check]:
    found = list(check_cluster(site))
    assert len({each.name for each in found}) == len(found)
    assert all(each.remedy for each in found if each.grade is not Grade.OK)
    return {each.name: each for each in found}


def test_a_healthy_cluster_passes_every_check(site: Callable[..., Site]) -> None:
    found = checked(site("{device: cpu, resources: {account: models, qos: high}}"))
    assert {name: each.grade.value for name, each in found.items()} == {
        **dict.fromkeys(["file", "commands", "controller", "accounting"], "ok"),
        **dict.fromkeys(["partition (all stages)", "submission (all stages)"], "ok"),
        **dict.fromkeys(["account and QOS", "python", "workspace"], "ok"),
        **dict.fromkeys(["environment quantize", "environment reference"], "ok"),
        **dict.fromkeys(["environment serve-cpu", "environment evaluate"], "warning"),
    }
    assert found["partition (all stages)"].observed == "main is UP, the default"


def refusing(said: str) -> str:
    return SBATCH.replace("  *) echo", f"  *) echo '{said}' >&2; exit 1; echo")


CPU = "{device: cpu}"
FAULTS: list[Any] = [
    *(
        pytest.param(CPU, {each: None}, "commands", "failed", f"not on PATH: {each}", id=each)
        for each in COMMANDS
    ),
    pytest.param(
        CPU,
        {"squeue": None},
        "controller",
        "failed",
        "could not be asked -> mend the commands first; partitions, accounts",
        id="not-asked",
    ),
    pytest.param(
        "{device: cuda, resources: {gpus: 0}, stages: {ptq: {gpus: 1}}}",
        {},
        "gpus (deploy, baseline_eval, candidate_eval)",
        "warning",
        "no GPU is asked for -> say gpus",
        id="no-gpus",
    ),
    pytest.param(
        CPU,
        {"sbatch": refusing("allocation failure: Invalid node name specified")},
        "submission (all stages)",
        "failed",
        "Invalid node name specified -> correct their resources in /",
        id="submission",
    ),
    pytest.param(
        f"{{device: cpu, interpreters: {{evaluate: {sys.executable}}}}}",
        {},
        "environment evaluate",
        "failed",
        f"{sys.executable}: has no lm-eval -> correct interpreters.evaluate",
        id="interpreter-of-something-else",
    ),
    pytest.param(
        "{device: cpu, interpreters: {evaluate: /bin/false}, resources: {container: {image: i}}}",
        {},
        "environment evaluate",
        "ok",
        "/bin/false: ready",
        id="interpreter-of-an-image",
    ),
    pytest.param(
        "{device: cpu, interpreters: {evaluate: /bin/false}}",
        {},
        "environment evaluate",
        "failed",
        "does not list its packages",
        id="interpreter-that-is-none",
    ),
    pytest.param(
        CPU,
        {"sbatch": "echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1"},
        "commands",
        "failed",
        "configuration source",
        id="no-slurm-conf",
    ),
    pytest.param(CPU, {"scontrol": "exit 1"}, "controller", "failed", "does not answer", id="down"),
    pytest.param(CPU, {"sacct": "exit 1"}, "accounting", "warning", "does not", id="accounting"),
    pytest.param(
        "{device: cpu, resources: {partition: mian}}",
        {},
        "partition (all stages)",
        "failed",
        "mian is not there -> name one of: main, old",
        id="partition-unknown",
    ),
    pytest.param(
        "{device: cpu, stages: {ptq: {partition: old}}}",
        {},
        "partition (ptq)",
        "failed",
        "old is DOWN",
        id="partition-down",
    ),
    pytest.param(
        "{device: cpu, resources: {partition: 'old,main'}}",
        {},
        "partition (all stages)",
        "ok",
        "old is DOWN, main is UP",
        id="one-of-two-is-up",
    ),
    pytest.param(
        CPU,
        {"scontrol": f'[ "$1" = ping ] || echo "{PARTITIONS}" | sed s/Default=YES/Default=NO/'},
        "partition (all stages)",
        "failed",
        "Slurm has no default",
        id="no-default-partition",
    ),
    pytest.param(
        "{device: cpu, resources: {time: 1-00:00:00}}",
        {},
        "partition (all stages)",
        "ok",
        "main is UP",
        id="walltime-at-the-limit",
    ),
    pytest.param(
        "{device: cpu, resources: {time: 1-00:00:01}}",
        {},
        "partition (all stages)",
        "failed",
        "jobs may run 1440 min, and 1441 are asked for",
        id="walltime-beyond",
    ),
    pytest.param(
        "{device: cpu, resources: {account: noone}}",
        {},
        "account and QOS",
        "failed",
        "account noone is not yours -> name one of: models, other",
        id="account",
    ),
    pytest.param(
        "{device: cpu, resources: {account: other, qos: high}}",
        {},
        "account and QOS",
        "failed",
        "QOS high is not yours in account other -> name one of: normal",
        id="qos-of-another-account",
    ),
    pytest.param(
        "{device: cpu, resources: {account: models}}",
        {"sacctmgr": "exit 0"},
        "account and QOS",
        "warning",
        "accounting knows no association",
        id="no-associations",
    ),
    pytest.param(
        CPU,
        {"sbatch": refusing("allocation failure: Requested node configuration is not available")},
        "submission (all stages)",
        "failed",
        "Requested node configuration is not available",
        id="impossible-resources",
    ),
    pytest.param(
        "{device: cpu, python: /no/python}",
        {},
        "python",
        "failed",
        f"No such file or directory -> install day0 {version('day0')} there",
        id="no-python",
    ),
    pytest.param(
        "{device: cpu, python: /no/python, resources: {container: {image: i}}}",
        {},
        "python",
        "warning",
        "try it with --probe",
        id="python-in-an-image",
    ),
    pytest.param(
        "{device: cpu, resources: {container: {image: i}}}",
        {},
        "containers",
        "failed",
        "sbatch does not know --container-image",
        id="no-pyxis",
    ),
    pytest.param(
        "{device: cpu, resources: {container: {image: i}}}",
        {"sbatch": SBATCH.replace("--container=", "--container-image=")},
        "containers",
        "ok",
        "knows",
        id="pyxis",
    ),
    pytest.param(
        "{device: cpu, resources: {modules: [cuda/12.8]}}",
        {},
        "modules",
        "failed",
        "module: command not found",
        id="no-modules",
    ),
    pytest.param(
        "{device: cpu, resources: {modules: [cuda/12.8]}}",
        {"module": '[ "$*" = "load cuda/12.8" ]'},
        "modules",
        "ok",
        "cuda/12.8",
        id="modules",
    ),
    pytest.param(
        "{device: cpu, interpreters: {}}",
        {},
        "environment serve-cpu",
        "failed",
        "--device cpu serve-cpu",
        id="environment",
    ),
    pytest.param(
        "{device: cuda, interpreters: {serve-cuda: /no/python}}",
        {},
        "environment serve-cuda",
        "failed",
        "correct interpreters.serve-cuda, or leave it out",
        id="given-interpreter",
    ),
]


@pytest.mark.parametrize(("entry", "commands", "name", "grade", "said"), FAULTS)
def test_each_fault_is_found_and_has_a_remedy(
    site: Callable[..., Site],
    entry: str,
    commands: dict[str, str | None],
    name: str,
    grade: str,
    said: str,
) -> None:
    found = checked(site(entry, **commands))
    assert found[name].grade == grade
    assert said in f"{found[name].observed} -> {found[name].remedy}"
    assert "workspace" in found  # no check is the last because another failed


def test_a_configuration_that_is_not_there_costs_no_minute(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    made = site(CPU, sbatch="exec /bin/sleep 60", scontrol="exec /bin/sleep 60")
    stated = {**made.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    found = checked(replace(made, environ=stated))
    assert found["commands"].observed == f"SLURM_CONF: {tmp_path}/slurm.conf is no file"
    assert found["controller"].grade is Grade.FAILED


@pytest.mark.parametrize(
    "option", ["gres: 'gpu:4'", "gpus-per-socket: 2", "tres-per-task: 'gpu:1'"]
)
def test_gpus_may_be_asked_for_otherwise(site: Callable[..., Site], option: str) -> None:
    found = checked(site(f"{{device: cuda, resources: {{gpus: 0, extra: {{{option}}}}}}}"))
    assert not any(name.startswith("gpus") for name in found)


def test_every_environment_has_packages_to_be_known_by() -> None:
    assert set(PACKAGES) == set(ENVIRONMENTS)


def test_a_python_of_another_version_is_refused(site: Callable[..., Site], tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 0.0.1\n")
    other.chmod(0o755)
    found = checked(site(f"{{device: cpu, python: {other}}}"))["python"]
    assert found.grade is Grade.FAILED
    assert f"day0 0.0.1, and {version('day0')} here" in found.observed


def test_a_workspace_that_cannot_be_written_is_refused(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    made = site()
    (tmp_path / "workspace").write_text("a file")
    assert checked(made)["workspace"].grade is Grade.FAILED


def test_a_command_that_hangs_is_given_up(site: Callable[..., Site]) -> None:
    sleeping = "exec /bin/sleep 60"
    made = site("{device: cpu, command_timeout_s: 1, python: /bin/true}", scontrol=sleeping)
    assert checked(made)["controller"].grade is Grade.FAILED


def test_what_is_tried_is_what_a_release_submits(site: Callable[..., Site]) -> None:
    made = site("{device: cpu, resources: {gpus: 2, memory_gib: 1.5, extra: {exclusive: true}}}")
    options = sbatch_options(made.cluster.resources[SUBMITTED[0]])
    assert {"--gpus-per-node=2", "--mem=1536M", "--exclusive", "--time=240"} <= set(options)


def test_distinct_resources_are_told_by_their_stages(site: Callable[..., Site]) -> None:
    made = site("{device: cpu, stages: {ptq: {memory_gib: 4}, deploy: {memory_gib: 4}}}")
    assert list(made.distinct) == ["ptq, deploy", "baseline_eval, candidate_eval"]


H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory_bytes": int(79.6 * GIB),
    "driver": "570.1",
    "compute_capability": [9, 0],
}
CUDA = (
    "{device: cuda, accelerator: {name: NVIDIA H100 80GB HBM3, memory_gib: 80, "
    "compute_capability: '9.0'}, resources: {gpus: 1, cpus: 8, memory_gib: 64}}"
)


def told(**other: Any) -> dict[str, Any]:
    """What a healthy node of the cluster above tells, and what it tells otherwise."""
    node = {
        "at": 1000.0,
        "host": "gpu-1",
        "day0_version": version("day0"),
        "writable": True,
        "machine": {"accelerators": [H100], "processor": "AMD EPYC", "cores": 64},
        "cores_allowed": 8,
        "memory_limit_bytes": 64 * GIB,
        "munge": None,
    }
    return {**node, **other}


def judged(cluster: Cluster, answer: dict[str, Any]) -> dict[str, Check]:
    found = list(judge(cluster, cluster.resources[SUBMITTED[0]], answer, (990.0, 1010.0)))
    assert all(each.remedy for each in found if each.grade is not Grade.OK)
    return {each.name: each for each in found}


def machine(*accelerators: dict[str, Any]) -> dict[str, Any]:
    return {"accelerators": list(accelerators), "processor": "AMD EPYC", "cores": 64}


def test_a_node_that_is_as_described_passes(site: Callable[..., Site]) -> None:
    found = judged(site(CUDA).cluster, told())
    assert {each.grade for each in found.values()} == {Grade.OK}
    assert found["accelerator"].observed == "NVIDIA H100 80GB HBM3, as described"


ODD_NODES: list[Any] = [
    pytest.param(CUDA, {"day0_version": "0.0.1"}, "day0", "failed", "0.0.1 on the node", id="day0"),
    pytest.param(CUDA, {"writable": False}, "shared workspace", "failed", "cannot", id="read-only"),
    pytest.param(CUDA, {"machine": machine()}, "device", "failed", "lists no GPU", id="no-gpu"),
    pytest.param(
        CUDA, {"machine": machine(H100, H100)}, "device", "warning", "ConstrainDevices", id="more"
    ),
    pytest.param(CUDA.replace("gpus: 1", "gpus: 2"), {}, "device", "failed", "gpus: 2", id="fewer"),
    pytest.param(
        CUDA,
        {"machine": machine({**H100, "name": "NVIDIA A100"})},
        "accelerator",
        "failed",
        '"name": "NVIDIA A100"',
        id="another-gpu",
    ),
    pytest.param(
        CUDA,
        {"machine": machine({**H100, "compute_capability": [8, 0]})},
        "accelerator",
        "failed",
        '"compute_capability": "8.0"',
        id="another-capability",
    ),
    pytest.param(
        CUDA,
        {"machine": machine({**H100, "memory_bytes": 75 * GIB})},
        "accelerator",
        "failed",
        '"memory_gib": 75',
        id="less-memory",
    ),
    pytest.param(
        CUDA,
        {"machine": machine({**H100, "memory_bytes": 76 * GIB})},
        "accelerator",
        "ok",
        "as described",
        id="memory-at-the-share",
    ),
    pytest.param(
        "{device: cuda}", {}, "accelerator", "warning", "is not described", id="not-described"
    ),
    pytest.param(CUDA, {"at": 985.0}, "clock", "ok", "beyond 5 s", id="clock-at-the-slack"),
    pytest.param(CUDA, {"at": 984.0}, "clock", "warning", "6 s behind", id="clock-behind"),
    pytest.param(CUDA, {"at": 1016.0}, "clock", "warning", "6 s ahead", id="clock-ahead"),
    pytest.param(
        CUDA, {"memory_limit_bytes": None}, "memory", "warning", "ConstrainRAMSpace", id="no-limit"
    ),
    pytest.param(
        CUDA, {"memory_limit_bytes": 32 * GIB}, "memory", "failed", "memory_gib: 64", id="memory"
    ),
    pytest.param("{device: cpu}", {}, "memory", "warning", "Slurm's default", id="no-memory-said"),
    pytest.param(
        CUDA, {"cores_allowed": 4}, "cores", "failed", "4 of 64 cores; cpus: 8", id="cores"
    ),
    pytest.param("{device: cpu}", {}, "cores", "warning", "Slurm's default", id="no-cpus-said"),
    pytest.param(CUDA, {"munge": "no socket"}, "munge", "warning", "no socket", id="munge"),
]


@pytest.mark.parametrize(("entry", "other", "name", "grade", "said"), ODD_NODES)
def test_a_node_that_is_otherwise_is_told(
    site: Callable[..., Site],
    entry: str,
    other: dict[str, Any],
    name: str,
    grade: str,
    said: str,
) -> None:
    found = judged(site(entry).cluster, told(**other))[name]
    assert found.grade == grade
    assert said in f"{found.observed} -> {found.remedy}"


def test_a_server_over_several_nodes_needs_munge(site: Callable[..., Site]) -> None:
    cluster = site("{device: cpu, resources: {nodes: 2}, stages: {ptq: {nodes: 1}}}").cluster
    resources = cluster.resources[Stage.DEPLOY]
    found = {each.name: each for each in judge(cluster, resources, told(munge="no"), (990, 1010))}
    assert found["munge"].grade is Grade.FAILED


def test_a_node_describes_itself_in_json(site: Callable[..., Site], tmp_path: Path) -> None:
    told_here = json.loads(json.dumps(describe_node(tmp_path)))
    assert set(told_here) == set(told())
    assert told_here["writable"] is True
    assert told_here["cores_allowed"] == len(os.sched_getaffinity(0))
    assert "job" in judged(site().cluster, told_here)
    assert describe_node(tmp_path / "no")["writable"] is False


@pytest.mark.parametrize(
    ("group", "limits", "limit"),
    [
        pytest.param("0::/a/b", {"a/memory.max": "100", "a/b/memory.max": "max"}, 100, id="above"),
        pytest.param("0::/a/b", {"a/memory.max": "100", "a/b/memory.max": "50"}, 50, id="smallest"),
        pytest.param("0::/a", {"a/memory.max": "max"}, None, id="no-limit"),
        pytest.param("0::/a", {}, None, id="not-told"),
        pytest.param(
            "9:cpu:/x\n4:memory:/slurm/job_1",
            {"memory/slurm/job_1/memory.limit_in_bytes": "2147483648"},
            2 * GIB,
            id="first-version",
        ),
        pytest.param(
            "4:memory:/a",
            {"memory/a/memory.limit_in_bytes": "9223372036854771712"},
            None,
            id="first-version-without-a-limit",
        ),
        pytest.param("", {}, None, id="empty"),
    ],
)
def test_memory_limits_are_read_from_control_groups(
    tmp_path: Path, group: str, limits: dict[str, str], limit: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group)
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert memory_limit_bytes(tmp_path) == limit


@pytest.mark.parametrize(
    ("arguments", "commands", "code"),
    [
        pytest.param(["check", "c"], {}, 0, id="holds"),
        pytest.param(["check"], {"sbatch": refusing("no")}, 1, id="fails"),
        pytest.param(["check"], {"sbatch": "exit 1"}, 5, id="no-configuration"),
        pytest.param(["check", "d"], {}, 2, id="unknown-cluster"),
        pytest.param(["check", "c"], {"scontrol": "exit 1"}, 5, id="no-controller"),
        pytest.param(["check", "c", "--probe"], {"scontrol": None}, 5, id="no-command"),
        pytest.param(["show", "c"], {}, 0, id="show"),
        pytest.param(["show", "d"], {}, 2, id="show-unknown"),
        pytest.param(["list"], {}, 0, id="list"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_exit_codes(
    site: Callable[..., Site],
    tmp_path: Path,
    arguments: list[str],
    commands: dict[str, str | None],
    code: int,
    as_json: bool,
) -> None:
    made = site(**commands)
    options = ["--workspace", str(tmp_path / "ws")] if arguments[0] == "check" else []
    given = ["cluster", *arguments, *options, *(["--json"] if as_json else [])]
    result = CliRunner().invoke(app, given, env={**made.environ})
    assert result.exit_code == code, result.output
    if as_json and code != 2:
        assert json.loads(result.stdout)
    elif code == 2:
        assert str(tmp_path / "clusters.yaml") in result.output


def test_show_names_the_file_of_every_value(site: Callable[..., Site], tmp_path: Path) -> None:
    made = site("{device: cpu, max_jobs: 3}")
    result = CliRunner().invoke(app, ["cluster", "show", "--json"], env={**made.environ})
    settings = json.loads(result.stdout)["settings"]
    assert settings["max_jobs"] == {"value": 3, "from": str(tmp_path / "clusters.yaml")}
    assert settings["continuations"] == {"value": 3, "from": "default"}
