"""Show a release while it works: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from conductor.chain import Stage, State

PLAIN_EVERY_S = 10.0
MARKS = {State.DONE: "[green]done[/]", State.FAILED: "[red]failed[/]"}


class LiveDisplay:
    """One live line for the running stage, one line left behind for each that ended."""

    def __init__(self, console: Console) -> None:
        """Draw on ``console``, which must be a terminal."""
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[stage]}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._started = time.monotonic()
        self._row = self._progress.add_task("", stage="", total=None)

    def __enter__(self) -> LiveDisplay:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()

    def stage_started(self, stage: Stage, attempt: int) -> None:
        """Begin a new live line."""
        self._started = time.monotonic()
        label = stage if attempt == 1 else f"{stage} (attempt {attempt})"
        self._progress.reset(self._row, stage=label, description="")
        self._progress.tasks[0].total = None

    def stage_progress(self, done: int, total: int, doing: str) -> None:
        """Update the live line."""
        # To ``update`` a total of None means that it stays; a length that is not known must be set.
        self._progress.tasks[0].total = total or None
        self._progress.update(self._row, completed=done, description=doing)

    def stage_finished(self, stage: Stage, state: State, detail: str) -> None:
        """Leave one line about the stage."""
        from rich.markup import escape

        seconds = time.monotonic() - self._started
        first_line = escape(detail.partition("\n")[0])
        self._console.print(f"{MARKS[state]} [bold]{stage}[/] {seconds:.0f} s  {first_line}")

    def stage_kept(self, stage: Stage) -> None:
        """Leave one line about a stage that is not run again."""
        self._console.print(f"[cyan]kept[/] [bold]{stage}[/] done before")


class PlainDisplay:
    """Plain lines for logs: starts, ends, and progress every few seconds."""

    def __init__(self, console: Console) -> None:
        """Write to ``console``, which need not be a terminal."""
        self._console = console
        self._stage = ""
        self._started = self._reported = time.monotonic()

    def __enter__(self) -> PlainDisplay:
        """Nothing needs to be prepared."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing needs to be restored."""

    def stage_started(self, stage: Stage, attempt: int) -> None:
        """Say that a stage starts."""
        self._stage = stage
        self._started = self._reported = time.monotonic()
        self._line(f"{stage}: started" + (f", attempt {attempt}" if attempt > 1 else ""))

    def stage_progress(self, done: int, total: int, doing: str) -> None:
        """Say how far the stage is, at most every few seconds."""
        now = time.monotonic()
        if now - self._reported >= PLAIN_EVERY_S:
            self._reported = now
            stage = f"{self._stage}: " if self._stage else ""
            count = f" {done}/{total}" if total else ""
            self._line(f"{stage}{doing}{count} ({now - self._started:.0f} s)")

    def stage_finished(self, stage: Stage, state: State, detail: str) -> None:
        """Say how a stage ended."""
        seconds = time.monotonic() - self._started
        first_line = detail.partition("\n")[0]
        self._line(f"{stage}: {state} after {seconds:.0f} s: {first_line}".removesuffix(": "))

    def stage_kept(self, stage: Stage) -> None:
        """Say that a stage is not run again."""
        self._line(f"{stage}: kept, done before")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def open_display(console: Console) -> LiveDisplay | PlainDisplay:
    """Return the display that fits where ``console`` writes to."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
