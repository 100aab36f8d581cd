"""Build, list or re-lock the worker environments: ``python -m conductor.environments --help``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from conductor.compatibility import Device
from conductor.environments.builder import (
    ENVIRONMENTS,
    GIB,
    EnvironmentFailed,
    Environments,
    lock,
    names_for,
)
from conductor.probes.machine import probe_machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit code 0, or 2 when an environment could not be made."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "lock":
            for name in options.names or ENVIRONMENTS:
                lock(name, os.environ)
                _say(f"{name}: locked")
            return 0
        if options.command == "status":
            environments = Environments(options.root, device=options.device)
            for name in ENVIRONMENTS:
                _say(f"{name}: {environments.status(name)}")
            return 0
        environments = Environments(options.root, device=options.device)
        for name in options.names or names_for(environments.device):
            _build(environments, name, verbose=options.verbose)
    except EnvironmentFailed as failure:
        sys.stderr.write(f"error: {failure}\n")
        return 2
    return 0


def _build(environments: Environments, name: str, *, verbose: bool) -> None:
    started = time.monotonic()
    built = environments.build(name, _say if verbose else lambda line: None)
    seconds = time.monotonic() - started
    size = environments.size_bytes(name) / GIB
    what = f"built in {seconds:.0f} s" if built else "ready"
    _say(f"{name}: {what}, {size:.1f} GiB ({ENVIRONMENTS[name].purpose})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m conductor.environments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make environments ready; those that are stay")
    status = commands.add_parser("status", help="say which environments are ready")
    relock = commands.add_parser("lock", help="resolve the .in files anew into the .txt files")
    for command in (build, status):
        command.add_argument("--root", type=Path, help="where environments live")
        command.add_argument(
            "--device",
            type=Device,
            default=probe_machine().device,
            help="cpu or cuda; what this machine has if left out",
        )
    build.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"all that the device needs if left out; of {', '.join(ENVIRONMENTS)}",
    )
    build.add_argument("--verbose", action="store_true", help="show the installer's output")
    relock.add_argument("names", nargs="*", metavar="NAME")
    return parser


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
