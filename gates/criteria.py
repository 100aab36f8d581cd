"""Criteria: every limit the gates hold evidence against, with where its number comes from.

Probes, gates and documentation read the same tables, so a recipe or a limit is changed in one
place. Nothing here measures or decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gates.evidence import Bucket

SCORE_THRESHOLD = 0.01
"""Largest drop, as a fraction of the task's scale: the usual "under one percent" of a release."""

IMPLAUSIBLE_GAIN = 0.05
"""Gain, as a fraction of the scale, above which a quantized candidate is not believed: rounding
weights loses information, so five points up means that the two sides were not measured alike."""

CONFIDENCE = 0.95
"""One-sided confidence of every interval that decides: a candidate exactly at the margin passes in
at most 5 % of all cases."""

ALPHA = 0.05
"""Largest chance of each wrong answer that intervals allow: what the confidence leaves."""

POWER = 0.8
"""Chance of a decision that numbers of questions are worked out for: the usual one of trials."""

ASSUMED_DISCORDANCE = 0.08
"""Share of answers that are right on one side only, assumed where only scores are known: 8-bit
candidates change 1 to 5 % of them, 4-bit ones up to 15 % (Dutta et al. 2024, "Accuracy is not all
you need")."""

RISKY_DROP_MARGINS = 3.0
"""True drop, in margins, whose chance to pass the threshold rule is named beside its verdicts."""

MOST_REPEATS = 64
"""Most answers to one question that are proposed where a benchmark has no more questions."""

REPLAYED_LOGLIKELIHOODS = 10
"""Questions from which bit-identical log-likelihoods on both sides are the same answers twice:
other weights change the last bits of every one."""

REPLAYED_SHARE = 0.9
"""Share of a task's questions from which bit-identical log-likelihoods count. Two checkpoints agree
on some by chance where logits have 16 bits: 16 % were seen for an 8-bit candidate."""

REPLAYED_TEXTS = 30
"""Questions from which identical long texts on both sides are the same answers twice."""

REPLAYED_TEXT_CHARACTERS = 200
"""Mean length from which a text counts as long: rounding weights changes a word within it often
enough that thirty in a row do not stay as they were."""

REPLAYED_SUITE = 100
"""Questions of a whole suite from which identical answers throughout, short ones included, are the
same answers twice."""

UNIT_MIXUP_RATIOS = (50.0, 200.0)
"""Two scores, one at most 1 and one above it, whose ratio lies in this range around 100 are read
as a fraction beside a percentage, even where a scale is declared."""

LARGEST_GUESSED_SCALE = 100.0
"""Full score assumed of a task whose scores do not fit in 0 to 1 and that has no declared one."""

FRACTION_SUSPECTED_SCALE = 50.0
"""Declared scale from which two scores of at most 1 are so low that they may be fractions."""

VERBOSITY_THRESHOLD = 0.05
"""Largest change of the mean completion length, in either direction, as a fraction of the
baseline's."""

FEWEST_LENGTHS = 30
"""Questions, or clusters of them, below which an interval of the mean length is not believed:
lengths have no upper end, and a few that happen to agree show nothing of the rest."""

SAMPLE_COUNT_TOLERANCE = 0.01
"""Relative difference within which two sample counts are the same run size: one lost request must
not make a task unmeasurable, a truncated run must."""

SHORT_OUTPUT_TOKENS = 1000
"""Below this mean length a few tokens are a large percentage; such tasks carry a warning."""

EXTERNAL_TOLERANCE = 0.05
"""Largest distance of a baseline score from its published reference, as a fraction of the scale:
prompt and harness versions move a score by a few points, a broken set-up by more."""

INHERENT_GROWTH_MAX = 1.10
"""Largest growth that is put down to the source's own precision. Worst known case: NVFP4 over
MXFP4 keeps the 4-bit values and goes from an 8-bit scale per 32 to one per 16, (4 + 0.5) /
(4 + 0.25) = 1.06; the rest is room for metadata."""

UNSCORABLE_ANSWERS = 0.0
"""Share of answers that may be null or have a log-probability that is no number: harnesses score
them like wrong ones, so that a single one moves the score unseen."""

EMPTY_ANSWERS = 0.05
"""Share of answers that may be empty. Sound models stop at once now and then; a server whose
template or stop words are wrong does so most of the time."""

TRUNCATED_ANSWERS = 0.10
"""Share of answers that the length limit may cut off. Reasoning benchmarks lose a few percent to
it; beyond one in ten the score is that of the limit."""

REFUSED_ANSWERS = 0.01
"""Share of answers that a server's content filter may refuse: those are not the model's."""

CUT_PROMPTS = 0.01
"""Share of prompts that may be cut to fit the model's context: what is left asks another thing."""

IDENTICAL_ANSWERS = 0.50
"""Share of different prompts that may get one and the same answer, whatever the targets are: models
that know little still change their answer with the question."""

ANSWER_LIMITS: Mapping[str, float] = MappingProxyType(
    {
        "null": UNSCORABLE_ANSWERS,
        "non_finite": UNSCORABLE_ANSWERS,
        "empty": EMPTY_ANSWERS,
        "truncated": TRUNCATED_ANSWERS,
        "refused": REFUSED_ANSWERS,
        "context_overflow": CUT_PROMPTS,
        "identical": IDENTICAL_ANSWERS,
    }
)
"""Limit of each rate that a run summary or ``gate_run --limits`` may replace, by its name."""

IDENTICAL_ANSWERS_ABOVE_TARGETS = 0.25
"""How much larger than that of the most common target the share of the most common answer may be:
where most questions of a benchmark have one answer, most answers are the same."""

FEWEST_ALIKE = 5
"""Questions from which identical answers to different prompts, or of different draws, say
anything: four short answers are the same by chance."""

RECOMPUTED_SCORE_TOLERANCE = 1e-6
"""Relative difference within which a reported score is that of its samples: sums in another order
differ by less than 1e-9."""

SERVER_ERROR_RATE = 0.01
"""Largest share of requests that a server may fail (5xx) or turn away (429), as harnesses repeat
those: beyond it, what was answered depends on when it was asked."""

SQNR_SHORTFALL_DB = 6.0
"""Signal-to-quantization-noise ratio that a quantized tensor may fall short of what rounding the
source's own weights to the nearest value of the format gives, in decibels. Calibrated methods
(GPTQ, AWQ clipping, scale searches) trade one or two of them for a better output; 6 dB is twice the
noise amplitude, and a wrong scale or packing order costs ten or more."""

GAIN_ERROR_PERCENT = 5.0
"""Factor between dequantized and source weights (least squares), in percent from 1. Rounding to
nearest keeps it within 1 %, clipping within 3."""

GAIN_SCATTER = 4.0
"""How far apart the factors of groups that share a scale may lie, in terms of the standard
deviation that rounding leaves. Clean exports of all formats stay under 2, GPTQ included; scales
of another layer, or rolled by one row, come to 10 and more."""

INPUT_SCALES = (1e-10, 1e10)
"""Range of input scales, and of their inverses, that activations lead to: largest magnitudes from
1e-6 to 1e6, divided by at most 6 x 448 (NVFP4)."""

EXPERT_SCALE_OCTAVES = 8.0
"""Distance of an expert's scale from the median of its layer's experts, in powers of two.
Calibrated input scales of one layer spread over one or two orders of magnitude; an expert that no
calibration token reached keeps the start value, which is off by many."""

CANARY_REPEAT_TOKENS = 8
"""Shortest answer in which one token repeated throughout counts as a loop."""

CANARY_LOGPROB_FLOOR = -5.0
"""Mean log-probability (nats) of greedy tokens under which an answer is noise: a model that gives
its own best token less than exp(-5) = 0.7 % on average is not predicting text."""

CANARY_LOGPROB_CEILING = 1e-3
"""A log-probability is at most 0; this much is left for rounding in the server."""

PRECISION_BITS: Mapping[str, int] = MappingProxyType(
    {
        "fp32": 32,
        "bf16": 16,
        "fp16": 16,
        "fp8": 8,
        "int8": 8,
        "mxfp8": 8,
        "mxfp4": 4,
        "nvfp4": 4,
        "fp4": 4,
        "int4": 4,
        "nf4": 4,
        "w4a16": 4,
        "awq": 4,
        "4bit": 4,
    }
)
"""Bits per weight of each source precision that may be declared. Closed: a free description such
as "mostly fp8" proves nothing about what can shrink."""

SIZE_TOLERANCE = 0.01
"""Share of the predicted size left for small tensors that exporters add, such as cache scales."""

SCALE_WIDENING: Mapping[Bucket, float] = MappingProxyType(
    {Bucket.INT4: (32 + 4) / 16, Bucket.NF4: 32 / 8}
)
"""How much more than a recipe's scales a format may store: 32-bit ones and zero points. The scales
of the other formats have one width only."""

STORED_AGAIN: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"F32": (0.5, 1.0), "F8_E4M3": (1.0, 2.0)}
)
"""How much smaller or larger a tensor that is left alone may be written, by its safetensors type:
exporters write 32-bit floats in 16 bits, and expand 8-bit ones to 16."""

BYTES_PER_ROW = 4
"""Most that one matrix stores beside its weights for each row: a 32-bit scale."""

BYTES_PER_COLUMN = 4
"""Most that one matrix stores beside its weights for each column: a 32-bit smoothing factor."""

BYTES_PER_MATRIX = 64
"""Most that one matrix stores beside its weights as a whole: a few global scales or its shape."""

MODULE_KINDS = ("attention.qkv", "attention.output", "mlp", "experts")
"""Kinds of linear modules a recipe can mean. A recipe that means all of them also means matrices of
decoder layers that are of no kind known. Embeddings, ``lm_head``, routers, norms, convolutions,
vision towers and multi-token-prediction heads are left alone by every recipe."""

SIXTEEN_BITS = "16 bits"
"""Precision of inputs that a recipe leaves in floating point."""

UNKNOWN_KIND = "unknown"
"""Kind of a decoder layer's matrix whose name says nothing, as in an architecture that is new."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantize, as far as a checkpoint can show it.

    ``bits`` are the target's bits per weight; ``weight_bits`` add the scales that the format
    stores beside the weights, so that sizes can be predicted. ``quantizes`` holds the
    ``MODULE_KINDS`` that are meant. ``group_size`` is the number of columns that share a scale,
    ``activations`` the precision of the layers' inputs (``SIXTEEN_BITS`` where they are left as
    they are); ``None`` where the recipe does not say.
    """

    name: str
    bucket: Bucket
    bits: int
    quantizes: tuple[str, ...]
    weight_bits: float
    summary: str
    group_size: int | None = None
    activations: str | None = None

    def means(self, kind: str) -> bool:
        """Tell whether modules of this kind are to be quantized."""
        return kind in self.quantizes or (
            kind == UNKNOWN_KIND and set(self.quantizes) >= set(MODULE_KINDS)
        )


_NVFP4_BITS = 4 + 8 / 16
"""4-bit values and one 8-bit scale per block of 16."""

_GROUP_128_BITS = 4 + 16 / 128
"""4-bit values and one 16-bit scale per group of 128."""

_MXFP4_BITS = 4 + 8 / 32
"""4-bit values and one 8-bit exponent per block of 32."""

_NF4_BITS = 4 + 8 / 64
"""4-bit values and one 8-bit scale per block of 64: bitsandbytes quantizes the scales again."""

_TABLE = (
    Recipe(
        name="nvfp4",
        bucket=Bucket.NVFP4,
        bits=4,
        quantizes=MODULE_KINDS,
        weight_bits=_NVFP4_BITS,
        summary="4-bit floating point in blocks of 16, for all linear layers.",
        group_size=16,
        activations="NVFP4",
    ),
    Recipe(
        name="nvfp4_mlp_only",
        bucket=Bucket.NVFP4,
        bits=4,
        quantizes=("mlp", "experts"),
        weight_bits=_NVFP4_BITS,
        summary="4-bit floating point for MLP and expert layers; attention is left alone.",
        group_size=16,
        activations="NVFP4",
    ),
    Recipe(
        name="nvfp4_experts_only",
        bucket=Bucket.NVFP4,
        bits=4,
        quantizes=("experts",),
        weight_bits=_NVFP4_BITS,
        summary="4-bit floating point for the experts of a mixture-of-experts model only.",
        group_size=16,
        activations="NVFP4",
    ),
    Recipe(
        name="nvfp4_omlp_only",
        bucket=Bucket.NVFP4,
        bits=4,
        quantizes=("attention.output", "mlp", "experts"),
        weight_bits=_NVFP4_BITS,
        summary="4-bit floating point for MLP, expert and attention output layers.",
        group_size=16,
        activations="NVFP4",
    ),
    Recipe(
        name="fp8",
        bucket=Bucket.FP8,
        bits=8,
        quantizes=MODULE_KINDS,
        weight_bits=8.0,
        summary="8-bit floating point weights and activations, for all linear layers.",
        activations="FP8",
    ),
    Recipe(
        name="int8",
        bucket=Bucket.INT8,
        bits=8,
        quantizes=MODULE_KINDS,
        weight_bits=8.0,
        summary="8-bit integer weights and activations, for all linear layers.",
        activations="INT8",
    ),
    Recipe(
        name="int4_awq",
        bucket=Bucket.INT4,
        bits=4,
        quantizes=MODULE_KINDS,
        weight_bits=_GROUP_128_BITS,
        summary="4-bit integer weights in groups of 128, scaled to what activations need.",
        group_size=128,
        activations=SIXTEEN_BITS,
    ),
    Recipe(
        name="w4a16",
        bucket=Bucket.INT4,
        bits=4,
        quantizes=MODULE_KINDS,
        weight_bits=_GROUP_128_BITS,
        summary="4-bit integer weights in groups of 128, 16-bit activations.",
        group_size=128,
        activations=SIXTEEN_BITS,
    ),
    Recipe(
        name="w4a16_nvfp4",
        bucket=Bucket.NVFP4,
        bits=4,
        quantizes=MODULE_KINDS,
        weight_bits=_NVFP4_BITS,
        summary="4-bit floating point weights in blocks of 16, 16-bit activations.",
        group_size=16,
        activations=SIXTEEN_BITS,
    ),
    Recipe(
        name="mxfp4",
        bucket=Bucket.MXFP4,
        bits=4,
        quantizes=MODULE_KINDS,
        weight_bits=_MXFP4_BITS,
        summary="4-bit floating point in blocks of 32 with power-of-two scales.",
        group_size=32,
    ),
    Recipe(
        name="mxfp4_experts_only",
        bucket=Bucket.MXFP4,
        bits=4,
        quantizes=("experts",),
        weight_bits=_MXFP4_BITS,
        summary="4-bit floating point in blocks of 32 for the experts only, as gpt-oss has it.",
        group_size=32,
    ),
    Recipe(
        name="nf4",
        bucket=Bucket.NF4,
        bits=4,
        quantizes=MODULE_KINDS,
        weight_bits=_NF4_BITS,
        summary="4-bit normal-float weights in blocks of 64, as bitsandbytes stores them.",
        activations=SIXTEEN_BITS,
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _TABLE})
