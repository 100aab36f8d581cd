"""One side of a comparison, whichever form it was given in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conductor.gate_commands.documents import (
    InputError,
    check_shape,
    evaluation_results,
    holds_samples,
    parsed_samples,
    probed,
    read_document,
)
from gates import EvidenceError

if TYPE_CHECKING:
    from conductor.probes.lm_eval import EvaluationResults, TaskResult
    from gates.samples import TaskSamples


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison: bare scores, a samples document, or the results of a directory."""

    path: Path
    bare: Any = None
    samples: Mapping[str, Any] | None = None
    results: EvaluationResults | None = None

    @cached_property
    def tasks(self) -> Mapping[str, TaskSamples]:
        """The tasks of a samples document."""
        return parsed_samples(self.path, self.samples)

    @cached_property
    def scores(self) -> Any:
        """Score of each task; bare ones may be of any type."""
        if self.results:
            return self.results.scores()
        if self.samples is None:
            return self.bare
        from gates.pairing import scores_of

        try:
            return scores_of(self.tasks)
        except EvidenceError as error:
            raise InputError(str(self.path), str(error)) from None

    @property
    def scales(self) -> dict[str, float]:
        """Full score of each task whose metric has a known one."""
        if self.results:
            return self.results.scales()
        tasks = self.tasks if self.samples else {}
        return {name: task.scale for name, task in tasks.items() if task.scale is not None}

    @property
    def directions(self) -> dict[str, bool]:
        """Whether a higher score is better, for each task whose results say so."""
        tasks: Mapping[str, TaskResult | TaskSamples] = {}
        if self.results:
            tasks = self.results.tasks
        elif self.samples:
            tasks = self.tasks
        return {
            name: task.higher_is_better
            for name, task in tasks.items()
            if task.higher_is_better is not None
        }

    @property
    def questions(self) -> dict[str, int]:
        """How many questions are behind the score of each task, where that is known."""
        if self.results:
            tasks = self.results.tasks.items()
            return {name: task.scored_samples for name, task in tasks if task.scored_samples}
        tasks_asked = self.tasks if self.samples else {}
        return {name: len(task.questions) for name, task in tasks_asked.items()}


def read_side(path: Path, clusters: Mapping[str, str]) -> Side:
    """Read a directory of results, a samples document or bare scores."""
    if path.is_dir():
        results = evaluation_results(path, clusters)
        for task in clusters.keys() - results.tasks.keys():
            raise InputError("--clusters", f"{task}: names a task that {path} has no results of")
        # A directory compared with itself is no replay, but a run beside itself.
        samples = probed(lambda: results.samples(checkpoint=str(path.resolve())))
        return Side(path=path, results=results, samples=samples if samples["tasks"] else None)
    if clusters:
        raise InputError("--clusters", f"is about directories, and {path} is none")
    document = read_document(path)
    if holds_samples(document):
        return Side(path=path, samples=document)
    check_shape(document, "scores", str(path))
    return Side(path=path, bare=document)
