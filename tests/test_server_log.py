"""What a server's log says: requests from an offset on, starts, and memory that ran out."""

from __future__ import annotations

from pathlib import Path

import pytest

from conductor.probes.reading import ProbeError
from conductor.probes.server_log import read_server_log

START = "(APIServer pid=7) INFO:     Started server process [7]\n"
OK = '(APIServer pid=7) INFO:     127.0.0.1:30001 - "POST /v1/completions HTTP/1.1" 200 OK\n'
BUSY = OK.replace("200 OK", "503 Service Unavailable")


@pytest.mark.parametrize(
    ("offset", "codes"),
    [
        pytest.param(0, {"200": 2, "503": 1}, id="all"),
        pytest.param(len(START), {"200": 2, "503": 1}, id="after-the-start"),
        pytest.param(len(START + OK), {"200": 1, "503": 1}, id="after-the-first-request"),
        pytest.param(len(START + OK) + 1, {"200": 1}, id="in-the-middle-of-a-line"),
        pytest.param(len(START + OK + BUSY + OK), {}, id="at-the-end"),
        pytest.param(10**9, {}, id="beyond-the-end"),
    ],
)
def test_requests_count_from_the_offset_and_starts_from_the_beginning(
    tmp_path: Path, offset: int, codes: dict[str, int]
) -> None:
    log = tmp_path / "server.log"
    log.write_text(START + OK + BUSY + OK)
    facts = read_server_log(log, offset)
    assert facts == {"status_codes": codes, "starts": 1, "out_of_memory": False}


ENGINE = "(EngineCore_DP0 pid=12) ERROR 11-22 20:06:13 [core.py:906] "


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "torch.cuda.OutOfMemoryError: CUDA out of memory.",
        "MemoryError",
        "MemoryError: Unable to allocate 8.00 GiB",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't",
    ],
)
@pytest.mark.parametrize(
    "prefix", ["", "(Worker pid=3) ", ENGINE, "\x1b[0;36m(Worker pid=3)\x1b[0m "]
)
def test_memory_that_ran_out_is_seen(tmp_path: Path, prefix: str, line: str) -> None:
    log = tmp_path / "server.log"
    log.write_text(START + prefix + line + "\n" + OK)
    assert read_server_log(log)["out_of_memory"]
    assert read_server_log(log, offset=log.stat().st_size)["out_of_memory"]


@pytest.mark.parametrize(
    "line",
    [
        "    raise torch.OutOfMemoryError(message)",
        "the model wrote: MemoryError",
        "MemoryErrors are rare",
        f"{ENGINE}  MemoryError: in the middle of a traceback",
        f"{ENGINE}RuntimeError: CUDA error: an illegal memory access was encountered",
        "INFO 11-22 20:06:13 [logger.py:1] MemoryError: said somebody",
        "ValueError: No available memory for the cache blocks",
    ],
)
def test_prose_is_no_want_of_memory(tmp_path: Path, line: str) -> None:
    log = tmp_path / "server.log"
    log.write_text(START + line + "\n")
    assert not read_server_log(log)["out_of_memory"]


def test_a_log_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="does not exist"):
        read_server_log(tmp_path / "server.log")
