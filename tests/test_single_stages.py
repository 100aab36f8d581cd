"""One stage on its own works where it is typed: a configuration for a cluster is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from conductor.cli import app

COMMANDS = [
    pytest.param(["ptq", "demo", "--recipe", "int8"], id="ptq"),
    pytest.param(["serve", "demo"], id="serve"),
    pytest.param(["evaluate", "demo", "--suite", "demo"], id="evaluate"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cluster_is_refused(tmp_path: Path, command: list[str]) -> None:
    config = tmp_path / "release.yaml"
    config.write_text("executor: slurm\ncluster: hall\n")
    output = tmp_path / "output"
    done = CliRunner().invoke(app, [*command, "--config", str(config), "--output", str(output)])
    assert done.exit_code == 2
    assert f"executor: slurm ({config}) is for whole releases" in done.stderr
    assert "within an allocation of your own" in done.stderr
    assert not output.exists()
