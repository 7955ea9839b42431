from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustft.errors import UserError
from robustft.shards import Published, publish, split, withdraw
from robustft.store import UNIT_ROWS


@given(st.integers(1, 100_000), st.integers(1, 70))
def test_shards_are_whole_units_that_cover_the_input(total: int, count: int) -> None:
    shards = split(total, count, Path("out"), "ab" * 16)
    assert len(shards) == count
    assert [shard.start for shard in shards[1:]] == [shard.stop for shard in shards[:-1]]
    assert (shards[0].start, shards[-1].stop) == (0, total)
    assert all(shard.start % UNIT_ROWS == 0 for shard in shards if shard.rows)
    assert [unit for shard in shards for unit in shard.units] == [*range(-(-total // UNIT_ROWS))]
    sizes = [len(shard.units) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_what_is_published_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "phases" / "detected"
    publish(target, {"x": np.arange(3), "empty": np.zeros((0, 4))}, {"seconds": 1.5})
    publish(target, {"x": np.arange(9)}, {"seconds": 2.5})
    found = Published(target)
    assert found.facts == {"seconds": 1.5}
    assert found["x"].tolist() == [0, 1, 2]
    assert {name: array.shape for name, array in found.arrays.items()} == {
        "x": (3,), "empty": (0, 4)
    }  # fmt: skip
    assert [path.name for path in target.parent.iterdir()] == ["detected"]


def test_a_damaged_publication_is_told(tmp_path: Path) -> None:
    publish(tmp_path / "p", {"x": np.arange(3)})
    (tmp_path / "p/x.npy").write_bytes(b"no array")
    (tmp_path / "p/facts.json").write_bytes(b"{")
    with pytest.raises(UserError, match="cannot be read"):
        Published(tmp_path / "p")["x"]
    with pytest.raises(UserError, match="cannot be read"):
        _ = Published(tmp_path / "p").facts


def test_nothing_pickled_is_read(tmp_path: Path) -> None:
    publish(tmp_path / "p", {"x": np.arange(3)})
    np.save(tmp_path / "p/x.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        Published(tmp_path / "p")["x"]


def test_what_cannot_be_withdrawn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    withdraw(tmp_path / "p")  # is not there: nothing to do
    publish(tmp_path / "p", {"x": np.arange(3)})

    def busy(folder: Path) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        with pytest.raises(UserError, match="cannot be removed: Device or resource busy"):
            withdraw(tmp_path / "p")
    withdraw(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_nobody_finds_a_part_of_what_is_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed meanwhile leaves what looks published, and is not."""
    publish(tmp_path / "p", {"x": np.arange(3)})

    class Killed(BaseException):
        pass

    def half(folder: Path) -> None:
        (folder / "x.npy").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(Killed):
        withdraw(tmp_path / "p")
    assert not (tmp_path / "p").exists()
