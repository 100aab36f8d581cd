"""``day0 fleet``: many releases from one process."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conductor.cli.ending import ending_well
from conductor.cli.options import JsonOption, WorkspaceOption, workspace_of
from conductor.failure import unusable

if TYPE_CHECKING:
    from rich.console import Console

    from conductor.fleet.places import Places
    from conductor.fleet.record import Fleet
    from conductor.fleet.running import Prepared


def fleet(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="YAML with `models`, `recipes` and `suites` (every model with every recipe and "
            "suite), `exclude`, and single `releases`; `config` and `settings` hold for all.",
            show_default=False,
        ),
    ] = None,
    go_on_with: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="Go on with the fleet of this name as it is recorded, without its file.",
            metavar="NAME",
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Show one table and redraw it; while another process works on the fleet, only "
            "show it until that ends.",
        ),
    ] = False,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan-only",
            help="Print what would run, what is finished, and who shares whose baseline; write "
            "nothing.",
        ),
    ] = False,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Release many models, recipes and suites, several at a time, with one table and one summary.

    Every release is an ordinary one, with a run directory of its own. Given again, or with
    --resume, a fleet goes on: what came to a decision is kept, what was cut short is resumed, and
    how one release ends never ends another. Releases that ask their source the same share its
    evaluation. What it came to is in summary.json and summary.html in the fleet's directory.

    Exit codes: 0 every release is an ACCEPT, 1 some are decided otherwise, 2 unusable file,
    5 some were aborted, 130 stopped on request and resumable.

    Example: `day0 fleet week.yaml --watch`
    """
    from rich.console import Console

    from conductor.fleet.record import hold_fleet
    from conductor.fleet.running import prepare
    from conductor.fleet.show import plan_document, plan_table
    from conductor.fleet.show import watch as watch_other
    from conductor.run_lock import holder

    with ending_well() as ending:
        find_fleet = _finder(file, go_on_with, workspace)
        found = find_fleet()
        if plan_only:
            document = plan_document(prepare(found, _places(found).find))
            if as_json:
                print(json.dumps(document, indent=2))
            else:
                console = Console()
                console.print(plan_table(document), soft_wrap=not console.is_terminal)
            raise typer.Exit(0)
        if watch and holder(found.directory) is not None:
            watch_other(found.directory, Console(stderr=True), clock=_now, sleep=time.sleep)
            raise typer.Exit(0)
        with hold_fleet(found.directory):
            found = find_fleet()  # once more: nobody else gives it run ids now
            places = _places(found)
            prepared = prepare(found, places.find)
            found.write()
            ending.resume_with = _resume_command(found)
            code = _carry_out(prepared, places, watch=watch, as_json=as_json)
        raise typer.Exit(code)


def _finder(file: Path | None, name: str | None, workspace: Path | None) -> Callable[[], Fleet]:
    """Return what reads the fleet that is meant: as a file asks for it, or as it is recorded."""
    from conductor.fleet.asked import read_fleet_file
    from conductor.fleet.record import directory_of, plan_fleet, read_fleet

    if (file is None) == (name is None):
        raise unusable("name either the file of a fleet, or with --resume one that was begun")
    if file is None:
        return lambda: read_fleet(directory_of(str(name), workspace_of(workspace)))
    asked, where = read_fleet_file(file, workspace)
    return lambda: plan_fleet(asked, where, _now())


def _places(found: Fleet) -> Places:
    from conductor.fleet.places import Places

    return Places(dict(os.environ), found.asked.max_jobs)


def _carry_out(prepared: Prepared, places: Places, *, watch: bool, as_json: bool) -> int:
    """Carry out a fleet that this process holds; however it ends, leave a summary."""
    from rich.console import Console

    from conductor.fleet.running import Crew, exit_code
    from conductor.fleet.show import fleet_table
    from conductor.fleet.summary import SUMMARY_HTML, summary_document, write_summary

    fleet = prepared.fleet
    crew = Crew(prepared, find=places.find, clock=_now)
    try:
        with _showing(Console(stderr=True), watch) as show:
            crew.work(show)
    finally:
        status = crew.board.document()
        code = exit_code(crew.board.states())
        document = summary_document(fleet, prepared.releases, status, exit_code=code, now=_now())
        write_summary(document, fleet.directory)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        console = Console()
        table = fleet_table(status, _now())
        console.print(table, soft_wrap=not console.is_terminal)
        console.print(f"summary: {fleet.directory / SUMMARY_HTML}", markup=False, soft_wrap=True)
    return code


@contextmanager
def _showing(console: Console, watch: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show a fleet on standard error: one table that is redrawn, or lines."""
    from rich.live import Live

    from conductor.fleet.show import PlainShow, fleet_table

    if not (watch and console.is_terminal):
        yield PlainShow(console)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda document: live.update(fleet_table(document, _now()), refresh=True)


def _resume_command(found: Fleet) -> str:
    workspace = shlex.quote(str(found.workspace))
    return f"day0 fleet --resume {shlex.quote(found.fleet_id)} --workspace {workspace}"


def _now() -> datetime:
    return datetime.now(UTC)
