"""Which option was given in place of which: the rule that wrong labels follow, for a reader to see.

Only among records that share their options: a letter that means something else in every question
says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustft.answers import option_names
from robustft.prompts import LETTERS
from robustft.records import Record
from robustft.terminal import printable

_SHOWN = 8  # the commonest
_FEW = 10  # records that say nothing of a rule
_MOST = 0.5  # of the records found noisy, where a pair makes up that much, it is the rule
_MOST_OF_TWO = 0.75  # two options have two pairs, and one of them always makes up half
_QUOTED = 40  # characters of an option on the terminal


@dataclass(frozen=True, slots=True)
class Confusion:
    """An option given in place of another, among records that share their options."""

    given: str  # the option's text
    right: str  # that of the one the crowd holds right
    records: int  # found noisy that were given the one for the other
    held_right: int  # all for which the crowd holds the other right, whatever they were given
    noisy: int  # all found noisy
    options: int  # how many there are to choose from

    @property
    def prevails(self) -> bool:
        """Whether most of what was found noisy is this."""
        most = _MOST if self.options > 2 else _MOST_OF_TWO
        return self.records >= max(_FEW, most * self.noisy)

    def __str__(self) -> str:
        """As in `"neutral" given for "positive": 143 of 161 found noisy`, safe to print."""
        given, right = map(_quoted, (self.given, self.right))
        return f"{given} given for {right}: {self.records:,} of {self.noisy:,} found noisy"


class Confusions:
    """Counts them unit by unit; as large as the juries and options are many, not the records.

    `juries` judge the records, each those of one set of options, or of many sets that are rare.
    """

    def __init__(self, juries: int, width: int) -> None:
        self._given = np.zeros((juries, width, width), np.int64)  # found noisy [jury, right, given]
        self._right = np.zeros((juries, width), np.int64)  # noisy or clean
        self._options: dict[int, tuple[str, ...]] = {}  # of each jury; (): they are not the same

    def add(
        self,
        records: Sequence[Record],
        jury: NDArray[np.int8],
        pooled: NDArray[np.float64],
        noisy: NDArray[np.bool_],
        silent: NDArray[np.bool_],
    ) -> None:
        """Count n records.

        jury: [n] which one judged, -1: none; pooled: [n, options] its probabilities; noisy, silent:
        [n] what was found noisy, and what has no verdict.
        """
        judged = (jury >= 0) & ~silent & bool(pooled.shape[1])
        rows = [r for r in np.flatnonzero(judged).tolist() if records[r].options is not None]
        if not rows:
            return
        given = np.array([LETTERS.index(records[row].answer) for row in rows])
        right, whose, wrong = pooled[rows].argmax(1), jury[rows], noisy[rows]
        np.add.at(self._right, (whose, right), 1)
        np.add.at(self._given, (whose[wrong], right[wrong], given[wrong]), 1)
        sets = zip(whose.tolist(), (records[row].options or () for row in rows), strict=True)
        for number, options in dict.fromkeys(sets):  # as they come: the first spelling is shown
            known = self._options.setdefault(number, options)
            if known and known != options and option_names(known) != option_names(options):
                self._options[number] = ()

    def found(self) -> tuple[Confusion, ...]:
        """The commonest first, eight at most; sets of the same options in another order are one."""
        pairs: Counter[tuple[tuple[str, ...], str, str]] = Counter()
        right: Counter[tuple[tuple[str, ...], str]] = Counter()
        noisy: Counter[tuple[str, ...]] = Counter()
        texts: dict[tuple[tuple[str, ...], str], str] = {}
        for number, options in sorted(self._options.items()):
            if not options or self._right[number].sum() < 2:
                continue
            names = option_names(options)
            alike = tuple(sorted(names))
            noisy[alike] += int(self._given[number].sum())
            for at, name in enumerate(names):
                texts.setdefault((alike, name), options[at])
                right[alike, name] += int(self._right[number, at])
            for at, instead in np.argwhere(self._given[number]).tolist():
                if names[at] != names[instead]:
                    count = int(self._given[number, at, instead])
                    pairs[alike, names[instead], names[at]] += count
        ranked = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:_SHOWN]
        return tuple(
            Confusion(
                texts[alike, instead], texts[alike, name], pairs[alike, instead, name],
                right[alike, name], noisy[alike], len(alike),
            )
            for alike, instead, name in ranked
        )  # fmt: skip


def _quoted(text: str) -> str:
    return f'"{printable(text[:_QUOTED])}{"…" * (len(text) > _QUOTED)}"'
