"""What the tests of training are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import write


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty choice questions whose answer is the colour that the question names."""
    colours = ["red", "green", "blue"]
    rows = [
        {
            "question": f"What colour? {'The very ' * (n % 5)}{colours[n % 3]} box",
            "options": colours,
            "answer": "ABC"[n % 3],
        }
        for n in range(40)
    ]
    return write(tmp_path / "colours.jsonl", rows)
