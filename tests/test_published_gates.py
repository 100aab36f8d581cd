"""The calling forms and answers that programs written for the published day-0 gates rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conductor import gate_commands
from gates import (
    evaluate_checkpoint,
    evaluate_comparison,
    evaluate_run,
    evaluate_verbosity,
)
from gates.criteria import PRECISION_BITS, RECIPES

SOURCE_BYTES = 20_000
LITTLE_GROWTH = 21_000
DOUBLED = 40_000


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {
        "source_bytes": SOURCE_BYTES,
        "output_bytes": 9_000,
        "recipe": "nvfp4",
        "layer_precision_counts": {
            "NVFP4": 70,
            "BF16_or_excluded": 2,
            "unexpected_unquantized": 0,
            "declaration_mismatch": 0,
        },
        "metadata_diffs": [],
        **changes,
    }


def counts(**layers: int) -> dict[str, int]:
    return {"unexpected_unquantized": 0, "declaration_mismatch": 0, **layers}


def task(**changes: Any) -> dict[str, Any]:
    return {
        "status": "SUCCESS",
        "expected_samples": 40,
        "scored_samples": 40,
        "score": 61.5,
        "errors": [],
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "failure_class"),
    [
        pytest.param({}, None, id="good"),
        pytest.param({"output_bytes": SOURCE_BYTES}, "SIZE_NOT_REDUCED", id="same-size"),
        pytest.param(
            {"layer_precision_counts": counts(NVFP4=0)}, "MODEL_UNSUPPORTED", id="nothing-covered"
        ),
        pytest.param(
            {"layer_precision_counts": counts(NVFP4=60, unexpected_unquantized=10)},
            "QUANT_COVERAGE_FAILURE",
            id="layers-left-out",
        ),
        pytest.param(
            {
                "output_bytes": DOUBLED,
                "layer_precision_counts": counts(NVFP4=60, unexpected_unquantized=10),
            },
            "QUANT_COVERAGE_FAILURE",
            id="coverage-outranks-size",
        ),
        pytest.param({"metadata_diffs": ["eos_token_id"]}, "QUANT_COVERAGE_FAILURE", id="metadata"),
        pytest.param({"recipe": "fp8_bf16_kv"}, "USER_CONFIG_ERROR", id="unknown-recipe"),
        pytest.param(
            {"recipe": "nope", "output_bytes": LITTLE_GROWTH, "source_precision": "bf16"},
            "USER_CONFIG_ERROR",
            id="unknown-recipe-outranks-growth",
        ),
    ],
)
def test_checkpoint_failure_classes(changes: dict[str, Any], failure_class: str | None) -> None:
    verdict = evaluate_checkpoint(checkpoint(**changes))
    assert verdict["pass"] is (failure_class is None)
    assert verdict["failure_class"] == failure_class


FP8 = {"recipe": "fp8", "layer_precision_counts": counts(FP8=70)}


@pytest.mark.parametrize(
    ("changes", "output_bytes", "note"),
    [
        pytest.param({"source_precision": "mxfp4"}, LITTLE_GROWTH, "waived", id="mxfp4"),
        pytest.param({"source_precision": " MXFP4 "}, LITTLE_GROWTH, "waived", id="untidy-name"),
        pytest.param({**FP8, "source_precision": "fp8"}, LITTLE_GROWTH, "waived", id="fp8"),
        pytest.param({**FP8, "source_precision": "int8"}, LITTLE_GROWTH, "waived", id="int8"),
        pytest.param({**FP8, "source_precision": "mxfp8"}, LITTLE_GROWTH, "waived", id="mxfp8"),
        pytest.param({"accept_size_growth": True}, DOUBLED, "accepted explicitly", id="accepted"),
        pytest.param(
            {"accept_size_growth": True, "source_precision": "mxfp4"},
            LITTLE_GROWTH,
            "takes precedence",
            id="both",
        ),
    ],
)
def test_growth_is_waived_with_a_note(
    changes: dict[str, Any], output_bytes: int, note: str
) -> None:
    verdict = evaluate_checkpoint(checkpoint(output_bytes=output_bytes, **changes))
    assert verdict["pass"]
    assert note in verdict["notes"][0]
    declared = "no source precision declared" not in verdict["notes"][0]
    assert declared is ("source_precision" in changes)


@pytest.mark.parametrize(
    ("changes", "output_bytes", "reason"),
    [
        pytest.param({}, LITTLE_GROWTH, "None is not a recognised", id="undeclared"),
        pytest.param(
            {"source_precision": "mxfp4 and some bf16"},
            LITTLE_GROWTH,
            "'mxfp4 and some bf16' is not a recognised",
            id="prose",
        ),
        pytest.param(
            {"source_precision": "not_mxfp4"}, LITTLE_GROWTH, "not a recognised", id="substring"
        ),
        pytest.param({"source_precision": "bf16"}, LITTLE_GROWTH, "should compress", id="wide"),
        pytest.param(
            {**FP8, "source_precision": "bf16"}, LITTLE_GROWTH, "should compress", id="wide-fp8"
        ),
        pytest.param({"source_precision": "mxfp4"}, DOUBLED, "explains at most", id="too-much"),
    ],
)
def test_unexplained_growth_is_refused_without_naming_what_would_pass(
    changes: dict[str, Any], output_bytes: int, reason: str
) -> None:
    verdict = evaluate_checkpoint(checkpoint(output_bytes=output_bytes, **changes))
    assert verdict["failure_class"] == "SIZE_NOT_REDUCED"
    assert reason in verdict["detail"]
    assert "checkpoint-validation.md" in verdict["detail"]
    assert "int4" not in verdict["detail"]


def test_size_messages_point_at_a_page_that_exists() -> None:
    root = Path(__file__).parent.parent
    assert (root / "docs/reference/checkpoint-validation.md").is_file()


def test_growth_is_accepted_by_the_literal_true_only() -> None:
    grown = checkpoint(output_bytes=LITTLE_GROWTH, accept_size_growth="false")
    assert not evaluate_checkpoint(grown)["pass"]


def test_recipes_name_a_precision_of_known_width() -> None:
    for recipe in RECIPES.values():
        assert recipe.bits == PRECISION_BITS[recipe.bucket.lower()]
        assert recipe.bits <= recipe.weight_bits < 16


@pytest.mark.parametrize(
    ("changes", "failure_class"),
    [
        pytest.param({}, None, id="good"),
        pytest.param({"scored_samples": 39}, "SAMPLE_ACCOUNTING_FAILED", id="lost-a-sample"),
        pytest.param({"errors": ["judge: rate limit hit"]}, "EVAL_JUDGE_FAILED", id="judge"),
        pytest.param({"score": None}, "SAMPLE_ACCOUNTING_FAILED", id="no-score"),
        pytest.param({"score": "61.5"}, "SAMPLE_ACCOUNTING_FAILED", id="score-as-text"),
        pytest.param({"status": "TIMEOUT"}, "INFRA_TRANSIENT", id="timed-out"),
        pytest.param({"status": "RUNNING", "score": None}, "INFRA_TRANSIENT", id="running"),
    ],
)
def test_run_failure_classes(changes: dict[str, Any], failure_class: str | None) -> None:
    verdict = evaluate_run({"tasks": {"mmlu": task(), "ifeval": task(**changes)}})
    assert verdict["pass"] is (failure_class is None)
    assert verdict["failure_class"] == failure_class


def test_run_without_tasks_is_a_request_error() -> None:
    assert evaluate_run({"tasks": {}})["failure_class"] == "USER_CONFIG_ERROR"


@pytest.mark.parametrize(
    ("baseline", "candidate", "options", "decision"),
    [
        pytest.param(60.0, 59.5, {}, "ACCEPT", id="half-a-point"),
        pytest.param(60.0, 57.0, {}, "REGRESSION", id="three-points"),
        pytest.param(60.0, 70.0, {}, "ANOMALOUS", id="ten-points-up"),
        pytest.param(60.0, 130.0, {}, "ANOMALOUS", id="above-the-scale"),
        pytest.param(0.80, 0.795, {}, "ACCEPT", id="fraction-half-a-point"),
        pytest.param(1.0, 0.0, {}, "REGRESSION", id="fraction-collapse"),
        pytest.param(60.0, 59.5, {"relative": True}, "ACCEPT", id="relative-within"),
        pytest.param(60.0, 59.3, {"relative": True}, "REGRESSION", id="relative-beyond"),
        pytest.param(0.8, 0.6, {"scales": {"t": 100.0}}, "ACCEPT", id="declared-percent"),
        pytest.param(60.0, 59.5, {"scales": None}, "ACCEPT", id="scales-none"),
        pytest.param(60.0, 59.5, {"scales": {}}, "ACCEPT", id="scales-empty"),
        pytest.param(60.0, 59.5, {"scales": []}, "ACCEPT", id="scales-empty-list"),
        pytest.param(60.0, "59", {}, "ANOMALOUS", id="text"),
        pytest.param(60.0, None, {}, "ANOMALOUS", id="null"),
        pytest.param(60.0, float("nan"), {}, "ANOMALOUS", id="nan"),
        pytest.param(60.0, True, {}, "ANOMALOUS", id="bool"),
    ],
)
def test_comparison_decisions(
    baseline: float, candidate: object, options: dict[str, Any], decision: str
) -> None:
    verdict = evaluate_comparison({"t": baseline}, {"t": candidate}, threshold=0.01, **options)
    assert verdict["decision"] == decision
    assert verdict["pass"] is (decision == "ACCEPT")


def test_comparison_names_only_the_task_that_fell() -> None:
    verdict = evaluate_comparison({"keeps": 60.0, "falls": 1.0}, {"keeps": 59.9, "falls": 0.0})
    assert verdict["decision"] == "REGRESSION"
    assert "falls" in verdict["detail"]
    assert "keeps" not in verdict["detail"]
    assert set(verdict["per_task"]["falls"]) >= {
        "baseline",
        "candidate",
        "drop",
        "drop_fraction",
        "scale",
        "within_threshold",
    }


def test_comparison_of_different_task_sets_is_an_accounting_failure() -> None:
    verdict = evaluate_comparison({"a": 60.0}, {"b": 60.0})
    assert verdict["failure_class"] == "SAMPLE_ACCOUNTING_FAILED"
    assert verdict["decision"] == "ANOMALOUS"


@pytest.mark.parametrize(
    "scales",
    [[1, 2], 5, {"t": "100"}, {"t": 0}, {"t": -5}, {"t": float("nan")}, {"t": True}],
    ids=str,
)
def test_comparison_refuses_bad_scales(scales: object) -> None:
    verdict = evaluate_comparison({"t": 60.0}, {"t": 59.5}, scales=scales)
    assert verdict["failure_class"] == "USER_CONFIG_ERROR"


Runs = list[tuple[float, int]]


@pytest.mark.parametrize(
    ("baseline", "candidate", "failure_class"),
    [
        pytest.param([(2000.0, 50)], [(2050.0, 50)], None, id="within"),
        pytest.param([(2000.0, 50)], [(2300.0, 50)], "VERBOSITY_EXCEEDED", id="longer"),
        pytest.param([(2000.0, 50)], [(1700.0, 50)], "VERBOSITY_EXCEEDED", id="shorter"),
        pytest.param(
            [(2000.0, 50)], [(2000.0, 30)], "SAMPLE_ACCOUNTING_FAILED", id="other-sample-count"
        ),
        pytest.param([(2000.0, 200)], [(2000.0, 198)], None, id="one-percent-fewer-samples"),
        pytest.param([(0.0, 50)], [(5.0, 50)], "SAMPLE_ACCOUNTING_FAILED", id="zero-baseline"),
        pytest.param([], [(5.0, 50)], "SAMPLE_ACCOUNTING_FAILED", id="one-side-only"),
    ],
)
def test_verbosity_failure_classes(
    baseline: Runs, candidate: Runs, failure_class: str | None
) -> None:
    verdict = evaluate_verbosity({"t": baseline}, {"t": candidate})
    assert verdict["failure_class"] == failure_class
    assert verdict["pass"] is (failure_class is None)
    assert {"not_comparable", "max_abs_delta"} <= set(verdict)


def test_verbosity_compares_runs_of_the_largest_size_on_both_sides() -> None:
    verdict = evaluate_verbosity(
        {"t": [(900.0, 300), (2000.0, 200)]}, {"t": [(900.0, 280), (2010.0, 200)]}
    )
    row = verdict["per_task"]["t"]
    assert row["status"] == "compared"
    assert row["sample_counts"] == [200]
    assert "n=300" in row["truncated_comparison"]
    assert row["dropped_mismatched_runs"] == 2


def test_verbosity_averages_runs_of_one_size_and_leaves_partial_ones_out() -> None:
    verdict = evaluate_verbosity(
        {"t": [(100.0, 20), (3000.0, 60), (3100.0, 60)]}, {"t": [(3060.0, 60)]}
    )
    row = verdict["per_task"]["t"]
    assert row["baseline_tokens"] == 3050.0
    assert row["dropped_mismatched_runs"] == 1
    assert "truncated_comparison" not in row
    assert verdict["pass"]
    assert verdict["max_abs_delta"] == 0.0033


def test_verbosity_names_what_it_did_not_measure() -> None:
    verdict = evaluate_verbosity(
        {"a": [(2000.0, 50)], "b": [(2000.0, 50)]},
        {"a": [(2000.0, 50)], "b": [(2000.0, 40)]},
        dropped_tasks=["c"],
    )
    assert verdict["pass"]
    assert verdict["not_comparable"] == ["b"]
    assert "NOT MEASURED: ['b']" in verdict["detail"]
    assert "DROPPED BEFORE COMPARISON: ['c']" in verdict["detail"]


@pytest.mark.parametrize("candidate", [[(4000.0, 50)], [(2000.0, 9)]], ids=["fails", "unmeasured"])
def test_verbosity_names_dropped_tasks_when_it_fails_too(candidate: Runs) -> None:
    verdict = evaluate_verbosity({"a": [(2000.0, 50)]}, {"a": candidate}, dropped_tasks=["c"])
    assert not verdict["pass"]
    assert "DROPPED BEFORE COMPARISON" in verdict["detail"]


def test_verbosity_warns_of_short_outputs_and_judges_them() -> None:
    verdict = evaluate_verbosity({"t": [(300.0, 50)]}, {"t": [(400.0, 50)]})
    assert "short_output_warning" in verdict["per_task"]["t"]
    assert verdict["failure_class"] == "VERBOSITY_EXCEEDED"


def test_verbosity_does_not_pool_tasks_that_share_a_key() -> None:
    verdict = evaluate_verbosity(
        {"k": [(100.0, 9)]}, {"k": [(100.0, 9)]}, collapsed_keys={"k": ["k.0", "k.1"]}
    )
    assert verdict["failure_class"] == "USER_CONFIG_ERROR"
    assert "layout not understood" in verdict["detail"]


@pytest.mark.parametrize(
    ("found_artifacts", "failure_class"),
    [(True, "SAMPLE_ACCOUNTING_FAILED"), (False, "USER_CONFIG_ERROR")],
    ids=["dead-evaluation", "wrong-path"],
)
def test_verbosity_without_metrics(found_artifacts: bool, failure_class: str) -> None:
    verdict = evaluate_verbosity({}, {}, found_artifacts=found_artifacts)
    assert verdict["failure_class"] == failure_class


def launcher_side(root: Path, tokens: float) -> str:
    artifacts = root / "eval_1" / "invocation" / "harness.task" / "artifacts"
    artifacts.mkdir(parents=True)
    metrics = {"response_stats": {"avg_completion_tokens": tokens, "successful_count": 10}}
    (artifacts / "eval_factory_metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return str(root)


@pytest.mark.parametrize(
    ("candidate", "exit_code"),
    [pytest.param(101.0, 0, id="alike"), pytest.param(250.0, 1, id="longer")],
)
def test_verbosity_command_reads_launcher_directories(
    candidate: float, exit_code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [launcher_side(tmp_path / "b", 100.0), launcher_side(tmp_path / "c", candidate)]
    argv = ["--baseline", sides[0], "--candidate", sides[1]]
    assert gate_commands.verbosity_main(argv) == exit_code
    assert set(json.loads(capsys.readouterr().out)["per_task"]) == {"harness.task"}
