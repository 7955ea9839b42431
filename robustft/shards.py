"""Shards: whole units of the input, each worked on in a folder of its own, and what they publish.

A phase publishes its arrays as a folder that is there in full or not at all: written beside its
place, brought to the disk, renamed. Whoever comes second finds the first one's and keeps that, so
several processes on a shared file system need no coordinator.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from robustft.errors import UserError
from robustft.store import UNIT_ROWS

_FACTS = "facts.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """Records [start, stop) of the input, shard `number` of `of`, and the folder it works in."""

    number: int
    of: int
    start: int
    stop: int
    folder: Path

    @property
    def rows(self) -> int:
        """How many records it holds."""
        return self.stop - self.start

    @property
    def units(self) -> range:
        """Numbers of its units."""
        return range(self.start // UNIT_ROWS, -(-self.stop // UNIT_ROWS))

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.number}/{self.of}"

    def phase(self, name: str) -> Path:
        """Where a phase publishes."""
        return self.folder / "phases" / name


def split(total: int, count: int, out: Path, content_hash: str) -> list[Shard]:
    """The records of an input in `count` shards of whole units, in order.

    Folders are named by row range and content, so that none is ever taken for another. With more
    shards than units some are empty.
    """
    units = -(-total // UNIT_ROWS)
    edges = [min(units * number // count * UNIT_ROWS, total) for number in range(count)] + [total]
    shards = []
    for number in range(count):
        start, stop = edges[number], edges[number + 1]
        name = f"rows-{start:010}-{stop:010}-{content_hash[:12]}"
        shards.append(Shard(number, count, start, stop, out / "shards" / name))
    return shards


def plan_folder(out: Path) -> Path:
    """Where the shards of an output folder find what they are parts of."""
    return out / "shards" / "plan"


def conclusion_folder(out: Path) -> Path:
    """Where the split of the whole corpus is published."""
    return out / "phases" / "conclusion"


def first_conclusion(conclusion: Path) -> Path:
    """Where, beside a conclusion, the one is published that the fine-tuned experts learn from."""
    return conclusion.with_name("first-conclusion")


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Make what the block writes appear as `folder`, unless it is there already by then.

    Yields a temporary folder to write to and a mapping to fill with facts (JSON). Raises UserError
    where they cannot be written.
    """
    temporary = _temporary(folder)
    facts: dict[str, Any] = {}
    try:
        temporary.mkdir(parents=True)
        yield temporary, facts
        (temporary / _FACTS).write_bytes(orjson.dumps(facts))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        _sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    """A name beside `folder` that nobody else has."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")


def publish(
    folder: Path, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any] | None = None
) -> None:
    """Make arrays and facts appear as `folder`; see `publishing`."""
    with publishing(folder) as (temporary, told):
        told.update(facts or {})
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)


def withdraw(folder: Path) -> None:
    """Remove what was published as `folder`, if it was. Raises UserError where it stays.

    It goes at once: nobody finds a part of it, even where this process is killed meanwhile.
    """
    try:
        if folder.is_dir():
            shutil.rmtree(folder.rename(_temporary(folder)))
    except OSError as error:
        raise UserError(f"{folder}: cannot be removed: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    """Bring a file or a folder's list of files to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Published:
    """What a phase has published; arrays are mapped when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The JSON facts."""
        with self._telling():
            found: dict[str, Any] = orjson.loads((self.folder / _FACTS).read_bytes())
        return found

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").exists()

    def __getitem__(self, name: str) -> NDArray[Any]:
        with self._telling():
            path = self.folder / f"{name}.npy"
            # As a plain array: every look into a memmap object costs a microsecond more.
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array by name."""
        return {path.stem: self[path.stem] for path in sorted(self.folder.glob("*.npy"))}

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder}: cannot be read ({error}); delete it and run the same command again"
            ) from error
