"""The run gate on raw samples: logs made by hand with one fault each, and sound ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval_on_disk import (
    QUESTIONS,
    Change,
    Row,
    change_results,
    change_rows,
    hashed,
    rows_of,
    text_row,
    write_plan,
    write_results,
)

from conductor.gate_commands import run_main
from conductor.probes.lm_eval import NULL_ANSWER, probe_results
from gates import FailureClass, evaluate_run
from gates.criteria import ANSWER_LIMITS

LOST, REPLAYED, IMPLAUSIBLE = (
    FailureClass.SAMPLE_ACCOUNTING_FAILED,
    FailureClass.ANSWERS_REPLAYED,
    FailureClass.IMPLAUSIBLE_SCORE,
)


def verdict_on(results: Path) -> Any:
    return evaluate_run(probe_results(results).run_summary())


def failed(verdict: Any) -> set[str]:
    return {check.subject for check in verdict.checks if not check.passed}


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, dict[str, Any]]]:
    def ask(arguments: list[str]) -> tuple[int, dict[str, Any]]:
        exit_code = run_main(arguments)
        return exit_code, json.loads(capsys.readouterr().out)

    return ask


Ask = Callable[[list[str]], tuple[int, dict[str, Any]]]


def test_sound_runs_pass(tmp_path: Path) -> None:
    verdict = verdict_on(write_results(tmp_path / "r"))
    assert verdict.passed, verdict.detail
    assert verdict.notes == ("all tasks: not known whether prompts were cut to fit the context",)


def drop_a_third(rows: list[Row]) -> None:
    del rows[10:20]


def each(**changes: Any) -> Change:
    return lambda rows: [row.update(changes) for row in rows]


def some(count: int, **changes: Any) -> Change:
    return lambda rows: [row.update(changes) for row in rows[:count]]


def number_on(rows: list[Row]) -> None:
    rows[3]["doc_id"] = 999


NAN = float("nan")
FAULTS: dict[str, tuple[str, Change, FailureClass, str, str]] = {
    "dropped-third": ("choices", drop_a_third, LOST, "filters.none", "10 missing (doc 10 missing"),
    "one-dropped": ("words", lambda rows: rows.pop(7), LOST, "filters.none", "doc 7 missing"),
    "duplicated-id": (
        "words",
        lambda rows: rows.append(rows[4]),
        LOST,
        "filters.none",
        "1 duplicated (doc 4 scored 2 times)",
    ),
    "id-in-place-of-another": (
        "words",
        lambda rows: rows[5].update(doc_id=6),
        LOST,
        "filters.none",
        "1 missing, 1 duplicated (doc 5 missing, doc 6 scored 2 times)",
    ),
    "unplanned-id": (
        "choices",
        number_on,
        LOST,
        "filters.none",
        "1 missing, 1 unplanned (doc 3 missing, doc 999 not planned)",
    ),
    "nan-logprobs": (
        "choices",
        each(resps=[[["nan", "False"]], [["nan", "False"]]]),
        LOST,
        "answers.non_finite",
        "30 of 30 answers have a log-probability that is no finite number",
    ),
    "one-infinite-logprob": (
        "choices",
        some(1, resps=[[["-inf", "False"]], [["-1.0", "False"]]]),
        LOST,
        "answers.non_finite",
        "1 of 30",
    ),
    "nan-literals": (
        "choices",
        some(2, resps=[[[NAN, False]], [[-1.0, False]]]),
        LOST,
        "answers.non_finite",
        "2 of 30",
    ),
    "null-text": ("words", some(1, resps=[[None]]), LOST, "answers.null", "1 of 30 answers are"),
    "placeholder": ("words", some(2, resps=[[NULL_ANSWER]]), LOST, "answers.null", "2 of 30"),
    "number-that-is-none": ("words", some(1, resps=[[NAN]]), LOST, "answers.null", "1 of 30"),
    "error-for-text": ("words", some(1, resps=[[{"e": 1}]]), LOST, "answers.null", "or no text"),
    "fewer-answers-than-requests": (
        "words",
        some(1, arguments={"gen_args_0": {"arg_0": "a"}, "gen_args_1": {"arg_0": "b"}}),
        LOST,
        "samples",
        "29 of 30 scored",
    ),
    "fewer-in-lists": (
        "choices",
        some(2, arguments=[["a", "b"], ["a", "c"], ["a", "d"]]),
        LOST,
        "errors",
        "2 documents were not scored: 0 (2 answers to 3 requests)",
    ),
    "empty": (
        "words",
        some(2, resps=[[" \n"]]),
        LOST,
        "answers.empty",
        "2 of 30 answers are empty (6.7%, at most 5.0% allowed)",
    ),
    "truncated": (
        "words",
        some(4, finish_reasons=["length"]),
        LOST,
        "answers.truncated",
        "4 of 30 answers were cut off",
    ),
    "truncated-in-the-singular": (
        "words",
        some(4, finish_reason="length"),
        LOST,
        "answers.truncated",
        "4 of 30",
    ),
    "refused": (
        "words",
        some(1, finish_reasons=["content_filter"]),
        LOST,
        "answers.refused",
        "1 of 30 answers were refused",
    ),
    "replayed-text": (
        "words",
        each(resps=[["42"]]),
        REPLAYED,
        "answers.identical",
        "30 of 30 different prompts got the same answer (100.0%, at most 50.0% allowed)",
    ),
    "replayed-logprobs": (
        "choices",
        some(24, resps=[[["-1.25", "False"]], [["-0.75", "True"]]]),
        REPLAYED,
        "answers.identical",
        "24 of 30 different prompts",
    ),
}


@pytest.mark.parametrize(
    ("task", "change", "failure_class", "subject", "words"), FAULTS.values(), ids=FAULTS.keys()
)
def test_one_fault(
    tmp_path: Path,
    task: str,
    change: Change,
    failure_class: FailureClass,
    subject: str,
    words: str,
) -> None:
    results = write_results(tmp_path / "r")
    change_rows(results, task, change)
    verdict = verdict_on(results)
    assert verdict.failure_class is failure_class, verdict.detail
    assert f"tasks.{task}.{subject}" in failed(verdict)
    assert words in verdict.detail
    assert {name for name, row in verdict.per_task.items() if not row["ok"]} == {task}


TOLERATED: dict[str, tuple[str, Change]] = {
    "one-empty": ("words", some(1, resps=[[""]])),
    "truncated-at-limit": ("words", some(3, finish_reasons=["length"])),
    "identical-at-limit": ("words", some(15, resps=[["42"]])),
    "refusal-in-words": ("words", some(9, resps=[["I am not authorized: 429, judge refused."]])),
    "no-hashes": (
        "words",
        lambda rows: [
            row.pop(name) for row in rows for name in ("doc_hash", "prompt_hash", "target_hash")
        ],
    ),
    "numbers-for-text": ("words", lambda rows: [r.update(resps=[[r["doc_id"]]]) for r in rows]),
    "arguments-of-another-form": ("words", each(arguments=["prompt", {"until": []}])),
    "no-filter": ("choices", lambda rows: [row.pop("filter") for row in rows]),
    "ids-as-text": (
        "choices",
        lambda rows: [row.update(doc_id=str(row["doc_id"])) for row in rows],
    ),
    "huge-row": ("words", some(1, doc={"text": "x" * 2_000_000})),
    "nan-elsewhere": ("choices", some(3, doc={"weight": NAN})),
    "lone-surrogate": ("words", some(1, resps=[["\ud800"]])),
}


@pytest.mark.parametrize(("task", "change"), TOLERATED.values(), ids=TOLERATED.keys())
def test_no_fault(tmp_path: Path, task: str, change: Change) -> None:
    results = write_results(tmp_path / "r")
    change_rows(results, task, change)
    verdict = verdict_on(results)
    assert verdict.passed, verdict.detail


def test_a_benchmark_of_one_answer_may_be_answered_alike(tmp_path: Path) -> None:
    def yes(number: int, target: str) -> Row:
        right = {"target": target, "target_hash": hashed(target), "exact_match": target == "yes"}
        return text_row(number, resps=[["yes"]], **right)

    for no, passes in (7, True), (9, False):
        rows = [yes(number, "yes" if number >= no else "no") for number in range(QUESTIONS)]
        verdict = verdict_on(write_results(tmp_path / str(no), {"words": rows}))
        assert verdict.passed is passes, verdict.detail


def test_empty_answers_are_not_called_replayed(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    change_rows(results, "words", some(25, resps=[[""]]))
    verdict = verdict_on(results)
    assert verdict.failure_class is LOST
    assert failed(verdict) == {"tasks.words.answers.empty"}


def test_the_same_prompt_may_get_the_same_answer(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    change_rows(results, "words", some(25, resps=[["42"]], prompt_hash=hashed("one prompt")))
    assert verdict_on(results).passed


@pytest.mark.parametrize(("count", "passes"), [(4, True), (5, False)])
def test_few_identical_answers_say_nothing(tmp_path: Path, count: int, passes: bool) -> None:
    rows = [text_row(number, resps=[["42"]]) for number in range(count)]
    results = write_results(tmp_path / "r", {"words": rows}, original=count, effective=count)
    assert verdict_on(results).passed is passes


def test_score_in_another_unit(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    change_results(results, lambda d: d["results"]["choices"].update({"acc,none": 73.3333333}))
    verdict = verdict_on(results)
    assert verdict.failure_class is IMPLAUSIBLE
    assert "the samples come to 0.733333, but the reported score is 73.3333" in verdict.detail


@pytest.mark.parametrize(
    ("factor", "passes"), [(1 + 1e-7, True), (1 - 1e-5, False), (1.01, False)], ids=str
)
def test_reported_score_is_that_of_the_samples(tmp_path: Path, factor: float, passes: bool) -> None:
    results = write_results(tmp_path / "r")
    score = probe_results(results).scores()["words"]
    assert score
    change_results(
        results, lambda d: d["results"]["words"].update({"exact_match,none": score * factor})
    )
    verdict = verdict_on(results)
    assert verdict.passed is passes
    assert passes or verdict.failure_class is IMPLAUSIBLE


def test_score_that_nobody_can_work_out_is_said(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    change_results(
        results, lambda d: d["configs"]["words"]["metric_list"][0].update(aggregation="bleu")
    )
    verdict = verdict_on(results)
    assert verdict.passed
    assert any(note.startswith("words: score not worked out") for note in verdict.notes)


@pytest.mark.parametrize("flag", ["False", False], ids=["text", "boolean"])
def test_log_likelihoods_are_known_by_their_form(tmp_path: Path, flag: object) -> None:
    results = write_results(tmp_path / "r")
    change_results(results, lambda d: d.pop("configs"))
    assert verdict_on(results).passed
    change_rows(results, "choices", each(resps=[[["-1.0", flag]], [["nan", flag]]]))
    verdict = verdict_on(results)
    assert verdict.failure_class is LOST
    assert "tasks.choices.answers.non_finite" in failed(verdict)


@pytest.mark.parametrize("section", ["configs", "n-samples"])
def test_a_task_that_was_asked_and_has_no_results(tmp_path: Path, section: str) -> None:
    results = write_results(tmp_path / "r")
    other = {"configs": "n-samples", "n-samples": "configs"}[section]
    change_results(results, lambda d: [d[name].pop("words") for name in ("results", other)])
    verdict = verdict_on(results)
    assert verdict.failure_class is LOST
    assert "tasks.words.score" in verdict.detail


def test_without_a_count_nobody_knows_what_was_planned(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    change_results(results, lambda d: d["n-samples"].pop("words"))
    verdict = verdict_on(results)
    assert verdict.failure_class is LOST
    assert "n-samples.words.effective is no number" in verdict.detail


def hash_rows(results: Path) -> None:
    """Write the hash over all rows into the results, as lm-eval does."""
    hashes = {
        task: hashed(
            "".join(r["doc_hash"] + r["prompt_hash"] + r["target_hash"] for r in rows_of(task))
        )
        for task in ("words", "choices")
    }
    change_results(results, lambda d: d.update(task_hashes=hashes))


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        (lambda rows: None, False),
        (each(resps=[["other"]], exact_match=1.0), False),
        (lambda rows: rows[3].pop("target_hash"), False),
        (lambda rows: rows[3].update(target_hash="f" * 64), True),
        (lambda rows: rows.reverse(), True),
    ],
    ids=["as-written", "answers", "unknown", "target", "order"],
)
def test_rows_that_the_harness_did_not_hash_are_noted(
    tmp_path: Path, change: Change, noted: bool
) -> None:
    results = write_results(tmp_path / "r")
    hash_rows(results)
    change_rows(results, "words", change)
    notes = verdict_on(results).notes
    assert any(note.startswith("words: rows were taken out") for note in notes) is noted


@pytest.mark.parametrize(
    ("factor", "noted"), [(1.0, False), (1.04, False), (0.94, True), (3.0, True)], ids=str
)
def test_a_standard_error_that_does_not_follow_is_noted(
    tmp_path: Path, factor: float, noted: bool
) -> None:
    results = write_results(tmp_path / "r")
    stderr = (0.8 * 0.2 / 29) ** 0.5 * factor
    change_results(
        results, lambda d: d["results"]["words"].update({"exact_match_stderr,none": stderr})
    )
    verdict = verdict_on(results)
    assert verdict.passed
    assert any(n.startswith("words: the reported standard error") for n in verdict.notes) is noted


def test_results_without_a_log(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    next(results.rglob("samples_words_*")).unlink()
    verdict = verdict_on(results)
    assert verdict.failure_class is LOST
    assert "no sample log samples_words_" in verdict.detail


def two_filters(lost: str | None) -> list[Row]:
    return [
        {**row, "filter": name}
        for row in rows_of("words")
        for name in ("strict", "loose")
        if not (name == lost and row["doc_id"] in (3, 8))
    ]


@pytest.mark.parametrize("lost", [None, "strict", "loose"])
def test_each_filter_is_counted(tmp_path: Path, lost: str | None) -> None:
    rows = {"words": two_filters(lost)}
    verdict = verdict_on(write_results(tmp_path / "r", rows, filters=("strict", "loose")))
    if lost is None:
        assert verdict.passed
    else:
        assert verdict.failure_class is LOST
        assert f"tasks.words.filters.{lost}: of 30 planned items, 2 missing" in verdict.detail
        assert "(doc 3 missing, doc 8 missing)" in verdict.detail


def test_a_filter_without_any_row_is_missed(tmp_path: Path) -> None:
    rows = [row for row in two_filters(None) if row["filter"] == "strict"]
    results = write_results(tmp_path / "r", {"words": rows}, filters=("strict", "loose"))
    assert "filters.loose: of 30 planned items, 30 missing" in verdict_on(results).detail


def test_documents_are_held_against_the_written_plan(tmp_path: Path) -> None:
    rows = [text_row(number) for number in (4, 11, 2, 9, 17)]
    planned = {row["doc_id"]: row["doc_hash"] for row in rows}
    results = write_results(tmp_path / "r", {"words": rows}, effective=5)
    write_plan(results, "words", planned)
    verdict = verdict_on(results)
    assert verdict.passed, verdict.detail
    assert probe_results(results).samples()["tasks"]["words"]["size"] == QUESTIONS
    write_plan(results, "words", {**planned, 11: hashed("another document")})
    detail = "of 5 planned items, 1 missing, 1 unplanned (doc 11 missing, doc 11 not planned)"
    assert detail in verdict_on(results).detail
    write_plan(results, "words", {**planned, 29: hashed("document 29")})
    assert "of 6 planned items, 1 missing (doc 29 missing)" in verdict_on(results).detail
    write_plan(results, "words", planned, repeat=1)
    assert "5 missing, 5 unplanned" not in verdict_on(results).detail
    change_rows(results, "words", each(repeat=0))
    assert "5 missing, 5 unplanned" in verdict_on(results).detail


@pytest.mark.parametrize(
    "entry",
    [[], {"documents": []}, {"documents": {"0": 1}}, {"documents": {}, "repeat": "one"}],
    ids=["list", "documents-list", "hash-number", "repeat-text"],
)
def test_unusable_plan(tmp_path: Path, ask: Ask, entry: object) -> None:
    results = write_results(tmp_path / "r")
    (results / "planned.json").write_text(json.dumps({"words": entry}))
    exit_code, document = ask(["--results", str(results)])
    assert exit_code == 2
    assert "planned.json: words needs documents" in document["detail"]


def test_a_drawn_subset_without_a_plan_is_told_from_the_log(tmp_path: Path) -> None:
    rows = {"words": [text_row(number) for number in (4, 11, 2, 9, 17)]}
    verdict = verdict_on(write_results(tmp_path / "subset", rows, effective=5))
    assert verdict.passed
    assert "words: which documents were to be asked is known from the log alone" in verdict.notes
    verdict = verdict_on(write_results(tmp_path / "limit", rows, effective=5, limit=5))
    assert "3 missing, 3 unplanned" in verdict.detail
    verdict = verdict_on(write_results(tmp_path / "fewer", rows, effective=6))
    assert "of 6 planned items, 1 missing" in verdict.detail


def repeated(answer: Callable[[int, int], str]) -> list[Row]:
    return [
        text_row(number, repeat=repeat, resps=[[answer(number, repeat)]])
        for repeat in range(3)
        for number in range(QUESTIONS)
    ]


@pytest.mark.parametrize(
    ("answer", "temperature", "failure_class"),
    [
        pytest.param(lambda n, r: f"{n}", 0.7, REPLAYED, id="replayed"),
        pytest.param(lambda n, r: f"{n}", 0.0, None, id="greedy"),
        pytest.param(lambda n, r: f"{n}.{r if n == 7 else 0}", 0.7, None, id="one-differs"),
        pytest.param(lambda n, r: f"{n}.{r}", 0.7, None, id="fresh"),
    ],
)
def test_repeats_must_be_drawn_afresh(
    tmp_path: Path,
    answer: Callable[[int, int], str],
    temperature: float,
    failure_class: FailureClass | None,
) -> None:
    generation = {"temperature": temperature}
    rows = {"words": repeated(answer)}
    verdict = verdict_on(write_results(tmp_path / "rows", rows, generation=generation))
    assert verdict.failure_class is failure_class, verdict.detail
    within = [
        text_row(n, resps=[[answer(n, r) for r in range(3)]], finish_reasons=["stop"] * 3)
        for n in range(QUESTIONS)
    ]
    results = write_results(tmp_path / "within", {"words": within}, generation=generation)
    assert verdict_on(results).failure_class is failure_class


def test_a_repeat_that_lost_questions(tmp_path: Path) -> None:
    rows = repeated(lambda n, r: f"{n}.{r}")
    del rows[-1]
    verdict = verdict_on(write_results(tmp_path / "r", {"words": rows}))
    assert verdict.failure_class is LOST
    assert "of 90 planned items, 1 missing (doc 29 missing in repeat 2)" in verdict.detail
    assert "29 of 30 scored" in verdict.detail


def test_prompts_cut_to_fit_the_context(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    facts = results / "harness_facts.json"
    facts.write_text(json.dumps({"context_overflow": {"words": 0, "choices": 0}}))
    verdict = verdict_on(results)
    assert verdict.passed
    assert verdict.notes == ()
    facts.write_text(json.dumps({"context_overflow": {"words": 1, "choices": 0}}))
    verdict = verdict_on(results)
    assert verdict.failure_class is LOST
    assert "tasks.words.answers.context_overflow: 1 of 30 prompts were cut" in verdict.detail


def test_unknown_reasons_are_said_and_not_passed_over(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r")
    change_rows(results, "words", lambda rows: [row.pop("finish_reasons") for row in rows])
    verdict = verdict_on(results)
    assert verdict.passed
    assert any("words: not known whether answers were cut off" in note for note in verdict.notes)
    assert not any(
        "truncated" in check.subject for check in verdict.checks if "words" in check.subject
    )


ACCESS = '(APIServer pid=7) INFO:     127.0.0.1:3{:04} - "POST /v1/completions HTTP/1.1" {}\n'
START = "INFO:     Started server process [{}]\n"


def server_log(path: Path, *parts: str) -> Path:
    path.write_text("".join(parts))
    return path


FINE = "".join(ACCESS.format(n, "200 OK") for n in range(200))

SERVERS: dict[str, tuple[list[str], str | None, str]] = {
    "sound": ([START.format(1), FINE], None, ""),
    "api-processes-together": ([START.format(1), START.format(2), FINE], None, ""),
    "few-errors": (
        [START.format(1), FINE, ACCESS.format(1, "503 Service Unavailable")],
        None,
        "server: of 201 requests, some ended badly: 1 with 503",
    ),
    "many-errors": (
        [START.format(1), FINE, *[ACCESS.format(1, "500 Internal Server Error")] * 3],
        "INFRA_TRANSIENT",
        "server.errors: 3 of 203 requests failed",
    ),
    "turned-away": (
        [START.format(1), FINE, *[ACCESS.format(1, "429 Too Many Requests")] * 9],
        "INFRA_TRANSIENT",
        "server.errors: 9 of 209",
    ),
    "restarted": (
        [START.format(1), FINE, START.format(2), FINE],
        "INFRA_TRANSIENT",
        "server.starts: the server started 2 times",
    ),
    "restarted-at-once": (
        [START.format(1), "INFO:     Shutting down\n", START.format(2), FINE],
        "INFRA_TRANSIENT",
        "server.starts: the server started 2 times",
    ),
    "nothing-answered": (
        [START.format(1), *[ACCESS.format(1, "404 Not Found")] * 9],
        "INFRA_TRANSIENT",
        "server.errors: 9 of 9",
    ),
    "refused-requests": (
        [START.format(1), FINE, *[ACCESS.format(1, "400 Bad Request")] * 9],
        None,
        "server: of 209 requests, some ended badly: 9 with 400",
    ),
    "no-request": ([START.format(1)], None, "server: the log has no request"),
    "colours": (
        [ACCESS.format(1, "500 x").replace("INFO", "\x1b[32mINFO\x1b[0m")] * 9,
        "INFRA_TRANSIENT",
        "server.errors: 9 of 9",
    ),
    "a-prompt-like-a-log": (
        [
            START.format(1),
            FINE,
            *['INFO: prompt: "INFO: 1:2 - "POST /v1/completions HTTP/1.1" 500"\n'] * 50,
            *["auth failed 401 error 500 rate limit\n"] * 50,
            *["x" * 3 * 2**16 + ACCESS.format(1, "500")] * 9,
        ],
        None,
        "",
    ),
    "health-checks": (
        [START.format(1), FINE, *['INFO:     1.2.3.4:5 - "GET /health HTTP/1.1" 503\n'] * 50],
        None,
        "",
    ),
}


@pytest.mark.parametrize(("parts", "failure_class", "words"), SERVERS.values(), ids=SERVERS.keys())
def test_server_log(
    tmp_path: Path, ask: Ask, parts: list[str], failure_class: str | None, words: str
) -> None:
    results = write_results(tmp_path / "r")
    log = server_log(tmp_path / "server.log", *parts)
    exit_code, document = ask(["--results", str(results), "--server-log", str(log)])
    assert (exit_code, document["failure_class"]) == (int(failure_class is not None), failure_class)
    assert words in document["detail"] + " ".join(document["notes"])


@pytest.mark.parametrize("content", [b"", b"hello\n" * 9, b"\x1f\x8b\x08" + b"\0" * 99], ids=repr)
def test_a_server_log_that_tells_nothing(tmp_path: Path, ask: Ask, content: bytes) -> None:
    log = tmp_path / "server.log"
    log.write_bytes(content)
    results = write_results(tmp_path / "r")
    exit_code, document = ask(["--results", str(results), "--server-log", str(log)])
    assert exit_code == 2
    assert document["detail"].endswith("give the plain log of vLLM, with access lines")


def test_limits_of_the_caller(tmp_path: Path, ask: Ask) -> None:
    results = write_results(tmp_path / "r")
    change_rows(results, "words", some(4, finish_reasons=["length"]))
    assert ask(["--results", str(results)])[0] == 1
    assert ask(["--results", str(results), "--limits", '{"truncated": 0.2}'])[0] == 0
    exit_code, document = ask(["--results", str(results), "--limits", '{"cut": 0.2}'])
    assert exit_code == 2
    assert "--limits" in document["detail"]


def test_summary_of_a_directory_is_a_summary_of_a_file(tmp_path: Path, ask: Ask) -> None:
    results = write_results(tmp_path / "r")
    change_rows(results, "choices", drop_a_third)
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps(probe_results(results).run_summary()))
    answers = [ask([f"--{name}", str(p)]) for name, p in (("results", results), ("run", summary))]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("log", [b'{"doc_id": 0', b'{"doc_id": 0, "resps": [["a"'], ids=str)
def test_log_cut_in_the_middle_of_a_line(tmp_path: Path, ask: Ask, log: bytes) -> None:
    results = write_results(tmp_path / "r")
    path = next(results.rglob("samples_words_*"))
    path.write_bytes(path.read_bytes() + log)
    exit_code, document = ask(["--results", str(results)])
    assert exit_code == 2
    assert f"{path}:31: is cut off: the log ends in the middle of a row" in document["detail"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"doc_id": null}', "is no row of a sample log"),
        ('{"filter": "none"}', "is no row of a sample log"),
        ('{"doc_id": 1, "filter": 3}', "is no row of a sample log"),
        ("[1]", "holds a JSON list"),
        ("text", "is not valid JSON"),
        ('{"doc_id": ' + "[" * 100_000 + "]" * 100_000 + "}", ":1: "),
    ],
    ids=["id-null", "no-id", "filter-number", "list", "no-json", "nested"],
)
def test_line_that_is_no_row(tmp_path: Path, ask: Ask, line: str, words: str) -> None:
    results = write_results(tmp_path / "r")
    path = next(results.rglob("samples_words_*"))
    path.write_text(line + "\n" + path.read_text())
    exit_code, document = ask(["--results", str(results)])
    assert exit_code == 2
    assert f"{path}:1: " in document["detail"]
    assert words in document["detail"]


def audit(**changes: Any) -> dict[str, Any]:
    counted = {"planned": 100, "scored": 100, "missing": 0, "duplicated": 0, "unplanned": 0}
    answers = {
        **dict.fromkeys(("null", "empty", "truncated", "refused", "non_finite"), 0),
        "asked": 100,
        "identical": 1,
        "identical_targets": 1,
        "distinct_prompts": 100,
    }
    document = {
        "filters": {"none": counted | changes.pop("counted", {})},
        "answers": answers | changes.pop("answers", {}),
        "recomputed_score": 0.5,
        "repeats": None,
        "context_overflow": 0,
        **changes,
    }
    task = {
        "status": "SUCCESS",
        "expected_samples": 100,
        "scored_samples": 100,
        "score": 0.5,
        "scale": 1.0,
        "errors": [],
        "audit": document,
    }
    return {"tasks": {"words": task}}


@pytest.mark.parametrize("kind", [k for k in ANSWER_LIMITS if k not in ("identical",)])
@pytest.mark.parametrize("over", [False, True], ids=["at-limit", "over"])
def test_rate_at_its_limit(kind: str, over: bool) -> None:
    number = round(ANSWER_LIMITS[kind] * 100) + over
    changes = (
        {"context_overflow": number} if kind == "context_overflow" else {"answers": {kind: number}}
    )
    assert evaluate_run(audit(**changes)).passed is not over


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"counted": {"missing": -1}}, "tasks.words.audit.filters.none.missing"),
        ({"counted": {"missing": 0.5}}, "tasks.words.audit.filters.none.missing"),
        ({"counted": {"examples": "doc 1"}}, "tasks.words.audit.filters.none.examples"),
        ({"answers": {"empty": None}}, "tasks.words.audit.answers.empty"),
        ({"answers": {"truncated": True}}, "tasks.words.audit.answers.truncated"),
        ({"filters": None}, "tasks.words.audit.filters"),
        ({"recomputed_score": NAN}, "tasks.words.audit.recomputed_score"),
        ({"repeats": {"count": 2}}, "tasks.words.audit.repeats.identical_questions"),
        ({"context_overflow": 10**400}, "tasks.words.audit.context_overflow"),
    ],
    ids=str,
)
def test_unusable_audit_is_named(changes: dict[str, Any], path: str) -> None:
    verdict = evaluate_run(audit(**changes))
    assert verdict.failure_class is FailureClass.USER_CONFIG_ERROR
    assert verdict.detail.startswith(path)


@pytest.mark.parametrize(
    ("top", "path"),
    [
        ({"server": []}, "server"),
        ({"server": {}}, "server.status_codes"),
        ({"server": {"status_codes": {"ok": 1}}}, "server.status_codes"),
        ({"server": {"status_codes": {"200": -1}}}, "server.status_codes.200"),
        ({"server": {"status_codes": {}, "starts": 1.5}}, "server.starts"),
    ],
    ids=str,
)
def test_unusable_server_facts_are_named(top: dict[str, Any], path: str) -> None:
    verdict = evaluate_run(audit() | top)
    assert verdict.failure_class is FailureClass.USER_CONFIG_ERROR
    assert verdict.detail.startswith(path)


def test_counts_that_contradict_each_other() -> None:
    assert evaluate_run(audit(counted={"scored": 90})).failure_class is LOST
    assert evaluate_run(audit(answers={"asked": 0, "null": 3})).failure_class is LOST
