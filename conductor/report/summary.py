"""Sum a release up in a terminal: plain lines for a log, tables for a person."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from conductor.report.argument import reasons, undecided
from conductor.report.rows import (
    Row,
    cost,
    gate_rows,
    in_reading_order,
    is_paired,
    places,
    task_row,
)
from conductor.report.smoke import sentence as smoke_sentence
from conductor.report.wording import (
    NO_DECISION,
    PUBLISH_WORDS,
    Document,
    counted,
    first_clause,
    headline,
    printable,
    say,
    whole_percent,
)
from gates.criteria import CONFIDENCE

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

STYLES = {
    "ACCEPT": "bold green",
    "REGRESSION": "bold red",
    "ANOMALOUS": "bold yellow",
    "INFEASIBLE": "bold magenta",
    NO_DECISION: "bold",
}
LONGEST_DETAIL = 120
"""Characters of a gate's words that a terminal shows whole."""
MOST_DOUBTS = 5
"""Undecided tasks of which a terminal says more than their row."""
TONE_STYLES = {"bad": "red", "warn": "yellow", "odd": "magenta"}


def summarize(document: Document, *, plain: bool) -> RenderableType | str:
    """Summarize a validated document: decision, gates, tasks, paths and run IDs.

    Args:
        document: the validated document.
        plain: True gives lines of text for a log, False a rich renderable for a terminal.
    """
    shown: Document = printable(document)
    if plain:
        return "\n".join(" ".join(line.split()) for line in _plain_lines(shown))
    return _rich_summary(shown)


def _short_reasons(document: Document) -> Iterable[str]:
    for sentence, evidence in reasons(document):
        yield f"{sentence} (more in the report)" if evidence else sentence


def _doubts(document: Document) -> Iterable[str]:
    """Say of the first undecided tasks what would decide them, and count the others."""
    found = undecided(document["tasks"])
    yield from found[:MOST_DOUBTS]
    if len(found) > MOST_DOUBTS:
        further = counted(len(found) - MOST_DOUBTS, "further task")
        yield f"{further} undecided: the report says what would decide"


def _not_pinned(document: Document) -> Iterable[str]:
    """Say what a deterministic release could not pin."""
    for each in (document.get("deterministic") or {}).get("not_pinned", ()):
        yield f"{each['what']} ({each['why']})"


def _plain_lines(document: Document) -> Iterable[str]:
    yield f"decision: {headline(document)} ({PUBLISH_WORDS[document['publish']]})"
    for reason in _short_reasons(document):
        yield f"reason: {reason}"
    yield f"next: {document['next_action']}"
    if smoke := smoke_sentence(document):
        yield smoke
    for each in _not_pinned(document):
        yield f"not pinned: {each}"
    for row in gate_rows(document):
        yield f"gate {_gate_line(row)}"
    for task in in_reading_order(document["tasks"]):
        yield _paired_line(task) if task.get("outcome") else _threshold_line(task)
    for sentence in _doubts(document):
        yield f"evidence: {sentence}"
    for deviation in document["deviations"]:
        yield f"deviation: {deviation}"
    if held := cost(document):
        yield f"cost: {held}"
    for name, text in places(document):
        yield f"{name}: {text}"


def _threshold_line(task: Document) -> str:
    row = task_row(task)
    return (
        f"task {row['task']}: baseline {row['baseline_error']}, candidate "
        f"{row['candidate_error']}, drop {row['drop']}, limit {row['limit']}, {row['words']}"
    )


def _paired_line(task: Document) -> str:
    row = task_row(task)
    asked, lost, gained = task.get("questions"), task.get("lost"), task.get("gained")
    line = (
        f"task {row['task']}: {row['words']}: baseline {row['baseline']}, candidate "
        f"{row['candidate']}, drop {row['drop']} (bounds {row['bounds']}), margin {row['limit']}"
    )
    if asked is not None:
        line += f", {asked} question{'' if asked == 1 else 's'}"
    if lost is not None and gained is not None:
        line += f", {lost} lost, {gained} gained"
    return line


def _gate_line(row: Row) -> str:
    result = f"{row['words']}, {row['held']} of {len(row['checks'])} checks hold"
    cause = f" {row['failure_class']}" if row["failure_class"] else ""
    detail = f": {_brief(row)}" if _brief(row) else ""
    return f"{row['gate']} ({row['stage']}) {result}{cause}{detail}"


def _brief(row: Row) -> str:
    """Say what a gate that passed says, or its sum; what one that failed says is a reason."""
    detail = row["detail"] if row["passed"] else ""
    return detail if len(detail) <= LONGEST_DETAIL else first_clause(detail)


def _rich_summary(document: Document) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = headline(document)
    smoke = smoke_sentence(document)
    parts: list[RenderableType] = [
        Text(f"{head}: {PUBLISH_WORDS[document['publish']]}", style=STYLES[head]),
        *map(Text, _short_reasons(document)),
        Text(f"Next: {document['next_action']}"),
        *([Text(smoke)] if smoke else []),
        *(Text(f"Not pinned: {each}", style="yellow") for each in _not_pinned(document)),
        *(Text(f"Deviation: {deviation}", style="yellow") for deviation in document["deviations"]),
    ]
    gates = gate_rows(document)
    if gates:
        table = _table("Gates")
        for name in ("gate", "result", "checks held"):
            table.add_column(name, no_wrap=True)
        table.add_column("detail")
        for row in gates:
            held = f"{row['held']} of {len(row['checks'])}"
            cells = [row["gate"], row["words"], held, _brief(row)]
            table.add_row(*map(Text, cells), style=None if row["passed"] else "red")
        parts.append(table)
    if document["tasks"]:
        parts.append(_task_table(document))
    parts += map(Text, _doubts(document))
    found = Table.grid(padding=(0, 2))
    found.add_column(no_wrap=True)
    found.add_column(overflow="fold")
    if held := cost(document):
        found.add_row(Text("cost"), Text(held))
    for name, text in places(document):
        found.add_row(Text(name), Text(text))
    return Group(*parts, found)


def _table(title: str) -> Table:
    """Make a table of few lines and spaces, so that it fits 80 columns."""
    from rich.table import Table

    return Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)


def _task_table(document: Document) -> Table:
    from rich.text import Text

    columns = {
        "task": "task",
        "baseline": "baseline_error",
        "candidate": "candidate_error",
        "drop": "drop",
        "limit": "limit",
        "verdict": "words",
    }
    title = "Scores ± standard errors"
    if is_paired(document["tasks"]):
        of_what = "the baseline score" if document["relative"] else "the scale"
        title = (
            f"Drops with one-sided {whole_percent(CONFIDENCE)} bounds, the margin is "
            f"{say(document['threshold'])} of {of_what}"
        )
        columns = {
            "task": "task",
            "source": "baseline",
            "candidate": "candidate",
            "drop": "drop",
            "bounds": "bounds",
            "asked": "questions",
            "lost /\ngained": "flips",
            "outcome": "words",
        }
    table = _table(title)
    for name, key in columns.items():
        if key == "task":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(
                name, justify="left" if key == "words" else "right", no_wrap=key != "questions"
            )
    for row in map(task_row, in_reading_order(document["tasks"])):
        cells = [Text(row[key]) for key in columns.values()]
        table.add_row(*cells, style=TONE_STYLES.get(row["tone"]))
    return table
