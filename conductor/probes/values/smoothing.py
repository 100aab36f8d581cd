"""Tell smoothed weights from damaged ones.

AWQ and SmoothQuant divide what a layer puts out by a factor a channel and multiply the columns that
read it with the same, so that the model computes what it did. The factor goes into the weight of a
norm, or into the rows of the linear before (v before o, up before down). A change is explained
where the other side has the inverse; a norm that is changed alone, or columns that are rescaled
alone, are not.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from conductor.probes.values.identity import comparable, differs, is_rounded_again
from conductor.probes.values.tensor_files import TensorFiles

if TYPE_CHECKING:
    from conductor.probes.pairs import Stored

Factors = NDArray[np.float64]

_AFTER_LAYER = re.compile(r"^(.*?\b(?:layers?|h|blocks?)\.\d+)\.(.+)$")

_READS = (
    (r"attn\.q_b_proj$", ("self_attn.q_a_layernorm",)),
    (r"attn\.kv_b_proj$", ("self_attn.kv_a_layernorm",)),
    (r"^encoder_attn\.", ()),
    (
        r"(attn|attention|mixer)\.(q_proj|k_proj|v_proj|qkv_proj|gate_proj|q_a_proj"
        r"|kv_a_proj_with_mqa|query_key_value|W_pack|c_attn|wq|wk|wv|wqkv|in_proj\w*)$",
        ("input_layernorm", "attention_norm", "ln_1", "self_attn_layer_norm"),
    ),
    (
        r"(mlp|feed_forward|block_sparse_moe|ffn|moe)\.([\w.]+\.)?(gate_proj|up_proj|gate_up_proj"
        r"|w1|w3|gate|router|shared_expert_gate|fc1|fc_in|c_fc|dense_h_to_4h)$",
        (
            "pre_feedforward_layernorm",
            "pre_mlp_layernorm",
            "post_attention_layernorm",
            "ffn_norm",
            "ln_2",
            "input_layernorm",
        ),
    ),
    (r"^fc1$", ("final_layer_norm",)),
)
"""Which norm of its layer a linear reads, by name: the first that is there."""

_READS_NORM = tuple((re.compile(rule), norms) for rule, norms in _READS)

_FOLLOWED_BY = {
    "v_proj": "o_proj",
    "qkv_proj": "o_proj",
    "up_proj": "down_proj",
    "gate_up_proj": "down_proj",
    "w3": "w2",
}
"""Linears whose last rows become the columns of another of the same parent."""

_FOLLOWERS = frozenset(_FOLLOWED_BY.values())

_HEAD_SIZES = (128, 64, 256, 96, 80, 192, 32, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormChange:
    """A norm that differs from the source's, and what its readers' columns may be multiplied with.

    ``factors`` has one row for each way in which the weight of a norm is meant: as it is stored,
    and as one more than that.
    """

    name: str
    factors: tuple[Factors, ...]


class Norms:
    """The norms of both checkpoints that differ, looked up by who reads them."""

    def __init__(self, source: TensorFiles, candidate: TensorFiles) -> None:
        """Compare nothing yet."""
        self._source, self._candidate = source, candidate
        self._known: dict[tuple[str, str], NormChange | None] = {}
        self._lock = threading.Lock()

    def changed_for(self, source_module: str, module: str, columns: int) -> NormChange | None:
        """Return the changed norm that a linear of so many columns reads, if there is one."""
        ours, theirs = _AFTER_LAYER.match(module), _AFTER_LAYER.match(source_module)
        if not ours or not theirs:
            return None
        for norm in next((norms for rule, norms in _READS_NORM if rule.search(ours[2])), ()):
            name, source_name = (f"{match[1]}.{norm}.weight" for match in (ours, theirs))
            if name in self._candidate.weights.tensors:
                change = self._change(source_name, name)
                return change if change and change.factors[0].size == columns else None
        return None

    def _change(self, source_name: str, name: str) -> NormChange | None:
        key = (source_name, name)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._compare(source_name, name)
            return self._known[key]

    def _compare(self, source_name: str, name: str) -> NormChange | None:
        was, is_now = (
            files.weights.tensors.get(each)
            for files, each in ((self._source, source_name), (self._candidate, name))
        )
        if was is None or is_now is None or was.shape != is_now.shape or len(was.shape) != 1:
            return None
        if not comparable(was.dtype, is_now.dtype):
            return None
        if not differs(self._source, source_name, self._candidate, name, deep=True):
            return None
        if is_rounded_again(self._source, source_name, self._candidate, name):
            return None
        theirs, ours = (
            files.elements(each).astype(np.float64)
            for files, each in ((self._source, source_name), (self._candidate, name))
        )
        return NormChange(
            name=name, factors=(_ratio(theirs, ours), _ratio(1.0 + theirs, 1.0 + ours))
        )


def _ratio(numerator: Factors, denominator: Factors) -> Factors:
    ratio = np.ones_like(numerator)
    usable = (denominator != 0) & np.isfinite(denominator) & np.isfinite(numerator)
    np.divide(numerator, denominator, out=ratio, where=usable)
    return ratio


@dataclass(frozen=True, slots=True)
class Couple:
    """A place where rows of one linear become columns of the next; ``first`` tells which it is."""

    key: tuple[str, int | None]
    first: bool


def couple_of(module: str, expert: int | None) -> Couple | None:
    """Return the couple that a linear belongs to, ``None`` for one whose rows go elsewhere."""
    parent, _, leaf = module.rpartition(".")
    if leaf in _FOLLOWED_BY:
        return Couple((f"{parent}.{_FOLLOWED_BY[leaf]}", expert), first=True)
    return Couple((module, expert), first=False) if leaf in _FOLLOWERS else None


def biases_before(module: str) -> Iterator[str]:
    """Yield what the bias of the first linear of a couple may be called, given either."""
    parent, _, leaf = module.rpartition(".")
    last = _FOLLOWED_BY.get(leaf, leaf)
    for first, follower in _FOLLOWED_BY.items():
        if follower == last:
            yield f"{parent}.{first}.bias"


def column_factors(gains: Factors, first: Stored, second: Stored) -> Iterator[Factors]:
    """Yield what the columns of the second may be multiplied with, as rows of the first were.

    Several query heads may read one head of values: its rows stand for columns of each of them.
    """
    rows, columns = first.shape[0], second.shape[1]
    inverse = _ratio(np.ones_like(gains), gains)
    if rows >= columns:
        yield inverse[rows - columns :]
    elif columns % rows == 0:
        for size in _HEAD_SIZES:
            if rows % size == 0:
                heads = inverse.reshape(-1, 1, size)
                yield np.broadcast_to(heads, (heads.shape[0], columns // rows, size)).reshape(-1)
