"""Which part of a model a module is, told from its name alone.

What a recipe means is computed from the source's own linear modules, never from the list that an
exporter wrote: that list names whatever ended up unquantized, and so can not show a layer missed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gates.criteria import MODULE_KINDS, UNKNOWN_KIND

OTHER = "other"
"""Kind of what lies outside the decoder layers and no rule names, or is no matrix."""

HEADS = ("lm_head", "embed_out", "output_layer")
"""Names of the head: the first in most models, the others in tensors of GPT-NeoX and Megatron."""

_PLACE_RULES = (
    (
        "vision",
        r"(^|\.)(visual|vision|vision_\w+|vit|vpm|image_\w+|embed_vision"
        r"|\w*multi_modal_projector|mm_projector)\.",
    ),
    ("audio", r"(^|\.)(audio_\w+|speech_\w+|embed_audio)\."),
    ("mtp", r"(^|\.)(mtp|nextn|eagle)\w*\."),
    ("lm_head", rf"(^|\.)({'|'.join(HEADS)})$"),
    ("embeddings", r"(^|[._])(embed\w*|embeddings|wte|wpe)$|^(model\.)?shared$"),
)
"""Parts that every recipe leaves alone, wherever they lie in the model."""

_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?)\.N\.")
"""A decoder layer in a name whose numbers are written N."""

_LAYER_RULES = (
    ("embeddings", r"\.relative_attention_bias$"),
    ("router", r"\.(gate|\w*router|shared_expert_gate)(\.\w+)?$"),
    ("experts", r"\.experts\.(N\.)?\w+$"),
    ("experts", r"\.block_sparse_moe\.(input|output)_linear$"),
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
    ("mlp", r"\.(mlp|shared_mlp|ffn|feed_forward|block_sparse_moe|moe|shared_experts?)\."),
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

_FUSED_BY_ENGINES: Mapping[str, tuple[str, ...]] = {
    "q, k and v": ("q_proj", "k_proj", "v_proj", "wq", "wk", "wv"),
    "q_a and kv_a": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate and up": ("gate_proj", "up_proj", "w1", "w3"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Linears of one parent that engines load into one matrix, which has one precision."""

EXPERTS = "experts"
"""Kind, and fused group: an engine runs all experts of a layer with one kernel."""

_GROUP_OF = {leaf: group for group, leaves in _FUSED_BY_ENGINES.items() for leaf in leaves}


@dataclass(frozen=True, eq=False, slots=True)
class Traits:
    """What the name of a module tells.

    ``linear`` is true where it certainly is a linear module, to which engines apply what a
    configuration declares; of routers and embeddings no file tells. ``group`` names what engines
    fuse it with. What is ``optional`` lies outside of all lists of layers and is of no kind known:
    exporters quantize it or not, and recipes say nothing of it.
    """

    kind: str
    linear: bool
    group: str | None
    optional: bool


class Names:
    """The traits of modules by name, worked out once for all names that differ in numbers only."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Take the number of decoder layers, past which layers predict further tokens."""
        self._layer_count = layer_count(config)
        self._by_parent: dict[str, dict[str, Traits]] = {}
        self._by_pattern: dict[tuple[str, bool], dict[str, Traits]] = {}

    def traits(self, module: str) -> Traits:
        """Return the traits of a module."""
        parent, _, leaf = module.rpartition(".")
        known = self._by_parent.get(parent)
        if known is None:
            pattern = _NUMBER.sub("N", parent)
            further = _predicts_further(f"{parent}.", self._layer_count)
            known = self._by_pattern.setdefault((pattern, further), {})
            self._by_parent[parent] = known
        traits = known.get(leaf)
        if traits is None:
            traits = known[leaf] = _traits(module, self._layer_count)
        return traits


def _traits(module: str, layers: int | None) -> Traits:
    kind, pattern = kind_of(module, layers), _NUMBER.sub("N", module)
    part = _part_of(pattern)
    is_linear = part in MODULE_KINDS or kind == "lm_head"
    group = EXPERTS if part == EXPERTS else _GROUP_OF.get(module.rpartition(".")[2])
    return Traits(
        kind=kind,
        linear=is_linear,
        group=group if is_linear else None,
        optional=kind == OTHER and ".N." not in pattern,
    )


def kind_of(module: str, layers: int | None = None) -> str:
    """Return the kind of a module; decoder layers beyond ``layers`` predict further tokens."""
    kind = _kind_of_pattern(_NUMBER.sub("N", module))
    return "mtp" if kind not in ("vision", "audio") and _predicts_further(module, layers) else kind


def _predicts_further(module: str, layers: int | None) -> bool:
    number = _LAYER_NUMBER.search(module) if layers is not None else None
    return number is not None and layers is not None and int(number[1]) >= layers


@lru_cache(maxsize=4096)
def _kind_of_pattern(pattern: str) -> str:
    for kind, rule in _PLACES:
        if rule.search(pattern):
            return kind
    return (_part_of(pattern) or UNKNOWN_KIND) if _LAYER.search(pattern) else OTHER


def _part_of(pattern: str) -> str | None:
    """Return which part of a layer a name is, were it in a decoder layer."""
    return next((kind for kind, rule in _PARTS if rule.search(pattern)), None)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Return the number of decoder layers, also of a model whose text part is nested."""
    return _whole_number(config, "num_hidden_layers")


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """Return the width of the decoder, also of a model whose text part is nested."""
    return _whole_number(config, "hidden_size")


def _whole_number(config: Mapping[str, Any], field: str) -> int | None:
    for part in (config, config.get("text_config")):
        number = part.get(field) if isinstance(part, Mapping) else None
        if type(number) is int:
            return number
    return None
