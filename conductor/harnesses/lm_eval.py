"""lm-evaluation-harness: from a suite and an engine to the evaluation worker's request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conductor.probes.lm_eval import NULL_ANSWER, MetricChoice
from conductor.rounds import Batch
from conductor.suites import Suite

# What may differ between the two sides' requests: where the model is, and where answers go.
MAY_DIFFER = frozenset({"model_path", "base_url", "served_name", "output_dir", "request_cache"})

# lm-eval scores an answer of null as an empty text; this makes it recognizable in the samples.
HARNESS_ENVIRON: Mapping[str, str] = {"LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER": NULL_ANSWER}


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """How the harness asks; equal on both sides."""

    seed: int
    limit: int | None
    concurrency: int
    request_timeout_s: int
    max_length: int | None


def evaluation_request(
    suite: Suite,
    settings: HarnessSettings,
    batch: Batch,
    *,
    output_dir: Path,
    request_cache: Path,
) -> dict[str, Any]:
    """Return the request for ``workers/evaluate.py``, less how the engine is reached."""
    return {
        "tasks": {
            task.name: task.fewshot
            for task in suite.tasks.values()
            if batch.questions is None or task.name in batch.questions
        },
        "sizes": {task.name: task.samples for task in suite.tasks.values()},
        **batch.document(),
        "include_path": str(suite.include_path) if suite.include_path else None,
        "apply_chat_template": suite.apply_chat_template,
        "generation": dict(suite.generation) or None,
        "seed": settings.seed,
        "limit": settings.limit,
        "concurrency": settings.concurrency,
        "timeout_s": settings.request_timeout_s,
        "max_length": settings.max_length,
        "output_dir": str(output_dir),
        "request_cache": str(request_cache),
    }


def metric_choices(suite: Suite) -> dict[str, MetricChoice]:
    """Return which metric and filter of each task is its score."""
    return {
        task.name: MetricChoice(metric=task.metric, filter=task.filter)
        for task in suite.tasks.values()
    }
