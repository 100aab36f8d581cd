"""Gate on a quantized checkpoint: did the recipe happen, wholly, soundly and to nothing else?

An exporter ends well with layers left in 16 bits, with the wrong precision, with scales that are
NaN, or with a file as large as the source's. This gate looks at what was written. It reports every
failed check; the verdict's failure class is the one of the failure most worth acting on first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gates.criteria import INHERENT_GROWTH_MAX, PRECISION_BITS, RECIPES, Recipe
from gates.evidence import Bucket, CheckpointEvidence, EvidenceError, LayerCounts, Measured
from gates.findings import CHECKS, KINDS, MEASURES, WHOLE, Kind, Measure
from gates.verdict import Check, FailureClass, Verdict

GATE = "ptq"

_MOST_ACTIONABLE_FIRST = (
    FailureClass.MODEL_UNSUPPORTED,
    FailureClass.QUANT_COVERAGE_FAILURE,
    FailureClass.SIZE_NOT_REDUCED,
    FailureClass.CHECKPOINT_NOT_SERVABLE,
    FailureClass.USER_CONFIG_ERROR,
)

_BROKEN_FILES = "integrity"
"""The check that comes before all others: what is broken on disk explains what they find."""

_SIZE_REFERENCE = "see docs/reference/checkpoint-validation.md"
_SAID_BY_INTENT = ("unexpected_unquantized", "declaration_mismatch")

_COUNTED = (*_SAID_BY_INTENT, *Bucket)
"""Counts of layers whose names a finding may hold."""

_NAMES_SHOWN = 5
_NAMES_KEPT = 20

_Outcome = tuple[Check, FailureClass]
"""A check, and the class of its failure if it fails."""


def evaluate_checkpoint(summary: object, *, recipes: Mapping[str, Recipe] = RECIPES) -> Verdict:
    """Check a checkpoint summary against its recipe, a row of ``recipes`` in any letter case.

    Sizes are bytes of weights on disk. A summary that cannot be read fails with
    ``USER_CONFIG_ERROR``; nothing is raised.
    """
    try:
        evidence = CheckpointEvidence.parse(summary)
        facts = _facts(evidence)
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    recipe = _find(evidence.recipe, recipes)
    notes = [
        *(fact.sentence for fact in facts if fact.kind.failure_class is None),
        *_unknown_kinds(evidence),
    ]
    outcomes = [
        *_recipe_known(evidence, recipe, recipes),
        *_examined(evidence, facts),
        _size(evidence, recipe, notes),
        *_expected_size(evidence, notes),
        *_coverage(evidence, recipe),
        _metadata(evidence),
    ]
    failed = sorted((outcome for outcome in outcomes if not outcome[0].passed), key=_rank)
    return Verdict(
        gate=GATE,
        checks=tuple(check for check, _ in outcomes),
        failure_class=failed[0][1] if failed else None,
        detail="; ".join(check.detail for check, _ in failed if check.detail) or _passed(evidence),
        notes=tuple(notes),
        findings=tuple(fact.document() for fact in facts),
    )


def _rank(outcome: _Outcome) -> tuple[bool, int]:
    check, failure_class = outcome
    return check.subject != _BROKEN_FILES, _MOST_ACTIONABLE_FIRST.index(failure_class)


def _passed(evidence: CheckpointEvidence) -> str:
    """Say what passed, and in numbers how good it is."""
    checks = ("size", "coverage", *(name for name in evidence.examined if name != "metadata"))
    said = f"{', '.join(checks)} and metadata all pass"
    if evidence.bits_per_weight:
        bits = ", ".join(f"{kind} {n:.2f}" for kind, n in evidence.bits_per_weight.items())
        said += f"; bits per weight: {bits}"
    if evidence.sqnr_db:
        ratios = ", ".join(
            f"{kind} {measured:.1f} dB (the format gives {expected:.1f})"
            for kind, (measured, expected) in evidence.sqnr_db.items()
        )
        said += f"; signal to quantization noise: {ratios}"
    return said


@dataclass(frozen=True, kw_only=True)
class _Fact:
    """Things of one kind that were found; of a measure, those that reach its limit."""

    kind: Kind
    count: int
    groups: Mapping[str, int]
    names: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Say how many, where in the model, and name the first."""
        kinds = {group: n for group, n in self.groups.items() if group != WHOLE}
        groups = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
        where = f" ({groups})" if groups else ""
        named = f": {_abridged(self.names, self.count)}" if self.names else ""
        remedy = f" [{self.kind.remedy}]" if self.kind.remedy else ""
        return f"{self.count} {self.kind.says}{where}{named}{remedy}"

    def document(self) -> dict[str, object]:
        """Return the JSON form, with all names that the summary holds."""
        return {
            "kind": self.kind.name,
            "check": self.kind.check,
            "failure_class": self.kind.failure_class,
            "count": self.count,
            "groups": dict(self.groups),
            "names": list(self.names),
            "says": self.kind.says,
            "remedy": self.kind.remedy,
        }


def _facts(evidence: CheckpointEvidence) -> list[_Fact]:
    """Return what the summary's findings and measurements come to, in the order of the tables."""
    found = [
        _Fact(
            kind=KINDS[finding.kind],
            count=finding.count,
            groups=finding.groups,
            names=finding.names,
        )
        for finding in evidence.findings.values()
        if finding.count and finding.kind in KINDS
    ]
    measured = [_measured(evidence, measure) for measure in MEASURES.values()]
    order = [*KINDS, *MEASURES]
    return sorted(
        (fact for fact in [*found, *measured] if fact.count),
        key=lambda fact: order.index(fact.kind.name),
    )


def _unknown_kinds(evidence: CheckpointEvidence) -> Iterator[str]:
    """Say which findings and measures no table knows, so that none is passed over in silence."""
    known = {*KINDS, *_COUNTED}
    for finding in evidence.findings.values():
        if finding.kind not in known:
            yield f"a finding of a kind that this gate does not know: {finding.kind!r}"
    for name in sorted({m.measure for m in evidence.measurements} - MEASURES.keys()):
        yield f"a measure that this gate does not know: {name!r}"


def _measured(evidence: CheckpointEvidence, measure: Measure) -> _Fact:
    """Gather the tensors of all module kinds that reach the measure's limit, the worst first."""
    groups: dict[str, int] = {}
    worst: list[Measured] = []
    for measurement in evidence.measurements:
        reached = measurement.at_least(measure.limit)
        if measurement.measure == measure.name and reached:
            groups[measurement.group] = groups.get(measurement.group, 0) + reached
            worst += [tensor for tensor in measurement.worst if tensor.value >= measure.limit]
    worst.sort(key=lambda tensor: -tensor.value)
    return _Fact(
        kind=measure,
        count=sum(groups.values()),
        groups=groups,
        names=tuple(
            f"{tensor.name} ({tensor.detail or f'{tensor.value:g} {measure.unit}'})"
            for tensor in worst[:_NAMES_KEPT]
        ),
    )


def _examined(evidence: CheckpointEvidence, facts: list[_Fact]) -> Iterator[_Outcome]:
    """Require of every check that was made that it found nothing to refuse.

    A finding counts whether or not its check is listed as made.
    """
    refused = [fact for fact in facts if fact.kind.failure_class is not None]
    for name in CHECKS:
        failed = [fact for fact in refused if fact.kind.check == name]
        if not failed and (name not in evidence.examined or name == "metadata"):
            continue
        check = Check(
            subject=name,
            observed={fact.kind.name: fact.count for fact in failed},
            limit={},
            passed=not failed,
            detail="; ".join(fact.sentence for fact in failed),
        )
        classes = [fact.kind.failure_class for fact in failed if fact.kind.failure_class]
        yield check, min(classes, key=_MOST_ACTIONABLE_FIRST.index, default=FailureClass.UNKNOWN)


def _find(name: str, recipes: Mapping[str, Recipe]) -> Recipe | None:
    """Return the row of that name, or the last one whose name differs in letter case only."""
    by_folded_name = {known.casefold(): recipe for known, recipe in recipes.items()}
    return recipes.get(name, by_folded_name.get(name.casefold()))


def _recipe_known(
    evidence: CheckpointEvidence, recipe: Recipe | None, recipes: Mapping[str, Recipe]
) -> Iterator[_Outcome]:
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


def _size(evidence: CheckpointEvidence, recipe: Recipe | None, notes: list[str]) -> _Outcome:
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
    if _is_expected(evidence) and PRECISION_BITS.get(precision or "", 16) < 16:
        return f"is as expected: layers of a {precision!r} source that are left alone are expanded"
    return ""


def _is_expected(evidence: CheckpointEvidence) -> bool:
    """Tell whether the size lies in the range that recipe and source lead to."""
    if evidence.expected_bytes is None:
        return False
    low, high = evidence.expected_bytes
    return low <= evidence.output_bytes <= high


def _growth_unexplained(evidence: CheckpointEvidence, recipe: Recipe) -> str:
    precision = evidence.source_precision
    if precision not in PRECISION_BITS:
        return f"source_precision {precision!r} is not a recognised precision"
    if _cannot_shrink(evidence, recipe):
        return f"a {precision!r} source explains at most {INHERENT_GROWTH_MAX}x"
    return f"a {precision!r} source should compress under this recipe"


def _expected_size(evidence: CheckpointEvidence, notes: list[str]) -> Iterator[_Outcome]:
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


def _coverage(evidence: CheckpointEvidence, recipe: Recipe | None) -> Iterator[_Outcome]:
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


def _covered(evidence: CheckpointEvidence, recipe: Recipe) -> _Outcome:
    covered = evidence.layers.quantized[recipe.bucket]
    instead = _counted_instead(evidence.layers)
    if not instead and "lost" in evidence.findings:
        instead = f"{evidence.findings['lost'].count} tensor(s) of the source lost"
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


def _no_layers(evidence: CheckpointEvidence, kind: str, layers: int, what: str) -> _Outcome:
    """Require a count of wrong layers to be 0.

    Where the layers' intent was examined, that check says the same by reason and with names.
    """
    said_there = "intent" in evidence.examined and kind in _SAID_BY_INTENT
    check = Check(
        subject=kind,
        observed=layers,
        limit=0,
        passed=layers == 0,
        detail=f"{layers} layer(s) {what}{_named(evidence, kind)}"
        if layers and not said_there
        else "",
    )
    return check, FailureClass.QUANT_COVERAGE_FAILURE


def _named(evidence: CheckpointEvidence, kind: str) -> str:
    """Name the first layers behind a count, as far as the summary names them."""
    finding = evidence.findings.get(kind)
    if finding is None or not finding.names:
        return ""
    return f": {_abridged(finding.names, finding.count)}"


def _metadata(evidence: CheckpointEvidence) -> _Outcome:
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
