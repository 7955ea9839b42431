from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robustft.corpus import Corpus, CorpusWriter
from robustft.errors import UserError
from robustft.records import Record
from robustft.shards import Shard


def record(index: int) -> Record:
    options = ("red", "grün") if index % 2 else None
    turns = (("user", "hi"), ("assistant", "\n")) if index % 3 else ()
    return Record(index, index + 1, f"r{index}", f"question {index}?", options, "A", turns, {})


def rows(start: int, stop: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((100, 6), np.float32)[start:stop]


def write(folder: Path, start: int, stop: int, held: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    with CorpusWriter(folder, 6, held) as corpus:
        corpus.append([record(i) for i in range(start + held, stop)], rows(start + held, stop))
        corpus.sync()
        assert corpus.rows == stop - start


def test_records_and_embeddings_come_back_by_position_across_shards(tmp_path: Path) -> None:
    edges = [(0, 40), (40, 41), (41, 100)]
    shards = [Shard(n, 3, a, b, tmp_path / str(n)) for n, (a, b) in enumerate(edges)]
    for shard in shards:
        write(shard.folder, shard.start, shard.stop)
    with Corpus(shards) as corpus:
        for position in (0, 39, 40, 41, 99):
            found = corpus.record(position)
            expected = record(position)
            for name in ("index", "id", "question", "options", "answer", "context"):
                assert getattr(found, name) == getattr(expected, name)
        wanted = np.array([99, 0, 41, 40, 0, 39])
        np.testing.assert_array_equal(corpus[wanted], rows(0, 100)[wanted])
        ids, cosines = corpus.index().search(rows(0, 100), 5)
    whole = tmp_path / "whole"
    write(whole, 0, 100)
    with Corpus([Shard(0, 1, 0, 100, whole)]) as corpus:
        expected_ids, expected_cosines = corpus.index().search(rows(0, 100), 5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(cosines, expected_cosines)


@pytest.mark.parametrize("torn", [0, 1, 7, 30])
def test_whatever_is_not_marked_is_cut_and_written_again(tmp_path: Path, torn: int) -> None:
    write(tmp_path, 0, 20)
    for name in ("embeddings.f32", "questions.jsonl", "questions.idx"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"x" * torn)
    write(tmp_path, 0, 50, held=20)
    with Corpus([Shard(0, 1, 0, 50, tmp_path)]) as corpus:
        assert [corpus.record(i).id for i in range(50)] == [f"r{i}" for i in range(50)]
        np.testing.assert_array_equal(corpus[np.arange(50)], rows(0, 50))


def test_a_lost_file_is_told(tmp_path: Path) -> None:
    write(tmp_path, 0, 20)
    (tmp_path / "questions.idx").write_bytes(b"")
    with pytest.raises(UserError, match="shorter than the 20 records"):
        CorpusWriter(tmp_path, 6, 20)
