"""Try the orchestration alone, offline and in seconds: a dry run is stopped in mid-queue, resumed,
and examined for tools that were started twice, files that are missing, and shapes that are wrong.

Run as ``python tests/smoke.py``; exits 1 and says what is wrong.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from run_checks import all_problems, outcome, submissions

INTERRUPTED = Path(__file__).with_name("interrupted.py")
DRY_RUN = ("release", "demo", "--recipe", "int8", "--dry-run", "--overlap", "never")
STOPPED = 130


def day0(*arguments: str, at: str = "", number: int = 0) -> subprocess.CompletedProcess[str]:
    """Run day0; with ``at``, SIGTERM meets it at the ``number``-th point of that name."""
    return subprocess.run(
        [sys.executable, INTERRUPTED, "--signal", "SIGTERM", "--at", at, str(number), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def stop_and_resume(workspace: Path) -> list[str]:
    """Return what is wrong with a dry run that was stopped before the source was evaluated."""
    stopped = day0(*DRY_RUN, "--workspace", str(workspace), at="tool_started evaluate.py", number=1)
    (run_dir,) = (workspace / "runs").iterdir()
    if stopped.returncode != STOPPED or "day0 resume" not in stopped.stderr:
        return [f"the stop ended with {stopped.returncode}: {stopped.stderr}"]
    resumed = day0("resume", str(run_dir))
    if resumed.returncode != 0:
        return [f"the resumed release ended with {resumed.returncode}: {resumed.stderr}"]
    problems = all_problems(run_dir)
    if (decision := outcome(run_dir)["decision"]) != "ACCEPT":
        problems.append(f"the decision is {decision}; ACCEPT was recorded")
    starts = sorted(count for count in submissions(run_dir).values())
    if starts != [1, 1, 2]:
        problems.append(f"tools were started {starts} times; one was stopped, so 1, 1 and 2 is due")
    return problems


def main() -> int:
    started = time.monotonic()
    with TemporaryDirectory(prefix="day0-smoke-") as directory:
        problems = stop_and_resume(Path(directory) / "workspace")
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"{len(problems)} problems in {seconds:.1f} s: {'; '.join(problems) or 'ok'}\n"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
