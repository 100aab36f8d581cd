"""Verification: a byte changed anywhere is named, and a forgery with its digests in order too."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import run_day0
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conductor.digests import file_digest, tree_digests
from conductor.event_log import parse
from conductor.evidence.seal import RUN_MANIFEST, SEALED, is_unsealed, seal_document
from conductor.evidence.verify import Findings, verify
from conductor.failure import Failure
from conductor.files import write_json
from conductor.history import History, apply, chained, render
from conductor.journal import Journal
from conductor.report import report_digest
from gates import FailureClass

Edit = Callable[[Path], None]


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def problems(run_dir: Path) -> dict[str, str]:
    """Return what is wrong, by file."""
    found: dict[str, str] = {}
    for problem in verify(run_dir).problems:
        found[problem.file] = f"{found.get(problem.file, '')}{problem.problem}; "
    return found


def files_of(run_dir: Path) -> list[str]:
    return [
        path.relative_to(run_dir).as_posix()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file()
    ]


def flip(path: Path, offset: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset % len(content)] ^= bits
    path.write_bytes(bytes(content))


def test_a_finished_run_holds(finished_run: Path) -> None:
    before = {name: file_digest(finished_run / name) for name in files_of(finished_run)}
    findings = verify(finished_run)
    assert findings.problems == ()
    assert findings.not_checked == ()
    assert "the decision ACCEPT, which follows from the verdicts" in findings.checked
    assert {name: file_digest(finished_run / name) for name in files_of(finished_run)} == before


def test_a_run_that_was_not_accepted_holds_as_well(tmp_path: Path) -> None:
    words = ("release", "demo", "--recipe", "int8", "--dry-run", "--threshold", "0.0005")
    assert run_day0(*words, "--workspace", str(tmp_path)).exit_code == 3
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert problems(run_dir) == {}
    verdict = json.loads((run_dir / "verdicts" / "compare.json").read_text())
    assert not verdict["pass"]


def test_a_stage_that_failed_without_a_verdict_cannot_be_hushed_up(tmp_path: Path) -> None:
    words = ("release", "demo", "--recipe", "int8", "--dry-run", "--limit", "3")
    assert run_day0(*words, "--workspace", str(tmp_path)).exit_code == 2
    (run_dir,) = (tmp_path / "runs").iterdir()
    findings = verify(run_dir)
    assert findings.problems == ()
    assert "the decision that there is none, which follows from the verdicts" in findings.checked
    edited(DECISION, lambda it: it["failures"].clear())(run_dir)
    forge(run_dir)
    assert "leaves out that baseline_eval failed" in problems(run_dir)[DECISION]


def test_a_byte_changed_in_every_sealed_file_names_every_file(run_dir: Path) -> None:
    names = [name for name in files_of(run_dir) if not is_unsealed(name)]
    assert len(names) > 70
    for number, name in enumerate(names):
        flip(run_dir / name, random.Random(number).randrange(2**31))
    assert set(names) <= problems(run_dir).keys()


@given(chance=st.randoms(use_true_random=False))
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_byte_changed_in_one_file_names_it(run_dir: Path, chance: random.Random) -> None:
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in files_of(run_dir):
        kinds.setdefault((name.partition("/")[0], Path(name).suffix), []).append(name)
    name = chance.choice(kinds[chance.choice(sorted(kinds))])
    path = run_dir / name
    if not path.stat().st_size:
        return
    before = path.read_bytes()
    flip(path, chance.randrange(len(before)), 1 << chance.randrange(8))
    found = problems(run_dir)
    path.write_bytes(before)
    assert name in found, found


def test_a_byte_changed_in_any_event_is_found(run_dir: Path) -> None:
    path = run_dir / "events.jsonl"
    before = path.read_bytes()
    ends = [offset for offset, byte in enumerate(before) if byte == ord("\n")]
    chance = random.Random(0)
    for start, end in zip([0, *ends], ends, strict=False):
        flip(path, chance.randint(start, end), 1 << chance.randrange(8))
        assert "events.jsonl" in problems(run_dir)
        path.write_bytes(before)


LINES: list[tuple[str, Callable[[list[bytes]], list[bytes]]]] = [
    ("dropped", lambda lines: [*lines[:3], *lines[4:]]),
    ("first-dropped", lambda lines: lines[1:]),
    ("last-dropped", lambda lines: lines[:-1]),
    ("doubled", lambda lines: [*lines[:3], lines[2], *lines[3:]]),
    ("swapped", lambda lines: [lines[0], lines[2], lines[1], *lines[3:]]),
    ("blank", lambda lines: [*lines[:3], b"", *lines[3:]]),
    ("appended", lambda lines: [*lines, b'{"at": "x", "event": "more"}']),
    ("carriage-returns", lambda lines: [line + b"\r" for line in lines]),
    ("emptied", lambda lines: []),
    ("a-space-in-the-last", lambda lines: [*lines[:-1], lines[-1].replace(b": ", b":  ", 1)]),
    ("a-key-twice-in-the-last", lambda lines: [*lines[:-1], b'{"at": "x", ' + lines[-1][1:]]),
]


@pytest.mark.parametrize("change", [pytest.param(each, id=name) for name, each in LINES])
def test_a_log_that_was_edited_is_found(
    run_dir: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    path = run_dir / "events.jsonl"
    lines = change(path.read_bytes().splitlines())
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    found = problems(run_dir)
    assert {"events.jsonl", "manifest.json"} & found.keys()


@pytest.mark.parametrize(
    ("edit", "named", "words"),
    [
        pytest.param(
            lambda run: (run / "events.jsonl").unlink(), "events.jsonl", "is missing", id="no-log"
        ),
        pytest.param(
            lambda run: (run / "manifest.json").unlink(),
            "manifest.json",
            "is missing",
            id="no-manifest",
        ),
        pytest.param(
            lambda run: (run / RUN_MANIFEST).unlink(), RUN_MANIFEST, "is missing", id="no-seal"
        ),
        pytest.param(
            lambda run: (run / "report.json").unlink(), "report.json", "is missing", id="no-report"
        ),
        pytest.param(
            lambda run: (run / "stages/ptq/result.json").unlink(),
            "stages/ptq/result.json",
            "is missing",
            id="no-stage-file",
        ),
        pytest.param(
            lambda run: (run / "checkpoint/model.safetensors").unlink(),
            "checkpoint/model.safetensors",
            "is missing",
            id="no-weights",
        ),
        pytest.param(
            lambda run: (run / "stages/more.txt").write_text("x"),
            "stages/more.txt",
            "is not among the sealed files",
            id="a-file-more",
        ),
        pytest.param(
            lambda run: os.mkfifo(run / "stages/pipe"), "stages/pipe", "is no file", id="a-pipe"
        ),
        pytest.param(
            lambda run: (run / "stages/link").symlink_to("nowhere"),
            "stages/link",
            "is no file",
            id="a-link-to-nothing",
        ),
        pytest.param(
            lambda run: (run / ".x.1.tmp").write_text("x"),
            ".x.1.tmp",
            "is not among the sealed files",
            id="a-temporary-file",
        ),
        pytest.param(
            lambda run: (run / "lock").write_text("x"), "lock", "holds something", id="the-lock"
        ),
        pytest.param(
            lambda run: (
                write_json(run / "bundle.json", {"version": 1, "left_out": ["report.json"]})
                or (run / "report.json").unlink()
            ),
            "report.json",
            "is missing",
            id="left-out-what-may-not-be",
        ),
    ],
)
def test_files_that_are_missing_or_too_many(
    run_dir: Path, edit: Edit, named: str, words: str
) -> None:
    edit(run_dir)
    assert words in problems(run_dir)[named]


def forge(run_dir: Path, change: Callable[[dict[str, Any]], Any] = lambda event: None) -> None:
    """Put every digest in order after an edit, as somebody would who knows how they are made.

    ``change`` edits each event.
    """
    files = tree_digests(run_dir, is_unsealed)
    write_json(run_dir / RUN_MANIFEST, seal_document(run_dir.name, files))
    report = json.loads((run_dir / "report.json").read_text())
    history, lines = History(), []
    for line in (run_dir / "events.jsonl").read_bytes().splitlines():
        event = dict(parse(line))
        change(event)
        if event["event"] == SEALED:
            event["sha256"] = file_digest(run_dir / RUN_MANIFEST)
        if event["event"] == "release_finished":
            event |= {"report": report_digest(report), "decision": report["decision"]}
        event = chained(history, event)
        apply(history, event)
        lines.append(render(event) + b"\n")
    (run_dir / "events.jsonl").write_bytes(b"".join(lines))
    write_json(run_dir / "manifest.json", history.document())


def edited(name: str, change: Callable[[Any], Any]) -> Edit:
    def edit(run_dir: Path) -> None:
        document = json.loads((run_dir / name).read_text())
        change(document)
        write_json(run_dir / name, document)

    return edit


def without_gate(gate: str) -> Edit:
    def edit(run_dir: Path) -> None:
        for kind in ("verdicts", "evidence"):
            (run_dir / kind / f"{gate}.json").unlink()
        edited("evidence/decision.json", lambda it: it["verdicts"].remove(gate))(run_dir)

    return edit


def test_putting_digests_in_order_changes_nothing_by_itself(run_dir: Path) -> None:
    forge(run_dir)
    assert problems(run_dir) == {}


DECISION = "evidence/decision.json"


@pytest.mark.parametrize(
    ("edit", "named", "words"),
    [
        pytest.param(
            edited("verdicts/compare.json", lambda it: it.update({"detail": "fine"})),
            "verdicts/compare.json",
            "is not what its gate says of evidence/compare.json",
            id="verdict",
        ),
        pytest.param(
            edited("verdicts/external.json", lambda it: it["checks"].popitem()),
            "verdicts/external.json",
            "is not what its gate says",
            id="verdict-check",
        ),
        pytest.param(
            edited("evidence/compare.json", lambda it: it["arguments"].update(threshold=0.5)),
            "verdicts/compare.json",
            "is not what its gate says",
            id="threshold",
        ),
        pytest.param(
            edited("evidence/ptq.json", lambda it: it.update(function="evaluate_canary")),
            "evidence/ptq.json",
            "does not answer",
            id="other-gate",
        ),
        pytest.param(
            edited("evidence/ptq.json", lambda it: it.update(gate="canary")),
            "evidence/ptq.json",
            "gate: is 'canary'",
            id="gate-name",
        ),
        pytest.param(
            edited(DECISION, lambda it: it.update(required=["ptq"])),
            DECISION,
            "does not require compare",
            id="requires-less",
        ),
        pytest.param(
            edited(DECISION, lambda it: it["verdicts"].remove("compare")),
            DECISION,
            "leaves out the verdict of compare",
            id="verdict-left-out",
        ),
        pytest.param(without_gate("compare"), "report.json", "not what follows", id="gate-gone"),
        pytest.param(
            lambda run: (run / "evidence/compare.json").unlink(),
            "evidence/compare.json",
            "is missing beside verdicts/compare.json",
            id="evidence-gone",
        ),
        pytest.param(
            lambda run: (run / "verdicts/compare.json").unlink(),
            "verdicts/compare.json",
            "is missing beside evidence/compare.json",
            id="verdict-gone",
        ),
        pytest.param(
            edited(
                DECISION,
                lambda it: it["failures"].append(
                    {"stage": "deploy", "failure_class": "SYSTEMIC", "message": "m"}
                ),
            ),
            "report.json",
            "decision, failure_class, exit_code, reasons: not what follows",
            id="decision",
        ),
        pytest.param(
            edited("report.json", lambda it: it.update(decision="REGRESSION")),
            "report.json",
            "decision: not what follows",
            id="report-decision",
        ),
        pytest.param(
            edited("report.json", lambda it: it.update(run_id="other")),
            "report.json",
            "run_id: is that of another run",
            id="report-run-id",
        ),
        pytest.param(
            edited("report.json", lambda it: it["gates"][0]["document"].update(detail="x")),
            "report.json",
            "gates: what it says of ptq",
            id="report-gates",
        ),
        pytest.param(
            edited("report.json", lambda it: it["tasks"][0].update(drop=-0.5)),
            "report.json",
            "tasks: the drop of demo_addition is not",
            id="report-drop",
        ),
        pytest.param(
            edited("report.json", lambda it: it["tasks"][0].update(candidate=0.999)),
            "report.json",
            "tasks: the candidate of demo_addition is not",
            id="report-score",
        ),
        pytest.param(
            edited("report.json", lambda it: it["tasks"][0].update(baseline_stderr=0.0)),
            "report.json",
            "tasks: the baseline_stderr of demo_addition is not",
            id="report-error",
        ),
        pytest.param(
            edited("report.json", lambda it: it["tasks"][0].update(external=None)),
            "report.json",
            "tasks: the external of demo_addition is not",
            id="report-external",
        ),
        pytest.param(
            edited("report.json", lambda it: it["tasks"].pop(0)),
            "report.json",
            "tasks: demo_addition is left out",
            id="report-task-left-out",
        ),
        pytest.param(
            edited("report.json", lambda it: it.pop("tasks")),
            "report.json",
            "does not follow gates/schemas/report.json",
            id="report-shape",
        ),
        pytest.param(
            edited("env.json", lambda it: it.clear()),
            "env.json",
            "does not follow gates/schemas/environment.json",
            id="environment-shape",
        ),
        pytest.param(
            lambda run: (run / "checkpoint/more.bin").write_bytes(b"x"),
            "checkpoint/more.bin",
            "was not there when the candidate was evaluated",
            id="candidate-file-more",
        ),
        pytest.param(
            lambda run: flip(run / "checkpoint/model.safetensors", 9000),
            "checkpoint/model.safetensors",
            "is not what ptq left",
            id="candidate-weights",
        ),
        pytest.param(
            lambda run: flip(run / "stages/baseline_eval/evaluation.json", 60),
            "stages/baseline_eval/evaluation.json",
            "is not what baseline_eval left",
            id="stage-output",
        ),
    ],
)
def test_a_forgery_with_its_digests_in_order_is_found(
    run_dir: Path, edit: Edit, named: str, words: str
) -> None:
    edit(run_dir)
    forge(run_dir)
    told = [str(problem) for problem in verify(run_dir).problems]
    assert any(line.startswith(f"{named}: ") and words in line for line in told), told


@pytest.mark.parametrize("summary", [None, [], {"tasks": []}, {"tasks": {"demo_addition": 1}}])
def test_evidence_that_its_gate_cannot_read_stops_nothing(run_dir: Path, summary: object) -> None:
    change = edited(
        "evidence/candidate_run.json", lambda it: it["arguments"].update(summary=summary)
    )
    change(run_dir)
    assert "is not what its gate says" in problems(run_dir)["verdicts/candidate_run.json"]


HOSTILE = ["", "[]", "{}", "null", "[" * 50_000, '{"a": NaN}', "\0\0", '"text"', "1e999"]
DOCUMENTS = [
    *("manifest.json", "report.json", RUN_MANIFEST, "env.json", DECISION, "events.jsonl"),
    *("evidence/compare.json", "verdicts/compare.json", "config.resolved.yaml"),
]


@pytest.mark.parametrize("content", HOSTILE)
def test_documents_that_are_none_are_named_and_stop_nothing(run_dir: Path, content: str) -> None:
    for name in DOCUMENTS:
        (run_dir / name).write_text(content)
    assert set(DOCUMENTS) <= problems(run_dir).keys()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_is_none_is_named_among_sound_ones(run_dir: Path, name: str) -> None:
    (run_dir / name).write_text('{"a": NaN}')
    assert name in problems(run_dir)


def test_a_release_that_has_not_ended_was_never_sealed(run_dir: Path) -> None:
    path = run_dir / "events.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert "was never sealed" in problems(run_dir)[RUN_MANIFEST]


def test_a_release_that_went_on_is_not_what_was_sealed(run_dir: Path) -> None:
    day0 = ("resume", str(run_dir), "--from-step", "compare", "--to-step", "compare")
    run_day0(*day0)
    assert "went on after it was sealed" in problems(run_dir)["events.jsonl"]
    assert run_day0("resume", str(run_dir)).exit_code == 0
    assert problems(run_dir) == {}


def test_what_is_noted_of_a_finished_run_leaves_it_finished(run_dir: Path) -> None:
    Journal.open(run_dir, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC)).record("a_note", of="it")
    assert problems(run_dir) == {}


def test_a_run_of_an_earlier_version_says_that_it_was_never_sealed(run_dir: Path) -> None:
    (run_dir / RUN_MANIFEST).unlink()
    path = run_dir / "events.jsonl"
    events = [parse(line) for line in path.read_bytes().splitlines()]
    for event in events:
        del event["previous"]
    lines = [render(event) + b"\n" for event in events if event["event"] != SEALED]
    path.write_bytes(b"".join(lines))
    told = {str(problem) for problem in verify(run_dir).problems}
    assert any("never sealed" in line and "an earlier day0" in line for line in told)
    assert any("line 1 holds no digest of the one before it" in line for line in told)


def test_a_copy_of_the_candidate_is_held_against_the_one_evaluated(
    finished_run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(finished_run / "checkpoint", tmp_path / "copy"))
    findings = verify(finished_run, copy)
    assert findings.problems == ()
    assert f"{copy}, which holds the candidate that was evaluated" in findings.checked
    flip(copy / "model.safetensors", 5000)
    (copy / "README.md").write_text("x")
    (copy / "config.json").unlink()
    told = {Path(problem.file).name for problem in verify(finished_run, copy).problems}
    assert told == {"model.safetensors", "README.md", "config.json"}


def test_a_copy_of_a_candidate_that_was_refused_is_held_against_the_seal(run_dir: Path) -> None:
    """A stage that failed recorded nothing of its files; the seal has them."""
    copy = Path(shutil.copytree(run_dir / "checkpoint", run_dir.parent / "copy"))

    def forget(event: dict[str, Any]) -> None:
        if "outputs" in event and event["stage"] == "ptq":
            event["outputs"] = {}

    forge(run_dir, forget)
    assert verify(run_dir, copy).problems == ()
    flip(copy / "model.safetensors", 5000)
    told = {problem.file for problem in verify(run_dir, copy).problems}
    assert str(copy / "model.safetensors") in told


@pytest.mark.parametrize(
    ("path", "checkpoint", "words"),
    [
        pytest.param("gone", None, "cannot be read", id="nothing-there"),
        pytest.param("empty", None, "no release is recorded", id="empty-directory"),
        pytest.param("note.txt", None, "is no bundle", id="a-text"),
        pytest.param("empty", "gone", "is no directory", id="checkpoint-gone"),
    ],
)
def test_what_cannot_be_verified_is_refused(
    tmp_path: Path, path: str, checkpoint: str | None, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(Failure, match=words) as refused:
        verify(tmp_path / path, checkpoint and tmp_path / checkpoint)
    assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR


def test_findings_as_json(run_dir: Path) -> None:
    assert Findings(problems=()).document()["holds"]
    (run_dir / "report.md").write_text("x")
    finished = run_day0("verify", str(run_dir), "--json")
    document = json.loads(finished.stdout)
    assert finished.exit_code == 1
    assert not document["holds"]
    assert [problem["file"] for problem in document["problems"]] == ["report.md"]


def test_the_command_names_what_is_wrong(run_dir: Path) -> None:
    assert run_day0("verify", str(run_dir)).exit_code == 0
    (run_dir / "report.md").write_text("x")
    finished = run_day0("verify", str(run_dir))
    assert finished.exit_code == 1
    assert "wrong: report.md: has other contents than were sealed" in finished.stdout
    assert run_day0("verify", str(run_dir / "nothing")).exit_code == 2
