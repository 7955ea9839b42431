"""Text that is not UTF-8: one line that says so, before its every row becomes a reject.

No encoding is guessed: only a byte order mark and the NULs of the first characters tell one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from robustft.errors import UserError
from robustft.records.formats import TextReader
from robustft.records.framing import CHUNK_BYTES, Place, Reject, split_array, split_csv, split_lines

# How they begin, with a mark or (as in RFC 4627, section 3) with two characters of ASCII.
_UNICODE = {
    "UTF-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    "UTF-16": re.compile(rb"\xff\xfe|\xfe\xff"),
    "UTF-32LE": re.compile(rb"[^\0]\0\0\0"),
    "UTF-32BE": re.compile(rb"\0\0\0[^\0]"),
    "UTF-16LE": re.compile(rb"[^\0]\0[^\0]\0"),
    "UTF-16BE": re.compile(rb"\0[^\0]\0[^\0]"),
}
_FEW = 3  # fewer rows that are not UTF-8 are damaged ones
_SHARE = 20  # so are fewer than one in so many, or than so many for every row that is UTF-8
_UNPACK = {"gzip": ("gzip -dc", "gzip"), "zstd": ("zstd -dc", "zstd")}


def refuse_unicode(path: Path, start: bytes, compression: str | None) -> None:
    """Raise UserError where a file starts as UTF-16 or UTF-32."""
    for encoding, sign in _UNICODE.items():
        if sign.match(start):
            raise UserError(
                f"{path}: expected UTF-8, found {encoding}; convert it: "
                + _command(path, encoding, compression)
            )


def refuse_other(reader: TextReader, start: bytes) -> None:
    """Raise UserError where many rows of a file's `start` are not UTF-8 and hardly any other is.

    Rows in ASCII count for neither.
    """
    path = reader.files[0]
    bad, good, rows, first = 0, 0, 0, ""
    for number, data in _rows(reader, start):
        rows += 1
        if data.isascii():
            continue
        try:
            data.decode()
            good += 1
        except UnicodeDecodeError as error:
            bad += 1
            found = f"found byte 0x{data[error.start]:02x} at offset {error.start}"
            first = first or f"{Place(number).named(reader.format)}: expected UTF-8, {found}"
    if bad >= max(_FEW, rows / _SHARE) and bad > _SHARE * good:
        raise UserError(
            f"{path}, {first} ({bad} of the first {rows} are not UTF-8); save it as UTF-8, or, if "
            f"it is Windows-1252: {_command(path, 'WINDOWS-1252', reader.compression)}"
        )


def _rows(reader: TextReader, start: bytes) -> Iterator[tuple[int, bytes]]:
    if reader.format == "json":
        array = split_array([start], reader.limit)
        return (item for item in array if not isinstance(item, Reject))
    if len(start) >= CHUNK_BYTES:  # the last line may break off
        start = start[: start.rfind(b"\n") + 1] or start
    lines = split_lines([start], reader.limit)
    if reader.format != "csv":
        return (item for item in lines if not isinstance(item, Reject))
    # A record of many lines is one row; one that is not UTF-8 is a reject already.
    records = split_csv(lines, reader.limit, reader.delimiter)
    return ((one.line, one.data) if isinstance(one, Reject) else one[:2] for one in records)


def _command(path: Path, encoding: str, compression: str | None) -> str:
    old, new = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"utf8-{path.name}")))
    if compression is None:
        return f"iconv -f {encoding} -t UTF-8 {old} > {new}"
    unpack, pack = _UNPACK[compression]
    return f"{unpack} {old} | iconv -f {encoding} -t UTF-8 | {pack} > {new}"
