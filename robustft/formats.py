"""The text formats of input and output files: JSONL, JSON array and CSV, plain, .gz or .zst.

Readers stream bytes and yield rows or rejects; the largest thing ever held is one line of at most
`MAX_LINE_BYTES`, whatever the file or the compression ratio. Rows remember the bytes they came
from, so that a row whose answer stays is written back byte for byte.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import orjson

from robustft.errors import UserError

MAX_LINE_BYTES = 8 << 20
REJECT_BYTES = 64 << 10
CHUNK_BYTES = 128 << 10
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Reject:
    """An input record that could not be read: where, why, and its first 64 KiB as they stood.

    `line` counts from 1 (lines for JSONL and CSV, records otherwise); `size` is the length of the
    whole record in bytes (what of it was read, where a compressed file breaks off).
    """

    line: int
    reason: str
    data: bytes
    size: int


class TextRow(dict[str, Any]):
    """A row of a text file, and `raw`, the bytes it was read from (no line end)."""

    __slots__ = ("raw",)

    def __init__(self, values: Mapping[str, Any], raw: bytes) -> None:
        super().__init__(values)
        self.raw = raw


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

    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]] | Reject]:
        """Yield (line, row) or a reject, in input order; every call starts afresh."""

    def writer(self, file: IO[bytes]) -> RowWriter:
        """Return a writer of this format, columns and compression on an open binary file."""

    def content_hash(self) -> str:
        """Return a hexadecimal fingerprint of the content, whatever the name and the times."""


class DamagedError(Exception):
    """A compressed stream that breaks off or cannot be decoded any further."""


def reject(line: int, reason: str, data: bytes | bytearray, size: int | None = None) -> Reject:
    """Build a reject, cutting `data` to `REJECT_BYTES`."""
    return Reject(line, reason, bytes(data[:REJECT_BYTES]), len(data) if size is None else size)


def system_error(path: Path, error: OSError) -> UserError:
    """Turn an operating-system error into one line that names the file."""
    return UserError(f"{path}: {error.strerror or error}")


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


def read_chunks(path: Path, compression: str | None) -> Iterator[bytes]:
    """Yield the (decompressed) bytes of a file in pieces of at most `CHUNK_BYTES`.

    Raises `DamagedError` where a compressed stream breaks, after everything that precedes it.
    """
    try:
        with path.open("rb") as file:
            if compression is None:
                while block := file.read(CHUNK_BYTES):
                    yield block
            else:
                yield from _decompressed(file, compression)
    except OSError as error:
        raise system_error(path, error) from None


def _decompressed(file: IO[bytes], compression: str) -> Iterator[bytes]:
    import pyarrow as pa

    def stream() -> Any:
        file.seek(0)
        return pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)

    source, done = stream(), 0
    try:
        while block := source.read(CHUNK_BYTES):
            done += len(block)
            yield block
        return
    except OSError as error:
        reason = str(error)
    # The failing read swallowed up to a chunk of good bytes: come back for them one at a time.
    rescued = bytearray()
    with contextlib.suppress(OSError):
        source = stream()
        while done > 0:
            done -= len(source.read(min(done, CHUNK_BYTES)))
        while byte := source.read(1):
            rescued += byte
    if rescued:
        yield bytes(rescued)
    raise DamagedError(reason)


def split_lines(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[int, bytes] | Reject]:
    r"""Yield (number, line) for bytes split on \n only; a longer line than `limit` is a reject."""
    number, tail, size = 1, bytearray(), 0  # size also counts bytes no longer held in tail
    damage = ""
    try:
        for chunk in chunks:
            *complete, rest = chunk.split(b"\n")
            for piece in complete:
                size += len(piece)
                if size > limit:
                    tail += piece[:REJECT_BYTES]
                    yield reject(number, f"longer than {limit} bytes", tail, size)
                else:
                    yield number, bytes(tail + piece) if tail else piece
                number, size = number + 1, 0
                tail.clear()
            size += len(rest)
            tail += rest
            if size > limit:
                del tail[REJECT_BYTES:]
    except DamagedError as error:
        damage = f"the compressed file is truncated or damaged from here on ({error})"
    if damage:
        yield reject(number, damage, tail, size)
    elif size > limit:
        yield reject(number, f"longer than {limit} bytes", tail, size)
    elif size:
        yield number, bytes(tail)


_AT_ELEMENT = re.compile(rb'["\[\]{},]')
_INSIDE_ELEMENT = re.compile(rb'["\[\]{}]')
_IN_STRING = re.compile(rb'["\\]')


def split_array(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[int, bytes] | Reject]:
    """Yield (number, bytes) for each element of a JSON array, counted from 1, unparsed.

    Only brackets, commas and strings are looked at, without recursion, so neither the length of
    the array nor the depth of an element matters; an element longer than `limit` is a reject.
    """
    number, depth, in_string = 1, 0, False
    buffer, pos, dropped = bytearray(), 0, 0  # dropped: bytes of this element no longer held

    def element(end: int) -> tuple[int, bytes] | Reject:
        if dropped + end > limit:
            return reject(number, f"longer than {limit} bytes", buffer[:end], dropped + end)
        return number, bytes(buffer[:end].strip())

    damage = ""
    stream = iter(chunks)
    while True:
        try:
            chunk = next(stream, b"")
        except DamagedError as error:
            damage = f"the compressed file is truncated or damaged from here on ({error})"
            break
        if not chunk:
            break
        buffer += chunk
        while depth >= 0:
            pattern = _IN_STRING if in_string else _AT_ELEMENT if depth < 2 else _INSIDE_ELEMENT
            found = pattern.search(buffer, pos)
            if found is None:
                pos = len(buffer)
                break
            token, pos = found.group(), found.end()
            if token == b"\\":
                if pos == len(buffer):
                    pos -= 1
                    break
                pos += 1
            elif token == b'"':
                in_string = not in_string
            elif depth == 0:  # the caller has seen that the first byte is "["
                depth = 1
                del buffer[:pos]
                pos = 0
            elif token in b"[{":
                depth += 1
            elif token == b"," or depth == 1:
                if token == b"," or number > 1 or dropped or buffer[: pos - 1].strip():
                    yield element(pos - 1)
                    number += 1
                del buffer[:pos]
                pos = dropped = 0
                depth = 1 if token == b"," else -1
            else:
                depth -= 1
        if depth < 0:
            if buffer.strip():
                yield reject(number, "text after the end of the array", buffer)
                return
            buffer.clear()
        elif pos > limit:
            keep = min(REJECT_BYTES, pos)
            dropped += pos - keep
            del buffer[keep:pos]
            pos = keep
    if damage or depth >= 0:
        reason = damage or "the array is not closed: a bracket or quote is missing"
        yield reject(number, reason, buffer, dropped + len(buffer))


_LONG_NUMBER = re.compile(rb"[0-9]{19}")


def parse_json(number: int, data: bytes) -> tuple[int, TextRow] | Reject:
    """Parse one JSON object strictly; anything else is a reject that says what is wrong."""
    try:
        value = orjson.loads(data)
        if _LONG_NUMBER.search(data):
            value = json.loads(data)  # orjson turns integers beyond 64 bits into floats
    except (ValueError, RecursionError) as error:
        return reject(number, _json_reason(data, str(error)), data)
    if not isinstance(value, dict):
        return reject(number, f"expected a JSON object, found {type_name(value)}", data)
    return number, TextRow(value, data)


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


def _text_reason(data: bytes) -> str | None:
    if b"\0" in data:
        return f"NUL byte at offset {data.index(0)}"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
    return None


def has_nan(data: bytes) -> bool:
    """Tell whether text that is no JSON uses NaN or Infinity as numbers."""
    return re.search(rb"[:\[,]\s*-?(NaN|Infinity)\b", data) is not None


def _json_reason(data: bytes, error: str) -> str:
    if reason := _text_reason(data):
        return reason
    if has_nan(data):
        return "not valid JSON: NaN and Infinity are no JSON numbers"
    if "depth" in error.lower() or "recursion" in error.lower():
        return "nested too deeply: at most 1024 levels are read"
    return f"not valid JSON: {error}"


class _CsvFeed:
    """Hands lines to `csv.reader`, remembers what it took, and takes back what was not used."""

    def __init__(self, lines: Iterator[tuple[int, bytes] | Reject], limit: int) -> None:
        self.waiting: deque[tuple[int, bytes] | Reject] = deque()
        self.lines, self.limit = lines, limit
        self.taken: list[tuple[int, bytes]] = []
        self.size = 0

    def peek(self) -> tuple[int, bytes] | Reject | None:
        if not self.waiting:
            item = next(self.lines, None)
            if item is None:
                return None
            self.waiting.append(item)
        return self.waiting[0]

    def begin(self) -> None:
        self.taken.clear()
        self.size = 0

    def give_back(self) -> tuple[int, bytes]:
        """Return the first line of a broken record; the others are read again as records."""
        first, *others = self.taken
        self.waiting.extendleft(reversed(others))
        return first

    def raw(self) -> bytes:
        return b"\n".join(data for _, data in self.taken)

    def __iter__(self) -> _CsvFeed:
        return self

    def __next__(self) -> str:
        item = self.peek()
        if item is None or isinstance(item, Reject):
            raise StopIteration
        self.size += len(item[1]) + 1
        if self.taken and self.size > self.limit:
            raise csv.Error(f"a quoted field makes the record longer than {self.limit} bytes")
        self.waiting.popleft()
        self.taken.append(item)
        return item[1].decode(errors="surrogateescape") + "\n"


def split_csv(
    lines: Iterator[tuple[int, bytes] | Reject], limit: int
) -> Iterator[tuple[int, bytes, list[str]] | Reject]:
    """Yield (line, raw bytes, fields) per record of RFC 4180, quoted line breaks included.

    After a broken quote only the line where the record began is rejected, and reading starts again
    on the next, so that one stray quote cannot take the rest of the file with it.
    """
    csv.field_size_limit(max(csv.field_size_limit(), limit + 1))  # the module's default is 128 KiB
    feed = _CsvFeed(lines, limit)
    reader = csv.reader(feed, strict=True)
    while (item := feed.peek()) is not None:
        if isinstance(item, Reject):
            feed.waiting.popleft()
            yield item
            continue
        feed.begin()
        try:
            fields = next(reader)
        except (csv.Error, StopIteration) as error:
            reader = csv.reader(feed, strict=True)
            number, data = feed.give_back()
            yield reject(number, f"broken CSV: {_csv_reason(str(error))}", data)
            continue
        number, raw = feed.taken[0][0], feed.raw()
        if reason := _text_reason(raw):
            yield reject(number, reason, raw)
        elif fields:
            yield number, raw, fields


def _csv_reason(error: str) -> str:
    if error in ("", "unexpected end of data"):
        return "a quoted field is never closed"
    return "text after a closing quote" if error.startswith("',' expected") else error


@dataclass(frozen=True, slots=True)
class TextReader:
    """JSONL, JSON-array or CSV files of one kind, read one after the other as one input."""

    files: tuple[Path, ...]
    format: str  # "jsonl", "json" or "csv"
    compression: str | None  # None, "gzip" or "zstd"
    suffix: str  # of the output's name: ".jsonl.gz"
    limit: int = MAX_LINE_BYTES
    fields: tuple[str, ...] = ()
    header: bytes = b""

    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]] | Reject]:
        """Yield (line, row) or a reject, in input order."""
        for path in self.files:
            for item in self._file_rows(path):
                if isinstance(item, Reject) and len(self.files) > 1:
                    item = Reject(item.line, f"{path.name}: {item.reason}", item.data, item.size)
                yield item

    def _file_rows(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any]] | Reject]:
        chunks = without_bom(read_chunks(path, self.compression))
        if self.format == "csv":
            yield from self._csv_rows(path, chunks)
            return
        split = split_array if self.format == "json" else split_lines
        for item in split(chunks, self.limit):
            if isinstance(item, Reject):
                yield item
            elif self.format == "json" or item[1].strip():
                yield parse_json(item[0], item[1].strip())

    def _csv_rows(
        self, path: Path, chunks: Iterator[bytes]
    ) -> Iterator[tuple[int, Mapping[str, Any]] | Reject]:
        records = split_csv(split_lines(chunks, self.limit), self.limit)
        header = next(records, None)
        names = csv_header(path, header)[0]
        if names != self.fields:
            raise UserError(
                f"{path}: expected the columns {', '.join(self.fields)}, found {', '.join(names)}"
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
        if self.compression is not None:
            import pyarrow as pa

            out = pa.CompressedOutputStream(pa.PythonFile(_KeptOpen(file), "w"), self.compression)
        if self.format == "csv":
            return CsvWriter(out, self.fields, self.header, close=out is not file)
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
    names = tuple(item[2])
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}, line {item[0]}: the column {name!r} appears twice")
    return names, item[1]


def without_bom(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks less a byte order mark at the very start."""
    first = next(chunks, b"")
    yield first.removeprefix(BOM)
    yield from chunks


class JsonWriter:
    """Writes JSON objects, one a line or as an array; untouched rows go out byte for byte."""

    def __init__(self, file: Any, *, array: bool, close: bool) -> None:
        self._file, self._array, self._close = file, array, close
        self._count = 0

    def write(self, row: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        """Write one row with the fields of `changes` replaced."""
        raw = row.raw if isinstance(row, TextRow) and not changes else b""
        pretty = isinstance(row, TextRow) and b"\n" in row.raw
        data = raw or dump_json({**row, **changes}, pretty=pretty)
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
    """Writes CSV records under the input's own header line and line ends."""

    def __init__(self, file: Any, fields: tuple[str, ...], header: bytes, *, close: bool) -> None:
        self._file, self._fields, self._close = file, fields, close
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
        csv.writer(text).writerow([values[name] for name in self._fields])
        self._line(text.getvalue().removesuffix("\r\n").encode())

    def close(self) -> None:
        """Close the compressed stream."""
        if self._close:
            self._file.close()
