"""Engines answer prompts: a served endpoint, or a model loaded in process.

A release talks to one :class:`EngineSession`, which serves both sides under the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from conductor.executors.local import Progress

CANARY_MAX_TOKENS = 32
REMEMBERED = "not started: its answers to these prompts are remembered"


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The two checkpoints of a release."""

    source: Path
    candidate: Path

    def path(self, side: str) -> Path:
        """Return the checkpoint of ``source`` or ``candidate``."""
        path: Path = getattr(self, side)
        return path


class EngineSession(Protocol):
    """One engine, on one device, for the two checkpoints of one release.

    Two threads may use it, each for one side.
    """

    @property
    def holds_both(self) -> bool:
        """True when both sides can be asked at the same time."""

    def answer_canary(
        self,
        prompts: Sequence[str],
        stage_dir: Path,
        progress: Progress,
        source_answers: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Let both sides answer ``prompts`` and return the canary's evidence document.

        Args:
            prompts: what both sides are asked.
            stage_dir: receives what the engine leaves.
            progress: is told how far it is.
            source_answers: what the source answered to these prompts under the same settings; with
                them the source is not asked again.

        Raises:
            Failure: OUT_OF_MEMORY, or the world does not let the engine answer.
        """

    def backend(self, side: str, stage_dir: Path, progress: Progress) -> dict[str, Any]:
        """Make ``side`` ready and return what the harness needs to reach it.

        Raises:
            Failure: it cannot be made ready.
        """

    def secrets(self, side: str) -> Mapping[str, str]:
        """Return environment variables for the harness that must not be written to disk."""

    def check(self, side: str) -> None:
        """Raise Failure when ``side`` has stopped answering: it died, or it hangs."""

    def settings(self, side: str) -> Mapping[str, Any]:
        """Return the resolved settings under which ``side`` answers."""

    def log(self, side: str) -> Path | None:
        """Return the log of the server that answers for ``side``, or None where none does."""

    def begin(self, side: str, stage_dir: Path) -> None:
        """Start what answers for ``side`` without waiting, where there is room for it."""

    def discard(self, side: str) -> None:
        """Stop what answers for ``side``, so that its next use starts afresh."""

    def narrow(self) -> None:
        """From now on, load one side at a time: memory ran out."""

    def close(self) -> None:
        """End everything that was started."""
