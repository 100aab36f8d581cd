import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from conductor.chain import Stage, State
from conductor.documents import validate
from conductor.journal import Journal, name_run, timestamp

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class TickingClock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create(
        tmp_path / "runs" / "a-run", clock=TickingClock(), model="demo", recipe="int8"
    )


def events(journal: Journal) -> list[dict[str, object]]:
    lines = (journal.run_dir / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_manifest_follows_the_events(journal: Journal) -> None:
    journal.start(Stage.SETUP)
    journal.finish(Stage.SETUP, State.DONE)
    journal.start(Stage.PTQ)
    manifest = json.loads((journal.run_dir / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["stages"]["setup"]["state"] == "done"
    assert manifest["stages"]["ptq"]["state"] == "running"
    assert manifest["stages"]["compare"]["state"] == "pending"
    assert [event["event"] for event in events(journal)] == [
        "release_started",
        "stage_started",
        "stage_finished",
        "stage_started",
    ]


def test_retries_get_directories_of_their_own(journal: Journal) -> None:
    journal.start(Stage.PTQ)
    first = journal.attempt_dir(Stage.PTQ)
    journal.finish(Stage.PTQ, State.FAILED)
    journal.start(Stage.PTQ)
    second = journal.attempt_dir(Stage.PTQ)
    assert first == journal.run_dir / "stages" / "ptq"
    assert second == first / "attempt-2"
    assert journal.stages[Stage.PTQ].attempts == 2


def test_stage_seconds_cover_all_attempts(journal: Journal) -> None:
    journal.start(Stage.PTQ)
    assert journal.stages[Stage.PTQ].seconds is None
    journal.finish(Stage.PTQ, State.FAILED)
    once = journal.stages[Stage.PTQ].seconds
    journal.start(Stage.PTQ)
    journal.finish(Stage.PTQ, State.DONE)
    assert once is not None
    assert journal.stages[Stage.PTQ].seconds > once


def test_a_run_directory_is_never_reused(journal: Journal) -> None:
    with pytest.raises(FileExistsError):
        Journal.create(journal.run_dir, clock=TickingClock(), model="demo", recipe="int8")


def test_outcome_is_in_the_manifest(journal: Journal) -> None:
    journal.start(Stage.SETUP)
    journal.finish(Stage.SETUP, State.DONE)
    journal.close(decision="ACCEPT", exit_code=0)
    manifest = json.loads((journal.run_dir / "manifest.json").read_text())
    validate(manifest, schema="manifest", where="manifest.json")
    assert manifest["decision"] == "ACCEPT"
    assert events(journal)[-1]["event"] == "release_finished"


@pytest.mark.parametrize(
    ("model", "recipe", "expected"),
    [
        pytest.param("demo", "int8", "demo-int8-20260102-030405-ab12", id="plain"),
        pytest.param(
            "org/Model_X@main", "nvfp4", "model-x-main-nvfp4-20260102-030405-ab12", id="hub-id"
        ),
        pytest.param("/a/b/", "x/My Recipe.yaml", "b-my-recipe-20260102-030405-ab12", id="paths"),
    ],
)
def test_name_run(model: str, recipe: str, expected: str) -> None:
    assert name_run(model, recipe, START, "ab12") == expected


def test_timestamps_are_utc() -> None:
    assert timestamp(START) == "2026-01-02T03:04:05.000Z"
