"""What 200 releases from one process cost the conductor: memory, time, and time for each step.

Run: ``.venv/bin/python benchmarks/fleet.py [DIRECTORY]`` on a machine that does nothing else. In
processes of their own, fleets of 50, 100 and 200 dry runs of the demo, eight at a time; they differ
in their margin, so that each is a release that somebody could ask for. Tools are answered by their
records; everything around them is done as for any release. A step of the scheduler is one look at
the board: what it shows is put together, and written if it changed. Its time on the processor may
grow no faster than the number of releases, give or take what a clock does; on the wall it waits for
the threads of the releases. The exit code is 1 when a limit is missed.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from conductor.fleet.asked import read_fleet_file
from conductor.fleet.places import Places
from conductor.fleet.record import plan_fleet
from conductor.fleet.running import Crew, prepare
from conductor.fleet.summary import summary_document, write_summary

SIZES = (50, 100, 200)
AT_ONCE = 8
LIMIT_MB = 500
SLACK = 1.5
"""Growth beyond the number of releases that counts as noise."""


class TimedCrew(Crew):
    """A crew that notes how long each step takes: on the wall, and on the processor."""

    steps_s: list[tuple[float, float]]

    def step(self, show: Any) -> None:
        """Do a step and note its times."""
        started = time.perf_counter(), time.thread_time()
        super().step(show)
        self.steps_s.append((time.perf_counter() - started[0], time.thread_time() - started[1]))


def now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


def quietly(document: Mapping[str, Any]) -> None:
    """Show nothing."""


def measure(size: int, directory: Path) -> dict[str, Any]:
    """Carry out a fleet of ``size`` dry runs in this process, and say what it took."""
    file = directory / f"fleet-{size}.yaml"
    rows = [
        {"model": "demo", "recipe": "int8", "settings": {"threshold": round(0.02 + n / 10000, 4)}}
        for n in range(size)
    ]
    asked = {"settings": {"dry_run": True}, "at_once": AT_ONCE, "releases": rows}
    file.write_text(yaml.safe_dump(asked), encoding="utf-8")
    started = time.monotonic()
    read, workspace = read_fleet_file(file, directory / f"workspace-{size}")
    fleet = plan_fleet(read, workspace, now())
    fleet.directory.mkdir(parents=True)
    places = Places(dict(os.environ), None)
    prepared = prepare(fleet, places.find)
    fleet.write()
    prepared_s = time.monotonic() - started
    crew = TimedCrew(prepared, find=places.find, clock=now)
    crew.steps_s = []
    crew.work(quietly)
    worked_s = time.monotonic() - started - prepared_s
    document = summary_document(
        fleet, prepared.releases, crew.board.document(), exit_code=0, now=now()
    )
    write_summary(document, fleet.directory)
    return {
        "releases": size,
        "accepted": document["totals"]["decisions"]["ACCEPT"],
        "prepared_s": prepared_s,
        "worked_s": worked_s,
        "summary_s": time.monotonic() - started - prepared_s - worked_s,
        "step_wall_ms": 1000 * statistics.median(wall for wall, _ in crew.steps_s),
        "step_ms": 1000 * statistics.median(own for _, own in crew.steps_s),
        "steps": len(crew.steps_s),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def main() -> int:
    """Print the table; exit code 1 when a limit is missed."""
    if sys.argv[2:]:
        print(json.dumps(measure(int(sys.argv[2]), Path(sys.argv[1]))))
        return 0
    directory = Path(sys.argv[1] if sys.argv[1:] else mkdtemp(prefix="day0-fleet-")).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in SIZES:
        command = [sys.executable, __file__, str(directory), str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append(json.loads(done.stdout))
    table = Table("releases", "accepted", "preparing", "wall", "a release", "summary",
                  "a step, own", "growth", "a step, wall", "peak memory")  # fmt: skip
    growths = [1.0]
    for before, row in pairwise(rows):
        step = row["step_ms"] / before["step_ms"]
        growths.append(step / (row["releases"] / before["releases"]))
    for row, growth in zip(rows, growths, strict=True):
        table.add_row(
            f"{row['releases']}",
            f"{row['accepted']}",
            f"{row['prepared_s']:.1f} s",
            f"{row['worked_s']:.0f} s",
            f"{row['worked_s'] / row['releases']:.2f} s",
            f"{row['summary_s']:.1f} s",
            f"{row['step_ms']:.2f} ms",
            f"{growth:.2f} of linear",
            f"{row['step_wall_ms']:.0f} ms",
            f"{row['peak_mb']:.0f} MB",
        )
    console = Console(width=130)
    console.print(table)
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    console.print(f"{os.cpu_count()} cores, load {load} at the end; results in {directory}")
    is_whole = all(row["accepted"] == row["releases"] for row in rows)
    in_memory = max(row["peak_mb"] for row in rows) <= LIMIT_MB
    return int(not (is_whole and in_memory and max(growths) <= SLACK))


if __name__ == "__main__":
    sys.exit(main())
