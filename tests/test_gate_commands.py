"""The gate commands: exit codes, messages and valid JSON, whatever they are given."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conductor.gate_commands import compare_main, ptq_main, run_main, verbosity_main

DATA = Path(__file__).parent / "data" / "gates"
RESULTS = DATA.with_name("lm_eval_results")
ROOT = Path(__file__).parent.parent

Main = Callable[[list[str]], int]

COMMANDS: dict[str, tuple[Main, str, str]] = {
    "ptq": (ptq_main, "--summary {}", "checkpoint-good"),
    "run": (run_main, "--run {}", "run-good"),
    "compare": (
        compare_main,
        f"--baseline {DATA / 'scores-baseline.json'} --candidate {{}}",
        "scores-at-threshold",
    ),
    "verbosity": (
        verbosity_main,
        f"--baseline {DATA / 'tokens-good.json'} --candidate {{}}",
        "tokens-good",
    ),
}


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a command; return its exit code and the one document that it printed."""

    def ask(main: Main, arguments: str | list[str]) -> tuple[int, dict[str, Any]]:
        argv = arguments.split() if isinstance(arguments, str) else arguments
        exit_code = main(argv)
        printed = capsys.readouterr()
        return exit_code, json.loads(printed.out, parse_constant=pytest.fail)

    return ask


Ask = Callable[..., tuple[int, dict[str, Any]]]


@pytest.mark.parametrize(
    ("command", "name", "exit_code", "words"),
    [
        pytest.param("ptq", "checkpoint-good", 0, "all pass", id="ptq-good"),
        pytest.param(
            "ptq", "checkpoint-counts-absent", 2, "layer_precision_counts", id="no-counts"
        ),
        pytest.param("ptq", "checkpoint-output-zero", 2, "output_bytes", id="output-zero"),
        pytest.param("ptq", "checkpoint-output-negative", 2, "output_bytes", id="output-negative"),
        pytest.param(
            "ptq", "checkpoint-counts-list", 2, "layer_precision_counts", id="counts-list"
        ),
        pytest.param("ptq", "checkpoint-key-twice", 2, "'output_bytes' is given twice", id="twice"),
        pytest.param("ptq", "checkpoint-nan", 2, "NaN is no JSON number", id="nan"),
        pytest.param("ptq", "checkpoint-400-digits", 2, "output_bytes", id="400-digits"),
        pytest.param("ptq", "checkpoint-5000-digits", 2, "not usable JSON", id="5000-digits"),
        pytest.param("ptq", "checkpoint-foreign-precision", 1, "FP8", id="foreign-precision"),
        pytest.param("run", "run-good", 0, "all 1 task(s) valid", id="run-good"),
        pytest.param(
            "run", "run-counts-absent", 1, "expected_samples: is missing", id="no-samples"
        ),
        pytest.param("run", "run-zero-of-zero", 1, "at least 1, got 0", id="zero-of-zero"),
        pytest.param("run", "run-score-null", 1, "tasks.copy.score", id="score-null"),
        pytest.param("run", "run-author-field-missing", 1, "kind other", id="author"),
        pytest.param("run", "run-judge-rate-limit", 1, "kind rate_limit", id="judge"),
        pytest.param("run", "run-tasks-list", 2, "tasks: ", id="tasks-list"),
        pytest.param("run", "run-errors-absent", 2, "errors", id="errors-absent"),
        pytest.param("run", "deep-field", 2, "holds a value that cannot be read", id="deep-field"),
        pytest.param("compare", "scores-at-threshold", 0, "within", id="at-threshold"),
        pytest.param("compare", "scores-below", 1, "copy: 0.7 to 0.6", id="below"),
        pytest.param("compare", "scores-percent", 1, "percentage", id="unit-mix-up"),
        pytest.param("compare", "scores-text", 1, "finite number", id="score-text"),
        pytest.param("compare", "scores-list", 2, "the document: ", id="scores-list"),
        pytest.param("compare", "scores-infinite", 2, "too large", id="infinite"),
        pytest.param("compare", "lone-surrogate", 1, "task sets differ", id="surrogate"),
        pytest.param("verbosity", "tokens-good", 0, "within", id="alike"),
        pytest.param("verbosity", "tokens-longer", 1, "['copy']", id="longer"),
        pytest.param("verbosity", "tokens-negative", 2, "copy.0.0", id="negative-tokens"),
        pytest.param("verbosity", "tokens-no-samples", 2, "copy.0.1", id="no-samples-counted"),
    ],
)
def test_named_inputs(command: str, name: str, exit_code: int, words: str, ask: Ask) -> None:
    main, arguments, _ = COMMANDS[command]
    path = DATA / f"{name}.json"
    code, document = ask(main, arguments.format(path))
    assert code == exit_code
    assert document["pass"] is (exit_code == 0)
    assert words in document["detail"]
    if exit_code == 2:
        assert document["failure_class"] == "USER_CONFIG_ERROR"
        assert document["decision"] is None
        assert str(path) in document["detail"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("empty.json", "is empty"),
        ("not-utf8.json", "is not UTF-8"),
        ("truncated.json", "is not usable JSON"),
        ("deep.json", "nested too deeply"),
        ("absent.json", "does not exist"),
        ("checkpoint-good.json/inside-a-file", "cannot be read"),
    ],
    ids=["empty", "not-utf8", "truncated", "deep", "absent", "inside-a-file"],
)
def test_files_that_hold_no_document(command: str, name: str, problem: str, ask: Ask) -> None:
    main, arguments, _ = COMMANDS[command]
    code, document = ask(main, arguments.format(DATA / name))
    assert code == 2
    assert problem in document["detail"]
    assert name in document["detail"]


@pytest.mark.parametrize("command", ["ptq", "run", "compare"])
def test_a_directory_without_results(command: str, tmp_path: Path, ask: Ask) -> None:
    main, arguments, _ = COMMANDS[command]
    code, document = ask(main, arguments.format(tmp_path))
    assert code == 2
    assert str(tmp_path) in document["detail"]


def test_checkpoint_directories_without_weights(tmp_path: Path, ask: Ask) -> None:
    arguments = f"--checkpoint {tmp_path} --source {tmp_path} --recipe fp8"
    code, document = ask(ptq_main, arguments)
    assert code == 2
    assert str(tmp_path) in document["detail"]


def test_a_directory_of_results_is_checked_as_a_run(ask: Ask) -> None:
    code, document = ask(run_main, f"--results {RESULTS}")
    assert code == 0
    assert document["checks"]["tasks.compare.filters.none"]["observed"]["scored"] == 5
    assert all("known" in note for note in document["notes"])


@pytest.mark.parametrize(
    ("candidate", "decision", "exit_code"),
    [("itself", "ACCEPT", 0), ("worse", "REGRESSION", 1), ("renamed", "ANOMALOUS", 1)],
    ids=str,
)
def test_a_directory_of_results_is_compared(
    candidate: str, decision: str, exit_code: int, tmp_path: Path, ask: Ask
) -> None:
    _, own = ask(compare_main, f"--baseline {RESULTS} --candidate {RESULTS}")
    scores = {task: row["baseline"] for task, row in own["per_task"].items()}
    sides = {
        "itself": scores,
        "worse": {task: score - 0.2 for task, score in scores.items()},
        "renamed": {f"new_{task}": score for task, score in scores.items()},
    }
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(sides[candidate]), encoding="utf-8")
    code, document = ask(compare_main, f"--baseline {RESULTS} --candidate {path}")
    assert (code, document["decision"]) == (exit_code, decision)
    if document["per_task"]:
        assert "compare, 5 questions: 47 % and " in document["notes"][0]


Document = dict[str, Any]


def results_with(
    directory: Path, change: Callable[[Document], object], *, drop_samples: str = ""
) -> Path:
    """Copy the results to ``directory`` with one change, or without a task's last sample."""
    shutil.copytree(RESULTS, directory)
    (file,) = directory.rglob("results_*.json")
    document = json.loads(file.read_text(encoding="utf-8"))
    change(document)
    file.write_text(json.dumps(document), encoding="utf-8")
    for log in directory.rglob(f"samples_{drop_samples}_*.jsonl" if drop_samples else "none"):
        rows = log.read_text(encoding="utf-8").splitlines(keepends=True)
        last = json.loads(rows[-1])["doc_id"]
        log.write_text("".join(row for row in rows if json.loads(row)["doc_id"] != last))
    return directory


def unbounded(score: float) -> Callable[[Document], None]:
    """Turn the task into one whose score has no full score, and is better when lower."""

    def change(document: Document) -> None:
        row = document["results"]["reverse"]
        row["perplexity,none"] = score
        document["configs"]["reverse"]["metric_list"] = [{"metric": "perplexity"}]
        document["configs"]["reverse"]["filter_list"] = [{"name": "none"}]
        document["higher_is_better"]["reverse"] = {"perplexity": False}

    return change


def perplexity_results(directory: Path, score: float) -> Path:
    results_with(directory, unbounded(score))
    (log,) = directory.rglob("samples_reverse_*.jsonl")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    nats = {"filter": "none", "perplexity": -math.log(score)}
    documents = {row["doc_id"]: row | nats for row in rows}
    log.write_text("".join(json.dumps(r) + "\n" for r in documents.values()), encoding="utf-8")
    return directory


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_a_run_that_is_not_sound_is_not_compared(side: str, tmp_path: Path, ask: Ask) -> None:
    sides = dict.fromkeys(("baseline", "candidate"), RESULTS)
    sides[side] = results_with(tmp_path / "lossy", lambda d: None, drop_samples="compare")
    code, document = ask(
        compare_main, f"--baseline {sides['baseline']} --candidate {sides['candidate']}"
    )
    assert code == 1
    assert document["gate"] == "compare"
    assert document["failure_class"] == "SAMPLE_ACCOUNTING_FAILED"
    assert document["detail"].startswith(f"{side}: tasks.compare.scored_samples: 4 of 5 scored")


def fewer_samples(document: Document) -> None:
    document["n-samples"]["compare"]["effective"] = 4
    document["results"]["compare"] |= {"acc,none": 0.75, "acc_norm,none": 0.5}


@pytest.mark.parametrize(
    ("change", "drop_samples", "named"),
    [
        pytest.param(
            lambda d: d["higher_is_better"]["compare"].update(acc=False, acc_norm=False),
            "",
            "tasks.compare.higher_is_better (true for the baseline, false for the candidate)",
            id="direction",
        ),
        pytest.param(
            lambda d: d["versions"].update(compare=3.0),
            "",
            "tasks.compare.version ('1.0' for the baseline, '3.0' for the candidate)",
            id="version",
        ),
        pytest.param(
            lambda d: d["n-shot"].update(compare=5),
            "",
            "tasks.compare.shots (0 for the baseline, 5 for the candidate)",
            id="shots",
        ),
        pytest.param(
            lambda d: d.update(lm_eval_version="0.4.0"),
            "",
            "harness.lm_eval ('0.4.13' for the baseline, '0.4.0' for the candidate)",
            id="lm-eval",
        ),
        pytest.param(
            fewer_samples,
            "compare",
            "tasks.compare.documents, tasks.compare.prompts, tasks.compare.targets; 1 of 5 "
            "documents differ, first that of doc 4; 1 of 5 prompts differ, first that of doc 4; "
            "1 of 5 targets differ, first that of doc 4",
            id="samples",
        ),
    ],
)
def test_runs_that_were_made_differently_are_not_compared(
    change: Callable[[Document], object], drop_samples: str, named: str, tmp_path: Path, ask: Ask
) -> None:
    other = results_with(tmp_path / "other", change, drop_samples=drop_samples)
    code, document = ask(compare_main, f"--baseline {RESULTS} --candidate {other}")
    assert code == 1
    assert document["gate"] == "compare"
    assert (document["failure_class"], document["decision"]) == ("CONDITIONS_DIFFER", "ANOMALOUS")
    assert document["detail"] == f"the two sides differ in {named}"


def cached(document: Document) -> None:
    document["config"].update(use_cache="/cache/answers")


def without_seeds(document: Document) -> None:
    document["config"].pop("random_seed")
    document.pop("versions")


NOTED: dict[str, tuple[Callable[[Document], object], bool, str]] = {
    "tokenizer": (
        lambda d: d["config"].update(model_args={"pretrained": "/a", "tokenizer": "/other"}),
        False,
        "model_args.tokenizer: the model's own for the baseline, /other for the candidate",
    ),
    "one-cache": (cached, True, "config.use_cache: both sides read answers from /cache/answers"),
    "unrecorded": (without_seeds, True, "seeds.fewshot, tasks.*.version"),
    "run": (lambda d: None, False, "baseline and candidate: all tasks: not known whether prompts"),
    "run-of-one": (
        lambda d: d["results"]["compare"].update(
            {"acc_stderr,none": 7.0, "acc_norm_stderr,none": 7.0}
        ),
        False,
        "candidate: compare: the reported standard error is not that of the samples",
    ),
}


@pytest.mark.parametrize(("change", "both", "note"), NOTED.values(), ids=NOTED.keys())
def test_what_could_not_be_compared_is_noted(
    change: Callable[[Document], object], both: bool, note: str, tmp_path: Path, ask: Ask
) -> None:
    def named(document: Document) -> None:
        document["config"] = {"model_args": {"pretrained": "/a"}, "random_seed": 0}

    def changed(document: Document) -> None:
        named(document)
        change(document)

    baseline = results_with(tmp_path / "baseline", changed if both else named)
    candidate = results_with(tmp_path / "candidate", changed)
    _, document = ask(compare_main, f"--baseline {baseline} --candidate {candidate}")
    assert document["per_task"], document["detail"]
    assert any(note in each for each in document["notes"]), document["notes"]


def test_a_direction_that_is_upside_down_on_both_sides(tmp_path: Path, ask: Ask) -> None:
    def flip(document: Document) -> None:
        document["higher_is_better"]["compare"] = {"acc": False, "acc_norm": False}

    results = results_with(tmp_path / "r", flip)
    code, document = ask(compare_main, f"--baseline {results} --candidate {results}")
    assert code == 2
    assert document["detail"].startswith("tasks.compare.higher_is_better: is the opposite")
    assert "metric_list" in document["detail"]


@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (100.0, 2)], ids=["same", "another"])
def test_a_scale_that_is_known_cannot_be_another(
    scale: float, code: int, tmp_path: Path, ask: Ask
) -> None:
    task = {"metric": "acc", "scale": 1.0, "scores": [1, 0] * 200}
    task["questions"] = [str(number) for number in range(400)]
    path = tmp_path / "samples.json"
    path.write_text(json.dumps({"tasks": {"arc": task}}))
    options = f'--baseline {path} --candidate {path} --scales {{"arc":{scale}}}'
    found, document = ask(compare_main, options)
    assert found == code, document["detail"]
    assert (
        code == 0 or document["detail"] == f"--scales: arc: {path} has scores up to 1; leave it out"
    )


def test_a_failure_says_what_to_do_next(tmp_path: Path, ask: Ask) -> None:
    other = results_with(tmp_path / "other", lambda d: d["versions"].update(compare=3.0))
    _, document = ask(compare_main, f"--baseline {RESULTS} --candidate {other}")
    assert document["next_action"] == "Evaluate both sides again under one set of settings."
    _, document = ask(compare_main, f"--baseline {RESULTS} --candidate {tmp_path / 'none'}")
    assert "file named in the reason" in document["next_action"]


def test_another_metric_is_another_condition(tmp_path: Path, ask: Ask) -> None:
    other = perplexity_results(tmp_path / "other", 0.5)
    _, document = ask(compare_main, f"--baseline {RESULTS} --candidate {other}")
    assert document["failure_class"] == "CONDITIONS_DIFFER"
    assert "tasks.reverse.metric" in document["detail"]


@pytest.mark.parametrize(
    ("scores", "options", "exit_code", "words"),
    [
        ((12.0, 12.0), "", 2, "tasks.reverse: has a metric without a known full score"),
        ((12.0, 12.05), "--relative", 0, "within"),
        ((12.0, 13.0), "--relative", 1, "beyond threshold"),
        ((250.0, 251.0), "--relative", 2, "give --scales"),
        ((250.0, 251.0), '--scales {"reverse":1000}', 0, "within"),
        ((250.0, 299.0), '--scales {"reverse":1000}', 1, "beyond threshold"),
    ],
    ids=["refused", "relative", "relative-worse", "relative-above-100", "scale", "scale-worse"],
)
def test_a_metric_without_a_full_score(
    scores: tuple[float, float],
    options: str,
    exit_code: int,
    words: str,
    tmp_path: Path,
    ask: Ask,
) -> None:
    sides = [perplexity_results(tmp_path / str(n), score) for n, score in enumerate(scores)]
    arguments = f"--baseline {sides[0]} --candidate {sides[1]} --rule threshold {options}"
    code, document = ask(compare_main, arguments)
    assert code == exit_code, document["detail"]
    assert words in document["detail"]


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--directions", '{"copy":"lower"}', "--scales", '{"copy":2.5}'], 0, "within"),
        (["--directions", '{"copy":"higher"}'], 1, "copy: 0.7 to 0.6"),
        ([], 1, "copy: 0.7 to 0.6"),
        (
            ["--directions", '{"other":"lower"}'],
            2,
            "--directions: other: names a task that has no score",
        ),
        (["--directions", '{"copy":"down"}'], 2, "--directions: copy: "),
        (["--directions", "[]"], 2, "--directions: "),
        (["--directions", "{"], 2, "--directions: is not usable JSON"),
    ],
    ids=["lower", "higher", "not-given", "unknown-task", "unknown-value", "list", "broken"],
)
def test_directions_of_score_files(
    options: list[str], exit_code: int, words: str, ask: Ask
) -> None:
    files = f"--baseline {DATA / 'scores-baseline.json'} --candidate {DATA / 'scores-below.json'}"
    code, document = ask(compare_main, [*files.split(), *options])
    assert code == exit_code, document["detail"]
    assert words in document["detail"]


def test_directions_against_those_of_the_results_are_refused(ask: Ask) -> None:
    sides = f"--baseline {RESULTS} --candidate {RESULTS}"
    code, document = ask(compare_main, sides + ' --directions {"reverse":"lower"}')
    assert code == 2
    assert "--directions: reverse: the results say" in document["detail"]


def test_lower_scores_in_files_need_a_scale(tmp_path: Path, ask: Ask) -> None:
    file = tmp_path / "scores.json"
    file.write_text('{"ppl": 12.0}')
    arguments = f'--baseline {file} --candidate {file} --directions {{"ppl":"lower"}}'
    code, document = ask(compare_main, arguments)
    assert code == 2
    assert "give --scales or --relative" in document["detail"]


def samples_file(path: Path, scores: list[Any], **fields: Any) -> Path:
    questions = [f"{n}:doc:prompt" for n in range(len(scores))]
    entry = {"metric": "acc", "scale": 1.0, "questions": questions, "scores": scores, **fields}
    path.write_text(json.dumps({"tasks": {"copy": entry}}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("lost", "options", "exit_code", "failure_class"),
    [
        (0, "", 0, None),
        (0, "--rule noninferiority", 0, None),
        (20, "--rule noninferiority", 1, "ACCURACY_REGRESSION"),
        (5, "", 1, "INSUFFICIENT_EVIDENCE"),
        (5, "--threshold 0.1", 0, None),
        (5, "--rule threshold", 0, None),
        (5, '--directions {"copy":"lower"}', 0, None),
        (5, '--questions {"copy":9}', 2, "USER_CONFIG_ERROR"),
        (5, '--clusters {"copy":"story"}', 2, "USER_CONFIG_ERROR"),
        (5, '--scales {"other":1}', 2, "USER_CONFIG_ERROR"),
    ],
    ids=["default", "asked", "worse", "undecided", "wide", "threshold", "lower", "n", "c", "scale"],
)
def test_samples_documents_are_compared(
    lost: int, options: str, exit_code: int, failure_class: str | None, tmp_path: Path, ask: Ask
) -> None:
    baseline = samples_file(tmp_path / "base.json", [1] * 500)
    candidate = samples_file(tmp_path / "cand.json", [0] * lost + [1] * (500 - lost))
    code, document = ask(compare_main, f"--baseline {baseline} --candidate {candidate} {options}")
    assert (code, document["failure_class"]) == (exit_code, failure_class), document["detail"]


def test_a_mix_of_samples_and_scores_is_held_to_the_threshold(tmp_path: Path, ask: Ask) -> None:
    samples = samples_file(tmp_path / "samples.json", [1] * 70 + [0] * 30)
    bare = DATA / "scores-baseline.json"
    code, document = ask(compare_main, f"--baseline {bare} --candidate {samples}")
    assert code == 0
    assert "copy, 100 questions: " in document["notes"][-1]
    sides = f"--baseline {bare} --candidate {samples} --rule noninferiority"
    code, document = ask(compare_main, sides)
    assert code == 2
    assert document["detail"].startswith(f"{bare}: holds scores alone")


def test_the_risk_of_bare_scores_is_told_with_their_questions(ask: Ask) -> None:
    files = f"--baseline {DATA / 'scores-baseline.json'} --candidate {DATA / 'scores-below.json'}"
    _, document = ask(compare_main, files)
    assert "is unknown without the numbers of questions" in document["notes"][-1]
    _, document = ask(compare_main, files + ' --questions {"copy":300}')
    assert "copy, 300 questions: 27 % and 11 %" in document["notes"][-1]
    code, document = ask(compare_main, files + ' --questions {"copy":0}')
    assert code == 2
    assert document["detail"].startswith("--questions: copy: ")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scores": [1, 0, "x"]}, "tasks.copy.scores[2]"),
        ({"scores": [1]}, "tasks.copy.scores: must have one entry for each of the 3 questions"),
        ({"questions": ["a", "a", "b"]}, "tasks.copy.questions[1]"),
        ({"extra": 1}, "tasks.copy.extra"),
    ],
    ids=["text", "length", "twice", "unknown"],
)
@pytest.mark.parametrize("main", [compare_main, verbosity_main])
def test_samples_documents_that_cannot_be_read(
    main: Main, fields: Document, words: str, tmp_path: Path, ask: Ask
) -> None:
    bad = samples_file(tmp_path / "bad.json", [1, 0, 1])
    document = json.loads(bad.read_text(encoding="utf-8"))
    document["tasks"]["copy"] |= fields
    bad.write_text(json.dumps(document), encoding="utf-8")
    code, document = ask(main, f"--baseline {bad} --candidate {bad}")
    assert code == 2
    assert str(bad) in document["detail"]
    assert words in document["detail"]


def test_a_samples_document_too_large_for_the_strict_parser(
    tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor.gate_commands.documents.LARGEST_DOCUMENT_BYTES", 100)
    samples = samples_file(tmp_path / "samples.json", [1] * 400)
    code, _ = ask(compare_main, f"--baseline {samples} --candidate {samples}")
    assert code == 0
    (bare := tmp_path / "bare.json").write_text(json.dumps({f"task {n}": 1 for n in range(99)}))
    (broken := tmp_path / "broken.json").write_text('{"tasks": {' + " " * 200)
    for path, words in ((bare, "of bare scores"), (broken, "is not usable JSON")):
        code, document = ask(compare_main, f"--baseline {path} --candidate {path}")
        assert code == 2
        assert words in document["detail"]


def test_directories_are_compared_by_their_samples(tmp_path: Path, ask: Ask) -> None:
    shutil.copytree(RESULTS, tmp_path / "again")
    sides = f"--baseline {RESULTS} --candidate {tmp_path / 'again'}"
    code, document = ask(compare_main, sides)
    assert (code, document["failure_class"]) == (1, "INSUFFICIENT_EVIDENCE")
    assert document["per_task"]["compare"]["questions"] == 5
    code, document = ask(compare_main, f"{sides} --rule threshold")
    assert code == 0
    _, document = ask(compare_main, f'{sides} --clusters {{"compare":"nothing"}}')
    assert document["failure_class"] == "USER_CONFIG_ERROR"
    code, document = ask(compare_main, f'{sides} --clusters {{"absent":"id"}}')
    assert code == 2
    assert "--clusters: absent" in document["detail"]


@pytest.mark.parametrize(
    ("factor", "exit_code", "failure_class"),
    [(1.0, 0, None), (1.2, 1, "VERBOSITY_EXCEEDED"), (1.05, 1, "INSUFFICIENT_EVIDENCE")],
    ids=["same", "longer", "at-the-limit"],
)
def test_lengths_of_single_answers_are_decided_by_an_interval(
    factor: float, exit_code: int, failure_class: str | None, tmp_path: Path, ask: Ask
) -> None:
    lengths = [100 + n % 50 for n in range(200)]
    longer = [length * (factor + (0.1 if n % 2 else -0.1)) for n, length in enumerate(lengths)]
    baseline = samples_file(tmp_path / "base.json", [1] * 200, lengths=lengths)
    candidate = samples_file(tmp_path / "cand.json", [1] * 200, lengths=longer)
    code, document = ask(verbosity_main, f"--baseline {baseline} --candidate {candidate}")
    assert (code, document["failure_class"]) == (exit_code, failure_class), document["detail"]
    assert "delta_upper" in document["per_task"]["copy"]
    means = tmp_path / "means.json"
    means.write_text(json.dumps({"copy": [[sum(lengths) / 200, 200]]}))
    code, document = ask(verbosity_main, f"--baseline {means} --candidate {candidate}")
    assert "delta_upper" not in document["per_task"]["copy"]


def test_a_perplexity_of_directories_needs_a_relative_margin(tmp_path: Path, ask: Ask) -> None:
    sides = [perplexity_results(tmp_path / str(n), score) for n, score in enumerate((12.0, 12.05))]
    code, document = ask(compare_main, f"--baseline {sides[0]} --candidate {sides[1]}")
    assert code == 2
    assert "tasks.reverse: a perplexity has no full score" in document["detail"]
    code, document = ask(compare_main, f"--baseline {sides[0]} --candidate {sides[1]} --relative")
    assert (code, document["failure_class"]) == (1, "INSUFFICIENT_EVIDENCE")
    assert document["per_task"]["reverse"]["method"] == "ratio"


def test_a_directory_of_results_is_compared_in_length(ask: Ask) -> None:
    code, document = ask(verbosity_main, f"--baseline {RESULTS} --candidate {RESULTS}")
    assert code == 0
    assert document["max_abs_delta"] == 0


def launcher_run(side: Path, run: str, task: str, tokens: float) -> None:
    artifacts = side / run / "invocation" / task / "artifacts"
    artifacts.mkdir(parents=True)
    metrics = {"response_stats": {"avg_completion_tokens": tokens, "successful_count": 10}}
    (artifacts / "eval_factory_metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


def test_runs_that_were_left_out_are_named(tmp_path: Path, ask: Ask) -> None:
    for name in ("baseline", "candidate"):
        launcher_run(tmp_path / name, "eval_low", "h.kept", 100.0)
        launcher_run(tmp_path / name, "eval_high", "h.kept", 900.0)
        launcher_run(tmp_path / name, "eval_high", "h.gone", 900.0)
    sides = f"--baseline {tmp_path / 'baseline'} --candidate {tmp_path / 'candidate'}"
    code, document = ask(verbosity_main, f"{sides} --exclude _high")
    assert code == 0
    assert "DROPPED BEFORE COMPARISON: ['h.gone']" in document["detail"]
    assert document["partially_excluded_tasks"] == ["h.kept"]
    assert document["harvest_diagnostics"]["baseline"]["excluded_run_dirs"] == ["eval_high"]
    code, document = ask(verbosity_main, f"{sides} --glob nothing_*")
    assert code == 2
    assert "--glob" in document["detail"]


def test_a_device_is_not_read(ask: Ask) -> None:
    code, document = ask(run_main, "--run /dev/zero")
    assert code == 2
    assert "is not a regular file" in document["detail"]


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        pytest.param(ptq_main, "", "give --summary", id="ptq-nothing"),
        pytest.param(ptq_main, "--checkpoint a --source b", "--recipe", id="ptq-no-recipe"),
        pytest.param(ptq_main, "--summary a --source b", "either", id="ptq-both"),
        pytest.param(
            ptq_main, "--checkpoint a --source b --recipe x", "unknown recipe 'x'", id="ptq-recipe"
        ),
        pytest.param(ptq_main, "--bogus", "gate_ptq --help", id="ptq-unknown-option"),
        pytest.param(run_main, "", "--run", id="run-nothing"),
        pytest.param(compare_main, "--baseline a", "--candidate", id="compare-one-side"),
        pytest.param(
            compare_main,
            "--baseline a --candidate b --threshold x",
            "--threshold",
            id="not-a-number",
        ),
        pytest.param(verbosity_main, "--baseline a --candidate b", "a: ", id="verbosity-absent"),
    ],
)
def test_unusable_arguments_are_answered_in_json(
    main: Main, arguments: str, words: str, ask: Ask
) -> None:
    code, document = ask(main, arguments)
    assert code == 2
    assert words in document["detail"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--threshold nan", "threshold: must be a finite number, got NaN"),
        ("--threshold inf", "threshold: must be a finite number, got Infinity"),
        ("--threshold 1.5", "threshold: must be a fraction from 0 to 1"),
        ("--scales {", "--scales: is not usable JSON"),
        ('--scales {"copy":0}', "--scales: "),
        ('--scales {"other":1}', "scales.other: names a task that has no score"),
    ],
    ids=["nan", "infinite", "above-1", "broken-scales", "scale-zero", "scale-of-no-task"],
)
def test_comparison_options_that_are_refused(option: str, words: str, ask: Ask) -> None:
    files = f"--baseline {DATA / 'scores-baseline.json'} --candidate {DATA / 'scores-below.json'}"
    code, document = ask(compare_main, f"{files} {option}")
    assert code == 2
    assert document["decision"] is None
    assert words in document["detail"]


@pytest.mark.parametrize(
    ("baseline", "candidate", "options", "decision"),
    [
        ("scores-percent", "scores-fraction", "", "ANOMALOUS"),
        ("scores-zero", "scores-zero", "--relative", "ANOMALOUS"),
        ("scores-baseline", "scores-below", "--threshold 0.1", "ACCEPT"),
        ("scores-baseline", "scores-below", '--scales {"copy":100}', "ACCEPT"),
    ],
    ids=["unit-mix-up", "relative-to-zero", "wider-threshold", "stated-scale"],
)
def test_comparison_options(
    baseline: str, candidate: str, options: str, decision: str, ask: Ask
) -> None:
    files = f"--baseline {DATA / baseline}.json --candidate {DATA / candidate}.json"
    _, document = ask(compare_main, f"{files} {options}")
    assert document["decision"] == decision


def test_recipe_on_the_command_line_overrides_the_summary(ask: Ask) -> None:
    code, document = ask(ptq_main, f"--summary {DATA / 'checkpoint-good.json'} --recipe fp8")
    assert code == 1
    assert document["failure_class"] == "QUANT_COVERAGE_FAILURE"


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [("scores-at-threshold", 0), ("scores-below", 1), ("scores-list", 2)],
    ids=["passes", "fails", "unusable"],
)
def test_a_reader_that_left_costs_nothing_but_the_text(name: str, exit_code: int) -> None:
    """As in ``gate_compare ... | head -1``: no traceback, and the exit code that was due."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from conductor.gate_commands import compare_main; sys.exit(compare_main())"
    files = ["--baseline", DATA / "scores-baseline.json", "--candidate", DATA / f"{name}.json"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, files)],
            stdout=writing,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (exit_code, b"")


@pytest.mark.parametrize("name", ["scores-at-threshold", "scores-below", "scores-list", "--help"])
@pytest.mark.parametrize("output", [">/dev/full", ">&-"], ids=["full", "closed"])
def test_a_verdict_that_cannot_be_written_is_no_answer(name: str, output: str) -> None:
    code = "import sys; from conductor.gate_commands import compare_main; sys.exit(compare_main())"
    files = ["--baseline", DATA / "scores-baseline.json", "--candidate", DATA / f"{name}.json"]
    if name == "--help":
        files = [name]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {output}', "sh", sys.executable, "-c", code, *map(str, files)],
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("the answer could not be written to standard output: ")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["pipe", "socket", "circle", "long", "null"])
def test_paths_that_are_no_regular_file(
    command: str, kind: str, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("x" * 5000 if kind == "long" else "input.json")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "null":
        path = Path("in\0put.json")
    main, arguments, _ = COMMANDS[command]
    code, document = ask(main, arguments.format(path))
    assert code == 2
    assert document["failure_class"] == "USER_CONFIG_ERROR"


@pytest.mark.parametrize("kind", ["checkpoint", "source", "results"])
def test_directories_with_names_too_long(kind: str, tmp_path: Path, ask: Ask) -> None:
    long = "x" * 5000
    if kind == "results":
        code, _ = ask(run_main, f"--results {long}")
    else:
        sides = {"checkpoint": RESULTS, "source": RESULTS, kind: long}
        arguments = f"--checkpoint {sides['checkpoint']} --source {sides['source']} --recipe fp8"
        code, _ = ask(ptq_main, arguments)
    assert code == 2


@pytest.mark.parametrize("main", [ptq_main, run_main, compare_main, verbosity_main])
def test_help_teaches_by_example(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert "example:" in text
    assert "2  the input is unusable" in text


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("command", COMMANDS)
def test_any_bytes_are_answered_in_json(
    command: str, content: bytes, tmp_path: Path, ask: Ask
) -> None:
    path = tmp_path / "input.json"
    path.write_bytes(content)
    main, arguments, _ = COMMANDS[command]
    code, document = ask(main, arguments.format(path))
    assert code in (1, 2)
    assert not document["pass"]
