"""The dialects of CSV: what divides the columns is found, and kept in what is written."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from robustft.errors import UserError
from robustft.records import Record, RecordSource, RecordWriter, Reject, open_records


def save(path: Path, text: str) -> str:
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return str(path)


def rewrite(path: str, answer: str, schema: str | None = None) -> tuple[RecordSource, str]:
    """A file's source, and what is written with every answer replaced."""
    source = open_records(path, schema=schema)
    out = Path(path).with_name(f"out{source.suffix}")
    with RecordWriter(out, source) as writer:
        for item in source:
            assert isinstance(item, Record)
            writer.write(item, answer)
    data = out.read_bytes()
    return source, (gzip.decompress(data) if source.suffix.endswith(".gz") else data).decode()


def joined(lines: list[list[str]], mark: str) -> str:
    return "".join(mark.join(line) + "\n" for line in lines)


@pytest.mark.parametrize("name", ["d.tsv", "d.TSV", "d.tsv.gz"])
def test_a_tsv_is_a_csv_with_tabs(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, 'question\tanswer\na, b;c?\t"x\ty"\n')
    source, written = rewrite(path, "z, z")
    assert (source.format, source.suffix) == ("csv", name.lower().removeprefix("d"))
    assert next(iter(source)).answer == "x\ty"  # type: ignore[union-attr]
    assert written == "question\tanswer\na, b;c?\tz, z\n"


def test_a_tsv_may_hold_another_dialect_of_csv_but_a_tab_comes_first(tmp_path: Path) -> None:
    _, written = rewrite(save(tmp_path / "a.tsv", "question;answer\na;b\n"), "c")
    assert written == "question;answer\na;c\n"
    path = save(tmp_path / "b.tsv", "question\tanswer, short\na, b?\tc\n")
    _, written = rewrite(path, "d", "qa:question,answer, short")
    assert written == "question\tanswer, short\na, b?\td\n"


@pytest.mark.parametrize(
    ("mark", "other"), [(";", ", "), ("\t", ", "), ("|", "; "), (",", "; "), (";", "|")]
)
def test_a_columns_name_may_hold_another_delimiter(tmp_path: Path, mark: str, other: str) -> None:
    lines = [["question", f"notes{other}more", "answer"], ["a", "b", "c"], ["a", "b", "d"]]
    source, written = rewrite(save(tmp_path / "d.csv", joined(lines, mark)), "e")
    assert source.fields == tuple(lines[0])
    assert written == joined([lines[0], ["a", "b", "e"], ["a", "b", "e"]], mark)


def test_where_several_delimiters_divide_the_rows_the_one_with_most_columns_is_meant(
    tmp_path: Path,
) -> None:
    text = "question;notes, more;answer\na;1,5;c\n"  # one comma in every line
    source, _ = rewrite(save(tmp_path / "d.csv", text), "c")
    assert source.fields == ("question", "notes, more", "answer")


def test_rows_and_not_names_tell_what_divides_them(tmp_path: Path) -> None:
    text = "question,answer;a;b;c\n" + "x,y\n" * 3 + "x;y;z;1\n"
    source = open_records(save(tmp_path / "d.csv", text), schema="qa:question,answer;a;b;c")
    assert source.fields == ("question", "answer;a;b;c")


@pytest.mark.parametrize("few", ["", "x,y\n", "x;y\n"])
@pytest.mark.parametrize("names", [("a.csv", "b.csv"), ("b.csv", "a.csv")])
def test_files_of_one_header_have_one_delimiter(
    tmp_path: Path, names: tuple[str, str], few: str
) -> None:
    """Also where one holds no record that tells which it is."""
    head = "question,answer,notes (a; b; c; d)\n"
    for name, rows in zip(names, ("q,a,\n" * 3, few), strict=True):
        save(tmp_path / name, head + rows)
    items = list(open_records(str(tmp_path)))
    assert [item.answer for item in items if isinstance(item, Record)] == ["a"] * 3
    assert len(items) == 3 + bool(few)


@pytest.mark.parametrize(
    ("first", "mark"),
    [("sep=;", ";"), ("SEP=,", ","), ("sep=\t", "\t"), ('"sep=;"', ";"), ("sep=#", "#")],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_that_tells_excel_the_delimiter_is_believed_and_kept(
    tmp_path: Path, first: str, mark: str, end: str
) -> None:
    head = f"\ufeff{first}{end}question{mark}answer|more{end}"
    path = save(tmp_path / "d.csv", f"{head}a{mark}b{end}'{mark}{end}")
    source = open_records(path, schema="qa:question,answer|more")
    record, reject = source
    assert isinstance(record, Record)
    assert isinstance(reject, Reject)
    assert (record.question, record.answer, record.line, reject.line) == ("a", "b", 3, 4)
    with RecordWriter(tmp_path / "out.csv", source) as writer:
        writer.write(record, "c")
    assert (tmp_path / "out.csv").read_bytes().decode() == f"{head}a{mark}c{end}"


def test_a_line_that_tells_excel_the_delimiter_is_no_header(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"d\.csv: the file is empty"):
        open_records(save(tmp_path / "d.csv", "sep=;\n"))
    (tmp_path / "d.csv").unlink()
    save(tmp_path / "a.csv", "sep=;\nquestion;answer\na;b\n")
    save(tmp_path / "b.csv", "question;answer\na;b\n")
    with pytest.raises(UserError, match=r"b\.csv: expected the layout and columns of a\.csv"):
        open_records(str(tmp_path))
