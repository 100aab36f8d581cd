"""8-bit floating point as Hugging Face configurations declare it: ``fp8`` and ``fbgemm_fp8``.

Weights are E4M3. In the manner of DeepSeek one scale is for a block of 128 by 128, and a tensor
``weight_scale_inv`` holds what weights are multiplied with, whatever its name says; blocks at the
end of a matrix may be smaller. Without blocks there is one scale for the matrix or, ``fbgemm_fp8``,
one for each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conductor.probes.formats.exclusions import excluder
from conductor.probes.formats.layout import FLOAT_DTYPES, UNDECLARED, Format, Layout, Parts, Scheme
from conductor.probes.formats.scaled import FLOAT8, Scaled
from conductor.probes.safetensors_header import Tensor

BLOCK = (128, 128)

_INVERSE = "weight_scale_inv"
_SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0")
_CACHE_PARTS = frozenset({"k_scale", "v_scale", "q_scale", "prob_scale"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8(Scaled):
    """E4M3 with a scale for every ``block`` (rows, columns); without: for the matrix, or a row."""

    block: tuple[int, int] | None = BLOCK

    def shape(self, parts: Parts) -> tuple[int, int] | None:
        """Return the shape of the linear, where its scales are as the block says."""
        shape = super().shape(parts)
        return shape if shape and self._is_divided(parts, shape) else None

    def holds(self, parts: Parts, shape: tuple[int, int]) -> bool:
        """Tell whether these tensors are a linear of ``shape`` with scales as the block says."""
        return super().holds(parts, shape) and self._is_divided(parts, shape)

    def _is_divided(self, parts: Parts, shape: tuple[int, int]) -> bool:
        scale = parts.get(self.scale)
        if scale is None:
            return True
        if self.block:
            return scale.shape == _grid(shape, self.block)
        return math.prod(scale.shape) == 1 or scale.shape in ((shape[0],), (shape[0], 1))


def _layout(block: tuple[int, int] | None, scale: str, input_scale: str) -> Layout:
    return Fp8(
        precision="FP8",
        code=FLOAT8,
        block=block,
        scale=scale,
        scale_dtypes=_SCALE_DTYPES,
        input_scale=input_scale,
        step=BLOCK,
        extra=frozenset({"input_scale_ub"}),
    )


LAYOUTS = (_layout(BLOCK, _INVERSE, "activation_scale"),)


def read(
    stated: Mapping[str, Any], beside: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Format:
    """Return the format that ``quantization_config`` declares.

    Scales are called ``weight_scale_inv`` with blocks, and without them in the checkpoints of some
    publishers; the tensors tell. Engines never quantize the head.
    """
    block = _block(stated.get("weight_block_size"))
    if block == ():
        return Format(
            name=f"unknown (fp8 with weight_block_size {stated['weight_block_size']!r})",
            layouts=LAYOUTS,
            declared=lambda _: UNDECLARED,
            known=False,
        )
    inverse = block or any(name.endswith(f".{_INVERSE}") for name in tensors)
    scale = _INVERSE if inverse else "weight_scale"
    own_input = any(name.endswith(".activation_scale") for name in tensors)
    excludes = excluder(stated.get("modules_to_not_convert") or stated.get("ignored_layers"))
    scheme = Scheme(
        precision="FP8", activations="FP8", static=stated.get("activation_scheme") == "static"
    )

    def declared(module: str) -> Scheme:
        is_head = module.rpartition(".")[2] == "lm_head"
        return UNDECLARED if is_head or excludes(module) else scheme

    return Format(
        name="FP8" + (f" in blocks of {block[0]} by {block[1]}" if block else ""),
        layouts=(_layout(block or None, scale, _input_scale(own_input)),),
        declared=declared,
        problems=_otherwise_divided(block, tensors),
        kv_cache="FP8" if stated.get("kv_cache_scheme") else None,
        extra_parts=_CACHE_PARTS,
    )


def _otherwise_divided(
    block: tuple[int, ...] | None, tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Say where there are not as many scales as the declared block has, with the first of them."""
    if not block:
        return ()
    found = []
    for name, scale in tensors.items():
        module, _, part = name.rpartition(".")
        weight = tensors.get(f"{module}.weight") if part == _INVERSE else None
        if weight and len(weight.shape) == 2 and scale.shape != _grid(weight.shape, block):
            found.append(f"{name} {list(scale.shape)} of {list(weight.shape)}")
    more = f" and {len(found) - 1} more" if found[1:] else ""
    declares = f"config.json quantization_config declares weight_block_size {list(block)}"
    return (f"{declares}: {found[0]}{more}",) if found else ()


def _grid(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix."""
    return tuple(math.ceil(size / part) for size, part in zip(shape, block, strict=True))


def _input_scale(own: bool) -> str:
    return "activation_scale" if own else "input_scale"


def _block(value: Any) -> tuple[int, int] | tuple[()] | None:
    """Return the rows and columns of a block, ``None`` for none, nothing for what is no block."""
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    return ()
