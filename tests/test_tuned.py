from __future__ import annotations

import importlib
import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import read, write
from hypothesis import given
from hypothesis import strategies as st
from scripted import LetterEmbedder, ScriptedEngine

from robustft import tuned
from robustft.cleaning import run_clean
from robustft.cli import main
from robustft.config import CleanConfig, EngineConfig, TunedConfig
from robustft.detection import Conclusion
from robustft.errors import UserError
from robustft.intake import take_in
from robustft.records import open_records
from robustft.shards import Shard
from robustft.store import Store
from robustft.verdicts import CleanResult

COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answer is the colour that they name; one answer in four is wrong."""
    rng = random.Random(0)
    rows = []
    for n in range(120):
        wrong = n % 4 == 1
        answer = "ABC"[(n + rng.choice([1, 2]) * wrong) % 3]
        row = {"id": str(n), "question": f"What colour? box {n // 6}, {COLOURS[n % 3]}"}
        rows.append(row | {"options": COLOURS, "answer": answer})
    return write(tmp_path_factory.mktemp("tuned") / "colours.jsonl", rows)


def config_for(corpus: Path, model: Path, out: Path, epochs: int = 12) -> CleanConfig:
    return CleanConfig(
        input=str(corpus),
        out=out,
        without=frozenset({"rel", "checker"}),
        engine=EngineConfig(model=str(model), device="cpu"),
        tuned=TunedConfig(folds=2, fold_epochs=epochs, fold_learning_rate=2e-2),
    )


def cleaned(config: CleanConfig) -> CleanResult:
    return run_clean(config, embedder=LetterEmbedder())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(corpus: Path, tiny_model: Path) -> tuple[CleanConfig, CleanResult]:
    """A run that nothing disturbed."""
    config = config_for(corpus, tiny_model, corpus.parent / "whole")
    return config, cleaned(config)


def test_the_fine_tuned_model_joins_the_crowd_out_of_fold(
    corpus: Path, whole: tuple[CleanConfig, CleanResult]
) -> None:
    config, result = whole
    assert result.weights["tuned"] > 0.05
    assert list(result.seconds) == ["load", "detect", "split", "folds", "relabel", "write", "total"]
    assert result.seconds["folds"] > result.seconds["split"]
    verdicts = read(config.out / "verdicts.jsonl")
    said = [verdict["experts"]["tuned"] for verdict in verdicts]
    truth = ["ABC"[n % 3] for n in range(120)]
    right = sum(one["answer"] == letter for one, letter in zip(said, truth, strict=True))
    assert right > 60  # a third by chance
    asked = {record.question: tuned.fold_of(record, config) for record in open_records(str(corpus))}
    learnt = sorted((config.out / "tuned").glob("*/fold-*.jsonl"))
    assert [path.name for path in learnt] == ["fold-1.jsonl", "fold-2.jsonl"]
    for fold, path in enumerate(learnt):
        rows = read(path)
        assert rows
        assert all(asked[row["question"]] != fold for row in rows)
        assert path.with_suffix("").joinpath("adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def brief(corpus: Path, tiny_model: Path) -> CleanConfig:
    """A run that nothing disturbed and whose models learnt little."""
    config = config_for(corpus, tiny_model, corpus.parent / "brief", epochs=1)
    cleaned(config)
    return config


@pytest.mark.parametrize(
    ("owner", "what", "call"),
    [
        ("robustft.tuned", "train", 2),
        ("robustft.tuned", "load_engine", 1),
        ("robustft.tuned", "load_engine", 2),
        ("robustft.cleaning", "conclude", 2),
    ],
)
def test_killed_anywhere_and_resumed_ends_the_same(
    brief: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    owner: str, what: str, call: int,
) -> None:  # fmt: skip
    config = replace(brief, out=tmp_path / "broken")
    real, calls = getattr(importlib.import_module(owner), what), itertools.count(1)

    class Killed(BaseException):
        pass

    def killing(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(f"{owner}.{what}", killing)
        with pytest.raises(Killed):
            cleaned(config)
    cleaned(config)
    for name in ("cleaned.jsonl", "verdicts.jsonl"):
        assert (config.out / name).read_bytes() == (brief.out / name).read_bytes()


@given(st.integers(1, 60), st.integers(2, 4), st.integers(0, 99))
def test_the_surest_two_thirds_of_every_label_are_learnt(
    count: int, options: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pooled = np.round(rng.dirichlet(np.ones(options), size=count), 1)  # with ties
    pooled[rng.random(count) < 0.2] = 0.0  # not judged
    labels = tuned.surest_labels(pooled)
    judged = pooled.any(1)
    assert (labels[~judged] == -1).all()
    for label in range(options):
        same = np.flatnonzero(judged & (pooled.argmax(1) == label))
        learnt = labels[same] == label
        assert learnt.sum() == round(2 / 3 * len(same))
        assert set(labels[same].tolist()) <= {label, -1}
        if learnt.any() and not learnt.all():
            certainty = pooled[same, label]
            assert certainty[learnt].min() >= certainty[~learnt].max()


def test_equal_questions_share_a_fold(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = config_for(corpus, tiny_model, tmp_path)
    records = list(open_records(str(corpus)))
    folds = [tuned.fold_of(record, config) for record in records]
    assert {30 < folds.count(fold) < 90 for fold in (0, 1)} == {True}
    twins: dict[str, set[int]] = {}
    for record, fold in zip(records, folds, strict=True):
        twins.setdefault(record.question, set()).add(fold)
    assert len(twins) < len(records)
    assert all(len(found) == 1 for found in twins.values())
    other = [tuned.fold_of(record, replace(config, seed=1)) for record in records]
    assert other != folds


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"detector": "paper"}, "detector must be crowd"),
        ({"engine": EngineConfig(engine="vllm")}, "engine must be transformers"),
    ],
)
def test_what_cannot_hear_them_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CleanConfig(input="in.jsonl", out=Path("out"), tuned=TunedConfig(folds=2), **changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds", "1"], "folds must be 0 (none) or at least 2, got 1"),
        (["--folds", "2", "--processes", "2"], "--folds does not go with shards: it belongs"),
        (["--folds", "2", "--method", "noiseal"], "--folds does not go with --method noiseal"),
        (
            ["--folds", "2", "--fold-learning-rate", "0"],
            "--fold-learning-rate: expected a number above 0",
        ),
        (["--folds", "2"], "--folds needs multiple choice"),
    ],
)
def test_one_line_says_what_does_not_go(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "open.jsonl", [{"question": "Who?", "answer": "Nobody"}])
    assert main(["clean", str(path), "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_too_little_to_learn_from(tiny_model: Path, tmp_path: Path) -> None:
    row = {"question": "What colour?", "options": COLOURS, "answer": "A"}
    path = write(tmp_path / "one.jsonl", [row] * 6)  # one question, so all in one fold
    config = config_for(path, tiny_model, tmp_path)
    nothing, certain = np.zeros(6, np.bool_), np.tile([1.0, 0.0, 0.0], (6, 1))
    first = Conclusion(nothing, nothing, certain, np.zeros(6), np.zeros(6, np.int8))
    with (
        take_in(open_records(str(path)), tmp_path / "intake") as intake,
        Store(tmp_path / "run.sqlite") as store,
        pytest.raises(UserError, match="too few records are certain"),
    ):
        tuned.ask_tuned(config, Shard(0, 1, 0, 6, tmp_path), intake, store, first)


def test_a_ready_engine_cannot_be_fine_tuned(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_for(corpus, tiny_model, tmp_path / "out")
    with pytest.raises(UserError, match="give model, not an engine"):
        run_clean(config, engine=ScriptedEngine(), embedder=LetterEmbedder())  # type: ignore[arg-type]
