"""Where columns come from: Parquet, saved Hugging Face datasets (Arrow), and the hub."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from robustft.errors import UserError
from robustft.records.columnar import ColumnReader, Damage, Start
from robustft.records.formats import hash_files, refuse_twins

BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024
_DAMAGED = (OSError, ValueError, NotImplementedError)  # Arrow's errors are one of these


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
        yield Start(name)
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
                    yield Damage(left, _first_line(error))


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
            yield Damage(1, f"{path.name} breaks off: {_first_line(error)}")


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
