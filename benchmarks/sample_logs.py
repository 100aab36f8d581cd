"""Time and memory to read a log of samples, beside ``json.loads`` of each line, in one run.

Run: ``.venv/bin/python benchmarks/sample_logs.py [rows]``. Rows are as lm-eval writes them: one
multiple-choice task with four choices, one generation task with few-shot prompts of 2,000
characters. The aim: about the time that parsing every line as JSON takes, a quarter more at most,
and memory that does not grow with the size of the rows.
"""

from __future__ import annotations

import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conductor.probes.sample_log import Plan, Reading, read_log

ROWS = 100_000
RUNS = 3
AIM_RATIO = 1.25


def row(number: int, kind: str, draw: random.Random) -> dict[str, Any]:
    """Return one row as lm-eval logs it."""
    question = f"What is {number} + 17? " + "An example of how to answer. " * 70
    if kind == "choices":
        likelihoods = [[[str(-draw.random() * 40), "False"]] for _ in range(4)]
        arguments = {f"gen_args_{i}": {"arg_0": question, "arg_1": str(i)} for i in range(4)}
        answers: Any = likelihoods
    else:
        arguments = {"gen_args_0": {"arg_0": question, "arg_1": {"until": ["\n"]}}}
        answers = [[f"{number + 17} " * 20]]
    hashes = {
        f"{name}_hash": sha256(f"{name}{number}".encode()).hexdigest()
        for name in ("doc", "prompt", "target")
    }
    return {
        "doc_id": number,
        "doc": {"question": question, "answer": str(number + 17)},
        "target": str(number + 17),
        "arguments": arguments,
        "resps": answers,
        "filtered_resps": [each[0] for each in answers],
        "filter": "none",
        "metrics": ["acc"],
        **hashes,
        "acc": float(draw.random() < 0.7),
    }


def seconds(work: Callable[[], object]) -> float:
    """Return the least time that some work takes."""
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def parse_lines(log: Path) -> None:
    """Parse every line with the standard library, and let it go."""
    with log.open("rb") as stream:
        for line in stream:
            json.loads(line)


def main(rows: int) -> int:
    """Print the table; exit code 1 when reading is over its aim."""
    over = False
    for kind in ("choices", "text"):
        draw = random.Random(0)
        with TemporaryDirectory() as directory:
            log = Path(directory) / "samples.jsonl"
            with log.open("w") as stream:
                for number in range(rows):
                    stream.write(json.dumps(row(number, kind, draw)) + "\n")
            reading = Reading(
                metric="acc",
                filter="none",
                aggregation="mean",
                likelihood=kind == "choices",
                plan=Plan(documents=range(rows), count=rows, size=rows),
            )
            plain = seconds(lambda log=log: parse_lines(log))
            read = seconds(lambda log=log, reading=reading: read_log(log, reading))
            tracemalloc.start()
            kept = read_log(log, reading)
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            size = log.stat().st_size
        over |= read > AIM_RATIO * plain
        print(
            f"{kind:8} {rows} rows, {size / 2**20:.0f} MiB: json.loads {plain:.2f} s, "
            f"read_log {read:.2f} s, ratio {read / plain:.2f}; "
            f"{held / rows:.0f} bytes kept per question, {kept.scored} scored"
        )
    return int(over)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS))
