"""An engine that fails on some requests: nothing is lost or made up, and resuming repairs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import quiz, read, write
from scripted import REASON, FlakyEngine, LetterEmbedder, ScriptedEngine, digest

from robustft import decisions, resumable
from robustft.cleaning import run_clean
from robustft.config import CleanConfig, EngineConfig, EvalConfig, ExpertConfig
from robustft.engines import Abilities, Prompt
from robustft.evaluation import evaluate
from robustft.scoring import score_file
from robustft.shards import withdraw
from robustft.verdicts import CleanResult


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
    assert all(line["reason"].count("not judged") == 1 for line in unjudged)
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
        patch.setattr(decisions, "withdraw", killed)
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


@pytest.mark.parametrize("command", ["eval", "score"])
def test_where_nothing_got_a_reply_no_figure_is_made_up(tmp_path: Path, command: str) -> None:
    source = str(write(tmp_path / "in.jsonl", quiz(3)))
    engine, out = FlakyEngine(every=1), tmp_path / "o.jsonl"
    if command == "eval":
        said = str(evaluate(EvalConfig(source, out=out), engine=engine))
        assert said.startswith("scripted: no question was answered, ")
        assert "3 questions got no reply from the engine and were left out." in said
    else:
        said = str(score_file(source, out, EngineConfig(), engine=engine))
        assert said.startswith(
            "0 responses scored, 0 unreadable records, 3 not answered by the engi"
        )
        assert "mean nll" not in said
    assert "nan" not in said


@pytest.mark.parametrize("command", ["eval", "score"])
def test_what_failed_in_a_killed_session_is_asked_again(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "UNIT_ROWS", 16)
    source = str(write(tmp_path / "in.jsonl", [*quiz(20), b"{broken", *quiz(20, seed=1)]))

    def call(out: str, engine: ScriptedEngine) -> str:
        path = tmp_path / out
        if command == "score":
            return str(score_file(source, path, EngineConfig(), engine=engine))
        return str(evaluate(EvalConfig(input=source, out=path), engine=engine))

    batches = 0

    def kill() -> None:
        nonlocal batches
        batches += 1
        if batches > 4:
            raise KeyboardInterrupt

    flaky = FlakyEngine(3, before_batch=kill)
    with pytest.raises(KeyboardInterrupt):
        call("out.jsonl", flaky)
    again = ScriptedEngine()
    said = call("out.jsonl", again)
    assert flaky.failed
    assert len(again.asked) == 40 - (len(flaky.asked) - flaky.failed)
    assert "reply from the engine" not in said
    assert "not answered" not in said
    call("whole.jsonl", ScriptedEngine())
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


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
