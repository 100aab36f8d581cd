"""``day0 cluster check --probe`` on a real Slurm: what jobs tell, and that none is left behind.

What is made of the answers is tried in ``test_cluster_check``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_rig import SlurmRig

from conductor.cluster.check import Check, Grade, Site, check_cluster
from conductor.cluster.description import load_cluster
from conductor.cluster.trial import try_nodes
from conductor.executors.slurm.commands import Slurm

pytestmark = pytest.mark.slurm

SMALL = "cpus: 1, memory_gib: 0.5, time: '0:05:00'"


@pytest.fixture
def site(
    slurm_rig: SlurmRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Site]:
    """Return the rig as a cluster that an entry describes; sbatch inherits our variables."""
    monkeypatch.setenv("SLURM_CONF", slurm_rig.environ["SLURM_CONF"])

    def make(entry: str) -> Site:
        path = tmp_path / "clusters.yaml"
        path.write_text(f"clusters: {{rig: {entry}}}\n")
        environ = {**slurm_rig.environ, "DAY0_CLUSTERS": str(path)}
        return Site(
            cluster=load_cluster("rig", environ, tmp_path),
            slurm=Slurm(timeout_s=60, environ=environ),
            environ=environ,
            workspace=tmp_path / "workspace",
        )

    return make


def tried(site: Site, timeout_s: float = 60) -> dict[str, Check]:
    found = list(try_nodes(site, timeout_s=timeout_s, show=lambda done, total, doing: None))
    return {each.name: each for each in found}


def left_in_queue(rig: SlurmRig, workspace: Path) -> str:
    runs = {each.name for each in (workspace / "cluster-check").iterdir()}
    alive = rig.command("squeue", "--noheader", "--format=%j", "--states=PENDING,RUNNING")
    return "\n".join(line for line in alive.splitlines() if any(run in line for run in runs))


def test_slurm_takes_what_a_release_would_submit(site: Callable[[str], Site]) -> None:
    made = site(f"{{device: cpu, resources: {{{SMALL}}}}}")
    found = {each.name: each for each in check_cluster(made)}
    for name in ("commands", "controller", "accounting", "partition (all stages)", "python"):
        assert found[name].grade is Grade.OK, found[name]
    assert "to start at" in found["submission (all stages)"].observed


def test_every_set_of_resources_gets_a_job_that_answers(
    site: Callable[[str], Site], slurm_rig: SlurmRig
) -> None:
    made = site(f"{{device: cpu, resources: {{{SMALL}}}, stages: {{ptq: {{memory_gib: 1}}}}}}")
    found = tried(made)
    assert {each.grade for each in found.values()} <= {Grade.OK, Grade.WARNING}, found
    for stages in ("ptq", "deploy, baseline_eval, candidate_eval"):
        assert found[f"shared workspace ({stages})"].grade is Grade.OK
        assert found[f"munge ({stages})"].grade is Grade.OK
    if slurm_rig.memory_enforced:
        assert found["memory (ptq)"].observed == "limited to 1.0 GiB"
    assert not list((made.workspace / "cluster-check").iterdir())


def test_a_job_that_fails_is_told_with_its_log(site: Callable[[str], Site]) -> None:
    made = site(f"{{device: cpu, python: /no/python, resources: {{{SMALL}}}}}")
    found = tried(made)["job (all stages)"]
    assert found.grade is Grade.FAILED
    assert "/no/python: No such file or directory" in found.observed


def test_a_job_that_slurm_refuses_is_told(site: Callable[[str], Site]) -> None:
    made = site(f"{{device: cpu, resources: {{{SMALL}, partition: none}}}}")
    found = tried(made)["job (all stages)"]
    assert found.grade is Grade.FAILED
    assert "invalid partition" in found.observed


def test_a_job_that_does_not_start_is_cancelled(
    site: Callable[[str], Site], slurm_rig: SlurmRig
) -> None:
    node = slurm_rig.nodes[0]
    made = site(f"{{device: cpu, resources: {{{SMALL}, extra: {{nodelist: {node}}}}}}}")
    slurm_rig.drain(node)
    try:
        found = tried(made, timeout_s=3)["job (all stages)"]
    finally:
        slurm_rig.undrain(node)
    assert found.grade is Grade.FAILED
    assert "no answer within 3 s; it is PENDING" in found.observed
    assert not left_in_queue(slurm_rig, made.workspace)
