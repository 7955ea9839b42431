from __future__ import annotations

import math
from pathlib import Path

import pytest
from commandline import read, write
from runs import choice_rows
from scripted import LetterEmbedder, ScriptedEngine

from robustft.cleaning import run_clean
from robustft.config import CleanConfig, EngineConfig, ExpertConfig
from robustft.consensus import consensus
from robustft.errors import UserError
from robustft.opinions import Opinion

NAN = float("nan")


def lettered(*shares: float) -> Opinion:
    return Opinion("A", "why", 0.1, 0.5, shares, 10, 1)


def written(answer: str | None, nll: float = NAN) -> Opinion:
    return Opinion(answer, f"so {answer}", nll, nll, None, 10, 4)


def test_probabilities_are_averaged() -> None:
    found = consensus([lettered(0.6, 0.4, 0.0), lettered(0.0, 0.9, 0.1)], "ABC", "choice")
    assert found.answer == "B"
    assert found.probabilities == (0.3, 0.65, 0.05)
    assert found.nll == pytest.approx(-math.log(0.65))
    assert (found.prompt_tokens, found.new_tokens) == (20, 2)


def test_the_largest_group_speaks_through_its_surest_member() -> None:
    said = [written("1,000", 0.9), written("7", 0.1), written("$1000.00", 0.3), written(None)]
    found = consensus(said, "", "number")
    assert found.answer == "$1000.00"
    assert found.nll == pytest.approx(0.6 - math.log(2 / 4))
    assert found.new_tokens == 16


def test_between_groups_of_one_size_the_surer_one_speaks() -> None:
    assert consensus([written("7", 0.5), written("8", 0.2)], "", "number").answer == "8"
    assert consensus([written("7"), written("8", 9.0)], "", "number").answer == "8"
    assert consensus([written("7"), written("8")], "", "number").answer == "7"


def test_silence_and_failure_stay_what_they_are() -> None:
    assert consensus([written(None), written(None)], "", "text").answer is None
    failed = consensus([written("7", 0.1), Opinion(None, failure="HTTP 500")], "", "number")
    assert (failed.answer, failed.failure) == (None, "HTTP 500")


def test_samples_of_a_greedy_engine_are_refused() -> None:
    with pytest.raises(UserError, match=r"samples must be 1 at temperature 0"):
        CleanConfig(input="x", out=Path("y"), experts=ExpertConfig(samples=2))


def test_every_sample_is_asked_once_and_resuming_asks_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(20))

    def run(out: str, samples: int) -> ScriptedEngine:
        engine = ScriptedEngine()
        config = CleanConfig(
            input=str(source), out=tmp_path / out, detector="paper",
            engine=EngineConfig(temperature=0.7), experts=ExpertConfig(rounds=2, samples=samples),
        )  # fmt: skip
        run_clean(config, engine=engine, embedder=LetterEmbedder())  # type: ignore[arg-type]
        return engine

    one, three = run("one", 1), run("three", 3)
    # The scripted engine answers alike every time: three samples say what one does.
    assert [(v["verdict"], v["answer"]) for v in read(tmp_path / "one/verdicts.jsonl")] == [
        (v["verdict"], v["answer"]) for v in read(tmp_path / "three/verdicts.jsonl")
    ]
    assert len(three.asked) - len(one.asked) == 2 * 20 * (2 * 2 + 1)
    (tmp_path / "three/phases").rename(tmp_path / "gone")
    assert run("three", 3).asked == []
