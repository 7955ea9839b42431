"""The whole command with a tiny random model: files, resume, cache, what is not run."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from scripted import FlakyEngine

from robustft.cli import main
from robustft.config import EngineConfig, ReproduceConfig
from robustft.engines import Prompt
from robustft.errors import UserError
from robustft.evaluation import EvalResult
from robustft.methods import METHODS
from robustft.metrics import Tally, wilson
from robustft.predictions import judge
from robustft.reproduction import paper, plots
from robustft.reproduction.categories import CATEGORY, by_category
from robustft.reproduction.cells import Bench, Cell, Outcome
from robustft.reproduction.grid import reproduce
from robustft.reproduction.presets import preset_for
from robustft.reproduction.rows import Row, to_csv, to_markdown
from robustft.reproduction.studies import STUDIES
from robustft.reproduction.workshop import TrainingData, Workshop

WORDS = ("river", "mountain", "forest", "desert", "island", "valley")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    subjects = ("anatomy", "virology", "sociology")
    for name, size in (("labeled", 16), ("test", 9)):
        rows = [
            {
                "question": f"{name} {n}: {' '.join(rng.choices(WORDS, k=4))}?",
                "options": ["red", "green", "blue"],
                "answer": rng.choice("ABC"),
                "Subject": subjects[n % 3],
            }
            for n in range(size)
        ]
        for task in ("fpb", "mmlu"):
            path = folder / task / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(
    what: str, data: Path, out: Path, model: Path, encoder: Path, *more: str
) -> list[str]:
    return [
        "reproduce", what, "--data", str(data), "--out", str(out), "--model", str(model),
        "--embedder", str(encoder), "--device", "cpu", "--dtype", "float32", "--rounds", "1",
        "--reasoning-tokens", "4", "--epochs", "1", "--top-layers", "1", *more,
    ]  # fmt: skip


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_table1_is_written_and_read_again(
    data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    methods = "vanilla,hermes-3,self-label,sft,noiseal,self-rag,self-select,robustft-paper,robustft"
    command = arguments(
        "table1", data, tmp_path, tiny_model, tiny_encoder, "--tasks", "fpb", "--noise", "30",
        "--methods", methods,
    )  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "[1] NousResearch/Hermes-3-Llama-3.1-8B is not here" in said
    assert "(84.4)" in said  # the paper's own number
    found = {row["row"]: row for row in rows_of(tmp_path / "table1.csv")}
    for title in ("Vanilla", "SelfLabel", "SFT", "SelfRAG", "RobustFT (ours)"):
        right = round(float(found[title]["accuracy"]) * 9 / 100)
        low, high = wilson(right, 9)
        assert [found[title][name] for name in ("accuracy", "low", "high", "test_records")] == [
            f"{100 * right / 9:.2f}", f"{100 * low:.2f}", f"{100 * high:.2f}", "9",
        ]  # fmt: skip
    assert found["Hermes-3"]["accuracy"] == ""
    assert {found[n]["steps"] for n in ("SelfLabel", "SFT", "RobustFT (ours)")} == {"2"}
    for suffix in ("png", "svg", "md"):
        assert (tmp_path / f"table1.{suffix}").stat().st_size > 200
    before = (tmp_path / "table1.csv").read_bytes()

    def never(*arguments: object, **more: object) -> object:
        raise AssertionError("a second call must not load a model")

    for name in ("workshop.load_engine", "workshop.Embedder"):
        monkeypatch.setattr(f"robustft.reproduction.{name}", never)
    monkeypatch.setattr("robustft.training.load_causal_lm", never)
    assert main(command) == 0
    assert (tmp_path / "table1.csv").read_bytes() == before


def test_whiskers_of_methods_stand_side_by_side() -> None:
    rows = [Row(name, "fpb", noise, values=[70.0, 72.0]) for name in "abc" for noise in (0, 30, 50)]
    (axis,) = plots._against_noise(rows).axes
    places = [bars.lines[0].get_xdata() for bars in axis.containers]
    assert np.diff(places, axis=0) == pytest.approx(np.full((2, 3), 0.75))
    assert places[1] == pytest.approx([0, 30, 50])


@pytest.mark.parametrize(
    ("what", "more", "lines"),
    [
        ("fig1", ["--tasks", "fpb", "--noise", "0,50", "--methods", "vanilla,sft"], 4),
        ("fig4", ["--tasks", "fpb", "--noise", "50", "--methods", "vanilla,sft"], 2),
        ("fig5", ["--tasks", "mmlu", "--noise", "50", "--methods", "vanilla,sft"], 4),
        ("fig6", ["--tasks", "fpb", "--noise", "50", "--methods", "vanilla,sft"], 2),
        ("table2", ["--tasks", "fpb", "--noise", "50", "--methods", "vanilla,sft"], 2),
    ],
)
def test_figures_share_what_was_trained(
    what: str, more: list[str], lines: int, data: Path, tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path, tiny_encoder: Path,
) -> None:  # fmt: skip
    out = tmp_path_factory.getbasetemp() / "shared-figures"
    assert main(arguments(what, data, out, tiny_model, tiny_encoder, *more)) == 0
    found = rows_of(out / f"{what}.csv")
    assert len(found) == lines
    assert all(row["accuracy"] for row in found)
    if what == "fig4":
        quantiles = [float(found[0][f"perplexity_p{q}"]) for q in (10, 50, 90)]
        assert 1 < quantiles[0] < quantiles[1] < quantiles[2]
    if what == "fig6":
        assert found[0]["deviation"]
    assert (out / f"{what}.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((out / "cache" / "adapters").iterdir())) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("what", ["table3", "fig3"])
def test_ablations_and_sensitivity(
    what: str, data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path
) -> None:
    command = arguments(
        what, data, tmp_path, tiny_model, tiny_encoder, "--tasks", "fpb", "--noise", "30",
        "--methods", "robustft-paper",
    )  # fmt: skip
    assert main(command) == 0
    assert len(rows_of(tmp_path / f"{what}.csv")) == (6 if what == "table3" else 10)


def test_a_dry_run_computes_nothing(
    data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = arguments(
        "table1", data, tmp_path, tiny_model, tiny_encoder, "--tasks", "fpb,arc", "--noise", "30",
        "--methods", "sft,robustft", "--dry-run",
    )  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "SFT on fpb at 30 %" in said
    assert "tokens trained" in said
    assert "arc" in said
    assert re.search(r"not run: 2 cells \(SFT, .* on arc\): no data", said)
    assert not (tmp_path / "table1.csv").exists()


def test_a_dry_run_tells_rows_apart_and_what_cannot_run(
    data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = ["--tasks", "fpb", "--noise", "30", "--dry-run"]
    assert main(arguments("table3", data, tmp_path, tiny_model, tiny_encoder, *more)) == 0
    said = capsys.readouterr().out
    assert "  RobustFT on fpb at 30 %, seed 0: " in said
    assert "  w/o Checker on fpb at 30 %, seed 0: " in said
    more += ["--methods", "sft"]
    assert main(arguments("fig6", data, tmp_path, tiny_model, tiny_encoder, *more)) == 0
    named = re.findall(r'  SFT on fpb at 30 %, seed 0, "(.*)": ', capsys.readouterr().out)
    assert len(set(named)) == 5
    more[1] = "arc"
    (tmp_path / "arc").mkdir()
    assert main(arguments("fig4", tmp_path, tmp_path, tiny_model, tiny_encoder, *more)) == 0
    said = capsys.readouterr().out
    assert said.startswith("Figure 4: perplexity on the test set: 1 cell\n")
    assert said.endswith("nothing of it can run here\n")
    assert "minutes" not in said


@pytest.mark.parametrize(("speed", "told"), [(1e9, "1 minute"), (10.0, r"\d\d+ minutes")])
def test_a_dry_run_tells_whole_minutes(
    speed: float, told: str, data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    parts = dict.fromkeys(("read", "written", "trained"), speed)
    monkeypatch.setattr("robustft.reproduction.workshop.Workshop.speeds", lambda _: parts)
    more = ["--tasks", "fpb", "--noise", "30", "--methods", "sft,robustft", "--dry-run"]
    assert main(arguments("table1", data, tmp_path, tiny_model, tiny_encoder, *more)) == 0
    assert re.search(rf": {told}\n$", capsys.readouterr().out)


def test_a_dry_run_counts_what_open_questions_may_be_answered_with(
    tmp_path: Path, tiny_model: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "drop"
    folder.mkdir(parents=True)
    for name, size in (("labeled", 4), ("test", 3)):
        rows = [json.dumps({"question": f"q{n}", "answer": f"town {n}"}) for n in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    command = arguments(
        "table1", tmp_path / "data", tmp_path, tiny_model, tiny_encoder, "--tasks", "drop",
        "--noise", "50", "--methods", "sft,self-label,robustft", "--dry-run",
    )  # fmt: skip
    assert main(command) == 0
    found = re.findall(r"([\d,]+) written", capsys.readouterr().out)
    # 3 test answers of 256 tokens; 4 training answers of 512, for RobustFT three times and with
    # two thoughts of 4 tokens.
    assert found == ["768", "2,816", "6,944"]


def test_what_the_last_step_lacks_is_told_before_the_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **more: object) -> Outcome:
        raise AssertionError("no cell may be run")

    monkeypatch.setattr(Bench, "run", never)
    plain = tmp_path / "data" / "mmlu"
    plain.mkdir(parents=True)
    for name in ("labeled", "test"):
        (plain / f"{name}.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    config = ReproduceConfig("fig5", tmp_path / "out", data=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"test.jsonl: fig5 needs a column Subject or Category"):
        reproduce(config)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="figures need matplotlib"):
        reproduce(dataclasses.replace(config, what="fig1", data=str(data)))


def test_a_share_leaves_the_rest_to_others(
    data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path
) -> None:
    command = arguments(
        "fig1", data, tmp_path, tiny_model, tiny_encoder, "--tasks", "fpb", "--noise", "0,50",
        "--methods", "sft", "--share", "1/2",
    )  # fmt: skip
    assert main(command) == 0
    assert not (tmp_path / "fig1.csv").exists()
    assert len(list((tmp_path / "cache" / "adapters").iterdir())) == 1


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--tasks", "gsm8k"], "tasks must be among mmlu, arc, pubmedqa, drop, fpb, got 'gsm8k'"),
        (["--methods", "magic"], "method must be one of vanilla"),
        (["--noise", "130"], "noise must be percents in [0, 100]"),
        (["--noise", "lots"], "expected a whole number"),
        (["--seeds", "0,1,0"], "seeds must be different ones, got (0, 1, 0)"),
        (["--share", "2/2"], "expected I/N with I from 0"),
        (["--rephrasings", "absent.txt", "--tasks", "fpb"], "cannot read the rephrasings"),
    ],
)
def test_mistakes_get_one_line(
    more: list[str], complaint: str, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["reproduce", "fig6", "--data", str(data), "--out", str(tmp_path), *more]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"what": "fig1", "models": ("a",)}, "--models belongs to table2, not to fig1"),
        ({"what": "fig1", "rephrasings": Path("a")}, "--rephrasings belongs to fig6, not to fig1"),
        ({"what": "table2", "models": ("a",), "engine": EngineConfig("b")}, "--models or --model,"),
        ({"what": "table2", "methods": ("sft", "tulu-3")}, "methods of table2 must be among "
         "vanilla, self-label, .*, got 'tulu-3'"),
        ({"what": "table3", "methods": ("sft",)}, "methods of table3 must be among robustft-paper, "
         "robustft, got 'sft'"),
        ({"what": "fig3", "methods": ("sft",)}, "methods of fig3 must be among robustft-paper"),
        ({"what": "fig6", "methods": ("self-rag",)}, "methods of fig6 .*, got 'self-rag'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(config: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        STUDIES[str(config["what"])](ReproduceConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (("/x/a/final", "/x/b/final"), ["a/final: SFT", "b/final: SFT"]),
        (("a/final/", "final"), ["a/final/: SFT", "final: SFT"]),
        (("meta-llama/Llama-3.2-3B", "google/gemma"), ["Llama-3.2-3B: SFT", "gemma: SFT"]),
    ],
)
def test_models_have_names_that_tell_them_apart(models: tuple[str, ...], names: list[str]) -> None:
    config = ReproduceConfig("table2", tasks=("fpb",), noise=(30,), methods=("sft",), models=models)
    assert [row.name for row in STUDIES["table2"](config).rows] == names


def test_what_failed_is_not_kept(
    data: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = FlakyEngine(3)
    monkeypatch.setattr("robustft.reproduction.workshop.load_engine", lambda *_: flaky)
    config = ReproduceConfig("table1", out=tmp_path, engine=EngineConfig(model=str(tiny_model)))
    shop = Workshop(tmp_path, config.engine, preset_for(config, None))
    noisy = TrainingData(data / "fpb" / "labeled.jsonl", None)

    def results() -> tuple[int, int]:
        made = shop.prepared(METHODS["self-label"], shop.clean_config(noisy, 0))
        manifest = json.loads((made.path.parent / "manifest.json").read_bytes())
        tested, _ = shop.evaluation(data / "fpb" / "test.jsonl", None, judge=judge)
        return manifest["unanswered"], tested.failed

    assert min(results()) > 0
    flaky.every = 1 << 40  # no hash is divisible by it
    assert results() == (0, 0)
    asked = len(flaky.asked)
    assert results() == (0, 0)
    assert len(flaky.asked) == asked


def with_other_weights(model: Path, folder: Path, by: float = 0.1) -> Path:
    """A copy of a model folder with other weights, of the same shapes and names."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w + by for name, w in weights.items()}, folder / "model.safetensors")
    return folder


def test_another_embedder_makes_sets_and_prompts_of_its_own(
    data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flaky = FlakyEngine(1 << 40)
    monkeypatch.setattr("robustft.reproduction.workshop.load_engine", lambda *_: flaky)
    noisy = TrainingData(data / "fpb" / "labeled.jsonl", None)
    cell = Cell("fpb", 0, "self-rag")
    sets, prompts = set(), []
    for embedder in (tiny_encoder, with_other_weights(tiny_encoder, tmp_path / "other")):
        config = ReproduceConfig(
            "table1", out=tmp_path, data=str(data), embedder=str(embedder),
            engine=EngineConfig(model=str(tiny_model)),
        )  # fmt: skip
        bench = Bench(config)
        shop = bench.shop(config.engine.model)
        sets.add(shop.prepared(METHODS["self-label"], shop.clean_config(noisy, 0)).path)
        prompts.append(bench._asked(shop, cell, bench.files(cell)))
    assert len(sets) == 2
    assert prompts[0] != prompts[1]


def test_other_weights_in_the_same_folder_are_asked_anew_and_a_note_tells_what_made_a_cell(
    data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = FlakyEngine(1 << 40)
    model = with_other_weights(tiny_model, tmp_path / "model")
    monkeypatch.setattr("robustft.reproduction.workshop.load_engine", lambda *_: engine)
    config = ReproduceConfig(
        "table1", tmp_path / "out", str(data), ("fpb",), (30,), ("vanilla",),
        embedder=str(tiny_encoder), engine=EngineConfig(model=str(model)),
    )  # fmt: skip

    def call(made_by: str) -> tuple[str, int]:
        monkeypatch.setattr("robustft.reproduction.workshop.made_by", lambda: made_by)
        note = next(line for line in reproduce(config).splitlines() if line.startswith("robustft"))
        return note, len(engine.asked)

    first = call("robustft 1, commit a")
    assert first[0] == "robustft 1, commit a."
    assert call("robustft 1, commit b") == first
    with_other_weights(tiny_model, model, by=0.2)
    second = call("robustft 1, commit b")
    assert second[0] == "robustft 1, commit b."
    assert second[1] > first[1]


def test_who_needs_a_set_that_another_prepares_waits_for_it(
    data: Path, tmp_path: Path, tiny_model: Path, tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    at_work, both = threading.Event(), threading.Event()

    class SlowEngine(FlakyEngine):
        def choose(self, prompts: Sequence[Prompt], *rest: object) -> list[object]:
            at_work.set()
            assert both.wait(60)
            return super().choose(prompts, *rest)

    engine = SlowEngine(1 << 40)
    monkeypatch.setattr("robustft.reproduction.workshop.load_engine", lambda *_: engine)
    config = ReproduceConfig("table1", engine=EngineConfig(model=str(tiny_model)))

    def prepare() -> Path:
        shop = Workshop(tmp_path, config.engine, preset_for(config, None), str(tiny_encoder))
        noisy = TrainingData(data / "fpb" / "labeled.jsonl", None)
        return shop.prepared(METHODS["self-label"], shop.clean_config(noisy, 0)).path

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare)
        assert at_work.wait(60)
        second = pool.submit(prepare)
        said = ""
        while "waiting" not in said and not second.done():
            said += capsys.readouterr().err
            time.sleep(0.01)
        both.set()
        assert first.result() == second.result()
    assert "waiting for another process, which prepares the same training set" in said
    assert len(engine.asked) == 16


def test_missing_data_is_told_and_nothing_is_made_up(tmp_path: Path) -> None:
    outcome = Bench(ReproduceConfig("table1", out=tmp_path, data=str(tmp_path))).run(
        Cell("drop", 30, "vanilla")
    )
    assert outcome.reason.startswith("not run: no data")
    row = Row.of("Vanilla", "drop", 30, [outcome], 87.2)
    again = Row.of("SFT", "drop", 30, [outcome], None)
    table = to_markdown([row, again], "t", [])
    assert "| Vanilla | not run [1] (87.2) |\n| SFT | not run [1] |\n\n" in table
    assert "\n[1] no data" in table
    assert table.count("no data") == 1
    (line,) = csv.DictReader(to_csv([row]).splitlines())
    assert (line["accuracy"], line["paper"]) == ("", "87.2")


def test_a_folder_without_any_of_the_tasks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "fpb").mkdir(parents=True)
    command = ["reproduce", "table1", "--out", str(tmp_path / "out"), "--tasks", "arc,drop"]
    for folder in ("data", "nothing"):
        assert main([*command, "--data", str(tmp_path / folder)]) == 2
        assert "a folder with one folder a task, found none of arc, drop" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


Right = Callable[[Cell], dict[str, tuple[int, int]]]  # category -> (right, of how many)


def written_table(
    config: ReproduceConfig, right: Right, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """The lines of the table, and the notes, where cells come out as `right` says."""

    def run(self: Bench, cell: Cell, *, perplexity: bool = False) -> Outcome:
        tallies = {name: Tally(total, correct) for name, (correct, total) in right(cell).items()}
        whole = Tally(
            sum(t.total for t in tallies.values()), sum(t.correct for t in tallies.values())
        )
        if not tallies:
            return Outcome(cell, reason="not run")
        return Outcome(cell, EvalResult("m", None, whole, tallies))

    monkeypatch.setattr(Bench, "run", run)
    reproduce(config)
    text = (config.out / f"{config.what}.md").read_text().splitlines()
    table = [line for line in text if line.startswith("|")]
    return table[2:], [line for line in text[1:] if line and not line.startswith("|")]


def test_a_table_over_seeds_against_hand_computed_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"vanilla": (50, 50, 50), "sft": (60, 62, 64), "robustft": (72, 75, 78)}
    config = ReproduceConfig(
        "table1", tmp_path, tasks=("fpb",), noise=(30,), methods=tuple(right), seeds=(0, 1, 2)
    )
    table, notes = written_table(
        config, lambda cell: {"all": (right[cell.method][cell.seed], 100)}, monkeypatch
    )
    said = capsys.readouterr().err
    assert "robustft: table1, cell 9 of 9: RobustFT (ours) on fpb at 30 %, seed 2\n" in said
    # Student's t with two degrees of freedom, 4.303, times 2 / sqrt(3) and 3 / sqrt(3); Wilson's
    # interval of 50 of 100 where the seeds agree.
    assert table == [
        "| Vanilla | 50.0 [40.4, 59.6] (75.5) |",
        "| SFT | 62.0 [57.0, 67.0] (79.7) |",
        "| RobustFT (ours) | **75.0** [67.5, 82.5] |",
        "| Δ RobustFT (ours) vs. Vanilla | +50.0 % |",
        "| Δ RobustFT (ours) vs. SFT | +21.0 % |",
    ]
    assert notes[0] == (
        "Accuracy in percent with Student's 95 % interval over seeds 0, 1, 2; where all agree, as "
        "without training, Wilson's over the test records. In round brackets: the paper's number, "
        "Llama-3.1-8B-Instruct unless the row names a model. Bold: the best on the same test "
        "records and noise."
    )


def test_a_table_of_models_has_the_best_of_each_bold_and_tells_their_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {"vanilla": 50, "sft": 60}
    small, large = "SmolLM2-135M-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
    config = ReproduceConfig(
        "table2", tmp_path, tasks=("fpb",), noise=(30,), methods=tuple(right), models=(small, large)
    )
    table, notes = written_table(
        config,
        lambda cell: {"all": (right[cell.method] - 20 * (cell.model == small), 100)},
        monkeypatch,
    )
    assert table == [
        "| SmolLM2-135M-Instruct: Vanilla | 30.0 [21.9, 39.6] |",
        "| SmolLM2-135M-Instruct: SFT | **40.0** [30.9, 49.8] |",
        "| Llama-3.1-8B-Instruct: Vanilla | 50.0 [40.4, 59.6] (75.5) |",
        "| Llama-3.1-8B-Instruct: SFT | **60.0** [50.2, 69.1] (79.7) |",
    ]
    assert notes[0].endswith("Bold: the best on the same test records and noise, of each model.")
    assert f" {small}: LoRA on the top 4 layers: learning rate 0.002, 8 records" in notes[1]
    assert f" {large}: LoRA on all layers: learning rate 0.0001, 8 records" in notes[1]


def test_the_table_of_figure_4_has_the_perplexities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Bench, cell: Cell, *, perplexity: bool = False) -> Outcome:
        result = EvalResult("m", None, Tally(100, 50))
        return Outcome(cell, result, perplexities=[1.0, 2.0, 3.0, 4.0, 5.0])

    monkeypatch.setattr(Bench, "run", run)
    reproduce(ReproduceConfig("fig4", tmp_path, tasks=("fpb",), noise=(30,), methods=("sft",)))
    text = (tmp_path / "fig4.md").read_text()
    assert "| SFT | 50.0 [40.4, 59.6], perplexity 3.00 [1.40, 4.60] |" in text
    assert "the table its median, in brackets what 10 and 90 % of the records lie below." in text


def test_drop_shows_exact_match_and_f1_and_says_which_the_paper_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Bench, cell: Cell, *, perplexity: bool = False) -> Outcome:
        return Outcome(cell, EvalResult("m", None, Tally(200, 80), credit=[92.5, 97.5][cell.seed]))

    monkeypatch.setattr(Bench, "run", run)
    reproduce(
        ReproduceConfig("table1", tmp_path, tasks=("drop",), noise=(30,), methods=("sft",),
                        seeds=(0, 1))
    )  # fmt: skip
    text = (tmp_path / "table1.md").read_text()
    assert "| SFT | 40.0 [33.5, 46.9], F1 47.5 (85.3) |" in text
    assert "DROP: exact match by its official metric, and that metric's F1. The paper's" in text
    (line,) = rows_of(tmp_path / "table1.csv")
    assert [line[name] for name in ("metric", "accuracy", "f1", "paper")] == [
        "exact match", "40.00", "47.50", "85.3",
    ]  # fmt: skip


def test_a_table_says_how_many_seeds_were_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right(cell: Cell) -> dict[str, tuple[int, int]]:
        return {"all": (60, 100)} if cell.seed == 1 else {}

    config = ReproduceConfig("table1", tmp_path, tasks=("fpb",), noise=(30,), methods=("sft",),
                             seeds=(0, 1, 2))  # fmt: skip
    table, _ = written_table(config, right, monkeypatch)
    assert table == ["| SFT | 60.0 [50.2, 69.1], 1 of 3 seeds (79.7) |"]


def test_categories_have_one_value_a_seed_and_their_best_method_is_bold(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right(cell: Cell) -> dict[str, tuple[int, int]]:
        if cell.method == "vanilla":
            return {"anatomy": (5, 10), "sociology": (3, 5), "virology": (0, 0), "law": (1, 2)}
        return {"anatomy": (5 + cell.seed, 10), "sociology": (2, 5), "law": (1, 2)}

    config = ReproduceConfig("fig5", tmp_path, str(data), noise=(30,), methods=("vanilla", "sft"),
                             seeds=(0, 1, 2))  # fmt: skip
    table, notes = written_table(config, right, monkeypatch)
    # 4.303 * 10 / sqrt(3); else Wilson's of one seed's records.
    assert table == [
        "| health | 50.0 [23.7, 76.3] | **60.0** [35.2, 84.8] |",
        "| culture | **60.0** [23.1, 88.2] | 40.0 [11.8, 76.9] |",
        "| law | 50.0 [9.5, 90.5] | 50.0 [9.5, 90.5] |",
    ]
    assert "In brackets" not in notes[0]


def test_instructions_are_averaged_over_seeds_before_they_deviate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("first\nsecond\nfirst\n")
    right = {("first", 0): 60, ("first", 1): 64, ("second", 0): 70, ("second", 1): 66}
    config = ReproduceConfig("fig6", tmp_path, tasks=("fpb",), noise=(30,), methods=("sft",),
                             seeds=(0, 1), rephrasings=words)  # fmt: skip
    table, notes = written_table(
        config, lambda cell: {"all": (right[str(cell.instruction), cell.seed], 100)}, monkeypatch
    )
    assert table == ["| SFT | 65.0 ± 4.2 |"]  # of 62 and 68
    assert notes[0] == (
        "Accuracy in percent: mean ± standard deviation over 2 instructions of the means over "
        "seeds 0, 1. In the CSV also Student's 95 % interval over them; where all agree, Wilson's "
        "over the test records. Bold: the best on the same test records and noise."
    )
    (line,) = rows_of(tmp_path / "fig6.csv")
    # Student's t with one degree of freedom, 12.706, times 3: no accuracy is 103.12 %.
    assert (line["low"], line["high"], line["seeds"]) == ("26.88", "100.00", "0 1")
    config = dataclasses.replace(config, seeds=(0,))
    _, notes = written_table(
        config, lambda cell: {"all": (right[str(cell.instruction), cell.seed], 100)}, monkeypatch
    )
    assert "over 2 instructions (one seed, 0). In the CSV" in notes[0]


def test_intervals_over_seeds_and_over_records() -> None:
    twelve = Row("a", "fpb", 30, [], values=[60.0, 62.0] * 6)
    low, high = twelve.interval
    assert twelve.mean == 61.0
    half = 2.201 * twelve.deviation / 12**0.5  # t with 11 degrees of freedom
    assert (low, high) == pytest.approx((61 - half, 61 + half), abs=1e-3)
    empty = Row.of("a", "fpb", 30, [Outcome(Cell("fpb", 30, "sft"), reason="not run: x")])
    assert empty.values == []
    assert str(empty.mean) == "nan"


def test_the_papers_numbers() -> None:
    assert paper.number(paper.TABLE1["sft"], "mmlu", 70) == 37.3
    assert paper.number(paper.TABLE1["robustft-paper"], "fpb", 30) == 84.4
    assert paper.number(paper.TABLE3["cer"], "arc", 50) == 84.1
    assert paper.number(paper.TABLE3["cer"], "fpb", 50) is None
    assert paper.number(paper.TABLE1["sft"], "mmlu", 40) is None
    assert paper.number(paper.TABLE1.get("robustft"), "mmlu", 30) is None
    for row in paper.TABLE1.values():
        assert len(row) == 15


def test_every_subject_has_a_category() -> None:
    assert len(CATEGORY) == 57
    assert list(by_category({})) == []


def test_a_study_of_every_table_and_figure() -> None:
    for name, study in STUDIES.items():
        rows = study(ReproduceConfig(name)).rows
        assert rows
        assert all(row.cells for row in rows)
    with pytest.raises(UserError):
        STUDIES["table1"](ReproduceConfig("table1", tasks=("x",)))


@pytest.mark.parametrize("what", ["table1", "table2", "fig1", "fig3", "fig4", "fig5", "fig6"])
def test_the_papers_own_detector_is_a_row_of_what_the_paper_shows(
    what: str, tmp_path: Path
) -> None:
    plans = STUDIES[what](ReproduceConfig(what, tmp_path)).rows
    assert {cell.method for plan in plans for cell in plan.cells} >= {"robustft-paper", "robustft"}


def test_figure_1_has_the_papers_number_of_robustft_beside_ours(tmp_path: Path) -> None:
    plans = STUDIES["fig1"](ReproduceConfig("fig1", tmp_path)).rows
    found = {plan.noise: plan.paper for plan in plans if plan.name == "RobustFT (paper)"}
    assert found == {0: None, 30: 68.2, 50: 68.0, 70: 67.6}
