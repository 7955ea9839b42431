"""Keep only the denoised records the model is most sure of (eq. 7, 8)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustft.metrics import share_of


def select_confident(nll: ArrayLike, beta: float) -> tuple[NDArray[np.bool_], float]:
    """The share `beta` of entries with the lowest response entropy (eq. 8).

    Parameters
    ----------
    nll: [n] mean negative log-likelihood of each answer (eq. 7), nats; NaN is never selected,
        infinity (no log-probability known) last.
    beta: share of the n entries to keep, in [0, 1]; the count is rounded half up.

    Returns:
    -------
    [n] mask, True where kept, ties broken by lower position; and the largest nll kept
    (NaN where nothing is).

    Raises:
    ------
    ValueError: beta is not in [0, 1].
    """
    values = np.asarray(nll, dtype=np.float64)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta!r}")
    count = min(share_of(beta, len(values)), int((~np.isnan(values)).sum()))
    mask = np.zeros(len(values), dtype=np.bool_)
    if count == 0:
        return mask, float("nan")
    order = np.argsort(values, kind="stable")  # NaN sorts last
    mask[order[:count]] = True
    return mask, float(values[order[count - 1]])
