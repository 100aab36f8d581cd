"""The supervisor and the local executor, with real processes of the standard library."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from conductor.executors import local, processes
from conductor.executors.environ import worker_environ
from conductor.executors.local import (
    SupervisedProcess,
    Worker,
    describe_status,
    kept_result,
    run_worker,
)
from conductor.failure import Failure

FAMILY = """
    import os, subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open("started", "w").close()
    {ending}
"""


@pytest.fixture(autouse=True)
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test end its own families at once, and no others that this process has."""
    monkeypatch.setattr(local, "_LIVE", set())


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def lives(member: psutil.Process) -> bool:
    """Whether it runs; the machine's first process may take a second to reap the dead."""
    try:
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_family(directory: Path, ending: str, temporary: Path | None = None) -> SupervisedProcess:
    script = directory / "family.py"
    script.write_text(textwrap.dedent(FAMILY.format(ending=ending)))
    return SupervisedProcess(
        [sys.executable, str(script)],
        environ=os.environ,
        log=directory / "log",
        cwd=directory,
        grace_s=1.0,
        temporary=temporary,
    )


def family_of(process: SupervisedProcess, directory: Path) -> list[psutil.Process]:
    assert eventually((directory / "started").exists)
    return psutil.Process(process.pid).children(recursive=True)


def test_stop_ends_the_whole_family(tmp_path: Path) -> None:
    with start_family(tmp_path, "time.sleep(600)") as process:
        family = family_of(process, tmp_path)
        assert len(family) == 3
    assert not any(member.is_running() for member in family)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda process: process.stop(), id="stopped"),
        pytest.param(lambda process: local.end_at_once(), id="at-once"),
        pytest.param(lambda process: os.kill(process.pid, signal.SIGKILL), id="supervisor-killed"),
        pytest.param(lambda process: process._process.stdin.close(), id="conductor-killed"),
    ],
)
def test_temporary_files_end_with_the_family(
    tmp_path: Path, end: Callable[[SupervisedProcess], None]
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    (place / "socket").touch()
    process = start_family(tmp_path, "time.sleep(600)", place)
    family_of(process, tmp_path)
    end(process)
    # Without a look of ours: where the conductor was killed, nobody looks.
    assert eventually(lambda: not place.exists() or process.poll() is not None)
    assert eventually(lambda: process.poll() is not None)
    assert not place.exists()


def test_family_ends_when_the_command_exits(tmp_path: Path) -> None:
    process = start_family(tmp_path, "time.sleep(1); sys.exit(7)")
    family = family_of(process, tmp_path)
    assert eventually(lambda: process.poll() is not None)
    assert process.poll() == 7
    assert not any(member.is_running() for member in family)


def test_family_ends_when_the_command_is_killed(tmp_path: Path) -> None:
    process = start_family(tmp_path, "time.sleep(600)")
    family = family_of(process, tmp_path)
    command = next(m for m in family if "family.py" in " ".join(m.cmdline()))
    command.kill()
    assert eventually(lambda: process.poll() is not None)
    assert process.poll() == 128 + signal.SIGKILL
    assert not any(member.is_running() for member in family)


def test_family_ends_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    process = start_family(tmp_path, "time.sleep(600)")
    family = family_of(process, tmp_path)
    assert len({os.getpgid(member.pid) for member in family}) == 2, "one left the session"
    os.kill(process.pid, signal.SIGKILL)
    assert eventually(lambda: process.poll() is not None)
    assert process.poll() == 128 + signal.SIGKILL
    assert eventually(lambda: not any(member.is_running() for member in family))


def test_stop_wakes_a_stopped_supervisor(tmp_path: Path) -> None:
    process = start_family(tmp_path, "time.sleep(600)")
    family = family_of(process, tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    process.stop()
    assert process.poll() == 128 + signal.SIGTERM
    assert not any(member.is_running() for member in family)


def test_stop_ends_the_family_of_a_supervisor_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake for this fault: a supervisor that stays stopped, because SIGCONT does not reach it."""
    process = start_family(tmp_path, "time.sleep(600)")
    family = family_of(process, tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(process._process, "send_signal", lambda number: None)
    monkeypatch.setattr(process, "_grace_s", 0.2)
    monkeypatch.setattr(local, "ANSWER_S", 0.2)
    process.stop()
    assert process.poll() == 128 + signal.SIGKILL
    assert eventually(lambda: not any(lives(member) for member in family))


def test_end_at_once_gives_no_grace_and_works_from_a_signal_handler(tmp_path: Path) -> None:
    families = []
    for name in ("one", "two", "stopped", "lost"):
        (tmp_path / name).mkdir()
        deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        process = start_family(tmp_path / name, deaf)
        families.append((process, family_of(process, tmp_path / name)))
    os.kill(families[2][0].pid, signal.SIGSTOP)
    os.kill(families[3][0].pid, signal.SIGKILL)
    first = families[0][0]
    previous = signal.signal(signal.SIGALRM, lambda *_: local.end_at_once())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        began = time.monotonic()
        first._process.wait()  # interrupted with the lock of Popen held
        assert time.monotonic() - began < 5
    finally:
        signal.signal(signal.SIGALRM, previous)
    members = [member for _, family in families for member in family]
    assert len(members) == 12
    assert eventually(lambda: not any(lives(member) for member in members), 2)
    assert first.poll() == 128 + signal.SIGQUIT
    for process, _ in families:
        process.stop()
    assert not local._LIVE


CONDUCTOR = """
    import os, sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from conductor.executors.local import SupervisedProcess
    process = SupervisedProcess(
        [sys.executable, "family.py"],
        environ=os.environ, log=Path("log"), cwd=Path.cwd(), grace_s=1.0,
        record=Path("server.process.json"),
    )
    Path("pid").write_text(str(process.pid))
    time.sleep(600)
"""


@pytest.mark.parametrize("fate", ["runs", "is-stopped", "is-killed"])
def test_family_of_a_killed_conductor_whose_supervisor(tmp_path: Path, fate: str) -> None:
    root = str(Path(local.__file__).parents[2])
    (tmp_path / "conductor.py").write_text(textwrap.dedent(CONDUCTOR.format(root=root)))
    ending = "time.sleep(600)"
    (tmp_path / "family.py").write_text(textwrap.dedent(FAMILY.format(ending=ending)))
    parent = subprocess.Popen([sys.executable, "conductor.py"], cwd=tmp_path)
    pid_file = tmp_path / "pid"
    assert eventually(lambda: pid_file.exists() and pid_file.read_text() != "")
    supervisor = psutil.Process(int(pid_file.read_text()))
    assert eventually((tmp_path / "started").exists)
    family = [supervisor, *supervisor.children(recursive=True)]
    assert len(family) == 4
    if fate != "runs":
        supervisor.send_signal(signal.SIGSTOP if fate == "is-stopped" else signal.SIGKILL)
    parent.kill()
    parent.wait()
    assert (tmp_path / "server.process.json").exists()
    if fate == "runs":
        assert eventually(lambda: not any(lives(member) for member in family))
        assert processes.end_leftovers(tmp_path) == []
    else:
        time.sleep(0.3)
        assert sum(lives(member) for member in family) >= 3
        (told,) = processes.end_leftovers(tmp_path)
        assert told.startswith("ended processes ")
    assert eventually(lambda: not any(lives(member) for member in family), 1)
    assert not (tmp_path / "server.process.json").exists()


def test_the_record_stands_while_the_family_lives(tmp_path: Path) -> None:
    record = tmp_path / "x.process.json"
    with SupervisedProcess(
        ["/bin/sleep", "600"], environ={}, log=tmp_path / "log", record=record
    ) as process:
        document = json.loads(record.read_text())
        assert document["pid"] == process.pid
        assert processes.is_alive(processes.identify(process.pid))
        environ = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
        assert f"{processes.MARK}={document['token']}" in environ
    assert not record.exists()


@pytest.mark.parametrize(
    "missing",
    [
        pytest.param({"log": "no/such/log"}, id="log"),
        pytest.param({"cwd": "no/such/directory"}, id="working-directory"),
        pytest.param({"record": "no/such/x.process.json"}, id="record"),
    ],
)
def test_a_start_that_fails_leaves_nothing(tmp_path: Path, missing: dict[str, str]) -> None:
    paths = {"log": tmp_path / "log", "record": tmp_path / "x.process.json"}
    paths |= {name: tmp_path / path for name, path in missing.items()}
    with pytest.raises(OSError):
        SupervisedProcess(["/bin/sleep", "600"], environ={}, **paths)
    assert not list(tmp_path.glob("*.process.json"))
    assert not local._LIVE


def test_a_record_that_cannot_be_completed_ends_what_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake for this fault: a disk that is full when the identity is written."""
    families = []

    def full(path: Path, token: str, identity: object) -> None:
        if identity:
            families.append(processes.Family(token=token, root=None))
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(processes, "write_record", full)
    with pytest.raises(OSError, match="No space left"):
        SupervisedProcess(
            ["/bin/sleep", "600"], environ={}, log=tmp_path / "l", record=tmp_path / "r"
        )
    assert not families[0].members()
    assert not local._LIVE


def test_many_signals_do_not_keep_the_supervisor_from_ending_its_family(tmp_path: Path) -> None:
    process = start_family(tmp_path, "time.sleep(600)")
    family = family_of(process, tmp_path)
    while process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
    assert process.poll() == 128 + signal.SIGTERM
    assert not any(member.is_running() for member in family)


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of workers for this test, beside the real protocol module."""
    directory = tmp_path / "workers"
    directory.mkdir()
    (directory / "protocol.py").write_text((local.WORKERS / "protocol.py").read_text())
    monkeypatch.setattr(local, "WORKERS", directory)
    return directory


def run_script(workers: Path, stage_dir: Path, body: str, **kwargs: object) -> dict[str, object]:
    script = workers / "worker.py"
    script.write_text("from protocol import WorkerFailure, run\n" + textwrap.dedent(body))
    return run_worker(
        Worker(script="worker.py", interpreter=Path(sys.executable)),
        stage_dir,
        {"number": 20},
        environ=os.environ,
        progress=kwargs.pop("progress", lambda done, total, doing: None),
        **kwargs,
    )


def test_worker_reads_a_request_and_returns_a_result(workers: Path, tmp_path: Path) -> None:
    body = """
        def main(request, progress):
            progress(1, 2, "halving")
            import time; time.sleep(0.5)
            return {"half": request["number"] / 2}
        run(main)
    """
    seen: list[tuple[int, int, str]] = []
    result = run_script(
        workers, tmp_path / "stage", body, progress=lambda *report: seen.append(report)
    )
    assert result == {"status": "ok", "half": 10.0}
    assert seen == [(1, 2, "halving")]
    assert json.loads((tmp_path / "stage" / "request.json").read_text()) == {"number": 20}


FAILURES = [
    pytest.param(
        'def main(*_):\n    raise WorkerFailure("MODEL_UNSUPPORTED", "no")\nrun(main)',
        "MODEL_UNSUPPORTED",
        "no",
        id="classified",
    ),
    pytest.param(
        'def main(*_):\n    raise KeyError("lost")\nrun(main)',
        "INFRA_TRANSIENT",
        "KeyError: 'lost'",
        id="crash-shows-the-log",
    ),
    pytest.param(
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "INFRA_TRANSIENT",
        "out of memory",
        id="killed",
    ),
    pytest.param("pass", "INFRA_TRANSIENT", "left no result.json", id="silent-success"),
]


@pytest.mark.parametrize(("body", "failure_class", "words"), FAILURES)
def test_worker_failures(
    workers: Path, tmp_path: Path, body: str, failure_class: str, words: str
) -> None:
    with pytest.raises(Failure) as caught:
        run_script(workers, tmp_path / "stage", body)
    assert caught.value.failure_class == failure_class
    assert words in caught.value.message


def test_worker_ends_when_it_is_no_longer_useful(workers: Path, tmp_path: Path) -> None:
    def lose_interest() -> None:
        if (tmp_path / "stage" / "stdout.log").read_text():
            raise Failure("DEPLOYMENT_HEALTH_FAILED", "the server died")

    body = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    notes = Notes()
    with pytest.raises(Failure, match="the server died"):
        run_script(workers, tmp_path / "stage", body, still_useful=lose_interest, note=notes)
    assert not psutil.pid_exists(int((tmp_path / "stage" / "stdout.log").read_text()))
    assert notes.events == [("tool_started", None), ("tool_finished", "ended")]
    assert not (tmp_path / "stage" / "worker.process.json").exists()


class Notes:
    """What was noted, with what stood in the stage directory at that moment."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []
        self.files: list[set[str]] = []

    def __call__(self, event: str, *, tool: str, directory: Path, status: object = None) -> None:
        assert tool == "worker.py"
        self.events.append((event, status))
        self.files.append({path.name for path in directory.iterdir()})


GOOD = 'run(lambda request, progress: {"answer": request["number"]})'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(GOOD, "ok", id="ok"),
        pytest.param(
            'def main(*_):\n    raise WorkerFailure("SYSTEMIC", "no")\nrun(main)',
            "failed",
            id="failed",
        ),
        pytest.param("pass", "crashed", id="crashed"),
    ],
)
def test_start_and_end_are_noted(workers: Path, tmp_path: Path, body: str, status: str) -> None:
    notes = Notes()
    with suppress(Failure):
        run_script(workers, tmp_path / "stage", body, note=notes)
    assert notes.events == [("tool_started", None), ("tool_finished", status)]
    assert notes.files[0] == {"request.json"}, "the intent is noted before anything is started"
    assert "worker.process.json" not in notes.files[1]


@pytest.mark.parametrize(
    "result",
    [
        pytest.param('{"status": "ok", "answer": 5}', id="good"),
        pytest.param('{"status": "o', id="torn"),
    ],
)
def test_a_result_of_an_earlier_start_is_not_taken_for_one(
    workers: Path, tmp_path: Path, result: str
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "result.json").write_text(result)
    (stage / "progress.json").write_text('{"done": 1, "total": 1, "doing": "before"}')
    seen: list[object] = []
    with pytest.raises(Failure, match=r"left no result\.json"):
        run_script(workers, stage, "pass", progress=lambda *report: seen.append(report))
    assert not seen


@pytest.mark.parametrize(
    ("request_before", "result_before", "kept"),
    [
        pytest.param({"number": 20}, {"status": "ok", "answer": 5}, True, id="same-request"),
        pytest.param({"number": 21}, {"status": "ok", "answer": 5}, False, id="other-request"),
        pytest.param(None, {"status": "ok", "answer": 5}, False, id="no-request"),
        pytest.param(
            {"number": 20},
            {"status": "failed", "failure_class": "SYSTEMIC", "message": "no"},
            False,
            id="failed",
        ),
        pytest.param({"number": 20}, [], False, id="no-result"),
    ],
)
def test_a_good_result_is_kept_for_the_same_request_alone(
    tmp_path: Path, request_before: object, result_before: object, kept: bool
) -> None:
    if request_before:
        (tmp_path / "request.json").write_text(json.dumps(request_before))
    (tmp_path / "result.json").write_text(json.dumps(result_before))
    assert kept_result(tmp_path, {"number": 20}) == (result_before if kept else None)


@pytest.mark.parametrize("result", ["{}", "[]", '{"status": "failed"}', "[" * 99_999, "\x00"])
def test_a_result_that_says_nothing_is_none(workers: Path, tmp_path: Path, result: str) -> None:
    body = f"import sys; open(sys.argv[1] + '/result.json', 'w').write({result!r})"
    with pytest.raises(Failure, match=r"left no result\.json"):
        run_script(workers, tmp_path / "stage", body)


HANGING = """
    import os, time
    def main(request, progress):
        progress(1, 2, "thinking")
        {hang}
        time.sleep(600)
    run(main)
"""


@pytest.mark.parametrize(
    "hang",
    [
        pytest.param("pass", id="waits"),
        pytest.param("os.kill(os.getpid(), 19)", id="is-stopped"),
        pytest.param("os.kill(os.getppid(), 19); os.kill(os.getpid(), 19)", id="all-stopped"),
        pytest.param(
            "while True: progress(1, 2, 'thinking'); time.sleep(0.05)", id="says-the-same-for-ever"
        ),
    ],
)
def test_a_worker_that_hangs_is_ended(workers: Path, tmp_path: Path, hang: str) -> None:
    notes = Notes()
    began = time.monotonic()
    with pytest.raises(Failure) as caught:
        run_script(workers, tmp_path / "stage", HANGING.format(hang=hang), stall_s=0.7, note=notes)
    assert time.monotonic() - began < 8
    assert caught.value.failure_class == "INFRA_TRANSIENT"
    assert "nothing new for" in caught.value.message and "watchdog" in caught.value.message
    assert str(tmp_path / "stage" / "stdout.log") in caught.value.message
    assert notes.events[-1] == ("tool_finished", "stalled")
    assert not list((tmp_path / "stage").glob("*.process.json"))


def test_a_worker_that_goes_on_is_not_ended(workers: Path, tmp_path: Path) -> None:
    body = """
        import time
        def main(request, progress):
            for done in range(8):
                progress(done, 8, "slow steps")
                time.sleep(0.3)
            return {}
        run(main)
    """
    assert run_script(workers, tmp_path / "stage", body, stall_s=1.5) == {"status": "ok"}


def test_a_result_stands_though_the_process_hung_afterwards(workers: Path, tmp_path: Path) -> None:
    body = GOOD + "\nimport time; time.sleep(600)"
    assert run_script(workers, tmp_path / "stage", body, stall_s=2.0)["answer"] == 20


def test_time_in_which_we_were_stopped_does_not_count_as_a_stall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(local.time, "monotonic", lambda: now[0])
    watchdog = local._Watchdog(100.0)
    watchdog.see((1, 2, "x"))
    now[0] += 3600
    watchdog.see((1, 2, "x"))
    assert not watchdog.barks
    for _ in range(10):
        now[0] += 10
        watchdog.see((1, 2, "x"))
    assert watchdog.barks


def test_no_limit_never_barks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.time, "monotonic", iter(range(0, 10**6, 20)).__next__)
    watchdog = local._Watchdog(None)
    for _ in range(1000):
        watchdog.see(None)
    assert not watchdog.barks


@pytest.mark.parametrize(
    ("body", "counts", "failure_class"),
    [
        pytest.param("os.kill(os.getpid(), 9)", [3, 4], "OUT_OF_MEMORY", id="killed-by-kernel"),
        pytest.param("os.kill(os.getpid(), 9)", [3, 3], "INFRA_TRANSIENT", id="killed-by-another"),
        pytest.param("sys.exit(1)", [3, 4], "OUT_OF_MEMORY", id="its-child-was-killed"),
        pytest.param("os.kill(os.getppid(), 9)", [3, 3], "INFRA_TRANSIENT", id="no-supervisor"),
    ],
)
def test_out_of_memory_is_told_from_a_crash(
    workers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    counts: list[int],
    failure_class: str,
) -> None:
    """Fake for this fault: the kernel's counter of processes killed for want of memory."""
    monkeypatch.setattr(processes, "memory_kills", iter(counts).__next__)
    with pytest.raises(Failure) as caught:
        run_script(workers, tmp_path / "stage", f"import os, sys, time\n{body}; time.sleep(9)")
    assert caught.value.failure_class == failure_class
    assert ("the host ran out of memory" in caught.value.message) is (
        failure_class == "OUT_OF_MEMORY"
    )


@pytest.mark.parametrize(
    "room",
    [
        pytest.param({"f_bavail": 1}, id="no-blocks"),
        pytest.param({"f_favail": 0}, id="no-files"),
    ],
)
def test_a_full_disk_is_told_from_a_crash(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: dict[str, int]
) -> None:
    """Fake for this fault: what the file system says of its room."""
    says = {"f_bavail": 10**6, "f_frsize": 4096, "f_files": 100, "f_favail": 100} | room
    monkeypatch.setattr(local.os, "statvfs", lambda path: SimpleNamespace(**says))
    with pytest.raises(Failure, match="is full; free some space") as caught:
        run_script(workers, tmp_path / "stage", "pass")
    assert caught.value.failure_class == "SYSTEMIC"


def test_a_leftover_of_an_earlier_start_is_ended_before_the_next(
    workers: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    token = "a" * 32
    leftover = subprocess.Popen(["/bin/sleep", "600"], env={processes.MARK: token})
    processes.write_record(stage / "worker.process.json", token, None)
    assert run_script(workers, stage, GOOD)["answer"] == 20
    assert leftover.wait(1) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("status", "words"),
    [(1, "exit status 1"), (143, "SIGTERM"), (137, "SIGKILL (often: out of memory)"), (255, "255")],
)
def test_describe_status(status: int, words: str) -> None:
    assert words in describe_status(status)


PROXIES = {"HTTP_PROXY": "http://p:1", "https_proxy": "http://p:1", "NO_PROXY": "intranet"}


def test_offline_workers_get_no_proxy_and_ask_no_hub() -> None:
    environ = worker_environ({**PROXIES, "PATH": "/bin"}, offline=True)
    assert not {name for name in environ if name.lower() in ("http_proxy", "https_proxy")}
    assert environ["NO_PROXY"] == environ["no_proxy"] == "127.0.0.1,localhost"
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert environ["PATH"] == "/bin"


def test_online_workers_keep_proxies_but_not_for_loopback() -> None:
    environ = worker_environ(PROXIES, offline=False)
    assert environ["HTTP_PROXY"] == "http://p:1"
    assert environ["NO_PROXY"] == environ["no_proxy"] == "127.0.0.1,localhost,intranet"
    assert "HF_HUB_OFFLINE" not in environ


def test_our_own_variables_stay_with_us() -> None:
    given = {"PYTHONPATH": "/x", "VIRTUAL_ENV": "/y", "MLFLOW_TRACKING_PASSWORD": "secret"}
    assert not given.keys() & worker_environ(given, offline=False).keys()
