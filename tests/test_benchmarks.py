"""The token benchmarks on tiny cases: rows, gates that pass, and gates that can fail."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from robustft import _core
from robustft.benchmarks import consistency, knn, linear_token_stats, token_peers
from robustft.benchmarks.measure import Row, extra_mib, table
from robustft.errors import UserError
from robustft.retrieval import CosineKNN

BENCH = Path(__file__).parents[1] / "bench"
TINY = {
    "token_stats": {"rows": 9, "vocab": 300},
    "token_gradients": {"rows": 9, "vocab": 300},
    "linear_token_stats": {"rows": 9, "width": 32, "vocab": 300},
    "linear_token_gradients": {"rows": 9, "width": 32, "vocab": 300},
}


@pytest.fixture(params=TINY)
def benchmark_module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module(f"robustft.benchmarks.{request.param}")
    tiny = [module.Case(**TINY[request.param], dtype=t) for t in ("float32", "bfloat16")]
    monkeypatch.setattr(module, "cases", lambda device, quick: tiny)
    return module


def test_rows_and_their_gate(
    benchmark_module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "rows.csv"
    arguments = ["--quick", "--device", "cpu", "--out", str(out)]
    assert benchmark_module.main(arguments) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["contender"] == benchmark_module.OURS]
    assert [row["correct"] for row in ours] == ["yes", "yes"]
    limits = [row for row in rows if row["contender"].startswith("limit")]
    assert [row["case"] for row in limits] == [row["case"] for row in ours]
    assert all(float(row["ms_p50"]) > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "alone; speed " in printed
    assert "x torch eager" in printed


@pytest.mark.parametrize("first", [0, 8])
def test_a_wrong_kernel_fails_its_gate(
    first: int, benchmark_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = benchmark_module.OURS.split()[1]
    right = getattr(benchmark_module, name)

    def wrong(x: Any, *rest: Any, **options: Any) -> Any:  # on the timed shape alone
        x = torch.cat([x[:first], x[first:] * 1.01]) if len(x) == 9 else x
        return right(x, *rest, **options)

    monkeypatch.setattr(benchmark_module, name, wrong)
    assert benchmark_module.main(["--quick", "--device", "cpu", "--only", "float32"]) == 1


def test_a_peer_that_finds_no_memory_ends_no_benchmark(
    benchmark_module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    eager = token_peers.eager

    def greedy(x: Any, ids: Any) -> Any:
        if len(x) == 9:  # all rows at once; a gate can do with fewer
            raise torch.OutOfMemoryError("tried to allocate\n7.83 GiB")
        return eager(x, ids)

    monkeypatch.setattr(token_peers, "eager", greedy)
    monkeypatch.setattr(benchmark_module, "_BLOCK", 4, raising=False)
    assert benchmark_module.main(["--quick", "--device", "cpu", "--only", "float32"]) == 0
    told = capsys.readouterr().out
    assert "not run: torch eager: OutOfMemoryError: tried to allocate\n" in told
    assert "x torch eager" not in told


def test_a_case_that_is_not_there(benchmark_module: ModuleType) -> None:
    with pytest.raises(UserError, match="--only: expected text from one of N=9"):
        benchmark_module.main(["--quick", "--only", "V=1000000"])


def test_a_file_that_rows_cannot_go_to_is_told_before_measuring(
    benchmark_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("name,age\n")
    monkeypatch.setattr(benchmark_module, "measure", None)  # which is not called
    for out, said in ((other, "expected columns among"), (other / "a.csv", "cannot be written")):
        with pytest.raises(UserError, match=said):
            benchmark_module.main(["--quick", "--device", "cpu", "--out", str(out)])


@pytest.mark.parametrize("field", ["argmax", "rank"])
def test_columns_out_of_order_fail_the_gate_from_hidden_states(field: str) -> None:
    hidden, weight, ids = linear_token_stats.inputs(
        linear_token_stats.Case(9, 32, 300, "float32"), "cpu"
    )
    found = linear_token_stats.linear_token_stats(hidden, weight, ids)
    assert linear_token_stats.gate(found, hidden, weight, ids) == "yes"
    one_off = replace(found, **{field: getattr(found, field) ^ 1})
    assert linear_token_stats.gate(one_off, hidden, weight, ids) == "NO"


@pytest.mark.parametrize("broken", [None, 0, 69])
def test_the_knn_gate_judges_the_timed_search(
    broken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = CosineKNN.search

    def wrong(self: CosineKNN, queries: Any, k: int) -> Any:  # where all queries come at once
        ids, cosines = search(self, queries, k)
        if broken is not None and len(queries) == 70:
            ids[broken] = np.roll(ids[broken], 1)
        return ids, cosines

    monkeypatch.setattr(CosineKNN, "search", wrong)
    rows = knn.run_case(knn.Case("random", 500, 16, 70, 3, 1), None, 0.01, ["numpy"])
    gates = {row.contender: row.correct for row in rows}
    assert gates["robustft"] == ("yes" if broken is None else "NO")
    assert gates["numpy matmul, argpartition"].startswith("same 1.000")


@pytest.mark.parametrize("broken", [None, 0, 299])
def test_the_consistency_gate_looks_at_questions_from_first_to_last(
    broken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = consistency.make_answers(300, 3, 5)
    pairwise = _core.consistency_pairwise

    def wrong(*arguments: Any) -> Any:
        agreement = pairwise(*arguments)
        if broken is not None:
            agreement[broken, 0, 1] = 0.5
        return agreement

    monkeypatch.setattr(_core, "consistency_pairwise", wrong)
    gates = {gate for *_, gate in consistency._contenders(ids, "exact")}
    assert gates == ({"yes"} if broken is None else {"NO"})


def test_knn_uses_the_cores_that_it_may_and_tells_peers_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5, 7, 9})
    case = "--kinds random --rows 50 --dims 4 --queries 2 --budget 0.01 --no-machine --peers numpy"
    assert knn.main(case.split()) == 0
    asked = capsys.readouterr().err.splitlines()
    assert asked == [f"random N=50 d=4 Q=2 k=10 threads={count}" for count in (1, 3)]
    ours, one, other = (
        Row("knn", "c", name, 1, 1.0, 1.0, 1.0, rate, "queries/s", "yes", "cpu", "", "", None)
        for name, rate in (("robustft", 8.0), ("torch matmul, topk", 4.0), ("faiss", 2.0))
    )
    assert knn.ratios([ours, one, other]) == "c threads=1: x torch matmul, topk 2.0; faiss 4.0"


def test_knn_keeps_the_rows_of_what_is_done_when_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row("knn", "c", "robustft", 1, 1.0, 1.0, 1.0, 8.0, "queries/s", "yes", "", "", "", None)
    made = iter([[row]])
    monkeypatch.setattr(knn, "run_case", lambda *_: next(made))
    out = tmp_path / "rows.csv"
    with pytest.raises(StopIteration):  # at the second case
        knn.main(["--quick", "--no-machine", "--out", str(out)])
    assert "robustft" in out.read_text()


@pytest.mark.parametrize("wrong", [False, True])
def test_wrong_neighbours_of_a_mapped_file_end_with_status_1(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("knn_memory", BENCH / "knn_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    search = CosineKNN.search
    monkeypatch.setattr(
        CosineKNN,
        "search",
        lambda self, queries, k: search(self, queries[:: -1 if wrong else 1], k),
    )
    arguments = [str(tmp_path / "rows"), "--rows", "500", "--dim", "16", "--queries", "4"]
    assert module.main(arguments) == wrong
    assert ("WRONG" in capsys.readouterr().out) == wrong


def test_the_table_tells_where_milliseconds_do_not_compare() -> None:
    fast = Row(
        "knn", "c", "ours", 1, 2.0, 2.0, 2.0, 1000.0, "queries/s", "yes", "cpu", "", "", None
    )
    assert "compare rates" not in table([fast, replace(fast, ms_p50=4.0, rate=500.0)])
    assert "compare rates" in table([fast, replace(fast, ms_p50=4.0, rate=100.0)])
    peak = replace(fast, contender="the machine's peak", ms_p50=math.nan)
    assert "nan" not in table([fast, peak])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_that_was_used_before_counts_again() -> None:
    def call() -> None:
        torch.empty(24 << 18).fill_(1)  # 24 MiB, which glibc keeps

    call()
    call()
    found = extra_mib(call, "cpu")
    assert found is not None
    assert 23 < found < 40


def test_end_to_end_shows_no_number_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(__file__).resolve().parent.parent / "bench" / "end_to_end.py"
    spec = importlib.util.spec_from_file_location("end_to_end", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    trained: list[str] = []
    history = SimpleNamespace(step=3, seconds=1.0)
    overall = SimpleNamespace(accuracy=0.5, interval=(0.4, 0.6))
    monkeypatch.setattr(
        bench,
        "train",
        lambda config: trained.append(config.input) or SimpleNamespace(records=2, history=history),
    )
    score = SimpleNamespace(overall=overall, macro_f1=0.5)
    monkeypatch.setattr(bench, "evaluate", lambda config: score)
    for name in ("labeled", "noisy50", "test", "cleaned"):
        (tmp_path / f"{name}.csv").write_text(name)
    work, out, cleaned = tmp_path / "work", tmp_path / "out.csv", tmp_path / "cleaned.csv"
    for arm in bench.ARMS:
        (work / f"{arm}-0").mkdir(parents=True)
    command = [str(tmp_path), str(cleaned), "--work", str(work), "--seeds", "0", "--out", str(out)]
    bench.main(command)
    bench.main(command)
    assert len(trained) == 3  # the second call found all it needs
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == list(bench.ARMS)
    assert all(row["device"] and row["commit"] and row["date"] for row in rows)
    with pytest.raises(UserError, match="not measured with the same steps; repeat the old"):
        bench.main([*command, "--steps", "3"])
    cleaned.write_text("of another day")
    with pytest.raises(UserError, match=r"cleaned-0.*not measured with the same training file;"):
        bench.main(command)
    assert len(trained) == 3
    with (path.parent / "results" / "end_to_end.csv").open(newline="", encoding="utf-8") as file:
        assert tuple(csv.DictReader(file).fieldnames or ()) == bench.FIELDS
