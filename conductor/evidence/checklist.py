"""The release checklist, filled from what lies in the run directory: ``checklist.md``.

Every item is a row of :data:`ITEMS`: what is promised, and the function that looks for the fact.
Invariants:

* An item is PASS only where a file in the run says so. What was not reached is SKIP with the
  reason; a file that should be there and is not is FAIL.
* The same run directory gives the same bytes: no clock, and nothing but files of the run.
* Warnings, numbers that are none, and deviations are listed even where there are none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from conductor.chain import STAGES, Stage, State
from conductor.evidence.reproduce import FAILURE
from conductor.files import write_text
from conductor.rendering import templates
from conductor.repair import attempt_dir, read_object
from conductor.report import escape_markdown, smoke
from conductor.report.wording import printable, split_reason

NAME = "checklist.md"

WARNING = re.compile(rb"\bWARN(?:ING)?\b|\b[A-Z]\w*Warning: ")
"""What a line of a log has that warns: a level, or the name of one of Python's warnings."""
LONGEST_WARNING = 160

Document = dict[str, Any]


class Mark(StrEnum):
    """What an item came to."""

    PASS = "PASS"  # noqa: S105 - no password
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found about an item, and the file of the run that says so."""

    mark: Mark
    words: str
    evidence: str


@dataclass(frozen=True)
class Run:
    """The files of a run, read when they are asked for; one that cannot be read is empty."""

    directory: Path

    @cached_property
    def report(self) -> Document:
        """The report document."""
        return read_object(self.directory / "report.json")

    @cached_property
    def manifest(self) -> Document:
        """The state of every stage."""
        return read_object(self.directory / "manifest.json")

    def stage(self, stage: Stage) -> Document:
        """Return what the manifest records of a stage."""
        record: Document = self.manifest.get("stages", {}).get(stage, {})
        return record

    def stage_file(self, stage: Stage, name: str) -> str:
        """Return the path of a file of the stage's last attempt, relative to the run."""
        attempts = self.stage(stage).get("attempts", 0)
        path = attempt_dir(self.directory, stage, attempts) / name
        return path.relative_to(self.directory).as_posix()

    def read(self, path: str) -> Document:
        """Return the JSON object in a file of the run."""
        return read_object(self.directory / path)

    def has(self, path: str) -> bool:
        """True when there is such a file."""
        return (self.directory / path).is_file()

    @cached_property
    def ended_by(self) -> Stage | None:
        """The stage whose failure ended the release, if one did."""
        return next((s for s in STAGES if self.stage(s).get("state") == State.FAILED), None)

    def not_reached(self, evidence: str) -> Finding:
        """Skip an item because the release ended before it."""
        why = f"not reached: {self.ended_by} failed" if self.ended_by else "not reached"
        return Finding(mark=Mark.SKIP, words=why, evidence=evidence)


Look = Callable[[Run], Finding]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of the checklist: the stage, what it promises, and how that is looked up."""

    stage: Stage
    promise: str
    look: Look


def write_checklist(run_dir: Path) -> None:
    """Write ``checklist.md`` of a release that came to its end, with a report or without.

    Raises:
        OSError: it cannot be written.
    """
    write_text(run_dir / NAME, render_checklist(run_dir))


def render_checklist(run_dir: Path) -> str:
    """Return the checklist of the run under ``run_dir`` as Markdown (GitHub tables)."""
    run = Run(run_dir)
    environment = templates(escape_markdown)
    shown = printable(
        {
            "run_id": run.manifest.get("run_id", run_dir.name),
            "decision": run.report.get("decision") or "none",
            "items": [
                {"stage": item.stage, "promise": item.promise, **_say(item.look(run))}
                for item in ITEMS
            ],
            "numbers": list(_numbers_that_are_none(run)),
            "warnings": list(_warnings(run)),
            "deviations": run.report.get("deviations", ["there is no report that lists them"]),
        }
    )
    return environment.get_template(f"{NAME}.j2").render(shown)


def _say(finding: Finding) -> Document:
    return {"mark": finding.mark.value, "words": finding.words, "evidence": finding.evidence}


def _passes(holds: bool, words: str, evidence: str) -> Finding:
    return Finding(mark=Mark.PASS if holds else Mark.FAIL, words=words, evidence=evidence)


def _file(path: str, words: str) -> Look:
    """Look whether a file is there that every release leaves."""

    def look(run: Run) -> Finding:
        return _passes(run.has(path), words if run.has(path) else "is not there", path)

    return look


def _stage_ended(stage: Stage) -> Look:
    """Look whether a stage came to its end, and what it said where it did not."""

    def look(run: Run) -> Finding:
        record, evidence = run.stage(stage), "manifest.json"
        match record.get("state"):
            case State.DONE:
                again = record["attempts"] - 1
                words = f"done, after {again} failed attempt(s)" if again else "done"
                return _passes(True, words, evidence)
            case State.FAILED:
                return _passes(False, split_reason(record["detail"])[0], _log_of(run, stage))
        return run.not_reached(evidence)

    return look


def _log_of(run: Run, stage: Stage) -> str:
    """Return the log of what failed in a stage, else the stage's, else what recorded the end."""
    step = run.read(FAILURE)
    logs = [each["log"] for each in run.report.get("stages", ()) if each["name"] == stage]
    if step.get("stage") == stage:
        logs.insert(0, step["log"])
    return next((log for log in logs if log), "manifest.json")


def _gate(gate: str, stage: Stage, unasked: str = "the gate was not asked") -> Look:
    """Look what a gate said; ``unasked`` is why a release may do without it."""

    def look(run: Run) -> Finding:
        evidence = f"verdicts/{gate}.json"
        verdict, state = run.read(evidence), run.stage(stage).get("state")
        if verdict.get("pass") is True:
            return _passes(True, f"{len(verdict['checks'])} checks hold", evidence)
        if verdict:
            failed = [name for name, check in verdict["checks"].items() if not check["passed"]]
            words = f"{', '.join(failed)}: {verdict['detail']}" if failed else verdict["detail"]
            return _passes(False, words, evidence)
        if state == State.DONE:
            return Finding(mark=Mark.SKIP, words=unasked, evidence=run.stage_file(stage, ""))
        if state == State.FAILED:
            return Finding(mark=Mark.SKIP, words=f"{stage} failed before", evidence="manifest.json")
        return run.not_reached("manifest.json")

    return look


def _inputs_have_digests(run: Run) -> Finding:
    path = run.stage_file(Stage.SETUP, "inputs.json")
    if run.stage(Stage.SETUP).get("state") != State.DONE:
        return run.not_reached("manifest.json")
    inputs = run.read(path)
    return _passes(bool(inputs), f"{len(inputs)} fields", path)


def _environment(run: Run) -> Finding:
    document = run.read("env.json")
    if not document:
        return _passes(False, "is not there", "env.json")
    accelerator = document["accelerator"]["statement"]
    used = ", ".join(document["environments"]) or "none"
    return _passes(True, f"accelerators: {accelerator}; environments: {used}", "env.json")


def _calibration(run: Run) -> Finding:
    evidence = run.stage_file(Stage.PTQ, "result.json")
    calibration = run.report.get("recipe", {}).get("calibration")
    if calibration is None:
        return run.not_reached("manifest.json")
    if not calibration["samples"]:
        return Finding(mark=Mark.SKIP, words="the recipe needs none", evidence=evidence)
    return _passes(True, f"{calibration['samples']:,} samples", evidence)


def _candidate_has_digests(run: Run) -> Finding:
    if run.stage(Stage.PTQ).get("state") != State.DONE:
        return run.not_reached("manifest.json")
    outputs = run.stage(Stage.PTQ).get("outputs") or {}
    files = [name for name in outputs if name.startswith("checkpoint/")]
    return _passes(bool(files), f"{len(files)} files", "manifest.json")


def _own_arithmetic(run: Run) -> Finding:
    emulated = run.report.get("engine", {}).get("emulated")
    if emulated is None or not run.has("verdicts/canary.json"):
        return run.not_reached("report.json")
    if emulated:
        words = run.report["engine"]["note"] or "low-precision arithmetic was emulated"
        return Finding(mark=Mark.SKIP, words=words, evidence="report.json")
    return _passes(True, f"{run.report['engine']['name']}", "report.json")


def _noise_floor(run: Run) -> Finding:
    if run.report.get("noise_floor"):
        return _passes(True, "the source was evaluated twice", "report.json")
    return Finding(mark=Mark.SKIP, words="not asked for", evidence="config.resolved.yaml")


def _decision(run: Run) -> Finding:
    report = run.report
    if not report:
        return _passes(False, "there is no report", "report.json")
    reason = split_reason(report["reasons"][0])[0]
    words = f"{report['decision'] or 'no decision'}: {reason}"
    return _passes(report["decision"] == "ACCEPT", words, "report.json")


def _publishable(run: Run) -> Finding:
    publish = run.report.get("publish", "unknown")
    return _passes(publish == "publish", publish, "report.json")


def _tracked(run: Run) -> Finding:
    tracking = run.report.get("tracking", {"status": "unknown", "detail": ""})
    status, detail = tracking["status"], tracking["detail"]
    if status == "disabled":
        return Finding(mark=Mark.SKIP, words=detail, evidence="report.json")
    logged = status == "logged"
    words = f"run {tracking['run_id']}" if logged else f"{status}: {split_reason(detail)[0]}"
    return _passes(logged, words, "report.json")


def _smoke_reached(run: Run) -> Finding:
    if not run.report.get("smoke"):
        return Finding(mark=Mark.SKIP, words="no smoke run", evidence="config.resolved.yaml")
    return _passes(not smoke.missing(run.report), smoke.sentence(run.report) or "", "report.json")


ITEMS = (
    Item(
        stage=Stage.SETUP,
        promise="The configuration is recorded, with where each value comes from",
        look=_file("config.resolved.yaml", "recorded"),
    ),
    Item(
        stage=Stage.SETUP,
        promise="Machine, interpreters and packages are recorded",
        look=_environment,
    ),
    Item(
        stage=Stage.SETUP,
        promise="The request can be carried out here",
        look=_stage_ended(Stage.SETUP),
    ),
    Item(
        stage=Stage.SETUP,
        promise="What the release depends on has digests",
        look=_inputs_have_digests,
    ),
    Item(stage=Stage.PTQ, promise="The candidate was made", look=_stage_ended(Stage.PTQ)),
    Item(stage=Stage.PTQ, promise="Calibration text went through the model", look=_calibration),
    Item(
        stage=Stage.PTQ,
        promise="The candidate is what the recipe promises",
        look=_gate("ptq", Stage.PTQ),
    ),
    Item(
        stage=Stage.PTQ, promise="The candidate's files have digests", look=_candidate_has_digests
    ),
    Item(stage=Stage.DEPLOY, promise="The candidate was started", look=_stage_ended(Stage.DEPLOY)),
    Item(
        stage=Stage.DEPLOY,
        promise="It answers like its source, as exported",
        look=_gate("canary", Stage.DEPLOY),
    ),
    Item(
        stage=Stage.DEPLOY,
        promise="Low-precision arithmetic ran on its own hardware",
        look=_own_arithmetic,
    ),
    Item(
        stage=Stage.BASELINE_EVAL,
        promise="The source was evaluated",
        look=_stage_ended(Stage.BASELINE_EVAL),
    ),
    Item(
        stage=Stage.BASELINE_EVAL,
        promise="Each of the source's samples is accounted for",
        look=_gate("baseline_run", Stage.BASELINE_EVAL),
    ),
    Item(
        stage=Stage.BASELINE_EVAL,
        promise="The source scores as published",
        look=_gate("external", Stage.BASELINE_EVAL, "the suite names no published score"),
    ),
    Item(
        stage=Stage.BASELINE_EVAL,
        promise="How far the source differs from itself was measured",
        look=_noise_floor,
    ),
    Item(
        stage=Stage.CANDIDATE_EVAL,
        promise="The candidate was evaluated",
        look=_stage_ended(Stage.CANDIDATE_EVAL),
    ),
    Item(
        stage=Stage.CANDIDATE_EVAL,
        promise="Each of the candidate's samples is accounted for",
        look=_gate("candidate_run", Stage.CANDIDATE_EVAL),
    ),
    Item(
        stage=Stage.COMPARE,
        promise="Both sides were asked under the same conditions",
        look=_gate("conditions", Stage.COMPARE),
    ),
    Item(
        stage=Stage.COMPARE,
        promise="No task loses more than the margin",
        look=_gate("compare", Stage.COMPARE),
    ),
    Item(
        stage=Stage.COMPARE,
        promise="Answers are as long as the source's",
        look=_gate("verbosity", Stage.COMPARE, "no task of the suite generates text"),
    ),
    Item(stage=Stage.CLOSEOUT, promise="The decision is ACCEPT", look=_decision),
    Item(stage=Stage.CLOSEOUT, promise="The decision is ground to publish", look=_publishable),
    Item(
        stage=Stage.CLOSEOUT, promise="The report can be read", look=_file("report.md", "written")
    ),
    Item(stage=Stage.CLOSEOUT, promise="The release is logged to MLflow", look=_tracked),
    Item(stage=Stage.CLOSEOUT, promise="A smoke run reached every stage", look=_smoke_reached),
)
"""The release checklist, in the order in which a release comes to its items."""


def _numbers_that_are_none(run: Run) -> Iterator[Document]:
    """Yield where NaN and infinity were looked for, and how many there were."""
    path = run.stage_file(Stage.PTQ, "checkpoint-summary.json")
    if summary := run.read(path):
        found = [each for each in summary["findings"] if each["kind"].startswith("non_finite_")]
        yield _counted("tensors of the candidate", sum(each["count"] for each in found), path)
    path = run.stage_file(Stage.DEPLOY, "canary.json")
    if canary := run.read(path):
        answers = [prompt[side] for prompt in canary["prompts"] for side in ("candidate", "source")]
        lost = sum(logprob is None for answer in answers for logprob in answer["logprobs"])
        yield _counted("log-probabilities of the canary", lost, path)
    for stage, side in ((Stage.BASELINE_EVAL, "source"), (Stage.CANDIDATE_EVAL, "candidate")):
        path = run.stage_file(stage, "run-summary.json")
        if summary := run.read(path):
            audits = [task.get("audit", {}) for task in summary["tasks"].values()]
            lost = sum(audit.get("answers", {}).get("non_finite", 0) for audit in audits)
            yield _counted(f"answers of the {side}", lost, path)


def _counted(what: str, count: int, evidence: str) -> Document:
    return {"what": what, "count": count, "evidence": evidence}


def _warnings(run: Run) -> Iterator[Document]:
    """Yield the logs that hold warnings, with how many, and the first of each."""
    setup = run.stage(Stage.SETUP).get("detail", "")
    if setup.startswith("warning: "):
        yield {"evidence": "manifest.json", "count": 1, "first": setup}
    for log in sorted((run.directory / "stages").rglob("*.log")):
        with log.open("rb") as lines:
            found = [line for line in lines if WARNING.search(line)]
        if found:
            yield {
                "evidence": log.relative_to(run.directory).as_posix(),
                "count": len(found),
                "first": found[0].decode(errors="replace").strip()[:LONGEST_WARNING],
            }
