"""``day0 status``, ``runs``, ``repair``, ``sync`` and ``cache explain``: what becomes of runs."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Annotated

import typer

from conductor.cli.ending import EXIT_FAILED, ending_well
from conductor.cli.options import JsonOption, RunArgument, WorkspaceOption, workspace_of


def status(
    run: RunArgument = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep showing it until nobody works on it.")
    ] = False,
) -> None:
    """Say where a release stands, also while another process works on it.

    Exit codes: 0 shown, 2 no such run.

    Example: `day0 status --watch`
    """
    from rich.console import Console

    from conductor import run_status

    with ending_well():
        run_dir = run_status.find_run(run, workspace_of(workspace))
        console = Console()
        if watch:
            run_status.watch(run_dir, console)
            return
        document = run_status.status_document(run_dir)
        if as_json:
            print(json.dumps(document, indent=2))
        else:
            console.print(run_status.status_table(document))


def runs(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """List the releases of a workspace, the latest first.

    Example: `day0 runs`
    """
    from rich.console import Console

    from conductor import run_status

    with ending_well():
        document = run_status.runs_document(workspace_of(workspace))
        if as_json:
            print(json.dumps(document, indent=2))
        else:
            Console().print(run_status.runs_table(document))


def repair(
    run: RunArgument = None, workspace: WorkspaceOption = None, as_json: JsonOption = False
) -> None:
    """Rebuild the manifest of a run from its events and files; say what could not be established.

    What is damaged is kept aside, and a second repair changes nothing.

    Exit codes: 0 the run can go on, 2 no such run, or one of a newer day0.

    Example: `day0 repair demo-int8`
    """
    from conductor.repair import repair as rebuild
    from conductor.run_lock import hold
    from conductor.run_status import find_run

    with ending_well():
        run_dir = find_run(run, workspace_of(workspace))
        with hold(run_dir):
            repaired = rebuild(run_dir, clock=lambda: datetime.now(UTC))
        if as_json:
            print(json.dumps({"run": str(run_dir), "findings": list(repaired.findings)}, indent=2))
        else:
            for finding in repaired.findings or ["nothing to repair"]:
                print(finding)


def sync(run: RunArgument = None, workspace: WorkspaceOption = None) -> None:
    """Send to MLflow what it did not take when a release ended; without a run, of all of them.

    Exit codes: 0 everything is logged, 1 the tracking server did not take it, 2 no such run.

    Example: `day0 sync`
    """
    from conductor.run_status import find_run
    from conductor.tracking import sync_runs

    with ending_well():
        directory = workspace_of(workspace)
        run_dirs = [find_run(run, directory)] if run else sorted((directory / "runs").glob("*"))
        outcomes = sync_runs(run_dirs, environ=dict(os.environ))
        for outcome in outcomes:
            print(outcome.words)
        if not outcomes:
            print("nothing is waiting to be logged")
        raise typer.Exit(0 if all(outcome.logged for outcome in outcomes) else EXIT_FAILED)


def explain(
    run: RunArgument = None, workspace: WorkspaceOption = None, as_json: JsonOption = False
) -> None:
    """Say why a run evaluated its source anew, or from which run it has the evaluation.

    For each cached evaluation that comes near: the fields that differ, with both values.

    Example: `day0 cache explain`
    """
    from conductor.baseline_cache import explain_run
    from conductor.run_status import find_run

    with ending_well():
        directory = workspace_of(workspace)
        run_dir = find_run(run, directory)
        lines = explain_run(run_dir, run_dir.parent.parent)
        print(json.dumps({"run": str(run_dir), "lines": lines}) if as_json else "\n".join(lines))
