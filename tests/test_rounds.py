"""What is asked next, from where the tasks stand."""

from typing import Any

import pytest

from conductor.rounds import Asked, Batch, Limits, first_batch, next_batch, repeats_of

LIMITS = Limits(first_batch=200, max_samples=None)


def asked(outcome: str, questions: int = 200, size: int = 1000, wanted: int = 0) -> Asked:
    return Asked(questions=questions, size=size, outcome=outcome, wanted=wanted)


def test_the_first_batch_is_bounded_by_what_there_is_and_what_is_allowed() -> None:
    sizes = {"large": 1000, "small": 50, "unknown": None}
    assert first_batch(sizes, LIMITS).questions == {
        "large": (0, 200),
        "small": (0, 50),
        "unknown": (0, 200),
    }
    few = Limits(first_batch=200, max_samples=120)
    assert first_batch({"large": 1000}, few).questions == {"large": (0, 120)}


NEXT: list[Any] = [
    pytest.param({"a": asked("pass"), "b": asked("pass")}, None, id="all-passed"),
    pytest.param({"a": asked("fail"), "b": asked("undecided")}, None, id="one-failed"),
    pytest.param({"a": asked("anomalous"), "b": asked("undecided")}, None, id="one-anomalous"),
    pytest.param({}, None, id="nothing-compared"),
    pytest.param(
        {"a": asked("pass"), "b": asked("undecided")}, {"b": (200, 320)}, id="only-the-undecided"
    ),
    pytest.param({"a": asked("undecided", 820)}, {"a": (820, 1000)}, id="to-the-end"),
    pytest.param({"a": asked("undecided", 1000)}, None, id="nothing-left"),
    pytest.param(
        {"a": asked("undecided", 1000), "b": asked("undecided", 1)},
        {"b": (1, 2)},
        id="grows-by-one",
    ),
    pytest.param({"a": asked("pass", wanted=300)}, {"a": (200, 500)}, id="for-lengths"),
    pytest.param({"a": asked("pass", wanted=3)}, {"a": (200, 320)}, id="for-lengths-no-small-step"),
    pytest.param({"a": asked("pass", 1000, wanted=3)}, None, id="for-lengths-nothing-left"),
    pytest.param(
        {"a": asked("pass", wanted=300), "b": asked("undecided")},
        {"b": (200, 320)},
        id="scores-before-lengths",
    ),
]


@pytest.mark.parametrize(("tasks", "expected"), NEXT)
def test_what_is_asked_next(
    tasks: dict[str, Asked], expected: dict[str, tuple[int, int]] | None
) -> None:
    batch = next_batch(tasks, LIMITS)
    assert (batch and batch.questions) == expected


def test_no_more_is_asked_than_allowed() -> None:
    limits = Limits(first_batch=200, max_samples=250)
    batch = next_batch({"a": asked("undecided")}, limits)
    assert batch is not None
    assert batch.questions == {"a": (200, 250)}
    assert next_batch({"a": asked("undecided", 250)}, limits) is None


def test_the_batches_of_a_task_follow_on_each_other_to_its_end() -> None:
    task, rounds = asked("undecided"), 1
    while (batch := next_batch({"a": task}, LIMITS)) is not None:
        assert batch.questions is not None
        first, end = batch.questions["a"]
        assert first == task.questions < end
        task, rounds = asked("undecided", end), rounds + 1
    assert (task.questions, rounds) == (1000, 5)


def test_tasks_that_sample_are_asked_again_in_the_same_round() -> None:
    batch = Batch(questions={"greedy": (0, 10), "sampled": (5, 10)})
    assert repeats_of(batch, ["sampled", "not asked"], 3) == [
        Batch(questions={"sampled": (5, 10)}, repeat=1),
        Batch(questions={"sampled": (5, 10)}, repeat=2),
    ]
    assert repeats_of(batch, ["sampled"], 1) == []
    assert repeats_of(batch, [], 3) == []


def test_a_batch_in_the_words_of_the_worker() -> None:
    assert Batch(questions={"t": (3, 9)}, repeat=2).document() == {
        "questions": {"t": {"from": 3, "to": 9}},
        "repeat": 2,
    }
    assert Batch().document() == {"questions": None, "repeat": 0}
