"""Parquet and datasets: every type and the schema survive, whatever changes in one column."""

from __future__ import annotations

import datetime
import decimal
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustft.errors import UserError
from robustft.records import Record, RecordSource, RecordWriter, Reject, open_records, output_name
from robustft.records.column_sources import open_stream

SCHEMA = pa.schema(
    [
        pa.field("question", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("answer", pa.int8(), metadata={"note": "kept"}),
        pa.field("when", pa.timestamp("ns", tz="UTC")),
        pa.field("cost", pa.decimal128(10, 3)),
        pa.field("kind", pa.dictionary(pa.int32(), pa.string())),
        pa.field("extra", pa.struct([("blob", pa.binary()), ("day", pa.date32())])),
        pa.field("pairs", pa.map_(pa.string(), pa.int16())),
        pa.field("half", pa.float16()),
        pa.field("uid", pa.uuid()),
    ],
    metadata={"made by": "a test"},
)


def table(count: int) -> pa.Table:
    when = pa.array([n * 1_000_000_007 for n in range(count)], pa.int64()).cast(SCHEMA[3].type)
    uid = pa.array([n.to_bytes(16, "big") for n in range(count)], pa.binary(16))
    columns = [
        pa.array([f"q{n}" for n in range(count)]),
        pa.array([["x", "y", "z"]] * count, SCHEMA[1].type),
        pa.array([n % 3 for n in range(count)], SCHEMA[2].type),
        when,
        pa.array([decimal.Decimal(n) / 8 for n in range(count)], SCHEMA[4].type),
        pa.DictionaryArray.from_arrays(
            pa.array([None if n % 5 == 0 else n % 2 for n in range(count)], pa.int32()),
            ["k0", "k1"],
        ),
        pa.array([{"blob": b"\xff\0", "day": datetime.date(2020, 1, 1)}] * count, SCHEMA[6].type),
        pa.array([[("a", n % 100)] for n in range(count)], SCHEMA[7].type),
        pa.array([n / 2 for n in range(count)], pa.float32()).cast(pa.float16()),
        pa.ExtensionArray.from_storage(pa.uuid(), uid),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def records(source: RecordSource) -> list[Record]:
    items = list(source)
    assert not [item for item in items if isinstance(item, Reject)]
    return [item for item in items if isinstance(item, Record)]


def rewrite(source: RecordSource, out: Path, answers: dict[int, str], drop: set[int]) -> pa.Table:
    with RecordWriter(out, source) as writer:
        for record in records(source):
            if record.index not in drop:
                writer.write(record, answers.get(record.index, record.answer))
    return pq.read_table(out)


def test_parquet_keeps_types_schema_and_codec(tmp_path: Path) -> None:
    pq.write_table(table(2500), tmp_path / "d.parquet", compression="zstd", row_group_size=700)
    before = pq.read_table(tmp_path / "d.parquet")
    source = open_records(str(tmp_path / "d.parquet"))
    assert (source.format, source.schema, output_name(source)) == (
        "parquet", "choice", "cleaned.parquet",
    )  # fmt: skip
    assert source.fields == tuple(SCHEMA.names)
    third = records(source)[2]
    assert (third.line, third.id, third.options, third.answer) == (3, "2", ("x", "y", "z"), "C")
    assert third.row["cost"] == decimal.Decimal("0.25")
    assert len(third.row) == len(SCHEMA)
    after = rewrite(source, tmp_path / "o.parquet", {}, set())
    assert after.equals(before, check_metadata=True)
    metadata = pq.ParquetFile(tmp_path / "o.parquet").metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    drop = {0, 3, 4, 2499}
    after = rewrite(source, tmp_path / "o.parquet", {1: "A", 1500: "C"}, drop)
    expected = before.to_pydict()["answer"]
    expected[1], expected[1500] = 0, 2
    kept = [n for n in range(2500) if n not in drop]
    assert after["answer"].to_pylist() == [expected[n] for n in kept]
    rest = [name for name in SCHEMA.names if name != "answer"]
    assert after.select(rest).equals(before.select(rest).take(kept), check_metadata=True)
    assert after.schema.equals(before.schema, check_metadata=True)


def categories(names: list[str]) -> pa.DictionaryArray:
    """As pandas writes them: each its own, with an index of 8 bits."""
    return pa.DictionaryArray.from_arrays(pa.array(range(len(names)), pa.int8()), names)


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_rows_dropped_here_and_there_leave_every_type_as_it_was(tmp_path: Path, text: Any) -> None:
    tags: list[Any] = [["long enough for a view, and more"], None, ["x"], ["y"]]
    columns = {
        "question": pa.array([f"question {n}" for n in range(2000)], text),
        "answer": pa.array([f"answer {n} of a good many" for n in range(2000)], text),
        "note": pa.array([None, "n"] * 1000, text),
        "wide": pa.array(tags * 500, pa.large_list(text)),
        "fixed": pa.array(tags * 500, pa.list_(text, 1)),
        "pairs": pa.array([[("k", "v")], None, [], [("k", None)]] * 500, pa.map_(text, text)),
        "blob": pa.array([b"\xff", None] * 1000, pa.binary_view()),
        "json": pa.ExtensionArray.from_storage(pa.json_(text), pa.array(["{}"] * 2000, text)),
    }
    before = pa.table(columns)
    pq.write_table(before, tmp_path / "d.parquet")
    drop = {n for n in range(2000) if n % 3 == 0 or n > 1990}
    source = open_records(str(tmp_path / "d.parquet"))
    after = rewrite(source, tmp_path / "o.parquet", {1: "new", 4: "newer"}, drop)
    kept = [n for n in range(2000) if n not in drop]
    changed = [{1: "new", 4: "newer"}.get(n, f"answer {n} of a good many") for n in kept]
    assert after.schema.equals(pq.read_schema(tmp_path / "d.parquet"), check_metadata=True)
    assert after.column("answer").to_pylist() == changed
    for name in before.schema.names:
        if name != "answer":
            values = before.column(name).to_pylist()
            assert after.column(name).to_pylist() == [values[n] for n in kept], name


def test_rows_may_be_written_in_any_order_and_twice(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a", "b"], "answer": ["x", "y"]}), tmp_path / "d.parquet")
    source = open_records(str(tmp_path / "d.parquet"))
    rows = [item.row for item in source if isinstance(item, Record)]
    for order in ([1, 0], [0, 0], [1]):
        with (tmp_path / "o.parquet").open("wb") as file:
            writer = source.reader.writer(file)
            for at in order:
                writer.write(rows[at], {})
            writer.close()
        assert pq.read_table(tmp_path / "o.parquet")["answer"].to_pylist() == [
            "xy"[n] for n in order
        ]


def test_categories_have_room_for_new_answers_and_other_files(tmp_path: Path) -> None:
    for part in ("a", "b"):
        words = [f"{part}{n}" for n in range(100)]
        columns = {"question": words, "answer": categories(words), "topic": categories(words)}
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
    source = open_records(str(tmp_path))
    answers = {n: f"new {n}" for n in range(0, 200, 2)}
    after = rewrite(source, tmp_path / "o.parquet", answers, set())
    given = [f"{part}{n}" for part in "ab" for n in range(100)]
    assert after["topic"].to_pylist() == given
    assert after["answer"].to_pylist() == [answers.get(n, given[n]) for n in range(200)]
    assert pa.types.is_dictionary(after.schema.field("answer").type)


def test_parquet_chat_turns(tmp_path: Path) -> None:
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("ns"))])
    rows = [
        [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a", "at": 1}]
        for n in range(4)
    ]
    before = pa.table({"messages": pa.array(rows, pa.list_(turn)), "n": range(4)})
    pq.write_table(before, tmp_path / "d.parquet")
    after = rewrite(
        open_records(str(tmp_path / "d.parquet")), tmp_path / "o.parquet", {2: "b"}, {0}
    )
    rows[2][1]["content"] = "b"
    expected = pa.table({"messages": pa.array(rows, pa.list_(turn)), "n": range(4)})
    assert after.equals(expected.slice(1))


def test_parquet_number_column_takes_numbers_only(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["q", "r"], "answer": [1, 2]}), tmp_path / "d.parquet")
    source = open_records(str(tmp_path / "d.parquet"))
    after = rewrite(source, tmp_path / "o.parquet", {0: "7"}, set())
    assert after["answer"].to_pylist() == [7, 2]
    with pytest.raises(UserError, match=r"field 'answer': the answer 'many' does not fit .* int64"):
        rewrite(source, tmp_path / "o.parquet", {0: "many"}, set())


HALF = decimal.Decimal("0.50")


@pytest.mark.parametrize(
    ("kind", "given", "answer", "fits"),
    [
        (pa.int64(), 12, "13", True), (pa.int64(), 12, "13.0", True),
        (pa.int64(), 12, "12.5", False), (pa.int64(), 12, "1/3", False),
        (pa.int64(), 12, "1e30", False), (pa.int8(), 12, "300", False),
        (pa.uint8(), 12, "-3", False), (pa.int64(), 12, "9" * 40, False),
        (pa.float64(), 0.5, "0.1", True), (pa.float64(), 0.5, "1/3", False),
        (pa.float32(), 0.5, "0.1", True), (pa.float32(), 0.5, "1e300", False),
        (pa.float16(), 0.5, "0.25", True), (pa.decimal128(5, 2), HALF, "1.1", True),
        (pa.decimal128(5, 2), HALF, "1.125", False), (pa.decimal128(5, 2), HALF, "many", False),
        (pa.string(), "12", "1/3", True), (pa.dictionary(pa.int8(), pa.string()), "a", "b", True),
    ],
)  # fmt: skip
def test_parquet_tells_beforehand_what_a_column_holds(
    tmp_path: Path, kind: pa.DataType, given: Any, answer: str, fits: bool
) -> None:
    schema = pa.schema({"question": pa.string(), "answer": kind})
    cells = pa.array([given] * 2, kind.value_type if pa.types.is_dictionary(kind) else kind)
    columns = [pa.array(["q", "r"]), cells.cast(kind)]
    pq.write_table(pa.table(columns, schema=schema), tmp_path / "d.parquet")
    source = open_records(str(tmp_path / "d.parquet"))
    first = records(source)[0]
    assert first.answer == str(given)
    told = source.refusal(first.row, answer)
    assert (told is None) == fits
    if fits:
        after = rewrite(source, tmp_path / "o.parquet", {0: answer}, set())["answer"].to_pylist()
        exact = isinstance(given, str | decimal.Decimal)
        expected = type(given)(answer) if exact else pytest.approx(float(answer))
        assert after == [expected, given]
    else:
        assert told is not None
        assert told.endswith(f"does not fit the column's type ({kind})")
        with pytest.raises(UserError, match="does not fit the column's type"):
            rewrite(source, tmp_path / "o.parquet", {0: answer}, set())


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_fractions_of_every_width_read_as_they_are_written(tmp_path: Path, kind: Any) -> None:
    cells = pa.array([0.1, 12.0, None, math.inf, 3.7]).cast(kind)
    before = pa.table({"question": list("abcde"), "answer": cells})
    pq.write_table(before, tmp_path / "d.parquet")
    source = open_records(str(tmp_path / "d.parquet"))
    first, second, *bad, last = source
    assert [one.answer for one in (first, second, last)] == ["0.1", "12.0", "3.7"]
    assert all(isinstance(one, Reject) for one in bad)
    with RecordWriter(tmp_path / "o.parquet", source) as writer:
        writer.write(first, "3.7")
        writer.write(last, last.answer)
    assert pq.read_table(tmp_path / "o.parquet")["answer"].to_pylist() == [cells[4].as_py()] * 2


def test_parquet_cell_that_is_no_text_is_one_reject(tmp_path: Path) -> None:
    bad = pa.array([b"fine", b"\xff\xfe", b"too"]).view(pa.string())
    pq.write_table(pa.table({"question": bad, "answer": ["a"] * 3}), tmp_path / "d.parquet")
    items = list(open_records(str(tmp_path / "d.parquet")))
    assert [type(item) for item in items] == [Record, Reject, Record]
    assert "field 'question': cannot be decoded" in items[1].reason
    assert items[1].line == 2


def test_a_date_beyond_pythons_does_no_harm(tmp_path: Path) -> None:
    days = pa.array([2**30] * 2, pa.int32()).view(pa.date32())
    before = pa.table({"question": ["q", "r"], "answer": ["a", None], "day": days})
    pq.write_table(before, tmp_path / "d.parquet")
    source = open_records(str(tmp_path / "d.parquet"))
    record, bad = source
    assert isinstance(record, Record)
    assert isinstance(bad, Reject)
    assert bad.data == b'{"question":"r","answer":null}'
    with RecordWriter(tmp_path / "o.parquet", source) as writer:
        writer.write(record, record.answer)
    assert pq.read_table(tmp_path / "o.parquet").equals(before.slice(0, 1))


@pytest.mark.parametrize("empty", [0, 2000])
def test_parquet_of_one_long_text_many_times_is_held_in_small_parts(
    tmp_path: Path, empty: int
) -> None:
    """On disk the text stands once, in a dictionary: kilobytes for a hundred megabytes."""
    text, rows = "q" * (1 << 20), 128
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
    for cells in (
        {"question": [None] * empty + [text] * rows, "answer": ["a"] * (empty + rows)},
        {"messages": [[]] * empty + [turns] * rows},
    ):
        before = pa.table(cells)
        path = tmp_path / "d.parquet"
        pq.write_table(before, path, compression="zstd", dictionary_pagesize_limit=8 << 20)
        assert path.stat().st_size < 4096
        source = open_records(str(path))
        pool = pa.default_memory_pool()
        held, peak, found = pool.bytes_allocated(), 0, 0
        tracemalloc.start()
        for item in source:
            found += isinstance(item, Record) and item.question == text
            peak = max(peak, pool.bytes_allocated() - held)
        peak += tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == rows
        assert peak < 32 << 20


def test_parquet_texts_of_every_type_are_measured(tmp_path: Path) -> None:
    long = "x" * (1 << 20)
    texts = pa.array([long, None, "y"] * 20)
    nested = pa.array([["y", None, long], None, []] * 20, pa.list_(pa.string()))
    columns = [
        texts, texts.cast(pa.large_string()), texts.cast(pa.binary()), texts.cast(pa.string_view()),
        texts.dictionary_encode(), nested, nested.cast(pa.large_list(pa.large_string())),
        pa.array([["x", None], None, ["y", long]] * 20, pa.list_(pa.string(), 2)),
        pa.array([{"n": 1, "s": long}, None, {"s": None}] * 20),
        pa.array([[("k", long)]] * 60, pa.map_(pa.string(), pa.string())),
        pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "x", "y"), texts),
    ]  # fmt: skip
    for column in columns:
        table = pa.table({"question": ["q"] * 60, "answer": ["a"] * 60, "a.b": column})
        pq.write_table(table, tmp_path / "d.parquet")
        reader = open_records(str(tmp_path / "d.parquet")).reader
        batches = reader.batches()  # type: ignore[attr-defined]
        sizes = [item.num_rows for item in batches if isinstance(item, pa.RecordBatch)]
        assert sum(sizes) == 60
        assert max(sizes) <= 4, column.type


def test_parquet_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (8_000, 32_000):
        text = ["question " * 20 + str(n) for n in range(count)]
        pq.write_table(pa.table({"question": text, "answer": text}), tmp_path / "d.parquet")
        del text
        source = open_records(str(tmp_path / "d.parquet"))
        pool = pa.default_memory_pool()
        held = pool.bytes_allocated()
        peak = 0
        tracemalloc.start()
        for _ in source:
            peak = max(peak, pool.bytes_allocated() - held)
        peaks.append(peak + tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


datasets = pytest.importorskip("datasets", reason="needs robustft[datasets]")


def hub_rows(count: int) -> Any:
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=["A", "B", "C"]),
        }
    )
    rows = {
        "question": [f"q{n}" for n in range(count)],
        "choices": [["x", "y", "z"]] * count,
        "answer": [n % 3 for n in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def check_hub(source: RecordSource, rows: Any, out: Path) -> None:
    assert (source.format, source.schema, output_name(source)) == (
        "hub",
        "choice",
        "cleaned.parquet",
    )
    assert [r.answer for r in records(source)] == ["ABC"[n % 3] for n in range(len(rows))]
    rewrite(source, out, {1: "C"}, {0})
    again = datasets.Dataset.from_parquet(str(out), cache_dir=str(out.parent / "cache"))
    assert again.features == rows.features
    assert again.to_list() == [{**rows[1], "answer": 2}, *rows.to_list()[2:]]


def test_saved_dataset(tmp_path: Path) -> None:
    rows = hub_rows(2500)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    check_hub(open_records(str(tmp_path / "one")), rows, tmp_path / "o.parquet")
    datasets.DatasetDict({"train": rows, "test": hub_rows(3)}).save_to_disk(tmp_path / "two")
    source = open_records(str(tmp_path / "two"), split="test")
    assert len(records(source)) == 3
    with pytest.raises(UserError, match=r"expected a split 'dev', found train, test"):
        open_records(str(tmp_path / "two"), split="dev")
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": []}')
    with pytest.raises(UserError, match=r"expected a split 'dev', found none"):
        open_records(str(tmp_path / "two"), split="dev")


def test_saved_dataset_reads_no_file_outside_its_folder(tmp_path: Path) -> None:
    rows = hub_rows(3)
    rows.save_to_disk(tmp_path / "one")
    (name,) = [path.name for path in (tmp_path / "one").glob("*.arrow")]
    (tmp_path / "one" / name).rename(tmp_path / name)
    state = tmp_path / "one" / "state.json"
    state.write_text(state.read_text().replace(name, f"../{name}"))
    with pytest.raises(UserError, match="No such file"):
        open_records(str(tmp_path / "one"))


def test_streamed_dataset(tmp_path: Path) -> None:
    rows = hub_rows(600)
    reader = open_stream(rows.to_iterable_dataset(num_shards=2), "owner/name@rev:train")
    from robustft.records.schemas import ChoiceSchema

    layout = ChoiceSchema("choices", "answer")
    source = RecordSource("owner/name", reader, layout, reader.fields, None)
    check_hub(source, rows, tmp_path / "o.parquet")
    again = open_stream(rows.to_iterable_dataset(), "owner/name@other:train")
    assert again.content_hash() != source.content_hash


def test_dataset_id_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = hub_rows(20)
    asked = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: SimpleNamespace(sha="abc")
    )
    monkeypatch.chdir(tmp_path)
    check_hub(open_records("owner/name:config", split="test"), rows, tmp_path / "o.parquet")
    options = {"split": "test", "streaming": True, "revision": "abc"}
    assert asked == [("owner/name", "config", options)]


def test_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hugging Face hub cannot be reached") as caught:
        open_records("owner/name")
    assert "\n" not in str(caught.value)
    for missing in ("name", "data.csv", "./owner/name", "owner/data.csv", "/no/such/file"):
        with pytest.raises(UserError, match="No such file"):
            open_records(missing)


def test_folder_of_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("a card")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.jsonl").write_text("no")
    for split, count in (("train", 3), ("test", 1)):
        for shard in range(2):
            name = folder / "data" / f"{split}-{shard:05}-of-00002.parquet"
            pq.write_table(table(count), name)
    found = records(open_records(str(folder)))
    assert [(one.file, one.line) for one in found] == [
        (f"data/train-{shard:05}-of-00002.parquet", line) for shard in (0, 1) for line in (1, 2, 3)
    ]
    assert len(records(open_records(str(folder), split="test"))) == 2
    with pytest.raises(
        UserError, match=r"expected files of the split 'validation', found .* test, train"
    ):
        open_records(str(folder), split="validation")


def test_folder_of_text_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text('question,answer\nq,a\nq,"broken\n')
    items = list(open_records(str(tmp_path)))
    assert [type(item) for item in items] == [Record, Reject, Record, Reject]
    assert [(item.file, item.line) for item in items] == [
        ("a.csv", 2), ("a.csv", 3), ("b.csv", 2), ("b.csv", 3),
    ]  # fmt: skip
    assert items[1].reason.startswith("broken CSV")
    (tmp_path / "c.csv").write_text("question,reply\nq,a\n")
    with pytest.raises(UserError, match=r"c\.csv: expected the layout and columns of a\.csv"):
        open_records(str(tmp_path))
    (tmp_path / "d.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"found \.csv \(a\.csv\), \.jsonl \(d\.jsonl\): "):
        open_records(str(tmp_path))
