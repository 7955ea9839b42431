"""The model itself as one more expert: fine-tuned on what the crowd is surest of, out of fold.

The first conclusion of the crowd labels the corpus. Of every label, the records it is surest of
train one LoRA adapter a fold, all but that fold's own; each adapter then answers its fold, and with
those answers the crowd concludes again. It is self-training (Yarowsky 1995) in which nobody judges
what it has learnt from; for the division into folds see Northcutt et al. 2021, arXiv 1911.00068.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from robustft.config import CleanConfig, TrainConfig
from robustft.detection import TUNED, Conclusion, Evidence, option_probabilities
from robustft.engines.factory import load_engine
from robustft.errors import UserError
from robustft.experts import Panel
from robustft.files import atomic_file
from robustft.intake import Intake
from robustft.opinions import Opinion
from robustft.progress import Progress
from robustft.prompts import LETTERS
from robustft.records import Record, RecordSource
from robustft.shards import Shard
from robustft.store import Store
from robustft.training import train

_SUREST = 2 / 3  # share of the records of every label that train
_NOT_LEARNT = -1


def refuse_folds(config: CleanConfig, other: str) -> None:
    """Raise UserError where folds are asked for together with what cannot hear them."""
    if config.tuned.folds:
        raise UserError(f"--folds does not go with {other}: it belongs to one run in one process")


def require_choices(config: CleanConfig, source: RecordSource) -> None:
    """Raise UserError where folds are asked for and the records offer no options."""
    if config.tuned.folds and source.kind != "choice":
        raise UserError(
            f"--folds needs multiple choice, {config.input} holds {source.schema}: leave it out"
        )


def ask_tuned(
    config: CleanConfig, shard: Shard, intake: Intake, store: Store, first: Conclusion
) -> Evidence:
    """Train the adapters and ask each about its fold: the evidence of the expert "tuned".

    `shard` is the whole corpus. What is trained and answered lasts, in `tuned` of the output folder
    and in the store, under a digest of the labels that were learnt.

    Raises:
        UserError: too little is certain for every fold to learn from, or training failed.
    """
    labels = surest_labels(first.pooled)
    basis = hashlib.blake2b(labels.tobytes(), digest_size=8).hexdigest()
    folds = np.zeros(shard.rows, np.int32)
    for _, chunk in intake.units(shard):
        for record in chunk:
            folds[record.index] = fold_of(record, config)
    found = np.zeros(first.pooled.shape, np.float32)
    for fold in range(config.tuned.folds):
        name = f"fold {fold + 1} of {config.tuned.folds}"
        path = config.out / "tuned" / basis / f"fold-{fold + 1}.jsonl"
        lessons = np.where(folds == fold, _NOT_LEARNT, labels)
        if (lessons == _NOT_LEARNT).all():
            raise UserError(
                f"--folds {config.tuned.folds}: too few records are certain for every fold to "
                "learn from some; leave it out or use fewer folds"
            )
        _write_lessons(path, shard, intake, lessons)
        adapter = _trained(config, path, name)
        for record, said in _answers(config, adapter, name, shard, intake, store, folds == fold):
            assert record.options is not None
            size = len(record.options)
            found[record.index, :size] = option_probabilities(said, size)
    return {TUNED: found}


def _answers(
    config: CleanConfig,
    adapter: Path,
    name: str,
    shard: Shard,
    intake: Intake,
    store: Store,
    asked: NDArray[np.bool_],
) -> Iterator[tuple[Record, Opinion]]:
    """The records `asked` [N] and what the model with an adapter, loaded for this, says to each."""
    basis = adapter.parent.name
    panel = Panel(load_engine(config.engine, adapter), store, config.experts, seed=config.seed)
    with Progress(f"{name} asked", shard.rows, unit="records") as progress:
        for unit, chunk in intake.units(shard):
            mine = [one for one in chunk if asked[one.index]]
            yield from zip(mine, panel.at(unit).tuned(mine, basis), strict=True)
            progress.update(len(chunk))


def surest_labels(pooled: NDArray[np.float64]) -> NDArray[np.int8]:
    """[N] the crowd's label where it is among the surest two thirds of that label, else -1.

    pooled: [N, options] the crowd's probabilities; a row of zeros was not judged.
    """
    best, certainty = pooled.argmax(1), pooled.max(1)
    labels = np.full(len(pooled), _NOT_LEARNT, np.int8)
    for label in range(pooled.shape[1]):
        same = np.flatnonzero((best == label) & (certainty > 0))
        order = np.argsort(-certainty[same], kind="stable")
        labels[same[order[: round(_SUREST * len(same))]]] = label
    return labels


def fold_of(record: Record, config: CleanConfig) -> int:
    """The fold of a record; equal questions share one, or an adapter would know its fold."""
    mixed = hashlib.blake2b(record.question_key, key=b"%d" % config.seed, digest_size=8)
    return int.from_bytes(mixed.digest(), "little") % config.tuned.folds


def _write_lessons(path: Path, shard: Shard, intake: Intake, labels: NDArray[np.int8]) -> None:
    """Write what an adapter learns: the records that have a label, with that as their answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as handle:
        for _, chunk in intake.units(shard):
            for record in chunk:
                label = int(labels[record.index])
                if label != _NOT_LEARNT:
                    row = {
                        "question": record.question,
                        "options": record.options,
                        "answer": LETTERS[label],
                    }
                    handle.write(orjson.dumps(row) + b"\n")


def _trained(config: CleanConfig, path: Path, title: str) -> Path:
    """The folder, beside its lessons, of the adapter that learnt them."""
    settings, folder = config.tuned, path.with_suffix("")
    train(
        TrainConfig(
            input=str(path), out=folder, schema="choice", seed=config.seed,
            epochs=settings.fold_epochs, learning_rate=settings.fold_learning_rate,
            batch_size=settings.fold_batch_size, top_layers=settings.fold_top_layers,
            engine=config.engine,
        ),
        title=title,
    )  # fmt: skip
    return folder
