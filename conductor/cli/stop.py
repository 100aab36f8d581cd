"""``day0 stop``: end the conductor of a release, and the jobs that it would leave."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

from conductor.cli.ending import ending_well
from conductor.cli.options import JsonOption, RunArgument, WorkspaceOption, workspace_of


def stop(
    run: RunArgument = None, workspace: WorkspaceOption = None, as_json: JsonOption = False
) -> None:
    """End whoever works on a release, and cancel its jobs on a cluster; it can be resumed.

    Stopping `day0 release` itself ends what runs on this machine and leaves its jobs: they go on,
    and `day0 resume` finds them again.

    Exit codes: 0 nothing of it goes on, 2 no such run, or somebody works on it on another host,
    5 something may go on: the message says what.

    Example: `day0 stop demo-int8`
    """
    from conductor.executors.slurm.commands import Slurm
    from conductor.run_status import find_run
    from conductor.stopping import COMMAND_TIMEOUT_S, stop_run

    with ending_well():
        stopped = stop_run(
            find_run(run, workspace_of(workspace)),
            slurm=Slurm(timeout_s=COMMAND_TIMEOUT_S, environ=dict(os.environ)),
            clock=lambda: datetime.now(UTC),
        )
        print(json.dumps(stopped.document(), indent=2) if as_json else stopped.words)
