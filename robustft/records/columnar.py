"""Arrow record batches read as rows, and rows written as Parquet.

Columns are decoded only when a schema asks for them; the others go from input to output as Arrow
arrays, so every type and the file's schema survive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import IO, Any, NamedTuple

import numpy as np

from robustft.errors import UserError
from robustft.records.formats import BadRowError, RowWriter
from robustft.records.framing import Place, Reject

GROUP_BYTES = 16 << 20  # a row group is written when it holds this much, or this many rows
GROUP_ROWS = 16 << 10
# Python's floats are longer: 0.1 would become 0.10000000149011612, which is no expert's answer.
_SHORT_FLOATS = {"halffloat": np.float16, "float": np.float32}
_UNREADABLE = (ValueError, TypeError, OverflowError)  # the last for a year that Python has not


@dataclass(slots=True)
class _Batch:
    """An Arrow record batch whose columns become Python values on first use."""

    arrow: Any
    names: dict[str, None]  # of all columns, in order
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def values(self, name: str) -> list[Any]:
        if name not in self.columns:
            column = self.arrow.column(name)
            try:
                self.columns[name] = column.to_pylist()
            except _UNREADABLE:  # one bad cell (invalid UTF-8) fails them all
                self.columns[name] = [_cell(scalar) for scalar in column]
            if short := _SHORT_FLOATS.get(str(column.type)):
                self.columns[name] = [
                    None if value is None else float(str(short(value)))
                    for value in self.columns[name]
                ]
        return self.columns[name]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except _UNREADABLE as error:
        return BadRowError(f"cannot be decoded: {error}")


class BatchRow(Mapping[str, Any]):
    """One row of a batch; a cell that cannot be decoded raises `BadRowError` when asked for."""

    __slots__ = ("batch", "position")

    def __init__(self, batch: _Batch, position: int) -> None:
        self.batch, self.position = batch, position

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        value = self.batch.values(name)[self.position]
        if isinstance(value, BadRowError):
            raise BadRowError(f"field {name!r}: {value}")
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.batch.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch.names)

    def __len__(self) -> int:
        return len(self.batch.names)


class Damage(NamedTuple):
    """In place of a batch: so many records could not be read."""

    records: int
    reason: str


class Start(NamedTuple):
    """Before the batches of a file: its name, as its places tell it."""

    file: str


@dataclass(frozen=True, slots=True)
class ColumnReader:
    """Arrow record batches from anywhere, read as rows and written as Parquet.

    `batches` starts the input afresh; `identity` gives its fingerprint.
    """

    format: str  # "parquet" or "hub"
    schema: Any  # pyarrow.Schema
    batches: Callable[[], Iterator[Any]]  # pyarrow.RecordBatch, Damage or Start
    identity: Callable[[], str]
    compression: str = "snappy"
    suffix: str = ".parquet"
    size: int | None = None  # records, where they are counted

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(self.schema.names)

    def rows(self, *, parsed: bool = True) -> Iterator[tuple[Place, Mapping[str, Any]] | Reject]:
        """Yield (place, row); a damaged part is one reject."""
        number, file = 0, ""
        for item in self.batches():
            if isinstance(item, Start):
                number, file = 0, item.file
                continue
            if isinstance(item, Damage):
                reason = f"{item.records} records from here on are damaged: {item.reason}"
                yield Reject(number + 1, reason, b"", 0, file)
                number += item.records
                continue
            batch = _Batch(item, dict.fromkeys(item.schema.names))
            for position in range(item.num_rows):
                number += 1
                yield Place(number, file), BatchRow(batch, position)

    def writer(self, file: IO[bytes]) -> RowWriter:
        """Return a Parquet writer with the input's schema and compression."""
        return ColumnWriter(file, self.schema, self.compression)

    def content_hash(self) -> str:
        """Return the fingerprint of the data."""
        return self.identity()

    def misfit(self, changes: Mapping[str, Any]) -> str | None:
        """The type of the first column that does not take its new value in full, if any."""
        for name, value in changes.items():
            kind = self.schema.field(name).type
            if _one(value, kind) is None:
                return str(kind)
        return None


def _one(value: Any, kind: Any) -> Any:
    """One value as an Arrow array of this type; None where it does not fit in full."""
    import pyarrow as pa

    try:
        if not isinstance(value, float):
            return pa.array([value], type=kind)
        cell = pa.array([value]).cast(kind)  # pa.array(type=kind) would cut 12.5 down to 12
        return cell if isfinite(cell[0].as_py()) else None
    except (ValueError, TypeError, OverflowError, NotImplementedError):
        return None


class ColumnWriter:
    """Writes rows as Parquet, in row groups of at most 16 MiB or 16,384 rows."""

    def __init__(self, file: IO[bytes], schema: Any, compression: str) -> None:
        import pyarrow.parquet as pq

        self._schema = _roomy(schema)
        self._parquet = pq.ParquetWriter(file, self._schema, compression=compression)
        self._batch: _Batch | None = None
        self._rows: list[tuple[int, Mapping[str, Any]]] = []  # of self._batch: position, changes
        self._group: list[Any] = []
        self._held = 0  # bytes of self._group

    def write(self, row: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        """Write one row with the fields of `changes` replaced; it must come from a batch."""
        if not isinstance(row, BatchRow):
            raise TypeError(f"row must be one that was read from columns, got {type(row).__name__}")
        if self._batch is not row.batch:
            self._finish_batch()
            self._batch = row.batch
        self._rows.append((row.position, changes))

    def close(self) -> None:
        """Write the last row group and the footer."""
        try:
            self._finish_batch()
            self._finish_group()
        finally:
            self._parquet.close()

    def _finish_batch(self) -> None:
        import pyarrow as pa

        if self._batch is None or not self._rows:
            return
        arrow = self._batch.arrow
        if arrow.schema != self._schema:
            arrow = arrow.cast(self._schema)
        positions = [position for position, _ in self._rows]
        if positions != list(range(arrow.num_rows)):
            columns = [_taken(column, positions) for column in arrow.columns]
            arrow = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        self._group.append(self._changed(arrow, [changes for _, changes in self._rows]))
        self._held += arrow.nbytes
        self._rows.clear()
        if self._held >= GROUP_BYTES or sum(p.num_rows for p in self._group) >= GROUP_ROWS:
            self._finish_group()

    def _changed(self, piece: Any, changes: Sequence[Mapping[str, Any]]) -> Any:
        """Return the rows with cells replaced; all other cells stay the arrays they were."""
        import pyarrow as pa

        for name in {name for change in changes for name in change}:
            index = piece.schema.get_field_index(name)
            column, parts, done = piece.column(index), [], 0
            for at, change in enumerate(changes):
                if name not in change:
                    continue
                cell = _one(change[name], column.type)
                if cell is None:
                    raise UserError(
                        f"field {name!r}: the answer {change[name]!r:.60} does not fit the"
                        f" column's type {column.type}"
                    )
                parts += [column.slice(done, at - done), cell]
                done = at + 1
            parts.append(column.slice(done))
            piece = piece.set_column(index, piece.schema.field(index), pa.concat_arrays(parts))
        return piece

    def _finish_group(self) -> None:
        import pyarrow as pa

        if self._group:
            table = pa.Table.from_batches(self._group)
            self._parquet.write_table(table.replace_schema_metadata(self._schema.metadata))
        self._group.clear()
        self._held = 0


def _taken(column: Any, positions: Sequence[int]) -> Any:
    """The cells of an array at these positions, copied; its type stays."""
    import pyarrow as pa

    kind, at = column.type, pa.array(positions, pa.int64())
    try:
        if pa.types.is_string_view(kind):  # Arrow takes no cells of views
            return column.cast(pa.large_string()).take(at).cast(kind)
        return column.take(at)
    except NotImplementedError:  # slow, but of any type
        return pa.concat_arrays([column.slice(position, 1) for position in positions])


def _roomy(schema: Any) -> Any:
    """The schema with indexes of 32 bits in columns of categories.

    Of 8 or 16 bits they have no room for new answers, nor for the categories of several files.
    """
    import pyarrow as pa

    for at, column in enumerate(schema):
        kind = column.type
        if pa.types.is_dictionary(kind) and kind.index_type.bit_width < 32:
            wide = pa.dictionary(pa.int32(), kind.value_type, ordered=kind.ordered)
            schema = schema.set(at, column.with_type(wide))
    return schema
