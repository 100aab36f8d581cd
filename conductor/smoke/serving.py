"""Let the candidate of a release answer a message, served as the release served it.

The prompt comes from the checkpoint's own chat template, which no evaluation need have used: a
template that was lost in the export would otherwise be found by the first user.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conductor.compatibility import Engine
from conductor.config import Config, load_recorded
from conductor.documents import refuse
from conductor.engines import EngineSession, Sides
from conductor.engines.opening import longest_request, open_session
from conductor.engines.vllm import UNSERVED
from conductor.executors.environ import worker_environ
from conductor.executors.local import Worker, run_worker
from conductor.failure import Failure
from conductor.files import read_json
from conductor.models import inspect_checkpoint
from conductor.preconditions import check_environment, check_port, environments_of
from conductor.probes.metadata.chat_templates import read_templates
from conductor.release import CONFIG
from conductor.stage_files import candidate_dir
from conductor.suites import load_suite
from conductor.world import World

WITHIN_S = 30.0
"""A person who asks a small question gives up on a chat that says nothing for longer."""

MESSAGE = "Hello! Who are you?"
MAX_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the candidate answered: ``asked`` is ``chat``, or ``completion`` without a template."""

    engine: Engine
    asked: str
    text: str
    seconds: float

    @property
    def in_time(self) -> bool:
        """Tell whether it said something in time."""
        return bool(self.text.strip()) and self.seconds <= WITHIN_S

    def document(self) -> dict[str, Any]:
        """Return the JSON form; ``characters`` counts those that are no white space at the ends."""
        return {
            "engine": self.engine,
            "asked": self.asked,
            "text": self.text,
            "characters": len(self.text.strip()),
            "seconds": round(self.seconds, 2),
            "in_time": self.in_time,
        }


def ask_candidate(run_dir: Path, world: World) -> Answer:
    """Serve the candidate of a finished release, ask it one message, and end what was started.

    Raises:
        Failure: the release has no candidate or no report, or its engine cannot be used here, or
            refuses to answer.
    """
    engine = _engine_of(run_dir)
    config, _ = load_recorded(run_dir / CONFIG, None, {})
    checkpoint = candidate_dir(run_dir)
    check_port(config)
    for name in environments_of(engine, world.machine.device):
        check_environment(world, name)
    with TemporaryDirectory(prefix="day0-chat-") as directory:
        ask = _ask_in_process if engine is Engine.TRANSFORMERS else _ask_server
        answer = ask(checkpoint, config, world, Path(directory))
    return Answer(engine=engine, **answer)


def _engine_of(run_dir: Path) -> Engine:
    where = run_dir / "report.json"
    try:
        return Engine(read_json(where)["engine"]["name"])
    except (OSError, ValueError, LookupError, TypeError):
        problem = "names no engine; bring the release to its end with `day0 resume`"
        raise refuse(str(where), problem) from None


def _ask_in_process(
    checkpoint: Path, config: Config, world: World, directory: Path
) -> Mapping[str, Any]:
    request = {
        "checkpoint": str(checkpoint),
        "message": MESSAGE,
        "max_tokens": MAX_TOKENS,
        "dtype": config.engine.dtype,
        "device": world.machine.device,
    }
    result = run_worker(
        Worker(script="chat.py", interpreter=world.environments.interpreter("reference")),
        directory,
        request,
        environ=worker_environ(world.environ, offline=True),
        progress=_ignore,
        stall_s=config.watchdog.evaluation_s,
    )
    return {name: result[name] for name in ("asked", "text", "seconds")}


def _ask_server(
    checkpoint: Path, config: Config, world: World, directory: Path
) -> Mapping[str, Any]:
    model = inspect_checkpoint(str(checkpoint), checkpoint, None)
    longest = longest_request(load_suite(config.suite), model)
    sides = Sides(source=checkpoint, candidate=checkpoint)
    session = open_session(Engine.VLLM, sides, config, longest, world)
    try:
        has_template = bool(read_templates(checkpoint, _tokenizer_config(checkpoint)))
        return _complete(session, directory, has_template=has_template)
    finally:
        session.close()


def _complete(session: EngineSession, directory: Path, *, has_template: bool) -> dict[str, Any]:
    """Ask over HTTP, as any client would."""
    import httpx

    backend = session.backend("candidate", directory, _ignore)
    way, prompt = (
        ("chat/completions", {"messages": [{"role": "user", "content": MESSAGE}]})
        if has_template
        else ("completions", {"prompt": MESSAGE})
    )
    started = time.monotonic()
    try:
        response = httpx.post(
            f"{backend['base_url']}/{way}",
            headers={"Authorization": f"Bearer {session.secrets('candidate')['OPENAI_API_KEY']}"},
            json={
                "model": backend["served_name"],
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
                **prompt,
            },
            timeout=WITHIN_S,
            trust_env=False,
        )
        response.raise_for_status()
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] if has_template else choice["text"]
    except httpx.HTTPStatusError as error:
        raise _unanswered(f"HTTP {error.response.status_code}: {error.response.text}") from None
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise _unanswered(f"{type(error).__name__}: {error}") from None
    return {
        "asked": "chat" if has_template else "completion",
        "text": text or "",
        "seconds": time.monotonic() - started,
    }


def _unanswered(problem: str) -> Failure:
    return Failure(
        UNSERVED["candidate"], f"the candidate did not answer a message: {problem[:500]}"
    )


def _tokenizer_config(checkpoint: Path) -> Mapping[str, Any]:
    path = checkpoint / "tokenizer_config.json"
    document = read_json(path) if path.exists() else {}
    return document if isinstance(document, Mapping) else {}


def _ignore(done: int, total: int, doing: str) -> None:
    """Tell nobody how far it is."""
