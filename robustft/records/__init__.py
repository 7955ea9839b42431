"""Training examples of any format and schema as one stream of `Record`, and back to a file."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from robustft.answers import Kind, answer_kind
from robustft.errors import UserError
from robustft.files import replacing
from robustft.progress import Progress
from robustft.records.columnar import ColumnReader
from robustft.records.formats import (
    BadRowError,
    Reader,
    RowWriter,
    TextReader,
    TextRow,
    dump_json,
)
from robustft.records.framing import MAX_LINE_BYTES, Place, Reject, reject, short
from robustft.records.ids import UniqueIds
from robustft.records.options import LETTERS
from robustft.records.schemas import ChoiceSchema, Context, Schema, find_schema, kind_of
from robustft.records.sources import open_reader
from robustft.terminal import printable

__all__ = [
    "Place",
    "Record",
    "RecordSource",
    "RecordWriter",
    "Reject",
    "count_records",
    "folded",
    "leave_out",
    "open_records",
    "output_name",
    "reopened",
]

SAMPLE_ROWS = 64
_log = logging.getLogger("robustft")


@dataclass(slots=True)  # frozen, it takes five times as long to make
class Record:
    """One training example, whatever its schema.

    `index` counts readable records from 0 in input order; `line` and `file` are those of its
    `Place`. `id` is the input's own `id` or the index, unique within
    the run. `answer` is the given answer: a letter from "A" for multiple choice, else the text.
    `context` holds (role, text) of the chat turns before the question. `row` is the original row.
    """

    index: int
    line: int
    id: str
    question: str
    options: tuple[str, ...] | None
    answer: str
    context: Context
    row: Mapping[str, Any]
    file: str = ""

    @property
    def place(self) -> Place:
        """Where it stands in the input."""
        return Place(self.line, self.file)

    @property
    def kind(self) -> Kind:
        """choice, number, span or text, by the given answer."""
        return answer_kind(self.answer, self.options)

    @property
    def given_option(self) -> str | None:
        """The text that the given letter stands for; None without options."""
        return None if self.options is None else self.options[LETTERS.index(self.answer)]

    @property
    def key(self) -> bytes:
        """16 bytes that tell the content: question, options, context and answer."""
        parts = [*_asked(self), *(self.options or ()), self.answer]
        return _digest(self, parts, answered=True)

    @property
    def question_key(self) -> bytes:
        """16 bytes that tell what is asked: question, options and context.

        The same for copies that differ in case, white space or the options' order alone.
        """
        options = sorted(map(folded, self.options or ()))
        return _digest(self, [*map(folded, _asked(self)), *options], answered=False)


def _asked(record: Record) -> list[str]:
    return [record.question, *(part for turn in record.context for part in turn)]


def _digest(record: Record, parts: Iterable[str], *, answered: bool) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    options = record.options
    # Every list is preceded by its length, every text by its size: no two contents collide.
    for size in (-1 if options is None else len(options), len(record.context), answered):
        digest.update(size.to_bytes(4, "little", signed=True))
    for part in parts:
        data = part.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def folded(text: str) -> str:
    """A text as copies of it share it that differ in case and white space alone."""
    return " ".join(text.split()).casefold()


class RecordSource:
    """The records of one input: streamed, in input order, afresh on every iteration.

    Memory does not grow with the file, but for 16 to 32 bytes per record where the input has ids of
    its own, which takes telling duplicates apart.

    `path` is the path or dataset id as given; `format` is "jsonl", "json", "csv", "parquet" or
    "hub"; `schema` names the schema in use, `kind` the same without fields of other names; `fields`
    are the columns, or the fields of the first rows where rows may differ; `suffix` ends the name
    of an output of the same format, such as ".jsonl.gz"; `limit` is how many records it stops
    after, None where it does not; `called` tells the letters of answers that are none in the file.
    """

    def __init__(
        self, path: str, reader: Reader, schema: Schema, fields: tuple[str, ...], limit: int | None
    ) -> None:
        self.path = path
        self.format = reader.format
        self.schema = schema.name
        self.kind = kind_of(schema.name)
        self.fields = fields
        self.suffix = reader.suffix
        self.reader = reader
        self.layout = schema
        self.limit = limit
        self.called = ""
        self._hash: str | None = None

    def __iter__(self) -> Iterator[Record | Reject]:
        """Yield records and rejects in input order; stops after `limit` records."""
        ids, index = UniqueIds(), 0
        for item in self.reader.rows():
            if isinstance(item, Reject):
                yield item
                continue
            (line, file), row = item
            try:
                parsed = self.layout.parse(row)
                own = row.get("id")
            except BadRowError as error:
                raw = row.raw if isinstance(row, TextRow) else _as_bytes(row)
                yield replace(reject(line, str(error), raw), file=file)
                continue
            yield Record(index, line, ids.unique(own, index), *parsed, row, file)
            index += 1
            if index == self.limit:
                break

    @property
    def size(self) -> int | None:
        """About how many records and rejects it will yield, where that can be told beforehand."""
        size = self.reader.size
        return size if size is None or self.limit is None else min(size, self.limit)

    def refusal(self, row: Mapping[str, Any], answer: str) -> str | None:
        """Why a new answer (letter or text) cannot be written in `row`, None where it can.

        Text takes any answer; a column of numbers takes only numbers that its type holds.
        """
        if not isinstance(self.reader, ColumnReader):
            return None
        kind = self.reader.misfit(self.layout.changes(row, answer))
        if kind is None:
            return None
        return f"the new answer {short(answer)!r} does not fit the column's type ({kind})"

    @property
    def content_hash(self) -> str:
        """Hexadecimal fingerprint of the input's bytes when this was first asked for.

        Its name and times do not matter.
        """
        if self._hash is None:
            self._hash = self.reader.content_hash()
        return self._hash

    def require_unchanged(self) -> None:
        """Raise UserError where the input's bytes are no longer those of `content_hash`."""
        if self.reader.content_hash() != self.content_hash:
            raise self.changed()

    def changed(self) -> UserError:
        """What to tell where the input is not what it was when the command began."""
        return UserError(
            f"{self.path}: has changed since the run began; put it back and run the same command "
            "again, or choose another --out"
        )


def _as_bytes(row: Mapping[str, Any]) -> bytes:
    """Render a row that never was text; what fails to decode is left out."""
    values: dict[str, Any] = {}
    for name in row:
        with contextlib.suppress(BadRowError):
            value = row[name]
            values[name] = (
                value if isinstance(value, str | int | float | list | dict | None) else repr(value)
            )
    try:
        return dump_json(values)
    except (TypeError, ValueError):
        return repr(values).encode(errors="replace")


def open_records(
    path: str,
    *,
    schema: str | None = None,
    limit: int | None = None,
    split: str = "train",
) -> RecordSource:
    """Open an input file, a folder of data files, a saved dataset or a Hugging Face dataset id.

    The format is told by the name's extension (and JSON lines from arrays by the content), the
    schema by the fields of the first 64 rows unless `schema` names one. `limit` stops after that
    many readable records; `split` chooses among a dataset's splits. Raises `UserError` when the
    input is missing, empty or unreadable, no schema fits, or not one record can be read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected a number of records from 1, found {limit}")
    reader = open_reader(path, split, MAX_LINE_BYTES)
    rows = (item[1] for item in reader.rows() if not isinstance(item, Reject))
    sample = list(islice(rows, SAMPLE_ROWS))
    if not sample and reader.fields:
        sample = [dict.fromkeys(reader.fields)]
    fields = reader.fields or tuple(dict.fromkeys(name for row in sample for name in row))
    layout: Schema | None = None
    if sample:
        layout = find_schema(sample, schema, path)
        source = RecordSource(path, reader, layout, fields, limit)
    rejected = 0
    first: Reject | None = None
    for item in source if layout else reader.rows():
        if isinstance(item, Record):
            if isinstance(layout, ChoiceSchema):
                source.called = layout.called(item.row)
            return source
        if isinstance(item, Reject):
            rejected, first = rejected + 1, first or item
    if first is None:
        raise UserError(f"{path}: the file holds no records")
    counted = "the only record was" if rejected == 1 else f"all {rejected} records were"
    place = first.place.named(reader.format)
    raise UserError(f"{path}: {counted} rejected; {place}: {first.reason}")


def count_records(source: RecordSource) -> int:
    """The number of records, by reading them all."""
    return sum(isinstance(item, Record) for item in watched(source, "count"))


def leave_out(reject: Reject, source: RecordSource, before: int) -> int:
    """How many were left out with this one; where it is the first, the log says why.

    For commands that write no rejects.jsonl.
    """
    if before == 0:
        _log.warning(
            "%s, %s: %s; left out, as are others that cannot be read",
            source.path, reject.place.named(source.reader.format), printable(reject.reason),
        )  # fmt: skip
    return before + 1


def watched(source: RecordSource, doing: str) -> Iterator[Record | Reject]:
    """What a source holds, with its progress shown."""
    with Progress(doing, source.size, unit="records") as progress:
        for item in source:
            progress.update(1)
            yield item


class RecordWriter:
    """Writes records in the format, schema, field order and compression of their source.

    A context manager: the file appears under its name only when the block ends well. A record
    whose answer stays is written as it stood (byte for byte in text formats).
    """

    def __init__(self, path: Path, source: RecordSource) -> None:
        self._path, self._source = Path(path), source
        self._stack = contextlib.ExitStack()
        self._writer: RowWriter | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacing(self._path))
            file = stack.enter_context(temporary.open("wb"))
            self._writer = self._source.reader.writer(file)
            stack.push(self._close_writer)
            self._stack = stack.pop_all()
        return self

    def write(self, record: Record, answer: str) -> None:
        """Write one record with this answer (letter for multiple choice, else text).

        Raises `ValueError` for a letter the record does not have, and `UserError` on closing for an
        answer that the source refuses (`RecordSource.refusal`).
        """
        self.write_row(record.row, None if answer == record.answer else answer)

    def write_row(self, row: Mapping[str, Any], answer: str | None) -> None:
        """Write one row with this answer; None: as it stands."""
        if self._writer is None:
            raise ValueError("RecordWriter.write: the writer is not open; use it in a with block")
        changes = {} if answer is None else self._source.layout.changes(row, answer)
        self._writer.write(row, changes)

    def _close_writer(self, kind: object, error: object, trace: object) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            # After an error the file goes, but buffers and codecs still want to be closed.
            with contextlib.suppress(*(() if kind is None else (Exception,))):
                writer.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)


def reopened(source: RecordSource, path: Path) -> RecordSource:
    """The records of `path`, a file that a `RecordWriter` made from `source`: the same layout."""
    if isinstance(source.reader, TextReader):  # fewer rows might be taken for another dialect
        reader: Reader = replace(source.reader, files=(path,), names=("",))
    else:
        reader = open_reader(str(path), "train", MAX_LINE_BYTES)
    return RecordSource(str(path), reader, source.layout, source.fields, None)


def output_name(source: RecordSource) -> str:
    """Return the name of the cleaned set beside its manifest: "cleaned.csv", "cleaned.jsonl.gz"."""
    return f"cleaned{source.suffix}"
