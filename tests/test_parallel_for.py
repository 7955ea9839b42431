"""Threads of one call: what happens where the machine has no memory for another one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from robustft import _core

CSRC = Path(__file__).parent.parent / "csrc"
PROGRAM = r"""
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "parallel_for.hpp"

thread_local int left = -1;  // allocations before memory runs out; -1: it does not

void* operator new(std::size_t size) {
    if (left == 0) throw std::bad_alloc();
    if (left > 0) --left;
    return std::malloc(size);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
    for (int enough = 1; enough < 6; ++enough) {
        std::atomic<int> sum{0};
        robustft::Monitor monitor;
        left = enough;
        robustft::parallel_for(1000, 8, monitor,
                               [&](std::size_t task, unsigned) { sum += static_cast<int>(task); });
        left = -1;
        std::printf("%d\n", sum.load());
    }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_threads_that_started_do_the_work_of_those_that_could_not(tmp_path: Path) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM, encoding="utf-8")
    command = ["g++", "-std=c++20", "-O1", "-pthread", f"-I{CSRC}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["499500"] * 5


def test_no_thread_is_one() -> None:
    x = np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32)
    index = _core.CosineIndex(8, "float32", "")
    index.append(x, None, 0, None)
    none, one = (
        (
            *_core.token_stats(x[None], None, 1.0, 0.0, -100, threads),
            *index.search(x, "float32", 3, None, None, -2.0, threads, "auto", None)[:2],
        )
        for threads in (0, 1)
    )
    for a, b in zip(none, one, strict=True):
        np.testing.assert_array_equal(a, b)
