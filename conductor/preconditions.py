"""What must hold before anything long is started; each check refuses with the remedy."""

from __future__ import annotations

import sys

from conductor.compatibility import Device, Engine, Row
from conductor.config import Config
from conductor.engines.vllm import LOOPBACK, port_is_free
from conductor.environments.builder import Environments, Status
from conductor.failure import Failure
from conductor.models import Model
from conductor.probes.machine import Machine
from gates import FailureClass


def environments_needed(row: Row) -> list[str]:
    """Name the worker environments that a release with this row uses."""
    return ["quantize", *environments_of(row.engine, row.device)]


def environments_of(engine: Engine, device: Device) -> list[str]:
    """Name the worker environments that serve and evaluate with an engine."""
    if engine is Engine.TRANSFORMERS:
        return ["reference"]
    return [f"serve-{device}", "evaluate"]


def check_port(config: Config) -> None:
    """Refuse a fixed port that somebody uses."""
    port = config.engine.port
    if port is not None and not port_is_free(port):
        raise Failure(
            FailureClass.SYSTEMIC,
            f"engine.port {port} is in use on {LOOPBACK}; stop what listens there, or leave "
            "engine.port out and a free port is taken",
        )


def check_parallel(config: Config, machine: Machine) -> None:
    """Refuse to spread a model over more accelerators than there are."""
    wanted, there = config.engine.tensor_parallel_size, max(1, len(machine.accelerators))
    if wanted > there:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"engine.tensor_parallel_size is {wanted} and this machine has {there} device(s); "
            "lower it or use a larger machine",
        )


def check_source(model: Model) -> None:
    """Refuse a source whose weights are packed already: no quantizer unpacks them."""
    if model.quantized is not None and model.quantized[0] in ("modelopt", "compressed-tensors"):
        method, bucket = model.quantized
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"model {model.path} is quantized already ({method}, {bucket}); give the checkpoint it "
            "was made from",
        )


def check_environment(environments: Environments, name: str) -> None:
    """Refuse to start without an environment that will be needed."""
    status = environments.status(name)
    if status is not Status.READY:
        raise Failure(
            FailureClass.SYSTEMIC,
            f"the {name!r} environment under {environments.root} is {status}; build it with "
            f"`{sys.executable} -m conductor.environments build {name}`",
        )
