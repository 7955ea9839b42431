"""Column files: Parquet, saved Hugging Face datasets (Arrow) and datasets streamed from the hub.

Columns are decoded only when a schema asks for them; the others go from input to output as Arrow
arrays, so every type and the file's schema survive.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from robustft.errors import UserError
from robustft.records.formats import BadRowError, RowWriter, hash_files, refuse_twins
from robustft.records.framing import Place, Reject

BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024
GROUP_BYTES = 16 << 20  # a row group is written when it holds this much, or this many rows
GROUP_ROWS = 16 << 10
# Python's floats are longer: 0.1 would become 0.10000000149011612, which is no expert's answer.
_SHORT_FLOATS = {"halffloat": np.float16, "float": np.float32}
_DAMAGED = (OSError, ValueError, NotImplementedError)  # Arrow's errors are one of these
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


class _Damage(NamedTuple):
    """In place of a batch: so many records could not be read."""

    records: int
    reason: str


class _Start(NamedTuple):
    """Before the batches of a file: its name, as its places tell it."""

    file: str


@dataclass(frozen=True, slots=True)
class ColumnReader:
    """Arrow record batches from anywhere, read as rows and written as Parquet.

    `batches` starts the input afresh; `identity` gives its fingerprint.
    """

    format: str  # "parquet" or "hub"
    schema: Any  # pyarrow.Schema
    batches: Callable[[], Iterator[Any]]  # pyarrow.RecordBatch, _Damage or _Start
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
            if isinstance(item, _Start):
                number, file = 0, item.file
                continue
            if isinstance(item, _Damage):
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


def open_parquet(files: tuple[Path, ...], names: tuple[str, ...]) -> ColumnReader:
    """Open Parquet files of one schema as one input; raises `UserError`.

    `names` are those of the files in places: "" where there is but one.
    """
    import pyarrow.parquet as pq

    schema: Any = None
    compression, size = "snappy", 0
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                found, metadata = file.schema_arrow, file.metadata
        except _DAMAGED as error:
            raise UserError(f"{path}: not a readable Parquet file: {_first_line(error)}") from None
        size += metadata.num_rows
        if schema is None:
            schema = found
            if metadata.num_row_groups and metadata.num_columns:
                codec = metadata.row_group(0).column(0).compression.lower()
                compression = {"uncompressed": "none", "lz4_raw": "lz4"}.get(codec, codec)
        elif not found.equals(schema):
            raise UserError(f"{path}: expected the columns and types of {files[0].name}")
    refuse_twins(files[0], schema.names)
    return ColumnReader(
        "parquet",
        schema,
        lambda: _parquet_batches(files, names),
        lambda: hash_files(files),
        compression,
        size=size,
    )


def _parquet_batches(files: tuple[Path, ...], names: tuple[str, ...]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # Buffered reads of one column page at a time: pre_buffer would load whole row groups.
    open_file = partial(
        pq.ParquetFile, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
    )
    for path, name in zip(files, names, strict=True):
        yield _Start(name)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open_file(path))
            texts = _texts(file)
            undecoded = stack.enter_context(open_file(path, read_dictionary=sorted(texts)))
            for number in range(file.num_row_groups):
                left = file.metadata.row_group(number).num_rows
                rows = min(BATCH_ROWS, max(1, BATCH_BYTES // _row_bytes(undecoded, number, texts)))
                try:
                    for batch in file.iter_batches(rows, row_groups=[number], use_threads=False):
                        left -= batch.num_rows
                        yield batch
                except _DAMAGED as error:
                    yield _Damage(left, _first_line(error))


def _texts(file: Any) -> set[str]:
    """The paths of the texts in a Parquet file, in lists and structs too."""
    columns = (file.schema.column(number) for number in range(file.metadata.num_columns))
    return {
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "NONE")
    }


def _row_bytes(file: Any, number: int, texts: set[str]) -> int:
    """About the bytes of a row in a row group, decoded; `file` gives `texts` as dictionaries.

    The group's own size tells too little: a text that many rows share stands in it once. So every
    text counts as the longest of the dictionary, which the first rows show; where these are empty,
    as the whole column.
    """
    group = file.metadata.row_group(number)
    rows = max(1, group.num_rows)
    size: int = max(1, group.total_byte_size // rows)
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema in texts and column.has_dictionary_page:
            longest = _longest(file, number, column.path_in_schema)
            size += (longest or column.total_uncompressed_size) * -(-column.num_values // rows)
    return size


def _longest(file: Any, number: int, path: str) -> int:
    """Bytes of the longest text that the first rows of a row group, or their dictionary, hold."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        batches = file.iter_batches(BATCH_ROWS, [number], [path], use_threads=False)
        array = next(batches).column(0)
    except (OSError, ValueError, StopIteration):
        return 0
    while not isinstance(array, pa.DictionaryArray):
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        else:
            array = array.field(0) if isinstance(array, pa.StructArray) else array.values
    return int(pc.max(pc.binary_length(array.dictionary)).as_py() or 0)


def open_arrow(folder: Path, files: tuple[Path, ...]) -> ColumnReader:
    """Open the Arrow files of a dataset saved with `save_to_disk`; raises `UserError`."""
    schema = None
    for path in files:
        try:
            with _arrow_stream(path) as stream:
                schema = schema or stream.schema
        except _DAMAGED as error:
            raise UserError(f"{path}: not a readable Arrow file: {_first_line(error)}") from None
    if schema is None:
        raise UserError(f"{folder}: the saved dataset holds no data files")
    refuse_twins(folder, schema.names)
    return ColumnReader("hub", schema, lambda: _arrow_batches(files), lambda: hash_files(files))


def _arrow_stream(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path)))


def _arrow_batches(files: tuple[Path, ...]) -> Iterator[Any]:
    for path in files:
        try:
            with _arrow_stream(path) as stream:
                yield from stream
        except _DAMAGED as error:
            yield _Damage(1, f"{path.name} breaks off: {_first_line(error)}")


def open_hub(path: str, split: str) -> ColumnReader:
    """Stream a dataset of the Hugging Face hub, `owner/name` or `owner/name:config`.

    Its current revision is looked up once and kept. Raises `UserError` when the hub cannot be
    reached or does not have it.
    """
    try:
        import datasets
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise UserError(
            f"{path}: no such file; to read it from the Hugging Face hub, install"
            " robustft[datasets]"
        ) from None
    name, _, config = path.partition(":")
    try:
        revision = HfApi().dataset_info(name, timeout=20).sha
    except RepositoryNotFoundError:
        raise UserError(
            f"{path}: no such file, and the Hugging Face hub has no dataset of this name that you"
            " may read"
        ) from None
    except Exception as error:  # the HTTP library's own types, which change between versions
        raise UserError(
            f"{path}: no such file, and the Hugging Face hub cannot be reached"
            f" ({_first_line(error)}); name a local file or folder"
        ) from None
    try:
        stream = datasets.load_dataset(
            name, config or None, split=split, streaming=True, revision=revision
        )
        return open_stream(stream, f"{path}@{revision}:{split}")
    except UserError:
        raise
    except Exception as error:  # unknown split or config, gated, unreadable files, network
        raise UserError(f"{path} (split {split!r}): {_first_line(error)}") from None


def open_stream(stream: Any, identity: str) -> ColumnReader:
    """Read a `datasets.IterableDataset`, whose content `identity` names."""

    def batches() -> Iterator[Any]:
        try:
            for table in stream.with_format("arrow").iter(batch_size=256):
                yield from table.combine_chunks().to_batches()
        except Exception as error:  # the network's and every file format's own types
            raise UserError(f"{identity}: reading broke off: {_first_line(error)}") from None

    if stream.features:
        schema = stream.features.arrow_schema
    else:
        schema = getattr(next(batches(), None), "schema", None)
    if schema is None:
        raise UserError(f"{identity}: the dataset holds no records")
    refuse_twins(identity, schema.names)
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return ColumnReader("hub", schema, batches, lambda: digest)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
