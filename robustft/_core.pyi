"""Typed face of the native module; csrc/bindings_*.cpp is the other side."""

from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

def hardware_threads() -> int: ...
def knn_isas() -> list[str]: ...

@final
class CosineIndex:
    def __init__(self, dim: int, dtype: str, isa: str) -> None: ...
    def append(
        self,
        rows: NDArray[Any],
        ids: NDArray[np.int64] | None,
        threads: int,
        progress: Callable[[int], object] | None,
    ) -> None: ...
    def attach(
        self, rows: NDArray[Any], ids: NDArray[np.int64] | None, blocks: NDArray[np.uint8]
    ) -> None: ...
    def blocks(self) -> list[NDArray[np.uint8]]: ...
    def check(self, rows: NDArray[Any], threads: int) -> None: ...
    def search(
        self,
        queries: NDArray[Any],
        dtype: str,
        k: int,
        exclude: NDArray[np.int64] | None,
        allowed: NDArray[np.uint64] | None,
        threshold: float,
        threads: int,
        tier: str,
        progress: Callable[[int], object] | None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], dict[str, int]]: ...
    def ids(self) -> NDArray[np.int64]: ...
    @property
    def isa(self) -> str: ...
    @property
    def extra_bytes(self) -> int: ...
    def __len__(self) -> int: ...

# Logits come as [outer, inner, vocab]: float64, float32, float16, or bfloat16's bits in uint16.
def token_stats_isas() -> list[str]: ...
def token_stats(
    logits: NDArray[Any],
    targets: NDArray[np.int64] | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    threads: int,
    isa: str = "",
) -> tuple[NDArray[Any], ...]: ...
def token_stats_partials(
    logits: NDArray[Any],
    targets: NDArray[np.int64] | None,
    target_logits: NDArray[Any] | None,
    temperature: float,
    softcap: float,
    threads: int,
    isa: str = "",
) -> tuple[NDArray[Any], ...]: ...
def token_stats_accumulate(
    tile: NDArray[Any],
    targets: NDArray[np.int64] | None,
    target_logits: NDArray[Any] | None,
    first_column: int,
    temperature: float,
    softcap: float,
    threads: int,
    reals: NDArray[np.float64],  # [4, rows]: max, second, sum, weighted; updated
    counts: NDArray[np.int64],  # [2, rows]: argmax, rank; updated
    isa: str = "",
) -> None: ...
def token_stats_backward(
    logits: NDArray[Any],
    targets: NDArray[np.int64] | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    threads: int,
    gradients: tuple[NDArray[Any] | None, ...],
    forward: tuple[NDArray[Any], ...],
    argmax: NDArray[np.int64],
    out: NDArray[Any],
    isa: str = "",
) -> None: ...
def consistency_pairwise(
    tokens: NDArray[np.int32],
    start: NDArray[np.int64],
    length: NDArray[np.int64],
    metric: str,
    threads: int,
) -> NDArray[np.float32]: ...
def consistency_summarise(
    agreement: NDArray[np.float32],
    present: NDArray[np.bool_],
    weight: NDArray[np.float64] | None,
    threshold: float,
    clustering: str,
    threads: int,
) -> tuple[
    NDArray[np.float32],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.float32],
]: ...
def consistency_instruction_set() -> str: ...
def consistency_force_instruction_set(name: str) -> None: ...
