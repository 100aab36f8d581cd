"""``day0 smoke``, ``smoke check`` and ``done`` as a user runs them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Finished, run_day0

from conductor.smoke.record import read_record

HELLO = """
[[scenario]]
name = "hello"
owners = ["greeting"]
command = ["{python}", "greet.py"]
expect = [{ stdout_contains = "hello" }]
timeout_s = 20
quick = true

[[scenario]]
name = "slow-hello"
owners = ["greeting"]
command = ["{python}", "greet.py"]
expect = [{ output_matches = "^hello world$" }]
after = ["hello"]
timeout_s = 20

[[scenario]]
name = "on-a-gpu"
owners = ["speed"]
command = ["{python}", "greet.py"]
expect = [{ stdout_contains = "hello" }]
needs = ["endpoint:NO_SUCH_VARIABLE"]
timeout_s = 20
quick = true
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with a manifest and what it protects, committed."""
    repo = tmp_path / "repo"
    (repo / "tests" / "smoke").mkdir(parents=True)
    (repo / "tests" / "smoke" / "manifest.toml").write_text(HELLO)
    (repo / "greet.py").write_text("print('hello world')\n")
    (repo / ".gitignore").write_text("/.day0/\n")
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for arguments in (["init"], ["add", "."], [*who, "commit", "--message", "m"]):
        subprocess.run(["git", *arguments], cwd=repo, check=True, capture_output=True)
    return repo


def day0(repo: Path, *arguments: str) -> Finished:
    manifest = ("--manifest", str(repo / "tests" / "smoke" / "manifest.toml"))
    done = run_day0(*arguments, *manifest)
    assert "Traceback" not in done.stderr
    return done


def break_it(repo: Path) -> None:
    (repo / "greet.py").write_text("print('goodbye')\n")


def test_quick_ones_run_and_skips_are_counted(repo: Path) -> None:
    done = day0(repo, "smoke")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "PASS hello (" in done.stdout
    assert "slow-hello" not in done.stdout
    reason = "on-a-gpu: NO_SUCH_VARIABLE is not set; set it to the endpoint's URL"
    assert f"SKIP {reason}" in done.stdout
    assert f"1 skipped, which is not passed:\n  {reason}\n" in done.stdout


def test_full_runs_all(repo: Path) -> None:
    assert "PASS slow-hello" in day0(repo, "smoke", "--full").stdout


def test_a_broken_promise_is_told_with_what_came_instead(repo: Path) -> None:
    break_it(repo)
    done = day0(repo, "smoke", "--full")
    assert done.exit_code == 1
    assert 'stdout was expected to contain "hello"; it is: goodbye' in done.stdout
    assert "FAIL slow-hello" in done.stdout
    assert "it comes after hello, which failed" in done.stdout
    kept = Path(done.stdout.rpartition("what they printed is in ")[2].splitlines()[0])
    assert (kept / "hello" / "stdout.log").read_text() == "goodbye\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        pytest.param(["smoke", "--owner", "greeting"], 0, id="owner"),
        pytest.param(["smoke", "--owner", "greeting", "--strict"], 0, id="owner-strict"),
        pytest.param(["smoke", "--strict"], 1, id="strict"),
        pytest.param(["smoke", "--owner", "speed"], 1, id="only-skips"),
        pytest.param(["smoke", "--owner", "nobody"], 2, id="unknown-owner"),
        pytest.param(["done", "greeting"], 0, id="done"),
        pytest.param(["done", "greeting", "--full"], 0, id="done-full"),
        pytest.param(["done", "speed"], 1, id="done-only-skips"),
        pytest.param(["done", "speed", "--full"], 1, id="done-only-own-skips"),
        pytest.param(["done", "nobody"], 1, id="done-nothing-to-run"),
        pytest.param(["done", "nobody", "--full"], 1, id="done-nothing-of-its-own"),
        pytest.param(["done", "../x"], 2, id="done-odd-owner"),
        pytest.param(["smoke", "check", "--base", "HEAD"], 0, id="check"),
        pytest.param(["smoke", "check", "--base", "no-such"], 2, id="check-unknown"),
    ],
)
def test_exit_codes(repo: Path, arguments: list[str], exit_code: int) -> None:
    done = day0(repo, *arguments)
    assert done.exit_code == exit_code, done.stdout + done.stderr


def test_done_is_recorded(repo: Path) -> None:
    assert day0(repo, "done", "greeting").exit_code == 0
    record = read_record(repo / ".day0" / "done" / "greeting.json")
    assert (record.owner, record.passed, record.checkpoint) == ("greeting", True, None)
    assert [each.name for each in record.scenarios] == ["hello", "slow-hello"]
    assert all(set(each.outputs) == {"stdout", "stderr"} for each in record.scenarios)
    break_it(repo)
    done = day0(repo, "done", "greeting")
    assert done.exit_code == 1
    assert "hello failed" in done.stdout
    broken = read_record(repo / ".day0" / "done" / "greeting.json")
    assert not broken.passed
    assert broken.code != record.code
    assert broken.scenarios[0].definition == record.scenarios[0].definition


def test_one_that_is_stopped_ends_what_it_started(repo: Path) -> None:
    code = "import os, time\nprint('hello', os.getpid(), flush=True)\ntime.sleep(600)\n"
    (repo / "greet.py").write_text(code)
    command = [sys.executable, "-m", "conductor.cli", "smoke", "--owner", "greeting"]
    with subprocess.Popen(
        [*command, "--manifest", str(repo / "tests" / "smoke" / "manifest.toml")],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (said := "".join(map(Path.read_text, repo.glob(".day0/smoke/*/hello/stdout*")))):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "every process that was started has ended" in stderr
    assert not psutil.pid_exists(int(said.split()[1]))


def test_json(repo: Path) -> None:
    document: dict[str, Any] = day0(repo, "smoke", "--json").report
    assert (document["passed"], document["owner"]) == (True, None)
    assert [each["outcome"] for each in document["scenarios"]] == ["passed", "skipped"]


def test_a_weakened_manifest_is_refused(repo: Path) -> None:
    manifest = repo / "tests" / "smoke" / "manifest.toml"
    manifest.write_text(HELLO.replace("^hello world$", "hello world|goodbye"))
    done = day0(repo, "smoke", "check", "--base", "HEAD")
    assert done.exit_code == 1
    assert "weakened: " in done.stdout
    assert "slow-hello: output: matches ^hello world$ is not demanded any more" in done.stdout


def test_a_manifest_without_an_assertion_is_refused(repo: Path) -> None:
    (repo / "tests" / "smoke" / "manifest.toml").write_text(
        HELLO.replace('{ stdout_contains = "hello" }', "{ exit_code = 0 }")
    )
    done = day0(repo, "smoke")
    assert done.exit_code == 2
    assert "scenario hello: expect: asserts nothing positive" in done.stderr


OF_A_RUN = """
[[scenario]]
name = "has-weights"
owners = ["weights"]
command = ["{python}", "-c", "import os, sys; print(sorted(os.listdir(sys.argv[1])))",
           "{run}/checkpoint"]
expect = [{ stdout_contains = "model.safetensors" }]
timeout_s = 20
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end with recorded tools."""
    workspace = tmp_path_factory.mktemp("finished")
    done = run_day0(
        *("release", "demo", "--recipe", "int8", "--dry-run", "--workspace", str(workspace))
    )
    assert done.exit_code == 0, done.stderr
    (run_dir,) = (workspace / "runs").iterdir()
    return run_dir


def test_done_about_a_run_is_recorded_in_the_run_and_sealed(repo: Path, finished: Path) -> None:
    from conductor.digests import checkpoint_digest

    (repo / "tests" / "smoke" / "manifest.toml").write_text(HELLO + OF_A_RUN)
    done = day0(repo, "done", "weights", "--run", str(finished))
    assert done.exit_code == 0, done.stdout + done.stderr
    record = read_record(finished / "smoke" / "weights.json")
    assert record.checkpoint == checkpoint_digest(finished / "checkpoint")
    verified = run_day0("verify", str(finished), "--json")
    assert verified.exit_code == 0, verified.stdout


def test_what_is_about_a_run_is_skipped_without_one(repo: Path) -> None:
    (repo / "tests" / "smoke" / "manifest.toml").write_text(HELLO + OF_A_RUN)
    done = day0(repo, "done", "weights")
    assert done.exit_code == 1
    assert "name one with --run RUN" in done.stdout


def test_a_run_without_a_candidate_is_refused(repo: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / finished.name
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoint")
    (repo / "tests" / "smoke" / "manifest.toml").write_text(HELLO + OF_A_RUN)
    done = day0(repo, "done", "weights", "--run", str(run_dir))
    assert done.exit_code == 2
    assert "there is no candidate to try" in done.stderr
    assert json.loads((run_dir / "report.json").read_text())
