"""Sessions of the engines: servers that start, die, hang and run out of memory.

In vLLM's place there is a small process that listens as it does: everything but vLLM is tried.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conductor.compatibility import Device
from conductor.engines import REMEMBERED, Sides, transformers, vllm
from conductor.engines.transformers import TransformersSession
from conductor.engines.vllm import ServerSettings, VllmSession, next_log
from conductor.failure import Failure
from conductor.probes.server_log import read_server_log
from gates.canary import Health, evaluate_canary

# What a server does is in the file `behaviour` of its checkpoint, read anew at every start.
STAND_IN = """
    import http.server, json, os, signal, sys, threading, time
    from pathlib import Path
    checkpoint, name, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    behaviour = (checkpoint / "behaviour").read_text().split()
    with (checkpoint / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\\n")
    print("INFO:     Started server process [1]", flush=True)
    (Path(os.environ["VLLM_RPC_BASE_PATH"]) / "socket").touch()
    if "loads" in behaviour:
        time.sleep(0.6)
    if "killed" in behaviour:
        os.kill(os.getpid(), signal.SIGKILL)
    if "refuses" in behaviour:
        sys.exit("ValueError: this checkpoint is not for me")
    if "exhausts" in behaviour:
        print("(EngineCore pid=1) ERROR 11-22 20:06:13 [core.py:906] "
              "torch.OutOfMemoryError: CUDA out of memory.", flush=True)
        sys.exit(1)
    if "never" in behaviour:
        time.sleep(60)

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, document, status=200):
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if (checkpoint / "unwell").exists():
                return self.answer({}, 503)
            self.answer({"data": [{"id": name, "max_model_len": 64}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if "falls" in behaviour:
                os.kill(os.getpid(), signal.SIGKILL)
            if "hangs" in behaviour:
                time.sleep(60)
            logprobs = {"tokens": ["a", "b"], "token_logprobs": [-0.1, -0.2]}
            choice = {"text": "ab", "logprobs": logprobs, "finish_reason": "stop"}
            self.answer({"choices": [choice]})

        def log_message(self, *_):
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Servers:
    """A session over two checkpoints whose servers behave as told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stage_dir = root / "stage"
        self.stage_dir.mkdir()
        for side in ("source", "candidate"):
            (root / side).mkdir()
            self.behave(side, "")
        self.notes: list[tuple[str, str]] = []
        self.sessions: list[VllmSession] = []

    def session(self, capacity: int = 2, **more: Any) -> VllmSession:
        settings: dict[str, Any] = {
            "interpreter": Path(sys.executable),
            "settings": ServerSettings(
                device=Device.CPU,
                dtype="auto",
                max_model_len=64,
                tensor_parallel_size=1,
                seed=0,
                cpu_kv_cache_gib=1,
                extra_arguments=(),
            ),
            "environ": os.environ,
            "health_timeout_s": 20.0,
            "silence_s": 30.0,
            "prompts_per_request": 8,
            "port": None,
            "note": lambda event, **facts: self.notes.append((event, facts["side"])),
        }
        sides = Sides(source=self.root / "source", candidate=self.root / "candidate")
        session = VllmSession(sides, capacity=capacity, **settings | more)
        self.sessions.append(session)
        return session

    def behave(self, side: str, behaviour: str) -> None:
        (self.root / side / "behaviour").write_text(behaviour)

    def pids(self, side: str) -> list[int]:
        """Return the processes that were started for a side, also those that ended."""
        starts = self.root / side / "starts"
        return [int(line) for line in starts.read_text().split()] if starts.exists() else []

    def live(self, side: str) -> list[int]:
        return [
            pid
            for pid in self.pids(side)
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        ]

    def records(self) -> list[str]:
        return sorted(path.name for path in self.stage_dir.glob("*.process.json"))


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def command(
        interpreter: Path, settings: Any, *, checkpoint: Path, served_name: str, port: int
    ) -> list[str]:
        return [str(interpreter), str(script), str(checkpoint), served_name, str(port)]

    monkeypatch.setattr(vllm, "server_command", command)
    monkeypatch.setattr(vllm, "POLL_S", 0.02)
    monkeypatch.setattr(vllm, "CHECK_EVERY_S", 0.05)
    found = Servers(tmp_path)
    yield found
    for session in found.sessions:
        session.close()
    assert not found.live("source") + found.live("candidate")
    assert not found.records()
    assert not list(temporary.iterdir())


def quiet(done: int, total: int, doing: str) -> None:
    """Show nothing."""


def eventually(condition: Callable[[], object], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def canary(servers: Servers, session: VllmSession, **more: Any) -> dict[str, Any]:
    return session.answer_canary(["1+1=", "2+2="], servers.stage_dir, quiet, **more)


def test_a_canary_serves_both_sides_at_once_and_keeps_them(servers: Servers) -> None:
    servers.behave("source", "loads")
    servers.behave("candidate", "loads")
    session = servers.session()
    evidence = canary(servers, session)
    assert evaluate_canary(evidence).passed
    assert [event for event, _ in servers.notes] == ["server_started"] * 2
    assert servers.records() == ["server-candidate.process.json", "server-source.process.json"]
    assert session.backend("source", servers.stage_dir, quiet)["served_name"] == "source"
    assert session.settings("source")["served_max_model_len"] == 64
    assert len(servers.pids("source")) == len(servers.pids("candidate")) == 1


def test_where_one_has_room_one_lives_at_a_time(servers: Servers) -> None:
    session = servers.session(capacity=1)
    assert evaluate_canary(canary(servers, session)).passed
    assert servers.notes == [
        ("server_started", "candidate"),
        ("server_stopped", "candidate"),
        ("server_started", "source"),
    ]
    assert not servers.live("candidate")
    # The source's server is there: it is asked first and not started again.
    assert evaluate_canary(canary(servers, session)).passed
    assert len(servers.pids("source")) == 1
    assert servers.live("candidate")


def test_remembered_answers_spare_the_source(servers: Servers) -> None:
    answers = [prompt["source"] for prompt in canary(servers, servers.session())["prompts"]]
    session = servers.session()
    evidence = canary(servers, session, source_answers=answers)
    assert evaluate_canary(evidence).passed
    assert evidence["source_health_detail"] == REMEMBERED
    assert [prompt["source"] for prompt in evidence["prompts"]] == answers
    assert len(servers.pids("source")) == 1
    with pytest.raises(ValueError, match="zip"):
        canary(servers, session, source_answers=answers[:1])


@pytest.mark.parametrize(
    ("behaviour", "health", "failure_class"),
    [
        ("refuses", Health.DIED, "CHECKPOINT_NOT_SERVABLE"),
        ("never", Health.TIMEOUT, "DEPLOYMENT_HEALTH_FAILED"),
        ("falls", Health.KILLED, "DEPLOYMENT_HEALTH_FAILED"),
    ],
)
def test_a_candidate_that_fails_is_told_from_the_world(
    servers: Servers, behaviour: str, health: Health, failure_class: str
) -> None:
    servers.behave("candidate", behaviour)
    evidence = canary(servers, servers.session(health_timeout_s=1.5))
    assert (evidence["health"], evidence["source_health"]) == (health, Health.OK)
    assert evidence["prompts"] == []
    assert evaluate_canary(evidence).failure_class == failure_class


@pytest.mark.parametrize(
    ("side", "behaviour", "words", "failure_class"),
    [
        ("candidate", "hangs", "watchdog.server_s", "DEPLOYMENT_HEALTH_FAILED"),
        ("source", "hangs", "watchdog.server_s", "INFRA_TRANSIENT"),
        ("source", "falls", "SIGKILL", "INFRA_TRANSIENT"),
        ("source", "loads killed", "SIGKILL", "INFRA_TRANSIENT"),
    ],
)
def test_a_server_that_the_world_takes_during_the_canary_is_tried_again(
    servers: Servers, side: str, behaviour: str, words: str, failure_class: str
) -> None:
    servers.behave(side, behaviour)
    session = servers.session(silence_s=0.5)
    with pytest.raises(Failure, match=words) as caught:
        canary(servers, session)
    assert caught.value.failure_class == failure_class
    servers.behave(side, "")
    assert evaluate_canary(canary(servers, session)).passed


def test_want_of_memory_is_no_fault_of_the_checkpoint(servers: Servers) -> None:
    servers.behave("candidate", "exhausts")
    session = servers.session()
    with pytest.raises(Failure, match="memory ran out for the candidate") as caught:
        canary(servers, session)
    assert caught.value.failure_class == "OUT_OF_MEMORY"
    servers.behave("candidate", "")
    session.narrow()
    assert evaluate_canary(canary(servers, session)).passed
    assert len(servers.live("source") + servers.live("candidate")) == 1
    session.begin("source", servers.stage_dir)
    session.begin("candidate", servers.stage_dir)
    assert len(servers.live("source") + servers.live("candidate")) == 1


def test_after_memory_ran_out_elsewhere_the_next_use_frees_the_other_side(
    servers: Servers,
) -> None:
    session = servers.session()
    canary(servers, session)
    session.narrow()
    session.backend("source", servers.stage_dir, quiet)
    assert not servers.live("candidate")
    assert len(servers.pids("source")) == 1


def test_every_start_has_a_log_of_its_own(servers: Servers) -> None:
    session = servers.session()
    logs = []
    for _ in range(3):
        session.backend("source", servers.stage_dir, quiet)
        logs.append(session.log("source"))
        session.discard("source")
        assert not servers.live("source")
    names = [f"server-source{number}.log" for number in ("", "-2", "-3")]
    assert logs == [servers.stage_dir / name for name in names]
    assert [read_server_log(servers.stage_dir / name)["starts"] for name in names] == [1, 1, 1]
    assert next_log(servers.stage_dir, "source").name == "server-source-4.log"
    session.discard("source")  # nothing is there any more, which is no error
    assert [side for event, side in servers.notes if event == "server_stopped"] == ["source"] * 3


def test_begin_waits_for_nothing_and_is_taken_up(servers: Servers) -> None:
    servers.behave("source", "loads")
    session = servers.session()
    began = time.monotonic()
    session.begin("source", servers.stage_dir)
    session.begin("source", servers.stage_dir)
    assert time.monotonic() - began < 0.5
    session.backend("source", servers.stage_dir, quiet)
    assert len(servers.pids("source")) == 1


def test_begin_does_not_push_another_out(servers: Servers) -> None:
    session = servers.session(capacity=1)
    session.backend("source", servers.stage_dir, quiet)
    session.begin("candidate", servers.stage_dir)
    session.check("source")
    assert not servers.pids("candidate")


@pytest.mark.parametrize("side", ["source", "candidate"])
def test_a_server_that_was_killed_is_noticed_and_replaced(servers: Servers, side: str) -> None:
    session = servers.session()
    session.backend(side, servers.stage_dir, quiet)
    session.check(side)
    os.kill(servers.pids(side)[-1], signal.SIGKILL)
    with pytest.raises(Failure, match="SIGKILL") as caught:
        assert eventually(lambda: session.check(side))
    assert caught.value.failure_class == vllm.UNSERVED[side]
    session.backend(side, servers.stage_dir, quiet)
    session.check(side)
    assert len(servers.pids(side)) == 2


@pytest.mark.parametrize("way", ["stopped", "unwell"])
def test_a_server_that_hangs_is_noticed(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(vllm, "PROBE_TIMEOUT_S", 0.2)
    session = servers.session(silence_s=0.6)
    session.backend("source", servers.stage_dir, quiet)
    if way == "stopped":
        os.kill(servers.pids("source")[-1], signal.SIGSTOP)
    else:
        (servers.root / "source" / "unwell").touch()
    began = time.monotonic()
    with pytest.raises(Failure, match=r"counts as hung.*watchdog\.server_s") as caught:
        assert eventually(lambda: session.check("source"))
    assert time.monotonic() - began >= 0.6
    assert caught.value.failure_class == "INFRA_TRANSIENT"
    session.discard("source")
    assert not servers.live("source")


def test_a_server_that_comes_back_in_time_is_not_hung(servers: Servers) -> None:
    session = servers.session(silence_s=0.5)
    session.backend("source", servers.stage_dir, quiet)
    unwell = servers.root / "source" / "unwell"
    for _ in range(4):
        unwell.touch()
        session.check("source")
        time.sleep(0.2)
        session.check("source")
        unwell.unlink()
        time.sleep(0.1)
        session.check("source")


def test_two_threads_use_a_side_each(servers: Servers) -> None:
    for side in ("source", "candidate"):
        servers.behave(side, "loads")
    session = servers.session()
    failures: list[BaseException] = []

    def use(side: str) -> None:
        try:
            for _ in range(3):
                session.begin(side, servers.stage_dir)
                backend = session.backend(side, servers.stage_dir, quiet)
                assert backend["served_name"] == side
                session.check(side)
                session.discard(side)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(side,)) for side in ("source", "candidate")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [len(servers.pids(side)) for side in ("source", "candidate")] == [3, 3]


@pytest.mark.parametrize("end", ["close", "discard"])
def test_a_server_that_is_stopped_while_it_loads_says_nothing_of_the_checkpoint(
    servers: Servers, end: str
) -> None:
    servers.behave("candidate", "never")
    session = servers.session()
    threading.Timer(
        0.7, lambda: session.close() if end == "close" else session.discard("candidate")
    ).start()
    with pytest.raises(Failure, match="stopped while it was loading") as caught:
        session.backend("candidate", servers.stage_dir, quiet)
    assert caught.value.failure_class == "INFRA_TRANSIENT"
    with pytest.raises(Failure, match="was stopped"):
        session.check("candidate")


def test_a_closed_session_starts_nothing(servers: Servers) -> None:
    session = servers.session()
    session.close()
    with pytest.raises(Failure, match="release is ending"):
        session.backend("source", servers.stage_dir, quiet)
    assert not servers.pids("source")


def transformers_session(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]) -> Any:
    """Return a session whose worker is replaced by its result, and the requests it was given."""
    requests: list[dict[str, Any]] = []

    def run_worker(worker: Any, stage_dir: Path, request: Any, **facts: Any) -> dict[str, Any]:
        requests.append({**json.loads(json.dumps(request)), "stall_s": facts["stall_s"]})
        return result

    monkeypatch.setattr(transformers, "run_worker", run_worker)
    session = TransformersSession(
        Sides(source=Path("/s"), candidate=Path("/c")),
        interpreter=Path("python"),
        device=Device.CPU,
        dtype="auto",
        environ={},
        stall_s=7.0,
        note=lambda event, **facts: None,
    )
    return session, requests


ANSWER = {"text": "a", "tokens": ["a"], "logprobs": [-0.1], "finish_reason": "stop", "error": None}


@pytest.mark.parametrize("remembered", [True, False])
def test_in_process_remembered_answers_spare_the_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, remembered: bool
) -> None:
    answers = {"candidate": [ANSWER]} if remembered else {"candidate": [ANSWER], "source": [ANSWER]}
    session, requests = transformers_session(monkeypatch, {"load_errors": {}, "answers": answers})
    evidence = session.answer_canary(["p"], tmp_path, quiet, [ANSWER] if remembered else None)
    assert evaluate_canary(evidence).passed
    assert (evidence["source_health_detail"] == REMEMBERED) is remembered
    assert list(requests[0]["checkpoints"]) == list(answers)
    assert requests[0]["stall_s"] == 7.0
    for nothing in (session.begin, session.discard):
        nothing("source", *([tmp_path] if nothing == session.begin else []))
    session.narrow()
    session.close()


def test_in_process_a_candidate_that_does_not_load_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = {"load_errors": {"candidate": "ValueError: no"}, "answers": {}}
    session, _ = transformers_session(monkeypatch, result)
    evidence = session.answer_canary(["p"], tmp_path, quiet, [ANSWER])
    assert (evidence["health"], evidence["source_health"]) == (Health.DIED, Health.OK)
    assert evidence["health_detail"] == "ValueError: no"
