"""Examine the numbers of a checkpoint: every scale, and weights held against the source's.

Tensors are looked at one by one, in the order of the candidate's files, by as many threads as there
are processors; each holds a few blocks at a time. What was seen is put together in that order, so
that a scan says the same each time.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from conductor.probes.findings import Findings, Measurements
from conductor.probes.modules import kind_of
from conductor.probes.pairs import Kept, Pair, Stored
from conductor.probes.safetensors_header import Weights
from conductor.probes.values.comparison import Comparison
from conductor.probes.values.examination import (
    CoupleOutcome,
    Examiner,
    Outcome,
    flaws,
    is_far,
)
from conductor.probes.values.scales import ExpertScales, count_tensor
from conductor.probes.values.tensor_files import TensorFiles

MOST_THREADS = 8
_AHEAD = 4
"""Tensors that are examined ahead of the one whose turn it is, for each thread."""

Progress = Callable[[int, int], None]
_Result = TypeVar("_Result")


def scan(
    candidate: Weights,
    source: Weights,
    pairs: Iterable[Pair],
    kept: Iterable[Kept],
    findings: Findings,
    measurements: Measurements,
    *,
    deep: bool,
    progress: Progress,
    transformed: bool = False,
) -> dict[str, Any]:
    """Examine all quantized and all kept tensors of a candidate.

    ``pairs`` and ``kept`` come in the order of the candidate's files. A sample of each tensor is
    compared with the source, all of it with ``deep``; scales, FP8 weights and kept tensors are
    read wholly in any case. ``progress`` gets the bytes that are done and those of all tensors.
    Values of a ``transformed`` (rotated) candidate are not compared.

    Returns for each module kind the number of quantized tensors that were compared, and the
    medians in decibels of their signal-to-quantization-noise ratio and of what the format gives;
    ``None`` where a median is without end.

    Raises:
        ProbeError: a file cannot be read, or ends before its tensors do.
    """
    files, source_files = TensorFiles(candidate), TensorFiles(source)
    examiner = Examiner(source_files, files, deep=deep, transformed=transformed)
    collected = _Collected(findings, measurements)
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    done, seen = 0, set[str]()
    with ThreadPoolExecutor(threads) as pool:

        def examined() -> Iterator[Callable[[], Outcome]]:
            for pair in pairs:
                seen.update(_own_tensors(pair.candidate))
                yield partial(examiner.examine_pair, pair)
            for each in kept:
                seen.add(each.candidate_name)
                yield partial(examiner.examine_kept, each)

        for outcome in _in_order(pool, examined(), threads * _AHEAD):
            collected.add(outcome)
            done = min(done + outcome.size_bytes, candidate.size_bytes)
            progress(done, candidate.size_bytes)
        collected.add_other_scales(files, seen)
        couples = collected.couples()
        explain = (partial(examiner.examine_couple, *_pairs(couple)) for couple in couples)
        answers = _in_order(pool, explain, threads * _AHEAD)
        for (first, second), answer in zip(couples, answers, strict=True):
            collected.add_couple(first, second, answer)
    collected.conclude(source_files, files)
    progress(candidate.size_bytes, candidate.size_bytes)
    return {"kinds": collected.kinds(), "deep": deep}


def _own_tensors(stored: Stored) -> Iterator[str]:
    """Yield the tensors of a matrix, without what lies beside it, as scales of the cache do."""
    for part, name in stored.tensors.items():
        if part in stored.layout.part_names:
            yield name


def _in_order(
    pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], _Result]], ahead: int
) -> Iterator[_Result]:
    """Yield the results of tasks in their order, with few of them under way."""
    under_way: deque[Future[_Result]] = deque()
    try:
        for task in tasks:
            under_way.append(pool.submit(task))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _pairs(couple: tuple[Outcome, Outcome]) -> tuple[Pair, Pair]:
    first, second = couple
    assert first.pair is not None and second.pair is not None
    return first.pair, second.pair


class _Collected:
    """Puts outcomes together, in the order in which they are added."""

    def __init__(self, findings: Findings, measurements: Measurements) -> None:
        self._findings, self._measurements = findings, measurements
        self._said: set[tuple[str, str]] = set()
        self._experts = ExpertScales()
        self._neutral: list[tuple[str, str]] = []
        self._calibrated = 0
        self._halves: list[tuple[str, str]] = []
        self._interleaved = 0
        self._unexplained: list[Outcome] = []
        self._vectors: list[Outcome] = []
        self._rescaled: set[str] = set()
        self._not_rescaled: dict[str, str] = {}
        self._couples: dict[str, CoupleOutcome] = {}
        self._ratios: dict[str, tuple[array[float], array[float]]] = defaultdict(
            lambda: (array("d"), array("d"))
        )

    def add(self, outcome: Outcome) -> None:
        """Take what was seen of one tensor; what another may explain waits for it."""
        for kind, name in outcome.found:
            self._say(kind, name, outcome.group)
        for scale in outcome.expert_scales:
            self._experts.add(outcome.group, scale)
        for name, is_neutral in outcome.input_scales:
            if is_neutral:
                self._neutral.append((name, outcome.group))
            self._calibrated += not is_neutral
        if outcome.in_halves:
            self._halves.append((outcome.name, outcome.group))
        self._interleaved += outcome.in_halves is False
        self._vote(outcome)
        if outcome.vector is not None:
            self._vectors.append(outcome)
        elif outcome.couple is not None:
            self._unexplained.append(outcome)
        else:
            self._judge(outcome)

    def add_other_scales(self, files: TensorFiles, seen: set[str]) -> None:
        """Look at scales of no linear, such as those of the key-value cache."""
        for name in files.weights.tensors:
            if name not in seen and "scale" in name.rpartition(".")[2]:
                group = kind_of(name.rpartition(".")[0])
                for kind, text in flaws(name, count_tensor(files, name)):
                    self._say(kind, text, group)

    def couples(self) -> list[tuple[Outcome, Outcome]]:
        """Return the linears that may explain each other; the others are as they are."""
        firsts = {o.couple.key: o for o in self._unexplained if o.couple and o.couple.first}
        seconds = {o.couple.key: o for o in self._unexplained if o.couple and not o.couple.first}
        both = [(firsts[key], seconds[key]) for key in firsts if key in seconds]
        coupled = {id(outcome) for couple in both for outcome in couple}
        for outcome in self._unexplained:
            if id(outcome) not in coupled:
                self._judge(outcome)
        return both

    def add_couple(self, first: Outcome, second: Outcome, answer: CoupleOutcome | None) -> None:
        """Take what became of two linears that may explain each other."""
        if answer is None:
            self._judge(first)
            self._judge(second)
            return
        for outcome, compared in ((first, answer.first), (second, answer.second)):
            was_altered = outcome.altered
            outcome.altered, outcome.remark = False, ""
            outcome.compared = None if was_altered else compared
            self._judge(outcome)
        first.votes = answer.votes
        self._vote(first)
        self._say("smoothed", first.name, first.group)
        self._couples[first.name.removesuffix(".weight")] = answer

    def conclude(self, source: TensorFiles, candidate: TensorFiles) -> None:
        """Judge what only all tensors together tell."""
        self._experts.measure(self._measurements)
        kind = "neutral_input_scale" if self._calibrated else "all_input_scales_neutral"
        for name, group in self._neutral:
            self._say(kind, name, group)
        for name, group in self._halves:
            if self._interleaved:
                remark = f"{name} (a half of the source's rows, where others hold every second)"
                self._say("not_decodable", remark, group)
            else:
                self._say("in_halves", name, group)
        for outcome in self._vectors:
            name = outcome.name
            norm = name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name
            culprit = self._not_rescaled.get(norm)
            if culprit is not None:
                remark = f"{name} ({culprit}, which reads it, is not rescaled in return)"
                self._say("altered", remark, outcome.group)
            elif norm in self._rescaled or self._is_rescaled_bias(outcome, source, candidate):
                self._say("smoothed", name, outcome.group)
            else:
                self._say("altered", name, outcome.group)

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Return the number of tensors and both medians for each module kind."""
        return {
            group: {
                "tensors": len(ratios),
                "sqnr_db": _median(ratios),
                "norm_db": _median(norms),
            }
            for group, (ratios, norms) in sorted(self._ratios.items())
        }

    def _vote(self, outcome: Outcome) -> None:
        for norm, is_explained in outcome.votes:
            if is_explained:
                self._rescaled.add(norm)
            else:
                self._not_rescaled.setdefault(norm, outcome.name)

    def _judge(self, outcome: Outcome) -> None:
        """Say how far a tensor is from the source, as far as that is known now."""
        if outcome.altered:
            self._say("altered", outcome.name, outcome.group)
        compared = outcome.compared
        if compared is None:
            return
        ratios, norms = self._ratios[outcome.group]
        ratios.append(compared.sqnr_db)
        norms.append(compared.norm_db)
        if compared.damaged_groups and not is_far(compared):
            count = f"{compared.damaged_groups} of {compared.groups} groups looked at"
            self._say("damaged_group", f"{outcome.name} ({count})", outcome.group)
        remark = f"; {outcome.remark}" if outcome.remark else ""
        detail = _in_decibels(compared)
        self._measurements.add(
            "sqnr_shortfall_db",
            outcome.group,
            outcome.name,
            compared.shortfall_db,
            detail + remark,
        )
        if compared.finite:
            detail = outcome.remark or f"values are {compared.gain:.4g} times the source's"
            self._measurements.add(
                "gain_error_percent",
                outcome.group,
                outcome.name,
                compared.gain_error_percent,
                detail,
            )
            detail = f"{compared.gain_scatter:.0f} times as far apart as rounding leaves them"
            self._measurements.add(
                "gain_scatter", outcome.group, outcome.name, compared.gain_scatter, detail
            )

    def _is_rescaled_bias(
        self, outcome: Outcome, source: TensorFiles, candidate: TensorFiles
    ) -> bool:
        """Tell whether a bias was rescaled like the rows that it is added to."""
        couple = self._couples.get(outcome.name.removesuffix(".bias"))
        if couple is None or outcome.vector is None:
            return False
        was = source.elements(outcome.vector.source_name)
        is_now = candidate.elements(outcome.vector.candidate_name)
        if was.shape != couple.gains.shape or is_now.shape != couple.gains.shape:
            return False
        expected = was * couple.gains
        distance = np.abs(expected - is_now)
        return bool((distance <= couple.gain_tolerance * np.abs(expected)).all())

    def _say(self, kind: str, name: str, group: str) -> None:
        """Note a finding once, also where several linears share the tensor."""
        if (kind, name) not in self._said:
            self._said.add((kind, name))
            self._findings.add(kind, name, group)


def _in_decibels(compared: Comparison) -> str:
    if not compared.finite:
        return "no number of dB"
    if compared.worst_decides:
        return (
            f"{compared.worst_sqnr_db:.1f} dB in its worst part, the format gives "
            f"{compared.worst_norm_db:.1f} dB"
        )
    return f"{compared.sqnr_db:.1f} dB, the format gives {compared.norm_db:.1f} dB"


def _median(values: array[float]) -> float | None:
    median = float(np.median(values)) if values else math.inf
    return round(median, 2) if math.isfinite(median) else None
