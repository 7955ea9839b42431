"""The GPU kernels: under the interpreter against the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from robustft_kernels import answer_consistency

ON_GPU = torch.cuda.is_available()
if not ON_GPU and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
pytest.importorskip("triton")
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

METRICS = ("exact", "token_f1", "lcs", "edit")


def ragged(seed: int, shape: tuple[int, int, int], vocabulary: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, shape)
    copies = rng.random((*shape[:2], 1)) < 0.5
    ids = np.where(copies & (rng.random(shape) < 0.8), ids[:, :1], ids)
    length = rng.integers(0, shape[2] + 1, shape[:2])
    length[0, 0] = shape[2]
    return np.where(np.arange(shape[2]) < length[..., None], ids, -1)


def assert_same(answers: object, **options: object) -> None:
    cpu = answer_consistency(answers, backend="cpu", **options)
    gpu = answer_consistency(answers, backend="triton", **options)
    for field in cpu.__slots__:
        one, two = getattr(cpu, field), getattr(gpu, field)
        if one is None:
            assert two is None
        elif field in ("agreement", "cluster", "majority", "given_agreement"):
            np.testing.assert_array_equal(one, two, err_msg=field)
        else:
            np.testing.assert_allclose(one, two, atol=2e-6, err_msg=field)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(2, 1, 4), (5, 3, 9), (2, 5, 33), (1, 3, 64), (1, 2, 70)])
def test_equals_the_cpu_path(metric: str, shape: tuple[int, int, int]) -> None:
    assert_same(ragged(shape[2], shape), metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_two_word_boundaries(metric: str) -> None:
    assert_same(ragged(1, (1, 2, 130), vocabulary=2), metric=metric)


def test_many_answers() -> None:
    assert_same(ragged(2, (1, 33, 3)), metric="token_f1")


@pytest.mark.parametrize("clustering", ["components", "greedy"])
def test_votes_weights_absent_and_given(clustering: str) -> None:
    rng = np.random.default_rng(3)
    ids = ragged(3, (6, 7, 4))
    present = rng.random((6, 7)) < 0.7
    present[0] = False
    weights = rng.normal(0, 5, (6, 7))
    weights[1] = -np.inf
    assert_same(ids, metric="token_f1", clustering=clustering, present=present,
                log_weights=weights, given=ids[:, 0])  # fmt: skip


@pytest.mark.parametrize(
    ("votes", "weights", "majority"),
    [
        ("xy", [1.0, 1.0 + 1e-9], 1),
        ("xy", [1.0 - 1e-9, 1.0], 1),
        ("xy", [1.0, 1.0], 0),
        # 0.1 + 0.2 > 0.3 in float64, in whichever order.
        ("xxy", [0.1, 0.2, 0.3], 0),
        ("yxx", [0.3, 0.1, 0.2], 1),
        # A sum depends on its order: 0.1 + 0.2 + 0.3 > 0.6 = 0.3 + 0.2 + 0.1.
        ("xxxy", [0.1, 0.2, 0.3, 0.6], 0),
        ("yxxx", [0.6, 0.1, 0.2, 0.3], 1),
        ("yxxx", [0.6, 0.3, 0.2, 0.1], 0),
        ("x", [0.0], -1),
    ],
)
def test_the_heaviest_cluster_by_the_last_bit(
    votes: str, weights: list[float], majority: int
) -> None:
    from robustft import _core
    from robustft_kernels import answer_consistency_triton

    same = np.equal.outer(list(votes), list(votes)).astype(np.float32)[None]
    here, given = np.ones((1, len(votes)), np.bool_), np.array([weights])
    cpu = _core.consistency_summarise(same, here, given, 0.5, "components", 1)
    tensors = [torch.from_numpy(x).to("cuda" if ON_GPU else "cpu") for x in (same, here, given)]
    gpu = answer_consistency_triton.summarise(*tensors, 0.5, "components")
    assert int(cpu[2][0]) == int(gpu[2][0]) == majority


def test_strings_packed_and_cosine() -> None:
    assert_same([["a b", "b a", None], ["x"], []], metric="token_f1", given=["a", "x", "y"])
    assert_same(np.arange(7) % 3, cu_seqlens=[0, 2, 2, 5, 7], counts=[3, 1], metric="lcs")
    rows = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    one = answer_consistency(rows, metric="cosine", backend="cpu")
    two = answer_consistency(rows, metric="cosine", backend="triton")
    torch.testing.assert_close(one.agreement, two.agreement, atol=1e-6, rtol=0)
    assert answer_consistency([], backend="triton").agreement.shape == (0, 0, 0)


def test_a_long_chain_is_one_component() -> None:
    ids = np.stack([np.arange(12), np.arange(12) + 1], axis=1)[None]
    assert_same(ids, metric="token_f1")


def test_carries_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustft_kernels import answer_consistency_triton

    monkeypatch.setattr(answer_consistency_triton, "_CARRY_BYTES", 1)
    assert_same(ragged(4, (3, 9, 66), vocabulary=3), metric="lcs")


def test_kernels_run_on_the_device_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, whose memory that of another need not be."""
    from robustft_kernels import answer_consistency_triton

    current: list[torch.device] = []
    launched = []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class Launches:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **options: launched.append(list(current))

    monkeypatch.setattr(answer_consistency_triton, "on", on, raising=False)
    for kernel in ("pairwise_kernel", "summarise_kernel"):
        monkeypatch.setattr(answer_consistency_triton, kernel, Launches())
    answer_consistency(torch.zeros(2, 3, 1, dtype=torch.int32), backend="triton")
    assert launched == [[torch.device("cpu")]] * 2


def many_pairs(monkeypatch: pytest.MonkeyPatch, total: int, width: int) -> None:
    from robustft_kernels import answer_consistency_triton

    if not ON_GPU:  # the interpreter pays per operation, however many lanes it has
        monkeypatch.setattr(answer_consistency_triton, "WARP", 4096)
    for metric in METRICS:
        assert_same(ragged(6, (total // 120, 16, width), vocabulary=9), metric=metric)


def test_thousands_of_pairs_equal_the_cpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    many_pairs(monkeypatch, 6_000, 10)


@pytest.mark.slow
def test_a_million_pairs_equal_the_cpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    many_pairs(monkeypatch, 1_000_000, 20)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_on_the_gpu_at_size() -> None:
    for metric in METRICS:
        for shape in ((4_000, 16, 64), (500, 64, 200)):
            ids = ragged(5, shape, vocabulary=50)
            cpu = answer_consistency(ids, metric=metric)
            gpu = answer_consistency(torch.from_numpy(ids).cuda(), metric=metric)
            np.testing.assert_array_equal(cpu.agreement, gpu.agreement.cpu().numpy())
            np.testing.assert_array_equal(cpu.cluster, gpu.cluster.cpu().numpy())


COMPILE = """
    import re, subprocess, sys, tempfile, warnings
    from pathlib import Path
    warnings.simplefilter("ignore")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from robustft_kernels import answer_consistency_triton as kernels

    PAIR = dict(tokens_ptr="*i32", start_ptr="*i64", length_ptr="*i32", carry_ptr="*i8",
                agreement_ptr="*fp32", questions="i32", slots="i32", steps="i32", stride="i32",
                METRIC="constexpr", KP="constexpr", LANES="constexpr", CARRY="constexpr")
    SUM = dict(agreement_ptr="*fp32", present_ptr="*i8", weight_ptr="*fp64", mean_ptr="*fp32",
               cluster_ptr="*i64", majority_ptr="*i64", fraction_ptr="*fp32", entropy_ptr="*fp32",
               threshold="fp32", slots="i32", GREEDY="constexpr", WEIGHTED="constexpr",
               KP="constexpr")
    cuda, hip = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def build(target, kernel, signature, constants, pointers, warps):
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(pointers)}
        source = ASTSource(kernel, signature, constants, aligned)
        built = triton.compile(source, target=target, options={"num_warps": warps})
        shared = built.metadata.shared
        if target is hip:
            spills = re.findall(r"vgpr_spill_count:\\s*(\\d+)", built.asm["amdgcn"])
            print("hip", kernel.__name__, constants, "spills", spills[0], "shared", shared)
            return
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True,
                                  check=True).stdout
        spills = len(re.findall(r"\\b(?:STL|LDL)\\b", sass))
        loop = len(re.findall(r"\\bSHFL\\b", sass)) if "pairwise" in kernel.__name__ else 0
        print("cuda", kernel.__name__, constants, "spills", spills, "shared", shared,
              "shuffles", loop)

    for metric, slots, carry in ((0, 16, False), (1, 16, False), (2, 16, False), (3, 64, True)):
        for target, warp in ((cuda, 32), (hip, 64)):
            lanes = max(warp, slots)
            build(target, kernels.pairwise_kernel, PAIR,
                  dict(METRIC=metric, KP=slots, LANES=lanes, CARRY=carry), 5, lanes // warp)
    for slots, greedy in ((16, False), (64, True)):
        for target in (cuda, hip):
            build(target, kernels.summarise_kernel, SUM,
                  dict(GREEDY=greedy, WEIGHTED=True, KP=slots), 8, 4 if slots > 32 else 1)
"""


def test_compiles_ahead_of_time_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    for line in lines:
        assert "spills 0 " in line, line
        shared = re.search(r"shared (\d+)", line)
        assert shared, line
        assert int(shared[1]) <= 65_536, line
        # One lane's pattern lies in one thread: a mask needs no exchange between threads.
        if "shuffles" in line and "'KP': 16" in line:
            assert line.endswith("shuffles 0"), line
