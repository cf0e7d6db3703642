"""GGUF files: a path in, metadata and bounded views of the tensors out.

The file is memory-mapped and never trusted: every count and length is held against the bytes that are left before
anything is allocated or looped over, so a lying file costs no more time and memory than its own header. Layout
(GGUF specification, versions 2 and 3, little endian):

    magic u32 | version u32 | tensors u64 | keys u64 | keys x (key, type, value) | tensors x info | padding | data

Strings are u64 length + UTF-8. Tensor offsets count from the aligned start of the data.
"""

import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike

from jaxserve.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError
from jaxserve.loading.gguf_quant import GGML_TYPES, TYPE_BY_NAME, UNSUPPORTED_TYPES, GGMLType, dequantize

MAX_HEADER_BYTES = 128 << 20  # metadata and tensor infos; the largest vocabularies in use need about 20 MiB
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_MIN_KEY_BYTES = 8 + 4 + 1  # empty key, type, one-byte value
_MIN_INFO_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, number of dims, one dim, type, offset

_SCALARS: dict[int, np.dtype] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in NumPy order (rows first), `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str  # name in gguf_quant.TYPE_BY_NAME
    offset: int
    nbytes: int


class GGUFFile:
    """A GGUF file, opened and checked.

    metadata  key -> int, float, bool or str; arrays are list[str], or np.ndarray of the stored dtype
    tensors   name -> TensorInfo, in file order

    Raises `ModelNotFoundError` (no such path), `UnsupportedModelError` (big endian, or a tensor type that jaxserve
    does not read) and `CorruptFileError` (anything else that is wrong), each with one line naming the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._map = _map_file(self.path)
        reader = _Reader(self.path, self._map)
        num_tensors, num_keys = reader.header()
        self.version: int = reader.version
        self.metadata: dict[str, Any] = reader.metadata(num_keys)
        self.tensors: dict[str, TensorInfo] = reader.tensors(num_tensors, self.metadata)

    def raw(self, name: str) -> np.ndarray:
        """u8[nbytes]: a read-only view of the stored bytes of tensor `name`. Raises KeyError if there is none."""
        info = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)

    def read(self, name: str, dtype: DTypeLike | None = np.float32) -> np.ndarray:
        """dtype[shape]: tensor `name`, dequantised into a new array. Raises KeyError if there is none.

        dtype None keeps what is stored: float32, float16 or bfloat16 as they are, quantised types as float32.
        """
        info = self.tensors[name]
        return to_array(self.raw(name), TYPE_BY_NAME[info.type], dtype).reshape(info.shape)


def to_array(raw: np.ndarray, ggml_type: GGMLType, dtype: DTypeLike | None = np.float32) -> np.ndarray:
    """u8[bytes] whole blocks -> dtype[values], a new array; dtype None = as stored (see `GGUFFile.read`)."""
    if dtype is None and ggml_type.native is not None:
        return raw.view(ggml_type.native).copy()
    return dequantize(raw, ggml_type).astype(np.float32 if dtype is None else dtype, copy=False)


def shown(text: str) -> str:
    """`text` quoted, on one line and cut to a readable length, for messages about names a file chose."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _map_file(path: Path) -> mmap.mmap:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer; what was opened is checked, not what was named
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptFileError(f"{path}: not a regular file")
        if status.st_size < 24:
            raise CorruptFileError(f"{path}: {status.st_size} bytes are too few for a GGUF header of 24")
        try:
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CorruptFileError(f"{path}: cannot be mapped: {error.strerror or error}") from None
    finally:
        os.close(descriptor)


class _Reader:
    """A cursor over the header. Nothing is taken before the bytes for it are known to be there."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.pos = 0
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.version = 0

    def header(self) -> tuple[int, int]:
        """Number of tensors and of metadata keys."""
        magic = self.data[:4]
        if magic != b"GGUF":
            self.fail(f"magic is {magic!r}, not b'GGUF'")
        self.pos = 4
        self.version = self.unsigned("<I", "version")
        swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big")
        if self.version not in (2, 3) and swapped in (2, 3):
            raise UnsupportedModelError(f"{self.path}: big-endian GGUF version {swapped} is not supported")
        if self.version not in (2, 3):
            self.fail(f"GGUF version {self.version} is not 2 or 3")
        num_tensors = self.unsigned("<Q", "number of tensors")
        num_keys = self.unsigned("<Q", "number of metadata keys")
        self.need(num_keys, _MIN_KEY_BYTES, "metadata keys")
        self.need(num_tensors, _MIN_INFO_BYTES, "tensors")
        return num_tensors, num_keys

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for number in range(count):
            key = self.string(f"metadata key {number}")
            if key in values:
                self.fail(f"duplicate metadata key {shown(key)}")
            kind = self.unsigned("<I", f"type of {shown(key)}")
            values[key] = self.array(key) if kind == _ARRAY else self.value(key, kind)
        return values

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.string(f"value of {shown(key)}")
        return self.numbers(key, kind, 1)[0].item()

    def array(self, key: str) -> list[str] | np.ndarray:
        kind = self.unsigned("<I", f"element type of {shown(key)}")
        count = self.unsigned("<Q", f"length of {shown(key)}")
        if kind == _ARRAY:
            self.fail(f"metadata {shown(key)} is an array of arrays")
        if kind == _STRING:
            return self.strings(key, count)
        return self.numbers(key, kind, count)

    def numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            self.fail(f"metadata {shown(key)} has unknown value type {kind}")
        self.need(count, dtype.itemsize, f"values of {shown(key)}")
        if kind == _BOOL:  # checked before the bytes become bools, which would hide any other value
            stored = np.frombuffer(self.data, np.uint8, count, self.pos)
            if count and stored.max() > 1:
                self.fail(f"metadata {shown(key)} holds {stored.max()} where a bool must be 0 or 1")
        values = np.frombuffer(self.data, dtype, count, self.pos).copy()
        self.pos += values.nbytes
        return values

    def strings(self, key: str, count: int) -> list[str]:
        self.need(count, 8, f"strings of {shown(key)}")
        # a vocabulary holds 10^5 strings: the loop works on locals, `string` would cost three times as much
        data, pos, end = self.data, self.pos, self.end
        length_at = struct.Struct("<Q").unpack_from
        texts: list[str] = []
        for number in range(count):
            if end - pos < 8:
                self.pos = pos
                self.need(1, 8, f"length of string {number} of {shown(key)}")
            (length,) = length_at(data, pos)
            pos += 8
            if length > end - pos:
                self.pos = pos
                self.need(length, 1, f"bytes of string {number} of {shown(key)}")
            try:
                texts.append(str(data[pos : pos + length], "utf-8"))
            except UnicodeDecodeError as error:
                self.fail(f"string {number} of {shown(key)} is not UTF-8 at byte {error.start} ({error.reason})")
            pos += length
        self.pos = pos
        return texts

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"general.alignment={alignment!r} is not a power of two in 8..{MAX_ALIGNMENT}")
        relative: dict[str, TensorInfo] = {}
        for number in range(count):
            info = self.tensor_info(number)
            if info.name in relative:
                self.fail(f"duplicate tensor {shown(info.name)}")
            relative[info.name] = info
        start = -(-self.pos // alignment) * alignment
        size = max(0, len(self.data) - start)
        used_until, previous = 0, ""
        for info in sorted(relative.values(), key=lambda info: info.offset):
            name = shown(info.name)
            if info.offset % alignment:
                self.fail(f"offset {info.offset} of tensor {name} is not a multiple of the alignment {alignment}")
            if info.offset + info.nbytes > size:
                self.fail(f"tensor {name} needs bytes {info.offset}..{info.offset + info.nbytes} of {size} tensor data")
            if info.offset < used_until:
                self.fail(f"tensor {name} at offset {info.offset} overlaps {previous}, which ends at {used_until}")
            used_until, previous = info.offset + info.nbytes, name
        return {
            info.name: TensorInfo(
                name=info.name, shape=info.shape, type=info.type, offset=start + info.offset, nbytes=info.nbytes
            )
            for info in relative.values()
        }

    def tensor_info(self, number: int) -> TensorInfo:
        name = self.string(f"name of tensor {number}")
        num_dims = self.unsigned("<I", f"number of dims of {shown(name)}")
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(f"tensor {shown(name)} has {num_dims} dims, not 1..{MAX_DIMS}")
        dims = [self.unsigned("<Q", f"dim {dim} of {shown(name)}") for dim in range(num_dims)]
        kind = self.unsigned("<I", f"type of tensor {shown(name)}")
        offset = self.unsigned("<Q", f"offset of tensor {shown(name)}")
        if 0 in dims:
            self.fail(f"tensor {shown(name)} has a zero dim in {dims}")
        ggml_type = GGML_TYPES.get(kind)
        if ggml_type is None:
            if kind in UNSUPPORTED_TYPES:
                raise UnsupportedModelError(
                    f"{self.path}: tensor {shown(name)} has type {UNSUPPORTED_TYPES[kind]}, which is not supported"
                    f" (supported: {', '.join(TYPE_BY_NAME)})"
                )
            self.fail(f"tensor {shown(name)} has unknown type {kind}")
        if dims[0] % ggml_type.block_values:
            self.fail(
                f"rows of tensor {shown(name)} have {dims[0]} values, not a multiple of"
                f" {ggml_type.name}'s {ggml_type.block_values}"
            )
        num_values = 1
        for dim in dims:  # Python integers: nothing overflows, and the product is held against the file's size
            num_values *= dim
        nbytes = num_values // ggml_type.block_values * ggml_type.block_bytes
        if nbytes > len(self.data):
            self.fail(f"tensor {shown(name)} of dims {dims} needs {nbytes} bytes, the file has {len(self.data)}")
        return TensorInfo(name=name, shape=tuple(reversed(dims)), type=ggml_type.name, offset=offset, nbytes=nbytes)

    def string(self, what: str) -> str:
        length = self.unsigned("<Q", f"length of {what}")
        self.need(length, 1, f"bytes of {what}")
        start, self.pos = self.pos, self.pos + length
        try:
            return str(self.data[start : self.pos], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 at byte {error.start} ({error.reason})")

    def unsigned(self, layout: str, what: str) -> int:
        width = struct.calcsize(layout)
        self.need(width, 1, f"bytes of {what}")
        (value,) = struct.unpack_from(layout, self.data, self.pos)
        self.pos += width
        return value

    def need(self, count: int, item_bytes: int, what: str) -> None:
        left = self.end - self.pos
        if count * item_bytes > left:
            limit = "the file" if self.end == len(self.data) else f"the {MAX_HEADER_BYTES} header bytes allowed"
            self.fail(f"{count} {what} need {count * item_bytes} bytes, {limit} has {left} left at byte {self.pos}")

    def fail(self, what: str) -> NoReturn:
        raise CorruptFileError(f"{self.path}: {what}")
