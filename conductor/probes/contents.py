"""The tensors of a checkpoint by module, and the weight matrices that they are.

A checkpoint has hundreds of thousands of tensors and a few dozen ways to store a module. So modules
whose tensors are alike but for their place share one ``Form``, and whatever follows from types and
shapes is worked out once for each form.

Experts of a layer may lie in one tensor without ``.weight`` in its name. Here each such projection
is a module like any other, with the part ``weight``; a matrix of it is one expert's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from sys import intern
from typing import Any

import msgspec

from conductor.probes.formats.layout import PLAIN, UNDECLARED, UNQUANTIZED, Layout, Parts
from conductor.probes.modules import EXPERTS, Traits, hidden_size
from conductor.probes.reading import ProbeError
from conductor.probes.safetensors_header import Tensor

PRECISION_OF_DTYPE: Mapping[str, str] = {
    "F32": "fp32",
    "BF16": "bf16",
    "F16": "fp16",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "I8": "int8",
}
"""Precision of weights of which each is an element of this type."""

FUSED_PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "input_linear": ("gate_proj", "up_proj"),
    "output_linear": ("down_proj",),
}
"""Projections that one fused tensor holds, in the order of its rows; others hold their own."""

_INTERLEAVED_MODELS = ("gpt_oss",)
"""Model types whose fused tensors hold a row of each projection in turn, not one after another."""

_NEVER_TURNED = ("input_linear", "output_linear")
"""Fused projections that hold [rows, columns] of each expert, as one linear does."""

_BLOCKS = "blocks"
_COMPANION_ENDS = (
    "_weight_scale_inv",
    "_weight_scale_2",
    "_weight_scale",
    "_input_scale",
    "_blocks",
    "_scales",
    "_bias",
)
"""What follows a projection's name in the names of the tensors beside its fused weight."""

_DOTTED_PARTS = (".weight", ".quant_state", ".weight_quantizer")
_PACKED_PARTS = ("weight_packed", "qweight", _BLOCKS)
WEIGHT_PARTS = frozenset({"weight", *_PACKED_PARTS})


@dataclass(frozen=True, eq=False, slots=True)
class Form:
    """The tensors that many modules have alike; ``parts`` are those of one of them."""

    parts: Parts
    size_bytes: int


@dataclass(frozen=True, eq=False, slots=True)
class Matrix:
    """A weight matrix of the source, or those of all experts of a layer in one tensor.

    ``rows`` and ``columns`` are those of one expert where there are ``experts`` (0: a plain
    matrix), with all ``projections`` in the rows. ``turned`` tensors hold [columns, rows].
    ``layout`` is ``None`` where the values cannot be read.
    """

    layout: Layout | None
    precision: str
    rows: int
    columns: int
    experts: int = 0
    projections: int = 1
    turned: bool = False
    interleaved: bool = False

    @property
    def layers(self) -> int:
        """Return the number of linears: experts times projections."""
        return max(self.experts, 1) * self.projections

    @property
    def weights(self) -> int:
        """Return the number of weights, however they are stored."""
        return max(self.experts, 1) * self.rows * self.columns

    @property
    def is_plain(self) -> bool:
        """Tell whether the source stores it in floating point, as it computes with it."""
        return self.layout is PLAIN


class Contents:
    """The modules of one checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Sort tensors by module; no tensor is looked into."""
        self.parts: dict[str, dict[str, Tensor]] = _by_module(tensors)
        self._undotted: dict[tuple[str, str], str] = {}
        self._fused: set[str] = set()
        self._join_dotted_parts()
        self._part_fused_experts()
        self.forms: dict[str, Form] = _forms(self.parts)

    @cached_property
    def distinct_forms(self) -> frozenset[Form]:
        """Return every form once."""
        return frozenset(self.forms.values())

    def tensor_name(self, module: str, part: str) -> str:
        """Return the full name of a tensor."""
        undotted = self._undotted.get((module, part))
        return undotted or (f"{module}.{part}" if module else part)

    def owner(self, name: str) -> str:
        """Return the module that a tensor of this name belongs to, be it there or not."""
        module = name.rpartition(".")[0]
        while module.endswith(_DOTTED_PARTS):
            module = module.rpartition(".")[0]
        fused = (each for each in self._fused if name == each or name.startswith(f"{each}_"))
        return next(fused, module) if module.endswith(EXPERTS) else module

    def _join_dotted_parts(self) -> None:
        """Give ``x.weight.absmax`` to ``x``: parts of bitsandbytes have dots in their names."""
        for module in [name for name in self.parts if name.endswith(_DOTTED_PARTS)]:
            owner, dotted = module, ""
            while owner.endswith(_DOTTED_PARTS):
                owner, _, last = owner.rpartition(".")
                dotted = f"{last}.{dotted}"
            found = self.parts.setdefault(owner, {})
            for part, tensor in self.parts.pop(module).items():
                found[dotted + part] = tensor

    def _part_fused_experts(self) -> None:
        """Make a module of each projection in ``x.experts``."""
        for module in [name for name in self.parts if name.endswith(EXPERTS)]:
            parts = self.parts[module]
            for projection in _fused_projections(parts):
                name, own = f"{module}.{projection}", f"{projection}_"
                fused = self.parts.setdefault(name, {})
                self._fused.add(name)
                for stored in [each for each in parts if f"{each}_".startswith(own)]:
                    part = "weight" if stored == projection else stored.removeprefix(own)
                    if part not in fused:
                        fused[part] = parts.pop(stored)
                        self._undotted[name, part] = f"{module}.{stored}"
            if not parts:
                del self.parts[module]


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    before = None
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        # Tensors of one module mostly follow each other.
        if module != before:
            before, parts = module, modules.setdefault(module, {})
        parts[intern(part)] = tensor
    return modules


def _forms(modules: Mapping[str, Parts]) -> dict[str, Form]:
    forms: dict[str, Form] = {}
    known: dict[tuple[object, ...], Form] = {}
    for module, parts in modules.items():
        signature: list[object] = []
        for part, tensor in parts.items():
            signature += (part, tensor.dtype, tensor.shape)
        key = tuple(signature)
        form = known.get(key)
        if form is None:
            size_bytes = sum(tensor.size_bytes for tensor in parts.values())
            form = known[key] = Form(parts=parts, size_bytes=size_bytes)
        forms[module] = form
    return forms


def _fused_projections(parts: Parts) -> list[str]:
    """Return the names that others of the parts are companions of, longest first."""
    found = set()
    for part, tensor in parts.items():
        companion = next((end for end in _COMPANION_ENDS if part.endswith(end)), None)
        if companion is not None:
            found.add(part.removesuffix(companion))
        elif len(tensor.shape) == 3:
            found.add(part)
    return sorted(found, key=len, reverse=True)


def is_fused(parts: Parts) -> bool:
    """Tell whether a module's weight holds the matrices of several experts."""
    weight = parts.get("weight")
    return _BLOCKS in parts or (weight is not None and len(weight.shape) == 3)


def experts_in(parts: Parts) -> int:
    """Return how many experts the tensors of a fused module hold."""
    weight = parts.get("weight", parts.get(_BLOCKS))
    return weight.shape[0] if weight is not None and weight.shape else 0


def expert_parts(parts: Parts, experts: int, expert: int, *, turned: bool) -> dict[str, Tensor]:
    """Return the tensors of one expert as [rows, columns], each with its own place in the file.

    What has no dimension of experts belongs to all of them.
    """
    return {
        part: _of_expert(tensor, experts, expert, turned=turned) for part, tensor in parts.items()
    }


def _of_expert(tensor: Tensor, experts: int, expert: int, *, turned: bool) -> Tensor:
    if not tensor.shape or tensor.shape[0] != experts:
        return tensor
    shape = tensor.shape[1:]
    if len(shape) == 3:
        shape = (shape[0], shape[1] * shape[2])
    if turned and len(shape) == 2:
        shape = shape[::-1]
    begin, end = tensor.offsets
    size = (end - begin) // experts
    begin += expert * size
    return msgspec.structs.replace(tensor, shape=shape, offsets=(begin, begin + size))


def projection_parts(parts: Parts, rows: int, projections: int) -> dict[str, Tensor]:
    """Return the parts of one of several projections that an expert's tensors hold.

    A part with a row, or a scale, for each of a number of rows is divided; what is for all of them
    belongs to every projection.
    """
    return {part: _of_projection(tensor, rows, projections) for part, tensor in parts.items()}


def _of_projection(tensor: Tensor, rows: int, projections: int) -> Tensor:
    if projections == 1 or not tensor.shape or tensor.shape[0] % projections:
        return tensor
    if len(tensor.shape) == 1 and tensor.shape[0] != rows * projections:
        return tensor
    shape = (tensor.shape[0] // projections, *tensor.shape[1:])
    return msgspec.structs.replace(tensor, shape=shape)


class Matrices:
    """The weight matrices of a source, worked out once for each form."""

    def __init__(
        self,
        directory: Path,
        contents: Contents,
        config: Mapping[str, Any],
        layouts: Iterable[Layout],
    ) -> None:
        """Take the layouts of the source's own format; ``directory`` names it in errors."""
        self._directory = directory
        self._contents = contents
        self._layouts = (PLAIN, *layouts)
        self._hidden = hidden_size(config)
        self.interleaved = config.get("model_type") in _INTERLEAVED_MODELS
        self._plain: dict[Form, Matrix | None] = {}

    def of(self, module: str, form: Form, traits: Traits) -> Matrix | None:
        """Return the matrix that a module is, or ``None`` where it is none.

        Raises:
            ProbeError: its weights are packed so that no shape can be told.
        """
        if _BLOCKS in form.parts or (traits.kind == EXPERTS and is_fused(form.parts)):
            return self._fused(module, form.parts)
        try:
            return self._plain[form]
        except KeyError:
            matrix = self._plain[form] = self._find(module, form.parts)
            return matrix

    def _find(self, module: str, parts: Parts) -> Matrix | None:
        found = self._stored_in(parts)
        if found is not None:
            layout, (rows, columns) = found
            precision = _precision(layout, parts)
            return Matrix(layout=layout, precision=precision, rows=rows, columns=columns)
        weight = parts.get("weight")
        if weight is not None and len(weight.shape) == 2:
            precision = PRECISION_OF_DTYPE.get(weight.dtype, "")
            if precision:
                rows, columns = weight.shape
                return Matrix(layout=None, precision=precision, rows=rows, columns=columns)
            raise self._packed(module, "weight", weight)
        for part in _PACKED_PARTS:
            if part in parts:
                raise self._packed(module, part, parts[part])
        return None

    def _stored_in(self, parts: Parts) -> tuple[Layout, tuple[int, int]] | None:
        """Return the layout and shape of one matrix, all of whose scales are there."""
        for layout in self._layouts:
            shape = layout.shape(parts)
            if shape is not None and not layout.missing(parts, UNDECLARED):
                return layout, shape
        return None

    def _fused(self, module: str, parts: Parts) -> Matrix:
        experts = experts_in(parts)
        found = {}
        for turned in (False,) if _BLOCKS in parts else (True, False):
            view = expert_parts(parts, experts, 0, turned=turned) if experts else {}
            layout_and_shape = self._stored_in(view)
            if layout_and_shape is not None:
                found[turned] = layout_and_shape
        if not found:
            part = "weight" if "weight" in parts else _BLOCKS
            raise self._packed(module, part, parts[part])
        turned = self._turned(module, found) if len(found) == 2 else True in found
        layout, (rows, columns) = found[turned]
        return Matrix(
            layout=layout,
            precision=_precision(layout, parts),
            rows=rows,
            columns=columns,
            experts=experts,
            projections=len(FUSED_PROJECTIONS.get(module.rpartition(".")[2], ("",))),
            turned=turned,
            interleaved=self.interleaved,
        )

    def _turned(self, module: str, found: Mapping[bool, tuple[Layout, tuple[int, int]]]) -> bool:
        """Tell which dimension of a fused tensor is which.

        One projection turns the model's width into the other's, which may be as wide. Where the
        two projections of a layer do not tell either, models that fuse experts turn them.
        """
        parent, _, leaf = module.rpartition(".")
        if leaf in _NEVER_TURNED:
            return False
        gate_up = self._contents.parts.get(f"{parent}.gate_up_proj", {}).get("weight")
        down = self._contents.parts.get(f"{parent}.down_proj", {}).get("weight")
        if gate_up is not None and down is not None and len(gate_up.shape) == len(down.shape) == 3:
            (_, first, second), (_, inner, outer) = gate_up.shape, down.shape
            if (first, second) == (outer, 2 * inner):
                return True
            if (first, second) == (2 * outer, inner):
                return False
        width = 0 if leaf.startswith("down") else 1
        fitting = [turned for turned, (_, shape) in found.items() if shape[width] == self._hidden]
        return fitting[0] if len(fitting) == 1 else True

    def _packed(self, module: str, part: str, tensor: Tensor) -> ProbeError:
        name = self._contents.tensor_name(module, part)
        return ProbeError(
            self._directory,
            f"the source's own weights are packed ({name}, {tensor.dtype} {list(tensor.shape)}) "
            "and do not show the shapes of their matrices",
            "give the checkpoint that it was quantized from",
        )


def _precision(layout: Layout, parts: Parts) -> str:
    """Return the name of a precision as sources' precisions are named."""
    if layout.precision != UNQUANTIZED:
        return layout.precision.lower()
    return PRECISION_OF_DTYPE.get(parts["weight"].dtype, "")
