"""vLLM's OpenAI-compatible server: how to start it, know that it is well, and end it.

It binds to loopback on one port with a random key, in a process family that ends with the release,
and has a log of its own. A server over several nodes has a companion on every further one, with a
log of its own (:mod:`conductor.engines.multi_node`): it is well while all of them run.
Both sides of a comparison are started from one :class:`ServerSettings`; only checkpoint, served
name, port and key differ.
"""

from __future__ import annotations

import math
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from conductor.compatibility import Device
from conductor.engines import CANARY_MAX_TOKENS, REMEMBERED, Sides
from conductor.engines.multi_node import (
    Host,
    Meeting,
    arrange,
    companion_command,
    is_free,
    rank_arguments,
    rank_environ,
)
from conductor.executors.environ import on_path
from conductor.executors.local import (
    SIGNALLED,
    Note,
    Progress,
    SupervisedProcess,
    describe_status,
    keep_exit_code,
    tail,
)
from conductor.executors.processes import RECORD_SUFFIX
from conductor.failure import Failure
from conductor.probes.reading import ProbeError
from conductor.probes.server_log import read_server_log
from gates import FailureClass
from gates.canary import Health

if TYPE_CHECKING:
    import httpx

LOOPBACK = "127.0.0.1"
PROBE_TIMEOUT_S = 5.0
POLL_S = 0.25
CHECK_EVERY_S = 5.0
LEAVES_WITHIN_S = 6.0  # vLLM's server leaves 5 s after its engine died
REFUSES_WITHIN_S = 30.0  # on every node a server reads the same checkpoint at about the same time
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
    return is_free(LOOPBACK, port)


def server_command(
    interpreter: Path, settings: ServerSettings, *, checkpoint: Path, served_name: str, port: int
) -> list[str]:
    """Return the command that serves ``checkpoint``; the key travels in the environment."""
    arguments = server_arguments(
        settings, checkpoint=checkpoint, served_name=served_name, port=port
    )
    return [str(interpreter), "-m", "vllm.entrypoints.openai.api_server", *arguments]


def server_arguments(
    settings: ServerSettings, *, checkpoint: Path, served_name: str, port: int
) -> list[str]:
    """Return what a server is told, and each of its companions."""
    arguments = [
        *("--model", str(checkpoint), "--served-model-name", served_name),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--dtype", settings.dtype, "--seed", str(settings.seed)),
        *("--tensor-parallel-size", str(settings.tensor_parallel_size)),
        "--no-enable-log-requests",
    ]
    if settings.max_model_len is not None:
        arguments += ["--max-model-len", str(settings.max_model_len)]
    if settings.device is Device.CPU:
        arguments.append("--enforce-eager")  # compiling costs more than it saves on a CPU
    return [*arguments, *settings.extra_arguments]


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


@dataclass(frozen=True, kw_only=True)
class End:
    """How a server ended: by which of its processes, with what exit status, and where its log is.

    ``what`` is ``server``, or ``companion on node n2``.
    """

    what: str
    status: int
    log: Path

    @property
    def words(self) -> str:
        """How, in words: ``ended with exit status 1``."""
        return f"ended with {describe_status(self.status)}"

    @property
    def seen(self) -> str:
        """Its log, with the last lines of it."""
        return f"its log is {self.log}\n{tail(self.log)}"


class VllmServer:
    """One running server for one checkpoint, here or over several nodes, of which ours leads."""

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
        hosts: tuple[Host, ...] = (),
    ) -> None:
        """Start the server; call :meth:`wait_healthy` before using it.

        Raises:
            Failure: INFRA_TRANSIENT when one of the ``hosts`` cannot be found.
        """
        self.served_name = served_name
        self.settings = settings
        self.api_key = secrets.token_urlsafe(24)
        self.port = port
        self.base_url = f"http://{LOOPBACK}:{port}/v1"
        self.log = log
        self.description: Mapping[str, Any] | None = None
        """What the server said of its model when it was first healthy; None before."""
        self._started = time.monotonic()
        self._look_at = self._started
        self._silent_since: float | None = None
        self._stopped = False
        self._meeting = arrange(hosts) if hosts else None
        self._parts: dict[str, SupervisedProcess] = {}
        # Its processes talk over sockets, which vLLM never removes.
        sockets = mkdtemp(prefix="day0-")
        environ = {
            **server_environ(on_path(environ, interpreter), settings, self.api_key),
            "VLLM_RPC_BASE_PATH": sockets,
        }
        command = server_command(
            interpreter, settings, checkpoint=checkpoint, served_name=served_name, port=port
        )
        if self._meeting:
            command += rank_arguments(self._meeting, 0)
            environ = rank_environ(environ, self._meeting, 0)
        self._start("server", command, environ, log, Path(sockets))
        if self._meeting:
            arguments = server_arguments(
                settings, checkpoint=checkpoint, served_name=served_name, port=port
            )
            self._start_companions(self._meeting, interpreter, arguments, environ)

    def _start_companions(
        self,
        meeting: Meeting,
        interpreter: Path,
        arguments: Sequence[str],
        environ: Mapping[str, str],
    ) -> None:
        try:
            for rank, host in list(enumerate(meeting.hosts))[1:]:
                self._start(
                    f"companion on node {host.name}",
                    companion_command(interpreter, arguments, meeting, rank),
                    rank_environ(environ, meeting, rank),
                    self.log.with_name(f"{self.log.stem}-node{rank}.log"),
                )
        except BaseException:
            self.stop()
            raise

    def _start(
        self,
        what: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        log: Path,
        temporary: Path | None = None,
    ) -> None:
        self._parts[what] = SupervisedProcess(
            command,
            environ=environ,
            log=log,
            record=log.with_name(f"{log.stem}{RECORD_SUFFIX}"),
            temporary=temporary,
        )

    def wait_healthy(
        self, ceiling_s: float, waiting: Callable[[float], None]
    ) -> tuple[Health, str]:
        """Wait until the server answers; return how that ended, and details in words.

        Args:
            ceiling_s: give up this many seconds after the start; loading must fit into it.
            waiting: called at every poll with the seconds since the start.

        Raises:
            Failure: the server was stopped meanwhile, which says nothing about the checkpoint.
        """
        while True:
            waited = time.monotonic() - self._started
            if self.end():
                return self._explain_end()
            if self.is_healthy():
                return Health.OK, f"healthy after {waited:.0f} s"
            if waited >= ceiling_s:
                return Health.TIMEOUT, (
                    f"not healthy after {ceiling_s:.0f} s; raise engine.health_timeout_s if it was "
                    f"still loading; its log is {self.log}\n{tail(self.log)}"
                )
            waiting(waited)
            time.sleep(POLL_S)

    def _explain_end(self) -> tuple[Health, str]:
        # A companion alone is an accident of its node: what it refuses, the server refuses as well.
        is_accident = not self._leaves(REFUSES_WITHIN_S)
        if self._stopped:
            raise Failure(
                FailureClass.INFRA_TRANSIENT,
                f"the server of the {self.served_name} was stopped while it was loading; start the "
                "stage again",
            )
        # Whether a port was lost to somebody is asked of the port, not read from the log.
        if taken := self._port_taken():
            return Health.PORT_TAKEN, f"port {taken} was taken by another process"
        end = self.end()
        assert end is not None, "it has ended"
        return Health.KILLED if is_accident or end.status > SIGNALLED else Health.DIED, (
            f"the {end.what} {end.words} while loading; {end.seen}"
        )

    def _port_taken(self) -> int | None:
        """Return a port of ours that another process has, once the server itself has ended."""
        if not self._leaves(0):
            return None
        if not port_is_free(self.port):
            return self.port
        meeting = self._meeting
        if meeting and not is_free(meeting.addresses[0], meeting.port):
            return meeting.port
        return None

    def end(self) -> End | None:
        """Return how the server ended, or None while all of it runs; one that left has failed.

        Where several processes ended, the one that a signal took is the cause, else the first. A
        companion that left in order did so because the server has gone, whose end follows.
        """
        ended = [
            End(what=what, status=status, log=process.log)
            for what, process in self._parts.items()
            if (status := process.poll()) is not None and (status or what == "server")
        ]
        return min(ended, key=lambda end: end.status <= SIGNALLED, default=None)

    def leaves(self, within_s: float) -> bool:
        """True when a process of the server has ended, or does so in time."""
        return _within(within_s, lambda: self.end() is not None)

    def _leaves(self, within_s: float) -> bool:
        """True when the process that serves has ended, or does so in time; not a companion."""
        return _within(within_s, lambda: self._parts["server"].poll() is not None)

    def ran_out_of_memory(self) -> bool:
        """True when a server that ended did so for want of memory, by the kernel or by its logs."""
        return any(
            process.out_of_memory or _log_tells_want_of_memory(process.log)
            for process in self._parts.values()
        )

    def is_healthy(self) -> bool:
        """True when our process runs, its engine is well, and it takes our key."""
        if self.end() is not None or self._get("/health") is None:
            return False
        served = self.served()
        self.description = self.description or served
        return served is not None

    def silent_s(self) -> float:
        """Return for how many seconds the server has not said that it is well.

        Asks it every few seconds at most, and counts from the first time that it was asked in
        vain: while nobody asked, it was not silent.
        """
        if time.monotonic() >= self._look_at:
            if self._get("/health") is not None:
                self._silent_since = None
            elif self._silent_since is None:
                self._silent_since = time.monotonic()
            self._look_at = time.monotonic() + CHECK_EVERY_S
        return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since

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

    def complete(self, prompt: str, max_tokens: int, timeout_s: float) -> dict[str, Any]:
        """Return one greedy completion with a logprob per token, in the canary's answer form.

        Raises:
            TimeoutError: the server took the prompt and did not answer in time.
        """
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
            response = self._client.post("/v1/completions", json=body, timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise TimeoutError(str(error)) from None
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

    @cached_property
    def _client(self) -> httpx.Client:
        """One for all requests: making one costs 14 ms of a core, and a request 0.1 ms."""
        import httpx

        return httpx.Client(
            base_url=f"http://{LOOPBACK}:{self.port}",
            headers={"Authorization": f"Bearer {self.api_key}"},
            timeout=PROBE_TIMEOUT_S,
            trust_env=False,
        )

    def _get(self, path: str) -> Any:
        """Return the answer to a GET if it is 200, else None."""
        import httpx

        try:
            response = self._client.get(path)
        except httpx.HTTPError:
            return None
        return response if response.status_code == httpx.codes.OK else None

    def stop(self) -> None:
        """End the server and everything it started; keep how one ended that left by itself."""
        self._stopped = True
        for process in self._parts.values():
            keep_exit_code(process.log, process.poll())
        for process in self._parts.values():
            process.stop()


def _finite_or_none(logprob: Any) -> Any:
    """JSON has no NaN: a logprob that is not finite travels as null, and the gate refuses it."""
    return None if isinstance(logprob, float) and not math.isfinite(logprob) else logprob


class VllmSession:
    """Serve the two checkpoints of a release, keeping a server while there is room for it.

    ``capacity`` servers may run at a time: one on an accelerator, whose memory a server fills; two
    where main memory holds both, so that no checkpoint is loaded twice. Two threads may use a
    session, each for one side, while there is room for two servers.
    """

    def __init__(
        self,
        sides: Sides,
        *,
        interpreter: Path,
        settings: ServerSettings,
        environ: Mapping[str, str],
        health_timeout_s: float,
        silence_s: float,
        port: int | None,
        capacity: int,
        prompts_per_request: int,
        note: Note,
        hosts: tuple[Host, ...] = (),
    ) -> None:
        """Keep what is needed; no server is started before a side is used.

        ``silence_s`` seconds without a word from ``/health`` count as a hang; ``note`` is told of
        every start, before it happens, and of every stop. A server runs over all ``hosts``, the
        first of which is ours, or here alone where there are none.
        """
        self._sides = sides
        self._interpreter = interpreter
        self._settings = settings
        self._environ = environ
        self._health_timeout_s = health_timeout_s
        self._silence_s = silence_s
        self._port = port
        self._capacity = 1 if port else capacity
        self._prompts_per_request = prompts_per_request
        self._note = note
        self._hosts = hosts
        # Held while servers are started and stopped, which takes seconds, never while one loads.
        self._lock = threading.Lock()
        self._servers: dict[str, VllmServer] = {}
        self._closed = False

    def answer_canary(
        self,
        prompts: Sequence[str],
        stage_dir: Path,
        progress: Progress,
        source_answers: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Serve both sides, at once where there is room, and ask them the same prompts.

        Where there is room for one, the candidate goes first because it is the one in doubt, unless
        the source's server is there already. A candidate that cannot be served still has the source
        tried: if that fails too, the settings are at fault and not the checkpoint.
        """
        asked: dict[str, Asked] = {}
        if source_answers is not None:
            asked["source"] = Asked.remembered(source_answers)
        sides = [side for side in ("candidate", "source") if side not in asked]
        sides.sort(key=lambda side: side not in self._servers)
        for side in sides:
            self.begin(side, stage_dir)
        for side in sides:
            asked[side] = self._ask(side, prompts, stage_dir, progress)
        candidate, source = asked["candidate"], asked["source"]
        healthy = candidate.health is source.health is Health.OK
        return {
            "engine": "vllm",
            "served_name": candidate.served_name,
            "expected_name": "candidate",
            "health": candidate.health,
            "health_detail": candidate.detail,
            "source_health": source.health,
            "source_health_detail": source.detail,
            "prompts": [
                {"prompt": prompt, "candidate": answer, "source": reference}
                for prompt, answer, reference in zip(
                    prompts, candidate.answers, source.answers, strict=True
                )
            ]
            if healthy
            else [],
        }

    def _ask(self, side: str, prompts: Sequence[str], stage_dir: Path, progress: Progress) -> Asked:
        server, health, detail = self._start(side, stage_dir, progress)
        if server is None:
            return _lost(side, health, detail)
        answers = []
        for number, prompt in enumerate(prompts):
            progress(number, len(prompts), f"canary: {side}")
            try:
                answers.append(server.complete(prompt, CANARY_MAX_TOKENS, self._silence_s))
            except TimeoutError:
                self.discard(side)
                raise Failure(
                    UNSERVED[side],
                    f"the server of the {side} left a prompt of the canary without an answer for "
                    f"{self._silence_s:.0f} s and counts as hung; read its log {server.log}, or "
                    f"raise watchdog.server_s if it only was busy\n{tail(server.log)}",
                ) from None
        if any(answer["error"] for answer in answers) and server.leaves(LEAVES_WITHIN_S):
            end = server.end()
            assert end is not None, "it has left"
            ended = f"the {end.what} {end.words} during the canary"
            self._refuse_want_of_memory(side, server, ended)
            if end.status > SIGNALLED:  # from outside: no answer, and not the checkpoint's fault
                return _lost(side, Health.KILLED, f"{ended}; its log is {end.log}")
        described = server.description or {}
        return Asked(health, detail, described.get("id", ""), answers)

    def backend(self, side: str, stage_dir: Path, progress: Progress) -> dict[str, Any]:
        """Serve ``side`` unless its server is still warm, and say how to reach it.

        Raises:
            Failure: of the class ``UNSERVED`` when it does not become healthy, or OUT_OF_MEMORY.
        """
        server, health, detail = self._start(side, stage_dir, progress)
        if server is None:
            raise Failure(UNSERVED[side], f"the {side} cannot be served ({health}): {detail}")
        return {
            "backend": "endpoint",
            "base_url": server.base_url,
            "served_name": server.served_name,
            "tokenizer": str(self._sides.source),
            "device": None,
            "batch_size": self._prompts_per_request,
        }

    def secrets(self, side: str) -> Mapping[str, str]:
        """Return the server's key in the variable that lm-eval reads."""
        return {"OPENAI_API_KEY": self._server(side).api_key}

    def check(self, side: str) -> None:
        """Raise Failure when the server of ``side`` has died, or has been silent for too long."""
        server = self._server(side)
        if end := server.end():
            ended = f"the {end.what} of the {side} {end.words}"
            self._refuse_want_of_memory(side, server, ended)
            raise Failure(UNSERVED[side], f"{ended} while it was needed; {end.seen}")
        if server.silent_s() >= self._silence_s:
            raise Failure(
                UNSERVED[side],
                f"the server of the {side} runs but has not said that it is well for "
                f"{self._silence_s:.0f} s and counts as hung; read its log {server.log}, or raise "
                f"watchdog.server_s if it only was busy\n{tail(server.log)}",
            )

    def settings(self, side: str) -> Mapping[str, Any]:
        """Return the settings of the server of ``side``, as asked for and as it says itself."""
        server = self._server(side)
        described = server.description or {}
        return {
            "engine": "vllm",
            **server.settings.document(),
            **({"nodes": len(self._hosts)} if self._hosts else {}),
            "served_max_model_len": described.get("max_model_len"),
        }

    def log(self, side: str) -> Path | None:
        """Return the log of the server of ``side``; it starts with the server."""
        return self._server(side).log

    def begin(self, side: str, stage_dir: Path) -> None:
        """Start the server of ``side`` without waiting, where there is room for one more."""
        with self._lock:
            if side not in self._servers and len(self._servers) < self._capacity:
                self._launch(side, stage_dir)

    @property
    def holds_both(self) -> bool:
        """True when there is room for two servers."""
        return self._capacity > 1

    def discard(self, side: str) -> None:
        """Stop the server of ``side`` if there is one; the next use starts another."""
        with self._lock:
            self._stop(side)

    def narrow(self) -> None:
        """From now on, have one server at a time; the next use of a side stops the other's."""
        self._capacity = 1

    def close(self) -> None:
        """End every server, and start none any more."""
        with self._lock:
            self._closed = True
            for side in list(self._servers):
                self._stop(side)

    def _server(self, side: str) -> VllmServer:
        server = self._servers.get(side)
        if server is None:
            raise Failure(
                FailureClass.INFRA_TRANSIENT,
                f"the server of the {side} was stopped, to make room or because the release is "
                "ending; start the stage again",
            )
        return server

    def _start(
        self, side: str, stage_dir: Path, progress: Progress
    ) -> tuple[VllmServer | None, Health, str]:
        """Return a healthy server of ``side``, warm or begun if there is one, or why there is none.

        Raises:
            Failure: OUT_OF_MEMORY when that is what ended it.
        """
        self._discard_unhealthy(side)
        for _ in range(PORT_ATTEMPTS):
            server = self._begun_or_new(side, stage_dir)
            health, detail = server.wait_healthy(
                self._health_timeout_s,
                lambda waited: progress(
                    int(waited), int(self._health_timeout_s), f"starting the {side}'s server"
                ),
            )
            if health is Health.OK:
                return server, health, detail
            self.discard(side)
            self._refuse_want_of_memory(side, server, f"the {side} cannot be served: {detail}")
            if health is not Health.PORT_TAKEN or self._port:
                break
        return None, health, detail

    def _discard_unhealthy(self, side: str) -> None:
        """Stop a server that was well once and is not any more; one that still loads may go on."""
        server = self._servers.get(side)
        if server and server.description is not None and not server.is_healthy():
            self.discard(side)

    def _begun_or_new(self, side: str, stage_dir: Path) -> VllmServer:
        with self._lock:
            others = [each for each in self._servers if each != side]
            for other in others[: len(others) + 1 - self._capacity]:
                self._stop(other)
            if side not in self._servers:
                self._launch(side, stage_dir)
            return self._servers[side]

    def _launch(self, side: str, stage_dir: Path) -> None:
        """Start a server; the lock is held."""
        if self._closed:
            raise Failure(
                FailureClass.INFRA_TRANSIENT,
                f"the {side} is not served any more: the release is ending; resume it",
            )
        stage_dir.mkdir(parents=True, exist_ok=True)
        log = next_log(stage_dir, side)
        self._note("server_started", side=side, log=log)
        self._servers[side] = VllmServer(
            self._interpreter,
            self._settings,
            checkpoint=self._sides.path(side),
            served_name=side,
            environ=self._environ,
            log=log,
            port=self._port or free_port(),
            hosts=self._hosts,
        )

    def _stop(self, side: str) -> None:
        """Stop a server and wait for its end; the lock is held."""
        if server := self._servers.pop(side, None):
            server.stop()
            self._note("server_stopped", side=side)

    def _refuse_want_of_memory(self, side: str, server: VllmServer, what: str) -> None:
        """Raise Failure when a server that has ended did so for want of memory."""
        if server.end() is not None and server.ran_out_of_memory():
            raise Failure(
                FailureClass.OUT_OF_MEMORY,
                f"{what}; {self._settings.device} memory ran out for the {side}: free some, or "
                f"lower engine.max_model_len or engine.cpu_kv_cache_gib; its log is {server.log}\n"
                f"{tail(server.log)}",
            )


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """True when ``condition`` holds, or does so in time."""
    give_up_at = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < give_up_at:
        time.sleep(POLL_S)
    return holds


def _log_tells_want_of_memory(log: Path) -> bool:
    with suppress(ProbeError):
        return bool(read_server_log(log)["out_of_memory"])
    return False


def _lost(side: str, health: Health, detail: str) -> Asked:
    """Return how a server was lost.

    Raises:
        Failure: the source's was killed: nothing in settings or checkpoints explains that.
    """
    if side == "source" and health is Health.KILLED:
        raise Failure(UNSERVED[side], f"the source cannot be served: {detail}")
    return Asked(health, detail)


@dataclass(frozen=True)
class Asked:
    """How a side's server started, and what it answered; empty where it did not."""

    health: Health
    detail: str
    served_name: str = ""
    answers: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def remembered(cls, answers: Sequence[Mapping[str, Any]]) -> Asked:
        """Stand for a server that gave these answers earlier, under the same settings."""
        return cls(Health.OK, REMEMBERED, answers=answers)


def next_log(stage_dir: Path, side: str) -> Path:
    """Return a log that no server has written yet: ``server-source.log``, ``server-source-2.log``.

    A log is one server's: another one's start in it would look like a server that fell over.
    """
    names = chain([f"server-{side}.log"], (f"server-{side}-{n}.log" for n in count(2)))
    return next(path for name in names if not (path := stage_dir / name).exists())
