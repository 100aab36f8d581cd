"""The seal of a run: over what, and what sealing again does and does not forgive."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conductor import files, tracking
from conductor.digests import file_digest, tree_digest
from conductor.event_log import parse
from conductor.evidence import seal as sealing
from conductor.evidence.seal import RUN_MANIFEST, UNSEALED, checkpoint_files, reseal, seals
from conductor.evidence.verify import verify
from conductor.tracking import Tracking, TrackingStatus


def clock() -> datetime:
    return datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def seal_of(run_dir: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run_dir / RUN_MANIFEST).read_text())
    return document


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [parse(line) for line in (run_dir / "events.jsonl").read_bytes().splitlines()]


def wrong(run_dir: Path) -> set[str]:
    return {problem.file for problem in verify(run_dir).problems}


def test_the_seal_names_every_file_and_the_candidate(run_dir: Path) -> None:
    document = seal_of(run_dir)
    there = {
        path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()
    } - UNSEALED
    assert document["files"].keys() == there
    assert document["run_id"] == run_dir.name
    assert document["checkpoint"] == tree_digest(checkpoint_files(document["files"]))
    assert len(checkpoint_files(document["files"])) > 3


def test_the_seal_is_recorded_before_the_release_has_ended(run_dir: Path) -> None:
    *_, sealed, ended = events(run_dir)
    assert [sealed["event"], ended["event"]] == ["evidence_sealed", "release_finished"]
    assert sealed["sha256"] == file_digest(run_dir / RUN_MANIFEST)


def test_what_was_added_is_sealed_again(run_dir: Path) -> None:
    before = seal_of(run_dir)
    (run_dir / "smoke").mkdir()
    (run_dir / "smoke" / "note.txt").write_text("x")
    (run_dir / "report.md").write_text("new")
    (run_dir / "report.html").unlink()
    assert wrong(run_dir) == {"smoke/note.txt", "report.md", "report.html"}
    reseal(run_dir, ["smoke", "report.md", "report.html", "not-there"], clock=clock)
    assert wrong(run_dir) == set()
    after = seal_of(run_dir)["files"]
    assert after.keys() ^ before["files"].keys() == {"smoke/note.txt", "report.html"}
    assert events(run_dir)[-1]["changed"] == ["not-there", "report.html", "report.md", "smoke"]


def test_what_was_not_named_is_not_forgiven(run_dir: Path) -> None:
    (run_dir / "report.md").write_text("new")
    (run_dir / "env.json").write_text((run_dir / "env.json").read_text() + " ")
    reseal(run_dir, ["report.md"], clock=clock)
    assert wrong(run_dir) == {"env.json"}


def test_a_candidate_that_was_moved_is_the_same(run_dir: Path) -> None:
    candidate = seal_of(run_dir)["checkpoint"]
    (run_dir / "checkpoint").rename(run_dir / "REJECTED-checkpoint")
    assert wrong(run_dir)
    reseal(run_dir, ["checkpoint", "REJECTED-checkpoint"], clock=clock)
    assert wrong(run_dir) == set()
    assert seal_of(run_dir)["checkpoint"] == candidate
    weights = run_dir / "REJECTED-checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    reseal(run_dir, ["REJECTED-checkpoint"], clock=clock)
    assert "checkpoint/model.safetensors" in wrong(run_dir)


def test_a_run_without_a_seal_gets_none(run_dir: Path) -> None:
    (run_dir / RUN_MANIFEST).unlink()
    before = (run_dir / "events.jsonl").read_bytes()
    reseal(run_dir, ["report.md"], clock=clock)
    assert not (run_dir / RUN_MANIFEST).exists()
    assert (run_dir / "events.jsonl").read_bytes() == before


def test_a_seal_that_nobody_recorded_is_left_alone(run_dir: Path) -> None:
    path = run_dir / RUN_MANIFEST
    path.write_text(path.read_text().replace("report.md", "report.me"))
    before = path.read_bytes()
    reseal(run_dir, ["report.md"], clock=clock)
    assert path.read_bytes() == before
    assert RUN_MANIFEST in wrong(run_dir)


def test_sealing_again_can_be_repeated_after_a_death(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(path: Path, content: bytes) -> None:
        raise Killed

    (run_dir / "report.md").write_text("new")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sealing, "write_bytes", die)
        reseal(run_dir, ["report.md"], clock=clock)
    assert RUN_MANIFEST in wrong(run_dir)
    reseal(run_dir, ["report.md"], clock=clock)
    assert wrong(run_dir) == set()


def send(pending: Path, **_: Any) -> Tracking:
    """Write what sending a release writes, and nothing to any store."""
    (pending.parent / "report.md").write_text("with run ids")
    (pending.parent / "tracking-result.json").write_text("{}")
    pending.unlink()
    return Tracking(status=TrackingStatus.LOGGED, uri=None)


@pytest.mark.parametrize("dies", [False, True], ids=["in-order", "dead-before-the-seal"])
def test_a_run_that_is_sent_later_is_sealed_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    pending = run_dir / tracking.PENDING
    pending.write_text("{}")
    reseal(run_dir, [tracking.PENDING], clock=clock)
    monkeypatch.setattr(tracking, "_read_plan", lambda _: SimpleNamespace(workspace="", uri=None))
    monkeypatch.setattr(tracking, "_send_bounded", send)
    if dies:
        send(pending)
        assert wrong(run_dir) == {"report.md", tracking.PENDING, tracking.RESULT}
    sent = tracking.sync_runs([run_dir], environ={})
    assert [each.logged for each in sent] == ([] if dies else [True])
    assert wrong(run_dir) == set()
    assert tracking.sync_runs([run_dir], environ={}) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param('{"files": {"a": {}}}', True, id="named"),
        pytest.param('{"files": {}}', False, id="not-named"),
        pytest.param("[]", False, id="no-seal"),
        pytest.param(None, False, id="none"),
    ],
)
def test_seals(tmp_path: Path, content: str | None, expected: bool) -> None:
    if content is not None:
        files.write_text(tmp_path / RUN_MANIFEST, content)
    assert seals(tmp_path, "a") is expected
