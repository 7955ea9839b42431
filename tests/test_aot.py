"""The Triton kernels compiled for GPUs that are not here: spills, shared memory, load widths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("aot_compile.py")
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}


def compiled(arch: str, *flags: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), arch, *flags],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(arch: str, kernels: dict[str, Any]) -> None:
    for name, facts in kernels.items():
        # The fused kernel may set its thread's number aside, once, while its loops run.
        assert facts["spills"] <= (5 if name.startswith("linear") else 0), (name, facts)
        assert facts["shared"] <= SHARED_LIMIT[arch], (name, facts)
        instructions = facts["instructions"]
        # V is not known to be a multiple of anything, so these are the kernels for odd V.
        loads = {i: n for i, n in instructions.items() if "_load_" in i or i.startswith("LDG")}
        wide = sum(n for i, n in loads.items() if i.endswith((".128", "dwordx4")))
        narrow = sum(loads.values()) - wide
        if name.startswith("logits"):
            # Narrow: the target's id and logit, and the one group around the maximum.
            assert wide >= 2, (name, instructions)
            assert narrow <= 3, (name, instructions)
            # A tile stays within a thread, and 24 warps or more fit a multiprocessor.
            assert set(facts.get("shuffles", [0])) == {0}, (name, facts)
            assert facts["registers"] <= 80, (name, facts)
        if name.startswith("backward"):
            # Narrow: eight numbers of the row, the logits of the target and the maximum.
            assert wide >= 1, (name, instructions)
            assert narrow <= 10, (name, instructions)
            assert {"STG.E.128", "global_store_dwordx4"} & set(instructions), (name, instructions)
        if name.startswith("linear"):
            matrix = sum(n for i, n in instructions.items() if i.startswith(MATRIX[arch]))
            assert matrix >= 4, (name, instructions)
        if name.startswith("linear bf16") and arch in ("sm_90", "sm_100"):
            assert instructions.get("UTMALDG", 0) >= 2, (name, instructions)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_main_kernels(arch: str) -> None:
    check(arch, compiled(arch))


def test_no_batch_compiles_again() -> None:
    """A compilation stalls the launch; numbers of rows and strides differ from batch to batch."""
    made = compiled("sm_90", "--compilations")
    assert set(made.values()) == {1}, made


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel(arch: str) -> None:
    check(arch, compiled(arch, "--all"))
