"""The text formats of files: JSONL, JSON array and CSV (.tsv, too), plain, .gz or .zst.

Rows remember the bytes they came from, so that a row whose answer stays is written back byte for
byte.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import orjson

from robustft.errors import UserError
from robustft.records.framing import (
    MAX_LINE_BYTES,
    Place,
    Reject,
    field_names,
    read_chunks,
    reject,
    short,
    split_array,
    split_csv,
    split_lines,
    system_error,
    text_reason,
    without_bom,
)


class BadRowError(Exception):
    """A row that does not fit its schema; the message names the field and what was found."""


class TextRow(dict[str, Any]):
    """A row of a text file, and `raw`, the bytes it was read from (no line end)."""

    __slots__ = ("raw",)

    def __init__(self, values: Mapping[str, Any], raw: bytes) -> None:
        super().__init__(values)
        self.raw = raw


class RawRow(Mapping[str, Any]):
    """A row of a JSON file as its bytes `raw`, known to be an object, parsed when it is needed."""

    __slots__ = ("_values", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._values: TextRow | None = None

    @property
    def parsed(self) -> TextRow:
        """The row."""
        if self._values is None:
            item = parse_json(0, self.raw)
            if isinstance(item, Reject):
                raise BadRowError(item.reason)
            self._values = item[1]
        return self._values

    def __getitem__(self, name: str) -> Any:
        return self.parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parsed)

    def __len__(self) -> int:
        return len(self.parsed)


class RowWriter(Protocol):
    """Writes rows of one format, in order."""

    def write(self, row: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        """Write `row` with the top-level fields of `changes` replaced; verbatim if empty."""

    def close(self) -> None:
        """Write what the format still needs; the file itself is closed by its owner."""


class Reader(Protocol):
    """One input in one format."""

    @property
    def format(self) -> str:
        """One of "jsonl", "json", "csv", "parquet", "hub"."""

    @property
    def suffix(self) -> str:
        """File name suffix of an output in this format."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns, or () where every row may have its own."""

    @property
    def size(self) -> int | None:
        """About how many records there are to read, where that can be told beforehand."""

    def rows(self, *, parsed: bool = True) -> Iterator[tuple[Place, Mapping[str, Any]] | Reject]:
        """Yield (place, row) or a reject, in input order; every call starts afresh.

        Not `parsed`: for who knows which rows can be read; formats may leave that to first use.
        """

    def writer(self, file: IO[bytes]) -> RowWriter:
        """Return a writer of this format, columns and compression on an open binary file."""

    def content_hash(self) -> str:
        """Return a hexadecimal fingerprint of the content, whatever the name and the times."""


def hash_files(files: Iterable[Path]) -> str:
    """Return the blake2b-128 of the files' bytes, as they lie on disk."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(path.stat().st_size.to_bytes(8, "little"))
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise system_error(path, error) from None
    return digest.hexdigest()


_DIGITS = bytes(ord("0") if chr(byte) in "0123456789" else ord(".") for byte in range(256))
_LONG_NUMBER = b"0" * 19
_LEVELS = 500  # half of Python's stack: what is read must also be written, wherever that is called
_TOO_DEEP = f"nested too deeply: at most {_LEVELS} levels are read"


def load_json(data: bytes) -> Any:
    """Parse JSON strictly; integers keep every digit. Raises ValueError."""
    value = orjson.loads(data)
    if data.count(b"[") + data.count(b"{") > _LEVELS and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    if _LONG_NUMBER in data.translate(_DIGITS):
        value = json.loads(data)  # orjson turns integers beyond 64 bits into floats
    return value


def parse_json(number: int, data: bytes) -> tuple[int, TextRow] | Reject:
    """Parse one JSON object; anything else is a reject that says what is wrong."""
    try:
        value = load_json(data)
    except ValueError as error:
        return reject(number, _json_reason(data, error), data)
    if not isinstance(value, dict):
        return reject(number, f"expected a JSON object, found {type_name(value)}", data)
    return number, TextRow(value, data)


def _is_deep(value: Any) -> bool:
    """Whether a JSON value nests in more than `_LEVELS` levels."""
    level = [value]
    for _ in range(_LEVELS):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
    return bool(level)


def type_name(value: object) -> str:
    """Name a value's type for a reader who does not know Python."""
    for kinds, name in (
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "text"),
        ((list, tuple), "a list"),
        (Mapping, "an object"),
    ):
        if isinstance(value, kinds):
            return name
    return "nothing (null)" if value is None else type(value).__name__


def has_nan(data: bytes) -> bool:
    """Tell whether text that is no JSON uses NaN or Infinity as numbers."""
    return re.search(rb"[:\[,]\s*-?(NaN|Infinity)\b", data) is not None


def _json_reason(data: bytes, error: ValueError) -> str:
    if reason := text_reason(data):
        return reason
    if has_nan(data):
        return "not valid JSON: NaN and Infinity are no JSON numbers"
    if any(word in str(error).lower() for word in ("deep", "depth", "recursion")):
        return _TOO_DEEP
    if isinstance(error, json.JSONDecodeError):  # its own "line 1" would be taken for the file's
        return f"not valid JSON: {error.msg} at character {error.pos + 1}"
    return f"not valid JSON: {error}"


@dataclass(frozen=True, slots=True)
class TextReader:
    """JSONL, JSON-array or CSV files of one kind, read one after the other as one input."""

    files: tuple[Path, ...]
    names: tuple[str, ...]  # of the files in their places: "" where there is but one
    format: str  # "jsonl", "json" or "csv"
    compression: str | None  # None, "gzip" or "zstd"
    suffix: str  # of the output's name: ".jsonl.gz"
    limit: int = MAX_LINE_BYTES
    fields: tuple[str, ...] = ()
    header: bytes = b""  # of CSV, as are the following
    delimiter: str = ","
    sep_line: bytes = b""  # before the header: "sep=;", by which Excel is told the delimiter

    @property
    def size(self) -> int | None:
        """The lines, told from the size of the files and the first 128 KiB."""
        if self.compression is not None or self.format == "json":
            return None
        start = next(read_chunks(self.files[0], None), b"")
        lines = start.count(b"\n") or 1
        return sum(path.stat().st_size for path in self.files) * lines // max(len(start), 1)

    def rows(self, *, parsed: bool = True) -> Iterator[tuple[Place, Mapping[str, Any]] | Reject]:
        """Yield (place, row) or a reject, in input order; JSON not `parsed` if so wished."""
        for path, name in zip(self.files, self.names, strict=True):
            for item in self._file_rows(path, parsed=parsed):
                if isinstance(item, Reject):
                    yield replace(item, file=name)
                else:
                    yield Place(item[0], name), item[1]

    def _file_rows(
        self, path: Path, *, parsed: bool
    ) -> Iterator[tuple[int, Mapping[str, Any]] | Reject]:
        if self.format == "csv":
            yield from self._csv_rows(path)
            return
        chunks = without_bom(read_chunks(path, self.compression))
        split = split_array if self.format == "json" else split_lines
        for item in split(chunks, self.limit):
            if isinstance(item, Reject):
                yield item
            elif (data := item[1].strip()) or self.format == "json":
                yield parse_json(item[0], data) if parsed else (item[0], RawRow(data))

    def csv_records(
        self, delimiter: str, path: Path | None = None
    ) -> Iterator[tuple[int, bytes, list[str]] | Reject]:
        """The records of a CSV file (of the first one), its header among them."""
        chunks = without_bom(read_chunks(path or self.files[0], self.compression))
        lines = split_lines(chunks, self.limit)
        return split_csv(islice(lines, bool(self.sep_line), None), self.limit, delimiter)

    def _csv_rows(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any]] | Reject]:
        records = self.csv_records(self.delimiter, path)
        header = next(records, None)
        names = csv_header(path, header)[0]
        if names != self.fields:
            raise UserError(
                f"{path}: expected the columns {field_names(self.fields)}, "
                f"found {field_names(names)}"
            )
        for item in records:
            if isinstance(item, Reject):
                yield item
                continue
            number, raw, values = item
            if len(values) == len(names):
                yield number, TextRow(dict(zip(names, values, strict=True)), raw)
            else:
                reason = f"expected {len(names)} fields, found {len(values)}"
                yield reject(number, reason, raw)

    def writer(self, file: IO[bytes]) -> RowWriter:
        """Return a writer of the same format, columns and compression."""
        out: Any = file
        if self.compression == "gzip":
            # Level 9, which Arrow would take, is five times as slow for a file 5 % smaller.
            out = gzip.GzipFile("", "wb", 6, file, mtime=0)
        elif self.compression is not None:
            import pyarrow as pa

            out = pa.CompressedOutputStream(pa.PythonFile(_KeptOpen(file), "w"), self.compression)
        if self.format == "csv":
            return CsvWriter(out, self.fields, self.header, self.delimiter, close=out is not file)
        return JsonWriter(out, array=self.format == "json", close=out is not file)

    def content_hash(self) -> str:
        """Return the fingerprint of the files' bytes."""
        return hash_files(self.files)


class _KeptOpen:
    """A file that arrow may write to and flush, and that is still its owner's to close."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.write, self.flush = file.write, file.flush

    def close(self) -> None:
        """Leave the file open."""


def csv_header(
    path: Path, item: tuple[int, bytes, list[str]] | Reject | None
) -> tuple[tuple[str, ...], bytes]:
    """Return the column names and the raw header line, or raise `UserError`."""
    if item is None:
        raise UserError(f"{path}: the file is empty")
    if isinstance(item, Reject):
        raise UserError(f"{path}, line {item.line}: expected a CSV header, found: {item.reason}")
    refuse_twins(f"{path}, line {item[0]}", item[2])
    return tuple(item[2]), item[1]


def refuse_twins(where: Path | str, columns: Iterable[str]) -> None:
    """Raise UserError, which begins with `where`, if two columns share a name."""
    twin = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twin is not None:
        raise UserError(f"{where}: the column {short(twin)!r} appears twice")


class JsonWriter:
    """Writes JSON objects, one a line or as an array; untouched rows go out byte for byte."""

    def __init__(self, file: Any, *, array: bool, close: bool) -> None:
        self._file, self._array, self._close = file, array, close
        self._count = 0

    def write(self, row: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        """Write one row with the fields of `changes` replaced."""
        raw = row.raw if isinstance(row, TextRow | RawRow) else b""
        data = raw if raw and not changes else dump_json({**row, **changes}, pretty=b"\n" in raw)
        if self._array:
            self._file.write((b",\n" if self._count else b"[\n") + data)
        else:
            self._file.write(data + b"\n")
        self._count += 1

    def close(self) -> None:
        """Close the array and the compressed stream."""
        if self._array:
            self._file.write(b"\n]\n" if self._count else b"[]\n")
        if self._close:
            self._file.close()


def dump_json(value: Any, *, pretty: bool = False) -> bytes:
    """Serialise to UTF-8 JSON; integers beyond 64 bits keep every digit."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 if pretty else None)
    except TypeError:
        text = json.dumps(value, ensure_ascii=False, indent=2 if pretty else None, allow_nan=False)
        return text.encode()


class CsvWriter:
    """Writes CSV records under the input's own header line, with its delimiter and line ends."""

    def __init__(
        self, file: Any, fields: tuple[str, ...], header: bytes, delimiter: str, *, close: bool
    ) -> None:
        self._file, self._fields, self._close = file, fields, close
        self._delimiter = delimiter
        self._end = b"\r\n" if header.endswith(b"\r") else b"\n"
        self._line(header.removesuffix(b"\r"))

    def _line(self, data: bytes) -> None:
        self._file.write(data + self._end)

    def write(self, row: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        """Write one row with the fields of `changes` replaced."""
        if isinstance(row, TextRow) and not changes:
            self._line(row.raw.removesuffix(b"\r"))
            return
        text = io.StringIO()
        values = {**row, **changes}
        csv.writer(text, delimiter=self._delimiter).writerow(
            [values[name] for name in self._fields]
        )
        self._line(text.getvalue().removesuffix("\r\n").encode())

    def close(self) -> None:
        """Close the compressed stream."""
        if self._close:
            self._file.close()
