"""200 records cleaned by `clean --dataset-info` with scripted experts."""

from __future__ import annotations

from pathlib import Path

from commandline import quiz, write
from scripted import LetterEmbedder, ScriptedEngine

from robustft.cleaning import run_clean
from robustft.config import CleanConfig

RECORDS = 200


def cleaned_corpus(folder: Path) -> Path:
    """The output folder of the run."""
    config = CleanConfig(
        input=str(write(folder / "noisy.jsonl", quiz(RECORDS))),
        out=folder / "run",
        detector="paper",
        dataset_info=True,
    )
    run_clean(config, engine=ScriptedEngine(), embedder=LetterEmbedder())
    return config.out
