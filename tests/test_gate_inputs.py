"""Evidence on file: what a gate was asked, and the same answer when it is asked again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gates
from conductor.evidence.gate_inputs import (
    GATES,
    GateInputError,
    ask,
    decision_inputs,
    file_decision,
    file_inputs,
    judge,
    judge_decision,
    on_our_evidence,
    remark,
)
from conductor.redaction import REDACTED
from gates import RECIPES, Check, FailureClass, StageFailure, Verdict

SETTINGS = {"seed": 1, "temperature": 0.0, "url": "http://a"}


def conditions(**changes: Any) -> Any:
    return ask(
        "conditions",
        gates.evaluate_conditions,
        baseline=SETTINGS,
        candidate={**SETTINGS, **changes},
        may_differ=frozenset({"url"}),
    )


def filed(run_dir: Path, name: str) -> Any:
    return json.loads((run_dir / "evidence" / f"{name}.json").read_text())


def test_every_gate_of_a_release_may_be_asked() -> None:
    assert set(gates.REQUIRED_GATES) == set(GATES)


def test_what_is_filed_gives_the_same_verdict(tmp_path: Path) -> None:
    asked = conditions(url="http://b", seed=2)
    assert file_inputs(tmp_path, asked) == asked.verdict
    again = filed(tmp_path, "conditions")
    assert again["gate"] == "conditions"
    assert again["function"] == "evaluate_conditions"
    assert again["arguments"]["may_differ"] == ["url"]
    assert judge(again) == asked.verdict
    assert asked.verdict.failure_class is FailureClass.CONDITIONS_DIFFER


def test_the_same_question_is_filed_as_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "evidence" / "conditions.json"
    file_inputs(tmp_path, conditions())
    before = path.read_bytes()
    file_inputs(tmp_path, conditions())
    assert path.read_bytes() == before


def test_remarks_join_the_detail_and_change_no_check() -> None:
    plain = conditions(seed=2)
    told = remark(plain, ["3 questions differ"])
    assert told.verdict.detail == f"{plain.verdict.detail}; 3 questions differ"
    assert told.verdict.checks == plain.verdict.checks
    assert judge(json.loads(json.dumps(told.inputs))) == told.verdict


def test_recipes_travel_as_documents() -> None:
    asked = ask("ptq", gates.evaluate_checkpoint, summary={"recipe": "int8"}, recipes=RECIPES)
    direct = gates.evaluate_checkpoint({"recipe": "int8"}, recipes=RECIPES)
    assert asked.verdict == direct
    assert judge(json.loads(json.dumps(asked.inputs))) == direct


def test_secrets_are_not_filed_and_the_verdict_does_not_know_them() -> None:
    token = "hf_" + "a1B2" * 8
    asked = conditions(header=f"Bearer {token}")
    assert token not in json.dumps(asked.inputs)
    assert token not in json.dumps(asked.verdict.document())
    assert REDACTED in asked.inputs["arguments"]["candidate"]["header"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"gate": "nonsense"}, "the gates are ptq", id="unknown-gate"),
        pytest.param({"gate": ["ptq"]}, "the gates are ptq", id="gate-no-text"),
        pytest.param({"function": "evaluate_canary"}, "does not answer", id="other-function"),
        pytest.param({"function": None}, "does not answer", id="no-function"),
        pytest.param({"arguments": []}, "must be a mapping", id="arguments-list"),
        pytest.param({"arguments": {"x": 1}}, "unexpected keyword", id="unknown-argument"),
        pytest.param({"arguments": {}}, "missing", id="no-arguments"),
        pytest.param({"remarks": None}, "list of sentences", id="no-remarks"),
        pytest.param({"arguments": {"recipes": 3}}, "recipes", id="recipes-number"),
        pytest.param({"arguments": {"recipes": {"a": {}}}}, "recipes", id="recipe-empty"),
    ],
)
def test_evidence_that_is_none_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(GateInputError, match=words):
        judge({**conditions().inputs, **change})


def verdict(failure_class: FailureClass | None = None) -> Verdict:
    check = Check(subject="x", observed=0, limit=0, passed=failure_class is None)
    return Verdict(gate="g", checks=(check,), failure_class=failure_class, detail="said the test")


def test_evidence_of_ours_that_cannot_be_read_is_no_fault_of_the_user() -> None:
    unreadable = verdict(FailureClass.USER_CONFIG_ERROR)
    assert on_our_evidence(unreadable).failure_class is FailureClass.UNKNOWN
    assert on_our_evidence(verdict()) == verdict()


def test_a_decision_is_made_again_from_its_file(tmp_path: Path) -> None:
    verdicts = {"ptq": verdict(), "compare": verdict(FailureClass.ACCURACY_REGRESSION)}
    failures = [StageFailure(stage="deploy", failure_class=FailureClass.SYSTEMIC, message="m")]
    inputs = decision_inputs(verdicts, failures, ("ptq",))
    file_decision(tmp_path, inputs)
    assert judge_decision(filed(tmp_path, "decision"), verdicts) == gates.decide(
        verdicts, failures, ("ptq",)
    )


def test_verdicts_that_were_taken_back_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "verdicts").mkdir()
    for gate in ("ptq", "compare"):
        (tmp_path / "verdicts" / f"{gate}.json").write_text("{}")
    file_inputs(tmp_path, conditions())
    file_decision(tmp_path, decision_inputs({"ptq": verdict()}, [], ("ptq",)))
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json"))
    assert left == ["evidence/decision.json", "verdicts/ptq.json"]


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({}, id="empty"),
        pytest.param({"verdicts": ["gone"], "failures": [], "required": []}, id="no-verdict"),
        pytest.param({"verdicts": [[]], "failures": [], "required": []}, id="verdict-list"),
        pytest.param({"verdicts": [], "failures": [{}], "required": []}, id="failure-empty"),
        pytest.param(
            {
                "verdicts": [],
                "failures": [{"stage": "s", "failure_class": "ODD", "message": "m"}],
                "required": [],
            },
            id="failure-class",
        ),
        pytest.param({"verdicts": [], "failures": 1, "required": []}, id="failures-number"),
    ],
)
def test_a_decision_without_its_ground_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(GateInputError):
        judge_decision(document, {})
