"""The noise of `corrupt`: exact, nested, uniform, wrong, and reversible from the truth file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustft.answers import answer_kind, normalise
from robustft.corruption import _choose, corrupt
from robustft.errors import UserError
from robustft.records import Record, open_records


def write(path: Path, rows: list[dict[str, Any]], junk: bytes = b"") -> Path:
    path.write_bytes(junk + b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def choices(count: int, options: int = 4) -> list[dict[str, Any]]:
    texts = [f"option {n}" for n in range(options)]
    return [
        {"question": f"q{n}", "options": texts, "answer": "ABCDEFGH"[n % options], "n": n}
        for n in range(count)
    ]


def answers(path: Path) -> list[str]:
    return [item.answer for item in open_records(str(path)) if isinstance(item, Record)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(1, 60), seed=st.integers(0, 5), rates=st.lists(st.floats(0, 1), min_size=2)
)
def test_exact_share_and_nesting(tmp_path: Path, count: int, seed: int, rates: list[float]) -> None:
    source = open_records(str(write(tmp_path / "d.jsonl", choices(count))))
    clean = answers(tmp_path / "d.jsonl")
    previous: dict[int, str] = {}
    for rate in sorted(rates):
        report = corrupt(source, rate, seed, tmp_path / "noisy.jsonl")
        noisy = answers(report.out)
        changed = {
            n: new for n, (old, new) in enumerate(zip(clean, noisy, strict=True)) if old != new
        }
        assert len(changed) == report.corrupted == int(Fraction(str(rate)) * count + Fraction(1, 2))
        assert previous.items() <= changed.items(), "a lower rate changes a subset, the same way"
        previous = changed


@pytest.mark.parametrize(("rate", "count", "wrong"), [(0.7, 45, 32), (0.5, 5, 3), (0.3, 15, 5)])
def test_half_a_record_is_rounded_up_as_written_in_decimals(
    tmp_path: Path, rate: float, count: int, wrong: int
) -> None:
    source = open_records(str(write(tmp_path / "d.jsonl", choices(count))))
    assert corrupt(source, rate, 0, tmp_path / "noisy.jsonl").corrupted == wrong


def test_truth_file_undoes_the_noise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = choices(50)
    source = open_records(str(write(tmp_path / "d.jsonl", rows, junk=b"broken\nworse\n")))
    report = corrupt(source, 0.3, 7, tmp_path / "noisy.jsonl")
    assert (report.records, report.rejected, report.corrupted) == (50, 2, 15)
    (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert said.startswith(f"{tmp_path / 'd.jsonl'}, line 1: ")  # the first of them alone
    assert "; 2 unreadable ones left out\n" in str(report)
    assert "; 1 unreadable one left out\n" in str(replace(report, rejected=1))
    assert report.truth == tmp_path / "noisy.jsonl.truth.jsonl"
    noisy, truth = lines(report.out), lines(report.truth)
    assert [line["id"] for line in truth] == [str(n) for n in range(50)]
    assert [line["index"] for line in truth] == list(range(50))
    assert [row | {"answer": line["truth"]} for row, line in zip(noisy, truth, strict=True)] == rows
    for row, line in zip(noisy, truth, strict=True):
        assert row["answer"] == line["given"]
        assert line["corrupted"] == (line["given"] != line["truth"])
    assert sum(line["corrupted"] for line in truth) == 15


def test_what_a_killed_one_left_is_written_over(tmp_path: Path) -> None:
    source = open_records(str(write(tmp_path / "in.jsonl", choices(9))))
    whole = corrupt(source, 0.5, 1, tmp_path / "whole.jsonl")
    corrupt(source, 0.5, 0, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()  # the truth gets its name first
    again = corrupt(source, 0.5, 1, tmp_path / "out.jsonl")
    assert again.out.read_bytes() == whole.out.read_bytes()
    again.truth.write_text("notes of mine")
    with pytest.raises(UserError, match="was not written by this command"):
        corrupt(source, 0.5, 1, tmp_path / "out.jsonl")


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    source = open_records(str(write(tmp_path / "d.jsonl", choices(200))))
    noisy = [
        corrupt(source, 0.5, seed, tmp_path / "n.jsonl").out.read_bytes() for seed in (1, 1, 2)
    ]
    assert noisy[0] == noisy[1] != noisy[2]


def test_wrong_options_are_uniform(tmp_path: Path) -> None:
    count = 6000
    source = open_records(str(write(tmp_path / "d.jsonl", choices(count))))
    report = corrupt(source, 1.0, 3, tmp_path / "noisy.jsonl")
    pairs = Counter((line["truth"], line["given"]) for line in lines(report.truth))
    assert len(pairs) == 12
    expected = count / 12
    chi_square = sum((found - expected) ** 2 / expected for found in pairs.values())
    assert chi_square < 26.1, "p < 0.001 at 8 degrees of freedom: 3 wrong options for 4 letters"


def test_options_that_say_the_same_are_not_wrong(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "options": ["x", "x ", "y"], "answer": "A"},
        {"question": "r", "options": ["x", "x"], "answer": "A"},
    ]
    source = open_records(str(write(tmp_path / "d.jsonl", rows)))
    assert answers(corrupt(source, 0.5, 0, tmp_path / "n.jsonl").out) == ["C", "A"]
    with pytest.raises(UserError, match=r"2 of 2 records .* only 1 has one"):
        corrupt(source, 1.0, 0, tmp_path / "n.jsonl")


def test_open_answers_come_from_other_records_of_their_kind(tmp_path: Path) -> None:
    given = ["18", "$1,234.50", "18.0", "yes", "New York", "Yes."]
    given += [f"Sentence number {n} which talks at some length about topic {n}." for n in range(4)]
    rows = [{"question": f"q{n}", "answer": answer} for n, answer in enumerate(given)]
    source = open_records(str(write(tmp_path / "d.jsonl", rows)))
    noisy = answers(corrupt(source, 1.0, 0, tmp_path / "n.jsonl").out)
    for old, new in zip(given, noisy, strict=True):
        kind = answer_kind(old)
        assert new in given
        assert answer_kind(new) == kind
        assert normalise(new, kind) != normalise(old, kind)
    same = write(tmp_path / "same.jsonl", [{"question": "q", "answer": "yes"}] * 3)
    source = open_records(str(same))
    with pytest.raises(UserError, match="only 0 have one"):
        corrupt(source, 0.5, 0, tmp_path / "n.jsonl")


def test_number_columns_stay_numbers(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": n} for n in range(5)]
    source = open_records(str(write(tmp_path / "d.jsonl", rows)))
    noisy = lines(corrupt(source, 1.0, 0, tmp_path / "n.jsonl").out)
    assert all(type(row["answer"]) is int for row in noisy)


def test_options_that_the_answer_column_cannot_name_are_not_taken(tmp_path: Path) -> None:
    options = [{"text": ["x", "y", "z"], "label": ["1", "2", "none"]}] * 20
    columns = {"question": [f"q{n}" for n in range(20)], "choices": options, "answerKey": [1] * 20}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    source = open_records(str(tmp_path / "d.parquet"))
    report = corrupt(source, 0.5, 0, tmp_path / "n.parquet")
    assert Counter(pq.read_table(report.out)["answerKey"].to_pylist()) == {1: 10, 2: 10}


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf")])
def test_rate_out_of_range(tmp_path: Path, rate: float) -> None:
    source = open_records(str(write(tmp_path / "d.jsonl", choices(4))))
    with pytest.raises(UserError, match="rate: expected a share from 0 to 1"):
        corrupt(source, rate, 0, tmp_path / "n.jsonl")


def test_output_must_have_the_format_and_not_be_the_input(tmp_path: Path) -> None:
    source = open_records(str(write(tmp_path / "d.jsonl", choices(4))))
    with pytest.raises(UserError, match=r"n\.csv: expected a name ending in \.jsonl"):
        corrupt(source, 0.5, 0, tmp_path / "n.csv")
    with pytest.raises(UserError, match="is the input itself"):
        corrupt(source, 0.5, 0, tmp_path / "d.jsonl")
    assert len(answers(tmp_path / "d.jsonl")) == 4


def test_an_input_that_grows_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "d.jsonl", choices(4))
    source = open_records(str(path))

    def choose(*arguments: Any) -> Any:
        write(path, choices(5))
        return _choose(*arguments)

    monkeypatch.setattr("robustft.corruption._choose", choose)
    with pytest.raises(UserError, match="has changed since"):
        corrupt(source, 0.5, 0, tmp_path / "n.jsonl")
    assert [one.name for one in tmp_path.iterdir()] == ["d.jsonl"]


def test_progress_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("robustft.progress._SECONDS_BETWEEN_LINES", 0.0)
    source = open_records(str(write(tmp_path / "d.jsonl", choices(4), junk=b"{\n")))
    corrupt(source, 0.5, 0, tmp_path / "n.jsonl")
    said = capsys.readouterr().err
    assert "robustft: read: " in said
    assert "robustft: write: " in said
