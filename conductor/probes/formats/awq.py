"""AWQ exports: 4-bit integers packed along the rows of a linear, in an order made for one kernel.

A linear [rows, columns] lies turned: ``qweight`` [columns, rows / 8], ``qzeros`` and ``scales``
[groups, rows (/ 8)]. A weight is its number less the zero point of its group, times the scale. The
factors that AWQ takes out of the activations are in the layer before, so that a weight here is the
source's times one factor a column.

What no list says is left alone, loaders take from the tensors: a module with a ``qweight`` is
quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conductor.probes.formats.gptq import GroupedIntegers, differences, unknown
from conductor.probes.formats.layout import UNDECLARED, Fetch, Format, Scheme
from conductor.probes.safetensors_header import Tensor

if TYPE_CHECKING:
    from conductor.probes.formats.numerics import Stored

METHOD = "awq"
FILE = "quant_config.json"

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which place of a word each of eight rows lies, counted from the lowest bits."""

_SPELLINGS: Mapping[str, str] = {"w_bit": "bits", "q_group_size": "group_size"}
"""Keys of AWQ's own file, and what ``config.json`` calls the same."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Awq(GroupedIntegers):
    """The layout of AWQ's GEMM version."""

    bits: int = 4
    step: tuple[int, int] = (8, 1)

    def turned(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of the linear from that of ``qweight``."""
        return stored[1] * 8, stored[0]

    def numbers(self, fetch: Fetch, rows: slice, columns: slice) -> Stored:
        """Return the integers of a block [rows, columns]."""
        return _turn(fetch("qweight", columns, _words(rows)))

    def zero_points(self, fetch: Fetch, rows: slice) -> Stored:
        """Return the zero points [groups, rows].

        Raises:
            ValueError: there are to be none, and they are not all in the middle.
        """
        zeros = _turn(fetch("qzeros", slice(None), _words(rows))).T
        if self.symmetric and (zeros != 2 ** (self.bits - 1)).any():
            raise ValueError("zero_point is false, and qzeros are not all in the middle")
        return zeros


def _words(rows: slice) -> slice:
    return slice(rows.start // 8, -(-rows.stop // 8))


def _turn(words: Stored) -> Stored:
    """Return words [columns, rows / 8] as numbers [rows, columns]."""
    import numpy as np

    turned = np.ascontiguousarray(words.T).view(np.uint32)
    numbers = np.empty((turned.shape[0], 8, turned.shape[1]), np.uint8)
    for row, place in enumerate(_PLACES):
        numbers[:, row] = (turned >> np.uint32(4 * place)) & np.uint32(0xF)
    return numbers.reshape(-1, turned.shape[1])


LAYOUTS = (Awq(),)


def read(
    stated: Mapping[str, Any], beside: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Format:
    """Return the format that ``quantization_config`` and ``quant_config.json`` declare."""
    own = {_SPELLINGS.get(key, key): value for key, value in beside.items()}
    in_config = {_SPELLINGS.get(key, key): value for key, value in stated.items()}
    facts = {**own, **in_config}
    version = str(facts.get("version") or facts.get("format") or "gemm").lower()
    bits, group = facts.get("bits"), facts.get("group_size")
    if version != "gemm" or type(bits) is not int or bits != 4:
        return unknown(f"{METHOD} {version}, {bits} bits")
    size = group if type(group) is int and group > 0 else None
    scheme = Scheme(precision="INT4", group_size=size)
    listed = facts.get("modules_to_not_convert")
    names = listed if isinstance(listed, list) else []
    excluded = [name for name in names if isinstance(name, str)]
    head = facts.get("lm_head") is True

    def declared(module: str) -> Scheme:
        if module.rpartition(".")[2] == "lm_head" and not head:
            return UNDECLARED
        if excluded:
            return UNDECLARED if any(name in module for name in excluded) else scheme
        return scheme if f"{module}.qweight" in tensors else UNDECLARED

    return Format(
        name=f"AWQ ({version}, {bits} bits)",
        layouts=(Awq(symmetric=facts.get("zero_point") is False, group=size),),
        declared=declared,
        problems=differences(in_config, own, FILE),
    )
