"""The release checklist: each item from the file that says so, and nothing from anywhere else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conductor.evidence.checklist import ITEMS, NAME, render_checklist

ROW = re.compile(
    r"\| (?P<stage>\w+) \| (?P<item>.*?) \| (?P<mark>PASS|FAIL|SKIP) \| (?P<found>.*) "
    r"\| (?P<evidence>\S*) \|"
)

Change = Callable[[Path], None]


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished dry run."""
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    return copy


def rows(run_dir: Path) -> dict[str, tuple[str, str, str]]:
    """Return mark, words and evidence by item."""
    found = [ROW.fullmatch(line) for line in render_checklist(run_dir).splitlines()]
    return {
        row["item"]: (row["mark"], row["found"], row["evidence"])
        for row in found
        if row is not None
    }


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_every_item_stands_once_and_names_a_file_that_is_there(run_dir: Path) -> None:
    found = rows(run_dir)
    assert list(found) == [item.promise for item in ITEMS]
    for mark, words, evidence in found.values():
        assert words
        assert (run_dir / evidence).exists(), (mark, evidence)


def test_a_dry_run_passes_what_it_proves(run_dir: Path) -> None:
    marks = {item: mark for item, (mark, _, _) in rows(run_dir).items()}
    assert [item for item, mark in marks.items() if mark == "FAIL"] == [
        "The decision is ground to publish"
    ]
    assert [item for item, mark in marks.items() if mark == "SKIP"] == [
        "Calibration text went through the model",
        "How far the source differs from itself was measured",
        "The release is logged to MLflow",
        "A smoke run reached every stage",
    ]


def test_it_is_written_with_the_run_and_made_of_it_alone(run_dir: Path) -> None:
    assert (run_dir / NAME).read_text() == render_checklist(run_dir)


def forget(name: str) -> Change:
    return lambda run_dir: (run_dir / name).unlink()


def set_report(**fields: Any) -> Change:
    return lambda run_dir: change(run_dir / "report.json", **fields)


def fail_gate(run_dir: Path) -> None:
    check = {"passed": False, "observed": 1, "limit": 0, "detail": "one | too many"}
    path = run_dir / "verdicts" / "compare.json"
    change(path, **{"pass": False, "detail": "demo_facts lost", "checks": {"demo_facts": check}})


def fail_stage(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "manifest.json").read_text())
    stages = manifest["stages"]
    stages["deploy"] |= {"state": "failed", "detail": "it would not start\nits log"}
    for name in ("baseline_eval", "candidate_eval", "compare"):
        stages[name] |= {"state": "pending"}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    for verdict in (run_dir / "verdicts").iterdir():
        if verdict.stem != "ptq":
            verdict.unlink()


def fail_server(run_dir: Path) -> None:
    fail_stage(run_dir)
    (run_dir / "reproduce").mkdir()
    step = {"stage": "deploy", "log": "stages/deploy/server-candidate.log"}
    (run_dir / "reproduce" / "failure.json").write_text(json.dumps(step))


def calibrate(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    report["recipe"]["calibration"]["samples"] = 128
    (run_dir / "report.json").write_text(json.dumps(report))


LOGGED = {"status": "logged", "uri": "u", "detail": "", "run_id": "abc", "stage_run_ids": {}}
CASES = [
    pytest.param(
        forget("config.resolved.yaml"),
        "The configuration is recorded, with where each value comes from",
        ("FAIL", "is not there", "config.resolved.yaml"),
        id="no-configuration",
    ),
    pytest.param(
        forget("env.json"),
        "Machine, interpreters and packages are recorded",
        ("FAIL", "is not there", "env.json"),
        id="no-environment",
    ),
    pytest.param(
        forget("verdicts/external.json"),
        "The source scores as published",
        ("SKIP", "the suite names no published score", "stages/baseline_eval"),
        id="no-published-score",
    ),
    pytest.param(
        fail_gate,
        "No task loses more than the margin",
        ("FAIL", "demo_facts: demo_facts lost", "verdicts/compare.json"),
        id="gate-says-no",
    ),
    pytest.param(
        fail_stage,
        "The candidate was started",
        ("FAIL", "it would not start", "stages/deploy/server-source.log"),
        id="stage-failed",
    ),
    pytest.param(
        fail_server,
        "The candidate was started",
        ("FAIL", "it would not start", "stages/deploy/server-candidate.log"),
        id="log-of-what-failed",
    ),
    pytest.param(
        fail_stage,
        "It answers like its source, as exported",
        ("SKIP", "deploy failed before", "manifest.json"),
        id="gate-of-the-failed-stage",
    ),
    pytest.param(
        fail_stage,
        "No task loses more than the margin",
        ("SKIP", "not reached: deploy failed", "manifest.json"),
        id="gate-of-a-later-stage",
    ),
    pytest.param(
        calibrate,
        "Calibration text went through the model",
        ("PASS", "128 samples", "stages/ptq/result.json"),
        id="calibrated",
    ),
    pytest.param(
        set_report(tracking=LOGGED),
        "The release is logged to MLflow",
        ("PASS", "run abc", "report.json"),
        id="logged",
    ),
    pytest.param(
        set_report(tracking=LOGGED | {"status": "unavailable", "detail": "gone\nmore"}),
        "The release is logged to MLflow",
        ("FAIL", "unavailable: gone", "report.json"),
        id="not-logged",
    ),
    pytest.param(
        set_report(decision="REGRESSION", reasons=["compare: lost"]),
        "The decision is ACCEPT",
        ("FAIL", "REGRESSION: compare: lost", "report.json"),
        id="regression",
    ),
    pytest.param(
        set_report(publish="publish"),
        "The decision is ground to publish",
        ("PASS", "publish", "report.json"),
        id="publish",
    ),
    pytest.param(
        forget("report.json"),
        "The decision is ACCEPT",
        ("FAIL", "there is no report", "report.json"),
        id="no-report",
    ),
    pytest.param(
        forget("stages/setup/inputs.json"),
        "What the release depends on has digests",
        ("FAIL", "0 fields", "stages/setup/inputs.json"),
        id="no-inputs",
    ),
]


@pytest.mark.parametrize(("spoil", "item", "expected"), CASES)
def test_an_item_follows_its_file(
    run_dir: Path, spoil: Change, item: str, expected: tuple[str, str, str]
) -> None:
    spoil(run_dir)
    assert rows(run_dir)[item] == expected


def section(run_dir: Path, name: str) -> str:
    return render_checklist(run_dir).partition(f"\n## {name}\n")[2].partition("\n## ")[0].strip()


def spoil_numbers(run_dir: Path) -> None:
    path = run_dir / "stages" / "ptq" / "checkpoint-summary.json"
    change(path, findings=[{"kind": "non_finite_scale", "count": 3, "names": []}])
    path = run_dir / "stages" / "deploy" / "canary.json"
    canary = json.loads(path.read_text())
    canary["prompts"][0]["source"]["logprobs"][0] = None
    path.write_text(json.dumps(canary))
    path = run_dir / "stages" / "baseline_eval" / "run-summary.json"
    summary = json.loads(path.read_text())
    summary["tasks"]["demo_facts"]["audit"]["answers"]["non_finite"] = 2
    path.write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("spoil", "counts"),
    [
        pytest.param(lambda run_dir: None, ["0", "0", "0", "0"], id="none"),
        pytest.param(spoil_numbers, ["3", "1", "2", "0"], id="some"),
    ],
)
def test_numbers_that_are_none_are_counted(run_dir: Path, spoil: Change, counts: list[str]) -> None:
    spoil(run_dir)
    lines = section(run_dir, "NaN and infinity").splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == counts


WARNINGS = [
    pytest.param("INFO all is well\n", None, id="none"),
    pytest.param(
        "x\nWARNING 11-22 careful\nWARN again\n", (2, "WARNING 11-22 careful"), id="level"
    ),
    pytest.param("a.py:3: UserWarning: old\n", (1, "a.py:3: UserWarning: old"), id="python"),
    pytest.param("no forewarning here\n", None, id="another-word"),
    pytest.param(f"WARNING {'x' * 500}\n", (1, f"WARNING {'x' * 152}"), id="long"),
    pytest.param("WARNING a | b\n", (1, r"WARNING a \| b"), id="table"),
]


@pytest.mark.parametrize(("text", "expected"), WARNINGS)
def test_warnings_of_logs_are_counted(
    run_dir: Path, text: str, expected: tuple[int, str] | None
) -> None:
    for log in run_dir.rglob("*.log"):
        log.write_text("")
    (run_dir / "stages" / "ptq" / "stdout.log").write_text(text)
    found = section(run_dir, "Warnings")
    if expected is None:
        assert found == "No log holds a warning."
    else:
        count, first = expected
        assert found.splitlines()[2:] == [f"| stages/ptq/stdout.log | {count} | {first} |"]


def test_deviations_are_those_of_the_report(run_dir: Path) -> None:
    set_report(deviations=["one", "two <b>"])(run_dir)
    assert section(run_dir, "Deviations") == "- one\n- two &lt;b&gt;"
    set_report(deviations=[])(run_dir)
    assert section(run_dir, "Deviations").startswith("None")
