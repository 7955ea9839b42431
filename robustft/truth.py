"""How a run's verdicts compare with the truth, where somebody knows it (as `corrupt` does)."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from robustft.answers import answer_kind, matches
from robustft.errors import UserError
from robustft.records import Record, RecordSource, Reject, folded, open_records
from robustft.records.framing import short
from robustft.terminal import plural_of

_CHECKED = 100  # records looked at before a run


@dataclass(frozen=True, slots=True)
class Comparison:
    """Counts of records; `str()` is the closing lines."""

    records: int
    wrong: int  # given answers that are not the truth
    noisy: int  # found noisy
    hits: int  # of those, wrong
    ranked: float | None  # AUROC of the noise score; None where nothing or all is wrong or judged
    kept: int  # in the training set
    right: int  # of those, with the true answer

    def __str__(self) -> str:
        are = plural_of(self.wrong, "is", "are")
        lines = f"truth         {self.wrong:,} of {self.records:,} given answers {are} wrong"
        if self.noisy:
            lines += (
                f"; of {self.noisy:,} found noisy {self.hits:,} "
                f"{plural_of(self.hits, 'is', 'are')} (precision "
                f"{self.hits / self.noisy:.0%}, recall {self.hits / max(self.wrong, 1):.0%})"
            )
        if self.ranked is not None:
            lines += (
                "\n              noise_score ranks a wrong answer above a right one "
                f"{self.ranked:.0%} of the time (chance: 50%)"
            )
        given = (self.records - self.wrong) / max(self.records, 1)
        return lines + (
            f"\n              right answers: {given:.1%} as given, "
            f"{self.right / max(self.kept, 1):.1%} of {self.kept:,} in the training set"
        )


def check(truth: str, source: Iterable[Record | Reject] = (), schema: str | None = None) -> None:
    """Raise UserError where `compare` could not read the truth, or it is that of another input.

    `source` is the input: its first records must be those of the truth by id and given answer, and
    of those without ids of their own most by question too, but for spaces and case.
    """
    records = (item for item in source if isinstance(item, Record))
    different = []
    pairs = list(itertools.islice(itertools.zip_longest(_known(truth, schema), records), _CHECKED))
    for number, (found, record) in enumerate(pairs, 1):
        if record is None:
            break
        known = _same_record(truth, number, {"id": record.id, "given": record.answer}, found)
        if record.id == str(record.index):
            asked = known.question
            if asked is not None and folded(asked) != folded(record.question):
                different.append((record.question, asked))
    if len(different) > len(pairs) / 2:
        expected, other = map(short, different[0])
        raise UserError(
            f"{truth}: expected the question {expected!r}, found {other!r}: the truth of another "
            "input?"
        )


def compare(out: Path, truth: str, schema: str | None = None) -> Comparison:
    """Compare `out`/verdicts.jsonl with the truth.

    `truth`: what `corrupt` writes beside its copy, one JSON line a record with `id` and `truth`; or
    the records with right answers, in any schema that `clean` reads: in `schema`, the input's,
    where they have its fields. Both are in the input's order; the truth may go on where a run had a
    --limit. Raises UserError where it cannot be read or belongs to another input.
    """
    scores, errors = array("d"), array("b")
    noisy = hits = kept = corrected = 0
    for number, (verdict, found) in enumerate(
        itertools.zip_longest(_lines(out / "verdicts.jsonl"), _known(truth, schema)), 1
    ):
        if verdict is None:
            break
        right = _same_record(truth, number, verdict, found).answer
        wrong = not _same(right, verdict["given"])
        flagged = verdict.get("verdict") == "noisy"  # baselines give no verdict and no score
        noisy += flagged
        hits += flagged and wrong
        score = verdict.get("noise_score")
        scores.append(np.nan if score is None else score)
        errors.append(wrong)
        if verdict["answer"] is not None:
            kept += 1
            corrected += _same(right, verdict["answer"])
    is_wrong = np.frombuffer(errors, np.int8).astype(np.bool_)
    ranked = _auroc(np.frombuffer(scores), is_wrong)
    return Comparison(len(scores), int(is_wrong.sum()), noisy, hits, ranked, kept, corrected)


def _same_record(
    truth: str, number: int, verdict: Mapping[str, Any], known: _Known | None
) -> _Known:
    """What the truth says of the record of a verdict; raises UserError where it is of another."""
    if known is None or known.id != verdict["id"]:
        expected = f"id {verdict['id']!r}"
        found = "nothing" if known is None else repr(known.id)
    elif known.given is not None and not _same(known.given, verdict["given"]):
        expected = f"given answer {short(verdict['given'])!r}"
        found = repr(short(known.given))
    else:
        return known
    raise UserError(
        f"{truth}, record {number}: expected the {expected}, found {found}: the truth of another "
        "input?"
    )


def _same(truth: str, answer: str) -> bool:
    return truth == answer or matches(truth, answer, kind=answer_kind(truth, None), options=None)


def _auroc(scores: np.ndarray[Any, Any], wrong: np.ndarray[Any, Any]) -> float | None:
    from sklearn.metrics import roc_auc_score

    judged = ~np.isnan(scores)
    scores, wrong = scores[judged], wrong[judged]
    return float(roc_auc_score(wrong, scores)) if len(np.unique(wrong)) == 2 else None


class _Known(NamedTuple):
    """What a truth says of one record."""

    id: str
    answer: str  # the right one
    given: str | None = None
    question: str | None = None


def _known(path: str, schema: str | None) -> Iterator[_Known]:
    if not written_by_corrupt(path):
        for one in _opened(path, schema):
            if isinstance(one, Record):
                yield _Known(one.id, one.answer, question=one.question)
        return
    for number, line in enumerate(_lines(Path(path)), 1):
        if not (isinstance(line.get("id"), str) and isinstance(line.get("truth"), str)):
            found = orjson.dumps(line).decode()
            raise UserError(f"{path}, line {number}: expected id and truth, found {found:.80}")
        given = line.get("given")
        yield _Known(line["id"], line["truth"], given if isinstance(given, str) else None)


def _opened(path: str, schema: str | None) -> RecordSource:
    """The records in the schema of the input or, where they are in another, in their own."""
    try:
        return open_records(path, schema=schema)
    except UserError:
        if schema is None:
            raise
        return open_records(path)


def written_by_corrupt(path: str | Path) -> bool:
    """Whether a file is a truth that `corrupt` wrote beside its copy."""
    try:
        with Path(path).open("rb") as file:
            # An array may be one line as long as the file.
            first = orjson.loads(file.readline() if file.peek(1).startswith(b"{") else b"")
    except (OSError, ValueError):  # not JSON lines; `open_records` says what is wrong, if anything
        return False
    return isinstance(first, dict) and "truth" in first


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                value = orjson.loads(line)
                if not isinstance(value, dict):
                    raise UserError(f"{path}, line {number}: expected an object")
                yield value
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: expected JSON lines ({error})") from error
