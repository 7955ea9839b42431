from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine

from robustft.config import EngineConfig, EvalConfig
from robustft.engines import Prompt
from robustft.errors import UserError
from robustft.evaluation import evaluate
from robustft.metrics import Tally, macro_f1, wilson
from robustft.predictions import Prediction, as_line, from_line
from robustft.records import Record, open_records

torch.set_num_threads(1)


def oracle(reply: str = "") -> ScriptedEngine:
    """Answers the letter that the question starts with, other questions with `reply`."""

    def likelihoods(prompt: Prompt, letters: Sequence[str]) -> list[float]:
        said = prompt.messages[-1].content.split()[0]
        return [0.8 if letter.strip() == said else 0.1 for letter in letters]

    return ScriptedEngine(choose=likelihoods, reply=lambda prompt: reply)


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def choice(said: str, answer: str, **more: object) -> dict[str, object]:
    return {"question": f"{said} is it", "options": ["x", "y", "z"], "answer": answer, **more}


def test_choices_are_scored_and_written_in_input_order(tmp_path: Path) -> None:
    rows = [
        choice("A", "A", id="one", Subject="law"),
        choice("B", "C", id="two", Subject="law"),
        choice("C", "C", id="three", Subject="art"),
        choice("B", "B", id="four", Subject="art"),
    ]
    out = tmp_path / "predictions.jsonl"
    result = evaluate(EvalConfig(write(tmp_path / "t.jsonl", rows), out=out), engine=oracle())
    assert (result.overall.correct, result.overall.total) == (3, 4)
    assert {name: (t.correct, t.total) for name, t in result.categories.items()} == {
        "law": (1, 2), "art": (2, 2),
    }  # fmt: skip
    # F1: A 1, B 2/3, C 2/3; the commonest answer, C, is right twice in four.
    assert result.macro_f1 == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert result.majority == 0.5
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["one", "two", "three", "four"]
    assert lines[1] == {
        "id": "two", "expected": "C", "predicted": "B", "correct": False,
        "probability": 0.8, "category": "law",
    }  # fmt: skip
    text = str(result)
    assert "scripted: accuracy 75.0% (3 of 4; 95% interval 30.1 to 95.4)" in text
    assert "  art: 100.0% (2 of 2" in text


def test_options_of_one_text_are_one(tmp_path: Path) -> None:
    row = {"question": "B is it", "options": ["x", "x", "z"], "answer": "A"}
    result = evaluate(EvalConfig(write(tmp_path / "t.jsonl", [row])), engine=oracle())
    assert (result.overall.correct, result.macro_f1) == (1, 1.0)


def test_options_that_differ_have_no_macro_f1(tmp_path: Path) -> None:
    rows = [choice("A", "A"), {**choice("B", "B"), "options": ["p", "q"]}]
    result = evaluate(EvalConfig(write(tmp_path / "t.jsonl", rows)), engine=oracle())
    assert result.overall.accuracy == 1.0
    assert result.macro_f1 is None
    assert result.majority is None
    assert "macro-F1" not in str(result)


@pytest.mark.parametrize(
    ("answer", "reply", "correct", "unanswered"),
    [
        ("4", "2 + 2 makes **4**.", 1, 0),
        ("4", "It is 5.", 0, 0),
        ("4", "", 0, 1),
        ("Paris", "Paris", 1, 0),
        ("Paris", "paris.", 1, 0),
        ("Paris", "Rome", 0, 0),
    ],
)
def test_generated_answers(
    tmp_path: Path, answer: str, reply: str, correct: int, unanswered: int
) -> None:
    rows = [{"question": "q", "answer": answer}]
    out = tmp_path / "p.jsonl"
    config = EvalConfig(write(tmp_path / "t.jsonl", rows), out=out)
    result = evaluate(config, engine=oracle(reply))
    assert result.overall.correct == correct
    assert result.unanswered == unanswered
    assert json.loads(out.read_text())["reply"] == reply
    assert ("counts as wrong" in str(result)) == bool(unanswered)


def test_f1_is_told_where_parts_of_an_answer_count(tmp_path: Path) -> None:
    data = write(tmp_path / "t.jsonl", [{"question": "q", "answer": "Smith, Jones"}] * 4)
    config = EvalConfig(data)
    whole = evaluate(config, engine=oracle("Smith"))
    assert "F1" not in str(whole)
    parts = evaluate(
        config, engine=oracle("Smith"), judge=lambda record, reply: (reply, False, 0.5)
    )
    assert parts.overall.correct == 0
    assert "mean F1 50.0%, in which a part of an answer counts for its share" in str(parts)


def test_unreadable_lines_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(choice("A", "A")) + "\n{broken\n")
    result = evaluate(EvalConfig(str(path)), engine=oracle())
    assert (result.overall.total, result.rejected) == (1, 1)
    assert "1 record could not be read and was left out" in str(result)
    (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert said.startswith(f"{path}, line 2: ")


@pytest.mark.parametrize("field", ["Subject", "answers"])
def test_what_cannot_be_decoded_costs_its_record_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"law", b"\xff", b"art"]).buffers())
    table = pa.table({"question": ["p", "q", "r"], "answer": ["4", "4", "5"], field: bad})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path)
    result = evaluate(EvalConfig(str(path)), engine=oracle("4"))
    assert (result.overall.correct, result.overall.total, result.rejected) == (1, 2, 1)
    (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert said.startswith(f"{path}, record 2: field '{field}': cannot be decoded: ")


def test_text_from_the_data_is_printed_as_one_harmless_line(tmp_path: Path) -> None:
    rows = [choice("A", "A", Subject="law\x1b[2J\nfaked: 1.0000\u202e")]
    result = evaluate(EvalConfig(write(tmp_path / "t.jsonl", rows)), engine=oracle())
    assert str(result).splitlines()[-1].startswith(r"  law\x1b[2J\nfaked: 1.0000\u202e: 100.0% (1")


def test_of_many_categories_the_largest_are_printed(tmp_path: Path) -> None:
    rows = [choice("A", "A", category=f"c{n:03}") for n in [*range(100), 99, 98]]
    out = tmp_path / "p.jsonl"
    result = evaluate(EvalConfig(write(tmp_path / "t.jsonl", rows), out=out), engine=oracle())
    said = str(result).splitlines()
    shown = [line.split(":")[0].strip() for line in said if line.startswith("  c")]
    assert shown == [f"c{n:03}" for n in [*range(58), 98, 99]]
    assert said[-2:] == ["  and 40 categories of no more records", f"predictions  {out}"]
    assert len({json.loads(line)["category"] for line in out.read_text().splitlines()}) == 100


def test_a_category_in_every_record_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = 0

    class Counted(Tally):
        def add(self, correct: bool) -> None:
            nonlocal held
            held += 1
            super().add(correct)

    rows = [choice("A", "A", category=f"c{n}") for n in range(1001)]
    path = write(tmp_path / "t.jsonl", [*rows, *rows[:9], *rows])
    monkeypatch.setattr("robustft.evaluation.Tally", Counted)
    result = evaluate(EvalConfig(path), engine=oracle())
    assert result.overall.total == 2011
    assert result.categories == {}
    assert held == 1001  # memory does not grow with what is not told


def test_predictions_appear_in_full_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("power cut")

    out = tmp_path / "p.jsonl"
    path = write(tmp_path / "t.jsonl", [choice("A", "A")])
    with pytest.raises(RuntimeError, match="power cut"):
        evaluate(EvalConfig(path, out=out), engine=ScriptedEngine(before_batch=fail))
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(EvalConfig(path, out=tmp_path / "file" / "p.jsonl"), engine=oracle())


def test_a_resumed_evaluation_reads_what_it_wrote(tmp_path: Path) -> None:
    row: dict[str, object] = {"question": "How far?", "answer": "3 miles", "Subject": "roads"}
    (record,) = (
        r for r in open_records(write(tmp_path / "t.jsonl", [row])) if isinstance(r, Record)
    )
    for prediction in (
        Prediction(record, "3 miles", True, "It is 3 miles.", category="roads"),
        Prediction(record, "2 miles", False, "2", category="roads", score=0.5),
        Prediction(record, None, False, "no idea"),
        Prediction(record, None, False, failure="503"),
    ):
        assert from_line(record, as_line(prediction)) == prediction
    assert "score" not in json.loads(as_line(Prediction(record, "x", True, "x", score=1.0)))


def test_predictions_of_an_adapter_with_other_settings_are_not_gone_on_with(
    tmp_path: Path,
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "p.jsonl"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    path = write(tmp_path / "t.jsonl", [choice("A", "A") for _ in range(600)])

    def asked_until_stopped(alpha: int) -> int:
        def stop() -> None:
            if len(engine.asked) >= 512:
                raise KeyboardInterrupt

        (adapter / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        engine = ScriptedEngine(before_batch=stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(EvalConfig(path, adapter=adapter, out=out), engine=engine)
        return len(engine.asked)

    assert asked_until_stopped(16) == asked_until_stopped(32) == 512


def test_an_adapter_changes_the_answers(tmp_path: Path, tiny_model: Path) -> None:
    from robustft.config import TrainConfig
    from robustft.engines.factory import load_engine
    from robustft.training import train

    rows = [choice("ABC"[n % 3], "ABC"[n % 3]) for n in range(12)]
    path = write(tmp_path / "t.jsonl", [{**row, "answer": "C"} for row in rows])
    engine = EngineConfig(model=str(tiny_model), device="cpu", dtype="float32")
    adapter = tmp_path / "adapter"
    train(TrainConfig(path, adapter, epochs=6, batch_size=4, learning_rate=3e-2, engine=engine))
    before = evaluate(EvalConfig(path, engine=engine))
    after = evaluate(EvalConfig(path, adapter=adapter, engine=engine))
    assert load_engine(engine, adapter).revision == load_engine(engine).revision
    assert after.overall.correct == 12
    assert before.overall.correct < 12
    assert str(after).startswith(f"{tiny_model.name} with {adapter}: accuracy 100.0% (12 of 12")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_within_bounds(pair: tuple[int, int]) -> None:
    correct, total = pair
    low, high = wilson(correct, total)
    assert 0.0 <= low <= high <= 1.0
    if total:
        assert low - 1e-12 <= correct / total <= high + 1e-12
        mirrored = wilson(total - correct, total)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_by_hand() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(9, 10) == pytest.approx((0.59585, 0.98212), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert math.isnan(Tally().accuracy)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ABC"), st.sampled_from(["A", "B", "C", "D"])),
        min_size=1,
        max_size=40,
    )
)
def test_macro_f1_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    from sklearn.metrics import f1_score

    expected, predicted = zip(*pairs, strict=True)
    reference = f1_score(expected, predicted, average="macro", zero_division=0)
    assert macro_f1(Counter(pairs)) == pytest.approx(reference)


def test_macro_f1_without_an_answer_counts_as_missed() -> None:
    assert macro_f1({("A", None): 1, ("A", "A"): 1}) == pytest.approx(2 / 3)
    assert math.isnan(macro_f1({}))
