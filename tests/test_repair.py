"""What is left of a run after damage: rebuilt from events, else from files; upgrades included."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from conductor import repair as module
from conductor.chain import STAGES, Stage, State, next_stage
from conductor.digests import verify
from conductor.documents import validate
from conductor.event_log import parse
from conductor.failure import Failure
from conductor.journal import Journal, read_history
from conductor.repair import Repair, repair
from conductor.stage_files import STAGE_GATES

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ALL_DONE = dict.fromkeys(STAGES, State.DONE)


def clock() -> datetime:
    return NOW


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))


def make_files(run_dir: Path) -> Path:
    """Leave what a release leaves that went through, without manifest and events."""
    for stage in STAGES[:-1]:
        write(run_dir / "stages" / stage / "result.json", {"status": "ok"})
        write(run_dir / "stages" / stage / "stdout.log", "words")
        for gate in STAGE_GATES.get(stage, ()):
            document = {"gate": gate, "pass": True, "failure_class": None, "detail": "fine"}
            write(run_dir / "verdicts" / f"{gate}.json", document)
    write(run_dir / "stages/baseline_eval/results/source/samples.jsonl", "{}\n")
    write(run_dir / "checkpoint/model.safetensors", "weights")
    write(run_dir / "report.json", {"decision": "ACCEPT", "exit_code": 0})
    write(run_dir / "config.resolved.yaml", "model: {value: demo}\nrecipe: {value: int8}\n")
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_files(tmp_path / "a-run")


def first_version(run_dir: Path, **words: str) -> bytes:
    """Write a manifest of version 1 and return its bytes."""
    stages = dict.fromkeys(map(str, STAGES), "done") | words
    document = {"version": 1, "run_id": "old", "model": "m", "recipe": "r", "stages": stages}
    write(run_dir / "manifest.json", document)
    return (run_dir / "manifest.json").read_bytes()


def contents(run_dir: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file()
    }


def repaired(run_dir: Path) -> Repair:
    """Repair, and hold the result against what must always hold."""
    found = repair(run_dir, clock=clock)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    validate(manifest, schema="manifest", where="manifest.json")
    after = contents(run_dir)
    again = repair(run_dir, clock=lambda: NOW.replace(year=2030))
    assert again.findings == []
    assert contents(run_dir) == after, "a second repair changes nothing"
    assert Journal.open(run_dir, clock=clock).history == found.history == again.history
    assert contents(run_dir) == after
    return found


def test_files_alone_prove_a_release_that_went_through(run_dir: Path) -> None:
    found = repaired(run_dir)
    history = found.history
    assert history.states == ALL_DONE
    assert (history.run_id, history.model, history.recipe) == ("a-run", "demo", "int8")
    assert history.outcome == {"decision": "ACCEPT", "exit_code": 0}
    ptq = history.stages[Stage.PTQ]
    assert ptq.attempts == 1
    assert ptq.outputs is not None
    assert {"checkpoint/model.safetensors", "stages/ptq/result.json"} <= ptq.outputs.keys()
    assert verify(run_dir, ptq.outputs) == []
    assert "manifest.json: is not there; rebuilt" in found.findings
    assert any("what these stages worked from was not recorded" in each for each in found.findings)
    assert any("when the release began was not recorded" in each for each in history.unknown)


def test_reading_establishes_the_same_and_writes_nothing(run_dir: Path) -> None:
    before = contents(run_dir)
    seen = read_history(run_dir)
    assert contents(run_dir) == before
    assert seen.states == ALL_DONE
    assert seen.stages[Stage.PTQ].outputs is None, "a look at a run reads no weights"


LOSSES: list[tuple[str, str | None, Stage, str]] = [
    ("verdicts/ptq.json", None, Stage.PTQ, "verdicts/ptq.json cannot be read"),
    ("verdicts/ptq.json", "{", Stage.PTQ, "verdicts/ptq.json cannot be read"),
    ("verdicts/ptq.json", '{"pass": "yes"}', Stage.PTQ, "verdicts/ptq.json cannot be read"),
    ("verdicts/external.json", "", Stage.BASELINE_EVAL, "verdicts/external.json cannot be read"),
    ("verdicts/canary.json", None, Stage.DEPLOY, "verdicts/canary.json cannot be read"),
    ("verdicts/conditions.json", None, Stage.COMPARE, "verdicts/conditions.json cannot be read"),
    ("stages/setup/result.json", None, Stage.SETUP, "stages/setup/result.json cannot be read"),
    ("stages/ptq/result.json", '{"status": "failed"}', Stage.PTQ, "or is not ok"),
    ("stages/ptq/result.json", "[]", Stage.PTQ, "or is not ok"),
    ("stages/ptq/result.json", "[" * 10**5, Stage.PTQ, "or is not ok"),
    ("checkpoint/model.safetensors", None, Stage.PTQ, "checkpoint/ is not there"),
    ("report.json", '{"decision": 5, "exit_code": 0}', Stage.CLOSEOUT, "report.json cannot be"),
    ("report.json", None, Stage.CLOSEOUT, "report.json cannot be read"),
    ("report.json", '{"exit_code": 0}', Stage.CLOSEOUT, "report.json cannot be read"),
    ("report.json", '{"decision": "MAYBE", "exit_code": 0}', Stage.CLOSEOUT, "cannot be read"),
]


@pytest.mark.parametrize(
    ("name", "content", "stage", "words"),
    [pytest.param(*loss, id=f"{loss[0]}-{(loss[1] or 'gone')[:12]}") for loss in LOSSES],
)
@pytest.mark.parametrize("has_word", [True, False], ids=["version-1", "no-manifest"])
def test_a_stage_whose_files_do_not_carry_it_is_not_done(
    run_dir: Path, name: str, content: str | None, stage: Stage, words: str, has_word: bool
) -> None:
    if has_word:
        first_version(run_dir)
    (run_dir / name).unlink()
    if content is not None:
        write(run_dir / name, content)
    found = repaired(run_dir)
    states = found.history.states
    assert states[stage] is State.PENDING
    for later in STAGES[STAGES.index(stage) :]:
        if later is not Stage.BASELINE_EVAL or stage in {Stage.SETUP, Stage.BASELINE_EVAL}:
            assert states[later] is State.PENDING
    assert next_stage(states) is stage
    if has_word:
        (told,) = [each for each in found.findings if each.startswith(f"{stage}: recorded as done")]
        assert words in told
    assert found.history.stages[stage].attempts == (stage is not Stage.CLOSEOUT)


def test_the_baseline_needs_no_candidate(run_dir: Path) -> None:
    (run_dir / "verdicts/ptq.json").unlink()
    states = repaired(run_dir).history.states
    assert states[Stage.BASELINE_EVAL] is State.DONE
    assert states[Stage.CANDIDATE_EVAL] is State.PENDING


@pytest.mark.parametrize("gate", ["external", "verbosity"])
def test_gates_that_not_every_suite_has_are_not_missed(run_dir: Path, gate: str) -> None:
    (run_dir / "verdicts" / f"{gate}.json").unlink()
    assert repaired(run_dir).history.states == ALL_DONE


def test_a_verdict_that_does_not_pass_fails_its_stage(run_dir: Path) -> None:
    verdict = {"pass": False, "failure_class": "SIZE_NOT_REDUCED", "detail": "too large"}
    write(run_dir / "verdicts/ptq.json", verdict)
    write(run_dir / "report.json", {"decision": "INFEASIBLE", "exit_code": 4})
    found = repaired(run_dir).history
    ptq = found.stages[Stage.PTQ]
    assert (ptq.state, ptq.gate, ptq.failure_class) == (State.FAILED, "ptq", "SIZE_NOT_REDUCED")
    assert ptq.detail == "ptq: too large"
    assert found.states[Stage.DEPLOY] is State.PENDING
    assert found.states[Stage.CLOSEOUT] is State.DONE, "a report follows a failure"


def test_only_the_latest_attempt_counts(run_dir: Path) -> None:
    latest = run_dir / "stages/ptq/attempt-10"
    write(run_dir / "stages/ptq/attempt-9/result.json", {"status": "ok"})
    write(latest / "request.json", {})
    write(run_dir / "stages/ptq/attempt-x/result.json", {"status": "ok"})
    found = repaired(run_dir).history
    assert found.stages[Stage.PTQ].state is State.PENDING
    assert found.stages[Stage.PTQ].attempts == 10
    shutil.rmtree(run_dir)
    make_files(run_dir)
    write(latest / "result.json", {"status": "ok"})
    found = repaired(run_dir).history
    assert found.stages[Stage.PTQ].state is State.DONE
    assert "stages/ptq/attempt-10/result.json" in (found.stages[Stage.PTQ].outputs or {})
    assert "stages/ptq/result.json" not in (found.stages[Stage.PTQ].outputs or {})


def test_a_run_of_version_1_is_upgraded_and_its_manifest_kept(run_dir: Path) -> None:
    original = first_version(run_dir)
    history = Journal.open(run_dir, clock=clock).history
    assert history.states == ALL_DONE
    assert (history.run_id, history.model, history.recipe) == ("old", "m", "r")
    assert history.stages[Stage.SETUP].inputs is None
    assert any("what these stages worked from was not" in each for each in history.unknown)
    assert (run_dir / "manifest.v1.json").read_bytes() == original
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["version"] == 2
    validate(manifest, schema="manifest", where="manifest.json")
    after = contents(run_dir)
    assert Journal.open(run_dir, clock=clock).history == history
    assert contents(run_dir) == after


def test_a_kept_original_is_never_replaced(run_dir: Path) -> None:
    original = first_version(run_dir)
    Journal.open(run_dir, clock=clock)
    first_version(run_dir, ptq="failed")  # an older day0 wrote again
    assert Journal.open(run_dir, clock=clock).states == ALL_DONE
    assert (run_dir / "manifest.v1.json").read_bytes() == original


def test_an_upgraded_release_goes_on(run_dir: Path) -> None:
    first_version(run_dir, compare="pending", closeout="pending")
    journal = Journal.open(run_dir, clock=clock)
    journal.resume()
    assert next_stage(journal.states) is Stage.COMPARE
    journal.start(Stage.COMPARE)
    assert journal.attempt_dir(Stage.COMPARE).name == "attempt-2", "files of unknown origin stay"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param({"ptq": "pending"}, {"ptq": State.PENDING}, id="pending-stays-pending"),
        pytest.param({"ptq": "failed"}, {"ptq": State.FAILED}, id="failed-stays-failed"),
        pytest.param({"ptq": "running"}, {"ptq": State.PENDING}, id="no-word-of-version-1"),
        pytest.param({"ptq": "finished"}, {"ptq": State.PENDING}, id="no-word-at-all"),
        pytest.param({"closeout": "pending"}, {"closeout": State.PENDING}, id="not-closed"),
    ],
)
def test_the_word_of_version_1_only_takes_away(
    run_dir: Path, words: dict[str, str], expected: dict[str, State]
) -> None:
    first_version(run_dir, **words)
    states = repaired(run_dir).history.states
    for stage, state in expected.items():
        assert states[Stage(stage)] is state
    assert states[Stage.SETUP] is State.DONE


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"stages": {}}, id="no-stages"),
        pytest.param({"stages": ["setup"]}, id="stages-as-list"),
        pytest.param({"stages": {"setup": ["done"], "ptq": 1}}, id="odd-words"),
        pytest.param({"stages": {"dance": "done"}}, id="unknown-stage"),
        pytest.param({"run_id": "", "model": 5, "recipe": None}, id="no-identity"),
    ],
)
def test_odd_manifests_of_version_1(run_dir: Path, changed: dict[str, Any]) -> None:
    document = json.loads(first_version(run_dir)) | changed
    write(run_dir / "manifest.json", document)
    found = repaired(run_dir)
    assert found.history.run_id
    assert json.loads((run_dir / "manifest.v1.json").read_text()) == document


def test_version_1_without_any_file_starts_again(tmp_path: Path) -> None:
    first_version(tmp_path)
    found = repaired(tmp_path)
    assert set(found.history.states.values()) == {State.PENDING}
    assert sum("recorded as done" in each for each in found.findings) == len(STAGES)


def test_an_upgrade_that_is_cut_off_is_finished_by_the_next(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = first_version(run_dir)

    class Killed(BaseException): ...

    for name in ("write_bytes", "write_json"):

        def die(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, die)
            Journal.open(run_dir, clock=clock)
        assert (run_dir / "manifest.json").read_bytes() == original
    journal = Journal.open(run_dir, clock=clock)
    assert journal.states == ALL_DONE
    assert (run_dir / "manifest.v1.json").read_bytes() == original
    lines = (run_dir / "events.jsonl").read_bytes().splitlines()
    assert [parse(line)["event"] for line in lines] == ["state_established"]


def work(run_dir: Path) -> Journal:
    """Let a journal go through a release whose files are there already."""
    files = contents(run_dir)
    shutil.rmtree(run_dir)
    journal = Journal.create(run_dir, clock=clock, model="demo", recipe="int8")
    for name, content in files.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_bytes(content)
    for stage in STAGES:
        journal.start(stage, inputs={"config.seed": 1})
        journal.finish(stage, State.DONE, outputs={"f": {"sha256": "0" * 64, "bytes": 1}})
    journal.close(decision="ACCEPT", exit_code=0)
    return journal


def test_a_healthy_run_has_nothing_to_repair(run_dir: Path) -> None:
    journal = work(run_dir)
    before = contents(run_dir)
    found = repair(run_dir, clock=clock)
    assert found.findings == []
    assert found.history == journal.history
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda path: path.unlink(), "is not there", id="missing"),
        pytest.param(lambda path: path.write_text("{"), "is not JSON", id="truncated"),
        pytest.param(lambda path: path.write_text("7"), "is not a JSON object", id="number"),
        pytest.param(
            lambda path: path.write_text(path.read_text().replace("done", "failed")),
            "did not say what the events say",
            id="edited",
        ),
    ],
)
def test_the_manifest_is_rebuilt_from_events(
    run_dir: Path, damage: Callable[[Path], None], words: str
) -> None:
    journal = work(run_dir)
    right = (run_dir / "manifest.json").read_bytes()
    damage(run_dir / "manifest.json")
    found = repaired(run_dir)
    assert found.findings == [f"manifest.json: {words}; rebuilt"]
    assert found.history == journal.history
    assert (run_dir / "manifest.json").read_bytes() == right


def test_lost_events_are_made_up_for_by_manifest_and_files(run_dir: Path) -> None:
    journal = work(run_dir)
    (run_dir / "events.jsonl").unlink()
    found = repaired(run_dir).history
    assert found.states == ALL_DONE
    assert found.stages[Stage.PTQ].inputs == {"config.seed": 1}
    assert found.stages[Stage.PTQ].outputs == journal.stages[Stage.PTQ].outputs
    assert found.started_at == journal.started_at


def damage_line(run_dir: Path, number: int, line: bytes) -> None:
    path = run_dir / "events.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[number] = line
    path.write_bytes(b"\n".join(lines))


def test_damaged_lines_are_kept_aside(run_dir: Path) -> None:
    work(run_dir)
    damage_line(run_dir, 4, b"\x00garbage")
    found = repaired(run_dir)
    assert any("line 5 was no event (not JSON); kept in" in each for each in found.findings)
    assert (run_dir / "events.damaged-1.jsonl").read_bytes() == b"\x00garbage\n"
    assert found.history.states == ALL_DONE
    assert "line 5 was no event" in found.history.unknown[0]
    damage_line(run_dir, 3, b"other")
    repaired(run_dir)
    assert (run_dir / "events.damaged-1.jsonl").read_bytes() == b"\x00garbage\n"
    assert (run_dir / "events.damaged-2.jsonl").read_bytes() == b"other\n"


@pytest.mark.parametrize(
    ("lose", "expected"),
    [
        pytest.param([], State.DONE, id="manifest-and-files-say-done"),
        pytest.param(["manifest.json"], State.RUNNING, id="no-manifest"),
        pytest.param(["verdicts/ptq.json"], State.RUNNING, id="no-verdict"),
        pytest.param(["stages/ptq/result.json"], State.RUNNING, id="no-result"),
    ],
)
def test_a_lost_end_of_a_stage(run_dir: Path, lose: list[str], expected: State) -> None:
    journal = work(run_dir)
    for name in lose:
        (run_dir / name).unlink()
    path = run_dir / "events.jsonl"
    path.write_bytes(b"\n".join([*path.read_bytes().splitlines()[:4], b"lost"]) + b"\n")
    history = repaired(run_dir).history
    ptq = history.stages[Stage.PTQ]
    assert (ptq.state, ptq.attempts) == (expected, 1)
    if expected is State.DONE:
        assert ptq.outputs == journal.stages[Stage.PTQ].outputs
    assert history.states[Stage.DEPLOY] is State.PENDING


def test_a_lost_beginning_is_made_up_for(run_dir: Path) -> None:
    work(run_dir)
    damage_line(run_dir, 0, b"lost")
    found = repaired(run_dir).history
    assert (found.run_id, found.model, found.recipe) == ("a-run", "demo", "int8")
    assert found.states == ALL_DONE


@pytest.mark.parametrize(
    "content",
    [pytest.param(b"", id="empty"), pytest.param(bytes(range(256)) * 50 + b"\n", id="binary")],
)
def test_a_log_without_an_event_falls_back_to_files(run_dir: Path, content: bytes) -> None:
    work(run_dir)
    (run_dir / "events.jsonl").write_bytes(content)
    assert repaired(run_dir).history.states == ALL_DONE


def test_a_repair_that_is_cut_off_keeps_lines_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(run_dir)
    damage_line(run_dir, 2, b"garbage")

    class Killed(BaseException): ...

    real = module.write_bytes

    def die_at_the_log(path: Path, content: bytes) -> None:
        if path.name == "events.jsonl":
            raise Killed
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "write_bytes", die_at_the_log)
        repair(run_dir, clock=clock)
    repaired(run_dir)
    assert [path.name for path in run_dir.glob("events.damaged-*")] == ["events.damaged-1.jsonl"]


def test_stages_that_events_call_done_are_held_against_their_files(run_dir: Path) -> None:
    work(run_dir)
    (run_dir / "verdicts/canary.json").unlink()
    found = repaired(run_dir)
    assert (
        "deploy: recorded as done, but verdicts/canary.json cannot be read; it runs again"
        in found.findings
    )
    states = found.history.states
    assert states[Stage.PTQ] is State.DONE
    assert states[Stage.BASELINE_EVAL] is State.DONE
    for stage in (Stage.DEPLOY, Stage.CANDIDATE_EVAL, Stage.COMPARE, Stage.CLOSEOUT):
        assert states[stage] is State.PENDING


def test_attempts_that_only_the_disk_knows_are_counted(run_dir: Path) -> None:
    work(run_dir)
    write(run_dir / "stages/ptq/attempt-3/request.json", {})
    found = repaired(run_dir)
    assert "ptq: attempt 3 has a directory, but only 1 were recorded" in found.findings
    assert found.history.stages[Stage.PTQ].attempts == 3
    assert found.history.states[Stage.PTQ] is State.PENDING


def test_a_torn_line_is_told(run_dir: Path) -> None:
    work(run_dir)
    with (run_dir / "events.jsonl").open("ab") as stream:
        stream.write(b'{"at": ')
    found = repaired(run_dir)
    assert found.findings == ["events.jsonl: its last line was cut off and is dropped"]


def test_a_newer_version_is_left_alone(run_dir: Path) -> None:
    write(run_dir / "manifest.json", {"version": 3})
    before = contents(run_dir)
    with pytest.raises(Failure, match="version 3 is newer than version 2"):
        repair(run_dir, clock=clock)
    assert contents(run_dir) == before


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Failure, match="no release is recorded here"):
        repair(tmp_path, clock=clock)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_report_is_not_believed_against_a_gate_that_said_no(run_dir: Path) -> None:
    verdict = run_dir / "verdicts" / "compare.json"
    verdict.write_text(json.dumps({**json.loads(verdict.read_text()), "pass": False}))
    history = repaired(run_dir).history
    assert history.states[Stage.COMPARE] is State.FAILED
    assert history.states[Stage.CLOSEOUT] is State.PENDING
    assert history.outcome == {}
