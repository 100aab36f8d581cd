"""Gate on a quantized checkpoint: did the recipe happen, wholly and to nothing else?

An exporter ends well with layers left in 16 bits, with the wrong precision, or with a file as
large as the source's. This gate looks at what was written. It reports every failed check; the
verdict's failure class is the one of the failure most worth acting on first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gates.criteria import INHERENT_GROWTH_MAX, PRECISION_BITS, RECIPES, Recipe
from gates.evidence import CheckpointEvidence, EvidenceError, LayerCounts
from gates.verdict import Check, FailureClass, Verdict

GATE = "ptq"

_MOST_ACTIONABLE_FIRST = (
    FailureClass.MODEL_UNSUPPORTED,
    FailureClass.QUANT_COVERAGE_FAILURE,
    FailureClass.SIZE_NOT_REDUCED,
    FailureClass.USER_CONFIG_ERROR,
)

_SIZE_REFERENCE = "see docs/reference/checkpoint-validation.md"
_NAMES_SHOWN = 5

_Finding = tuple[Check, FailureClass]
"""A check, and the class of its failure if it fails."""


def evaluate_checkpoint(summary: object, *, recipes: Mapping[str, Recipe] = RECIPES) -> Verdict:
    """Check a checkpoint summary against its recipe, a row of ``recipes`` in any letter case.

    Sizes are bytes of weights on disk. A summary that cannot be read fails with
    ``USER_CONFIG_ERROR``; nothing is raised.
    """
    try:
        evidence = CheckpointEvidence.parse(summary)
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    recipe = _find(evidence.recipe, recipes)
    notes: list[str] = []
    findings = [
        *_recipe_known(evidence, recipe, recipes),
        _size(evidence, recipe, notes),
        *_expected_size(evidence, notes),
        *_coverage(evidence, recipe),
        _metadata(evidence),
    ]
    failed = sorted(
        (finding for finding in findings if not finding[0].passed),
        key=lambda finding: _MOST_ACTIONABLE_FIRST.index(finding[1]),
    )
    return Verdict(
        gate=GATE,
        checks=tuple(check for check, _ in findings),
        failure_class=failed[0][1] if failed else None,
        detail="; ".join(check.detail for check, _ in failed)
        or "size, coverage and metadata all pass",
        notes=tuple(notes),
    )


def _find(name: str, recipes: Mapping[str, Recipe]) -> Recipe | None:
    """Return the row of that name, or the last one whose name differs in letter case only."""
    by_folded_name = {known.casefold(): recipe for known, recipe in recipes.items()}
    return recipes.get(name, by_folded_name.get(name.casefold()))


def _recipe_known(
    evidence: CheckpointEvidence, recipe: Recipe | None, recipes: Mapping[str, Recipe]
) -> Iterator[_Finding]:
    known = ", ".join(recipes)
    detail = "" if recipe else f"unknown recipe {evidence.recipe!r}; known: {known}"
    check = Check(
        subject="recipe",
        observed=evidence.recipe,
        limit=list(recipes),
        passed=recipe is not None,
        detail=detail,
    )
    yield check, FailureClass.USER_CONFIG_ERROR


def _size(evidence: CheckpointEvidence, recipe: Recipe | None, notes: list[str]) -> _Finding:
    """Require the output to be smaller than the source, or a reason why it is not."""
    ratio = evidence.output_bytes / evidence.source_bytes
    problem = ""
    if evidence.output_bytes >= evidence.source_bytes and recipe is not None:
        waiver = _growth_waiver(evidence, recipe, ratio)
        if waiver:
            notes.append(f"SIZE_NOT_REDUCED waived: {ratio:.3f}x growth {waiver}")
        else:
            reason = _growth_unexplained(evidence, recipe)
            problem = f"output is {ratio:.3f}x the source; {reason} ({_SIZE_REFERENCE})"
    check = Check(
        subject="size",
        observed=evidence.output_bytes,
        limit=evidence.source_bytes,
        passed=not problem,
        detail=problem or f"{ratio:.3f}x the source",
    )
    return check, FailureClass.SIZE_NOT_REDUCED


def _cannot_shrink(evidence: CheckpointEvidence, recipe: Recipe) -> bool:
    """Tell whether the declared source precision is no wider than what the recipe writes."""
    source_bits = PRECISION_BITS.get(evidence.source_precision or "")
    return source_bits is not None and source_bits <= recipe.bits


def _growth_waiver(evidence: CheckpointEvidence, recipe: Recipe, ratio: float) -> str:
    """Return why growth is allowed, or nothing.

    A declared precision can be reasoned about, so what it allows is bounded; an explicit
    acceptance is a person's decision and is not.
    """
    precision = evidence.source_precision
    if evidence.accept_size_growth:
        beside = (
            f"the declared source precision {precision!r} was not used, because the explicit "
            "acceptance takes precedence"
            if precision
            else "no source precision declared"
        )
        return f"accepted explicitly with accept_size_growth ({beside})"
    if _cannot_shrink(evidence, recipe) and ratio <= INHERENT_GROWTH_MAX:
        return f"is inherent: a {precision!r} source is already as narrow as the recipe's target"
    return ""


def _growth_unexplained(evidence: CheckpointEvidence, recipe: Recipe) -> str:
    precision = evidence.source_precision
    if precision not in PRECISION_BITS:
        return f"source_precision {precision!r} is not a recognised precision"
    if _cannot_shrink(evidence, recipe):
        return f"a {precision!r} source explains at most {INHERENT_GROWTH_MAX}x"
    return f"a {precision!r} source should compress under this recipe"


def _expected_size(evidence: CheckpointEvidence, notes: list[str]) -> Iterator[_Finding]:
    """Hold the output against the size range that recipe and source predict, where there is one."""
    if evidence.expected_bytes is None:
        return
    low, high = evidence.expected_bytes
    size = evidence.output_bytes
    too_small, too_large = size < low, size > high
    detail = ""
    if too_small:
        detail = (
            f"output is {size} bytes, under the {low} that the recipe needs: weights are missing"
        )
    elif too_large and evidence.accept_size_growth:
        notes.append(f"size above the expected {high} bytes was accepted explicitly")
    elif too_large:
        detail = (
            f"output is {size} bytes, above the {high} expected of the recipe ({_SIZE_REFERENCE})"
        )
    check = Check(
        subject="expected_size",
        observed=size,
        limit=[low, high],
        passed=not detail,
        detail=detail,
    )
    yield (
        check,
        FailureClass.QUANT_COVERAGE_FAILURE if too_small else FailureClass.SIZE_NOT_REDUCED,
    )


def _coverage(evidence: CheckpointEvidence, recipe: Recipe | None) -> Iterator[_Finding]:
    """Require layers in the recipe's precision, and none that should not be as they are."""
    if recipe is not None:
        yield _covered(evidence, recipe)
        for bucket, layers in evidence.layers.quantized.items():
            if bucket != recipe.bucket and layers:
                what = f"quantized to {bucket}, which recipe {recipe.name} does not make"
                yield _no_layers(evidence, bucket, layers, what)
    counts = evidence.layers
    yield _no_layers(
        evidence,
        "unexpected_unquantized",
        counts.unexpected_unquantized,
        "unexpectedly unquantized",
    )
    yield _no_layers(
        evidence,
        "declaration_mismatch",
        counts.declaration_mismatch,
        "in another precision than declared or meant",
    )


def _covered(evidence: CheckpointEvidence, recipe: Recipe) -> _Finding:
    covered = evidence.layers.quantized[recipe.bucket]
    instead = _counted_instead(evidence.layers)
    reason = (
        f"the export did not follow recipe {recipe.name} ({instead})"
        if instead
        else f"recipe {recipe.name} matched none of the model's modules; choose a recipe that "
        "means modules this model has"
    )
    check = Check(
        subject="coverage",
        observed=covered,
        limit=1,
        passed=covered > 0,
        detail=f"{covered} layer(s) in {recipe.bucket}"
        if covered
        else f"no layer is in {recipe.bucket}: {reason}",
    )
    # Where the recipe's modules are there in another precision, the export failed, not the choice.
    return (
        check,
        FailureClass.QUANT_COVERAGE_FAILURE if instead else FailureClass.MODEL_UNSUPPORTED,
    )


def _counted_instead(layers: LayerCounts) -> str:
    """Say what the layers are that are quantized, or should be; nothing if there are none."""
    counted = {
        **{f"in {bucket}": count for bucket, count in layers.quantized.items()},
        "left unquantized": layers.unexpected_unquantized,
        "not as declared or meant": layers.declaration_mismatch,
    }
    return ", ".join(f"{count} layer(s) {what}" for what, count in counted.items() if count)


def _no_layers(evidence: CheckpointEvidence, kind: str, layers: int, what: str) -> _Finding:
    check = Check(
        subject=kind,
        observed=layers,
        limit=0,
        passed=layers == 0,
        detail=f"{layers} layer(s) {what}{_named(evidence, kind)}" if layers else "",
    )
    return check, FailureClass.QUANT_COVERAGE_FAILURE


def _named(evidence: CheckpointEvidence, kind: str) -> str:
    """Name the first layers behind a count, as far as the summary names them."""
    finding = evidence.findings.get(kind)
    if finding is None or not finding.names:
        return ""
    return f": {_abridged(finding.names, finding.count)}"


def _metadata(evidence: CheckpointEvidence) -> _Finding:
    diffs = evidence.metadata_diffs
    check = Check(
        subject="metadata",
        observed=list(diffs),
        limit=[],
        passed=not diffs,
        detail=f"unexpected metadata differences: {_abridged(diffs, len(diffs))}" if diffs else "",
    )
    return check, FailureClass.QUANT_COVERAGE_FAILURE


def _abridged(names: tuple[str, ...], total: int) -> str:
    listed = names[:_NAMES_SHOWN]
    more = max(total, len(names)) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")
