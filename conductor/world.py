"""What a release finds: environments to run in, variables, hardware, here or on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from conductor.chain import Stage
from conductor.cluster.description import Cluster
from conductor.compatibility import Device
from conductor.engines.multi_node import Host
from conductor.environments.builder import Environments
from conductor.probes.machine import Accelerator, Machine, probe_machine


@dataclass(frozen=True, kw_only=True)
class World:
    """What a release finds: environments to run in, variables, and the hardware that computes.

    With a ``cluster``, environments and machine are those of its nodes, and nothing runs here.
    """

    environments: Environments
    environ: Mapping[str, str]
    machine: Machine
    cluster: Cluster | None = None
    nodes: tuple[Host, ...] = ()
    """The nodes of the allocation that a server runs over, ours first; here alone without any."""

    @property
    def serving_nodes(self) -> int:
        """Over how many nodes a server is spread."""
        return 1 if self.cluster is None else self.cluster.resources[Stage.CANDIDATE_EVAL].nodes

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> World:
        """Look at this machine, with the process variables ``environ``."""
        machine = probe_machine()
        return cls(
            environments=Environments(device=machine.device, variables=environ),
            environ=environ,
            machine=machine,
        )

    @classmethod
    def on(cls, cluster: Cluster, environ: Mapping[str, str]) -> World:
        """Take the word of ``clusters.yaml`` for the nodes of a cluster; nothing is looked at."""
        return cls(
            environments=Environments(
                cluster.environments,
                device=cluster.device,
                variables=environ,
                interpreters=cluster.interpreters,
            ),
            environ=environ,
            machine=node_of(cluster),
            cluster=cluster,
        )


def node_of(cluster: Cluster) -> Machine:
    """Return a node as the evaluation of the candidate is given it; what is not told is unknown.

    What has no name is named after the cluster, so that two clusters are not taken for one.
    """
    resources = cluster.resources[Stage.CANDIDATE_EVAL]
    unnamed = Accelerator(
        name=f"accelerator of cluster {cluster.name}",
        memory_bytes=None,
        driver="",
        compute_capability=None,
    )
    computes = cluster.device is Device.CUDA
    return Machine(
        device=cluster.device,
        accelerators=(cluster.accelerator or unnamed,) * resources.gpus if computes else (),
        processor=f"processor of cluster {cluster.name}",
        cores=resources.cpus,
        memory_bytes=None,
        memory_available_bytes=None,
        system=None,
    )
