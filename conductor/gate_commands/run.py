"""``gate_run``: from results, or a run summary, and a server's log to the verdict on a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gates
from conductor.gate_commands.command import make_parser, run_gate, sourced
from conductor.gate_commands.documents import (
    InputError,
    evaluation_results,
    probed,
    read_document,
    stated_option,
)
from gates.criteria import ANSWER_LIMITS


def run_main(argv: Sequence[str] | None = None) -> int:
    """Ask the gate on one evaluation run."""
    parser = make_parser(
        "gate_run",
        "Check one evaluation run: every task ended, every planned sample scored once, answers\n"
        "that a model gave to the questions, and scores that follow from them.",
        "gate_run --results out/baseline --server-log out/server.log",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run summary (JSON)")
    source.add_argument(
        "--results",
        type=Path,
        help="directory that lm-eval wrote with "
        "--log_samples: the newest results_*.json counts, with the logs of its time",
    )
    parser.add_argument(
        "--server-log",
        type=Path,
        help="plain log of the server that answered, as vLLM writes it: "
        "failed requests and restarts",
    )
    parser.add_argument(
        "--limits",
        help='largest shares of answers of a kind, as JSON: {"truncated": 0.2}; kinds with their '
        f"usual limits: {', '.join(f'{name} {limit:g}' for name, limit in ANSWER_LIMITS.items())}",
    )
    return run_gate("run", parser, _evaluate_run, argv)


def _evaluate_run(args: argparse.Namespace) -> Mapping[str, Any]:
    limits = dict(stated_option(args.limits, "limits"))
    if args.run:
        summary = read_document(args.run, "run_summary")
    else:
        summary = evaluation_results(args.results).run_summary()
    if args.server_log:
        summary["server"] = _server_facts(args.server_log)
    for entry in summary["tasks"].values() if limits else ():
        entry["limits"] = {**(entry.get("limits") or {}), **limits}
    return sourced(gates.evaluate_run(summary), args.run or args.results)


def _server_facts(path: Path) -> dict[str, Any]:
    """Read a server's log; one that tells nothing is not that of the server that answered."""
    from conductor.probes.server_log import read_server_log

    facts = probed(lambda: read_server_log(path))
    if not facts["status_codes"] and not facts["starts"]:
        problem = "has no line of a request or a start as uvicorn writes them"
        raise InputError(str(path), f"{problem}; give the plain log of vLLM, with access lines")
    return facts
