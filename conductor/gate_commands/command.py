"""What all gate commands share: a parser, one JSON verdict on standard output, the exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Never

import gates
from conductor.gate_commands.documents import InputError
from gates import EvidenceError, FailureClass, Verdict

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal, as shells have it."""

_EXIT_CODES = """
exit codes:
  0  the gate passed
  1  the gate failed; "failure_class" and "detail" say why
  2  the input is unusable; "detail" names the file, the field and what it must be
  130  stopped by Ctrl-C
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints become a JSON verdict like every other."""

    def error(self, message: str) -> Never:
        raise InputError("arguments", f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        if not _print(self.format_help().rstrip()):
            raise SystemExit(2)


def make_parser(name: str, description: str, example: str) -> _Parser:
    """Return a parser whose help shows one call and the exit codes."""
    return _Parser(
        prog=name,
        description=description,
        epilog=f"example:\n  {example}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_gate(
    gate: str,
    parser: _Parser,
    evaluate: Callable[[argparse.Namespace], Mapping[str, Any]],
    argv: Sequence[str] | None,
) -> int:
    """Parse, ask the gate and print; return the exit code."""
    try:
        document = dict(evaluate(parser.parse_args(argv)))
    except InputError as error:
        document = Verdict.refused(gate, EvidenceError(error.source, error.problem)).document()
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        # Names too long, links in a circle: probes and readers meet them wherever a path is used.
        problem = f"cannot be read ({error.strerror or error})"
        name = str(error.filename or "input")
        document = Verdict.refused(gate, EvidenceError(name, problem)).document()
    failure_class = document["failure_class"]
    if failure_class is not None:
        document["next_action"] = gates.TRIAGE[FailureClass(failure_class)].next_action
    if not _print(json.dumps(document, indent=2, allow_nan=False)):
        return 2
    if document["pass"]:
        return 0
    return 2 if failure_class == FailureClass.USER_CONFIG_ERROR else 1


def _print(text: str) -> bool:
    """Print an answer; tell whether it was written, and on standard error why it was not.

    A reader may have left, as ``head`` does, and has then read enough: the exit code still answers.
    """
    if sys.stdout is None:
        problem = "it is closed"
    else:
        try:
            print(text, flush=True)
            return True
        except OSError as error:
            # What is still buffered would be tried once more when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return True
            problem = error.strerror or str(error)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"the answer could not be written to standard output: {problem}", file=sys.stderr)
    return False


def sourced(verdict: Verdict, *sources: Path) -> dict[str, Any]:
    """Return the verdict's document; where the input was refused, name the files it came from."""
    document = verdict.document()
    if verdict.failure_class is FailureClass.USER_CONFIG_ERROR:
        document["detail"] = f"{', '.join(map(str, sources))}: {document['detail']}"
    return document
