"""What a deterministic release pins, and what it says that it could not pin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import run_day0
from report_documents import accept

from conductor import deterministic
from conductor.closeout import report_document
from conductor.compatibility import TABLE, Device, Engine
from conductor.config import Config, load_config, load_recorded
from conductor.deterministic import (
    ASKS_WORKERS,
    BATCH_INVARIANT,
    BATCH_INVARIANT_VERSIONS,
    PINNED,
    SERVER_ARGUMENTS,
    describe,
    pin_world,
    variables,
)
from conductor.digests import Digests
from conductor.engines.opening import planned_settings, server_settings
from conductor.environments import builder
from conductor.environments.builder import Environments
from conductor.executors.environ import worker_environ
from conductor.executors.local import WORKERS
from conductor.failure import Failure
from conductor.journal import Journal
from conductor.models import resolve_model
from conductor.probes.machine import Accelerator, Machine
from conductor.release_state import Plan, Release
from conductor.report import render_html, render_markdown, terminal_summary, validated
from conductor.suites import load_suite
from conductor.tools import NothingStarts
from conductor.world import World
from gates import RECIPES, FailureClass

DEMO = {"model": "demo", "recipe": "int8"}
VERSION = next(iter(BATCH_INVARIANT_VERSIONS))


def config_of(tmp_path: Path, text: str = "", **options: Any) -> Config:
    file = tmp_path / "release.yaml"
    file.write_text(f"deterministic: true\n{text}")
    return load_config(file, {**DEMO, **options})


def machine_with(*capabilities: tuple[int, int] | None) -> Machine:
    return Machine(
        device=Device.CUDA if capabilities else Device.CPU,
        accelerators=tuple(
            Accelerator(name="GPU", memory_bytes=1, driver="1", compute_capability=each)
            for each in capabilities
        ),
        processor="a processor",
        cores=2,
        memory_bytes=1,
        memory_available_bytes=1,
        system="Linux",
    )


def world_with(machine: Machine, environ: Mapping[str, str]) -> World:
    environments = Environments(device=machine.device, variables={})
    return World(environments=environments, environ=environ, machine=machine)


def plan_on(engine: Engine, *, dataset: str | None = None, suite: str = "demo") -> Plan:
    return Plan(
        model=resolve_model("demo"),
        recipe=RECIPES["int8"],
        suite=load_suite(suite),
        row=next(row for row in TABLE if row.engine is engine),
        quantize_request={"calibration": {"path": None, "dataset": dataset}},
    )


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="defaults"),
        pytest.param(
            "overlap: always\nevaluation: {concurrency: 64}\n", id="a-file-says-otherwise"
        ),
        pytest.param("evaluation: {prompts_per_request: 1}\n", id="a-file-says-the-same"),
    ],
)
def test_settings_are_pinned(tmp_path: Path, text: str) -> None:
    config = config_of(tmp_path, text)
    assert (config.concurrency, config.prompts_per_request, config.overlap) == (1, 1, "never")
    assert config.document()["evaluation.concurrency"] == {"value": 1, "from": PINNED}


def test_what_is_not_deterministic_is_left_alone(tmp_path: Path) -> None:
    config = load_config(None, DEMO)
    assert (config.concurrency, config.prompts_per_request, config.overlap) == (16, 8, "auto")
    assert server_settings(config, Device.CPU, None).extra_arguments == ()


def test_the_command_line_cannot_contradict_it(tmp_path: Path) -> None:
    with pytest.raises(
        Failure, match=r"overlap: always .* deterministic, .* never; leave"
    ) as caught:
        config_of(tmp_path, overlap="always")
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert config_of(tmp_path, overlap="never").overlap == "never"


@pytest.mark.parametrize("arguments", ["[--seed, '5']", "[--x, --seed=5]"])
def test_a_server_has_no_seed_of_its_own(tmp_path: Path, arguments: str) -> None:
    with pytest.raises(Failure, match=r"engine\.arguments: --seed .* deterministic, .* seed:"):
        config_of(tmp_path, f"engine: {{arguments: {arguments}}}\n")
    assert config_of(tmp_path, "engine: {arguments: [--seeds]}\n").engine.arguments


@pytest.mark.parametrize("named_in_a_file", [True, False])
def test_a_recorded_release_is_deterministic_again(tmp_path: Path, named_in_a_file: bool) -> None:
    import yaml

    begun = (
        config_of(tmp_path, "overlap: always\n")
        if named_in_a_file
        else load_config(None, {**DEMO, "deterministic": True})
    )
    recorded = tmp_path / "config.resolved.yaml"
    recorded.write_text(yaml.safe_dump(begun.document()))
    then, now = load_recorded(recorded, None, {})
    assert {**then.origins, "workspace": None} == {**begun.origins, "workspace": None}
    assert (now.concurrency, now.overlap, now.deterministic) == (1, "never", True)


@pytest.mark.parametrize(
    ("machine", "version", "expected"),
    [
        pytest.param(machine_with(), VERSION, set(), id="cpu"),
        pytest.param(machine_with((9, 0)), VERSION, {BATCH_INVARIANT}, id="hopper"),
        pytest.param(machine_with((8, 0)), VERSION, {BATCH_INVARIANT}, id="the-least-capability"),
        pytest.param(machine_with((7, 5)), VERSION, set(), id="just-under"),
        pytest.param(machine_with((9, 0), (7, 5)), VERSION, set(), id="one-of-two-under"),
        pytest.param(machine_with(None), VERSION, set(), id="unknown-capability"),
        pytest.param(machine_with((9, 0)), "0.10.0", set(), id="unknown-version"),
        pytest.param(machine_with((9, 0)), None, set(), id="no-version"),
    ],
)
def test_the_batch_invariant_mode_is_asked_for_where_it_is_known(
    machine: Machine, version: str | None, expected: set[str]
) -> None:
    found = variables(7, machine, version)
    assert found.keys() & {BATCH_INVARIANT} == expected
    assert (found["PYTHONHASHSEED"], found[ASKS_WORKERS]) == ("7", "1")
    assert ("CUBLAS_WORKSPACE_CONFIG" in found) == (machine.device is Device.CUDA)


def test_the_locked_server_is_one_whose_mode_is_known() -> None:
    lock = (Path(builder.HERE) / "serve-cuda.txt").read_text()
    assert any(f"vllm=={version}" in lock for version in BATCH_INVARIANT_VERSIONS)


def test_every_tool_gets_the_variables() -> None:
    world = pin_world(world_with(machine_with(), {"PATH": "/bin"}), 0, VERSION)
    for offline in (True, False):
        environ = worker_environ(world.environ, offline=offline)
        assert (environ["PYTHONHASHSEED"], environ[ASKS_WORKERS]) == ("0", "1")


def test_a_server_is_told_not_to_remember(tmp_path: Path) -> None:
    config = config_of(tmp_path, "engine: {arguments: [--enable-prefix-caching]}\n")
    settings = server_settings(config, Device.CPU, None)
    assert settings.extra_arguments == ("--enable-prefix-caching", *SERVER_ARGUMENTS)


@pytest.mark.parametrize("engine", list(Engine))
def test_what_others_were_answered_is_not_recalled(tmp_path: Path, engine: Engine) -> None:
    ours, theirs = (
        planned_settings(config, engine, Device.CPU, None, nodes=1)
        for config in (config_of(tmp_path), load_config(None, DEMO))
    )
    assert ours != theirs


def described(config: Config, plan: Plan | None, world: World, *said: str) -> dict[str, str]:
    """Return what is not pinned, with the reasons."""
    found = describe(config, plan, world, VERSION, said)["not_pinned"]
    return {each["what"]: each["why"] for each in found}


@pytest.mark.parametrize(
    ("engine", "machine", "dataset", "suite", "said", "expected"),
    [
        pytest.param(
            Engine.VLLM, machine_with((9, 0)), None, "demo", (), set(), id="served-on-gpu"
        ),
        pytest.param(
            *(Engine.VLLM, machine_with(), None, "demo", ()),
            {"the server's kernels"},
            id="served-on-cpu",
        ),
        pytest.param(Engine.TRANSFORMERS, machine_with(), None, "demo", (), set(), id="in-process"),
        pytest.param(
            *(Engine.TRANSFORMERS, machine_with(), "org/text", "standard", ()),
            {"calibration data org/text", "the data of suite standard"},
            id="from-the-hub",
        ),
        pytest.param(
            *(Engine.TRANSFORMERS, machine_with((9, 0)), None, "demo", ("cumsum_cuda_kernel",)),
            {"cumsum_cuda_kernel"},
            id="torch-says-so",
        ),
    ],
)
def test_what_is_left_open_is_said(
    tmp_path: Path,
    engine: Engine,
    machine: Machine,
    dataset: str | None,
    suite: str,
    said: tuple[str, ...],
    expected: set[str],
) -> None:
    world = pin_world(world_with(machine, {}), 0, VERSION)
    plan = plan_on(engine, dataset=dataset, suite=suite)
    found = described(config_of(tmp_path), plan, world, *said)
    assert found.keys() == {*expected, "the machine"}
    assert all(found.values())


def test_a_variable_of_the_caller_stands_and_is_told(tmp_path: Path) -> None:
    world = world_with(machine_with((9, 0)), {BATCH_INVARIANT: "0", "PYTHONHASHSEED": "0"})
    pinned = pin_world(world, 0, VERSION)
    assert pinned.environ[BATCH_INVARIANT] == "0"
    report = describe(config_of(tmp_path), plan_on(Engine.VLLM), pinned, VERSION, ())
    assert "PYTHONHASHSEED=0" in report["pinned"]
    assert f"{BATCH_INVARIANT}=1" not in report["pinned"]
    (told,) = [each for each in report["not_pinned"] if each["what"] == BATCH_INVARIANT]
    assert told["why"] == "the caller has set it to '0', not '1'"


def test_a_dry_run_claims_nothing_of_its_tools(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path), dry_run=True)
    report = describe(config, plan_on(Engine.VLLM), world_with(machine_with(), {}), VERSION, ())
    assert [each["what"] for each in report["not_pinned"]] == ["the tools"]
    assert not any("PYTHONHASHSEED" in each for each in report["pinned"])


def test_setup_may_have_failed(tmp_path: Path) -> None:
    world = pin_world(world_with(machine_with(), {}), 0, None)
    assert described(config_of(tmp_path), None, world).keys() == {"the machine"}


def test_what_torch_said_in_any_worker_is_reported(tmp_path: Path) -> None:
    journal = Journal.create(
        tmp_path / "runs" / "r",
        clock=lambda: datetime(2026, 1, 2, tzinfo=UTC),
        model="demo",
        recipe="int8",
    )
    said = {"ptq": '{"not_deterministic": ["b", "a"]}', "baseline_eval/round-1": "[1]"}
    said |= {"deploy": '{"not_deterministic": ["a"]}', "candidate_eval": '{"not_det', "setup": "{}"}
    for where, text in said.items():
        (journal.run_dir / "stages" / where).mkdir(parents=True)
        (journal.run_dir / "stages" / where / "result.json").write_text(text)
    release = Release(
        config=config_of(tmp_path),
        journal=journal,
        world=pin_world(world_with(machine_with(), {}), 0, None),
        tools=NothingStarts(),
        digests=Digests(None),
    )
    left_open = report_document(release)["deterministic"]["not_pinned"]
    assert [each["what"] for each in left_open] == ["a", "b", "the machine"]


# In torch's place: it keeps what it was told, and warns as torch does.
TORCH = """
    import types, warnings
    asked = []
    backends = types.SimpleNamespace(cudnn=types.SimpleNamespace(benchmark=True))
    def use_deterministic_algorithms(mode, *, warn_only):
        asked.append((mode, warn_only))
    def cumsum():
        warnings.warn("cumsum_cuda_kernel does not have a deterministic implementation, but you "
                      "set 'torch.use_deterministic_algorithms(True, warn_only=True)'.")
"""
WORKER = """
    import sys, torch, json, warnings
    sys.path.insert(0, sys.argv[1])
    from determinism import exceptions, use_deterministic_algorithms
    use_deterministic_algorithms()
    torch.cumsum(); torch.cumsum(); warnings.warn("something else")
    print(json.dumps([torch.asked, torch.backends.cudnn.benchmark, exceptions()]))
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(
            *("1", [[[True, True]], False, {"not_deterministic": ["cumsum_cuda_kernel"]}]),
            id="asked",
        ),
        pytest.param(None, [[], True, {}], id="not-asked"),
        pytest.param("0", [[], True, {}], id="asked-not-to"),
    ],
)
def test_workers_ask_torch_and_note_what_it_cannot(
    tmp_path: Path, value: str | None, expected: list[object]
) -> None:
    (tmp_path / "torch.py").write_text(textwrap.dedent(TORCH))
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environ.pop(ASKS_WORKERS, None)
    done = subprocess.run(
        [sys.executable, "worker.py", str(WORKERS)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environ | ({ASKS_WORKERS: value} if value else {}),
    )
    assert json.loads(done.stdout) == expected, done.stderr
    assert "something else" in done.stderr


def test_workers_know_the_names_by_which_they_are_asked_and_answer() -> None:
    source = (WORKERS / "determinism.py").read_text()
    assert f'"{ASKS_WORKERS}"' in source
    assert f'"{deterministic.EXCEPTIONS}"' in source


def test_the_report_says_what_was_pinned_and_what_was_not() -> None:
    left_open = {"what": "the server's kernels", "why": "vLLM has no such mode here"}
    described = {"pinned": ["PYTHONHASHSEED=0"], "not_pinned": [left_open]}
    document = validated(accept() | {"deterministic": described})
    plain = str(terminal_summary(document, plain=True)).splitlines()
    assert "not pinned: the server's kernels (vLLM has no such mode here)" in plain
    for page in (render_markdown(document), render_html(document)):
        assert "PYTHONHASHSEED=0" in page
        assert "vLLM has no such mode here" in page


@pytest.mark.parametrize("value", [pytest.param({"deterministic": None}, id="null"), {}])
def test_other_reports_say_nothing_of_it(value: dict[str, None]) -> None:
    document = validated(accept() | value)
    assert "Repeatability" not in render_markdown(document)
    assert "Repeatability" not in render_html(document)
    assert "not pinned" not in str(terminal_summary(document, plain=True))


def test_a_deterministic_dry_run_comes_to_its_end(workspace: Path) -> None:
    words = ("release", "demo", "--recipe", "int8", "--dry-run", "--deterministic", "--json")
    done = run_day0(*words, "--workspace", str(workspace))
    assert done.exit_code == 0, done.stderr
    report = done.report
    assert "evaluation.concurrency: 1" in report["deterministic"]["pinned"]
    assert [each["what"] for each in report["deterministic"]["not_pinned"]] == ["the tools"]


@pytest.mark.tools
def test_a_deterministic_quantizer_writes_the_same_bytes_again(tmp_path: Path) -> None:
    config = tmp_path / "release.yaml"
    config.write_text("deterministic: true\ncalibration: {samples: 8}\n")
    written = []
    for threads in ("1", "2"):
        output = tmp_path / threads
        done = run_day0(
            *("ptq", "demo", "--recipe", "int4_awq", "--config", str(config)),
            *("--output", str(output)),
            environ={"OMP_NUM_THREADS": threads},
        )
        assert done.exit_code == 0, done.stderr
        result = json.loads((output / "result.json").read_text())
        assert result[deterministic.EXCEPTIONS] == []
        written.append((output / "checkpoint" / "model.safetensors").read_bytes())
    assert written[0] == written[1]
