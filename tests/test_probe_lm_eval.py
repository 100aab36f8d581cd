"""The lm-eval probe, on a real evaluation of a small model and on changes to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval_on_disk import (
    QUESTIONS,
    Row,
    change_results,
    change_rows,
    choice_row,
    only,
    text_row,
    write_plan,
    write_results,
)

from conductor.probes import reading, sample_log
from conductor.probes.lm_eval import (
    NULL_ANSWER,
    MetricChoice,
    differing_questions,
    merge_results,
    probe_results,
)
from conductor.probes.reading import ProbeError
from gates import FailureClass, evaluate_run
from gates.samples import parse_samples

RECORDED = Path(__file__).parent / "data" / "lm_eval_results"
"""lm-eval 0.4.13 on 5 questions of a multiple-choice and a generation task, in one group."""

KINDS = RECORDED.with_name("lm_eval_kinds")
"""lm-eval 0.4.13 on 6 documents: rolling and single log-likelihoods, and three draws of a text that
two filters score."""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "results"))


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


def _older_task(results: Path) -> None:
    newest = only(results, "results_*.json")
    newest.with_name("results_2026-01-01T00-00-00.json").write_text(
        json.dumps({"results": {"compare": {}, "forgotten": {}}})
    )


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-directory": (shutil.rmtree, "is no directory"),
    "no-results": (lambda r: only(r, "results_*.json").unlink(), "holds no results_"),
    "several-models": (_second_model, "several models (other, tiny)"),
    "results-broken": (lambda r: only(r, "results_*.json").write_text("{"), "is not valid JSON"),
    "results-a-list": (lambda r: only(r, "results_*.json").write_text("[]"), "holds a JSON list"),
    "no-tasks": (lambda r: change_results(r, lambda d: d.pop("results")), "has no task"),
    "older-tasks": (
        _older_task,
        "is the newest results file and has no forgotten, which results_2026-01-01",
    ),
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


def test_log_larger_than_any_is_refused(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_log, "LARGEST_JSON_BYTES", 2000)
    with pytest.raises(ProbeError, match=r"jsonl:1: has more than 2000 bytes"):
        change_rows(results, "compare", lambda rows: rows[0].update(doc="x" * 3000))
        probe_results(results)


def test_more_planned_documents_than_there_are_anywhere(results: Path) -> None:
    change_results(results, lambda d: d["n-samples"]["compare"].update(effective=10**12))
    with pytest.raises(ProbeError, match=r"n-samples.compare.effective is larger than"):
        probe_results(results)


def test_reading_a_log_leaves_the_collector_on(results: Path) -> None:
    probe_results(results)
    assert reading.gc.isenabled()


AGGREGATED = [
    ("rolling", "word_perplexity", "weighted_perplexity", 6.0),
    ("rolling", "byte_perplexity", "weighted_perplexity", 38.0),
    ("rolling", "bits_per_byte", "bits_per_byte", 38.0),
    ("lastword", "perplexity", "perplexity", 1.0),
    ("lastword", "acc", "mean", None),
    ("drawn", "exact_match", "mean", None),
]


@pytest.mark.parametrize(("task", "metric", "aggregation", "weight"), AGGREGATED)
def test_recorded_score_follows_from_the_samples(
    task: str, metric: str, aggregation: str, weight: float | None
) -> None:
    found = probe_results(KINDS, choices={task: MetricChoice(metric=metric)})
    result = found.tasks[task]
    assert result.log
    assert result.score == pytest.approx(result.log.recomputed(), rel=1e-12)
    entry = found.samples()["tasks"][task]
    assert (entry["aggregation"], entry.get("weights")) == (aggregation, weight and [weight] * 6)
    assert evaluate_run(found.run_summary()).passed


def test_recorded_draws_are_one_score_per_question() -> None:
    found = probe_results(KINDS)
    entry = found.samples()["tasks"]["drawn"]
    assert entry["sampled"]
    assert set(entry["scores"]) == {0.0, 1.0}
    audit = found.run_summary()["tasks"]["drawn"]["audit"]
    assert audit["repeats"] == {
        "count": 3,
        "questions": 6,
        "identical_questions": 2,
        "sampled": True,
    }
    assert list(audit["filters"]) == ["first", "majority"]
    assert audit["answers"]["asked"] == 18


def test_samples_document(tmp_path: Path) -> None:
    found = probe_results(write_results(tmp_path / "r", original=1319), clusters={"words": "story"})
    document = found.samples(checkpoint="sha256:1")
    assert document["checkpoint"] == "sha256:1"
    words, choices = (document["tasks"][task] for task in ("words", "choices"))
    first = text_row(0)
    assert words["questions"][0] == f"0:{first['doc_hash'][:16]}:{first['prompt_hash'][:16]}"
    assert words["scores"] == [float(number % 5 != 0) for number in range(QUESTIONS)]
    assert words["clusters"][:4] == ["story 0", "story 0", "story 0", "story 1"]
    assert words["lengths"][:3] == [2.0, 3.0, 4.0]
    assert (words["answer_kind"], choices["answer_kind"]) == ("text", "loglikelihood")
    assert words["mean_answer_characters"] == pytest.approx(56 / 30)
    assert (words["size"], words["sampled"]) == (1319, False)
    assert choices["choice_logprobs"][1] == [-1.5 - 1 / 7, -0.5 - 1 / 11]
    assert not {"clusters", "lengths", "weights"} & choices.keys()
    parsed = parse_samples(document, "")
    assert parsed["words"].repeats == 1


def test_equal_digests_are_bit_identical_answers(tmp_path: Path) -> None:
    first, second = (probe_results(write_results(tmp_path / n)).samples() for n in ("a", "b"))
    assert first == second
    nudged = [choice_row(0), choice_row(1)]
    nudged[1]["resps"][0][0][0] = "-1.6428571428571430"
    rows = {"choices": nudged}
    third = probe_results(write_results(tmp_path / "c", rows, original=2, effective=2)).samples()
    answers = [each["tasks"]["choices"]["answers"][:2] for each in (first, third)]
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] != answers[1][1]


def test_unconditional_choices_are_left_out(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r", {"choices": [choice_row(n) for n in range(4)]})
    change_results(
        results,
        lambda d: d["configs"]["choices"]["metric_list"].append({"metric": "acc_mutual_info"}),
    )
    entry = probe_results(results).samples()["tasks"]["choices"]
    assert [len(each) for each in entry["choice_logprobs"]] == [1] * 4


def test_unusable_tasks_and_questions_are_no_samples(results: Path) -> None:
    only(results, "samples_compare_*").unlink()
    change_rows(results, "reverse", lambda rows: rows[0].update(resps=[[None]]))
    document = probe_results(results).samples()
    assert list(document["tasks"]) == ["reverse"]
    assert len(document["tasks"]["reverse"]["questions"]) == 4


@pytest.mark.parametrize(
    "row", [{"doc": {"question": "?"}}, {"doc": "text"}, {"doc": None}], ids=str
)
def test_document_without_its_cluster(tmp_path: Path, row: Row) -> None:
    results = write_results(tmp_path / "r")
    change_rows(results, "words", lambda rows: rows[3].update(row))
    with pytest.raises(ProbeError, match=r"jsonl:4: the document has no field 'story'"):
        probe_results(results, clusters={"words": "story"})


def test_repeats_are_lists_of_scores(tmp_path: Path) -> None:
    rows = [
        text_row(number, repeat=repeat, resps=[[f"{number} {repeat}"]], exact_match=float(repeat))
        for repeat in range(2)
        for number in range(QUESTIONS)
    ]
    found = probe_results(
        write_results(tmp_path / "r", {"words": rows}, generation={"do_sample": True})
    )
    document = found.samples()
    entry = document["tasks"]["words"]
    assert entry["scores"][0] == [0.0, 1.0]
    assert len(set(entry["answers"])) == QUESTIONS
    assert parse_samples(document, "")["words"].repeats == 2
    assert (found.tasks["words"].expected_samples, found.tasks["words"].scored_samples) == (30, 30)


def test_conditions(tmp_path: Path) -> None:
    conditions = probe_results(write_results(tmp_path / "r")).conditions()
    assert conditions["harness.lm_eval"] == "0.4.13"
    assert conditions["model_args.num_concurrent"] == 8
    assert conditions["tasks.words.generation"] == {"temperature": 0.0}
    assert conditions["tasks.words.shots"] == 0
    assert not {"model_args.model", "model_args.base_url", "model_args.api_key"} & conditions.keys()


def test_arguments_as_the_command_line_has_them(results: Path) -> None:
    stated = {"model_args": "pretrained=/a,dtype=bfloat16,token=x"}
    change_results(results, lambda d: d.update(config=stated))
    conditions = probe_results(results).conditions()
    arguments = {name for name in conditions if name.startswith("model_args.")}
    assert arguments == {"model_args.dtype"}


OTHER_CONDITIONS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "version": (
        lambda r: change_results(r, lambda d: d["versions"].update(words=2.0)),
        {"tasks.words.version"},
    ),
    "prompt": (
        lambda r: change_rows(r, "words", lambda rows: rows[7].update(prompt_hash="f" * 64)),
        {"tasks.words.prompts"},
    ),
    "text-under-the-same-hash": (
        lambda r: change_rows(
            r, "words", lambda rows: rows[7].update(arguments={"gen_args_0": {"arg_0": "Hi"}})
        ),
        {"tasks.words.prompts"},
    ),
    "target": (
        lambda r: change_rows(r, "words", lambda rows: rows[7].update(target_hash="f" * 64)),
        {"tasks.words.targets"},
    ),
    "filters": (
        lambda r: change_results(
            r, lambda d: d["configs"]["words"].update(filter_list=[{"name": "none"}])
        ),
        {"tasks.words.filter_list"},
    ),
    "metric-options": (
        lambda r: change_results(
            r, lambda d: d["configs"]["words"]["metric_list"][0].update(ignore_case=True)
        ),
        {"tasks.words.metric_list"},
    ),
    "document": (
        lambda r: change_rows(r, "choices", lambda rows: rows[7].update(doc_hash="f" * 64)),
        {"tasks.choices.documents"},
    ),
    "temperature": (
        lambda r: change_results(
            r, lambda d: d["configs"]["words"]["generation_kwargs"].update(temperature=0.5)
        ),
        {"tasks.words.generation"},
    ),
    "template": (
        lambda r: change_results(r, lambda d: d.update(chat_template_sha="abc")),
        {"chat_template_sha"},
    ),
    "concurrency": (
        lambda r: change_results(r, lambda d: d["config"]["model_args"].update(num_concurrent=1)),
        {"model_args.num_concurrent"},
    ),
    "seed": (
        lambda r: change_results(r, lambda d: d["config"].update(torch_seed=9)),
        {"seeds.torch"},
    ),
    "order": (lambda r: change_rows(r, "words", lambda rows: rows.reverse()), set()),
    "answers": (
        lambda r: change_rows(r, "words", lambda rows: rows[0].update(resps=[["other"]])),
        set(),
    ),
    "address": (
        lambda r: change_results(r, lambda d: d["config"]["model_args"].update(base_url="b")),
        set(),
    ),
}


@pytest.mark.parametrize(
    ("change", "differing"), OTHER_CONDITIONS.values(), ids=OTHER_CONDITIONS.keys()
)
def test_conditions_that_differ(
    tmp_path: Path, change: Callable[[Path], object], differing: set[str]
) -> None:
    sides = [write_results(tmp_path / name) for name in ("baseline", "candidate")]
    change(sides[1])
    found = [probe_results(side) for side in sides]
    first, second = (side.conditions() for side in found)
    assert {name for name in first | second if first.get(name) != second.get(name)} == differing
    hashed = {name for name in differing if name.endswith(("prompts", "documents", "targets"))}
    sentences = differing_questions(*found)
    assert sentences.keys() == hashed
    assert all(each.startswith("1 of 30 ") and "doc 7" in each for each in sentences.values())


def batch(directory: Path, numbers: range, *, repeat: int = 0, **options: Any) -> Path:
    """One evaluation of some questions of one task, with the plan written before it."""
    rows = [
        text_row(n, repeat=repeat, resps=[[f"{n} {repeat}"]], exact_match=float((n + repeat) % 2))
        for n in numbers
    ]
    options = {"generation": {"temperature": 0.7}, "seed": repeat, **options}
    results = write_results(directory, {"words": rows}, effective=len(rows), **options)
    write_plan(results, "words", {row["doc_id"]: row["doc_hash"] for row in rows}, repeat)
    (results / "completion_tokens.json").write_text(
        json.dumps({"words": {"mean": 3.0 + repeat, "count": len(rows)}})
    )
    return results


def test_growing_batches_become_one(tmp_path: Path) -> None:
    parts = [
        probe_results(batch(tmp_path / "a", range(10, 14))),
        probe_results(batch(tmp_path / "b", range(3))),
    ]
    merged = merge_results(parts)
    entry = merged.samples()["tasks"]["words"]
    asked = [int(key.partition(":")[0]) for key in entry["questions"]]
    assert asked == [10, 11, 12, 13, 0, 1, 2]
    assert merged.scores() == {"words": pytest.approx(3 / 7)}
    assert (merged.tasks["words"].expected_samples, merged.tasks["words"].scored_samples) == (7, 7)
    assert merged.completion_tokens == {"words": [(3.0, 4), (3.0, 3)]}
    assert evaluate_run(merged.run_summary()).passed
    assert merge_results(parts[:1]) is parts[0]


def test_repeated_batches_become_repeats(tmp_path: Path) -> None:
    parts = [
        probe_results(batch(tmp_path / str(r), range(6), repeat=r, generation={"temperature": 0.7}))
        for r in range(3)
    ]
    merged = merge_results(parts)
    entry = merged.samples()["tasks"]["words"]
    assert entry["scores"][:2] == [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    assert merged.scores() == {"words": 0.5}
    assert merged.tasks["words"].stderr == pytest.approx((1 / 6) * (6 / 5) ** 0.5 / 6**0.5)
    audit = merged.run_summary()["tasks"]["words"]["audit"]
    assert audit["repeats"]["count"] == 3
    assert audit["filters"]["none"]["planned"] == 18
    assert merged.conditions()["model_args.seed"] == [0, 1, 2]
    assert evaluate_run(merged.run_summary()).passed


def test_what_two_batches_both_asked_stays_visible(tmp_path: Path) -> None:
    parts = [
        probe_results(batch(tmp_path / str(n), numbers))
        for n, numbers in enumerate((range(5), range(4, 9)))
    ]
    merged = merge_results(parts)
    assert len(merged.samples()["tasks"]["words"]["questions"]) == 9
    verdict = evaluate_run(merged.run_summary())
    assert verdict.failure_class is FailureClass.SAMPLE_ACCOUNTING_FAILED
    assert "1 duplicated (doc 4 scored 2 times)" in verdict.detail


def test_a_batch_that_lost_answers_is_not_made_whole_by_another(tmp_path: Path) -> None:
    parts = [batch(tmp_path / str(n), r) for n, r in enumerate((range(5), range(5, 10)))]
    change_rows(parts[1], "words", lambda rows: rows.pop())
    verdict = evaluate_run(merge_results([probe_results(p) for p in parts]).run_summary())
    assert "of 10 planned items, 1 missing (doc 9 missing)" in verdict.detail


def test_unequal_repeats_are_no_samples(tmp_path: Path) -> None:
    parts = [
        probe_results(batch(tmp_path / "0", range(6))),
        probe_results(batch(tmp_path / "1", range(4), repeat=1)),
    ]
    merged = merge_results(parts)
    assert evaluate_run(merged.run_summary()).passed
    with pytest.raises(ProbeError, match=r"words: its repeats have 6, 4 questions"):
        merged.samples()


NOT_ALIKE: dict[str, tuple[Callable[[Path], object], str]] = {
    "version": (
        lambda r: change_results(r, lambda d: d["versions"].update(words=2.0)),
        "tasks.words.version is '2.0', but '1.0' in ",
    ),
    "concurrency": (
        lambda r: change_results(r, lambda d: d["config"]["model_args"].update(num_concurrent=1)),
        "model_args.num_concurrent is 1, but 8 in ",
    ),
    "model": (
        lambda r: change_results(r, lambda d: d.update(model_name="other")),
        "model is 'other', but 'tiny' in ",
    ),
    "prompt": (
        lambda r: change_rows(r, "words", lambda rows: rows[2].update(prompt_hash="f")),
        "words: doc 2 was asked with another prompt",
    ),
    "no-log": (lambda r: only(r, "samples_*").unlink(), "words has no log of samples"),
}


@pytest.mark.parametrize(("change", "problem"), NOT_ALIKE.values(), ids=NOT_ALIKE.keys())
def test_batches_asked_otherwise_are_not_put_together(
    tmp_path: Path, change: Callable[[Path], object], problem: str
) -> None:
    parts = [batch(tmp_path / str(r), range(4), repeat=r) for r in range(2)]
    change(parts[1])
    with pytest.raises(ProbeError) as caught:
        merge_results([probe_results(part) for part in parts])
    assert problem in str(caught.value)


def test_a_task_of_one_batch_only_is_kept(tmp_path: Path) -> None:
    parts = [
        probe_results(write_results(tmp_path / "both")),
        probe_results(batch(tmp_path / "one", range(3), repeat=1, generation={"temperature": 0.0})),
    ]
    merged = merge_results(parts)
    assert list(merged.tasks) == ["words", "choices"]
    assert merged.tasks["choices"] is parts[0].tasks["choices"]


def test_the_address_of_a_function_is_no_condition(tmp_path: Path) -> None:
    sides = [write_results(tmp_path / name) for name in ("a", "b")]
    for side, address in zip(sides, ("0x7f01", "0x7fab"), strict=True):
        metric = {"metric": f"<function f at {address}>"}
        change_results(side, lambda d, m=metric: d["configs"]["words"].update(metric_list=[m]))
    first, second = (probe_results(side).tasks["words"].scoring for side in sides)
    assert first == second
    assert first["metric_list"] == [{"metric": "<function f>"}]


HASHES = ("doc_hash", "prompt_hash")


@pytest.mark.parametrize("field", ["doc", "arguments"])
def test_without_hashes_the_content_counts(tmp_path: Path, field: str) -> None:
    sides = [write_results(tmp_path / name) for name in ("a", "b")]
    for side in sides:
        change_rows(side, "words", lambda rows: [r.pop(n) for r in rows for n in HASHES])
    assert probe_results(sides[0]).samples() == probe_results(sides[1]).samples()
    other = {"doc": {"question": "other"}, "arguments": [["other", {}]]}[field]
    change_rows(sides[1], "words", lambda rows: rows[7].update({field: other}))
    differing = differing_questions(*map(probe_results, sides))
    setting = {"doc": "documents", "arguments": "prompts"}[field]
    assert differing.keys() == {f"tasks.words.{setting}"}
    questions = [probe_results(side).samples()["tasks"]["words"]["questions"] for side in sides]
    assert [n for n, (a, b) in enumerate(zip(*questions, strict=True)) if a != b] == [7]


def test_what_nobody_recorded(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    silent = probe_results(results).unrecorded()
    assert silent == ["gen_kwargs", "seeds.numpy", "seeds.fewshot"]
    change_results(results, lambda d: [d.pop(n) for n in ("versions", "lm_eval_version")])
    change_rows(
        results, "words", lambda rows: [r.pop(n) for r in rows for n in (*HASHES, "arguments")]
    )
    added = {"harness.lm_eval", "tasks.*.version", "tasks.words.prompts"}
    assert set(probe_results(results).unrecorded()) - set(silent) >= added


@pytest.mark.parametrize(
    ("metric", "higher", "odd"),
    [
        ("acc", True, False),
        ("acc", False, True),
        ("perplexity", True, True),
        ("perplexity", False, False),
        ("error_rate", False, False),
        ("error_rate", True, False),
    ],
)
def test_directions_that_are_upside_down(
    tmp_path: Path, metric: str, higher: bool, odd: bool
) -> None:
    results = write_results(tmp_path / "r")
    change_results(
        results,
        lambda d: (
            d["results"].update(choices={f"{metric},none": 0.5}),
            d["configs"]["choices"]["metric_list"][0].update(metric=metric),
            d["higher_is_better"].update(choices={metric: higher}),
        ),
    )
    assert probe_results(results).upside_down() == (["choices"] if odd else [])
