"""What llm-compressor calls our recipes: a preset scheme, the layers it is for, and an algorithm.

Verified with llm-compressor 0.13: every row exports on a CPU. Integer and FP8 activations are
quantized per token while serving, so those rows need no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gates import Recipe
from gates.criteria import MODULE_KINDS


@dataclass(frozen=True, kw_only=True)
class Row:
    """A preset scheme, whether activations choose the scales first, and whether text is needed."""

    scheme: str
    awq: bool = False
    calibrated: bool = False


ROWS: Mapping[str, Row] = {
    "nvfp4": Row(scheme="NVFP4", calibrated=True),
    "nvfp4_mlp_only": Row(scheme="NVFP4", calibrated=True),
    "nvfp4_experts_only": Row(scheme="NVFP4", calibrated=True),
    "nvfp4_omlp_only": Row(scheme="NVFP4", calibrated=True),
    "fp8": Row(scheme="FP8_DYNAMIC"),
    "int8": Row(scheme="W8A8"),
    "int4_awq": Row(scheme="W4A16", awq=True, calibrated=True),
    "w4a16": Row(scheme="W4A16"),
    "w4a16_nvfp4": Row(scheme="NVFP4A16"),
    "mxfp4": Row(scheme="MXFP4"),
    "mxfp4_experts_only": Row(scheme="MXFP4"),
}

# Module names as transformers 5 builds them; fused experts are split into these by llm-compressor.
TARGETS: Mapping[str, str] = {
    "attention.qkv": r"re:.*[.](q_proj|k_proj|v_proj|qkv_proj|query_key_value)$",
    "attention.output": (
        r"re:.*[.](self_attn|attn|attention|self_attention)[.](o_proj|out_proj|dense)$"
    ),
    "mlp": (
        r"re:.*[.](mlp|feed_forward|shared_experts?|mixer)"
        r"[.](gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2)$"
    ),
    "experts": r"re:.*[.]experts[.]\d+[.](gate_proj|up_proj|down_proj|w1|w2|w3)$",
}

# Left alone by every recipe, as ModelOpt's presets leave them alone.
IGNORE = (
    r"re:.*lm_head$",
    r"re:.*[.](gate|router|shared_expert_gate)$",
    r"re:.*router[.].*",
    r"re:.*linear_attn[.](in_proj_a|in_proj_b)$",
    r"re:.*(embed_vision|vision_tower|visual|vision_model|multi_modal_projector).*",
    r"re:(.*[.])?mtp[.].*",
)


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's part of the worker's request."""
    row = ROWS[recipe.name]
    every = set(recipe.quantizes) == set(MODULE_KINDS)
    return {
        "scheme": row.scheme,
        "awq": row.awq,
        "targets": ["Linear"] if every else [TARGETS[kind] for kind in recipe.quantizes],
        "ignore": list(IGNORE),
    }
