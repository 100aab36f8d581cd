"""Processes known again by identity or token, and leftovers ended, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conductor.executors import processes
from conductor.executors.processes import (
    MARK,
    Family,
    Identity,
    end_leftovers,
    identify,
    is_alive,
    memory_kills,
    this_host,
    write_record,
)

TOKEN = "0123456789abcdef" * 2
OTHER_TOKEN = "f" * 32
SLEEP = "import sys, time; print(flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
DETACHED = (
    "import subprocess, sys; "
    f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"
)

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python program, wait until it printed, and end it after the test."""
    running: list[subprocess.Popen[bytes]] = []

    def started(program: str = SLEEP, token: str | None = TOKEN) -> "subprocess.Popen[bytes]":
        mark = {} if token is None else {MARK: token}
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", program],
            env={**os.environ, **mark},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout
        process.stdout.readline()
        running.append(process)
        return process

    yield started
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.3)


def record(directory: Path, document: object, name: str = "worker") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.process.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def recorded(identity: Identity, token: str = TOKEN, **changes: Any) -> dict[str, Any]:
    return {"token": token, **vars(identity)} | changes


def lives(process: "subprocess.Popen[bytes]") -> bool:
    return process.poll() is None


def test_an_identity_is_this_very_process(start: Start) -> None:
    process = start()
    identity = identify(process.pid)
    assert identity.pid == process.pid
    assert is_alive(identity)
    process.kill()
    time.sleep(0.1)
    assert not is_alive(identity), "nobody has reaped it yet, and it is dead all the same"
    process.wait()
    assert not is_alive(identity)
    with pytest.raises(ProcessLookupError, match=str(process.pid)):
        identify(process.pid)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"start_ticks": 1}, id="the-id-was-given-again"),
        pytest.param({"boot_id": "of another boot"}, id="before-a-reboot"),
        pytest.param({"host": "elsewhere"}, id="on-another-host"),
    ],
)
def test_anything_else_is_a_stranger(changes: dict[str, Any]) -> None:
    assert not is_alive(Identity(**(vars(identify(os.getpid())) | changes)))


def test_a_name_with_parentheses_and_blanks_is_read(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 (b c"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(program), "600"])
    try:
        assert is_alive(identify(process.pid))
    finally:
        process.kill()
        process.wait()


def test_leftovers_are_ended_by_identity_and_by_token(
    tmp_path: Path, start: Start, short_grace: None
) -> None:
    root, child, stranger, unmarked = (
        start(token=None),
        start(),
        start(token=OTHER_TOKEN),
        start(token=None),
    )
    path = record(tmp_path / "stages" / "ptq", recorded(identify(root.pid)))
    told = end_leftovers(tmp_path)
    assert (root.wait(1), child.wait(1)) == (-signal.SIGTERM, -signal.SIGTERM)
    assert lives(stranger) and lives(unmarked)
    assert not path.exists()
    assert told == [
        f"ended processes {min(root.pid, child.pid)}, {max(root.pid, child.pid)} that {path} names"
    ]
    assert end_leftovers(tmp_path) == []


def test_leftovers_of_a_conductor_that_died_before_it_knew_the_process(
    tmp_path: Path, start: Start
) -> None:
    process = start()
    write_record(tmp_path / "w.process.json", TOKEN, None)
    assert len(end_leftovers(tmp_path)) == 1
    assert process.wait(1) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("program", "stopped", "ending"),
    [
        pytest.param(SLEEP, True, signal.SIGTERM, id="stopped-processes-are-woken-to-end"),
        pytest.param(STUBBORN, False, signal.SIGKILL, id="deaf-ones-are-killed"),
        pytest.param(STUBBORN, True, signal.SIGKILL, id="stopped-and-deaf"),
    ],
)
def test_nothing_recorded_survives(
    tmp_path: Path, start: Start, short_grace: None, program: str, stopped: bool, ending: int
) -> None:
    process = start(program)
    if stopped:
        process.send_signal(signal.SIGSTOP)
    record(tmp_path, recorded(identify(process.pid)))
    end_leftovers(tmp_path)
    assert process.wait(1) == -ending


def test_a_child_that_left_the_session_is_found_when_its_parent_is_gone(
    tmp_path: Path, start: Start
) -> None:
    parent = start(DETACHED)
    parent.wait()
    (member,) = Family(token=TOKEN, root=None).members()
    record(tmp_path, {"token": TOKEN, "host": this_host()})
    assert end_leftovers(tmp_path) == [
        f"ended process {member} that {tmp_path / 'worker.process.json'} names"
    ]
    assert not Family(token=TOKEN, root=None).members()


def test_the_children_of_a_recorded_process_are_its_family_without_a_token(start: Start) -> None:
    program = (
        "import os, subprocess, sys; "
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}], env={{}}, start_new_session=True)"
        f"; {SLEEP}"
    )
    process = start(program, token=None)
    family = Family(token=TOKEN, root=identify(process.pid))
    deadline = time.monotonic() + 5
    while len(family.members()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    ended, left = family.end(1)
    assert len(ended) == 2
    assert not left


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"start_ticks": 1}, id="the-id-was-given-again"),
        pytest.param({"boot_id": "of another boot"}, id="before-a-reboot"),
    ],
)
def test_a_stranger_with_a_recorded_id_is_not_touched(
    tmp_path: Path, start: Start, changes: dict[str, Any]
) -> None:
    stranger = start(token=None)
    path = record(tmp_path, recorded(identify(stranger.pid), **changes))
    assert end_leftovers(tmp_path) == []
    assert lives(stranger)
    assert not path.exists()


def test_another_host_is_told_and_left_alone(tmp_path: Path, start: Start) -> None:
    process = start()
    path = record(tmp_path / "a", recorded(identify(process.pid), host="elsewhere"))
    writing = tmp_path / "a" / ".result.json.4194999.tmp"
    writing.touch()
    (told,) = end_leftovers(tmp_path)
    assert "host elsewhere" in told
    assert lives(process) and path.exists() and writing.exists()


GARBAGE = [
    pytest.param("", id="empty"),
    pytest.param('{"token": "0123', id="torn"),
    pytest.param("\x00\x00", id="zeros"),
    pytest.param([1, 2], id="a-list"),
    pytest.param("[" * 100_000, id="nested-too-deep"),
    pytest.param({}, id="nothing-in-it"),
    pytest.param({"token": "", "host": "h"}, id="an-empty-token-names-everybody"),
    pytest.param({"token": TOKEN, "host": 5}, id="host-is-no-name"),
    pytest.param({"token": TOKEN, "host": "h", "pid": "1", "start_ticks": 1}, id="pid-is-text"),
    pytest.param({"token": TOKEN, "host": "h", "pid": True, "start_ticks": 1}, id="pid-is-true"),
    pytest.param({"token": TOKEN, "host": "h", "pid": 1}, id="no-start"),
]


@pytest.mark.parametrize("document", GARBAGE)
def test_a_record_with_garbage_touches_nobody(
    tmp_path: Path, start: Start, document: object
) -> None:
    bystander, unmarked = start(token=""), start(token=None)
    path = record(tmp_path, document)
    (told,) = end_leftovers(tmp_path)
    assert str(path) in told and "no readable process record" in told
    assert lives(bystander) and lives(unmarked)
    assert not path.exists()


@pytest.mark.parametrize("pid", [0, -1, 1, 2**70])
def test_impossible_ids_touch_nobody(tmp_path: Path, pid: int) -> None:
    start_ticks = {1: identify(1).start_ticks + 1}.get(pid, 0)
    record(tmp_path, recorded(identify(os.getpid()), pid=pid, start_ticks=start_ticks))
    assert end_leftovers(tmp_path) == []


def test_the_caller_does_not_end_itself(tmp_path: Path) -> None:
    record(tmp_path, recorded(identify(os.getpid())))
    assert end_leftovers(tmp_path) == []


def test_a_process_that_cannot_be_ended_keeps_its_record(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake for this fault: signals that never arrive, as at a process that waits for a disk."""
    process = start()
    path = record(tmp_path, recorded(identify(process.pid)))
    monkeypatch.setattr(processes, "send", lambda *_: None)
    monkeypatch.setattr(processes, "GRACE_S", 0.1)
    monkeypatch.setattr(processes, "KILL_S", 0.1)
    (told,) = end_leftovers(tmp_path)
    assert str(process.pid) in told and "SIGKILL did not end" in told
    assert path.exists()


def test_unfinished_files_of_dead_writers_are_removed(tmp_path: Path, start: Start) -> None:
    dead, unreaped, writer = start(), start(), start(token=None)
    dead.kill()
    dead.wait()
    unreaped.kill()
    time.sleep(0.1)
    stage = tmp_path / "stages" / "ptq"
    cache = stage / "datasets-cache-abc"
    (cache / "deep").mkdir(parents=True)
    removed = [
        stage / f".result.json.{dead.pid}.tmp",
        stage / f".progress.json.{unreaped.pid}.tmp",
        tmp_path / f".manifest.json.{dead.pid}.tmp",
    ]
    kept = [
        stage / f".result.json.{writer.pid}.tmp",
        stage / "notes.tmp",
        stage / ".hidden.tmp",
        stage / f"result.{dead.pid}.tmp",
    ]
    for path in (*removed, *kept):
        path.touch()
    assert end_leftovers(tmp_path) == []
    assert not any(path.exists() for path in (*removed, cache))
    assert all(path.exists() for path in kept)


def test_a_record_that_is_a_directory_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.process.json").mkdir()
    assert end_leftovers(tmp_path) == []


def test_a_directory_that_does_not_exist_holds_no_leftovers(tmp_path: Path) -> None:
    assert end_leftovers(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        pytest.param(
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:memory:/box\n0::/\n",
                "cg/memory/box/memory.oom_control": "under_oom 0\noom_kill 3\n",
                "cg/memory/memory.oom_control": "oom_kill 7\n",
            },
            3,
            id="version-1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/user.slice/box\n",
                "cg/user.slice/box/memory.events": "oom 9\noom_kill 2\noom_group_kill 0\n",
            },
            2,
            id="version-2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/seen/from/outside\n",
                "cg/memory.events": "oom_kill 4\n",
            },
            4,
            id="container-whose-group-is-mounted-as-the-root",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "proc/vmstat": "nr_free 1\noom_kill 5\n"},
            5,
            id="no-group-has-a-counter",
        ),
        pytest.param({}, 0, id="nothing-to-read"),
    ],
)
def test_kills_for_memory_are_read(tmp_path: Path, files: dict[str, str], kills: int) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory_kills(tmp_path / "proc", tmp_path / "cg") == kills


def test_kills_for_memory_are_read_on_this_machine() -> None:
    assert memory_kills() >= 0
