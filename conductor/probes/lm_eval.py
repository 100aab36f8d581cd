"""Read what lm-evaluation-harness wrote: scores, and how many documents truly stand behind them.

lm-eval ends with exit code 0 when a server answered null or with NaN log-probabilities, and its
accuracy then looks plausible. So a document counts as scored only if its metric is a number and
every answer it was computed from is one; the log of samples is the evidence, and without it no
count is given. Scores are taken as lm-eval aggregated them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conductor.probes.reading import ProbeError, open_regular, parse_object, read_object

NULL_ANSWER = "<|day0:no-answer|>"
"""What the evaluation sets ``LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER`` to, so that an answer the
server never gave can be told from an empty one."""

COMPLETION_TOKENS_FILE = "completion_tokens.json"

RATE_METRICS = re.compile(
    r"(\w+_)?acc(_norm|_bytes|_mutual_info|uracy)?|exact_match|em|f1|pass@\d+|pass_at_\d+"
)
"""Metrics that lm-eval reports as a share from 0 to 1."""

_LIKELIHOOD_OUTPUTS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
_PREFIX = "results_"
_REMEDY = "run the evaluation again with --log_samples and an --output_path of its own"
_DOCUMENTS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class MetricChoice:
    """Which metric of a task is its score; without a filter, the task's first."""

    metric: str
    filter: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task: score and standard error on the metric's own scale, and sample counts.

    ``None`` means that the results do not say; ``errors`` are sentences for the reader.
    """

    task: str
    metric: str
    filter: str
    score: float | None
    stderr: float | None
    expected_samples: int | None
    scored_samples: int | None
    higher_is_better: bool | None
    scale: float | None
    version: str | None
    fewshot: int | None
    errors: tuple[str, ...] = ()

    def run_entry(self) -> dict[str, Any]:
        """Return the task as a run summary lists it. lm-eval writes results only when it ends."""
        entry = {
            "scored_samples": self.scored_samples,
            "scale": self.scale,
            "stderr": self.stderr,
        }
        return {
            "status": "SUCCESS",
            "expected_samples": self.expected_samples,
            "score": self.score,
            "errors": [{"kind": "other", "message": error} for error in self.errors],
            "metric": f"{self.metric},{self.filter}",
            **{name: value for name, value in entry.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """One evaluation of one model.

    ``completion_tokens`` are {task: [(mean length in tokens, documents)]} of generation tasks, and
    empty where nobody counted. ``versions`` are those of the software that evaluated.
    """

    tasks: Mapping[str, TaskResult]
    completion_tokens: Mapping[str, list[tuple[float, int]]]
    model: str
    versions: Mapping[str, str]
    results_file: Path = field(compare=False)

    def run_summary(self) -> dict[str, Any]:
        """Return the run summary that the run gate reads."""
        return {"tasks": {name: task.run_entry() for name, task in self.tasks.items()}}

    def scores(self) -> dict[str, float | None]:
        """Return {task: score}; a task without a usable score is listed with ``None``."""
        return {name: task.score for name, task in self.tasks.items()}

    def scales(self) -> dict[str, float]:
        """Return the full score of each task where the metric has a known one."""
        return {name: task.scale for name, task in self.tasks.items() if task.scale is not None}


def probe_results(
    results_dir: Path, *, choices: Mapping[str, MetricChoice] | None = None
) -> EvaluationResults:
    """Return the newest evaluation in a directory.

    ``choices`` say which metric counts for a task; a task they leave out is scored by its first
    metric. Groups are skipped: they have no documents of their own.

    Raises:
        ProbeError: there are no results, those of several models, or a file that cannot be read.
    """
    file = _newest_results(results_dir)
    document = read_object(file, _REMEDY)
    groups = _groups(document)
    tasks = {
        name: _task_result(name, document, file, (choices or {}).get(name))
        for name in _mapping(document, "results")
        if name not in groups
    }
    if not tasks:
        raise ProbeError(file, "has no task in results", _REMEDY)
    return EvaluationResults(
        tasks=tasks,
        completion_tokens=_completion_tokens(results_dir / COMPLETION_TOKENS_FILE),
        model=str(document.get("model_name") or file.parent.name),
        versions={
            name: str(document[f"{name}_version"])
            for name in ("lm_eval", "transformers")
            if document.get(f"{name}_version")
        },
        results_file=file,
    )


def _newest_results(results_dir: Path) -> Path:
    """Return the latest results file by the time in its name."""
    if not results_dir.is_dir():
        raise ProbeError(results_dir, "is no directory", "give lm-eval's --output_path")
    files = [path for path in results_dir.rglob(f"{_PREFIX}*.json") if path.is_file()]
    if not files:
        raise ProbeError(results_dir, f"holds no {_PREFIX}*.json", _REMEDY)
    models = sorted({path.parent.name for path in files})
    if len(models) > 1:
        raise ProbeError(
            results_dir,
            f"holds results of several models ({', '.join(models)})",
            "give the directory of one of them",
        )
    return max(files, key=lambda path: path.name)


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def _groups(document: Mapping[str, Any]) -> set[str]:
    subtasks = _mapping(document, "group_subtasks")
    return {*_mapping(document, "groups"), *(name for name, members in subtasks.items() if members)}


def _task_result(
    task: str, document: Mapping[str, Any], file: Path, choice: MetricChoice | None
) -> TaskResult:
    config = _mapping(_mapping(document, "configs"), task)
    values = _mapping(_mapping(document, "results"), task)
    metric, answer_filter = _chosen(values, config, choice)
    score = _number(values.get(f"{metric},{answer_filter}"))
    errors = [] if score is not None else [f"no usable score for {metric},{answer_filter}"]
    stamp = file.name.removeprefix(_PREFIX).removesuffix(".json")
    log = file.with_name(f"samples_{task.replace('/', '_')}_{stamp}.jsonl")
    scored = None
    if log.is_file():
        likelihood = config.get("output_type") in _LIKELIHOOD_OUTPUTS
        scored, unusable = _count_scored(log, metric, answer_filter, likelihood=likelihood)
        errors += unusable
    else:
        errors.append(f"no sample log {log.name}: cannot tell how many documents were scored")
    better = _mapping(_mapping(document, "higher_is_better"), task).get(metric)
    version = _mapping(document, "versions").get(task)
    fewshot = _mapping(document, "n-shot").get(task)
    return TaskResult(
        task=task,
        metric=metric,
        filter=answer_filter,
        score=score,
        stderr=_number(values.get(f"{metric}_stderr,{answer_filter}")),
        expected_samples=_whole(_mapping(_mapping(document, "n-samples"), task).get("effective")),
        scored_samples=scored,
        higher_is_better=better if isinstance(better, bool) else None,
        scale=1.0 if RATE_METRICS.fullmatch(metric) else None,
        version=None if version is None else str(version),
        fewshot=_whole(fewshot),
        errors=tuple(errors),
    )


def _chosen(
    values: Mapping[str, Any], config: Mapping[str, Any], choice: MetricChoice | None
) -> tuple[str, str]:
    """Return metric and filter: as chosen, or the task's first metric and first filter."""
    reported = [tuple(key.split(",", 1)) for key in values if "," in key and "_stderr," not in key]
    metrics = [choice.metric] if choice else [*_names(config, "metric_list", "metric")]
    metrics += [metric for metric, _ in reported if not choice]
    filters = [choice.filter] if choice and choice.filter else _names(config, "filter_list", "name")
    for metric in metrics:
        available = [name for reported_metric, name in reported if reported_metric == metric]
        wanted = [name for name in filters if name in available]
        if wanted or (available and not (choice and choice.filter)):
            return metric, (wanted or available)[0]
    return metrics[0] if metrics else "", filters[0] if filters else "none"


def _names(config: Mapping[str, Any], key: str, name: str) -> list[str]:
    entries = config.get(key)
    listed = entries if isinstance(entries, list) else []
    return [str(entry[name]) for entry in listed if isinstance(entry, Mapping) and name in entry]


def _count_scored(
    log: Path, metric: str, answer_filter: str, *, likelihood: bool
) -> tuple[int, list[str]]:
    """Count the documents that were scored from whole answers; describe those that were not."""
    scored: set[str] = set()
    unusable: dict[str, str] = {}
    for row in _rows(log):
        if row.get("filter") != answer_filter:
            continue
        document = str(row.get("doc_id"))
        problem = _problem(row, metric, likelihood=likelihood)
        if problem:
            unusable[document] = problem
        else:
            scored.add(document)
    scored -= unusable.keys()
    if not unusable:
        return len(scored), []
    shown = [f"{document} ({why})" for document, why in [*unusable.items()][:_DOCUMENTS_SHOWN]]
    more = ", ..." if len(unusable) > len(shown) else ""
    return len(scored), [f"{len(unusable)} documents were not scored: {', '.join(shown)}{more}"]


def _rows(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a log, one JSON object in a line."""
    with open_regular(log, _REMEDY) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield parse_object(line, Path(f"{log}:{number}"), _REMEDY)


def _problem(row: Mapping[str, Any], metric: str, *, likelihood: bool) -> str:
    """Return why a document does not count as scored, or nothing."""
    values = row.get(metric)
    numbers = values if isinstance(values, list) else [values]
    if not numbers or any(_number(value) is None for value in numbers):
        return f"{metric} is not a number"
    answers = [*_leaves(row.get("resps"))]
    if not answers:
        return "no answer"
    if any(answer is None or answer == NULL_ANSWER for answer in answers):
        return "null answer"
    if likelihood and any(_parsed(answer) is None for answer in answers):
        return "log-probability is not finite"
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what nested lists hold, in any order, however deep they are."""
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, list):
            waiting.extend(entry)
        else:
            yield entry


def _parsed(answer: Any) -> float | None:
    """Return a logged log-probability; lm-eval writes numbers and truth values as text."""
    if answer in ("True", "False") or isinstance(answer, bool):
        return 0.0
    try:
        return _number(float(answer))
    except (TypeError, ValueError):
        return None


def _number(value: Any) -> float | None:
    """Return a finite number; per-document rates may be true or false."""
    if not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _completion_tokens(path: Path) -> dict[str, list[tuple[float, int]]]:
    if not path.exists():
        return {}
    lengths = {}
    for task, entry in read_object(path, _REMEDY).items():
        stated = entry if isinstance(entry, Mapping) else {}
        mean, count = _number(stated.get("mean")), _whole(stated.get("count"))
        if mean is None or mean < 0 or not count:
            raise ProbeError(path, f"{task} needs a finite mean and a positive count", _REMEDY)
        lengths[task] = [(mean, count)]
    return lengths
