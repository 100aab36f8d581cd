"""Every check of every gate: met, just inside, at, just outside, absent, wrong type, hostile."""

from __future__ import annotations

import copy
import importlib.resources
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gates
from gates import (
    TRIAGE,
    Check,
    Decision,
    FailureClass,
    Outcome,
    StageFailure,
    Verdict,
    decide,
    evaluate_canary,
    evaluate_checkpoint,
    evaluate_comparison,
    evaluate_conditions,
    evaluate_external,
    evaluate_run,
    evaluate_verbosity,
)
from gates.canary import Health
from gates.decide import REQUIRED_GATES, Action
from gates.evidence import shown
from gates.findings import CHECKS, KINDS, MEASURES
from gates.verdict import plain

NAN, INF, HUGE = math.nan, math.inf, 10**400


def schema(name: str) -> Any:
    text = importlib.resources.files(gates).joinpath(f"schemas/{name}.json").read_text("utf-8")
    return jsonschema_rs.validator_for(text)


VERDICT_SCHEMA = schema("verdict")


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {
        "source_bytes": 1000,
        "output_bytes": 520,
        "recipe": "int8",
        "layer_precision_counts": {
            "INT8": 28,
            "BF16_or_excluded": 2,
            "unexpected_unquantized": 0,
            "declaration_mismatch": 0,
        },
        "metadata_diffs": [],
        **changes,
    }


def layers(**changes: Any) -> dict[str, Any]:
    return {"layer_precision_counts": checkpoint()["layer_precision_counts"] | changes}


def run(**changes: Any) -> dict[str, Any]:
    task = {
        "status": "SUCCESS",
        "expected_samples": 500,
        "scored_samples": 500,
        "score": 0.9,
        "scale": 1.0,
        "errors": [],
    }
    return {"tasks": {"copy": task | changes}}


def answer(**changes: Any) -> dict[str, Any]:
    return {
        "text": "Paris.",
        "tokens": ["Par", "is", "."],
        "logprobs": [-0.1, -0.2, -0.3],
        "finish_reason": "stop",
        "error": None,
        **changes,
    }


def canary(*answers: tuple[dict[str, Any], dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Evidence from (candidate, source) pairs."""
    pairs = answers or ((answer(), answer()),)
    return {
        "engine": "vllm",
        "served_name": "candidate",
        "expected_name": "candidate",
        "health": "ok",
        "health_detail": "",
        "prompts": [
            {"prompt": "Capital of France?", "candidate": c, "source": s} for c, s in pairs
        ],
        **changes,
    }


def without(document: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """Return a copy of the document with one field left out."""
    changed = copy.deepcopy(document)
    place = changed
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return changed


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field of a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield (*path, key)
        if isinstance(entry, (dict, list)):
            yield from fields(entry, (*path, key))


def replaced(document: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def deep(depth: int = 2000) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def passing(gate: str = "ptq", **changes: Any) -> Verdict:
    check = Check(subject="size", observed=1, limit=2, passed=True)
    values = {"gate": gate, "checks": (check,), "failure_class": None, "detail": "fine"}
    return Verdict(**values | changes)


def failing(failure_class: FailureClass | None, **changes: Any) -> Verdict:
    check = Check(subject="size", observed=3, limit=2, passed=False)
    return passing(checks=(check,), failure_class=failure_class, detail="bad", **changes)


@pytest.mark.parametrize(
    ("verdict", "passed"),
    [
        pytest.param(passing(), True, id="all-checks-hold"),
        pytest.param(passing(checks=()), False, id="no-checks"),
        pytest.param(passing(failure_class=FailureClass.UNKNOWN), False, id="names-a-failure"),
        pytest.param(failing(None), False, id="a-check-fails"),
    ],
)
def test_verdict_passes_only_with_checks_that_hold(verdict: Verdict, passed: bool) -> None:
    assert verdict.passed is verdict["pass"] is passed


def test_verdict_reads_like_its_document() -> None:
    verdict = passing()
    assert verdict == verdict.document()
    assert "gate" in verdict
    assert verdict.get("nothing") is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "true"),
        (NAN, "NaN"),
        (-INF, "-Infinity"),
        (HUGE, "an integer of about 401 digits"),
        ("x" * 99, repr("x" * 80 + "…")),
        ({"a": 1}, "a mapping of 1 entries"),
        (deep(), "a list of 1 entries"),
        (b"", "a bytes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_shown_is_short_whatever_the_value(value: object, words: str) -> None:
    assert shown(value) == words


@pytest.mark.parametrize("value", [NAN, INF, HUGE, deep(), {"a": {1, 2}}], ids=lambda v: type(v))
def test_plain_can_always_be_written_as_json(value: object) -> None:
    json.dumps(plain(value), allow_nan=False)


def finding(kind: str, *, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "count": count, "names": [], **more}


def sqnr(histogram: dict[str, Any], worst: Any = ()) -> dict[str, Any]:
    measurement = {"measure": "sqnr_shortfall_db", "group": "mlp", "histogram": histogram}
    return {"measurements": [{**measurement, "worst": worst}]}


@pytest.mark.parametrize(
    ("changes", "failure_class"),
    [
        pytest.param({}, None, id="met"),
        pytest.param({"output_bytes": 999}, None, id="size-just-inside"),
        pytest.param({"output_bytes": 1000}, "SIZE_NOT_REDUCED", id="size-at"),
        pytest.param({"output_bytes": 1001}, "SIZE_NOT_REDUCED", id="size-just-outside"),
        pytest.param({"source_precision": "int8", "output_bytes": 1100}, None, id="growth-at"),
        pytest.param(
            {"source_precision": "int8", "output_bytes": 1101},
            "SIZE_NOT_REDUCED",
            id="growth-above",
        ),
        pytest.param(
            {"source_precision": "fp8", "output_bytes": 1350, "expected_bytes": [1200, 1350]},
            None,
            id="growth-expected-of-a-quantized-source",
        ),
        pytest.param(
            {"source_precision": "fp8", "output_bytes": 1351, "expected_bytes": [1200, 1350]},
            "SIZE_NOT_REDUCED",
            id="growth-above-the-expected",
        ),
        pytest.param(
            {"source_precision": "bf16", "output_bytes": 1350, "expected_bytes": [1200, 1350]},
            "SIZE_NOT_REDUCED",
            id="growth-of-a-wide-source",
        ),
        pytest.param({"output_bytes": 0}, "USER_CONFIG_ERROR", id="size-zero"),
        pytest.param({"output_bytes": -5}, "USER_CONFIG_ERROR", id="size-negative"),
        pytest.param({"output_bytes": NAN}, "USER_CONFIG_ERROR", id="size-nan"),
        pytest.param({"output_bytes": True}, "USER_CONFIG_ERROR", id="size-bool"),
        pytest.param({"output_bytes": 0.5}, "USER_CONFIG_ERROR", id="size-half-a-byte"),
        pytest.param({"source_bytes": HUGE}, "USER_CONFIG_ERROR", id="size-400-digits"),
        pytest.param({"source_bytes": 1000.0}, None, id="size-whole-float"),
        pytest.param({"expected_bytes": [520, 520]}, None, id="expected-at"),
        pytest.param({"expected_bytes": [1, 519]}, "SIZE_NOT_REDUCED", id="expected-above"),
        pytest.param({"expected_bytes": [521, 900]}, "QUANT_COVERAGE_FAILURE", id="expected-below"),
        pytest.param({"expected_bytes": [600, 500]}, "USER_CONFIG_ERROR", id="expected-reversed"),
        pytest.param({"expected_bytes": [600]}, "USER_CONFIG_ERROR", id="expected-one-end"),
        pytest.param(
            {"expected_bytes": [1, 519], "accept_size_growth": True}, None, id="expected-accepted"
        ),
        pytest.param(
            {"expected_bytes": [521, 900], "accept_size_growth": True},
            "QUANT_COVERAGE_FAILURE",
            id="too-small-is-never-accepted",
        ),
        pytest.param(layers(INT8=1), None, id="one-layer"),
        pytest.param(layers(INT8=0), "MODEL_UNSUPPORTED", id="no-layer"),
        pytest.param(layers(unexpected_unquantized=1), "QUANT_COVERAGE_FAILURE", id="left-out"),
        pytest.param(layers(declaration_mismatch=1), "QUANT_COVERAGE_FAILURE", id="mismatch"),
        pytest.param(layers(FP8=1), "QUANT_COVERAGE_FAILURE", id="foreign-precision"),
        pytest.param(layers(FP8=0), None, id="foreign-precision-zero"),
        pytest.param(layers(FP4=3), "USER_CONFIG_ERROR", id="unknown-count"),
        pytest.param(layers(INT8=-1), "USER_CONFIG_ERROR", id="negative-count"),
        pytest.param(layers(INT8=True), "USER_CONFIG_ERROR", id="bool-count"),
        pytest.param({"layer_precision_counts": {"INT8": 28}}, "USER_CONFIG_ERROR", id="unchecked"),
        pytest.param({"layer_precision_counts": []}, "USER_CONFIG_ERROR", id="counts-list"),
        pytest.param({"metadata_diffs": None}, "USER_CONFIG_ERROR", id="diffs-null"),
        pytest.param({"metadata_diffs": ["x"]}, "QUANT_COVERAGE_FAILURE", id="diffs"),
        pytest.param({"recipe": ""}, "USER_CONFIG_ERROR", id="recipe-empty"),
        pytest.param({"recipe": None}, "USER_CONFIG_ERROR", id="recipe-null"),
        pytest.param({"recipe": ["int8"]}, "USER_CONFIG_ERROR", id="recipe-list"),
        pytest.param({"accept_size_growth": 1}, "USER_CONFIG_ERROR", id="accepted-by-one"),
        pytest.param({"source_precision": 8}, "USER_CONFIG_ERROR", id="precision-number"),
        pytest.param({"findings": {}}, "USER_CONFIG_ERROR", id="findings-mapping"),
        pytest.param(
            {"output_bytes": 0, "findings": [finding("unusable_header")]},
            "CHECKPOINT_NOT_SERVABLE",
            id="size-zero-explained",
        ),
        pytest.param({"findings": [finding("lost")]}, "QUANT_COVERAGE_FAILURE", id="finding"),
        pytest.param({"findings": [finding("lost", count=0)]}, None, id="finding-of-nothing"),
        pytest.param({"findings": [finding("added")]}, None, id="finding-to-note"),
        pytest.param({"findings": [finding("unheard_of")]}, None, id="finding-unknown"),
        pytest.param(
            {"findings": [finding("truncated")]}, "CHECKPOINT_NOT_SERVABLE", id="broken-file"
        ),
        pytest.param(
            {"findings": [finding("lost"), finding("truncated")]},
            "CHECKPOINT_NOT_SERVABLE",
            id="broken-file-first",
        ),
        pytest.param(
            {"findings": [finding("lost"), finding("not_loadable")]},
            "QUANT_COVERAGE_FAILURE",
            id="cause-before-engine",
        ),
        pytest.param(
            {"findings": [finding("unknown_format"), finding("not_intended")]},
            "MODEL_UNSUPPORTED",
            id="unknown-format",
        ),
        pytest.param(
            {"findings": [finding("lost"), finding("lost", count=0)]},
            "USER_CONFIG_ERROR",
            id="finding-given-twice",
        ),
        pytest.param(
            {"findings": [finding("lost", count=0, names=["a"])]},
            "USER_CONFIG_ERROR",
            id="finding-more-names-than-things",
        ),
        pytest.param({"examined": ["integrity", "numbers"]}, None, id="examined"),
        pytest.param({"examined": "numbers"}, "USER_CONFIG_ERROR", id="examined-text"),
        pytest.param(sqnr({"0": 9, "5": 1}), None, id="measure-just-inside"),
        pytest.param(sqnr({"0": 9, "6": 1}), "QUANT_COVERAGE_FAILURE", id="measure-at"),
        pytest.param(sqnr({"1000000": 1}), "QUANT_COVERAGE_FAILURE", id="measure-far-outside"),
        pytest.param(sqnr({"6": 0}), None, id="measure-of-nothing"),
        pytest.param(sqnr({"six": 1}), "USER_CONFIG_ERROR", id="measure-word"),
        pytest.param(sqnr({"-1": 1}), "USER_CONFIG_ERROR", id="measure-negative"),
        pytest.param(sqnr({"6": NAN}), "USER_CONFIG_ERROR", id="measure-nan"),
        pytest.param(sqnr({"6": True}), "USER_CONFIG_ERROR", id="measure-bool"),
        pytest.param({"measurements": [{}]}, "USER_CONFIG_ERROR", id="measure-empty"),
        pytest.param({"bits_per_weight": {"mlp": NAN}}, "USER_CONFIG_ERROR", id="bits-nan"),
        pytest.param({"numbers": {"kinds": []}}, "USER_CONFIG_ERROR", id="numbers-list"),
    ],
)
def test_checkpoint_checks(changes: dict[str, Any], failure_class: str | None) -> None:
    verdict = evaluate_checkpoint(checkpoint(**changes))
    assert verdict["failure_class"] == failure_class
    assert verdict["pass"] is (failure_class is None)


def test_checkpoint_says_what_was_found_where_and_what_to_do() -> None:
    found = {"kind": "lost", "count": 7, "groups": {"mtp": 6, "mlp": 1}, "names": list("abcdef")}
    noted = finding("added", groups={"mlp": 1}, names=["extra"])
    verdict = evaluate_checkpoint(checkpoint(findings=[noted, found]))
    kind = KINDS["lost"]
    sentence = f"7 {kind.says} (mtp 6, mlp 1): a, b, c, d, e and 2 more [{kind.remedy}]"
    assert verdict["detail"] == sentence
    assert verdict["checks"]["completeness"]["observed"] == {"lost": 7}
    assert verdict["notes"] == [f"1 {KINDS['added'].says} (mlp 1): extra"]
    assert [(f["kind"], f["failure_class"], f["names"]) for f in verdict["findings"]] == [
        ("lost", "QUANT_COVERAGE_FAILURE", list("abcdef")),
        ("added", None, ["extra"]),
    ]


def test_checkpoint_names_the_worst_of_what_was_measured() -> None:
    worst = [
        {"name": "good", "value": 5.9, "detail": ""},
        {"name": "bad", "value": 6.1, "detail": "3 dB, not 9"},
        {"name": "worse", "value": 12.0, "detail": ""},
    ]
    verdict = evaluate_checkpoint(checkpoint(**sqnr({"5": 1, "6": 1, "12": 1}, worst)))
    detail = verdict["detail"]
    assert detail.startswith("2 ")
    assert detail.index("worse (12 dB") < detail.index("bad (3 dB, not 9)")
    assert "good" not in detail


def test_checkpoint_says_so_where_a_finding_is_of_no_kind_known() -> None:
    summary = checkpoint(findings=[finding("unheard_of"), finding("FP8")])
    assert evaluate_checkpoint(summary)["notes"] == [
        "a finding of a kind that this gate does not know: 'unheard_of'"
    ]


@pytest.mark.parametrize("name", [*KINDS, *MEASURES])
def test_every_kind_belongs_to_a_check_and_can_be_said(name: str) -> None:
    kind = KINDS.get(name) or MEASURES[name]
    assert (kind.name, kind.check in CHECKS, bool(kind.says)) == (name, True, True)
    assert (name in KINDS) is not (name in MEASURES)


def test_layers_are_named_once_where_intent_was_examined() -> None:
    found = finding("left_unquantized", names=["model.layers.0.mlp.up_proj"])
    summary = checkpoint(findings=[found], examined=["intent"], **layers(unexpected_unquantized=1))
    verdict = evaluate_checkpoint(summary)
    assert not verdict["checks"]["unexpected_unquantized"]["passed"]
    assert verdict["detail"].count("1 layer(s)") == 1


def test_checkpoint_names_the_layers_behind_a_count() -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(20)]
    finding = {"kind": "unexpected_unquantized", "count": 24, "names": names}
    verdict = evaluate_checkpoint(
        checkpoint(findings=[finding], **layers(unexpected_unquantized=24))
    )
    assert "model.layers.4.mlp.up_proj and 19 more" in verdict["detail"]


def test_checkpoint_reports_every_failed_check() -> None:
    bad = checkpoint(output_bytes=2000, metadata_diffs=["x"], **layers(INT8=0, FP8=2))
    verdict = evaluate_checkpoint(bad)
    failed = {subject for subject, check in verdict["checks"].items() if not check["passed"]}
    assert failed == {"size", "coverage", "FP8", "metadata"}
    assert verdict["failure_class"] == "QUANT_COVERAGE_FAILURE"
    assert verdict["detail"].count("; ") >= 3


@pytest.mark.parametrize("row", ["mine", "Mine", "MINE_8"])
@pytest.mark.parametrize("change", [str, str.upper, str.lower, lambda name: f" {name}\n"])
def test_checkpoint_finds_a_recipe_that_the_caller_adds(
    row: str, change: Callable[[str], str]
) -> None:
    summary = checkpoint(recipe=change(row))
    recipes = {"other": gates.RECIPES["fp8"], row: gates.RECIPES["int8"]}
    assert evaluate_checkpoint(summary, recipes=recipes)["pass"]


@pytest.mark.parametrize(("name", "found"), [("mine", True), ("Mine", False), ("MINE", False)])
def test_checkpoint_prefers_the_recipe_as_written(name: str, found: bool) -> None:
    recipes = {"mine": gates.RECIPES["int8"], "Mine": gates.RECIPES["fp8"]}
    assert evaluate_checkpoint(checkpoint(recipe=name), recipes=recipes)["pass"] is found


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "matched none of the model's modules"),
        ({"BF16_or_excluded": 30}, "matched none of the model's modules"),
        (
            {"declaration_mismatch": 28},
            "the export did not follow recipe int8 (28 layer(s) not as declared or meant)",
        ),
        (
            {"unexpected_unquantized": 20, "FP8": 8},
            "did not follow recipe int8 (8 layer(s) in FP8, 20 layer(s) left unquantized)",
        ),
    ],
    ids=["nothing", "left-alone", "mismatch", "unquantized-and-foreign"],
)
def test_checkpoint_says_what_the_layers_are_if_none_is_covered(
    counts: dict[str, int], words: str
) -> None:
    verdict = evaluate_checkpoint(checkpoint(**layers(INT8=0, **counts)))
    nothing = not counts.keys() - {"BF16_or_excluded"}
    assert verdict["failure_class"] == (
        "MODEL_UNSUPPORTED" if nothing else "QUANT_COVERAGE_FAILURE"
    )
    assert words in verdict["detail"]
    assert ("matched none" in verdict["detail"]) is ("matched none" in words)


@pytest.mark.parametrize(
    ("changes", "failure_class"),
    [
        pytest.param({}, None, id="met"),
        pytest.param({"score": 1.0}, None, id="score-at-scale"),
        pytest.param({"score": 0.0}, None, id="score-zero"),
        pytest.param({"score": 1.0001}, "SAMPLE_ACCOUNTING_FAILED", id="score-above-scale"),
        pytest.param({"score": -0.0001}, "SAMPLE_ACCOUNTING_FAILED", id="score-negative"),
        pytest.param({"score": 90.0}, "SAMPLE_ACCOUNTING_FAILED", id="score-in-percent"),
        pytest.param({"score": NAN}, "SAMPLE_ACCOUNTING_FAILED", id="score-nan"),
        pytest.param({"score": INF}, "SAMPLE_ACCOUNTING_FAILED", id="score-infinite"),
        pytest.param({"score": True}, "SAMPLE_ACCOUNTING_FAILED", id="score-bool"),
        pytest.param({"score": HUGE}, "SAMPLE_ACCOUNTING_FAILED", id="score-400-digits"),
        pytest.param({"scored_samples": 499}, "SAMPLE_ACCOUNTING_FAILED", id="one-lost"),
        pytest.param({"scored_samples": 501}, "SAMPLE_ACCOUNTING_FAILED", id="one-too-many"),
        pytest.param({"scored_samples": None}, "SAMPLE_ACCOUNTING_FAILED", id="scored-null"),
        pytest.param({"expected_samples": "500"}, "SAMPLE_ACCOUNTING_FAILED", id="expected-text"),
        pytest.param({"expected_samples": True}, "SAMPLE_ACCOUNTING_FAILED", id="expected-bool"),
        pytest.param(
            {"expected_samples": -1, "scored_samples": -1},
            "SAMPLE_ACCOUNTING_FAILED",
            id="negative",
        ),
        pytest.param({"status": "PENDING"}, "INFRA_TRANSIENT", id="pending"),
        pytest.param({"status": "RESUMING"}, "INFRA_TRANSIENT", id="resuming"),
        pytest.param({"status": "FAILED"}, "UNKNOWN", id="failed"),
        pytest.param({"status": "KILLED"}, "UNKNOWN", id="killed"),
        pytest.param({"status": "success"}, "UNKNOWN", id="unknown-status"),
        pytest.param({"status": None}, "USER_CONFIG_ERROR", id="status-null"),
        pytest.param({"errors": ["parser gave up"]}, "UNKNOWN", id="other-error"),
        pytest.param(
            {"errors": [{"kind": "rate_limit", "message": "slow down"}]},
            "EVAL_JUDGE_FAILED",
            id="classified-error",
        ),
        pytest.param(
            {"errors": [{"kind": "other", "message": "judge"}]}, "UNKNOWN", id="kind-beats-prose"
        ),
        pytest.param(
            {"errors": [{"kind": "bad", "message": ""}]}, "USER_CONFIG_ERROR", id="unknown-kind"
        ),
        pytest.param({"errors": "judge failed"}, "USER_CONFIG_ERROR", id="errors-text"),
        pytest.param({"errors": [3]}, "USER_CONFIG_ERROR", id="error-number"),
        pytest.param({"scale": 0}, "USER_CONFIG_ERROR", id="scale-zero"),
        pytest.param({"stderr": NAN}, "USER_CONFIG_ERROR", id="stderr-nan"),
        pytest.param({"stderr": None}, None, id="stderr-null"),
    ],
)
def test_run_checks(changes: dict[str, Any], failure_class: str | None) -> None:
    verdict = evaluate_run(run(**changes))
    assert verdict["failure_class"] == failure_class
    assert verdict["pass"] is (failure_class is None)


@pytest.mark.parametrize(
    ("prose", "failure_class"),
    [
        ("Judge returned no verdict", "EVAL_JUDGE_FAILED"),
        ("HTTP 429 from endpoint", "EVAL_JUDGE_FAILED"),
        ("rate-limit exceeded", "EVAL_JUDGE_FAILED"),
        ("401 Unauthorized", "EVAL_JUDGE_FAILED"),
        ("authentication failed", "EVAL_JUDGE_FAILED"),
        ("author field missing", "UNKNOWN"),
        ("authored by nobody", "UNKNOWN"),
        ("sample 1401 could not be parsed", "UNKNOWN"),
        ("the judgement column is empty", "UNKNOWN"),
        ("separate limits apply", "UNKNOWN"),
        ("judge rate limit exceeded", "EVAL_JUDGE_FAILED"),
        ("RateLimitError: slow down", "EVAL_JUDGE_FAILED"),
        ("Error code: 429 - {'error': {}}", "EVAL_JUDGE_FAILED"),
        ("HTTP/1.1 429", "EVAL_JUDGE_FAILED"),
        ("HTTPError: 403", "EVAL_JUDGE_FAILED"),
        ("HTTP error: 403", "EVAL_JUDGE_FAILED"),
        ("HTTPStatusError: 429", "EVAL_JUDGE_FAILED"),
        ("status_code=401", "EVAL_JUDGE_FAILED"),
        ("{'code': 401}", "EVAL_JUDGE_FAILED"),
        ("API error (429)", "EVAL_JUDGE_FAILED"),
        ("403 Client Error: for url", "EVAL_JUDGE_FAILED"),
        ("403 Forbidden", "EVAL_JUDGE_FAILED"),
        ("invalid api key", "EVAL_JUDGE_FAILED"),
        ("Incorrect API key provided: sk-1", "EVAL_JUDGE_FAILED"),
        ("the api_key is not valid", "EVAL_JUDGE_FAILED"),
        ("quota exceeded", "EVAL_JUDGE_FAILED"),
        ("You exceeded your current quota", "EVAL_JUDGE_FAILED"),
        ("GPU 0: 429 MiB free", "UNKNOWN"),
        ("CUDA error: 429 MiB free", "UNKNOWN"),
        ("line 403: bad json", "UNKNOWN"),
        ("error on line 403", "UNKNOWN"),
        ("403 of 500 answers were empty", "UNKNOWN"),
        ("status code 4290", "UNKNOWN"),
        ("decode 429 tokens", "UNKNOWN"),
        ("HTTP 500 after 429 samples", "UNKNOWN"),
        ("Disk quota exceeded", "UNKNOWN"),
        ("you have exceeded your disk quota", "UNKNOWN"),
    ],
)
def test_run_classifies_prose_by_whole_words(prose: str, failure_class: str) -> None:
    assert evaluate_run(run(errors=[prose]))["failure_class"] == failure_class


def test_run_classifies_the_longest_prose_at_once() -> None:
    prose = "http error status " * 20_000 + "api key quota " * 20_000
    assert evaluate_run(run(errors=[prose]))["failure_class"] == "UNKNOWN"


def test_run_names_the_field_and_every_failure() -> None:
    verdict = evaluate_run(run(scored_samples=499, score=NAN))
    assert "tasks.copy.scored_samples: 499 of 500 scored" in verdict["detail"]
    assert "tasks.copy.score: must be a finite number, got NaN" in verdict["detail"]
    assert verdict["per_task"]["copy"]["ok"] is False


def test_run_says_that_a_scale_was_not_declared() -> None:
    verdict = evaluate_run(without(run(score=42.0), ("tasks", "copy", "scale")))
    assert verdict["pass"]
    assert "copy: no scale declared" in verdict["notes"][0]


@pytest.mark.parametrize(
    ("baseline", "candidate", "options", "decision"),
    [
        pytest.param(0.70, 0.6901, {}, "ACCEPT", id="just-inside"),
        pytest.param(0.70, 0.69, {}, "ACCEPT", id="at-in-fractions"),
        pytest.param(70, 69, {}, "ACCEPT", id="at-in-percent"),
        pytest.param(0.70, 0.6899, {}, "REGRESSION", id="just-outside"),
        pytest.param(70, 68.99, {}, "REGRESSION", id="just-outside-in-percent"),
        pytest.param(0.29, 0.28, {}, "ACCEPT", id="at-where-floats-round-up"),
        pytest.param(0.7, 0.75, {}, "ACCEPT", id="gain-at"),
        pytest.param(0.7, 0.7501, {}, "ANOMALOUS", id="gain-just-outside"),
        pytest.param(0.7, 0.7, {"threshold": 0}, "ACCEPT", id="threshold-zero-kept"),
        pytest.param(0.7, 0.6999, {"threshold": 0}, "REGRESSION", id="threshold-zero-lost"),
        pytest.param(0.7, 0.0, {"threshold": 1}, "ACCEPT", id="threshold-one"),
        pytest.param(0.5, 0.495, {"relative": True}, "ACCEPT", id="relative-at"),
        pytest.param(0.5, 0.4949, {"relative": True}, "REGRESSION", id="relative-just-outside"),
        pytest.param(0.0, 0.0, {"relative": True}, "ANOMALOUS", id="relative-to-zero"),
        pytest.param(0.0, 0.0, {}, "ACCEPT", id="absolute-from-zero"),
        pytest.param(57, 0.57, {}, "ANOMALOUS", id="units-mixed"),
        pytest.param(0.57, 57, {}, "ANOMALOUS", id="units-mixed-other-way"),
        pytest.param(57, 0.57, {"scales": {"t": 100}}, "ANOMALOUS", id="units-mixed-declared"),
        pytest.param(57, 0.57, {"scales": {"t": 1}}, "ANOMALOUS", id="outside-declared"),
        pytest.param(57, 0.0, {}, "REGRESSION", id="collapse-to-zero"),
        pytest.param(3.0, 0.9, {"scales": {"t": 100}}, "REGRESSION", id="low-scores-declared"),
        pytest.param(0.3, -0.1, {}, "ANOMALOUS", id="negative"),
        pytest.param(INF, 0.5, {}, "ANOMALOUS", id="infinite"),
        pytest.param(HUGE, 0.5, {}, "ANOMALOUS", id="400-digits"),
        pytest.param([], 0.5, {}, "ANOMALOUS", id="list"),
        pytest.param(
            2.0,
            2.02,
            {"scales": {"t": 10}, "directions": {"t": False}},
            "ACCEPT",
            id="lower-better",
        ),
        pytest.param(
            2.0, 2.2, {"scales": {"t": 10}, "directions": {"t": False}}, "REGRESSION", id="lower-up"
        ),
    ],
)
def test_comparison_checks(
    baseline: object, candidate: object, options: dict[str, Any], decision: str
) -> None:
    verdict = evaluate_comparison({"t": baseline}, {"t": candidate}, **options)
    assert verdict["decision"] == decision
    assert verdict["pass"] is (decision == "ACCEPT")
    expected = {"ACCEPT": None, "REGRESSION": "ACCURACY_REGRESSION"}
    assert verdict["failure_class"] == expected.get(decision, "IMPLAUSIBLE_SCORE")


@pytest.mark.parametrize(
    ("arguments", "options", "path"),
    [
        pytest.param(({"t": 1}, {"t": 1}), {"threshold": NAN}, "threshold", id="threshold-nan"),
        pytest.param(
            ({"t": 1}, {"t": 1}), {"threshold": INF}, "threshold", id="threshold-infinite"
        ),
        pytest.param(
            ({"t": 1}, {"t": 1}), {"threshold": 1.01}, "threshold", id="threshold-above-1"
        ),
        pytest.param(
            ({"t": 1}, {"t": 1}), {"threshold": -0.1}, "threshold", id="threshold-negative"
        ),
        pytest.param(({"t": 1}, {"t": 1}), {"threshold": True}, "threshold", id="threshold-bool"),
        pytest.param(({"t": 1}, {"t": 1}), {"threshold": "1"}, "threshold", id="threshold-text"),
        pytest.param(({"t": 1}, {"t": 1}), {"relative": "no"}, "relative", id="relative-text"),
        pytest.param(({"t": 1}, {"t": 1}), {"scales": {"u": 1}}, "scales.u", id="scale-of-no-task"),
        pytest.param(({"t": 1}, {"t": 1}), {"scales": {"t": INF}}, "scales.t", id="scale-infinite"),
        pytest.param(({"t": 1}, {"t": 1}), {"scales": {1: 1}}, "scales", id="scale-number-key"),
        pytest.param(
            ({"t": 1}, {"t": 1}),
            {"directions": {"u": True}},
            "directions.u",
            id="direction-no-task",
        ),
        pytest.param(([1], {"t": 1}), {}, "baseline", id="baseline-list"),
        pytest.param(({"t": 1}, None), {}, "candidate", id="candidate-null"),
        pytest.param(({}, {}), {}, "baseline", id="no-task"),
    ],
)
def test_comparison_refuses_what_it_cannot_read_and_decides_nothing(
    arguments: tuple[Any, Any], options: dict[str, Any], path: str
) -> None:
    verdict = evaluate_comparison(*arguments, **options)
    assert verdict["failure_class"] == "USER_CONFIG_ERROR"
    assert verdict["decision"] is None
    assert not verdict["pass"]
    assert verdict["detail"].startswith(f"{path}: ")


def test_comparison_says_when_it_inferred_a_scale() -> None:
    verdict = evaluate_comparison({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}, scales={"a": 1.0})
    assert verdict["notes"][0] == "b: scale 1 inferred from the scores"


def test_comparison_rows_are_exact() -> None:
    row = evaluate_comparison({"t": 0.7}, {"t": 0.69})["per_task"]["t"]
    assert (row["drop"], row["drop_fraction"], row["limit"], row["scale"]) == (0.01, 0.01, 0.01, 1)


@pytest.mark.parametrize(
    ("candidate", "failure_class"),
    [
        pytest.param([(1049.9, 100)], None, id="just-inside"),
        pytest.param([(1050, 100)], None, id="at"),
        pytest.param([(950, 100)], None, id="at-shorter"),
        pytest.param([(1050.1, 100)], "VERBOSITY_EXCEEDED", id="just-outside"),
        pytest.param([(949.9, 100)], "VERBOSITY_EXCEEDED", id="just-outside-shorter"),
        pytest.param([(0.0, 100)], "VERBOSITY_EXCEEDED", id="silent"),
        pytest.param([(1000, 101)], None, id="samples-at"),
        pytest.param([(1000, 102)], "SAMPLE_ACCOUNTING_FAILED", id="samples-outside"),
        pytest.param([(-1, 100)], "USER_CONFIG_ERROR", id="negative-tokens"),
        pytest.param([(NAN, 100)], "USER_CONFIG_ERROR", id="nan-tokens"),
        pytest.param([(1e308, 100)], "USER_CONFIG_ERROR", id="absurd-tokens"),
        pytest.param([(1000, 0)], "USER_CONFIG_ERROR", id="no-samples"),
        pytest.param([(1000, True)], "USER_CONFIG_ERROR", id="bool-samples"),
        pytest.param([(1000, 99.5)], "USER_CONFIG_ERROR", id="half-a-sample"),
        pytest.param([(1000, HUGE)], "USER_CONFIG_ERROR", id="400-digit-samples"),
        pytest.param([(1000,)], "USER_CONFIG_ERROR", id="row-too-short"),
        pytest.param([{"tokens": 1000}], "USER_CONFIG_ERROR", id="row-mapping"),
        pytest.param(None, "USER_CONFIG_ERROR", id="rows-null"),
    ],
)
def test_verbosity_checks(candidate: object, failure_class: str | None) -> None:
    verdict = evaluate_verbosity({"t": [(1000.0, 100)]}, {"t": candidate})
    assert verdict["failure_class"] == failure_class
    assert verdict["pass"] is (failure_class is None)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": NAN},
        {"threshold": -1},
        {"threshold": 2},
        {"threshold": True},
        {"dropped_tasks": "copy"},
        {"dropped_tasks": [1]},
        {"collapsed_keys": [1]},
    ],
    ids=str,
)
def test_verbosity_refuses_bad_options(options: dict[str, Any]) -> None:
    side = {"t": [(1000.0, 100)]}
    assert evaluate_verbosity(side, side, **options)["failure_class"] == "USER_CONFIG_ERROR"


@pytest.mark.parametrize(
    ("reference", "options", "failure_class"),
    [
        pytest.param(0.90, {}, None, id="met"),
        pytest.param(0.95, {}, None, id="at"),
        pytest.param(0.85, {}, None, id="at-below"),
        pytest.param(0.9501, {}, "EXTERNAL_BASELINE_MISMATCH", id="just-outside"),
        pytest.param(0.8499, {}, "EXTERNAL_BASELINE_MISMATCH", id="just-outside-below"),
        pytest.param(90, {}, "EXTERNAL_BASELINE_MISMATCH", id="other-unit"),
        pytest.param(0.95, {"tolerance": 0.01}, "EXTERNAL_BASELINE_MISMATCH", id="tighter"),
        pytest.param(0.90, {"tolerance": NAN}, "USER_CONFIG_ERROR", id="tolerance-nan"),
        pytest.param(0.90, {"scales": {"u": 1}}, "USER_CONFIG_ERROR", id="scale-of-no-task"),
        pytest.param("0.9", {}, "USER_CONFIG_ERROR", id="text"),
        pytest.param(NAN, {}, "USER_CONFIG_ERROR", id="nan"),
        pytest.param(-1, {}, "USER_CONFIG_ERROR", id="negative"),
    ],
)
def test_external_checks(
    reference: object, options: dict[str, Any], failure_class: str | None
) -> None:
    verdict = evaluate_external({"t": 0.9}, {"t": reference}, **options)
    assert verdict["failure_class"] == failure_class
    assert verdict["pass"] is (failure_class is None)


@pytest.mark.parametrize(
    ("score", "asked", "status", "failure_class"),
    [
        pytest.param(0.9, None, "verified", None, id="whole"),
        pytest.param(0.8, None, "failed", "EXTERNAL_BASELINE_MISMATCH", id="whole-off"),
        pytest.param(0.8, (500, 500), "failed", "EXTERNAL_BASELINE_MISMATCH", id="all-asked"),
        pytest.param(0.8, (20, 500), "externally unverified", None, id="few-and-off"),
        pytest.param(0.9, (20, 500), "externally unverified", None, id="few"),
        pytest.param(0.9, (450, 500), "verified", None, id="most"),
        pytest.param(0.8, (499, 500), "failed", "EXTERNAL_BASELINE_MISMATCH", id="many-and-off"),
        pytest.param(0.3, (20, 500), "failed", "EXTERNAL_BASELINE_MISMATCH", id="few-and-far-off"),
    ],
)
def test_external_of_a_part_needs_the_interval_to_be_off(
    score: float, asked: tuple[int, int] | None, status: str, failure_class: str | None
) -> None:
    reference = {"score": 0.9, "source": "model card", "protocol": "5-shot"}
    verdict = evaluate_external(
        {"t": score}, {"t": reference}, scales={"t": 1.0}, asked={"t": asked} if asked else None
    )
    assert verdict["failure_class"] == failure_class
    row = verdict["per_task"]["t"]
    assert row["status"] == status
    assert (row["published"], row["source"], row["protocol"]) == (0.9, "model card", "5-shot")
    assert row["difference"] == pytest.approx(score - 0.9)
    assert (verdict["notes"] == []) is (status != "externally unverified")


@pytest.mark.parametrize(
    ("reference", "asked", "path"),
    [
        pytest.param({}, None, "references.t.score", id="no-score"),
        pytest.param({"score": NAN}, None, "references.t.score", id="nan"),
        pytest.param({"score": 0.9, "source": 1}, None, "references.t.source", id="source-number"),
        pytest.param({"score": 0.9, "protocol": []}, None, "references.t.protocol", id="protocol"),
        pytest.param(0.9, {"t": 5}, "asked.t", id="asked-number"),
        pytest.param(0.9, {"t": (5,)}, "asked.t", id="asked-alone"),
        pytest.param(0.9, {"t": (0, 5)}, "asked.t[0]", id="asked-nothing"),
        pytest.param(0.9, {"t": (6, 5)}, "asked.t", id="asked-more-than-there-is"),
        pytest.param(0.9, {"t": (5, HUGE)}, "asked.t[1]", id="asked-400-digits"),
        pytest.param(0.9, {"u": (5, 5)}, "asked.u", id="asked-no-task"),
        pytest.param(0.9, [1], "asked", id="asked-list"),
    ],
)
def test_external_refuses_odd_references(reference: object, asked: object, path: str) -> None:
    verdict = evaluate_external({"t": 0.9}, {"t": reference}, asked=asked)
    assert verdict["failure_class"] == "USER_CONFIG_ERROR"
    assert verdict["detail"].startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        pytest.param(None, "unknown without the numbers of questions", id="unknown"),
        pytest.param({}, "unknown without the numbers of questions", id="empty"),
        pytest.param({"t": 300}, "t, 300 questions: 27 % and 11 %", id="few"),
        pytest.param({"t": 12000}, "t, 12,000 questions: 0 % and 0 %", id="many"),
    ],
)
def test_the_threshold_rule_says_how_often_it_is_wrong(questions: object, words: str) -> None:
    verdict = evaluate_comparison({"t": 0.7}, {"t": 0.7}, scales={"t": 1}, questions=questions)
    assert verdict.passed
    (note,) = verdict.notes
    assert words in note


@pytest.mark.parametrize("questions", [{"u": 1}, {"t": 0}, {"t": True}, {"t": HUGE}, [1]], ids=str)
def test_odd_numbers_of_questions_are_refused(questions: object) -> None:
    verdict = evaluate_comparison({"t": 0.7}, {"t": 0.7}, questions=questions)
    assert verdict["failure_class"] == "USER_CONFIG_ERROR"
    assert verdict["detail"].startswith("questions")


@pytest.mark.parametrize("references", [{}, None], ids=["empty", "none"])
def test_external_refuses_to_check_nothing(references: object) -> None:
    verdict = evaluate_external({"a": 0.9, "b": 0.8}, references)
    assert not verdict["pass"]
    assert verdict["failure_class"] == "USER_CONFIG_ERROR"
    assert verdict["detail"] == "references: no reference was given: leave this gate out"


def test_external_names_tasks_without_a_reference() -> None:
    verdict = evaluate_external({"a": 0.9, "b": 0.8}, {"a": 0.9}, scales={"a": 1.0})
    assert verdict["pass"]
    assert verdict["notes"] == ["b: externally unverified"]


@pytest.mark.parametrize(
    ("scores", "references"),
    [({}, {}), ({"a": NAN}, {}), ([], {}), ({"a": 0.9}, {"b": 0.9}), ({"a": 0.9}, [0.9])],
    ids=["no-scores", "nan-score", "scores-list", "reference-of-no-task", "references-list"],
)
def test_external_refuses_what_it_cannot_read(scores: object, references: object) -> None:
    verdict = evaluate_external(scores, references)
    assert verdict["failure_class"] == "USER_CONFIG_ERROR"
    assert not verdict["pass"]


LOOP = answer(text="la" * 8, tokens=["la"] * 8, logprobs=[-0.1] * 8)
RUNNING_ON = answer(finish_reason="length")
SILENT = answer(text="", tokens=[], logprobs=[])


@pytest.mark.parametrize(
    ("document", "failure_class"),
    [
        pytest.param(canary(), None, id="met"),
        pytest.param(canary((answer(text="Lyon."), answer())), None, id="another-answer"),
        pytest.param(canary(health="died"), "CHECKPOINT_NOT_SERVABLE", id="died"),
        pytest.param(canary(health="killed"), "DEPLOYMENT_HEALTH_FAILED", id="killed"),
        pytest.param(
            canary(health="timeout", prompts=[]), "DEPLOYMENT_HEALTH_FAILED", id="timed-out"
        ),
        pytest.param(canary(health="port_taken"), "INFRA_TRANSIENT", id="port-taken"),
        pytest.param(canary(served_name="other"), "DEPLOYMENT_HEALTH_FAILED", id="other-model"),
        pytest.param(canary(served_name=None), "DEPLOYMENT_HEALTH_FAILED", id="name-unknown"),
        pytest.param(canary(prompts=[]), "USER_CONFIG_ERROR", id="nothing-asked"),
        pytest.param(canary(health="fine"), "USER_CONFIG_ERROR", id="unknown-health"),
        pytest.param(canary((SILENT, answer())), "CHECKPOINT_NOT_SERVABLE", id="silent"),
        pytest.param(
            canary((answer(text=None), answer())), "CHECKPOINT_NOT_SERVABLE", id="null-text"
        ),
        pytest.param(
            canary((answer(error="500"), answer())), "CHECKPOINT_NOT_SERVABLE", id="request-failed"
        ),
        pytest.param(canary((LOOP, answer())), "CHECKPOINT_NOT_SERVABLE", id="loop"),
        pytest.param(canary((LOOP, LOOP), (answer(), answer())), None, id="loops-like-the-source"),
        pytest.param(
            canary((answer(tokens=["a"] * 7, logprobs=[-0.1] * 7), answer())), None, id="short-loop"
        ),
        pytest.param(canary((RUNNING_ON, answer())), "CHECKPOINT_NOT_SERVABLE", id="never-stops"),
        pytest.param(canary((RUNNING_ON, RUNNING_ON)), None, id="neither-stops"),
        pytest.param(
            canary((RUNNING_ON, answer()), (answer(), answer())), None, id="stops-somewhere"
        ),
        pytest.param(
            canary((answer(finish_reason=None), answer())),
            "CHECKPOINT_NOT_SERVABLE",
            id="no-finish-reason",
        ),
        pytest.param(
            canary((answer(logprobs=[-0.1, NAN, -0.1]), answer())),
            "CHECKPOINT_NOT_SERVABLE",
            id="nan",
        ),
        pytest.param(
            canary((answer(logprobs=[-0.1, None, -0.1]), answer())),
            "CHECKPOINT_NOT_SERVABLE",
            id="null-logprob",
        ),
        pytest.param(canary((answer(logprobs=[-5.0] * 3), answer())), None, id="mean-at-the-floor"),
        pytest.param(
            canary((answer(logprobs=[-5.01] * 3), answer())), "CHECKPOINT_NOT_SERVABLE", id="noise"
        ),
        pytest.param(
            canary((answer(logprobs=[-1e308] * 3), answer())),
            "CHECKPOINT_NOT_SERVABLE",
            id="absurd",
        ),
        pytest.param(
            canary((answer(logprobs=[0.5] * 3), answer())), "CHECKPOINT_NOT_SERVABLE", id="positive"
        ),
        pytest.param(
            canary((answer(logprobs=[]), answer())), "CHECKPOINT_NOT_SERVABLE", id="no-logprobs"
        ),
        pytest.param(
            canary((answer(logprobs=["-0.1"] * 3), answer())),
            "USER_CONFIG_ERROR",
            id="text-logprob",
        ),
        pytest.param(canary((answer(), SILENT)), "UNKNOWN", id="source-broken-everywhere"),
        pytest.param(canary((SILENT, SILENT)), "UNKNOWN", id="both-broken"),
        pytest.param(
            canary((answer(), SILENT), (answer(), answer())), None, id="source-broken-once"
        ),
        pytest.param(canary(source_health="ok"), None, id="source-healthy"),
        pytest.param(canary(source_health=None), None, id="source-health-null"),
        pytest.param(
            canary(source_health="ok", health="died"),
            "CHECKPOINT_NOT_SERVABLE",
            id="died-beside-a-healthy-source",
        ),
        pytest.param(
            canary(source_health="ok", health="timeout"),
            "DEPLOYMENT_HEALTH_FAILED",
            id="timed-out-beside-a-healthy-source",
        ),
        *(
            pytest.param(
                canary(source_health=source, health=candidate, prompts=[]),
                "SYSTEMIC",
                id=f"source-{source}-candidate-{candidate}",
            )
            for source in ("died", "killed", "timeout", "port_taken")
            for candidate in ("ok", "died", "timeout", "port_taken")
        ),
        pytest.param(canary(source_health="died"), "SYSTEMIC", id="source-died-after-answers"),
        pytest.param(
            canary(source_health="ok", prompts=[]), "USER_CONFIG_ERROR", id="nobody-asked"
        ),
        pytest.param(canary(source_health="fine"), "USER_CONFIG_ERROR", id="source-health-unknown"),
        pytest.param(canary(source_health=True), "USER_CONFIG_ERROR", id="source-health-bool"),
        pytest.param(
            canary(source_health="ok", source_health_detail=3), "USER_CONFIG_ERROR", id="detail-3"
        ),
        pytest.param(
            canary((answer(tokens=["Par", None, "."]), answer())), None, id="token-without-text"
        ),
        pytest.param(
            canary((answer(tokens=["Par", 3, "."]), answer())), "USER_CONFIG_ERROR", id="token-3"
        ),
    ],
)
def test_canary_checks(document: dict[str, Any], failure_class: str | None) -> None:
    verdict = evaluate_canary(document)
    assert verdict["failure_class"] == failure_class
    assert verdict["pass"] is (failure_class is None)


def test_canary_repeats_what_the_server_said() -> None:
    dead = evaluate_canary(canary(health="died", health_detail="no kernel for NVFP4"))
    assert "no kernel for NVFP4" in dead["detail"]
    reason = "ran out of memory"
    neither = canary(health="died", source_health="died", source_health_detail=reason)
    verdict = evaluate_canary(neither)
    assert (
        f"not even the source can be served with these settings: died: {reason}"
        in (verdict["detail"])
    )
    assert set(verdict["checks"]) == {"source_health", "health"}
    source = evaluate_canary(canary(source_health="timeout"))
    assert source["detail"] == (
        "the source cannot be served with these settings: timeout: its server gave no reason"
    )
    refused = evaluate_canary(canary((answer(error="HTTP 500: boom"), answer())))
    assert "prompts[0].candidate: the request failed (HTTP 500: boom)" in refused["detail"]


@pytest.mark.parametrize(
    ("baseline", "candidate", "failure_class"),
    [
        pytest.param({"seed": 1, "url": "a"}, {"seed": 1, "url": "b"}, None, id="met"),
        pytest.param({"seed": 1}, {"seed": 2}, "CONDITIONS_DIFFER", id="different"),
        pytest.param({"seed": 1}, {"seed": True}, "CONDITIONS_DIFFER", id="another-type"),
        pytest.param({"seed": 1, "limit": None}, {"seed": 1}, "CONDITIONS_DIFFER", id="one-side"),
        pytest.param({"url": "a"}, {"url": "b"}, "USER_CONFIG_ERROR", id="nothing-to-compare"),
        pytest.param([], {"seed": 1}, "USER_CONFIG_ERROR", id="list"),
    ],
)
def test_conditions_checks(baseline: object, candidate: object, failure_class: str | None) -> None:
    verdict = evaluate_conditions(baseline, candidate, may_differ={"url"})
    assert verdict["failure_class"] == failure_class
    assert verdict["pass"] is (failure_class is None)


ALL_PASS = {gate: passing(gate) for gate in REQUIRED_GATES}


def outcome_of(*failures: FailureClass) -> Outcome:
    return decide({f"gate {i}": failing(failure) for i, failure in enumerate(failures)})


def test_decision_is_accept_only_when_every_required_gate_passes() -> None:
    outcome = decide(ALL_PASS)
    assert (outcome.decision, outcome.exit_code, outcome.publish) == ("ACCEPT", 0, "publish")
    assert all(gate in outcome.reasons[0] for gate in REQUIRED_GATES)


@pytest.mark.parametrize("gate", REQUIRED_GATES)
def test_decision_is_never_accept_with_a_gate_missing(gate: str) -> None:
    outcome = decide({name: verdict for name, verdict in ALL_PASS.items() if name != gate})
    assert outcome.decision is Decision.ANOMALOUS
    assert outcome.reasons == (f"{gate}: the gate gave no verdict",)


@pytest.mark.parametrize("gate", REQUIRED_GATES)
def test_decision_is_never_accept_with_a_gate_that_checked_nothing(gate: str) -> None:
    outcome = decide(ALL_PASS | {gate: passing(gate, checks=())})
    assert outcome.decision is Decision.ANOMALOUS
    assert outcome.failure_class is FailureClass.UNKNOWN


def test_decision_without_required_gates_is_not_accept() -> None:
    assert decide(ALL_PASS, required=()).decision is Decision.ANOMALOUS


def test_decision_of_a_suite_without_generation_needs_no_verbosity() -> None:
    needed = tuple(gate for gate in REQUIRED_GATES if gate != "verbosity")
    verdicts = {gate: ALL_PASS[gate] for gate in needed}
    assert decide(verdicts, required=needed).decision is Decision.ACCEPT
    verdicts["verbosity"] = failing(FailureClass.VERBOSITY_EXCEEDED)
    assert decide(verdicts, required=needed).decision is Decision.REGRESSION


EXPECTED_ENDS = {
    "INFRA_TRANSIENT": (None, 5),
    "OUT_OF_MEMORY": (None, 5),
    "SYSTEMIC": (None, 5),
    "USER_CONFIG_ERROR": (None, 2),
    "MODEL_UNSUPPORTED": ("INFEASIBLE", 4),
    "QUANT_COVERAGE_FAILURE": ("INFEASIBLE", 4),
    "SIZE_NOT_REDUCED": ("INFEASIBLE", 4),
    "CHECKPOINT_NOT_SERVABLE": ("INFEASIBLE", 4),
    "DEPLOYMENT_HEALTH_FAILED": ("INFEASIBLE", 4),
    "EVAL_JUDGE_FAILED": ("ANOMALOUS", 3),
    "SAMPLE_ACCOUNTING_FAILED": ("ANOMALOUS", 3),
    "EXTERNAL_BASELINE_MISMATCH": ("ANOMALOUS", 3),
    "CONDITIONS_DIFFER": ("ANOMALOUS", 3),
    "IMPLAUSIBLE_SCORE": ("ANOMALOUS", 3),
    "ANSWERS_REPLAYED": ("ANOMALOUS", 3),
    "INSUFFICIENT_EVIDENCE": ("ANOMALOUS", 3),
    "UNKNOWN": ("ANOMALOUS", 3),
    "ACCURACY_REGRESSION": ("REGRESSION", 1),
    "VERBOSITY_EXCEEDED": ("REGRESSION", 1),
}


@pytest.mark.parametrize("failure_class", FailureClass)
def test_every_failure_class_ends_as_its_row_says(failure_class: FailureClass) -> None:
    outcome = outcome_of(failure_class)
    assert (outcome.decision, outcome.exit_code) == EXPECTED_ENDS[failure_class]
    assert outcome.failure_class is failure_class
    assert outcome.next_action == TRIAGE[failure_class].next_action
    assert outcome.publish != "publish"


@pytest.mark.parametrize("failure_class", FailureClass)
def test_no_next_action_asks_for_what_cannot_be_done(failure_class: FailureClass) -> None:
    assert "resume" not in TRIAGE[failure_class].next_action


@pytest.mark.parametrize("failure_class", FailureClass)
def test_triage_rows_retry_only_where_they_say_so(failure_class: FailureClass) -> None:
    row = TRIAGE[failure_class]
    retries = row.action in (Action.RETRY_ONCE, Action.WAIT_AND_RETRY)
    assert retries is (row.retries > 0) is (row.after_retries is not row.action)
    assert (row.action is Action.WAIT_AND_RETRY) is (row.wait_s > 0)


@pytest.mark.parametrize(
    ("failures", "decision"),
    [
        (("ACCURACY_REGRESSION", "EXTERNAL_BASELINE_MISMATCH"), "ANOMALOUS"),
        (("VERBOSITY_EXCEEDED", "QUANT_COVERAGE_FAILURE"), "INFEASIBLE"),
        (("QUANT_COVERAGE_FAILURE", "SYSTEMIC"), None),
        (("SYSTEMIC", "USER_CONFIG_ERROR"), None),
    ],
    ids=["mistrust-first", "infeasible-first", "broken-world-first", "bad-request-first"],
)
def test_the_gravest_failure_decides_and_all_are_named(
    failures: tuple[str, ...], decision: str | None
) -> None:
    outcome = outcome_of(*(FailureClass(failure) for failure in failures))
    assert outcome.decision == decision
    assert outcome.failure_class == failures[-1]
    assert len(outcome.reasons) == len(failures)


@pytest.mark.parametrize("decision", ["REGRESSION", "ANOMALOUS"])
def test_a_gate_that_decided_for_itself_is_taken_at_its_word(decision: str) -> None:
    own = failing(FailureClass.UNKNOWN, gate="compare", decision=Decision(decision))
    assert decide(ALL_PASS | {"compare": own}).decision == decision


def test_a_gate_that_passes_and_decides_against_is_not_accepted() -> None:
    contradiction = passing("compare", decision=Decision.REGRESSION)
    assert decide(ALL_PASS | {"compare": contradiction}).decision is Decision.REGRESSION


def test_a_stage_that_failed_without_a_verdict_counts() -> None:
    crash = StageFailure(stage="ptq", failure_class=FailureClass.INFRA_TRANSIENT, message="killed")
    outcome = decide(ALL_PASS, failures=[crash])
    assert (outcome.decision, outcome.exit_code) == (None, 5)
    assert outcome.reasons == ("ptq: killed",)


REQUIRED_FIELDS: dict[str, tuple[Callable[[Any], Verdict], dict[str, Any], set[Any]]] = {
    "checkpoint": (evaluate_checkpoint, checkpoint(), {"BF16_or_excluded"}),
    "run": (evaluate_run, run(), {"scale"}),
    "canary": (evaluate_canary, canary(), {0, 1, 2}),
}


@pytest.mark.parametrize(
    ("gate", "path"),
    [
        pytest.param(gate, path, id=f"{gate}-{'.'.join(map(str, path))}")
        for gate, (_, good, optional) in REQUIRED_FIELDS.items()
        for path in fields(good)
        if path[-1] not in optional
    ],
)
def test_a_field_that_is_absent_is_never_good(gate: str, path: tuple[Any, ...]) -> None:
    evaluate, good, _ = REQUIRED_FIELDS[gate]
    assert evaluate(good)["pass"]
    assert not evaluate(without(good, path))["pass"]


@pytest.mark.parametrize("value", [None, True, NAN, INF, HUGE, -1, "x", [], {}, deep()], ids=shown)
@pytest.mark.parametrize(
    ("gate", "path"),
    [
        pytest.param("checkpoint", ("source_bytes",), id="source_bytes"),
        pytest.param("checkpoint", ("output_bytes",), id="output_bytes"),
        pytest.param("checkpoint", ("recipe",), id="recipe"),
        pytest.param("checkpoint", ("layer_precision_counts",), id="counts"),
        pytest.param("checkpoint", ("layer_precision_counts", "INT8"), id="count"),
        pytest.param("checkpoint", ("layer_precision_counts", "declaration_mismatch"), id="wrong"),
        pytest.param("run", ("tasks",), id="tasks"),
        pytest.param("run", ("tasks", "copy"), id="task"),
        pytest.param("run", ("tasks", "copy", "status"), id="status"),
        pytest.param("run", ("tasks", "copy", "scored_samples"), id="scored_samples"),
        pytest.param("run", ("tasks", "copy", "score"), id="score"),
        pytest.param("canary", ("health",), id="health"),
        pytest.param("canary", ("prompts",), id="prompts"),
        pytest.param("canary", ("prompts", 0), id="prompt"),
        pytest.param("canary", ("prompts", 0, "candidate"), id="answer"),
        pytest.param("canary", ("prompts", 0, "candidate", "logprobs"), id="logprobs"),
    ],
)
def test_a_field_of_the_wrong_kind_is_never_good(
    gate: str, path: tuple[Any, ...], value: object
) -> None:
    evaluate, good, _ = REQUIRED_FIELDS[gate]
    verdict = evaluate(replaced(good, path, value))
    assert not verdict["pass"]
    VERDICT_SCHEMA.validate(json.loads(json.dumps(verdict.document(), allow_nan=False)))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def cyclic() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


@pytest.mark.parametrize(
    "make",
    [lambda: nested(3000), lambda: nested(64), cyclic],
    ids=["deep", "just-deeper", "cyclic"],
)
@pytest.mark.parametrize("sides", [1, 2])
def test_conditions_nested_without_end_are_refused(make: Callable[[], object], sides: int) -> None:
    other = make() if sides == 2 else 1
    verdict = evaluate_conditions({"seed": 1, "x": other}, {"seed": 1, "x": make()})
    assert verdict["failure_class"] == "USER_CONFIG_ERROR"
    assert ".x: is nested more than 64 deep, or holds itself" in verdict["detail"]


def test_conditions_nested_as_deep_as_allowed() -> None:
    assert evaluate_conditions({"x": nested(63)}, {"x": nested(63)}).passed


@pytest.mark.parametrize(
    ("scale", "scores", "noted"),
    [
        (100.0, (0.7, 0.1), True),
        (50.0, (1.0, 0.9), True),
        (49.0, (0.7, 0.6), False),
        (100.0, (1.1, 0.9), False),
        (1.0, (0.7, 0.7), False),
    ],
    ids=["fractions", "at-both-limits", "smaller-scale", "one-above-1", "scale-1"],
)
def test_scores_that_may_be_fractions_of_a_large_scale_are_noted(
    scale: float, scores: tuple[float, float], noted: bool
) -> None:
    verdict = evaluate_comparison({"t": scores[0]}, {"t": scores[1]}, scales={"t": scale})
    assert verdict["decision"] == "ACCEPT" or not noted
    assert any("are they fractions?" in note for note in verdict["notes"]) is noted


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(HUGE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

EVALUATE: dict[str, Callable[[Any], Verdict]] = {
    "checkpoint": evaluate_checkpoint,
    "run": evaluate_run,
    "canary": evaluate_canary,
    "baseline": lambda value: evaluate_comparison(value, {"t": 0.5}),
    "candidate": lambda value: evaluate_comparison({"t": 0.5}, value),
    "verbosity": lambda value: evaluate_verbosity(value, {"t": [(10, 10)]}),
    "scores": lambda value: evaluate_external(value, {"t": 0.5}),
    "conditions": lambda value: evaluate_conditions(value, {"seed": 1}),
}


@pytest.mark.parametrize("gate", EVALUATE)
@given(value=ANY_VALUE)
def test_a_hostile_document_never_passes_and_never_raises(gate: str, value: object) -> None:
    verdict = EVALUATE[gate](value)
    assert not verdict["pass"]
    assert verdict["failure_class"] is not None
    VERDICT_SCHEMA.validate(json.loads(json.dumps(verdict.document(), allow_nan=False)))


@given(data=st.data())
@pytest.mark.parametrize("gate", REQUIRED_FIELDS)
def test_a_document_with_one_hostile_field_never_raises(gate: str, data: st.DataObject) -> None:
    evaluate, good, _ = REQUIRED_FIELDS[gate]
    path = data.draw(st.sampled_from(list(fields(good))))
    verdict = evaluate(replaced(good, path, data.draw(ANY_VALUE)))
    VERDICT_SCHEMA.validate(json.loads(json.dumps(verdict.document(), allow_nan=False)))


@given(
    baseline=st.integers(0, 10_000), drop=st.integers(0, 10_000), threshold=st.integers(0, 10_000)
)
def test_fractions_and_percentages_get_the_same_answer(
    baseline: int, drop: int, threshold: int
) -> None:
    """Scores with four decimals, as a fraction of 1 and as a fraction of 100."""
    candidate = max(0, baseline - drop)
    answers = [
        evaluate_comparison(
            {"t": baseline / unit},
            {"t": candidate / unit},
            threshold=threshold / 10_000,
            scales={"t": 10_000 / unit},
        )
        for unit in (10_000, 100)
    ]
    within = baseline - candidate <= threshold
    assert answers[0]["per_task"]["t"]["within_threshold"] is within
    # Against a scale of 100, a score of at most 1 beside a hundred times as much is a unit mix-up.
    if answers[1]["decision"] != "ANOMALOUS":
        assert answers[1]["per_task"]["t"]["within_threshold"] is within


@pytest.mark.parametrize("health", Health)
def test_canary_schema_knows_every_health(health: Health) -> None:
    document = canary((answer(tokens=["Par", None, "."]), answer()))
    schema("canary_evidence").validate(document | {"health": health, "source_health": health})


@pytest.mark.parametrize("name", ["checkpoint", "run", "canary"])
def test_documents_that_pass_fit_their_schema(name: str) -> None:
    names = {"checkpoint": "checkpoint_summary", "run": "run_summary", "canary": "canary_evidence"}
    schema(names[name]).validate(REQUIRED_FIELDS[name][1])
