"""Directories of lm-eval results made by hand, in the form that lm-eval 0.4.13 writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

STAMP = "2026-11-22T10-00-00.000000"
QUESTIONS = 30

Row = dict[str, Any]
Change = Callable[[list[Row]], object]


def hashed(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def base_row(number: int, target: str) -> Row:
    return {
        "doc_id": number,
        "doc": {"question": f"question {number}", "story": f"story {number // 3}"},
        "target": target,
        "filter": "none",
        "doc_hash": hashed(f"document {number}"),
        "prompt_hash": hashed(f"prompt {number}"),
        "target_hash": hashed(target),
    }


def text_row(number: int, **changes: Any) -> Row:
    """One generated answer; every fifth is wrong."""
    answer = str(number if number % 5 else -1 - number)
    return {
        **base_row(number, str(number)),
        "arguments": {"gen_args_0": {"arg_0": f"prompt {number}", "arg_1": {"until": ["\n"]}}},
        "resps": [[answer]],
        "filtered_resps": [answer],
        "metrics": ["exact_match"],
        "exact_match": float(number % 5 != 0),
        "finish_reasons": ["stop"],
        "completion_tokens": [2 + number % 3],
        **changes,
    }


def choice_row(number: int, **changes: Any) -> Row:
    """One multiple-choice question of two choices; every fourth is wrong."""
    resps = [[[str(-1.5 - number / 7), "False"]], [[str(-0.5 - number / 11), "True"]]]
    return {
        **base_row(number, str(number % 2)),
        "arguments": {},
        "resps": resps,
        "filtered_resps": [each[0] for each in resps],
        "metrics": ["acc"],
        "acc": float(number % 4 != 0),
        **changes,
    }


TASKS: Mapping[str, tuple[Callable[..., Row], str, str]] = {
    "words": (text_row, "exact_match", "generate_until"),
    "choices": (choice_row, "acc", "multiple_choice"),
}


def rows_of(task: str, count: int = QUESTIONS) -> list[Row]:
    make = TASKS[task][0]
    return [make(number) for number in range(count)]


def write_results(
    directory: Path,
    rows: Mapping[str, list[Row]] | None = None,
    *,
    generation: Mapping[str, Any] | None = None,
    filters: tuple[str, ...] = ("none",),
    original: int = QUESTIONS,
    effective: int = QUESTIONS,
    limit: int | None = None,
    seed: int = 0,
    model: str = "tiny",
) -> Path:
    """Write results and logs; scores are the means over the rows of each filter."""
    rows = {task: rows_of(task) for task in TASKS} if rows is None else rows
    document: dict[str, Any] = {
        "results": {},
        "group_subtasks": {},
        "configs": {},
        "versions": dict.fromkeys(rows, 1.0),
        "n-shot": dict.fromkeys(rows, 0),
        "higher_is_better": {},
        "n-samples": {task: {"original": original, "effective": effective} for task in rows},
        "config": {
            "model": "local-completions",
            "model_args": {
                "model": model,
                "base_url": "http://127.0.0.1:1/v1/completions",
                "api_key": "secret",
                "num_concurrent": 8,
                "seed": seed,
            },
            "batch_size": 1,
            "limit": limit,
            "random_seed": 0,
            "torch_seed": seed,
        },
        "lm_eval_version": "0.4.13",
        "chat_template_sha": None,
        "model_name": model,
    }
    place = directory / model
    place.mkdir(parents=True)
    for task, task_rows in rows.items():
        _, metric, output = TASKS[task]
        scores: dict[str, Any] = {}
        for name in filters:
            values = [row[metric] for row in task_rows if row["filter"] == name]
            scores[f"{metric},{name}"] = sum(values) / len(values) if values else 0.0
        document["results"][task] = scores
        document["higher_is_better"][task] = {metric: True}
        document["configs"][task] = {
            "output_type": output,
            "metric_list": [{"metric": metric, "aggregation": "mean"}],
            "generation_kwargs": dict(generation or {"temperature": 0.0}),
            **({"filter_list": [{"name": name} for name in filters]} if len(filters) > 1 else {}),
        }
        lines = "".join(json.dumps(row) + "\n" for row in task_rows)
        (place / f"samples_{task}_{STAMP}.jsonl").write_text(lines)
    (place / f"results_{STAMP}.json").write_text(json.dumps(document))
    return directory


def only(results: Path, pattern: str) -> Path:
    (path,) = results.rglob(pattern)
    return path


def change_results(results: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = only(results, "results_*.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def change_rows(results: Path, task: str, change: Change) -> None:
    """Change the log of a task and nothing else: what a fault after the evaluation leaves."""
    path = only(results, f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_plan(results: Path, task: str, documents: Mapping[int, str], repeat: int = 0) -> None:
    plan = {
        "version": 1.0,
        "size": QUESTIONS,
        "documents": {str(number): each for number, each in documents.items()},
        "repeat": repeat,
    }
    (results / "planned.json").write_text(json.dumps({task: plan}))
