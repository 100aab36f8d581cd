"""The end of a release: the decision, the report document, and the tracking server.

A decision is owed however the release ended, so this needs nothing but the journal and whatever
the stages left.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import gates
from conductor import deterministic
from conductor.chain import STAGES, Stage, State
from conductor.compatibility import Engine
from conductor.config import Config, Rule
from conductor.costs import stage_cost, total_cost
from conductor.engines.opening import engine_version
from conductor.evidence.checklist import write_checklist
from conductor.evidence.environment import record_environment
from conductor.evidence.gate_inputs import decision_inputs, file_decision, judge_decision
from conductor.evidence.reproduce import write_reproduction
from conductor.executors.local import Progress
from conductor.files import read_json, redact_files
from conductor.jobs import job_folders, read_jobs
from conductor.journal import Journal, timestamp
from conductor.preconditions import environments_needed
from conductor.redaction import redact_document
from conductor.release_state import Plan, Release
from conductor.report import write_record, write_report
from conductor.smoke_run import reached
from conductor.stage_files import STAGE_GATES
from conductor.tracking import Tracking, TrackingStatus, log_release
from gates import FailureClass
from gates.criteria import SCORE_THRESHOLD

SCHEMA_VERSION = 1


def close_out(release: Release, progress: Progress) -> dict[str, Any]:
    """Decide, write the report, log to the tracking server; return the report document.

    The record is written before tracking is tried, and the report, with the run IDs, by whoever
    sends it; where nobody does, here. A failure to write it does not cost a decision, unless that
    is ACCEPT: publishing needs the evidence on disk.
    """
    progress(0, 0, "deciding")
    document: dict[str, Any] = redact_document(report_document(release))
    run_dir = release.journal.run_dir
    try:
        write_reproduction(release, document["exit_code"])
    except Exception as error:  # whatever stops it must not cost the report of the failure
        problem = f"{type(error).__name__}: {error}"
        document["deviations"].append(f"how to repeat what failed could not be written: {problem}")
    try:
        environment = record_environment(
            run_dir, release.world, _environments(release), dry_run=release.config.dry_run
        )
        if environment["earlier"]:
            document["deviations"].append(
                "machine, packages or variables changed on the way; env.json has what they were"
            )
        for folder in job_folders(run_dir):
            redact_files(folder.path)  # scripts and logs, which Slurm and submitit write
        file_decision(run_dir, _decision_inputs(release))
        write_record(document, run_dir)
        tracking = _track(release, document, progress)
        document["tracking"] = tracking.document()
        if tracking.status is not TrackingStatus.LOGGED:
            write_report(document, run_dir)
        write_checklist(run_dir)
    except Exception as error:
        _note_unwritten(document, error)
    return document


def _note_unwritten(document: dict[str, Any], error: Exception) -> None:
    """Say that the report is not whole; an ACCEPT that nobody can read up is withdrawn."""
    problem = f"the report could not be written: {type(error).__name__}: {error}"
    document["deviations"].append(problem)
    if document["decision"] is gates.Decision.ACCEPT:
        document |= {
            "decision": None,
            "exit_code": 5,
            "failure_class": FailureClass.SYSTEMIC,
            "reasons": [problem],
            "next_action": gates.TRIAGE[FailureClass.SYSTEMIC].next_action,
            "publish": "needs-human",
        }


def _track(release: Release, document: dict[str, Any], progress: Progress) -> Tracking:
    if release.resolved is None:
        return Tracking(
            status=TrackingStatus.DISABLED, uri=None, detail="setup did not get through"
        )
    if release.config.dry_run:
        return Tracking(status=TrackingStatus.DISABLED, uri=None, detail="a dry run is not logged")
    progress(0, 0, "logging to MLflow")
    return log_release(
        document,
        release.journal.run_dir,
        workspace=release.config.workspace,
        environ=release.world.environ,
        uri=release.config.tracking.uri,
        experiment=release.config.tracking.experiment,
        note=release.journal.record,
    )


def report_document(release: Release) -> dict[str, Any]:
    """Return everything the release found out, as the report document (schema ``report.json``)."""
    journal, config, outcome = release.journal, release.config, _outcome(release)
    finished = journal.clock()
    stages = _stages(release)
    return {
        "schema_version": SCHEMA_VERSION,
        "day0_version": version("day0"),
        "run_id": journal.run_id,
        "started_at": timestamp(journal.started_at),
        "finished_at": timestamp(finished),
        "seconds": round(journal.worked_s(), 3),
        "sessions": journal.history.sessions,
        "decision": outcome.decision,
        "exit_code": outcome.exit_code,
        "failure_class": outcome.failure_class,
        "reasons": list(outcome.reasons),
        "next_action": outcome.next_action,
        "publish": _publish(outcome, config),
        **_what(release),
        "threshold": config.threshold,
        "relative": config.relative,
        "rule": config.rule,
        "until_decided": config.until_decided,
        "seed": config.seed,
        "limit": config.limit,
        "deterministic": _repeatability(release) if config.deterministic else None,
        "smoke": reached(release) if config.smoke else None,
        "size": _size(release.checkpoint_summary),
        "stages": stages,
        "gpu_hours": total_cost(stages),
        "gates": _gates(release),
        "tasks": _tasks(release),
        "path": release.path,
        "noise_floor": release.noise_floor,
        "plan": [task.document() for task in release.outlook.tasks] if release.outlook else [],
        "settings": _settings(release),
        "paths": {
            "run": str(journal.run_dir),
            "checkpoint": str(release.checkpoint) if release.checkpoint.is_dir() else None,
            "report_json": str(journal.run_dir / "report.json"),
            "report_markdown": str(journal.run_dir / "report.md"),
            "report_html": str(journal.run_dir / "report.html"),
        },
        "tracking": Tracking(
            status=TrackingStatus.PENDING, uri=None, detail="not tried yet"
        ).document(),
        "versions": _versions(release),
        "deviations": _deviations(release),
    }


def _outcome(release: Release) -> gates.Outcome:
    outcome = judge_decision(_decision_inputs(release), release.verdicts)
    next_action = _next_action(outcome, release.config)
    return replace(outcome, next_action=next_action) if next_action else outcome


def _next_action(outcome: gates.Outcome, config: Config) -> str | None:
    """Say what to do next where that follows from how the release was asked for."""
    accepted = outcome.decision is gates.Decision.ACCEPT
    undecided = outcome.failure_class is FailureClass.INSUFFICIENT_EVIDENCE
    if config.dry_run:
        return "Release again without --dry-run: no tool ran, and nothing was measured."
    if config.smoke and (accepted or undecided):
        return (
            "Release with the production configuration once every stage was reached: a smoke run "
            "asks too little to publish on."
        )
    if accepted and config.limit is not None:
        return (
            "Release again without --limit before publishing: only the first "
            f"{config.limit} documents of each task were asked."
        )
    return _capped(config) if undecided else None


def _decision_inputs(release: Release) -> dict[str, Any]:
    """Return what is decided on: the verdicts, the stages that failed without one, what is owed."""
    failures = [
        gates.StageFailure(stage=stage, failure_class=f.failure_class, message=f.message)
        for stage, f in release.failures
    ]
    return decision_inputs(release.verdicts, failures, _required_gates(release.resolved))


def _capped(config: Config) -> str | None:
    """Say how to ask what an option kept from being asked."""
    if config.limit is not None:
        option, most = "--limit", config.limit
    elif config.max_samples is not None:
        option, most = "--max-samples", config.max_samples
    else:
        return None
    return (
        f"Release again without {option}, or with a larger one: at most {most:,} questions of each "
        "task were asked, and the reason says how many it takes."
    )


def _required_gates(plan: Plan | None) -> tuple[str, ...]:
    """Return the gates that an ACCEPT needs: all whose evidence the suite can give."""
    without = set()
    if plan is not None and not plan.suite.generation_tasks:
        without.add("verbosity")
    if plan is not None and not plan.suite.references:
        without.add("external")
    return tuple(gate for gate in gates.REQUIRED_GATES if gate not in without)


def _publish(outcome: gates.Outcome, config: Config) -> str:
    """Return what to do with the checkpoint; some releases prove too little to publish on.

    Those are dry runs, smoke runs, and releases that asked a part of each task.
    """
    proves_little = config.dry_run or config.smoke or config.limit is not None
    return "needs-human" if proves_little and not outcome.exit_code else outcome.publish


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
            "calibration": release.calibration,
        },
        "engine": {
            "name": plan.row.engine,
            "version": engine_version(plan.row.engine, plan.row.device, release.world.environments),
            "device": plan.row.device,
            "emulated": plan.row.emulated,
            "note": (
                "low-precision arithmetic was emulated by plain transformers"
                if plan.row.emulated
                else None
            ),
        },
        "suite": {
            "name": plan.suite.name,
            "tasks": len(plan.suite.tasks),
            "path": str(plan.suite.path),
        },
    }


def _size(summary: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    source, candidate = summary["source_bytes"], summary["output_bytes"]
    return {
        "source_bytes": source,
        "candidate_bytes": candidate,
        "ratio": round(candidate / source, 4) if source else None,
    }


def _stages(release: Release) -> list[dict[str, Any]]:
    """Describe every stage, with what it cost."""
    journal, jobs = release.journal, None
    with suppress(OSError):  # a log that cannot be read must not cost the decision
        jobs = read_jobs(journal.run_dir)
    return [
        _stage(stage, journal)
        | stage_cost(stage, journal.stages[stage].seconds, jobs, release.config, release.world)
        for stage in STAGES
        if stage is not Stage.CLOSEOUT
    ]


def _stage(stage: Stage, journal: Journal) -> dict[str, Any]:
    record, log = journal.stages[stage], journal.log_of(stage)
    return {
        "name": stage,
        "state": record.state,
        "seconds": record.seconds,
        "attempts": record.attempts,
        "interruptions": record.interruptions,
        "troubles": list(record.troubles),
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


EVIDENCE = (
    *("outcome", "drop_lower", "drop_upper", "method", "questions", "repeats", "clusters"),
    *("lost", "gained", "p_within", "p_worse", "p_worse_adjusted", "needed", "beside"),
)
"""What the accuracy gate says of a task beside its drop, where it has every question's score."""


def _tasks(release: Release) -> list[dict[str, Any]]:
    """One row per task with a score on any side; what was not measured is null."""
    plan = release.resolved
    sides = [release.evaluations.get(side) for side in ("source", "candidate")]
    if plan is None or not any(sides):
        return []
    compared = release.verdicts["compare"].per_task if "compare" in release.verdicts else {}
    external = release.verdicts["external"].per_task if "external" in release.verdicts else {}
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
                "higher_is_better": task.higher_is_better,
                **{name: row[name] for name in EVIDENCE if name in row},
                "external": external.get(task.name),
            }
        )
    return rows


def _settings(release: Release) -> dict[str, Any]:
    verdict = release.verdicts.get("conditions")
    if verdict is None:
        return {"compared": [], "differences": [], "values": {}}
    equal = [check for check in verdict.checks if check.passed]
    return {
        "compared": [check.subject for check in equal],
        "differences": [check.detail for check in verdict.checks if not check.passed],
        "values": {check.subject: str(check.observed) for check in equal},
    }


def _versions(release: Release) -> dict[str, dict[str, str]]:
    return {name: release.world.environments.versions(name) for name in _environments(release)}


def _environments(release: Release) -> list[str]:
    """Name the worker environments that the release uses, once that is known."""
    return environments_needed(release.resolved.row) if release.resolved else []


def _repeatability(release: Release) -> dict[str, Any]:
    """Return what a deterministic release pinned, and what neither it nor its tools could."""
    world, said = release.world, set[str]()
    for path in release.journal.run_dir.glob("stages/**/result.json"):
        # A worker that left no whole result said nothing.
        with suppress(OSError, ValueError, AttributeError, TypeError):
            said.update(read_json(path).get(deterministic.EXCEPTIONS, ()))
    version = engine_version(Engine.VLLM, world.machine.device, world.environments)
    return deterministic.describe(release.config, release.resolved, world, version, sorted(said))


def _deviations(release: Release) -> list[str]:
    """Say where this release departed from a plain one, and what it did not measure."""
    return [
        *_departures_in_course(release),
        *_departures_in_asking(release),
        *_departures_in_tools(release),
        *_gaps(release),
    ]


def _departures_in_course(release: Release) -> list[str]:
    """Say what was tried again, taken up again, or changed on the way."""
    history = release.journal.history
    config = release.config
    found = ["a dry run: recorded results stood for the tools"] if config.dry_run else []
    if config.smoke:
        found.append("a smoke run: it asks less than production does")
    found += [
        f"{name} is not as in production, on purpose: {reason}"
        for name, reason in config.smoke_purpose.items()
    ]
    found += [
        f"{name} is {config.origins[name][0]!r} by the command line, {value!r} in {file}"
        for name, (value, file) in config.overridden.items()
    ]
    found += [
        f"{stage}: {trouble}"
        for stage, record in history.stages.items()
        # The last failure of a stage that stays failed is the reason, not a deviation.
        for trouble in record.troubles[: -1 if record.state is State.FAILED else None]
    ]
    if history.sessions > 1:
        found.append(f"the release was resumed: {history.sessions} sessions worked on it")
    for change in history.changes:
        again = ", ".join(change["invalidates"]) or "nothing"
        found.append(
            f"{change['field']} changed on the way from {change['was']!r} to {change['now']!r} "
            f"(--accept-drift); repeated: {again}"
        )
    found += [f"not established: {sentence}" for sentence in history.unknown]
    source = release.evaluations.get("source")
    if source and source.recalled_from not in (None, release.journal.run_id):
        found.append(f"the source's evaluation is that of run {source.recalled_from}")
    if (plan := release.resolved) and plan.model.remark:
        found.append(plan.model.remark)
    return found + release.remarks


def _departures_in_asking(release: Release) -> list[str]:
    """Say on how many questions, and by which rule, scores were compared."""
    config = release.config
    found = []
    if config.limit is not None:
        found.append(f"only the first {config.limit} documents of each task were asked (--limit)")
    if config.until_decided and "source" in release.evaluations:
        found.append(_asked_in_rounds(release))
    if config.rule is Rule.THRESHOLD:
        found.append("observed drops were held to the threshold, without intervals (--rule)")
    if config.threshold > SCORE_THRESHOLD:
        found.append(f"threshold {config.threshold:g} is above the usual {SCORE_THRESHOLD:g}")
    if config.relative:
        found.append("drops were taken relative to the baseline (--relative)")
    return found


def _asked_in_rounds(release: Release) -> str:
    """Say how many of the questions were asked before the release looked for the last time."""
    config, counts = release.config, release.evaluations["source"].asked.values()
    asked, there = sum(count for count, _ in counts), sum(size for _, size in counts)
    words = (
        f"questions were drawn by lot and asked in batches: {asked:,} of {there:,} "
        "(--until-decided)"
    )
    if config.max_samples is not None:
        words += f", at most {config.max_samples:,} of each task (--max-samples)"
    if config.max_repeats > 1:
        words += f"; tasks that sample answered each {config.max_repeats} times (--max-repeats)"
    return words


def _departures_in_tools(release: Release) -> list[str]:
    config, plan = release.config, release.resolved
    found = []
    if config.engine.arguments:
        found.append(f"further engine arguments: {' '.join(config.engine.arguments)}")
    if config.calibration.data and release.calibration and not release.calibration["samples"]:
        found.append(f"calibration data {config.calibration.data} was not used: no need for it")
    if plan and plan.row.emulated and "canary" in release.verdicts:
        found.append("low-precision arithmetic was emulated, not run on its own hardware")
    return found


def _gaps(release: Release) -> list[str]:
    """Say what was not measured."""
    found = []
    if plan := release.resolved:
        unverified = [name for name in plan.suite.tasks if name not in plan.suite.references]
        if unverified:
            found.append(f"not compared with a published score: {', '.join(unverified)}")
    verbosity = release.verdicts.get("verbosity")
    if verbosity and verbosity.not_comparable:
        found.append(f"length of answers not compared: {', '.join(verbosity.not_comparable)}")
    return found
