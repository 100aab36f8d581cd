"""What NVIDIA ModelOpt calls our recipes: the presets that its wheel ships.

Verified with ModelOpt 0.47: every row exports on a CPU. The presets leave lm_head, routers, vision
towers and multi-token-prediction heads alone by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gates import Recipe


@dataclass(frozen=True, kw_only=True)
class Row:
    """A preset's name, and whether it runs text through the model."""

    preset: str
    calibrated: bool = True


ROWS: Mapping[str, Row] = {
    "nvfp4": Row(preset="nvfp4"),
    "nvfp4_mlp_only": Row(preset="nvfp4_mlp_only"),
    "nvfp4_experts_only": Row(preset="nvfp4_experts_only"),
    "nvfp4_omlp_only": Row(preset="nvfp4_omlp_only"),
    "fp8": Row(preset="fp8"),
    "int8": Row(preset="int8"),
    "int4_awq": Row(preset="int4_awq"),
    "w4a16": Row(preset="int4_blockwise_weight_only", calibrated=False),
    "w4a16_nvfp4": Row(preset="w4a16_nvfp4"),
    "mxfp4": Row(preset="mxfp4", calibrated=False),
}


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's part of the worker's request."""
    return {"scheme": ROWS[recipe.name].preset}
