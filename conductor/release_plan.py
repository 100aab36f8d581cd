"""What a release would do, before it does it: stages, reasons, sizes, questions and commands.

For ``--plan-only``. Commands and requests come from the functions that a release itself calls, so
the plan cannot say one thing and the release do another. Invariant: nothing is written, started or
downloaded, not even a directory made.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conductor import quantizers
from conductor.chain import EVERY_STEP, STAGES, Stage, State, Steps
from conductor.cluster.files import SUBMITTED
from conductor.compatibility import Engine
from conductor.config import Config
from conductor.engines.opening import longest_request, planned_settings, server_settings
from conductor.engines.vllm import server_command, server_environ
from conductor.evaluation import harness_settings
from conductor.executors.environ import on_path, worker_environ
from conductor.executors.local import Worker
from conductor.harnesses.lm_eval import HARNESS_ENVIRON, evaluation_request
from conductor.history import History
from conductor.inputs import Change
from conductor.probes.checkpoint import ProbeError, predict_bytes
from conductor.probes.machine import free_disk_bytes
from conductor.redaction import redact_document
from conductor.release_state import Plan
from conductor.repair import attempt_dir
from conductor.stages import DISK_RESERVE_BYTES, first_batch_of, quantize_request
from conductor.world import World

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conductor.baseline_cache import Row
    from conductor.digests import Digests

SIDE_OF: Mapping[Stage, str] = {
    Stage.BASELINE_EVAL: "source",
    Stage.CANDIDATE_EVAL: "candidate",
}
ANY_PORT = 0
"""Stands in a command for a port that is chosen when the server starts."""
DRAWN_KEY = "drawn when it starts"

ACTIONS: Mapping[str, str] = {
    "run": "run",
    "continue": "go on",
    "keep": "keep",
    "remembered": "from cache",
    "leave": "leave",
}
"""What stages do, in words for people."""

Document = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Past:
    """What an earlier part of the release left, as its journal and its files tell today.

    ``changes`` are what is not as it was; ``damaged`` says of stages, in sentences, which of their
    recorded files are not what they were.
    """

    history: History
    changes: Sequence[Change] = ()
    damaged: Mapping[Stage, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What becomes of one stage, why, and in which directory."""

    stage: Stage
    action: str
    reason: str
    directory: Path

    @property
    def is_done_now(self) -> bool:
        """True when tools of this stage are started."""
        return self.action in ("run", "continue")

    def document(self) -> dict[str, Any]:
        """The step as a JSON mapping."""
        return {
            "stage": self.stage,
            "action": self.action,
            "reason": self.reason,
            "directory": str(self.directory),
        }


def plan_document(
    config: Config,
    plan: Plan,
    world: World,
    run_dir: Path,
    *,
    steps: Steps = EVERY_STEP,
    past: Past | None = None,
    baseline: Sequence[Row] | None = None,
) -> dict[str, Any]:
    """Return what a release would do (schema ``release_plan.json``).

    Args:
        config: what is asked for now.
        plan: what setup resolves it to; its model need not be on disk.
        world: this machine, or the cluster.
        run_dir: of the release, which need not exist.
        steps: the stretch of the chain that is asked for.
        past: what is there of it, for a release that is resumed.
        baseline: what :func:`look_into_cache` found; None where the cache is not to be used.
    """
    decided = list(_decide(run_dir, steps, past, baseline))
    return {
        "run": str(run_dir),
        "model": {
            "requested": plan.model.requested,
            "path": str(plan.model.path),
            "revision": plan.model.revision,
            "architecture": plan.model.architecture,
            "on_disk": plan.model.path.is_dir(),
        },
        "recipe": {
            "name": plan.recipe.name,
            "quantizer": plan.row.quantizer,
            "summary": plan.recipe.summary,
        },
        "suite": {"name": plan.suite.name, "path": str(plan.suite.path)},
        "engine": {
            "name": plan.row.engine,
            "device": plan.row.device,
            "emulated": plan.row.emulated,
        },
        "changes": [
            {
                "field": change.field,
                "was": change.was,
                "now": change.now,
                "invalidates": list(change.invalidates),
            }
            for change in (past.changes if past else ())
        ],
        "cluster": world.cluster and {"name": world.cluster.name, "file": str(world.cluster.file)},
        "stages": [step.document() | {"resources": _resources(step, world)} for step in decided],
        "sizes": _sizes(config, plan),
        "questions": _questions(config, plan, decided),
        "commands": [
            command
            for step in decided
            if step.is_done_now
            for command in _commands(step, config, plan, world, run_dir)
        ],
    }


def _resources(step: Step, world: World) -> dict[str, Any] | None:
    """Return what the jobs of a stage ask for; None where none are submitted."""
    if world.cluster is None or not step.is_done_now or step.stage not in SUBMITTED:
        return None
    resources: dict[str, Any] = redact_document(world.cluster.resources[step.stage].document())
    return resources


def look_into_cache(config: Config, plan: Plan, world: World, digests: Digests) -> list[Row] | None:
    """Return the remembered evaluations of the source that are nearest to what would be asked.

    None where none would be used: ``fresh_baseline``, a rehearsal, or a model that is not on disk.

    Raises:
        OSError: a file of the model or the suite cannot be read.
    """
    from conductor.baseline_cache import BaselineCache, baseline_key

    if config.fresh_baseline or config.dry_run or not plan.model.path.is_dir():
        return None
    longest = longest_request(plan.suite, plan.model)
    row = plan.row
    settings = planned_settings(config, row.engine, row.device, longest, world.serving_nodes)
    batch = first_batch_of(config, plan.suite)
    key = baseline_key(config, plan, world, settings, batch, digests)
    return BaselineCache(config.workspace / "cache" / "baseline").explain(key)


def plan_report(document: Document) -> RenderableType:
    """Return a release plan for people."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    stages = Table("stage", "", box=None, pad_edge=False)
    stages.add_column("why", overflow="fold")
    for step in document["stages"]:
        stages.add_row(step["stage"], ACTIONS[step["action"]], escape(step["reason"]))
    lines = [
        *_what_words(document),
        *_size_words(document),
        *_question_words(document),
        *_job_words(document),
    ]
    drift = [
        f"changed: {change['field']} was {change['was']!r}, is {change['now']!r}"
        for change in document["changes"]
    ]
    commands = [
        line
        for command in document["commands"]
        for line in (f"# {command['stage']}: {command['what']}", shlex.join(command["command"]))
    ]
    parts = [
        *lines,
        *drift,
        "",
        *([_commands_words(document)] if commands else []),
        *commands,
    ]
    return Group(stages, "", *(escape(part) for part in parts))


def _what_words(document: Document) -> Iterator[str]:
    model, engine = document["model"], document["engine"]
    where = model["path"] if model["on_disk"] else "not on this disk, would be downloaded"
    emulated = ", emulated" if engine["emulated"] else ""
    yield f"Model: {model['requested']} ({model['architecture']}), {where}"
    yield (
        f"Recipe: {document['recipe']['name']} by {document['recipe']['quantizer']}; answers by "
        f"{engine['name']} on {engine['device']}{emulated}; suite {document['suite']['name']}"
    )


def _size_words(document: Document) -> Iterator[str]:
    sizes = document["sizes"]
    low, high = (_size(each) for each in sizes["checkpoint_bytes"])
    expected = low if low == high else f"{low} to {high}"
    yield (
        f"Sizes: source {_size(sizes['source_bytes'])}, candidate {expected} (from "
        f"{sizes['basis']}); room needed {_size(sizes['needed_bytes'])}, free "
        f"{_size(sizes['free_bytes'])}"
    )
    if sizes["download_bytes"]:
        yield f"Download: {_size(sizes['download_bytes'])}"


def _question_words(document: Document) -> Iterator[str]:
    questions = document["questions"]
    if not questions["sides"]:
        yield "Questions: none"
        return
    names = " and ".join(questions["sides"])
    if questions["total"] is None:
        unknown = [row["task"] for row in questions["tasks"] if row["least"] is None]
        yield f"Questions to {names}: not known for {', '.join(unknown)}"
        return
    low, high = questions["total"]
    count = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    yield f"Questions to {names}: {count} over {len(questions['tasks'])} tasks"


def _job_words(document: Document) -> Iterator[str]:
    """Say where each stage runs that is given to a cluster, and what its jobs ask for."""
    cluster = document["cluster"]
    if cluster is None:
        return
    yield f"Jobs of cluster {cluster['name']} ({cluster['file']}):"
    for step in document["stages"]:
        if step["resources"] is not None:
            asked = "; ".join(
                f"{name} {_listed(value)}"
                for name, value in step["resources"].items()
                if value not in (None, [], (), {})
            )
            yield f"  {step['stage']}: {asked}"


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={each}" for name, each in value.items())
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def _commands_words(document: Document) -> str:
    where = f", on nodes of cluster {document['cluster']['name']}" if document["cluster"] else ""
    return f"Commands, in this order{where} (their variables and requests: --json):"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def _decide(
    run_dir: Path, steps: Steps, past: Past | None, baseline: Sequence[Row] | None
) -> Iterator[Step]:
    """Say of each stage what becomes of it; once one runs, all later ones do."""
    void: str | None = None
    last = STAGES.index(steps.last or Stage.CLOSEOUT)
    for number, stage in enumerate(STAGES):
        attempts, action, reason = 0, "run", "a new release"
        if past is not None:
            attempts = past.history.stages[stage].attempts
            void = void or _why_void(stage, steps, past)
            action, reason = _on_resume(stage, past, void)
            if action == "run" and void is None and stage is not Stage.SETUP:
                void = f"{stage} runs"
        if number > last:
            action, reason = "leave", f"only the stages up to {steps.last} are asked for"
        if stage is Stage.BASELINE_EVAL and action in ("run", "continue"):
            action, reason = _from_cache(action, reason, baseline)
        attempt = attempts + 1 if action == "run" else max(attempts, 1)
        yield Step(
            stage=stage,
            action=action,
            reason=reason,
            directory=attempt_dir(run_dir, stage, attempt),
        )


def _why_void(stage: Stage, steps: Steps, past: Past) -> str | None:
    """Say why what ``stage`` left is of no use; None where nothing speaks against it."""
    if stage is steps.first:
        return f"everything from {stage} on is asked for again"
    changed = [change.field for change in past.changes if stage in change.invalidates]
    if changed:
        return f"{', '.join(changed)} changed"
    return "; ".join(past.damaged.get(stage, ())) or None


def _on_resume(stage: Stage, past: Past, void: str | None) -> tuple[str, str]:
    record, decision = past.history.stages[stage], past.history.outcome.get("decision")
    if void is not None:
        return "run", void
    if stage is Stage.SETUP and past.changes and record.state is State.DONE:
        return "run", "what the release depends on changed"
    match record.state:
        case State.DONE:
            count = len(record.outputs or {})
            files = f", and its {count} files are what they were" if count else ""
            return "keep", f"done before{files}"
        case State.RUNNING:
            return "continue", "was cut off; what it has is kept where its tool can go on"
        case State.FAILED if decision:
            return "keep", f"failed, which is why the decision is {decision}"
        case State.FAILED:
            return "run", f"failed before ({record.failure_class}); gets another attempt"
        case State.PENDING if decision:
            return "leave", f"not needed for the decision, {decision}"
        case State.PENDING:
            return "run", "not done yet"


def _from_cache(action: str, reason: str, rows: Sequence[Row] | None) -> tuple[str, str]:
    """Say what the cache makes of evaluating the source; ``rows`` are its nearest entries."""
    if rows is None:
        return action, reason
    if not rows:
        return action, f"{reason}; this workspace remembers no answers of another release"
    nearest = rows[0]
    if not nearest.differences and not nearest.damage:
        return "remembered", (
            f"the same was asked under the same conditions by {nearest.run_id}, {nearest.created}"
        )
    why_not = "; ".join(nearest.damage) or ", ".join(each.field for each in nearest.differences)
    verb = "is damaged" if nearest.damage else "differs"
    return action, f"{reason}; what {nearest.run_id} was answered {verb}: {why_not}"


def _sizes(config: Config, plan: Plan) -> dict[str, Any]:
    source = plan.model.weights_bytes
    on_disk = plan.model.path.is_dir()
    expected, basis = _expected_bytes(plan)
    return {
        "source_bytes": source,
        "checkpoint_bytes": expected,
        "basis": basis,
        "needed_bytes": 2 * source + DISK_RESERVE_BYTES,
        "free_bytes": free_disk_bytes(config.workspace),
        "download_bytes": 0 if on_disk else source,
    }


def _expected_bytes(plan: Plan) -> tuple[list[int], str]:
    """Predict the candidate's size from the source's headers, or from bits per weight alone."""
    if plan.model.path.is_dir():
        try:
            return predict_bytes(plan.model.path, plan.recipe), "the source's headers"
        except ProbeError:
            pass  # a source that cannot be read is refused by setup, and its size is no matter here
    bits = plan.recipe.weight_bits
    least = round(plan.model.weights_bytes * bits / 16)
    return [least, plan.model.weights_bytes], (
        f"{bits:g} bits a weight for all or none of a source in 16 bits, by the size of its files"
    )


def _questions(config: Config, plan: Plan, steps: Sequence[Step]) -> dict[str, Any]:
    tasks = [_task_questions(config, task.name, task.samples) for task in plan.suite.tasks.values()]
    sides = [SIDE_OF[step.stage] for step in steps if step.stage in SIDE_OF and step.is_done_now]
    known = [row for row in tasks if row["least"] is not None and row["most"] is not None]
    total = None
    if len(known) == len(tasks):
        total = [len(sides) * sum(row[bound] for row in known) for bound in ("least", "most")]
    return {"tasks": tasks, "sides": sides, "total": total}


def _task_questions(config: Config, name: str, size: int | None) -> dict[str, Any]:
    bounds = [each for each in (size, config.max_samples, config.limit) if each is not None]
    most = min(bounds) if size is not None else None
    least = most
    if config.until_decided and most is not None:
        least = min(config.first_batch, most)
    return {"task": name, "least": least, "most": most, "size": size}


def _commands(
    step: Step, config: Config, plan: Plan, world: World, run_dir: Path
) -> Iterator[dict[str, Any]]:
    match step.stage:
        case Stage.PTQ:
            yield _quantizing(step, config, plan, world, run_dir)
        case Stage.DEPLOY if plan.row.engine is Engine.VLLM:
            for side in ("candidate", "source"):
                yield _serving(step, side, config, plan, world, run_dir)
        case Stage.DEPLOY:
            yield _worker(
                step,
                "let both answer the canary's prompts",
                Worker(
                    script="answer_prompts.py",
                    interpreter=world.environments.interpreter("reference"),
                ),
                step.directory,
                worker_environ(world.environ, offline=True),
                None,
                world,
            )
        case Stage.BASELINE_EVAL | Stage.CANDIDATE_EVAL:
            yield _evaluating(step, config, plan, world)
        case Stage.SETUP | Stage.COMPARE | Stage.CLOSEOUT:
            pass  # nothing is started for these


def _quantizing(
    step: Step, config: Config, plan: Plan, world: World, run_dir: Path
) -> dict[str, Any]:
    checkpoint = run_dir / "checkpoint"
    request = quantize_request(plan.quantize_request, plan.model, checkpoint, config.seed, world)
    offline = request["calibration"]["dataset"] is None
    return _worker(
        step,
        f"quantize with {plan.row.quantizer}",
        Worker(
            script=quantizers.WORKERS[plan.row.quantizer],
            interpreter=world.environments.interpreter("quantize"),
        ),
        step.directory,
        worker_environ(world.environ, offline=offline),
        request,
        world,
    )


def _serving(
    step: Step, side: str, config: Config, plan: Plan, world: World, run_dir: Path
) -> dict[str, Any]:
    device = world.machine.device
    interpreter = world.environments.interpreter(f"serve-{device}")
    settings = server_settings(config, device, longest_request(plan.suite, plan.model))
    environ = on_path(worker_environ(world.environ, offline=True), interpreter)
    return {
        "stage": step.stage,
        "what": f"serve the {side}, which stays for its evaluation where there is room for both"
        + ("" if config.engine.port else "; port 0 stands for a free one"),
        "command": server_command(
            interpreter,
            settings,
            checkpoint=plan.model.path if side == "source" else run_dir / "checkpoint",
            served_name=side,
            port=config.engine.port or ANY_PORT,
        ),
        "environ": _own(server_environ(environ, settings, DRAWN_KEY), world),
        "request": None,
    }


def _evaluating(step: Step, config: Config, plan: Plan, world: World) -> dict[str, Any]:
    side = SIDE_OF[step.stage]
    directory = step.directory / "round-1" / side if config.until_decided else step.directory
    in_process = plan.row.engine is Engine.TRANSFORMERS
    request = evaluation_request(
        plan.suite,
        harness_settings(config, plan.suite, plan.model),
        first_batch_of(config, plan.suite),
        output_dir=directory / "results",
        request_cache=step.directory / "requests",
    )
    return _worker(
        step,
        f"ask the {side}" + (", and so on in growing batches" if config.until_decided else ""),
        Worker(
            script="evaluate.py",
            interpreter=world.environments.interpreter("reference" if in_process else "evaluate"),
        ),
        directory,
        {**worker_environ(world.environ, offline=plan.suite.is_local), **HARNESS_ENVIRON},
        request,
        world,
    )


def _worker(
    step: Step,
    what: str,
    worker: Worker,
    directory: Path,
    environ: Mapping[str, str],
    request: Mapping[str, Any] | None,
    world: World,
) -> dict[str, Any]:
    return {
        "stage": step.stage,
        "what": what,
        "command": [*worker.command, str(directory)],
        "environ": _own(on_path(environ, worker.interpreter), world),
        "request": request and dict(request),
    }


def _own(environ: Mapping[str, str], world: World) -> dict[str, str]:
    """Return the variables that differ from those of day0 itself."""
    return {name: value for name, value in environ.items() if world.environ.get(name) != value}
