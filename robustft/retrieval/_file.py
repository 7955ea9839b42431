"""The file a `CosineKNN` is saved in.

Layout, all little-endian:

    8 bytes   magic "RFTCOSNN"
    4 bytes   version (1)
    4 bytes   length of the header in bytes
    4 bytes   CRC-32 of the header
    header    JSON: dim, dtype, count, and for each section its offset, bytes and CRC-32
    sections  each at a multiple of 4096 bytes:
              rows    [count, dim] in the named dtype (bfloat16 as its 16 bits)
              blocks  [ceil(count / 64), 1024 + 256 * ceil(dim / 4)] bytes: the rows quantised, as
                      csrc/cosine_knn_codes.hpp describes
              ids     [count] int64, absent when a row's id is its position
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from robustft.errors import UserError

_MAGIC = b"RFTCOSNN"
_VERSION = 1
_PREFIX = struct.Struct("<8sIII")
_LARGEST_HEADER = 1 << 16
_PAGE = 4096
_MOST_ROWS = 0xFFFF_FF00  # the core numbers them in 32 bits
_SLAB = 1 << 24  # bytes checksummed at a time
_STORAGE = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds; `rows` [count, dim] and `blocks` are mapped, not read."""

    dim: int
    dtype: str
    rows: NDArray[Any]
    blocks: NDArray[np.uint8]
    ids: NDArray[np.int64] | None


def write(
    path: Path,
    *,
    dim: int,
    dtype: str,
    rows: list[NDArray[Any]],
    blocks: list[NDArray[np.uint8]],
    ids: NDArray[np.int64] | None,
) -> None:
    """Write all sections to a temporary file beside `path`, then give it its name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.seek(_PAGE * 2)  # room for the header, which needs the checksums
            sections = {
                "rows": _write_section(file, rows, _STORAGE[dtype]),
                "blocks": _write_section(file, blocks, "|u1"),
            }
            if ids is not None:
                sections["ids"] = _write_section(file, [ids], "<i8")
            header = json.dumps(
                {"dim": dim, "dtype": dtype, "count": sum(map(len, rows)), "sections": sections}
            ).encode()
            file.truncate(file.tell())  # an empty last section writes nothing
            file.seek(0)
            file.write(_PREFIX.pack(_MAGIC, _VERSION, len(header), zlib.crc32(header)))
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_section(file: BinaryIO, parts: list[NDArray[Any]], storage: str) -> dict[str, int]:
    offset = -(-file.tell() // _PAGE) * _PAGE
    file.seek(offset)
    checksum = 0
    for part in parts:
        step = max(1, _SLAB // max(1, part[:1].nbytes))
        for start in range(0, len(part), step):
            data = np.ascontiguousarray(part[start : start + step], storage).tobytes()
            checksum = zlib.crc32(data, checksum)
            file.write(data)
    return {"offset": offset, "bytes": file.tell() - offset, "crc32": checksum}


def read(path: Path, *, verify: bool) -> Content:
    """Map a file; every number in it is checked before it is used."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or prefix[:8] != _MAGIC:
            raise UserError(f"{path}: expected a saved CosineKNN index, found another kind of file")
        _, version, length, checksum = _PREFIX.unpack(prefix)
        if version != _VERSION:
            raise UserError(f"{path}: expected format version {_VERSION}, found {version}")
        raw = file.read(length) if length <= _LARGEST_HEADER else b""
    if len(raw) != length or zlib.crc32(raw) != checksum:
        raise UserError(f"{path}: expected a header with its checksum, found a damaged one")
    try:
        header = json.loads(raw)
        dim, count = _whole(header["dim"], 1 << 20), _whole(header["count"], _MOST_ROWS)
        dtype = header["dtype"]
        storage = np.dtype(_STORAGE[dtype])
        shapes = {
            "rows": (storage, (count, dim)),
            "blocks": (np.dtype("u1"), (-(-count // 64), 1024 + 256 * -(-dim // 4))),
            "ids": (np.dtype("<i8"), (count,)),
        }
        sections = {
            name: (
                _whole(place["offset"], 1 << 60),
                _whole(place["bytes"], 1 << 60),
                _whole(place["crc32"], (1 << 32) - 1),
            )
            for name, place in header["sections"].items()
        }
        if dim < 1 or not {"rows", "blocks"} <= set(sections) <= set(shapes):
            raise ValueError("impossible header")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: expected a valid header, found {error}") from None
    free = _PREFIX.size + len(raw)  # where the next section may begin
    arrays: dict[str, NDArray[Any]] = {}
    for name, (offset, length, checksum) in sorted(sections.items(), key=lambda one: one[1]):
        if offset < free:
            raise UserError(f"{path}: section '{name}' lies on what stands before it")
        free = offset + length
        dtype_, shape = shapes[name]
        if offset % _PAGE or length != dtype_.itemsize * int(np.prod(shape, dtype=object)):
            raise UserError(f"{path}: section '{name}' does not have the size its header implies")
        if offset + length > size:
            raise UserError(
                f"{path}: expected {offset + length} bytes, found {size}: the file is cut short"
            )
        if verify and _checksum(path, offset, length) != checksum:
            raise UserError(f"{path}: section '{name}' fails its checksum: the file is damaged")
        arrays[name] = (
            np.memmap(path, dtype_, "r", offset, shape) if length else np.empty(shape, dtype_)
        )
    ids = arrays.get("ids")
    names = None if ids is None else np.array(ids, np.int64)
    return Content(dim, dtype, arrays["rows"], arrays["blocks"], names)


def _whole(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"expected a whole number up to {most}, got {value!r:.40}")
    return value


def _checksum(path: Path, offset: int, length: int) -> int:
    checksum = 0
    with path.open("rb") as file:
        file.seek(offset)
        while length:
            data = file.read(min(length, _SLAB))
            if not data:
                break
            checksum = zlib.crc32(data, checksum)
            length -= len(data)
    return checksum
