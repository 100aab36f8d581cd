"""The lm-eval probe, on a real evaluation of a small model and on changes to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conductor.probes.lm_eval import NULL_ANSWER, MetricChoice, probe_results
from conductor.probes.reading import ProbeError
from gates import FailureClass, evaluate_run

RECORDED = Path(__file__).parent / "data" / "lm_eval_results"
"""lm-eval 0.4.13 on 5 questions of a multiple-choice and a generation task, in one group."""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "results"))


def only(results: Path, pattern: str) -> Path:
    (path,) = results.rglob(pattern)
    return path


def change_results(results: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = only(results, "results_*.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def change_rows(results: Path, task: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path = only(results, f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_recorded_evaluation() -> None:
    found = probe_results(RECORDED)
    assert list(found.tasks) == ["compare", "reverse"]
    assert found.scores() == {"compare": 0.8, "reverse": 1.0}
    assert found.scales() == {"compare": 1.0, "reverse": 1.0}
    assert (found.model, found.versions["lm_eval"]) == ("tiny", "0.4.13")
    assert found.completion_tokens == {"reverse": [(9.4, 5)]}
    compare, reverse = found.tasks.values()
    assert (compare.metric, compare.filter, compare.higher_is_better) == ("acc", "none", True)
    assert compare.stderr == pytest.approx(0.2)
    assert (compare.expected_samples, compare.scored_samples) == (5, 5)
    assert (compare.version, compare.fewshot, compare.errors) == ("1.0", 0, ())
    assert (reverse.metric, reverse.filter) == ("exact_match", "strict")
    assert evaluate_run(found.run_summary()).passed


@pytest.mark.parametrize(
    ("choice", "metric", "score"),
    [
        (MetricChoice(metric="acc_norm"), "acc_norm,none", 0.6),
        (MetricChoice(metric="acc", filter="none"), "acc,none", 0.8),
        (MetricChoice(metric="f1"), "f1,none", None),
        (MetricChoice(metric="acc", filter="other"), "acc,other", None),
    ],
    ids=["metric", "metric-and-filter", "metric-not-there", "filter-not-there"],
)
def test_chosen_metric(choice: MetricChoice, metric: str, score: float | None) -> None:
    task = probe_results(RECORDED, choices={"compare": choice}).tasks["compare"]
    assert (f"{task.metric},{task.filter}", task.score) == (metric, score)
    assert bool(task.errors) is (score is None)


def test_chosen_filter_counts_its_own_rows(results: Path) -> None:
    change_rows(
        results,
        "reverse",
        lambda rows: rows.remove(next(row for row in rows if row["filter"] == "loose")),
    )
    for name, scored in ("loose", 4), ("strict", 5):
        choices = {"reverse": MetricChoice(metric="exact_match", filter=name)}
        assert probe_results(results, choices=choices).tasks["reverse"].scored_samples == scored


def first(**changes: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[0].update(changes)


UNSCORED: dict[str, tuple[str, Callable[[list[dict[str, Any]]], object], str]] = {
    "nan-log-probability": (
        "compare",
        first(resps=[[["nan", "False"]], [["-1.0", "False"]]]),
        "log-probability is not finite",
    ),
    "infinite-log-probability": (
        "compare",
        first(resps=[[["-inf", "False"]], [["-1.0", "False"]]]),
        "log-probability is not finite",
    ),
    "word-for-log-probability": (
        "compare",
        first(resps=[[["None", "False"]], [["-1.0", "False"]]]),
        "log-probability is not finite",
    ),
    "null-response": ("reverse", first(resps=[[None]]), "null answer"),
    "answer-never-given": ("reverse", first(resps=[[NULL_ANSWER]]), "null answer"),
    "no-response": ("reverse", first(resps=[]), "no answer"),
    "metric-nan": ("compare", first(acc=float("nan")), "acc is not a number"),
    "metric-null": ("compare", first(acc=None), "acc is not a number"),
    "metric-text": ("compare", first(acc="1.0"), "acc is not a number"),
    "metric-absent": ("compare", lambda rows: rows[0].pop("acc"), "acc is not a number"),
    "metric-empty-list": ("compare", first(acc=[]), "acc is not a number"),
}


@pytest.mark.parametrize(("task", "change", "why"), UNSCORED.values(), ids=UNSCORED.keys())
def test_document_that_was_not_scored(
    results: Path, task: str, change: Callable[[list[dict[str, Any]]], object], why: str
) -> None:
    change_rows(results, task, change)
    found = probe_results(results)
    assert found.tasks[task].scored_samples == 4
    assert found.tasks[task].errors == (f"1 documents were not scored: 0 ({why})",)
    verdict = evaluate_run(found.run_summary())
    assert verdict.failure_class is FailureClass.SAMPLE_ACCOUNTING_FAILED


@pytest.mark.parametrize(
    "change",
    [first(acc=True), first(acc=[True, 0.5]), first(resps=[[["-1e3", "True"]], [["-2", "False"]]])],
    ids=["truth-value", "list-of-numbers", "numbers-as-text"],
)
def test_document_that_was_scored(
    results: Path, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    change_rows(results, "compare", change)
    assert probe_results(results).tasks["compare"].scored_samples == 5


def test_answer_that_reads_like_nan_is_text(results: Path) -> None:
    change_rows(results, "reverse", first(resps=[["nan"]]))
    assert probe_results(results).tasks["reverse"].scored_samples == 5


def test_documents_are_counted_once(results: Path) -> None:
    change_rows(results, "compare", lambda rows: rows.append(rows[0]))
    assert probe_results(results).tasks["compare"].scored_samples == 5
    change_rows(results, "compare", lambda rows: rows.pop(1))
    assert probe_results(results).tasks["compare"].scored_samples == 4


def test_document_logged_once_well_and_once_badly_is_not_scored(results: Path) -> None:
    change_rows(results, "compare", lambda rows: rows.append({**rows[0], "acc": None}))
    assert probe_results(results).tasks["compare"].scored_samples == 4


def test_sample_log_of_another_time_is_not_used(results: Path) -> None:
    log = only(results, "samples_compare_*.jsonl")
    log.rename(log.with_name("samples_compare_2001-01-01T00-00-00.jsonl"))
    found = probe_results(results)
    task = found.tasks["compare"]
    assert task.scored_samples is None
    assert "no sample log" in task.errors[0]
    assert "scored_samples" not in found.run_summary()["tasks"]["compare"]
    verdict = evaluate_run(found.run_summary())
    assert verdict.failure_class is FailureClass.SAMPLE_ACCOUNTING_FAILED


@pytest.mark.parametrize("value", [float("nan"), None, "0.8", 10**400], ids=str)
def test_score_that_is_no_number(results: Path, value: object) -> None:
    change_results(results, lambda d: d["results"]["compare"].update({"acc,none": value}))
    found = probe_results(results)
    assert found.scores()["compare"] is None
    assert not evaluate_run(found.run_summary()).passed


def test_standard_error_that_is_not_available(results: Path) -> None:
    change_results(results, lambda d: d["results"]["compare"].update({"acc_stderr,none": "N/A"}))
    found = probe_results(results)
    assert found.tasks["compare"].stderr is None
    assert evaluate_run(found.run_summary()).passed


def test_missing_sample_plan_fails_the_gate(results: Path) -> None:
    change_results(results, lambda d: d["n-samples"].pop("compare"))
    found = probe_results(results)
    assert found.tasks["compare"].expected_samples is None
    assert not evaluate_run(found.run_summary()).passed


def test_first_metric_is_the_tasks_own_first(results: Path) -> None:
    def reorder(document: dict[str, Any]) -> None:
        document["configs"]["compare"]["metric_list"].reverse()

    change_results(results, reorder)
    assert probe_results(results).tasks["compare"].metric == "acc_norm"
    change_results(results, lambda d: d["configs"]["compare"].pop("metric_list"))
    assert probe_results(results).tasks["compare"].metric == "acc"


SCALES = {
    "acc": 1.0,
    "acc_norm": 1.0,
    "exact_match": 1.0,
    "f1": 1.0,
    "pass@1": 1.0,
    "prompt_level_strict_acc": 1.0,
    "bleu": None,
    "word_perplexity": None,
    "mcc": None,
    "accuracy_gap": None,
}


@pytest.mark.parametrize(("metric", "scale"), SCALES.items(), ids=SCALES.keys())
def test_scale_of_metric(results: Path, metric: str, scale: float | None) -> None:
    change_results(results, lambda d: d["results"]["compare"].update({f"{metric},none": 0.5}))
    choices = {"compare": MetricChoice(metric=metric)}
    assert probe_results(results, choices=choices).tasks["compare"].scale == scale


def test_newest_results_count(results: Path) -> None:
    file = only(results, "results_*.json")
    older = json.loads(file.read_text())
    older["results"] = {}
    file.with_name("results_2001-01-01T00-00-00.000000.json").write_text(json.dumps(older))
    assert probe_results(results).results_file == file


def test_directory_of_one_model_will_do() -> None:
    found = probe_results(RECORDED / "tiny")
    assert found.scores() == {"compare": 0.8, "reverse": 1.0}
    assert found.completion_tokens == {}


def _second_model(results: Path) -> None:
    shutil.copytree(results / "tiny", results / "other")


def _broken_line(results: Path) -> None:
    log = only(results, "samples_compare_*.jsonl")
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]))


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-directory": (shutil.rmtree, "is no directory"),
    "no-results": (lambda r: only(r, "results_*.json").unlink(), "holds no results_"),
    "several-models": (_second_model, "several models (other, tiny)"),
    "results-broken": (lambda r: only(r, "results_*.json").write_text("{"), "is not valid JSON"),
    "results-a-list": (lambda r: only(r, "results_*.json").write_text("[]"), "holds a JSON list"),
    "no-tasks": (lambda r: change_results(r, lambda d: d.pop("results")), "has no task"),
    "broken-line": (_broken_line, ".jsonl:2: is not valid JSON"),
    "line-a-number": (
        lambda r: only(r, "samples_reverse_*").write_text("1\n"),
        ".jsonl:1: holds a JSON int",
    ),
    "lengths-broken": (
        lambda r: (r / "completion_tokens.json").write_text("{"),
        "is not valid JSON",
    ),
    "length-nan": (
        lambda r: (r / "completion_tokens.json").write_text('{"a": {"mean": NaN, "count": 1}}'),
        "a needs a finite mean",
    ),
    "length-of-nothing": (
        lambda r: (r / "completion_tokens.json").write_text('{"a": {"mean": 1, "count": 0}}'),
        "a needs a finite mean and a positive count",
    ),
}


@pytest.mark.parametrize(("break_it", "problem"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_directory(
    results: Path, break_it: Callable[[Path], object], problem: str
) -> None:
    break_it(results)
    with pytest.raises(ProbeError) as caught:
        probe_results(results)
    assert problem in str(caught.value)
    assert caught.value.remedy
