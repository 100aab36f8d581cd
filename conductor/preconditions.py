"""What must hold before anything long is started; each check refuses with the remedy."""

from __future__ import annotations

import shlex
import sys

from conductor.chain import Stage
from conductor.cluster.description import Cluster
from conductor.compatibility import Device, Engine, Row
from conductor.config import Config
from conductor.engines.vllm import LOOPBACK, port_is_free
from conductor.environments.builder import Status
from conductor.failure import Failure
from conductor.models import Model
from conductor.world import World
from gates import FailureClass

SERVING = (Stage.DEPLOY, Stage.BASELINE_EVAL, Stage.CANDIDATE_EVAL)
"""The stages in which a server answers."""


def environments_needed(row: Row) -> list[str]:
    """Name the worker environments that a release with this row uses."""
    return ["quantize", *environments_of(row.engine, row.device)]


def environments_of(engine: Engine, device: Device) -> list[str]:
    """Name the worker environments that serve and evaluate with an engine."""
    if engine is Engine.TRANSFORMERS:
        return ["reference"]
    return [f"serve-{device}", "evaluate"]


def check_port(config: Config) -> None:
    """Refuse a fixed port that somebody uses on this machine."""
    port = config.engine.port
    if port is not None and not port_is_free(port):
        raise Failure(
            FailureClass.SYSTEMIC,
            f"engine.port {port} is in use on {LOOPBACK}; stop what listens there, or leave "
            "engine.port out and a free port is taken",
        )


def check_parallel(config: Config, world: World) -> None:
    """Refuse to spread a model over more accelerators than there are, here or in a job."""
    wanted = config.engine.tensor_parallel_size
    if world.cluster is not None:
        _check_jobs(wanted, world.cluster)
        return
    there = max(1, len(world.machine.accelerators))
    if wanted > there:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"engine.tensor_parallel_size is {wanted} and this machine has {there} device(s); "
            "lower it or use a larger machine",
        )


def _check_jobs(wanted: int, cluster: Cluster) -> None:
    """Refuse jobs that serve with fewer accelerators, over all their nodes, than are wanted."""
    short = {
        stage: max(1, cluster.resources[stage].gpus) * cluster.resources[stage].nodes
        for stage in SERVING
    }
    named = [f"{stage} has {there}" for stage, there in short.items() if there < wanted]
    if named:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"engine.tensor_parallel_size is {wanted}, and of the devices that jobs of cluster "
            f"{cluster.name} ask for in {cluster.file}, {', '.join(named)} (gpus x nodes); lower "
            "the one or raise the other",
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


def check_environment(world: World, name: str) -> None:
    """Refuse to start without an environment that will be needed."""
    environments, cluster = world.environments, world.cluster
    status = environments.status(name)
    if status is not Status.READY:
        place = f" --root {shlex.quote(str(environments.root))} --device {environments.device}"
        raise Failure(
            FailureClass.SYSTEMIC,
            f"the {name!r} environment under {environments.root} is {status}; build it with "
            f"`{sys.executable} -m conductor.environments build{place if cluster else ''} {name}`"
            + (f", or name an interpreter for it in {cluster.file}" if cluster else ""),
        )


def check_python(cluster: Cluster) -> None:
    """Refuse a cluster without the interpreter for our own code; in an image none is seen."""
    in_images = any(each.container_image for each in cluster.resources.values())
    if not in_images and not cluster.python.exists():
        raise Failure(
            FailureClass.SYSTEMIC,
            f"{cluster.file}: clusters.{cluster.name}.python: there is no {cluster.python}; name "
            "the interpreter that has day0 on the shared storage",
        )
