"""Going on with a release: what is kept, what is done again, what is refused; in dry runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from conductor.chain import STAGES, Stage, State
from conductor.cli import app
from conductor.journal import read_history

Day0 = Callable[..., Result]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return tmp_path / "workspace"


@pytest.fixture
def day0(workspace: Path) -> Day0:
    """Run a command of day0 on the workspace, in this process."""

    def run(*arguments: str, exit_code: int = 0) -> Result:
        done = CliRunner().invoke(app, [*arguments, "--workspace", str(workspace)])
        assert done.exit_code == exit_code, done.output
        return done

    return run


@pytest.fixture
def begin(day0: Day0, workspace: Path) -> Callable[..., Path]:
    """Begin a dry run of the demo release, up to a step; return its directory."""

    def run(to_step: Stage | None = None, *arguments: str) -> Path:
        steps = ["--to-step", to_step] if to_step else []
        command = ("release", "demo", "--recipe", "int8", "--dry-run", *steps, *arguments)
        day0(*command, exit_code=130 if to_step else 0)
        (run_dir,) = (workspace / "runs").iterdir()
        return run_dir

    return run


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def started(run_dir: Path) -> Counter[str]:
    """Count the starts of each tool, by where it worked."""
    return Counter(
        event["directory"] for event in events(run_dir) if event["event"] == "tool_started"
    )


def report(run_dir: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return document


@pytest.mark.parametrize("last", STAGES[:-1])
def test_a_release_stopped_after_any_step_comes_to_the_same_end(
    begin: Callable[..., Path], day0: Day0, last: Stage
) -> None:
    run_dir = begin(last)
    done = {s for s, record in read_history(run_dir).stages.items() if record.state is State.DONE}
    assert done == set(STAGES[: STAGES.index(last) + 1])
    day0("resume")
    assert report(run_dir)["decision"] == "ACCEPT"
    assert set(started(run_dir).values()) == {1}
    assert {record.attempts for record in read_history(run_dir).stages.values()} == {1}


def test_a_finished_release_is_told_again_and_not_touched(
    begin: Callable[..., Path], day0: Day0
) -> None:
    run_dir = begin()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert json.loads(day0("resume", "--json").stdout) == report(run_dir)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_without_its_report_a_finished_release_is_closed_out_again(
    begin: Callable[..., Path], day0: Day0
) -> None:
    run_dir = begin()
    scores = report(run_dir)["tasks"]
    (run_dir / "report.json").unlink()
    day0("resume")
    assert report(run_dir)["tasks"] == scores
    assert set(started(run_dir).values()) == {1}


DAMAGES: list[Any] = [
    pytest.param("flipped", "checkpoint/model.safetensors", Stage.PTQ, id="checkpoint"),
    pytest.param("lost", "stages/ptq/checkpoint-summary.json", Stage.PTQ, id="summary"),
    pytest.param(
        "shortened", "stages/baseline_eval/run-summary.json", Stage.BASELINE_EVAL, id="run-summary"
    ),
    pytest.param("flipped", "stages/deploy/canary.json", Stage.DEPLOY, id="canary"),
    pytest.param(
        "lost", "stages/baseline_eval/evaluation.json", Stage.BASELINE_EVAL, id="evaluation"
    ),
    pytest.param("shortened", "stages/baseline_eval/result.json", Stage.BASELINE_EVAL, id="result"),
]


@pytest.mark.parametrize(("damage", "name", "stage"), DAMAGES)
def test_a_stage_whose_files_are_not_what_they_were_is_done_again_with_all_after_it(
    begin: Callable[..., Path], day0: Day0, damage: str, name: str, stage: Stage
) -> None:
    run_dir = begin(Stage.CANDIDATE_EVAL)
    path = run_dir / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-1])
    day0("resume")
    assert report(run_dir)["decision"] == "ACCEPT"
    assert name in " ".join(report(run_dir)["deviations"])
    for each, record in read_history(run_dir).stages.items():
        again = STAGES.index(stage) <= STAGES.index(each) <= STAGES.index(Stage.CANDIDATE_EVAL)
        assert record.attempts == 1 + again, each


def test_a_verdict_that_was_edited_is_judged_again(begin: Callable[..., Path], day0: Day0) -> None:
    run_dir = begin(Stage.CANDIDATE_EVAL)
    verdict = run_dir / "verdicts" / "ptq.json"
    judged = verdict.read_text()
    verdict.write_text(judged.replace('"pass": true', '"pass": false', 1))
    day0("resume")
    assert verdict.read_text() == judged
    assert report(run_dir)["decision"] == "ACCEPT"


def test_a_change_is_refused_field_by_field_and_nothing_is_touched(
    begin: Callable[..., Path], day0: Day0, tmp_path: Path
) -> None:
    run_dir = begin(Stage.CANDIDATE_EVAL)
    before = (run_dir / "events.jsonl").read_bytes()
    (tmp_path / "changed.yaml").write_text("threshold: 0.02\nseed: 1\n")
    refused = day0("resume", "--config", str(tmp_path / "changed.yaml"), exit_code=2)
    assert "config.threshold: 0.01 then, 0.02 now; repeats: compare, closeout" in refused.output
    assert "config.seed: 0 then, 1 now; repeats: setup, ptq" in refused.output
    assert "--accept-drift" in refused.output
    assert (run_dir / "events.jsonl").read_bytes() == before


def test_an_accepted_change_repeats_what_it_makes_void_and_is_in_the_report(
    begin: Callable[..., Path], day0: Day0, tmp_path: Path
) -> None:
    run_dir = begin(Stage.COMPARE)
    (tmp_path / "changed.yaml").write_text("threshold: 0.02\n")
    day0("resume", "--config", str(tmp_path / "changed.yaml"), "--accept-drift")
    document = report(run_dir)
    assert (document["decision"], document["threshold"]) == ("ACCEPT", 0.02)
    assert any("config.threshold changed" in each for each in document["deviations"])
    attempts = {stage: each.attempts for stage, each in read_history(run_dir).stages.items()}
    assert attempts == {**dict.fromkeys(STAGES, 1), Stage.SETUP: 2, Stage.COMPARE: 2}
    assert set(started(run_dir).values()) == {1}


@pytest.mark.parametrize("setting", ["retry: {limit: 3}", "watchdog: {server_s: 9}"])
def test_what_changes_no_result_may_change(
    begin: Callable[..., Path], day0: Day0, tmp_path: Path, setting: str
) -> None:
    run_dir = begin(Stage.PTQ)
    (tmp_path / "patient.yaml").write_text(setting)
    day0("resume", "--config", str(tmp_path / "patient.yaml"))
    assert report(run_dir)["decision"] == "ACCEPT"


def test_from_a_step_on_all_is_done_again(begin: Callable[..., Path], day0: Day0) -> None:
    run_dir = begin()
    day0("resume", "--from-step", "candidate_eval")
    attempts = {stage: each.attempts for stage, each in read_history(run_dir).stages.items()}
    assert attempts[Stage.BASELINE_EVAL] == 1
    assert attempts[Stage.CANDIDATE_EVAL] == attempts[Stage.COMPARE] == 2
    assert report(run_dir)["decision"] == "ACCEPT"


def test_only_one_step_is_done_again(begin: Callable[..., Path], day0: Day0) -> None:
    run_dir = begin()
    day0("resume", "--only-step", "deploy", exit_code=130)
    states = read_history(run_dir).states
    assert states[Stage.DEPLOY] is State.DONE
    assert {states[stage] for stage in STAGES[3:]} == {State.PENDING}


STEPS: list[Any] = [
    pytest.param(["--only-step", "ptq", "--to-step", "deploy"], "leave out", id="only-and-to"),
    pytest.param(["--from-step", "deploy", "--to-step", "ptq"], "comes after", id="backwards"),
    pytest.param(["--from-step", "quantize"], "is not a stage", id="unknown"),
    pytest.param(["--from-step", "candidate_eval"], "no valid outputs", id="skips-what-is-not"),
]


@pytest.mark.parametrize(("steps", "words"), STEPS)
def test_steps_that_cannot_be_are_refused(
    begin: Callable[..., Path], day0: Day0, steps: list[str], words: str
) -> None:
    run_dir = begin(Stage.PTQ)
    before = (run_dir / "events.jsonl").read_bytes()
    assert words in day0("resume", *steps, exit_code=2).output
    assert (run_dir / "events.jsonl").read_bytes() == before


def test_a_new_release_cannot_skip_steps(day0: Day0, workspace: Path) -> None:
    command = ("release", "demo", "--recipe", "int8", "--dry-run", "--from-step", "deploy")
    assert "--resume" in day0(*command, exit_code=2).output
    assert not workspace.exists()


def test_a_clock_that_jumps_changes_no_decision_and_no_duration(
    begin: Callable[..., Path], day0: Day0
) -> None:
    run_dir = begin(Stage.DEPLOY)
    log = run_dir / "events.jsonl"
    jumped = [{**event, "at": "2199-01-01T00:00:00.000Z"} for event in events(run_dir)]
    log.write_text("".join(json.dumps(event) + "\n" for event in jumped))
    day0("resume")
    document = report(run_dir)
    assert document["decision"] == "ACCEPT"
    assert 0 < document["seconds"] < 600
    assert all(0 <= stage["seconds"] < 600 for stage in document["stages"])


def edit_events(
    run_dir: Path, edit: Callable[[dict[str, Any]], dict[str, Any] | None], *more: dict[str, Any]
) -> None:
    """Pass every event through ``edit``, drop those that it makes nothing of, add ``more``."""
    edited = [new for event in events(run_dir) if (new := edit(event)) is not None]
    text = "".join(json.dumps(event) + "\n" for event in [*edited, *more])
    (run_dir / "events.jsonl").write_text(text)


@pytest.mark.parametrize("lost", ["stage_finished", None], ids=["its-end", "everything"])
def test_what_was_done_after_a_stage_whose_events_are_lost_is_done_again(
    begin: Callable[..., Path], day0: Day0, lost: str | None
) -> None:
    run_dir = begin(Stage.CANDIDATE_EVAL)

    def forget(event: dict[str, Any]) -> dict[str, Any] | None:
        is_lost = event.get("stage") == Stage.PTQ and lost in (None, event["event"])
        return None if is_lost else event

    edit_events(run_dir, forget)
    day0("resume")
    assert report(run_dir)["decision"] == "ACCEPT"
    attempts = {stage: each.attempts for stage, each in read_history(run_dir).stages.items()}
    assert attempts[Stage.PTQ] == 1
    assert {attempts[stage] for stage in STAGES[2:5]} == {2}


FAILED = {"event": "stage_finished", "stage": "baseline_eval", "attempt": 1, "state": "failed"}


@pytest.mark.parametrize(
    ("event", "exit_code"),
    [
        pytest.param({**FAILED, "detail": "x", "failure_class": "NO_SUCH"}, 3, id="unknown-class"),
        pytest.param({**FAILED, "detail": "x", "gate": "no-such-gate"}, 0, id="unknown-gate"),
        pytest.param({"event": "release_finished", "decision": "ACCEPT", "exit_code": 0}, 0,
                     id="a-decision-out-of-nowhere"),
    ],
)  # fmt: skip
def test_an_event_that_somebody_put_there_is_no_evidence(
    begin: Callable[..., Path], day0: Day0, event: dict[str, Any], exit_code: int
) -> None:
    run_dir = begin(Stage.BASELINE_EVAL)
    edit_events(run_dir, lambda each: each, event)
    day0("resume", exit_code=exit_code)
    assert len(report(run_dir)["gates"]) == (8 if exit_code == 0 else 2)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"publish": "publish"}, id="publish"),
        pytest.param({"reasons": ["because"]}, id="reasons"),
        pytest.param({"tasks": []}, id="tasks"),
        pytest.param({"decision": "REGRESSION", "exit_code": 1}, id="decision"),
    ],
)
def test_a_report_that_was_edited_is_written_again_from_the_evidence(
    begin: Callable[..., Path], day0: Day0, changed: dict[str, Any]
) -> None:
    run_dir = begin()
    before = report(run_dir)
    (run_dir / "report.json").write_text(json.dumps(before | changed))
    day0("resume")
    assert {name: report(run_dir)[name] for name in changed} == {
        name: before[name] for name in changed
    }
    assert set(started(run_dir).values()) == {1}


@pytest.mark.parametrize("text", ["[]", '"x"', "null", "{", "{}", "[" * 10**5])
def test_without_what_setup_recorded_nothing_of_it_is_kept(
    begin: Callable[..., Path], day0: Day0, text: str
) -> None:
    run_dir = begin(Stage.PTQ)
    (run_dir / "stages" / "setup" / "inputs.json").write_text(text)
    day0("resume", "--plan-only")
    day0("resume")
    assert read_history(run_dir).stages[Stage.PTQ].attempts == 2
    assert report(run_dir)["decision"] == "ACCEPT"


def test_a_release_that_is_decided_says_so_to_no_other_question(
    begin: Callable[..., Path], day0: Day0
) -> None:
    run_dir = begin()
    before = (run_dir / "events.jsonl").read_bytes()
    other = ("release", "--resume", run_dir.name, "demo", "--recipe", "int8", "--threshold", "0.02")
    refused = day0(*other, exit_code=2)
    assert "config.threshold: 0.01 then, 0.02 now" in refused.output
    assert (run_dir / "events.jsonl").read_bytes() == before
    day0(*other, "--accept-drift")
    assert report(run_dir)["threshold"] == 0.02
    assert read_history(run_dir).stages[Stage.COMPARE].attempts == 2


@pytest.mark.parametrize("arguments", [("--to-step", "ptq"), ("--accept-drift",)])
def test_a_decision_stands_where_nothing_is_asked_anew(
    begin: Callable[..., Path], day0: Day0, arguments: tuple[str, ...]
) -> None:
    run_dir = begin()
    before = (run_dir / "events.jsonl").read_bytes()
    assert "ACCEPT" in day0("resume", *arguments).output
    assert (run_dir / "events.jsonl").read_bytes() == before


def test_a_workspace_may_be_moved(
    begin: Callable[..., Path], workspace: Path, tmp_path: Path
) -> None:
    begin(Stage.PTQ)
    moved = workspace.rename(tmp_path / "elsewhere")
    done = CliRunner().invoke(app, ["resume", "--workspace", str(moved)])
    assert done.exit_code == 0, done.output
    assert not workspace.exists()


def test_without_the_recorded_configuration_it_is_said_what_is_missing(
    begin: Callable[..., Path], day0: Day0
) -> None:
    run_dir = begin(Stage.PTQ)
    (run_dir / "config.resolved.yaml").unlink()
    refused = day0("resume", exit_code=2).output
    assert "config.resolved.yaml: is not there" in refused
    assert "start a new release" in refused


def test_a_name_that_cannot_be_shown_ends_nothing(begin: Callable[..., Path], day0: Day0) -> None:
    run_dir = begin(Stage.SETUP)
    edit_events(run_dir, lambda e: e | {"model": "\ud800"} if "model" in e else e)
    assert "ud800" in day0("status").output
    day0("runs")


def test_between_an_accepted_change_and_the_setup_that_records_it_another_one_is_seen(
    begin: Callable[..., Path], day0: Day0, tmp_path: Path
) -> None:
    run_dir = begin(Stage.CANDIDATE_EVAL)
    change = {"field": "config.threshold", "was": 0.01, "now": 0.02, "invalidates": ["compare"]}
    edit_events(
        run_dir,
        lambda each: each,
        {"event": "drift_accepted", "changes": [change]},
        {"event": "stage_invalidated", "stage": "setup", "reason": "what it depends on changed"},
    )
    (tmp_path / "once.yaml").write_text("threshold: 0.02\n")
    (tmp_path / "twice.yaml").write_text("threshold: 0.02\nseed: 1\n")
    refused = day0("resume", "--config", str(tmp_path / "twice.yaml"), exit_code=2).output
    assert "config.seed: 0 then, 1 now" in refused
    assert "config.threshold" not in refused
    day0("resume", "--config", str(tmp_path / "once.yaml"))
    assert report(run_dir)["threshold"] == 0.02
    assert set(started(run_dir).values()) == {1}


@pytest.mark.parametrize(
    ("name", "command", "exit_code"),
    [
        ("stages/baseline_eval/baseline-key.json", ("cache", "explain"), 0),
        ("tracking-pending.json", ("sync",), 1),
        ("report.json", ("resume",), 0),
    ],
)
def test_a_file_nested_too_deeply_is_one_that_cannot_be_read(
    begin: Callable[..., Path], day0: Day0, name: str, command: tuple[str, ...], exit_code: int
) -> None:
    run_dir = begin()
    (run_dir / name).write_text("[" * 10**5)
    assert "defect" not in day0(*command, exit_code=exit_code).output
