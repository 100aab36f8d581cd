"""Measure a quantized checkpoint beside its source, from headers and configuration alone.

No weight is read and nothing is executed. What should be quantized comes from the source's weight
matrices and the recipe; what is quantized, from the candidate's tensors; what is declared, from its
configuration. The probe counts how the three agree and decides nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conductor.probes.formats import find_format
from conductor.probes.formats.layout import (
    FLOAT_DTYPES,
    UNQUANTIZED,
    Format,
    Parts,
    describe,
    measure,
)
from conductor.probes.metadata import metadata_diffs
from conductor.probes.modules import FUSED_PROJECTIONS, OTHER, Linear, linears
from conductor.probes.reading import ProbeError, read_object
from conductor.probes.safetensors_header import Tensor, Weights, pickled_files, read_weights
from gates.criteria import (
    BYTES_PER_COLUMN,
    BYTES_PER_MATRIX,
    BYTES_PER_ROW,
    MODULE_KINDS,
    SCALE_WIDENING,
    SIZE_TOLERANCE,
    STORED_AGAIN,
    UNKNOWN_KIND,
    Recipe,
)

__all__ = ["ProbeError", "probe_checkpoint"]

COUNTS = ("NVFP4", "FP8", "INT4", "INT8")
LEFT_ALONE, UNEXPECTED, MISMATCH = (
    "BF16_or_excluded",
    "unexpected_unquantized",
    "declaration_mismatch",
)

SOURCE_PRECISIONS: Mapping[str, str] = {
    "F32": "fp32",
    "BF16": "bf16",
    "F16": "fp16",
    "F8_E4M3": "fp8",
    "I8": "int8",
}
"""Name of a source's precision by the type of its weight matrices."""

NAMES_SHOWN = 20

_MIXTRAL_NAMES: Mapping[str, str] = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Other names under which an exporter may write the projections of an expert."""

_PACKED_SUFFIXES = (".weight_packed", ".qweight", "_blocks")


def probe_checkpoint(checkpoint: Path, source: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the checkpoint summary of ``checkpoint``, made from ``source`` with ``recipe``.

    Sizes are bytes of the tensors that the index refers to. ``layer_precision_counts`` holds
    every weight matrix of the source that has a counterpart once; ``findings`` name the ones
    behind a count, first 20 of each.

    Raises:
        ProbeError: a directory has no readable weights or configuration, or the source's weights
            are packed in a way that hides their shapes, or both are the same directory.
    """
    source_config, source_weights = _read(source)
    config, weights = _read(checkpoint)
    if checkpoint.samefile(source):
        raise ProbeError(checkpoint, "is the source itself", "give the quantized checkpoint")
    _refuse_packed(source, source_weights)
    matrices = list(linears(source_weights.tensors, source_config))
    tied = source_config.get("tie_word_embeddings") is True
    candidate = _Candidate(weights, find_format(checkpoint, config, weights.tensors))
    counts, names = _census(matrices, candidate, recipe, tied)
    lost = [*names.pop("lost"), *_lost_others(source_weights.tensors, matrices, weights.tensors)]
    pickled = pickled_files(checkpoint)
    unclassified = [m.module for m in matrices if m.kind in (OTHER, UNKNOWN_KIND)]
    return {
        "source_bytes": source_weights.size_bytes,
        "output_bytes": weights.size_bytes,
        "recipe": recipe.name,
        "source_precision": _source_precision(matrices),
        "layer_precision_counts": counts,
        "metadata_diffs": [
            *_listed("tensors of the source are lost or changed", lost),
            *_listed("pickled weights beside safetensors", pickled),
            *candidate.format.problems,
            *metadata_diffs(source, checkpoint, source_config, config),
        ],
        "findings": [
            {"kind": kind, "count": len(found), "names": found[:NAMES_SHOWN]}
            for kind, found in (
                *names.items(),
                ("lost_tensors", lost),
                ("pickled_weights", pickled),
                ("unclassified_matrices", unclassified),
                ("unindexed_tensors", list(weights.unindexed)),
            )
            if found
        ],
        "expected_bytes": _expected_bytes(source_weights.tensors, matrices, recipe, tied),
    }


def _read(directory: Path) -> tuple[dict[str, Any], Weights]:
    if not directory.is_dir():
        raise ProbeError(directory, "is no directory", "give the directory of a checkpoint")
    weights = read_weights(directory)
    return read_object(directory / "config.json", "copy or export the checkpoint again"), weights


def _refuse_packed(source: Path, weights: Weights) -> None:
    """Refuse a source whose weights do not show the shapes of their matrices."""
    for name, tensor in weights.tensors.items():
        hidden = name.endswith(".weight") and len(tensor.shape) == 2
        if name.endswith(_PACKED_SUFFIXES) or (hidden and tensor.dtype not in SOURCE_PRECISIONS):
            raise ProbeError(
                source,
                f"the source's own weights are packed ({name}, {tensor.dtype})",
                "give the checkpoint it was packed from",
            )


@dataclass(frozen=True, kw_only=True)
class _Counterpart:
    """What stands in the candidate for one matrix of the source, or for the fused ones of a layer.

    ``views`` are the ways to see the tensors found and the matrix meant as [rows, columns]: fused
    experts do not say which of their dimensions is which.
    """

    module: str
    kind: str
    layers: int
    views: tuple[tuple[Parts, Tensor], ...]

    @property
    def parts(self) -> Parts:
        return self.views[0][0]

    @property
    def lost(self) -> bool:
        return not self.parts.keys() - {"bias"}


class _Candidate:
    """The candidate's tensors by module, and its format."""

    def __init__(self, weights: Weights, checkpoint_format: Format) -> None:
        self.format = checkpoint_format
        self._modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in weights.tensors.items():
            module, _, part = name.rpartition(".")
            self._modules[module][part] = tensor

    def counterparts(self, linear: Linear) -> Iterator[_Counterpart]:
        """Yield what stands for a matrix: under its name, or one for each expert and projection."""
        if not linear.fused:
            module = self._present(linear.module)
            parts = self._modules.get(module, {})
            yield _Counterpart(
                module=module, kind=linear.kind, layers=1, views=((parts, linear.tensor),)
            )
            return
        fused = self._fused_parts(linear.module)
        _, first, second = linear.tensor.shape
        if fused:
            stored = {name: _without_experts(tensor) for name, tensor in fused.items()}
            turned = {name: _turned(tensor) for name, tensor in stored.items()}
            views = (
                (stored, linear.tensor._replace(shape=(first, second))),
                (turned, linear.tensor._replace(shape=(second, first))),
            )
            yield _Counterpart(
                module=linear.module, kind=linear.kind, layers=linear.layers, views=views
            )
            return
        parent, _, leaf = linear.module.rpartition(".")
        projections = FUSED_PROJECTIONS.get(leaf, (leaf,))
        shapes = ((first // len(projections), second), (second // len(projections), first))
        for expert in range(linear.tensor.shape[0]):
            for projection in projections:
                module = f"{parent}.{expert}.{projection}"
                parts = self._modules.get(module, {})
                yield _Counterpart(
                    module=module,
                    kind=linear.kind,
                    layers=1,
                    views=tuple((parts, linear.tensor._replace(shape=s)) for s in shapes),
                )

    def precision(self, counterpart: _Counterpart) -> str | None:
        """Return the precision that the tensors are in, or ``None`` if they are in none known."""
        measured = (
            measure(self.format.layouts, parts, matrix) for parts, matrix in counterpart.views
        )
        return next((precision for precision in measured if precision is not None), None)

    def _present(self, module: str) -> str:
        """Return the name that a module goes by in the candidate."""
        parent, _, leaf = module.rpartition(".")
        other = f"{parent}.{_MIXTRAL_NAMES.get(leaf, leaf)}"
        return other if module not in self._modules and other in self._modules else module

    def _fused_parts(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of fused experts: ``proj``, ``proj_weight_scale``, ..."""
        parent, _, leaf = module.rpartition(".")
        found = self._modules.get(parent, {})
        if leaf not in found:
            return {}
        prefix = f"{leaf}_"
        companions = {
            name.removeprefix(prefix): tensor
            for name, tensor in found.items()
            if name.startswith(prefix)
        }
        return {**companions, "weight": found[leaf]}


def _without_experts(tensor: Tensor) -> Tensor:
    return tensor._replace(shape=tensor.shape[-2:])


def _turned(tensor: Tensor) -> Tensor:
    return tensor._replace(shape=tensor.shape[::-1])


def _census(
    matrices: Iterable[Linear], candidate: _Candidate, recipe: Recipe, tied: bool
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Count the matrices by what became of them, and name those that something is wrong with.

    Matrices without a counterpart are in no count; they are named under ``lost``. A head that is
    tied to the embeddings need not be stored.
    """
    counts = dict.fromkeys((*COUNTS, recipe.bucket, LEFT_ALONE, UNEXPECTED, MISMATCH), 0)
    names: dict[str, list[str]] = {UNEXPECTED: [], MISMATCH: [], "lost": []}
    for linear in matrices:
        for counterpart in candidate.counterparts(linear):
            if counterpart.lost:
                if not (tied and linear.kind == "lm_head"):
                    names["lost"].append(counterpart.module)
                continue
            count, remark = _outcome(counterpart, candidate, recipe)
            counts[count] += counterpart.layers
            if count in names:
                names[count].append(counterpart.module + remark)
    return {str(name): count for name, count in counts.items()}, names


def _outcome(counterpart: _Counterpart, candidate: _Candidate, recipe: Recipe) -> tuple[str, str]:
    """Return the count that a matrix belongs to, and a remark on why.

    Servers apply declarations to linear modules only; whether a router or an embedding is one
    cannot be told from a file, so for those only what they are counts.
    """
    meant = recipe.means(counterpart.kind)
    actual = candidate.precision(counterpart)
    if actual is None:
        return MISMATCH, f" (stored in no known layout: {describe(counterpart.parts)})"
    if meant and actual == UNQUANTIZED:
        is_unknown = counterpart.kind == UNKNOWN_KIND
        return UNEXPECTED, " (of no kind known)" if is_unknown else ""
    is_linear = meant or counterpart.kind in (*MODULE_KINDS, "lm_head")
    declared = candidate.format.declared(counterpart.module) if is_linear else actual
    if actual != declared:
        return MISMATCH, f" (is {actual}, declared {declared})"
    if actual == UNQUANTIZED:
        return LEFT_ALONE, ""
    if not meant:
        return MISMATCH, f" (is {actual}, and the recipe leaves {counterpart.kind} alone)"
    if actual != recipe.bucket:
        return MISMATCH, f" (is {actual}, and the recipe means {recipe.bucket})"
    return recipe.bucket, ""


def _lost_others(
    source: Mapping[str, Tensor], matrices: Iterable[Linear], candidate: Mapping[str, Tensor]
) -> Iterator[str]:
    """Name the source's biases, norms and the like that are absent or of another shape or type.

    Left out: scales of a source that is itself quantized, rotary tables that loaders compute,
    and biases of fused experts that the candidate stores apart.
    """
    fused = {linear.module for linear in matrices if linear.fused}
    modules = {linear.module for linear in matrices}
    for name, tensor in source.items():
        module, _, part = name.rpartition(".")
        if name in fused or part == "inv_freq" or (module in modules and part != "bias"):
            continue
        split = name.removesuffix("_bias")
        if split in fused and split not in candidate:
            continue
        found = candidate.get(name)
        if found is None:
            yield name
        elif found.shape != tensor.shape:
            yield f"{name} ({list(tensor.shape)} is now {list(found.shape)})"
        elif found.dtype not in (tensor.dtype, *FLOAT_DTYPES):
            yield f"{name} ({tensor.dtype} is now {found.dtype})"


def _listed(what: str, names: list[str]) -> list[str]:
    """Return one sentence that counts and names, or none where there is nothing to name."""
    if not names:
        return []
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}{more}"]


def _source_precision(matrices: Iterable[Linear]) -> str | None:
    """Name the precision that most weights of the decoder layers are in."""
    elements: dict[str, int] = defaultdict(int)
    for linear in matrices:
        if linear.kind in MODULE_KINDS:
            elements[linear.tensor.dtype] += math.prod(linear.tensor.shape)
    if not elements:
        return None
    return SOURCE_PRECISIONS.get(max(elements, key=lambda dtype: elements[dtype]))


def _expected_bytes(
    source: Mapping[str, Tensor], matrices: Iterable[Linear], recipe: Recipe, tied: bool
) -> list[int]:
    """Return the least and the most bytes that the recipe can make of this source.

    Quantized weights take ``recipe.weight_bits``, at most widened by ``SCALE_WIDENING`` and what
    a matrix stores beside its weights; everything else stays, within ``STORED_AGAIN``. Scales of
    a quantized source and a head tied to the embeddings may go.
    """
    by_module = {linear.module: linear for linear in matrices}
    scale_bits = recipe.weight_bits - recipe.bits
    most_bits = recipe.bits + scale_bits * SCALE_WIDENING.get(recipe.bucket, 1.0)
    low = high = 0.0
    for name, tensor in source.items():
        module, _, part = name.rpartition(".")
        linear = by_module.get(name) or by_module.get(module)
        is_weight = linear is not None and linear.tensor is tensor
        if linear and is_weight and recipe.means(linear.kind):
            elements = math.prod(tensor.shape)
            rows, columns = tensor.shape[-2:]
            copies = elements // max(rows * columns, 1)
            beside = rows * BYTES_PER_ROW + columns * BYTES_PER_COLUMN + BYTES_PER_MATRIX
            low += elements * recipe.weight_bits / 8
            high += elements * most_bits / 8 + copies * beside
            continue
        least, most = STORED_AGAIN.get(tensor.dtype, (1.0, 1.0))
        may_go = linear is not None and (
            (tied and linear.kind == "lm_head") or (not is_weight and part != "bias")
        )
        low += 0.0 if may_go else tensor.size_bytes * least
        high += tensor.size_bytes * most
    return [
        max(1, math.floor(low * (1 - SIZE_TOLERANCE))),
        max(1, math.ceil(high * (1 + SIZE_TOLERANCE))),
    ]
