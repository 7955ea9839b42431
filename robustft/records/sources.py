"""Finding the reader for what the user named: a file, a folder, or a Hugging Face dataset."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from robustft.errors import UserError
from robustft.outputs import read_manifest
from robustft.records.column_sources import open_arrow, open_hub, open_parquet
from robustft.records.encodings import refuse_other, refuse_unicode
from robustft.records.formats import Reader, TextReader, csv_header
from robustft.records.framing import (
    BOM,
    DamagedError,
    Reject,
    read_chunks,
    system_error,
)
from robustft.remote import fetched, is_remote
from robustft.terminal import listed

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
# Of CSV, as spreadsheets write it; where two divide the columns equally well, the first is meant.
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}
_SEP_LINE = re.compile(rb'"?sep=([^\w\s"\x80-\xff]|\t)"?\r?\n', re.IGNORECASE)
DELIMITED_RECORDS = 64  # are looked at to tell them apart
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet"}
KNOWN = ".jsonl .ndjson .json .csv .tsv (also with .gz or .zst) and .parquet"
_HUB_SCHEME = "hf://datasets/"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", re.ASCII)
# How file and folder names of datasets mark their splits, as the hub reads them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Files of a dataset's folder that describe it.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def split_suffix(path: Path) -> tuple[str, str]:
    """Return (extension, compression extension or ""), in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compressed


def require_lines_name(out: Path) -> None:
    """Raise UserError where the name of a file of JSON lines says that it is something else."""
    suffix, compressed = split_suffix(out)
    # Many ".json" files hold one object a line; a name that says nothing is the user's choice.
    if compressed or suffix == ".parquet" or FORMATS.get(suffix) == "csv":
        raise UserError(f"{out}: expected a name ending in .jsonl, which is what is written")


def open_reader(path: str, split: str, limit: int) -> Reader:
    """Return the reader of a file (remote ones too), folder or dataset id; raises `UserError`."""
    hub = path.removeprefix(_HUB_SCHEME)
    file = fetched(path) if is_remote(path) and not HUB_ID.fullmatch(hub) else Path(path)
    mode = find(file, path)
    if mode is None:
        return open_hub(hub, split)
    if stat.S_ISDIR(mode):
        return open_folder(file, split, limit)
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: expected a file, found something that cannot be read twice")
    if split not in ("train", "test"):  # the defaults
        raise UserError(f"{path}: is one file, which has no split {split!r}: leave --split out")
    return open_files((file,), limit)


def find(file: Path, path: str) -> int | None:
    """The mode of the `file` that the user named by `path`; None: no file, but a dataset's id.

    Raises `UserError` where it is neither.
    """
    try:
        return file.stat().st_mode
    except FileNotFoundError as error:
        hub = path.removeprefix(_HUB_SCHEME)
        suffix = split_suffix(file)[0]
        local = suffix in FORMATS or suffix == ".parquet" or file.parent.is_dir()
        if HUB_ID.fullmatch(hub) and (hub != path or not local):
            return None
        if path == "-":
            raise UserError("-: input is read twice; save what is piped to a file") from None
        raise system_error(file, error) from None
    except OSError as error:
        raise system_error(file, error) from None
    except ValueError:  # a NUL in the name
        raise UserError(f"{path!r}: not a file name") from None


def open_folder(folder: Path, split: str, limit: int) -> Reader:
    """Open a dataset saved with `save_to_disk`, or a folder of data files of one kind."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = _json_object(folder / "dataset_dict.json").get("splits", [])
            if not isinstance(splits, list):
                splits = []
            if split not in splits:
                told = listed(splits) or "none"
                raise UserError(f"{folder}: expected a split {split!r}, found {told}")
            return open_folder(folder / split, split, limit)
        if (folder / "state.json").is_file():
            entries = _json_object(folder / "state.json").get("_data_files", [])
            # Only the last part of a name counts: this file may come from anywhere.
            names = [Path(str(entry["filename"])).name for entry in entries]
            return open_arrow(folder, tuple(folder / name for name in names))
        _refuse_outputs(folder)
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.name not in DESCRIPTIONS
            and split_suffix(path)[0] in (*FORMATS, ".parquet")
        )
    except OSError as error:
        raise system_error(folder, error) from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder}: state.json is not what save_to_disk writes") from None
    if not found:
        raise UserError(f"{folder}: the folder holds no data files; known are {KNOWN}")
    by_split: dict[str, list[Path]] = {}
    for path in found:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    files = by_split.get(split) or (found if set(by_split) == {""} else [])
    if not files:
        splits = ", ".join(sorted(name for name in by_split if name))
        raise UserError(
            f"{folder}: expected files of the split {split!r}, found those of {splits}: "
            "name one with --split"
        )
    named = (os.fsencode(path.relative_to(folder)) for path in files)
    return open_files(
        tuple(files), limit, tuple(name.decode(errors="backslashreplace") for name in named)
    )


def _refuse_outputs(folder: Path) -> None:
    """Raise UserError where a run's outputs lie in the folder, of which few files hold records."""
    if read_manifest(folder):
        sets = sorted(path for path in folder.glob("cleaned.*") if path.is_file())
        such = f", such as {sets[0]}, its training set" if sets else ""
        raise UserError(f"{folder}: holds the outputs of a run: give one file{such}")


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((name for name, marks in SPLITS.items() if set(marks) & set(words)), "")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def open_files(files: tuple[Path, ...], limit: int, names: tuple[str, ...] = ()) -> Reader:
    """Open files of one kind as one input, once extension and first bytes agree.

    `names` tell several files apart.
    """
    if len(files) == 1:
        names = ("",)
    kinds = {"".join(split_suffix(path)) for path in files}
    if len(kinds) > 1:
        folder = Path(os.path.commonpath(files))
        first = {"".join(split_suffix(path)): path for path in reversed(files)}
        found = listed([f"{kind} ({first[kind].relative_to(folder)})" for kind in sorted(kinds)])
        raise UserError(
            f"{folder}: expected data files of one kind, found {found}: give one file, such as "
            f"{first[min(kinds)]}, or a folder of one kind"
        )
    for path in files:
        _check_magic(path)
    if split_suffix(files[0])[0] == ".parquet":
        return open_parquet(files, names)
    readers = [_open_text(path, limit) for path in files]
    if len({reader.delimiter for reader in readers}) > 1:  # a file of few rows tells little of it
        surest = max(readers, key=lambda reader: _fit(reader, reader.delimiter))
        readers = [_open_text(path, limit, surest.delimiter) for path in files]
    for path, reader in zip(files, readers, strict=True):
        if _layout(reader) != _layout(readers[0]):
            raise UserError(f"{path}: expected the layout and columns of {files[0].name}")
    return replace(readers[0], files=files, names=names)


def _check_magic(path: Path) -> None:
    suffix, compressed = split_suffix(path)
    if suffix not in (*FORMATS, ".parquet") or (suffix == ".parquet" and compressed):
        found = repr(suffix + compressed) if suffix or compressed else "none"
        raise UserError(f"{path}: unknown extension, found {found}; known are {KNOWN}")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise system_error(path, error) from None
    if not start:
        raise UserError(f"{path}: the file is empty")
    magic = next((name for sign, name in MAGIC.items() if start.startswith(sign)), None)
    expected = "Parquet" if suffix == ".parquet" else COMPRESSIONS.get(compressed)
    if magic != expected:
        raise UserError(
            f"{path}: expected {expected or 'plain text'} as the name says, found"
            f" {magic or 'other'} data"
        )


def _open_text(path: Path, limit: int, delimiters: str = "") -> TextReader:
    suffix, compressed = split_suffix(path)
    compression = COMPRESSIONS.get(compressed)
    try:
        start = next(read_chunks(path, compression), b"")
    except DamagedError as error:
        raise UserError(f"{path}: not one byte can be decompressed: {error}") from None
    refuse_unicode(path, start, compression)
    bom = BOM if start.startswith(BOM) else b""
    start = start.removeprefix(BOM)
    text = start.lstrip()
    if not text:
        raise UserError(f"{path}: the file is empty")
    format = FORMATS[suffix]
    reader = TextReader((path,), ("",), format, compression, suffix + compressed, limit)
    if format == "csv":
        return _open_csv(reader, start, bom, delimiters or DELIMITERS[suffix])
    # Many ".json" files hold one object a line, so the first byte decides.
    reader = replace(reader, format="json" if text.startswith(b"[") else "jsonl")
    refuse_other(reader, start)
    one_object = reader.format == "jsonl" and text.split(b"\n", 1)[0].strip() == b"{"
    if suffix == ".json" and one_object:
        raise UserError(f"{path}: expected an array of objects or one a line, found one object")
    return reader


def _open_csv(reader: TextReader, start: bytes, bom: bytes, delimiters: str) -> TextReader:
    if declared := _SEP_LINE.match(start):
        reader, delimiters = replace(reader, sep_line=declared[0]), declared[1].decode()
    delimiter, first = _csv_start(reader, delimiters)
    reader = replace(reader, delimiter=delimiter)
    refuse_other(reader, start)
    fields, header = csv_header(reader.files[0], first)
    return replace(reader, fields=fields, header=bom + reader.sep_line + header)


def _csv_start(
    reader: TextReader, delimiters: str
) -> tuple[str, tuple[int, bytes, list[str]] | Reject | None]:
    """The delimiter and the header.

    The delimiter divides the header, and after it the most of the first records into as many
    fields; of several the one into the most, for a column's name may hold another.
    """
    heads = {mark: next(reader.csv_records(mark), None) for mark in delimiters}
    found = [
        mark for mark, head in heads.items() if isinstance(head, tuple) and len(head[2]) > 1
    ] or [delimiters[0]]
    best = found[0] if len(found) == 1 else max(found, key=lambda mark: _fit(reader, mark))
    return best, heads[best]


def _fit(reader: TextReader, delimiter: str) -> tuple[int, int]:
    """How many of the first records have as many fields as the header, and how many it has."""
    head, *others = islice(reader.csv_records(delimiter), 1 + DELIMITED_RECORDS)
    columns = 0 if isinstance(head, Reject) else len(head[2])
    fits = (not isinstance(one, Reject) and len(one[2]) == columns for one in others)
    return sum(fits), columns


def _layout(reader: TextReader) -> tuple[str, tuple[str, ...], str, bytes]:
    return reader.format, reader.fields, reader.delimiter, reader.sep_line
