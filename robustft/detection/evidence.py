"""What a detector needs to know of records: one row each, gathered unit by unit."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft import answers
from robustft.opinions import Opinion
from robustft.prompts import LETTERS
from robustft.records import Record

_LETTER = 0.9  # the probability an expert is taken to give the letter it names without one
FREE_TEXT = 1  # instead of a set of options
TUNED = "tuned"  # the model fine-tuned out of fold: [n, options] probabilities, where it was asked
Evidence = dict[str, NDArray[Any]]  # name -> [n] or [n, width], one row a record


def stacked(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several units as one; narrower columns are filled up with zeros."""
    found = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if arrays[0].ndim == 2:
            width = max(array.shape[1] for array in arrays)
            arrays = [
                array
                if array.shape[1] == width
                else np.pad(array, ((0, 0), (0, width - array.shape[1])))
                for array in arrays
            ]
        found[name] = np.concatenate(arrays)
    return found


@functools.lru_cache(maxsize=4096)
def option_set(options: tuple[str, ...]) -> int:
    """A number for a set of options; sets that differ in spelling alone share it."""
    text = "\0".join(answers.option_names(options))
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def is_free_text(record: Record) -> bool:
    """Whether an answer has no options, no few words and no final number to be compared by."""
    return record.kind == "text" and answers.final_number(record.answer) is None


def option_probabilities(said: Opinion, options: int) -> NDArray[np.float32]:
    """[options] an expert's probabilities; most on its letter where only that is known."""
    if said.probabilities is not None:
        return np.array(said.probabilities, dtype=np.float32)
    values = np.full(options, 1.0 / options, dtype=np.float32)
    if said.answer is not None and said.answer in LETTERS[:options] and options > 1:
        values[:] = (1.0 - _LETTER) / (options - 1)
        values[LETTERS.index(said.answer)] = _LETTER
    return values


def as_one(
    values: NDArray[np.float32], options: tuple[str, ...], given: int
) -> NDArray[np.float32]:
    """Probabilities where options that read like the given one count as it."""
    same = [n for n, option in enumerate(options) if n != given and option == options[given]]
    if same:
        values = values.copy()
        values[given] += values[same].sum()
        values[same] = 0.0
    return values
