"""What a checkpoint is before anything is done to it: whole, and quantized or not.

Reads headers and configuration only, so that a broken download or a source that is already
quantized is refused before hours are spent on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conductor.probes.formats import MODELOPT_FILE, compressed_tensors, modelopt
from conductor.probes.reading import COPY_AGAIN, ProbeError, read_object
from conductor.probes.safetensors_header import read_whole
from gates.evidence import Bucket

__all__ = ["ProbeError", "check_weights", "quantized_format"]

UNKNOWN = "unknown"


_BUCKET_OF_METHOD: Mapping[str, Bucket] = {
    "fp8": Bucket.FP8,
    "fbgemm_fp8": Bucket.FP8,
    "mxfp4": Bucket.MXFP4,
}
"""Methods that name their precision."""

_INTEGER_METHODS = ("awq", "gptq")
"""Methods that write integers and state their ``bits``."""


def check_weights(directory: Path) -> None:
    """Check that a checkpoint's weights are whole: every shard there, every tensor inside it.

    Raises:
        ProbeError: it is no directory, there are no weights, or anything is wrong with them that
            would fail a candidate: a shard or tensor that the index names is absent, a file is
            truncated, tensors overlap, ...
    """
    read_whole(directory)


def quantized_format(directory: Path) -> tuple[str, str] | None:
    """Return the method and the bucket that a checkpoint declares, or ``None`` where it has none.

    The method is ``modelopt``, ``compressed-tensors`` or another ``quant_method`` as written; the
    bucket is the precision of the weights, or ``unknown`` where they have none or several.

    Raises:
        ProbeError: it is no directory, or ``config.json`` or ``hf_quant_config.json`` cannot be
            read.
    """
    _require_directory(directory)
    declared = _declared(directory)
    if declared is None:
        return _from_modelopt_file(directory / MODELOPT_FILE)
    method = str(declared.get("quant_method") or UNKNOWN)
    if method == compressed_tensors.METHOD:
        return method, _bucket(compressed_tensors.precisions(declared))
    if method.startswith(modelopt.METHOD) or (method == UNKNOWN and "quant_algo" in declared):
        return modelopt.METHOD, _bucket(modelopt.precisions(declared))
    if method in _INTEGER_METHODS:
        return method, _bucket([f"INT{declared.get('bits')}"])
    return method, _BUCKET_OF_METHOD.get(method, UNKNOWN)


def _require_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise ProbeError(directory, "is no directory", "give the directory of a checkpoint")


def _declared(directory: Path) -> Mapping[str, Any] | None:
    """Return ``quantization_config``, which models with several parts keep with their text part."""
    path = directory / "config.json"
    config = read_object(path, COPY_AGAIN)
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        declared = part.get("quantization_config")
        if declared is None:
            continue
        if not isinstance(declared, dict):
            raise ProbeError(path, "quantization_config must be an object", COPY_AGAIN)
        return declared
    return None


def _from_modelopt_file(path: Path) -> tuple[str, str] | None:
    if not path.exists():
        return None
    quantization = read_object(path, COPY_AGAIN).get("quantization")
    stated = quantization if isinstance(quantization, dict) else {}
    return modelopt.METHOD, _bucket(modelopt.precisions(stated))


def _bucket(precisions: Iterable[str]) -> str:
    found = set(precisions)
    only = found.pop() if len(found) == 1 else UNKNOWN
    return only if only in set(Bucket) else UNKNOWN
