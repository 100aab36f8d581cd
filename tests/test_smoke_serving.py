"""Asking a candidate: what is sent, what is taken for an answer, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conductor.compatibility import Engine
from conductor.failure import Failure
from conductor.smoke import serving
from conductor.smoke.serving import WITHIN_S, Answer, ask_candidate
from conductor.world import World

CHAT = {"choices": [{"message": {"content": "Hello."}}]}
COMPLETION = {"choices": [{"text": " there"}]}


class Endpoint(ThreadingHTTPServer):
    """A server that gives one answer to everything, and keeps what it was asked."""

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.answer = status, answer
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def backend(self, side: str, directory: Path, progress: Any) -> dict[str, Any]:
        return {"base_url": f"http://127.0.0.1:{self.server_port}/v1", "served_name": side}

    def secrets(self, side: str) -> dict[str, str]:
        return {"OPENAI_API_KEY": "a key"}


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.answer).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    with Endpoint(*request.param) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("endpoint", "has_template", "path", "key", "text"),
    [
        pytest.param((200, CHAT), True, "/v1/chat/completions", "messages", "Hello.", id="chat"),
        pytest.param((200, COMPLETION), False, "/v1/completions", "prompt", " there", id="prompt"),
        pytest.param(
            (200, {"choices": [{"message": {"content": None}}]}),
            True, "/v1/chat/completions", "messages", "", id="no-content",
        ),
    ],
    indirect=["endpoint"],
)  # fmt: skip
def test_the_candidate_is_asked_as_any_client_would(
    tmp_path: Path, endpoint: Any, has_template: bool, path: str, key: str, text: str
) -> None:
    answer = serving._complete(endpoint, tmp_path, has_template=has_template)
    ((asked_at, authorization, body),) = endpoint.asked
    assert (asked_at, authorization) == (path, "Bearer a key")
    assert (body["model"], key in body) == ("candidate", True)
    assert answer["text"] == text
    assert answer["asked"] == ("chat" if has_template else "completion")


@pytest.mark.parametrize(
    "endpoint",
    [
        pytest.param((500, {}), id="500"),
        pytest.param((400, {"error": "no template"}), id="400"),
        pytest.param((200, {"choices": []}), id="no-choice"),
        pytest.param((200, {}), id="no-answer"),
    ],
    indirect=True,
)
def test_what_is_no_answer_is_the_candidates_failure(tmp_path: Path, endpoint: Any) -> None:
    with pytest.raises(Failure, match="did not answer a message") as refused:
        serving._complete(endpoint, tmp_path, has_template=True)
    assert refused.value.failure_class == "DEPLOYMENT_HEALTH_FAILED"


@pytest.mark.parametrize(
    ("text", "seconds", "in_time"),
    [
        pytest.param("Hello", 0.1, True, id="answer"),
        pytest.param("Hello", WITHIN_S, True, id="just-in-time"),
        pytest.param("Hello", WITHIN_S + 0.1, False, id="late"),
        pytest.param("", 0.1, False, id="nothing"),
        pytest.param(" \n", 0.1, False, id="blank"),
    ],
)
def test_what_counts_as_an_answer(text: str, seconds: float, in_time: bool) -> None:
    answer = Answer(engine=Engine.VLLM, asked="chat", text=text, seconds=seconds)
    assert answer.document()["in_time"] is in_time
    assert answer.document()["characters"] == len(text.strip())


@pytest.mark.parametrize(
    "report", [None, "{", "{}", '{"engine": null}', '{"engine": {"name": "sglang"}}']
)
def test_a_run_that_names_no_engine_is_refused(tmp_path: Path, report: str | None) -> None:
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    with pytest.raises(Failure, match="names no engine; bring the release to its end"):
        ask_candidate(tmp_path, World.find({}))
