"""One million questions compared by the gate, beside what parsing the same documents takes.

Run: ``.venv/bin/python benchmarks/compare_million.py [questions]``. The aim: under two seconds in
the gate itself for one task of a million questions, whatever its samples hold. Each figure is the
least of several runs, because other work on the machine only ever adds. Parsing by msgspec and the
gate run without the garbage collector, as ``gate_compare`` runs them.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from conductor.probes.reading import without_collector
from gates import evaluate_noninferiority

REPEATS = 3
AIM_S = 2.0
DISCORDANCE = 0.05


def side(questions: int, kind: str, seed: int) -> dict[str, Any]:
    """Return a samples document; sides of two seeds differ in their answers alone."""
    truth, own = random.Random(0), random.Random(seed)
    right = [truth.random() < 0.7 for _ in range(questions)]
    scores = [int(each != (own.random() < DISCORDANCE / 2)) for each in right]
    task: dict[str, Any] = {
        "metric": "acc",
        "scale": 1.0,
        "higher_is_better": True,
        "questions": [f"{n}:0123abcd:4567ef89" for n in range(questions)],
        "scores": scores,
    }
    if kind == "clusters":
        task["clusters"] = [f"passage {n // 10}" for n in range(questions)]
    if kind == "everything":
        task["answers"] = [f"{own.getrandbits(64):016x}" for _ in range(questions)]
        task["lengths"] = [own.randrange(20, 400) for _ in range(questions)]
        task["choice_logprobs"] = [[-own.random() for _ in range(4)] for _ in range(questions)]
    return {"tasks": {"t": task}}


def seconds(call: Callable[[], object]) -> float:
    """Return the least time that a call takes."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main(argv: list[str]) -> int:
    """Print the table; exit code 1 when a comparison is over the aim."""
    questions = int(argv[0]) if argv else 1_000_000
    print(f"{questions:,} questions; both sides")
    print(f"{'samples hold':12} {'MiB':>6} {'json':>8} {'msgspec':>8} {'gate':>8} {'of json':>8}")
    slowest = max(measure(questions, kind) for kind in ("scores", "clusters", "everything"))
    return int(slowest > AIM_S)


def measure(questions: int, kind: str) -> float:
    """Print one row; return the seconds in the gate."""
    texts = [json.dumps(side(questions, kind, seed)).encode() for seed in (1, 2)]
    plain = seconds(lambda: [json.loads(text) for text in texts])
    with without_collector():
        fast = seconds(lambda: [msgspec.json.decode(text) for text in texts])
        documents = [msgspec.json.decode(text) for text in texts]
        verdict = evaluate_noninferiority(*documents)
        if not verdict.passed:
            raise SystemExit(verdict.detail)
        gate = seconds(lambda: evaluate_noninferiority(*documents))
    size = sum(map(len, texts)) / 2**20
    print(f"{kind:12} {size:6.0f} {plain:6.2f} s {fast:6.2f} s {gate:6.2f} s {gate / plain:7.2f}x")
    return gate


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
