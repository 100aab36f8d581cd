"""Who may import whom, read from the source; and what a command costs before it does anything."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("gates", "conductor")
HEAVY = {
    *(
        "torch",
        "numpy",
        "scipy",
        "statsmodels",
        "pandas",
        "matplotlib",
        "mlflow",
        "transformers",
        "datasets",
    ),
    *("vllm", "lm_eval", "modelopt", "llmcompressor", "huggingface_hub", "safetensors", "httpx"),
    *("jsonschema_rs", "jinja2"),
}
ADAPTERS = ("conductor.quantizers", "conductor.engines", "conductor.harnesses")
ABOVE_PROBES = (
    *ADAPTERS,
    *("conductor.executors", "conductor.stages", "conductor.release", "conductor.closeout"),
    *("conductor.cli", "conductor.journal", "conductor.report", "conductor.tracking"),
)


def modules(*packages: str) -> Iterator[tuple[str, Path]]:
    for package in packages:
        base = ROOT / package.replace(".", "/")
        paths = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
        for path in paths:
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def breaches(found: set[str], forbidden: tuple[str, ...]) -> list[str]:
    return sorted(
        name for name in found for ban in forbidden if name == ban or name.startswith(f"{ban}.")
    )


COUNTING = "gates.statistics"
"""The one gate module that is made of numpy and scipy; imported where a gate counts."""


def outside_imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    found = {each.partition(".")[0] for each in imports(path, top_level_only=top_level_only)}
    return found - {*sys.stdlib_module_names, "gates"}


def test_gates_import_nothing_but_themselves_and_the_standard_library() -> None:
    for name, path in modules("gates"):
        if name != COUNTING:
            assert not outside_imports(path), f"{name} imports {outside_imports(path)}"


def test_the_counting_module_needs_numpy_and_scipy_and_statsmodels_only_where_used() -> None:
    ((_, path),) = modules(COUNTING)
    assert outside_imports(path) == {"numpy", "scipy", "statsmodels"}
    assert outside_imports(path, top_level_only=True) == {"numpy", "scipy"}


@pytest.mark.parametrize(
    "forbidden", ["os", "io", "time", "datetime", "logging", "random", "pathlib"]
)
def test_gates_touch_no_file_clock_or_log(forbidden: str) -> None:
    for name, path in modules("gates"):
        assert not breaches(imports(path), (forbidden,)), f"{name} imports {forbidden}"


def test_workers_import_nothing_of_ours_but_siblings() -> None:
    for name, path in modules("conductor.workers"):
        assert not breaches(imports(path), OURS), name


def test_the_chain_is_pure() -> None:
    ((_, path),) = modules("conductor.chain")
    assert not breaches(imports(path), ("conductor", "os", "pathlib", "time", "logging"))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_do_not_know_each_other(adapter: str) -> None:
    others = tuple(other for other in ADAPTERS if other != adapter)
    for name, path in modules(adapter):
        assert not breaches(imports(path), others), name


def test_executors_know_no_tool() -> None:
    for name, path in modules("conductor.executors"):
        assert not breaches(imports(path), (*ADAPTERS, "conductor.probes")), name


def test_probes_know_nothing_above_them() -> None:
    for name, path in modules("conductor.probes"):
        assert not breaches(imports(path), ABOVE_PROBES), name


NUMERIC = ("conductor.probes.values", "conductor.probes.formats.numerics")
"""Modules that are made of numpy; nothing else imports them at its top."""


def test_no_gate_imports_the_counting_module_at_its_top() -> None:
    for name, path in modules("gates"):
        assert not breaches(imports(path, top_level_only=True), (COUNTING,)), name


def test_nothing_heavy_is_imported_at_the_top_of_a_module() -> None:
    for name, path in modules("conductor"):
        if not name.startswith(("conductor.workers", "conductor.demo", *NUMERIC)):
            forbidden = (*HEAVY, *NUMERIC, COUNTING)
            assert not breaches(imports(path, top_level_only=True), forbidden), name


@pytest.mark.parametrize("package", NUMERIC)
def test_numeric_modules_load_no_other_heavy_library(package: str) -> None:
    for name, path in modules(package):
        heavy = tuple(each for each in HEAVY if each != "numpy")
        assert not breaches(imports(path, top_level_only=True), heavy), name


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["conductor.cli", "--help"], id="day0"),
        pytest.param(["conductor.cli", "release", "--help"], id="day0-release"),
        pytest.param(["conductor.gate_commands"], id="gate-commands"),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert loaded, done.stderr
    assert not breaches(loaded, tuple(HEAVY))
