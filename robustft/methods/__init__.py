"""The systems of the paper's tables, one file each.

A method either prepares a training set from the noisy one, or asks a model as it is, or shows it
noisy examples at test time.
"""

from __future__ import annotations

from robustft.errors import UserError
from robustft.methods import (
    noiseal,
    others,
    robustft_rows,
    self_label,
    self_rag,
    self_select,
    sft,
    vanilla,
)
from robustft.methods.base import Method, Setting

__all__ = ["METHODS", "Method", "Setting", "find_method"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        vanilla.METHOD,
        others.HERMES,
        others.TULU,
        self_label.METHOD,
        sft.METHOD,
        noiseal.METHOD,
        self_rag.METHOD,
        self_select.METHOD,
        robustft_rows.PAPER,
        robustft_rows.DEFAULT,
    )
}


def find_method(name: str) -> Method:
    """The method of that name. Raises UserError naming those there are."""
    if name not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
