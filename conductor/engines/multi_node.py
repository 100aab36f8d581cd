"""A server over several nodes of one Slurm allocation: who they are, and what runs on each.

vLLM's own launch over nodes is used, without Ray: the server runs on the first node, where we are,
and every further node runs a companion that has a share of the model and no API. Slurm starts the
companions, inside the allocation. Nothing is started here: these are the commands and variables.

What the nodes tell each other is neither encrypted nor authenticated, as vLLM has it: the network
between the nodes of an allocation is trusted. The API stays on loopback.
"""

from __future__ import annotations

import ipaddress
import random
import re
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from conductor.executors.local import WORKERS
from conductor.failure import Failure
from gates import FailureClass

COMPANION = WORKERS / "join_server.py"
SCONTROL_TIMEOUT_S = 60.0
# Below those that Linux hands out by itself: rank 0 listens many seconds after the port is drawn.
PORTS = range(20_000, 32_768)
_NODE = re.compile(r"^NodeName=(\S+)\s(?:.*\s)?NodeAddr=(\S+)", re.MULTILINE)
_PRIVATE = ("VLLM_API_KEY", "VLLM_RPC_BASE_PATH")
"""What a companion does not get: the API's key, and a directory that the first node alone has."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node of the allocation: by what name Slurm starts something there, and its address."""

    name: str
    address: str


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the processes of one server find each other: hosts and IP addresses by rank.

    ``port`` is of the first host. ``interface`` carries its address there, or is None when unknown.
    """

    hosts: tuple[Host, ...]
    addresses: tuple[str, ...]
    port: int
    interface: str | None


def hosts_of_job(
    environ: Mapping[str, str], run: Callable[..., Any] = subprocess.run
) -> tuple[Host, ...]:
    """Return the nodes of the Slurm job that ``environ`` is of, ours first; none where it has one.

    Raises:
        Failure: INFRA_TRANSIENT when Slurm does not say where they are.
    """
    if int(environ.get("SLURM_JOB_NUM_NODES", "1")) < 2:
        return ()
    command = ["scontrol", "--oneliner", "show", "node", environ["SLURM_JOB_NODELIST"]]
    try:
        told = run(command, env=environ, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unknown(command, str(error)) from None
    if told.returncode:
        raise _unknown(command, told.stderr.strip())
    hosts = read_hosts(told.stdout, environ["SLURMD_NODENAME"])
    if len(hosts) != int(environ["SLURM_JOB_NUM_NODES"]):
        raise _unknown(command, f"it names {len(hosts)} nodes")
    return hosts


def read_hosts(shown: str, first: str) -> tuple[Host, ...]:
    """Read the hosts in what ``scontrol --oneliner show node`` says; that named ``first`` leads."""
    hosts = [Host(name=name, address=address) for name, address in _NODE.findall(shown)]
    return tuple(sorted(hosts, key=lambda host: host.name != first))


def _unknown(command: Sequence[str], why: str) -> Failure:
    return Failure(
        FailureClass.INFRA_TRANSIENT,
        f"the nodes of this job are not known: `{' '.join(command)}` failed ({why}); see that "
        "Slurm answers on its compute nodes, then start the stage again",
    )


def arrange(hosts: tuple[Host, ...]) -> Meeting:
    """Arrange where a server's processes meet, with a port that is free at this moment.

    Raises:
        Failure: INFRA_TRANSIENT when the address of a node is not known here.
    """
    try:
        others = tuple(_resolve(host.address) for host in hosts[1:])
        ours = _facing(others[0])
    except OSError as error:
        addresses = ", ".join(host.address for host in hosts[1:])
        raise Failure(
            FailureClass.INFRA_TRANSIENT,
            f"node {hosts[0].name} finds no way to {addresses} ({error}); names and addresses of "
            "nodes must be known on all of them",
        ) from None
    return Meeting(
        hosts=hosts,
        addresses=(ours, *others),
        port=next(port for port in random.sample(PORTS, len(PORTS)) if is_free(ours, port)),
        interface=_interface_of(ours),
    )


def _resolve(address: str) -> str:
    return str(socket.getaddrinfo(address, None)[0][4][0])


def _facing(address: str) -> str:
    """Return our own address as ``address`` would see it; nothing is sent.

    Our own name may stand for an address of the loopback network here (``/etc/hosts`` of Debian).
    """
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))
        return str(probe.getsockname()[0])


def is_free(address: str, port: int) -> bool:
    """True when ``port`` can be bound at ``address``, which is one of ours."""
    with socket.socket(_family(address)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET if ipaddress.ip_address(address).version == 4 else socket.AF_INET6


def _interface_of(address: str) -> str | None:
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, has in interfaces if address in {a.address for a in has}), None)


def rank_arguments(meeting: Meeting, rank: int) -> list[str]:
    """Return the arguments that make a vLLM process the one of ``rank``."""
    return [
        *("--nnodes", str(len(meeting.hosts)), "--node-rank", str(rank)),
        *("--master-addr", meeting.addresses[0], "--master-port", str(meeting.port)),
    ]


def rank_environ(environ: Mapping[str, str], meeting: Meeting, rank: int) -> dict[str, str]:
    """Return the variables of the process of ``rank``, from those of the server.

    Left to itself, vLLM takes the address of the route to the internet, which a node may not have,
    and gloo what the node's own name stands for; nodes of a cluster name their interfaces alike.
    """
    kept = {name: value for name, value in environ.items() if not rank or name not in _PRIVATE}
    if meeting.interface:
        kept.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
    return {**kept, "VLLM_HOST_IP": meeting.addresses[rank]}


def companion_command(
    interpreter: Path, arguments: Sequence[str], meeting: Meeting, rank: int
) -> list[str]:
    """Return the command that starts the companion of ``rank``, with the server's ``arguments``.

    A step may use what the job has on its node; without ``--overlap`` it would wait for the other
    side's server. Whatever of it is left is ended with the job.
    """
    return [
        *("srun", "--overlap", "--nodes=1", "--ntasks=1", "--export=ALL"),
        f"--nodelist={meeting.hosts[rank].name}",
        *(str(interpreter), str(COMPANION), *arguments, *rank_arguments(meeting, rank)),
    ]
