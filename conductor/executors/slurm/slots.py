"""How many jobs of a cluster are in its queue or at work at a time, over all releases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore

LOOK_S = 0.5
"""Seconds between two looks whether whoever waits for a slot is still wanted."""


class JobSlots:
    """At most ``limit`` jobs at a time."""

    def __init__(self, limit: int) -> None:
        """Begin with every slot free."""
        self._free = BoundedSemaphore(limit)

    @contextmanager
    def one(self, still_wanted: Callable[[], None]) -> Iterator[None]:
        """Hold a slot while the block runs; wait for one first.

        ``still_wanted`` is called while it waits, and raises to give up.
        """
        while not self._free.acquire(timeout=LOOK_S):
            still_wanted()
        try:
            yield
        finally:
            self._free.release()
