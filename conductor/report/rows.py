"""Make the rows of a report's tables out of a release document, once for all its forms.

Invariants:
- What needs attention comes first: failed gates and checks, then tasks by outcome and drop.
- A document that an earlier version wrote, or an early stop, lacks fields: its rows say "none" or
  its table is empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from conductor.report import wording
from conductor.report.wording import Document

WITHIN_WORDS = {True: "within limit", False: "over limit", None: "not compared"}
OUTCOMES = ("anomalous", "fail", "undecided", "pass")
"""Outcomes of a task in the order in which a reader needs them."""
TONES = {"pass": "good", "fail": "bad", "undecided": "warn", "anomalous": "odd"}
"""Names of the colours of the outcomes."""
WITHIN_TONES = {True: "good", False: "bad", None: ""}
EXTERNAL_TONES = {"verified": "good", "failed": "bad", "externally unverified": "warn"}

Row = dict[str, Any]


def in_reading_order(tasks: Iterable[Document]) -> list[Document]:
    """Order tasks for reading: by outcome, the largest drop first, tasks without one last."""

    def urgency(task: Document) -> tuple[int, float]:
        outcome, drop = task.get("outcome"), task["drop_fraction"]
        rank = OUTCOMES.index(outcome) if outcome else len(OUTCOMES)
        return rank, math.inf if drop is None else -drop

    return sorted(tasks, key=urgency)


def is_paired(tasks: Iterable[Document]) -> bool:
    """Tell whether any task was judged by bounds of its drop."""
    return any(task.get("outcome") for task in tasks)


def task_row(task: Document) -> Row:
    """Say a task's scores, its drop against the margin, and how it came out."""
    lower, upper, limit = task.get("drop_lower"), task.get("drop_upper"), task["limit"]
    digits = wording.decimals(task["scale"], limit, task["drop"], lower, upper)
    outcome, within = task.get("outcome"), task["within_threshold"]
    return {
        "task": task["task"],
        "metric": task["metric"] or "not recorded",
        "baseline": wording.fixed(task["baseline"], digits),
        "candidate": wording.fixed(task["candidate"], digits),
        "baseline_error": wording.with_error(task["baseline"], task["baseline_stderr"], digits),
        "candidate_error": wording.with_error(task["candidate"], task["candidate_stderr"], digits),
        "drop": wording.fixed(task["drop"], digits, sign="+"),
        "lower": wording.fixed(lower, digits, sign="+"),
        "upper": wording.fixed(upper, digits, sign="+"),
        "bounds": wording.bounds(lower, upper, digits),
        "limit": wording.fixed(limit, digits),
        "scale": wording.say(task["scale"]),
        "samples": wording.say(task["samples"]),
        "questions": _questions(task),
        "flips": _flips(task),
        "within": within,
        "words": outcome or WITHIN_WORDS[within],
        "tone": TONES[outcome] if outcome else WITHIN_TONES[within],
    }


def _questions(task: Document) -> str:
    """Say what was asked: questions, answers to each, and the clusters they come in."""
    asked = task.get("questions")
    if asked is None:
        return wording.count(task["samples"])
    repeats, clusters = task.get("repeats") or 1, task.get("clusters")
    each = f", {repeats} answers each" if repeats > 1 else ""
    within = f", {wording.counted(clusters, 'cluster')}" if clusters else ""
    return f"{asked:,}{each}{within}"


def _flips(task: Document) -> str:
    lost, gained = task.get("lost"), task.get("gained")
    if lost is None or gained is None:
        return "none"
    return f"{lost:,} / {gained:,}"


def answer_rows(tasks: Iterable[Document]) -> list[Row]:
    """Say how many answers stayed as they were, for the tasks that were compared in pairs."""
    names = ("agreement", "changed_answers", "lost", "gained")
    return [
        {
            "task": task["task"],
            **{name: wording.rate(beside.get(name)) for name in names},
            "mcnemar": wording.p_value(beside.get("mcnemar_p")),
        }
        for task, beside in _beside(tasks)
        if any(beside.get(name) for name in names)
    ]


def length_rows(tasks: Iterable[Document]) -> list[Row]:
    """Say how long the answers are on both sides, for the tasks that have them counted."""
    return [
        {
            "task": task["task"],
            **{
                side: f"{wording.fixed(lengths[f'{side}_mean'], 1)} "
                f"({wording.quantiles(lengths[f'{side}_quantiles'])})"
                for side in ("baseline", "candidate")
            },
            "change": wording.change(lengths),
        }
        for task, beside in _beside(tasks)
        if (lengths := beside.get("length"))
    ]


def likelihood_rows(tasks: Iterable[Document]) -> list[Row]:
    """Say how far the likelihoods of the choices moved, for the tasks that have them."""
    return [
        {
            "task": task["task"],
            "kl": wording.mean(beside.get("kl")),
            "logprob_shift": wording.mean(beside.get("logprob_shift")),
        }
        for task, beside in _beside(tasks)
        if beside.get("kl") or beside.get("logprob_shift")
    ]


def _beside(tasks: Iterable[Document]) -> Iterable[tuple[Document, Document]]:
    for task in tasks:
        if beside := task.get("beside"):
            yield task, beside


def length_limit(document: Document) -> float | None:
    """Return the change of length that the verbosity gate allowed, if it held all to one limit."""
    limits = {
        check["limit"]
        for gate in document["gates"]
        if gate["gate"].removeprefix("gate_") == "verbosity"
        for check in gate["document"]["checks"].values()
        if isinstance(check["limit"], float)
    }
    return float(limits.pop()) if len(limits) == 1 else None


def external_rows(tasks: Iterable[Document]) -> list[Row]:
    """Say what the baseline was held against, task by task."""
    rows = []
    for task in tasks:
        external = task.get("external")
        if not external:
            continue
        digits = wording.decimals(task["scale"], None)
        rows.append(
            {
                "task": task["task"],
                "published": wording.fixed(external["published"], digits),
                "measured": wording.fixed(external["measured"], digits),
                "difference": wording.fixed(external["difference"], digits, sign="+"),
                "status": external["status"],
                "tone": EXTERNAL_TONES[external["status"]],
                "source": external["source"] or "none",
                "protocol": external["protocol"] or "none known",
            }
        )
    return rows


def path_rows(document: Document) -> list[Row]:
    """Say what every look showed, task by task."""
    tasks = {task["task"]: task for task in document["tasks"]}
    order = {name: place for place, name in enumerate(tasks)}
    looks = sorted(
        document.get("path", []),
        key=lambda look: (order.get(look["task"], len(order)), look["task"], look["round"]),
    )
    rows = []
    for look in looks:
        task = tasks.get(look["task"], {})
        lower, upper, limit = look["drop_lower"], look["drop_upper"], task.get("limit")
        digits = wording.decimals(task.get("scale"), limit, look["drop"], lower, upper)
        rows.append(
            {
                "task": look["task"],
                "round": wording.count(look["round"]),
                "questions": wording.count(look["questions"]),
                "drop": wording.fixed(look["drop"], digits, sign="+"),
                "bounds": wording.bounds(lower, upper, digits),
                "limit": wording.fixed(limit, digits),
                "words": look["outcome"] or "none",
                "tone": TONES.get(look["outcome"], ""),
            }
        )
    return rows


def noise_rows(document: Document) -> list[Row]:
    """Say how far the baseline is from its own repeat."""
    noise = document.get("noise_floor") or {}
    return [
        {
            "task": name,
            "questions": wording.count(row["questions"]),
            "lost": wording.count(row["lost"]),
            "gained": wording.count(row["gained"]),
            "discordance": wording.percent(row["discordance"]),
            "changed": wording.percent(row["changed"]),
            "logprob_shift": wording.say(row["logprob_shift"]),
        }
        for name, row in noise.items()
    ]


def plan_rows(document: Document) -> list[Row]:
    """Say what the planned numbers of questions could tell."""
    return [
        {
            "task": row["task"],
            "questions": wording.count(row["questions"]),
            "margin": wording.percent(row["margin"]),
            "discordance": wording.percent(row["discordance"]),
            "detectable_drop": wording.percent(row["detectable_drop"]),
            "power": wording.percent(row["power"]),
            "needed": "no number is enough" if row["needed"] is None else f"{row['needed']:,}",
        }
        for row in document.get("plan", [])
    ]


def job_rows(document: Document) -> list[Row]:
    """List the jobs of all stages, in the order in which they were submitted."""
    return [
        {
            "stage": stage["name"],
            "job": job["job_id"] or job["name"],
            "node": wording.fact(job["node"]),
            "state": wording.fact(job["state"]),
            "queued": wording.known_duration(job["queued_s"]),
            "ran": wording.known_duration(job["ran_s"]),
            "held": _held(job),
        }
        for stage in document["stages"]
        for job in stage.get("jobs", ())
    ]


def _held(job: Document) -> str:
    """Say what a job was given: nodes, and accelerators on each."""
    if job["nodes"] is None or job["gpus"] is None:
        return wording.fact(None)
    return f"{wording.counted(job['nodes'], 'node')}, {wording.counted(job['gpus'], 'GPU')} each"


def cost(document: Document) -> str:
    """Say what the release held, and for how long jobs waited and ran; empty where nobody knows."""
    stages = [stage for stage in document["stages"] if stage.get("jobs")]
    parts = []
    if stages:
        count = sum(len(stage["jobs"]) for stage in stages)
        queued, ran = (
            wording.known_duration(_sum(stage[name] for stage in stages))
            for name in ("queued_s", "ran_s")
        )
        parts.append(f"{wording.counted(count, 'job')}, queued {queued}, ran {ran}")
    if (hours := document.get("gpu_hours")) is not None:
        parts.append(f"{hours:,.2f} GPU hours")
    return "; ".join(parts)


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else math.fsum(each for each in known if each is not None)


def gate_rows(document: Document) -> list[Row]:
    """List every gate with its checks, failed gates and failed checks first."""
    rows = [_gate_row(gate) for gate in document["gates"]]
    return sorted(rows, key=lambda row: bool(row["passed"]))


def _gate_row(gate: Document) -> Row:
    verdict = gate["document"]
    checks = [{"subject": subject, **check} for subject, check in verdict["checks"].items()]
    return {
        "gate": gate["gate"],
        "stage": gate["stage"],
        "passed": verdict["pass"],
        "words": "passed" if verdict["pass"] else "FAILED",
        "failure_class": verdict["failure_class"],
        "detail": verdict["detail"],
        "checks": sorted(checks, key=lambda check: bool(check["passed"])),
        "held": sum(check["passed"] for check in checks),
        "notes": verdict["notes"],
        "not_comparable": verdict["not_comparable"],
    }


def places(document: Document) -> Iterable[tuple[str, str]]:
    """Say where the report, the checkpoint and the MLflow runs are."""
    paths, tracking = document["paths"], document["tracking"]
    yield "report", paths["report_html"]
    if paths["checkpoint"]:
        yield "checkpoint", paths["checkpoint"]
    if tracking["status"] != "logged":
        yield "MLflow", f"{tracking['status']}: {tracking['detail']}"
        return
    yield "MLflow", tracking["uri"] or "not recorded"
    yield "MLflow run", tracking["run_id"] or "not recorded"
