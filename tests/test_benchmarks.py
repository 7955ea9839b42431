"""The token benchmarks on tiny cases: rows, gates that pass, and gates that can fail."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from robustft.errors import UserError

TINY = {
    "token_stats": {"rows": 8, "vocab": 300},
    "token_gradients": {"rows": 8, "vocab": 300},
    "linear_token_stats": {"rows": 8, "width": 32, "vocab": 300},
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
    out = tmp_path / "rows.csv"
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
    assert "of the limit; speed " in printed
    assert "x torch eager" in printed


def test_a_wrong_kernel_fails_its_gate(
    benchmark_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = benchmark_module.OURS.split()[1]
    right = getattr(benchmark_module, name)

    def wrong(x: Any, *rest: Any, **options: Any) -> Any:
        return right(x * 1.01, *rest, **options)

    monkeypatch.setattr(benchmark_module, name, wrong)
    assert benchmark_module.main(["--quick", "--device", "cpu", "--only", "float32"]) == 1


def test_a_case_that_is_not_there(benchmark_module: ModuleType) -> None:
    with pytest.raises(UserError, match="--only: expected text from one of N=8"):
        benchmark_module.main(["--quick", "--only", "V=1000000"])
