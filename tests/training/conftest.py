"""What the tests of training are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty choice questions whose answer is the colour that the question names."""
    path = tmp_path / "colours.jsonl"
    colours = ["red", "green", "blue"]
    with path.open("w") as file:
        for n in range(40):
            row = {
                "question": f"What colour? {'The very ' * (n % 5)}{colours[n % 3]} box",
                "options": colours,
                "answer": "ABC"[n % 3],
            }
            file.write(json.dumps(row) + "\n")
    return path
