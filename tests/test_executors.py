"""The supervisor and the local executor, with real processes of the standard library."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from conductor.executors import local
from conductor.executors.environ import worker_environ
from conductor.executors.local import SupervisedProcess, Worker, describe_status, run_worker
from conductor.failure import Failure

FAMILY = """
    import os, subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open("started", "w").close()
    {ending}
"""


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def start_family(directory: Path, ending: str) -> SupervisedProcess:
    script = directory / "family.py"
    script.write_text(textwrap.dedent(FAMILY.format(ending=ending)))
    return SupervisedProcess(
        [sys.executable, str(script)],
        environ=os.environ,
        log=directory / "log",
        cwd=directory,
        grace_s=1.0,
    )


def family_of(process: SupervisedProcess, directory: Path) -> list[psutil.Process]:
    assert eventually((directory / "started").exists)
    return psutil.Process(process.pid).children(recursive=True)


def test_stop_ends_the_whole_family(tmp_path: Path) -> None:
    with start_family(tmp_path, "time.sleep(600)") as process:
        family = family_of(process, tmp_path)
        assert len(family) == 3
    assert not any(member.is_running() for member in family)


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
    family = [m for m in family_of(process, tmp_path) if os.getpgid(m.pid) == process.pid]
    assert len(family) == 2
    os.kill(process.pid, signal.SIGKILL)
    assert eventually(lambda: process.poll() is not None)
    assert process.poll() == 128 + signal.SIGKILL
    assert eventually(lambda: not any(member.is_running() for member in family))


def test_family_ends_when_the_conductor_is_killed(tmp_path: Path) -> None:
    conductor = tmp_path / "conductor_killed_by_test.py"
    conductor.write_text(
        textwrap.dedent(f"""
            import os, sys, time
            from pathlib import Path
            sys.path.insert(0, {str(Path(local.__file__).parents[2])!r})
            from conductor.executors.local import SupervisedProcess
            sleep = "import time; time.sleep(600)"
            process = SupervisedProcess(
                [sys.executable, "-c", sleep],
                environ=os.environ, log=Path("log"), cwd=Path.cwd(), grace_s=1.0,
            )
            Path("pid").write_text(str(process.pid))
            time.sleep(600)
        """)
    )
    parent = subprocess.Popen([sys.executable, str(conductor)], cwd=tmp_path)
    pid_file = tmp_path / "pid"
    assert eventually(lambda: pid_file.exists() and pid_file.read_text() != "")
    supervisor = psutil.Process(int(pid_file.read_text()))
    assert eventually(lambda: bool(supervisor.children()))
    family = [supervisor, *supervisor.children(recursive=True)]
    parent.kill()
    parent.wait()
    assert eventually(lambda: not any(member.is_running() for member in family))


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
    with pytest.raises(Failure, match="the server died"):
        run_script(workers, tmp_path / "stage", body, still_useful=lose_interest)
    assert not psutil.pid_exists(int((tmp_path / "stage" / "stdout.log").read_text()))


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
