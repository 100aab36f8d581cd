"""Ask the candidate of a release one message: ``python -m conductor.smoke RUN``.

Prints the answer as JSON. Exit code 0 when it came in time, 1 when it did not, 2 when there is no
such candidate, 5 when it cannot be served.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from conductor.failure import Failure
from conductor.run_status import find_run
from conductor.smoke.serving import ask_candidate
from conductor.world import World
from gates import FailureClass


def main() -> int:
    """Ask, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m conductor.smoke", description=__doc__)
    parser.add_argument("run", help="a run's directory, its id or the beginning of one")
    parser.add_argument("--workspace", type=Path, default=Path("day0-workspace"))
    asked = parser.parse_args()
    try:
        run_dir = find_run(asked.run, asked.workspace.absolute())
        answer = ask_candidate(run_dir, World.find(dict(os.environ)))
    except Failure as failure:
        sys.stderr.write(f"error: {failure.message}\n")
        return 2 if failure.failure_class is FailureClass.USER_CONFIG_ERROR else 5
    sys.stdout.write(f"{json.dumps(answer.document(), indent=2)}\n")
    return 0 if answer.in_time else 1


if __name__ == "__main__":
    sys.exit(main())
