"""The worker's side of the seam: what becomes a result, and what is a crash."""

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conductor.executors.local import WORKERS

PROTOCOL = (WORKERS / "protocol.py").read_text(encoding="utf-8")


def run_worker_script(
    directory: Path, body: str, memory_bytes: int | None = None
) -> "subprocess.CompletedProcess[str]":
    (directory / "protocol.py").write_text(PROTOCOL)
    head = "import errno, os\nfrom pathlib import Path\nfrom protocol import WorkerFailure, run\n"
    (directory / "worker.py").write_text(head + textwrap.dedent(body))
    (directory / "request.json").write_text('{"number": 20}')

    def limit() -> None:
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.RLIM_INFINITY))

    return subprocess.run(
        [sys.executable, "worker.py", str(directory)],
        cwd=directory,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def result_of(directory: Path) -> dict[str, object] | None:
    path = directory / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_what_main_returns_is_the_result(tmp_path: Path) -> None:
    body = """
        def main(request, progress):
            progress(1, 2, "halving")
            return {"half": request["number"] / 2}
        run(main)
    """
    assert run_worker_script(tmp_path, body).returncode == 0
    assert result_of(tmp_path) == {"status": "ok", "half": 10.0}
    assert json.loads((tmp_path / "progress.json").read_text()) == {
        "done": 1,
        "total": 2,
        "doing": "halving",
    }


RAISED = [
    pytest.param(
        'raise WorkerFailure("MODEL_UNSUPPORTED", "no such model")',
        "MODEL_UNSUPPORTED",
        "no such model",
        id="classified",
    ),
    pytest.param("raise MemoryError", "OUT_OF_MEMORY", "host", id="host-memory"),
    pytest.param(
        """
        class ArrayMemoryError(MemoryError): pass
        raise ArrayMemoryError("Unable to allocate 9 GiB")
        """,
        "OUT_OF_MEMORY",
        "host ran out of memory (Unable to allocate 9 GiB)",
        id="numpy-host-memory",
    ),
    pytest.param(
        """
        class OutOfMemoryError(RuntimeError): pass
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\\nmore")
        """,
        "OUT_OF_MEMORY",
        "device ran out of memory (CUDA out of memory. Tried to allocate 2 GiB)",
        id="torch-device-memory",
    ),
    pytest.param(
        'raise RuntimeError("CUDA error: out of memory")',
        "OUT_OF_MEMORY",
        "device",
        id="cuda-runtime-memory",
    ),
    pytest.param(
        """
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
                           "can't allocate memory: you tried to allocate 68719476736 bytes.")
        """,
        "OUT_OF_MEMORY",
        "host",
        id="torch-host-memory",
    ),
    pytest.param(
        'raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")',
        "SYSTEMIC",
        "/full/disk",
        id="disk",
    ),
    pytest.param(
        "raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))", "SYSTEMIC", "quota", id="quota"
    ),
    pytest.param(
        """
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
        """,
        "SYSTEMIC",
        "disk is full",
        id="safetensors-disk",
    ),
    pytest.param(
        """
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("cannot save") from error
        """,
        "SYSTEMIC",
        "disk is full",
        id="wrapped-disk",
    ),
    pytest.param(
        """
        try:
            raise MemoryError
        except MemoryError:
            raise WorkerFailure("MODEL_UNSUPPORTED", "try another recipe") from None
        """,
        "OUT_OF_MEMORY",
        "try another recipe",
        id="taken-for-the-model's-fault",
    ),
    pytest.param(
        """
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise WorkerFailure("SYSTEMIC", "3 MiB are free") from error
        """,
        "SYSTEMIC",
        "3 MiB are free",
        id="the-worker-knew",
    ),
]


@pytest.mark.parametrize(("body", "failure_class", "words"), RAISED)
def test_what_is_raised_is_classified(
    tmp_path: Path, body: str, failure_class: str, words: str
) -> None:
    main = "def main(request, progress):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    done = run_worker_script(tmp_path, main + "\nrun(main)\n")
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path)
    assert result is not None
    assert (result["status"], result["failure_class"]) == ("failed", failure_class)
    assert words in str(result["message"])


@pytest.mark.parametrize(
    "body",
    [
        pytest.param('raise KeyError("lost")', id="any-exception"),
        pytest.param('raise OSError(errno.EIO, "Input/output error")', id="another-system-error"),
        pytest.param('raise RuntimeError("CUDA error: misaligned address")', id="another-cuda"),
        pytest.param("raise KeyboardInterrupt", id="interrupted"),
    ],
)
def test_anything_else_is_a_crash_with_a_traceback(tmp_path: Path, body: str) -> None:
    done = run_worker_script(tmp_path, f"def main(*_):\n    {body}\nrun(main)\n")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert result_of(tmp_path) is None


def test_a_real_want_of_memory_is_reported(tmp_path: Path) -> None:
    body = "def main(*_):\n    return {'x': len(bytearray(1 << 32))}\nrun(main)\n"
    done = run_worker_script(tmp_path, body, memory_bytes=1 << 30)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path)
    assert result is not None and result["failure_class"] == "OUT_OF_MEMORY"
    assert "MemoryError" in done.stderr, "the log shows where"


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_a_real_full_device_is_reported(tmp_path: Path) -> None:
    body = "def main(*_):\n    Path('/dev/full').write_text('x' * 9999)\nrun(main)\n"
    run_worker_script(tmp_path, body)
    result = result_of(tmp_path)
    assert result is not None and result["failure_class"] == "SYSTEMIC"
    assert os.strerror(errno.ENOSPC) in str(result["message"])


def test_no_half_file_stays_when_the_disk_fills_while_writing(tmp_path: Path) -> None:
    body = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        run(lambda request, progress: {"text": "x" * 10000})
    """
    assert run_worker_script(tmp_path, body).returncode == 1
    assert not list(tmp_path.glob("*result.json*"))
