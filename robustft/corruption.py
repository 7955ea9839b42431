"""A noisy copy of a training set at an exact rate, with the truth kept beside it.

Of N records rate * N, rounded half up, get a wrong answer (in the paper's official sets rounded
down), uniform over the wrong options (or, for open questions, the answer to another question of the
same kind); with one seed the records changed at a lower rate are also changed at a higher one, in
the same way.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from robustft.answers import Kind, matches, normalise
from robustft.errors import UserError
from robustft.files import replacing, spare, spare_others
from robustft.metrics import share_of
from robustft.next_steps import to_clean
from robustft.records import Record, RecordSource, RecordWriter, Reject, leave_out, watched
from robustft.records.formats import dump_json
from robustft.terminal import counted
from robustft.truth import written_by_corrupt

# Wrong answers to open questions come from this many distinct answers of each kind.
DONORS = 4096
DONOR_CHARACTERS = 16_384
KINDS: tuple[Kind, ...] = ("choice", "number", "span", "text")
FIXED = 255  # in place of a kind: no wrong answer exists


@dataclass(frozen=True, slots=True)
class CorruptionReport:
    """What `corrupt` did: counts, and the two files it wrote; `str()` is its closing summary."""

    records: int
    rejected: int
    corrupted: int
    rate: float
    seed: int
    out: Path
    truth: Path
    schema: str | None = None  # as it was named; None where it was found

    def __str__(self) -> str:
        cleaned = self.out.with_name(f"{self.out.name.partition('.')[0]}-cleaned")
        unread = f"; {counted(self.rejected, 'unreadable one')} left out" if self.rejected else ""
        return (
            f"{self.corrupted:,} of {counted(self.records, 'answer')} made wrong "
            f"(rate {self.rate:g}, seed {self.seed}){unread}\n"
            f"noisy copy  {self.out}\n"
            f"truth       {self.truth}\n"
            f"next:\n  {to_clean(self.out, cleaned, self.schema, self.truth)}"
        )


class _Donor(NamedTuple):
    rank: int
    normal: str
    answer: str


def _hash(seed: int, purpose: str, text: str) -> int:
    """Return 64 bits that depend on all three arguments and on nothing else."""
    data = f"{seed}\0{purpose}\0{text}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def corrupt(
    source: RecordSource, rate: float, seed: int, out: Path, *, schema: str | None = None
) -> CorruptionReport:
    """Write `source` to `out` with a share `rate` in [0, 1] of its answers made wrong.

    Beside it, `<out>.truth.jsonl` holds one line a record: id, index, truth (the answer before),
    given (the answer now) and corrupted. `schema` is the name by which `source` was opened, if it
    was by one: the copy must be opened by it, too. Two passes over the input; 9 bytes a record and
    at most `DONORS` answers of each kind are held. Raises `UserError` when the rate is out of
    range, `out` has not the input's format, or too few records have any wrong answer.
    """
    if not 0.0 <= rate <= 1.0:
        raise UserError(f"rate: expected a share from 0 to 1, found {rate}")
    if not out.name.lower().endswith(source.suffix):
        raise UserError(f"{out}: expected a name ending in {source.suffix}, as the input has")
    spare(out, source.path)
    truth = out.with_name(out.name + ".truth.jsonl")
    if not written_by_corrupt(truth):  # else they are an earlier output, or what was left of one
        spare_others([out, truth])
    kinds, ranks, donors, rejected = _survey(source, seed)
    count = share_of(rate, len(kinds))
    chosen = _choose(kinds, ranks, count)
    with (
        RecordWriter(out, source) as writer,
        replacing(truth) as temporary,
        temporary.open("wb") as lines,
    ):
        for record in watched(source, "write"):
            if not isinstance(record, Record):
                continue
            if record.index >= len(kinds):
                raise source.changed()
            given = record.answer
            if chosen[record.index]:
                given = _wrong_answer(record, source, seed, donors)
            writer.write(record, given)
            line = {
                "id": record.id,
                "index": record.index,
                "truth": record.answer,
                "given": given,
                "corrupted": bool(chosen[record.index]),
            }
            lines.write(dump_json(line) + b"\n")
    return CorruptionReport(len(kinds), rejected, count, rate, seed, out, truth, schema)


def _survey(
    source: RecordSource, seed: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64], dict[Kind, list[_Donor]], int]:
    """Return kind [N], rank [N], the donors of each kind and the number of rejects."""
    kinds, ranks, rejected = bytearray(), array("Q"), 0
    # Negated ranks: heapq keeps the smallest on top, the donors wanted are those of least rank.
    heaps: dict[Kind, list[tuple[int, str, str]]] = {kind: [] for kind in KINDS[1:]}
    held: set[tuple[Kind, str]] = set()
    for item in watched(source, "read"):
        if isinstance(item, Reject):
            rejected = leave_out(item, source, rejected)
            continue
        ranks.append(_hash(seed, "rank", item.id))
        kind = item.kind
        fixed = kind == "choice" and not _wrong_options(item, source)
        kinds.append(FIXED if fixed else KINDS.index(kind))
        if kind == "choice" or len(item.answer) > DONOR_CHARACTERS:
            continue
        normal, heap = normalise(item.answer, kind), heaps[kind]
        if (kind, normal) in held:
            continue
        entry = (-_hash(seed, kind, normal), normal, item.answer)
        held.add((kind, normal))
        heapq.heappush(heap, entry)
        if len(heap) > DONORS:
            held.discard((kind, heapq.heappop(heap)[1]))
    donors = {
        kind: sorted(_Donor(-rank, normal, answer) for rank, normal, answer in heap)
        for kind, heap in heaps.items()
    }
    by_kind = np.frombuffer(bytes(kinds), np.uint8).copy()
    for kind, found in donors.items():
        if len(found) < 2:  # nothing but this answer: no other record has a different one
            by_kind[by_kind == KINDS.index(kind)] = FIXED
    return by_kind, np.array(ranks, np.uint64), donors, rejected


def _choose(
    kinds: npt.NDArray[np.uint8], ranks: npt.NDArray[np.uint64], count: int
) -> npt.NDArray[np.bool_]:
    """Return which records [N] change: the `count` of least rank among those that can."""
    able = np.flatnonzero(kinds != FIXED)
    if len(able) < count:
        raise UserError(
            f"rate: {count:,} of {counted(len(kinds), 'record')} must get a wrong answer, but only "
            f"{counted(len(able), 'has', 'have')} one to take (another option, or another record's "
            "answer of the same kind)"
        )
    chosen = np.zeros(len(kinds), bool)
    chosen[able[np.argsort(ranks[able], kind="stable")[:count]]] = True
    return chosen


def _wrong_options(record: Record, source: RecordSource) -> list[str]:
    """Return the letters that can be written and whose text differs from the given one's."""
    options = [option.strip() for option in record.options or ()]
    right = options[ord(record.answer) - ord("A")]
    wrong = [chr(ord("A") + i) for i, option in enumerate(options) if option != right]
    return [letter for letter in wrong if source.refusal(record.row, letter) is None]


def _wrong_answer(
    record: Record, source: RecordSource, seed: int, donors: dict[Kind, list[_Donor]]
) -> str:
    """Return the record's wrong answer; it depends on seed and data, never on the rate."""
    draw = _hash(seed, "answer", record.id)
    if record.options is not None:
        wrong = _wrong_options(record, source)
        return wrong[draw % len(wrong)]
    kind = record.kind  # donors stood in the same column: any of them fits
    normal, found = normalise(record.answer, kind), donors[kind]
    start = draw % len(found)
    others = (d for d in found[start : start + 64] + found[:64] if d.normal != normal)
    first = next(others)
    # Among long answers two may agree though their words differ: prefer one that does not.
    best = (d for d in chain([first], others) if not matches(d.answer, record.answer, kind=kind))
    return next(best, first).answer
