"""How every command begins and ends: a display, one message, and a documented exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from conductor.executors.local import end_at_once
from conductor.failure import Failure, Stopped
from conductor.redaction import know, redact
from gates import FailureClass

if TYPE_CHECKING:
    from conductor.config import Config
    from conductor.display import LiveDisplay, PlainDisplay

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_SYSTEMIC = 5
EXIT_STOPPED = 130


def load(
    path: Path | None, options: dict[str, Any], required: tuple[str, ...] = ("model", "recipe")
) -> Config:
    """Resolve the configuration of a command; see ``config.load_config``."""
    from conductor.config import load_config

    return load_config(path, options, required)


@contextmanager
def display() -> Iterator[LiveDisplay | PlainDisplay]:
    """Show on standard error how the work gets on."""
    from rich.console import Console

    from conductor.display import open_display

    with open_display(Console(stderr=True)) as shown:
        yield shown


@dataclass(kw_only=True)
class Ending:
    """What a command says when it was stopped, beside that it was; how often it was asked to."""

    resume_with: str | None = None
    asked: int = 0

    def stop(self, number: int, frame: FrameType | None) -> NoReturn:
        """End in good order at the first signal, and at once at the second."""
        self.asked += 1
        if self.asked > 1:
            print("stopped at once", *self.resumption(), sep="; ", file=sys.stderr, flush=True)
            end_at_once()
            os._exit(EXIT_STOPPED)
        raise KeyboardInterrupt

    def words(self) -> str:
        """Say that everything has ended, and how to go on."""
        ended = "stopped on request; every process that was started has ended"
        return "; ".join([ended, *self.resumption()])

    def resumption(self) -> list[str]:
        """Say how to go on, where there is something to go on with."""
        return [f"resume with: {self.resume_with}"] if self.resume_with else []


class Commands(TyperGroup):
    """Commands whose usage errors, which repeat what was given, repeat no secret."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if message := getattr(error, "message", None):
                know(os.environ, sys.argv)
                error.message = redact(message)  # type: ignore[attr-defined]
            raise


@contextmanager
def ending_well() -> Iterator[Ending]:
    """Turn what may stop a command into one message and a documented exit code.

    From here on this process knows its secrets, and hides them in whatever it writes or says.
    """
    know(os.environ, sys.argv)
    ending = Ending()
    _show_any_name()
    # Also where a shell started us with SIGINT ignored, as it does for background jobs.
    _on_signals(ending.stop)
    try:
        yield ending
    except Failure as failure:
        refused = failure.failure_class is FailureClass.USER_CONFIG_ERROR
        stop(EXIT_UNUSABLE if refused else EXIT_SYSTEMIC, f"error: {failure.message}")
    except FileExistsError as error:
        stop(EXIT_UNUSABLE, f"error: {error.filename} exists already; name another directory")
    except OSError as error:
        what = ": ".join(filter(None, [error.strerror or str(error), error.filename]))
        stop(EXIT_SYSTEMIC, "; ".join([f"error: {what}", *ending.resumption()]))
    except typer.Exit:
        raise
    except Exception as error:
        # An exit code of 1 says REGRESSION; a defect of ours must not look like one.
        print(redact(traceback.format_exc(limit=-3)), end="", file=sys.stderr)
        stop(EXIT_SYSTEMIC, f"error: a defect of day0: {type(error).__name__}: {error}")
    except Stopped as stopped:
        _on_signals(signal.SIG_IGN)
        stop(EXIT_STOPPED, "; ".join([stopped.message, *ending.resumption()]))
    except KeyboardInterrupt:
        _on_signals(signal.SIG_IGN)  # one more changes nothing about the end
        stop(EXIT_STOPPED, ending.words())


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _show_any_name() -> None:
    """Let no name that the terminal cannot show end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stop(code: int, message: str) -> NoReturn:
    """Print one message, without its secrets, and end with an exit code."""
    print(redact(message), file=sys.stderr)
    raise typer.Exit(code)
