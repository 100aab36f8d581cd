"""Show that a worker works where nobody counts how far it is.

Loading, downloading and tokenizing can take longer than a watchdog waits for progress. Whether a
worker works is read from the processor time and the bytes that it uses, so that one which hangs, or
waits for a server that does, falls silent.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

from protocol import Progress

PULSE_S = 5.0
BUSY_SHARE = 0.01  # of a core; a process that waits for a silent server uses a tenth of it
BUSY_BYTES = 1 << 14  # read and written; what the pulse itself reads is less


class Pulse:
    """Pass progress on, and report work that nobody counts: loading, downloading, tokenizing.

    Whether there is any is read from the processor time and the bytes that this process uses, so
    that one which hangs, or waits for a server that does, falls silent.
    """

    def __init__(self, progress: Progress) -> None:
        """Begin to look, until the process ends."""
        self._progress = progress
        self._latest = (0, 0, "")
        self._lock = threading.Lock()  # one file is written, by two threads
        threading.Thread(target=self._look, daemon=True).start()

    def __call__(self, done: int, total: int, doing: str) -> None:
        """Report what was counted."""
        with self._lock:
            self._latest = (done, total, doing)
            self._progress(done, total, doing)

    def _look(self) -> None:
        began = time.monotonic()
        worked_s, moved = time.process_time(), moved_bytes()
        while True:
            time.sleep(PULSE_S)
            now_s, now = time.process_time(), moved_bytes()
            if now_s - worked_s > BUSY_SHARE * PULSE_S or now - moved > BUSY_BYTES:
                with self._lock:
                    done, total, doing = self._latest
                    self._progress(done, total, f"{doing} ({time.monotonic() - began:.0f} s)")
            worked_s, moved = now_s, now


def moved_bytes() -> int:
    """Return how many bytes this process has read and written so far; 0 where it may not know."""
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    return 0
