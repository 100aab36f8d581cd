"""Release documents for the tests of the report and of tracking: one for each kind of evidence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDED = (
    *("more_questions_if_lossless", "more_questions_at_observed", "more_repeats"),
    "benchmark_too_small",
)
DATA = Path(__file__).parent / "data"
Document = dict[str, Any]

EVERYTHING = {
    "agreement": {"rate": 0.9901, "lower": 0.9833, "upper": 0.9942},
    "changed_answers": {"rate": 0.412, "lower": 0.386, "upper": 0.439},
    "lost": {"rate": 0.0068, "lower": 0.0036, "upper": 0.0129},
    "gained": {"rate": 0.003, "lower": 0.0012, "upper": 0.0078},
    "mcnemar_p": 0.2668,
    "length": {
        "baseline_mean": 120.4,
        "candidate_mean": 124.1,
        "baseline_quantiles": [61.0, 112.0, 190.5],
        "candidate_quantiles": [62.0, 115.0, 199.0],
        "change": 0.0307,
        "change_lower": 0.0102,
        "change_upper": 0.0517,
    },
    "kl": None,
    "logprob_shift": None,
}
CHOICES = {
    "agreement": {"rate": 0.984, "lower": 0.974, "upper": 0.99},
    "changed_answers": None,
    "lost": {"rate": 0.009, "lower": 0.0047, "upper": 0.017},
    "gained": {"rate": 0.007, "lower": 0.0034, "upper": 0.0144},
    "mcnemar_p": 0.8036,
    "length": None,
    "kl": {"mean": 0.0123, "lower": 0.0101, "upper": 0.0147},
    "logprob_shift": {"mean": -0.031, "lower": -0.052, "upper": -0.009},
}


def example(name: str) -> Document:
    """Read a document that an earlier version wrote."""
    document: Document = json.loads((DATA / f"report-{name}.json").read_text("utf-8"))
    return document


def row(task: str, **fields: Any) -> Document:
    """Return the row of a task that passes by Tango's interval; ``fields`` say what is otherwise.

    The score of the candidate and the drop follow from the questions lost and gained.
    """
    made = {
        "task": task,
        "metric": "exact_match,strict-match",
        "baseline": 0.712,
        "baseline_stderr": 0.0125,
        "candidate_stderr": 0.0126,
        "limit": 0.01,
        "scale": 1.0,
        "higher_is_better": True,
        "outcome": "pass",
        "drop_lower": -0.0011,
        "drop_upper": 0.0087,
        "method": "score",
        "questions": 1319,
        "repeats": 1,
        "clusters": None,
        "lost": 9,
        "gained": 4,
        "p_within": 0.0213,
        "p_worse": 0.98,
        "p_worse_adjusted": 1.0,
        "needed": None,
        "beside": copy.deepcopy(EVERYTHING),
        "external": None,
    } | fields
    lost, gained = made["lost"] or 0, made["gained"] or 0
    drop = (lost - gained) / made["questions"] * made["scale"]
    return {
        "drop": drop,
        "drop_fraction": drop / made["scale"],
        "candidate": made["baseline"] - drop,
        "samples": made["questions"],
        "within_threshold": {"pass": True, "fail": False}.get(made["outcome"]),
    } | made


def accept() -> Document:
    """Return an ACCEPT by noninferiority, with everything that stands beside accuracy."""
    document = example("accept")
    gsm8k = row("gsm8k")
    gsm8k["external"] = {
        "published": 0.72,
        "source": "https://example.org/model-card",
        "protocol": "8 shots there, 5 here",
        "measured": 0.712,
        "difference": -0.008,
        "status": "verified",
    }
    hellaswag = row(
        "hellaswag",
        metric="acc_norm,none",
        baseline=0.801,
        questions=10042,
        lost=91,
        gained=70,
        drop_lower=0.0001,
        drop_upper=0.0042,
        beside=copy.deepcopy(CHOICES),
    )
    hellaswag["external"] = {
        "published": None,
        "source": None,
        "protocol": None,
        "measured": 0.801,
        "difference": None,
        "status": "externally unverified",
    }
    ifeval = row(
        "ifeval",
        metric="prompt_level_strict_acc,none",
        baseline=55.3,
        baseline_stderr=2.1,
        candidate_stderr=2.1,
        scale=100.0,
        limit=1.0,
        questions=541,
        repeats=4,
        clusters=180,
        method="cluster",
        lost=None,
        gained=None,
        drop=0.12,
        drop_fraction=0.0012,
        candidate=55.18,
        drop_lower=-0.61,
        drop_upper=0.88,
    )
    document |= {"rule": "noninferiority", "tasks": [gsm8k, hellaswag, ifeval]}
    return document


def regression() -> Document:
    """Return a REGRESSION: one task fails, one is undecided, the others pass."""
    failing = row(
        "math",
        baseline=0.482,
        questions=5000,
        lost=240,
        gained=60,
        drop_lower=0.0304,
        drop_upper=0.0417,
        p_within=1.0,
        p_worse=2e-12,
        p_worse_adjusted=8e-12,
        outcome="fail",
    )
    document = example("regression")
    document["reasons"] = ["math lost more than its margin."]
    document["rule"] = "noninferiority"
    document["tasks"] = [*accept()["tasks"][:2], failing, undecided_row()]
    return document


def undecided_row() -> Document:
    """Return the row of a task whose bounds enclose the margin."""
    return row(
        "arc_challenge",
        metric="acc,none",
        baseline=0.5412,
        questions=1172,
        lost=36,
        gained=33,
        drop_lower=-0.0091,
        drop_upper=0.0143,
        p_within=0.11,
        p_worse=0.84,
        beside=copy.deepcopy(CHOICES),
        outcome="undecided",
        needed={
            "more_questions_if_lossless": 2477,
            "more_questions_at_observed": 4530,
            "more_repeats": None,
            "benchmark_too_small": False,
        },
    )


def insufficient() -> Document:
    """Return an ANOMALOUS document: nothing fails, but three tasks are undecided."""
    small = row(
        "copa",
        metric="acc,none",
        baseline=0.87,
        questions=100,
        lost=1,
        gained=1,
        method="exact",
        drop_lower=-0.047,
        drop_upper=0.047,
        p_within=0.4,
        p_worse=0.7,
        outcome="undecided",
        needed={
            "more_questions_if_lossless": None,
            "more_questions_at_observed": None,
            "more_repeats": None,
            "benchmark_too_small": True,
        },
    )
    unbounded = row(
        "wikitext",
        metric="word_perplexity,none",
        baseline=12.31,
        candidate=12.35,
        baseline_stderr=None,
        candidate_stderr=None,
        higher_is_better=False,
        questions=20,
        method="ratio",
        lost=None,
        gained=None,
        drop=0.0032,
        drop_fraction=0.0032,
        drop_lower=None,
        drop_upper=None,
        p_within=1.0,
        p_worse=1.0,
        beside=None,
        outcome="undecided",
        needed={
            "more_questions_if_lossless": 10,
            "more_questions_at_observed": None,
            "more_repeats": 3,
            "benchmark_too_small": False,
        },
    )
    document = example("anomalous")
    return document | {
        "rule": "noninferiority",
        "failure_class": "INSUFFICIENT_EVIDENCE",
        "reasons": ["3 of 4 tasks are undecided: arc_challenge, copa, wikitext."],
        "next_action": "Ask as many more questions as the reason says.",
        "tasks": [accept()["tasks"][0], undecided_row(), small, unbounded],
    }


def sequential() -> Document:
    """Return an ACCEPT that was decided in growing rounds, with the path to it."""
    document = accept()
    document["path"] = []
    for task, decided_at in zip(document["tasks"], (5, 3, 4), strict=True):
        task["method"] = "betting"
        for look in range(1, decided_at + 1):
            scale, width = task["scale"], 0.05 / look
            document["path"].append(
                {
                    "round": look,
                    "task": task["task"],
                    "questions": 100 * 2**look,
                    "drop": task["drop"],
                    "drop_lower": None if look == 1 else task["drop"] - width * scale,
                    "drop_upper": task["drop_upper"]
                    if look == decided_at
                    else task["drop"] + width * scale,
                    "outcome": "pass" if look == decided_at else "undecided",
                }
            )
    document["path"].sort(key=lambda look: look["round"])
    return document


def noise_floor() -> Document:
    """Return an ACCEPT with the baseline held against its own repeat, and with a plan."""
    document = accept()
    document["noise_floor"] = {
        "gsm8k": {
            "questions": 1319,
            "lost": 5,
            "gained": 6,
            "discordance": 0.00834,
            "changed": 0.302,
            "logprob_shift": None,
        },
        "hellaswag": {
            "questions": 10042,
            "lost": 0,
            "gained": 0,
            "discordance": 0.0,
            "changed": None,
            "logprob_shift": 0.0004,
        },
    }
    document["plan"] = [
        {
            "task": "gsm8k",
            "questions": 1319,
            "margin": 0.01,
            "discordance": 0.02,
            "detectable_drop": 0.0097,
            "power": 0.81,
            "needed": 1237,
        },
        {
            "task": "ifeval",
            "questions": 541,
            "margin": 0.01,
            "discordance": 0.05,
            "detectable_drop": 0.0239,
            "power": 0.271,
            "needed": 3092,
        },
    ]
    return document


def threshold_rule() -> Document:
    """Return a REGRESSION by observed drops alone, as bare score files give it."""
    document = example("regression")
    fields = ("drop_lower", "drop_upper", "method", "lost", "gained", "needed", "beside")
    for task in document["tasks"]:
        task |= dict.fromkeys(("outcome", "external", *fields))
    return document | {"rule": "threshold", "path": [], "noise_floor": None, "plan": []}


def early() -> Document:
    """Return an INFEASIBLE release that stopped before anything was evaluated."""
    return example("infeasible") | {"rule": None, "path": [], "noise_floor": None, "plan": []}


def on_a_cluster() -> Document:
    """Return an ACCEPT whose stages ran as jobs: one was cancelled, of one little is known."""
    document = accept()
    job = {"job_id": "17", "node": "n1", "state": "COMPLETED", "queued_s": 200.0, "ran_s": 3600.0,
           "nodes": 2, "gpus": 4}  # fmt: skip
    unknown = dict.fromkeys(("job_id", "node", "state", "queued_s", "ran_s", "nodes", "gpus"))
    jobs = {
        "ptq": [
            {"name": "day0-run-ptq-1-0a", **job, "state": "CANCELLED"},
            {"name": "day0-run-ptq-2-0b", **job, "job_id": "18"},
        ],
        "deploy": [{"name": "day0-run-deploy-1-0c", **unknown}],
    }
    for stage in document["stages"]:
        of_stage = jobs.get(stage["name"], [])
        known = len(of_stage) if stage["name"] == "ptq" else None
        stage |= {
            "queued_s": known and 200.0 * known,
            "ran_s": known and 3600.0 * known,
            "gpu_hours": known and 8.0 * known,
            "jobs": of_stage,
        }
    return document | {"gpu_hours": None}


KINDS: dict[str, Callable[[], Document]] = {
    "noninferiority-accept": accept,
    "noninferiority-regression": regression,
    "noninferiority-undecided": insufficient,
    "sequential": sequential,
    "noise-floor": noise_floor,
    "threshold-rule": threshold_rule,
    "early-stop": early,
    "on-a-cluster": on_a_cluster,
}
