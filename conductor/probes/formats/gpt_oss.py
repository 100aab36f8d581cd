"""MXFP4 as gpt-oss stores its experts: ``blocks`` of 32 numbers and a power of two for each.

The tensors of a layer hold all its experts: ``gate_up_proj_blocks`` U8 [experts, rows,
columns / 32, 16], the lower number in the low nibble, and ``gate_up_proj_scales`` U8 [experts,
rows, columns / 32], an exponent plus 127. Cut to one expert they are [rows, columns / 2] and
[rows, columns / 32]. Loaders quantize experts only; the list of what is left alone names the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conductor.probes.formats.exclusions import excluder
from conductor.probes.formats.layout import UNDECLARED, Format, Scheme
from conductor.probes.formats.scaled import E8M0_DTYPES, FLOAT4, Scaled
from conductor.probes.safetensors_header import Tensor

GROUP = 32

LAYOUTS = (
    Scaled(
        precision="MXFP4",
        code=FLOAT4,
        weight="blocks",
        scale="scales",
        scale_dtypes=E8M0_DTYPES,
        grouped=True,
    ),
)

_SCHEME = Scheme(precision="MXFP4", group_size=GROUP)


def read(
    stated: Mapping[str, Any], beside: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Format:
    """Return the format that ``quantization_config`` declares."""
    excludes = excluder(stated.get("modules_to_not_convert"))

    def declared(module: str) -> Scheme:
        is_expert = "experts" in module.split(".")
        return _SCHEME if is_expert and not excludes(module) else UNDECLARED

    return Format(name="MXFP4 (gpt-oss)", layouts=LAYOUTS, declared=declared)
