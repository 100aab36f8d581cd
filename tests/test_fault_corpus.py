"""The gate on the fault corpus: every clean export passes, every fault is caught and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exports_on_disk import EXPORTS, checkpoint
from fault_corpus import FAULTS, Copied, Fault, corpus_page

from conductor.gate_commands import ptq_main

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "fault-corpus.md"

Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return where a source or an export lies; each is written once."""
    root = tmp_path_factory.mktemp("corpus")

    def write(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            checkpoint(name).write(directory)
        return directory

    return write


def ask_gate(
    directory: Path,
    source: Path,
    recipe: str,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...] = (),
) -> tuple[int, dict[str, Any]]:
    arguments = ["--checkpoint", directory, "--source", source, "--recipe", recipe, *options]
    capsys.readouterr()
    exit_code = ptq_main([str(argument) for argument in arguments])
    return exit_code, json.loads(capsys.readouterr().out)


def found(verdict: dict[str, Any]) -> set[str]:
    """Return the kinds of findings that refuse the checkpoint, and the checks that failed."""
    kinds = {each["kind"] for each in verdict["findings"] if each["failure_class"]}
    return kinds | {name for name, check in verdict["checks"].items() if not check["passed"]}


@pytest.mark.parametrize("name", EXPORTS)
def test_clean_export_passes(
    name: str, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    export = EXPORTS[name]
    exit_code, verdict = ask_gate(written(name), written(export.source), export.recipe, capsys)
    assert (exit_code, verdict["failure_class"]) == (0, None), verdict["detail"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fault_is_caught_and_named(
    fault: Fault, written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = EXPORTS[fault.base]
    source, directory = written(export.source), tmp_path / "candidate"
    shutil.copytree(written(fault.base), directory)
    fault.change(Copied(directory=directory, source=source))
    exit_code, verdict = ask_gate(directory, source, export.recipe, capsys, fault.options)
    assert exit_code == 1, verdict["detail"]
    assert verdict["failure_class"] == fault.failure_class, verdict["detail"]
    assert fault.finding in found(verdict)
    assert fault.named in verdict["detail"]


def test_corpus_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == corpus_page(), "run `make docs`"


def test_names_of_faults_are_unique() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
