"""The one exception that ends a stage: what kind of failure it is, and what to do about it.

A failing gate returns a verdict; this exception is for bad input and a broken world. It is raised
where the fact is known, so nobody downstream has to read a message to classify it.
"""

from __future__ import annotations

from conductor.redaction import redact
from gates import FailureClass


class Failure(Exception):
    """A classified failure; the message says what was seen and ends with the remedy.

    It holds no secret, whatever a tool said: everybody who tells of the failure repeats it.
    """

    def __init__(self, failure_class: FailureClass, message: str) -> None:
        """Keep both for the journal, the report and the exit code."""
        self.failure_class = failure_class
        self.message = redact(message)
        super().__init__(self.message)


class Stalled(Failure):
    """A worker that made no progress and was ended; what it depends on may hang as well."""

    def __init__(self, message: str) -> None:
        """Keep the message; a hang is taken for a passing trouble of the world."""
        super().__init__(FailureClass.INFRA_TRANSIENT, message)


class Stopped(KeyboardInterrupt):
    """The release is to stop where it is, to be resumed; the message says why, and what goes on."""

    def __init__(self, message: str) -> None:
        """Keep the message for whoever asked."""
        self.message = redact(message)
        super().__init__(self.message)


def unusable(message: str) -> Failure:
    """Return the failure that refuses what somebody gave, to be raised."""
    return Failure(FailureClass.USER_CONFIG_ERROR, message)
