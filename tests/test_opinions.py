"""Opinions survive being stored as bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from robustft.opinions import Opinion, Said, pack, unpack


@given(
    st.one_of(st.none(), st.text(alphabet=st.characters(exclude_categories=("Cs",)))),
    st.one_of(st.floats(0, 100), st.just(float("nan"))),
    st.one_of(st.none(), st.lists(st.floats(0, 1), min_size=1).map(tuple)),
)
def test_opinions_round_trip(
    answer: str | None, nll: float, probabilities: tuple[float, ...] | None
) -> None:
    said = [Said(3, "b", Opinion(answer, "said", nll, nll, probabilities, 3, 4))]
    assert repr([*unpack(pack(said))]) == repr(said)  # repr, for NaN is not equal to itself
