"""Arrays in .npy and .npz files, read in ascending row ranges, so that memory does not grow with the number of rows.

Arrays in .npy and uncompressed .npz files are mapped, compressed ones decompressed range by range. The files are untrusted:
nothing is unpickled, and the sizes that they declare are compared with their own before anything is allocated.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from graphq.errors import DataError

MAX_LOAD_BYTES = 1 << 30
"""Limit of one row of a compressed npz member; of all of it in Fortran order, since that has to be loaded whole."""

_BLOCK_BYTES = 1 << 20
_DEFLATE_RATIO = 1032  # no deflate stream expands more
_FILE_ERRORS = (OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)

Bounds = Iterable[tuple[int, int]]


class Column(Protocol):
    """An array `[samples, ...]` that is read in ascending row ranges."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def stream(self, bounds: Bounds) -> Iterator[np.ndarray]: ...


def is_float(dtype: np.dtype) -> bool:
    """Whether it is a floating-point type, those of `ml_dtypes` included."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


@dataclass(frozen=True)
class _Stored:
    """An array in npy format inside a file: mapped for the length of a batch, compressed if `member` is not None."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    offset: int
    member: str | None = None

    def stream(self, bounds: Bounds) -> Iterator[np.ndarray]:
        if 0 in self.shape:
            return (np.zeros((last - first, *self.shape[1:]), self.dtype) for first, last in bounds)
        return self._map(bounds) if self.member is None else self._decompress(self.member, bounds)

    def _map(self, bounds: Bounds) -> Iterator[np.ndarray]:
        for first, last in bounds:
            try:
                whole = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, "F" if self.fortran else "C")
            except (OSError, ValueError) as error:
                raise _broken(self.path, f"it changed while it was read ({error})") from error
            yield whole[first:last]

    def _decompress(self, member: str, bounds: Bounds) -> Iterator[np.ndarray]:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
                _read_exactly(file, self.offset)
                if self.fortran:
                    data = _read_exactly(file, row * self.shape[0])
                    whole = np.ndarray(self.shape, self.dtype, data, order="F")
                    yield from (whole[first:last] for first, last in bounds)
                    return
                position = 0
                for first, last in bounds:
                    for skip in range(position, first * row, _BLOCK_BYTES):
                        _read_exactly(file, min(_BLOCK_BYTES, first * row - skip))
                    position = last * row
                    yield np.ndarray((last - first, *self.shape[1:]), self.dtype, _read_exactly(file, (last - first) * row))
        except _FILE_ERRORS as error:
            raise _broken(self.path, f"array '{member}' cannot be decompressed ({error})") from error


def open_npy(path: Path) -> Column:
    """The array of a .npy file, unread."""
    try:
        with path.open("rb") as file:
            return _parse(file, path, path.name, path.stat().st_size)
    except OSError as error:
        raise _broken(path, f"it cannot be read ({error})") from error


def open_npz(path: Path) -> dict[str, Column]:
    """The arrays of an .npz file by name, unread."""
    try:
        with path.open("rb") as file:
            magic = file.read(6)
            if not magic.startswith(b"PK"):
                kind = "an .npy file" if magic == b"\x93NUMPY" else "a pickle" if magic[:1] == b"\x80" else "something else"
                raise _broken(path, f"it is no npz but {kind}")
            with zipfile.ZipFile(path) as archive:
                members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                return {name: _open_member(path, archive, file, info) for name, info in members.items()}
    except _FILE_ERRORS as error:
        raise _broken(path, f"it is truncated or damaged ({error})") from error


def _open_member(path: Path, archive: zipfile.ZipFile, file: IO[bytes], info: zipfile.ZipInfo) -> _Stored:
    """Header of one member; sizes that it declares are compared with those of the file before anything is allocated."""
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _broken(path, f"member '{info.filename}' is encrypted or compressed by another method than deflate")
    if info.compress_type == zipfile.ZIP_STORED:
        file.seek(info.header_offset)
        local = file.read(30)
        if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
            raise _broken(path, f"member '{info.filename}' is not where the index says")
        name_size, extra_size = struct.unpack("<HH", local[26:30])
        begin = file.seek(name_size + extra_size, 1)
        return _parse(file, path, info.filename, min(begin + info.file_size, path.stat().st_size))
    with archive.open(info) as stream:
        stored = _parse(stream, path, info.filename, min(info.file_size, info.compress_size * _DEFLATE_RATIO))
    size = math.prod(stored.shape if stored.fortran else stored.shape[1:]) * stored.dtype.itemsize
    if size > MAX_LOAD_BYTES:
        what = "in Fortran order" if stored.fortran else "per sample"
        raise _broken(path, f"array '{info.filename}' has {size} bytes {what}, the limit is {MAX_LOAD_BYTES} (np.savez has none)")
    return replace(stored, member=info.filename)


def _parse(file: IO[bytes], path: Path, name: str, end: int) -> _Stored:
    """Header of the npy data at the file's position; `end` is the position where its bytes end."""
    try:
        if np.lib.format.read_magic(file) != (1, 0):  # later versions only serve arrays of records
            raise ValueError("records are not supported")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy evaluates the header as a literal, which fails in many ways
        raise _broken(path, f"'{name}' is not in npy format ({error})") from error
    if dtype.hasobject:
        raise _broken(path, f"array '{name}' holds Python objects (pickle), which are never loaded")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or file.tell() + size > end:
        raise _broken(path, f"array '{name}' declares {dtype} {list(shape)}: {size} bytes; {max(end - file.tell(), 0)} are there")
    return _Stored(path, dtype, shape, fortran, file.tell())


def _read_exactly(file: IO[bytes], count: int) -> bytearray:
    """The next `count` bytes, in small steps, since a zip member needs twice the bytes that it is asked for."""
    data = bytearray(count)
    for begin in range(0, count, _BLOCK_BYTES):
        part = file.read(min(_BLOCK_BYTES, count - begin))
        data[begin : begin + len(part)] = part
        if len(part) < min(_BLOCK_BYTES, count - begin):
            raise EOFError(f"{begin + len(part)} bytes instead of {count}")
    return data


def _broken(path: Path, why: str) -> DataError:
    hint = "write it again with np.savez or np.save, as plain numbers"
    return DataError(f"cannot use {path.name}: {why}", where=str(path), expected="arrays as numpy writes them", hint=hint)
