"""Hold three accounts of every layer against each other: what is meant, what is, what is declared.

What is meant follows from the source's matrices and the recipe, what is from the candidate's
tensors, what is declared from its configuration. No two of them will do: exporters write their list
of exceptions from whatever ended up unquantized, so the last two agree on a layer that was missed.

A layer has one outcome, the one that tells most about it. Outcomes are worked out once for all
layers that are alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from conductor.probes.contents import WEIGHT_PARTS, Contents, Form, expert_parts, experts_in
from conductor.probes.findings import Findings
from conductor.probes.formats.layout import (
    PLAIN,
    UNDECLARED,
    UNQUANTIZED,
    Format,
    Layout,
    Parts,
    Scheme,
    describe,
)
from conductor.probes.matching import (
    PREFIXES,
    Case,
    Match,
    common_name,
    select,
    without_prefix,
)
from conductor.probes.modules import EXPERTS, HEADS, OTHER
from gates.criteria import SIXTEEN_BITS, UNKNOWN_KIND, Recipe
from gates.evidence import Bucket

LEFT_ALONE, UNEXPECTED, MISMATCH = (
    "BF16_or_excluded",
    "unexpected_unquantized",
    "declaration_mismatch",
)
COUNTS = ("NVFP4", "FP8", "INT4", "INT8")
"""Precisions that are counted whether or not there are any; others where there are some."""

_ATTENTION_OF_TORCH = "in_proj_weight"
"""Part that tells torch's own attention, whose ``out_proj`` is a linear of a class of its own."""

_MEMBERS_SHOWN = 4


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Outcome:
    """What became of a layer.

    ``count`` is the count it belongs to and ``kind`` the finding about it, with a ``remark`` for
    the reader. ``other_activations`` is a remark of its own. ``layout`` is ``None`` where it is
    none known; ``turned`` tells how a fused tensor lies. ``group_size`` is as stored, and
    ``is_group_usual`` where it is as the recipe means.
    """

    count: str
    kind: str | None = None
    remark: str = ""
    other_activations: str = ""
    layout: Layout | None = None
    turned: bool = False
    precision: str = ""
    group_size: int | None = None
    is_group_usual: bool = True


class Layer(NamedTuple):
    """A matrix of the source that the candidate has, with its outcome and declaration."""

    match: Match
    outcome: Outcome
    scheme: Scheme


@dataclass(kw_only=True)
class Intent:
    """All layers of a candidate, and how many there are of each outcome.

    ``quantized_beside`` are the cases that are quantized though the recipe does not mean them;
    ``finest_group`` is the smallest group of those that it means, ``None`` where none has any.
    """

    counts: dict[str, int]
    layers: list[Layer]
    quantized_beside: frozenset[Case]
    finest_group: int | None


def examine(
    matches: list[Match],
    candidate: Contents,
    checkpoint_format: Format,
    recipe: Recipe,
    findings: Findings,
    *,
    broken: Collection[str] = (),
) -> Intent:
    """Count the layers by outcome and note all that is wrong with one.

    Modules among ``broken`` have tensors that are not whole, and are left out.
    """
    counts = dict.fromkeys((*COUNTS, recipe.bucket, LEFT_ALONE, UNEXPECTED, MISMATCH), 0)
    layers = list(_layers(matches, _Reading(checkpoint_format, recipe, candidate), broken))
    examples = {layer.outcome: layer for layer in layers}
    quantized = [each for each in examples.values() if each.outcome.layout not in (None, PLAIN)]
    groups = (outcome.group_size for outcome in examples if outcome.count == recipe.bucket)
    intent = Intent(
        counts={str(name): count for name, count in counts.items()},
        layers=layers,
        quantized_beside=frozenset(
            match.case for match, _, _ in quantized if not recipe.means(match.traits.kind)
        ),
        finest_group=min(filter(None, groups), default=None),
    )
    for outcome, count in Counter(layer.outcome for layer in intent.layers).items():
        linears = count * examples[outcome].match.layers
        intent.counts[outcome.count] = intent.counts.get(outcome.count, 0) + linears
    noted = {outcome for outcome in examples if outcome.kind or outcome.other_activations}
    for layer in _with_outcomes(intent.layers, noted):
        _note(layer, findings)
    mixed = _Groups(examples.values())
    for layer in _with_outcomes(intent.layers, mixed.outcomes):
        mixed.add(layer)
    mixed.report(findings)
    for match in select(matches, _is_unclassified):
        findings.add("unclassified", match.source, match.traits.kind)
    nameless = {each for each in examples if each.kind is None and each.layout is None}
    unreadable = list(_with_outcomes(intent.layers, nameless))
    findings.extend("contradiction", checkpoint_format.problems)
    if unreadable or not checkpoint_format.known:
        findings.add("unknown_format", _seen(checkpoint_format, unreadable, candidate))
    return intent


def _layers(
    matches: Iterable[Match], reading: _Reading, broken: Collection[str]
) -> Iterator[Layer]:
    for match in matches:
        if match.case.matrix is None or match.candidate is None or match.candidate in broken:
            continue
        scheme = reading.declared(match)
        yield Layer(match, reading.outcome(match, scheme), scheme)


def _with_outcomes(layers: Iterable[Layer], outcomes: Collection[Outcome]) -> Iterator[Layer]:
    if outcomes:
        yield from (layer for layer in layers if layer.outcome in outcomes)


def _note(layer: Layer, findings: Findings) -> None:
    match, outcome, _ = layer
    if outcome.kind is not None:
        name = f"{match.candidate} ({outcome.remark})" if outcome.remark else match.candidate
        findings.add(outcome.kind, name or "", match.traits.kind, count=match.layers)
    if outcome.other_activations:
        name = f"{match.candidate} ({outcome.other_activations})"
        findings.add("other_activations", name, match.traits.kind, count=match.layers)


def _is_unclassified(case: Case) -> bool:
    return case.matrix is not None and case.traits.kind in (OTHER, UNKNOWN_KIND)


def _seen(checkpoint_format: Format, unreadable: list[Layer], candidate: Contents) -> str:
    """Name what cannot be read, and what its layers look like."""
    if not unreadable:
        return checkpoint_format.name
    match, _, scheme = unreadable[0]
    module = match.candidate or ""
    declares = f" declares {scheme.precision}" if scheme.precision != UNQUANTIZED else ""
    return (
        f"{checkpoint_format.name}{declares}: {len(unreadable)} layer(s) such as {module} "
        f"({describe(candidate.parts[module])})"
    )


class _Reading:
    """Reads what layers are and are declared, once for all that are alike."""

    def __init__(self, checkpoint_format: Format, recipe: Recipe, candidate: Contents) -> None:
        self._format = checkpoint_format
        self._recipe = recipe
        self._candidate = candidate
        self._precisions = {layout.precision for layout in checkpoint_format.layouts}
        self._asked: dict[Case, bool] = {}
        self._outcomes: dict[tuple[object, ...], Outcome] = {}
        self._views: dict[tuple[Form, bool], Parts] = {}

    def declared(self, match: Match) -> Scheme:
        """Return what the configuration gives a layer that it certainly speaks of.

        Whether a router or an embedding is a linear module to the engine cannot be told from a
        file, so for those only what they are counts.
        """
        case = match.case
        asked = self._asked.get(case)
        if asked is None:
            traits = case.traits
            asked = traits.linear or traits.optional or self._recipe.means(traits.kind)
            self._asked[case] = asked
        if not asked:
            return UNDECLARED
        module = match.candidate or ""
        if case.traits.kind == "lm_head" and self._is_head_left_alone(module):
            return UNDECLARED
        return self._format.declared(module)

    def _is_head_left_alone(self, module: str) -> bool:
        """Tell whether the head is declared unquantized by one of its names.

        A configuration may have the name that the exporter's own classes give it.
        """
        parent = module.rpartition(".")[0]
        names = (f"{parent}.{head}" if parent else head for head in HEADS)
        return any(self._format.declared(name).precision == UNQUANTIZED for name in names)

    def outcome(self, match: Match, scheme: Scheme) -> Outcome:
        """Return what became of a layer, one and the same for all that are alike."""
        case = match.case
        pieces = match.source_slice or match.candidate_slice
        key = case, scheme, pieces and pieces.projections
        outcome = self._outcomes.get(key)
        if outcome is None:
            outcome = self._work_out(match, scheme)
            # Of a layer that is to be left alone and is declared quantized, the name tells more.
            if scheme is UNDECLARED or self._recipe.means(case.traits.kind):
                self._outcomes[key] = outcome
        return outcome

    def _work_out(self, match: Match, scheme: Scheme) -> Outcome:
        source, stored = match.case.before, match.case.after
        if stored is None:
            raise ValueError(f"{match.source} is lost")
        layout, turned, parts = self._layout(match, source, stored, scheme)
        if not (layout is PLAIN or self._format.known):
            return Outcome(count=MISMATCH)
        if layout is None:
            known = self._is_known(scheme)
            return self._in_no_layout(match, stored) if known else Outcome(count=MISMATCH)
        meant = self._recipe.means(match.traits.kind)
        is_kept = layout is not PLAIN and _alike(source, stored)
        if layout is PLAIN:
            count, kind, remark = self._unquantized(match, scheme, meant=meant)
        elif is_kept and not (meant and layout.precision == self._recipe.bucket):
            count, kind, remark = self._kept(match, layout, scheme, meant=meant)
        else:
            count, kind, remark = self._quantized(match, layout, parts, scheme, meant=meant)
            if is_kept and kind is None:
                kind, remark = "quantized_in_source", f"is {layout.precision} there as well"
        is_good = count not in (LEFT_ALONE, UNEXPECTED, MISMATCH)
        return Outcome(
            count=count,
            kind=kind,
            remark=remark,
            other_activations=self._other_activations(scheme) if is_good else "",
            layout=layout,
            turned=turned,
            precision=layout.precision,
            group_size=layout.group_size(parts, match.shape),
            is_group_usual=self._is_group_usual(match, layout, parts),
        )

    def _is_known(self, scheme: Scheme) -> bool:
        """Tell whether a declared precision is one that this format's tensors can be in.

        What engines make of another cannot be told, whatever the tensors are.
        """
        return scheme.precision in (UNQUANTIZED, *Bucket) or scheme.precision in self._precisions

    def _layout(
        self, match: Match, source: Form, stored: Form, scheme: Scheme
    ) -> tuple[Layout | None, bool, Parts]:
        """Return the layout of a layer, how it is turned, and the tensors of one matrix of it."""
        matrix = match.matrix
        for turned, parts in self._matrices(match, stored):
            layout = self._format.layout(parts, match.shape, scheme)
            if layout is not None:
                return layout, turned, parts
        if matrix is not None and matrix.layout is not None and _alike(source, stored):
            turned = matrix.turned
            view = dict(self._matrices(match, stored)).get(turned, stored.parts)
            return matrix.layout, turned, view
        return None, False, stored.parts

    def _matrices(self, match: Match, stored: Form) -> Iterator[tuple[bool, Parts]]:
        """Yield how the tensors may be seen as [rows, columns]; as the source has them first."""
        matrix = match.matrix
        is_apart = match.source_slice is not None
        if matrix is None or is_apart or not (matrix.experts or match.candidate_slice):
            yield False, stored.parts
            return
        experts = experts_in(stored.parts)
        if not experts or (matrix.experts and experts != matrix.experts):
            return
        for turned in (matrix.turned, not matrix.turned):
            view = self._views.get((stored, turned))
            if view is None:
                view = expert_parts(stored.parts, experts, 0, turned=turned)
                self._views[stored, turned] = view
            yield turned, view

    def _in_no_layout(self, match: Match, stored: Form) -> Outcome:
        """Return the outcome of tensors that are no matrix of this shape."""
        shape = PLAIN.shape(stored.parts)
        if shape is not None:
            remark = f"{list(match.shape)} is now {list(shape)}"
            return Outcome(count=MISMATCH, kind="reshaped", remark=remark)
        if not stored.parts.keys() & WEIGHT_PARTS:
            remark = f"the weight; there are {', '.join(sorted(stored.parts))}"
            return Outcome(count=MISMATCH, kind="lost", remark=remark)
        return Outcome(
            count=MISMATCH,
            kind="unknown_layout",
            remark=f"stored in no known layout: {describe(stored.parts)}",
        )

    def _unquantized(
        self, match: Match, scheme: Scheme, *, meant: bool
    ) -> tuple[str, str | None, str]:
        is_declared = scheme.precision != UNQUANTIZED
        remark = f"is unquantized, declared {scheme.precision}" if is_declared else ""
        if meant:
            is_unknown = match.traits.kind == UNKNOWN_KIND
            remarks = (remark, "of no kind known" if is_unknown else "")
            return UNEXPECTED, "left_unquantized", ", ".join(filter(None, remarks))
        if match.traits.optional or not is_declared:
            return LEFT_ALONE, None, ""
        if not self._is_declared_everywhere(match.candidate or ""):
            return LEFT_ALONE, None, ""
        if self._is_of_another_class(match.candidate or ""):
            return LEFT_ALONE, "declared_by_class", remark
        return MISMATCH, "declared_not_so", remark

    def _is_of_another_class(self, module: str) -> bool:
        """Tell whether a module is a linear that exporters, who ask for its class, pass over."""
        parent, _, leaf = module.rpartition(".")
        return leaf == "out_proj" and _ATTENTION_OF_TORCH in self._candidate.parts.get(parent, {})

    def _is_declared_everywhere(self, module: str) -> bool:
        """Tell whether a module is declared quantized by whatever prefix it goes.

        Loaders map the names of tensors and of the configuration to their own before they compare.
        """
        spellings = (without_prefix(module), common_name(module))
        names = (prefix + name for name in spellings for prefix in PREFIXES)
        return all(self._format.declared(name).precision != UNQUANTIZED for name in names)

    def _kept(
        self, match: Match, layout: Layout, scheme: Scheme, *, meant: bool
    ) -> tuple[str, str | None, str]:
        """Return the outcome of a layer that is as quantized as the source has it."""
        if meant:
            return UNEXPECTED, "left_unquantized", f"is {layout.precision}, as in the source"
        if match.traits.linear and scheme.precision != layout.precision:
            return (MISMATCH, *_otherwise(layout, scheme))
        return LEFT_ALONE, None, ""

    def _quantized(
        self, match: Match, layout: Layout, parts: Parts, scheme: Scheme, *, meant: bool
    ) -> tuple[str, str | None, str]:
        precision, recipe = layout.precision, self._recipe
        if not meant and not match.traits.optional:
            remark = f"is {precision}, and the recipe leaves {match.traits.kind} alone"
            return MISMATCH, "not_intended", remark
        if precision != recipe.bucket and precision == scheme.precision:
            remark = f"is {precision}, and the recipe means {recipe.bucket}"
            return MISMATCH, "wrong_precision", remark
        if precision != scheme.precision:
            return (MISMATCH, *_otherwise(layout, scheme))
        missing = layout.missing(parts, scheme)
        if missing:
            return MISMATCH, "missing_companion", f"without {', '.join(missing)}"
        group, columns = layout.group_size(parts, match.shape), match.shape[1]
        found = f"in groups of {group}" if group else "without groups"
        if scheme.group_size and not _is_group(group, scheme.group_size, columns):
            return MISMATCH, "wrong_group_size", f"{found}, declared {scheme.group_size}"
        if not meant:
            return precision, "quantized_outside", f"is {precision}"
        if not self._is_group_usual(match, layout, parts):
            is_finer = group is not None and group < (recipe.group_size or 0)
            kind = "finer_group_size" if is_finer else "wrong_group_size"
            remark = f"{found}, and the recipe means {recipe.group_size}"
            return (precision if is_finer else MISMATCH), kind, remark
        return precision, None, ""

    def _other_activations(self, scheme: Scheme) -> str:
        meant, declared = self._recipe.activations, scheme.activations or SIXTEEN_BITS
        if meant is None or meant == declared:
            return ""
        return f"inputs in {declared}, and the recipe means {meant}"

    def _is_group_usual(self, match: Match, layout: Layout, parts: Parts) -> bool:
        """Tell whether groups are as the recipe means, or whole rows that these do not divide."""
        group, usual = layout.group_size(parts, match.shape), self._recipe.group_size
        columns = match.shape[1]
        return (
            usual is None
            or _is_group(group, usual, columns)
            or (group is None and columns % usual != 0)
        )


def _otherwise(layout: Layout, scheme: Scheme) -> tuple[str, str]:
    kind = "not_declared" if scheme.precision == UNQUANTIZED else "declared_otherwise"
    return kind, f"is {layout.precision}, declared {scheme.precision}"


def _alike(source: Form, stored: Form) -> bool:
    """Tell whether two modules have the same tensors but for their values."""
    return source.parts.keys() == stored.parts.keys() and all(
        (tensor.dtype, tensor.shape) == (stored.parts[part].dtype, stored.parts[part].shape)
        for part, tensor in source.parts.items()
    )


def _is_group(group: int | None, wanted: int, columns: int) -> bool:
    """Tell whether groups are as wanted, or as near to it as a matrix of so many columns allows.

    One scale serves a matrix with no more columns than a group; columns that groups do not divide
    lie in groups of a smaller power of two, or end in a group that is not full.
    """
    if group == wanted:
        return True
    if columns <= wanted:
        return group is None or group <= columns
    if group is None or columns % wanted == 0:
        return False
    is_power = group & (group - 1) == 0
    return (group < wanted and is_power) or -(-columns // group) == -(-columns // wanted)


_State = tuple[str, int | None]
"""What all members of a group must be alike in: precision, and an unusual size of its groups."""


def _state(outcome: Outcome) -> _State:
    return outcome.precision, None if outcome.is_group_usual else outcome.group_size


class _Groups:
    """Layers that engines load into one matrix, by what they are in."""

    def __init__(self, examples: Iterable[Layer]) -> None:
        """Look only at outcomes of layers some of whose group are stored otherwise somewhere."""
        found: dict[str, dict[_State, set[Outcome]]] = defaultdict(lambda: defaultdict(set))
        for match, outcome, _ in examples:
            if match.traits.group is not None and outcome.layout is not None:
                found[match.traits.group][_state(outcome)].add(outcome)
        self.outcomes = {
            outcome
            for states in found.values()
            if len(states) > 1
            for outcomes in states.values()
            for outcome in outcomes
        }
        self._members: dict[tuple[str, str], dict[_State, list[str]]] = {}
        self._kinds: dict[tuple[str, str], str] = {}

    def add(self, layer: Layer) -> None:
        """Note one member; only the first few of each precision keep their names."""
        traits, module = layer.match.traits, layer.match.candidate or ""
        parent = module.rpartition(".")[0]
        group = traits.group or ""
        if group == EXPERTS and not parent.endswith(EXPERTS):
            parent = parent.rpartition(".")[0]
        key = parent, group
        state = _state(layer.outcome)
        members = self._members.get(key)
        if members is None:
            self._members[key] = {state: [module]}
            self._kinds[key] = traits.kind
            return
        names = members.get(state)
        if names is None:
            members[state] = [module]
        elif len(names) < _MEMBERS_SHOWN and module not in names:
            names.append(module)

    def report(self, findings: Findings) -> None:
        """Note every group whose members differ, with members of each precision."""
        for key, members in self._members.items():
            if len(members) > 1:
                parent, group = key
                findings.add(
                    "mixed_group",
                    f"{parent}: {group} ({_members(parent, members)})",
                    self._kinds[key],
                )


def _members(parent: str, members: Mapping[_State, list[str]]) -> str:
    """Name the members by precision: ``q_proj, k_proj NVFP4; v_proj FP8``."""
    return "; ".join(
        f"{', '.join(name.removeprefix(f'{parent}.') for name in names)} {precision}"
        + (f" in groups of {group}" if group else "")
        for (precision, group), names in members.items()
    )
