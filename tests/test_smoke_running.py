"""Running scenarios: order, skips, timeouts, and that nothing outlives them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from conductor.compatibility import Device
from conductor.environments.builder import Environments
from conductor.failure import Failure
from conductor.probes.machine import Accelerator, Machine
from conductor.smoke.manifest import Scenario, parse_manifest
from conductor.smoke.needs import check_need, unmet
from conductor.smoke.running import Runner, Surroundings, choose, with_those_before
from conductor.world import World

MACHINE = Machine(
    device=Device.CPU,
    accelerators=(),
    processor="p",
    cores=2,
    memory_bytes=2**34,
    memory_available_bytes=2**33,
    system="Linux",
)


def gpu(capability: tuple[int, int] | None) -> Machine:
    card = Accelerator(name="card", memory_bytes=2**34, driver="1", compute_capability=capability)
    return replace(MACHINE, device=Device.CUDA, accelerators=(card,))


def world(tmp_path: Path, machine: Machine = MACHINE, **environ: str) -> World:
    environments = Environments(tmp_path / "environments", device=machine.device, variables={})
    return World(environments=environments, environ={"PATH": "/usr/bin:/bin", **environ},
                 machine=machine)  # fmt: skip


def around(tmp_path: Path, run: Path | None = None) -> Surroundings:
    return Surroundings(
        repo=tmp_path, kept=tmp_path / "kept", run=run, world=world(tmp_path, WORD="word")
    )


def scenario(name: str, code: str, expect: str, more: str = "") -> str:
    return f"""
        [[scenario]]
        name = "{name}"
        owners = ["x"]
        command = ["{{python}}", "-c", '''{code}''']
        expect = [{expect}]
        timeout_s = 20
        {more}
    """


def parse(text: str) -> tuple[Scenario, ...]:
    return parse_manifest(text, where="m.toml", directory=Path())


def run(tmp_path: Path, text: str, *, of_run: Path | None = None) -> dict[str, Any]:
    """Run all scenarios and return ``{name: (outcome, problems)}``; ``told`` hears the same."""
    told: list[Any] = []
    results = Runner(around(tmp_path, of_run)).run_all(parse(text), told.append)
    assert told == results
    return {each.name: (str(each.outcome), list(each.problems)) for each in results}


HELLO = scenario("hello", "print('hello')", '{ stdout_contains = "hello" }')


def test_what_appears_passes_and_its_output_is_kept(tmp_path: Path) -> None:
    assert run(tmp_path, HELLO) == {"hello": ("passed", [])}
    assert (tmp_path / "kept" / "hello" / "stdout.log").read_text() == "hello\n"


def test_the_streams_are_kept_apart(tmp_path: Path) -> None:
    code = "import sys; print('one', file=sys.stderr); print('two')"
    text = scenario("a", code, '{ stderr_contains = "one" }, { stdout_contains = "two" }')
    assert run(tmp_path, text) == {"a": ("passed", [])}
    assert (tmp_path / "kept" / "a" / "stderr.log").read_text() == "one\n"


def test_what_failed_is_told_with_what_came_instead(tmp_path: Path) -> None:
    text = scenario(
        "a", "print('bye'); exit(3)", '{ stdout_contains = "hello" }, { exit_code = 0 }'
    )
    assert run(tmp_path, text) == {
        "a": (
            "failed",
            [
                'stdout was expected to contain "hello"; it is: bye',
                "exit code was expected to be 0; it is: 3",
                "it ended with exit status 3",
            ],
        )
    }


def test_a_command_that_is_not_there_fails(tmp_path: Path) -> None:
    text = HELLO.replace('"{python}", "-c"', '"no-such-command"')
    outcome, problems = run(tmp_path, text)["hello"]
    assert outcome == "failed"
    assert "exit status 127" in problems[-1]


def test_there_is_no_shell(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1:])"
    text = scenario("a", code, '{ stdout_contains = "$WORD; *" }')
    text = text.replace("''']", "''', '$WORD; *']")
    assert run(tmp_path, text) == {"a": ("passed", [])}


def test_places(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; [pathlib.Path(p, 'f').write_text('made ' + p) for p in sys.argv[1:]]"
    )
    expect = (
        '{ file = "{tmp}/f", contains = "tmp/a" }, { file = "{workspace}/f", contains = "made" }'
    )
    text = scenario("a", code, expect).replace("''']", "''', '{tmp}', '{workspace}']")
    assert run(tmp_path, text) == {"a": ("passed", [])}


def test_one_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; print('hello', flush=True); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
        "start_new_session=True); print(child.pid, flush=True); time.sleep(600)"
    )
    text = scenario("a", code, '{ stdout_contains = "hello" }')
    started = time.monotonic()
    results = run(tmp_path, text.replace("timeout_s = 20", "timeout_s = 3"))
    assert results == {"a": ("failed", ["it was not done after 3 s, and was ended"])}
    assert time.monotonic() - started < 60
    pid = int((tmp_path / "kept" / "a" / "stdout.log").read_text().split()[1])
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("first", "outcome", "words"),
    [
        pytest.param(HELLO, "passed", "", id="passed"),
        pytest.param(HELLO.replace("print", "len"), "failed", "after hello, which", id="failed"),
        pytest.param(
            HELLO.replace("timeout_s", 'needs = ["gpu"]\ntimeout_s'),
            "skipped",
            "it comes after hello",
            id="skipped",
        ),
    ],
)
def test_what_comes_after_another(tmp_path: Path, first: str, outcome: str, words: str) -> None:
    text = scenario("b", "print('world')", '{ stdout_contains = "world" }', 'after = ["hello"]')
    found, problems = run(tmp_path, first + text)["b"]
    assert (found, words in " ".join(problems)) == (outcome, True)


def test_the_workspace_is_shared(tmp_path: Path) -> None:
    write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'f').write_text('x'); print('hello')"
    read = "import pathlib, sys; print('read', pathlib.Path(sys.argv[1], 'f').read_text())"
    one = scenario("hello", write, '{ stdout_contains = "hello" }')
    two = scenario("b", read, '{ stdout_contains = "read x" }', 'after = ["hello"]')
    text = (one + two).replace("''']", "''', '{workspace}']")
    assert {outcome for outcome, _ in run(tmp_path, text).values()} == {"passed"}


def test_one_about_a_run_needs_a_run(tmp_path: Path) -> None:
    text = HELLO.replace("''']", "''', '{run}']")
    outcome, problems = run(tmp_path, text)["hello"]
    assert (outcome, "--run RUN" in problems[0]) == ("skipped", True)
    assert run(tmp_path, text, of_run=tmp_path)["hello"][0] == "passed"


MANY = parse(
    HELLO
    + scenario("b", "1", '{ stdout_contains = "word" }', 'quick = true\nafter = ["hello"]')
    + scenario("c", "1", '{ stdout_contains = "word" }', "quick = true").replace('"x"', '"y"')
)


@pytest.mark.parametrize(
    ("owners", "full", "names", "with_before"),
    [
        pytest.param([], False, "bc", ["hello", "b", "c"], id="quick"),
        pytest.param([], True, "hello b c", ["hello", "b", "c"], id="full"),
        pytest.param(["y"], False, "c", ["c"], id="owner"),
        pytest.param(["x"], False, "b", ["hello", "b"], id="with-those-before"),
        pytest.param(["x", "y"], True, "hello b c", ["hello", "b", "c"], id="owners"),
    ],
)
def test_what_is_chosen(owners: list[str], full: bool, names: str, with_before: list[str]) -> None:
    chosen = choose(MANY, owners=owners, full=full)
    assert "".join(each.name for each in chosen) == names.replace(" ", "")
    assert [each.name for each in with_those_before(chosen, MANY)] == with_before


def test_an_owner_that_nobody_knows_is_refused() -> None:
    with pytest.raises(Failure, match=r"z: no scenario has this owner; owners: x, y"):
        choose(MANY, owners=["x", "z"], full=True)


def test_an_owner_without_anything_quick_is_told_of_full() -> None:
    with pytest.raises(Failure, match=r"none of 1 scenario\(s\) is quick; run them with --full"):
        choose(MANY[:1], owners=["x"], full=False)


@pytest.mark.parametrize(
    ("need", "machine", "environ", "words"),
    [
        pytest.param("gpu", MACHINE, {}, "there is no GPU", id="no-gpu"),
        pytest.param("gpu", gpu((9, 0)), {}, None, id="gpu"),
        pytest.param("dtype:bfloat16", MACHINE, {}, None, id="bfloat16-on-cpu"),
        pytest.param("dtype:bfloat16", gpu((7, 5)), {}, "does not compute in bfloat16", id="old"),
        pytest.param("dtype:bfloat16", gpu((8, 0)), {}, None, id="bfloat16"),
        pytest.param("dtype:float16", gpu(None), {}, "does not compute", id="unknown-capability"),
        pytest.param("environment:quantize", MACHINE, {}, "is absent; run:", id="environment"),
        pytest.param("engine:vllm", MACHINE, {}, "serve-cpu is absent", id="vllm"),
        pytest.param("engine:vllm", gpu((9, 0)), {}, "serve-cuda is absent", id="vllm-cuda"),
        pytest.param("engine:transformers", MACHINE, {}, "reference is absent", id="transformers"),
        pytest.param("endpoint:MINE", MACHINE, {}, "MINE is not set", id="no-variable"),
        pytest.param(
            "endpoint:MINE", MACHINE, {"MINE": "http://127.0.0.1:9"}, "nothing answers", id="silent"
        ),
        pytest.param("endpoint:MINE", MACHINE, {"MINE": "no url"}, "nothing answers", id="no-url"),
        pytest.param(
            "network", MACHINE, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "not answer", id="offline"
        ),
    ],
)
def test_needs(
    tmp_path: Path, need: str, machine: Machine, environ: Mapping[str, str], words: str | None
) -> None:
    check_need(need)
    reason = unmet(need, world(tmp_path, machine, **environ))
    assert (reason is None) if words is None else words in (reason or "")


def test_this_interpreter_runs_day0(tmp_path: Path) -> None:
    text = """
        [[scenario]]
        name = "a"
        owners = ["x"]
        command = ["{day0}", "--help"]
        expect = [{ stdout_contains = "release" }]
        timeout_s = 60
    """
    assert sys.executable
    results = Runner(replace(around(tmp_path), repo=Path(__file__).parent.parent)).run_all(
        parse(text), lambda result: None
    )
    assert [each.outcome for each in results] == ["passed"]
