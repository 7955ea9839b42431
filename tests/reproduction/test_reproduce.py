"""The whole command with a tiny random model: files, resume, cache, what is not run."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from scripted import FlakyEngine

from robustft.cli import main
from robustft.config import EngineConfig, ReproduceConfig
from robustft.errors import UserError
from robustft.evaluation import judge
from robustft.methods import METHODS
from robustft.reproduction import paper
from robustft.reproduction.categories import CATEGORY, by_category
from robustft.reproduction.cells import Bench, Cell, Outcome
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
    assert "not run: NousResearch/Hermes-3-Llama-3.1-8B is not here" in said
    assert "(84.4)" in said  # the paper's own number
    found = {row["row"]: row for row in rows_of(tmp_path / "table1.csv")}
    for title in ("Vanilla", "SelfLabel", "SFT", "SelfRAG", "RobustFT (ours)"):
        assert 0 <= float(found[title]["accuracy"]) <= 100
        assert found[title]["test_records"] == "9"
    assert found["Hermes-3"]["accuracy"] == ""
    assert {found[n]["steps"] for n in ("SelfLabel", "SFT", "RobustFT (ours)")} == {"2"}
    assert "Δ RobustFT (ours) vs. SFT" in said or found["SFT"]["accuracy"] == "0.00"
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
        assert float(found[0]["perplexity_p10"]) <= float(found[0]["perplexity_p90"])
    if what == "fig6":
        assert float(found[0]["deviation"]) >= 0
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
        tested = shop.evaluation(data / "fpb" / "test.jsonl", None, judge=judge)
        return manifest["unanswered"], tested.failed

    assert min(results()) > 0
    flaky.every = 1 << 40  # no hash is divisible by it
    assert results() == (0, 0)
    asked = len(flaky.asked)
    assert results() == (0, 0)
    assert len(flaky.asked) == asked


def with_other_weights(model: Path, folder: Path) -> Path:
    """A copy of a model folder with other weights, of the same shapes and names."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w + 0.1 for name, w in weights.items()}, folder / "model.safetensors")
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


def test_missing_data_is_told_and_nothing_is_made_up(tmp_path: Path) -> None:
    outcome = Bench(ReproduceConfig("table1", out=tmp_path, data=str(tmp_path))).run(
        Cell("drop", 30, "vanilla")
    )
    assert outcome.reason.startswith("not run: no data")
    row = Row.of("Vanilla", "drop", 30, [outcome], 87.2)
    assert "not run: no data" in to_markdown([row], "t", [])
    (line,) = csv.DictReader(to_csv([row]).splitlines())
    assert (line["accuracy"], line["paper"]) == ("", "87.2")


def test_intervals_over_seeds_and_over_records() -> None:
    several = Row("a", "fpb", 30, [], values=[60.0, 62.0, 64.0])
    low, high = several.interval
    assert several.mean == 62.0
    assert (low, high) == pytest.approx((62 - 4.303 * 2 / 3**0.5, 62 + 4.303 * 2 / 3**0.5))
    assert several.deviation == 2.0
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
