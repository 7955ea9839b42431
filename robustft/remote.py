"""Inputs and outputs on other file systems (s3://, gs://, hf://, https://, …), through fsspec.

A remote input is copied to the cache once, and read from there: a run reads its input several times
and wants the same bytes each time. A remote --out is a folder of this machine while the run is at
work, which is what a killed run resumes from; its finished files are copied at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustft.errors import UserError
from robustft.files import replacing
from robustft.models import cache_dir
from robustft.progress import Progress

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+", re.ASCII)
_BLOCK = 4 << 20
_LAST = "manifest.json"  # where it is, the rest is
_STAYS = ("run.sqlite", "embeddings.f32", "input-", ".")  # beginnings of working files' names


def is_remote(path: str) -> bool:
    """Whether a path names a file system by its scheme."""
    return _URL.fullmatch(path) is not None


def local_path(path: str) -> Path:
    """Where a path leads on this machine; file:// names its file system, other schemes none."""
    return Path(path.removeprefix("file://"))


def fetched(url: str) -> Path:
    """A copy of a remote file as it is now, in the cache.

    Raises UserError where it cannot be had.
    """
    system, path = _opened(url)
    with _telling(url):
        info = system.info(path)
        version = f"{url} {system.ukey(path)}"
    if info.get("type") == "directory":
        raise UserError(f"{url}: is a folder; remote inputs are single files")
    name = Path(path.partition("?")[0]).name
    target = _place("in", version) / name
    if not target.exists():
        progress = Progress(f"fetch {name}", info.get("size"), unit="bytes")
        with replacing(target) as temporary, temporary.open("wb") as file, progress:
            for block in _blocks(system, path, url):
                file.write(block)
                progress.update(len(block))
    return target


@contextlib.contextmanager
def output_folder(out: str | Path) -> Iterator[Path]:
    """The folder to write to: `out`, or where that is remote, one whose files are copied there.

    They are copied when the block ends well. Raises UserError where they cannot be.
    """
    url = str(out)
    if not is_remote(url):
        yield Path(out)
        return
    system, path = _opened(url)
    folder = _place("out", url)
    print(f"robustft: {url}: at work in {folder}", file=sys.stderr)
    yield folder
    files = sorted(
        (file for file in folder.iterdir() if file.is_file() and not file.name.startswith(_STAYS)),
        key=lambda file: (file.name == _LAST, file.name),
    )
    with _telling(url), Progress("copy", len(files), unit="files") as progress:
        system.makedirs(path, exist_ok=True)
        for file in files:
            system.put_file(str(file), f"{path.rstrip('/')}/{file.name}")
            progress.update(1)


def _place(kind: str, key: str) -> Path:
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    return cache_dir() / "remote" / f"{kind}-{digest}"


def _opened(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url}: remote files need fsspec; install robustft[remote]") from None
    with _telling(url):
        system, path = fsspec.core.url_to_fs(url)
    return system, path


def _blocks(system: Any, path: str, url: str) -> Iterator[bytes]:
    with _telling(url), system.open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


@contextlib.contextmanager
def _telling(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None
    except Exception as error:  # every file system has errors of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url}: {first[:300]}") from None
