"""From the bytes of a file to the bytes of its records: decompression, lines, arrays, CSV.

Everything streams; the largest thing ever held is one record of at most `MAX_LINE_BYTES`, whatever
the file or the compression ratio.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from robustft.errors import UserError

MAX_LINE_BYTES = 8 << 20
REJECT_BYTES = 64 << 10
REASON_CHARACTERS = 2000
CHUNK_BYTES = 128 << 10
RETRY_LINES = 1000  # a record may have, at first, among lines that a broken record had swallowed
RETRY_LEAST = 8
BOM = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """Where a record stands: `line` counts from 1, lines for JSONL and CSV, else records.

    `file` is its file's name, relative to the input's folder; "" where the input is one file.
    """

    line: int
    file: str = ""

    @property
    def told(self) -> dict[str, Any]:
        """The same as output lines tell it: `file` only where there are several."""
        return {"file": self.file, "line": self.line} if self.file else {"line": self.line}

    def named(self, format: str) -> str:
        """The same for a message: what is counted in an input of this format is a line or not."""
        counted = "line" if format in ("jsonl", "csv") else "record"
        return f"{self.file}, {counted} {self.line}" if self.file else f"{counted} {self.line}"


@dataclass(frozen=True, slots=True)
class Reject:
    """An input record that could not be read: where, why, and its first 64 KiB as they stood.

    `line` and `file` are those of its `Place`; `size` is the length of the whole record in bytes
    (what of it was read, where a compressed file breaks off).
    """

    line: int
    reason: str
    data: bytes
    size: int
    file: str = ""

    @property
    def place(self) -> Place:
        """Where it stands in the input."""
        return Place(self.line, self.file)

    @property
    def told(self) -> dict[str, Any]:
        """The same as a line of rejects.jsonl tells it."""
        text = self.data.decode("utf-8", "backslashreplace")
        return {**self.place.told, "reason": self.reason, "bytes": self.size, "data": text}


class DamagedError(Exception):
    """A compressed stream that breaks off or cannot be decoded any further."""


def reject(line: int, reason: str, data: bytes | bytearray, size: int | None = None) -> Reject:
    """Build a reject, cutting `data` to `REJECT_BYTES`, `reason` to `REASON_CHARACTERS`."""
    size = len(data) if size is None else size
    return Reject(line, short(reason, REASON_CHARACTERS), bytes(data[:REJECT_BYTES]), size)


def short(text: str, most: int = 60) -> str:
    """`text`, its end left out where it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def field_names(names: Iterable[str]) -> str:
    """The first 20 names of an input's fields, each made short, for a message."""
    return ", ".join(map(short, islice(names, 20))) or "none"


def system_error(path: Path, error: OSError) -> UserError:
    """Turn an operating-system error into one line that names the file."""
    return UserError(f"{path}: {error.strerror or error}")


def read_chunks(path: Path, compression: str | None) -> Iterator[bytes]:
    """Yield the (decompressed) bytes of a file in pieces of at most `CHUNK_BYTES`.

    Raises `DamagedError` where a compressed stream breaks, after everything that precedes it.
    """
    try:
        with path.open("rb") as file:
            while compression is None and (block := file.read(CHUNK_BYTES)):
                yield block
    except OSError as error:
        raise system_error(path, error) from None
    if compression is not None:
        yield from _decompressed(path, compression)


def _decompressed(path: Path, compression: str) -> Iterator[bytes]:
    import pyarrow as pa

    def stream() -> Any:
        return pa.CompressedInputStream(pa.OSFile(str(path)), compression)

    done = 0
    try:
        with stream() as source:
            while block := source.read(CHUNK_BYTES):
                done += len(block)
                yield block
            return
    except OSError as error:
        reason = str(error)
    # The failing read swallowed up to a chunk of good bytes: come back for them one at a time.
    rescued = bytearray()
    with contextlib.suppress(OSError), stream() as source:
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
        data = buffer[:end] if dropped else buffer[:end].lstrip()
        if dropped + len(data) > limit:
            return reject(number, f"longer than {limit} bytes", data, dropped + len(data))
        return number, bytes(data.rstrip())

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
            pos = len(buffer)
        if pos > limit and not dropped:
            blank = len(buffer) - len(buffer.lstrip())
            del buffer[:blank]
            pos -= blank
        if pos > limit:
            keep = min(REJECT_BYTES, pos)
            dropped += pos - keep
            del buffer[keep:pos]
            pos = keep
    rest = buffer if dropped else buffer.lstrip()
    if damage or depth >= 0 or rest:
        reason = damage or "the array is not closed: a bracket or quote is missing"
        if depth < 0 and not damage:
            reason = "text after the end of the array"
        yield reject(number, reason, rest, dropped + len(rest))


def without_bom(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks less a byte order mark at the very start."""
    first = next(chunks, b"")
    yield first.removeprefix(BOM)
    yield from chunks


def text_reason(data: bytes) -> str | None:
    """Say why bytes cannot be text (NUL, invalid UTF-8), or None when they can."""
    if b"\0" in data:
        return f"NUL byte at offset {data.index(0)}"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
    return None


class _CsvFeed:
    """Hands lines to `csv.reader`, remembers what it took, and takes back what was not used.

    A broken record may have run over megabytes before that was known. Its lines are read again as
    records of at most `_patience` lines, which every further broken one halves and every good one
    raises by one: so all of them together are read a few times, whatever they hold.
    """

    def __init__(self, lines: Iterator[tuple[int, bytes] | Reject], limit: int) -> None:
        self.waiting: deque[tuple[int, bytes] | Reject] = deque()
        self.lines, self.limit = lines, limit
        self.taken: list[tuple[int, bytes]] = []
        self.size = 0
        self._patience: int | None = None  # None: no line in `waiting` was given back

    def peek(self) -> tuple[int, bytes] | Reject | None:
        if not self.waiting:
            item = next(self.lines, None)
            if item is None:
                return None
            self.waiting.append(item)
        return self.waiting[0]

    def start(self) -> tuple[int, bytes] | Reject | None:
        """Return what the next record begins with, without taking it; None at the end."""
        if not self.waiting:
            self._patience = None
        self.taken.clear()
        self.size = 0
        return self.peek()

    def give_back(self) -> tuple[int, bytes]:
        """Return the first line of a broken record; the others are read again as records."""
        first, *others = self.taken
        self.waiting.extendleft(reversed(others))
        if others:
            half = RETRY_LINES if self._patience is None else self._patience // 2
            self._patience = max(half, RETRY_LEAST)
        return first

    def accept(self) -> tuple[int, bytes]:
        """Return the number of the first line of a good record and its bytes."""
        if self._patience is not None:
            self._patience = min(self._patience + 1, RETRY_LINES)
        return self.taken[0][0], b"\n".join(data for _, data in self.taken)

    def __iter__(self) -> _CsvFeed:
        return self

    def __next__(self) -> str:
        item = self.peek()
        if item is None or isinstance(item, Reject):
            raise StopIteration
        self.size += len(item[1]) + 1
        if self.taken and self.size > self.limit:
            raise csv.Error(f"a quoted field makes the record longer than {self.limit} bytes")
        if len(self.taken) == self._patience:
            raise csv.Error("a quoted field is not closed on the next lines")
        self.waiting.popleft()
        self.taken.append(item)
        return item[1].decode(errors="surrogateescape") + "\n"


def split_csv(
    lines: Iterator[tuple[int, bytes] | Reject], limit: int, delimiter: str = ","
) -> Iterator[tuple[int, bytes, list[str]] | Reject]:
    """Yield (line, raw bytes, fields) per record of RFC 4180, quoted line breaks included.

    Spreadsheets of many countries write another `delimiter` than that standard's comma.

    After a broken quote only the line where the record began is rejected, and reading starts again
    on the next, so that one stray quote cannot take the rest of the file with it.
    """
    csv.field_size_limit(max(csv.field_size_limit(), limit + 1))  # the module's default is 128 KiB
    feed = _CsvFeed(lines, limit)
    reader = csv.reader(feed, strict=True, delimiter=delimiter)
    while (item := feed.start()) is not None:
        if isinstance(item, Reject):
            feed.waiting.popleft()
            yield item
            continue
        try:
            fields = next(reader)
        except (csv.Error, StopIteration) as error:
            reader = csv.reader(feed, strict=True, delimiter=delimiter)
            number, data = feed.give_back()
            yield reject(number, f"broken CSV: {_csv_reason(str(error))}", data)
            continue
        number, raw = feed.accept()
        if reason := text_reason(raw):
            yield reject(number, reason, raw)
        elif fields:
            yield number, raw, fields


def _csv_reason(error: str) -> str:
    if error in ("", "unexpected end of data"):
        return "a quoted field is never closed"
    if error.startswith("new-line character"):
        return "a carriage return outside quotes"
    return "text after a closing quote" if "' expected after" in error else error
