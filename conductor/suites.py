"""What a release evaluates: tasks with metric, scale, direction, shots, sampling and references.

A suite is a YAML file. Two come with the package: ``demo``, local and offline, and ``standard``,
benchmarks of lm-evaluation-harness whose data sets come from the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conductor.documents import read_yaml
from conductor.failure import Failure
from gates import FailureClass

_PACKAGE = Path(__file__).parent
BUILT_IN: dict[str, Path] = {
    "demo": _PACKAGE / "demo" / "suite.yaml",
    "standard": _PACKAGE / "suite_files" / "standard.yaml",
}

PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics of lm-eval that have no full score."""

# Plain prose that any language model continues: used when a suite brings no prompts of its own.
CANARY_PROMPTS = (
    "The capital of France is",
    "2, 4, 6, 8,",
    "Once upon a time there was a",
    "Water boils at a temperature of",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One lm-eval task and how to read its score."""

    name: str
    metric: str
    filter: str
    kind: str
    scale: float
    higher_is_better: bool
    samples: int | None
    fewshot: int | None
    reference: float | None
    reference_source: str | None
    reference_protocol: str | None
    clusters: str | None
    discordance: float | None
    limits: Mapping[str, float]

    @property
    def is_perplexity(self) -> bool:
        """True when the score is no share of right answers."""
        return self.metric in PERPLEXITIES


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named set of tasks, evaluated under one set of sampling parameters."""

    name: str
    path: Path
    tasks: Mapping[str, Task]
    include_path: Path | None
    max_length: int | None
    apply_chat_template: bool
    canary_prompts: tuple[str, ...]
    generation: Mapping[str, Any]

    @property
    def is_local(self) -> bool:
        """True when every task file and data file lies beside the suite, so nothing is fetched."""
        return self.include_path is not None

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """Published scores of the source model: score, source, and how its protocol differs."""
        return {
            task.name: {
                "score": task.reference,
                "source": task.reference_source,
                "protocol": task.reference_protocol,
            }
            for task in self.tasks.values()
            if task.reference is not None
        }

    @property
    def generation_tasks(self) -> list[str]:
        """The tasks whose completions have a length worth comparing."""
        return [task.name for task in self.tasks.values() if task.kind == "generation"]


def load_suite(name_or_path: str) -> Suite:
    """Load a built-in suite by name, or any suite from its file.

    Raises:
        Failure: USER_CONFIG_ERROR when there is no such suite or its file is malformed.
    """
    path = BUILT_IN.get(name_or_path, Path(name_or_path))
    if name_or_path not in BUILT_IN and not path.is_file():
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"unknown suite {name_or_path!r}: give one of {', '.join(BUILT_IN)}, or the path of a "
            "suite file",
        )
    path = path.resolve()
    document = read_yaml(path, schema="suite", what="suite")
    include = document.get("include_path")
    if include and not (path.parent / include).is_dir():
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"suite {path}: include_path: {path.parent / include} is not a directory; "
            "give the directory of the task files, relative to the suite's file",
        )
    suite = Suite(
        name=document["name"],
        path=path,
        tasks={name: _parse_task(name, fields) for name, fields in document["tasks"].items()},
        include_path=path.parent / include if include else None,
        max_length=document.get("max_length"),
        apply_chat_template=document.get("apply_chat_template", False),
        canary_prompts=tuple(document.get("canary_prompts", CANARY_PROMPTS)),
        generation=document.get("generation", {}),
    )
    _check_tasks(suite)
    return suite


def _check_tasks(suite: Suite) -> None:
    """Refuse references off their scale, and names that no local task file has."""
    known = _local_task_names(suite.include_path) if suite.include_path else suite.tasks.keys()
    problems = [
        f"tasks.{task.name}.reference: {task.reference} is outside 0 to {task.scale:g}"
        for task in suite.tasks.values()
        if task.reference is not None and not 0 <= task.reference <= task.scale
    ] + [
        f"tasks.{name}: no task file under {suite.include_path} has this name"
        for name in suite.tasks
        if name not in known
    ]
    if problems:
        raise Failure(FailureClass.USER_CONFIG_ERROR, f"suite {suite.path}: {'; '.join(problems)}")


def check_perplexities(suite: Suite, *, relative: bool, until_decided: bool) -> None:
    """Refuse perplexities where their drop has no margin, or no interval that holds at every look.

    Raises:
        Failure: USER_CONFIG_ERROR, which names the tasks and the option.
    """
    fields = [f"tasks.{task.name}.metric" for task in suite.tasks.values() if task.is_perplexity]
    problem = None
    if until_decided:
        problem = (
            "a perplexity has no bounds, so nothing about it holds at every look; leave out "
            "--until-decided, or take these tasks out of the suite"
        )
    elif not relative:
        problem = (
            "a perplexity has no full score that a drop could be a fraction of; give --relative, "
            "which allows it to grow by that fraction"
        )
    if fields and problem:
        where = f"suite {suite.path}: {', '.join(fields)}"
        raise Failure(FailureClass.USER_CONFIG_ERROR, f"{where}: {problem}")


class _TaskFileLoader(yaml.SafeLoader):
    """Read a task file for its name alone: lm-eval's own tags, such as !function, become null."""


_TaskFileLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _local_task_names(directory: Path) -> set[str]:
    names = set()
    for path in [*directory.rglob("*.yaml"), *directory.rglob("*.yml")]:
        try:
            document = yaml.load(path.read_text(encoding="utf-8"), _TaskFileLoader)  # noqa: S506
        except (OSError, ValueError, yaml.YAMLError):
            continue  # lm-eval will say what is wrong with it
        if isinstance(document, dict) and isinstance(document.get("task"), str):
            names.add(document["task"])
    return names


def _parse_task(name: str, fields: Mapping[str, Any]) -> Task:
    return Task(
        name=name,
        metric=fields["metric"],
        filter=fields.get("filter", "none"),
        kind=fields["kind"],
        scale=float(fields.get("scale", 1.0)),
        higher_is_better=fields.get("higher_is_better", True),
        samples=fields.get("samples"),
        fewshot=fields.get("fewshot"),
        reference=fields.get("reference"),
        reference_source=fields.get("reference_source"),
        reference_protocol=fields.get("reference_protocol"),
        clusters=fields.get("clusters"),
        discordance=fields.get("discordance"),
        limits=fields.get("limits", {}),
    )
