"""Harvesting of NeMo Evaluator Launcher artifacts: task names, exclusion, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conductor.probes.nel import declared_task, harvest, matches_exclude

ONE_TASK = "evaluation:\n  tasks:\n  - name: {name}\n    container: x\nexport:\n  name: other\n"
TWO_TASKS = "evaluation:\n  tasks:\n  - name: first\n  - name: second\n"


def write_run(side: Path, run: str, metrics: object = (100.0, 10), **declared: str) -> Path:
    """Write one artifacts directory; ``metrics`` are (tokens, count), a document, or raw text."""
    artifacts = side / run / "artifacts"
    artifacts.mkdir(parents=True)
    if isinstance(metrics, tuple):
        stats = dict(zip(("avg_completion_tokens", "successful_count"), metrics, strict=True))
        metrics = {"response_stats": stats}
    text = metrics if isinstance(metrics, str) else json.dumps(metrics)
    (artifacts / "eval_factory_metrics.json").write_text(text)
    for name, content in declared.items():
        suffix = {"metadata": "yaml", "config": "yml"}[name]
        (artifacts / f"{name}.{suffix}").write_text(content)
    return artifacts


KEYS = {
    "harness-and-task": (["eval_a/inv/h.task"], {"h.task": 1}),
    "without-invocation": (["eval_a/h.task"], {"h.task": 1}),
    "both-depths": (["eval_a/h.one", "eval_b/inv/h.two"], {"h.one": 1, "h.two": 1}),
    "repeats": (["eval_a/inv/h.task.0", "eval_a/inv/h.task.1"], {"h.task": 2}),
    "two-harnesses-one-task": (["eval_a/i/g.t", "eval_a/i/h.t"], {"g.t": 1, "h.t": 1}),
    "no-harness": (["eval_a/inv/ifbench"], {"ifbench": 1}),
    "other-run-directories": (["run_a/inv/h.task"], {}),
}


@pytest.mark.parametrize(("runs", "expected"), KEYS.values(), ids=KEYS.keys())
def test_task_from_directory(tmp_path: Path, runs: list[str], expected: dict[str, int]) -> None:
    for run in runs:
        write_run(tmp_path, run)
    found = harvest(tmp_path)
    assert {task: len(pairs) for task, pairs in found.items()} == expected
    assert all(pair == (100.0, 10) for pairs in found.values() for pair in pairs)


DECLARED: dict[str, tuple[dict[str, str], str | None]] = {
    "metadata": ({"metadata": ONE_TASK.format(name="h.task")}, "h.task"),
    "config": ({"config": ONE_TASK.format(name="h.task")}, "h.task"),
    "metadata-first": (
        {"metadata": ONE_TASK.format(name="a"), "config": ONE_TASK.format(name="b")},
        "a",
    ),
    "several-tasks": ({"metadata": TWO_TASKS}, None),
    "several-then-one": ({"metadata": TWO_TASKS, "config": ONE_TASK.format(name="b")}, "b"),
    "quoted": ({"config": "tasks: [{name: 'h.task'}]\n"}, "h.task"),
    "inner-names-do-not-count": (
        {"config": "tasks:\n- name: h.task\n  container:\n    name: image\n"},
        "h.task",
    ),
    "no-tasks": ({"config": "name: x\n"}, None),
    "empty": ({"config": ""}, None),
    "not-yaml": ({"config": "tasks: [\n"}, None),
    "tasks-of-another-kind": ({"config": "tasks: 3\n"}, None),
    "runs-nothing": ({"config": "!!python/object/apply:os.getcwd []\n"}, None),
    "refers-to-itself": ({"config": "a: &a\n  b: *a\n"}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("files", "name"), DECLARED.values(), ids=DECLARED.keys())
def test_declared_task(tmp_path: Path, files: dict[str, str], name: str | None) -> None:
    artifacts = write_run(tmp_path, "eval_a/inv.0", **files)
    assert declared_task(artifacts) == name
    assert set(harvest(tmp_path)) == {name or "inv"}


EXCLUDE = [
    ("eval_gpqa_high", "_high", True),
    ("eval_high_effort_run", "high_effort", True),
    ("eval_high_effort_run", "_high_effort_", True),
    ("eval_highctx", "_high", False),
    ("eval_highmem", "high", False),
    ("eval_effort_high", "high_effort", False),
    ("eval_high", "high_effort", False),
    ("eval_gpqa", "", False),
    ("eval__gpqa", "_", False),
]


@pytest.mark.parametrize(("run_dir", "exclude", "expected"), EXCLUDE)
def test_exclude_takes_whole_tokens(run_dir: str, exclude: str, expected: bool) -> None:
    assert matches_exclude(run_dir, exclude) is expected


def test_excluded_runs_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, "eval_a/inv/h.kept")
    write_run(tmp_path, "eval_a_high/inv/h.kept")
    write_run(tmp_path, "eval_a_high/inv/h.gone.1")
    diagnostics: dict[str, Any] = {}
    assert set(harvest(tmp_path, exclude="_high", diagnostics=diagnostics)) == {"h.kept"}
    assert diagnostics["excluded_run_dirs"] == ["eval_a_high"]
    assert diagnostics["excluded_tasks"] == ["h.gone", "h.kept"]
    assert diagnostics["partially_excluded_tasks"] == ["h.kept"]


@pytest.mark.parametrize(
    "metrics",
    [
        (None, 10),
        (100.0, 0),
        (float("nan"), 10),
        (float("inf"), 10),
        (-5.0, 10),
        (True, True),
        ("100", 10),
        {"response_stats": [1]},
        {},
    ],
    ids=str,
)
def test_metrics_without_lengths(tmp_path: Path, metrics: object) -> None:
    write_run(tmp_path, "eval_a/inv/h.task", metrics)
    diagnostics: dict[str, Any] = {}
    assert harvest(tmp_path, diagnostics=diagnostics) == {}
    (entry,) = diagnostics["metrics_without_tokens"]
    assert entry.startswith("h.task: ")
    assert diagnostics["found_metrics_files"] is True


@pytest.mark.parametrize("text", ["{truncated", "[]", ""], ids=["cut", "list", "empty"])
def test_unreadable_metrics_do_not_collapse(tmp_path: Path, text: str) -> None:
    write_run(tmp_path, "eval_a/inv.0")
    write_run(tmp_path, "eval_a/inv.1", text)
    diagnostics: dict[str, Any] = {}
    assert set(harvest(tmp_path, diagnostics=diagnostics)) == {"inv"}
    assert "inv.1" in diagnostics["unreadable_metrics"][0]
    assert "collapsed_keys" not in diagnostics


COLLAPSED = {
    "numbered-only": (["inv.0", "inv.1"], {}, {"inv": ["inv.0", "inv.1"]}),
    "several-declared": (["inv.0", "inv.1"], {"metadata": TWO_TASKS}, {"inv": ["inv.0", "inv.1"]}),
    "declared": (["inv.0", "inv.1"], {"config": ONE_TASK.format(name="t")}, None),
    "repeats-with-harness": (["h.task.1", "h.task.2"], {}, None),
    "repeats-beside-the-first": (["ifbench", "ifbench.1"], {}, None),
}


@pytest.mark.parametrize(("runs", "files", "expected"), COLLAPSED.values(), ids=COLLAPSED.keys())
def test_keys_that_may_pool_tasks(
    tmp_path: Path,
    runs: list[str],
    files: dict[str, str],
    expected: dict[str, list[str]] | None,
) -> None:
    for run in runs:
        write_run(tmp_path, f"eval_a/{run}", **files)
    diagnostics: dict[str, Any] = {}
    assert len(harvest(tmp_path, diagnostics=diagnostics)) == 1
    assert diagnostics.get("collapsed_keys") == expected


def test_declared_name_is_authoritative(tmp_path: Path) -> None:
    write_run(tmp_path, "eval_a/any", config=ONE_TASK.format(name="task"))
    write_run(tmp_path, "eval_a/task.1")
    write_run(tmp_path, "eval_a/task.2")
    diagnostics: dict[str, Any] = {}
    assert len(harvest(tmp_path, diagnostics=diagnostics)["task"]) == 3
    assert "collapsed_keys" not in diagnostics


def test_nothing_matched(tmp_path: Path) -> None:
    diagnostics: dict[str, Any] = {}
    assert harvest(tmp_path / "none", diagnostics=diagnostics) == {}
    assert "eval_*" in diagnostics["no_files_matched"]
    assert diagnostics["found_metrics_files"] is False


def test_linked_run_directory(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere", "inv/h.task")
    side = tmp_path / "side"
    side.mkdir()
    (side / "eval_a").symlink_to(tmp_path / "elsewhere")
    assert set(harvest(side)) == {"h.task"}
