"""Records of scenarios: written, read, and not believed when they contradict themselves."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conductor.digests import checkpoint_digest, tree_digest, tree_digests
from conductor.failure import Failure
from conductor.smoke.record import (
    Record,
    ScenarioRecord,
    code_digest,
    read_record,
    record_path,
    write_record,
)
from gates.smoke import Outcome

DIGEST = "ab" * 32


def scenario(outcome: Outcome = Outcome.PASSED) -> ScenarioRecord:
    return ScenarioRecord(
        name="a",
        definition=DIGEST,
        outcome=outcome,
        problems=["nothing came"] if outcome is not Outcome.PASSED else [],
        seconds=1.5,
        outputs={"stdout": DIGEST},
    )


def record(**facts: Any) -> Record:
    return Record(
        **{
            "owner": "x",
            "passed": True,
            "detail": "1 scenario(s) passed",
            "when": "2026-01-02T03:04:05Z",
            "code": DIGEST,
            "checkpoint": None,
            "scenarios": (scenario(),),
            **facts,
        }
    )


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(record(), id="passed"),
        pytest.param(record(checkpoint=DIGEST, owner=None), id="of-a-candidate"),
        pytest.param(record(passed=False, scenarios=(scenario(Outcome.FAILED),)), id="failed"),
        pytest.param(record(passed=False, scenarios=()), id="nothing-to-run"),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, written: Record) -> None:
    path = record_path(tmp_path, "x", of_run=False)
    write_record(path, written)
    assert path == tmp_path / ".day0" / "done" / "x.json"
    assert read_record(path) == written


def test_the_record_of_a_run_lies_in_the_run(tmp_path: Path) -> None:
    assert record_path(tmp_path, "x", of_run=True) == tmp_path / "smoke" / "x.json"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"passed": 1}, "passed: ", id="odd-type"),
        pytest.param({"code": "ab"}, "code: ", id="odd-digest"),
        pytest.param({"owner": "../x"}, "owner: ", id="odd-owner"),
        pytest.param({"version": 2}, "version: ", id="newer"),
        pytest.param({"more": 1}, "more", id="unknown"),
        pytest.param({"scenarios": []}, "did not pass", id="passed-with-none"),
        pytest.param(
            {"scenarios": [record(scenarios=()).document() and {}]}, "scenarios.0", id="no-scenario"
        ),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(record().document() | change))
    with pytest.raises(Failure) as refused:
        read_record(path)
    assert words in refused.value.message
    assert str(path) in refused.value.message


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.SKIPPED])
def test_a_record_that_contradicts_itself_is_refused(tmp_path: Path, outcome: Outcome) -> None:
    path = tmp_path / "x.json"
    write_record(path, record(scenarios=(scenario(outcome),)))
    with pytest.raises(Failure, match="did not pass"):
        read_record(path)


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(Failure, match="is not JSON"):
        read_record(tmp_path / "x.json")


def test_no_record_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "x.json")


def edit(root: Path) -> None:
    (root / "conductor" / "a.py").write_text("2")


def add(root: Path) -> None:
    (root / "conductor" / "b.py").write_text("")


def rename(root: Path) -> None:
    (root / "conductor" / "a.py").rename(root / "conductor" / "c.py")


def remove(root: Path) -> None:
    (root / "conductor" / "a.py").unlink()


def ignore(root: Path) -> None:
    (root / "conductor" / "__pycache__").mkdir()
    (root / "conductor" / "__pycache__" / "a.pyc").write_text("")


@pytest.mark.parametrize(
    ("change", "same"),
    [(edit, False), (add, False), (rename, False), (remove, False), (ignore, True)],
)
@pytest.mark.parametrize("in_git", [True, False], ids=["git", "no-git"])
def test_the_code_has_one_digest(
    tmp_path: Path, change: Callable[[Path], None], same: bool, in_git: bool
) -> None:
    for package in ("conductor", "gates"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("1")
    if in_git:
        (tmp_path / ".gitignore").write_text("__pycache__/\n")
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
        subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    before = code_digest(tmp_path)
    change(tmp_path)
    assert (code_digest(tmp_path) == before) is same


def test_elsewhere_the_code_is_our_packages(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    before = code_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("y")
    assert code_digest(tmp_path) == before


def test_a_checkpoint_is_known_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = checkpoint_digest(tmp_path)
    assert before == tree_digest(tree_digests(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    assert checkpoint_digest(tmp_path) != before
