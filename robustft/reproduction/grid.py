"""Run a study: its cells, on one device or several, then its table and figure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from robustft.config import ReproduceConfig
from robustft.errors import UserError
from robustft.files import make_folder, write_atomically
from robustft.methods import METHODS
from robustft.models import DEFAULT_MODEL
from robustft.predictions import category_of
from robustft.progress import Progress
from robustft.provenance import made_by
from robustft.reproduction import plots
from robustft.reproduction.cells import Bench, Cell, Outcome
from robustft.reproduction.estimate import estimate
from robustft.reproduction.presets import Preset, preset_for
from robustft.reproduction.rows import CHANGE, Row, to_csv, to_markdown
from robustft.reproduction.studies import STUDIES, Study
from robustft.reproduction.workshop import read
from robustft.terminal import counted


def reproduce(config: ReproduceConfig) -> str:
    """Compute a table or figure and write NAME.csv, NAME.md, NAME.png and NAME.svg to its folder.

    Called again it reads what is there; killed, it goes on where it was. Returns what to print.

    Raises:
        UserError: a name is unknown, there is no folder of data, or none can be written; the test
            records have no categories, or matplotlib is missing.
    """
    study = STUDIES[config.what](config)
    tasks = dict.fromkeys(plan.task for plan in study.rows)
    if config.data is not None and not any((Path(config.data) / task).is_dir() for task in tasks):
        raise UserError(
            f"--data {config.data}: expected a folder with one folder a task, found none of "
            f"{', '.join(tasks)}"
        )
    if config.dry_run:
        return estimate(study, config)
    # What the last step needs, before the first takes hours.
    try:
        make_folder(config.out)
    except OSError as error:
        raise UserError(f"{config.out}: cannot be written: {error.strerror}") from error
    plots.require_matplotlib()
    if study.categories:
        _require_categories(study, config)
    workers = _workers(config)
    if workers:
        _side_by_side(workers)
    outcomes = _run(study, config, alone=not workers)
    if config.share[1] > 1:
        return ""
    rows = _rows(study, outcomes)
    return _write(study, config, rows)


def _require_categories(study: Study, config: ReproduceConfig) -> None:
    bench = Bench(config)
    for task in dict.fromkeys(plan.task for plan in study.rows):
        try:
            test = bench.files(Cell(task, 0, "vanilla")).test
        except UserError:
            continue  # the table says that there are no data
        if not any(category_of(record.row) for record in read(test, config.test_limit)):
            raise UserError(
                f"{test}: {study.name} needs a column Subject or Category, found no record with one"
            )


def _run(study: Study, config: ReproduceConfig, *, alone: bool) -> dict[Cell, Outcome]:
    """The outcome of every cell; with a share, those of this process."""
    bench = Bench(config)
    names = study.cells
    cells = sorted(names, key=lambda cell: str(cell.model))  # a model is loaded once
    number, of = config.share
    done: dict[Cell, Outcome] = {}
    with Progress(study.name, len(cells), unit="cells") as progress:
        for index, cell in enumerate(cells):
            if index % of == number:
                which = f"cell {index + 1} of {len(cells)}: {cell.named(names[cell])}"
                print(f"robustft: {study.name}, {which}", file=sys.stderr, flush=True)
                done[cell] = bench.run(cell, perplexity=study.perplexity)
                if done[cell].reason and alone:
                    print(f"robustft: {done[cell].reason}", file=sys.stderr, flush=True)
            progress.update(1)
    return done


# --- several GPUs --------------------------------------------------------------------------------


def _workers(config: ReproduceConfig) -> list[tuple[list[str], dict[str, str]]]:
    """Commands and environments of one process a GPU; none where there is at most one."""
    import torch

    count = torch.cuda.device_count()
    if config.share[1] > 1 or count < 2 or config.engine.device not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    command = [sys.executable, "-m", "robustft", *sys.argv[1:]]
    return [
        ([*command, "--share", f"{index}/{count}"], os.environ | {"CUDA_VISIBLE_DEVICES": name})
        for index, name in enumerate(names[:count])
    ]


def _side_by_side(workers: Sequence[tuple[list[str], dict[str, str]]]) -> None:
    """Run all workers to their end; what one left undone is computed here afterwards."""
    running = [subprocess.Popen(command, env=environment) for command, environment in workers]
    try:
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise


# --- results -------------------------------------------------------------------------------------


def _rows(study: Study, outcomes: dict[Cell, Outcome]) -> list[Row]:
    rows = [
        Row.of(plan.name, plan.task, plan.noise, [outcomes[c] for c in plan.cells], plan.paper)
        for plan in study.rows
    ]
    return [*rows, *(_relative(rows) if study.relative else [])]


def _relative(rows: Sequence[Row]) -> list[Row]:
    """The paper's last two rows: relative improvement of RobustFT over vanilla and over SFT."""
    at = {(row.name, row.task, row.noise): row for row in rows}
    found = []
    for ours in ("robustft-paper", "robustft"):
        for base in ("vanilla", "sft"):
            for row in rows:
                other = at.get((METHODS[base].title, row.task, row.noise))
                if row.name != METHODS[ours].title or other is None or not row.values:
                    continue
                if other.values and other.mean > 0:
                    change = 100 * (row.mean / other.mean - 1)
                    name = f"{CHANGE} {METHODS[ours].title} vs. {METHODS[base].title}"
                    found.append(Row(name, row.task, row.noise, values=[change]))
    return found


def _write(study: Study, config: ReproduceConfig, rows: Sequence[Row]) -> str:
    notes = _notes(study, config, rows)
    listed = [part for row in rows for part in row.by_category()] if study.categories else rows
    markdown = to_markdown(listed, study.title, notes, deviation=study.instructions > 0)
    base = config.out / study.name
    write_atomically(base.with_suffix(".csv"), to_csv(listed))
    write_atomically(base.with_suffix(".md"), markdown)
    drawn = plots.draw(study, rows, base)
    files = [f"{base}.csv", f"{base}.md", *map(str, drawn)]
    return markdown + "\nwritten:\n" + "\n".join(f"  {name}" for name in files)


def _notes(study: Study, config: ReproduceConfig, rows: Sequence[Row]) -> list[str]:
    """What a reader must know to take the numbers for what they are."""
    cells = [cell for plan in study.rows for cell in plan.cells]
    models = list(dict.fromkeys(cell.model or DEFAULT_MODEL for cell in cells))
    notes = [
        _accuracy_note(study, config.seeds),
        f"Model: {', '.join(models)}. Data: {config.data or 'Hugging Face hub'}, "
        f"{config.limit or 'all'} training and {config.test_limit or 'all'} test records. "
        + _settings_note({model: preset_for(config, model) for model in models}),
    ]
    if any(row.metric == "exact match" for row in rows):
        notes.append(
            "DROP: exact match by its official metric, and that metric's F1. The paper's number is "
            "neither: by the authors' code a reply is right that holds a gold answer or is part of "
            "one."
        )
    if study.note:
        notes.append(study.note)
    if any(o.powerless for row in rows for o in row.outcomes):
        notes.append(
            "Rows marked * : no expert was better than chance, RobustFT changed nothing and was "
            "trained on the noisy set as it stands."
        )
    made = dict.fromkeys(o.made_by for row in rows for o in row.outcomes if o.made_by)
    notes.append(f"{'; '.join(made) or made_by()}.")
    return [f"{note}\n" for note in notes]


def _settings_note(presets: Mapping[str, Preset]) -> str:
    """How models were trained and asked; by name where not all of them alike."""
    alike: dict[Preset, list[str]] = {}
    for model, preset in presets.items():
        alike.setdefault(preset, []).append(model)
    found = []
    for preset, models in alike.items():
        whose = f"{', '.join(models)}: " if len(alike) > 1 else ""
        top = preset.top_layers
        layers = "all layers" if top is None else f"the top {counted(top, 'layer')}"
        found.append(
            f"{whose}LoRA on {layers}: learning rate {preset.learning_rate:g}, {preset.batch_size} "
            f"records a step, as many steps for every row as {counted(preset.epochs, 'epoch')} of "
            f"the noisy set would take. Experts: {counted(preset.rounds, 'round')} of reasoning of "
            f"{preset.reasoning_tokens} tokens."
        )
    return " ".join(found)


def _accuracy_note(study: Study, seeds: Sequence[int]) -> str:
    """What the numbers of the table are, and what stands beside them."""
    several = f"seeds {', '.join(map(str, seeds))}"
    one = f"(one seed, {seeds[0]})"
    wilson = "Wilson's over the test records"
    if study.instructions:
        over = one if len(seeds) == 1 else f"of the means over {several}"
        note = (
            f"Accuracy in percent: mean ± standard deviation over "
            f"{counted(study.instructions, 'instruction')} {over}. In the CSV also Student's 95 % "
            f"interval over them; where all agree, {wilson}."
        )
    elif len(seeds) > 1:
        note = (
            f"Accuracy in percent with Student's 95 % interval over {several}; where all agree, as "
            f"without training, {wilson}."
        )
    else:
        note = f"Accuracy in percent with Wilson's 95 % interval over the test records {one}."
    if any(plan.paper is not None for plan in study.rows):
        note += (
            " In round brackets: the paper's number, Llama-3.1-8B-Instruct unless the row names a "
            "model."
        )
    each = ", of each model" if len({cell.model for cell in study.cells}) > 1 else ""
    return f"{note} Bold: the best on the same test records and noise{each}."
