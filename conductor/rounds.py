"""Which questions to ask next when a release asks only as many as it takes to decide: pure.

The questions of a task have one order, drawn by lot once, and every batch is the next stretch of
it, so what has been asked is at all times a random sample. Batches grow, because a look costs a
server's attention and the last look is the one that mostly decides. Invariants:

* Both sides are asked the same batches; nothing asked is asked again under the same seed.
* One failed task, or every task passed, ends the asking: nothing further could change the decision.
* A question gets all its answers in its own round. How often it is asked must not depend on what it
  showed, or looking early would no longer be valid.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

GROWTH = 1.6
"""Factor from one look's number of questions to the next's: at most 60 % more are asked than it
takes, in half as many rounds as small steps would need."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one round asks: of each task a stretch ``(first, end)`` of its drawn order.

    ``questions`` of None stand for every task, whole or up to the limit. ``repeat`` counts the
    answers that the same questions had before, and moves the sampling seed.
    """

    questions: Mapping[str, tuple[int, int]] | None = None
    repeat: int = 0

    def document(self) -> dict[str, Any]:
        """The batch as a JSON mapping, in the words of the evaluation worker's request."""
        return {
            "questions": self.questions
            and {task: {"from": first, "to": end} for task, (first, end) in self.questions.items()},
            "repeat": self.repeat,
        }


EVERYTHING = Batch()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a release may go: questions of each task in the first batch, and in all."""

    first_batch: int
    max_samples: int | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Where one task stands: what was asked, what there is, and what the last look came to.

    ``outcome`` is that of its score; ``wanted`` are the further questions that would decide on the
    length of its answers.
    """

    questions: int
    size: int
    outcome: str
    wanted: int = 0


def first_batch(sizes: Mapping[str, int | None], limits: Limits) -> Batch:
    """Return the first batch; a size of None is not known before the task is loaded."""
    most = min(limits.first_batch, limits.max_samples or limits.first_batch)
    return Batch(questions={task: (0, min(most, size or most)) for task, size in sizes.items()})


def next_batch(tasks: Mapping[str, Asked], limits: Limits) -> Batch | None:
    """Return what to ask after a look at ``tasks``, or None when asking on is of no use.

    Scores come first: only when every task has passed are lengths worth a question.
    """
    outcomes = {task.outcome for task in tasks.values()}
    if outcomes - {"pass", "undecided"}:
        return None
    further = {}
    for name, task in tasks.items():
        most = min(task.size, limits.max_samples or task.size)
        wanted = task.wanted if outcomes == {"pass"} else 0
        if (wanted or task.outcome == "undecided") and task.questions < most:
            end = max(math.ceil(task.questions * GROWTH), task.questions + wanted)
            further[name] = task.questions, min(most, end)
    return Batch(questions=further) if further else None


def repeats_of(batch: Batch, sampled: Collection[str], answers: int) -> list[Batch]:
    """Return the further batches that give each question of a sampled task so many answers."""
    again = {task: stretch for task, stretch in (batch.questions or {}).items() if task in sampled}
    return [Batch(questions=again, repeat=number) for number in range(1, answers) if again]
