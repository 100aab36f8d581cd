"""Evaluations that a stage could have left, for tests that ask nobody."""

from __future__ import annotations

from pathlib import Path

from conductor.probes.lm_eval import EvaluationResults, TaskResult
from conductor.release_state import Evaluation
from conductor.suites import Suite


def evaluation(suite: Suite, scored: int | None = 500) -> Evaluation:
    tasks = {
        name: TaskResult(
            task=name,
            metric=task.metric,
            filter=task.filter,
            score=0.9,
            stderr=0.01,
            expected_samples=scored,
            scored_samples=scored,
            higher_is_better=True,
            scale=1.0,
            version="1",
            fewshot=0,
        )
        for name, task in suite.tasks.items()
    }
    results = EvaluationResults(
        tasks=tasks, completion_tokens={}, model="m", versions={}, results_file=Path("r")
    )
    return Evaluation(
        settings={},
        conditions={},
        results=results,
        samples={"tasks": {}},
        summary={},
        server=None,
        recalled_from=None,
    )
