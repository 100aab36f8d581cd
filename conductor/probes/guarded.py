"""Run what strangers wrote where it can do no harm: in a process with a time and a memory limit.

Patterns, templates and tokenizers come with a checkpoint, and evaluating one can take for ever or
fill the memory. A task is a script that reads one JSON document from its standard input and writes
one line of JSON per answer; the answers before a failure are kept, so that its cause can be named.
As a script, this module sets the limits and runs the task.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 30.0
MEMORY_BYTES = 768 << 20
"""Address space of a task; two tokenizers of 260,000 entries need 0.5 GB."""

_SHOWN_CHARACTERS = 160


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a task answered, and what stopped it: empty where it came to its end."""

    answers: list[Any]
    problem: str = ""


def run(
    task: Path, question: Any, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES
) -> Outcome:
    """Ask a task, and return its answers: all of them, or those before ``problem``.

    The script imports nothing of ours: it runs isolated from the working directory and from
    environment variables.
    """
    command = [sys.executable, "-I", __file__, str(task), str(memory_bytes), str(timeout_s)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    problem = ""
    with process:
        try:
            output, complaint = process.communicate(json.dumps(question), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, complaint = process.communicate()
            problem = f"it takes longer than {timeout_s:g} s"
    if not problem and process.returncode != 0:
        problem = _ending(process.returncode, complaint)
    return Outcome(answers=_answers(output), problem=problem)


def _answers(output: str) -> list[Any]:
    """Return the whole lines; the last one may have been cut when its writer was ended."""
    return [json.loads(line) for line in output.split("\n")[:-1]]


def _ending(code: int, complaint: str) -> str:
    lines = complaint.strip().splitlines()
    last = lines[-1] if lines else "nothing was said"
    if "MemoryError" in last or "memory allocation" in complaint:
        return "it needs more memory than it is given"
    ended = f"it was ended by signal {-code}" if code < 0 else f"it failed with code {code}"
    return f"{ended} ({last[:_SHOWN_CHARACTERS]})"


def _limit(memory_bytes: int, timeout_s: float) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = int(timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


if __name__ == "__main__":
    script, memory, seconds = sys.argv[1:]
    _limit(int(memory), float(seconds))
    runpy.run_path(script, run_name="__main__")
