"""What a suite can tell before anything is asked: smallest drop seen, power, questions needed.

The figures are those of the tests that will judge, for an assumed discordance: the share of
questions that only one side answers right. A lossless candidate still has some, and they are what
a drop has to be told apart from. Invariants:

* A size that nobody stated is not guessed: such a task has no figures, and a warning says so.
* A perplexity has no share of right answers, so its task is not planned, and a warning says so.
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

    ``unplanned`` are the tasks scored by a perplexity. ``power`` is ``None`` where there are any,
    or a task's size is not known.
    """

    suite: str
    tasks: tuple[Planned, ...]
    unplanned: tuple[str, ...]
    power: float | None

    @property
    def warning(self) -> str | None:
        """What a person should know before anything is asked: that no decision is likely."""
        if self.power is None or self.power >= POWER:
            return None
        remedy = "ask more questions"
        if any(task.cannot_decide for task in self._weak):
            remedy = "widen --threshold before any score is known, or take larger benchmarks"
        return (
            "a candidate that loses nothing is shown to pass all "
            f"{len(self.tasks)} tasks with a chance of {self.power:.0%}, so the release is "
            f"unlikely to end in ACCEPT; {remedy}"
        )

    @property
    def _weak(self) -> list[Planned]:
        return [task for task in self.tasks if task.power is not None and task.power < POWER]

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that stands against a decision, one sentence each, with what to do."""
        hopeless = [task.task for task in self.tasks if task.needed is None]
        weak = [task for task in self._weak if task.task not in hopeless]
        groups = {
            "the number of questions is not known: state it as `samples` in the suite": [
                task.task for task in self.tasks if task.questions is None
            ],
            "no figures can be given for a perplexity before it is measured": self.unplanned,
            "no number of questions shows a drop to be under so small a margin": hopeless,
            "the benchmark has too few questions for this margin": [
                f"{task.task} ({task.size:,} of {task.needed:,} needed)"
                for task in weak
                if task.cannot_decide
            ],
            "asked too few questions; raise --limit or --max-samples": [
                f"{task.task} ({task.questions:,} of {task.needed:,} needed)"
                for task in weak
                if not task.cannot_decide
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
        if not task.is_perplexity
    )
    unplanned = tuple(task.name for task in suite.tasks.values() if task.is_perplexity)
    powers = [task.power for task in tasks if task.power is not None]
    return Outlook(
        suite=suite.name,
        tasks=tasks,
        unplanned=unplanned,
        power=math.prod(powers) if len(powers) == len(suite.tasks) else None,
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
