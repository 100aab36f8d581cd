"""Know a process again, and end what somebody left running.

A process id proves nothing: it is given again. A process is known by its id together with the
tick of its start (counted from boot, so no wall clock decides), the boot and the host; or by a
random token in its environment, which its children inherit. What neither names is never touched.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conductor.files import read_json, write_json

RECORD_SUFFIX = ".process.json"
CACHE_PREFIX = "datasets-cache-"  # directories of a harness that end with its evaluation
MARK = "DAY0_PROCESS"
JOB = "DAY0_JOB"
"""Names the cluster job that we are, for processes that end with it and with nobody else."""
JOBS = "jobs"
"""The directory of the jobs of a task, in that of the task."""
GRACE_S = 10.0
KILL_S = 10.0  # a process that SIGKILL does not end within this waits for a device or a disk
POLL_S = 0.05
PROC = Path("/proc")
_TOKEN = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)\.tmp")


@dataclass(frozen=True)
class Identity:
    """One process on one host since one boot; ``start_ticks`` counts from that boot."""

    pid: int
    start_ticks: int
    boot_id: str
    host: str


def this_host() -> str:
    """Return the name of this machine or container."""
    return socket.gethostname()


def boot_id() -> str:
    """Return the kernel's random id of this boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def identify(pid: int) -> Identity:
    """Return the identity of a process that exists.

    Raises:
        ProcessLookupError: there is no such process.
    """
    entry = _entry(pid)
    if entry is None:
        raise ProcessLookupError(f"no process has the id {pid}")
    return Identity(pid, entry.start_ticks, boot_id(), this_host())


def is_alive(identity: Identity) -> bool:
    """Tell whether this very process runs, here and now; one that only waits to be reaped is dead.

    A process of another host cannot be seen from here, and is not alive as far as this tells.
    """
    if (identity.host, identity.boot_id) != (this_host(), boot_id()):
        return False
    entry = _entry(identity.pid)
    return entry is not None and entry.lives and entry.start_ticks == identity.start_ticks


class _Entry(NamedTuple):
    """What ``/proc/PID/stat`` says of a process."""

    state: str
    parent: int
    start_ticks: int

    @property
    def lives(self) -> bool:
        return self.state not in "ZX"


def _entry(pid: int) -> _Entry | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name stands in parentheses and may hold any character, so the fields count from its end.
    state, parent, *rest = text.rpartition(")")[2].split()
    return _Entry(state, int(parent), int(rest[17]))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A supervisor, whatever descends from it, and whatever carries its token."""

    token: str
    root: Identity | None

    def members(self) -> dict[int, _Entry]:
        """Return the members that live, by process id; never this process itself."""
        table = _own_processes()
        root = self.root.pid if self.root and is_alive(self.root) else None
        found = {pid for pid in table if pid == root or _carries(pid, self.token)}
        descendants = found
        while descendants:
            descendants = {pid for pid in table if table[pid].parent in found} - found
            found |= descendants
        return {pid: table[pid] for pid in found}

    def end(self, grace_s: float) -> tuple[set[int], set[int]]:
        """End every member: SIGTERM, ``grace_s`` seconds, then SIGKILL.

        Members that are stopped are woken, so that they can end in an orderly way.

        Returns:
            The process ids of those that were ended, and of those that SIGKILL did not end.
        """
        seen: dict[int, _Entry] = {}
        now = time.monotonic()
        kill_at, give_up_at = now + grace_s, now + grace_s + KILL_S
        empty_looks = 0
        # Twice nobody: one look may miss a child that is born while it looks.
        while empty_looks < 2 and (now := time.monotonic()) < give_up_at:
            members = self.members()
            for pid, entry in members.items():
                if now >= kill_at:
                    send(pid, entry.start_ticks, signal.SIGKILL)
                elif seen.get(pid) is None:
                    send(pid, entry.start_ticks, signal.SIGTERM, signal.SIGCONT)
            seen |= members
            empty_looks = 0 if members else empty_looks + 1
            if members:
                time.sleep(POLL_S)
        left = set() if empty_looks == 2 else set(self.members())
        return set(seen) - left, left


def _own_processes() -> dict[int, _Entry]:
    """Return the living processes of this user, by id, without this one."""
    table = {}
    for directory in PROC.iterdir():
        if directory.name.isdecimal() and int(directory.name) != os.getpid():
            with suppress(OSError):
                entry = _entry(int(directory.name))
                if entry and entry.lives and directory.stat().st_uid == os.getuid():
                    table[int(directory.name)] = entry
    return table


def _carries(pid: int, token: str) -> bool:
    try:
        variables = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{MARK}={token}".encode() in variables


def send(pid: int, start_ticks: int, *numbers: signal.Signals) -> None:
    """Send signals to a process if it is still the one that started at ``start_ticks``."""
    with suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            entry = _entry(pid)
            if entry and entry.start_ticks == start_ticks:
                for number in numbers:
                    signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def write_record(path: Path, token: str, identity: Identity | None) -> None:
    """Write down a family: its token before it is started, its supervisor's identity after."""
    known = asdict(identity) if identity else {"host": this_host()}
    write_json(path, {"token": token, "job": os.environ.get(JOB), **known})


def end_leftovers(directory: Path) -> list[str]:
    """End what a dead conductor's records below ``directory`` still name, and clean up after it.

    To be called by the one conductor that holds the run, before it starts anything. Records and
    temporary files of writers that are gone are removed; a record of another host stays.

    Returns:
        One sentence for everything that was ended, left alone or not understood.
    """
    told = []
    elsewhere = []
    # os.walk, unlike a glob, bears that what still runs takes directories away meanwhile.
    tree = [(Path(where), directories, names) for where, directories, names in os.walk(directory)]
    files = [place / name for place, _, names in tree for name in names]
    for record in sorted(each for each in files if each.name.endswith(RECORD_SUFFIX)):
        told += end_recorded(record)
        if record.exists():
            elsewhere.append(record.parent)
    with_jobs = [
        place for place, directories, _ in tree if JOBS in directories and _is_at_work(place)
    ]
    remove_unfinished(directory, [*elsewhere, *with_jobs], lambda pid: not _runs(pid))
    return told


def _is_at_work(directory: Path) -> bool:
    """True when a job of the task in ``directory`` was not seen to end, and may write there."""
    return any(not (job / "ended.json").exists() for job in (directory / JOBS).iterdir())


def end_recorded(record: Path) -> list[str]:
    """End the family that one record names, then remove the record; return what there is to say."""
    try:
        family, host, job = _read_record(record)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        with suppress(OSError):
            record.unlink()
        return [
            f"{record} is no readable process record ({error}); look for servers and workers that "
            "still run, and end them"
        ]
    if job is not None and JOB not in os.environ:
        return []  # the cluster ends what its job has started
    if job is not None and host != this_host():
        record.unlink(missing_ok=True)  # an earlier start of our task, on another node
        return []
    if host != this_host():
        return [
            f"{record} names processes on host {host}, which cannot be seen from here; look "
            "there, end them, and delete the record"
        ]
    ended, left = family.end(GRACE_S)
    if left:
        return [f"{record} names {_processes(left)} that SIGKILL did not end; reboot the machine"]
    record.unlink(missing_ok=True)
    return [f"ended {_processes(ended)} that {record} names"] if ended else []


def _processes(pids: Iterable[int]) -> str:
    ordered = sorted(pids)
    noun = "process" if len(ordered) == 1 else "processes"
    return f"{noun} {', '.join(map(str, ordered))}"


def _read_record(record: Path) -> tuple[Family, str, str | None]:
    document = read_json(record)
    if not isinstance(document, Mapping):
        raise ValueError("it is not a mapping")
    token, host = document.get("token"), document.get("host")
    # An empty token would name every process whose variable is empty.
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ValueError("token must be 32 hexadecimal digits")
    if not isinstance(host, str):
        raise ValueError("host must be a name")
    job = document.get("job")
    if not isinstance(job, str | None):
        raise ValueError("job must be a number in quotes, or null")
    return Family(token=token, root=_read_identity(document)), host, job


def _read_identity(document: Mapping[str, Any]) -> Identity | None:
    if "pid" not in document:
        return None  # its conductor died between the record and the start
    pid, start_ticks = document["pid"], document.get("start_ticks")
    if type(pid) is not int or type(start_ticks) is not int:
        raise ValueError("pid and start_ticks must be whole numbers")
    return Identity(pid, start_ticks, str(document.get("boot_id")), str(document["host"]))


def remove_unfinished(
    directory: Path,
    spared: Collection[Path] = (),
    is_gone: Callable[[int], bool] = lambda pid: True,
) -> None:
    """Remove unfinished files below ``directory``, but none below a ``spared`` directory.

    ``is_gone`` tells of a process id whether whoever wrote under it is no more.
    """
    for where, directories, files in os.walk(directory):
        place = Path(where)
        if any(place.is_relative_to(each) for each in spared):
            continue
        for name in files:
            writer = _TEMPORARY.fullmatch(name)
            if writer and is_gone(int(writer["pid"])):
                (place / name).unlink(missing_ok=True)
        for name in directories:
            if name.startswith(CACHE_PREFIX):
                shutil.rmtree(place / name, ignore_errors=True)


def remove_records(directory: Path) -> None:
    """Remove the records below ``directory``, whose processes have all ended with their job."""
    for where, _, files in os.walk(directory):
        for name in files:
            if name.endswith(RECORD_SUFFIX):
                (Path(where) / name).unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    entry = _entry(pid)
    return entry is not None and entry.lives


_OOM_COUNTERS = {"memory": "memory.oom_control", "": "memory.events"}


def memory_kills(proc: Path = PROC, cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how often the kernel killed a process of our control group for want of memory.

    Without a readable counter of the group (cgroup v1 or v2), that of the whole machine counts.
    """
    counters = []
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            for controller, name in _OOM_COUNTERS.items():
                if controller in controllers.split(","):
                    base = cgroups / controller
                    # In a container the group's own directory is mounted as the root.
                    counters += [base / group.lstrip("/") / name, base / name]
    for counter in [*counters, proc / "vmstat"]:
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", counter.read_text(encoding="utf-8"), re.M)
            if found:
                return int(found[1])
    return 0
