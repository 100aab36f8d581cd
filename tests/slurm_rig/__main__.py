"""Start a real Slurm for a person: ``python -m tests.slurm_rig DIRECTORY``, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import suppress
from pathlib import Path

from . import SlurmRig, missing_programs


def main() -> None:
    """Start one, say how to reach it, and stop it when told to."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm_rig", description=__doc__)
    parser.add_argument("directory", type=Path, help="where everything of it goes")
    directory: Path = parser.parse_args().directory
    if missing := missing_programs():
        sys.exit(f"missing: {', '.join(missing)}; install Slurm with scripts/install-slurm.sh")
    directory.mkdir(parents=True, exist_ok=True)
    with suppress(KeyboardInterrupt), SlurmRig(directory) as rig:
        for name, value in rig.environ.items():
            sys.stdout.write(f"export {name}={value}\n")
        sys.stdout.write("# up; Ctrl-C stops it\n")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
