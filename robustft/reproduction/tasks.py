"""The paper's five tasks: where their data comes from, and how an answer is scored.

A local folder (`--data DIR`) is tried first: `DIR/<task>/labeled.*`, `test.*` and, where the noisy
copies exist, `noisy30.*` or `noisy/noisy30.*`, as in the authors' repository. Otherwise the hub is
asked, and rows are brought to this package's own fields. Noisy copies that do not exist are made
by `robustft.corruption`: exact, nested, uniform over the wrong options, or the answer to another
question of the same kind where there are no options.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from robustft.answers import answer_kind, parse
from robustft.corruption import corrupt
from robustft.errors import UserError
from robustft.files import atomic_file, locked
from robustft.predictions import Judge, judge
from robustft.prompts import opening
from robustft.records import Record, open_records
from robustft.records.framing import MAX_LINE_BYTES, Reject
from robustft.records.sources import open_reader
from robustft.reproduction.drop import best_score, gold_spans

Row = dict[str, Any]
_SUFFIXES = (
    ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".jsonl.zst",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark: on the hub `hub` (owner/name:config) with its splits, read by `convert`."""

    name: str
    title: str
    hub: str
    splits: tuple[str, str]  # of training and test; one name twice: its rows go to each in turn
    convert: Callable[[Mapping[str, Any]], Row | None]
    judge: Judge = judge
    metric: str = "accuracy"  # what the share of right answers is called; exact match has an F1 too

    def rows_of(self, part: int) -> slice:
        """Which rows of its split the training set (part 0) or the test set (part 1) takes."""
        return slice(part, None, 2) if self.splits[0] == self.splits[1] else slice(0, None, 1)


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """Clean training set, noisy copy (the clean one at rate 0) and test set."""

    labeled: Path
    noisy: Path
    test: Path


def task_files(task: Task, noise: int, seed: int, data: str | None, work: Path) -> TaskFiles:
    """The files of a task at a noise rate in percent; what has to be made is made in `work`.

    Raises UserError where neither the folder nor the hub has the data.
    """
    folder = None if data is None else Path(data) / task.name
    labeled = folder and _find(folder, "labeled")
    test = folder and _find(folder, "test")
    if not labeled or not test:
        if data is not None:
            lacking = "labeled" if not labeled else "test"
            raise UserError(f"no data: {folder} has no {lacking}.csv (.jsonl, .parquet)")
        labeled, test = (
            _from_hub(task, part, work / task.name / name)
            for part, name in enumerate(("labeled.jsonl", "test.jsonl"))
        )
    if noise == 0:
        return TaskFiles(labeled, labeled, test)
    official = folder and (
        _find(folder, f"noisy{noise}") or _find(folder / "noisy", f"noisy{noise}")
    )
    return TaskFiles(labeled, official or _made_noisy(task, labeled, noise, seed, work), test)


def _find(folder: Path, stem: str) -> Path | None:
    found = (folder / f"{stem}{suffix}" for suffix in _SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def _made_noisy(task: Task, labeled: Path, noise: int, seed: int, work: Path) -> Path:
    """A noisy copy, named by the content of what it copies."""
    source = open_records(str(labeled))
    made_of = source.content_hash[:16]
    out = work / task.name / f"noisy{noise}-seed{seed}-{made_of}{source.suffix}"
    with locked(work / "locks" / out.name, wait="makes the same noisy copy"):
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            corrupt(source, noise / 100, seed, out)
    return out


def _from_hub(task: Task, part: int, path: Path) -> Path:
    """The hub's training (part 0) or test (part 1) rows as JSONL, fetched once for a `work`."""
    if not path.exists():
        try:
            reader = open_reader(f"hf://datasets/{task.hub}", task.splits[part], MAX_LINE_BYTES)
        except UserError as error:
            raise UserError(f"no data: {error}") from error
        with atomic_file(path) as handle:
            keep = task.rows_of(part)
            rows = _converted(task, reader.rows())
            for row in itertools.islice(rows, keep.start, keep.stop, keep.step):
                handle.write(orjson.dumps(row) + b"\n")
    return path


def _converted(task: Task, rows: Any) -> Iterator[Row]:
    for item in rows:
        if not isinstance(item, Reject):
            row = task.convert(item[1])
            if row is not None:
                yield row


# --- the tasks -----------------------------------------------------------------------------------


def _mmlu(row: Mapping[str, Any]) -> Row:
    return {
        "question": row["question"],
        "options": list(row["choices"]),
        "answer": "ABCD"[int(row["answer"])],
        "Subject": row["subject"],
    }


def _arc(row: Mapping[str, Any]) -> Row | None:
    labels, texts = list(row["choices"]["label"]), list(row["choices"]["text"])
    if row["answerKey"] not in labels:
        return None
    letter = "ABCDEFGH"[labels.index(row["answerKey"])]
    return {"id": row["id"], "question": row["question"], "options": texts, "answer": letter}


def _pubmedqa(row: Mapping[str, Any]) -> Row:
    options = ["yes", "no", "maybe"]
    context = "\n".join(row["context"]["contexts"])
    return {
        "id": str(row["pubid"]),
        "question": f"{context}\n\n{row['question']}",
        "options": options,
        "answer": "ABC"[options.index(row["final_decision"])],
    }


def _drop(row: Mapping[str, Any]) -> Row | None:
    golds = _drop_golds(row)
    if not golds:
        return None
    return {
        "id": row["query_id"],
        "question": f"{row['passage']}\n\n{row['question']}",
        "answer": ", ".join(golds[0]),
        "golds": golds,
    }


def _drop_golds(row: Mapping[str, Any]) -> list[list[str]]:
    """The spans of every accepted answer: the answer, then what validators gave, if anything.

    Validators' answers are a list in DROP's own files, and a list for each of their fields on the
    hub. An empty answer is nobody's, as in the metric's script.
    """
    more = row.get("validated_answers") or []
    if isinstance(more, Mapping):
        fields = ("number", "spans", "date")
        parts = zip(*(more[name] for name in fields), strict=True)
        more = [dict(zip(fields, part, strict=True)) for part in parts]
    golds = [gold_spans(answer) for answer in (row["answer"], *more)]
    return [spans for spans in golds if spans[0].strip()]


def _fpb(row: Mapping[str, Any]) -> Row:
    label = row["label"]
    options = ["negative", "neutral", "positive"]
    index = options.index(label) if isinstance(label, str) else int(label)
    return {
        "question": f"What is the sentiment of the following sentence?\n{row['sentence']}",
        "options": options,
        "answer": "ABC"[index],
    }


def judge_drop(record: Record, reply: str) -> tuple[str | None, bool, float]:
    """DROP's official metric: (answer read, exact match, F1).

    A reply is read as a span, where the gold answer is a number as its number too, and where a
    gold answer has several spans as a list besides, split at commas, semicolons, line ends and
    "and"; the best reading counts.
    """
    golds = record.row.get("golds")
    if isinstance(golds, str):
        golds = orjson.loads(golds)
    golds = [[record.answer]] if not golds else [g if isinstance(g, list) else [g] for g in golds]
    kind = answer_kind(record.answer)
    begun = opening(kind)
    span = parse(reply, kind="span", begun=begun).answer
    answer = parse(reply, kind="number", begun=begun).answer if kind == "number" else span
    readings = [[text] for text in (answer, span) if text is not None]
    if span is not None and max(len(gold) for gold in golds) > 1:
        readings.append(_listed(span))
    if not readings:
        return None, False, 0.0
    return answer or span, *max(best_score(said, golds) for said in readings)


def _listed(text: str) -> list[str]:
    for mark in (";", "\n", ", and ", " and ", ", "):
        text = text.replace(mark, "\0")
    return [part.strip() for part in text.split("\0") if part.strip()]


TASKS = {
    task.name: task
    for task in (
        Task("mmlu", "MMLU", "cais/mmlu:all", ("validation", "test"), _mmlu),
        Task("arc", "ARC", "allenai/ai2_arc:ARC-Challenge", ("train", "test"), _arc),
        Task("pubmedqa", "PubMedQA", "qiaojin/PubMedQA:pqa_labeled", ("train", "train"), _pubmedqa),
        Task(
            # Not ucinlp/drop: there several validators' answers stand as spans of a single one.
            "drop",
            "DROP",
            "EleutherAI/drop",
            ("train", "validation"),
            _drop,
            judge_drop,
            "exact match",
        ),
        Task("fpb", "FPB", "atrost/financial_phrasebank", ("train", "test"), _fpb),
    )
}
