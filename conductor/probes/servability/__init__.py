"""Tell from a checkpoint's files alone whether an engine would load it on a device.

Facts about engines stand in ``loaders``, their reading of exclusion lists in
``exclusions``; here they are asked about one checkpoint. What no table answers is a note,
never a pass. A reason is named once, with the first module and the count of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from conductor.probes.findings import Findings
from conductor.probes.formats.layout import UNQUANTIZED
from conductor.probes.servability import loaders
from conductor.probes.servability.exclusions import ExpressionError, Role, SplitError, Unit, unit_of
from conductor.probes.servability.loaders import Answer, Row
from conductor.probes.servability.treatments import Stated, Treatment, number, texts, treatment
from gates.findings import WHOLE

FAILS, UNKNOWN, ELSEWHERE = "not_loadable", "servability_unknown", "not_loadable_elsewhere"

STRAY_PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.")
"""What wrappers of training put before every name; no loader takes it off."""

_DECODER_KINDS = ("attention.qkv", "attention.output", "mlp", "experts", "lm_head")
"""Kinds whose modules every loader names alike; others depend on the architecture's own code."""

_SAME_NAMES = ("model.layers.", "lm_head")
"""Beginnings of names that vLLM's models do not rename."""

_COLUMN_PARALLEL = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"),
        *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1"),
    )
)
_ROW_PARALLEL = frozenset(("o_proj", "down_proj", "w2", "fc2"))
_NOT_SPLIT = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "lm_head"))
_FUSED_LAST = ("v_proj", "up_proj", "kv_a_proj_with_mqa")
"""Projections that come last in what they are fused into, whatever their names' order."""
_SHARED = _COLUMN_PARALLEL | _ROW_PARALLEL | _NOT_SPLIT
_KEYS_AND_VALUES = ("k_proj", "v_proj")
"""Repeated, not split, on ranks beyond the number of key-value heads."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The engine, in one version and on one device, that is to load a checkpoint.

    ``device`` is ``cpu`` or ``cuda``; ``capability`` is CUDA's, ``None`` where it is not known;
    ``tensor_parallel`` is the number of ranks that share each matrix.
    """

    engine: str
    version: str
    device: str
    capability: tuple[int, int] | None = None
    tensor_parallel: int = 1

    def __str__(self) -> str:
        """Name it as the findings do."""
        ranks = f", {self.tensor_parallel} ranks" if self.tensor_parallel > 1 else ""
        return f"{self.engine} {self.version} on {self.device}{ranks}"


class QuantizedLinear(NamedTuple):
    """One linear of a checkpoint, quantized or not; ``shape`` is (rows, columns).

    ``group_size`` is in columns for each scale, None where scales are per tensor, row or block.
    """

    module: str
    kind: str
    precision: str
    shape: tuple[int, int]
    group_size: int | None = None


class _Part(NamedTuple):
    """What makes two linears of one unit alike."""

    projection: str
    precision: str
    rows: int
    columns: int
    group_size: int | None


@dataclass(kw_only=True)
class _Stored:
    """What a checkpoint has for one unit."""

    unit: Unit
    kind: str
    first: str
    parts: dict[_Part, tuple[str, int]] = field(default_factory=dict)
    """The first module of each kind of part, and how many there are."""

    @property
    def count(self) -> int:
        return sum(count for _, count in self.parts.values())

    @property
    def quantized(self) -> bool:
        return any(part.precision != UNQUANTIZED for part in self.parts)

    @property
    def mixed(self) -> bool:
        return len({part.precision for part in self.parts}) > 1

    @property
    def precision(self) -> str:
        return " and ".join(sorted({part.precision for part in self.parts}))

    @property
    def whole(self) -> tuple[str, str, int]:
        """First module, kind and count, as a reason that concerns all of it is noted."""
        return self.first, self.kind, self.count


@dataclass(kw_only=True)
class _Reasons:
    """Reasons collected, each with its first module, that one's kind and how many there are."""

    where: str
    found: dict[tuple[str, str], tuple[str, str, int]] = field(default_factory=dict)

    def add(self, finding: str, phrase: str, of: tuple[str, str, int] = ("", WHOLE, 1)) -> None:
        """Add a phrase that is the predicate of a module, or a sentence where there is none."""
        first, kind, count = self.found.get((finding, phrase), (*of[:2], 0))
        self.found[finding, phrase] = first, kind, count + of[2]

    def report(self, findings: Findings) -> None:
        """Add every reason once: "where: module phrase (and 12 more)"."""
        for (finding, phrase), (first, kind, count) in self.found.items():
            more = f" (and {count - 1} more)" if count > 1 else ""
            subject = f"{first} " if first else ""
            findings.add(finding, f"{self.where}: {subject}{phrase}{more}", kind)


def lint(
    checkpoint: Path,
    config: Mapping[str, Any],
    linears: Iterable[QuantizedLinear],
    target: Target,
    findings: Findings,
) -> None:
    """Note why an engine would not load a checkpoint, and what no table says about it.

    Args:
        checkpoint: its directory.
        config: its ``config.json``.
        linears: every linear of it, quantized or not.
        target: what is to load it; no other version's facts stand in for its own.
        findings: where ``not_loadable`` and ``servability_unknown`` are added.
    """
    reasons = _Reasons(where=str(target))
    linears = list(linears)
    _check_names(linears, reasons)
    if target.device in loaders.devices(target.engine, target.version):
        _check_architecture(config, target.engine, target.version, reasons)
        _check_heads(config, target.tensor_parallel, reasons)
        loader = _Loader(config=config, stated=Stated.of(checkpoint, config), target=target)
        loader.check(_units(linears, fuses=loader.fuses), reasons)
    else:
        reasons.add(UNKNOWN, "no table says what this engine, version and device load")
    reasons.report(findings)


def lint_everywhere(
    checkpoint: Path,
    config: Mapping[str, Any],
    linears: Iterable[QuantizedLinear],
    findings: Findings,
) -> None:
    """Note, for every engine, version and device of the table, why it would not load a checkpoint.

    Nobody asked for one of them, so that none of the reasons is a failure.
    """
    linears = list(linears)
    for engine, version, device in loaders.targets():
        answers = Findings()
        target = Target(engine=engine, version=version, device=device)
        lint(checkpoint, config, linears, target, answers)
        findings.extend(ELSEWHERE, answers.names(FAILS))
        findings.extend(UNKNOWN, answers.names(UNKNOWN))


def _check_names(linears: Sequence[QuantizedLinear], reasons: _Reasons) -> None:
    for linear in linears:
        if linear.module.startswith(STRAY_PREFIXES):
            prefix = next(p for p in STRAY_PREFIXES if linear.module.startswith(p))
            phrase = f"begins with {prefix!r}, which no loader takes off"
            reasons.add(FAILS, phrase, (linear.module, linear.kind, 1))


def _check_architecture(
    config: Mapping[str, Any], engine: str, version: str, reasons: _Reasons
) -> None:
    known, named = loaders.architectures(engine, version), texts(config.get("architectures"))
    if known and not named:
        reasons.add(UNKNOWN, "config.json names no architecture")
    elif known and not known.intersection(named):
        said = ", ".join(named)
        phrase = f"{said} is none of its own models; it may run with transformers' code"
        reasons.add(UNKNOWN, phrase)


def _check_heads(config: Mapping[str, Any], ranks: int, reasons: _Reasons) -> None:
    heads, shared = number(config, "num_attention_heads"), number(config, "num_key_value_heads")
    if heads and heads % ranks:
        reasons.add(FAILS, f"{heads} attention heads are not divisible by {ranks} ranks")
    # Latent attention has one head of keys and values, whatever the configuration says.
    if shared and not number(config, "kv_lora_rank") and shared % ranks and ranks % shared:
        phrase = f"{shared} key-value heads neither divide {ranks} ranks nor are divided by them"
        reasons.add(FAILS, phrase)


def _units(linears: Iterable[QuantizedLinear], *, fuses: bool) -> list[_Stored]:
    """Return what the checkpoint has for each module that the engine makes."""
    units: dict[str, _Stored] = {}
    for module, kind, precision, (rows, columns), group_size in linears:
        parent, experts, projection = module.partition(".experts.")
        stored = units.get(f"{parent}.experts") if fuses and experts else None
        if stored is None:
            unit = unit_of(module, fuses=fuses)
            stored = units.setdefault(unit.name, _Stored(unit=unit, kind=kind, first=module))
        projection = (projection or module).rpartition(".")[2]
        part = _Part(projection, precision, rows, columns, group_size)
        first, count = stored.parts.get(part, (module, 0))
        stored.parts[part] = first, count + 1
    return list(units.values())


@dataclass(frozen=True, kw_only=True)
class _Loader:
    """What one engine, version and device makes of one checkpoint."""

    config: Mapping[str, Any]
    stated: Stated
    target: Target

    @property
    def fuses(self) -> bool:
        return self.target.engine == loaders.VLLM

    def check(self, units: Sequence[_Stored], reasons: _Reasons) -> None:
        """Add every reason why these units would not load as they are stored."""
        method = self.stated.method
        if not method:
            for stored in units:
                if stored.quantized:
                    phrase = "and config.json has no quantization_config"
                    reasons.add(FAILS, f"is {stored.precision}, {phrase}", stored.whole)
        elif method not in loaders.METHODS[self.target.engine, self.target.version]:
            reasons.add(FAILS, f"has no loader for quant_method {method!r}")
        else:
            self._check_treatment(units, reasons)
        if self.fuses and self.target.tensor_parallel > 1:
            for stored in units:
                if stored.kind in _DECODER_KINDS:
                    self._check_split(stored, reasons)

    def _check_treatment(self, units: Sequence[_Stored], reasons: _Reasons) -> None:
        """Check what the loader takes each unit for against what it is."""
        try:
            treat = treatment(self.stated, [each.unit for each in units], fuses=self.fuses)
        except ExpressionError as error:
            reasons.add(UNKNOWN, f"what it leaves alone cannot be told: {error}")
            return
        for stored in units:
            if not self._is_named_alike(stored):
                if stored.quantized:
                    phrase = "is quantized, and what the engine calls it is not known"
                    reasons.add(UNKNOWN, phrase, stored.whole)
            elif stored.mixed:
                phrase = f"and what it is fused with are {stored.precision}"
                reasons.add(FAILS, phrase, stored.whole)
            else:
                self._check_unit(stored, treat, reasons)

    def _is_named_alike(self, stored: _Stored) -> bool:
        """Tell whether it is known what the engine makes of a unit, and by which name.

        Architectures keep projections of their own in full precision whatever a list says, and a
        tied output head is not made at all.
        """
        if stored.kind == "lm_head" and self.config.get("tie_word_embeddings") is True:
            return False
        if not self.fuses:
            return stored.kind in _DECODER_KINDS
        return (
            stored.kind in _DECODER_KINDS
            and stored.unit.name.startswith(_SAME_NAMES)
            and all(part.projection in _SHARED for part in stored.parts)
        )

    def _check_unit(self, stored: _Stored, treat: Treatment, reasons: _Reasons) -> None:
        made_of = stored.unit.name.rpartition(".")[2]
        try:
            taken = treat(stored.unit, stored.quantized)
        except SplitError as error:
            phrase = f"is only in part of {made_of}, and {error.pattern!r} names not all of that"
            reasons.add(FAILS, phrase, stored.whole)
            return
        if stored.quantized and taken.scheme is None:
            by = f" by {taken.pattern!r}" if taken.pattern is not None else ""
            fused = f", as all of {made_of}" if stored.unit.role is Role.EXPERTS else ""
            phrase = f"is {stored.precision} on disk, and taken for unquantized{by}{fused}"
            reasons.add(FAILS, phrase, stored.whole)
        elif not stored.quantized and taken.scheme is not None:
            phrase = f"is unquantized on disk, and taken for {taken.scheme}"
            reasons.add(FAILS, phrase, stored.whole)
        elif taken.scheme is not None:
            self._check_scheme(stored, taken.scheme, reasons)

    def _check_scheme(self, stored: _Stored, scheme: str, reasons: _Reasons) -> None:
        what = f"is {scheme} ({self.stated.label})"
        row = loaders.find(
            self.target.engine,
            self.target.version,
            self.target.device,
            self.stated.table_method,
            scheme,
        )
        if row is None:
            phrase = f"{what}, which nobody has tried or read about"
            reasons.add(UNKNOWN, phrase, stored.whole)
        elif row.answer is Answer.REFUSES:
            reasons.add(FAILS, f"{what}: {row.because}", stored.whole)
        elif row.answer is Answer.UNKNOWN:
            reasons.add(UNKNOWN, f"{what}: {row.because}", stored.whole)
        else:
            if stored.unit.role is Role.EXPERTS and row.experts:
                reasons.add(UNKNOWN, f"{what}: {row.experts}", stored.whole)
            self._check_capability(what, row, stored, reasons)
            self._check_dimensions(row, stored, reasons)

    def _check_capability(self, what: str, row: Row, stored: _Stored, reasons: _Reasons) -> None:
        if row.capability is None:
            return
        least = f"needs compute capability {_dotted(row.capability)}"
        if self.target.capability is None:
            reasons.add(UNKNOWN, f"{what}, which {least}; none was given", stored.whole)
        elif self.target.capability < row.capability:
            phrase = f"{what}, which {least}; this is {_dotted(self.target.capability)}"
            reasons.add(FAILS, phrase, stored.whole)
        elif row.unknown_from is not None and self.target.capability >= row.unknown_from:
            since = _dotted(row.unknown_from)
            phrase = f"{what}, which nobody has tried from compute capability {since} on"
            reasons.add(UNKNOWN, phrase, stored.whole)

    def _check_dimensions(self, row: Row, stored: _Stored, reasons: _Reasons) -> None:
        """Hold each rank's share of a quantized unit against what its kernel takes."""
        single = stored.unit.role is not Role.EXPERTS
        for part, (module, count) in stored.parts.items():
            of = module, stored.kind, count
            _, columns = self._share(part)
            share = f"{part.columns} columns{self._per_rank(columns)}, which is no multiple of"
            if single and columns % row.columns:
                reasons.add(FAILS, f"has {share} {row.columns}", of)
            group = part.group_size
            if group and group < part.columns and columns % group:
                reasons.add(FAILS, f"has {share} the group of {group}", of)
            if row.groups is not None and (group or -1) not in row.groups:
                known = ", ".join(str(size) for size in row.groups if size > 0)
                # GPTQ's own list is closed; other methods have a kernel that takes any size.
                finding = FAILS if row.method == "gptq" else UNKNOWN
                phrase = f"has groups of {group}; known to work are {known} and whole rows"
                reasons.add(finding, phrase, of)
        rows = sum(self._share(part)[0] for part in stored.parts)
        if single and rows % row.rows:
            fused = " with what it is fused with" if len(stored.parts) > 1 else ""
            phrase = f"has {rows} rows{fused}, which is no multiple of {row.rows}"
            reasons.add(FAILS, phrase, stored.whole)
        if row.blocked:
            self._check_blocks(stored, reasons)

    def _per_rank(self, size: int) -> str:
        return f", {size} per rank" if self.target.tensor_parallel > 1 else ""

    def _check_blocks(self, stored: _Stored, reasons: _Reasons) -> None:
        """Check that no rank and no seam of a fused unit cuts a block of scales."""
        block = self.stated.block
        if block is None:
            reasons.add(UNKNOWN, "the configuration does not say how large its blocks are")
            return
        split = self.target.tensor_parallel > 1 and not any(
            p.projection in _NOT_SPLIT for p in stored.parts
        )
        parts = sorted(stored.parts.items(), key=lambda item: item[0].projection in _FUSED_LAST)
        # The last of several matrices in one may end within a block, as long as ranks share none.
        seams = parts if split or stored.unit.role is Role.EXPERTS else parts[:-1]
        for part, (module, count) in seams:
            rows, _ = self._share(part)
            if part.projection in _COLUMN_PARALLEL | _NOT_SPLIT and rows % block[0]:
                phrase = f"has {part.rows} rows{self._per_rank(rows)}, which cuts its blocks of"
                reasons.add(FAILS, f"{phrase} {block[0]}", (module, stored.kind, count))
        for part, (module, count) in parts if split else ():
            _, columns = self._share(part)
            if part.projection in _ROW_PARALLEL and columns % block[1]:
                phrase = f"has {part.columns} columns{self._per_rank(columns)}, which cuts its"
                phrase = f"{phrase} blocks of {block[1]}"
                reasons.add(FAILS, phrase, (module, stored.kind, count))

    def _check_split(self, stored: _Stored, reasons: _Reasons) -> None:
        """Check that the ranks can share a unit evenly, quantized or not."""
        for part, (module, count) in stored.parts.items():
            of = module, stored.kind, count
            if part.projection in (*_KEYS_AND_VALUES, *_NOT_SPLIT):
                continue
            if part.projection in _COLUMN_PARALLEL and part.rows % self.target.tensor_parallel:
                reasons.add(
                    FAILS,
                    f"has {part.rows} rows, which {self.target.tensor_parallel} do not divide",
                    of,
                )
            elif part.projection in _ROW_PARALLEL and part.columns % self.target.tensor_parallel:
                phrase = (
                    f"has {part.columns} columns, which {self.target.tensor_parallel} do not divide"
                )
                reasons.add(FAILS, phrase, of)
            elif part.precision != UNQUANTIZED and part.projection not in _SHARED:
                phrase = "is quantized, and how ranks share it is not known"
                reasons.add(UNKNOWN, phrase, of)

    def _share(self, part: _Part) -> tuple[int, int]:
        """Return one rank's rows and columns of a linear, rounded up where they do not divide."""
        rows, columns = part.rows, part.columns
        if part.projection in _ROW_PARALLEL:
            columns = math.ceil(columns / self.target.tensor_parallel)
        elif part.projection in _KEYS_AND_VALUES:
            heads = number(self.config, "num_key_value_heads") or self.target.tensor_parallel
            rows = math.ceil(rows / min(self.target.tensor_parallel, heads))
        elif part.projection in _COLUMN_PARALLEL:
            rows = math.ceil(rows / self.target.tensor_parallel)
        return rows, columns


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
