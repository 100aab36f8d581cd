"""vLLM's OpenAI-compatible server: how to start it, know that it is well, and end it.

It binds to loopback on one port with a random key, in a process family that ends with the release.
Both sides of a comparison are started from one :class:`ServerSettings`; only checkpoint, served
name, port and key differ.
"""

from __future__ import annotations

import math
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conductor.compatibility import Device
from conductor.engines import CANARY_MAX_TOKENS, Sides
from conductor.executors.environ import on_path
from conductor.executors.local import SIGNALLED, Progress, SupervisedProcess, describe_status, tail
from conductor.failure import Failure
from gates import FailureClass
from gates.canary import Health

LOOPBACK = "127.0.0.1"
PROBE_TIMEOUT_S = 5.0
POLL_S = 0.25
PORT_ATTEMPTS = 3  # a free port can be lost to another process before the server binds it


# What it means when a server of either side is lost: the candidate's may be the candidate's
# fault, the source's is the world's.
UNSERVED: Mapping[str, FailureClass] = {
    "candidate": FailureClass.DEPLOYMENT_HEALTH_FAILED,
    "source": FailureClass.INFRA_TRANSIENT,
}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What both sides of a comparison share; sizes in tokens, GiB as named."""

    device: Device
    dtype: str
    max_model_len: int | None
    tensor_parallel_size: int
    seed: int
    cpu_kv_cache_gib: int
    extra_arguments: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The settings as a JSON mapping, for comparing the two sides by machine."""
        return asdict(self) | {"extra_arguments": list(self.extra_arguments)}


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """True when ``port`` can be bound on loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def server_command(
    interpreter: Path, settings: ServerSettings, *, checkpoint: Path, served_name: str, port: int
) -> list[str]:
    """Return the command that serves ``checkpoint``; the key travels in the environment."""
    command = [
        *(str(interpreter), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(checkpoint), "--served-model-name", served_name),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--dtype", settings.dtype, "--seed", str(settings.seed)),
        *("--tensor-parallel-size", str(settings.tensor_parallel_size)),
        "--no-enable-log-requests",
    ]
    if settings.max_model_len is not None:
        command += ["--max-model-len", str(settings.max_model_len)]
    if settings.device is Device.CPU:
        command.append("--enforce-eager")  # compiling costs more than it saves on a CPU
    return [*command, *settings.extra_arguments]


def server_environ(
    environ: Mapping[str, str], settings: ServerSettings, api_key: str
) -> dict[str, str]:
    """Return the server's environment: the given one, the key, and no telemetry."""
    ours = {"VLLM_API_KEY": api_key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if settings.device is Device.CPU:
        ours |= {
            "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return {**environ, **ours}


class VllmServer:
    """One running server for one checkpoint."""

    def __init__(
        self,
        interpreter: Path,
        settings: ServerSettings,
        *,
        checkpoint: Path,
        served_name: str,
        environ: Mapping[str, str],
        log: Path,
        port: int,
    ) -> None:
        """Start the server; call :meth:`wait_healthy` before using it."""
        self.served_name = served_name
        self.settings = settings
        self.api_key = secrets.token_urlsafe(24)
        self.port = port
        self.base_url = f"http://{LOOPBACK}:{port}/v1"
        self.log = log
        self._process = SupervisedProcess(
            server_command(
                interpreter, settings, checkpoint=checkpoint, served_name=served_name, port=port
            ),
            environ=server_environ(on_path(environ, interpreter), settings, self.api_key),
            log=log,
        )

    def wait_healthy(
        self, ceiling_s: float, waiting: Callable[[float], None]
    ) -> tuple[Health, str]:
        """Wait until the server answers; return how that ended, and details in words.

        Args:
            ceiling_s: give up after this many seconds; loading must fit into it.
            waiting: called at every poll with the seconds waited so far.
        """
        started = time.monotonic()
        while (waited := time.monotonic() - started) < ceiling_s:
            status = self._process.poll()
            if status is not None:
                return self._explain_exit(status)
            if self.is_healthy():
                return Health.OK, f"healthy after {waited:.0f} s"
            waiting(waited)
            time.sleep(POLL_S)
        return Health.TIMEOUT, (
            f"not healthy after {ceiling_s:.0f} s; raise engine.health_timeout_s if it was still "
            f"loading; its log is {self.log}\n{tail(self.log)}"
        )

    def _explain_exit(self, status: int) -> tuple[Health, str]:
        # Whether the port was lost to somebody is asked of the port, not read from the log.
        if not port_is_free(self.port):
            return Health.PORT_TAKEN, f"port {self.port} was taken by another process"
        return Health.KILLED if status > SIGNALLED else Health.DIED, (
            f"the server ended with {describe_status(status)} while loading; "
            f"its log is {self.log}\n{tail(self.log)}"
        )

    def exit_status(self) -> int | None:
        """Return the server's exit status, or None while it runs; a server that left has failed."""
        return self._process.poll()

    def is_healthy(self) -> bool:
        """True when our process runs, its engine is well, and it takes our key."""
        return (
            self._process.poll() is None
            and self._get("/health") is not None
            and self.served() is not None
        )

    def served(self) -> dict[str, Any] | None:
        """Return the server's own description of its model, or None when it gives none.

        It is asked with our key, so that a stranger on the same port is not taken for our server.
        """
        response = self._get("/v1/models")
        if response is None:
            return None
        try:
            model: dict[str, Any] = response.json()["data"][0]
        except (ValueError, KeyError, IndexError, TypeError):
            return None
        return model

    def complete(self, prompt: str, max_tokens: int, *, timeout_s: float = 120.0) -> dict[str, Any]:
        """Return one greedy completion with a logprob per token, in the canary's answer form."""
        import httpx

        body = {
            "model": self.served_name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": 1,
            "seed": self.settings.seed,
        }
        answer: dict[str, Any] = {"text": None, "tokens": [], "logprobs": [], "finish_reason": None}
        try:
            response = httpx.post(
                f"{self.base_url}/completions",
                json=body,
                headers={"Authorization": f"Bearer {self.api_key}"},
                timeout=timeout_s,
                trust_env=False,
            )
        except httpx.HTTPError as error:
            return answer | {"error": f"{type(error).__name__}: {error}"}
        if response.is_error:
            return answer | {"error": f"HTTP {response.status_code}: {response.text[:500]}"}
        try:
            choice = response.json()["choices"][0]
            logprobs = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
            return {
                "text": choice["text"],
                "tokens": logprobs["tokens"],
                "logprobs": [_finite_or_none(each) for each in logprobs["token_logprobs"]],
                "finish_reason": choice["finish_reason"],
                "error": None,
            }
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return answer | {"error": f"no completion in the answer: {type(error).__name__}"}

    def _get(self, path: str) -> Any:
        """Return the answer to a GET if it is 200, else None."""
        import httpx

        try:
            response = httpx.get(
                f"http://{LOOPBACK}:{self.port}{path}",
                headers={"Authorization": f"Bearer {self.api_key}"},
                timeout=PROBE_TIMEOUT_S,
                trust_env=False,
            )
        except httpx.HTTPError:
            return None
        return response if response.status_code == httpx.codes.OK else None

    def stop(self) -> None:
        """End the server and everything it started."""
        self._process.stop()


def _finite_or_none(logprob: Any) -> Any:
    """JSON has no NaN: a logprob that is not finite travels as null, and the gate refuses it."""
    return None if isinstance(logprob, float) and not math.isfinite(logprob) else logprob


class VllmSession:
    """Serve the two checkpoints of a release, keeping a server while there is room for it.

    ``capacity`` servers may run at a time: one on an accelerator, whose memory a server fills; two
    where main memory holds both, so that no checkpoint is loaded twice.
    """

    def __init__(
        self,
        sides: Sides,
        *,
        interpreter: Path,
        settings: ServerSettings,
        environ: Mapping[str, str],
        health_timeout_s: float,
        port: int | None,
        capacity: int,
    ) -> None:
        """Keep what is needed; no server is started before a side is used."""
        self._sides = sides
        self._interpreter = interpreter
        self._settings = settings
        self._environ = environ
        self._health_timeout_s = health_timeout_s
        self._port = port
        self._capacity = 1 if port else capacity
        self._servers: dict[str, VllmServer] = {}

    def answer_canary(
        self, prompts: Sequence[str], stage_dir: Path, progress: Progress
    ) -> dict[str, Any]:
        """Serve the candidate first, then the source, and ask both the same prompts.

        The candidate comes first because it is the one in doubt; the source's server stays for the
        baseline evaluation. A candidate that cannot be served still has the source tried: if that
        fails too, the settings are at fault and not the checkpoint.
        """
        candidate, health, detail = self._start("candidate", stage_dir, progress)
        served = candidate.served() if candidate else None
        ours = self._ask(candidate, prompts, progress) if candidate else []
        source, source_health, source_detail = self._start("source", stage_dir, progress)
        theirs = self._ask(source, prompts, progress) if source else []
        return {
            "engine": "vllm",
            "served_name": served["id"] if served else "",
            "expected_name": "candidate",
            "health": health,
            "health_detail": detail,
            "source_health": source_health,
            "source_health_detail": source_detail,
            "prompts": [
                {"prompt": prompt, "candidate": answer, "source": reference}
                for prompt, answer, reference in zip(prompts, ours, theirs, strict=False)
            ],
        }

    def _ask(
        self, server: VllmServer, prompts: Sequence[str], progress: Progress
    ) -> list[dict[str, Any]]:
        answers = []
        for number, prompt in enumerate(prompts):
            progress(number, len(prompts), f"canary: {server.served_name}")
            answers.append(server.complete(prompt, CANARY_MAX_TOKENS))
        return answers

    def backend(self, side: str, stage_dir: Path, progress: Progress) -> dict[str, Any]:
        """Serve ``side`` unless its server is still warm, and say how to reach it."""
        server = self._ready(side, stage_dir, progress)
        return {
            "backend": "endpoint",
            "base_url": server.base_url,
            "served_name": server.served_name,
            "tokenizer": str(self._sides.source),
            "device": None,
            "batch_size": 1,
        }

    def secrets(self, side: str) -> Mapping[str, str]:
        """Return the server's key in the variable that lm-eval reads."""
        return {"OPENAI_API_KEY": self._servers[side].api_key}

    def check(self, side: str) -> None:
        """Raise Failure when the server of ``side`` has died."""
        status = self._servers[side].exit_status()
        if status is not None:
            raise Failure(
                UNSERVED[side],
                f"the server of the {side} ended with {describe_status(status)} during the "
                f"evaluation; its log is {self._servers[side].log}\n"
                f"{tail(self._servers[side].log)}",
            )

    def settings(self, side: str) -> Mapping[str, Any]:
        """Return the settings of the server of ``side``, as asked for and as it says itself."""
        server = self._servers[side]
        served = server.served() or {}
        return {
            "engine": "vllm",
            **server.settings.document(),
            "served_max_model_len": served.get("max_model_len"),
        }

    def log(self, side: str) -> Path | None:
        """Return the log of the server of ``side``; it starts with the server."""
        return self._servers[side].log

    def close(self) -> None:
        """End every server."""
        for server in self._servers.values():
            server.stop()
        self._servers.clear()

    def _ready(self, side: str, stage_dir: Path, progress: Progress) -> VllmServer:
        """Return a healthy server for ``side``, warm if there is one.

        Raises:
            Failure: of the class ``UNSERVED`` when it does not become healthy.
        """
        warm = self._servers.get(side)
        if warm and warm.is_healthy():
            return warm
        server, health, detail = self._start(side, stage_dir, progress)
        if server is None:
            raise Failure(UNSERVED[side], f"the {side} cannot be served ({health}): {detail}")
        return server

    def _start(
        self, side: str, stage_dir: Path, progress: Progress
    ) -> tuple[VllmServer | None, Health, str]:
        self._make_room(side)
        for _ in range(PORT_ATTEMPTS):
            server = VllmServer(
                self._interpreter,
                self._settings,
                checkpoint=self._sides.path(side),
                served_name=side,
                environ=self._environ,
                log=stage_dir / f"server-{side}.log",
                port=self._port or free_port(),
            )
            self._servers[side] = server
            health, detail = server.wait_healthy(
                self._health_timeout_s,
                lambda waited: progress(
                    int(waited), int(self._health_timeout_s), f"starting the {side}'s server"
                ),
            )
            if health is Health.OK:
                return server, health, detail
            self._servers.pop(side).stop()
            if health is not Health.PORT_TAKEN or self._port:
                break
        return None, health, detail

    def _make_room(self, side: str) -> None:
        if stale := self._servers.pop(side, None):
            stale.stop()
        while len(self._servers) >= self._capacity:
            self._servers.pop(next(iter(self._servers))).stop()
