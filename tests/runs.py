"""Corpora with known flaws, and whole runs over them with scripted experts."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commandline import write
from scripted import LetterEmbedder, ScriptedEngine

from robustft.cleaning import run_clean
from robustft.config import CleanConfig, ExpertConfig
from robustft.engines import Prompt
from robustft.opinions import unpack

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "jade")


def choice_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "id": f"r{i}",
            "note": {"kept": [i, None]},
            "question": f"Number {i}: {' '.join(rng.choices(WORDS, k=6))}?",
            "options": ["red", "green", "blue"],
            "answer": rng.choice("ABC"),
        }
        for i in range(count)
    ]


def chat(rows: list[dict[str, Any]], path: Path) -> Path:
    turns = [
        [{"role": "user", "content": r["question"]},
         {"role": "assistant", "content": f"A long answer about {r['answer']} and more words."}]
        for r in rows
    ]  # fmt: skip
    return write(path, [{"messages": messages} for messages in turns])


def run(path: Path, out: Path, engine: ScriptedEngine | None = None, **settings: Any) -> Any:
    settings.setdefault("detector", "paper")
    config = CleanConfig(input=str(path), out=out, experts=ExpertConfig(rounds=2), **settings)
    return run_clean(config, engine=engine or ScriptedEngine(), embedder=LetterEmbedder())  # type: ignore[arg-type]


def all_doubt(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
    """A checker that never believes; the content-free question gets even odds."""
    if candidates == (" Yes", " No"):
        return [0.5, 0.5] if "N/A" in prompt.messages[-1].content else [0.1, 0.9]
    return [0.7] + [0.1] * (len(candidates) - 1)


def all_trust(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
    return list(reversed(all_doubt(prompt, candidates)))


def assert_asked_once(store: Path) -> None:
    """No question of a store was put twice, and every one was paid for."""
    rows = sqlite3.connect(store).execute(
        "SELECT unit, expert, round, opinions, questions FROM batches"
    )
    asked: Counter[tuple[Any, ...]] = Counter()
    questions = 0
    for unit, expert, round_, body, count in rows:
        questions += count
        asked.update((unit, expert, round_, said.row) for said in unpack(body))
    assert asked
    assert set(asked.values()) == {1}
    assert questions == len(asked)


def worded_rows(
    count: int, wrong: float, labels: Sequence[int] = (0, 1, 2), own: int = 5
) -> tuple[list[dict[str, Any]], list[str]]:
    """Questions of five words that tell the label, and the true answers; given ones go wrong.

    labels: what true labels are drawn from. own: how many words are the label's own, the others
    being those of any one label.
    """
    rng = random.Random(0)
    rows, truth = [], []
    for i in range(count):
        label, other = rng.choice(labels), rng.randrange(3)
        near, far = (("zebra zoo", "quick quiz", "happy yarn")[k].split() for k in (label, other))
        words = rng.choices(near, k=own) + rng.choices(far, k=5 - own)
        given = label if rng.random() > wrong else (label + rng.choice((1, 2))) % 3
        truth.append("ABC"[label])
        rows.append({"question": f"{' '.join(words)} {i}", "options": ["x", "y", "z"],
                     "answer": "ABC"[given]})  # fmt: skip
    return rows, truth
