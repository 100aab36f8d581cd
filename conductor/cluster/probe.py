"""What a node is like, told by a job of ``day0 cluster check --probe``. Measures, never judges."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conductor.executors.slurm.folders import JobFolder
from conductor.probes.machine import probe_machine

MUNGE_TIMEOUT_S = 20
UNLIMITED_BYTES = 1 << 60
"""Control groups of the first version say a number near 2^63 for no limit."""


def main(path: str) -> None:
    """Write what this node is like as the outcome of the job in the folder ``path``."""
    folder = JobFolder(Path(path))
    folder.write("outcome", {"status": "ok", "answer": describe_node(folder.path)})


def describe_node(shared: Path) -> dict[str, Any]:
    """Return the facts of this node as JSON; sizes in bytes, the time in UTC epoch seconds.

    Args:
        shared: a directory on the storage that the node shares with whoever asks.
    """
    return {
        "at": time.time(),
        "host": os.uname().nodename,
        "day0_version": version("day0"),
        "writable": _is_writable(shared),
        "machine": probe_machine().document(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "memory_limit_bytes": memory_limit_bytes(Path("/")),
        "munge": _munge(),
    }


def _is_writable(directory: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def memory_limit_bytes(root: Path) -> int | None:
    """Return the smallest memory limit of this process's control group and those above it.

    ``None`` where there is none, or the system under ``root`` does not tell.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            base = root / "sys/fs/cgroup" / controllers
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            below = base / group.lstrip("/")
            found += [_limit(each / name) for each in (below, *below.parents)]
    return min((limit for limit in found if limit is not None), default=None)


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() and int(text) < UNLIMITED_BYTES else None


def _munge() -> str | None:
    """Return what is wrong with munge here, or None when a credential can be made and read."""
    if shutil.which("munge") is None or shutil.which("unmunge") is None:
        return "its commands are not installed"
    socket = _munge_socket()
    try:
        made = subprocess.run(
            ["munge", "--no-input", *socket],  # noqa: S607
            capture_output=True,
            check=True,
            timeout=MUNGE_TIMEOUT_S,
        )
        subprocess.run(
            ["unmunge", "--output=/dev/null", "--metadata=/dev/null", *socket],  # noqa: S607
            input=made.stdout,
            capture_output=True,
            check=True,
            timeout=MUNGE_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        return error.stderr.decode(errors="replace").strip() or f"exit status {error.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None


def _munge_socket() -> list[str]:
    """Return the option that names Slurm's socket of munge; nothing where it is the usual one."""
    try:
        said = subprocess.run(
            ["scontrol", "show", "config"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=MUNGE_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    named = re.search(r"^AuthInfo\s.*\bsocket=([^,\s]+)", said.stdout, re.MULTILINE)
    return [f"--socket={named[1]}"] if named else []


if __name__ == "__main__":
    main(sys.argv[1])
