"""Start a real Slurm on this machine, hurt it as asked, and leave nothing of it behind.

Nothing outside its directory is used: no /etc, no /var, no /run, no systemd. Every daemon runs in
the foreground under a supervisor of its own, so the whole cluster and its jobs end with the process
that started it, however that process ends.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from conductor.executors.local import SupervisedProcess, tail

from .configuration import CGROUPS, Layout

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db", "sbatch")
UP_S = 60.0
"""Longest start of one daemon. An idle machine needs a second; tests share theirs with others."""
COMMAND_S = 60.0
POLL_S = 0.05
GRACE_S = 5.0
LONGEST_SOCKET_PATH = 107
LONGEST_SOCKET = "/spool/rig00000-0/rig00000-0_99999.4294967291"
"""That of a batch job, below the directory of a rig."""
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
"""Daemons lie where a user that is not root seldom looks."""


def missing_programs() -> list[str]:
    """Return the programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class CommandFailed(Exception):
    """A command of Slurm that was to succeed did not."""


class SlurmRig:
    """A Slurm cluster whose nodes are all this machine; a context manager.

    Partitions: ``main`` (the default), ``short`` (a minute at most), and ``urgent``, whose jobs
    preempt those of ``requeued`` and of ``cancelled``, which end as they are called.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 2,
        accounting: bool = True,
        min_job_age_s: int = 300,
    ) -> None:
        """Choose ports and names; everything goes into ``directory``, and nothing starts yet.

        ``min_job_age_s`` is how long ``squeue`` still shows a job that has ended.

        Raises:
            ValueError: the path of the directory is too long for the sockets in it.
        """
        if len(str(directory.resolve())) > LONGEST_SOCKET_PATH - len(LONGEST_SOCKET):
            raise ValueError(f"{directory} is too long a path for sockets; name a shorter one")
        ports = _free_ports(nodes + 2)
        self._layout = Layout(
            directory=directory.resolve(),
            accounting=accounting,
            min_job_age_s=min_job_age_s,
            controller_port=ports[0],
            accounting_port=ports[1],
            node_ports=tuple(ports[2:]),
        )
        self._daemons: dict[str, SupervisedProcess] = {}

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes."""
        return self._layout.nodes

    @property
    def memory_enforced(self) -> bool:
        """Whether a job that takes more memory than it asked for is ended."""
        return self._layout.cgroups

    @property
    def environ(self) -> Mapping[str, str]:
        """What a process needs beside its environment to reach this Slurm."""
        return {"SLURM_CONF": str(self._layout.conf)}

    def start(self) -> None:
        """Start every daemon; return when all nodes are idle.

        Raises:
            TimeoutError: a daemon does not come up; the message has the end of its log.
        """
        self._layout.write()
        try:
            self._start_munge()
            if self._layout.accounting:
                self._start_database()
                self.start_accounting()
            self.start_controller()
            for node in self.nodes:
                self._start_node(node)
            for node in self.nodes:
                self._await_node(node)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every daemon and every job; return when nothing of them is left."""
        with ExitStack() as stack:
            for daemon in self._daemons.values():
                stack.callback(daemon.stop)
        self._daemons.clear()
        remove_cgroups(self.nodes)

    def __enter__(self) -> SlurmRig:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it, however the block was left."""
        self.stop()

    def start_controller(self) -> None:
        """Start slurmctld; return when it answers."""
        self._start("slurmctld", "-D", "-f", str(self._layout.conf))
        self._await("slurmctld", lambda: self.try_command("scontrol", "ping").returncode == 0)

    def stop_controller(self) -> None:
        """Stop slurmctld in good order, as for an update: it saves what it knows."""
        self._daemons.pop("slurmctld").stop()

    def kill_controller(self) -> None:
        """Kill slurmctld where it stands: it forgets the jobs of the last five seconds."""
        self._kill("slurmctld")

    def start_accounting(self) -> None:
        """Start slurmdbd; return when it listens."""
        self._start("slurmdbd", "-D", MYSQL_UNIX_PORT=str(self._layout.database_socket))
        self._await("slurmdbd", lambda: _listens(self._layout.accounting_port))

    def kill_accounting(self) -> None:
        """Kill slurmdbd where it stands; its database goes on."""
        self._kill("slurmdbd")

    def start_node(self, node: str) -> None:
        """Start a node; return when jobs may run on it."""
        self._start_node(node)
        self._await_node(node)

    def kill_node(self, node: str) -> None:
        """Let a node die with everything on it, and tell the controller.

        It would find out by itself, after half a minute in which nothing else happens.
        """
        self._kill(node)
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")

    def drain(self, node: str) -> None:
        """Let no further job start on a node."""
        self.command("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def undrain(self, node: str) -> None:
        """Let jobs start on a node again."""
        self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def forget_jobs(self) -> None:
        """Lose the controller's state as a reinstalled one does: job numbers start over."""
        for daemon in ("slurmctld", *self.nodes):
            self._kill(daemon)
        shutil.rmtree(self._layout.state)
        shutil.rmtree(self._layout.directory / "spool")
        self._layout.write()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)

    def end_walltime(self, job_id: str) -> None:
        """Let the walltime of a running job be over now: the least that can be asked is a minute.

        The controller looks every 30 s, so up to that passes before the job gets TIMEOUT.
        """
        self.command("scontrol", "update", f"JobId={job_id}", "EndTime=now+1seconds")

    def command(self, *words: str) -> str:
        """Run a command of Slurm; return what it prints.

        Raises:
            CommandFailed: it did not do it; the message has what it said.
        """
        done = self.try_command(*words)
        if done.returncode:
            raise CommandFailed(f"{' '.join(words)}: {done.stdout.strip()}")
        return done.stdout

    def try_command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm that may fail; both outputs are in ``stdout``."""
        return subprocess.run(
            words,
            env={**os.environ, **self.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_S,
        )

    def submit(self, script: str, *options: str) -> str:
        """Submit the lines of a shell script with options of sbatch; return the number of the job.

        What the job prints goes to ``JOB.out`` in the directory of the rig.
        """
        out = self._layout.directory / "%j.out"
        words = ("sbatch", "--parsable", "--chdir=/", f"--output={out}", *options)
        return self.command(*words, "--wrap", script).strip()

    def output(self, job_id: str) -> str:
        """Return what a job of ``submit`` has printed so far."""
        path = self._layout.directory / f"{job_id}.out"
        return path.read_text() if path.exists() else ""

    def state(self, job_id: str) -> tuple[str, str]:
        """Return state and reason of a job as squeue shows them."""
        shown = self.command("squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T|%r")
        state, _, reason = shown.strip().partition("|")
        return state, reason

    def await_state(self, job_id: str, *states: str, timeout_s: float = 60) -> str:
        """Return the reason of a job as soon as it is in one of ``states``.

        Raises:
            TimeoutError: it did not get there; the message has its last state and reason.
        """
        end = time.monotonic() + timeout_s
        while True:
            state, reason = self.state(job_id)
            if state in states:
                return reason
            if time.monotonic() > end:
                raise TimeoutError(f"job {job_id} is {state} ({reason}), not {' or '.join(states)}")
            time.sleep(POLL_S * 4)

    def cancel(self, *job_ids: str) -> None:
        """Cancel jobs; of one that has ended nothing is said."""
        self.try_command("scancel", "--quiet", *job_ids)

    def account(self, *filters: str, fields: str = "JobID,State,ExitCode") -> list[list[str]]:
        """Return what accounting knows of jobs, one row of ``fields`` for each start of each job.

        It lags behind the queue by some seconds.
        """
        words = ("sacct", "-nXPD", "-S", "now-1hours", "-o", fields, *filters)
        return [line.split("|") for line in self.command(*words).splitlines()]

    def _start_munge(self) -> None:
        munge = self._layout.munge_key.parent
        self._start(
            "munged",
            *("--foreground", "--force"),
            *(f"--key-file={self._layout.munge_key}", f"--socket={self._layout.munge_socket}"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self._await("munged", self._layout.munge_socket.exists)

    def _start_database(self) -> None:
        """Start MariaDB on a socket alone, without the syncs that a test does not need."""
        data = self._layout.database / "data"
        user = getpass.getuser()
        if not data.exists():
            subprocess.run(
                [
                    *(
                        _program("mariadb-install-db"),
                        "--no-defaults",
                        f"--user={user}",
                        "--skip-test-db",
                    ),
                    *(f"--datadir={data}", "--auth-root-authentication-method=socket"),
                    f"--auth-root-socket-user={user}",
                ],
                check=True,
                capture_output=True,
                timeout=UP_S,
            )
        self._start(
            "mariadbd",
            *("--no-defaults", f"--user={user}", f"--datadir={data}", "--skip-networking"),
            *(f"--socket={self._layout.database_socket}", f"--pid-file={data}/pid"),
            *("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"),
            *("--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync"),
        )
        self._await("mariadbd", self._layout.database_socket.exists)

    def _start_node(self, node: str) -> None:
        spool = self._layout.directory / "spool" / node
        spool.mkdir(parents=True, exist_ok=True)
        self._start("slurmd", "-D", "-N", node, "-f", str(self._layout.conf), name=node)

    def _await_node(self, node: str) -> None:
        words = ("sinfo", "-h", "-n", node, "-p", "main", "-o", "%T")
        self._await(node, lambda: self.try_command(*words).stdout.strip() in ("idle", "mixed"))

    def _start(self, program: str, *words: str, name: str = "", **environ: str) -> None:
        name = name or program
        self._daemons[name] = SupervisedProcess(
            [_program(program), *words],
            environ={**os.environ, **self.environ, "PATH": PATH, **environ},
            log=self._log(name),
            grace_s=GRACE_S,
        )

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.quit()
        while daemon.poll() is None:
            time.sleep(POLL_S)

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until a daemon is ready; say what it logged when it ends before, or never is."""
        end = time.monotonic() + UP_S
        while not ready():
            ended = self._daemons[name].poll() is not None
            if ended or time.monotonic() > end:
                logs = sorted(self._layout.logs.glob(f"*{name}*"))
                words = "ended" if ended else f"is not ready after {UP_S:.0f} s"
                told = "\n".join(f"{log}:\n{tail(log)}" for log in logs)
                raise TimeoutError(f"{name} {words}\n{told}")
            time.sleep(POLL_S)

    def _log(self, name: str) -> Path:
        return self._layout.logs / f"{name}.out"


def _program(name: str) -> str:
    return shutil.which(name, path=PATH) or name


def _free_ports(number: int) -> list[int]:
    """Return ports that nobody listens on at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def remove_cgroups(nodes: Iterable[str]) -> None:
    """Remove the control groups of nodes that are dead; nothing else ever does."""
    for node in nodes:
        for top in CGROUPS.glob(f"*/slurm_{node}"):
            below = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
            for directory in [*below, top]:
                with suppress(OSError):
                    directory.rmdir()
