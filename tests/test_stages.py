"""Evaluating in rounds: what is asked of which side, when it stops, and what is kept of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from conductor import stages
from conductor.ahead import Ahead
from conductor.chain import Stage
from conductor.closeout import report_document
from conductor.compatibility import TABLE
from conductor.config import load_config
from conductor.digests import Digests
from conductor.environments.builder import Environments
from conductor.evaluation import Inquiry
from conductor.failure import Failure
from conductor.journal import Journal
from conductor.models import resolve_model
from conductor.probes.lm_eval import EvaluationResults
from conductor.probes.machine import probe_machine
from conductor.release_state import Evaluation, Plan, Release, World
from conductor.rounds import Batch
from conductor.suites import load_suite
from conductor.tools import NothingStarts
from gates import RECIPES, Check, FailureClass, Verdict

SIZE = 2000
SUITE = "name: two\ntasks:\n" + "".join(
    f"  {name}: {{metric: acc, kind: multiple_choice, samples: {SIZE}}}\n" for name in ("a", "b")
)

Answers = Callable[[str, str, int, int], int]
"""From side, task, question and repeat to right (1) or wrong (0)."""


def same(side: str, task: str, question: int, repeat: int) -> int:
    return int(question % 10 > 0)


def half_lost(side: str, task: str, question: int, repeat: int) -> int:
    return int(question % 2) if (side, task) == ("candidate", "b") else 1


def flips(side: str, task: str, question: int, repeat: int) -> int:
    """Answers of which five in a hundred change, as often to the better as to the worse."""
    changed = task == "b" and random.Random(question).random() < 0.05
    return int((side == "candidate") == (question % 2 == 0)) if changed else 1


class Harness:
    """Answers batches without any model, and remembers what it was asked."""

    def __init__(self, answers: Answers, *, sampled: bool = False) -> None:
        self.answers = answers
        self.sampled = sampled
        self.asked: list[tuple[str, str, Batch]] = []

    def evaluate(
        self, release: Release, side: str, batch: Batch, where: Path, *callbacks: Any
    ) -> Evaluation:
        self.asked.append((side, where.relative_to(release.journal.run_dir).as_posix(), batch))
        stretches = batch.questions or dict.fromkeys(release.plan.suite.tasks, (0, SIZE))
        scores = {
            task: {
                question: [self.answers(side, task, question, batch.repeat)]
                for question in range(*stretch)
            }
            for task, stretch in stretches.items()
        }
        return self.evaluation(side, scores)

    def merge(self, parts: list[Evaluation], suite: Any) -> Evaluation:
        scores: dict[str, dict[int, list[int]]] = {}
        for part in parts:
            for task, questions in part.settings["scores"].items():
                for question, answers in questions.items():
                    scores.setdefault(task, {}).setdefault(question, []).extend(answers)
        return self.evaluation(parts[0].settings["side"], scores)

    def evaluation(self, side: str, scores: Mapping[str, dict[int, list[int]]]) -> Evaluation:
        tasks = {
            task: {
                "metric": "acc",
                "filter": "none",
                "scale": 1.0,
                "higher_is_better": True,
                "sampled": self.sampled,
                "size": SIZE,
                "questions": [str(question) for question in questions],
                "scores": list(questions.values()),
                "answers": [f"{side}-{task}-{question}" for question in questions],
            }
            for task, questions in scores.items()
        }
        entry = {"status": "SUCCESS", "score": 0.5, "errors": [], "scale": 1.0}
        counted = {
            task: {**entry, "expected_samples": len(rows), "scored_samples": len(rows)}
            for task, rows in scores.items()
        }
        return Evaluation(
            settings={"side": side, "scores": scores},
            conditions={"engine": "the test's"},
            results=EvaluationResults(
                tasks={}, completion_tokens={}, model="m", versions={}, results_file=Path("r")
            ),
            samples={"tasks": tasks},
            summary={"tasks": counted},
            server=None,
            recalled_from=None,
        )


@pytest.fixture
def release(tmp_path: Path) -> Callable[..., Release]:
    """Make a release of two tasks that has come to its evaluations."""

    def make(**options: Any) -> Release:
        suite = tmp_path / "suite.yaml"
        suite.write_text(SUITE)
        clock = lambda: datetime.now(UTC)  # noqa: E731
        made = Release(
            config=load_config(
                None, {"model": "demo", "recipe": "int8", "suite": str(suite), **options}
            ),
            journal=Journal.create(tmp_path / "run", clock=clock, model="demo", recipe="int8"),
            world=World(environments=Environments(tmp_path), environ={}, machine=probe_machine()),
            tools=NothingStarts(),
            digests=Digests(None),
            resolved=Plan(
                model=resolve_model("demo"),
                recipe=RECIPES["int8"],
                suite=load_suite(str(suite)),
                row=TABLE[0],
                quantize_request={"scheme": "W8A8"},
            ),
        )
        for stage in (Stage.BASELINE_EVAL, Stage.CANDIDATE_EVAL):
            made.journal.start(stage)
        return made

    return make


def run(release: Release, harness: Harness, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(stages, "_evaluate", harness.evaluate)
    patch.setattr(stages, "merge", harness.merge)
    return {
        **stages.run_baseline_eval(release, lambda *_: None),
        **stages.run_candidate_eval(release, lambda *_: None),
        **stages.run_compare(release, lambda *_: None),
    }


def questions(release: Release, side: str) -> dict[str, int]:
    tasks = release.evaluations[side].samples["tasks"]
    return {name: len(task["questions"]) for name, task in tasks.items()}


def test_without_rounds_both_sides_are_asked_everything_once(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, harness = release(), Harness(same)
    verdicts = run(made, harness, monkeypatch)
    assert verdicts["compare"].decision == "ACCEPT"
    assert [(side, where) for side, where, _ in harness.asked] == [
        ("source", "stages/baseline_eval"),
        ("candidate", "stages/candidate_eval"),
    ]
    assert made.path == []


def test_a_lossless_candidate_is_decided_with_a_part_of_the_questions(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, harness = release(until_decided=True), Harness(same)
    verdicts = run(made, harness, monkeypatch)
    assert verdicts["compare"].decision == "ACCEPT", verdicts["compare"].detail
    assert set(verdicts) >= {"baseline_run", "candidate_run"}
    counts = questions(made, "source")
    assert counts == questions(made, "candidate")
    assert all(200 < count < SIZE for count in counts.values())
    assert made.path[0]["round"] == 1
    assert made.path[0]["outcome"] == "undecided"
    assert {row["outcome"] for row in made.path[-2:]} == {"pass"}
    assert [(side, where) for side, where, _ in harness.asked][:4] == [
        ("source", "stages/baseline_eval/round-1/source"),
        ("candidate", "stages/candidate_eval/round-1/candidate"),
        ("candidate", "stages/candidate_eval/round-2/candidate"),
        ("source", "stages/candidate_eval/round-2/source"),
    ]


def test_a_broken_candidate_is_refused_at_the_first_look(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, harness = release(until_decided=True), Harness(half_lost)
    verdicts = run(made, harness, monkeypatch)
    assert verdicts["compare"].failure_class is FailureClass.ACCURACY_REGRESSION
    assert questions(made, "candidate") == {"a": 200, "b": 200}
    assert len(harness.asked) == 2


def test_only_undecided_tasks_are_asked_on_and_no_more_than_allowed(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, harness = release(until_decided=True, max_samples=700), Harness(flips)
    verdicts = run(made, harness, monkeypatch)
    assert verdicts["compare"].failure_class is FailureClass.INSUFFICIENT_EVIDENCE
    counts = questions(made, "source")
    assert counts["a"] < counts["b"] == 700
    assert made.path[-1]["outcome"] == "undecided"
    assert {row["task"] for row in made.path} == {"a", "b"}
    looks = [(row["task"], row["questions"]) for row in made.path]
    assert len(looks) == len(set(looks)), "a task that was not asked on shows nothing new"
    said = " ".join(report_document(made)["deviations"])
    assert f"batches: {counts['a'] + 700:,} of {2 * SIZE:,} " in said
    assert "at most 700 of each task" in said


def test_references_are_held_against_everything_that_was_asked(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []

    def judge(made: Release) -> Verdict:
        judged.append(questions(made, "source")["a"])
        return Verdict(
            gate="external",
            checks=(Check(subject="x", observed=0, limit=0, passed=True),),
            failure_class=None,
            detail="",
        )

    monkeypatch.setattr(stages, "_judge_references", judge)
    made = release(until_decided=True)
    (task,) = [task for name, task in made.plan.suite.tasks.items() if name == "a"]
    suite = replace(
        made.plan.suite, tasks={**made.plan.suite.tasks, "a": replace(task, reference=0.9)}
    )
    made.resolved = replace(made.plan, suite=suite)
    run(made, Harness(same), monkeypatch)
    assert judged == [200, questions(made, "source")["a"]]


def test_tasks_that_sample_get_their_answers_in_every_round(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = release(until_decided=True, max_repeats=3)
    harness = Harness(same, sampled=True)
    verdicts = run(made, harness, monkeypatch)
    assert verdicts["compare"].decision == "ACCEPT", verdicts["compare"].detail
    assert {row["repeats"] for row in verdicts["compare"].per_task.values()} == {3}
    assert [(where, batch.repeat) for _, where, batch in harness.asked][:3] == [
        ("stages/baseline_eval/round-1/source", 0),
        ("stages/baseline_eval/round-1/source-repeat-1", 1),
        ("stages/baseline_eval/round-1/source-repeat-2", 2),
    ]


def test_a_second_attempt_begins_with_the_first_round(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, harness = release(until_decided=True), Harness(same)
    run(made, harness, monkeypatch)
    before, path = questions(made, "source"), list(made.path)
    made.journal.start(Stage.CANDIDATE_EVAL)
    stages.run_candidate_eval(made, lambda *_: None)
    assert questions(made, "source") == before
    assert made.path == path
    assert harness.asked[-1][1].startswith("stages/candidate_eval/attempt-2/round-")


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(Failure(FailureClass.INFRA_TRANSIENT, "its worker crashed"), id="no-answers"),
        pytest.param("lost", id="answers-that-its-gate-refused"),
    ],
)
def test_only_what_passed_its_gate_is_remembered(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch, first: Failure | str
) -> None:
    """Fakes: the harness, whose first answers are none or incomplete, and the cache."""
    made, harness, kept = release(), Harness(same), []
    scores = {task: {number: [1] for number in range(SIZE)} for task in ("a", "b")}

    def evaluate(*_: Any) -> Evaluation:
        if isinstance(first, Failure) and made.journal.stages[Stage.BASELINE_EVAL].attempts == 1:
            raise first
        answers = harness.evaluation("source", scores)
        if made.journal.stages[Stage.BASELINE_EVAL].attempts == 1:
            answers.summary["tasks"]["a"]["scored_samples"] = 12
        return answers

    monkeypatch.setattr(stages, "evaluate", evaluate)
    monkeypatch.setattr(stages.remembered, "recall", lambda *_: None)
    monkeypatch.setattr(stages.remembered, "keep", lambda _, inquiries: kept.extend(inquiries))
    with suppress(Failure):
        assert not stages.run_baseline_eval(made, lambda *_: None)["baseline_run"].passed
    made.journal.start(Stage.BASELINE_EVAL)
    assert stages.run_baseline_eval(made, lambda *_: None)["baseline_run"].passed
    (inquiry,) = kept
    assert inquiry.directory == made.journal.attempt_dir(Stage.BASELINE_EVAL)


@pytest.mark.parametrize(
    ("failure_class", "kept"),
    [
        pytest.param(FailureClass.INFRA_TRANSIENT, True, id="the-world-cut-it-short"),
        pytest.param(FailureClass.SAMPLE_ACCOUNTING_FAILED, False, id="samples-were-lost"),
        pytest.param(None, False, id="it-came-to-its-end"),
    ],
)
def test_answers_are_kept_for_the_next_attempt_alone(
    release: Callable[..., Release],
    monkeypatch: pytest.MonkeyPatch,
    failure_class: FailureClass | None,
    kept: bool,
) -> None:
    harness, rounds = Harness(same), []

    def evaluate(inquiry: Inquiry, *_: Any) -> Evaluation:
        """Stand for the harness, which fails in the candidate's second round."""
        inquiry.request_cache.mkdir(parents=True)
        rounds.append(inquiry.batch)
        if len(rounds) == 3 and failure_class:
            raise Failure(failure_class, "in the second round")
        return harness.evaluate(made, inquiry.side, inquiry.batch, inquiry.directory)

    monkeypatch.setattr(stages, "evaluate", evaluate)
    monkeypatch.setattr(stages, "merge", harness.merge)
    monkeypatch.setattr(stages.remembered, "recall", lambda *_: None)
    monkeypatch.setattr(stages.remembered, "keep", lambda *_: None)
    made = release(until_decided=True)
    with suppress(Failure):
        stages.run_baseline_eval(made, lambda *_: None)
        stages.run_candidate_eval(made, lambda *_: None)
    assert not (made.journal.stage_dir(Stage.BASELINE_EVAL) / "requests").exists()
    requests = made.journal.stage_dir(Stage.CANDIDATE_EVAL) / "requests"
    assert sorted(each.name for each in requests.glob("*")) == (
        ["round-1-candidate", "round-2-candidate"] if kept else []
    )


def test_what_went_wrong_ahead_is_said_in_a_line(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise Failure(FailureClass.INFRA_TRANSIENT, "its worker crashed\n    Traceback ...")

    made = release()
    made.ahead = Ahead(crash)
    run(made, Harness(same), monkeypatch)
    assert made.ahead is None
    assert made.remarks == ["evaluating the source ahead: its worker crashed"]


@pytest.mark.parametrize(
    ("run_id", "said"),
    [
        pytest.param("another", ["the source's evaluation is that of run another"], id="another's"),
        pytest.param("run", [], id="an-earlier-attempt-of-its-own"),
    ],
)
def test_whose_evaluation_of_the_source_it_is_is_said(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch, run_id: str, said: list[str]
) -> None:
    made = release()
    run(made, Harness(same), monkeypatch)
    source = made.evaluations["source"]
    made.evaluations["source"] = replace(source, recalled_from=run_id)
    assert [each for each in report_document(made)["deviations"] if "that of run" in each] == said


def test_the_noise_floor_asks_the_source_the_same_again(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsteady(side: str, task: str, question: int, repeat: int) -> int:
        return int(question % 10 > repeat) if task == "a" else 1

    made, harness = release(noise_floor=True, until_decided=True), Harness(unsteady)
    verdicts = run(made, harness, monkeypatch)
    assert verdicts["compare"].decision == "ACCEPT"
    assert harness.asked[1][1:] == (
        "stages/baseline_eval/noise-floor",
        Batch(questions={"a": (0, 200), "b": (0, 200)}, repeat=1),
    )
    assert made.noise_floor is not None
    assert made.noise_floor["a"] == {
        "questions": 200,
        "lost": 20,
        "gained": 0,
        "discordance": 0.1,
        "changed": 0.0,
        "logprob_shift": None,
    }
    assert made.noise_floor["b"]["discordance"] == 0.0


def test_a_second_run_of_the_source_that_is_not_whole_is_a_failure(
    release: Callable[..., Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing(Harness):
        def evaluate(self, *arguments: Any) -> Evaluation:
            evaluation = super().evaluate(*arguments)
            if len(self.asked) == 2:
                evaluation.summary["tasks"]["a"]["scored_samples"] = 12
            return evaluation

    made = release(noise_floor=True)
    with pytest.raises(Failure, match="second run of the source") as caught:
        run(made, Losing(same), monkeypatch)
    assert caught.value.failure_class is FailureClass.SAMPLE_ACCOUNTING_FAILED
