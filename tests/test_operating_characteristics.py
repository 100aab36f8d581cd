"""The error rates that docs/operating-characteristics.md states, held in a small simulation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "operating_characteristics.py"


def test_the_error_rates_hold_in_a_quick_simulation() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest" in done.stdout
