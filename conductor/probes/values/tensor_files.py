"""Read tensors piece by piece from the files of a checkpoint, in bounded memory.

Every read says where it begins and ends; nothing maps or loads a file whole, so that a file that
shrinks meanwhile is an error with a name and not the end of the process. Reads may come from
several threads at once; few files are kept open, the ones read last.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from conductor.probes.reading import ProbeError, open_regular
from conductor.probes.safetensors_header import DTYPE_BITS, Weights

if TYPE_CHECKING:
    from conductor.probes.pairs import Stored

Elements = NDArray[Any]
Bytes = NDArray[np.uint8]

FILES_OPEN = 16
ALL = slice(None)

CHUNK_BYTES = 4 << 20
"""Bytes that a pass over a whole tensor holds at a time. Between two reads a thread waits for its
turn to run Python, so that small ones leave the other processors idle."""

_NARROW_GAP_BYTES = 32 << 10
"""Rows that lie closer together than this are read in one piece, with what is between them: a call
costs as much as copying so many bytes."""

_COPY_AGAIN = "copy the checkpoint again, and leave it alone while it is examined"

_VIEW = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
}
"""How stored elements are seen; types that are not named are seen as bytes."""


class _OpenFile:
    """A file descriptor that is closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        with open_regular(path, _COPY_AGAIN) as stream:
            self.descriptor = os.dup(stream.fileno())

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


class TensorFiles:
    """The tensor bytes of one checkpoint."""

    def __init__(self, weights: Weights) -> None:
        """Open nothing yet."""
        self.weights = weights
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, begin: int, end: int) -> Bytes:
        """Return bytes ``begin`` to ``end`` of a tensor, uint8.

        Raises:
            ProbeError: the file cannot be read, or ends before that.
        """
        buffer = np.empty(end - begin, dtype=np.uint8)
        self._fill(buffer, name, begin)
        return buffer

    def chunks(self, name: str, begin: int = 0, end: int | None = None) -> Iterator[Bytes]:
        """Yield bytes of a tensor in order, ``CHUNK_BYTES`` at a time.

        Each chunk takes the place of the one before it.
        """
        last = self.weights.tensors[name].size_bytes if end is None else end
        buffer = np.empty(min(CHUNK_BYTES, max(0, last - begin)), dtype=np.uint8)
        for place in range(begin, last, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, last - place)]
            self._fill(chunk, name, place)
            yield chunk

    def elements(self, name: str) -> Elements:
        """Return a whole tensor, as ``seen_as`` does."""
        tensor = self.weights.tensors[name]
        return seen_as(tensor.dtype, self.read(name, 0, tensor.size_bytes))

    def _fill(self, buffer: Bytes, name: str, begin: int) -> None:
        shard = self.weights.shard_of[name]
        position = self.weights.data_start[shard] + self.weights.tensors[name].offsets[0] + begin
        view, done = memoryview(buffer.data), 0
        opened = self._file(shard)
        while done < len(view):
            try:
                count = os.preadv(opened.descriptor, [view[done:]], position + done)
            except OSError as error:
                path = self.weights.directory / shard
                raise ProbeError(path, f"cannot be read ({error.strerror})", _COPY_AGAIN) from None
            if count == 0:
                problem = f"ends within tensor {name!r}: it was cut while it was read"
                raise ProbeError(self.weights.directory / shard, problem, _COPY_AGAIN)
            done += count

    def _file(self, shard: str) -> _OpenFile:
        with self._lock:
            opened = self._open.pop(shard, None) or _OpenFile(self.weights.directory / shard)
            self._open[shard] = opened
            while len(self._open) > FILES_OPEN:
                self._open.popitem(last=False)
        return opened


def seen_as(dtype: str, stored: Bytes) -> Elements:
    """Return bytes as elements of a safetensors type; floating-point ones as float32.

    BF16, F16, F32 and F64 become float32; integers wider than a byte and I8 stay what they are;
    everything else stays bytes.
    """
    elements = stored.view(_VIEW.get(dtype, "u1"))
    if dtype == "BF16":
        widened: Elements = np.left_shift(elements, 16, dtype=np.uint32)
        return widened.view(np.float32)
    if dtype in ("F16", "F64"):
        return elements.astype(np.float32)
    return elements


class StoredReader:
    """Fetch stored elements of the parts of one matrix, whatever tensor holds them.

    Called with the name of a part and slices of its stored rows and columns, as a ``Layout``
    does. A part says where it lies, also as one expert's share of a tensor; where the file holds
    [columns, rows] it is turned here.
    """

    def __init__(self, files: TensorFiles, stored: Stored) -> None:
        """Read ``stored`` from ``files``."""
        self._files = files
        self._stored = stored

    def __call__(self, part: str, rows: slice = ALL, columns: slice = ALL) -> Elements:
        """Return stored elements: of a 2-D part those asked for, of any other part all."""
        tensor = self._stored.parts[part]
        raw = self.raw(part, rows, columns)
        elements = seen_as(tensor.dtype, raw.reshape(-1))
        if len(tensor.shape) != 2:
            return elements.reshape(tensor.shape)
        matrix = elements.reshape(len(raw), -1 if elements.size else 0)
        return matrix.T if self._stored.turned else matrix

    def raw(self, part: str, rows: slice = ALL, columns: slice = ALL) -> Bytes:
        """Return the bytes of those elements: a row for each row in the file."""
        tensor = self._stored.parts[part]
        if len(tensor.shape) != 2:
            return self._read_flat(part)
        down, across = (
            range(*asked.indices(size))
            for asked, size in zip((rows, columns), tensor.shape, strict=True)
        )
        height = self._height(part)
        first, step = self._place(part, height)
        down = _span(down, first, step)
        if not self._stored.turned:
            return self._matrix(part, tensor.shape[1], down, across)[::step]
        read = self._matrix(part, height, across, down)
        elements = read.reshape(len(across), len(down), -1)[:, ::step]
        return elements.reshape(len(across), -1) if elements.size else read

    def _height(self, part: str) -> int:
        """Return the stored rows of a part, with those of other projections of the expert."""
        own = self._stored.parts[part]
        tensor = self._files.weights.tensors[self._stored.tensors[part]]
        if self._stored.expert is None or len(tensor.shape) < 2:
            return own.shape[0]
        return tensor.shape[-1] if self._stored.turned else tensor.shape[1]

    def _place(self, part: str, height: int) -> tuple[int, int]:
        """Return the stored row at which the projection begins, and the step to its next."""
        own = self._stored.parts[part].shape[0]
        if own == height:
            return 0, 1
        if self._stored.row_step > 1:
            return self._stored.first_row, self._stored.row_step
        return self._stored.first_row * own // self._stored.shape[0], 1

    def _read_flat(self, part: str) -> Bytes:
        tensor = self._stored.parts[part]
        if len(tensor.shape) != 1:
            return self._read(part, 0, tensor.size_bytes).reshape(1, -1)
        first, step = self._place(part, self._height(part))
        rows = _span(range(tensor.shape[0]), first, step)
        return self._matrix(part, 1, rows, range(1))[::step].reshape(1, -1)

    def chunks(self, part: str) -> Iterator[Bytes]:
        """Yield the bytes that this matrix has of a part, in the order of the file.

        Of projections that share a part, each has its own rows where those lie together; where
        they do not, the first gets all and the others nothing.
        """
        stored, tensor = self._stored, self._stored.parts[part]
        first, last = 0, tensor.size_bytes
        height = self._height(part) if tensor.shape else 0
        if tensor.shape and tensor.shape[0] != height:
            if stored.row_step == 1 and not stored.turned:
                row_bytes = tensor.size_bytes // height
                first = self._place(part, height)[0] * row_bytes
                last = first + tensor.shape[0] * row_bytes
            elif stored.first_row:
                return
        start = self._start(part)
        yield from self._files.chunks(stored.tensors[part], start + first, start + last)

    def _start(self, part: str) -> int:
        """Return where in its tensor a part begins."""
        name = self._stored.tensors[part]
        return self._stored.parts[part].offsets[0] - self._files.weights.tensors[name].offsets[0]

    def _read(self, part: str, begin: int, end: int) -> Bytes:
        first = self._start(part)
        return self._files.read(self._stored.tensors[part], first + begin, first + end)

    def _matrix(self, part: str, width: int, rows: range, columns: range) -> Bytes:
        """Return bytes of stored rows of ``width`` elements each."""
        bits = DTYPE_BITS[self._stored.parts[part].dtype]
        stride, length = width * bits // 8, len(columns) * bits // 8
        begin = rows.start * stride + columns.start * bits // 8
        if stride == length:
            together = self._read(part, begin, begin + len(rows) * length)
            return together.reshape(len(rows), length)
        pieces = np.empty((len(rows), length), dtype=np.uint8)
        at_once = max(1, CHUNK_BYTES // stride) if stride - length < _NARROW_GAP_BYTES else 1
        for index in range(0, len(rows), at_once):
            count = min(at_once, len(rows) - index)
            place = begin + index * stride
            read = self._read(part, place, place + (count - 1) * stride + length)
            pieces[index : index + count] = np.lib.stride_tricks.as_strided(
                read, (count, length), (stride, 1), writeable=False
            )
        return pieces


def _span(rows: range, first: int, step: int) -> range:
    """Return the rows of an expert from the first to the last of these rows of a projection."""
    if not rows:
        return rows
    return range(first + rows.start * step, first + (rows.stop - 1) * step + 1)
