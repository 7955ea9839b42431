"""What each table and figure of the paper consists of: its cells, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustft.config import ABLATIONS, ReproduceConfig
from robustft.errors import UserError
from robustft.methods import METHODS, Method, find_method
from robustft.reproduction import paper
from robustft.reproduction.cells import Cell
from robustft.reproduction.presets import TABLE2_MODELS
from robustft.reproduction.tasks import TASKS

_ABLATION_NAMES = {
    "": "RobustFT",
    "selection": "w/o Selection",
    "checker": "w/o Checker",
    "reviewer": "w/o Reviewer",
    "cer": "w/o CER",
    "rel": "w/o REL",
}
_OF_FIGURES = ("vanilla", "sft", "robustft-paper", "robustft")  # and of table 2
BETAS = (0.3, 0.4, 0.5, 0.6, 0.7)
KS = (1, 2, 3, 4, 5)
REPHRASINGS = Path(__file__).parent / "rephrasings.txt"


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row of a study: what it is called, and its cells, one a seed (or instruction)."""

    name: str
    task: str
    noise: int | None
    cells: tuple[Cell, ...]
    paper: float | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """A table or figure: its rows, and what is said below it."""

    name: str
    title: str
    rows: tuple[RowPlan, ...]
    relative: bool = False  # add the improvement over vanilla and SFT
    perplexity: bool = False
    categories: bool = False  # one line a category of the test records
    instructions: int = 0  # over how many each row is the mean; 0: it is not
    note: str = ""

    @property
    def cells(self) -> dict[Cell, str]:
        """Every cell once, in the order of the rows, with the row that first needs it."""
        found: dict[Cell, str] = {}
        for plan in self.rows:
            for cell in plan.cells:
                found.setdefault(cell, plan.name)
        return found


def _grid(
    config: ReproduceConfig, tasks: Sequence[str], noise: Sequence[int]
) -> Iterator[tuple[str, int]]:
    for task in config.tasks or tasks:
        if task not in TASKS:
            raise UserError(f"tasks must be among {', '.join(TASKS)}, got {task!r}")
        for rate in config.noise or noise:
            yield task, rate


def _seeds(config: ReproduceConfig, **fields: Any) -> tuple[Cell, ...]:
    fields.setdefault("model", config.engine.model)
    return tuple(Cell(seed=seed, **fields) for seed in config.seeds)


def _methods(
    config: ReproduceConfig, usual: Sequence[str], fit: Callable[[Method], bool] = lambda _: True
) -> list[str]:
    """The methods to run, each of which must fit the study."""
    fitting = [name for name, method in METHODS.items() if fit(method)]
    for name in config.methods:
        find_method(name)
        if name not in fitting:
            raise UserError(
                f"methods of {config.what} must be among {', '.join(fitting)}, got {name!r}"
            )
    return list(config.methods or usual)


def _is_robustft(method: Method) -> bool:
    """Whether it has the parts and the settings of RobustFT."""
    return method.name in ("robustft-paper", "robustft")


def _last_parts(models: Sequence[str]) -> dict[str, str]:
    """The models by the last part of their names, or as many parts as tell them apart."""
    parts = [model.rstrip("/").split("/") for model in models]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return dict(zip(models, names, strict=True))
    return {model: model for model in models}


def table1(config: ReproduceConfig) -> Study:
    """Methods x tasks x noise."""
    rows = [
        RowPlan(
            METHODS[method].title, task, noise,
            _seeds(config, task=task, noise=noise, method=method),
            paper.number(paper.TABLE1.get(method), task, noise),
        )
        for method in _methods(config, tuple(METHODS))
        for task, noise in _grid(config, paper.TASK_ORDER, paper.NOISE)
    ]  # fmt: skip
    return Study("table1", "Table 1: methods under noise", tuple(rows), relative=True)


def table2(config: ReproduceConfig) -> Study:
    """Models x (vanilla, SFT, RobustFT) x tasks x noise."""
    rows = []
    models = config.models or ((config.engine.model,) if config.engine.model else TABLE2_MODELS)
    methods = _methods(config, _OF_FIGURES, lambda method: method.model is None)
    for model, short in _last_parts(models).items():
        for method in methods:
            for task, noise in _grid(config, paper.TASK_ORDER, paper.NOISE):
                cells = _seeds(config, task=task, noise=noise, method=method, model=model)
                printed = paper.TABLE2.get(model, {}).get(method)
                name = f"{short}: {METHODS[method].title}"
                number = paper.number(printed, task, noise)
                rows.append(RowPlan(name, task, noise, cells, number))
    return Study("table2", "Table 2: models under noise", tuple(rows))


def table3(config: ReproduceConfig) -> Study:
    """RobustFT with one part left out."""
    methods = _methods(config, ("robustft-paper",), _is_robustft)
    rows = []
    for method in methods:
        for part in ("", *ABLATIONS):
            changes = (("without", frozenset({part})),) if part else ()
            for task, noise in _grid(config, ("mmlu", "arc"), paper.NOISE):
                cells = _seeds(config, task=task, noise=noise, method=method, changes=changes)
                name = _ABLATION_NAMES[part]
                name = f"{METHODS[method].title}: {name}" if len(methods) > 1 else name
                number = paper.number(paper.TABLE3[part], task, noise)
                rows.append(RowPlan(name, task, noise, cells, number))
    which = ", ".join(METHODS[method].title for method in methods)
    return Study("table3", "Table 3: ablations", tuple(rows), note=f"Method: {which}.")


def fig1(config: ReproduceConfig) -> Study:
    """Accuracy against noise."""
    rows = [
        RowPlan(
            METHODS[method].title, task, noise,
            _seeds(config, task=task, noise=noise, method=method),
            paper.number(paper.TABLE1.get(method), task, noise),
        )
        for method in _methods(config, _OF_FIGURES)
        for task, noise in _grid(config, ("mmlu",), (0, *paper.NOISE))
    ]  # fmt: skip
    return Study("fig1", "Figure 1: accuracy against noise", tuple(rows))


def fig3(config: ReproduceConfig) -> Study:
    """Sensitivity to beta and k."""
    rows = []
    for method in _methods(config, ("robustft-paper", "robustft"), _is_robustft):
        for task, noise in _grid(config, ("mmlu",), paper.NOISE):
            for name, values, usual in (("beta", BETAS, 0.5), ("k", KS, 3)):
                for value in values:
                    changes = () if value == usual else ((name, value),)
                    cells = _seeds(config, task=task, noise=noise, method=method, changes=changes)
                    shown = f"{value:.0%}" if name == "beta" else str(value)
                    label = f"{METHODS[method].title}: {name} = {shown}"
                    rows.append(RowPlan(label, task, noise, cells))
    note = (
        "Where the default detector settles labels itself (all records share their options), k "
        "changes nothing: no neighbours are shown to the model."
    )
    return Study("fig3", "Figure 3: sensitivity to beta and k", tuple(rows), note=note)


def fig4(config: ReproduceConfig) -> Study:
    """Perplexity of the right test answers."""
    rows = [
        RowPlan(
            METHODS[method].title, task, noise,
            _seeds(config, task=task, noise=noise, method=method),
        )
        for task, noise in _grid(config, ("mmlu", "arc"), paper.NOISE)
        for method in _methods(config, _OF_FIGURES)
    ]  # fmt: skip
    note = (
        "Perplexity of a test record: exp of the mean nll (nats) of its right answer's tokens; in "
        "the table its median, in brackets what 10 and 90 % of the records lie below."
    )
    title = "Figure 4: perplexity on the test set"
    return Study("fig4", title, tuple(rows), perplexity=True, note=note)


def fig5(config: ReproduceConfig) -> Study:
    """Accuracy by category of MMLU."""
    rows = [
        RowPlan(
            METHODS[method].title, task, noise,
            _seeds(config, task=task, noise=noise, method=method),
        )
        for task, noise in _grid(config, ("mmlu",), paper.NOISE)
        for method in _methods(config, _OF_FIGURES)
    ]  # fmt: skip
    note = (
        "Categories: the subcategories that Hendrycks et al. publish with MMLU "
        "(github.com/hendrycks/test, categories.py)."
    )
    title = "Figure 5: accuracy by category"
    return Study("fig5", title, tuple(rows), categories=True, note=note)


def fig6(config: ReproduceConfig) -> Study:
    """Stability under rephrased instructions: mean and deviation over them."""
    path = config.rephrasings or REPHRASINGS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the rephrasings: {error}") from error
    wordings = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    wordings = list(dict.fromkeys(wordings))
    if not wordings:
        raise UserError(f"{path}: expected one instruction a line, found none")
    rows = [
        RowPlan(
            METHODS[method].title, task, noise,
            tuple(
                cell
                for words in wordings
                for cell in _seeds(
                    config, task=task, noise=noise, method=method, instruction=words
                )
            ),
        )
        for method in _methods(
            config, _OF_FIGURES, lambda method: not method.demonstrations
        )
        for task, noise in _grid(config, ("mmlu", "arc"), paper.NOISE)
    ]  # fmt: skip
    said = "; ".join(f'"{words}"' for words in wordings)
    title = "Figure 6: stability under rephrased instructions"
    return Study(
        "fig6", title, tuple(rows), instructions=len(wordings), note=f"Instructions: {said}."
    )


STUDIES: dict[str, Callable[[ReproduceConfig], Study]] = {
    study.__name__: study for study in (table1, table2, table3, fig1, fig3, fig4, fig5, fig6)
}
