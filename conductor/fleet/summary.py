"""What a fleet came to, read from its runs: decisions, sizes, scores and costs.

Every number is one that a release reported; nothing is judged here. Runs are read one at a time, so
that a summary of many needs no more memory than one report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conductor.event_log import parse, read_log
from conductor.files import write_json, write_text
from conductor.fleet.record import Fleet, Planned
from conductor.history import timestamp
from conductor.jobs import Job, read_jobs, total_gpu_hours, total_queued_s
from conductor.rendering import templates
from conductor.report import read_report, wording
from gates import Decision

SCHEMA_VERSION = 1
SUMMARY_JSON, SUMMARY_HTML = "summary.json", "summary.html"

ENDED = ("finished", "kept", "aborted")
TASK = {"source": "baseline", "candidate": "candidate"}
TASK_FACTS = ("drop", "drop_lower", "drop_upper", "limit", "outcome")

Document = Mapping[str, Any]


def summary_document(
    fleet: Fleet,
    releases: Sequence[Planned],
    status: Document,
    *,
    exit_code: int,
    now: datetime,
) -> dict[str, Any]:
    """Return what a fleet came to (schema ``fleet_summary.json``).

    ``status`` is the document of its board.
    """
    rows = [_release(each, line) for each, line in zip(releases, status["releases"], strict=True)]
    return {
        "schema_version": SCHEMA_VERSION,
        "day0_version": version("day0"),
        "fleet": fleet.fleet_id,
        "file": str(fleet.asked.file),
        "created": fleet.created,
        "written": timestamp(now),
        "exit_code": exit_code,
        "totals": _totals(rows),
        "releases": rows,
    }


def write_summary(document: Document, directory: Path) -> None:
    """Write a summary for programs and for people.

    Raises:
        OSError: the disk is full or gone.
    """
    write_json(directory / SUMMARY_JSON, document)
    write_text(directory / SUMMARY_HTML, summary_html(document))


def _release(each: Planned, line: Document) -> dict[str, Any]:
    """Return one release; of one without a decision, as much as its run directory tells."""
    # A release that went on from an earlier end may have left a report that is not its last word.
    report = read_report(each.run_dir) if line["state"] in ENDED else None
    if report and report["decision"] != line["decision"]:
        report = None
    jobs, baseline = _look_into(each.run_dir)
    config = each.config
    return {
        "number": each.number,
        "run_id": each.run_id,
        "run": str(each.run_dir),
        "report_html": report and report["paths"]["report_html"],
        "model": config.model,
        "recipe": config.recipe,
        "suite": config.suite,
        "settings": each.wanted.own_words(),
        "state": line["state"],
        "decision": line["decision"],
        "failure_class": report and report["failure_class"],
        "reason": wording.split_reason(report["reasons"][0])[0] if report else line["problem"],
        "publish": report and report["publish"],
        "size": report and report["size"],
        "tasks": [_task(task) for task in report["tasks"]] if report else [],
        "gpu_hours": total_gpu_hours(jobs) if jobs else None,
        "seconds": report["seconds"] if report else line["seconds"],
        "queued_s": total_queued_s(jobs) if jobs else None,
        "baseline": None if config.dry_run else baseline,  # a record was read
    }


def _task(task: Document) -> dict[str, Any]:
    return {
        "task": task["task"],
        "scale": task["scale"],
        **{name: task[theirs] for name, theirs in TASK.items()},
        **{name: task.get(name) for name in TASK_FACTS},
    }


def _look_into(run_dir: Path) -> tuple[list[Job], str | None]:
    """Return the jobs of a run, and where its evaluation of the source is from."""
    if not run_dir.is_dir():
        return [], None
    try:
        return read_jobs(run_dir), _baseline(map(parse, read_log(run_dir).sound))
    except OSError:
        return [], None


def _baseline(events: Iterable[Document]) -> str | None:
    """Tell whether a release asked its source, or has the answers that an earlier one got."""
    found = None
    for event in events:
        directory = event.get("directory")
        if isinstance(directory, str) and directory.startswith("stages/baseline_eval"):
            if event["event"] == "recalled":
                return "reused"
            if event["event"] in ("tool_started", "job_submitted"):
                found = "evaluated"
    return found


def _totals(rows: Sequence[Document]) -> dict[str, Any]:
    decided = Counter(row["decision"] for row in rows if row["decision"])
    baselines = Counter(row["baseline"] for row in rows if row["baseline"])
    sizes = [row["size"] for row in rows if row["size"]]
    source, candidate = (
        sum(size[name] for size in sizes) for name in ("source_bytes", "candidate_bytes")
    )
    begun = [row for row in rows if row["state"] != "waiting"]
    return {
        "releases": len(rows),
        "decisions": {decision: decided[decision] for decision in Decision},
        "undecided": len(rows) - decided.total(),
        "source_bytes": source,
        "candidate_bytes": candidate,
        "ratio": round(candidate / source, 4) if source else None,
        "gpu_hours": _sum_if_known(row["gpu_hours"] for row in begun),
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 3),
        "queued_s": _sum_if_known(row["queued_s"] for row in begun),
        "baselines": {name: baselines[name] for name in ("evaluated", "reused")},
    }


def _sum_if_known(values: Iterator[float | None]) -> float | None:
    """Return a sum; a part that is not known leaves it unknown, and so does nothing to add."""
    known = list(values)
    if not known or None in known:
        return None
    return round(sum(value for value in known if value is not None), 6)


def summary_html(document: Document) -> str:
    """Return a summary as a page that needs no other file."""
    environment = templates()
    environment.filters |= {
        name: getattr(wording, name) for name in ("counted", "duration", "first_clause", "size")
    }
    template = environment.get_template("fleet.html.j2")
    shown = wording.printable(document)
    return template.render({**shown, "rows": [_shown(row) for row in shown["releases"]]})


def _shown(row: Document) -> dict[str, Any]:
    """Add what a page says of a release in words."""
    return {
        **row,
        "words": row["decision"] or row["state"],
        "size_words": _size_words(row["size"]),
        "scores": [_score_words(task) for task in row["tasks"]],
    }


def _size_words(size: Document | None) -> str:
    if size is None:
        return ""
    source, candidate = (size[f"{side}_bytes"] / 2**30 for side in ("source", "candidate"))
    unit = "GiB"
    if source < 1:
        source, candidate, unit = 1024 * source, 1024 * candidate, "MiB"
    ratio = "" if size["ratio"] is None else f" ({wording.percent(size['ratio'])})"
    return f"{source:,.2f} to {candidate:,.2f} {unit}{ratio}"


def _score_words(task: Document) -> dict[str, str]:
    near = task["drop"], task["drop_lower"], task["drop_upper"]
    digits = wording.decimals(task["scale"], task["limit"], *near)
    tones = {"pass": "good", "fail": "bad", "undecided": "warn", "anomalous": "odd"}
    return {
        "task": task["task"],
        "source": wording.fixed(task["source"], digits),
        "candidate": wording.fixed(task["candidate"], digits),
        "drop": wording.fixed(task["drop"], digits, sign="+"),
        "bounds": wording.bounds(task["drop_lower"], task["drop_upper"], digits),
        "limit": wording.fixed(task["limit"], digits),
        "outcome": task["outcome"] or "",
        "tone": tones.get(task["outcome"], ""),
    }
