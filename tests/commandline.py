"""Running the command line inside the test process, with scripted experts unless told otherwise."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scripted import LetterEmbedder, ScriptedEngine

import robustft.cleaning
import robustft.evaluation
import robustft.methods
import robustft.scoring
from robustft.cli import main

# What stands on stderr beside a result of the default model.
SMALL_MODEL = (
    "robustft: SmolLM2-135M-Instruct is a small model: fine to see how everything works, too weak "
    "for real work. Name a stronger one with --model.\n"
)
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron")


@dataclass(frozen=True)
class Finished:
    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr of a command that refused its input."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("robustft: ")
        assert "Traceback" not in self.err
        assert self.out == ""
        return lines[0]


class CommandLine:
    """`run(...)` is `robustft ...`; `script` replaces the engine of the following runs."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._engine: dict[str, Any] = {}
        asking = robustft.cleaning, robustft.evaluation, robustft.methods, robustft.scoring
        for module in asking:
            patch.setattr(module, "load_engine", lambda *_: ScriptedEngine(**self._engine))
        for module in (robustft.cleaning, robustft.methods):
            patch.setattr(module, "Embedder", lambda _: LetterEmbedder())

    def script(self, **engine: Any) -> None:
        self._engine = engine

    def __call__(self, *arguments: object) -> Finished:
        return call(self._capture, *arguments)

    def refused(self, *arguments: object) -> str:
        """The complaint of a command that must end with status 2."""
        done = self(*arguments)
        assert done.status == 2, done.err
        return done.complaint


def call(capture: pytest.CaptureFixture[str], *arguments: object) -> Finished:
    """Run `robustft ARGUMENTS` in this process."""
    capture.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # --help and --version
        status = int(stop.code or 0)
    return Finished(status, *capture.readouterr())


def quiz(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Multiple-choice rows."""
    rng = random.Random(seed)
    return [
        {
            "id": f"r{i}",
            "question": f"Number {i}: {' '.join(rng.choices(WORDS, k=5))}?",
            "options": ["red", "green", "blue"],
            "answer": rng.choice("ABC"),
        }
        for i in range(count)
    ]


def write(path: Path, rows: Sequence[Any]) -> Path:
    """JSON lines; a row that is bytes already stands as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
