"""What a release ran on and with: ``env.json``.

Invariants:

* Only variables of :data:`RECORDED_VARIABLES` are written, and of these none whose name has a word
  for a secret.
* A fact that cannot be found out is null, and no accelerator is a sentence that says so.
* The file is replaced only where something is not what it was; what it was then stays, under
  ``earlier``. A release that is resumed on the same machine leaves the same file.
* Of a cluster, ``machine`` is what ``clusters.yaml`` says of a node, and ``nodes`` what jobs found.
  Which nodes those were is no change of the conditions.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conductor.config import Executor
from conductor.documents import validate
from conductor.environments.builder import Environments, installed_packages
from conductor.failure import Failure
from conductor.files import read_json, write_json
from conductor.jobs import job_folders
from conductor.probes.machine import probe_driver
from conductor.redaction import names_secret, redact_document
from conductor.world import World

NAME = "env.json"
VERSION = 1
PACKAGE = Path(__file__).parent.parent
GIT_TIMEOUT_S = 20

RECORDED_VARIABLES = (
    *("CUBLAS_*", "CUDA_*", "CUDNN_*", "FLASHINFER_*", "GOMP_*", "KMP_*", "MALLOC_*", "MKL_*"),
    *("NCCL_*", "NVIDIA_*", "OMP_*", "OPENBLAS_*", "PYTORCH_*", "TORCH_*", "TRITON_*", "VLLM_*"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"),
    *("TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "DAY0_DETERMINISTIC", "DAY0_ENVIRONMENTS"),
    *("XDG_CACHE_HOME",),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHASHSEED", "TMPDIR", "LANG", "LC_ALL", "TZ"),
)
"""The variables that can change what a tool does, by name or pattern."""

CONTAINER_FILES = {".dockerenv": "docker", "run/.containerenv": "podman"}
"""Files that a container engine puts into every container, by what they tell."""

CONTAINER_GROUPS = {
    "kubepods": "kubernetes",
    "docker": "docker",
    "libpod": "podman",
    "containerd": "containerd",
    "lxc": "lxc",
}
"""Words in the control group of the first process, by what they tell; the most telling first."""

Document = dict[str, Any]


def record_environment(
    run_dir: Path, world: World, names: Iterable[str], *, dry_run: bool
) -> Document:
    """Write ``env.json`` under ``run_dir`` unless it says the same already; return what is there.

    Args:
        run_dir: the directory of the release.
        world: what the release found on this machine.
        names: the worker environments that it uses.
        dry_run: the world is a recorded one, whose accelerators cannot be asked.

    Raises:
        OSError: the file cannot be written.
    """
    path = run_dir / NAME
    before = _recorded(path)
    # A release that ended early no longer knows what it was going to use.
    names = dict.fromkeys([*(before["environments"] if before else ()), *names])
    document = describe(world, names, dry_run=dry_run) | _where(run_dir, world)
    if before and _lasting(before) == _lasting(document):
        if before.get("nodes", []) == document["nodes"]:
            return before
        document = {**before, "nodes": document["nodes"]}
    else:
        document["earlier"] = [*before["earlier"], _without(before, "earlier")] if before else []
    write_json(path, document)
    return document


def _where(run_dir: Path, world: World) -> Document:
    """Return where workers and servers run, and which nodes of a cluster ran what so far."""
    where = {
        "executor": Executor.LOCAL if world.cluster is None else Executor.SLURM,
        "cluster": world.cluster and world.cluster.document(),
        "nodes": list(_nodes(run_dir)),
    }
    plain: Document = redact_document(json.loads(json.dumps(where)))
    return plain


def _nodes(run_dir: Path) -> Iterator[Document]:
    """Say of each job that got as far as describing its node where that was."""
    for folder in job_folders(run_dir):
        found = folder.read("node")
        if found is not None:
            claim, record = folder.read("claim") or {}, folder.path / "node.json"
            relative = record.relative_to(run_dir)
            yield {
                "job": folder.name,
                "job_id": claim.get("job_id"),
                "stage": relative.parts[1],
                "node": claim.get("node"),
                "record": str(relative),
                "machine": found["machine"],
                "accelerator": found["accelerator"]["statement"],
            }


def _recorded(path: Path) -> Document | None:
    """Return what was written; None where there is nothing, or another version wrote it."""
    try:
        document = read_json(path)
        validate(document, schema="environment", where=str(path))
    except (OSError, ValueError, Failure):
        return None
    recorded: Document = document
    return recorded


def describe(world: World, names: Iterable[str], *, dry_run: bool) -> Document:
    """Return machine, interpreters with packages, revision, container and variables, as JSON."""
    document = {
        "version": VERSION,
        "day0_version": version("day0"),
        "dry_run": dry_run,
        "machine": world.machine.document(),
        "accelerator": _accelerator(world, dry_run=dry_run),
        "interpreter": _interpreter(),
        "environments": {name: _environment(world.environments, name) for name in names},
        "git": git_state(PACKAGE),
        "container": find_container(Path("/")),
        "variables": recorded_variables(world.environ),
    }
    plain: Document = redact_document(json.loads(json.dumps(document)))
    return plain


def _lasting(document: Document) -> Document:
    """Return ``document`` less what is another at every look, and less its earlier states.

    One from before there were clusters was made on this machine.
    """
    return {
        "executor": Executor.LOCAL,
        "cluster": None,
        **_without(_without(document, "earlier"), "nodes"),
        "machine": _without(document["machine"], "memory_available_bytes"),
        "accelerator": _without(document["accelerator"], "nvidia_smi"),
    }


def _without(document: Document, name: str) -> Document:
    return {each: value for each, value in document.items() if each != name}


def _accelerator(world: World, *, dry_run: bool) -> Document:
    """Return what the driver says, and one sentence on it."""
    machine = world.machine
    unasked = {"cuda_version": None, "nvidia_smi": None}
    if dry_run:
        return {"statement": "not asked: the tools of a dry run are recorded", **unasked}
    if world.cluster is not None:
        names = ", ".join(each.name for each in machine.accelerators) or "none"
        return {"statement": f"of each node, as {world.cluster.file} says: {names}", **unasked}
    report = probe_driver()
    if machine.accelerators:
        names = ", ".join(each.name for each in machine.accelerators)
        drivers = ", ".join(sorted({each.driver for each in machine.accelerators}))
        cuda = report.cuda_version or "not told"
        statement = f"{len(machine.accelerators)}: {names} (driver {drivers}, CUDA {cuda})"
    else:
        statement = f"none: {report.failure or 'nvidia-smi lists none'}"
    return {
        "statement": statement,
        "cuda_version": report.cuda_version,
        "nvidia_smi": report.text or None,
    }


def _interpreter() -> Document:
    places = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return {
        "path": sys.executable,
        "python": platform.python_version(),
        "packages": installed_packages(map(Path, places)),
    }


def _environment(environments: Environments, name: str) -> Document:
    return {
        "path": str(environments.interpreter(name)),
        "python": environments.python_version(name),
        "status": environments.status(name),
        "lock_digest": environments.digest(name),
        "packages": environments.packages(name),
    }


def git_state(directory: Path) -> Document | None:
    """Return revision and dirtiness of the checkout that ``directory`` is tracked in, or None.

    A package that is installed inside somebody's checkout is not a part of it.
    """
    try:
        _git(directory, "ls-files", "--error-unmatch", "__init__.py")
        return {
            "revision": _git(directory, "rev-parse", "HEAD").strip(),
            "dirty": bool(_git(directory, "status", "--porcelain", ":/").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", "--no-optional-locks", "-C", str(directory), *arguments],  # noqa: S607
        env=environ,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=GIT_TIMEOUT_S,
    ).stdout


def find_container(root: Path) -> Document | None:
    """Return what tells that the system under ``root`` is a container, or None.

    ``id`` is the container's, 64 hexadecimal digits, where its control group names it.
    """
    try:
        groups = (root / "proc/1/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        groups = ""
    identity = re.search(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", groups)
    for word, kind in CONTAINER_GROUPS.items():
        if word in groups:
            told_by = "/proc/1/cgroup"
            return {"kind": kind, "told_by": told_by, "id": identity and identity[0]}
    for name, kind in CONTAINER_FILES.items():
        if (root / name).exists():
            return {"kind": kind, "told_by": f"/{name}", "id": identity and identity[0]}
    return None


def recorded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that may be recorded, by name."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if any(fnmatch(name, pattern) for pattern in RECORDED_VARIABLES) and not names_secret(name)
    }
