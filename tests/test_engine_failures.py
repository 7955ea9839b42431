"""An engine that fails on some requests: nothing is lost or made up, and resuming repairs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commandline import quiz, read, write
from scripted import LetterEmbedder, ScriptedEngine, digest

from robustft import pipeline
from robustft.cleaning import run_clean
from robustft.config import CleanConfig, EngineConfig, EvalConfig, ExpertConfig
from robustft.engines import Abilities, Failure, Prompt
from robustft.evaluation import evaluate
from robustft.scoring import score_file
from robustft.shards import withdraw
from robustft.verdicts import CleanResult

REASON = "HTTP 500 (4 tries)"


class FlakyEngine(ScriptedEngine):
    """Fails on every request whose hash is divisible by `every`."""

    def __init__(self, every: int, **scripted: Any) -> None:
        super().__init__(**scripted)
        self.every = every
        self.failed = 0

    def _or_failure(self, prompts: Sequence[Prompt], replies: Sequence[Any]) -> list[Any]:
        found = [
            Failure(REASON) if digest(prompt) % self.every == 0 else reply
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        self.failed += sum(isinstance(reply, Failure) for reply in found)
        return found

    def generate(self, prompts: Sequence[Prompt], *rest: Any) -> list[Any]:
        return self._or_failure(prompts, super().generate(prompts, *rest))

    def choose(self, prompts: Sequence[Prompt], *rest: Any) -> list[Any]:
        return self._or_failure(prompts, super().choose(prompts, *rest))

    def score(self, prompts: Sequence[Prompt], *rest: Any) -> list[Any]:
        return self._or_failure(prompts, super().score(prompts, *rest))


def clean(source: Path, out: Path, engine: ScriptedEngine, detector: str = "paper") -> CleanResult:
    config = CleanConfig(
        input=str(source), out=out, detector=detector, experts=ExpertConfig(rounds=2)
    )
    return run_clean(config, engine=engine, embedder=LetterEmbedder())


@pytest.mark.parametrize("detector", ["paper", "crowd"])
@pytest.mark.parametrize("every", [2, 9, 60])
def test_a_resumed_run_is_the_run_that_never_failed(
    tmp_path: Path, every: int, detector: str
) -> None:
    source = write(tmp_path / "in.jsonl", quiz(80))
    clean(source, tmp_path / "whole", ScriptedEngine(), detector)
    first = FlakyEngine(every)
    result = clean(source, tmp_path / "out", first, detector)
    assert first.failed
    assert result.unanswered > 0
    assert "asks those questions again" in result.warnings[-1]
    lines = read(tmp_path / "out/verdicts.jsonl")
    assert [line["id"] for line in lines] == [f"r{i}" for i in range(80)]
    unjudged = [line for line in lines if line["reason"].startswith("not judged")]
    assert all(line["action"] == "keep" and REASON in line["reason"] for line in unjudged)
    assert sum(result.counts[a] for a in ("keep", "relabel", "drop")) == 80

    clean(source, tmp_path / "out", ScriptedEngine(), detector)
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("withdrawn", range(4))
def test_killed_while_failures_are_opened_again(
    tmp_path: Path, withdrawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", quiz(80))
    clean(source, tmp_path / "whole", ScriptedEngine())
    assert clean(source, tmp_path / "out", FlakyEngine(9)).unanswered > 0
    left = withdrawn

    def killed(folder: Path) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        withdraw(folder)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "withdraw", killed)
        with pytest.raises(KeyboardInterrupt):
            clean(source, tmp_path / "out", ScriptedEngine())
    assert clean(source, tmp_path / "out", ScriptedEngine()).unanswered == 0
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_failed_question_is_put_once_a_session(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(40))
    engine = FlakyEngine(5)
    clean(source, tmp_path / "out", engine)
    asked = [prompt for prompt in engine.asked if digest(prompt) % 5 == 0]
    assert asked
    assert len(asked) == len(set(asked))


def test_an_unjudged_record_is_nobodys_neighbour(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(80))
    clean(source, tmp_path / "out", FlakyEngine(9))
    lines = read(tmp_path / "out/verdicts.jsonl")
    unjudged = {line["id"] for line in lines if line["reason"].startswith("not judged")}
    shown = {near["id"] for line in lines for near in line["neighbours"]}
    assert unjudged
    assert shown
    assert not unjudged & shown


def test_eval_leaves_failures_out(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(40))
    out = tmp_path / "p.jsonl"
    result = evaluate(EvalConfig(input=str(source), out=out), engine=FlakyEngine(3))
    assert result.failed > 0
    assert result.failed + result.overall.total == 40
    assert "were left out" in str(result)
    assert sum(line.get("failed") == REASON for line in read(out)) == result.failed


def test_score_writes_a_line_for_a_failure(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", quiz(40))
    out = tmp_path / "s.jsonl"
    engine = FlakyEngine(3)
    summary = score_file(str(source), out, EngineConfig(), engine=engine)
    lines = read(out)
    assert [line["id"] for line in lines] == [f"r{i}" for i in range(40)]
    assert sum(line.get("failed") == REASON for line in lines) == summary.failures == engine.failed
    assert summary.mean_nll == 1.0


def test_without_likelihoods_words_are_read_from_text(tmp_path: Path) -> None:
    replies = {"Reply Yes or No.": " Yes, it is.", "": "Answer: B"}

    def reply(prompt: Prompt) -> str:
        asked = prompt.messages[-1].content
        return next(text for mark, text in replies.items() if mark in asked)

    source = write(tmp_path / "in.jsonl", quiz(20))
    engine = ScriptedEngine(reply=reply)
    engine.abilities = Abilities(choose=False, score=False)
    result = clean(source, tmp_path / "out", engine)
    lines = read(tmp_path / "out/verdicts.jsonl")
    assert {line["experts"]["base"]["answer"] for line in lines} == {"B"}
    assert {line["experts"]["checker"]["answer"] for line in lines} == {"yes"}
    assert result.counts["clean"] == 20
    replies["Reply Yes or No."] = "No."
    assert clean(source, tmp_path / "no", engine).counts["noisy"] == 20
    replies["Reply Yes or No."] = "Hmm."  # no word: the paper's rule without a checker decides
    assert clean(source, tmp_path / "hm", engine).counts["clean"] == sum(
        line["given"] == "B" for line in lines
    )
