"""`--dry-run`: what a study would do, in tokens, and in time where the speed is known."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from robustft.config import EvalConfig, ReproduceConfig
from robustft.engines.encoding import PromptEncoder
from robustft.errors import UserError
from robustft.methods import METHODS
from robustft.models import load_tokenizer
from robustft.predictions import ask_plainly
from robustft.records import Record
from robustft.reproduction.cells import Bench, Cell
from robustft.reproduction.studies import Study
from robustft.reproduction.workshop import TrainingData, Workshop, read
from robustft.terminal import counted

_PARTS = ("read", "written", "trained")


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """What a cell costs: tokens of prompts, generated tokens, tokens trained on."""

    read: int
    written: int
    trained: int


def estimate(study: Study, config: ReproduceConfig) -> str:
    """The plan of a study, an upper bound: what cells share is counted once a cell."""
    bench = Bench(config)
    cells = study.cells
    lines = [f"{study.title}: {counted(len(cells), 'cell')}"]
    total: Counter[str] = Counter()
    speeds: dict[str, float] = {}
    lacking: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell, row in cells.items():
        try:
            work = _work(bench, cell, perplexity=study.perplexity)
            speeds = speeds or bench.shop(cell.model).speeds()
        except UserError as error:
            lacking[str(error)].append(cell)
            continue
        total.update(dataclasses.asdict(work))
        lines.append(
            f"  {cell.named(row)}: {work.read:,} tokens read, {work.written:,} written, "
            f"{work.trained:,} trained on"
        )
    lines += [f"  not run: {_named(some)}: {why}" for why, some in lacking.items()]
    if lacking and config.data is None:
        lines.append("  with --data FOLDER the data come from a folder with one folder a task")
    lines.append("at most: " + ", ".join(f"{total[part]:,} tokens {part}" for part in _PARTS))
    if len(cells) == sum(map(len, lacking.values())):
        lines.append("nothing of it can run here")
    elif all(speeds.get(part) for part in _PARTS if total[part]):
        seconds = sum(total[part] / speeds[part] for part in _PARTS if total[part])
        took = counted(math.ceil(seconds / 60), "minute")
        lines.append(f"at the speed of earlier work in {config.out}: {took}")
    else:
        lines.append(
            f"time: unknown until some of this has run in {config.out}; a small --limit tells soon"
        )
    return "\n".join(lines)


def _named(cells: Sequence[Cell]) -> str:
    """What a number of cells share, in few words."""
    methods = dict.fromkeys(METHODS[cell.method].title for cell in cells)
    tasks = dict.fromkeys(cell.task for cell in cells)
    return f"{counted(len(cells), 'cell')} ({', '.join(methods)} on {', '.join(tasks)})"


def _work(bench: Bench, cell: Cell, *, perplexity: bool) -> _Work:
    config = bench.config
    method = METHODS[cell.method]
    model = bench.other_model(cell) if method.model else cell.model
    files, shop = bench.files(cell), bench.shop(model)
    train, test = read(files.noisy, config.limit), read(files.test, config.test_limit)
    train_tokens, test_tokens = _tokens(shop, train), _tokens(shop, test)
    seen = test_tokens * (1 + method.demonstrations + perplexity)
    # Choices are read from the likelihoods of their letters; other answers may take all their room.
    written, trained = _open(test) * EvalConfig(str(files.test)).answer_tokens, 0
    clean = shop.clean_config(TrainingData(files.noisy, config.limit), cell.seed)
    answers = _open(train) * clean.experts.answer_tokens
    if cell.method.startswith("robustft"):
        steps = 2 * shop.preset.rounds
        thoughts = len(train) * steps * shop.preset.reasoning_tokens
        written += thoughts + 3 * answers  # the base, the reasoned, the context-enhanced answer
        seen += train_tokens * (3 + steps) + thoughts * steps + 2 * train_tokens
    elif cell.method == "noiseal":  # may ask about every record in three rounds, and once more
        written += 4 * answers
        seen += 4 * train_tokens * (1 + clean.k)
    elif method.prepare is not None:
        written += answers if cell.method == "self-label" else 0
        seen += train_tokens * 2
    if method.trains:
        batch, epochs = shop.preset.batch_size, shop.preset.epochs
        per_record = train_tokens / max(len(train), 1)
        trained = round(math.ceil(len(train) / batch) * batch * epochs * per_record)
    return _Work(seen, written, trained)


def _open(records: list[Record]) -> int:
    """How many records have no options."""
    return sum(record.options is None for record in records)


def _tokens(shop: Workshop, records: list[Record]) -> int:
    """Tokens of the records' prompts, from a sample of 64."""
    sample = records[:64]
    encoder = PromptEncoder(load_tokenizer(shop.source))
    lengths = [len(ids) for ids in encoder.encode(ask_plainly(sample))]
    return round(sum(lengths) / max(len(sample), 1) * len(records))
