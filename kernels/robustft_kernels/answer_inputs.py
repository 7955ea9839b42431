"""The forms in which answers arrive, brought to one: runs of token ids, or unit rows.

`Library` hides whether the arrays are NumPy's (for C++) or torch's (for Triton).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustft_kernels.answer_text import Unit, encode

MAX_ANSWERS = 64


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class Library:
    """NumPy, or torch on a GPU (the answers' own, if any); results go back to where they were."""

    def __init__(self, answers: Any, *, triton: bool) -> None:
        self.triton = triton
        self.tensors = is_tensor(answers)
        self.home: Any = answers.device if self.tensors else "cpu"
        self.device = self.home
        if triton:
            import torch

            self.module: Any = torch
            if torch.device(self.home).type == "cpu" and torch.cuda.is_available():
                self.device = "cuda"
        else:
            self.module = np

    def native(self, value: Any) -> Any:
        """`value` as an array of this library (copied only if it must be)."""
        if self.triton:
            return self.module.as_tensor(value, device=self.device)
        if is_tensor(value):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":
                value = value.float()
            return value.numpy()
        return np.asarray(value)

    def result(self, value: Any) -> Any:
        """An array of this library as the caller wants it."""
        if self.tensors:
            import torch

            return torch.as_tensor(value, device=self.home)
        return value.cpu().numpy() if self.triton else value

    def counting(self, stop: int) -> Any:
        """0 ... stop - 1, int64."""
        if self.triton:
            return self.module.arange(stop, device=self.device)
        return np.arange(stop, dtype=np.int64)

    def contiguous(self, value: Any) -> Any:
        """`value` in row-major memory."""
        return value.contiguous() if self.triton else np.ascontiguousarray(value)

    def cast(self, value: Any, dtype: str) -> Any:
        """`value` with the named dtype (copied only if it must be)."""
        kind = getattr(self.module, dtype)
        return value.to(kind) if self.triton else value.astype(kind, copy=False)

    def real(self, value: float) -> Any:
        """A float32 scalar (a bare Python float would widen NumPy results)."""
        return self.native(np.float32(value))


class Runs(NamedTuple):
    """Slot [n, k] holds tokens[start[n, k] : start[n, k] + length[n, k]], nothing if length < 0."""

    tokens: Any  # [T] int32
    start: Any  # [N, K] int64
    length: Any  # [N, K] int64


def runs_of(
    xp: Library,
    answers: Any,
    given: Any,
    present: Any,
    cu_seqlens: Any,
    counts: Any,
    unit: Unit,
    normaliser: Callable[[str], str] | None,
) -> Runs:
    """Answers in any form but embeddings as runs; the given ones, if any, are the last slot."""
    if isinstance(answers, (list, tuple)):
        if cu_seqlens is not None or counts is not None:
            raise TypeError("cu_seqlens and counts go with token ids, got strings")
        runs = _from_strings(xp, answers, given, unit, normaliser)
    else:
        ids = _integers(xp, "answers", answers)
        if normaliser is not None:
            raise TypeError("normaliser goes with strings, got token ids")
        if cu_seqlens is not None:
            runs = _from_packed(xp, ids, cu_seqlens, counts)
        elif counts is not None:
            raise TypeError("counts goes with cu_seqlens, got counts alone")
        else:
            runs = _from_padded(xp, "answers [N, K, L]", ids, 3)
        if given is not None:
            last = _from_padded(xp, "given [N, L]", _integers(xp, "given", given), 2)
            runs = _with_last(xp, runs, last)
    slots = runs.length.shape[1] - (given is not None)
    if slots > MAX_ANSWERS:
        raise ValueError(f"answers must be at most {MAX_ANSWERS} per question, got {slots}")
    return runs._replace(length=_masked(xp, runs.length, present, slots))


def _masked(xp: Library, length: Any, present: Any, slots: int) -> Any:
    if present is None:
        return xp.contiguous(length)
    here = checked_present(xp, present, (length.shape[0], slots))
    length = xp.contiguous(length + 0)
    length[:, :slots] = xp.module.where(here, length[:, :slots], -1)
    return length


def checked_present(xp: Library, present: Any, shape: tuple[int, int]) -> Any:
    """`present` as a bool array of the given shape."""
    here = xp.native(present)
    if here.dtype != xp.module.bool or tuple(here.shape) != shape:
        raise ValueError(
            f"present must be bool [N, K] = {shape}, got {here.dtype} {tuple(here.shape)}"
        )
    return here


def _from_strings(
    xp: Library,
    answers: Sequence[Any],
    given: Any,
    unit: Unit,
    normaliser: Callable[[str], str] | None,
) -> Runs:
    for i, row in enumerate(answers):
        if not isinstance(row, (list, tuple)):
            raise TypeError(f"answers[{i}] must be a list of strings, got {type(row).__name__}")
    rows: list[Sequence[Any]] = list(answers)
    slots = max(map(len, rows), default=0)
    if given is not None:
        is_list = isinstance(given, Sized) and not isinstance(given, str)
        found = len(given) if is_list else type(given).__name__
        if found != len(rows):
            raise ValueError(f"given must be one string per question ({len(rows)}), got {found}")
        rows = [
            [*row, *[None] * (slots - len(row)), last]
            for row, last in zip(rows, given, strict=True)
        ]
        slots += 1
    place: list[int] = []
    texts: list[str] = []
    for i, row in enumerate(rows):
        for k, text in enumerate(row):
            if isinstance(text, str):
                place.append(i * slots + k)
                texts.append(text)
            elif text is not None:
                is_given = given is not None and k == slots - 1
                name = f"given[{i}]" if is_given else f"answers[{i}][{k}]"
                raise TypeError(f"{name} must be str or None, got {type(text).__name__}")
    ids, offsets = encode(texts, unit, normaliser)
    start = np.zeros(len(rows) * slots, dtype=np.int64)
    length = np.full(len(rows) * slots, -1, dtype=np.int64)
    start[place] = offsets[:-1]
    length[place] = np.diff(offsets)
    shape = (len(rows), slots)
    return Runs(*map(xp.native, (ids, start.reshape(shape), length.reshape(shape))))


def _integers(xp: Library, name: str, value: Any) -> Any:
    """Token ids as int32; TypeError for anything but integers, ValueError beyond int32."""
    ids = xp.native(value)
    if str(ids.dtype).removeprefix("torch.") not in {
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
    }:
        raise TypeError(f"{name} must be strings or integer token ids, got {ids.dtype}")
    if str(ids.dtype).endswith(("int64", "uint32")) and 0 not in ids.shape:
        wide = xp.cast(ids, "int64") if xp.triton else ids  # torch has no min of unsigned ones
        low, high = int(wide.min()), int(wide.max())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} must hold ids within int32, got {low if low < 0 else high}")
    return xp.cast(ids, "int32")


def _from_padded(xp: Library, name: str, ids: Any, ndim: int) -> Runs:
    if ids.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(ids.shape)}")
    if ndim == 2:
        ids = ids[:, None, :]
    questions, slots, width = ids.shape
    real = ids >= 0
    length = real.sum(axis=-1)
    if not bool((real == (xp.counting(width) < length[..., None])).all()):
        raise ValueError(f"{name} must have negative ids only as padding after an answer")
    start = xp.counting(questions * slots).reshape(questions, slots) * width
    return Runs(xp.contiguous(ids).reshape(-1), start, xp.cast(length, "int64"))


def _from_packed(xp: Library, ids: Any, cu_seqlens: Any, counts: Any) -> Runs:
    bounds = _host_integers("cu_seqlens", cu_seqlens)
    if ids.ndim != 1 or bounds.ndim != 1 or not len(bounds):
        raise ValueError(
            f"with cu_seqlens, answers must be [T] and cu_seqlens [M + 1], got "
            f"{tuple(ids.shape)} and {bounds.shape}"
        )
    if bounds[0] != 0 or bounds[-1] != len(ids) or (np.diff(bounds) < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to T = {len(ids)}, got {bounds}")
    # The Triton kernel tells what lies beyond an answer by negative ids.
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(f"answers must be ids >= 0 with cu_seqlens, got {int(ids.min())}")
    if counts is None:
        raise TypeError("counts (answers per question) must be given with cu_seqlens, got None")
    total = len(bounds) - 1
    per_question = _host_integers("counts", counts)
    if per_question.ndim == 0:
        if per_question < 1 or total % per_question:
            raise ValueError(f"counts must divide the {total} answers, got {counts}")
        per_question = np.full(total // per_question, per_question)
    if per_question.ndim != 1 or (per_question < 0).any() or per_question.sum() != total:
        raise ValueError(f"counts must be [N], not negative, with sum {total}, got {per_question}")
    slots = int(per_question.max(initial=0))
    here = np.arange(slots) < per_question[:, None]
    start = np.zeros(here.shape, dtype=np.int64)
    length = np.full(here.shape, -1, dtype=np.int64)
    start[here] = bounds[:-1]
    length[here] = np.diff(bounds)
    return Runs(xp.contiguous(ids), xp.native(start), xp.native(length))


def _host_integers(name: str, value: Any) -> NDArray[np.int64]:
    """Bounds or counts as a NumPy array; TypeError for anything but integers."""
    array = Library(None, triton=False).native(value)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    whole: NDArray[np.int64] = array.astype(np.int64)
    return whole


def _with_last(xp: Library, runs: Runs, last: Runs) -> Runs:
    if len(last.length) != len(runs.length):
        raise ValueError(f"given must have N = {len(runs.length)} rows, got {len(last.length)}")
    join = xp.module.concatenate
    return Runs(
        join([runs.tokens, last.tokens]),
        join([runs.start, last.start + len(runs.tokens)], axis=1),
        join([runs.length, last.length], axis=1),
    )


def unit_rows(xp: Library, answers: Any, given: Any, present: Any) -> tuple[Any, Any]:
    """Embeddings as unit rows [N, K, D] float32 and who is present [N, K]; given ones come last."""
    rows = _embeddings(xp, "answers", answers, 3)
    if rows.shape[1] > MAX_ANSWERS:
        raise ValueError(f"answers must be at most {MAX_ANSWERS} per question, got {rows.shape[1]}")
    here = xp.module.full(rows.shape[:2], True)
    here = xp.native(here)
    if present is not None:
        here = checked_present(xp, present, tuple(rows.shape[:2]))
        rows = xp.module.where(here[..., None], rows, xp.real(0.0))
    _check_finite(xp, "answers", rows)
    if given is not None:
        last = _embeddings(xp, "given", given, 2)
        if last.shape != (rows.shape[0], rows.shape[2]):
            raise ValueError(
                f"given must be [N, D] = {(rows.shape[0], rows.shape[2])}, got {tuple(last.shape)}"
            )
        _check_finite(xp, "given", last)
        rows = xp.module.concatenate([rows, last[:, None, :]], axis=1)
        here = xp.module.concatenate([here, xp.module.ones_like(here[:, :1])], axis=1)
    if rows.shape[2]:
        # Scaling by the largest element first keeps the squares, and float64, within range.
        largest = xp.module.amax(abs(rows), axis=2)[..., None]
        rows = xp.cast(rows / xp.module.where(largest > 0, largest, xp.real(1.0)), "float32")
        norm = (rows * rows).sum(axis=2)[..., None] ** 0.5
        rows = rows / xp.module.where(norm > 0, norm, xp.real(1.0))
    return rows, here


def _embeddings(xp: Library, name: str, value: Any, ndim: int) -> Any:
    if isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be floating embeddings for metric='cosine', got a list")
    rows = xp.native(value)
    if "float" not in str(rows.dtype):
        raise TypeError(f"{name} must be floating embeddings for metric='cosine', got {rows.dtype}")
    if rows.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(rows.shape)}")
    return rows if "float64" in str(rows.dtype) else xp.cast(rows, "float32")


def _check_finite(xp: Library, name: str, rows: Any) -> None:
    if not bool(xp.module.isfinite(rows).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
