"""What a run directory can still prove: its events, and where those are lost, its files.

Invariants: a manifest is never believed against events, and never makes a stage more done than its
files do; what cannot be established is said; nothing that a person may want back is deleted; a
second repair changes nothing. Whoever writes holds the run's lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from conductor import event_log
from conductor.chain import STAGES, Stage, State
from conductor.digests import Digests
from conductor.event_log import EventLog, Reading, read_log
from conductor.failure import unusable
from conductor.files import read_regular, write_bytes, write_json
from conductor.history import (
    MOST_ATTEMPTS,
    VERSION,
    Event,
    History,
    apply,
    chained,
    moment_of,
    timestamp,
)
from conductor.stage_files import STAGE_GATES, candidate_dir, outputs_of
from gates import Decision, FailureClass

MANIFEST = "manifest.json"
ORIGINAL_V1 = "manifest.v1.json"
LARGEST_DOCUMENT_BYTES = 256 * 2**20

GATES_OF_SOME_SUITES = frozenset({"external", "verbosity"})
"""Asked only where the suite has published scores, or tasks that generate."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``manifest.json`` as it lies there: its document, or what is wrong with it."""

    content: bytes = b""
    document: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def version(self) -> int | None:
        """The version that it claims; None where it cannot be told."""
        claimed = self.document.get("version")
        return claimed if type(claimed) is int else None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run directory says: its log, its manifest, and the state that they prove.

    ``established`` is the event that is still to be appended where the events alone do not say how
    the release began.
    """

    log: Reading
    manifest: Manifest
    history: History
    established: Event | None


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What a repair came to; ``findings`` say what was wrong and what stays unknown."""

    history: History
    findings: list[str]


def look(run_dir: Path, *, digests: Digests | None, at: datetime) -> Found:
    """Read a run directory without writing; where events are lost, establish from its files.

    Args:
        run_dir: the run directory.
        digests: takes those of outputs that were not recorded; None leaves them out.
        at: the moment of the look, for the event.

    Raises:
        Failure: USER_CONFIG_ERROR when it is no run directory, a newer day0 wrote it, or the log
            is not a file that can be read.
    """
    manifest = _read_manifest(run_dir / MANIFEST)
    try:
        log = read_log(run_dir)
    except OSError as error:
        raise unusable(
            f"{run_dir / event_log.NAME}: cannot be read ({error.strerror}); put the log itself "
            "there, or move it away and run day0 repair"
        ) from None
    for name, claimed in ((MANIFEST, manifest.version), (event_log.NAME, log.version)):
        if claimed is not None and claimed > VERSION:
            raise unusable(
                f"{run_dir / name}: version {claimed} is newer than version {VERSION}, which day0 "
                f"{version('day0')} reads; use the day0 that wrote it, or a later one"
            )
    _check_is_run(run_dir, log, manifest)
    history, established = log.history, None
    if not history.begun:
        established = chained(history, _establish(run_dir, manifest, digests, at))
        apply(history, established)
    history.run_id = history.run_id or run_dir.name
    history.started_at = history.started_at or _oldest(run_dir)
    return Found(log=log, manifest=manifest, history=history, established=established)


def keep_up(run_dir: Path, found: Found) -> EventLog:
    """Write down what :func:`look` found: a whole last line, the established state, the manifest.

    Raises:
        OSError: the run directory cannot be written.
    """
    log = EventLog(run_dir=run_dir)
    if found.log.torn:
        log.cut_torn()
    if found.manifest.version == 1 and not (run_dir / ORIGINAL_V1).exists():
        write_bytes(run_dir / ORIGINAL_V1, found.manifest.content)
    if found.established is not None:
        log.append(found.established)
    write_manifest(run_dir, found.history, found.manifest)
    return log


def write_manifest(run_dir: Path, history: History, there: Manifest) -> None:
    """Replace the manifest unless it says the same already."""
    if there.document != history.document():
        write_json(run_dir / MANIFEST, history.document())


def repair(run_dir: Path, *, clock: Callable[[], datetime]) -> Repair:
    """Rebuild the manifest from events and files, and say what was found.

    Lines of the log that are no events are kept in ``events.damaged-N.jsonl``. Stages that the
    events call done are held against their files.

    Raises:
        Failure: USER_CONFIG_ERROR as for :func:`look`.
        OSError: the run directory cannot be written.
    """
    at = clock()
    found = look(run_dir, digests=Digests(None), at=at)
    findings = _set_damaged_aside(run_dir, found.log)
    unknown = list(findings)
    if found.log.torn:
        findings.append(f"{event_log.NAME}: its last line was cut off and is dropped")
    before = len(found.history.unknown)
    history = found.history
    log = keep_up(run_dir, found)
    if found.established is not None:
        findings.append(f"the state was established from: {found.established['source']}")
        findings += history.unknown[before - len(found.established["unknown"]) :]
    recorded = _recorded(found.manifest) if found.log.damaged else {}
    corrections, told = _held_against_files(run_dir, history, recorded)
    findings += told
    if corrections or unknown:
        event = {
            "at": timestamp(at),
            "event": "state_established",
            "elapsed_s": 0.0,
            "source": "files",
            "stages": corrections,
            "unknown": unknown + told,
        }
        event = chained(history, event)
        apply(history, event)
        log.append(event)
    write_manifest(run_dir, history, found.manifest)
    findings += _about_manifest(found.manifest, history)
    return Repair(history=history, findings=findings)


def _about_manifest(manifest: Manifest, history: History) -> list[str]:
    if manifest.problem is not None:
        return [f"{MANIFEST}: {manifest.problem}; rebuilt"]
    if manifest.version == 1:
        return [f"{MANIFEST}: upgraded from version 1, which is kept as {ORIGINAL_V1}"]
    if manifest.document != history.document():
        return [f"{MANIFEST}: did not say what the events say; rebuilt"]
    return []


def _read_manifest(path: Path) -> Manifest:
    try:
        content = read_regular(path, LARGEST_DOCUMENT_BYTES)
    except FileNotFoundError:
        return Manifest(problem="is not there")
    except OSError as error:
        return Manifest(problem=f"cannot be read ({error.strerror})")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return Manifest(content=content, problem="is not JSON")
    if not isinstance(document, dict):
        return Manifest(content=content, problem="is not a JSON object")
    return Manifest(content=content, document=document)


def _check_is_run(run_dir: Path, log: Reading, manifest: Manifest) -> None:
    if log.sound or log.damaged or manifest.document:
        return
    if (run_dir / "stages").is_dir() or (run_dir / "config.resolved.yaml").is_file():
        return
    raise unusable(
        f"{run_dir}: no release is recorded here (no events, no manifest, no stages); name another "
        "run, or start a new one"
    )


def _set_damaged_aside(run_dir: Path, log: Reading) -> list[str]:
    """Move damaged lines out of the log; return sentences on them."""
    if not log.damaged:
        return []
    lines = b"".join(damaged.line + b"\n" for damaged in log.damaged)
    aside = _aside(run_dir, lines)
    write_bytes(aside, lines)
    write_bytes(run_dir / event_log.NAME, b"".join(line + b"\n" for line in log.sound))
    return [
        f"{event_log.NAME}: line {damaged.number} was no event ({damaged.problem}); kept in "
        f"{aside.name}"
        for damaged in log.damaged
    ]


def _aside(run_dir: Path, lines: bytes) -> Path:
    """Return the next free name, or that of a repair that was cut off after these lines."""
    number = 1
    while (path := run_dir / f"events.damaged-{number}.jsonl").exists():
        if path.is_file() and path.read_bytes() == lines:
            break
        number += 1
    return path


def _establish(run_dir: Path, manifest: Manifest, digests: Digests | None, at: datetime) -> Event:
    """Return the event that says what the manifest's word and the files together prove."""
    words, unknown = _words(manifest)
    recorded = _recorded(manifest)
    stages: dict[Stage, dict[str, Any]] = {}
    for stage in STAGES:
        there = _there(run_dir, stage, {name: each["state"] for name, each in stages.items()})
        state, said = _weighed(stage, there, words)
        unknown += said
        known = recorded.get(stage, {})
        attempts = max(there.attempts, _count(known.get("attempts")))
        stages[stage] = {"state": state, "attempts": attempts}
        if state is State.DONE:
            stages[stage]["inputs"] = _mapping(known.get("inputs"))
            stages[stage]["outputs"] = _mapping(known.get("outputs")) or (
                outputs_of(run_dir, stage, attempt_dir(run_dir, stage, attempts), digests)
                if digests
                else None
            )
        elif state is State.FAILED:
            stages[stage] |= _why_failed(run_dir, there.gate)
    without = [
        stage
        for stage, each in stages.items()
        if each["state"] is State.DONE and stage is not Stage.CLOSEOUT and not each["inputs"]
    ]
    if without:
        unknown.append(f"what these stages worked from was not recorded: {', '.join(without)}")
    identity, said = _identity(run_dir, manifest)
    event: dict[str, Any] = {
        "at": timestamp(at),
        "event": "state_established",
        "elapsed_s": 0.0,
        "source": f"manifest version {manifest.version}" if words is not None else "files",
        **identity,
        "stages": stages,
        "unknown": unknown + said,
    }
    if stages[Stage.CLOSEOUT]["state"] is State.DONE:
        report = read_object(run_dir / "report.json")
        event |= {"decision": report["decision"], "exit_code": report["exit_code"]}
    return json.loads(json.dumps(event))  # type: ignore[no-any-return]


def _why_failed(run_dir: Path, gate: str | None) -> dict[str, Any]:
    """Return what the verdict says that failed a stage; without one, that nothing says it."""
    if gate is None:
        return {"detail": "it failed; what was found does not say why"}
    verdict = read_object(run_dir / "verdicts" / f"{gate}.json")
    failure_class = verdict.get("failure_class")
    return {
        "gate": gate,
        "failure_class": failure_class if failure_class in tuple(FailureClass) else "UNKNOWN",
        "detail": f"{gate}: {verdict.get('detail')}",
    }


@dataclass(frozen=True, kw_only=True)
class There:
    """What the files say of one stage.

    ``problem`` is why it is not done, ``gate`` the one whose verdict fails it.
    """

    state: State
    attempts: int
    problem: str | None
    gate: str | None = None


def _there(run_dir: Path, stage: Stage, before: Mapping[Stage, State]) -> There:
    """Return what the files say of ``stage``; ``before`` are the states of the stages before it."""
    attempts = _attempts_on_disk(run_dir, stage)
    problem = _missing_before(stage, before) or (
        _missing_report(run_dir, before)
        if stage is Stage.CLOSEOUT
        else _missing(run_dir, stage, attempts)
    )
    if problem is not None:
        return There(state=State.PENDING, attempts=attempts, problem=problem)
    for gate in STAGE_GATES.get(stage, ()):
        if _verdict(run_dir, gate) is False:
            problem = f"gate {gate} did not pass"
            return There(state=State.FAILED, attempts=attempts, problem=problem, gate=gate)
    return There(state=State.DONE, attempts=attempts, problem=None)


def _missing_before(stage: Stage, before: Mapping[Stage, State]) -> str | None:
    """Say which earlier stage keeps this one from being done.

    The baseline needs no candidate, and closeout follows a failure as well.
    """
    if stage is Stage.CLOSEOUT and State.FAILED in before.values():
        return None
    needed = [Stage.SETUP] if stage is Stage.BASELINE_EVAL else list(before)
    for earlier in needed:
        if before[earlier] is not State.DONE:
            return f"{earlier} is not done"
    return None


def _missing(run_dir: Path, stage: Stage, attempts: int) -> str | None:
    """Say what a stage that is done would have left and that is not there."""
    for gate in STAGE_GATES.get(stage, ()):
        if _verdict(run_dir, gate) is None and not (
            gate in GATES_OF_SOME_SUITES and not (run_dir / "verdicts" / f"{gate}.json").exists()
        ):
            return f"verdicts/{gate}.json cannot be read"
    if stage is Stage.PTQ and not any(candidate_dir(run_dir).glob("*")):
        return "checkpoint/ is not there"
    result = attempt_dir(run_dir, stage, attempts) / "result.json"
    if read_object(result).get("status") != "ok":
        return f"{result.relative_to(run_dir)} cannot be read, or is not ok"
    return None


def _missing_report(run_dir: Path, before: Mapping[Stage, State]) -> str | None:
    """Say why there is no report to go by; it is not believed against a gate that said no."""
    report = read_object(run_dir / "report.json")
    decision = report.get("decision", "")
    if decision not in (None, *Decision) or not _is_count(report.get("exit_code")):
        return "report.json cannot be read"
    if decision == Decision.ACCEPT and State.FAILED in before.values():
        return "report.json says ACCEPT, and a gate did not pass"
    return None


def attempt_dir(run_dir: Path, stage: Stage, attempt: int) -> Path:
    """Return the directory of one attempt: ``stages/<stage>``, a retry's ``attempt-N`` below it."""
    directory = run_dir / "stages" / stage
    return directory / f"attempt-{attempt}" if attempt > 1 else directory


def _attempts_on_disk(run_dir: Path, stage: Stage) -> int:
    directory = run_dir / "stages" / stage
    if not directory.is_dir():
        return 0
    numbers = [path.name.removeprefix("attempt-") for path in directory.glob("attempt-*")]
    return max([1, *(int(number) for number in numbers if number.isdecimal() and len(number) < 5)])


def _verdict(run_dir: Path, gate: str) -> bool | None:
    """Return whether a verdict on disk passes; None where it cannot be read."""
    passed = read_object(run_dir / "verdicts" / f"{gate}.json").get("pass")
    return passed if isinstance(passed, bool) else None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; what cannot be read says nothing."""
    try:
        document = json.loads(read_regular(path, LARGEST_DOCUMENT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _words(manifest: Manifest) -> tuple[dict[Stage, str] | None, list[str]]:
    """Return what the manifest says of every stage, None without one; and what it does not say."""
    stages = manifest.document.get("stages")
    if not isinstance(stages, dict):
        return None, []
    words, unknown = {}, []
    for stage in STAGES:
        word = stages.get(stage)
        word = word.get("state") if isinstance(word, dict) else word
        if word not in tuple(State):
            unknown.append(f"{stage}: {MANIFEST} does not say its state")
            word = State.PENDING
        words[stage] = str(word)
    return words, unknown


def _recorded(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return the records of a manifest that has them, by stage."""
    stages = _mapping(manifest.document.get("stages")) or {}
    return {stage: record for stage, record in stages.items() if isinstance(record, dict)}


def _weighed(
    stage: Stage, there: There, words: Mapping[Stage, str] | None
) -> tuple[State, list[str]]:
    """Return a stage's state from its files and the manifest's word, and what is to be told.

    The word only takes away: a stage that was not done then is not done now.
    """
    if words is None:
        return there.state, []
    match words[stage]:
        case State.DONE if there.state is State.DONE:
            return State.DONE, []
        case State.DONE:
            return State.PENDING, [f"{stage}: recorded as done, but {there.problem}; it runs again"]
        case State.FAILED:
            return State.FAILED, []
        case _:
            return State.PENDING, []


def _identity(run_dir: Path, manifest: Manifest) -> tuple[dict[str, Any], list[str]]:
    """Return run id, model, recipe and beginning, and what of them is not known."""
    unknown = []
    config = _config(run_dir)
    identity: dict[str, Any] = {"run_id": run_dir.name}
    if isinstance(run_id := manifest.document.get("run_id"), str) and run_id:
        identity["run_id"] = run_id
    for name in ("model", "recipe"):
        value = manifest.document.get(name, config.get(name))
        identity[name] = value if isinstance(value, str) else ""
        if not identity[name]:
            unknown.append(f"which {name} was released is not recorded")
    began = manifest.document.get("started_at")
    if moment_of(began) is None:
        began = timestamp(_oldest(run_dir))
        unknown.append("when the release began was not recorded: the oldest file's time is taken")
    return {**identity, "started_at": began}, unknown


def _config(run_dir: Path) -> dict[str, Any]:
    """Return the settings of the resolved configuration; none where it cannot be read."""
    try:
        content = read_regular(run_dir / "config.resolved.yaml", LARGEST_DOCUMENT_BYTES)
        document = yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    settings = _mapping(document) or {}
    return {name: (_mapping(setting) or {}).get("value") for name, setting in settings.items()}


def _oldest(run_dir: Path) -> datetime:
    files = [run_dir / "config.resolved.yaml", *(run_dir / "stages").glob("*/request.json")]
    times = [path.stat().st_mtime for path in [run_dir, *files] if path.exists()]
    return datetime.fromtimestamp(min(times), UTC)


def _held_against_files(
    run_dir: Path, history: History, recorded: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[Stage, dict[str, Any]], list[str]]:
    """Return what the files correct in the events: stages not done, attempts not recorded.

    ``recorded`` is what the manifest says, where lines of the log were lost: a stage whose end was
    in one of them is done if the files say so too.
    """
    corrections: dict[Stage, dict[str, Any]] = {}
    told = []
    states: dict[Stage, State] = {}
    for stage, record in history.stages.items():
        there = _there(run_dir, stage, states)
        known = recorded.get(stage, {})
        state, kept = record.state, record.document()
        if state is State.DONE and there.state is not State.DONE:
            state, kept = State.PENDING, {}
            told.append(f"{stage}: recorded as done, but {there.problem}; it runs again")
        elif state is State.RUNNING and there.state is State.DONE and _says_done(known, there):
            state, kept = State.DONE, {name: known[name] for name in ("inputs", "outputs")}
            told.append(f"{stage}: its end is not among the events; manifest and files say done")
        if there.attempts > record.attempts:
            told.append(
                f"{stage}: attempt {there.attempts} has a directory, but only {record.attempts} "
                "were recorded"
            )
        states[stage] = state
        if state is not record.state or there.attempts > record.attempts:
            attempts = max(there.attempts, record.attempts)
            corrections[stage] = {**kept, "state": state, "attempts": attempts}
    return corrections, told


def _says_done(known: Mapping[str, Any], there: There) -> bool:
    return (
        known.get("state") == State.DONE
        and known.get("attempts") == there.attempts
        and isinstance(known.get("inputs"), dict)
        and isinstance(known.get("outputs"), dict)
    )


def _mapping(value: object) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST_ATTEMPTS


def _count(value: object) -> int:
    return value if isinstance(value, int) and _is_count(value) else 0
