"""Read what safetensors files say about their tensors, without touching a weight.

A file is an 8-byte little-endian header length, a JSON header and the tensor bytes. A checkpoint is
one file, or the shards that an index names. Headers can be wrong in many places at once and a
person repairs them all, so everything wrong is reported, and nothing is raised for it. Invariants:
a tensor that is returned lies inside its file, has as many bytes as its type and shape need,
overlaps no other and has a name of its own; a name that is reported and not returned is in
``broken``. Whatever a header claims, little more memory is used than its own bytes need.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Raw

from conductor.probes.findings import Findings
from conductor.probes.reading import COPY_AGAIN, ProbeError, open_regular, read_bytes
from gates.findings import KINDS

LARGEST_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library itself sets."""

LARGEST_INDEX_BYTES = 200_000_000
MOST_TENSORS = 1_000_000
"""Most tensors of a checkpoint, and names of an index: the largest known have 281,393."""

MOST_TENSORS_IN_FILE = 500_000
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

_SUFFIX = ".safetensors"
_METADATA = "__metadata__"
_METADATA_FIRST = b'{"__metadata__":'
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_NAME = 200

_QUOTES_OF_ENTRY = 10
"""Quotation marks of a header's entry: around its name, three keys and the type."""

_QUOTES_OF_MAPPING = 4
"""Quotation marks of an entry of a weight map."""

_QUOTES_OF_KEYS = 4
"""Quotation marks around the two keys of an index; one name more in its weight map has as many."""

_ARRAYS_MATTER_BYTES = 16 << 20
"""Size of a header above which a long array in it could take a gigabyte once it is parsed."""

_LONG_ARRAY = re.compile(rb"\[[^\]\[]{4096}")
_SERIES = re.compile(r"(.*?)-?(\d{1,6})-of-(\d{1,6})\.safetensors")

_WeightMap = TypeVar("_WeightMap")

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

if TYPE_CHECKING:
    Dtype = str
else:
    # Types that are known come as one text each, which takes less memory and compares faster.
    Dtype = Literal[tuple(DTYPE_BITS)]

_Size = Annotated[int, msgspec.Meta(ge=0)]
_Shape = Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MOST_DIMENSIONS)]


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """One tensor as its header describes it; ``offsets`` count from the file's first tensor byte.

    The collector need not look at tensors: they are many, and hold numbers and text only.
    """

    dtype: Dtype
    shape: _Shape
    offsets: tuple[_Size, _Size] = msgspec.field(name="data_offsets")

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        begin, end = self.offsets
        return end - begin


class _Stated(Tensor, frozen=True, gc=False):
    """A tensor of any type, known or not."""

    dtype: str


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The whole tensors of a checkpoint, in the order of its files.

    ``shard_of`` maps every tensor to the name of its file, ``data_start`` a file to where its
    tensor bytes begin. ``broken`` are names that a finding says something about and that are not
    in ``tensors``.
    """

    directory: Path
    tensors: dict[str, Tensor]
    shard_of: Mapping[str, str]
    data_start: Mapping[str, int]
    broken: frozenset[str] = frozenset()

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.offsets[1] - tensor.offsets[0] for tensor in self.tensors.values())


def read_weights(directory: Path, findings: Findings) -> Weights:
    """Return the whole tensors of a checkpoint directory, and report all that is wrong with it.

    Findings are those of the check "integrity", except pickled files: ``pickled_files`` lists
    them, and whether they are to blame depends on the source.

    Raises:
        ProbeError: there is no checkpoint at all: no directory, no safetensors file, or no tensor
            in any of them.
    """
    if not directory.is_dir():
        raise ProbeError(directory, "is no directory", "give the directory of a checkpoint")
    entries = {entry.name for entry in os.scandir(directory)}
    dangling = dangling_links(directory)
    findings.extend("dangling_link", map(_shown, dangling))
    reader = _Reader(directory, entries.difference(dangling), dangling, findings)
    try:
        index = _read_index(reader) if INDEX_FILE in reader.present else None
    except ProbeError as error:
        findings.add("unusable_file", f"{INDEX_FILE} ({error.problem})")
        index = None
    weights = _read_indexed(reader, *index) if index else _read_unindexed(reader)
    if reader.all_readable and not weights.size_bytes and not weights.broken:
        raise ProbeError(directory, "holds no weights", COPY_AGAIN)
    return weights


def read_whole(directory: Path) -> Weights:
    """Return the tensors of a checkpoint that must be whole, such as a source.

    Raises:
        ProbeError: as for ``read_weights``, or anything is wrong that would fail a candidate.
    """
    findings = Findings()
    weights = read_weights(directory, findings)
    found = [entry for entry in findings.document() if KINDS[entry["kind"]].failure_class]
    if found:
        problem = "; ".join(
            f"{entry['count']} {KINDS[entry['kind']].says}: {', '.join(entry['names'][:3])}"
            for entry in found
        )
        raise ProbeError(directory, problem, KINDS[found[0]["kind"]].remedy)
    return weights


def pickled_files(directory: Path) -> list[str]:
    """Return the paths of pickled files within a directory; they are never opened."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.suffix.lower() in _PICKLED_SUFFIXES and not path.is_dir()
    )


def dangling_links(directory: Path) -> list[str]:
    """Return the paths of links within a directory that lead nowhere, or in a circle."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_symlink() and not path.exists()
    )


class _Header(NamedTuple):
    """The header of one file: its tensors or, where not all entries are usual, the entries.

    ``repeated`` are names that it gives several times, and how often; ``ambiguous`` names whose
    entry gives a key twice.
    """

    data_start: int
    data_bytes: int
    tensors: dict[str, Tensor] | None = None
    entries: Collection[tuple[str, Raw]] = ()
    repeated: Mapping[str, int] = {}
    ambiguous: Collection[str] = ()

    @property
    def tensor_count(self) -> int:
        """Number of entries that are no metadata."""
        return len(self.entries if self.tensors is None else self.tensors)


@dataclass(kw_only=True)
class _File:
    """What one file holds: tensors that are whole, and names of those that are not."""

    data_start: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)


class _Reader:
    """Reads the files of one directory and notes what is wrong, by file and tensor."""

    def __init__(
        self,
        directory: Path,
        present: Collection[str],
        dangling: Collection[str],
        findings: Findings,
    ) -> None:
        self.directory = directory
        self.present = present
        self.dangling = dangling
        self.findings = findings
        self.all_readable = True
        self._tensor_count = 0

    def note(self, kind: str, file: str, name: str, remark: str = "") -> None:
        """Note what is wrong with one tensor of one file."""
        # That module builds on this one.
        from conductor.probes.modules import kind_of

        text = f"{_shown(file)}: {_shown(name)}" + (f", {remark}" if remark else "")
        module = _shown(name).rpartition(".")[0] or _shown(name)
        self.findings.add(kind, text, kind_of(module))

    def read(self, file: str) -> _File | None:
        """Return what a file holds, or ``None`` where its header cannot be read."""
        path = self.directory / file
        try:
            header = _read_header(path)
            self._tensor_count += header.tensor_count
            if self._tensor_count > MOST_TENSORS:
                raise ProbeError(path, f"goes beyond {MOST_TENSORS} tensors", COPY_AGAIN)
        except ProbeError as error:
            self.findings.add("unusable_header", f"{_shown(file)} ({error.problem})")
            self.all_readable = False
            return None
        tensors = header.tensors
        if tensors is not None and _fit_together(tensors.values(), header.data_bytes):
            return _File(data_start=header.data_start, tensors=tensors)
        found = _File(data_start=header.data_start)
        self._check(file, header, found)
        for name, times in header.repeated.items():
            found.broken.add(name)
            self.note("duplicate_name", file, name, f"{times} times")
        for name in header.ambiguous:
            if name not in found.broken:
                found.broken.add(name)
                self.note("unusable_tensor", file, name, "gives a key twice")
        for name in found.broken:
            found.tensors.pop(name, None)
        return found

    def _check(self, file: str, header: _Header, found: _File) -> None:
        """Hold every tensor against its shape, its neighbours and the file's end."""
        tensors, data_bytes = found.tensors, header.data_bytes
        position, in_order = 0, True
        usual = header.tensors
        members = self._decode(file, header, found) if usual is None else usual.items()
        for name, tensor in members:
            begin, end = tensor.offsets
            if (end - begin) * 8 != DTYPE_BITS[tensor.dtype] * math.prod(tensor.shape):
                found.broken.add(name)
                self.note("unusable_tensor", file, name, _misfit(tensor))
                continue
            if end > data_bytes:
                found.broken.add(name)
                self.note("truncated", file, name, f"bytes {begin} to {end} of {data_bytes}")
            tensors[name] = tensor
            in_order &= begin == position
            position = end
        if not in_order or position != data_bytes:
            # Places that seem to be no tensor's may be those of one that is not known in full.
            all_known = len(tensors) == header.tensor_count
            self._check_places(file, found, data_bytes if all_known else None)

    def _decode(self, file: str, header: _Header, found: _File) -> Iterator[tuple[str, Tensor]]:
        """Yield what entries describe, and note those that describe no tensor."""
        for name, entry in header.entries:
            try:
                tensor = _TENSOR.decode(entry)
            except _NOT_JSON:
                found.broken.add(name)
                self.note("unusable_tensor", file, name, _why_unusable(entry))
            else:
                yield name, tensor

    def _check_places(self, file: str, found: _File, data_bytes: int | None) -> None:
        """Require each tensor to begin where the one before it ends, and the last at the end.

        Without ``data_bytes`` holes are not looked for.
        """
        places = sorted((*tensor.offsets, name) for name, tensor in found.tensors.items())
        position, before = 0, ""
        for begin, end, name in places:
            if begin < position:
                found.broken.update((name, before))
                remark = f"bytes {begin} to {end}, overlaps {_shown(before)}"
                self.note("overlapping", file, name, remark)
            elif data_bytes is not None:
                self._note_hole(file, position, begin, data_bytes)
            if end > position:
                position, before = end, name
        if data_bytes is not None:
            self._note_hole(file, position, data_bytes, data_bytes)

    def _note_hole(self, file: str, begin: int, end: int, data_bytes: int) -> None:
        end = min(end, data_bytes)
        if begin < end:
            self.findings.add("hole", f"{_shown(file)}: bytes {begin} to {end} of {data_bytes}")


def _read_unindexed(reader: _Reader) -> Weights:
    """Read the one file that is a checkpoint, or all files where the index is absent.

    Loaders that look for ``model.safetensors`` read it alone; others read every file there is.
    """
    files = sorted(name for name in reader.present if name.endswith(_SUFFIX))
    if SINGLE_FILE in files:
        _note_strays(reader, files, {SINGLE_FILE}, f"beside {SINGLE_FILE}")
        files = [SINGLE_FILE]
    elif not files:
        raise _no_weights(reader.directory)
    elif len(files) > 1 and INDEX_FILE not in reader.present:
        shown = f"{INDEX_FILE} (of {len(files)} files, {_shown(files[0])} and others)"
        reader.findings.add("missing_index", shown)
    for first, count in _absent_of_series(files):
        reader.findings.add("missing_shard", f"{first} (the others say so)", count=count)
    tensors: dict[str, Tensor] = {}
    shard_of: dict[str, str] = {}
    data_start: dict[str, int] = {}
    broken: set[str] = set()
    for file in files:
        found = reader.read(file)
        if found is None:
            continue
        data_start[file] = found.data_start
        broken |= found.broken
        for name in sorted(shard_of.keys() & found.tensors.keys()):
            broken.add(name)
            reader.note("duplicate_name", file, name, f"also in {_shown(shard_of[name])}")
        tensors |= found.tensors
        shard_of |= dict.fromkeys(found.tensors, file)
    for name in broken & tensors.keys():
        del tensors[name], shard_of[name]
    return Weights(
        directory=reader.directory,
        tensors=tensors,
        shard_of=shard_of,
        data_start=data_start,
        broken=frozenset(broken),
    )


def _read_indexed(
    reader: _Reader, shard_of: dict[str, str], total_size: int | float | None
) -> Weights:
    """Read the shards that an index names, and hold both against each other."""
    named = _by_file(shard_of)
    forgotten = _left_out_of_series(reader.present, named)
    if SINGLE_FILE in reader.present and named.keys() != {SINGLE_FILE}:
        reader.findings.add("two_sets", f"{SINGLE_FILE} beside {INDEX_FILE}")
    beside = sorted(name for name in reader.present if name.endswith(_SUFFIX))
    _note_strays(reader, beside, {*named, *forgotten, SINGLE_FILE}, f"not in {INDEX_FILE}")
    tensors: dict[str, Tensor] = {}
    data_start: dict[str, int] = {}
    broken: set[str] = set()
    elsewhere: dict[str, str] = {}
    for file in sorted({*named, *forgotten}):
        found = _read_named(reader, file, len(named.get(file, ())))
        if found is None:
            continue
        data_start[file] = found.data_start
        broken |= found.broken
        if found.tensors.keys() != set(named.get(file, ())):
            _set_apart(reader, file, found, shard_of, elsewhere)
        tensors |= found.tensors
    _note_absent(reader, shard_of, tensors, data_start.keys(), elsewhere, broken)
    for name, file in elsewhere.items():
        broken.add(name)
        if name not in shard_of:
            reader.note("not_in_index", file, name)
        elif tensors.pop(name, None):
            reader.note("duplicate_name", file, name, f"also in {_shown(shard_of[name])}")
    weights = Weights(
        directory=reader.directory,
        tensors=tensors,
        shard_of=_only(tensors, shard_of),
        data_start=data_start,
        broken=frozenset(broken),
    )
    if not broken and total_size not in (None, weights.size_bytes):
        problem = f"total_size {total_size}, tensors {weights.size_bytes}"
        reader.findings.add("wrong_total_size", f"{INDEX_FILE} ({problem})")
    return weights


def _by_file(shard_of: Mapping[str, str]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = defaultdict(list)
    for name, file in shard_of.items():
        named[file].append(name)
    return dict(named)


def _set_apart(
    reader: _Reader, file: str, found: _File, shard_of: Mapping[str, str], elsewhere: dict[str, str]
) -> None:
    """Move tensors that the index does not look for in this file to those that are elsewhere."""
    for name in [name for name in found.tensors if shard_of.get(name) != file]:
        del found.tensors[name]
        if name in elsewhere:
            reader.note("duplicate_name", file, name, f"also in {_shown(elsewhere[name])}")
        elsewhere[name] = file


def _note_strays(
    reader: _Reader, files: Iterable[str], known: Collection[str], remark: str
) -> None:
    strays = (f"{_shown(file)} ({remark})" for file in files if file not in known)
    reader.findings.extend("stray_file", strays)


def _read_named(reader: _Reader, file: str, tensor_count: int) -> _File | None:
    """Return what a shard holds; one that leads nowhere is noted as a link already."""
    if file in reader.present:
        return reader.read(file)
    reader.all_readable = False
    if file not in reader.dangling:
        reader.findings.add("missing_shard", f"{_shown(file)} ({tensor_count} tensors)")
    return None


def _note_absent(
    reader: _Reader,
    shard_of: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    read: Collection[str],
    elsewhere: Mapping[str, str],
    broken: set[str],
) -> None:
    """Note tensors that are not in the shard the index names, where that shard could be read."""
    if len(tensors) == len(shard_of):
        return
    for name, file in shard_of.items():
        if name in tensors or name in broken:
            continue
        broken.add(name)
        if file in read:
            other = elsewhere.get(name)
            reader.note("not_in_shard", file, name, f"is in {_shown(other)}" if other else "")


def _only(tensors: Mapping[str, Tensor], shard_of: Mapping[str, str]) -> Mapping[str, str]:
    """Return the part of a weight map that concerns these tensors."""
    if len(tensors) == len(shard_of):
        return shard_of
    return {name: shard_of[name] for name in tensors}


class _Index(msgspec.Struct, Generic[_WeightMap]):
    weight_map: _WeightMap
    metadata: Raw = Raw(b"{}")


class _IndexMetadata(msgspec.Struct):
    total_size: int | float | None = None


def _read_index(reader: _Reader) -> tuple[dict[str, str], int | float | None]:
    """Return the weight map and the total size of an index.

    Raises:
        ProbeError: it cannot be read, or its weight map names no files beside it.
    """
    path, findings = reader.directory / INDEX_FILE, reader.findings
    document = read_bytes(path, COPY_AGAIN, largest=LARGEST_INDEX_BYTES)
    quotes = document.count(b'"')
    if quotes > _QUOTES_OF_MAPPING * MOST_TENSORS + 1000:
        raise ProbeError(path, f"names more than {MOST_TENSORS} tensors", COPY_AGAIN)
    try:
        index = _decode_index(document, reader.present)
    except _NOT_JSON as error:
        problem = f"has no usable weight_map ({_reason(error)})"
        raise ProbeError(path, problem, COPY_AGAIN) from None
    shard_of, metadata = index.weight_map, bytes(index.metadata)
    if not shard_of or not all(map(_is_plain_name, set(shard_of.values()))):
        problem = "weight_map must map tensor names to names of files beside it"
        raise ProbeError(path, problem, COPY_AGAIN)
    quotes -= metadata.count(b'"') + _QUOTES_OF_KEYS
    if quotes > _QUOTES_OF_MAPPING * len(shard_of):
        members = _all_members(_RAW_INDEX.decode(document).weight_map)
        for name, times in _repeated(members).items():
            findings.add("duplicate_name", f"{INDEX_FILE}: {_shown(name)}, {times} times")
    try:
        stated = _INDEX_METADATA.decode(metadata)
    except _NOT_JSON:
        findings.add("wrong_total_size", f"{INDEX_FILE} (total_size is no number)")
        stated = None
    return shard_of, stated.total_size if stated else None


def _decode_index(document: bytes, present: Iterable[str]) -> _Index[dict[str, str]]:
    """Return an index; files that are there are one text each, made and compared faster."""
    files = tuple(name for name in present if name.endswith(_SUFFIX))
    literal: Any = Literal
    try:
        found: _Index[dict[str, str]] = msgspec.json.decode(
            document, type=_Index[dict[str, literal[files]]]
        )
    except (msgspec.ValidationError, TypeError):
        return _INDEX.decode(document)
    return found


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def _read_header(path: Path) -> _Header:
    """Return the header of one file.

    Raises:
        ProbeError: the file cannot be read or is shorter than its header, or the header is no
            JSON object, or larger than any that loaders take.
    """
    with open_regular(path, COPY_AGAIN) as stream:
        try:
            file_bytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(file_bytes - 8, LARGEST_HEADER_BYTES):
                claim = f"{file_bytes} bytes, header of {header_bytes}"
                raise ProbeError(path, f"is no whole safetensors file: {claim}", COPY_AGAIN)
            header = stream.read(header_bytes)
        except OSError as error:
            raise ProbeError(path, f"cannot be read ({error.strerror})", COPY_AGAIN) from None
    try:
        return _parse_header(header, file_bytes - 8 - header_bytes)
    except _NOT_JSON as error:
        problem = f"the header is no usable JSON ({_reason(error)})"
        raise ProbeError(path, problem, COPY_AGAIN) from None


def _parse_header(header: bytes, data_bytes: int) -> _Header:
    """Decode a header or, where it is unusual, split it into its entries.

    Two equal keys are one in a dictionary, so names are counted by their quotation marks, which a
    usual entry has ten of; only where the number is another are all names collected.
    """
    if not header.isascii():
        header.decode("utf-8")
    quotes = header.count(b'"')
    if quotes > _QUOTES_OF_ENTRY * MOST_TENSORS_IN_FILE:
        raise msgspec.ValidationError(f"more than {MOST_TENSORS_IN_FILE} tensors")
    if len(header) > _ARRAYS_MATTER_BYTES and _LONG_ARRAY.search(header):
        raise msgspec.ValidationError("an array of thousands")
    data_start = 8 + len(header)
    tensors = _decode_usual(header, quotes)
    if tensors is not None:
        return _Header(data_start, data_bytes, tensors)
    members = _MEMBERS.decode(header)
    metadata = members.pop(_METADATA, None)
    if metadata is not None:
        text = bytes(metadata)
        quotes -= text.count(b'"') + 2
        if len(text) > _ARRAYS_MATTER_BYTES:
            raise msgspec.ValidationError(f"{_METADATA} of {len(text)} bytes")
        _METADATA_MAP.decode(text)
    if quotes == _QUOTES_OF_ENTRY * len(members):
        return _Header(data_start, data_bytes, entries=members.items())
    every = [member for member in _all_members(header) if member[0] != _METADATA]
    return _Header(
        data_start,
        data_bytes,
        entries=every,
        repeated=_repeated(every),
        ambiguous=[name for name, entry in every if _gives_a_key_twice(entry)],
    )


def _decode_usual(header: bytes, quotes: int) -> dict[str, Tensor] | None:
    """Return all tensors of a usual header, which begins with its metadata if it has any.

    Of most there is nothing to say, and at once they are decoded faster than one by one. ``None``
    is for any header that needs a closer look.
    """
    entries = header
    try:
        if header.startswith(_METADATA_FIRST):
            # Metadata in which a text has a brace is cut too early, and is no JSON.
            end = header.find(b"}") + 1
            _METADATA_MAP.decode(header[len(_METADATA_FIRST) : end])
            if header[end : end + 1] != b",":
                return None
            quotes -= header.count(b'"', 0, end)
            entries = b"{" + header[end + 1 :]
        tensors = _TENSORS.decode(entries)
    except _NOT_JSON:
        return None
    # Without entries, a comma after the metadata has not been held to be wrong.
    return tensors if tensors and quotes == _QUOTES_OF_ENTRY * len(tensors) else None


class _Slot:
    """Stands for a key of an object; each equals itself only, so that none replaces another."""

    __slots__ = ()


def _all_members(document: bytes | Raw) -> list[tuple[str, Raw]]:
    """Return the members of a JSON object, those of equal names as well."""
    names: list[str] = []

    def keep(_: type, name: str) -> _Slot:
        if len(names) == MOST_TENSORS:
            raise ValueError(f"more than {MOST_TENSORS} names")
        names.append(name)
        return _Slot()

    members = msgspec.json.decode(document, type=dict[_Slot, Raw], dec_hook=keep)
    return list(zip(names, members.values(), strict=True))


def _repeated(members: Iterable[tuple[str, Raw]]) -> dict[str, int]:
    counts = Counter(name for name, _ in members)
    return {name: times for name, times in counts.items() if times > 1}


def _gives_a_key_twice(entry: Raw) -> bool:
    try:
        return bool(_repeated(_all_members(entry)))
    except _NOT_JSON:
        return False


def _why_unusable(entry: Raw) -> str:
    """Say why an entry of a header describes no tensor."""
    try:
        return _misfit(_STATED.decode(entry))
    except _NOT_JSON as error:
        return _reason(error)


def _fit_together(tensors: Iterable[Tensor], data_bytes: int) -> bool:
    """Tell whether each has its bytes and begins where the one before it ends, to the very end."""
    bits_of, prod = DTYPE_BITS, math.prod
    position = 0
    for tensor in tensors:
        begin, end = tensor.offsets
        if begin != position or (end - begin) * 8 != bits_of[tensor.dtype] * prod(tensor.shape):
            return False
        position = end
    return position == data_bytes


def _misfit(tensor: Tensor) -> str:
    begin, end = tensor.offsets
    known = "" if tensor.dtype in DTYPE_BITS else ", a type that is not known"
    return (
        f"{_shown(tensor.dtype)} {_shown(str(list(tensor.shape)))} in bytes {begin} to {end}{known}"
    )


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else _shown(str(error))


def _shown(name: str) -> str:
    """Shorten what nobody would read to the end."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _series(file: str) -> tuple[str, int, str] | None:
    """Return what comes before the number in "model-00002-of-00003", the number, and the total."""
    match = _SERIES.fullmatch(file)
    return (match[1], int(match[2]), match[3]) if match else None


def _left_out_of_series(present: Iterable[str], named: Collection[str]) -> list[str]:
    """Return files whose names say that they are shards of the checkpoint, and no index does."""
    known = {(found[0], found[2]) for found in map(_series, named) if found}
    return [
        file
        for file in present
        if file not in named and (found := _series(file)) and (found[0], found[2]) in known
    ]


def _absent_of_series(files: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the first file absent from each numbered series, and how many are."""
    series: dict[tuple[str, str], set[int]] = {}
    for found in map(_series, files):
        if found:
            series.setdefault((found[0], found[2]), set()).add(found[1])
    for (stem, total), numbers in series.items():
        first = 0 if 0 in numbers else 1
        expected = range(first, first + int(total))
        absent = len(expected) - len(numbers.intersection(expected))
        if absent:
            number = next(number for number in expected if number not in numbers)
            yield _shown(f"{stem}-{number:0{len(total)}d}-of-{total}{_SUFFIX}"), absent


def _no_weights(directory: Path) -> ProbeError:
    pickled = pickled_files(directory)
    if pickled:
        return ProbeError(
            directory,
            f"holds pickled weights only ({pickled[0]}), which can run code when loaded",
            "convert them to safetensors on a machine you can afford to lose",
        )
    return ProbeError(directory, "holds no safetensors weights", "check the path, or export again")


_TENSOR = msgspec.json.Decoder(Tensor)
_TENSORS = msgspec.json.Decoder(dict[str, Tensor])
_STATED = msgspec.json.Decoder(_Stated)
_MEMBERS = msgspec.json.Decoder(dict[str, Raw])
_INDEX = msgspec.json.Decoder(_Index[dict[str, str]])
_METADATA_MAP = msgspec.json.Decoder(dict[str, str] | None)
_RAW_INDEX = msgspec.json.Decoder(_Index[Raw])
_INDEX_METADATA = msgspec.json.Decoder(_IndexMetadata | None)
