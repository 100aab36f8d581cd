"""Which tensors of the candidate hold the values of which tensors of the source.

A pair is one matrix as both sides store it, one expert at a time where several lie in one tensor.
Whatever is not quantized anew comes as kept: it should hold the source's values as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from conductor.probes.contents import (
    Contents,
    expert_parts,
    experts_in,
    projection_parts,
)
from conductor.probes.formats.layout import PLAIN, Layout, Parts, Scheme
from conductor.probes.intent import LEFT_ALONE, Layer
from conductor.probes.matching import Match, Slice


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One matrix [rows, columns] as a checkpoint stores it.

    ``parts`` are oriented as the matrix is, also where the file holds them ``turned``;
    ``tensors`` are their full names. Of a fused module they are those of one ``expert`` and, where
    its tensor holds several projections, of one of those: row ``i`` of the matrix is row
    ``first_row + i * row_step`` of the expert's.
    """

    module: str
    layout: Layout
    parts: Parts
    tensors: Mapping[str, str]
    shape: tuple[int, int]
    expert: int | None = None
    turned: bool = False
    first_row: int = 0
    row_step: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One matrix in both checkpoints, and what the candidate declares of it."""

    kind: str
    source: Stored
    candidate: Stored
    scheme: Scheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """One tensor that should have the same values in both checkpoints."""

    kind: str
    source_name: str
    candidate_name: str


@dataclass(frozen=True, kw_only=True)
class Counterparts:
    """Both checkpoints by module, what stands for what, and what became of each layer.

    ``interleaved`` models hold the rows of fused projections in turn.
    """

    source: Contents
    candidate: Contents
    matches: list[Match]
    layers: list[Layer]
    interleaved: bool = False

    def pairs(self, shard_of: Mapping[str, str]) -> Iterator[Pair]:
        """Yield every layer that is stored another way than in the source.

        They come in the order of the candidate's files, given ``shard_of`` its tensors.
        """
        paired = [layer for layer in self.layers if _is_pair(layer)]
        paired.sort(key=lambda layer: self._place(layer.match, shard_of))
        for layer in paired:
            yield from self._pairs(layer)

    def kept(self, shard_of: Mapping[str, str]) -> Iterator[Kept]:
        """Yield every tensor that is in both checkpoints and in no pair, in the same order."""
        kept = list(self._all_kept())
        kept.sort(key=lambda each: shard_of.get(each.candidate_name, ""))
        yield from kept

    def _all_kept(self) -> Iterator[Kept]:
        paired = {layer.match.candidate for layer in self.layers if not _is_kept(layer)}
        for match in self.matches:
            if match.candidate is None:
                continue
            before = self.source.parts[match.source]
            after = self.candidate.parts[match.candidate]
            if match.candidate not in paired:
                for part in before:
                    if part in after:
                        yield self._kept(match, part)
            elif match.is_whole and "bias" in before and "bias" in after:
                yield self._kept(match, "bias")

    def _kept(self, match: Match, part: str) -> Kept:
        return Kept(
            kind=match.traits.kind,
            source_name=self.source.tensor_name(match.source, part),
            candidate_name=self.candidate.tensor_name(match.candidate or "", part),
        )

    def _place(self, match: Match, shard_of: Mapping[str, str]) -> tuple[str, int]:
        module = match.candidate or ""
        part, tensor = next(iter(self.candidate.parts[module].items()))
        return shard_of.get(self.candidate.tensor_name(module, part), ""), tensor.offsets[0]

    def _pairs(self, layer: Layer) -> Iterator[Pair]:
        match, outcome, scheme = layer
        matrix, layout = match.matrix, outcome.layout
        if matrix is None or matrix.layout is None or layout is None:
            return
        before, after = match.source_slice, match.candidate_slice
        fused = matrix.experts and before is None
        for expert in range(matrix.experts) if fused else (None,):
            shape = (matrix.rows // (before.projections if before else 1), matrix.columns)
            source = self._stored(
                self.source, match.source, matrix.layout, shape, before or expert, matrix.turned
            )
            candidate = self._stored(
                self.candidate,
                match.candidate or "",
                layout,
                shape,
                after or expert,
                outcome.turned,
            )
            yield Pair(kind=match.traits.kind, source=source, candidate=candidate, scheme=scheme)

    def _stored(
        self,
        contents: Contents,
        module: str,
        layout: Layout,
        shape: tuple[int, int],
        place: Slice | int | None,
        turned: bool,
    ) -> Stored:
        """Return one matrix of a module: all of it, one expert's, or one projection of that."""
        found = contents.parts[module]
        parts: Parts = {part: found[part] for part in found if part in layout.part_names}
        tensors = {part: contents.tensor_name(module, part) for part in parts}
        if place is None:
            return Stored(module=module, layout=layout, parts=parts, tensors=tensors, shape=shape)
        expert = place.expert if isinstance(place, Slice) else place
        own = expert_parts(parts, experts_in(parts), expert, turned=turned)
        if isinstance(place, Slice):
            own = projection_parts(own, shape[0], place.projections)
        first_row, row_step = 0, 1
        if isinstance(place, Slice) and self.interleaved:
            first_row, row_step = place.projection, place.projections
        elif isinstance(place, Slice):
            first_row = place.projection * shape[0]
        return Stored(
            module=module,
            layout=layout,
            parts=own,
            tensors=tensors,
            shape=shape,
            expert=expert,
            turned=turned,
            first_row=first_row,
            row_step=row_step,
        )


def _is_kept(layer: Layer) -> bool:
    """Tell whether a layer's tensors are those of the source as they are."""
    match, outcome, _ = layer
    if match.matrix is None or not match.is_whole:
        return False
    is_as_it_was = outcome.turned == match.matrix.turned
    is_plain = outcome.layout is PLAIN and match.matrix.layout is PLAIN
    is_kept_quantized = (
        outcome.count == LEFT_ALONE and outcome.layout is not PLAIN and not match.matrix.is_plain
    )
    return is_as_it_was and (is_plain or is_kept_quantized)


def _is_pair(layer: Layer) -> bool:
    return layer.outcome.layout is not None and not _is_kept(layer)


def unreadable(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Yield layers whose values in the source cannot be read."""
    for layer in layers:
        matrix = layer.match.matrix
        if _is_pair(layer) and matrix is not None and matrix.layout is None:
            yield layer
