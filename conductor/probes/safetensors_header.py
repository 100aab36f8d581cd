"""Read what safetensors files say about their tensors, without touching a weight.

A file is an 8-byte little-endian header length, a JSON header and the tensor bytes. Invariants:
every tensor returned lies inside its file, has as many bytes as its type and shape need, and
overlaps no other; the tensors fill the file without a hole. A checkpoint is one file, or the shards
that an index names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conductor.probes.reading import ProbeError, open_regular, parse_object, read_object

LARGEST_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library itself sets."""

MOST_DIMENSIONS = 16

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COPY_AGAIN = "copy or export the checkpoint again"


class Tensor(NamedTuple):
    """One tensor as its header describes it."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


class Weights(NamedTuple):
    """The tensors of a checkpoint, and those in its shards that the index does not name."""

    tensors: dict[str, Tensor]
    unindexed: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors that the index refers to."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file.

    Raises:
        ProbeError: the file cannot be read, is truncated, or its header contradicts itself.
    """
    with open_regular(path, _COPY_AGAIN) as stream:
        try:
            file_bytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(file_bytes - 8, LARGEST_HEADER_BYTES):
                raise ProbeError(
                    path,
                    f"is no whole safetensors file: {file_bytes} bytes, header of {header_bytes}",
                    _COPY_AGAIN,
                )
            header = stream.read(header_bytes)
        except OSError as error:
            raise ProbeError(path, f"cannot be read ({error.strerror})", _COPY_AGAIN) from None
    entries = parse_object(header, path, _COPY_AGAIN)
    entries.pop("__metadata__", None)
    return _tensors(entries, path, file_bytes - 8 - header_bytes)


def _tensors(entries: Mapping[str, Any], path: Path, data_bytes: int) -> dict[str, Tensor]:
    """Check every entry against its own shape, its neighbours and the end of the file.

    A name that occurs twice with different bytes leaves a hole where the first lay.
    """
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = (*shape, begin, end)
            if len(shape) > MOST_DIMENSIONS or set(map(type, numbers)) != {int} or min(numbers) < 0:
                raise ValueError
            bits = DTYPE_BITS[dtype] * math.prod(shape)
        except (KeyError, TypeError, ValueError):
            raise ProbeError(
                path,
                f"tensor {name!r} has no usable dtype, shape and data_offsets",
                "export the checkpoint again with a current version of the exporter",
            ) from None
        if (end - begin) * 8 != bits or end > data_bytes:
            problem = (
                f"tensor {name!r} ({dtype} {shape}) cannot lie at bytes {begin} to {end} "
                f"of {data_bytes}"
            )
            raise ProbeError(path, problem, _COPY_AGAIN)
        tensors[name] = Tensor(dtype, tuple(shape), end - begin)
        spans.append((begin, end, name))
    spans.sort()
    position = 0
    for begin, end, name in spans:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "follows a hole"
            raise ProbeError(path, f"tensor {name!r} {kind}", _COPY_AGAIN)
        position = end
    if position != data_bytes:
        problem = f"{data_bytes - position} bytes belong to no tensor"
        raise ProbeError(path, problem, _COPY_AGAIN)
    return tensors


def read_weights(directory: Path) -> Weights:
    """Return the tensors of a checkpoint directory: one file, or an index and its shards.

    Raises:
        ProbeError: there are no safetensors weights, it is unclear which files are the weights,
            a shard or a tensor that the index names is absent, or a header is unusable.
    """
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.exists() and single.exists():
        raise ProbeError(
            directory,
            f"holds both {SINGLE_FILE} and {INDEX_FILE}, and loaders disagree on which to read",
            "remove the one that is left over",
        )
    if index.exists():
        return _read_shards(index)
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise _no_weights(directory)
    if len(files) > 1:
        raise ProbeError(directory, f"holds shards and no {INDEX_FILE}", _COPY_AGAIN)
    return _not_empty(Weights(read_header(files[0]), ()), files[0])


def _read_shards(index: Path) -> Weights:
    shard_of = read_object(index, _COPY_AGAIN).get("weight_map")
    shards = _shard_names(shard_of)
    if not isinstance(shard_of, dict) or not shards:
        raise ProbeError(index, "weight_map must map tensor names to file names", _COPY_AGAIN)
    found: dict[str, Tensor] = {}
    unindexed: list[str] = []
    for shard in shards:
        path = index.parent / shard
        if not path.is_file():
            raise ProbeError(path, f"is named in {INDEX_FILE} and does not exist", _COPY_AGAIN)
        for name, tensor in read_header(path).items():
            if shard_of.get(name) == shard:
                found[name] = tensor
            else:
                unindexed.append(name)
    absent = [name for name in shard_of if name not in found]
    if absent:
        problem = f"{len(absent)} tensors are not in the shard the index names: {absent[0]}"
        raise ProbeError(index, problem, _COPY_AGAIN)
    return _not_empty(Weights(found, tuple(unindexed)), index)


def _shard_names(shard_of: object) -> list[str]:
    """Return the shards of a weight map, or none where one is no name of a file beside it."""
    values = list(shard_of.values()) if isinstance(shard_of, dict) else []
    if not all(isinstance(value, str) for value in values):
        return []
    names = sorted(set(values))
    return names if all(Path(name).name == name for name in names) else []


def _not_empty(weights: Weights, path: Path) -> Weights:
    if weights.size_bytes == 0:
        raise ProbeError(path, "holds no weights", _COPY_AGAIN)
    return weights


def pickled_files(directory: Path) -> list[str]:
    """Return the paths of pickled files within a directory; they are never opened."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.suffix in _PICKLED_SUFFIXES and not path.is_dir()
    )


def _no_weights(directory: Path) -> ProbeError:
    pickled = pickled_files(directory)
    if pickled:
        return ProbeError(
            directory,
            f"holds pickled weights only ({pickled[0]}), which can run code when loaded",
            "convert them to safetensors on a machine you can afford to lose",
        )
    return ProbeError(directory, "holds no safetensors weights", "check the path, or export again")
