"""Which module of the candidate stands for each module of the source.

Exporters write other prefixes, other names for the same projections, and experts in one tensor
where they lay apart, or apart where they lay in one. Names are compared as they are first; only
what is left over on both sides is compared by a common spelling. Where that leaves a choice,
nothing is taken: a wrong guess would hide a lost tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from conductor.probes.contents import (
    FUSED_PROJECTIONS,
    Contents,
    Form,
    Matrices,
    Matrix,
    experts_in,
    is_fused,
)
from conductor.probes.modules import OTHER, Names, Traits
from gates.criteria import UNKNOWN_KIND

_PREFIX = re.compile(r"^((model|language_model)\.)+")

_RENAMED_PARENTS = (
    (_PREFIX, ""),
    (re.compile(r"^(vision_tower|vision_model|visual)\."), "visual."),
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
)
"""Spellings of what a module lies in, and the common one. Read in this order."""

_RENAMED_PROJECTIONS: Mapping[str, str] = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names for the projections of an expert, and the usual ones."""

_RENAMED_FUSED: Mapping[str, str] = {
    "input_linear": "experts.gate_up_proj",
    "output_linear": "experts.down_proj",
}
"""Granite's names for the projections of all experts in one tensor, and the usual ones."""

PREFIXES = ("", "model.", "language_model.", "language_model.model.", "model.language_model.")
"""Prefixes under which one and the same module goes in configurations and tensors."""

_EXPERT = re.compile(r"\.experts\.(\d+)\.$")

_FUSED_IN: Mapping[str, tuple[tuple[str, int, int], ...]] = {
    "gate_proj": (("gate_up_proj", 0, 2), ("gate_proj", 0, 1)),
    "up_proj": (("gate_up_proj", 1, 2), ("up_proj", 0, 1)),
    "down_proj": (("down_proj", 0, 1),),
}
"""Fused tensors that may hold a projection: name, which of its projections, and of how many."""


class Slice(NamedTuple):
    """One projection of one expert in a fused module."""

    expert: int
    projection: int
    projections: int


@dataclass(frozen=True, eq=False, slots=True)
class Case:
    """What all matches that are alike have in common; a checkpoint has a few dozen.

    ``before`` is how the source stores the module, ``after`` how the candidate does: ``None``
    where it is lost.
    """

    traits: Traits
    matrix: Matrix | None
    before: Form
    after: Form | None


class Match(NamedTuple):
    """A module of the source and what stands for it; ``candidate`` is ``None`` where it is lost.

    ``source_slice`` is set where a fused module of the source is stored apart in the candidate,
    ``candidate_slice`` where it is the other way round. ``is_tied_head`` marks the head that only
    the candidate stores, matched with the embeddings, which have a match of their own.
    """

    source: str
    candidate: str | None
    case: Case
    source_slice: Slice | None = None
    candidate_slice: Slice | None = None
    is_tied_head: bool = False

    @property
    def traits(self) -> Traits:
        """Return what the module's name tells."""
        return self.case.traits

    @property
    def matrix(self) -> Matrix | None:
        """Return the weight matrix that the source has here."""
        return self.case.matrix

    @property
    def is_whole(self) -> bool:
        """Tell whether a module stands for a module, and not for a piece of one."""
        return self.source_slice is None and self.candidate_slice is None

    @property
    def layers(self) -> int:
        """Return the number of linears that this match stands for."""
        return 1 if self.source_slice or self.matrix is None else self.matrix.layers

    @property
    def shape(self) -> tuple[int, int]:
        """Return rows and columns of what is stored for one expert, or of the whole matrix."""
        if self.matrix is None:
            raise ValueError(f"{self.source} is no matrix")
        rows = self.matrix.rows
        if self.source_slice:
            rows //= self.source_slice.projections
        if self.candidate_slice:
            rows *= self.candidate_slice.projections
        return rows, self.matrix.columns


def match_modules(
    source: Contents, candidate: Contents, names: Names, matrices: Matrices, *, tied: bool
) -> list[Match]:
    """Return a match for every module of the source, and one for each expert that lies apart.

    ``tied`` models need not store their head; one that the candidate stores is matched with the
    embeddings that it is made from.
    """
    matched: list[Match] = []
    left: list[Match] = []
    cases: dict[tuple[Traits, Form, Form | None], Case] = {}
    for module, before in source.forms.items():
        alike = names.traits(module), before, candidate.forms.get(module)
        case = cases.get(alike)
        if case is None:
            traits, _, after = alike
            matrix = matrices.of(module, before, traits)
            if matrix is None and traits.kind == UNKNOWN_KIND:
                traits = replace(traits, kind=OTHER)
            case = Case(traits, matrix, before, after)
            # How fused experts lie may depend on the modules beside them.
            if case.matrix is None or not case.matrix.experts:
                cases[alike] = case
        (left if case.after is None else matched).append(Match(module, module, case))
    if left:
        renames = _Renames(left, source, candidate)
        for match in left:
            matched.extend(renames.find(match))
    if tied:
        matched.extend(_tied_head(matched, candidate, names))
    return matched


def select(matches: Iterable[Match], is_wanted: Callable[[Case], object]) -> Iterator[Match]:
    """Yield the matches whose case is wanted, in their order; each case is asked for once."""
    wanted = {case for case in {match.case for match in matches} if is_wanted(case)}
    if wanted:
        yield from (match for match in matches if match.case in wanted)


def without_prefix(module: str) -> str:
    """Return a module's name without what only says where the model lies."""
    return _PREFIX.sub("", module)


def common_name(module: str) -> str:
    """Return the common spelling of a module's name."""
    parent, _, leaf = module.rpartition(".")
    parent = _common_parent(f"{parent}." if parent else "")
    return parent + _renamed_leaves(parent).get(leaf, leaf)


def _common_parent(parent: str) -> str:
    for pattern, common in _RENAMED_PARENTS:
        parent = pattern.sub(common, parent)
    return parent


def _renamed_leaves(parent: str) -> Mapping[str, str]:
    """Return the other names of what lies in a parent of this common name, and the usual ones."""
    if _EXPERT.search(parent):
        return _RENAMED_PROJECTIONS
    return _RENAMED_FUSED if parent.endswith(".mlp.") else {}


class _Renames:
    """What is left over on both sides, by common spelling."""

    def __init__(self, left: Iterable[Match], source: Contents, candidate: Contents) -> None:
        self._candidate = candidate
        self._cases: dict[tuple[Case, Form | None], Case] = {}
        self._wanted = _unambiguous(match.source for match in left)
        self._offered = _unambiguous(
            module for module in candidate.parts if module not in source.parts
        )

    def find(self, match: Match) -> Iterator[Match]:
        """Yield what stands for a module under another name."""
        common = common_name(match.source)
        if self._wanted.get(common) is None:
            yield self._stored(match, None)
            return
        found = self._offered.get(common)
        if found is not None:
            yield self._stored(match, found)
        elif match.matrix is not None and match.matrix.experts:
            yield from self._apart(match, match.matrix, common)
        else:
            yield self._fused(match, common)

    def _stored(self, match: Match, candidate: str | None) -> Match:
        """Return a match with the module that stands for it."""
        after = self._candidate.forms[candidate] if candidate is not None else None
        key = match.case, after
        if key not in self._cases:
            self._cases[key] = replace(match.case, after=after)
        return match._replace(candidate=candidate, case=self._cases[key])

    def _apart(self, match: Match, matrix: Matrix, common: str) -> Iterator[Match]:
        """Yield a match for each expert and projection, or one lost module where there is none."""
        parent, _, leaf = common.rpartition(".")
        projections = FUSED_PROJECTIONS.get(leaf, (leaf,))
        found = [
            self._stored(match, self._offered.get(f"{parent}.{expert}.{projection}"))._replace(
                source_slice=Slice(expert, place, len(projections))
            )
            for expert in range(matrix.experts)
            for place, projection in enumerate(projections)
        ]
        if any(each.candidate is not None for each in found):
            yield from found
        else:
            yield self._stored(match, None)

    def _fused(self, match: Match, common: str) -> Match:
        """Return the slice of a fused module that an expert of the source is stored in."""
        parent, _, leaf = common.rpartition(".")
        expert = _EXPERT.search(f"{parent}.")
        if expert is None or match.matrix is None:
            return self._stored(match, None)
        number = int(expert[1])
        layer = parent.rpartition(".")[0]
        for fused, place, projections in _FUSED_IN.get(leaf, ()):
            module = self._offered.get(f"{layer}.{fused}")
            parts = self._candidate.parts[module] if module is not None else {}
            if is_fused(parts) and number < experts_in(parts):
                return self._stored(match, module)._replace(
                    candidate_slice=Slice(number, place, projections)
                )
        return self._stored(match, None)


def _unambiguous(modules: Iterable[str]) -> dict[str, str | None]:
    """Return modules by common name; ``None`` where several share one."""
    found: dict[str, str | None] = {}
    parents: dict[str, tuple[str, Mapping[str, str]]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        known = parents.get(parent)
        if known is None:
            common = _common_parent(f"{parent}." if parent else "")
            known = parents[parent] = common, _renamed_leaves(common)
        name = known[0] + known[1].get(leaf, leaf)
        found[name] = None if name in found else module
    return found


def _tied_head(matched: list[Match], candidate: Contents, names: Names) -> Iterator[Match]:
    """Yield a match of the embeddings with a head that only the candidate stores."""
    if any(match.traits.kind == "lm_head" for match in matched):
        return
    embeddings = [m for m in matched if m.traits.kind == "embeddings" and m.matrix is not None]
    heads = [f"{prefix}lm_head" for prefix in PREFIXES if f"{prefix}lm_head" in candidate.parts]
    if len(embeddings) == 1 and len(heads) == 1:
        case = replace(
            embeddings[0].case, traits=names.traits(heads[0]), after=candidate.forms[heads[0]]
        )
        yield embeddings[0]._replace(candidate=heads[0], case=case, is_tied_head=True)
