from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commandline import quiz, write

from robustft.corpus import Corpus, EmbeddingWriter
from robustft.errors import UserError
from robustft.intake import Intake, take_in
from robustft.records import open_records
from robustft.shards import Shard


def rows(start: int, stop: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((100, 6), np.float32)[start:stop]


def embed(folder: Path, start: int, stop: int, held: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    with EmbeddingWriter(folder, 6, held) as embeddings:
        embeddings.append(rows(start + held, stop))
        embeddings.sync()
        assert embeddings.rows == stop - start


@pytest.fixture
def intake(tmp_path: Path) -> Intake:
    source = open_records(str(write(tmp_path / "in.jsonl", quiz(100))))
    return take_in(source, tmp_path / "input")


def test_records_and_embeddings_come_back_by_position_across_shards(
    tmp_path: Path, intake: Intake
) -> None:
    edges = [(0, 40), (40, 41), (41, 100)]
    shards = [Shard(n, 3, a, b, tmp_path / str(n)) for n, (a, b) in enumerate(edges)]
    for shard in shards:
        embed(shard.folder, shard.start, shard.stop)
    corpus = Corpus(intake, shards)
    wanted = np.array([99, 0, 41, 40, 0, 39])
    assert [corpus.record(position).id for position in wanted] == [f"r{n}" for n in wanted]
    np.testing.assert_array_equal(corpus[wanted], rows(0, 100)[wanted])
    ids, cosines = corpus.index().search(rows(0, 100), 5)
    whole = Shard(0, 1, 0, 100, tmp_path / "whole")
    embed(whole.folder, 0, 100)
    expected_ids, expected_cosines = Corpus(intake, [whole]).index().search(rows(0, 100), 5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(cosines, expected_cosines)


@pytest.mark.parametrize("torn", [0, 1, 7, 30])
def test_whatever_is_not_marked_is_cut_and_written_again(
    tmp_path: Path, intake: Intake, torn: int
) -> None:
    embed(tmp_path, 0, 20)
    with (tmp_path / "embeddings.f32").open("ab") as file:
        file.write(b"x" * torn)
    embed(tmp_path, 0, 50, held=20)
    corpus = Corpus(intake, [Shard(0, 1, 0, 50, tmp_path)])
    np.testing.assert_array_equal(corpus[np.arange(50)], rows(0, 50))


def test_a_lost_file_is_told(tmp_path: Path) -> None:
    embed(tmp_path, 0, 20)
    (tmp_path / "embeddings.f32").write_bytes(b"")
    with pytest.raises(UserError, match="shorter than the 20 records"):
        EmbeddingWriter(tmp_path, 6, 20)
