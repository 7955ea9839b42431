from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustft.selection import select_confident

ENTROPIES = st.lists(st.one_of(st.floats(0, 20), st.just(float("nan")), st.just(1.0)), max_size=60)


@given(ENTROPIES, st.floats(0, 1))
def test_keeps_exactly_the_most_confident_share(nll: list[float], beta: float) -> None:
    mask, threshold = select_confident(nll, beta)
    values = np.array(nll)
    kept, dropped = values[mask], values[~mask]
    wanted = (2 * Fraction(str(beta)) * len(nll) + 1) // 2  # rounded half up
    assert mask.sum() == min(wanted, np.isfinite(values).sum())
    assert np.isfinite(kept).all()
    if len(kept):
        assert threshold == kept.max()
        assert (dropped[np.isfinite(dropped)] >= threshold).all()
    else:
        assert np.isnan(threshold)


@pytest.mark.parametrize(
    ("count", "beta", "kept"),
    [(45, 0.7, 32), (50, 0.29, 15), (50, 0.57, 29), (5, 0.5, 3), (4, 0.1, 0)],
)
def test_half_a_record_is_rounded_up_whatever_its_share_is_in_binary(
    count: int, beta: float, kept: int
) -> None:
    assert select_confident(np.arange(count), beta)[0].sum() == kept


@given(ENTROPIES)
def test_selections_nest(nll: list[float]) -> None:
    small, large = (select_confident(nll, beta)[0] for beta in (0.3, 0.7))
    assert (large | ~small).all()


def test_ties_go_to_the_lower_position() -> None:
    mask, _ = select_confident([1.0, 1.0, 1.0, 1.0], 0.5)
    assert mask.tolist() == [True, True, False, False]


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_outside_its_range_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        select_confident([1.0], beta)


def test_beta_zero_and_one() -> None:
    assert not select_confident([1.0, 2.0], 0)[0].any()
    assert select_confident([1.0, 2.0], 1)[0].all()
    assert select_confident([], 0.5)[0].shape == (0,)
