"""The files that the daemons of a test Slurm read.

Everything lies below one directory and listens on loopback. Times are as short as Slurm takes
them, so that what a cluster does in minutes happens here in seconds.
"""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

CPUS = 16
"""What each node declares, whatever it has: enough for several small jobs at a time."""
GPU_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
"""What each node offers as its GPUs: Slurm only asks that the files exist."""
MEMORY_SHARE = 0.75
"""Of this machine's memory, what all nodes declare together."""
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a test Slurm keeps its files, and the ports and names it goes by."""

    directory: Path
    accounting: bool
    min_job_age_s: int
    controller_port: int
    accounting_port: int
    node_ports: tuple[int, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of nodes that no other Slurm of this machine has: its cgroups go by them."""
        return tuple(f"rig{self.controller_port}-{n}" for n in range(1, len(self.node_ports) + 1))

    @property
    def conf(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.directory / "munge" / "socket"

    @property
    def munge_key(self) -> Path:
        return self.directory / "munge" / "key"

    @property
    def database(self) -> Path:
        return self.directory / "database"

    @property
    def database_socket(self) -> Path:
        return self.database / "socket"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def logs(self) -> Path:
        return self.directory / "log"

    @cached_property
    def cgroups(self) -> bool:
        """Whether jobs live in control groups, which enforce memory and miss no process."""
        return os.geteuid() == 0 and all(
            os.access(CGROUPS / controller, os.W_OK) and (CGROUPS / controller / "tasks").exists()
            for controller in ("freezer", "memory")
        )

    def write(self) -> None:
        """Write every file and make every directory that the daemons expect."""
        for directory in (self.munge_key.parent, self.database, self.state, self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        for directory in (self.munge_key.parent, self.database, self.state):
            directory.chmod(0o700)
        if not self.munge_key.exists():
            self.munge_key.write_bytes(os.urandom(128))
            self.munge_key.chmod(0o400)
        self.conf.write_text(self._slurm_conf())
        (self.directory / "gres.conf").write_text(
            "".join(f"Name=gpu File={device}\n" for device in GPU_DEVICES)
        )
        if self.cgroups:
            (self.directory / "cgroup.conf").write_text(
                f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={CGROUPS}\nConstrainRAMSpace=yes\n"
            )
        slurmdbd_conf = self.directory / "slurmdbd.conf"
        slurmdbd_conf.write_text(self._slurmdbd_conf())
        slurmdbd_conf.chmod(0o600)

    def _slurm_conf(self) -> str:
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        memory_mib = int(psutil.virtual_memory().total * MEMORY_SHARE) // 2**20
        everything = f"Nodes={','.join(self.nodes)} State=UP"
        return "\n".join(
            [
                "ClusterName=rig",
                f"SlurmctldHost={host}(127.0.0.1)",
                f"SlurmctldPort={self.controller_port}",
                f"SlurmUser={user}",
                f"SlurmdUser={user}",
                "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
                f"AuthInfo=socket={self.munge_socket},cred_expire=5",
                f"StateSaveLocation={self.state}",
                f"SlurmdSpoolDir={self.directory}/spool/%n",
                f"SlurmctldPidFile={self.directory}/slurmctld.pid",
                f"SlurmdPidFile={self.directory}/slurmd.%n.pid",
                f"SlurmctldLogFile={self.logs}/slurmctld.log",
                f"SlurmdLogFile={self.logs}/slurmd.%n.log",
                *self._confinement(),
                *self._accounting(),
                "MpiDefault=none",
                "ReturnToService=2",
                "SlurmdTimeout=6",
                "SlurmdParameters=config_overrides",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_CPU_Memory",
                "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1",
                "PriorityType=priority/basic",
                "PreemptType=preempt/partition_prio",
                "PreemptMode=REQUEUE",
                "JobRequeue=1",
                f"MinJobAge={self.min_job_age_s}",
                "KillWait=2",
                "GresTypes=gpu",
                *(
                    f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
                    f"CPUs={CPUS} RealMemory={memory_mib // len(self.nodes)} "
                    f"Gres=gpu:{len(GPU_DEVICES)} State=UNKNOWN"
                    for name, port in zip(self.nodes, self.node_ports, strict=True)
                ),
                f"PartitionName=main {everything} Default=YES DefaultTime=60 DefMemPerCPU=256 "
                "PriorityTier=10 PreemptMode=OFF",
                f"PartitionName=short {everything} MaxTime=1 PriorityTier=10 PreemptMode=OFF",
                f"PartitionName=requeued {everything} PriorityTier=1 PreemptMode=REQUEUE",
                f"PartitionName=cancelled {everything} PriorityTier=1 PreemptMode=CANCEL",
                f"PartitionName=urgent {everything} PriorityTier=100 PreemptMode=OFF",
                "",
            ]
        )

    def _confinement(self) -> list[str]:
        kind = "cgroup" if self.cgroups else "linuxproc"
        return [
            f"ProctrackType=proctrack/{kind}",
            f"TaskPlugin=task/{'cgroup' if self.cgroups else 'none'}",
        ]

    def _accounting(self) -> list[str]:
        if not self.accounting:
            return ["AccountingStorageType=accounting_storage/none"]
        return [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=localhost",
            f"AccountingStoragePort={self.accounting_port}",
            # For this connection the socket of munge stands here, not in AuthInfo.
            f"AccountingStoragePass={self.munge_socket}",
            "AccountingStoreFlags=job_comment",
            "JobAcctGatherType=jobacct_gather/linux",
            "JobAcctGatherFrequency=task=2",
        ]

    def _slurmdbd_conf(self) -> str:
        user = getpass.getuser()
        return "\n".join(
            [
                f"AuthInfo=socket={self.munge_socket}",
                "DbdHost=localhost",
                f"DbdPort={self.accounting_port}",
                f"SlurmUser={user}",
                f"LogFile={self.logs}/slurmdbd.log",
                f"PidFile={self.directory}/slurmdbd.pid",
                "StorageType=accounting_storage/mysql",
                "StorageHost=localhost",
                f"StorageUser={user}",
                "StorageLoc=slurm_acct_db",
                "",
            ]
        )
