"""Our own scenarios, all of them, live; on this machine none may be skipped but for its device."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_day0

MANIFEST = Path(__file__).with_name("smoke") / "manifest.toml"


@pytest.mark.tools
@pytest.mark.timeout(1800)
def test_every_scenario_passes() -> None:
    done = run_day0(*("smoke", "--full", "--strict", "--manifest", str(MANIFEST)), timeout_s=1700)
    assert done.exit_code == 0, done.stdout + done.stderr
