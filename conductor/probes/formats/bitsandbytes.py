"""bitsandbytes exports: 4-bit numbers of a table, or 8-bit integers with a scale per row.

The 4-bit weight [rows, columns] is one run of numbers, row after row, two in a byte with the first
in the high nibble, and one scale (``weight.absmax``) for every 64 of them. Its shape, the size of
its blocks and the like are JSON in the bytes of ``weight.quant_state.bitsandbytes__nf4``, so that
headers show no more than the count. With nested quantization the scales are bytes that stand for
numbers of a second table, times a scale for every 256 of them, plus an offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from conductor.probes.formats.exclusions import excluder
from conductor.probes.formats.layout import UNDECLARED, Fetch, Format, Layout, Parts, Scheme
from conductor.probes.formats.scaled import INTEGER8, Scaled
from conductor.probes.safetensors_header import Tensor

if TYPE_CHECKING:
    from conductor.probes.formats.layout import Values
    from conductor.probes.formats.numerics import Stored

BLOCK = 64

_STEPS = 4096
"""Steps from 0 to 1 in which the nearest of a table's numbers is looked up: of two that are as near
to within one step, either will do."""

_LEVELS, _NESTED_LEVELS = 16, 256

_ABSMAX, _MAP = "weight.absmax", "weight.quant_map"
_NESTED_ABSMAX, _NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
_STATE = "weight.quant_state.bitsandbytes__"

_TABLE_TOLERANCE = 1e-3
"""How far a stored number of a table may lie from the table's; neighbours are 0.005 apart."""

_FORMAT, _ROW_BY_ROW = "weight_format", 0

_STORED_BYTES: Mapping[str, int] = {"U8": 1, "BF16": 2, "F32": 4}
"""Types that the bytes may be dressed in (``bnb_4bit_quant_storage``), and how many one takes."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """What the JSON beside a weight says."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float
    kind: str
    nested: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class FourBit(Layout):
    """One of the two tables of 16 numbers between -1 and 1: ``nf4`` or ``fp4``."""

    precision: str
    levels: tuple[float, ...]

    part_names = frozenset(
        {"weight", "bias", _ABSMAX, _MAP, _NESTED_ABSMAX, _NESTED_MAP}
        | {_STATE + name for name in ("nf4", "fp4")}
    )

    @property
    def state_part(self) -> str:
        """Return the part that holds the JSON."""
        return _STATE + self.precision.lower()

    def shape(self, parts: Parts) -> None:
        """Return nothing: headers do not show it."""
        return

    def holds(self, parts: Parts, shape: tuple[int, int]) -> bool:
        """Tell whether these tensors are as many 4-bit numbers as a linear of ``shape`` has."""
        weight = parts.get("weight")
        if weight is None or weight.dtype not in _STORED_BYTES or 1 not in weight.shape[:2]:
            return False
        if any(name.startswith(_STATE) and name != self.state_part for name in parts):
            return False
        is_told = weight.dtype == "U8" or self.state_part in parts
        stored = math.prod(weight.shape) * _STORED_BYTES[weight.dtype]
        return is_told and len(weight.shape) == 2 and stored == math.ceil(math.prod(shape) / 2)

    def group_size(self, parts: Parts, shape: tuple[int, int]) -> int | None:
        """Return the numbers per scale, a power of two; a block may go on in the next row."""
        return _block(parts)

    def missing(self, parts: Parts, scheme: Scheme) -> tuple[str, ...]:
        """Return the parts absent without which the numbers mean nothing."""
        needed = [_ABSMAX, _MAP, self.state_part]
        if _is_nested(parts):
            needed += [_NESTED_ABSMAX, _NESTED_MAP]
        return tuple(name for name in needed if name not in parts)

    def scales(self, parts: Parts) -> tuple[str, ...]:
        """Return the scales that are stored as numbers."""
        name = _NESTED_ABSMAX if _is_nested(parts) else _ABSMAX
        return (name,) if name in parts else ()

    def read(self, parts: Parts, fetch: Fetch, rows: slice, columns: slice) -> Values:
        """Return a block of the dequantized matrix.

        Raises:
            ValueError: the JSON beside the weight cannot be read or contradicts the tensors.
        """
        import numpy as np

        state = _state(fetch(self.state_part), self.state_part, parts)
        if state.kind != self.precision.lower():
            raise ValueError(f"{self.state_part} says quant_type {state.kind}")
        first_row, last_row, _ = rows.indices(state.shape[0])
        first, last = first_row * state.shape[1], last_row * state.shape[1]
        stored = _bytes(parts["weight"], fetch, first // 2, math.ceil(last / 2))
        codes = np.stack([stored >> 4, stored & 0xF], axis=1).reshape(-1)
        codes = codes[first % 2 :][: last - first]
        table = fetch(_MAP).reshape(-1)
        if table.size != _LEVELS:
            raise ValueError(f"{_MAP} holds {table.size} numbers, not {_LEVELS}")
        distances = np.abs(np.sort(table) - np.sort(self.levels))
        if not (distances <= _TABLE_TOLERANCE).all():
            raise ValueError(f"{_MAP} does not hold the numbers of {self.precision}")
        scales = _scales(parts, fetch, first // state.block, math.ceil(last / state.block), state)
        spread = np.repeat(scales, state.block)[first % state.block :][: last - first]
        values: Values = (table[codes] * spread).reshape(-1, state.shape[1])
        return values[:, columns]

    def nearest(self, values: Values, parts: Parts, largest: float | None) -> Values:
        """Return a block rounded to nearest: blocks of numbers from its first on."""
        import numpy as np

        block = _block(parts) or BLOCK
        flat = values.reshape(-1)
        padded = np.zeros(math.ceil(flat.size / block) * block, dtype=np.float32)
        padded[: flat.size] = flat
        blocks = padded.reshape(-1, block)
        scales = np.abs(blocks).max(axis=1, keepdims=True)
        scales[scales == 0] = 1
        steps = np.linspace(-1, 1, 2 * _STEPS + 1, dtype=np.float32)
        levels = np.array(sorted(self.levels), dtype=np.float32)
        nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, steps)]
        places = (blocks * (_STEPS / scales) + np.float32(_STEPS + 0.5)).astype(np.int32)
        rounded: Values = (nearest[places] * scales).reshape(-1)
        return rounded[: flat.size].reshape(values.shape)


def _numbers(parts: Parts) -> int:
    """Return how many numbers the bytes of a weight hold."""
    weight = parts["weight"]
    return math.prod(weight.shape) * _STORED_BYTES[weight.dtype] * 2


def _block(parts: Parts) -> int | None:
    """Return the numbers per scale, a power of two."""
    scales = parts.get(_ABSMAX)
    count = math.prod(scales.shape) if scales else 0
    return 1 << max(0, math.ceil(math.log2(_numbers(parts) / count))) if count else None


def _is_nested(parts: Parts) -> bool:
    scales = parts.get(_ABSMAX)
    return _NESTED_ABSMAX in parts or (scales is not None and scales.dtype == "U8")


def _state(stored: Stored, part: str, parts: Parts) -> _State:
    """Return the JSON of a weight.

    Raises:
        ValueError: it cannot be read or contradicts the tensors.
    """
    try:
        facts = json.loads(bytes(stored.tolist()))
        rows, columns = facts["shape"]
        state = _State(
            shape=(int(rows), int(columns)),
            block=int(facts["blocksize"]),
            nested_block=int(facts.get("nested_blocksize", 1)),
            offset=float(facts.get("nested_offset", 0.0)),
            kind=str(facts["quant_type"]),
            nested="nested_offset" in facts,
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{part} holds no JSON with shape, blocksize and quant_type") from None
    fits = _numbers(parts)
    count, scales = math.prod(state.shape), math.prod(parts[_ABSMAX].shape)
    if min(*state.shape, state.block, state.nested_block) < 1 or not 0 <= fits - count <= 1:
        raise ValueError(f"{part} says shape {list(state.shape)}, the weight has {fits} numbers")
    if math.ceil(count / state.block) != scales:
        raise ValueError(f"{part} says blocks of {state.block}, and there are {scales} scales")
    if state.nested != _is_nested(parts):
        says, are = ("", " not") if state.nested else (" not", "")
        raise ValueError(f"{part} says that scales are{says} quantized, and they are{are}")
    return state


def _bytes(weight: Tensor, fetch: Fetch, first: int, last: int) -> Stored:
    """Return some of the bytes of a weight, whatever type they are dressed in."""
    import numpy as np

    size = _STORED_BYTES[weight.dtype]
    part = slice(first // size, math.ceil(last / size))
    lies_down = weight.shape[0] == 1
    stored = fetch("weight", slice(None), part) if lies_down else fetch("weight", part, slice(None))
    stored = np.ascontiguousarray(stored).reshape(-1)
    if size == 2:
        stored = (stored.view(np.uint32) >> 16).astype("<u2")
    return stored.view(np.uint8)[first % size :][: last - first]


def _scales(parts: Parts, fetch: Fetch, first: int, last: int, state: _State) -> Values:
    """Return the scales of some blocks, read from bytes where they are quantized themselves."""
    import numpy as np

    stored: Values = fetch(_ABSMAX).reshape(-1)[first:last]
    if not _is_nested(parts):
        return stored
    whole = fetch(_NESTED_ABSMAX).reshape(-1)
    place = np.arange(first, first + stored.size) // state.nested_block
    if place.size and place[-1] >= whole.size:
        raise ValueError(f"{_NESTED_ABSMAX} holds {whole.size} scales, which are too few")
    table = fetch(_NESTED_MAP).reshape(-1)
    if table.size != _NESTED_LEVELS:
        raise ValueError(f"{_NESTED_MAP} holds {table.size} numbers, not {_NESTED_LEVELS}")
    scales: Values = table[stored] * whole[place] + np.float32(state.offset)
    return scales


def _normal_levels() -> tuple[float, ...]:
    """Return the numbers of NF4: quantiles of a normal distribution, with 0 and both ends.

    Dettmers et al., QLoRA (arXiv 2305.14314), appendix E: eight steps on the positive side and
    seven on the negative one, from the quantile that both sides share to the middle.
    """
    end = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(end + (0.5 - end) * step / 8) for step in range(8)]
    negative = [-quantile(end + (0.5 - end) * step / 7) for step in range(7)]
    largest = max(positive)
    return tuple(value / largest for value in sorted([*positive, 0.0, *negative]))


@dataclass(frozen=True, kw_only=True, eq=False)
class EightBit(Scaled):
    """8-bit integers, and the largest magnitude of each row: 127 stands for it."""

    def read(self, parts: Parts, fetch: Fetch, rows: slice, columns: slice) -> Values:
        """Return a block of the dequantized matrix.

        Raises:
            ValueError: the integers lie in an order made for one kind of GPU.
        """
        if _FORMAT in parts and (order := int(fetch(_FORMAT).reshape(-1)[0])) != _ROW_BY_ROW:
            raise ValueError(f"{_FORMAT} is {order}: the integers do not lie row by row")
        values = super().read(parts, fetch, rows, columns)
        values /= 127
        return values


_HALF_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8, 12, 4, 6, 2, 3))
"""The positive half of bitsandbytes' own 4-bit floating point, in the order of its codes."""

LAYOUTS: tuple[Layout, ...] = (
    FourBit(precision="NF4", levels=_normal_levels()),
    FourBit(precision="FP4", levels=(*_HALF_FP4, *(-value for value in _HALF_FP4))),
    EightBit(precision="INT8", code=INTEGER8, scale="SCB", extra=frozenset({_FORMAT})),
)


def read(
    stated: Mapping[str, Any], beside: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Format:
    """Return the format that ``quantization_config`` declares.

    Without a list of what to skip the loader skips the head.
    """
    skipped = stated.get("llm_int8_skip_modules")
    excludes = excluder(["lm_head"] if skipped is None else skipped)
    scheme = _scheme(stated)
    if scheme is None:
        return Format(
            name="unknown (bitsandbytes that loads in neither 4 nor 8 bits)",
            layouts=LAYOUTS,
            declared=lambda _: UNDECLARED,
            known=False,
        )
    return Format(
        name=f"bitsandbytes {scheme.precision}",
        layouts=LAYOUTS,
        declared=lambda module: UNDECLARED if excludes(module) else scheme,
        problems=_otherwise_nested(stated, tensors),
    )


def _otherwise_nested(stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Say where scales are quantized themselves and declared not to be, or the other way round."""
    declared = stated.get("bnb_4bit_use_double_quant")
    if not any(name.endswith(f".{_ABSMAX}") for name in tensors):
        return ()
    nested = any(name.endswith(f".{_NESTED_ABSMAX}") for name in tensors)
    if not isinstance(declared, bool) or declared == nested:
        return ()
    is_there = "there are" if nested else "there are no"
    return (
        f"config.json quantization_config says bnb_4bit_use_double_quant {json.dumps(declared)}, "
        f"and {is_there} {_NESTED_ABSMAX}",
    )


def _scheme(stated: Mapping[str, Any]) -> Scheme | None:
    if stated.get("load_in_4bit") is True or stated.get("_load_in_4bit") is True:
        return Scheme(precision=str(stated.get("bnb_4bit_quant_type", "fp4")).upper())
    if stated.get("load_in_8bit") is True or stated.get("_load_in_8bit") is True:
        return Scheme(precision="INT8", activations="INT8")
    return None
