"""Inputs and outputs on other file systems (s3://, gs://, hf://, https://, …), through fsspec.

A remote input is copied to the cache once, and read from there: a run reads its input several times
and wants the same bytes each time. A remote --out is a folder of this machine while the run is at
work, which is what a killed run resumes from; its finished files are copied at the end, unless they
would land on the input or on files that did not come from that folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustft.errors import UserError
from robustft.files import not_ours, replacing, write_atomically
from robustft.models import cache_dir
from robustft.outputs import ANSWERS, MANIFEST, is_output
from robustft.progress import Progress

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+", re.ASCII)
_BLOCK = 4 << 20
_VALIDATORS = ("ETag", "Content-MD5", "Digest", "Last-Modified")  # of a web server's file
_FETCHED: set[Path] = set()  # by this process
_SENT = ".sent"  # names of the files that were copied, or were about to be
# Beginnings of working files' names.
_STAYS = ("run.sqlite", ANSWERS, "embeddings.f32", "input-", ".")


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
    # The key of a web page is its address alone.
    marks = [str(info[name]) for name in _VALIDATORS if info.get(name)]
    unmarked = url.startswith(("http://", "https://")) and not marks
    if info.get("type") == "directory":
        raise UserError(f"{url}: is a folder; remote inputs are single files")
    name = Path(path.partition("?")[0]).name
    target = _place("in", " ".join([version, *marks])) / name
    if not target.exists() or (unmarked and target not in _FETCHED):
        progress = Progress(f"fetch {name}", info.get("size"), unit="bytes")
        with replacing(target) as temporary, temporary.open("wb") as file, progress:
            for block in _blocks(system, path, url):
                file.write(block)
                progress.update(len(block))
    _FETCHED.add(target)
    return target


@contextlib.contextmanager
def output_folder(
    out: str | Path, data: object = None, *, exchange: bool = False, writes: bool = True
) -> Iterator[Path]:
    """The folder to write to: `out`, or where that is remote, one whose files are copied there.

    They are copied when the block ends well, if it `writes` any. Raises UserError, before the block
    where that can be known, where they cannot be, or would replace `data`, the input, or files of
    somebody else's; `exchange`: with `--dataset-info`.
    """
    url = str(out)
    if not is_remote(url):
        yield Path(out)
        return
    system, path = _opened(url)
    folder = _place("out", url)
    target = _Target(url.rstrip("/"), system, _real(system, path), folder)
    if isinstance(data, str | Path):
        target.spare_input(str(data), exchange=exchange)
    target.spare_others(lambda name: is_output(name, exchange=exchange))
    if not writes:
        yield folder
        return
    target.try_writing()
    print(f"robustft: {url}: at work in {folder}", file=sys.stderr)
    yield folder
    target.receive()
    print(f"robustft: {url}: holds the files now", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Target:
    """A remote output folder and the folder of this machine whose files it gets."""

    url: str
    system: Any
    path: str
    folder: Path

    def spare_input(self, data: str, *, exchange: bool) -> None:
        """Raise UserError where outputs would land on the input or among its files."""
        system, path = _opened(data)
        path = _real(system, path)
        parent, _, name = path.rpartition("/")
        if system == self.system and f"{self.path}/".startswith(f"{path}/"):
            raise UserError(f"{self.url}: lies in the input folder; choose another --out")
        if system == self.system and parent == self.path and is_output(name, exchange=exchange):
            raise UserError(f"{data}: would be overwritten; choose another --out")

    def spare_others(self, taken: Callable[[str], bool]) -> None:
        """Raise UserError where a file is `taken` by name and did not come from `folder`."""
        with _telling(self.url):
            self.system.invalidate_cache()
            there = self.system.exists(self.path)
            found = self.system.ls(self.path, detail=True) if there else []
        sent = self._sent()
        for entry in found:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            full = entry["type"] == "directory" or entry["size"]
            if full and taken(name) and name not in sent:
                raise not_ours(f"{self.url}/{name}")

    def try_writing(self) -> None:
        """Raise UserError where nothing can be written: after hours of work it would be late."""
        probe = f"{self.path}/.robustft"
        with _telling(self.url):
            self.system.makedirs(self.path, exist_ok=True)
            self.system.pipe_file(probe, b"robustft")
        with contextlib.suppress(Exception):  # some may write and not delete
            self.system.rm_file(probe)

    def receive(self) -> None:
        """Copy what is finished; the manifest comes last."""
        files = sorted(
            (one for one in self.folder.iterdir() if one.is_file() and _leaves(one.name)),
            key=lambda file: (file.name == MANIFEST, file.name),
        )
        names = {file.name for file in files}
        self.spare_others(names.__contains__)
        # Before the first one is copied: what a broken copy leaves there is this folder's.
        write_atomically(self.folder / _SENT, "\n".join(sorted(self._sent() | names)))
        with _telling(self.url), Progress("copy", len(files), unit="files") as progress:
            for file in files:
                self.system.put_file(str(file), f"{self.path}/{file.name}")
                progress.update(1)

    def _sent(self) -> set[str]:
        path = self.folder / _SENT
        return set(path.read_text().splitlines()) if path.exists() else set()


def _leaves(name: str) -> bool:
    return not name.startswith(_STAYS)


def _real(system: Any, path: str) -> str:
    """A path without links, where the file system is this machine's, and without a last slash."""
    from fsspec.implementations.local import LocalFileSystem

    return os.path.realpath(path) if isinstance(system, LocalFileSystem) else path.rstrip("/")


def _place(kind: str, key: str) -> Path:
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    return cache_dir() / "remote" / f"{kind}-{digest}"


def _opened(url: str) -> tuple[Any, str]:
    """The file system of an address, or of a path of this machine, and the path in it."""
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
