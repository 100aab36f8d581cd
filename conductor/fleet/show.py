"""Show a fleet to people: one table, or a line whenever something changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conductor.documents import validate
from conductor.failure import Failure
from conductor.files import read_json
from conductor.fleet.board import STATUS
from conductor.fleet.running import Prepared
from conductor.journal import Clock
from conductor.report.wording import counted, duration, printable
from conductor.run_lock import holder

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

STYLES: Mapping[str, str] = {
    "running": "cyan",
    "stopped": "yellow",
    "aborted": "red",
    "ACCEPT": "green",
    "REGRESSION": "red",
    "ANOMALOUS": "yellow",
    "INFEASIBLE": "magenta",
}
INTERVAL_S = 1.0

Document = Mapping[str, Any]


def fleet_table(document: Document, now: datetime) -> RenderableType:
    """Return where the releases of a fleet stand; ``document`` is that of a board."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("", justify="right", no_wrap=True)
    for heading in ("model", "recipe", "suite"):
        table.add_column(heading, overflow="ellipsis", no_wrap=True, min_width=6)
    for heading, width in (("stage", 8), ("state", 8), ("decision", 9)):
        table.add_column(heading, no_wrap=True, min_width=width)
    for heading in ("time", "queued"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=10)
    table.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)
    rows = printable(document["releases"])
    for row in rows:
        table.add_row(
            str(row["number"]),
            *map(escape, (_short(row["model"]), _recipe(row), _short(row["suite"]))),
            row["stage"] or "",
            _styled(row["state"]),
            _styled(row["decision"] or ""),
            duration(_seconds(row, now)),
            duration(row["queued_s"] or None),
            escape(row["doing"] or row["problem"] or ""),
        )
    return Group(escape(headline(document)), "", table)


def headline(document: Document) -> str:
    """Return in one line how many releases are how far."""
    rows = document["releases"]
    words = [row["decision"] or row["state"] for row in rows]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words)))
    return f"{document['fleet']}: {counted(len(rows), 'release')}: {counts}"


def lines(document: Document) -> Iterator[str]:
    """Yield a line for each release that says how far it is; times are left out."""
    for row in printable(document["releases"]):
        if row["state"] == "waiting" or (row["state"] == "running" and not row["stage"]):
            continue
        what = f"{row['number']} {_short(row['model'])} {_recipe(row)}"
        how = row["decision"] or row["state"]
        if row["state"] == "kept":
            how = f"{how} (kept)"
        if row["state"] == "running":
            how = row["stage"]
        yield f"{what}: {how}" + (f": {row['problem']}" if row["problem"] else "")


class PlainShow:
    """A line whenever a release is further; for logs."""

    def __init__(self, console: Console) -> None:
        """Write to ``console``, which need not be a terminal."""
        self._console = console
        self._said: set[str] = set()

    def __call__(self, document: Document) -> None:
        """Say what was not said yet."""
        for line in lines(document):
            if line not in self._said:
                self._said.add(line)
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def watch(
    directory: Path, console: Console, *, clock: Clock, sleep: Callable[[float], None]
) -> None:
    """Show a fleet that another process works on, until nobody does."""
    from rich.live import Live

    if not console.is_terminal:
        show = PlainShow(console)
        while holder(directory) is not None:
            show(read_status(directory))
            sleep(INTERVAL_S)
        show(read_status(directory))
        return
    with Live(console=console, auto_refresh=False) as live:
        held = True
        while held:
            held = holder(directory) is not None
            live.update(fleet_table(read_status(directory), clock()), refresh=True)
            if held:
                sleep(INTERVAL_S)


def read_status(directory: Path) -> Document:
    """Return what was last written of a fleet; one that nothing was written of has no releases."""
    empty = {"fleet": directory.name, "releases": []}
    try:
        document = read_json(directory / STATUS)
        validate(document, schema="fleet_status", where=str(directory / STATUS))
    except (OSError, ValueError, Failure):
        return empty
    return dict(document)


def plan_document(prepared: Prepared) -> dict[str, Any]:
    """Return what a fleet would do, release by release."""
    from conductor.run_status import runs_document

    workspace = prepared.fleet.workspace
    there = {row["run_id"]: row for row in runs_document(workspace)["runs"]}
    return {
        "fleet": prepared.fleet.fleet_id,
        "directory": str(prepared.fleet.directory),
        "at_once": prepared.at_once,
        "max_jobs": prepared.fleet.asked.max_jobs,
        "releases": [
            {
                "number": each.number,
                "run_id": each.run_id if each.run_id in there else None,
                **each.wanted.named(),
                "settings": each.wanted.own_words(),
                "state": there[each.run_id]["state"] if each.run_id in there else "new",
                "decision": there[each.run_id]["decision"] if each.run_id in there else None,
                "baseline": prepared.baselines.get(each.number),
            }
            for each in prepared.releases
        ],
    }


def plan_table(document: Document) -> RenderableType:
    """Return a plan for people."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "model", "recipe", "suite", "what is done", "baseline"):
        table.add_column(heading)
    for row in printable(document["releases"]):
        texts = [_short(row["model"]), _recipe(row), _short(row["suite"])]
        table.add_row(
            str(row["number"]), *map(escape, texts), escape(_action(row)), _whose_baseline(row)
        )
    at_once = counted(document["at_once"], "release")
    return Group(f"{escape(document['fleet'])}: {at_once} at a time", "", table)


def _action(row: Document) -> str:
    if row["state"] == "new":
        return "release"
    if row["decision"]:
        return f"keep: {row['decision']}"
    return f"go on: it is {row['state']}"


def _whose_baseline(row: Document) -> str:
    if row["baseline"] is None:
        return "its own"
    return "asks the source" if row["baseline"] == row["number"] else f"that of {row['baseline']}"


def _seconds(row: Document, now: datetime) -> float | None:
    if row["state"] == "running" and row["since"]:
        return max(0.0, (now - datetime.fromisoformat(row["since"])).total_seconds())
    seconds: float | None = row["seconds"]
    return seconds


def _recipe(row: Document) -> str:
    """Name a recipe, with what is special about this release of it."""
    own = f" ({row['settings']})" if row["settings"] else ""
    return _short(row["recipe"]) + own


def _short(name: str) -> str:
    """Return the last part of a path; a Hub id stays whole."""
    return Path(name).name if name.startswith("/") else name


def _styled(word: str) -> str:
    style = STYLES.get(word)
    return f"[{style}]{word}[/]" if style else word
