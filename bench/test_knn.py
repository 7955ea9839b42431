"""pytest-benchmark cases of the kNN: `python -m pytest bench/test_knn.py`."""

import pytest

from robustft.benchmarks.knn import make_rows
from robustft.benchmarks.knn_peers import Case, contenders

CASES = [Case("random", 20_000, 384, queries, 10, 2) for queries in (1, 64)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("peer", ["robustft", "faiss", "torch"])
def test_search(benchmark, case: Case, peer: str) -> None:
    if peer != "robustft":
        pytest.importorskip(peer)
    rows, queries = (
        make_rows(case.kind, case.rows, 384, 1),
        make_rows(case.kind, case.queries, 384, 2),
    )
    wanted = next(c for c in contenders(rows, case, [peer]) if c.name.startswith(peer))
    benchmark(wanted.call, queries)
