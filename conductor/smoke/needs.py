"""What a scenario needs of the machine, asked of the machine before the scenario starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conductor.compatibility import Device, Engine
from conductor.environments.builder import ENVIRONMENTS, Status
from conductor.failure import unusable

if TYPE_CHECKING:
    from conductor.world import World

ANSWER_S = 5.0
HUB = "https://huggingface.co"

DTYPES: Mapping[str, tuple[int, int]] = {"float32": (0, 0), "float16": (6, 0), "bfloat16": (8, 0)}
"""The compute capability from which vLLM lets a CUDA device compute in a type. Its CPU build takes
all three on x86-64. Source: ``supported_dtypes`` of its platforms, version 0.32."""

Look = Callable[["World", str], str | None]
"""Return why a need is not met, or None when it is; the text is what follows the colon."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """One kind of need: how it is asked for, and how it is looked for."""

    look: Look
    known: tuple[str, ...] | None = None
    """What may follow the colon; None where anything may, empty where nothing."""


def _gpu(world: World, _: str) -> str | None:
    return None if world.machine.device is Device.CUDA else "there is no GPU"


def _engine(world: World, name: str) -> str | None:
    serves = f"serve-{world.machine.device}"
    return _environment(world, serves if name == Engine.VLLM else "reference")


def _environment(world: World, name: str) -> str | None:
    status = world.environments.status(name)
    if status is Status.READY:
        return None
    return f"environment {name} is {status}; run: python -m conductor.environments build {name}"


def _dtype(world: World, name: str) -> str | None:
    for accelerator in world.machine.accelerators:
        if (accelerator.compute_capability or (0, 0)) < DTYPES[name]:
            return f"{accelerator.name} does not compute in {name}"
    return None


def _endpoint(world: World, variable: str) -> str | None:
    url = world.environ.get(variable)
    if not url:
        return f"{variable} is not set; set it to the endpoint's URL"
    return None if _answers(url) else f"nothing answers at the URL in {variable}"


def _network(world: World, _: str) -> str | None:
    url = world.environ.get("HF_ENDPOINT") or HUB
    return None if _answers(url) else f"{url} does not answer"


def _answers(url: str) -> bool:
    """Tell whether anything answers there, with whatever status."""
    import httpx

    try:
        httpx.get(url, timeout=ANSWER_S)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


NEEDS: Mapping[str, Need] = {
    "gpu": Need(look=_gpu, known=()),
    "engine": Need(look=_engine, known=tuple(Engine)),
    "environment": Need(look=_environment, known=tuple(ENVIRONMENTS)),
    "dtype": Need(look=_dtype, known=tuple(DTYPES)),
    "endpoint": Need(look=_endpoint),
    "network": Need(look=_network, known=()),
}
"""By the word before the colon: ``gpu``, ``engine:vllm``, ``endpoint:MY_URL``."""


def check_need(need: str) -> None:
    """Refuse a need that nobody can look for.

    Raises:
        Failure: USER_CONFIG_ERROR, which says what is known.
    """
    kind, _, argument = need.partition(":")
    if kind not in NEEDS:
        raise unusable(f"{kind!r} is not known; known: {', '.join(NEEDS)}")
    known = NEEDS[kind].known
    if known == () and argument:
        raise unusable(f"{kind} takes nothing after it")
    if known is None and not argument.isidentifier():
        raise unusable(f"{kind}:{argument} must name an environment variable")
    if known and argument not in known:
        raise unusable(f"{kind}:{argument} is not known; known: {', '.join(known)}")


def unmet(need: str, world: World) -> str | None:
    """Return why ``need`` is not met on this machine, or None when it is."""
    kind, _, argument = need.partition(":")
    return NEEDS[kind].look(world, argument)
