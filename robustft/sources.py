"""Finding the reader for what the user named: a file, a folder, or a Hugging Face dataset."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

from robustft.errors import UserError
from robustft.formats import (
    BOM,
    DamagedError,
    Reader,
    TextReader,
    csv_header,
    read_chunks,
    split_csv,
    split_lines,
    system_error,
    without_bom,
)

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet"}
KNOWN = ".jsonl .ndjson .json .csv (also with .gz or .zst) and .parquet"


def split_suffix(path: Path) -> tuple[str, str | None]:
    """Return (extension, compression extension or None), in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return (suffixes[-2] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), None


def open_reader(path: str, split: str, limit: int) -> Reader:
    """Return the reader of a file; raises `UserError`."""
    file = Path(path)
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise system_error(file, error) from None
    except ValueError:  # a NUL in the name
        raise UserError(f"{path!r}: not a file name") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: expected a file, found something that cannot be read twice")
    return open_file(file, limit)


def open_file(path: Path, limit: int) -> Reader:
    """Return the reader that a file's extension asks for, once its first bytes agree."""
    suffix, compressed = split_suffix(path)
    if suffix not in FORMATS or (suffix == ".parquet" and compressed):
        found = repr(suffix + (compressed or "")) if suffix or compressed else "none"
        raise UserError(f"{path}: unknown extension, found {found}; known are {KNOWN}")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise system_error(path, error) from None
    if not start:
        raise UserError(f"{path}: the file is empty")
    magic = next((name for sign, name in MAGIC.items() if start.startswith(sign)), None)
    compression = COMPRESSIONS.get(compressed or "")
    expected = "Parquet" if suffix == ".parquet" else compression
    if magic != expected:
        raise UserError(
            f"{path}: expected {expected or 'plain text'} as the name says, found"
            f" {magic or 'other'} data"
        )
    return _open_text(path, suffix, compression, f"{suffix}{compressed or ''}", limit)


def _open_text(
    path: Path, suffix: str, compression: str | None, full_suffix: str, limit: int
) -> TextReader:
    try:
        start = next(read_chunks(path, compression), b"")
    except DamagedError as error:
        raise UserError(f"{path}: not one byte can be decompressed: {error}") from None
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: expected UTF-8, found UTF-16; convert it first")
    bom = BOM if start.startswith(BOM) else b""
    start = start.removeprefix(BOM).lstrip()
    if not start:
        raise UserError(f"{path}: the file is empty")
    reader = TextReader((path,), FORMATS[suffix], compression, full_suffix, limit)
    if suffix == ".csv":
        lines = split_lines(without_bom(read_chunks(path, compression)), limit)
        fields, header = csv_header(path, next(split_csv(lines, limit), None))
        return replace(reader, fields=fields, header=bom + header)
    # Many ".json" files hold one object a line, so the first byte decides.
    if start.startswith(b"["):
        return replace(reader, format="json")
    if suffix == ".json" and start.split(b"\n", 1)[0].strip() == b"{":
        raise UserError(f"{path}: expected an array of objects or one a line, found one object")
    return replace(reader, format="jsonl")
