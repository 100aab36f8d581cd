"""Keep an int8 export in a few kilobytes: what the demo model beside it does not give.

The export's weights are the source's, divided by a scale per row, in bfloat16 arithmetic, and
rounded; embeddings and norms are the source's own bytes. So the header and the scales are enough,
and the whole file is made of them again, byte for byte.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np

SIZES = {"BF16": 2, "I8": 1}


def shrink(export: bytes, source: bytes) -> bytes:
    """Return the header of ``export``, and of its tensors those that ``source`` does not give.

    Raises:
        ValueError: the export cannot be made of that again.
    """
    header, tensors = _read(export)
    known = _read(source)[1]
    kept = [data for name, (entry, data) in tensors.items() if not _is_given(name, entry, known)]
    shrunk = header + b"".join(kept)
    if restore(shrunk, source) != export:
        raise ValueError("the export is not its source, scaled by rows and rounded to 8 bits")
    return shrunk


def restore(shrunk: bytes, source: bytes) -> bytes:
    """Return the whole export, as :func:`shrink` got it."""
    header, entries = _header(shrunk)
    known = _read(source)[1]
    kept, at = {}, len(header)
    for name, entry in entries.items():
        if not _is_given(name, entry, known):
            size = math.prod(entry["shape"]) * SIZES[entry["dtype"]]
            kept[name] = shrunk[at : at + size]
            at += size
    tensors = []
    for name, entry in entries.items():
        if name in kept:
            tensors.append(kept[name])
        elif entry["dtype"] == "I8":
            tensors.append(_quantize(known[name][1], kept[f"{name}_scale"], entry["shape"]))
        else:
            tensors.append(known[name][1])
    return header + b"".join(tensors)


def _header(file: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return the header as it stands in a safetensors file, and its entries as the tensors lie."""
    (length,) = struct.unpack_from("<Q", file)
    header = file[: 8 + length]
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return header, dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))


def _read(file: bytes) -> tuple[bytes, dict[str, tuple[dict[str, Any], bytes]]]:
    """Return the header, and each tensor's entry and bytes."""
    header, entries = _header(file)
    body = memoryview(file)[len(header) :]
    return header, {
        name: (entry, bytes(body[slice(*entry["data_offsets"])])) for name, entry in entries.items()
    }


def _is_given(name: str, entry: dict[str, Any], known: dict[str, Any]) -> bool:
    """True when the source has the tensor: as it is, or to be quantized."""
    if name not in known or known[name][0]["shape"] != entry["shape"]:
        return False
    return entry["dtype"] in ("I8", known[name][0]["dtype"])


def _quantize(weight: bytes, scale: bytes, shape: list[int]) -> bytes:
    scaled = _bfloat16(_floats(weight).reshape(shape) / _floats(scale).reshape(-1, 1))
    return bytes(np.clip(np.round(scaled), -128, 127).astype(np.int8).tobytes())


def _floats(bfloats: bytes) -> Any:
    return (np.frombuffer(bfloats, "<u2").astype("<u4") << 16).view("<f4")


def _bfloat16(values: Any) -> Any:
    """Round to the nearest bfloat16, halves to even; the result is held in 32 bits."""
    bits = values.view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype("<u4").view("<f4")
