"""What a release costs beside the same tools by hand, and what is saved by not doing things twice.

Run: ``.venv/bin/python benchmarks/release.py [DIRECTORY]`` on a machine that does nothing else;
about seven minutes on two cores. In one run, one after the other: the demo release by hand
(``by_hand.sh``), the same with ``day0 release`` in an empty workspace, a second recipe in that
workspace, and the resumption of the first release, which has ended. All of them find the files of
the tools in memory: all libraries are loaded once before. The exit code is 1 when a limit is
missed.

The conductor's own time is measured in two ways. On the clock: the wall time of its process, less
the time in which a tool was at work, by the journal's monotonic seconds: from the start of a worker
to its end, from the start of a server to the first question to it or the end of the stage that asks
it, and while a server is being stopped. By the processor: what the process itself used, without its
children; looking after tools that are at work is most of it, and holds nobody up, so it has no
limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
DAY0 = Path(sys.executable).with_name("day0")
ENVIRONMENTS = Path(
    os.environ.get("DAY0_ENVIRONMENTS", Path.home() / ".cache" / "day0" / "environments")
)
LIBRARIES = {"quantize": "llmcompressor", "serve-cpu": "vllm", "evaluate": "lm_eval.evaluator"}
SAMPLE_S = 0.02

OWN_SHARE = 0.02
RESUME_S = 1.0
SECOND_RATIO = 1 / 2
HAND_RATIO = 2 / 3
MISSED = "MISSED"

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One command: its wall time and the processor time of its own process, in seconds."""

    wall_s: float
    own_cpu_s: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured, in words and as a number, and what it may be at most."""

    what: str
    measured: str
    value: float
    limit: float | None
    limit_words: str

    @property
    def outcome(self) -> str:
        """Whether the limit is kept, where there is one."""
        if self.limit is None:
            return ""
        return "kept" if self.value <= self.limit else MISSED


def timed(command: Sequence[str | Path], output: Path, *, expected: Sequence[int] = (0,)) -> Run:
    """Run a command to its end, its standard output into a file, and measure it."""
    with output.open("w") as stream:
        started = time.monotonic()
        process = psutil.Popen(list(map(str, command)), cwd=ROOT, stdout=stream, env=environ())
        own_cpu_s = 0.0
        while process.poll() is None:
            try:
                used = process.cpu_times()
                own_cpu_s = used.user + used.system
            except psutil.Error:
                break  # it is just ending
            time.sleep(SAMPLE_S)
        status = process.wait()
        wall_s = time.monotonic() - started
    if status not in expected:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {status}; see {output}")
    return Run(wall_s=wall_s, own_cpu_s=own_cpu_s)


def environ() -> dict[str, str]:
    """Return our variables, less what would keep Python from keeping bytecode."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def warm_up(directory: Path) -> None:
    """Load every library once, so that nobody is the first to read it from the disk."""
    for environment, library in LIBRARIES.items():
        interpreter = str(ENVIRONMENTS / environment / "bin" / "python")
        command = [interpreter, "-c", f"import {library}"]
        subprocess.run(command, env=environ(), capture_output=True, check=True)
    rehearsal = ["release", "demo", "--recipe", "int8", "--dry-run"]
    timed([DAY0, *rehearsal, "--workspace", directory / "rehearsal"], directory / "rehearsal.log")


def read_events(run_dir: Path) -> list[Event]:
    """Return the events of a release."""
    lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def waits(events: Sequence[Event]) -> Iterator[tuple[float, float]]:
    """Yield stretches of the journal's seconds in which a tool was at work; they may overlap."""
    tools: dict[str, float] = {}
    servers_since: float | None = None
    before = 0.0
    for event in events:
        now = float(event["elapsed_s"])
        match event["event"]:
            case "tool_started":
                tools[event["directory"]] = now
            case "tool_finished":
                yield tools.pop(event["directory"]), now
            case "server_started":
                servers_since = now if servers_since is None else servers_since
            case "server_stopped":
                yield before, now
        if servers_since is not None and event["event"] in ("tool_started", "stage_finished"):
            yield servers_since, now
            servers_since = None
        before = now


def covered_s(stretches: Iterator[tuple[float, float]]) -> float:
    """Return the length of the union of stretches."""
    total, end = 0.0, 0.0
    for begins, ends in sorted(stretches):
        total += max(0.0, ends - max(begins, end))
        end = max(end, ends)
    return total


def release(recipe: str, directory: Path) -> tuple[Run, Path]:
    """Release the demo with a recipe; return what it took and its run directory."""
    report = directory / f"{recipe}.json"
    run = timed(
        [DAY0, "release", "demo", "--recipe", recipe, "--workspace", directory / "workspace",
         "--json"],
        report,
    )  # fmt: skip
    return run, Path(json.loads(report.read_text(encoding="utf-8"))["paths"]["run"])


def count_asked(run_dir: Path) -> int:
    """Return how often a release asked the source with lm-eval."""
    return sum(
        event["event"] == "tool_started" and "/baseline_eval" in event["directory"]
        for event in read_events(run_dir)
    )


def measure(directory: Path) -> list[Row]:
    """Carry everything out below ``directory`` and return the table."""
    warm_up(directory)
    hand = timed(
        [ROOT / "benchmarks" / "by_hand.sh", directory / "by-hand"], directory / "hand.log"
    )
    first, run_dir = release("int8", directory)
    second, second_dir = release("fp8", directory)
    resumed = timed([DAY0, "resume", run_dir, "--json"], directory / "resumed.json")
    if count_asked(second_dir):
        raise SystemExit(f"the second recipe asked the source anew; see {second_dir}")
    own_s = first.wall_s - covered_s(waits(read_events(run_dir)))
    return [
        Row(
            what="a release, to the same by hand",
            measured=f"{first.wall_s:.1f} s to {hand.wall_s:.1f} s",
            value=first.wall_s / hand.wall_s,
            limit=HAND_RATIO,
            limit_words="two thirds",
        ),
        Row(
            what="the second recipe, to the first",
            measured=f"{second.wall_s:.1f} s to {first.wall_s:.1f} s",
            value=second.wall_s / first.wall_s,
            limit=SECOND_RATIO,
            limit_words="half",
        ),
        Row(
            what="resuming a finished release",
            measured=f"{resumed.wall_s:.2f} s",
            value=resumed.wall_s,
            limit=RESUME_S,
            limit_words="1 s",
        ),
        Row(
            what="the conductor's own time, by the clock",
            measured=f"{own_s:.2f} s of {first.wall_s:.1f} s",
            value=own_s / first.wall_s,
            limit=OWN_SHARE,
            limit_words="2 %",
        ),
        Row(
            what="the conductor's own time, by the processor",
            measured=f"{first.own_cpu_s:.2f} s of {first.wall_s:.1f} s",
            value=first.own_cpu_s / first.wall_s,
            limit=None,
            limit_words="",
        ),
    ]


def main() -> int:
    """Print the table; exit code 1 when a limit is missed."""
    directory = Path(sys.argv[1] if sys.argv[1:] else mkdtemp(prefix="day0-benchmark-")).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise SystemExit(f"{directory} is not empty; name another directory")
    rows = measure(directory)
    table = Table("what", "measured", "ratio", "at most", "")
    for row in rows:
        ratio = "" if row.limit == RESUME_S else f"{row.value:.3f}"
        table.add_row(row.what, row.measured, ratio, row.limit_words, row.outcome)
    console = Console()
    console.print(table)
    console.print(f"by hand, step by step, in {directory / 'by-hand' / 'steps.tsv'}")
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    console.print(f"{os.cpu_count()} cores, load {load} at the end")
    return int(any(row.outcome == MISSED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
