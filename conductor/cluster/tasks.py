"""What a job on a cluster does: three kinds of task, documents on one side, calls on the other.

``worker`` runs one worker (a quantizer), ``canary`` serves both sides and asks them a few prompts,
``evaluation`` serves one side and lets the harness ask it: server and harness are in one job, since
nobody outside may reach the node. The conductor writes a task as JSON; the job carries it out with
the tools of its node, as a release on that machine would. Invariants:

* A task holds no secret and no variable but those in which the caller's environment differs from
  the one that the job inherits.
* Whatever was left by an earlier job for the same task is gone on with, or removed by the job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conductor.compatibility import Device, Engine
from conductor.config import ENTRY, Config, restore
from conductor.engines import EngineSession, Sides
from conductor.engines.multi_node import hosts_of_job
from conductor.environments.builder import Environments
from conductor.evaluation import Inquiry
from conductor.executors.local import Progress, Worker, kept_result
from conductor.failure import Failure
from conductor.harnesses.lm_eval import HarnessSettings
from conductor.preconditions import check_environment, environments_of
from conductor.rounds import Batch
from conductor.suites import load_suite
from conductor.tools import Tools, tools_here
from conductor.world import World
from gates import FailureClass

QUANTIZE = "quantize"
CONDUCTORS_OWN = (
    *(ENTRY, "workspace", "run_name", "executor", "cluster", "tracking."),
    *("overlap", "fresh_baseline", "retry."),
)
"""Settings, or beginnings of their names, that no job needs."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An engine that is to be opened on a node: what :meth:`Tools.open_session` takes."""

    engine: Engine
    sides: Sides
    config: Config
    max_length: int | None
    one_at_a_time: bool = False

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "engine": self.engine,
            "sides": {side: str(self.sides.path(side)) for side in ("source", "candidate")},
            "max_length": self.max_length,
            "one_at_a_time": self.one_at_a_time,
        }


def worker_task(
    worker: Worker,
    stage_dir: Path,
    request: Mapping[str, Any],
    environ: Mapping[str, str],
    inherited: Mapping[str, str],
    stall_s: float | None,
) -> dict[str, Any]:
    """Return the task of running a worker.

    ``environ`` is what the worker is to have, ``inherited`` what the job will have by itself.
    """
    return {
        "task": "worker",
        "directory": str(stage_dir),
        "script": worker.script,
        "interpreter": str(worker.interpreter),
        "request": dict(request),
        "set": {n: value for n, value in environ.items() if inherited.get(n) != value},
        "unset": sorted(set(inherited) - set(environ)),
        "stall_s": stall_s,
    }


def canary_task(
    opened: Opened,
    prompts: Any,
    stage_dir: Path,
    source_answers: Any,
) -> dict[str, Any]:
    """Return the task of serving both sides and asking them ``prompts``."""
    return {
        "task": "canary",
        "directory": str(stage_dir),
        "opened": opened.document(),
        "prompts": list(prompts),
        "source_answers": None if source_answers is None else list(source_answers),
    }


def evaluation_task(opened: Opened, inquiry: Inquiry) -> dict[str, Any]:
    """Return the task of serving one side and evaluating it.

    How many sides fit at a time, which may come out while it runs, makes no other task of it.
    """
    return {
        "task": "evaluation",
        "directory": str(inquiry.directory),
        "opened": replace(opened, one_at_a_time=False).document(),
        "inquiry": {
            "side": inquiry.side,
            "settings": asdict(inquiry.settings),
            "request_cache": str(inquiry.request_cache),
            "stall_s": inquiry.stall_s,
            "batch": inquiry.batch.document(),
        },
    }


def on_node(
    task: Mapping[str, Any], config: Config, device: Device, environments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``task`` with what the node must know besides: settings, device, environments.

    A job is known again by its task, so the task holds no setting of the conductor's own, and not
    where a setting comes from.
    """
    settings = {
        name: {"value": entry["value"], "from": "task"}
        for name, entry in config.document().items()
        if not name.startswith(CONDUCTORS_OWN)
    }
    return {**task, "config": settings, "device": device, "environments": dict(environments)}


@dataclass(frozen=True, kw_only=True)
class Node:
    """The node that a task is carried out on: its world, its tools, who is told."""

    world: World
    tools: Tools
    progress: Progress

    @classmethod
    def find(
        cls,
        task: Mapping[str, Any],
        environ: Mapping[str, str],
        note: Callable[..., None],
        progress: Progress,
    ) -> Node:
        """Look at the node that we are on.

        Raises:
            Failure: SYSTEMIC when it is not what the cluster is said to have; INFRA_TRANSIENT when
                Slurm does not say where the job's other nodes are.
        """
        config = restore(task["config"])
        given = task["environments"]
        environments = Environments(
            given["root"],
            device=Device(task["device"]),
            variables=environ,
            interpreters={name: Path(path) for name, path in given["interpreters"].items()},
        )
        world, open_tools = tools_here(config, environ, environments)
        if world.machine.device != task["device"]:
            raise Failure(
                FailureClass.SYSTEMIC,
                f"node {os.uname().nodename} has the device {world.machine.device}, and its "
                f"cluster is said to have {task['device']}: ask for nodes that have it, in "
                "resources of clusters.yaml, or correct device there",
            )
        if not config.dry_run:
            world = replace(world, nodes=hosts_of_job(environ))
        return cls(world=world, tools=open_tools(world, note), progress=progress)


def carry_out(task: Mapping[str, Any], node: Node) -> Any:
    """Do what ``task`` says on ``node``; return its answer, a JSON document or None.

    Raises:
        Failure: it could not be done.
    """
    return TASKS[task["task"]](task, node)


def _run_worker(task: Mapping[str, Any], node: Node) -> None:
    directory = Path(task["directory"])
    if kept_result(directory, task["request"]):
        return
    environ = {n: value for n, value in node.world.environ.items() if n not in task["unset"]}
    if not restore(task["config"]).dry_run:
        check_environment(node.world, QUANTIZE)
    node.tools.run_worker(
        Worker(script=task["script"], interpreter=Path(task["interpreter"])),
        directory,
        task["request"],
        environ=environ | task["set"],
        progress=node.progress,
        stall_s=task["stall_s"],
    )


def _answer_canary(task: Mapping[str, Any], node: Node) -> dict[str, Any]:
    session = _open(task, node)
    try:
        return session.answer_canary(
            task["prompts"], Path(task["directory"]), node.progress, task["source_answers"]
        )
    finally:
        session.close()


def _evaluate(task: Mapping[str, Any], node: Node) -> None:
    asked, batch = task["inquiry"], task["inquiry"]["batch"]
    questions = batch["questions"] and {
        name: (stretch["from"], stretch["to"]) for name, stretch in batch["questions"].items()
    }
    inquiry = Inquiry(
        side=asked["side"],
        suite=load_suite(restore(task["config"]).suite),
        settings=HarnessSettings(**asked["settings"]),
        directory=Path(task["directory"]),
        request_cache=Path(asked["request_cache"]),
        stall_s=asked["stall_s"],
        batch=Batch(questions=questions, repeat=batch["repeat"]),
    )
    if inquiry.is_answered():
        return
    session = _open(task, node)
    try:
        node.tools.ask(inquiry, session, node.world, node.progress, lambda: None)
    except Failure:
        session.check(inquiry.side)  # what a dying server did to the harness is the server's
        raise
    finally:
        session.close()


def _open(task: Mapping[str, Any], node: Node) -> EngineSession:
    """Open the engine of a task on the node.

    Raises:
        Failure: SYSTEMIC when an environment for it is not there.
    """
    opened, config = task["opened"], restore(task["config"])
    engine = Engine(opened["engine"])
    for name in environments_of(engine, node.world.machine.device):
        check_environment(node.world, name)
    sides = Sides(**{side: Path(path) for side, path in opened["sides"].items()})
    session = node.tools.open_session(engine, sides, config, opened["max_length"])
    if opened["one_at_a_time"]:
        session.narrow()
    return session


TASKS: Mapping[str, Callable[[Mapping[str, Any], Node], Any]] = {
    "worker": _run_worker,
    "canary": _answer_canary,
    "evaluation": _evaluate,
}
