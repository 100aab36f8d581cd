"""Read what lm-evaluation-harness wrote: scores, and what truly stands behind them.

lm-eval ends with exit code 0 when a server answered null or with NaN log-probabilities, and its
accuracy then looks plausible. So a document counts as scored only if its metric is a number and
every answer it was computed from is one; the log of samples is the evidence, and without it no
count is given. Scores are taken as lm-eval aggregated them, beside what follows from the samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from conductor.probes import sample_evidence
from conductor.probes.harness_settings import (
    ALWAYS_RECORDED,
    is_sampled,
    places_of,
    settings_of,
)
from conductor.probes.reading import ProbeError, read_object
from conductor.probes.sample_log import (
    NULL_ANSWER,
    REMEDY,
    DocumentId,
    Plan,
    Reading,
    SampleLog,
    document_id,
    finite,
    merge_logs,
    read_log,
    sum_known,
)

__all__ = [
    "COMPLETION_TOKENS_FILE",
    "NULL_ANSWER",
    "PLAN_FILE",
    "EvaluationResults",
    "MetricChoice",
    "TaskResult",
    "differing_questions",
    "merge_results",
    "probe_results",
]

COMPLETION_TOKENS_FILE = "completion_tokens.json"
PLAN_FILE = "planned.json"
"""What was to be asked, written before anything is: {task: {version, size, documents, repeat}}."""

FACTS_FILE = "harness_facts.json"
"""What the evaluation counted beside lm-eval: {"context_overflow": {task: cut prompts}}."""

RATE_METRICS = re.compile(
    r"(\w+_)?acc(_norm|_bytes|_mutual_info|uracy)?|exact_match|em|f1|pass@\d+|pass_at_\d+"
)
"""Metrics that lm-eval reports as a share from 0 to 1."""

_AGGREGATIONS = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    "mcc": "matthews_corrcoef",
    **{name: name for name in ("f1", "bleu", "chrf", "chrf++", "ter", "brier_score", "bypass")},
}
"""How lm-eval aggregates a metric whose task does not say; all others are means."""

_LOWER_IS_BETTER = (
    *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
    *("ter", "brier_score"),
)
_TOLD_OF_EVERY_TASK = (
    *("version", "shots", "output_type", "higher_is_better"),
    *("documents", "prompts", "targets"),
)

_LIKELIHOOD_OUTPUTS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
_SCORING = ("output_type", "repeats", "filter_list", "metric_list")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_LARGEST_PLAN = 100_000_000
_PREFIX = "results_"
_TASK_SECTIONS = ("results", "configs", "n-samples")
"""Where a results document names its tasks; one that has no results was asked and got lost."""
_DIGEST_BYTES = 16

_BATCHES_MAY_DIFFER = re.compile(r"limit|seeds\..*|model_args\.seed")
"""Settings that differ between batches of one side: other questions, or fresh draws."""


@dataclass(frozen=True, kw_only=True)
class MetricChoice:
    """Which metric of a task is its score; without a filter, the task's first."""

    metric: str
    filter: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task: score and standard error on the metric's own scale, and sample counts.

    ``None`` means that the results do not say; ``errors`` are sentences for the reader.
    ``generation`` says how answers were generated, ``scoring`` how they become scores, ``size`` how
    many documents the whole benchmark has, ``context_overflow`` how many prompts were cut to fit
    the model. ``log`` is what the log of samples says.
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
    aggregation: str = "mean"
    size: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=dict)
    task_hash: str | None = None
    context_overflow: int | None = None
    log: SampleLog | None = field(default=None, compare=False, repr=False)

    def run_entry(self) -> dict[str, Any]:
        """Return the task as a run summary lists it. lm-eval writes results only when it ends."""
        audit = None
        if self.log:
            audit = sample_evidence.audit(
                self.log,
                sampled=is_sampled(self.generation),
                context_overflow=self.context_overflow,
                task_hash=self.task_hash,
            )
        entry = {
            "scored_samples": self.scored_samples,
            "scale": self.scale,
            "stderr": self.stderr,
            "audit": audit,
        }
        return {
            "status": "SUCCESS",
            "expected_samples": self.expected_samples,
            "score": self.score,
            "errors": [{"kind": "other", "message": error} for error in self.errors],
            "metric": f"{self.metric},{self.filter}",
            **{name: value for name, value in entry.items() if value is not None},
        }

    def samples_entry(self) -> dict[str, Any] | None:
        """Return the task's questions and scores; nothing without a usable log.

        Raises:
            ValueError: some questions have more answers than others.
        """
        questions = sample_evidence.samples(self.log) if self.log else None
        if questions is None:
            return None
        asked = len(questions["questions"])
        return {
            "metric": self.metric,
            "filter": self.filter,
            "aggregation": self.aggregation,
            "higher_is_better": self.higher_is_better,
            "scale": self.scale,
            "sampled": is_sampled(self.generation),
            "size": self.size if self.size is not None and self.size >= asked else None,
            **questions,
        }

    def conditions(self) -> dict[str, object]:
        """Return how the task was asked, as far as the results say."""
        conditions: dict[str, object] = {
            "version": self.version,
            "hash": self.task_hash,
            "metric": self.metric,
            "filter": self.filter,
            "higher_is_better": self.higher_is_better,
            "aggregation": self.aggregation,
            "shots": self.fewshot,
            "size": self.size,
            "generation": dict(self.generation),
            **self.scoring,
        }
        for name, hashes in _hashes(self).items():
            conditions[name] = _digest(hashes)
        return conditions


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """One evaluation of one model.

    ``completion_tokens`` are {task: [(mean length in tokens, documents)]} of generation tasks, and
    empty where nobody counted. ``versions`` are those of the software that evaluated, ``settings``
    those that hold for all tasks. ``places`` are where its tokenizer
    and cached answers were read.
    """

    tasks: Mapping[str, TaskResult]
    completion_tokens: Mapping[str, list[tuple[float, int]]]
    model: str
    versions: Mapping[str, str]
    results_file: Path = field(compare=False)
    settings: Mapping[str, object] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def run_summary(self) -> dict[str, Any]:
        """Return the run summary that the run gate reads."""
        return {"tasks": {name: task.run_entry() for name, task in self.tasks.items()}}

    def samples(self, *, checkpoint: str | None = None) -> dict[str, Any]:
        """Return the samples document: each question of each task that has a usable log.

        ``checkpoint`` says of which checkpoint, by digest or path.

        Raises:
            ProbeError: a task has more answers to some questions than to others.
        """
        tasks = {}
        for name, task in self.tasks.items():
            try:
                entry = task.samples_entry()
            except ValueError as error:
                remedy = "ask every question equally often"
                raise ProbeError(self.results_file, f"{name}: {error}", remedy) from None
            if entry is not None:
                tasks[name] = entry
        return {"tasks": tasks, **({"checkpoint": checkpoint} if checkpoint else {})}

    def conditions(self) -> dict[str, object]:
        """Return how the harness asked, setting by setting; both sides must share all of them."""
        conditions = dict(self.settings)
        for name, task in self.tasks.items():
            for setting, value in task.conditions().items():
                conditions[f"tasks.{name}.{setting}"] = value
        return conditions

    def unrecorded(self) -> list[str]:
        """Return the conditions that every run has and this one does not tell."""
        asked = {name: task.conditions() for name, task in self.tasks.items()}
        silent = {
            setting: [name for name in asked if asked[name][setting] is None]
            for setting in _TOLD_OF_EVERY_TASK
        }
        return [name for name in ALWAYS_RECORDED if name not in self.settings] + [
            f"tasks.{name}.{setting}"
            for setting, names in silent.items()
            for name in (["*"] if len(names) == len(asked) else names)
        ]

    def upside_down(self) -> list[str]:
        """Return the tasks whose direction is not that of a metric which lm-eval knows."""
        return [
            name
            for name, task in self.tasks.items()
            if task.higher_is_better is not None
            and (
                (RATE_METRICS.fullmatch(task.metric) and not task.higher_is_better)
                or (task.metric in _LOWER_IS_BETTER and task.higher_is_better)
            )
        ]

    def scores(self) -> dict[str, float | None]:
        """Return {task: score}; a task without a usable score is listed with ``None``."""
        return {name: task.score for name, task in self.tasks.items()}

    def scales(self) -> dict[str, float]:
        """Return the full score of each task where the metric has a known one."""
        return {name: task.scale for name, task in self.tasks.items() if task.scale is not None}


def probe_results(
    results_dir: Path,
    *,
    choices: Mapping[str, MetricChoice] | None = None,
    clusters: Mapping[str, str] | None = None,
) -> EvaluationResults:
    """Return the newest evaluation in a directory.

    ``choices`` say which metric counts for a task; a task they leave out is scored by its first
    metric. ``clusters`` name the field of a task's documents by which its questions belong
    together. Groups are skipped: they have no documents of their own.

    Raises:
        ProbeError: there are no results, those of several models, or a file that cannot be read.
    """
    file = _newest_results(results_dir)
    source = _Source(
        document=read_object(file, REMEDY),
        file=file,
        plan_file=results_dir / PLAN_FILE,
        plan=_optional_object(results_dir / PLAN_FILE),
        overflows=_mapping(_optional_object(results_dir / FACTS_FILE), "context_overflow"),
    )
    listed = [name for section in _TASK_SECTIONS for name in _mapping(source.document, section)]
    tasks = {
        name: source.task(name, (choices or {}).get(name), (clusters or {}).get(name))
        for name in dict.fromkeys(listed)
        if name not in _groups(source.document)
    }
    if not tasks.keys() & _mapping(source.document, "results").keys():
        raise ProbeError(file, "has no task in results", REMEDY)
    return EvaluationResults(
        tasks=tasks,
        completion_tokens=_completion_tokens(results_dir / COMPLETION_TOKENS_FILE),
        model=str(source.document.get("model_name") or file.parent.name),
        versions={
            name: str(source.document[f"{name}_version"])
            for name in ("lm_eval", "transformers")
            if source.document.get(f"{name}_version")
        },
        results_file=file,
        settings=settings_of(source.document),
        places=places_of(source.document),
    )


def _optional_object(path: Path) -> Mapping[str, Any]:
    return read_object(path, REMEDY) if path.exists() else {}


def _newest_results(results_dir: Path) -> Path:
    """Return the latest results file by the time in its name."""
    if not results_dir.is_dir():
        raise ProbeError(results_dir, "is no directory", "give lm-eval's --output_path")
    files = [path for path in results_dir.rglob(f"{_PREFIX}*.json") if path.is_file()]
    if not files:
        raise ProbeError(results_dir, f"holds no {_PREFIX}*.json", REMEDY)
    models = sorted({path.parent.name for path in files})
    if len(models) > 1:
        raise ProbeError(
            results_dir,
            f"holds results of several models ({', '.join(models)})",
            "give the directory of one of them",
        )
    newest = max(files, key=lambda path: path.name)
    _refuse_older_tasks(newest, files)
    return newest


def _refuse_older_tasks(newest: Path, files: Iterable[Path]) -> None:
    """Refuse results of which some tasks stand in an older file alone: they would be left out."""
    tasks = _mapping(read_object(newest, REMEDY), "results").keys()
    for file in files:
        older = [] if file == newest else _mapping(read_object(file, REMEDY), "results")
        left_out = [name for name in older if name not in tasks]
        if left_out:
            raise ProbeError(
                newest,
                f"is the newest results file and has no {', '.join(left_out)}, which {file.name} "
                "has",
                "give each evaluation a directory of its own, or ask all tasks in one",
            )


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def _groups(document: Mapping[str, Any]) -> set[str]:
    subtasks = _mapping(document, "group_subtasks")
    return {*_mapping(document, "groups"), *(name for name, members in subtasks.items() if members)}


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The documents that one evaluation left beside its logs of samples."""

    document: Mapping[str, Any]
    file: Path
    plan_file: Path
    plan: Mapping[str, Any]
    overflows: Mapping[str, Any]

    def of(self, section: str, task: str) -> Any:
        """Return what a section of the results says of a task."""
        return _mapping(self.document, section).get(task)

    def task(self, task: str, choice: MetricChoice | None, cluster_field: str | None) -> TaskResult:
        """Return one task, from its results and its log of samples."""
        config = _mapping(_mapping(self.document, "configs"), task)
        values = _mapping(_mapping(self.document, "results"), task)
        metric, answer_filter = _chosen(values, config, choice)
        score = finite(values.get(f"{metric},{answer_filter}"))
        errors = [] if score is not None else [f"no usable score for {metric},{answer_filter}"]
        reading = Reading(
            metric=metric,
            filter=answer_filter,
            aggregation=_aggregation(config, metric),
            likelihood=_is_likelihood(config),
            plan=self.planned(task),
            filters=tuple(name for reported, name in _reported(values) if reported == metric),
            contrasted="acc_mutual_info" in _names(config, "metric_list", "metric"),
            cluster_field=cluster_field,
        )
        stamp = self.file.name.removeprefix(_PREFIX).removesuffix(".json")
        path = self.file.with_name(f"samples_{task.replace('/', '_')}_{stamp}.jsonl")
        log = read_log(path, reading) if path.is_file() else None
        if log:
            errors += log.problems()
        else:
            errors.append(f"no sample log {path.name}: cannot tell how many documents were scored")
        if reading.plan.count is None:
            errors.append(
                f"n-samples.{task}.effective is no number: cannot tell what was to be asked"
            )
        better = _mapping(_mapping(self.document, "higher_is_better"), task).get(metric)
        version, task_hash = self.of("versions", task), self.of("task_hashes", task)
        return TaskResult(
            task=task,
            metric=metric,
            filter=answer_filter,
            score=score,
            stderr=finite(values.get(f"{metric}_stderr,{answer_filter}")),
            expected_samples=reading.plan.count,
            scored_samples=log.scored if log else None,
            higher_is_better=better if isinstance(better, bool) else None,
            scale=1.0 if RATE_METRICS.fullmatch(metric) else None,
            version=None if version is None else str(version),
            fewshot=_whole(self.of("n-shot", task)),
            errors=tuple(errors),
            aggregation=reading.aggregation,
            size=reading.plan.size,
            generation=_mapping(config, "generation_kwargs"),
            scoring=_scoring(config),
            task_hash=task_hash if isinstance(task_hash, str) else None,
            context_overflow=_whole(self.overflows.get(task)),
            log=log,
        )

    def planned(self, task: str) -> Plan:
        """Return what was to be asked: as it was written down before, or counted by lm-eval."""
        counts = _mapping(_mapping(self.document, "n-samples"), task)
        size, count = _whole(counts.get("original")), _whole(counts.get("effective"))
        if count is not None and count > _LARGEST_PLAN:
            problem = f"n-samples.{task}.effective is larger than {_LARGEST_PLAN}"
            raise ProbeError(self.file, problem, REMEDY)
        if task in self.plan:
            return _written_plan(self.plan[task], task, self.plan_file)
        # lm-eval asks the first ones, or with --samples, of which it keeps no record, any.
        any_subset = (
            _mapping(self.document, "config").get("limit") is None
            and count is not None
            and size is not None
            and count < size
        )
        documents = None if count is None or any_subset else range(count)
        return Plan(documents=documents, count=count, size=size)


def _is_likelihood(config: Mapping[str, Any]) -> bool | None:
    """Tell whether log-likelihoods are what a task asks for, where it says what."""
    output = config.get("output_type")
    return output in _LIKELIHOOD_OUTPUTS if isinstance(output, str) else None


def _scoring(config: Mapping[str, Any]) -> dict[str, object]:
    """Return how a task makes scores of answers; functions are written with their address."""
    return {name: _without_addresses(config.get(name)) for name in _SCORING}


def _without_addresses(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_addresses(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_addresses(entry) for entry in value]
    return _ADDRESS.sub("", value) if isinstance(value, str) else value


def _written_plan(entry: Any, task: str, path: Path) -> Plan:
    """Read one task of the plan that an evaluation wrote before it asked anything."""
    stated = _mapping({"entry": entry}, "entry")
    documents = stated.get("documents")
    repeat = stated.get("repeat", 0)
    if (
        not isinstance(documents, Mapping)
        or not all(each is None or isinstance(each, str) for each in documents.values())
        or _whole(repeat) is None
    ):
        problem = f"{task} needs documents {{id: hash}} and a repeat that is a whole number"
        raise ProbeError(path, problem, REMEDY)
    hashes: dict[DocumentId, str | None] = {document_id(n): each for n, each in documents.items()}
    return Plan(documents=hashes, count=len(hashes), size=_whole(stated.get("size")), repeat=repeat)


def _reported(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return metric and filter of every score of a task."""
    keys = (key.split(",", 1) for key in values if "," in key and "_stderr," not in key)
    return [(metric, name) for metric, name in keys]


def _chosen(
    values: Mapping[str, Any], config: Mapping[str, Any], choice: MetricChoice | None
) -> tuple[str, str]:
    """Return metric and filter: as chosen, or the task's first metric and first filter."""
    reported = _reported(values)
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
    return [str(entry[name]) for entry in _entries(config, key) if name in entry]


def _entries(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    entries = config.get(key)
    listed = entries if isinstance(entries, list) else []
    return [entry for entry in listed if isinstance(entry, Mapping)]


def _aggregation(config: Mapping[str, Any], metric: str) -> str:
    """Return how a task's score comes from its documents: as the task says, or as lm-eval does.

    A metric that a task lists under another name is aggregated as the task's others are; a
    function of the task's own is called ``custom``.
    """
    entries = _entries(config, "metric_list")
    own = [entry for entry in entries if entry.get("metric") == metric]
    stated = {
        str(entry.get("aggregation") or _AGGREGATIONS.get(str(entry.get("metric")), "mean"))
        for entry in own or entries
    }
    name = stated.pop() if len(stated) == 1 else _AGGREGATIONS.get(metric, "mean")
    return name if re.fullmatch(r"[\w+]{1,40}", name) and not stated else "custom"


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _completion_tokens(path: Path) -> dict[str, list[tuple[float, int]]]:
    lengths = {}
    for task, entry in _optional_object(path).items():
        stated = entry if isinstance(entry, Mapping) else {}
        mean, count = finite(stated.get("mean")), _whole(stated.get("count"))
        if mean is None or mean < 0 or not count:
            raise ProbeError(path, f"{task} needs a finite mean and a positive count", REMEDY)
        lengths[task] = [(mean, count)]
    return lengths


def _hashes(task: TaskResult) -> dict[str, dict[DocumentId, str]]:
    """Return the hash of each document, prompt and target by document; empty where nobody knows."""
    found: dict[str, dict[DocumentId, str]] = {"documents": {}, "prompts": {}, "targets": {}}
    for column in task.log.columns.values() if task.log else ():
        for document, key, texts, target in zip(
            column.documents, column.keys, column.texts, column.targets, strict=True
        ):
            _, found["documents"][document], prompt = key.rsplit(":", 2)
            found["prompts"][document] = prompt + texts
            found["targets"][document] = target
    return found


def _digest(hashes: Mapping[DocumentId, str]) -> str | None:
    """Return one digest over hashes by document, in any order; ``None`` where none is known."""
    if not any(hashes.values()):
        return None
    lines = sorted(f"{document}:{value}" for document, value in hashes.items())
    text = "\n".join(lines).encode(errors="surrogatepass")
    return blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()


def differing_questions(
    baseline: EvaluationResults, candidate: EvaluationResults
) -> dict[str, str]:
    """Say of each condition about single questions that differs how many do, and which first.

    The keys are those of ``conditions()``, such as ``tasks.gsm8k.prompts``.
    """
    sentences = {}
    for name in baseline.tasks.keys() & candidate.tasks.keys():
        sides = _hashes(baseline.tasks[name]), _hashes(candidate.tasks[name])
        for setting in sides[0]:
            first, second = (side[setting] for side in sides)
            differing = [
                each for each in {**first, **second} if first.get(each) != second.get(each)
            ]
            if differing:
                sentences[f"tasks.{name}.{setting}"] = (
                    f"{len(differing)} of {len({**first, **second})} {setting} differ, "
                    f"first that of doc {differing[0]}"
                )
    return sentences


def merge_results(batches: Sequence[EvaluationResults]) -> EvaluationResults:
    """Return several evaluations of one side as one: more questions, or more answers to them.

    Scores are worked out again over all questions. What was asked twice under the same repeat is
    counted as duplicated.

    Raises:
        ProbeError: batches were made under different conditions, or one has no log of samples.
    """
    first, *others = batches
    if not others:
        return first
    for batch in others:
        _refuse_other_conditions(first, batch)
    names = dict.fromkeys(name for batch in batches for name in batch.tasks)
    last = batches[-1]
    return EvaluationResults(
        tasks={
            name: _merged_task([batch for batch in batches if name in batch.tasks], name)
            for name in names
        },
        completion_tokens={
            name: [entry for batch in batches for entry in batch.completion_tokens.get(name, ())]
            for name in names
            if any(name in batch.completion_tokens for batch in batches)
        },
        model=last.model,
        versions=last.versions,
        results_file=last.results_file,
        settings={
            name: _one_or_all(batch.settings.get(name) for batch in batches)
            for name in first.settings
        },
        places=last.places,
    )


def _one_or_all(values: Iterable[object]) -> object:
    """Return the value that all have, or the different ones in their order."""
    different: list[object] = []
    for value in values:
        if value not in different:
            different.append(value)
    return different[0] if len(different) == 1 else different


def _refuse_other_conditions(first: EvaluationResults, batch: EvaluationResults) -> None:
    """Refuse a batch that was asked otherwise than the first; other questions are its purpose."""
    shared = first.tasks.keys() & batch.tasks.keys()
    sides = [
        {
            **{
                n: value
                for n, value in side.settings.items()
                if not _BATCHES_MAY_DIFFER.fullmatch(n)
            },
            **{
                f"tasks.{name}.{setting}": value
                for name in shared
                for setting, value in side.tasks[name].conditions().items()
                if setting not in ("hash", "documents", "prompts", "targets")
            },
            "model": side.model,
        }
        for side in (first, batch)
    ]
    for name in sorted({*sides[0], *sides[1]}):
        values = [side.get(name) for side in sides]
        if values[0] != values[1]:
            raise ProbeError(
                batch.results_file,
                f"{name} is {values[1]!r:.80}, but {values[0]!r:.80} in {first.results_file}",
                "put together only batches that were asked alike",
            )


def _merged_task(batches: Sequence[EvaluationResults], name: str) -> TaskResult:
    """Put the batches of one task together."""
    parts = [batch.tasks[name] for batch in batches]
    if len(parts) == 1:
        return parts[0]
    logs = [part.log for part in parts if part.log]
    if len(logs) < len(parts):
        bare = next(batch for batch in batches if not batch.tasks[name].log)
        raise ProbeError(bare.results_file, f"{name} has no log of samples", REMEDY)
    log = merge_logs(logs)
    _refuse_other_prompts(log, name, batches[-1].results_file)
    score = log.recomputed()
    errors = log.problems()
    if score is None:
        errors.append(f"no score of all batches: {parts[0].aggregation} cannot be worked out")
    hashes = {part.task_hash for part in parts}
    return TaskResult(
        **{
            **{each: getattr(parts[0], each) for each in _CARRIED_OVER},
            "score": score,
            "stderr": log.standard_error(),
            "expected_samples": log.planned,
            "scored_samples": log.scored,
            "errors": tuple(errors),
            "task_hash": hashes.pop() if len(hashes) == 1 else None,
            "context_overflow": sum_known(part.context_overflow for part in parts),
            "log": log,
        }
    )


_CARRIED_OVER = (
    *("task", "metric", "filter", "higher_is_better", "scale", "version", "fewshot"),
    *("aggregation", "size", "generation", "scoring"),
)
"""What all batches of a task agree on."""


def _refuse_other_prompts(log: SampleLog, task: str, path: Path) -> None:
    """Refuse a question that was put in other words when it was asked again."""
    keys: dict[DocumentId, str] = {}
    for column in log.columns.values():
        for document, key in zip(column.documents, column.keys, strict=True):
            if keys.setdefault(document, key) != key:
                problem = f"{task}: doc {document} was asked with another prompt or content before"
                raise ProbeError(path, problem, "put together only batches that were asked alike")
