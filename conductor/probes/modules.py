"""Which parts of a model a tensor belongs to, told from its name and shape alone.

What a recipe means is computed from the source's own linear modules, never from the list that an
exporter wrote: that list names whatever ended up unquantized, and so can not show a layer missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from conductor.probes.safetensors_header import Tensor
from gates.criteria import UNKNOWN_KIND

OTHER = "other"
"""Kind of a matrix outside the decoder layers that no rule names; recipes leave it alone."""

_PLACE_RULES = (
    (
        "vision",
        r"(^|\.)(visual|vision|vision_\w+|vit|vpm|image_\w+|audio_\w+|speech_\w+|embed_vision"
        r"|embed_audio|\w*multi_modal_projector|mm_projector)\.",
    ),
    ("mtp", r"(^|\.)(mtp|nextn|eagle)\w*\."),
    ("lm_head", r"(^|\.)(lm_head|embed_out|output_layer)$"),
    ("embeddings", r"(^|[._])(embed\w*|embeddings|wte|wpe)$"),
)
"""Parts that every recipe leaves alone, wherever they lie in the model."""

_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?)\.N\.")
"""A decoder layer in a name whose numbers are written N."""

_LAYER_RULES = (
    ("router", r"\.(gate|router|shared_expert_gate)(\.\w+)?$"),
    ("experts", r"\.experts\.(N\.)?\w+$"),
    ("small", r"\.(linear_attn\.in_proj_(a|b|ba)|\w*conv1d)$"),
    ("norm", r"\.\w*norm\d*$"),
    (
        "mlp",
        r"\.(gate_proj|up_proj|down_proj|gate_up_proj|fc\d|fc_in|fc_out|w[123]|c_fc|linear_fc\d"
        r"|dense_h_to_4h|dense_4h_to_h)$",
    ),
    ("attention.qkv", r"\.(linear_attn|mamba)\."),
    (
        "attention.output",
        r"\.(\w*attn|\w*attention|mixer)\.(\w+\.)*(o_proj|wo|to_out|dense|c_proj|proj)$",
    ),
    ("attention.output", r"\.(\w*attn|\w*attention)\.out_proj$"),
    ("attention.qkv", r"\.(\w*attn|\w*attention|mixer)\."),
    ("mlp", r"\.(mlp|ffn|feed_forward|block_sparse_moe|moe|shared_experts?)\."),
)
"""Parts of a decoder layer, first match wins.

The tiny gates of gated linear attention and convolutions are left alone, as the quantizers'
presets do, and so are norms, which are matrices where each head has its own. Linear attention and
state-space projections count with ``attention.qkv``: recipes that single out the output projection
mean that of softmax attention. What no rule names is of a kind unknown.
"""

_PLACES = tuple((kind, re.compile(rule)) for kind, rule in _PLACE_RULES)
_PARTS = tuple((kind, re.compile(rule)) for kind, rule in _LAYER_RULES)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_FUSED_EXPERTS = re.compile(r"\.experts\.\w+(?<!_bias)$")
FUSED_PROJECTIONS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that one fused tensor holds; others hold the one they are named after."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One weight matrix of the source, or the fused matrices of all experts of a layer.

    ``tensor`` is the source's tensor; for fused experts [experts, rows, columns] or
    [experts, columns, rows]. ``layers`` counts the linears in it: experts times projections.
    """

    module: str
    kind: str
    tensor: Tensor
    layers: int = 1

    @property
    def fused(self) -> bool:
        """Tell whether this is a tensor of all experts."""
        return len(self.tensor.shape) == 3


def linears(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[Linear]:
    """Yield every weight matrix of a source: 2-D ``.weight`` tensors and fused 3-D experts."""
    layer_count = _layer_count(config)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            yield Linear(module=module, kind=kind_of(module, layer_count), tensor=tensor)
        elif len(tensor.shape) == 3 and _FUSED_EXPERTS.search(name):
            projections = FUSED_PROJECTIONS.get(name.rpartition(".")[2], ("",))
            yield Linear(
                module=name,
                kind=kind_of(name, layer_count),
                tensor=tensor,
                layers=tensor.shape[0] * len(projections),
            )


def kind_of(module: str, layer_count: int | None = None) -> str:
    """Return the kind of a module; layers beyond ``layer_count`` predict further tokens."""
    kind = _kind_of_pattern(_NUMBER.sub("N", module))
    number = _LAYER_NUMBER.search(module)
    if layer_count is not None and number and kind != "vision":
        return "mtp" if int(number[1]) >= layer_count else kind
    return kind


@lru_cache(maxsize=4096)
def _kind_of_pattern(pattern: str) -> str:
    for kind, rule in _PLACES:
        if rule.search(pattern):
            return kind
    if _LAYER.search(pattern):
        for kind, rule in _PARTS:
            if rule.search(pattern):
                return kind
        return UNKNOWN_KIND
    return OTHER


def _layer_count(config: Mapping[str, Any]) -> int | None:
    """Return the number of decoder layers, also of a model whose text part is nested."""
    for part in (config, config.get("text_config")):
        count = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        if type(count) is int:
            return count
    return None
