"""What tests of real tools share: the command line, a workspace, Slurm, a search for leftovers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_rig import SlurmRig, missing_programs

from conductor.environments.builder import Environments, Status, names_for
from conductor.probes.machine import probe_machine


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fail, rather than skip, tests of real tools whose environments nobody built."""
    device = probe_machine().device
    environments = Environments(device=device)
    missing = [name for name in names_for(device) if environments.status(name) is not Status.READY]
    if missing and any(item.get_closest_marker("tools") for item in items):
        pytest.exit(
            f"worker environments not ready: {', '.join(missing)}; run `make test`, which builds "
            'them, or `pytest -m "not tools"`',
            returncode=4,
        )
    _skip_without_slurm([item for item in items if item.get_closest_marker("slurm")])


def _skip_without_slurm(items: list[pytest.Item]) -> None:
    """Skip the tests that need Slurm on a machine without it; fail in CI, which installs it."""
    if not items or not (missing := missing_programs()):
        return
    words = f"Slurm is not installed ({', '.join(missing)} missing); run scripts/install-slurm.sh"
    if os.environ.get("CI"):
        pytest.exit(words, returncode=4)
    for item in items:
        item.add_marker(pytest.mark.skip(reason=words))


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One finished ``day0`` command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        """The report document that ``--json`` printed."""
        document: dict[str, Any] = json.loads(self.stdout)
        return document


def run_day0(
    *arguments: str, environ: Mapping[str, str] | None = None, timeout_s: float = 900
) -> Finished:
    """Run ``day0`` as a user would, without a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "conductor.cli", *arguments],
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return Finished(exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr)


def descendants_with(marker: Path) -> list[psutil.Process]:
    """Return the processes that have ``marker`` in their command line or working files."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(marker) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """A workspace of its own; the test fails when a process that names it is left behind."""
    directory = tmp_path / "workspace"
    yield directory
    left = descendants_with(directory)
    assert not left, f"processes left behind: {[process.cmdline() for process in left]}"


@pytest.fixture(scope="session")
def slurm_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmRig]:
    """A real Slurm of two nodes; whoever kills a part of it starts that part again."""
    with SlurmRig(tmp_path_factory.mktemp("slurm")) as rig:
        yield rig


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a dry run that came to its end; tests that change it take a copy."""
    workspace = tmp_path_factory.mktemp("finished") / "workspace"
    words = ("release", "demo", "--recipe", "int8", "--dry-run", "--overlap", "never")
    finished = run_day0(*words, "--workspace", str(workspace))
    assert finished.exit_code == 0, finished.stderr
    (run_dir,) = (workspace / "runs").iterdir()
    return run_dir
