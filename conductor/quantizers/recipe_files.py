"""Read a user's own ModelOpt or llm-compressor recipe far enough to know what it promises.

The quantizer itself reads the whole file later; here it is asked what the gate must know before
anything runs: which quantizer it is for, the format of the weights, and which kinds of layers. The
last is found by applying the file's patterns to one layer name of each kind, in the quantizer's own
order of precedence. What cannot be known is refused rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from conductor.compatibility import Quantizer
from conductor.failure import Failure
from gates import FailureClass, Recipe
from gates.evidence import Bucket


class RecipeError(Failure):
    """A recipe file that cannot be used: which, what is wrong with it, and the remedy."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        """Keep the parts; the message joins them."""
        super().__init__(FailureClass.USER_CONFIG_ERROR, f"recipe {path}: {problem}; {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe from a file, the quantizer it is written for, and whether it needs text."""

    path: Path
    quantizer: Quantizer
    recipe: Recipe
    calibrated: bool


@dataclass(frozen=True, kw_only=True)
class Format:
    """A weight format: its bucket, its bits, and its bits with scales."""

    bucket: Bucket
    bits: int
    weight_bits: float


NVFP4 = Format(bucket=Bucket.NVFP4, bits=4, weight_bits=4 + 8 / 16)
MXFP4 = Format(bucket=Bucket.MXFP4, bits=4, weight_bits=4 + 8 / 32)
FP8 = Format(bucket=Bucket.FP8, bits=8, weight_bits=8.0)
INT8 = Format(bucket=Bucket.INT8, bits=8, weight_bits=8.0)
INT4_GROUP_128 = Format(bucket=Bucket.INT4, bits=4, weight_bits=4 + 16 / 128)

# One layer of each kind, under the name that both quantizers see.
PROBES: Mapping[str, str] = {
    "attention.qkv": "model.layers.0.self_attn.q_proj",
    "attention.output": "model.layers.0.self_attn.o_proj",
    "mlp": "model.layers.0.mlp.up_proj",
    "experts": "model.layers.0.mlp.experts.0.up_proj",
}

# llm-compressor's preset schemes that a gate has a bucket for (compressed-tensors 0.18).
SCHEMES: Mapping[str, Format] = {
    "NVFP4": NVFP4,
    "NVFP4A16": NVFP4,
    "MXFP4": MXFP4,
    "MXFP4A16": MXFP4,
    "FP8": FP8,
    "FP8_DYNAMIC": FP8,
    "FP8_BLOCK": FP8,
    "W8A8": INT8,
    "INT8": INT8,
    "W8A16": INT8,
    "W4A16": INT4_GROUP_128,
    "W4A16_ASYM": INT4_GROUP_128,
    "W4A8": INT4_GROUP_128,
    "W4AFP8": INT4_GROUP_128,
}
# Those whose activations are scaled in advance, from text.
STATIC_SCHEMES = {"NVFP4", "FP8"}
# Modifiers that run text through the model whatever the scheme.
CALIBRATED_MODIFIERS = {
    *("AWQModifier", "GPTQModifier", "SmoothQuantModifier", "AutoRoundModifier"),
}

# ModelOpt's importable number formats and units that decide about weights (ModelOpt 0.47).
NUMERICS: Mapping[str, Format] = {
    "nvfp4": NVFP4,
    "nvfp4_static": NVFP4,
    "nvfp4_four_over_six": NVFP4,
    "mxfp4": MXFP4,
    "fp8": FP8,
    "int8": INT8,
    "int8_per_channel": INT8,
    "int4_per_block": INT4_GROUP_128,
}
UNITS: Mapping[str, tuple[tuple[str, Format | None], ...]] = {
    "base_disable_all": (("*", None),),
    "default_disabled_quantizers": (),
    "mamba_moe_disabled_quantizers": (
        *(("*q_proj*", None), ("*k_proj*", None), ("*v_proj*", None), ("*o_proj*", None)),
    ),
    "w4a4_nvfp4_nvfp4": (("*weight_quantizer", NVFP4),),
    "w4a4_nvfp4_nvfp4_four_over_six": (("*weight_quantizer", NVFP4),),
    "w4_nvfp4": (("*weight_quantizer", NVFP4),),
    "w8a8_fp8_fp8": (("*weight_quantizer", FP8),),
    "block_sparse_moe_nvfp4": (("*block_sparse_moe*weight_quantizer", NVFP4),),
    "experts_nvfp4": (("*.experts.*weight_quantizer", NVFP4),),
    "mixer_mlp_nvfp4": (("*.mixer.up_proj.weight_quantizer", NVFP4),),
    **dict.fromkeys(
        (
            *("kv_fp8", "kv_fp8_affine", "kv_fp8_cast", "kv_nvfp4", "kv_nvfp4_affine"),
            *("kv_nvfp4_cast", "kv_nvfp4_rotate", "attention_qkv_fp8"),
        ),
        (),
    ),
}


def read_recipe_file(path: Path) -> RecipeFile:
    """Read a recipe file of either quantizer; which one is told by its keys.

    Raises:
        RecipeError: the file cannot be read, is for neither, or promises no single format.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(path, f"cannot be read ({error.strerror})", "check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(path, f"is not YAML ({_flat(error)})", "correct it") from None
    keys = {str(key) for key in document} if isinstance(document, dict) else set()
    if keys & {"quantize", "quant_cfg", "metadata"}:
        return _modelopt_file(path, document)
    if any(key.endswith("_stage") for key in keys):
        return _llmcompressor_file(path, document)
    raise RecipeError(
        path,
        "is neither a ModelOpt recipe (no `quantize` or `quant_cfg`) nor an llm-compressor recipe "
        "(no key that ends in `_stage`)",
        "start from a recipe that one of them ships",
    )


def _modelopt_file(path: Path, document: Mapping[str, Any]) -> RecipeFile:
    body = document.get("quantize", document)
    entries = body.get("quant_cfg") if isinstance(body, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(
            path,
            "has no list `quant_cfg`" + (" under `quantize`" if "metadata" in document else ""),
            "only post-training quantization recipes are supported",
        )
    imports = document.get("imports") or {}
    if not isinstance(imports, dict):
        raise RecipeError(path, "imports: must be a mapping", "correct it")
    rules = list(_modelopt_rules(path, entries, imports))
    formats = {}
    for kind, name in PROBES.items():
        matching = [
            format_
            for pattern, format_ in rules
            if fnmatchcase(f"{name}.weight_quantizer", pattern)
        ]
        formats[kind] = matching[-1] if matching else None
    return RecipeFile(
        path=path.resolve(),
        quantizer=Quantizer.MODELOPT,
        recipe=_recipe(path, formats),
        calibrated=True,
    )


def _modelopt_rules(
    path: Path, entries: Sequence[Mapping[str, Any]], imports: Mapping[str, Any]
) -> Iterator[tuple[str, Format | None]]:
    """Yield (pattern of quantizer names, format or off) in the order in which they apply."""
    for index, entry in enumerate(entries):
        where = f"quant_cfg.{index}"
        if "$import" in entry:
            yield from _imported(path, where, entry["$import"], imports, UNITS)
            continue
        pattern = entry.get("quantizer_name")
        if not isinstance(pattern, str):
            raise RecipeError(path, f"{where}: has no `quantizer_name`", "add it")
        names = (f"{name}.weight_quantizer" for name in PROBES.values())
        if entry.get("parent_class", "nn.Linear") != "nn.Linear" or not any(
            fnmatchcase(name, pattern) for name in names
        ):
            continue
        if entry.get("enable") is False:
            yield pattern, None
        elif "cfg" in entry:
            yield pattern, _modelopt_format(path, f"{where}.cfg", entry["cfg"], imports)


def _imported(
    path: Path, where: str, name: Any, imports: Mapping[str, Any], known: Mapping[str, Any]
) -> Any:
    target = str(imports.get(str(name), ""))
    base = target.rpartition("/")[2].removesuffix(".yaml").removesuffix(".yml")
    if base not in known:
        raise RecipeError(
            path,
            f"{where}: imports {name!r} ({target or 'not under imports'}), of which the format "
            "cannot be told",
            f"write its entries out, or import one of {', '.join(known)}",
        )
    return known[base]


def _modelopt_format(path: Path, where: str, cfg: Any, imports: Mapping[str, Any]) -> Format:
    if not isinstance(cfg, dict):
        raise RecipeError(path, f"{where}: must be one mapping", "correct it")
    if "$import" in cfg:
        imported: Format = _imported(path, where, cfg["$import"], imports, NUMERICS)
        return imported
    blocks = cfg.get("block_sizes") or {}
    block = blocks.get(-1) if isinstance(blocks, dict) else None
    scale = blocks.get("scale_bits") if isinstance(blocks, dict) else None
    match cfg.get("num_bits"), block, scale:
        case (("e2m1" | [2, 1]), 16, ("e4m3" | [4, 3])):
            return NVFP4
        case (("e2m1" | [2, 1]), 32, ("e8m0" | [8, 0])):
            return MXFP4
        case (("e4m3" | [4, 3]), _, None):
            return FP8
        case 8, _, None:
            return INT8
        case 4, size, None if size is None or (isinstance(size, int) and size > 0):
            return Format(bucket=Bucket.INT4, bits=4, weight_bits=4 + (16 / size if size else 0.0))
    raise RecipeError(
        path,
        f"{where}: num_bits {cfg.get('num_bits')!r} with block_sizes {blocks!r} is no format that "
        "can be gated",
        f"use one of {', '.join(Bucket)}",
    )


def _llmcompressor_file(path: Path, document: Mapping[str, Any]) -> RecipeFile:
    modifiers = list(_modifiers(path, document))
    rules = [rule for where, _, body in modifiers for rule in _scheme_rules(path, where, body)]
    formats = {}
    for kind, name in PROBES.items():
        matching = [each for each, targets, ignore in rules if _meant(name, targets, ignore)]
        formats[kind] = matching[-1] if matching else None
    names = {name for _, name, _ in modifiers}
    # Of schemes that are written out, the activations are not looked at: text never hurts.
    static = any(
        "config_groups" in body
        or not isinstance(body.get("scheme"), str | None)
        or str(body.get("scheme")).upper() in STATIC_SCHEMES
        for _, _, body in modifiers
    )
    return RecipeFile(
        path=path.resolve(),
        quantizer=Quantizer.LLMCOMPRESSOR,
        recipe=_recipe(path, formats),
        calibrated=static or bool(names & CALIBRATED_MODIFIERS),
    )


def _modifiers(
    path: Path, document: Mapping[str, Any]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (dotted place, modifier name, settings) as llm-compressor finds them."""
    for stage, groups in document.items():
        if not str(stage).endswith("_stage"):
            continue
        for group, bodies in (groups if isinstance(groups, dict) else {}).items():
            if not str(group).endswith("_modifiers"):
                continue
            for name, body in (bodies if isinstance(bodies, dict) else {}).items():
                where = f"{stage}.{group}.{name}"
                if not isinstance(body, dict):
                    raise RecipeError(path, f"{where}: must be a mapping", "correct it")
                yield where, str(name), body


def _scheme_rules(
    path: Path, where: str, body: Mapping[str, Any]
) -> Iterator[tuple[Format, list[str], list[str]]]:
    """Yield (format, targets, ignore) for each scheme of a modifier."""
    ignore = _names(path, f"{where}.ignore", body.get("ignore", []))
    targets = _names(path, f"{where}.targets", body.get("targets", ["Linear"]))
    scheme = body.get("scheme")
    groups = body.get("config_groups") or {}
    if isinstance(scheme, str):
        yield _scheme_format(path, f"{where}.scheme", scheme), targets, ignore
    elif isinstance(scheme, dict):
        for name, meant in scheme.items():
            place = f"{where}.scheme.{name}"
            yield _scheme_format(path, place, str(name)), _names(path, place, meant), ignore
    elif scheme is not None or not isinstance(groups, dict):
        raise RecipeError(path, f"{where}: scheme or config_groups is malformed", "correct it")
    for name, group in groups.items():
        place = f"{where}.config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise RecipeError(path, f"{place}: has no mapping `weights`", "add it")
        meant = _names(path, f"{place}.targets", group.get("targets", ["Linear"]))
        yield _group_format(path, f"{place}.weights", group["weights"]), meant, ignore


def _names(path: Path, where: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise RecipeError(path, f"{where}: must be a name or a list of names", "correct it")
    for each in values:
        try:
            re.compile(each.removeprefix("re:"))
        except re.error as error:
            if each.startswith("re:"):
                raise RecipeError(
                    path, f"{where}: {each!r} is no regular expression ({error})", "correct it"
                ) from None
    return values


def _scheme_format(path: Path, where: str, scheme: str) -> Format:
    if scheme.upper() not in SCHEMES:
        raise RecipeError(
            path, f"{where}: {scheme!r} cannot be gated", f"use one of {', '.join(SCHEMES)}"
        )
    return SCHEMES[scheme.upper()]


def _group_format(path: Path, where: str, weights: Mapping[str, Any]) -> Format:
    size = weights.get("group_size")
    match weights.get("num_bits"), weights.get("type", "int"), size:
        case 4, "float", 16:
            return NVFP4
        case 4, "float", 32:
            return MXFP4
        case 8, "float", _:
            return FP8
        case 8, "int", _:
            return INT8
        case 4, "int", None | -1:
            return Format(bucket=Bucket.INT4, bits=4, weight_bits=4.0)
        case 4, "int", int() if size > 0:
            return Format(bucket=Bucket.INT4, bits=4, weight_bits=4 + 16 / size)
    raise RecipeError(
        path,
        f"{where}: num_bits {weights.get('num_bits')!r}, type {weights.get('type')!r}, group_size "
        f"{size!r} is no format that can be gated",
        f"use one of {', '.join(Bucket)}",
    )


def _meant(name: str, targets: Sequence[str], ignore: Sequence[str]) -> bool:
    return _matches(name, targets) and not _matches(name, ignore)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Match as compressed-tensors does: a class, an exact name, or an expression after ``re:``."""
    return any(
        re.match(pattern.removeprefix("re:"), name)
        if pattern.startswith("re:")
        else pattern in ("Linear", name)
        for pattern in patterns
    )


def _recipe(path: Path, formats: Mapping[str, Format | None]) -> Recipe:
    meant = {kind: each for kind, each in formats.items() if each is not None}
    if not meant:
        raise RecipeError(
            path, "quantizes no attention, MLP or expert weights", "correct its patterns"
        )
    if len(set(meant.values())) > 1:
        mixed = ", ".join(f"{kind} {each.bucket}" for kind, each in meant.items())
        raise RecipeError(
            path, f"mixes formats ({mixed})", "use one format for all weights of a recipe"
        )
    one = next(iter(meant.values()))
    return Recipe(
        name=path.stem,
        bucket=one.bucket,
        bits=one.bits,
        quantizes=tuple(meant),
        weight_bits=one.weight_bits,
        summary=f"{one.bucket} for {', '.join(meant)}, from {path.name}.",
    )


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())
