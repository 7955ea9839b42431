"""Where to compute, and in which precision: what "auto" means."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from robustft.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device is {name}, but torch sees {count} CUDA devices")
    return device


def pick_dtype(name: str, device: torch.device, *, training: bool = False) -> torch.dtype:
    """The dtype of that name; "auto" is the fastest one that is accurate enough.

    On CUDA bfloat16, else float16 (for training float32: float16 gradients underflow). On a CPU
    bfloat16 where it has the instructions, else float32; for training always float32, see
    `fast_matmul`.
    """
    if name != "auto":
        chosen = getattr(torch, name)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return torch.float32 if training else torch.float16
    native = any(
        getattr(torch.cpu, probe, lambda: False)()
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return torch.bfloat16 if native and not training else torch.float32


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """Let float32 matrix products inside the block use the fastest kernels.

    On a CPU that is oneDNN instead of MKL: measured on an AMD Zen core pair, 417 against 190
    GFLOP/s and ten times the training speed beside other work, at the same error (4e-7) where
    oneDNN then computes in float32. It may round the factors to bfloat16 (Intel's AMX), and CUDA
    to TF32; sums stay float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
