"""CosineKNN against an fp64 brute force: same ids, same order, same cosines, whatever the road."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from robustft import _core
from robustft.benchmarks.knn_reference import exact_neighbours as brute_force
from robustft.errors import UserError
from robustft.retrieval import CosineKNN, _page_release

ISAS = _core.knn_isas()


def assert_same(found, expected) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[0].dtype == np.int64
    assert found[1].dtype == np.float32


def gaussian(n: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def corpus(kind: str, n: int, d: int, rng: np.random.Generator) -> NDArray[np.float32]:
    rows = rng.standard_normal((n, d))
    if kind == "clustered":
        centres = rng.standard_normal((max(1, n // 50), d))
        rows = centres[rng.integers(len(centres), size=n)] + 0.05 * rows
    elif kind == "duplicated":
        rows = rows[rng.integers(max(1, n // 4), size=n)]
    elif kind == "near-tied":  # every cosine within about 0.01
        rows = rng.standard_normal(d) + 0.05 * rows
    elif kind == "integers":
        rows = rng.integers(-1, 2, (n, d)).astype(np.float64)
    elif kind == "scaled":
        rows = rows * 10.0 ** rng.uniform(-30, 30, (n, 1))
    rows = rows.astype(np.float32)
    rows[rng.random(n) < 0.02] = 0
    return rows


KINDS = ["gaussian", "clustered", "duplicated", "near-tied", "integers", "scaled"]


@st.composite
def cases(draw: st.DrawFn, most_rows: int, most_queries: int, work: float):
    """Rows, queries, k and options; `work` bounds N * d * Q so that a case stays short."""
    n = draw(st.one_of(st.integers(0, 80), st.integers(0, 2000), st.integers(0, most_rows)))
    d = draw(
        st.one_of(
            st.integers(1, 40), st.integers(1, 1536), st.sampled_from([64, 127, 384, 768, 1536])
        )
    )
    q = draw(st.one_of(st.integers(0, 20), st.integers(0, most_queries)))
    q = min(q, int(work / max(1, n * d)) + 1)
    k = draw(st.one_of(st.integers(1, 12), st.integers(1, n + 3)))
    k = k if n * q <= 1_000_000 else min(k, 500)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(KINDS))
    rows = corpus(kind, n, d, rng)
    queries = corpus(kind, q, d, rng)
    if n and q:  # some queries are rows
        own = rng.random(q) < 0.3
        queries[own] = rows[rng.integers(n, size=own.sum())]
    options = {}
    if draw(st.booleans()):
        options["ids"] = rng.permutation(3 * n)[:n]
    names = options.get("ids", np.arange(n))
    if n and draw(st.booleans()):
        options["exclude"] = np.where(rng.random(q) < 0.8, rng.choice(names, q), -1)
    if draw(st.booleans()):
        options["threshold"] = draw(st.sampled_from([-0.1, 0.0, 0.3, 0.999]))
    if draw(st.booleans()):
        options["allowed"] = rng.random(n) < draw(st.sampled_from([0.0, 0.02, 0.3, 0.7, 1.0]))
    return rows, queries, k, options


def use_isa(patch: pytest.MonkeyPatch, isa: str) -> None:
    """Let the indexes to come use one instruction set instead of the best."""
    core = _core.CosineIndex
    patch.setattr(_core, "CosineIndex", lambda dim, dtype, _: core(dim, dtype, isa))


def check(isa: str, rows, queries, k, options, expected) -> None:
    """Same answer from one instruction set, bit by bit, for 1, 2 and 7 threads."""
    arguments = {name: value for name, value in options.items() if name != "ids"}
    for threads in (1, 2, 7):
        with pytest.MonkeyPatch.context() as patch:
            use_isa(patch, isa)
            index = CosineKNN(rows, ids=options.get("ids"), threads=threads)
        assert index._core.isa == isa
        found = index.search(queries, k, **arguments)
        assert_same(found, expected)
        assert [part.tobytes() for part in found] == [part.tobytes() for part in expected]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(most_rows=2000, most_queries=40, work=2e6))
def test_equals_brute_force(case) -> None:
    rows, queries, k, options = case
    expected = brute_force(rows, queries, k, **options)
    for isa in ISAS:
        check(isa, rows, queries, k, options, expected)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(most_rows=50_000, most_queries=300, work=1e9))
def test_equals_brute_force_at_length(case) -> None:
    rows, queries, k, options = case
    expected = brute_force(rows, queries, k, **options)
    for isa in ISAS:
        check(isa, rows, queries, k, options, expected)


@pytest.mark.parametrize("tier", ["int8", "float32", "exact"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_tier(isa: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_isa(monkeypatch, isa)
    rng = np.random.default_rng(0)
    for kind in KINDS:
        rows, queries = corpus(kind, 1500, 65, rng), corpus(kind, 40, 65, rng)
        index = CosineKNN(rows, threads=2)
        assert index._core.isa == isa
        index._tier = tier
        assert_same(index.search(queries, 6), brute_force(rows, queries, 6))


@pytest.mark.parametrize("isa", ISAS)
def test_no_sum_of_codes_overflows(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_isa(monkeypatch, isa)
    rng = np.random.default_rng(0)
    for d in (7, 16, 50, 200):
        columns = np.arange(d)
        shapes = [  # where a query's large columns lie, as seen by one lane of a few steps
            np.ones(d),
            columns // 2 % 2 == 0,
            columns // 2 % 2 == 1,
            columns % 16 < 8,
            columns == d // 2,
            np.where(columns % 2 == 0, 1, 0.01),
        ]
        queries = np.array([sign * shape for shape in shapes for sign in (1.0, -1.0)])
        queries += 1e-3 * rng.standard_normal(queries.shape)
        rows = np.concatenate([np.where(queries > 0, 1.0, -1.0), rng.choice([-1.0, 1.0], (500, d))])
        rows, queries = rows.astype(np.float32), queries.astype(np.float32)
        index = CosineKNN(rows, threads=1)
        index._tier = "int8"
        assert_same(index.search(queries, 5), brute_force(rows, queries, 5))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("allowed", [1.0, 0.7, 0.3])
def test_the_filter_changes_with_the_rows(
    isa: str, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that defeat the 8-bit bound, rows that do not, and the former again."""
    use_isa(monkeypatch, isa)
    rng = np.random.default_rng(0)
    tied = corpus("near-tied", 80_040, 24, rng)
    rows = np.concatenate([tied[:40_000], gaussian(50_000, 24), tied[40_000:80_000]])
    queries = np.concatenate([tied[80_000:], rows[:5], gaussian(5, 24, 1)])
    mask = rng.random(len(rows)) < allowed
    exclude = rng.integers(len(rows), size=len(queries))
    expected = brute_force(rows, queries, 4, exclude=exclude, allowed=mask)
    for threads in (1, 2):
        index = CosineKNN(rows, threads=threads)
        *found, counts = index._search(
            queries, "float32", 4, exclude, None, index._bitmap(mask), None
        )
        assert_same(found, expected)
        assert counts["rescored"] < 0.02 * len(queries) * len(rows)
        assert counts["float_pairs"] > 0
        assert counts["int8_pairs"] > 0 or isa == "portable"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("allowed", [1.0, 0.3])
def test_where_no_filter_turns_rows_away_none_is_run(
    isa: str, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosines nearer to each other than what fp32 can tell, and rows after them that are not."""
    use_isa(monkeypatch, isa)
    rng = np.random.default_rng(0)
    tied = rng.standard_normal(64) + 1e-3 * rng.standard_normal((40_020, 64))
    rows = np.concatenate([tied[20:].astype(np.float32), gaussian(20_000, 64)])
    rows[::7], rows[3] = rows[0], 0
    queries = np.concatenate([tied[:20].astype(np.float32), rows[3:4]])
    mask = rng.random(len(rows)) < allowed
    expected = brute_force(rows, queries, 4, allowed=mask)
    for threads in (1, 2):
        index = CosineKNN(rows, threads=threads)
        *found, counts = index._search(queries, "float32", 4, None, None, index._bitmap(mask), None)
        assert_same(found, expected)
        if isa != "portable":  # which has one filter, in fp32
            assert counts["float_pairs"] < 0.3 * len(queries) * mask.sum()
            assert counts["int8_pairs"] > 0


@pytest.mark.parametrize("isa", ISAS)
def test_a_trial_may_end_in_another_stretch(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_isa(monkeypatch, isa)
    tied = corpus("near-tied", 2760, 32, np.random.default_rng(0))
    rows, queries = tied[60:], tied[:60]
    assert_same(CosineKNN(rows, threads=2).search(queries, 20), brute_force(rows, queries, 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    rows = torch.from_numpy(gaussian(700, 37)).to(dtype)
    queries = torch.from_numpy(gaussian(9, 37, 1))
    index = CosineKNN(rows)
    assert index.dtype == str(dtype).removeprefix("torch.")
    expected = brute_force(rows.double().numpy(), queries.double().numpy(), 10)
    assert_same(index.search(queries, 10), expected)
    assert_same(index.search(queries.double(), 10), expected)
    if dtype != torch.bfloat16:
        assert_same(CosineKNN(rows.numpy()).search(queries.numpy(), 10), expected)


def test_half_precision_extremes() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(np.float16)
    rows = values[np.isfinite(values)].reshape(-1, 1024)
    queries = gaussian(3, 1024)
    assert_same(CosineKNN(rows).search(queries, 8), brute_force(rows, queries, 8))


@pytest.mark.parametrize(("dtype", "size"), [(np.float16, 2e-5), (np.float32, 1e-39)])
def test_subnormal_numbers_count_whatever_the_caller_does_with_them(
    dtype: type[np.floating], size: float
) -> None:
    rows = (gaussian(500, 40).astype(np.float64) * size).astype(dtype)
    expected = brute_force(rows, rows[:9], 5)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps subnormal numbers")
    try:
        found = CosineKNN(rows, threads=2).search(rows[:9], 5)
        assert torch.tensor(1e-42) * 1 == 0  # as it was for the caller
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, expected)


def test_float64_keeps_what_float32_would_lose() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 1e-12], [1.0, -1e-12]])
    ids, _ = CosineKNN(rows).search(np.array([[1.0, 1e-3]]), 3)
    assert ids.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("layout", ["transposed", "strided", "reversed", "broadcast", "big-endian"])
def test_layouts(layout: str) -> None:
    base = gaussian(40, 24)
    rows = {
        "transposed": np.asfortranarray(base),
        "strided": np.repeat(base, 2, axis=0)[::2],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[3], (40, 24)),
        "big-endian": base.astype(">f4"),
    }[layout]
    queries = gaussian(5, 24, 1)
    assert_same(CosineKNN(rows).search(queries, 7), brute_force(rows, queries, 7))


def test_rows_are_not_copied(tmp_path: Path) -> None:
    rows = gaussian(2000, 96)
    assert np.shares_memory(CosineKNN(rows)._parts[0], rows)
    rows.tofile(tmp_path / "rows.f32")
    mapped = np.memmap(tmp_path / "rows.f32", np.float32, "r", shape=rows.shape)
    index = CosineKNN(mapped)
    assert np.shares_memory(index._parts[0], mapped)
    assert_same(index.search(rows[:3], 4), brute_force(rows, rows[:3], 4))


@pytest.mark.parametrize(("mode", "released"), [("r", True), ("r+", True), ("c", False)])
def test_pages_of_a_mapped_file_are_given_back(tmp_path: Path, mode: str, released: bool) -> None:
    rows = gaussian(500, 16)
    rows.tofile(tmp_path / "rows.f32")
    mapped = np.memmap(tmp_path / "rows.f32", np.float32, mode, shape=rows.shape)  # type: ignore[call-overload]
    if mode == "c":  # changes that the file does not hold
        mapped[7] = rows[7] = 1
    release = _page_release(np.asarray(mapped)[10:])
    assert (release is not None) == released
    if release is not None:
        release(0)
    assert_same(CosineKNN(mapped).search(rows[:3], 4), brute_force(rows, rows[:3], 4))
    assert _page_release(rows) is None


def test_zero_vectors_have_cosine_zero() -> None:
    rows = np.array([[-1, 0], [0, 0], [1, 0], [0, 0]], np.float32)
    ids, cosines = CosineKNN(rows).search(np.array([[1, 0], [0, 0]], np.float32), 4)
    assert ids.tolist() == [[2, 1, 3, 0], [0, 1, 2, 3]]
    assert cosines.tolist() == [[1, 0, 0, -1], [0, 0, 0, 0]]


def test_fewer_neighbours_are_padded() -> None:
    ids, cosines = CosineKNN(gaussian(3, 4)).search(gaussian(2, 4), 5)
    assert (ids[:, 3:] == -1).all()
    assert np.isnan(cosines[:, 3:]).all()
    ids, cosines = CosineKNN(np.empty((0, 4), np.float32)).search(gaussian(2, 4), 2)
    assert (ids == -1).all()
    assert np.isnan(cosines).all()


def test_threshold_is_strict() -> None:
    rows = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    ids, _ = CosineKNN(rows).search(np.array([[1, 0]], np.float32), 3, threshold=0.0)
    assert ids.tolist() == [[0, 2, -1]]


def test_allowed_takes_ids_or_booleans() -> None:
    rows, queries = gaussian(300, 16), gaussian(4, 16, 1)
    names = np.random.default_rng(0).permutation(1000)[:300]
    mask = np.arange(300) % 7 == 0
    index = CosineKNN(rows, ids=names)
    expected = brute_force(rows, queries, 5, ids=names, allowed=mask)
    assert_same(index.search(queries, 5, allowed=mask), expected)
    assert_same(index.search(queries, 5, allowed=names[mask]), expected)
    assert_same(index.search(queries, 5, allowed=set(names[mask].tolist())), expected)
    nobody, _ = index.search(queries, 5, allowed=[])
    assert (nobody == -1).all()


def test_rows_that_share_an_id_are_excluded_together() -> None:
    rows = gaussian(6, 8)
    index = CosineKNN(rows, ids=[4, 4, 2, 2, 1, 1])
    ids, _ = index.search(rows[:1], 6, exclude=[4])
    assert sorted(ids[0].tolist()) == [-1, -1, 1, 1, 2, 2]


def test_self_search_excludes_each_row() -> None:
    rows = corpus("duplicated", 400, 32, np.random.default_rng(0))
    expected = brute_force(rows, rows, 4, exclude=np.arange(400))
    assert_same(CosineKNN(rows).self_search(4), expected)
    index = CosineKNN(rows[:150])
    index.add(rows[150:])
    assert_same(index.self_search(4), expected)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1500), min_size=1, max_size=5), st.booleans())
def test_adding_equals_building_at_once(sizes: list[int], named: bool) -> None:
    rows, queries = gaussian(sum(sizes), 20), gaussian(5, 20, 1)
    ids = np.random.default_rng(0).permutation(len(rows)) if named else None
    index = CosineKNN(rows[:0], ids=[] if named else None)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        index.add(rows[part], ids=None if ids is None else ids[part])
        start += size
    assert len(index) == len(rows)
    assert_same(index.search(queries, 9), brute_force(rows, queries, 9, ids=ids))


def test_add_is_all_or_nothing() -> None:
    rows = gaussian(3000, 8)
    index = CosineKNN(rows[:10])
    index.add(rows[:1000])
    bad = rows.copy()
    bad[2500, 3] = np.inf
    with pytest.raises(ValueError, match="row 2500"):
        index.add(bad)
    assert len(index) == 1010


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("named", [False, True])
def test_save_and_load(tmp_path: Path, dtype: str, named: bool) -> None:
    rows = torch.from_numpy(gaussian(500, 12)).to(getattr(torch, dtype))
    queries = gaussian(6, 12, 1)
    ids = np.random.default_rng(0).permutation(700) if named else None
    index = CosineKNN(rows[:300], ids=None if ids is None else ids[:300])
    index.add(rows[300:], ids=None if ids is None else ids[300:500])
    index.save(tmp_path / "index.knn")
    again = CosineKNN.load(tmp_path / "index.knn")
    assert_same(again.search(queries, 8), index.search(queries, 8))
    assert again.ids.tolist() == index.ids.tolist()
    again.add(rows[:5], ids=None if ids is None else ids[500:505])
    assert len(again) == 505
    assert [path.name for path in tmp_path.iterdir()] == ["index.knn"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts on the limit of a process's memory")
def test_an_add_that_finds_no_memory_leaves_a_loaded_index_whole(tmp_path: Path) -> None:
    code = """
        import resource, sys
        import numpy as np
        from robustft.retrieval import CosineKNN
        rows = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
        CosineKNN(rows[:200]).save(sys.argv[1])
        index = CosineKNN.load(sys.argv[1], threads=1)
        many = np.zeros((2_000_000, 64), np.float32)  # whose codes take 160 MB
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), resource.RLIM_INFINITY))
        try:
            index.add(many, copy=False)
        except MemoryError:
            print("no memory")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        index.add(rows[200:])
        found = index.search(rows, 5)
        wanted = CosineKNN(rows).search(rows, 5)
        print(all(map(np.array_equal, found, wanted)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "index.knn")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == ["no memory", "True", ""]


def test_an_empty_index_survives_the_disk(tmp_path: Path) -> None:
    CosineKNN(np.empty((0, 5), np.float16)).save(tmp_path / "index.knn")
    index = CosineKNN.load(tmp_path / "index.knn")
    assert (len(index), index.dim, index.dtype) == (0, 5, "float16")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_files_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("knn") / "index.knn"
    CosineKNN(gaussian(9, 3), ids=np.arange(9)).save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        start = data.draw(st.sampled_from([0, 8, 12, 16, 30, 8192, 12288]))
        place = start + data.draw(st.integers(0, 60))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"index\.knn: "):
        CosineKNN.load(path)


@pytest.mark.parametrize("error", [-1.0, -1e30])
@pytest.mark.parametrize("threads", [1, 3])
def test_unverified_blocks_of_other_rows_are_found_out(
    tmp_path: Path, error: float, threads: int
) -> None:
    path = tmp_path / "index.knn"
    rows = gaussian(500, 3)
    CosineKNN(rows).save(path)
    with path.open("r+b") as file:
        file.seek(4096 * 4 + 256)  # after the header and the rows: the first block's errors
        file.write(struct.pack("<f", error) * 64)
    index = CosineKNN.load(path, threads=threads, verify=False)
    with pytest.raises(ValueError, match="the index's blocks are not those of its rows"):
        index.search(rows, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 3.0), ("dim", True), ("dim", "3"), ("dim", math.inf), ("dim", 1 << 60),
        ("count", -1), ("count", 1e30), ("count", 0xFFFF_FF01), ("offset", -4096), ("offset", 0),
        ("offset", 1 << 62), ("bytes", -1), ("dtype", ["float32"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verify", [True, False])
def test_a_header_that_lies_is_refused(
    tmp_path: Path, field: str, value: object, verify: bool
) -> None:
    path = tmp_path / "index.knn"
    CosineKNN(gaussian(9, 3), ids=np.arange(9)).save(path)
    content = path.read_bytes()
    prefix = struct.Struct("<8sIII")
    magic, version, length, _ = prefix.unpack(content[: prefix.size])
    header = json.loads(content[prefix.size : prefix.size + length])
    (header if field in header else header["sections"]["ids"])[field] = value
    told = json.dumps(header).encode()
    path.write_bytes(
        prefix.pack(magic, version, len(told), zlib.crc32(told))
        + told
        + content[prefix.size + len(told) :]
    )
    with pytest.raises(UserError, match=r"index\.knn: "):
        CosineKNN.load(path, verify=verify)


def two_rows() -> CosineKNN:
    return CosineKNN(gaussian(2, 3))


def one_row(k: int = 1, threads: int | None = None) -> None:
    rows = gaussian(1, 3)
    ids, _ = CosineKNN(rows, threads=threads).search(rows, k)
    assert ids[0, 0] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CosineKNN([[1, 2]]), TypeError, "embeddings must be float16.*got int64"),
        (lambda: CosineKNN(gaussian(2, 3)[0]), ValueError, r"embeddings must be a matrix.*\[3\]"),
        (lambda: CosineKNN(np.empty((3, 0), np.float32)), ValueError, "at least one column"),
        (lambda: CosineKNN(np.full((3, 2), np.nan, np.float16)), ValueError, "row 0 must be fin"),
        (lambda: CosineKNN(np.array([[1, 2], [1e200, 0]])), ValueError, "row 1 must be .*1e140"),
        (lambda: CosineKNN(gaussian(2, 3), ids=[1]), ValueError, r"ids must be \[2\], got \[1\]"),
        (lambda: CosineKNN(gaussian(2, 3), ids=[1, -2]), ValueError, "ids must be >= 0.*got -2"),
        (lambda: CosineKNN(gaussian(2, 3), ids=[1.5, 2]), TypeError, "ids must be integers"),
        *(
            (functools.partial(one_row, **{name: value}), error, message)
            for name in ("threads", "k")
            for value, error, message in (
                (0, ValueError, rf"{name} must be in \[1, 2147483647\], got 0"),
                (2**64, ValueError, rf"{name} must be in .*, got {2**64}"),
                (1.5, TypeError, f"{name} must be a whole number, got 1.5"),
                (True, TypeError, f"{name} must be a whole number, got True"),
            )
        ),
        (lambda: two_rows().search(gaussian(1, 4), 1), ValueError, r"be \[Q, 3\], got \[1, 4\]"),
        (
            lambda: two_rows().search(np.full((1, 3), np.nan), 1),
            ValueError,
            "queries row 0 must be finite",
        ),
        (
            lambda: two_rows().search(gaussian(1, 3), 1, allowed=[5]),
            ValueError,
            "allowed must hold ids of the index, got 5",
        ),
        (
            lambda: two_rows().search(gaussian(1, 3), 1, threshold=float("nan")),
            ValueError,
            "threshold must be a number, got nan",
        ),
        (
            lambda: two_rows().add(gaussian(2, 3).astype(np.float64)),
            TypeError,
            "embeddings must be float32 like the index, got float64",
        ),
        (lambda: two_rows().add(gaussian(2, 3), ids=[1, 2]), ValueError, "ids must not be given"),
        (
            lambda: CosineKNN(gaussian(0, 3), ids=[]).add(gaussian(2, 3)),
            ValueError,
            "ids must be given",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_numpy_integers_are_whole_numbers(kind: type) -> None:
    one_row(k=kind(1), threads=kind(2))


def test_many_python_threads_share_an_index() -> None:
    rows, queries = gaussian(3000, 48), gaussian(40, 48, 1)
    index = CosineKNN(rows[:1000], threads=2)
    expected = [brute_force(rows[:n], queries, 5) for n in (1000, 3000)]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(index.search, queries, 5) for _ in range(16)]
        index.add(rows[1000:])
        for future in futures:
            ids, cosines = future.result()
            assert any(
                np.array_equal(ids, want[0]) and np.array_equal(cosines, want[1])
                for want in expected
            )
    assert_same(index.search(queries, 5), expected[1])


def in_a_child(code: str) -> str:
    """What `code` prints in a process of its own, so that a deadlock cannot hang the tests."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("copy", [False, True])
def test_an_index_is_read_during_a_long_add(copy: bool) -> None:
    printed = in_a_child(f"""
        import threading
        import numpy as np
        from robustft.retrieval import CosineKNN

        rng = np.random.default_rng(0)
        many = rng.integers(-9, 9, (60_000, 512), np.int8).astype(np.float16)
        index = CosineKNN(many[:1000], threads=1)
        query, done, searched = many[:2], threading.Event(), threading.Event()

        def read():
            while not done.is_set():
                index.search(query, 3)
                index.ids, index.extra_bytes
                searched.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        searched.wait()
        index.add(many, copy={copy})  # takes longer than the 50 ms between two looks at Ctrl-C
        done.set()
        reader.join()
        print(len(index))
    """)
    assert printed == "61000\n"


def test_an_index_grows_while_it_is_searched() -> None:
    printed = in_a_child("""
        import threading
        import numpy as np
        from robustft.retrieval import CosineKNN

        rng = np.random.default_rng(0)
        rows = rng.standard_normal((6000, 16), np.float32)
        index = CosineKNN(rows[:500], threads=1)
        done, wrong = threading.Event(), []

        def read():
            while not done.is_set():
                try:
                    ids, _ = index.self_search(3)
                    assert not (ids == np.arange(len(ids))[:, None]).any()
                    ids, _ = index.search(rows[:1], 3, allowed=[4, 2])
                    assert sorted(ids[0]) == [-1, 2, 4]
                except Exception as error:
                    wrong.append(repr(error))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for i in range(500, len(rows), 2):
                index.add(rows[i : i + 2])
        finally:
            done.set()
        reader.join()
        print(len(index), wrong[:3])
    """)
    assert printed == "6000 []\n"


def test_rows_added_meanwhile_are_not_allowed() -> None:
    rows = gaussian(300, 16)
    index = CosineKNN(rows[:40])
    index.add(rows[40:60], copy=False)

    def grow(done: int, total: int) -> None:
        if len(index) == 60:
            index.add(rows[60:])

    found = index.self_search(3, allowed=iter([7, 50, 59]), progress=grow)
    assert len(index) == 300
    expected = CosineKNN(rows[:60]).self_search(3, allowed=[7, 50, 59])
    assert_same(found, expected)


def test_ctrl_c_stops_a_long_search() -> None:
    code = """
        import _thread, threading
        import numpy as np
        from robustft.retrieval import CosineKNN
        row = np.arange(256, dtype=np.float32)
        index = CosineKNN(np.broadcast_to(row, (20_000, 256)), threads=2)
        threading.Timer(0.3, _thread.interrupt_main).start()
        try:  # nothing but ties: minutes
            index.search(np.broadcast_to(row, (4_000_000, 256)), 1)
        except KeyboardInterrupt:
            print("stopped", *index.search(row[None], 3)[0][0])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "stopped 0 1 2\n"


def test_usable_after_fork() -> None:
    rows = gaussian(20000, 64)
    index = CosineKNN(rows, threads=2)
    expected = index.search(rows[:200], 3)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(index.search(rows[:200], 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of threads and fork
        child.start()
    assert receiver.poll(60)
    assert_same(receiver.recv(), expected)
    child.join(60)
    assert child.exitcode == 0


def test_progress_grows_to_the_total_and_its_errors_come_back() -> None:
    rows = gaussian(20000, 256)
    index = CosineKNN(rows, threads=2)
    seen: list[tuple[int, int]] = []
    index.search(rows[:1000], 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (20_000_000, 20_000_000)

    def refuse(done: int, total: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        index.search(rows, 3, progress=refuse)
