"""One cell of a table: a method on a task at a noise rate, with one seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustft.config import ReproduceConfig
from robustft.engines import Prompt
from robustft.errors import UserError
from robustft.evaluation import EvalResult
from robustft.methods import find_method
from robustft.models import find_model
from robustft.predictions import Ask, ask_plainly
from robustft.prompts import answer_prompt, context_prompt
from robustft.records import Record, open_records
from robustft.reproduction.presets import preset_for
from robustft.reproduction.tasks import TASKS, TaskFiles, task_files
from robustft.reproduction.workshop import TrainingData, Workshop, read
from robustft.retrieval import CosineKNN


@dataclass(frozen=True, slots=True)
class Cell:
    """What is computed. `changes` are fields of CleanConfig (an ablation, beta, k)."""

    task: str
    noise: int  # percent
    method: str
    seed: int = 0
    model: str | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    instruction: str | None = None  # in place of the usual one, at test time

    def named(self, row: str) -> str:
        """What a line calls it that belongs to the row of this name."""
        worded = "" if self.instruction is None else f', "{self.instruction}"'
        return f"{row} on {self.task} at {self.noise} %, seed {self.seed}{worded}"


@dataclass(slots=True)
class Outcome:
    """What came out of a cell: an evaluation, or why there is none."""

    cell: Cell
    result: EvalResult | None = None
    reason: str = ""
    kept: int = 0  # records trained on
    steps: int = 0
    powerless: bool = False  # RobustFT found no expert better than chance and changed nothing
    perplexities: list[float] = field(default_factory=list)
    made_by: str = ""  # versions and commit, of the day it was evaluated

    @property
    def accuracy(self) -> float:
        """Share of right answers, in percent; NaN where it was not run."""
        return math.nan if self.result is None else 100.0 * self.result.overall.accuracy


class Bench:
    """Computes cells; one workshop a model, the one at work in memory."""

    def __init__(self, config: ReproduceConfig) -> None:
        self.config = config
        self.work = config.out / "cache"
        self._shops: dict[str | None, Workshop] = {}

    def shop(self, model: str | None) -> Workshop:
        """The workshop of a model. Raises UserError where the model cannot be found."""
        if model not in self._shops:
            for other in self._shops.values():
                other.engine.release()
            engine = dataclasses.replace(self.config.engine, model=model)
            preset = preset_for(self.config, model)
            self._shops[model] = Workshop(self.work, engine, preset, self.config.embedder)
        return self._shops[model]

    def files(self, cell: Cell) -> TaskFiles:
        """The data of a cell. Raises UserError where there is none."""
        task = TASKS[cell.task]
        return task_files(task, cell.noise, cell.seed, self.config.data, self.work / "data")

    def run(self, cell: Cell, *, perplexity: bool = False) -> Outcome:
        """Compute a cell, or say in one line why that is not possible."""
        outcome = Outcome(cell)
        try:
            files = self.files(cell)
            method = find_method(cell.method)
            model = self.other_model(cell) if method.model else cell.model
            shop = self.shop(model)
            adapter = None
            if method.trains:
                adapter = self._adapter(shop, cell, files, outcome)
            ask = self._ask(shop, cell, files)
            outcome.result, outcome.made_by = shop.evaluation(
                files.test, self.config.test_limit, adapter=adapter, ask=ask,
                judge=TASKS[cell.task].judge, asked=self._asked(shop, cell, files),
            )  # fmt: skip
            if perplexity:
                limit = self.config.test_limit
                outcome.perplexities = shop.perplexities(files.test, limit, adapter)
        except UserError as error:
            outcome.result, outcome.reason = None, f"not run: {error}"
        return outcome

    def other_model(self, cell: Cell) -> str:
        """The other model of a row, checked to be within reach before anything is loaded."""
        method = find_method(cell.method)
        named = {"hermes-3": self.config.hermes, "tulu-3": self.config.tulu}.get(cell.method)
        model = named or method.model or ""
        if not find_model(model).local and not _on_hub(model):
            raise UserError(f"{model} is not here and the hub cannot be reached")
        return model

    def _adapter(self, shop: Workshop, cell: Cell, files: TaskFiles, outcome: Outcome) -> Path:
        noisy = TrainingData(files.noisy, self.config.limit)
        total = len(read(files.noisy, self.config.limit))
        steps = math.ceil(total / shop.preset.batch_size) * shop.preset.epochs
        method = find_method(cell.method)
        config = shop.clean_config(noisy, cell.seed, **dict(cell.changes))
        if cell.method == "self-label":  # the given answers are not looked at
            config = dataclasses.replace(config, input=str(files.labeled))
        data = shop.prepared(method, config)
        outcome.kept, outcome.steps = len(read(data.path, data.limit)), steps
        outcome.powerless = data.powerless
        return shop.adapter(data, steps, cell.seed)

    def _ask(self, shop: Workshop, cell: Cell, files: TaskFiles) -> Ask:
        shown = find_method(cell.method).demonstrations
        if shown:
            return demonstrating(read(files.noisy, self.config.limit), shop.embedder, shown)
        if cell.instruction is not None:
            return rephrased(cell.instruction)
        return ask_plainly

    def _asked(self, shop: Workshop, cell: Cell, files: TaskFiles) -> object:
        """What tells the prompts of `_ask` from others."""
        shown = find_method(cell.method).demonstrations
        if shown:
            noisy = open_records(str(files.noisy)).content_hash
            return ["demonstrations", shown, noisy, self.config.limit, shop.embedder.identity]
        return cell.instruction


def demonstrating(examples: Sequence[Record], embedder: Any, count: int) -> Ask:
    """Prompts with the nearest of some (noisy) examples and their answers before the question."""
    index = CosineKNN(embedder.encode([example.question for example in examples]))

    def ask(records: Sequence[Record]) -> list[Prompt]:
        queries = embedder.encode([record.question for record in records])
        ids, _ = index.search(queries, min(count, len(examples)))
        prompts = []
        for record, near in zip(records, ids.tolist(), strict=True):
            shown = [examples[i] for i in near if i >= 0]
            prompts.append(
                context_prompt(record, [(s.question, s.options, s.answer) for s in shown])
            )
        return prompts

    return ask


def rephrased(instruction: str) -> Ask:
    """Prompts whose instruction is worded otherwise."""

    def ask(records: Sequence[Record]) -> list[Prompt]:
        return [answer_prompt(record, instruction) for record in records]

    return ask


def _on_hub(model: str) -> bool:
    try:
        from huggingface_hub import HfApi

        HfApi().model_info(model, timeout=10)
    except Exception:  # offline, gated, unknown: the libraries raise types of their own
        return False
    return True
