"""A Slurm cluster as a release sees it: what its nodes are, and what the jobs of a stage ask for.

``conductor.cluster.files`` reads it from ``clusters.yaml``. Invariants:

* Whoever holds a cluster holds one that is whole: every stage has its resources, resolved.
* Sizes are per node; what is None is left to Slurm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from conductor.chain import Stage
from conductor.cluster.files import SUBMITTED as SUBMITTED
from conductor.cluster.files import Described, find_described
from conductor.compatibility import Device
from conductor.failure import unusable
from conductor.probes.machine import Accelerator

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job asks for; sizes are per node, and None is left to Slurm.

    ``modules`` are loaded before anything else, then the lines of ``setup`` are run by the shell.
    ``extra`` holds further options of sbatch by their long names; True is one without a value.
    """

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    nodes: int
    gpus: int
    cpus: int | None
    memory_gib: float | None
    time_minutes: int | None
    container_image: str | None
    container_mounts: tuple[str, ...]
    modules: tuple[str, ...]
    setup: tuple[str, ...]
    extra: Mapping[str, str | int | bool]

    def document(self) -> dict[str, Any]:
        """Return the resources as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster: its nodes, where our code lies on them, and what each stage asks for.

    ``file`` is the last file that describes it. ``python`` runs our code on the nodes;
    ``environments`` is the root of the stage environments, None for the usual one, and
    ``interpreters`` are given ones, by the name of the environment that they stand for.
    ``max_jobs`` bounds the jobs of one conductor at a time, and ``continuations`` how often a job
    that ran into its walltime is continued.
    """

    name: str
    file: Path
    device: Device
    accelerator: Accelerator | None
    python: Path
    environments: Path | None
    interpreters: Mapping[str, Path]
    resources: Mapping[Stage, Resources]
    max_jobs: int | None
    continuations: int
    poll_s: float
    command_timeout_s: float

    def document(self) -> dict[str, Any]:
        """Return the cluster as JSON has it."""
        return {
            "name": self.name,
            "file": str(self.file),
            "device": self.device.value,
            "accelerator": self.accelerator and asdict(self.accelerator),
            "python": str(self.python),
            "environments": self.environments and str(self.environments),
            "interpreters": {name: str(path) for name, path in self.interpreters.items()},
            "resources": {stage.value: each.document() for stage, each in self.resources.items()},
            "max_jobs": self.max_jobs,
            "continuations": self.continuations,
            "poll_s": self.poll_s,
            "command_timeout_s": self.command_timeout_s,
        }


def load_cluster(name: str | None, environ: Mapping[str, str], directory: Path) -> Cluster:
    """Return a cluster as the user's and the project's ``clusters.yaml`` describe it.

    Args:
        name: the cluster; None for the only one that is described.
        environ: process variables; they say where the user's file lies.
        directory: where the project's file is looked for, and in its parents up to the project.

    Raises:
        Failure: USER_CONFIG_ERROR naming file, field and remedy.
    """
    return build(find_described(name, environ, directory))


def build(described: Described) -> Cluster:
    """Return the cluster that the files describe.

    Raises:
        Failure: USER_CONFIG_ERROR when something is missing, or does not fit together.
    """
    if described.value("device") is None:
        raise unusable(f"{described.where('device')}: is missing; say cpu or cuda")
    device = Device(described.value("device"))
    environments = described.value("environments")
    resources = {stage: _resources(described, stage) for stage in SUBMITTED}
    _refuse_unequal_nodes(described, resources)
    return Cluster(
        name=described.name,
        file=described.file,
        device=device,
        accelerator=_accelerator(described, device),
        python=_path(described.value("python")),
        environments=_path(environments) if environments else None,
        interpreters={
            name: _path(path) for name, path in described.section("interpreters").items()
        },
        resources=resources,
        max_jobs=described.value("max_jobs"),
        continuations=int(described.value("continuations")),
        poll_s=float(described.value("poll_s")),
        command_timeout_s=float(described.value("command_timeout_s")),
    )


def _accelerator(described: Described, device: Device) -> Accelerator | None:
    said = described.section("accelerator")
    if not said:
        return None
    if device is Device.CPU:
        name = f"accelerator.{next(iter(said))}"
        raise unusable(f"{described.where(name)}: there is none on a cpu; leave one of them out")
    if "name" not in said:
        raise unusable(f"{described.where('accelerator.name')}: is missing; nvidia-smi has it")
    memory_gib, capability = said.get("memory_gib"), said.get("compute_capability")
    major, _, minor = (capability or "").partition(".")
    return Accelerator(
        name=said["name"],
        memory_bytes=int(memory_gib * GIB) if memory_gib else None,
        driver="",
        compute_capability=(int(major), int(minor)) if capability else None,
    )


def _resources(described: Described, stage: Stage) -> Resources:
    section = f"stages.{stage}"
    said = described.section(section)
    nodes = int(said["nodes"])
    mounts, image = said.get("container.mounts", ()), said.get("container.image")
    if mounts and not image:
        name = f"{section}.container.mounts"
        raise unusable(f"{described.where(name)}: needs container.image beside it")
    if image and nodes > 1:
        name = f"{section}.container.image"
        raise unusable(
            f"{described.where(name)}: a job in a container cannot start anything on its further "
            "nodes; say nodes: 1, or leave the image out"
        )
    if stage is Stage.PTQ and nodes > 1:
        raise unusable(
            f"{described.where(f'{section}.nodes')}: a quantizer runs on one node; say nodes: 1"
        )
    return Resources(
        partition=said.get("partition"),
        account=said.get("account"),
        qos=said.get("qos"),
        constraint=said.get("constraint"),
        nodes=nodes,
        gpus=int(said["gpus"]),
        cpus=int(said["cpus"]) if "cpus" in said else None,
        memory_gib=said.get("memory_gib"),
        time_minutes=minutes_of(said["time"]),
        container_image=image,
        container_mounts=tuple(mounts),
        modules=tuple(said.get("modules", ())),
        setup=tuple(said.get("setup", ())),
        extra=_without_false(described.section(f"{section}.extra")),
    )


def _refuse_unequal_nodes(described: Described, resources: Mapping[Stage, Resources]) -> None:
    """Refuse stages that would serve the same model over different numbers of nodes."""
    serving = {stage: resources[stage].nodes for stage in SUBMITTED if stage is not Stage.PTQ}
    if len(set(serving.values())) > 1:
        stages = ", ".join(f"{stage} {nodes}" for stage, nodes in serving.items())
        most = max(serving, key=lambda stage: serving[stage])
        raise unusable(
            f"{described.where(f'stages.{most}.nodes')}: both sides are served alike, and the "
            f"stages ask for different numbers of nodes ({stages}); say the same of all three"
        )


def _without_false(extra: Mapping[str, Any]) -> dict[str, str | int | bool]:
    """Return the options that are there: false takes away what was said before."""
    return {name: value for name, value in extra.items() if value is not False}


def minutes_of(time: str) -> int:
    """Return a walltime in one of Slurm's forms as minutes, rounded up.

    The forms are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S (sbatch's manual page, ``--time``).
    """
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = ((0, *parts, 0)[:3]) if len(parts) < 3 else parts
    return int(days or 0) * 24 * 60 + hours * 60 + minutes + ceil(seconds / 60)


def _path(text: str) -> Path:
    return Path(text).expanduser()
