"""Find what the candidate has lost of its source, and what it has beside it.

Every tensor of the source is present, part of a matrix that is stored another way, or knowingly
left out. What a matrix is stored as is another question; here it counts that it is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from conductor.probes.contents import FUSED_PROJECTIONS, Contents
from conductor.probes.findings import Findings
from conductor.probes.formats.layout import FLOAT_DTYPES, PLAIN, Format
from conductor.probes.intent import Intent
from conductor.probes.matching import Case, Match, select
from conductor.probes.modules import EXPERTS, Names
from conductor.probes.safetensors_header import Tensor

COMPUTED_PARTS = frozenset({"inv_freq", "cos_cached", "sin_cached", "masked_bias", "position_ids"})
"""Tables that loaders compute, which old checkpoints store; see ``is_computed`` for one more."""

_MASK = "bias"
"""Name that GPT-2, GPT-J and GPT-NeoX give the causal mask of an attention module."""

_TIED_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


def is_computed(part: str, tensor: Tensor) -> bool:
    """Tell whether a tensor is one that loaders compute, such as a causal mask [1, 1, n, n]."""
    if part == _MASK and len(tensor.shape) == 4:
        return tensor.shape == (1, 1, *[tensor.shape[-1]] * 2)
    return part in COMPUTED_PARTS


def find_losses(
    matches: list[Match],
    source: Contents,
    candidate: Contents,
    source_format: Format,
    findings: Findings,
    *,
    tied: bool,
    broken: Collection[str] = (),
) -> None:
    """Note tensors of the source that are lost, reshaped or left out.

    ``tied`` models store their head or their embeddings. Modules among ``broken`` have tensors
    that are not whole, which is said elsewhere.
    """
    losses = _Losses(source, candidate, source_format, findings, broken)
    present = {case.traits.kind for case in {match.case for match in matches} if case.after}
    for match in select(matches, losses.are_possible):
        if match.candidate is not None:
            losses.compare(match)
        elif tied and _is_made_from_other(match, present):
            for part in source.parts[match.source]:
                name = source.tensor_name(match.source, part)
                findings.add("not_stored", name, match.traits.kind)
        else:
            losses.report(match)


def _is_made_from_other(match: Match, present: Collection[str]) -> bool:
    """Tell whether a lost module is the head or the embeddings, and the other one is there."""
    if match.traits.kind == "lm_head":
        return "embeddings" in present
    return match.source.rpartition(".")[2] in _TIED_EMBEDDINGS and "lm_head" in present


class _Losses:
    """Compares the tensors of modules that stand for each other."""

    def __init__(
        self,
        source: Contents,
        candidate: Contents,
        source_format: Format,
        findings: Findings,
        broken: Collection[str],
    ) -> None:
        self._source = source
        self._candidate = candidate
        self._format = source_format
        self._findings = findings
        self._broken = broken
        self._ordinary: dict[Case, tuple[str, ...]] = {}

    def are_possible(self, case: Case) -> bool:
        """Tell whether tensors may be lost: a module, or what is there beside its matrix."""
        return case.after is None or bool(self._ordinary_parts(case))

    def compare(self, match: Match) -> None:
        """Compare what a module has beside a matrix that may be stored another way."""
        before = self._source.parts[match.source]
        after = self._candidate.parts[match.candidate or ""]
        for part in self._ordinary_parts(match.case):
            self._compare(match, part, before[part], after.get(part))

    def report(self, match: Match) -> None:
        """Note a module that is lost with all its tensors."""
        if match.source_slice is not None:
            parent, _, leaf = match.source.rpartition(".")
            expert, place, _ = match.source_slice
            projection = FUSED_PROJECTIONS.get(leaf, (leaf,))[place]
            experts = parent if parent.endswith(EXPERTS) else f"{parent}.{EXPERTS}"
            self._lose(match, f"{experts}.{expert}.{projection}")
            return
        for part in self._source.parts[match.source]:
            if match.matrix is None or part in self._essential(match):
                self._compare(match, part, self._source.parts[match.source][part], None)

    def _essential(self, match: Match) -> Collection[str]:
        """Return the parts that make a lost matrix worth naming: its weight, and its bias."""
        parts = match.case.before.parts
        weight = max(parts, key=lambda part: parts[part].size_bytes)
        return {*self._ordinary_parts(match.case), weight}

    def _ordinary_parts(self, case: Case) -> tuple[str, ...]:
        """Return the parts that must be in the candidate as they are.

        A bias is one, also of a matrix; the scales of a matrix that the source has quantized are
        none.
        """
        found = self._ordinary.get(case)
        if found is None:
            found = self._ordinary[case] = tuple(self._find_ordinary(case))
        return found

    def _find_ordinary(self, case: Case) -> Iterator[str]:
        if case.matrix is None:
            yield from case.before.parts
            return
        layout = case.matrix.layout
        for part in case.before.parts:
            is_own = part == "weight" or (layout is not None and part in layout.part_names)
            is_scale = layout is not PLAIN and self._format.explains(part)
            if part == "bias" or not (is_own or is_scale or "scale" in part):
                yield part

    def _compare(self, match: Match, part: str, before: Tensor, after: Tensor | None) -> None:
        name = self._source.tensor_name(match.source, part)
        if after is None:
            if is_computed(part, before) or self._is_cache_scale(match, part):
                self._findings.add("not_stored", name, match.traits.kind)
            elif match.source not in self._broken and match.candidate not in self._broken:
                self._lose(match, name)
            return
        shape = _expected_shape(match, part, before, after)
        if shape != after.shape:
            self._reshape(match, name, list(before.shape), list(after.shape))
        elif after.dtype != before.dtype and not {after.dtype, before.dtype} <= {*FLOAT_DTYPES}:
            self._reshape(match, name, before.dtype, after.dtype)

    def _is_cache_scale(self, match: Match, part: str) -> bool:
        return match.matrix is None and part in self._format.extra_parts

    def _lose(self, match: Match, name: str) -> None:
        self._findings.add("lost", name, match.traits.kind)

    def _reshape(self, match: Match, name: str, before: object, after: object) -> None:
        self._findings.add("reshaped", f"{name} ({before} is now {after})", match.traits.kind)


def _expected_shape(match: Match, part: str, before: Tensor, after: Tensor) -> tuple[int, ...]:
    """Return the shape that a part must have, where experts lie apart on one side only."""
    if match.source_slice is not None and part == "bias" and before.shape:
        return (before.shape[-1] // match.source_slice.projections,)
    if match.candidate_slice is not None and part == "bias" and before.shape:
        return (*after.shape[:1], before.shape[-1] * match.candidate_slice.projections)
    return before.shape


_CACHE_SCALES = ("k_scale", "v_scale")


def find_cache_gaps(candidate: Contents, names: Names, findings: Findings) -> None:
    """Name attention modules without a scale of the key-value cache that others have.

    The scales lie beside the projections, or in the module that holds those.
    """
    if not any(part in form.parts for form in candidate.distinct_forms for part in _CACHE_SCALES):
        return
    scales: dict[str, set[str]] = defaultdict(set)
    for module, parts in candidate.parts.items():
        parent, _, leaf = module.rpartition(".")
        attention = parent if leaf in ("k_proj", "v_proj") else module
        found = {part for part in _CACHE_SCALES if part in parts}
        if found or (leaf == "k_proj" and names.traits(module).kind == "attention.qkv"):
            scales[attention] |= found
    wanted = set().union(*scales.values())
    for attention, found in scales.items():
        for part in sorted(wanted - found):
            findings.add("missing_companion", f"{attention} (without {part})", "attention.qkv")


def find_additions(
    matches: list[Match],
    intent: Intent,
    candidate: Contents,
    checkpoint_format: Format,
    names: Names,
    findings: Findings,
) -> None:
    """Note tensors of the candidate that neither the source nor its format explains."""
    used = {match.candidate for match in matches}
    for module, parts in candidate.parts.items():
        if module in used:
            continue
        for part, tensor in parts.items():
            if part not in checkpoint_format.extra_parts and not is_computed(part, tensor):
                findings.add(
                    "added", candidate.tensor_name(module, part), names.traits(module).kind
                )
    plain_layers = [layer.match for layer in intent.layers if layer.outcome.layout is PLAIN]
    plain = {match.candidate for match in plain_layers}
    plain_cases = {match.case for match in plain_layers}

    def beside(case: Case, *, is_quantized: bool) -> list[str]:
        """Return the parts that neither the source nor the format explains."""
        return [
            part
            for part in (case.after.parts if case.after else ())
            if part not in case.before.parts
            and part != "weight"
            and part not in checkpoint_format.extra_parts
            and not (is_quantized and _explains(checkpoint_format, part))
        ]

    def has_more(case: Case) -> bool:
        return bool(beside(case, is_quantized=case.matrix is not None and case not in plain_cases))

    for match in select(matches, has_more):
        module = match.candidate or ""
        is_quantized = match.matrix is not None and module not in plain
        for part in beside(match.case, is_quantized=is_quantized):
            findings.add("added", candidate.tensor_name(module, part), match.traits.kind)


def find_originals(
    matches: list[Match], intent: Intent, candidate: Contents, findings: Findings
) -> None:
    """Note original weights of layers whose quantized weights go by another name."""
    layouts = {layer.match.case: layer.outcome.layout for layer in intent.layers}

    def keeps_original(case: Case) -> bool:
        layout = layouts.get(case)
        parts = case.after.parts if case.after else {}
        return layout not in (None, PLAIN) and "weight" in parts.keys() - layout.part_names

    for match in select(matches, keeps_original):
        name = candidate.tensor_name(match.candidate or "", "weight")
        findings.add("left_beside", name, match.traits.kind)


def _explains(checkpoint_format: Format, part: str) -> bool:
    """Tell whether a quantized matrix may have a part; of an unknown format, anything may be."""
    return not checkpoint_format.known or checkpoint_format.explains(part)
