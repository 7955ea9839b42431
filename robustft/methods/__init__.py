"""The systems of the paper's tables, one file each.

A method either prepares a training set from the noisy one, or asks a model as it is, or shows it
noisy examples at test time.
"""

from __future__ import annotations

import contextlib

from robustft.cache import Cache
from robustft.config import CleanConfig
from robustft.embedding import Embedder
from robustft.engines.cached import RememberingEngine
from robustft.engines.factory import load_engine
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
from robustft.outputs import ANSWERS
from robustft.verdicts import CleanResult

__all__ = ["METHODS", "Method", "Setting", "clean_by", "find_method"]

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


def clean_by(name: str, config: CleanConfig) -> CleanResult:
    """Write the training set that a method makes of `config.input` to `config.out`.

    What the model has answered stays there in `answers.sqlite`: a killed run asks nothing twice.

    Raises:
        UserError: no such method, it makes none, or the input, a model or the folder is wrong.
    """
    prepare = find_method(name).prepare
    if prepare is None:
        raise UserError(f"method {name!r} makes no training set")
    engine = load_engine(config.engine)
    with contextlib.closing(Cache(config.out / ANSWERS)) as cache:
        if not name.startswith("robustft"):  # which has a store of its own
            engine = RememberingEngine(engine, cache, config.engine)
        return prepare(Setting(config, engine, Embedder(config.embedder)))
