"""Whether a run, or a bundle of one, still says what was found when it was made.

Nothing is believed that can be looked up: files are digested again, events are folded again, gates
are asked again with the evidence on file, and the decision is made again from their verdicts. That
needs no network, no tool and no model, only this package.

Invariants: what cannot be read is a problem and never a pass; everything is looked at, so that all
that is wrong is named at once; what is looked at was made by somebody else and is not trusted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conductor import event_log
from conductor.chain import Stage, State
from conductor.digests import tree_digest, tree_digests
from conductor.evidence.bundle import DamagedBundle, Unpacked, is_weight, unpacked
from conductor.evidence.gate_inputs import (
    DECISION,
    EVIDENCE,
    VERDICTS,
    GateInputError,
    judge,
    judge_decision,
    on_our_evidence,
)
from conductor.evidence.seal import (
    LEFT_OUT,
    RUN_MANIFEST,
    SEALED,
    UNSEALED,
    Facts,
    checkpoint_files,
    seal_document,
)
from conductor.failure import unusable
from conductor.files import read_regular
from conductor.history import HANDLERS, EventError, History, apply, line_digest
from conductor.repair import MANIFEST
from conductor.report import report_digest
from conductor.run_lock import LOCK
from gates import REQUIRED_GATES, Verdict

REPORT = "report.json"
LARGEST_DOCUMENT_BYTES = 2 * 2**30

SHAPES: Mapping[str, str] = {
    MANIFEST: "manifest",
    RUN_MANIFEST: "run_manifest",
    LEFT_OUT: "bundle",
    REPORT: "report",
    "env.json": "environment",
    "config.resolved.yaml": "resolved_config",
    f"{VERDICTS}/*.json": "verdict",
    f"{EVIDENCE}/{DECISION}.json": "decision_inputs",
    f"{EVIDENCE}/*.json": "gate_inputs",
    "stages/ptq/*checkpoint-summary.json": "checkpoint_summary",
    "stages/deploy/*canary.json": "canary_evidence",
    "stages/*_eval/*run-summary*.json": "run_summary",
    "smoke/*.json": "smoke_record",
}
"""The schema of each document of a run; the first pattern that fits counts."""

OWED = (MANIFEST, REPORT, "env.json", "config.resolved.yaml", f"{EVIDENCE}/{DECISION}.json")
"""Documents without which a run proves nothing."""

MAY_BE_LEFT_OUT = frozenset({"verbosity", "external"})
"""Gates that a suite may have no evidence for; an ACCEPT needs every other."""

NOTHING = object()
"""Stands for a document that cannot be read: null is one that can."""

GOES_ON = frozenset(HANDLERS) - {"release_finished"}
"""Events by which a release goes on: what a seal from before them says is no longer its end."""

RELATIVE, ABSOLUTE = 1e-9, 1e-12
"""How far a number that was computed again may be from the first: libraries of another version add
up in another order. A number that was changed has another digest in any case."""


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold: the file it shows in, and what is wrong."""

    file: str
    problem: str

    def __str__(self) -> str:
        """Return both as one line."""
        return f"{self.file}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a verification came to; all holds when there is no problem.

    ``checked`` are sentences on what was looked at, ``not_checked`` on what was not there to be.
    """

    problems: tuple[Problem, ...]
    checked: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "holds": not self.problems,
            "problems": [{"file": p.file, "problem": p.problem} for p in self.problems],
            "checked": list(self.checked),
            "not_checked": list(self.not_checked),
        }


def verify(path: Path, checkpoint: Path | None = None) -> Findings:
    """Verify the run directory or bundle at ``path``, offline.

    Args:
        path: what is verified.
        checkpoint: a directory that is said to hold the candidate: a copy, or what a bundle has
            left out.

    Raises:
        Failure: USER_CONFIG_ERROR when it is neither a run nor a bundle, or ``checkpoint`` is none.
        OSError: there is no room to open a bundle, or no permission to read what is verified.
    """
    if checkpoint is not None and not checkpoint.is_dir():
        raise unusable(f"--checkpoint {checkpoint}: is no directory; name the checkpoint's")
    if path.is_dir():
        return _verify_run(path, Unpacked(run_dir=path, passed={}), checkpoint)
    try:
        with unpacked(path) as opened:
            return _verify_run(path, opened, checkpoint)
    except DamagedBundle as damage:
        return Findings(problems=(Problem(damage.member or path.name, damage.problem),))


def _verify_run(path: Path, opened: Unpacked, checkpoint: Path | None) -> Findings:
    run = _Run(opened.run_dir)
    if not any((run.run_dir / name).is_file() for name in (event_log.NAME, MANIFEST)):
        raise unusable(f"{path}: no release is recorded here; name a run or a bundle")
    run.read_log()
    run.check_manifest()
    run.check_seal()
    run.check_files(opened.passed)
    run.check_shapes()
    run.check_verdicts()
    run.check_decision()
    run.check_report()
    run.check_checkpoint(checkpoint)
    return Findings(
        problems=tuple(dict.fromkeys(run.problems)),
        checked=tuple(run.checked),
        not_checked=tuple(run.not_checked),
    )


@dataclass
class _Run:
    """One run under examination: what was read of it so far, and what was found.

    ``files`` are the facts of what is there, ``sealed`` those of the seal.
    """

    run_dir: Path
    problems: list[Problem] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    history: History = field(default_factory=History)
    events: list[Mapping[str, Any]] = field(default_factory=list)
    files: Facts = field(default_factory=dict)
    sealed: Facts = field(default_factory=dict)
    seal: Mapping[str, Any] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    asked: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def tell(self, file: str, problem: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(file, problem))

    def content(self, name: str) -> bytes | None:
        """Return the bytes of a file; None, and a problem, where there are none to be had."""
        try:
            return read_regular(self.run_dir / name, LARGEST_DOCUMENT_BYTES)
        except FileNotFoundError:
            self.tell(name, "is missing")
        except OSError as error:
            self.tell(name, f"cannot be read ({error.strerror or error})")
        return None

    def document(self, name: str) -> Any:
        """Return the document in a file; ``NOTHING``, and a problem, where there is none."""
        import yaml

        content = self.content(name)
        if content is None:
            return NOTHING
        try:
            text = content.decode()
            if name.endswith(".yaml"):
                return yaml.safe_load(text)
            if name.startswith(f"{EVIDENCE}/"):
                return json.loads(text)  # a gate says itself what it thinks of NaN
            return json.loads(text, parse_float=event_log.finite, parse_constant=event_log.finite)
        except (ValueError, RecursionError, yaml.YAMLError):
            self.tell(name, "is no document that can be read")
            return NOTHING

    def mapping(self, name: str) -> dict[str, Any]:
        """Return the mapping in a file; an empty one where there is none, which its shape tells."""
        document = self.document(name)
        return document if isinstance(document, dict) else {}

    def read_log(self) -> None:
        """Follow the chain of events, and fold them."""
        content = self.content(event_log.NAME)
        if content is None:
            return
        *lines, rest = content.split(b"\n")
        before = len(self.problems)
        if rest or not lines:
            self.tell(event_log.NAME, "its last line is cut off, or it has none")
        previous: str | None = None
        for number, line in enumerate(lines, start=1):
            self._read_line(number, line, previous)
            previous = line_digest(line)
        if len(self.problems) == before:
            self.checked.append(f"{len(lines)} events, each with the digest of the one before it")

    def _read_line(self, number: int, line: bytes, previous: str | None) -> None:
        try:
            event = event_log.parse(line)
            if "previous" not in event:
                self.tell(event_log.NAME, f"line {number} holds no digest of the one before it")
            elif event["previous"] != previous:
                self.tell(
                    event_log.NAME,
                    f"line {number} does not follow the one before it: one of them was changed, or "
                    "one between them is gone",
                )
            apply(self.history, event)
            self.events.append(event)
            if self.history.head != line_digest(line):
                self.tell(event_log.NAME, f"line {number} is not written as day0 writes it")
        except (EventError, ValueError) as error:
            self.tell(event_log.NAME, f"line {number} is no event ({error})")

    def check_manifest(self) -> None:
        """Hold the manifest against the events, byte for byte."""
        content = self.content(MANIFEST)
        if content is None:
            return
        folded = self.history.document()
        if content == (json.dumps(folded, indent=2, allow_nan=False) + "\n").encode():
            self.checked.append("the manifest is what the events come to")
            return
        self.tell(MANIFEST, "is not what the events come to")
        with suppress(ValueError, RecursionError, AttributeError):
            if json.loads(content).get("head") != folded["head"]:
                self.tell(event_log.NAME, f"its last line is not the one that {MANIFEST} ends with")

    def check_seal(self) -> None:
        """Hold the seal against the event that recorded it, and see that nothing came after."""
        seals = [number for number, each in enumerate(self.events) if each["event"] == SEALED]
        if not seals:
            self.tell(
                RUN_MANIFEST,
                "the run was never sealed: its release has not come to its end, or an earlier day0 "
                "made it",
            )
            return
        last = seals[-1]
        if any(each["event"] in GOES_ON for each in self.events[last:]):
            self.tell(event_log.NAME, "the release went on after it was sealed, and has not ended")
        if not self.history.outcome:
            self.tell(event_log.NAME, "the release has not come to its end")
        content = self.content(RUN_MANIFEST)
        if content is None:
            return
        if hashlib.sha256(content).hexdigest() != self.events[last].get("sha256"):
            self.tell(RUN_MANIFEST, "is not the seal that the events recorded")
        self.seal = self.mapping(RUN_MANIFEST)
        if _shape_problems(self.seal, "run_manifest"):
            self.seal = {}
            return
        self.sealed = self.seal["files"]
        if self.seal != seal_document(self.history.run_id, self.sealed):
            self.tell(RUN_MANIFEST, "its run id or checkpoint is not that of its events and files")

    def check_files(self, passed: Facts) -> None:
        """Digest every file, and compare what is there with what was sealed."""
        there = tree_digests(self.run_dir, UNSEALED.__contains__)
        self.files = {**there, **passed}
        left_out = self._left_out()
        agreeing = 0
        for name, facts in self.sealed.items():
            if name not in self.files:
                if name in left_out:
                    self.not_checked.append(f"{name} is not in the bundle")
                else:
                    self.tell(name, "is missing")
            elif self.files[name] != facts:
                self.tell(name, "has other contents than were sealed")
            else:
                agreeing += 1
        for name in sorted(self.files.keys() - self.sealed.keys()) if self.seal else ():
            self.tell(name, "is not among the sealed files")
        for path in self.run_dir.rglob("*"):
            if not path.is_file() and not path.is_dir():
                self.tell(path.relative_to(self.run_dir).as_posix(), "is no file")
        lock = self.run_dir / LOCK
        if lock.exists() and (not lock.is_file() or lock.stat().st_size):
            self.tell(LOCK, "holds something; a lock is an empty file")
        if self.seal:
            self.checked.append(f"{agreeing} files as they were sealed")

    def _left_out(self) -> set[str]:
        if not (self.run_dir / LEFT_OUT).exists():
            return set()
        named = self.mapping(LEFT_OUT).get("left_out")
        names = {name for name in named if isinstance(name, str)} if isinstance(named, list) else []
        return {name for name in names if is_weight(name)}

    def check_shapes(self) -> None:
        """Hold every document against its schema."""
        names = [
            *self.files,
            *(each for each in (MANIFEST, RUN_MANIFEST, LEFT_OUT) if self._has(each)),
        ]
        checked = 0
        for name in names:
            schema = next((SHAPES[each] for each in SHAPES if fnmatch(name, each)), None)
            if schema is None:
                continue
            checked += 1
            for problem in _shape_problems(self.document(name), schema):
                self.tell(name, f"does not follow gates/schemas/{schema}.json: {problem}")
        for name in OWED:
            if not self._has(name):
                self.tell(name, "is missing")
        self.checked.append(f"{checked} documents against their schemas")

    def _has(self, name: str) -> bool:
        return (self.run_dir / name).is_file()

    def check_verdicts(self) -> None:
        """Ask every gate again, with its evidence."""
        for kind in (VERDICTS, EVIDENCE):
            for path in sorted((self.run_dir / kind).glob("*.json")):
                self._check_counterpart(path, EVIDENCE if kind == VERDICTS else VERDICTS)
        agreeing = 0
        for path in sorted((self.run_dir / EVIDENCE).glob("*.json")):
            if path.stem == DECISION:
                continue
            evidence, verdict = (f"{kind}/{path.stem}.json" for kind in (EVIDENCE, VERDICTS))
            inputs = self.mapping(evidence)
            try:
                if inputs.get("gate") != path.stem:
                    raise GateInputError(f"gate: is {inputs.get('gate')!r}")
                again = on_our_evidence(judge(inputs))
            except GateInputError as error:
                self.tell(evidence, f"no gate can be asked with it: {error}")
                continue
            self.verdicts[path.stem], self.asked[path.stem] = again, inputs["arguments"]
            if not self._has(verdict):
                continue
            if _same(self.document(verdict), again.document()):
                agreeing += 1
            else:
                self.tell(verdict, f"is not what its gate says of {evidence}")
        self.checked.append(f"{agreeing} verdicts, each what its gate says of its evidence")

    def _check_counterpart(self, path: Path, kind: str) -> None:
        if path.stem != DECISION and not self._has(f"{kind}/{path.name}"):
            self.tell(f"{kind}/{path.name}", f"is missing beside {path.parent.name}/{path.name}")

    def check_decision(self) -> None:
        """Decide again, from the verdicts of the gates and the stages that failed."""
        name = f"{EVIDENCE}/{DECISION}.json"
        if not self._has(name):
            return
        inputs = self.mapping(name)
        try:
            outcome = judge_decision(inputs, self.verdicts)
        except GateInputError as error:
            self.tell(name, f"nothing can be decided from it: {error}")
            return
        for problem in self._decision_gaps(inputs):
            self.tell(name, problem)
        report = self.mapping(REPORT)
        made = {
            "decision": outcome.decision,
            "failure_class": outcome.failure_class,
            "exit_code": outcome.exit_code,
            "reasons": list(outcome.reasons),
        }
        wrong = [key for key, value in made.items() if not _same(report.get(key), value)]
        if report.get("publish") not in (outcome.publish, "needs-human"):
            wrong.append("publish")
        if wrong:
            self.tell(REPORT, f"{', '.join(wrong)}: not what follows from the verdicts")
        else:
            said = outcome.decision or "that there is none"
            self.checked.append(f"the decision {said}, which follows from the verdicts")

    def _decision_gaps(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Say what the decision should have taken into account and did not."""
        for gate in sorted(set(self.verdicts) - set(inputs["verdicts"])):
            yield f"leaves out the verdict of {gate}"
        for gate in REQUIRED_GATES:
            if gate not in inputs["required"] and gate not in MAY_BE_LEFT_OUT:
                yield f"does not require {gate}"
        failed = {str(failure["stage"]) for failure in inputs["failures"]}
        for stage, record in self.history.stages.items():
            if record.state is State.FAILED and record.gate is None and stage not in failed:
                yield f"leaves out that {stage} failed"

    def check_report(self) -> None:
        """Hold the report against the events and the verdicts."""
        report, outcome = self.mapping(REPORT), self.history.outcome
        if not report or not outcome:
            return
        for key in ("decision", "exit_code"):
            if report.get(key) != outcome[key]:
                self.tell(REPORT, f"{key}: is {report.get(key)!r}, the events say {outcome[key]!r}")
        if report.get("run_id") != self.history.run_id:
            self.tell(REPORT, "run_id: is that of another run")
        if report_digest(report) != outcome.get("report"):
            self.tell(REPORT, "is not the report that the events recorded")
        documents = {str(row.get("gate")): row.get("document") for row in _rows(report, "gates")}
        for gate in sorted({*documents, *self.verdicts}):
            again = self.verdicts.get(gate)
            if again is None or not _same(documents.get(gate), again.document()):
                self.tell(REPORT, f"gates: what it says of {gate} is not its verdict")
        self._check_tasks({str(row.get("task")): row for row in _rows(report, "tasks")})

    def _check_tasks(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Hold what the report says of each task against what the gates were asked and said."""
        for task, row in rows.items():
            for name, value in self._task_facts(task).items():
                if not _same(row.get(name), value):
                    self.tell(REPORT, f"tasks: the {name} of {task} is not what its gate has")
        compared = self.verdicts.get("compare")
        for task in sorted((compared.document()["per_task"] if compared else {}).keys() - rows):
            self.tell(REPORT, f"tasks: {task} is left out")

    def _task_facts(self, task: str) -> dict[str, Any]:
        """Return what the gates have of a task, as a row of the report names it."""
        facts: dict[str, Any] = {}
        if "compare" in self.verdicts:
            facts |= self.verdicts["compare"].document()["per_task"].get(task, {})
        if "external" in self.verdicts:
            facts["external"] = self.verdicts["external"].document()["per_task"].get(task)
        for gate, side in (("baseline_run", "baseline"), ("candidate_run", "candidate")):
            if gate in self.verdicts:
                # What the gate refused to read has no score that counts.
                with suppress(KeyError, TypeError):
                    scored = self.asked[gate]["summary"]["tasks"][task]
                    facts |= {side: scored["score"], f"{side}_stderr": scored["stderr"]}
        return facts

    def check_checkpoint(self, elsewhere: Path | None) -> None:
        """See that the sealed candidate is the one that was quantized, and so evaluated."""
        for stage, record in self.history.stages.items():
            if record.state is State.DONE:
                self._check_outputs(stage, record.outputs or {})
        sealed = checkpoint_files(self.sealed)
        recorded = checkpoint_files(self.history.stages[Stage.PTQ].outputs or {})
        candidate = recorded or sealed  # a stage whose gate said no recorded none
        if recorded:
            for name in sorted(sealed.keys() - recorded.keys()):
                self.tell(f"checkpoint/{name}", "was not there when the candidate was evaluated")
        if elsewhere is not None:
            self._check_copy(elsewhere, candidate)
        if candidate:
            digest = tree_digest(candidate)
            self.checked.append(f"the candidate, {len(candidate)} files with the digest {digest}")

    def _check_outputs(self, stage: Stage, outputs: Facts) -> None:
        """Hold what a stage recorded of its files against the seal; the candidate may be moved."""
        moved = checkpoint_files(self.sealed)
        for name, facts in outputs.items():
            inside = next(iter(checkpoint_files({name: facts})), None)
            if self.seal and (self.sealed.get(name) or moved.get(inside or "")) != facts:
                self.tell(name, f"is not what {stage} left")

    def _check_copy(self, directory: Path, candidate: Facts) -> None:
        """Hold a copy of the candidate against the one that was evaluated."""
        if not candidate:
            self.tell(str(directory), "there is no candidate that it could be a copy of")
            return
        there, before = tree_digests(directory), len(self.problems)
        for name in sorted({*there, *candidate}):
            if name not in there:
                self.tell(str(directory / name), "is missing")
            elif name not in candidate:
                self.tell(str(directory / name), "was not there when the candidate was evaluated")
            elif there[name] != candidate[name]:
                self.tell(str(directory / name), "is not the file that was evaluated")
        left = {f"{name} is not in the bundle" for name in self.sealed}
        self.not_checked = [each for each in self.not_checked if each not in left]
        if len(self.problems) == before:
            self.checked.append(f"{directory}, which holds the candidate that was evaluated")


def _rows(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the mappings in a list of a document; whatever else is there is told by its shape."""
    rows = document.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _shape_problems(document: object, schema: str) -> list[str]:
    import jsonschema_rs

    from conductor.documents import read_schema

    if document is NOTHING:
        return []  # that was told
    try:
        validator = jsonschema_rs.validator_for(
            read_schema(schema), retriever=lambda address: read_schema(Path(address).stem)
        )
        return [
            f"{'.'.join(map(str, error.instance_path)) or 'the document'}: {error.message[:200]}"
            for error in validator.iter_errors(document)
        ]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return [f"holds a value that JSON cannot: {error}"]


def _same(one: object, other: object) -> bool:
    """Tell whether two documents say the same; numbers may differ as little as rounding does."""
    try:
        return _equal(one, other)
    except RecursionError:
        return False


def _equal(one: object, other: object) -> bool:
    match one, other:
        case (dict(), dict()):
            return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
        case (list(), list()):
            return len(one) == len(other) and all(map(_equal, one, other))
        case (str(), str()):
            # A report holds no half of a surrogate pair.
            return one.encode(errors="replace") == other.encode(errors="replace")
        case (bool(), _) | (_, bool()):
            return one is other
        case (int() | float(), int() | float()):
            return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        case _:
            return one is None and other is None
