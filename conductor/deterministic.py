"""What ``--deterministic`` pins, and why what it cannot pin stays open: tables and pure functions.

A release that is to be repeatable asks one question at a time, gives every tool one seed, and asks
each for the mode in which it promises the same result for the same input. Invariants:

* A setting of a file gives way to a pin; one of the command line that contradicts it is refused.
* A variable that the caller has set stays as it is, so that a tool which cannot live with a pin can
  be spared it. It is told among what was not pinned.
* A promise that a tool does not make is none: what stays open is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from conductor.compatibility import Device, Engine

if TYPE_CHECKING:
    from conductor.config import Config
    from conductor.probes.machine import Machine
    from conductor.release_state import Plan
    from conductor.world import World

PINNED = "deterministic"
"""Where a setting comes from that was pinned."""

SETTINGS: Mapping[str, Any] = {
    # What else is in a batch changes the last bits of an answer: each question has one of its own.
    "evaluation.concurrency": 1,
    "evaluation.prompts_per_request": 1,
    # Otherwise the load of the machine decides which tools run beside each other.
    "overlap": "never",
}

SERVER_ARGUMENTS = ("--no-enable-prefix-caching",)
"""Further arguments of vLLM: no answer is to depend on which questions came before."""

ASKS_WORKERS = "DAY0_DETERMINISTIC"
"""Has workers ask torch for deterministic algorithms (``workers/determinism.py`` reads it)."""

EXCEPTIONS = "not_deterministic"
"""Under this name a worker's result has the operations for which torch knows no such algorithm."""

BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
BATCH_INVARIANT_VERSIONS = frozenset({"0.32.0"})
"""Versions of vLLM in whose sources the batch-invariant mode was found as it is used here."""
BATCH_INVARIANT_CAPABILITY = (8, 0)
"""Least compute capability for it, by vLLM's documentation of that version."""


@dataclass(frozen=True, kw_only=True)
class Open:
    """Something that was not pinned, and why."""

    what: str
    why: str


def contradictions(values: Mapping[str, tuple[Any, str]], option: str) -> list[str]:
    """Say which settings that come from ``option``, the command line, a deterministic release pins.

    A seed that the server alone is given is refused wherever it comes from.

    ``values`` are settings with their origins, by dotted name.
    """
    found = [
        f"{name}: {values[name][0]} cannot stand beside deterministic, which pins it to {pin}; "
        "leave one of the two out"
        for name, pin in SETTINGS.items()
        if values[name][1] == option and values[name][0] != pin
    ]
    arguments, origin = values["engine.arguments"]
    if any(argument.partition("=")[0] == "--seed" for argument in arguments):
        found.append(
            f"engine.arguments: --seed ({origin}) cannot stand beside deterministic, which gives "
            "every tool one seed; take it out, and give that as seed:"
        )
    return found


def pin_settings(values: Mapping[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """Return settings with their origins as a deterministic release has them."""
    pins = {name: (pin, PINNED) for name, pin in SETTINGS.items() if values[name][0] != pin}
    return {**values, **pins}


def variables(seed: int, machine: Machine, vllm_version: str | None) -> dict[str, str]:
    """Return the environment variables that every worker and server is to have."""
    pins = {ASKS_WORKERS: "1", "PYTHONHASHSEED": str(seed)}
    if machine.device is Device.CUDA:
        # Without it, cuBLAS chooses its workspace anew, and with it how it adds up.
        pins["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if _want_of_batch_invariance(machine, vllm_version) is None:
        pins[BATCH_INVARIANT] = "1"
    return pins


def pin_world(world: World, seed: int, vllm_version: str | None) -> World:
    """Return ``world`` with the variables of a deterministic release, less those that are set."""
    pins = variables(seed, world.machine, vllm_version)
    return replace(world, environ={**pins, **world.environ})


def describe(
    config: Config,
    plan: Plan | None,
    world: World,
    vllm_version: str | None,
    exceptions: Iterable[str],
) -> dict[str, Any]:
    """Return what was pinned and what was not, as a report has it (``deterministic``).

    Args:
        config: the configuration of a deterministic release.
        plan: what setup resolved, or None where it did not get through.
        world: the machine, with the variables that its tools were given.
        vllm_version: the version of the server's package, or None.
        exceptions: operations of which torch said that they are not deterministic.
    """
    wanted = variables(config.seed, world.machine, vllm_version)
    served = plan is not None and plan.row.engine is Engine.VLLM
    pinned = [f"seed {config.seed} of every tool that draws by lot"]
    pinned += [f"{name}: {value}" for name, value in SETTINGS.items()]
    if config.dry_run:
        replayed = Open(what="the tools", why="a dry run: recorded results stood for them")
        return {"pinned": pinned, "not_pinned": [asdict(replayed)]}
    pinned += [f"server {argument}" for argument in SERVER_ARGUMENTS if served]
    pinned += [f"{name}={pin}" for name, pin in wanted.items() if world.environ.get(name) == pin]
    left_open = [
        *_set_by_caller(wanted, world.environ),
        *(_left_open_by_server(world, vllm_version) if served else ()),
        *(_left_open_by_data(plan) if plan is not None else ()),
        *(
            Open(what=each, why="torch has no deterministic algorithm for it")
            for each in exceptions
        ),
        Open(
            what="the machine",
            why="another processor, accelerator or number of cores may add up in another order; "
            "env.json says what this one is",
        ),
    ]
    return {"pinned": pinned, "not_pinned": [asdict(each) for each in left_open]}


def _want_of_batch_invariance(machine: Machine, version: str | None) -> str | None:
    """Say why vLLM cannot be asked for its batch-invariant mode; None where it can."""
    if machine.device is not Device.CUDA:
        return f"vLLM has no batch-invariant mode on this device ({machine.device})"
    if version not in BATCH_INVARIANT_VERSIONS:
        return f"vLLM {version or 'of no known version'} is not known to have such a mode"
    capabilities = [each.compute_capability for each in machine.accelerators]
    if any(each is None or each < BATCH_INVARIANT_CAPABILITY for each in capabilities):
        least = ".".join(map(str, BATCH_INVARIANT_CAPABILITY))
        return f"vLLM's batch-invariant mode needs compute capability {least}"
    return None


def _set_by_caller(wanted: Mapping[str, str], environ: Mapping[str, str]) -> Iterable[Open]:
    for name, pin in wanted.items():
        if environ.get(name) != pin:
            yield Open(
                what=name, why=f"the caller has set it to {environ.get(name)!r}, not {pin!r}"
            )


def _left_open_by_server(world: World, version: str | None) -> Iterable[Open]:
    if why := _want_of_batch_invariance(world.machine, version):
        yield Open(what="the server's kernels", why=f"{why}; each question was asked alone")


def _left_open_by_data(plan: Plan) -> Iterable[Open]:
    if dataset := plan.quantize_request["calibration"]["dataset"]:
        yield Open(what=f"calibration data {dataset}", why="the Hub may have another revision")
    if not plan.suite.is_local:
        yield Open(
            what=f"the data of suite {plan.suite.name}",
            why="the Hub may have another revision; both sides of this release had the same",
        )
