"""Say why a release came to its decision, and what to do next, as a short argument.

Every sentence is made from the document alone: the rule, what each task shows under it, the other
gates, the conclusion. Nothing is judged again here.
"""

from __future__ import annotations

from collections.abc import Iterable

from conductor.report.rows import OUTCOMES, gate_rows, in_reading_order, is_paired, task_row
from conductor.report.wording import (
    PUBLISH_WORDS,
    SMALLEST_P,
    Document,
    counted,
    first_clause,
    headline,
    listed,
    p_value,
    say,
    split_reason,
    whole_percent,
)
from gates.criteria import ALPHA, CONFIDENCE, POWER
from gates.evidence import join

SURE = whole_percent(CONFIDENCE)
METHOD_WORDS = {
    "exact": "an exact test of the lost and gained questions",
    "score": "Tango's score interval for the difference of paired shares",
    "t": "a t interval of the differences per question",
    "cluster": "a t interval of the differences per cluster of questions",
    "ratio": "an interval of the paired log-likelihoods per unit of text",
    "betting": "a betting confidence sequence, which holds at every look",
}


def argue(document: Document) -> list[str]:
    """Return the argument for the decision, one step per entry."""
    tasks = in_reading_order(document["tasks"])
    compared = [task for task in tasks if task["drop"] is not None or task.get("outcome")]
    steps: list[str] = []
    if compared:
        steps += _rule(document, paired=is_paired(compared))
        steps += _outcomes(document, compared)
    else:
        steps.append(_uncompared(tasks))
    steps += _stages(document)
    steps += _gates(document, without_compare=bool(compared))
    steps.append(_conclusion(document))
    steps.append(f"Next: {document['next_action']}")
    return steps


def reasons(document: Document) -> list[tuple[str, str]]:
    """Split each reason into its sentence and the evidence after it.

    What the accuracy gate says of every task is left to the argument, unless it disbelieves one.
    """
    outcomes = {task.get("outcome") for task in document["tasks"]}
    parts = []
    for reason in document["reasons"]:
        gate, _, detail = reason.partition(": ")
        if _is_compare(gate) and outcomes & {"fail", "undecided"} and "anomalous" not in outcomes:
            reason = f"{gate}: {first_clause(detail)}"
        parts.append(split_reason(reason))
    return parts


def undecided(tasks: Iterable[Document]) -> list[str]:
    """Say of every undecided task why it is, and what would decide it."""
    return [
        what_would_decide(task)
        for task in in_reading_order(tasks)
        if task.get("outcome") == "undecided"
    ]


def what_would_decide(task: Document) -> str:
    """Say why a task is undecided, and how many questions or answers more would decide it."""
    return f"{task['task']} is undecided: {_doubt(task)} {_remedy(task)}".rstrip()


def methods(tasks: Iterable[Document]) -> list[str]:
    """Say how the bounds were made, a sentence for each method used."""
    tasks = list(tasks)
    used = dict.fromkeys(task["method"] for task in tasks if task.get("method"))
    return [
        f"{METHOD_WORDS.get(method, method)}: "
        f"{listed(task['task'] for task in tasks if task.get('method') == method)}"
        for method in used
    ]


def weak_plans(document: Document) -> list[str]:
    """Name the tasks that a candidate without any loss would probably leave undecided."""
    return [
        row["task"]
        for row in document.get("plan", [])
        if row["power"] is not None and row["power"] < POWER
    ]


def unpublished(tasks: Iterable[Document]) -> list[str]:
    """Name the tasks without a published score."""
    return [task["task"] for task in tasks if not task.get("external")]


def _rule(document: Document, *, paired: bool) -> Iterable[str]:
    of_what = "the baseline score" if document["relative"] else "the scale"
    if not paired:
        yield (
            f"Rule: the observed drop of a task may be at most {say(document['threshold'])} of "
            f"{of_what}. Without paired answers there are no bounds, so the rule cannot tell a "
            "loss from chance."
        )
        return
    yield (
        "Rule: both sides answered the same questions, and their answers are compared in pairs. "
        f"The margin is {say(document['threshold'])} of {of_what}. A task passes when it is shown, "
        f"with {SURE} confidence, that its drop is below the margin; it fails when the "
        "drop is shown to be above it, with the same confidence for all tasks together (Holm's "
        "correction); otherwise it is undecided. Publishing needs every task to pass."
    )
    if document.get("path"):
        rounds = max(look["round"] for look in document["path"])
        yield (
            f"Questions were asked in {counted(rounds, 'growing round')}, in an order fixed "
            "beforehand. The bounds hold at every look, so stopping early costs no confidence."
        )


def _uncompared(tasks: Iterable[Document]) -> str:
    if any(None not in (task["baseline"], task["candidate"]) for task in tasks):
        return "Both sides were scored, but their scores were not judged."
    return "No scores were compared: the release ended before both sides had them."


def _outcomes(document: Document, tasks: list[Document]) -> Iterable[str]:
    groups = {
        outcome: [task for task in tasks if task.get("outcome") == outcome] for outcome in OUTCOMES
    }
    for task in groups["anomalous"]:
        yield _anomalous(document, task)
    yield from map(_failing, groups["fail"])
    yield from map(what_would_decide, groups["undecided"])
    if groups["pass"]:
        yield _passing(groups["pass"], len(tasks))
    yield from _by_threshold([task for task in tasks if not task.get("outcome")])


def _anomalous(document: Document, task: Document) -> str:
    details = [
        check["detail"]
        for gate in document["gates"]
        if _is_compare(gate["gate"])
        for subject, check in gate["document"]["checks"].items()
        if subject == join("tasks", task["task"])
    ]
    said = f"{task['task']} is not believed, so it is judged neither way: {'; '.join(details)}"
    return said.removesuffix(": ")


def _failing(task: Document) -> str:
    row = task_row(task)
    adjusted = task.get("p_worse_adjusted")
    p = "" if adjusted is None else f" ({_p(adjusted)} after Holm's correction)"
    return (
        f"{task['task']} fails: its drop is above {row['lower']} with {SURE} confidence, "
        f"and the margin is {row['limit']}{p}.{_flips(task)}"
    )


def _p(p: float) -> str:
    return f"p {p_value(p)}" if p < SMALLEST_P else f"p = {p_value(p)}"


def _flips(task: Document) -> str:
    lost, gained, asked = task.get("lost"), task.get("gained"), task.get("questions")
    if lost is None or gained is None or asked is None:
        return ""
    return f" Of {counted(asked, 'question')} the candidate lost {lost:,} and gained {gained:,}."


def _passing(tasks: list[Document], all_tasks: int) -> str:
    names = listed(task["task"] for task in tasks)
    closest = max(tasks, key=_used_up)
    row = task_row(closest)
    known = f" Closest to its margin is {closest['task']}: its drop is below {row['upper']} with "
    return f"Shown to pass, {len(tasks)} of {counted(all_tasks, 'task')}: {names}." + (
        ""
        if closest.get("drop_upper") is None
        else f"{known}{SURE} confidence, and the margin is {row['limit']}."
    )


def _used_up(task: Document) -> float:
    """Return the share of the margin that the upper bound takes."""
    upper, limit = task.get("drop_upper"), task["limit"]
    return float(upper / limit) if upper is not None and limit else -float("inf")


def _by_threshold(tasks: list[Document]) -> Iterable[str]:
    for task in tasks:
        if task["within_threshold"] is False:
            row = task_row(task)
            yield f"{task['task']} is over the limit: drop {row['drop']}, limit {row['limit']}."
    within = [task["task"] for task in tasks if task["within_threshold"]]
    if within:
        yield f"{counted(len(within), 'task')} within the limit: {listed(within)}."
    uncompared = [task["task"] for task in tasks if task["within_threshold"] is None]
    if uncompared:
        yield f"Not compared: {listed(uncompared)}."


def _doubt(task: Document) -> str:
    row = task_row(task)
    lower, upper, limit = task.get("drop_lower"), task.get("drop_upper"), task["limit"]
    if lower is None and upper is None:
        return "the evidence gives no bounds of its drop."
    if lower is not None and limit is not None and lower > limit:
        return (
            f"its drop is above {row['lower']} taken by itself, but that is not shown with "
            f"{SURE} confidence for all tasks together (Holm's correction)."
        )
    doubt = f"its drop lies within {row['bounds']}, and so does the margin {row['limit']}."
    if task.get("method") == "betting" and task.get("p_within"):
        doubt += (
            f" The evidence for a pass is {1 / task['p_within']:.1f} of the {1 / ALPHA:.0f} "
            "that decide."
        )
    return doubt


def _remedy(task: Document) -> str:
    needed = task.get("needed")
    if needed is None:
        return ""
    lossless, observed = needed["more_questions_if_lossless"], needed["more_questions_at_observed"]
    repeats, too_small = needed["more_repeats"], needed["benchmark_too_small"]
    ways = []
    if lossless:
        ways.append(f"{counted(lossless, 'more question')} if the candidate loses nothing")
    if observed and observed != lossless:
        ways.append(f"{counted(observed, 'more question')} if the true drop is the observed one")
    if repeats:
        ways.append(f"{counted(repeats, 'more answer')} to every question")
    sentences = []
    if lossless == 0:
        sentences.append("A candidate that loses nothing would usually have passed by now.")
    if ways:
        where = " (in further clusters)" if task.get("clusters") else ""
        sentences.append(
            f"To decide it with {whole_percent(POWER)} power{where}: {', or '.join(ways)}."
        )
    if too_small:
        size = "The benchmark does not have so many: it" if lossless else "The benchmark"
        sentences.append(
            f"{size} is too small for this margin, whatever is done with it: take a larger one, or "
            "settle on a wider margin before looking at scores again."
        )
    elif observed is None:
        sentences.append(
            "If the true drop is the observed one, it is too close to the margin for any number "
            "of questions."
        )
    return " ".join(sentences)


def _stages(document: Document) -> Iterable[str]:
    refused = {row["stage"] for row in gate_rows(document) if not row["passed"]}
    for stage in document["stages"]:
        if stage["state"] == "failed" and stage["name"] not in refused:
            yield f"Stage {stage['name']} failed; the reason is at the head of this report."


def _gates(document: Document, *, without_compare: bool) -> Iterable[str]:
    rows = [
        row for row in gate_rows(document) if not (without_compare and _is_compare(row["gate"]))
    ]
    for row in rows:
        if not row["passed"]:
            yield f"Gate {row['gate']} ({row['stage']}) failed: {row['detail']}"
    held = [row["gate"] for row in rows if row["passed"]]
    if held:
        yield f"These gates hold: {listed(held)}."


def _is_compare(gate: str) -> bool:
    return gate.removeprefix("gate_") == "compare"


def _conclusion(document: Document) -> str:
    cause = f" ({document['failure_class']})" if document["failure_class"] else ""
    return f"Therefore {headline(document)}{cause}: {PUBLISH_WORDS[document['publish']]}."
