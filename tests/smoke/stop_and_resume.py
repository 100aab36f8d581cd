"""Stop a real release while the candidate is evaluated, resume it, and examine what it left.

Run as ``python -m tests.smoke.stop_and_resume WORKSPACE``; prints JSON, and exits 1 when something
is wrong: work that was done twice, files that are missing, shapes and digests that do not hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.run_checks import all_problems, outcome, submissions

INTERRUPTED = Path(__file__).parents[1] / "interrupted.py"
RELEASE = ("release", "demo", "--recipe", "int8", "--overlap", "never")
STOP_AT = "tool_started evaluate.py"  # the candidate: the evaluation of the source is cached
STOPPED = 130


def day0(*arguments: str, stop_at: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run day0; with ``stop_at``, SIGTERM meets it at the first point of that name."""
    words = ["--signal", "SIGTERM", "--at", stop_at or "", str(int(stop_at is not None))]
    return subprocess.run(
        [sys.executable, INTERRUPTED, *words, *arguments],
        capture_output=True,
        text=True,
    )


def main(workspace: Path) -> int:
    before = set(workspace.glob("runs/*"))
    stopped = day0(*RELEASE, "--workspace", str(workspace), stop_at=STOP_AT)
    (run_dir,) = set(workspace.glob("runs/*")) - before
    resumed = day0("resume", str(run_dir))
    problems = all_problems(run_dir)
    if "day0 resume" not in stopped.stderr:
        problems.append(f"the stop does not say how to go on: {stopped.stderr}")
    if resumed.returncode:
        problems.append(f"the resumed release ended with {resumed.returncode}: {resumed.stderr}")
    if not problems:
        starts = {tool: count for (tool, _), count in submissions(run_dir).items()}
    document = {
        "stopped_with": stopped.returncode,
        "problems": problems,
        "decision": None if problems else outcome(run_dir)["decision"],
        "starts": {} if problems else starts,
    }
    sys.stdout.write(f"{json.dumps(document, indent=2)}\n")
    return int(stopped.returncode != STOPPED or bool(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
