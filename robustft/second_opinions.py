"""What other models have said of the same records: read from the outputs of their finished runs.

Witnesses of their own for the crowd. Beside the given answer and one model's there is nobody to
tell who of the two is wrong; a third witness tells, most of all where answers are open.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from robustft.config import differences
from robustft.errors import UserError
from robustft.intake import READ_BY
from robustft.opinions import Opinion
from robustft.outputs import METHOD, read_manifest
from robustft.prompts import LETTERS
from robustft.records import Record, RecordSource
from robustft.remote import is_remote
from robustft.shards import plan_folder
from robustft.store import UNIT_ROWS
from robustft.terminal import counted, listed, printable

# What else votes, is asked, or stands among a verdict's experts.
_TAKEN = (
    "model", "base", "reasoned", "checker", "tuned", "context", "review", "reasoning",
    "reflection", "regression", "regression with words", "neighbours",
)  # fmt: skip
_LONGEST = 48  # letters of a name: it stands in every verdict, and within a file's name
_BLOCK_BYTES = 1 << 22


class SecondOpinions:
    """The opinions of finished runs, unit by unit. Raises UserError where they are not usable."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._runs = [_Run(local_folder(folder)) for folder in folders]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """One name a run: its model's, numbered where that is taken."""
        found = list(_TAKEN)
        for run in self._runs:
            name = run.model.rstrip("/").rpartition("/")[2][:_LONGEST] or "other"
            numbered = (f"{name} {number}" for number in itertools.count(2))
            found.append(next(n for n in itertools.chain([name], numbered) if n not in found))
        return tuple(found[len(_TAKEN) :])

    @property
    def models(self) -> dict[str, str]:
        """Who is behind each name: a model and its revision."""
        return dict(zip(self.names, self.identity, strict=True))

    @property
    def identity(self) -> list[str]:
        """What a resumed run must share with the run it resumes."""
        return [run.identity for run in self._runs]

    def require_other(self, model: str, revision: str) -> None:
        """Raise UserError where a run has asked the model at hand, or one that another run has.

        What one model says twice would pass for confirmed.
        """
        heard = {_identity(model, revision): "as this run does"}
        for run in self._runs:
            if run.identity in heard:
                raise UserError(
                    f"--second-opinion {run.folder}: expected a run of another model, found one "
                    f"that has asked {run.model}, {heard[run.identity]}: what one model says "
                    "twice is not confirmed by it"
                )
            heard[run.identity] = f"as {run.folder} has"

    def require_input(self, source: RecordSource, settings: dict[str, Any]) -> None:
        """Raise UserError where a run has read another input, or other records of it, or lost some.

        settings: the fingerprint of the configuration at hand.
        """
        for run in self._runs:
            before = run.manifest["config"]
            differ = differences(
                {name: before.get(name) for name in READ_BY},
                {name: settings[name] for name in READ_BY},
            )
            if run.manifest["input"]["blake2b"] != source.content_hash:
                differ.insert(0, "its content was another")
            if differ:
                found = f"{run.manifest['input'].get('path')}: {'; '.join(differ)}"
                raise UserError(
                    f"--second-opinion {run.folder}: expected a run on the same input with the "
                    f"same --schema, --split and --limit, found one on {printable(found)}"
                )
            run.require_whole()

    def unit(self, number: int, records: Sequence[Record]) -> list[tuple[Opinion, ...]]:
        """What every run's model said to each record of a unit, in the order of `names`."""
        said = [run.unit(number, records) for run in self._runs]
        return list(zip(*said, strict=True)) if said else [()] * len(records)


class _Run:
    """One finished run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "verdicts.jsonl"
        self.manifest = read_manifest(folder)
        match self.manifest:
            case {
                "method": method,
                "counts": dict(),
                "config": dict(),
                "models": {"model": str(model), "revision": str(revision)},
            } if method == METHOD and self.path.is_file():
                self.model = printable(model)
                self.identity = _identity(model, revision)
            case _:
                raise UserError(
                    f"--second-opinion {folder}: expected the --out of a finished `robustft "
                    f"clean`, found {_instead(folder, self.manifest)}"
                )

    def require_whole(self) -> None:
        """Raise UserError where verdicts are missing: else only hours of asking would tell."""
        counts = self.manifest["counts"]
        records = int(counts.get("input", 0)) - int(counts.get("rejected", 0))
        status = self.path.stat()
        _, lines = _unit_starts(self.path, status.st_size, status.st_mtime_ns)
        if lines != records:
            whole = min(lines, records) // UNIT_ROWS * UNIT_ROWS
            raise self._wrong_number(whole + 1, min(records - whole, UNIT_ROWS), lines - whole)

    def _wrong_number(self, first: int, expected: int, found: int) -> UserError:
        return UserError(
            f"{self.path}: expected {counted(expected, 'verdict')} from line {first} on, one for "
            f"every record of the input, found {found}"
        )

    def unit(self, number: int, records: Sequence[Record]) -> Iterator[Opinion]:
        """What the model said to each record: by its reasoning, where it was asked to reason."""
        found: list[bytes] = []
        status = self.path.stat()
        starts, _ = _unit_starts(self.path, status.st_size, status.st_mtime_ns)
        if number + 1 < len(starts):
            start, stop = starts[number : number + 2]
            with self.path.open("rb") as file:
                file.seek(start)
                found = file.read(stop - start).splitlines()
        first = number * UNIT_ROWS + 1
        if len(found) != len(records):
            raise self._wrong_number(first, len(records), len(found))
        for row, (line, record) in enumerate(zip(found, records, strict=True)):
            opinion = _opinion(line, record)
            if opinion is None:
                raise UserError(
                    f"{self.path}, line {first + row}: expected the verdict on record "
                    f"{record.id!r:.80}, with what its experts answered"
                )
            yield opinion


def local_folder(run: str) -> Path:
    """The folder that names a run. Raises UserError where it is on another file system."""
    folder = run.removeprefix("file://")
    if not folder:  # a shell variable that is not set, most likely
        raise UserError("--second-opinion: expected a folder, found nothing")
    if is_remote(folder):
        raise UserError(
            f"--second-opinion {run}: expected a folder of this machine; copy the run's "
            "manifest.json and verdicts.jsonl into one"
        )
    return Path(folder)


def full_paths(runs: Sequence[str]) -> tuple[str, ...]:
    """The folders of runs as they are named from anywhere."""
    return tuple(str(local_folder(run).resolve()) for run in runs)


def found_again(
    recorded: Sequence[str], identity: Sequence[str], named: Sequence[str]
) -> tuple[str, ...]:
    """The folders of the runs that were heard: as `recorded`, but for those `named` anew.

    identity: who was heard, as `SecondOpinions.identity`. Raises UserError where a folder does not
    hold one of them.
    """
    places = dict(zip(identity, recorded, strict=True))
    for folder in named:
        run = _Run(local_folder(folder))
        if run.identity not in places:
            raise UserError(
                f"--second-opinion {folder}: expected a run that was heard before, of "
                f"{listed(identity) or 'none'}, found one of {run.identity}"
            )
        places[run.identity] = folder
    for heard, folder in places.items():
        moved = f"{heard} was heard from there: if it has moved, say where with --second-opinion"
        try:
            found = _Run(local_folder(folder)).identity
        except UserError as error:
            raise UserError(f"{error}; {moved}") from None
        if found != heard:
            raise UserError(f"--second-opinion {folder}: found a run of {found}; {moved}")
    return tuple(places.values())


def _instead(folder: Path, manifest: dict[str, Any]) -> str:
    """What a folder holds that is not the --out of a finished run of ours."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "nothing there"
    if "counts" not in manifest and plan_folder(folder).is_dir():
        return f"shards that are not merged: run `robustft merge {folder}`"
    if (method := manifest.get("method", METHOD)) != METHOD:
        return printable(f"one of --method {method}, in which no experts were heard")
    if "counts" not in manifest and (folder / "run.sqlite").exists():
        return "one that is not finished: run its command again"
    missing = [
        name for name in ("manifest.json", "verdicts.jsonl") if not (folder / name).is_file()
    ]
    return f"no {' and no '.join(missing)} in it" if missing else "another manifest.json"


def _identity(model: str, revision: str) -> str:
    return printable(f"{model}@{revision}")


@functools.lru_cache(maxsize=16)
def _unit_starts(path: Path, size: int, modified: int) -> tuple[list[int], int]:
    """Where the lines of each unit begin, and the file's end; how many lines there are.

    `size` and `modified` are the file's own.
    """
    starts, lines, at = [0], 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            first = -(lines + 1) % UNIT_ROWS  # of the ends here, the one that ends a unit
            starts += (ends[first::UNIT_ROWS] + at + 1).tolist()
            lines, at = lines + len(ends), at + len(block)
    return ([*starts, at] if starts[-1] < at else starts), lines


def _opinion(line: bytes, record: Record) -> Opinion | None:
    """What a line of verdicts says; None where it is not of this record or not well formed."""
    try:
        verdict = orjson.loads(line)
    except ValueError:
        return None
    match verdict:
        case {"given": given, "experts": {"base": base, **others}} if given == record.answer:
            said = [_read(one, record.options) for one in (others.get("reasoned", base), base)]
            if None not in said:
                return next((one for one in said if one and one.answer), said[0])
    return None


def _read(said: object, options: tuple[str, ...] | None) -> Opinion | None:
    """One expert's entry as an opinion; None where it is none on these options."""
    match said:
        case {"answer": None | str() as answer, **more}:
            shares = more.get("probabilities")
        case _:
            return None
    if options is None:
        return Opinion(answer)
    if answer not in (None, *LETTERS[: len(options)]):
        return None
    if shares is None:
        return Opinion(answer)
    if not isinstance(shares, list) or len(shares) != len(options):
        return None
    known = all(isinstance(share, float | int) and 0.0 <= share <= 1.0 for share in shares)
    return Opinion(answer, probabilities=tuple(shares)) if known and any(shares) else None
