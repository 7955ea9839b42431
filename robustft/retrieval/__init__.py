"""Exact cosine k-nearest neighbours: which training questions are most like this one (eq. 4).

The answer is that of an fp64 brute force, in ids and in order, on every machine: ties go to the
lower id, whatever the number of threads, the batch or the instruction set.
"""

from __future__ import annotations

import math
import mmap
import operator
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustft import _core
from robustft.retrieval import _file

if TYPE_CHECKING:
    import torch

Embeddings: TypeAlias = "ArrayLike | torch.Tensor"
Progress: TypeAlias = Callable[[int, int], object]

Found: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]

_FIRST_TAIL = 1024  # rows of the first buffer `add` copies into; later ones double
_LARGEST_TAIL = 1 << 16
_MOST = 2**31 - 1  # neighbours, or threads


class NeighbourIndex(Protocol):
    """What `clean` asks of a retriever; see `CosineKNN` for what comes back."""

    def search(
        self, queries: NDArray[np.float32], k: int, *, allowed: NDArray[np.bool_] | None = None
    ) -> Found:
        """Ids and cosines [Q, k] of the nearest rows, those `allowed` [N] only."""
        ...


class CosineKNN:
    """Exact cosine kNN over rows that stay where they are.

    The cosine of x and y is `dot(x, y) * (1/|x| * 1/|y|)` in fp64, elements summed in one fixed
    order; a zero vector has cosine 0 with everything. PyTorch equivalent, without the promise on
    order and ties: `(F.normalize(queries) @ F.normalize(embeddings).T).topk(k)`.

    Args:
        embeddings: [N, d] float16, bfloat16, float32 or float64, numpy or torch; N may be 0. Rows
            whose elements are contiguous are used in place (read-only memory maps too) and must
            not change while the index lives; anything else is copied.
        ids: [N] integers >= 0 that name the rows; their positions when None. Rows may share an
            id: `exclude` then leaves out all of them.
        threads: workers of each call; None for one per core this process may use.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: a wrong shape, or a row with NaN or infinity (its number is named). float64
            rows must be zero or have their largest magnitude within 1e-140 ... 1e140.

    One index may be searched from several Python threads at once; `add` waits for them.
    """

    def __init__(
        self, embeddings: Embeddings, *, ids: ArrayLike | None = None, threads: int | None = None
    ) -> None:
        rows, dtype = _as_rows(embeddings, "embeddings")
        self._setup(rows.shape[1], dtype, threads)
        self._append(rows, None if ids is None else _as_ids(ids, len(rows)))

    def _setup(self, dim: int, dtype: str, threads: int | None) -> None:
        if dim < 1:
            raise ValueError(f"embeddings must have at least one column, got {dim}")
        self._threads = (
            _core.hardware_threads() if threads is None else _positive(threads, "threads")
        )
        self._dim = dim
        self._dtype = dtype
        self._lock = threading.Lock()  # `add` and whatever reads rows with their ids
        self._named = False  # whether rows carry ids of their own
        self._core = _core.CosineIndex(dim, dtype, "")
        self._tier = "auto"
        self._tail: NDArray[Any] | None = None  # where `add` puts its copies
        self._tail_used = 0
        self._parts: list[NDArray[Any]] = []  # every row, in order

    def __len__(self) -> int:
        """Return the number of rows, N."""
        return len(self._core)

    @property
    def dim(self) -> int:
        """Columns of every row, d."""
        return self._dim

    @property
    def dtype(self) -> str:
        """The rows' dtype: "float16", "bfloat16", "float32" or "float64"."""
        return self._dtype

    @property
    def ids(self) -> NDArray[np.int64]:
        """[N] the rows' ids (a copy)."""
        return self._core.ids() if self._named else np.arange(len(self), dtype=np.int64)

    @property
    def extra_bytes(self) -> int:
        """Bytes held on top of the rows themselves."""
        tail = 0 if self._tail is None else self._tail[self._tail_used :].nbytes
        return self._core.extra_bytes + tail

    def search(
        self,
        queries: Embeddings,
        k: int,
        *,
        exclude: ArrayLike | None = None,
        threshold: float | None = None,
        allowed: ArrayLike | Iterable[int] | None = None,
        progress: Progress | None = None,
    ) -> Found:
        """Find the k rows of highest cosine for each query.

        Args:
            queries: [Q, d] in any of the supported dtypes, not necessarily that of the rows.
            k: neighbours per query, in [1, 2**31 - 1]; may exceed N.
            exclude: [Q] one id per query to leave out (the query itself, say); -1 for none.
            threshold: only neighbours whose cosine is above it.
            allowed: the rows to look at: [N] booleans, or a list of ids.
            progress: called as `progress(done, total)` in query-row pairs, a few times a second.

        Returns:
            ids int64 [Q, k] and cosines float32 [Q, k], best first, ties by lower id. With fewer
            than k neighbours the rest of the row is id -1 and cosine NaN.

        Raises:
            TypeError: an unsupported dtype, or a k that is no whole number.
            ValueError: a wrong shape or value, or a query with NaN or infinity.
            KeyboardInterrupt: on Ctrl-C, within a fraction of a second.
        """
        rows, dtype = _as_rows(queries, "queries")
        bits = None if allowed is None else self._bitmap(allowed)
        ids, cosines, _ = self._search(rows, dtype, k, exclude, threshold, bits, progress)
        return ids, cosines

    def self_search(
        self,
        k: int,
        *,
        threshold: float | None = None,
        allowed: ArrayLike | Iterable[int] | None = None,
        progress: Progress | None = None,
    ) -> Found:
        """Search every row among all others: `search(rows, k, exclude=ids)`, [N, k] each.

        N is the number of rows at the start; those added meanwhile may be among the neighbours.
        """
        with self._lock:
            ids, parts = self.ids, list(self._parts)
            bits = None if allowed is None else self._bitmap(allowed)
        found = []
        start = 0
        for part in parts:
            own = ids[start : start + len(part)]
            start += len(part)
            found.append(self._search(part, self._dtype, k, own, threshold, bits, progress)[:2])
        if len(found) == 1:
            return found[0]
        if not found:
            _positive(k, "k")
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        return (
            np.concatenate([ids for ids, _ in found]),
            np.concatenate([cosines for _, cosines in found]),
        )

    def add(
        self, embeddings: Embeddings, *, ids: ArrayLike | None = None, copy: bool = True
    ) -> None:
        """Append rows [M, d] of the index's dtype, in amortised constant time a row.

        `ids` [M] must be given if and only if the index was built with ids. With `copy=False` the
        rows are used in place, as those the index was built with; meant for few and large parts.
        Raises TypeError where the dtype differs from the index's, ValueError where the width does,
        a row is not finite, or ids are missing or not wanted; nothing is added then.
        """
        rows, dtype = _as_rows(embeddings, "embeddings")
        if dtype != self._dtype:
            raise TypeError(f"embeddings must be {self._dtype} like the index, got {dtype}")
        if rows.shape[1] != self._dim:
            raise ValueError(f"embeddings must be [M, {self._dim}], got {list(rows.shape)}")
        names = None if ids is None else _as_ids(ids, len(rows))
        with self._lock:
            if (len(self) or self._named) and (names is not None) != self._named:
                expected = "must" if self._named else "must not"
                raise ValueError(f"ids {expected} be given: the index was built that way")
            self._core.check(rows, self._threads)  # all first: none is added if one is bad
            if not copy:
                self._tail = None
                self._append(rows, names)
                return
            done = 0
            while done < len(rows):
                if self._tail is None or self._tail_used == len(self._tail):
                    capacity = _FIRST_TAIL if self._tail is None else 2 * len(self._tail)
                    capacity = max(min(capacity, _LARGEST_TAIL), len(rows) - done)
                    self._tail = np.empty((capacity, self._dim), rows.dtype)
                    self._tail_used = 0
                count = min(len(rows) - done, len(self._tail) - self._tail_used)
                end = self._tail_used + count
                part = self._tail[self._tail_used : end]
                part[:] = rows[done : done + count]
                self._append(part, None if names is None else names[done : done + count])
                if self._tail_used:  # one part a buffer, however many calls fill it
                    del self._parts[-1]
                    self._parts[-1] = self._tail[:end]
                self._tail_used = end
                done += count

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index, rows included, to one file (format: `robustft/retrieval/_file.py`).

        The file appears under its name only when it is complete.
        """
        with self._lock:
            _file.write(
                Path(path),
                dim=self._dim,
                dtype=self._dtype,
                rows=self._parts,
                blocks=self._core.blocks(),
                ids=self._core.ids() if self._named else None,
            )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, threads: int | None = None, verify: bool = True
    ) -> CosineKNN:
        """Open a file that `save` wrote; its rows stay on disk, mapped into memory.

        `verify=False` skips the checksums of the sections, and with them one read of the file.

        Raises:
            UserError: the file is not such a file, is cut short, or fails its checksum.
        """
        content = _file.read(Path(path), verify=verify)
        index = cls.__new__(cls)
        index._setup(content.dim, content.dtype, threads)
        if content.rows.size:
            index._core.attach(content.rows, content.ids, content.blocks)
            index._parts.append(content.rows)
        index._named = content.ids is not None
        return index

    def _append(self, rows: NDArray[Any], ids: NDArray[np.int64] | None) -> None:
        self._core.append(rows, ids, self._threads, _page_release(rows))
        self._named = self._named or ids is not None
        self._parts.append(rows)

    def _search(
        self,
        rows: NDArray[Any],
        dtype: str,
        k: int,
        exclude: ArrayLike | None,
        threshold: float | None,
        allowed: NDArray[np.uint64] | None,
        progress: Progress | None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], dict[str, int]]:
        if rows.shape[1] != self._dim:
            raise ValueError(f"queries must be [Q, {self._dim}], got {list(rows.shape)}")
        k = _positive(k, "k")
        floor = -math.inf if threshold is None else float(threshold)
        if math.isnan(floor):
            raise ValueError("threshold must be a number, got nan")
        total = len(rows) * len(self)
        found = self._core.search(
            rows,
            dtype,
            k,
            None if exclude is None else _as_ids(exclude, len(rows), "exclude", lowest=-1),
            allowed,
            floor,
            self._threads,
            self._tier,
            None if progress is None else lambda done: progress(min(done, total), total),
        )
        if progress is not None:
            progress(total, total)
        return found

    def _bitmap(self, allowed: ArrayLike | Iterable[int]) -> NDArray[np.uint64]:
        """One bit per row, row i at bit i % 64 of word i // 64.

        Rows that are added later have none, and are not allowed.
        """
        count = len(self)
        chosen = np.asarray(allowed if hasattr(allowed, "__array__") else list(allowed))  # type: ignore[arg-type]
        if chosen.dtype == np.bool_:
            if chosen.shape != (count,):
                raise ValueError(f"allowed must be [{count}] booleans, got {chosen.shape}")
            mask = chosen
        else:
            wanted = _as_ids(chosen, chosen.size, "allowed")
            if self._named:
                known = self._core.ids()
                mask = np.isin(known, wanted)
                unknown = wanted[~np.isin(wanted, known)]
            else:
                mask = np.zeros(count, np.bool_)
                mask[wanted[wanted < count]] = True
                unknown = wanted[wanted >= count]
            if unknown.size:
                raise ValueError(f"allowed must hold ids of the index, got {unknown[0]}")
        packed = np.zeros((mask.size + 63) // 64 * 8, np.uint8)
        bits = np.packbits(mask, bitorder="little")
        packed[: bits.size] = bits
        return packed.view(np.uint64)


def _page_release(rows: NDArray[Any]) -> Callable[[int], None] | None:
    """For rows in a mapped file: gives back, while they are read, the pages that were.

    Each row is read once to quantise it. Without this the whole file would count as resident.
    """
    owner: Any = rows
    while not isinstance(owner, np.memmap):
        if owner is None:
            return None
        owner = getattr(owner, "base", None)
    pages: Any = getattr(owner, "_mmap", None)
    if pages is None or owner.mode not in ("r", "r+") or not hasattr(mmap, "MADV_DONTNEED"):
        return None  # a private copy ("c") would lose what was written to it
    advice = mmap.MADV_DONTNEED
    return lambda done: pages.madvise(advice)


def _positive(value: int, name: str) -> int:
    try:
        number = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if not 1 <= number <= _MOST:
        raise ValueError(f"{name} must be in [1, {_MOST}], got {number}")
    return number


def _as_ids(
    value: ArrayLike, count: int, name: str = "ids", *, lowest: int = 0
) -> NDArray[np.int64]:
    array = np.asarray(value)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.shape != (count,):
        raise ValueError(f"{name} must be [{count}], got {list(array.shape)}")
    ids = np.ascontiguousarray(array, np.int64)
    if ids.size and (ids.min() < lowest or (array.dtype.kind == "u" and array.max() > 2**63 - 1)):
        raise ValueError(f"{name} must be >= {lowest} and fit int64, got {array[ids < lowest][0]}")
    return ids


def _as_rows(value: Embeddings, name: str) -> tuple[NDArray[Any], str]:
    """Any supported matrix as (storage [rows, d], dtype name); bfloat16 is stored as uint16."""
    dtype = ""
    if type(value).__module__.partition(".")[0] == "torch":
        tensor: Any = value.detach().cpu()  # type: ignore[union-attr]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype == "bfloat16":
            import torch

            tensor = tensor.view(torch.uint16)
        array = tensor.numpy()
    else:
        array = np.asarray(value)
    dtype = dtype or array.dtype.name
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must be a matrix [rows, d], got shape {list(array.shape)}")
    if dtype == "bfloat16":
        array = array.view(np.uint16)
    contiguous_rows = array.shape[1] <= 1 or array.strides[1] == array.itemsize
    if not (contiguous_rows and array.flags.aligned and array.dtype.isnative):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return array, dtype
