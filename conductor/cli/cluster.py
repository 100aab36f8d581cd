"""``day0 cluster check``, ``show`` and ``list``: what is said of clusters, and whether it holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conductor.cli.ending import EXIT_FAILED, EXIT_SYSTEMIC, display, ending_well
from conductor.cli.options import JsonOption, WorkspaceOption, workspace_of

if TYPE_CHECKING:
    from rich.table import Table

    from conductor.cluster.check import Check, Site

NAME_WIDTH = 30

NameArgument = Annotated[
    str | None,
    typer.Argument(
        help="A cluster in `clusters.yaml`; the only one if left out.", show_default=False
    ),
]


def check(
    name: NameArgument = None,
    workspace: WorkspaceOption = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Submit one small job for each set of resources.")
    ] = False,
    probe_timeout: Annotated[
        int, typer.Option(help="Seconds to wait for these jobs, in the queue too.", min=1)
    ] = 600,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with a cluster, or with what is said of it, before a release finds out.

    Exit codes: 0 all holds, 1 a check failed, 2 no usable `clusters.yaml`, 5 Slurm cannot be
    reached.

    Example: `day0 cluster check hopper --probe`
    """
    from rich.console import Console

    from conductor.cluster.check import Grade, Site, check_cluster
    from conductor.cluster.description import load_cluster
    from conductor.cluster.trial import try_nodes
    from conductor.executors.slurm.commands import Slurm

    with ending_well():
        environ = dict(os.environ)
        cluster = load_cluster(name, environ, Path.cwd())
        slurm = Slurm(timeout_s=cluster.command_timeout_s, environ=environ)
        site = Site(
            cluster=cluster, slurm=slurm, environ=environ, workspace=workspace_of(workspace)
        )
        checks = []
        with display() as shown:
            for each in check_cluster(site):
                checks.append(each)
                shown.stage_progress(len(checks), 0, f"{each.name}: {each.grade}")
            if probe and site.answers:
                checks += try_nodes(site, timeout_s=probe_timeout, show=shown.stage_progress)
        if as_json:
            found = {"cluster": cluster.name, "checks": [each.document() for each in checks]}
            print(json.dumps(found, indent=2))
        else:
            Console().print(_table(checks))
        broken = any(each.grade is Grade.FAILED for each in checks)
        raise typer.Exit(_exit_code(site, broken=broken))


def show(name: NameArgument = None, as_json: JsonOption = False) -> None:
    """Print what holds of a cluster: every value, with the file that it comes from.

    Exit codes: 0 shown, 2 no usable `clusters.yaml`.

    Example: `day0 cluster show hopper`
    """
    from conductor.cluster.description import build
    from conductor.cluster.files import find_described

    with ending_well():
        described = find_described(name, dict(os.environ), Path.cwd())
        build(described)  # refuses what does not fit together
        if as_json:
            print(json.dumps(described.document(), indent=2))
            return
        width = max(map(len, described.settings))
        for setting, (value, origin) in described.settings.items():
            print(f"{setting:<{width}}  {json.dumps(value, ensure_ascii=False)}  ({origin})")


def list_clusters(as_json: JsonOption = False) -> None:
    """List the clusters that the user's and the project's `clusters.yaml` describe.

    Exit codes: 0 listed, 2 no usable `clusters.yaml`.

    Example: `day0 cluster list`
    """
    from conductor.cluster.files import read_clusters

    with ending_well():
        described = read_clusters(dict(os.environ), Path.cwd())
        if as_json:
            print(json.dumps({name: str(each.file) for name, each in described.items()}, indent=2))
            return
        for each in described.values():
            print(f"{each.name}  {each.value('device') or 'device is missing'}  ({each.file})")


def _exit_code(site: Site, *, broken: bool) -> int:
    if not site.answers:
        return EXIT_SYSTEMIC
    return EXIT_FAILED if broken else 0


def _table(checks: list[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("", box=None, pad_edge=False)
    table.add_column("check", max_width=NAME_WIDTH)
    table.add_column("observed", overflow="fold")
    for each in checks:
        remedy = f"\n-> {each.remedy}" if each.remedy else ""
        grade = each.grade.upper() if each.grade == "failed" else each.grade
        table.add_row(Text(grade), Text(each.name), Text(each.observed + remedy))
    return table
