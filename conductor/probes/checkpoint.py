"""Measure a quantized checkpoint beside its source.

What should be quantized comes from the source's weight matrices and the recipe; what is quantized,
from the candidate's tensors; what is declared, from its configuration. Headers alone tell how the
three agree, what is lost and how large it should be; numbers and the files beside the weights come
after. The probe counts and names, executes nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conductor.probes.completeness import (
    find_additions,
    find_cache_gaps,
    find_losses,
    find_originals,
)
from conductor.probes.contents import Contents, Matrices
from conductor.probes.findings import Findings, Measurements
from conductor.probes.formats import ALL_LAYOUTS, find_format
from conductor.probes.formats.layout import UNDECLARED, Format
from conductor.probes.intent import Layer, examine
from conductor.probes.matching import match_modules
from conductor.probes.metadata import metadata_diffs
from conductor.probes.modules import Names
from conductor.probes.pairs import Counterparts, unreadable
from conductor.probes.reading import COPY_AGAIN, ProbeError, read_object, without_collector
from conductor.probes.safetensors_header import (
    Weights,
    pickled_files,
    read_weights,
    read_whole,
)
from conductor.probes.servability import QuantizedLinear, Target, lint, lint_everywhere
from conductor.probes.sizes import Census, bits_per_weight
from gates.criteria import Recipe

__all__ = ["ProbeError", "predict_bytes", "probe_checkpoint", "probe_headers"]

CONFIG = "config.json"

HEADER_CHECKS = ("integrity", "completeness", "intent")

UNREADABLE = Format(
    name="unreadable", layouts=ALL_LAYOUTS, declared=lambda _: UNDECLARED, known=False
)
"""Format of a checkpoint whose declaration is in a file that cannot be read."""

Progress = Callable[[int, int], None]
"""Told the bytes read so far, and of how many."""

_Read = TypeVar("_Read")


def probe_headers(checkpoint: Path, source: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the checkpoint summary as far as headers and ``config.json`` tell.

    Sizes are bytes of whole tensors. ``layer_precision_counts`` holds every weight matrix of the
    source that has a counterpart once, with fused experts as experts times projections.
    ``examined`` names the checks that were made; no others have anything in ``findings``.

    Raises:
        ProbeError: a directory has no weights or no readable configuration, the source's are not
            whole or hide the shapes of their matrices, or both are the same directory.
    """
    with without_collector():
        return _examine(checkpoint, source, recipe).summary


def predict_bytes(source: Path, recipe: Recipe) -> list[int]:
    """Return the least and the most bytes of what ``recipe`` makes of ``source``: no export needed.

    Raises:
        ProbeError: the source's weights are not whole, or its configuration cannot be read.
    """
    with without_collector():
        weights, config = read_whole(source), read_object(source / CONFIG, COPY_AGAIN)
        contents = Contents(weights.tensors)
        layouts = find_format(source, config, weights.tensors).layouts
        matrices = Matrices(source, contents, config, layouts)
        tied = _is_tied(config)
        matches = match_modules(contents, contents, Names(config), matrices, tied=tied)
        return Census(matches).expected_bytes(recipe, tied=tied)


def probe_checkpoint(
    checkpoint: Path,
    source: Path,
    recipe: Recipe,
    *,
    deep: bool = False,
    target: Target | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the checkpoint summary of ``checkpoint``, made from ``source`` with ``recipe``.

    Adds to ``probe_headers`` what the tensors hold, of which ``deep`` reads every block, what the
    files beside them say, and whether ``target`` would load them. Where nobody asked for a target,
    all that are known are asked, and their answers are notes.

    Raises:
        ProbeError: as for ``probe_headers``, or a file that exists cannot be read.
    """
    # Reading tensors takes numpy, which takes longer to load than headers take to read.
    from conductor.probes.values import numbers

    with without_collector():
        examination = _examine(checkpoint, source, recipe)
    findings, measurements = examination.findings, Measurements()
    counterparts = examination.counterparts
    for layer in unreadable(counterparts.layers):
        findings.add("not_measured", layer.match.source, layer.match.traits.kind)
    seen = numbers.scan(
        examination.weights,
        examination.source_weights,
        counterparts.pairs(examination.weights.shard_of),
        counterparts.kept(examination.weights.shard_of),
        findings,
        measurements,
        deep=deep,
        progress=progress or (lambda done, total: None),
        transformed=examination.transformed,
    )
    answered = _ask_engines(checkpoint, examination, target)
    return {
        **examination.summary,
        "metadata_diffs": metadata_diffs(
            source, checkpoint, examination.source_config, examination.config
        ),
        "findings": findings.document(),
        "measurements": measurements.document(),
        "numbers": seen,
        "examined": [*HEADER_CHECKS, "numbers", *answered, "metadata"],
    }


@dataclass(frozen=True, kw_only=True)
class _Examination:
    """What the headers told, and what the further checks start from."""

    summary: dict[str, Any]
    findings: Findings
    counterparts: Counterparts
    weights: Weights
    source_weights: Weights
    config: Mapping[str, Any]
    source_config: Mapping[str, Any]
    is_declared: bool
    transformed: bool


def _examine(checkpoint: Path, source: Path, recipe: Recipe) -> _Examination:
    findings = Findings()
    source_weights = read_whole(source)
    source_config = read_object(source / CONFIG, COPY_AGAIN)
    weights = _read_weights(checkpoint, findings)
    if checkpoint.samefile(source):
        raise ProbeError(checkpoint, "is the source itself", "give the quantized checkpoint")
    config = _usable(lambda: read_object(checkpoint / CONFIG, COPY_AGAIN), findings) or {}
    _note_pickled(checkpoint, source, findings)
    source_format = find_format(source, source_config, source_weights.tensors)
    stated_format = _usable(lambda: find_format(checkpoint, config, weights.tensors), findings)
    checkpoint_format = stated_format or UNREADABLE
    before, after = Contents(source_weights.tensors), Contents(weights.tensors)
    names = Names(source_config)
    matrices = Matrices(source, before, source_config, source_format.layouts)
    tied = _is_tied(source_config)
    broken = {after.owner(name) for name in weights.broken}
    matches = match_modules(before, after, names, matrices, tied=tied)
    intent = examine(matches, after, checkpoint_format, recipe, findings, broken=broken)
    find_losses(matches, before, after, source_format, findings, tied=tied, broken=broken)
    find_cache_gaps(after, names, findings)
    find_originals(matches, intent, after, findings)
    find_additions(matches, intent, after, checkpoint_format, names, findings)
    census = Census(matches)
    summary = {
        "source_bytes": source_weights.size_bytes,
        # A size is positive; that nothing is whole stands among the findings.
        "output_bytes": weights.size_bytes,
        "recipe": recipe.name,
        "source_precision": census.precision(),
        "layer_precision_counts": intent.counts,
        "metadata_diffs": [],
        "findings": findings.document(),
        "measurements": [],
        "examined": list(HEADER_CHECKS),
        "expected_bytes": census.expected_bytes(
            recipe,
            tied=tied,
            quantized_beside=intent.quantized_beside,
            finest_group=intent.finest_group,
        ),
        "bits_per_weight": bits_per_weight(census, after, names, matches),
    }
    return _Examination(
        summary=summary,
        findings=findings,
        counterparts=Counterparts(
            source=before,
            candidate=after,
            matches=matches,
            layers=intent.layers,
            interleaved=matrices.interleaved,
        ),
        weights=weights,
        source_weights=source_weights,
        config=config,
        source_config=source_config,
        is_declared=stated_format is not None,
        transformed=checkpoint_format.transformed,
    )


def _ask_engines(
    checkpoint: Path, examination: _Examination, target: Target | None
) -> tuple[str, ...]:
    """Note what engines make of a checkpoint; return the check that was made, if one was.

    Where nobody asked about an engine, or no table answers, nothing was checked. A configuration
    that contradicts itself is not put to any.
    """
    config, findings = examination.config, examination.findings
    if not examination.is_declared or findings.count("contradiction"):
        return ()
    linears = map(_linear, examination.counterparts.layers)
    if target is None:
        lint_everywhere(checkpoint, config, linears, findings)
        return ()
    lint(checkpoint, config, linears, target, findings)
    return () if findings.count("servability_unknown") else ("servability",)


def _linear(layer: Layer) -> QuantizedLinear:
    """Return a layer as an engine meets it."""
    match, outcome, scheme = layer
    return QuantizedLinear(
        module=match.candidate or match.source,
        kind=match.traits.kind,
        precision=outcome.precision,
        shape=match.shape,
        group_size=scheme.group_size or outcome.group_size,
    )


def _read_weights(checkpoint: Path, findings: Findings) -> Weights:
    """Return the candidate's weights; what has a configuration and no weights is a bad export."""
    try:
        return read_weights(checkpoint, findings)
    except ProbeError as error:
        if not (checkpoint / CONFIG).exists():
            raise
        findings.add("no_weights", error.problem)
        return Weights(directory=checkpoint, tensors={}, shard_of={}, data_start={})


def _usable(read: Callable[[], _Read], findings: Findings) -> _Read | None:
    """Read a file of the candidate; one that cannot be read is a finding."""
    try:
        return read()
    except ProbeError as error:
        findings.add("unusable_file", f"{error.path.name} ({error.problem})")
        return None


def _note_pickled(checkpoint: Path, source: Path, findings: Findings) -> None:
    in_source = set(pickled_files(source))
    for path in pickled_files(checkpoint):
        findings.add("pickled_in_source" if path in in_source else "pickled", path)


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether the head is the embeddings, also of a model whose text part is nested."""
    return any(part.get("tie_word_embeddings") is True for part in _text_parts(config))


def _text_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    text = config.get("text_config")
    if isinstance(text, Mapping):
        yield text
