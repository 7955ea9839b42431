"""A run goes on in the words it began in, or says that it does not."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import quiz, write
from runs import choice_rows, run
from scripted import ScriptedEngine

from robustft import prompts
from robustft.config import EngineConfig
from robustft.engines.transformers import TransformersEngine
from robustft.models import find_model, load_causal_lm, load_tokenizer
from robustft.scoring import score_file
from robustft.wording import wording

SAID = "asked in other words"


def broken_off(source: Path, out: Path) -> None:
    left = iter(range(2))

    def stop() -> None:
        if next(left, None) is None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(source, out, ScriptedEngine(before_batch=stop))


@pytest.mark.parametrize("noted", [True, False])
def test_a_run_that_goes_on_in_other_words_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, noted: bool
) -> None:
    source, out = write(tmp_path / "in.jsonl", choice_rows(40)), tmp_path / "out"
    broken_off(source, out)
    if noted:
        monkeypatch.setitem(prompts._HOW, "choice", "Which one is it?")
    else:  # by a version that noted nothing
        with sqlite3.connect(out / "run.sqlite") as store:
            store.execute("DELETE FROM meta WHERE name = 'wording'")
    assert SAID not in caplog.text
    run(source, out)
    assert caplog.text.count(SAID) == 1
    caplog.clear()
    run(source, out, beta=0.9)
    assert SAID not in caplog.text


def test_a_run_that_goes_on_in_the_same_words_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = write(tmp_path / "in.jsonl", choice_rows(40)), tmp_path / "out"
    broken_off(source, out)
    with caplog.at_level(logging.WARNING):
        run(source, out)
    assert SAID not in caplog.text


def test_a_finished_run_is_selected_from_again_whatever_would_be_asked_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = write(tmp_path / "in.jsonl", choice_rows(40)), tmp_path / "out"
    run(source, out)
    monkeypatch.setattr(prompts, "_ANSWER", "Solution:")
    run(source, out, beta=0.5)
    assert SAID not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("_ANSWER", "A:"), ("CHECKER_WORDS", (" Y", " N")), ("_IS_IT_CORRECT", "Right? Y or N.")],
)
def test_every_word_counts(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    before = wording(ScriptedEngine())  # type: ignore[arg-type]
    assert wording(ScriptedEngine()) == before  # type: ignore[arg-type]
    monkeypatch.setattr(prompts, name, value)
    assert wording(ScriptedEngine()) != before  # type: ignore[arg-type]


def test_the_chat_template_and_what_ends_a_reply_count() -> None:
    source = find_model(None)
    model = load_causal_lm(source, dtype=torch.float32)
    found = set()
    for change in ("", "template", "ends"):
        tokenizer = load_tokenizer(source)
        if change == "template":
            tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "kind")
        engine = TransformersEngine(EngineConfig(device="cpu"), model=model, tokenizer=tokenizer)
        if change == "ends":
            engine.encoder.ends = engine.encoder.ends | {5}
        found.add(wording(engine))
    assert len(found) == 3


def test_scores_of_other_words_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "in.jsonl", quiz(3)), tmp_path / "scores.jsonl"
    kept = []
    for answer in ("Answer:", "Solution:"):
        monkeypatch.setattr(prompts, "_ANSWER", answer)
        engine = ScriptedEngine()

        def stop(*_: Any) -> Any:
            kept.extend(path.name for path in tmp_path.glob(".*.partial"))
            raise InterruptedError

        engine.score = stop  # type: ignore[method-assign]
        with pytest.raises(InterruptedError):
            score_file(str(source), out, EngineConfig(), engine=engine)  # type: ignore[arg-type]
    assert len(set(kept)) == 2
