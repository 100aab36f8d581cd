"""What must hold of a run directory, however often its release was interrupted.

Each function returns sentences on what is wrong: an empty list is a run in order.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema_rs
import yaml

from conductor import digests
from conductor.evidence.verify import verify
from conductor.history import replay

SHAPES = {
    "manifest.json": "manifest",
    "report.json": "report",
    "config.resolved.yaml": "resolved_config",
    "env.json": "environment",
    "verdicts/*.json": "verdict",
    "stages/ptq/**/checkpoint-summary.json": "checkpoint_summary",
    "stages/deploy/**/canary.json": "canary_evidence",
    "stages/*_eval/**/run-summary.json": "run_summary",
}
"""Which schema of ``gates/schemas`` a file of a run follows; at least one file each."""

STAGE_FILES = ("request.json", "result.json")
WORKING_STAGES = ("setup", "ptq", "deploy", "baseline_eval", "candidate_eval", "compare")
WHOLE_RUN = (
    *(
        "manifest.json",
        "events.jsonl",
        "config.resolved.yaml",
        "env.json",
        "checkpoint/config.json",
    ),
    *("report.json", "report.md", "report.html", "checklist.md"),
    *(f"stages/{stage}/**/{name}" for stage in WORKING_STAGES for name in STAGE_FILES),
)
"""What a release that came to its end leaves."""


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def submissions(run_dir: Path) -> Counter[tuple[str, str]]:
    """Count how often each tool was started for each directory."""
    return Counter(
        (event["tool"], event["directory"])
        for event in read_events(run_dir)
        if event["event"] == "tool_started"
    )


def repeated_work(run_dir: Path) -> list[str]:
    """Name the tools that were started again in a stage after they had come to their end in it."""
    finished: set[tuple[str, str]] = set()
    found = []
    for number, event in enumerate(read_events(run_dir), start=1):
        if event["event"] not in ("tool_started", "tool_finished"):
            continue
        work = (event["tool"], _without_attempt(event["directory"]))
        if event["event"] == "tool_started" and work in finished:
            found.append(f"event {number}: {work} is started again after its end")
        if event["event"] == "tool_finished" and event["status"] == "ok":
            finished.add(work)
    return found


def _without_attempt(directory: str) -> str:
    return "/".join(part for part in directory.split("/") if not part.startswith("attempt-"))


def missing_files(run_dir: Path) -> list[str]:
    return [f"there is no {pattern}" for pattern in WHOLE_RUN if not any(run_dir.glob(pattern))]


def stale_files(workspace: Path) -> list[str]:
    """Name temporary files, records of processes, and partial caches that were left behind."""
    patterns = (".*.tmp", "*.process.json", "datasets-cache-*", "requests/*")
    return [f"{path} was left" for pattern in patterns for path in workspace.rglob(pattern)]


def misshapen_files(run_dir: Path) -> list[str]:
    found = []
    for pattern, schema in SHAPES.items():
        paths = sorted(run_dir.glob(pattern))
        if not paths:
            found.append(f"there is no {pattern}")
        for path in paths:
            text = path.read_text(encoding="utf-8")
            document = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
            found += [f"{path}: {problem}" for problem in shape_problems(document, schema)]
    return found


def shape_problems(document: Any, schema: str) -> list[str]:
    validator = jsonschema_rs.validator_for(_schema(f"{schema}.json"), retriever=_schema)
    return [f"{error.instance_path}: {error.message}" for error in validator.iter_errors(document)]


def _schema(address: str) -> Any:
    path = resources.files("gates").joinpath("schemas", address.rpartition("/")[2])
    return json.loads(path.read_text("utf-8"))


def wrong_manifest(run_dir: Path) -> list[str]:
    """Compare the manifest with what the events come to."""
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    folded = json.loads(json.dumps(replay(read_events(run_dir)).document()))
    return [
        f"manifest.json: {name} is {manifest.get(name)!r}, the events say {folded.get(name)!r}"
        for name in sorted({*manifest, *folded})
        if manifest.get(name) != folded.get(name)
    ]


def changed_outputs(run_dir: Path) -> list[str]:
    """Hold what lies on disk against the digests that the stages recorded."""
    stages = replay(read_events(run_dir)).stages
    return [
        f"{stage}: {problem}"
        for stage, record in stages.items()
        for problem in digests.verify(run_dir, record.outputs or {})
    ]


def undigested_stages(run_dir: Path) -> list[str]:
    """Name the finished stages whose outputs nobody recorded."""
    stages = replay(read_events(run_dir)).stages
    return [
        f"{stage} has no recorded outputs" for stage in WORKING_STAGES if not stages[stage].outputs
    ]


def unverified(run_dir: Path) -> list[str]:
    return [str(problem) for problem in verify(run_dir).problems]


def all_problems(run_dir: Path) -> list[str]:
    """Return everything that is wrong with the run of a finished release."""
    workspace = run_dir.parent.parent
    return [
        *repeated_work(run_dir),
        *missing_files(run_dir),
        *stale_files(workspace),
        *misshapen_files(run_dir),
        *wrong_manifest(run_dir),
        *changed_outputs(run_dir),
        *undigested_stages(run_dir),
        *unverified(run_dir),
    ]


TASK_FIELDS = ("task", "baseline", "candidate", "drop", "drop_lower", "drop_upper", "outcome")


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return what a release came to, without times and places: decision, scores, verdicts.

    Without what its servers logged as well: an evaluation that was cut short asked some twice.
    """
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    verdicts = {
        path.stem: json.loads(path.read_text(encoding="utf-8").replace(str(run_dir), "RUN"))
        for path in sorted((run_dir / "verdicts").glob("*.json"))
    }
    for verdict in verdicts.values():
        verdict["checks"].pop("server.errors", None)
    return {
        **{name: report[name] for name in ("decision", "exit_code", "failure_class", "reasons")},
        "tasks": [{name: row[name] for name in TASK_FIELDS} for row in report["tasks"]],
        "verdicts": verdicts,
    }
