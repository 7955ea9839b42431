from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustft.errors import UserError
from robustft.store import Opinion, Store, folder_lock


@given(
    st.one_of(st.none(), st.text(alphabet=st.characters(exclude_categories=("Cs",)))),
    st.one_of(st.floats(0, 100), st.just(float("nan"))),
    st.one_of(st.none(), st.lists(st.floats(0, 1), min_size=1).map(tuple)),
)
def test_opinions_round_trip(
    answer: str | None, nll: float, probabilities: tuple[float, ...] | None
) -> None:
    opinion = Opinion(answer, "said", nll, nll, probabilities, 3, 4)
    again = Opinion.from_json(opinion.to_json())
    assert repr(again) == repr(opinion)  # repr, for NaN is not equal to itself


def test_what_was_stored_is_found_with_its_unit(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite") as store:
        store.add("base", 0, 7, [(b"k1", Opinion("A")), (b"k2", Opinion(None))], 0.5)
        found = store.find([b"k1", b"k2", b"k3"], "base", 0)
        assert {key: (unit, opinion.answer) for key, (unit, opinion) in found.items()} == {
            b"k1": (7, "A"),
            b"k2": (7, None),
        }
        assert store.find([b"k1"], "base", 1) == {}
        assert math.isnan(found[b"k2"][1].nll)
        assert store.totals()["base"]["questions"] == 2


def test_a_failed_batch_leaves_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite") as store:
        with pytest.raises(AttributeError):
            store.add("base", 0, 0, [(b"k1", Opinion("A")), (b"k2", None)], 0.0)  # type: ignore[list-item]
        assert store.find([b"k1"], "base", 0) == {}


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite") as store:
        assert store.holds({"k": 3, "beta": 0.5}) is False
        store.claim({"k": 3, "beta": 0.5})
        assert store.holds({"k": 3, "beta": 0.5}) is True
        with pytest.raises(UserError, match=r"k was 3, now 5"):
            store.claim({"k": 5, "beta": 0.5})


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.sqlite").write_bytes(b"this is not a database, and long enough to say so" * 9)
    with pytest.raises(UserError, match=r"run\.sqlite: cannot be used"):
        Store(tmp_path / "run.sqlite")


def test_a_second_run_names_the_first(tmp_path: Path) -> None:
    code = "from pathlib import Path; from robustft.store import folder_lock\n"
    code += f"with folder_lock(Path({str(tmp_path)!r})): pass"
    with folder_lock(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"process {os.getpid()}" in done.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_records_are_found_by_position(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite") as store:
        store.add_records((i, f"id{i}", [f"q{i}", None, "a"]) for i in range(1200))
        found = store.records_at([0, 5, 1199])
        assert found[5] == ("id5", ["q5", None, "a"])
        assert sorted(found) == [0, 5, 1199]
