"""What a suite can tell before anything is asked: smallest drop seen, power, questions needed.

The figures are those of the tests that will judge, for an assumed discordance: the share of
questions that only one side answers right. A lossless candidate still has some, and they are what
a drop has to be told apart from. Invariants:

* A size that nobody stated is not guessed: such a task has no figures, and a warning says so.
* Nothing is refused here. A suite that is too small is the user's to change or to run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from conductor.suites import Suite, Task
from gates.criteria import ASSUMED_DISCORDANCE, POWER


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What one task can tell; margin, drop and discordance are fractions, of scale or questions.

    ``power`` is the chance that a lossless candidate is shown to pass, ``needed`` the questions
    that give it the usual chance; ``None`` where the task's size is not known.
    """

    task: str
    size: int | None
    questions: int | None
    margin: float
    discordance: float
    detectable_drop: float | None
    power: float | None
    needed: int | None

    @property
    def cannot_decide(self) -> bool:
        """True when all questions of the benchmark are too few."""
        return self.needed is None or (self.size is not None and self.needed > self.size)

    def document(self) -> dict[str, Any]:
        """The row as a JSON mapping, as the report holds it."""
        return {
            "task": self.task,
            "questions": self.questions,
            "margin": self.margin,
            "discordance": self.discordance,
            "detectable_drop": self.detectable_drop,
            "power": self.power,
            "needed": self.needed,
        }


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a suite can tell: a row per task, and the chance that a lossless candidate passes all.

    ``power`` is ``None`` where a task's size is not known.
    """

    suite: str
    tasks: tuple[Planned, ...]
    power: float | None

    @property
    def warning(self) -> str | None:
        """What a person should know before anything is asked: that no decision is likely."""
        if self.power is None or self.power >= POWER:
            return None
        return (
            "a candidate that loses nothing is shown to pass all "
            f"{len(self.tasks)} tasks with a chance of {self.power:.0%}, so the release is "
            "unlikely to end in ACCEPT; widen --threshold before any score is known, or take "
            "larger benchmarks"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that stands against a decision, one sentence each, with what to do."""
        weak = [task for task in self.tasks if task.power is not None and task.power < POWER]
        small = [task for task in weak if task.cannot_decide]
        groups = {
            "the number of questions is not known: state it as `samples` in the suite": [
                task.task for task in self.tasks if task.questions is None
            ],
            "the benchmark has too few questions for this margin": [
                f"{task.task} ({_counts(task.size, task.needed)})" for task in small
            ],
            "asked too few questions; raise --limit or leave it out": [
                f"{task.task} ({_counts(task.questions, task.needed)})"
                for task in weak
                if task not in small
            ],
        }
        found = [f"{problem}: {', '.join(names)}" for problem, names in groups.items() if names]
        return (*found, *([self.warning] if self.warning else []))

    def document(self) -> dict[str, Any]:
        """The outlook as a JSON mapping."""
        return {
            "suite": self.suite,
            "tasks": [{**task.document(), "size": task.size} for task in self.tasks],
            "power": self.power,
            "warnings": list(self.warnings),
        }


def _counts(there: int | None, needed: int | None) -> str:
    return f"{there:,} of {needed:,} needed" if needed else f"{there:,}; no number is enough"


def look_ahead(
    suite: Suite,
    *,
    threshold: float,
    relative: bool = False,
    discordance: float | None = None,
    limit: int | None = None,
) -> Outlook:
    """Work out what ``suite`` can tell at ``threshold`` if ``limit`` questions a task are asked.

    ``discordance`` comes first, then the suite's own of a task, then the usual one.
    With ``relative`` the margin is a share of the published score; a task without one is planned
    as if it scored its full scale, which flatters it.
    """
    tasks = tuple(
        _plan(
            task,
            margin=threshold * (_share(task) if relative else 1.0),
            discordance=next(
                each
                for each in (discordance, task.discordance, ASSUMED_DISCORDANCE)
                if each is not None
            ),
            limit=limit,
        )
        for task in suite.tasks.values()
    )
    powers = [task.power for task in tasks if task.power is not None]
    return Outlook(
        suite=suite.name,
        tasks=tasks,
        power=math.prod(powers) if len(powers) == len(tasks) else None,
    )


def _share(task: Task) -> float:
    return 1.0 if task.reference is None else task.reference / task.scale


def _plan(task: Task, *, margin: float, discordance: float, limit: int | None) -> Planned:
    from gates import statistics

    questions = None if task.samples is None else min(task.samples, limit or task.samples)
    return Planned(
        task=task.name,
        size=task.samples,
        questions=questions,
        margin=margin,
        discordance=discordance,
        detectable_drop=questions
        and statistics.detectable_drop(questions, discordance=discordance),
        power=questions and statistics.power(questions, margin, discordance=discordance),
        needed=statistics.questions_needed(margin, variance=discordance),
    )
