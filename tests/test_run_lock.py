"""One conductor a run: between processes, threads and crashes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conductor.executors.processes import boot_id, identify, this_host
from conductor.failure import Failure
from conductor.run_lock import HOLDER, LOCK, hold, holder
from gates import FailureClass

HOLD_AND_WAIT = """
import sys
from pathlib import Path
from conductor.run_lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_WAIT, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def described(**changed: Any) -> dict[str, Any]:
    this = identify(os.getpid())
    return {
        "pid": this.pid,
        "start_ticks": this.start_ticks,
        "boot_id": boot_id(),
        "host": this_host(),
        "since": "2026-01-02T03:04:05.000Z",
        "command": "day0 release demo",
    } | changed


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    try:
        with pytest.raises(Failure) as refused, hold(tmp_path):
            pass
        assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR
        for part in (str(tmp_path), f"process {process.pid}", this_host(), f"kill {process.pid}"):
            assert part in refused.value.message
        who = holder(tmp_path)
        assert who is not None and who.pid == process.pid
        assert who.since in refused.value.message
    finally:
        process.communicate("")


def test_a_crash_frees_the_run_at_once(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert (tmp_path / HOLDER).exists()
    assert holder(tmp_path) is None
    with hold(tmp_path):
        who = holder(tmp_path)
        assert who is not None and who.pid == os.getpid()


def test_a_stopped_holder_keeps_the_run(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    try:
        assert holder(tmp_path) is not None
        with pytest.raises(Failure), hold(tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGCONT)
        process.communicate("")


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    code = HOLD_AND_WAIT.replace(
        '    print("held"',
        "    import subprocess\n"
        "    child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        '    Path(sys.argv[1], "child").write_text(str(child.pid))\n'
        '    print("held"',
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout and process.stdout.readline() == b"held\n"
    process.kill()
    process.communicate()
    try:
        with hold(tmp_path):
            pass
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_the_same_process_cannot_hold_twice_and_loses_nothing_by_trying(tmp_path: Path) -> None:
    with hold(tmp_path):
        with pytest.raises(Failure, match=f"process {os.getpid()}"), hold(tmp_path):
            pass
        with pytest.raises(Failure), hold(tmp_path):
            pass
        assert holder(tmp_path) is not None
    assert holder(tmp_path) is None
    assert not (tmp_path / HOLDER).exists()
    with hold(tmp_path):
        pass


def test_an_error_inside_frees_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hold(tmp_path):
        raise KeyboardInterrupt
    with hold(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "known"),
    [
        pytest.param(json.dumps(described()), True, id="this-process"),
        pytest.param(json.dumps(described(host="elsewhere")), True, id="another-host-is-believed"),
        pytest.param(json.dumps(described(start_ticks=1)), False, id="pid-given-again"),
        pytest.param(json.dumps(described(boot_id="0")), False, id="before-a-reboot"),
        pytest.param(json.dumps(described(pid=2**22 + 1)), False, id="gone"),
        pytest.param(json.dumps(described(pid="1")), False, id="pid-as-text"),
        pytest.param(json.dumps(described(host=["a"])), False, id="host-as-list"),
        pytest.param(json.dumps(described(more=1)), False, id="unknown-field"),
        pytest.param("{}", False, id="no-fields"),
        pytest.param("[" * 100_000, False, id="deep"),
        pytest.param("[]", False, id="no-mapping"),
        pytest.param("", False, id="empty"),
        pytest.param("\udcff", False, id="not-utf-8"),
    ],
)
def test_holder_is_who_lives(tmp_path: Path, content: str, known: bool) -> None:
    (tmp_path / HOLDER).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert (holder(tmp_path) is not None) is known
    with hold(tmp_path):  # words decide nothing
        pass


def test_holder_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / HOLDER)
    assert holder(tmp_path) is None


@pytest.mark.parametrize("content", [None, "broken"], ids=["missing", "damaged"])
def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path, content: str | None) -> None:
    process = start_holder(tmp_path)
    try:
        (tmp_path / HOLDER).unlink()
        if content:
            (tmp_path / HOLDER).write_text(content)
        with pytest.raises(Failure, match="has not said who it is; wait for it"), hold(tmp_path):
            pass
    finally:
        process.communicate("")


def test_a_run_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="name a run that exists"), hold(tmp_path / "missing"):
        pass
    assert not (tmp_path / "missing").exists()
    assert holder(tmp_path / "missing") is None


def lock_is_directory(directory: Path) -> Path:
    (directory / LOCK).mkdir()
    return directory


def lock_is_link(directory: Path) -> Path:
    (directory / "target").write_text("mine")
    (directory / LOCK).symlink_to(directory / "target")
    return directory


def holder_is_directory(directory: Path) -> Path:
    (directory / HOLDER).mkdir()
    return directory


@pytest.mark.parametrize("make", [lock_is_directory, lock_is_link, holder_is_directory])
def test_a_lock_that_cannot_be_taken_says_why(tmp_path: Path, make: Any) -> None:
    with pytest.raises(Failure) as refused, hold(make(tmp_path)):
        pass
    assert refused.value.failure_class is FailureClass.SYSTEMIC
    assert "make the directory writable" in refused.value.message
